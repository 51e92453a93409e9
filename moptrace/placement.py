"""Where a tensor lives: named axes over the ranks, and one kind of ownership per axis.

The W ranks are numbered ``0 .. W-1``. A *view* is a reshape of ``arange(W)`` with a name for each
axis; several views of the same ranks overlap freely (tokens see ``dp, cp, tp``, experts ``edp,
ep``). A *placement* says, for each axis of one view, how the ranks along that axis hold a tensor:

==============  =============================================  =========================
kind            the ranks along the axis hold                  their gradients are
==============  =============================================  =========================
``Shard(d)``    different slices of dimension ``d``            ``Shard(d)``
``Rows(by)``    different rows of a routed tensor              ``Rows(by)``
``Replicate``   the same value                                 ``Partial``
``Partial``     terms of a sum                                 ``Replicate``
``Invariant``   the same value                                 ``Invariant``
==============  =============================================  =========================

``Replicate`` and ``Invariant`` differ only in their gradients: each rank's use of a replicated
value contributes a term of its gradient, while an invariant value is used alike everywhere and its
gradient is complete on every rank. This is the discipline of ``jax.shard_map`` with varying axes;
every gradient reduction follows from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

__all__ = [
    "INVARIANT",
    "PARTIAL",
    "REPLICATE",
    "Axis",
    "Invariant",
    "Kind",
    "Layout",
    "Partial",
    "Placement",
    "Replicate",
    "Rows",
    "Shard",
    "View",
    "chunk_sizes",
    "gradient_kind",
    "own_blocks",
    "parse_kind",
]


@dataclass(frozen=True, slots=True)
class Shard:
    """The ranks hold consecutive slices of dimension ``dim``, or of each of its ``blocks``.

    With several blocks the dimension is that many equal pieces end to end, each of them split:
    what becomes of a split dimension when others are merged before it, or when several split
    tensors are concatenated along it (DTensor calls it a strided shard).
    """

    dim: int
    blocks: int = 1

    def __str__(self) -> str:
        return f"shard({self.dim})" if self.blocks == 1 else f"shard({self.dim} in {self.blocks})"


@dataclass(frozen=True, slots=True)
class Rows:
    """The ranks hold different token-expert pairs, in dimension 0, as many as routing gives them.

    ``by="token"``: each rank has the pairs of its own tokens. ``by="expert"``: each rank has the
    pairs of its own experts. Within a rank the rows are grouped by expert. ``by="arrival"``: as by
    expert, but still in the order in which the other ranks sent them.
    """

    by: str

    def __str__(self) -> str:
        return f"rows(by {self.by})"


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the value; gradients of its uses are terms of a sum."""

    def __str__(self) -> str:
        return "replicate"


@dataclass(frozen=True, slots=True)
class Invariant:
    """Every rank holds the value and uses it alike; its gradient is the same everywhere."""

    def __str__(self) -> str:
        return "invariant"


@dataclass(frozen=True, slots=True)
class Partial:
    """The value is the sum of what the ranks hold."""

    def __str__(self) -> str:
        return "partial"


Kind: TypeAlias = Shard | Rows | Replicate | Invariant | Partial

REPLICATE, INVARIANT, PARTIAL = Replicate(), Invariant(), Partial()


def gradient_kind(kind: Kind) -> Kind:
    """How the gradient of a value of this kind is held.

    >>> str(gradient_kind(REPLICATE)), str(gradient_kind(Shard(1)))
    ('partial', 'shard(1)')
    """
    match kind:
        case Replicate():
            return PARTIAL
        case Partial():
            return REPLICATE
        case _:
            return kind


def parse_kind(text: str) -> Kind:
    """Read a kind back from its printed form.

    >>> parse_kind("shard(2)") == Shard(2) and parse_kind("rows(by expert)") == Rows("expert")
    True
    """
    simple = {"replicate": REPLICATE, "invariant": INVARIANT, "partial": PARTIAL}
    if text in simple:
        return simple[text]
    if found := re.fullmatch(r"shard\((\d+)(?: in (\d+))?\)", text):
        return Shard(int(found[1]), int(found[2] or 1))
    if found := re.fullmatch(r"rows\(by (token|expert|arrival)\)", text):
        return Rows(found[1])
    raise ValueError(f"{text!r} is not a kind of placement")


