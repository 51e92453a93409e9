"""What the rows of a tensor stand for: an abstract interpretation of routing.

Mixture-of-Experts code moves rows around with integers. Whatever its style, it can be read in one
small vocabulary. An *axis* is something that a dimension counts: a model's tokens, the ``k`` slots
of a token, the experts, the pairs (token, slot) sorted by expert, or the pairs of one expert. A
dimension carries a tuple of axes (a flattened ``[N, k]`` carries both), or none: then it is a
feature. A value that matters means one of:

``Index``   integers: a map from its own axes to coordinates in other axes
``Rows``    a value that depends on routing axes; ``on`` and ``off`` are its constant values at
            selected and other (token, expert) pairs where they are known
``Sum``     rows that are collected expert by expert, by ``index_add`` and its like
``Counts``  pairs for each expert, or their running totals
``Span``    a number: how many pairs the experts ``start .. stop-1`` have

All else is *opaque*. Rules are small functions, one for each kind of operator, in ``RULES``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import roles

__all__ = [
    "RESHAPES",
    "Axis",
    "Contraction",
    "Counts",
    "Dims",
    "Domains",
    "Index",
    "Position",
    "Routing",
    "Rows",
    "Space",
    "Span",
    "Sum",
    "argument",
    "carried",
    "contraction",
    "is_pointwise",
    "kinds",
    "packet",
    "permutation",
    "positions",
    "reshaped",
    "shape",
    "substituted",
    "tensors",
    "unified",
]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Axis:
    """Something a dimension counts; ``of`` tells axes of one kind apart."""

    kind: str  # token, slot, expert, sorted, branch, range
    size: int | None
    of: Any
    expert: int | None = None


Space = tuple[Axis, ...]
Dims = tuple[Space, ...]


@dataclass(eq=False)
class Routing:
    """One choice of experts: ``ids`` are integers over ``tokens`` and ``slot`` axes."""

    ids: fx.Node
    tokens: Space
    slot: Space
    certain: bool  # the result of a top-k or argmax; else integers that may choose experts
    experts: int | None = None

    @property
    def pairs(self) -> Space:
        return (*self.tokens, *self.slot)

    @property
    def expert(self) -> Axis:
        return Axis("expert", None, self)

    @property
    def k(self) -> int:
        return math.prod(a.size or 1 for a in self.slot)

    @property
    def distinct(self) -> bool:
        """Whether the slots of a token are known to hold different experts."""
        return self.certain or not self.slot


@dataclass(frozen=True)
class Index:
    dims: Dims
    to: Space
    routing: Routing | None = None


@dataclass(frozen=True)
class Rows:
    dims: Dims
    routing: Routing
    on: Any = None
    off: Any = None
    expert: int | None = None
    done: bool = False  # the experts' results are summed: a value for each token

    @property
    def total(self) -> bool:
        """Whether the value is complete: one for each token, whatever its experts are."""
        return self.done or (
            self.expert is None and kinds(self.dims) == {"token"} and self.routing.k == 1
        )


@dataclass(frozen=True)
class Sum(Rows):
    """``rows`` of ``expert_added`` (all experts if None) are added to ``previous``."""

    base: fx.Node | None = None
    previous: Sum | None = None
    rows: fx.Node | None = None
    rows_dims: Dims = ()
    added: int | None = None

    @property
    def pieces(self) -> list[tuple[int | None, fx.Node, Dims]]:
        found: list[tuple[int | None, fx.Node, Dims]] = []
        step: Sum | None = self
        while step is not None:
            assert step.rows is not None
            found.append((step.added, step.rows, step.rows_dims))
            step = step.previous
        return found[::-1]


@dataclass(frozen=True)
class Counts:
    routing: Routing
    running: bool = False


@dataclass(frozen=True)
class Span:
    routing: Routing | None
    start: int
    stop: int


@dataclass(frozen=True)
class Position:
    """The place of each pair in its expert's queue: what a capacity is compared with."""


Meaning = Any  # Index | Rows | Counts | Span | Position | tuple of these | None


# ---- Reading nodes -------------------------------------------------------------------------------


_ALIASES = {aten.concat: aten.cat, aten.concatenate: aten.cat}


