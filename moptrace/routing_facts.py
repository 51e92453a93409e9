"""What is known of integers without data: routing, told by how it is made in a traced model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import sympy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx

from moptrace import roles
from moptrace.core import (
    args_of,
)

__all__ = ["AMOUNTS", "UNKNOWN", "Fact", "Facts", "Kind"]

aten = torch.ops.aten


class Kind(Enum):
    UNKNOWN = "it depends on floating-point values"
    PLAIN = "it does not depend on routing"
    CHOICE = "experts that were chosen, or positions of tokens"
    MASK = "for each token, whether an expert was chosen"
    COUNT = "how many tokens an expert has"
    POSITION = "where the rows of an expert begin or end"
    BUSY = "whether an expert has tokens"
    IDLE = "whether an expert has none"


@dataclass(frozen=True, slots=True)
class Fact:
    """The kind of a number or tensor, and which dimension runs over the experts, if one does.

    ``among`` is the number of experts of which a choice can be, where a top-k decides it.
    """

    kind: Kind
    experts: int | None = None
    among: int | None = None


UNKNOWN, PLAIN, CHOICE = Fact(Kind.UNKNOWN), Fact(Kind.PLAIN), Fact(Kind.CHOICE)
AMOUNTS = (Kind.COUNT, Kind.POSITION)


class Facts:
    """Facts about the nodes of a graph that is being made, found in order and on demand."""

    def __init__(self, graph: fx.Graph, needs_gradient: Iterable[bool]) -> None:
        self.graph = graph
        self.inputs = iter(needs_gradient)
        self.known: dict[fx.Node, Fact] = {}
        self.symbols: dict[sympy.Symbol, Kind] = {}
        self.differentiable: set[fx.Node] = set()
        self.enabled = True
        self.last: fx.Node = graph._root

    def __getitem__(self, node: fx.Node) -> Fact:
        self.refresh()
        return self.known[node]

    def needs_gradient(self, node: fx.Node) -> bool:
        self.refresh()
        return node in self.differentiable

    def refresh(self) -> None:
        while self.last.next is not self.graph._root:
            self.last = self.last.next
            self._add(self.last)

    def _add(self, node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            self.enabled = bool(args_of(node)[0])
        self.known[node] = fact = _fact(node, self.known)
        example = roles.value(node)
        if node.op == "placeholder":
            if next(self.inputs):
                self.differentiable.add(node)
        elif self.enabled and node.target is not aten.detach.default:
            is_integer = isinstance(example, Tensor) and not example.is_floating_point()
            if not is_integer and any(n in self.differentiable for n in node.all_input_nodes):
                self.differentiable.add(node)
        sizes = example.shape if isinstance(example, Tensor) else (example,)
        for size in sizes:
            if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                for symbol in size.node.expr.free_symbols - self.symbols.keys():
                    self.symbols[symbol] = self._symbol_kind(node, fact)

    def _symbol_kind(self, node: fx.Node, fact: Fact) -> Kind:
        if node.target in (aten.item.default, aten._local_scalar_dense.default):
            return fact.kind
        kinds = {self.known[n].kind for n in node.all_input_nodes}
        routed = kinds & {Kind.MASK, Kind.COUNT, Kind.POSITION, Kind.CHOICE}
        return Kind.COUNT if routed else Kind.UNKNOWN


def _fact(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    if node.op != "call_function":
        example = roles.value(node)
        exact = isinstance(example, Tensor) and not example.is_floating_point()
        return PLAIN if exact else UNKNOWN
    facts = [known[n] for n in node.all_input_nodes]
    rule = _FACT_RULES.get(node.target)
    if rule is not None and facts:
        return rule(node, known)
    kinds = {f.kind for f in facts}
    if Kind.UNKNOWN in kinds:
        return UNKNOWN
    return PLAIN if kinds <= {Kind.PLAIN} else CHOICE


_FactRule = Callable[[fx.Node, Mapping[fx.Node, Fact]], Fact]


def _rank(node: Any) -> int:
    return roles.tensor(node).dim()


def _same(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    return known[args_of(node)[0]]


def _selection(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    """Indices of the largest values: a choice, unless only the batch's own integers are sorted."""
    source = args_of(node)[0]
    if known[source].kind is Kind.PLAIN:
        return PLAIN
    if node.target is not aten.topk.default:
        return CHOICE
    dim = args_of(node)[2] if len(args_of(node)) > 2 else -1
    return replace(CHOICE, among=roles.tensor(source).shape[dim])


