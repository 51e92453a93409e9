"""Where a tensor lives: named axes over the ranks, and one kind of ownership per axis.

The W ranks are numbered ``0 .. W-1``. A *view* is a reshape of ``arange(W)`` with a name for each
axis; several views of the same ranks overlap freely (tokens see ``dp, cp``, experts ``edp, ep``).
A *placement* says, for each axis of one view, how the ranks along that axis hold a tensor:

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
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

        Only a placement that treats all ranks alike can change views for nothing: a dimension
        that is split over all ranks in their order is the same split in every view.

        >>> tokens = View("tokens", (Axis("dp", 4),))
        >>> experts = View("experts", (Axis("edp", 2), Axis("ep", 2)))
        >>> print(Placement(tokens, (Shard(0),)).expressed_in(experts))
        edp: shard(0), ep: shard(0)
        """
        if self.view == view:
            return self
        alike = {
            kind for kind, axis in zip(self.kinds, self.view.axes, strict=True) if axis.size > 1
        }
        if len(alike) > 1:
            return None
        return Placement.uniform(view, alike.pop() if alike else self.kinds[0])

    def __str__(self) -> str:
        pairs = zip(self.view.axes, self.kinds, strict=True)
        return ", ".join(f"{axis.name}: {kind}" for axis, kind in pairs)


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
    """The views in which a program sees its ranks.

    ``tokens`` is the view of activations: sequences are split over ``dp``, and the tokens of each
    over ``cp``. ``experts`` is the view of the experts and of parameter storage: every parameter is
    a ``DTensor`` on this one mesh, so optimizers and norms see a single mesh. ``home`` has all
    ranks on one axis: what all views say alike is said there. Without ``cp`` it is ``tokens``.
    """

    home: View
    tokens: View
    experts: View

    def __post_init__(self) -> None:
        if not self.home.size == self.tokens.size == self.experts.size:
            raise ValueError(f"{self} are not views of the same ranks")

    @classmethod
    def of(cls, world_size: int, ep: int = 1, cp: int = 1) -> Layout:
        """Experts over sub-groups of ``ep`` consecutive ranks, each sequence over ``cp``."""
        for name, size in (("ep", ep), ("cp", cp)):
            if size < 1 or world_size % size:
                raise ValueError(f"{name}={size} does not divide {world_size} ranks")
        home = tokens = View("home", (Axis("dp", world_size),))
        if cp > 1:
            home = View("home", (Axis("world", world_size),))
            tokens = View("tokens", (Axis("dp", world_size // cp), Axis("cp", cp)))
        experts = View("experts", (Axis("edp", world_size // ep), Axis("ep", ep)))
        return cls(home, tokens, experts)

    @property
    def world_size(self) -> int:
        return self.home.size

    @property
    def views(self) -> tuple[View, ...]:
        """The distinct views."""
        return tuple(dict.fromkeys((self.home, self.tokens, self.experts)))

    @cached_property
    def _view_of_axis(self) -> dict[str, View]:
        return {axis.name: view for view in self.views for axis in view.axes}

    def view_of(self, axis: str) -> View:
        return self._view_of_axis[axis]

    def size(self, axis: str) -> int:
        view = self.view_of(axis)
        return view.axes[view.index(axis)].size

    def sizes(self, length: int, axis: str) -> tuple[int, ...]:
        """The slice of a dimension of ``length`` that each rank along ``axis`` holds.

        The axis over all ranks splits in the nested order of parameter storage, so that a
        parameter's shards are those of its ``DTensor``.
        """
        if self.view_of(axis) is self.home:
            return chunk_sizes(length, [a.size for a in self.experts.axes])
        return chunk_sizes(length, (self.size(axis),))

    def normalised(self, placement: Placement) -> Placement:
        """The placement in the home view where it can be said there."""
        return placement.expressed_in(self.home) or placement

    def __str__(self) -> str:
        return " ".join(str(view) for view in self.views)