def packet(node: fx.Node) -> Any:
    """The operator without its overload."""
    found = getattr(node.target, "overloadpacket", node.target)
    return _ALIASES.get(found, found)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor; the name of a size that depends on routing, which compares safely."""
    value = roles.value(node)
    if isinstance(value, tuple | list):
        value = value[0]
    if not isinstance(value, Tensor):
        return ()
    return tuple(n if isinstance(n, int) else str(n) for n in value.shape)


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor operands in argument order, repeats included."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [x for x in leaves if isinstance(x, fx.Node) and isinstance(roles.value(x), Tensor)]


_ALSO_POINTWISE = {
    aten._to_copy, aten.to, aten.contiguous, aten.alias, aten.detach, aten.dropout,
    aten.floor_divide, aten.lift_fresh_copy, aten.where, aten.masked_fill, aten.hardswish,
    aten.log_sigmoid, aten.type_as, aten.div, aten.pow, aten.feature_dropout,
}  # fmt: skip


def is_pointwise(node: fx.Node) -> bool:
    """Element by element, with broadcasting."""
    if packet(node) is aten.where and len(node.args) == 1:
        return False
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or (
        packet(node) in _ALSO_POINTWISE
    )


def kinds(dims: Dims) -> set[str]:
    return {axis.kind for space in dims for axis in space}


def carried(dims: Dims) -> set[Axis]:
    return {axis for space in dims for axis in space}


def _aligned(dims: Dims, rank: int) -> Dims:
    return ((),) * (rank - len(dims)) + dims


# ---- How dimensions move -------------------------------------------------------------------------


def reshaped(before: Sequence[Any], dims: Dims, after: Sequence[Any]) -> Dims | None:
    """The axes of the dimensions after a reshape; None if an axis would be torn or mixed.

    >>> token, slot = Axis("token", 5, 0), Axis("slot", 2, 0)
    >>> reshaped((5, 2, 8), ((token,), (slot,), ()), (10, 8)) == ((token, slot), ())
    True
    """
    atoms: list[tuple[Axis | None, Any]] = []
    for size, space in zip(before, dims, strict=True):
        if len(space) == 1:
            atoms.append((space[0], size))
        elif space:
            atoms.extend((axis, axis.size) for axis in space)
        elif not _is_one(size):
            atoms.append((None, size))
    atoms.reverse()
    result: list[Space] = []
    for size in after:
        space: list[Axis] = []
        features, have = False, 1
        while not _is_one(size) and not (isinstance(size, int) and have == size):
            if not atoms:
                return None
            axis, length = atoms.pop()
            if axis is None:
                features = True
                if isinstance(length, int) and isinstance(size, int):
                    if have * length > size:
                        if size % have or length % (size // have):
                            return None
                        atoms.append((None, length // (size // have)))
                        length = size // have
                    have *= length
                    continue
                break
            space.append(axis)
            if not (isinstance(length, int) and isinstance(size, int)):
                break
            have *= length
            if have > size:
                return None
        if space and features:
            return None
        result.append(tuple(space))
    return None if atoms else tuple(result)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


RESHAPES = {
    aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten,
    aten.unflatten, aten._reshape_alias, aten.view_as, aten.reshape_as,
}  # fmt: skip


def permutation(node: fx.Node) -> list[int] | None:
    """For an operator that reorders dimensions, the operand's dimension of each result's."""
    rank = len(shape(node))
    order = list(range(rank))
    match packet(node):
        case aten.permute:
            return [int(d) % rank for d in argument(node, 1, "dims")]
        case aten.transpose | aten.swapaxes | aten.swapdims:
            a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
            return order
        case aten.t | aten.numpy_T | aten.mT | aten.adjoint | aten.matrix_H:
            return [*order[:-2], *reversed(order[-2:])]
    return None


# Operators that treat each position of all but some dimensions alike: the place of ``dim`` among
# their arguments, and what happens to it.
_ALONG: dict[Any, tuple[int, str]] = {
    aten.softmax: (1, "keep"), aten._softmax: (1, "keep"), aten.log_softmax: (1, "keep"),
    aten.cumsum: (1, "keep"), aten.cumprod: (1, "keep"), aten.flip: (1, "keep"),
    aten.roll: (2, "keep"), aten.sum: (1, "reduce"), aten.mean: (1, "reduce"),
    aten.amax: (1, "reduce"), aten.amin: (1, "reduce"), aten.var: (1, "reduce"),
    aten.std: (1, "reduce"), aten.prod: (1, "reduce"), aten.logsumexp: (1, "reduce"),
    aten.any: (1, "reduce"), aten.all: (1, "reduce"), aten.linalg_vector_norm: (2, "reduce"),
    aten.norm: (2, "reduce"), aten.split: (2, "keep"), aten.chunk: (2, "keep"),
    aten.split_with_sizes: (2, "keep"), aten.slice: (1, "keep"), aten.select: (1, "drop"),
    aten.unbind: (1, "drop"), aten.cat: (1, "keep"), aten.stack: (1, "add"), aten.glu: (1, "keep"),
    aten.narrow: (1, "keep"),
}  # fmt: skip
_DEFAULT_DIM = {
    aten.slice: 0, aten.select: 0, aten.unbind: 0, aten.cat: 0, aten.stack: 0, aten.split: 0,
    aten.chunk: 0, aten.split_with_sizes: 0, aten.glu: -1,
}  # fmt: skip
_TRAILING = {aten.layer_norm: 1, aten.rms_norm: 1, aten._fused_rms_norm: 1, aten.native_layer_norm: 1}


@dataclass(frozen=True)
class Along:
    """Which dimensions an operator mixes: numbers of operand dimensions (of the result's if added).

    ``kept`` gives for each result dimension its operand dimension, None if it is added.
    """

    mixed: tuple[int, ...]
    kept: tuple[int | None, ...]
    place: int | None


def positions(node: fx.Node) -> Along | None:
    """How a softmax, reduction, split, slice, cat, norm... treats dimensions; None for others."""
    operator_ = packet(node)
    operands = tensors(node)
    if not operands:
        return None
    rank = len(shape(operands[0]))
    if operator_ in _TRAILING:
        count = len(argument(node, 1, "normalized_shape"))
        return Along(tuple(range(rank - count, rank)), tuple(range(rank)), None)
    if operator_ not in _ALONG:
        return None
    place, effect = _ALONG[operator_]
    dim = argument(node, place, "dim", _DEFAULT_DIM.get(operator_))
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    if effect == "add":
        added = dims[0] % (rank + 1)
        kept = [*range(added), None, *range(added, rank)]
        return Along((added,), tuple(kept), place)
    mixed = tuple(d % rank for d in dims)
    removed = set(mixed) if effect == "drop" else set()
    if effect == "reduce" and len(shape(node)) < rank:
        removed = set(mixed)
    return Along(mixed, tuple(d for d in range(rank) if d not in removed), place)


@dataclass(frozen=True)
class Contraction:
    """A product of tensors that is summed over letters that the result lacks, as in einsum."""

    operands: tuple[fx.Node, ...]
    letters: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    bias: fx.Node | None = None
    grouped: str | None = None  # the letter that only the weight of a grouped product carries


def _letters(text: str) -> tuple[str, ...]:
    return tuple(text)


def _batch(rank: int) -> tuple[str, ...]:
    return tuple(f"b{i}" for i in range(rank))


def contraction(node: fx.Node) -> Contraction | None:
    """Read linear, matmul, einsum and their like as one notation; None for other operators."""
    args: Any = node.args
    match packet(node):
        case aten.linear:
            lead = _batch(len(shape(args[0])) - 1)
            bias = argument(node, 2, "bias")
            return Contraction((args[0], args[1]), ((*lead, "k"), ("n", "k")), (*lead, "n"), bias)
        case aten.mm:
            return Contraction((args[0], args[1]), (("m", "k"), ("k", "n")), ("m", "n"))
        case aten.bmm:
            return Contraction(
                (args[0], args[1]), (("b", "m", "k"), ("b", "k", "n")), ("b", "m", "n")
            )
        case aten.addmm | aten.baddbmm if not node.kwargs:
            lead = ("b",) if packet(node) is aten.baddbmm else ()
            letters = ((*lead, "m", "k"), (*lead, "k", "n"))
            return Contraction((args[1], args[2]), letters, (*lead, "m", "n"), args[0])
        case aten.matmul:
            a, b = len(shape(args[0])), len(shape(args[1]))
            batch = _batch(max(a, b, 2) - 2)
            left = ("k",) if a == 1 else (*batch[len(batch) - (a - 2) :], "m", "k")
            right = ("k",) if b == 1 else (*batch[len(batch) - (b - 2) :], "k", "n")
            result = (*batch, *(("m",) if a > 1 else ()), *(("n",) if b > 1 else ()))
            return Contraction((args[0], args[1]), (left, right), result)
        case aten.einsum:
            equation = str(args[0]).replace(" ", "")
            if "..." in equation:
                return None
            sides = equation.split("->")
            letters = tuple(_letters(side) for side in sides[0].split(","))
            if len(sides) == 1:
                once = sorted(c for c in set("".join(sides[0].split(","))) if equation.count(c) == 1)
                sides.append("".join(once))
            if any(len(set(side)) < len(side) for side in letters):
                return None
            return Contraction(tuple(args[1]), letters, _letters(sides[1]))
    if node.target is torch.ops.moptrace.grouped_mm.default:
        letters = (("s", "k"), ("e", "k", "n"))
        return Contraction((args[0], args[1]), letters, ("s", "n"), grouped="e")
    return None


# ---- The interpretation --------------------------------------------------------------------------


_PRODUCTS = {
    aten.linear, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.matmul, aten.einsum, aten.one_hot,
}  # fmt: skip


@dataclass
class Domains:
    """The meaning of every node of a graph, and where code that selects experts was not understood.

    ``refusals`` gives for each such node the reason; it is an error only where the node is still
    needed after every block was rewritten.
    """

    meaning: dict[fx.Node, Meaning] = field(default_factory=dict)
    refusals: dict[fx.Node, str] = field(default_factory=dict)
    routings: dict[fx.Node, Routing] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: fx.Graph) -> Domains:
        domains = cls()
        for node in graph.nodes:
            if node.op == "call_function":
                meaning = domains._interpret(node)
                if meaning is not None:
                    domains.meaning[node] = meaning
        return domains

    def _interpret(self, node: fx.Node) -> Meaning:
        rule = RULES.get(packet(node))
        if rule is not None:
            return rule(self, node)
        # The table of operators has all that can start a meaning: nothing comes from nothing.
        if not any(n in self.meaning for n in node.all_input_nodes):
            return None
        if packet(node) not in _PRODUCTS and any(
            isinstance(self.meaning.get(n), Position) for n in node.all_input_nodes
        ):
            return Position()
        if packet(node) in RESHAPES:
            return reshape_rule(self, node)
        if is_pointwise(node):
            return pointwise_rule(self, node)
        if (order := permutation(node)) is not None:
            return permute_rule(self, node, order)
        if (product := contraction(node)) is not None:
            return contraction_rule(self, node, product)
        if (along := positions(node)) is not None:
            return along_rule(self, node, along)
        return self.refuse(node, f"{_op(node)} is not known to treat each row alike")

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Note why an operator on rows of experts was not understood; its result is opaque."""
        for operand in node.all_input_nodes:
            meaning = self.meaning.get(operand)
            if isinstance(meaning, Rows) and kinds(meaning.dims) & {"sorted", "branch"}:
                self.refusals[node] = reason
                return

    def maps(self, node: fx.Node) -> tuple[int, list[Index]] | None:
        """The first indexed dimension and the index maps of a gather, None if it has no meaning."""
        if packet(node) is aten.index:
            return _indices(self, node)
        if packet(node) is aten.gather:
            index = self.index(node.args[2])
            return index and (0, [replace(index, dims=index.dims[:1])])
        at = 2 if packet(node) is aten.index_select else 1
        first = int(node.args[1]) if at == 2 else 0  # type: ignore[arg-type]
        index = self.index(node.args[at])
        return index and (first % len(shape(node.args[0])), [index])  # type: ignore[arg-type]

    def rows(self, node: Any) -> Rows | None:
        meaning = self.meaning.get(node) if isinstance(node, fx.Node) else None
        return meaning if isinstance(meaning, Rows) and not meaning.done else None

    def index(self, node: Any) -> Index | None:
        """The meaning of an integer tensor; integers of unknown origin may be a choice of experts."""
        meaning = self.meaning.get(node) if isinstance(node, fx.Node) else None
        return meaning if isinstance(meaning, Index) else None

    def choice(self, node: Any) -> Index | None:
        """Like ``index``, and an opaque integer tensor is taken for a choice of experts."""
        if not isinstance(node, fx.Node) or node in self.meaning:
            return self.index(node)
        value = roles.value(node)
        if not isinstance(value, Tensor) or value.dtype not in _INTEGERS or not value.dim():
            return None
        if packet(node) in RESHAPES | _CASTS and self.choice(node.args[0]) is not None:
            self.meaning[node] = self._interpret(node)
            return self.index(node)
        lead = value.dim() if value.dim() == 1 else value.dim() - 1
        self.meaning[node] = chosen = self.chosen(node, lead)
        return chosen

    def chosen(
        self, node: fx.Node, lead: int, *, experts: int | None = None, certain: bool = False
    ) -> Index:
        """Take ``node`` for ids of experts over ``lead`` token dimensions and the slots after them."""
        if node not in self.routings:
            sizes = shape(node)
            tokens = tuple(Axis("token", n, (node, i)) for i, n in enumerate(sizes[:lead]))
            slots = tuple(Axis("slot", n, (node, i)) for i, n in enumerate(sizes[lead:]))
            seen = [tuple(a for a in axes if a.size != 1) for axes in (tokens, slots)]
            self.routings[node] = Routing(node, seen[0], seen[1], certain, experts)
        routing = self.routings[node]
        axes = {a.of[1] + (lead if a.kind == "slot" else 0): a for a in routing.pairs}
        dims = tuple((axes[d],) if d in axes else () for d in range(len(shape(node))))
        return Index(dims, (routing.expert,), routing)


_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.uint8}
Rule = Callable[[Domains, fx.Node], Meaning]