@dataclass(frozen=True, slots=True)
class Axis:
    """A named dimension of a view, with its number of ranks."""

    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.name}={self.size}"


@dataclass(frozen=True, slots=True)
class View:
    """A reshape of ``arange(W)``: its axes from the slowest to the fastest varying rank."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def size(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    def index(self, axis: str) -> int:
        return [a.name for a in self.axes].index(axis)

    def spans(self) -> Iterator[tuple[int, int]]:
        """For each axis the steps between its ranks: from one to the next, and past the last.

        >>> list(View("experts", (Axis("edp", 2), Axis("ep", 4))).spans())
        [(4, 8), (1, 4)]
        """
        outer = self.size
        for axis in self.axes:
            yield outer // axis.size, outer
            outer //= axis.size

    def coordinate(self, rank: int, axis: str) -> int:
        """The position of ``rank`` along ``axis``."""
        at = self.index(axis)
        inner = math.prod(a.size for a in self.axes[at + 1 :])
        return rank // inner % self.axes[at].size

    def groups(self, axis: str) -> list[list[int]]:
        """The ranks that differ only along ``axis``, one list per sub-group.

        >>> View("experts", (Axis("edp", 2), Axis("ep", 2))).groups("edp")
        [[0, 2], [1, 3]]
        """
        at = self.index(axis)
        size, inner = self.axes[at].size, math.prod(a.size for a in self.axes[at + 1 :])
        starts = [r for r in range(self.size) if r // inner % size == 0]
        return [[start + i * inner for i in range(size)] for start in starts]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.axes))})"


@dataclass(frozen=True, slots=True)
class Placement:
    """How the ranks of one view hold a tensor: one kind for each axis of the view."""

    view: View
    kinds: tuple[Kind, ...]

    def __post_init__(self) -> None:
        if len(self.kinds) != len(self.view.axes):
            raise ValueError(f"{self.view} needs {len(self.view.axes)} kinds, got {self.kinds}")

    @classmethod
    def uniform(cls, view: View, kind: Kind) -> Placement:
        """The same kind on every axis of ``view``."""
        return cls(view, (kind,) * len(view.axes))

    def kind(self, axis: str) -> Kind:
        return self.kinds[self.view.index(axis)]

    def with_kind(self, axis: str, kind: Kind) -> Placement:
        at = self.view.index(axis)
        return Placement(self.view, (*self.kinds[:at], kind, *self.kinds[at + 1 :]))

    def axes_of_dim(self, dim: int) -> tuple[Axis, ...]:
        """The axes that split dimension ``dim``, slowest first."""
        pairs = zip(self.view.axes, self.kinds, strict=True)
        return tuple(a for a, kind in pairs if isinstance(kind, Shard) and kind.dim == dim)

    def expressed_in(self, view: View) -> Placement | None:
        """The same ownership in the words of another view of the ranks, if it has such words.

        An axis there may take the place of several here, or of a part of one: it needs one kind
        for all the ranks that it spans.

        >>> tokens = View("tokens", (Axis("dp", 4), Axis("tp", 2)))
        >>> experts = View("experts", (Axis("edp", 2), Axis("ep", 4)))
        >>> print(Placement(tokens, (Shard(0), Shard(0))).expressed_in(experts))
        edp: shard(0), ep: shard(0)
        >>> print(Placement(tokens, (Shard(0), REPLICATE)).expressed_in(experts))
        None
        """
        if self.view == view:
            return self
        spans = zip(self.view.spans(), self.kinds, strict=True)
        own = [(span, kind) for span, kind in spans if span[0] < span[1]]  # of several ranks
        kinds: list[Kind] = []
        for low, high in view.spans():
            alike = {kind for (first, past), kind in own if first < high and low < past}
            if len(alike) > 1:
                return None
            kinds.append(alike.pop() if alike else self._of_one_rank())
        return Placement(view, tuple(kinds))

    def _of_one_rank(self) -> Kind:
        """The kind along an axis of one rank, where each says the same."""
        alike = {k for k, axis in zip(self.kinds, self.view.axes, strict=True) if axis.size > 1}
        return alike.pop() if len(alike) == 1 else self.kinds[0]

    def __str__(self) -> str:
        pairs = zip(self.view.axes, self.kinds, strict=True)
        return ", ".join(f"{axis.name}: {kind}" for axis, kind in pairs)


def own_blocks(placement: Placement, axis: str) -> int | None:
    """The blocks of the dimension that ``axis`` splits, as a rank finds them in its own part.

    Slices along an inner axis are slices of the outer axis's slice, so an outer split cannot change
    while an inner one stays, unless the outer one splits what each inner rank holds: each of the
    inner axis's slices, as blocks. None where an inner split is in the way.

    >>> view = View("tokens", (Axis("cp", 2), Axis("tp", 4)))
    >>> own_blocks(Placement(view, (Shard(1, blocks=4), Shard(1))), "cp")
    1
    >>> print(own_blocks(Placement(view, (Shard(1), Shard(1))), "cp"))
    None
    """
    kind = placement.kind(axis)
    assert isinstance(kind, Shard)
    blocks = kind.blocks
    at = placement.view.index(axis)
    inner = zip(placement.view.axes[at + 1 :], placement.kinds[at + 1 :], strict=True)
    beside = [(a.size, k) for a, k in inner if isinstance(k, Shard) and k.dim == kind.dim]
    inside = [(size, k) for size, k in beside if size > 1]
    if not inside:
        return blocks
    own = inside[0][1].blocks
    parts = math.prod(size for size, _ in inside)
    alike = all(k.blocks == own for _, k in inside)
    return own if alike and blocks == own * parts else None


def chunk_sizes(size: int, parts: Sequence[int]) -> tuple[int, ...]:
    """The lengths of the slices when ``size`` elements are split over nested axes.

    Each axis splits as ``torch.chunk`` and ``DTensor`` do: equal slices of the rounded-up length,
    the last ones shorter or empty.

    >>> chunk_sizes(10, (4,)), chunk_sizes(10, (2, 3)), chunk_sizes(2, (4,))
    ((3, 3, 3, 1), (2, 2, 1, 2, 2, 1), (1, 1, 0, 0))
    """
    sizes = (size,)
    for part in parts:
        sizes = tuple(piece for whole in sizes for piece in _chunks(whole, part))
    return sizes


def _chunks(size: int, parts: int) -> Iterable[int]:
    step = -(-size // parts)
    for _ in range(parts):
        piece = min(step, size)
        size -= piece
        yield piece


@dataclass(frozen=True)
class Layout:
    """The views in which a program sees its ranks; ``Layout.of`` makes them.

    ``home`` has all ranks on one axis: what all views say alike is said there. ``tokens`` is the
    view of activations: sequences are split over ``dp``, and the tokens of each over ``cp`` and
    ``tp``; where weights are split over ``tp`` too, tokens are gathered there. ``dense`` is the
    view of dense weights between their uses, ``tensor`` that of those which are split over ``tp``
    also in use, ``vocabulary`` that of the weights that have a row for each word, ``experts`` that
    of the experts. ``storage`` is cut finely enough for all of them, so that every parameter is a
    ``DTensor`` on one mesh and optimizers and norms see a single one.

    Pipeline stages, if there are any, have these views each of their own ranks; ``layers`` are the
    numbers of layers that they have.
    """

    home: View
    tokens: View
    dense: View
    tensor: View
    vocabulary: View
    experts: View
    storage: View
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len({view.size for view in self.views}) != 1:
            raise ValueError(f"{self} are not views of the same ranks")

    @classmethod
    def of(
        cls,
        world_size: int,
        ep: int = 1,
        cp: int = 1,
        *,
        tp: int = 1,
        etp: int = 1,
        vp: int | None = None,
        dp_replicate: int = 1,
    ) -> Layout:
        """Sub-groups of ``ep * etp``, ``etp``, ``cp * tp``, ``tp`` and ``vp`` consecutive ranks.

        Tokens and experts see independent reshapes of the ranks (Liu et al., MoE Parallel Folding,
        2025, listing 1).

        >>> print(Layout.of(8, ep=4, cp=2, tp=2))
        home(world=8) tokens(dp=2, cp=2, tp=2) tensor(fsdp=4, tp=2) experts(edp=2, ep=4)
        >>> print(Layout.of(8, ep=2, etp=2))
        home(dp=8) experts(edp=2, ep=2, etp=2)
        """
        vp = vp or world_size
        sizes = {"vp": vp, "cp": cp, "tp": tp, "dp_replicate": dp_replicate, "ep": ep, "etp": etp}
        for name, size in sizes.items():
            if size < 1 or world_size % size:
                raise ValueError(f"{name}={size} does not divide {world_size} ranks")
        rest = world_size // tp
        if rest % cp or rest % dp_replicate or world_size % (ep * etp):
            raise ValueError(f"{sizes} do not divide {world_size} ranks")

        def view(name: str, **axes: int) -> View:
            first, *others = axes.items()
            kept = [first, *((axis, size) for axis, size in others if size > 1)]
            return View(name, tuple(Axis(*axis) for axis in kept))

        home = tokens = view("home", dp=world_size)
        if cp * tp > 1:
            home = view("home", world=world_size)
            tokens = view("tokens", dp=rest // cp, cp=cp, tp=tp)
        dense = halves = home
        if dp_replicate > 1:
            dense = halves = view(
                "dense", dp_replicate=dp_replicate, dp_shard=world_size // dp_replicate
            )
        if tp > 1:
            fsdp = Axis("fsdp", rest // dp_replicate)
            halves = View("tensor", (*dense.axes[: dp_replicate > 1], fsdp, Axis("tp", tp)))
        words = home
        if vp < world_size:
            words = View("vocabulary", (Axis("vdp", world_size // vp), Axis("vp", vp)))
        shared = (Axis("edp", world_size // (ep * etp)), Axis("ep", ep), Axis("etp", etp))
        experts = View("experts", shared if etp > 1 else shared[:2])
        storage = _refined(experts, dense, halves, words)
        return cls(home, tokens, dense, halves, words, experts, storage)

    @property
    def world_size(self) -> int:
        """The ranks of a stage: all of them, if there is one."""
        return self.home.size

    @property
    def stages(self) -> int:
        return len(self.layers) or 1

    @cached_property
    def views(self) -> tuple[View, ...]:
        """The distinct views in which programs speak, those of fewer axes first."""
        weights = (self.dense, self.tensor, self.vocabulary, self.experts)
        return tuple(dict.fromkeys((self.home, self.tokens, *weights)))

    @cached_property
    def _view_of_axis(self) -> dict[str, View]:
        return {axis.name: view for view in reversed(self.views) for axis in view.axes}

    def view_of(self, axis: str) -> View:
        """The view of an axis; the tokens' where several have it."""
        return self._view_of_axis[axis]

    def spanning(self, view: View, axes: Sequence[str]) -> str | None:
        """The axis, of any view, along which the ranks are that differ along these axes of one.

        >>> layout = Layout.of(8, cp=2, tp=2, vp=4)
        >>> layout.spanning(layout.tokens, ["cp", "tp"])
        'vp'
        """
        if len(axes) == 1:
            return axes[0]
        spans = dict(zip((axis.name for axis in view.axes), view.spans(), strict=True))
        low, high = min(spans[a][0] for a in axes), max(spans[a][1] for a in axes)
        if math.prod(self.size(axis) for axis in axes) * low != high:
            return None
        named = ((v, a) for v in self.views for a in zip(v.spans(), v.axes, strict=True))
        return next((axis.name for _, (span, axis) in named if span == (low, high)), None)

    def said_along(self, placement: Placement, axis: str) -> Placement | None:
        """The placement in a view that has ``axis``, if one can say it."""
        views = [v for v in self.views if any(a.name == axis for a in v.axes)]
        said = (placement.expressed_in(view) for view in views)
        return next((found for found in said if found is not None), None)

    def common_view(self, placements: Iterable[Placement]) -> View:
        """The view for an operator on values so placed: that of fewest axes which can say them all.

        If none can, that of its tokens, if it has any: the other values are moved there.

        >>> layout = Layout.of(4, ep=2)
        >>> rows, weight = Placement.uniform(layout.home, Shard(0)), (Shard(1), Shard(0))
        >>> print(layout.common_view([rows, Placement(layout.experts, weight)]))
        experts(edp=2, ep=2)
        """
        said = list(placements)
        present = {placement.view for placement in said} - {self.home}
        order = (self.tokens, self.vocabulary, self.experts, self.tensor, self.dense)
        views = [view for view in order if view in present]
        for view in sorted((*views, self.home), key=lambda view: len(view.axes)):
            if all(placement.expressed_in(view) for placement in said):
                return view
        return views[0]

    def size(self, axis: str) -> int:
        view = self.view_of(axis)
        return view.axes[view.index(axis)].size

    def sizes(self, length: int, axis: str) -> tuple[int, ...]:
        """The slice of a dimension of ``length`` that each rank along ``axis`` holds.

        An axis that storage cuts more finely splits in that nested order, so that a parameter's
        shards are those of its ``DTensor``.
        """
        return chunk_sizes(length, self._cuts[axis])

    @cached_property
    def _cuts(self) -> dict[str, tuple[int, ...]]:
        """For each axis the sizes of the axes of storage that it spans."""
        fine = list(zip(self.storage.spans(), self.storage.axes, strict=True))
        cuts: dict[str, tuple[int, ...]] = {}
        for view in self.views:
            for (low, high), axis in zip(view.spans(), view.axes, strict=True):
                inside = tuple(a.size for (i, j), a in fine if low <= i and j <= high)
                cuts[axis.name] = inside if math.prod(inside) == axis.size else (axis.size,)
        return cuts

    def normalised(self, placement: Placement) -> Placement:
        """The placement in the home view where it can be said there, else in one of programs."""
        said = (placement.expressed_in(view) for view in (self.home, placement.view, *self.views))
        allowed = (found for found in said if found is not None and found.view in self.views)
        return next(allowed, placement)

    def __str__(self) -> str:
        views = " ".join(str(view) for view in self.views)
        if not self.layers:
            return views
        return f"stages({' + '.join(map(str, self.layers))} layers) of {views}"


def _refined(*views: View) -> View:
    """The first view, cut further wherever one of the others has a border between axes.

    A view whose borders do not nest with those that are there is left out: what is held in it must
    be stored alike on all axes.

    >>> experts, dense = (View("", (Axis("a", 8 // n), Axis("b", n))) for n in (4, 2))
    >>> print(_refined(experts, dense))
    storage(a=2, b_0=2, b_1=2)
    """
    first, *others = views
    borders = {low for low, _ in first.spans()}
    for view in others:
        wider = sorted(borders | {low for low, _ in view.spans()})
        if all(b % a == 0 for a, b in pairwise((*wider, first.size))):
            borders = set(wider)
    axes: list[Axis] = []
    for (low, high), axis in zip(first.spans(), first.axes, strict=True):
        cuts = sorted((b for b in borders if low < b < high), reverse=True)
        edges = [high, *cuts, low]
        sizes = [outer // inner for outer, inner in pairwise(edges)]
        names = [axis.name] if not cuts else [f"{axis.name}_{i}" for i in range(len(sizes))]
        axes += [Axis(*pair) for pair in zip(names, sizes, strict=True)]
    return View("storage", tuple(axes))
