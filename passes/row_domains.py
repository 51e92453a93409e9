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

All else is *opaque*. ``row_rules`` says, for each kind of operator, what its result means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.passes.axes import CASTS, RESHAPES, Axis, Dims, Space, kinds, packet, shape

__all__ = [
    "Chooser",
    "Columns",
    "Counts",
    "Domains",
    "Index",
    "Meaning",
    "Position",
    "Ranking",
    "Routing",
    "Rows",
    "Span",
    "Sum",
    "aligned",
    "fill_of",
    "is_literal",
    "span_of",
    "spelled",
    "without_history",
]

aten = torch.ops.aten


@dataclass(eq=False)
class Routing:
    """One choice of experts: ``ids`` are integers over ``tokens`` and ``slot`` axes."""

    ids: fx.Node
    tokens: Space
    slot: Space
    certain: bool  # the result of a top-k or argmax; else integers that may choose experts
    experts: int | None = None
    looked_up: bool = False  # parameters of experts are gathered by it

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
    lookup: bool = False  # a parameter of each row's expert

    @property
    def total(self) -> bool:
        """Whether the value is complete: one for each token, whatever its experts are."""
        if self.expert is not None or self.lookup:
            return self.done
        return self.done or (kinds(self.dims) == {"token"} and self.routing.k == 1)


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


@dataclass(frozen=True)
class Chooser:
    """A node whose second result is a choice of experts."""

    lead: int
    experts: int


@dataclass(frozen=True)
class Ranking:
    """All experts in the order of a token's scores; its first k are a choice."""

    lead: int
    experts: int


@dataclass(frozen=True)
class Columns:
    """The [S, rank] result of nonzero."""

    columns: tuple[Index, ...]


Meaning = Any  # Index | Rows | Counts | Span | Position | tuple of these | None


# ---- The interpretation --------------------------------------------------------------------------


@dataclass
class Domains:
    """The meaning of every node of a graph, and where code that selects experts was not understood.

    ``refusals`` gives for each such node the reason; it is an error only where the node is still
    needed after every block was rewritten.
    """

    rule: Callable[[Domains, fx.Node], Meaning]
    meaning: dict[fx.Node, Meaning] = field(default_factory=dict)
    refusals: dict[fx.Node, str] = field(default_factory=dict)
    routings: dict[fx.Node, Routing] = field(default_factory=dict)

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Note why an operator on rows of experts was not understood; its result is opaque."""
        for operand in node.all_input_nodes:
            meaning = self.meaning.get(operand)
            if isinstance(meaning, Rows) and kinds(meaning.dims) & {"sorted", "branch"}:
                self.refusals[node] = reason
                return

    def rows(self, node: Any) -> Rows | None:
        meaning = self.meaning.get(node) if isinstance(node, fx.Node) else None
        return meaning if isinstance(meaning, Rows) and not meaning.done else None

    def index(self, node: Any) -> Index | None:
        """The meaning of an integer tensor."""
        meaning = self.meaning.get(node) if isinstance(node, fx.Node) else None
        return meaning if isinstance(meaning, Index) else None

    def choice(self, node: Any) -> Index | None:
        """Like ``index``, and an opaque integer tensor is taken for a choice of experts."""
        if not isinstance(node, fx.Node) or node in self.meaning:
            return self.index(node)
        value = roles.value(node)
        if not isinstance(value, Tensor) or value.dtype not in _INTEGERS or not value.dim():
            return None
        if packet(node) in RESHAPES | CASTS and self.choice(node.args[0]) is not None:
            self.meaning[node] = self.rule(self, node)
            return self.index(node)
        lead = value.dim() if value.dim() == 1 else value.dim() - 1
        self.meaning[node] = chosen = self.chosen(node, lead)
        return chosen

    def chosen(
        self, node: fx.Node, lead: int, *, experts: int | None = None, certain: bool = False
    ) -> Index:
        """Take ``node`` for ids of experts: ``lead`` token dimensions, then slots."""
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


def spelled(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.")


def is_literal(value: Any) -> bool:
    return isinstance(value, int | float | bool)


def fill_of(node: Any) -> Any:
    """The constant that fills a tensor, None if it is not constant."""
    if not isinstance(node, fx.Node):
        return None
    match packet(node):
        case aten.zeros | aten.zeros_like | aten.new_zeros:
            return 0
        case aten.ones | aten.ones_like | aten.new_ones:
            return 1
        case aten.full | aten.full_like:
            return node.args[1] if is_literal(node.args[1]) else None
        case aten.new_full:
            return node.args[2] if is_literal(node.args[2]) else None
        case aten.clone | aten._to_copy | aten.expand:
            return fill_of(node.args[0])
        case _:
            return None


def without_history(meaning: Rows | Index) -> Rows | Index:
    """Rows without the history of a sum."""
    if isinstance(meaning, Sum):
        return Rows(meaning.dims, meaning.routing)
    return meaning


def aligned(dims: Dims, rank: int) -> Dims:
    return ((),) * (rank - len(dims)) + dims


def span_of(domains: Domains, value: Any) -> Span | None:
    if isinstance(value, int) and value == 0:
        return Span(None, 0, 0)
    meaning = domains.meaning.get(value) if isinstance(value, fx.Node) else None
    return meaning if isinstance(meaning, Span) else None