def _op(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.")


def _literal(value: Any) -> bool:
    return isinstance(value, int | float | bool)


# ---- Sources of meaning --------------------------------------------------------------------------


def topk_rule(domains: Domains, node: fx.Node) -> Meaning:
    """The indices of a top-k, or of a maximum over one dimension, may choose experts."""
    source = tensors(node)[0]
    rank = len(shape(source))
    match packet(node):
        case aten.topk:
            dim = argument(node, 2, "dim", -1)
        case _:
            dim = argument(node, 1, "dim")
    if not rank or not isinstance(dim, int) or dim % rank != rank - 1:
        return None
    result = roles.value(node)
    experts = shape(source)[-1]
    if packet(node) is aten.argmax or packet(node) is aten.argmin:
        return domains.chosen(node, rank - 1, experts=experts, certain=True)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return None
    return _Chooser(rank - 1, experts)


@dataclass(frozen=True)
class _Chooser:
    """A node whose second result is a choice of experts."""

    lead: int
    experts: int


@dataclass(frozen=True)
class _Ranking:
    """All experts in the order of a token's scores; its first k are a choice."""

    lead: int
    experts: int


def getitem_rule(domains: Domains, node: fx.Node) -> Meaning:
    source, number = node.args
    meaning = domains.meaning.get(source)  # type: ignore[arg-type]
    if isinstance(meaning, _Chooser):
        if number != 1:
            return None
        return domains.chosen(node, meaning.lead, experts=meaning.experts, certain=True)
    if isinstance(meaning, tuple):
        return meaning[number] if isinstance(number, int) else None
    if isinstance(meaning, Rows):
        return replace(meaning)  # a piece of a split or chunk of features
    return None


def sort_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Sorting ids puts pairs in the order of experts; sorting a permutation inverts it."""
    source = tensors(node)[0]
    descending = argument(node, len(node.args), "descending", False) or any(
        a is True for a in node.args[2:]
    )
    value = roles.tensor(source)
    if value.is_floating_point():
        if source in domains.meaning or value.dim() < 2:
            return None
        ranked = _Ranking(value.dim() - 1, value.shape[-1])
        return ranked if packet(node) is aten.argsort else (None, ranked)
    before = domains.choice(source)
    if before is None or before.routing is None or len(before.dims) != 1 or descending:
        return None
    if before.to == (before.routing.expert,):
        pairs = before.dims[0]
        if {a.kind for a in pairs} - {"token", "slot"}:
            return None
        size = math.prod(a.size or 1 for a in pairs)
        rows = ((Axis("sorted", size, node),),)
        order = Index(rows, pairs, before.routing)
        ids = Index(rows, before.to, before.routing)
    else:
        ids, order = None, Index((before.to,), before.dims[0], before.routing)
    return order if packet(node) is aten.argsort else (ids, order)


def arange_rule(domains: Domains, node: fx.Node) -> Meaning:
    (size,) = shape(node)
    start = node.args[0] if len(node.args) > 1 else 0
    step = node.args[2] if len(node.args) > 2 else 1
    if not isinstance(size, int) or (start, step) != (0, 1) or size == 1:
        return None
    axis = Axis("range", size, node)
    return Index(((axis,),), (axis,))


def one_hot_rule(domains: Domains, node: fx.Node) -> Meaning:
    ids = domains.choice(node.args[0])
    if ids is None or ids.routing is None or ids.to != (ids.routing.expert,):
        return None
    ids.routing.experts = ids.routing.experts or shape(node)[-1]
    return Rows((*ids.dims, ids.to), ids.routing, on=1, off=0)


def compare_rule(domains: Domains, node: fx.Node) -> Meaning:
    """``ids == e`` and ``ids == arange(E)`` select the pairs of an expert."""
    left, right = node.args[:2]
    if _literal(left) or (domains.index(right) and not domains.index(left)):
        left, right = right, left
    if isinstance(left, fx.Node) and left in domains.meaning and not domains.index(left):
        return pointwise_rule(domains, node)
    if _literal(right):
        ids = domains.index(left)
        if ids is None or ids.routing is None or ids.to != (ids.routing.expert,):
            return None
        return Rows(ids.dims, ids.routing, on=True, off=False, expert=int(right))  # type: ignore
    a, b = domains.index(left), domains.index(right)
    if a is not None and a.routing is None:
        a, b = b, a
    if a is None or b is None or a.routing is None or a.to != (a.routing.expert,):
        return None
    if len(b.to) != 1 or b.to[0].kind != "range" or carried(b.dims) != set(b.to):
        return None
    rank = len(shape(node))
    dims = [
        (a.routing.expert,) if there else here
        for here, there in zip(_aligned(a.dims, rank), _aligned(b.dims, rank), strict=True)
    ]
    a.routing.experts = a.routing.experts or b.to[0].size
    return Rows(tuple(dims), a.routing, on=True, off=False)


def scatter_rule(domains: Domains, node: fx.Node) -> Meaning:
    """``full.scatter(-1, ids, weights)`` is a matrix of tokens and experts.

    ``empty.scatter(0, order, values)`` moves values through a permutation.
    """
    base, dim, index, source = node.args[:4]
    rank = len(shape(node))
    if dim % rank == 0 and (moved := domains.index(index)) is not None:  # type: ignore[operator]
        if moved.to and moved.routing and moved.to != (moved.routing.expert,):
            return write_rows(domains, node, base, [moved], source, adds=False)
    ids = domains.choice(index)
    fill = _fill(base)
    if ids is None or ids.routing is None or fill is None or ids.to != (ids.routing.expert,):
        return None
    if dim % rank != rank - 1 or len(ids.dims) != rank:  # type: ignore[operator]
        return None
    if any(a.kind == "slot" for space in ids.dims[:-1] for a in space) or not ids.routing.distinct:
        return None
    ids.routing.experts = ids.routing.experts or shape(node)[-1]
    on = source if _literal(source) else _fill(source)
    return Rows((*ids.dims[:-1], ids.to), ids.routing, on=on, off=fill)


def _fill(node: Any) -> Any:
    """The constant that fills a tensor, None if it is not constant."""
    if not isinstance(node, fx.Node):
        return None
    match packet(node):
        case aten.zeros | aten.zeros_like | aten.new_zeros:
            return 0
        case aten.ones | aten.ones_like | aten.new_ones:
            return 1
        case aten.full | aten.full_like:
            return node.args[1] if _literal(node.args[1]) else None
        case aten.new_full:
            return node.args[2] if _literal(node.args[2]) else None
        case aten.clone | aten._to_copy | aten.expand:
            return _fill(node.args[0])
    return None


def counts_rule(domains: Domains, node: fx.Node) -> Meaning:
    """bincount and histc of ids in any order are the numbers of pairs of each expert."""
    source = node.args[0]
    ids = domains.choice(source)
    if ids is None or ids.routing is None or ids.to != (ids.routing.expert,):
        return None
    if carried(ids.dims) != set(ids.routing.pairs) and "sorted" not in kinds(ids.dims):
        return None
    if packet(node) is aten.histc:
        bins = argument(node, 1, "bins", 100)
        if (argument(node, 2, "min", 0), argument(node, 3, "max", 0)) != (0, bins - 1):
            return None
        ids.routing.experts = ids.routing.experts or bins
    return Counts(ids.routing)


def cumsum_rule(domains: Domains, node: fx.Node) -> Meaning:
    source = node.args[0]
    meaning = domains.meaning.get(source)  # type: ignore[arg-type]
    if isinstance(meaning, Counts) and not meaning.running:
        return replace(meaning, running=True)
    if isinstance(meaning, Rows) and meaning.on is not None and meaning.off == 0:
        mixed = meaning.dims[int(argument(node, 1, "dim"))]
        if {a.kind for a in mixed} & {"token", "slot"}:
            return Position()
    if meaning is None or isinstance(meaning, Counts | Position):
        return None
    along = positions(node)
    return along_rule(domains, node, along) if along else None


def diff_rule(domains: Domains, node: fx.Node) -> Meaning:
    """The differences of running totals, with a zero in front, are the counts."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    if isinstance(meaning, Counts) and meaning.running and _fill(argument(node, 3, "prepend")) == 0:
        return Counts(meaning.routing)
    return None


def item_rule(domains: Domains, node: fx.Node) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    return meaning if isinstance(meaning, Span) else None


def arithmetic_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Sums and differences of numbers of pairs."""
    a, b = (_span(domains, x) for x in node.args[:2])
    if a is None or b is None:
        return None
    routing = a.routing or b.routing
    if node.target is operator.add:
        for left, right in ((a, b), (b, a)):
            if left.start == left.stop:
                return replace(right, routing=routing)
            if left.stop == right.start:
                return Span(routing, left.start, right.stop)
    elif node.target is operator.sub:
        if b.start == b.stop:
            return replace(a, routing=routing)
        if a.start == b.start and b.stop <= a.stop:
            return Span(routing, b.stop, a.stop)
        if a.stop == b.stop and a.start <= b.start:
            return Span(routing, a.start, b.start)
    return None


def _span(domains: Domains, value: Any) -> Span | None:
    if value == 0 and isinstance(value, int):
        return Span(None, 0, 0)
    meaning = domains.meaning.get(value) if isinstance(value, fx.Node) else None
    return meaning if isinstance(meaning, Span) else None


# ---- Gathering rows ------------------------------------------------------------------------------


def places(domains: Domains, node: Any) -> list[Index] | None:
    """The coordinates at which an expert's mask holds, one map for each dimension."""
    mask = domains.rows(node)
    if mask is None or mask.expert is None or not mask.on or mask.off or mask.on is None:
        return None
    found = {a.kind for a in carried(mask.dims)}
    if found - {"token", "slot"}:
        return None
    flat = [axis for space in mask.dims for axis in space]
    while flat and flat[-1].kind == "slot":
        flat.pop()
    branch = Axis("branch", None, (mask.routing, tuple(flat)), mask.expert)
    return [Index(((branch,),), space, mask.routing) for space in mask.dims]


def nonzero_rule(domains: Domains, node: fx.Node) -> Meaning:
    if packet(node) is aten.where and len(node.args) > 1:
        return pointwise_rule(domains, node)
    found = places(domains, node.args[0])
    if found is None:
        return None
    return _Columns(tuple(found)) if packet(node) is aten.nonzero else tuple(found)


@dataclass(frozen=True)
class _Columns:
    """The [S, rank] result of nonzero."""

    columns: tuple[Index, ...]


def gather_rule(domains: Domains, node: fx.Node) -> Meaning:
    """A gather along dimension 0 with an index that is expanded over features."""
    index = domains.index(node.args[2])
    if node.args[1] != 0 or index is None or index.routing is None or index.dims[:1] == ((),):
        return None
    if kinds(index.dims[1:]) - {"range"} or kinds((index.to,)) & {"expert", "slot", "range"}:
        return None
    return gather_rows(domains, node, node.args[0], 0, [replace(index, dims=index.dims[:1])])  # type: ignore[arg-type]


def _indices(domains: Domains, node: fx.Node) -> tuple[int, list[Index]] | None:
    """The first indexed dimension and the maps of an ``index`` or ``index_put``, masks resolved."""
    given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    first = next((i for i, x in enumerate(given) if x is not None), 0)
    given = given[first:]
    if any(x is None for x in given):
        return None
    maps: list[Index] = []
    for x in given:
        value = roles.value(x)
        if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8):
            found = places(domains, x)
            if found is None:
                return None
            maps.extend(found)
            continue
        found = domains.index(x) or domains.choice(x)
        if found is None:
            return None
        maps.append(found)
    return first, maps


