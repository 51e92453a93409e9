"""What each operator's result means, from the meanings of its operands: see ``row_domains``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.passes.axes import (
    RESHAPES,
    Axis,
    Dims,
    argument,
    carried,
    contraction,
    is_pointwise,
    kinds,
    packet,
    permutation,
    positions,
    shape,
    tensors,
)
from moptrace.passes.row_domains import (
    Chooser,
    Counts,
    Domains,
    Index,
    Meaning,
    Position,
    Ranking,
    Routing,
    Rows,
    Span,
    aligned,
    fill_of,
    is_literal,
    span_of,
    spelled,
)
from moptrace.passes.row_keep import (
    along_rule,
    contraction_rule,
    divide_rule,
    expand_rule,
    permute_rule,
    pointwise_rule,
    repeat_interleave_rule,
    reshape_rule,
    select_rule,
    unbind_rule,
)
from moptrace.passes.row_moves import (
    cat_rule,
    gather_rule,
    index_add_rule,
    index_copy_rule,
    index_put_rule,
    index_rule,
    nonzero_rule,
    scatter_reduce_rule,
    slice_rule,
    slice_scatter_rule,
    split_rule,
    stack_rule,
    write_rows,
)

__all__ = ["interpret"]

aten = torch.ops.aten
Rule = Callable[[Domains, fx.Node], Meaning]


def interpret(graph: fx.Graph) -> Domains:
    """The meaning of every node of a graph that has one."""
    domains = Domains(meaning_of)
    for node in graph.nodes:
        if node.op == "call_function" and (meaning := meaning_of(domains, node)) is not None:
            domains.meaning[node] = meaning
    return domains


_PRODUCTS = {
    aten.linear, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.matmul, aten.einsum,
    aten.one_hot,
}  # fmt: skip


def meaning_of(domains: Domains, node: fx.Node) -> Meaning:
    meaning = _meaning_of(domains, node)
    if isinstance(meaning, Rows) and meaning.expert is not None and meaning.on is None:
        # Every token has the one expert: its values are those of a dense block. Masks keep their
        # meaning, since rows that they select have a size of their own.
        if meaning.routing.experts == 1 and kinds(meaning.dims) <= {"token"} and not meaning.done:
            return None
    return meaning


def _meaning_of(domains: Domains, node: fx.Node) -> Meaning:
    rule = RULES.get(packet(node))
    if rule is not None:
        return rule(domains, node)
    # The table of operators has all that can start a meaning: nothing comes from nothing.
    if not any(n in domains.meaning for n in node.all_input_nodes):
        return None
    if packet(node) not in _PRODUCTS and any(
        isinstance(domains.meaning.get(n), Position) for n in node.all_input_nodes
    ):
        return Position()
    if packet(node) in RESHAPES:
        return reshape_rule(domains, node)
    if is_pointwise(node):
        return pointwise_rule(domains, node)
    if (order := permutation(node)) is not None:
        return permute_rule(domains, node, order)
    if (product := contraction(node)) is not None:
        return contraction_rule(domains, node, product)
    if (along := positions(node)) is not None:
        return along_rule(domains, node, along)
    return domains.refuse(node, f"{spelled(node)} is not known to treat each row alike")


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
    return Chooser(rank - 1, experts)


def getitem_rule(domains: Domains, node: fx.Node) -> Meaning:
    source, number = node.args
    meaning = domains.meaning.get(source)  # type: ignore[arg-type]
    if isinstance(meaning, Chooser):
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
        ranked = Ranking(value.dim() - 1, value.shape[-1])
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
    return _matrix(ids.dims, ids.routing, shape(node)[-1], on=1, off=0)


def _matrix(dims: Dims, routing: Routing, columns: int, **constant: Any) -> Rows | None:
    """A value for each of ``dims`` and expert; the dimension of one expert carries nothing."""
    routing.experts = routing.experts or columns
    if routing.experts > 1:
        return Rows((*dims, (routing.expert,)), routing, **constant)
    return Rows((*dims, ()), routing, expert=0, **constant) if columns == 1 else None


def compare_rule(domains: Domains, node: fx.Node) -> Meaning:
    """``ids == e`` and ``ids == arange(E)`` select the pairs of an expert."""
    left, right = node.args[:2]
    if is_literal(left) or (domains.index(right) and not domains.index(left)):
        left, right = right, left
    if isinstance(left, fx.Node) and left in domains.meaning and not domains.index(left):
        return pointwise_rule(domains, node)
    if is_literal(right):
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
        for here, there in zip(aligned(a.dims, rank), aligned(b.dims, rank), strict=True)
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
    fill = fill_of(base)
    if ids is None or ids.routing is None or fill is None or ids.to != (ids.routing.expert,):
        return None
    if dim % rank != rank - 1 or len(ids.dims) != rank:  # type: ignore[operator]
        return None
    if any(a.kind == "slot" for space in ids.dims[:-1] for a in space) or not ids.routing.distinct:
        return None
    on = source if is_literal(source) else fill_of(source)
    return _matrix(ids.dims[:-1], ids.routing, shape(node)[-1], on=on, off=fill)


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
    if (
        isinstance(meaning, Counts)
        and meaning.running
        and fill_of(argument(node, 3, "prepend")) == 0
    ):
        return Counts(meaning.routing)
    return None


def item_rule(domains: Domains, node: fx.Node) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    return meaning if isinstance(meaning, Span) else None


def arithmetic_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Sums and differences of numbers of pairs."""
    a, b = (span_of(domains, x) for x in node.args[:2])
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