def _element(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    parent, index = args_of(node)
    if parent.target in _SELECTIONS and index == 0:  # the values, not the indices
        return known[args_of(parent)[0]]
    return known[parent]


def _moved(where: Callable[[fx.Node, int], int | None]) -> _FactRule:
    """The rule of an operator that only moves or removes dimensions."""

    def rule(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
        fact = known[args_of(node)[0]]
        if fact.experts is None:
            return fact
        return replace(fact, experts=where(node, fact.experts))

    return rule


def _permuted(node: fx.Node, dim: int) -> int:
    rank = _rank(node)
    return [d % rank for d in args_of(node)[1]].index(dim)


def _transposed(node: fx.Node, dim: int) -> int:
    first, second = (d % _rank(node) for d in args_of(node)[1:3])
    return {first: second, second: first}.get(dim, dim)


def _unsqueezed(node: fx.Node, dim: int) -> int:
    return dim + (args_of(node)[1] % _rank(node) <= dim)


def _without(node: fx.Node, dim: int) -> int | None:
    removed = (args_of(node)[1] if len(args_of(node)) > 1 else 0) % _rank(args_of(node)[0])
    return None if removed == dim else dim - (removed < dim)


def _viewed(node: fx.Node, dim: int) -> int | None:
    before, after = roles.tensor(args_of(node)[0]).shape, roles.tensor(node).shape
    if dim == 0 and after[:1] == before[:1]:
        return 0
    if dim == len(before) - 1 and after[-1:] == before[-1:]:
        return len(after) - 1
    return None


def _reduced(total: Kind) -> _FactRule:
    """Sums and any: over all tokens they tell about experts, over fewer still about tokens."""

    def rule(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
        fact = known[args_of(node)[0]]
        if fact.kind not in (Kind.MASK, Kind.COUNT, Kind.BUSY):
            return fact if fact.kind in (Kind.UNKNOWN, Kind.PLAIN) else CHOICE
        rank = _rank(args_of(node)[0])
        dims = args_of(node)[1] if len(args_of(node)) > 1 else None
        dims = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {d % rank for d in dims} if rank else set()
        keep = len(args_of(node)) > 2 and args_of(node)[2]
        experts = fact.experts
        if experts in gone:
            experts = None
        elif experts is not None and not keep:
            experts -= sum(d < experts for d in gone)
        left = set(range(rank)) - gone - {fact.experts}
        kind = Kind.MASK if left and fact.kind is Kind.MASK else total
        return replace(fact, kind=kind, experts=experts)

    return rule


_POSITIVE = {("gt", 0), ("ge", 1), ("ne", 0)}
_NEGATIVE = {("eq", 0), ("lt", 1), ("le", 0)}


_SYNONYMS = {
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
}


def _comparison(node: fx.Node) -> str:
    operator_: Any = node.target
    name: str = operator_._schema.name.removeprefix("aten::")
    return _SYNONYMS.get(name, name)


def _compared(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    name = _comparison(node)
    left, right = args_of(node)[:2]
    fact = known[left]
    if isinstance(right, fx.Node):
        return _compared_tensors(name, node, known)
    if fact.kind in (Kind.UNKNOWN, Kind.PLAIN):
        return fact
    if fact.kind is Kind.CHOICE:
        return Fact(Kind.MASK)
    positive = (name, right) in _POSITIVE or (
        fact.kind in (Kind.BUSY, Kind.MASK, Kind.IDLE) and (name, right) == ("eq", 1)
    )
    if not positive and (name, right) not in _NEGATIVE:
        return CHOICE
    if fact.kind is Kind.MASK:
        return fact if positive else CHOICE
    busy = positive != (fact.kind is Kind.IDLE)
    return replace(fact, kind=Kind.BUSY if busy else Kind.IDLE)


def _compared_tensors(name: str, node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    left, right = args_of(node)[:2]
    kinds = {known[left].kind, known[right].kind}
    if Kind.UNKNOWN in kinds:
        return UNKNOWN
    if kinds == {Kind.PLAIN}:
        return PLAIN
    if Kind.POSITION in kinds and kinds <= set(AMOUNTS):  # an expert's first and last row
        return Fact(Kind.BUSY if name in ("ne", "lt", "gt") else Kind.IDLE)
    if kinds <= {Kind.CHOICE, Kind.PLAIN}:
        choice, others = (left, right) if known[left].kind is Kind.CHOICE else (right, left)
        return Fact(Kind.MASK, _only_dim_of(others, choice, _rank(node)))
    return CHOICE


def _only_dim_of(others: fx.Node, choice: fx.Node, rank: int) -> int | None:
    """The dimension over which ``others`` (all the experts) varies and ``choice`` does not."""
    shapes = [(1,) * (rank - _rank(n)) + tuple(roles.tensor(n).shape) for n in (others, choice)]
    dims = [d for d, (a, b) in enumerate(zip(*shapes, strict=True)) if a != 1 and b == 1]
    return dims[0] if len(dims) == 1 else None


def _one_hot(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    fact = known[args_of(node)[0]]
    if fact.kind is not Kind.CHOICE:
        return fact
    return replace(fact, kind=Kind.MASK, experts=_rank(node) - 1)


def _scattered(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    """Marks or counts put where the choices point."""
    kinds = {known[n].kind for n in node.all_input_nodes}
    if kinds != {Kind.PLAIN, Kind.CHOICE} or known[args_of(node)[0]].kind is not Kind.PLAIN:
        return UNKNOWN if Kind.UNKNOWN in kinds else PLAIN if kinds == {Kind.PLAIN} else CHOICE
    rank = _rank(node)
    if rank == 1:
        return Fact(Kind.COUNT, 0)
    dim = args_of(node)[1]
    return Fact(Kind.MASK, dim % rank) if isinstance(dim, int) else CHOICE


def _counted(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    fact = known[args_of(node)[0]]
    return Fact(Kind.COUNT, 0) if fact.kind is Kind.CHOICE else fact


def _accumulated(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    fact = known[args_of(node)[0]]
    return replace(fact, kind=Kind.POSITION) if fact.kind is Kind.COUNT else CHOICE


def _summed(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    facts = [known[n] for n in node.all_input_nodes]
    kinds = {f.kind for f in facts}
    if Kind.UNKNOWN in kinds:
        return UNKNOWN
    if kinds & set(AMOUNTS) and kinds <= {*AMOUNTS, Kind.PLAIN}:
        return replace(facts[0], kind=Kind.POSITION)
    return PLAIN if kinds == {Kind.PLAIN} else CHOICE


def _difference(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    facts = [known[n] for n in node.all_input_nodes]
    if all(f.kind in AMOUNTS for f in facts):
        return replace(facts[0], kind=Kind.COUNT)
    return UNKNOWN if UNKNOWN in facts else CHOICE


def _conjunction(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    facts = [known[n] for n in node.all_input_nodes]
    if Kind.UNKNOWN in {f.kind for f in facts}:
        return UNKNOWN
    masks = [f for f in facts if f.kind is Kind.MASK]
    return masks[0] if masks else facts[0] if len({f.kind for f in facts}) == 1 else CHOICE


def _negated(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    fact = known[args_of(node)[0]]
    swapped = {Kind.BUSY: Kind.IDLE, Kind.IDLE: Kind.BUSY, Kind.MASK: Kind.CHOICE}
    return replace(fact, kind=swapped.get(fact.kind, fact.kind))


def _looked_up(node: fx.Node, known: Mapping[fx.Node, Fact]) -> Fact:
    """An integer table of the model, read at the batch's integers, chooses experts too."""
    kinds = {known[n].kind for n in node.all_input_nodes}
    if Kind.UNKNOWN in kinds:
        return UNKNOWN
    table = args_of(node)[0]
    if table.op == "placeholder" or kinds != {Kind.PLAIN}:
        return CHOICE
    return PLAIN


def _overloads(rules: Mapping[str, _FactRule]) -> dict[Any, _FactRule]:
    found: dict[Any, _FactRule] = {}
    for names, rule in rules.items():
        for name in names.split():
            packet = getattr(aten, name, None)
            if packet is not None:
                found |= {getattr(packet, overload): rule for overload in packet.overloads()}
    return found


_SELECTIONS = _overloads({"topk sort max min kthvalue mode": _selection})
_FACT_RULES: dict[Any, _FactRule] = {
    **_SELECTIONS,
    **_overloads(
        {
            "argmax argmin argsort multinomial": _selection,
            "_to_copy to clone detach alias contiguous lift_fresh lift_fresh_copy slice expand "
            "item _local_scalar_dense": _same,
            "permute": _moved(_permuted),
            "transpose": _moved(_transposed),
            "unsqueeze": _moved(_unsqueezed),
            "select unbind": _moved(_without),
            "view reshape flatten squeeze _unsafe_view": _moved(_viewed),
            "sum count_nonzero": _reduced(Kind.COUNT),
            "any": _reduced(Kind.BUSY),
            "eq ne lt le gt ge greater greater_equal less less_equal not_equal": _compared,
            "one_hot": _one_hot,
            "scatter scatter_add index_add index_put": _scattered,
            "bincount histc": _counted,
            "cumsum": _accumulated,
            "add": _summed,
            "sub diff": _difference,
            "mul bitwise_and bitwise_or logical_and logical_or": _conjunction,
            "bitwise_not logical_not": _negated,
            "index gather index_select": _looked_up,
        }
    ),
    operator.getitem: _element,
    operator.add: _summed,
    operator.sub: _difference,
}