def index_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Gathering by a map from one domain to another brings a value into the first."""
    source: Any = node.args[0]
    match packet(node):
        case aten.index:
            found = _indices(domains, node)
            if found is None:
                return _refused_gather(domains, node)
            first, maps = found
        case aten.index_select:
            first, maps = int(node.args[1]) % len(shape(source)), [domains.index(node.args[2])]  # type: ignore
        case _:  # embedding
            first, maps = 0, [domains.index(node.args[1])]
    if not maps or any(m is None for m in maps):
        return None
    return gather_rows(domains, node, source, first, maps)  # type: ignore[arg-type]


def _refused_gather(domains: Domains, node: fx.Node) -> None:
    domains.refuse(node, "the rows are selected by a mask or index whose meaning is not known")


def gather_rows(
    domains: Domains, node: fx.Node, source: fx.Node, first: int, maps: Sequence[Index]
) -> Meaning:
    routing = next((m.routing for m in maps if m.routing), None)
    if len({m.dims for m in maps}) != 1:
        return None
    dims, targets = maps[0].dims, [m.to for m in maps]
    inner = domains.meaning.get(source)
    before = getattr(inner, "dims", ((),) * len(shape(source)))
    if isinstance(inner, Rows) and inner.done:
        inner, before = None, ((),) * len(before)
    after = before[first + len(maps) :]
    result = (*before[:first], *dims, *after)
    if isinstance(inner, Index):
        change = unified(before[first : first + len(maps)], targets)
        if change is None:
            return None
        to = substituted(inner.to, change)
        return Index(tuple(substituted(s, change) for s in result), to, inner.routing or routing)
    if routing is None:
        return None
    if isinstance(inner, Rows):
        covered = before[first : first + len(maps)]
        if inner.routing is not routing:
            return domains.refuse(node, "it mixes the choices of two routers")
        if any(c and c != t for c, t in zip(covered, targets, strict=True)):
            return domains.refuse(node, "its index counts something else than the rows it selects")
        branches = [a for space in dims for a in space if a.kind == "branch"]
        expert = branches[0].expert if branches and inner.expert is not None else inner.expert
        if branches and inner.expert not in (None, branches[0].expert):
            return None
        if branches and inner.expert is not None:
            expert = None  # at its own pairs a masked value is an ordinary row
        return Rows(result, routing, on=inner.on, off=None, expert=expert)
    for target, size in zip(targets, shape(source)[first:], strict=False):
        known = [a.size for a in target]
        if None not in known and math.prod(known) != size:  # type: ignore[arg-type]
            return None
    selects = kinds(dims) & {"branch"}
    if selects and not routing.certain and routing.experts is None:
        return None  # integers compared with a constant need not choose experts: ignored labels
    if kinds(dims) <= {"token", "slot"} and kinds((targets[0],)) != {"expert"}:
        return None if kinds(dims) else None
    return Rows(result, routing)


def unified(axes: Sequence[Space], targets: Sequence[Space]) -> dict[Axis, Space] | None:
    """What ranges must stand for so that ``targets`` index ``axes``; None if they differ."""
    change: dict[Axis, Space] = {}
    for have, want in zip(axes, targets, strict=True):
        if have == want:
            continue
        if len(have) == 1 and have[0].kind == "range":
            change[have[0]] = want
        elif len(have) == len(want) and all(a == b or a.kind == "range" for a, b in zip(have, want, strict=True)):
            change.update({a: (b,) for a, b in zip(have, want, strict=True) if a != b})
        else:
            return None
    return change


def substituted(space: Space, change: dict[Axis, Space]) -> Space:
    return tuple(b for a in space for b in change.get(a, (a,)))


# ---- Collecting rows -----------------------------------------------------------------------------


def index_put_rule(domains: Domains, node: fx.Node) -> Meaning:
    found = _indices(domains, node)
    if found is None or found[0] != 0:
        return _refused_gather(domains, node)
    adds = bool(argument(node, 3, "accumulate", False))
    return write_rows(domains, node, node.args[0], found[1], node.args[2], adds=adds)


def index_add_rule(domains: Domains, node: fx.Node) -> Meaning:
    """index_add, and scatter_add with an index that is expanded over features."""
    base, dim, index, rows = node.args[:4]
    found = domains.index(index)
    if found is None or dim != 0 or node.kwargs.get("alpha", 1) != 1:
        if isinstance(found, Index) and found.to and found.routing and found.to[0].kind == "expert":
            return _count_by_adding(domains, found, node)
        return domains.refuse(node, "it adds rows at places whose meaning is not known")
    if found.to[:1] and found.to[0].kind == "expert":
        return _count_by_adding(domains, found, node)
    maps = [replace(found, dims=found.dims[:1])]
    return write_rows(domains, node, base, maps, rows, adds=True)


def index_copy_rule(domains: Domains, node: fx.Node) -> Meaning:
    base, dim, index, rows = node.args[:4]
    found = domains.index(index)
    if dim != 0 or found is None:
        return domains.refuse(node, "it writes rows at places whose meaning is not known")
    return write_rows(domains, node, base, [found], rows, adds=False)


def scatter_reduce_rule(domains: Domains, node: fx.Node) -> Meaning:
    if argument(node, 4, "reduce") == "sum" and argument(node, 5, "include_self", True):
        return index_add_rule(domains, node)
    return domains.refuse(node, "it reduces rows by something other than a sum")


def _count_by_adding(domains: Domains, ids: Index, node: fx.Node) -> Meaning:
    """``zeros(E).scatter_add(0, ids, ones)`` counts pairs."""
    complete = ids.routing and (
        carried(ids.dims) == set(ids.routing.pairs) or "sorted" in kinds(ids.dims)
    )
    if complete and len(shape(node)) == 1 and _fill(node.args[0]) == 0 and _fill(node.args[3]) == 1:
        return Counts(ids.routing)  # type: ignore[arg-type]
    return None


def write_rows(
    domains: Domains, node: fx.Node, base: Any, maps: Sequence[Index], values: Any, *, adds: bool
) -> Meaning:
    """Rows that are written or added at the places that ``maps`` give."""
    if len({m.dims for m in maps}) != 1 or len(maps[0].dims) != 1:
        return None
    domain, targets = maps[0].dims[0], tuple(m.to for m in maps)
    integers = domains.index(values)
    if integers is not None:  # a permutation that is written, such as an inverse one
        if adds or len(targets) != 1:
            return None
        change = unified((integers.dims[0],), (domain,))
        if change is None or {a.kind for a in domain} != {"sorted"}:
            return None
        return Index(targets, substituted(integers.to, change), integers.routing or maps[0].routing)
    rows = domains.rows(values)
    if rows is None or not isinstance(values, fx.Node):
        return domains.refuse(node, "it writes something else than rows of experts")
    if rows.dims[:1] != (domain,):
        return domains.refuse(node, "the rows are not those that its index counts")
    features = rows.dims[1:]
    if carried(features):
        return domains.refuse(node, "the rows have a second dimension of routing")
    dims = (*targets, *features)
    axis = domain[0] if len(domain) == 1 else None
    whole = axis is not None and axis.kind == "sorted"
    if axis is None or axis.kind not in ("sorted", "branch"):
        return None
    routing = rows.routing
    previous = domains.meaning.get(base)
    previous = previous if isinstance(previous, Rows) and previous.routing is routing else None
    onto_tokens = kinds(dims) == {"token"}
    if not adds and (added := _added_to(domains, node, base, maps, values)) is not None:
        values, adds = added, True
    if onto_tokens and not adds and routing.k > 1:
        return domains.refuse(node, "a later expert overwrites what an earlier one wrote")
    covers = not (onto_tokens and adds)
    start = None if covers or _fill(base) == 0 else base
    if not isinstance(previous, Sum) or previous.dims != dims:
        if previous is not None:
            return domains.refuse(node, "it adds to something else than a sum of experts' rows")
        previous = None
    return Sum(
        dims, routing, base=previous.base if previous else start, previous=previous, rows=values,
        rows_dims=rows.dims, added=None if whole else axis.expert, done=onto_tokens,
    )  # fmt: skip


def _added_to(
    domains: Domains, node: fx.Node, base: Any, maps: Sequence[Index], values: fx.Node
) -> fx.Node | None:
    """``out[i] = out[i] + rows``: the node of ``rows``."""
    if packet(values) is not aten.add or len(values.args) != 2 or values.kwargs:
        return None
    for mine, other in (values.args, values.args[::-1]):
        while isinstance(mine, fx.Node) and packet(mine) in RESHAPES:
            mine = mine.args[0]
        if not (isinstance(mine, fx.Node) and isinstance(other, fx.Node)):
            continue
        if packet(mine) not in (aten.index, aten.index_select) or mine.args[0] is not base:
            continue
        if packet(mine) is aten.index_select:
            same = [domains.index(mine.args[2])] == list(maps)
        else:
            same = (_indices(domains, mine) or (0, None))[1] == list(maps)
        if same:
            return other
    return None


def cat_rule(domains: Domains, node: fx.Node) -> Meaning:
    """The rows of expert 0, 1, ... E-1 one after another are rows sorted by expert."""
    parts: Any = node.args[0]
    meanings = [domains.meaning.get(p) for p in parts]
    if not any(m is not None for m in meanings):
        return None
    dim = argument(node, 1, "dim", 0)
    if all(isinstance(m, Rows | Index) and m.dims and _branch(m.dims[0]) for m in meanings):
        if dim % len(shape(node)) == 0:
            return _joined(domains, node, parts, meanings)
    if isinstance(meanings[-1], Counts) and meanings[-1].running and _fill(parts[0]) == 0:
        return None
    if all(isinstance(m, Index) for m in meanings) and dim % len(shape(node)) == len(shape(node)) - 1:
        return _several_choices(domains, node, meanings)
    if any(isinstance(m, Counts | Span | Index | Position) for m in meanings):
        return None
    along = positions(node)
    return along_rule(domains, node, along) if along else None


def _several_choices(domains: Domains, node: fx.Node, choices: Sequence[Index]) -> Meaning:
    """Ids chosen one after another, such as an argmax and the next argmax, side by side."""
    if any(m.routing is None or m.to != (m.routing.expert,) or m.dims[-1] for m in choices):
        return None
    experts = {m.routing.experts for m in choices if m.routing}
    if len(experts) != 1:
        return None
    return domains.chosen(node, len(shape(node)) - 1, experts=experts.pop())


def _branch(space: Space) -> Axis | None:
    return space[0] if len(space) == 1 and space[0].kind == "branch" else None


def _joined(domains: Domains, node: fx.Node, parts: Any, meanings: list[Any]) -> Meaning:
    branches = [_branch(m.dims[0]) for m in meanings]
    if [b.expert for b in branches if b] != list(range(len(parts))):
        return domains.refuse(node, "it joins the rows of experts in another order than 0, 1, 2...")
    routing = meanings[0].routing
    order = branches[0].of  # type: ignore[union-attr]
    size = math.prod(a.size or 1 for a in routing.pairs)
    axis = order if isinstance(order, Axis) else Axis("sorted", size, order)
    dims = ((axis,), *meanings[0].dims[1:])
    if isinstance(meanings[0], Index):
        return Index(dims, meanings[0].to, routing)
    result: Sum | None = None
    for branch, part, meaning in zip(branches, parts, meanings, strict=True):
        result = Sum(
            dims, routing, previous=result, rows=part, rows_dims=meaning.dims, added=branch.expert
        )  # type: ignore[union-attr]
    return result


def slice_rule(domains: Domains, node: fx.Node) -> Meaning:
    """A slice of sorted rows between two running totals is one expert's."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    dim = argument(node, 1, "dim", 0)
    if isinstance(meaning, _Ranking):
        if dim % (meaning.lead + 1) != meaning.lead or argument(node, 2, "start") not in (None, 0):
            return None
        return domains.chosen(node, meaning.lead, experts=meaning.experts, certain=True)
    if isinstance(meaning, _Columns):
        start, end = argument(node, 2, "start"), argument(node, 3, "end")
        if dim % 2 == 1 and isinstance(start, int) and isinstance(end, int) and end - start == 1:
            column = meaning.columns[start]
            return replace(column, dims=(*column.dims, ()))
        return meaning if dim % 2 == 0 else None
    if not isinstance(meaning, Rows | Index):
        return None
    space = meaning.dims[dim]
    if space and space[0].kind == "sorted" and dim == 0:
        branch = _slice_branch(domains, node, space[0])
        if branch is None:
            return domains.refuse(node, "a slice of sorted rows that is not one expert's")
        return replace(_piece(meaning), dims=((branch,), *meaning.dims[1:]))
    if isinstance(meaning, Index) or meaning.done:
        return meaning if shape(node) == shape(node.args[0]) else None  # type: ignore[arg-type]
    return along_rule(domains, node, positions(node))  # type: ignore[arg-type]


def _piece(meaning: Rows | Index) -> Rows | Index:
    """Rows without the history of a sum."""
    if isinstance(meaning, Sum):
        return Rows(meaning.dims, meaning.routing)
    return meaning


def _slice_branch(domains: Domains, node: fx.Node, axis: Axis) -> Axis | None:
    start = _span(domains, argument(node, 2, "start", 0) or 0)
    end = _span(domains, argument(node, 3, "end"))
    if start is None or end is None or end.start != 0 or start.start != 0:
        return None
    if end.stop - start.stop != 1:
        return None
    return Axis("branch", None, axis, start.stop)


def slice_scatter_rule(domains: Domains, node: fx.Node) -> Meaning:
    """One expert's rows are written into a buffer of sorted rows."""
    base, values = node.args[:2]
    rows = domains.rows(values)
    dim = argument(node, 2, "dim", 0)
    if rows is None or dim != 0 or not (branch := _branch(rows.dims[0])):
        return None
    axis = branch.of
    if not isinstance(axis, Axis):
        return domains.refuse(node, "it writes rows that were not a slice of sorted rows")
    start = _span(domains, argument(node, 3, "start", 0) or 0)
    end = _span(domains, argument(node, 4, "end"))
    if start is None or end is None or (start.stop, end.stop) != (branch.expert, branch.expert + 1):  # type: ignore[operator]
        return domains.refuse(node, "it writes the rows of one expert over those of another")
    dims = ((axis,), *rows.dims[1:])
    previous = domains.rows(base)
    return Sum(
        dims, rows.routing, previous=previous if isinstance(previous, Sum) else None,
        rows=values, rows_dims=rows.dims, added=branch.expert,  # type: ignore[arg-type]
    )  # fmt: skip


def split_rule(domains: Domains, node: fx.Node) -> Meaning:
    """A split of sorted rows by counts gives each expert's rows."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(meaning, Rows | Index):
        return None
    dim = argument(node, 2, "dim", 0) % len(meaning.dims)
    space = meaning.dims[dim]
    if space and space[0].kind == "sorted" and dim == 0:
        sizes = [_span(domains, s) for s in node.args[1]]  # type: ignore[union-attr]
        wanted = [(e, e + 1) for e in range(len(sizes))]
        if [(s.start, s.stop) for s in sizes if s] != wanted:
            return domains.refuse(node, "a split of sorted rows that is not one piece an expert")
        return tuple(
            replace(_piece(meaning), dims=((Axis("branch", None, space[0], e),), *meaning.dims[1:]))
            for e in range(len(sizes))
        )
    if isinstance(meaning, Index):
        return None
    return along_rule(domains, node, positions(node))  # type: ignore[arg-type]


def stack_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Weighted results of expert 0, 1, ... E-1, stacked, have a dimension of experts."""
    parts: Any = node.args[0]
    meanings = [domains.rows(p) for p in parts]
    if not all(m is not None and m.expert is not None for m in meanings):
        if any(meanings):
            domains.refuse(node, "it stacks rows of experts")
        return None
    if [m.expert for m in meanings if m] != list(range(len(parts))):
        return None
    first = meanings[0]
    assert first is not None
    at = argument(node, 1, "dim", 0) % (len(first.dims) + 1)
    dims = (*first.dims[:at], (first.routing.expert,), *first.dims[at:])
    return replace(first, dims=dims, expert=None)


# ---- Operators that keep their rows --------------------------------------------------------------


def reshape_rule(domains: Domains, node: fx.Node) -> Meaning:
    source: Any = node.args[0]
    meaning = domains.meaning.get(source)
    if isinstance(meaning, Counts | Span) and len(shape(node)) == len(shape(source)):
        return meaning
    if isinstance(meaning, _Columns) and len(meaning.columns) == 1 and len(shape(node)) == 1:
        return meaning.columns[0]
    if not isinstance(meaning, Rows | Index):
        return None
    if isinstance(meaning, Rows) and meaning.done:
        return None
    dims = reshaped(shape(source), meaning.dims, shape(node))
    if dims is None:
        return domains.refuse(node, "it merges rows with features, or cuts rows apart")
    return replace(_piece(meaning), dims=dims)


def permute_rule(domains: Domains, node: fx.Node, order: list[int]) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(meaning, Rows | Index) or (isinstance(meaning, Rows) and meaning.done):
        return None
    return replace(_piece(meaning), dims=tuple(meaning.dims[d] for d in order))


def expand_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Broadcast dimensions of an index count something of their own; those of rows are features."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(meaning, Rows | Index) or (isinstance(meaning, Rows) and meaning.done):
        return None
    dims = _aligned(meaning.dims, len(shape(node)))
    if isinstance(meaning, Index):
        dims = tuple(
            space if space or _is_one(n) or not isinstance(n, int) else (Axis("range", n, (node, i)),)
            for i, (space, n) in enumerate(zip(dims, shape(node), strict=True))
        )
    return replace(_piece(meaning), dims=dims)


def repeat_interleave_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Each token's number k times over: a map from pairs to tokens."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    repeats = argument(node, 1, "repeats")
    if not isinstance(meaning, Index) or len(meaning.dims) != 1 or not isinstance(repeats, int):
        return None
    extra = () if repeats == 1 else (Axis("range", repeats, node),)
    return replace(meaning, dims=((*meaning.dims[0], *extra),))


def divide_rule(domains: Domains, node: fx.Node) -> Meaning:
    """The quotient and remainder of a flat coordinate are its leading and trailing parts."""
    meaning = domains.index(node.args[0])
    if meaning is None:
        return pointwise_rule(domains, node) if node.args[0] in domains.meaning else None  # type: ignore
    number = node.args[1]
    if packet(node) is aten.div and node.kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return None
    if not isinstance(number, int):
        return None
    if number == 1 and packet(node) is not aten.remainder:
        return meaning
    for cut in range(len(meaning.to) + 1):
        if math.prod(a.size or 0 for a in meaning.to[cut:]) == number:
            quotient = packet(node) is not aten.remainder
            return replace(meaning, to=meaning.to[:cut] if quotient else meaning.to[cut:])
    return None


_CASTS = {
    aten._to_copy, aten.to, aten.clone, aten.contiguous, aten.alias, aten.detach,
    aten.lift_fresh_copy,
}  # fmt: skip


def pointwise_rule(domains: Domains, node: fx.Node) -> Meaning:
    operands = tensors(node)
    found = [domains.meaning.get(x) for x in operands]
    if packet(node) in _CASTS and not isinstance(found[0], Rows):
        return found[0]
    rows = [m for m in found if isinstance(m, Rows) and not m.done]
    if not rows:
        return None
    if packet(node) in (aten.add, aten.sub) and (sum_ := dense_sum_rule(domains, node, rows)):
        return sum_
    routing = rows[0].routing
    if any(m.routing is not routing for m in rows):
        return domains.refuse(node, "it mixes the choices of two routers")
    dims = _joint_dims(domains, node, operands)
    if dims is None:
        return domains.refuse(node, "it combines rows of different domains")
    experts = {m.expert for m in rows if not (kinds(m.dims) & {"branch"})} - {None}
    if len(experts) > 1:
        return None
    expert = experts.pop() if experts else None
    on, off = (_constant(node, domains, at) for at in ("on", "off"))
    result = Rows(dims, routing, on=on, off=off, expert=expert)
    if expert is not None or "expert" in kinds(dims):
        if off is None:
            return None
    if result.total and packet(node) not in _CASTS:
        features = [math.prod(n for n, d in zip(shape(x), _aligned(((),) * len(shape(x)), len(shape(x))), strict=True)) for x in operands if domains.rows(x) is None]
        tokens = math.prod(a.size or 1 for a in routing.tokens)
        if packet(node) is not aten.mul or any(f > tokens for f in features):
            return None
    return result


def _joint_dims(domains: Domains, node: fx.Node, operands: Iterable[fx.Node]) -> Dims | None:
    """The axes of a broadcast result; None if its operands disagree."""
    rank = len(shape(node))
    result: list[Space] = [()] * rank
    for x in operands:
        rows = domains.rows(x)
        if rows is None:
            continue
        for d, space in enumerate(_aligned(rows.dims, rank)):
            if space and result[d] and result[d] != space:
                return None
            result[d] = result[d] or space
    return tuple(result)


def _constant(node: fx.Node, domains: Domains, at: str) -> Any:
    """What the operator gives at selected ("on") or other ("off") pairs, where that is constant."""

    def known(x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return x
        rows = domains.rows(x)
        return _UNKNOWN if rows is None or getattr(rows, at) is None else getattr(rows, at)

    args = [known(x) for x in node.args]
    match packet(node):
        case aten.mul if any(_literal(a) and a == 0 for a in args):
            return 0
        case aten.div if _literal(args[0]) and args[0] == 0:
            return 0
        case aten.masked_fill if args[1] is not _UNKNOWN:
            return args[2] if args[1] and _literal(args[2]) else _or_none(args[0])
        case aten.where if args[0] is not _UNKNOWN and len(args) == 3:
            return _or_none(_scalar(args[1] if args[0] else args[2]))
        case _ if packet(node) in _CASTS:
            return _or_none(args[0])
        case aten.dropout:
            return 0 if args[0] == 0 and _literal(args[0]) else None
    if any(x is _UNKNOWN for x in args) or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        return None
    try:
        values = [torch.tensor(a) if _literal(a) and i == 0 else a for i, a in enumerate(args)]
        if len(values) > 1 and str(node.target).endswith(".Tensor") and _literal(values[1]):
            values[1] = torch.tensor(values[1])
        return node.target(*values, **node.kwargs).item()  # type: ignore[operator]
    except (RuntimeError, TypeError, AttributeError):
        return None


_UNKNOWN = object()


def _scalar(value: Any) -> Any:
    return value


def _or_none(value: Any) -> Any:
    return None if value is _UNKNOWN else value


def dense_sum_rule(domains: Domains, node: fx.Node, rows: list[Rows]) -> Meaning:
    """``out + w[:, e, None] * expert_e(x)``: a sum, expert by expert, over all tokens."""
    if packet(node) is not aten.add or len(node.args) != 2 or node.kwargs:
        return None
    left, right = (x if isinstance(x, fx.Node) else None for x in node.args)
    if left is None or right is None:
        return None
    a, b = domains.rows(left), domains.rows(right)
    if isinstance(domains.meaning.get(right), Sum) or (b is None and a is not None):
        left, right, a, b = right, left, b, a
    total = domains.meaning.get(left)
    total = total if isinstance(total, Sum) and total.expert is None else None
    if b is None or b.expert is None or b.off != 0 or kinds(b.dims) != {"token"}:
        return None
    if not any(not space for space in b.dims) or carried(b.dims) != set(b.routing.tokens):
        return None
    if not (total or a is None or (a.expert is not None and a.off == 0)):
        return None
    if shape(node) != shape(right):
        return None
    if total is None and a is not None:
        if a.expert == b.expert:
            return None
        first = _without_zero(left)
        total = Sum(a.dims, a.routing, rows=first, rows_dims=a.dims, added=a.expert, done=True)
    elif total is not None and (total.routing is not b.routing or total.dims != b.dims):
        total = None  # another block's sum, such as a residual: an opaque start
    start = None if total is not None or _fill(left) == 0 else left
    return Sum(
        b.dims, b.routing, base=total.base if total else start, previous=total, rows=right,
        rows_dims=b.dims, added=b.expert, done=True,
    )  # fmt: skip


def _without_zero(node: fx.Node) -> fx.Node:
    """The other operand of an addition of 0, with which Python's ``sum`` starts."""
    if packet(node) is aten.add and len(node.args) == 2 and not node.kwargs:
        for one, other in (node.args, node.args[::-1]):
            if _literal(one) and one == 0 and isinstance(other, fx.Node):
                return other
    return node


def along_rule(domains: Domains, node: fx.Node, along: Along) -> Meaning:
    """Operators that mix positions along some dimensions, and treat all others alike."""
    operands = tensors(node)
    meanings = [domains.rows(x) for x in operands]
    first = next((m for m in meanings if m is not None), None)
    if first is None:
        return None
    joint = [()] * len(first.dims)
    for m in meanings:
        for d, space in enumerate(m.dims if m else ()):
            if space and joint[d] and joint[d] != space:
                return domains.refuse(node, "it joins rows of different domains")
            joint[d] = joint[d] or space
    axes = {a for d in along.mixed if None not in along.kept for a in joint[d]}
    kept = tuple(
        () if d is None or (shape(node) and _is_one(shape(node)[i])) else joint[d]
        for i, d in enumerate(along.kept)
    )
    if axes:
        return mixing_rule(domains, node, first, along, kept, axes)
    on = first.on if len(operands) == 1 and packet(node) in _PIECES else None
    off = first.off if len(operands) == 1 and packet(node) in _PIECES | {aten.sum, aten.mean} else None
    if off != 0 and packet(node) not in _PIECES:
        off = None
    if off is None and (first.expert is not None or "expert" in kinds(first.dims)):
        if not kinds(first.dims) & {"branch"}:
            return None
    result = Rows(kept, first.routing, on=on, off=off, expert=first.expert)
    if result.total and any(shape(operands[0])[d] != 1 for d in along.mixed):
        return None
    return result


_PIECES = {aten.split, aten.chunk, aten.split_with_sizes, aten.slice, aten.select, aten.unbind}


def mixing_rule(
    domains: Domains, node: fx.Node, rows: Rows, along: Along, kept: Dims, axes: set[Axis]
) -> Meaning:
    """An operator along a dimension of routing."""
    found = {a.kind for a in axes}
    match packet(node):
        case aten.sum | aten.any:
            return reduced(domains, node, replace(_piece(rows)), kept, axes)  # type: ignore[arg-type]
        case aten.softmax | aten._softmax if found == {"expert"} and rows.off == -math.inf:
            return Rows(kept, rows.routing, off=0)
        case aten.select if found == {"expert"} and isinstance(number := node.args[2], int):
            return replace(_piece(rows), dims=kept, expert=number)
        case aten.slice if found == {"expert"} and shape(node)[along.mixed[0]] == 1:
            start = argument(node, 2, "start") or 0
            return replace(_piece(rows), dims=kept, expert=start) if start >= 0 else None
        case aten.unbind if found == {"expert"}:
            count = shape(node.args[0])[along.mixed[0]]  # type: ignore[arg-type]
            return tuple(replace(_piece(rows), dims=kept, expert=e) for e in range(count))
    return domains.refuse(node, f"{_op(node)} mixes rows, which an expert must treat one by one")


def reduced(
    domains: Domains, node: fx.Node, rows: Rows, kept: Dims, axes: set[Axis]
) -> Meaning:
    """What is left when ``axes`` are summed away."""
    routing, found = rows.routing, {a.kind for a in axes}
    if found & {"sorted", "branch", "range"}:
        return domains.refuse(node, "it adds up rows, which an expert must treat one by one")
    left = kinds(kept)
    narrow = rows.expert is not None or "expert" in kinds(rows.dims)
    if "token" in found:
        if rows.on == 1 and rows.off == 0 and left <= {"expert"} and carried(rows.dims) >= set(routing.pairs):
            return Counts(routing) if left else Span(routing, rows.expert or 0, (rows.expert or 0) + 1)
        return None
    if narrow and (rows.off != 0 or ("slot" in found and not routing.distinct)):
        return None
    whole = "slot" not in left and "expert" not in left and rows.expert is None
    if not whole:
        return replace(rows, dims=kept, on=rows.on)
    if all(kept) or carried(kept) != set(routing.tokens):
        return None  # a number for each token: no result of experts
    return Rows(kept, routing, done=True)


def contraction_rule(domains: Domains, node: fx.Node, product: Contraction) -> Meaning:
    """A product of rows with weights; summed over slots or experts, it is the end of a block."""
    meaning: dict[str, Space] = {}
    rows: list[Rows] = []
    for x, letters in zip(product.operands, product.letters, strict=True):
        found = domains.rows(x)
        if found is None:
            continue
        rows.append(found)
        for letter, space in zip(letters, found.dims, strict=True):
            if space and meaning.get(letter, space) != space:
                return domains.refuse(node, "it multiplies rows of different domains")
            if space:
                meaning[letter] = space
    if not rows:
        return None
    routing = rows[0].routing
    if any(m.routing is not routing for m in rows):
        return domains.refuse(node, "it mixes the choices of two routers")
    kept = tuple(meaning.get(letter, ()) for letter in product.result)
    gone = {a for letter, space in meaning.items() if letter not in product.result for a in space}
    experts = {m.expert for m in rows if "branch" not in kinds(m.dims)} - {None}
    if len(experts) > 1:
        return None
    joint = tuple(meaning.values())
    off = 0 if any(m.off == 0 for m in rows) and product.bias is None else None
    result = Rows(joint, routing, off=off, expert=experts.pop() if experts else None)
    if (result.expert is not None or "expert" in kinds(joint)) and off is None:
        return None
    if product.grouped and not isinstance(domains.meaning.get(node.args[2]), Counts):  # type: ignore
        return domains.refuse(node, "the sizes of its groups are not the numbers of pairs of experts")
    if not gone:
        return None if replace(result, dims=kept).total else replace(result, dims=kept)
    if not _spread(domains, product, meaning, gone):
        return None
    return reduced(domains, node, result, kept, gone)


def _spread(
    domains: Domains, product: Contraction, meaning: dict[str, Space], gone: set[Axis]
) -> bool:
    """Whether an operand besides the routing weights depends on tokens and on what is summed away.

    A matrix of tokens and keys times values, as in sparse attention, is no mixture of experts.
    """
    if {a.kind for a in gone} == {"token"}:
        return True
    for x, letters in zip(product.operands, product.letters, strict=True):
        spaces = [meaning.get(letter, ()) for letter in letters]
        axes = {a.kind for space in spaces for a in space}
        if not all(spaces) and "token" in axes and axes & {"slot", "expert", "sorted"}:
            return True
    return False


def select_rule(domains: Domains, node: fx.Node) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    dim, number = node.args[1], node.args[2]
    if isinstance(meaning, _Columns) and isinstance(number, int):
        return meaning.columns[number] if dim in (1, -1) else None
    if isinstance(meaning, Counts) and isinstance(number, int) and number >= 0:
        return Span(meaning.routing, 0 if meaning.running else number, number + 1)
    if isinstance(meaning, Rows) and not meaning.done:
        return along_rule(domains, node, positions(node))  # type: ignore[arg-type]
    return None


def unbind_rule(domains: Domains, node: fx.Node) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    dim = argument(node, 1, "dim", 0)
    if isinstance(meaning, _Columns) and dim in (1, -1):
        return meaning.columns
    if isinstance(meaning, Counts):
        count = meaning.routing.experts or 0
        return tuple(Span(meaning.routing, 0 if meaning.running else e, e + 1) for e in range(count))
    if isinstance(meaning, Rows) and not meaning.done:
        return along_rule(domains, node, positions(node))  # type: ignore[arg-type]
    return None


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.topk, aten.max, aten.min, aten.argmax, aten.argmin), topk_rule),
    **dict.fromkeys((aten.sort, aten.argsort), sort_rule),
    **dict.fromkeys((aten.bincount, aten.histc), counts_rule),
    **dict.fromkeys((aten.nonzero, aten.nonzero_numpy, aten.where), nonzero_rule),
    **dict.fromkeys((aten.index, aten.index_select, aten.embedding), index_rule),
    **dict.fromkeys((aten.index_add, aten.scatter_add), index_add_rule),
    **dict.fromkeys((aten.floor_divide, aten.remainder, aten.div), divide_rule),
    **dict.fromkeys((operator.add, operator.sub), arithmetic_rule),
    **dict.fromkeys((aten.item, aten._local_scalar_dense), item_rule),
    **dict.fromkeys((aten.split, aten.split_with_sizes), split_rule),
    operator.getitem: getitem_rule,
    aten.arange: arange_rule,
    aten.gather: gather_rule,
    aten.index_copy: index_copy_rule,
    aten.scatter_reduce: scatter_reduce_rule,
    aten.one_hot: one_hot_rule,
    aten.eq: compare_rule,
    aten.scatter: scatter_rule,
    aten.cumsum: cumsum_rule,
    aten.diff: diff_rule,
    aten.index_put: index_put_rule,
    aten.cat: cat_rule,
    aten.slice: slice_rule,
    aten.slice_scatter: slice_scatter_rule,
    aten.stack: stack_rule,
    aten.expand: expand_rule,
    aten.repeat_interleave: repeat_interleave_rule,
    aten.select: select_rule,
    aten.unbind: unbind_rule,
}
