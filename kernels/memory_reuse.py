"""Let pointwise operators write where memory is: over an operand, or into a concatenation.

What runs on the rows of one expert is to stay in cache. An operator that makes a new tensor for its
result brings memory into it that was not there, and a concatenation moves what was just written.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

__all__ = ["reuse_memory", "with_out"]

aten = torch.ops.aten


def reuse_memory(graph: fx.Graph, fresh: Collection[Any] = ()) -> None:
    """Give pointwise operators of a graph a place for their results, where there is one.

    The results of operators that only a concatenation of columns uses are written there at once.
    Others are written over an operand of their shape and dtype that nothing uses afterwards, if it
    is the result of a pointwise operator or of one of ``fresh``, which give memory of their own.

    Requires: example values under ``meta["val"]``. Ensures: the same values; inputs are not
    written.
    """
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        if _is_of_columns(node):
            _write_into(node)
    memory = _Memory(graph)
    for node in graph.nodes:
        if not _makes_its_own(node) or with_out(node.target) is None:
            continue
        for x in node.all_input_nodes:
            own = _makes_its_own(x) or x.target in fresh or x in memory.written
            if own and _is_alike(x, node) and memory.is_free_after(x, node):
                _write_to(node, x)
                memory.write(node, over=x)
                break


def _write_to(node: fx.Node, place: fx.Node) -> None:
    found = with_out(node.target)  # type: ignore[arg-type]
    assert found is not None
    node.target, name = found
    node.kwargs = {**node.kwargs, name: place}


class _Memory:
    """Which nodes look at the same memory, and until when it is needed."""

    def __init__(self, graph: fx.Graph):
        self.source: dict[fx.Node, fx.Node] = {}
        self.last: dict[fx.Node, fx.Node] = {}
        self.written = set[fx.Node]()
        for node in graph.nodes:
            if _is_view(node):
                self.source[node] = node.all_input_nodes[0]
            for x in node.all_input_nodes:
                self.last[self.root(x)] = node

    def root(self, x: fx.Node) -> fx.Node:
        while x in self.source:
            x = self.source[x]
        return x

    def is_free_after(self, x: fx.Node, node: fx.Node) -> bool:
        """Whether a node is the last that looks at the memory of an operand, and at it as it is."""
        root = self.root(x)
        return self.last[root] is node and not any(
            y is not x and self.root(y) is root for y in node.all_input_nodes
        )

    def write(self, node: fx.Node, over: fx.Node) -> None:
        root = self.root(over)
        self.last[root] = self.last.pop(node, node)
        self.source[node] = over
        self.written.add(node)


@cache
def with_out(target: OpOverload) -> tuple[OpOverload, str] | None:
    """The overload that takes the tensor to write to, and the name of that argument.

    >>> with_out(aten.mul.Tensor)
    (<OpOverload(op='aten.mul', overload='out')>, 'out')
    """
    taken = [(x.name, str(x.type)) for x in target._schema.arguments]
    packet = target.overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        arguments = overload._schema.arguments
        own = [(x.name, str(x.type)) for x in arguments if not x.is_out]
        out = [x.name for x in arguments if x.is_out]
        if own == taken and len(out) == 1:
            return overload, out[0]
    return None


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _makes_its_own(node: fx.Node) -> bool:
    """Whether it is a pointwise operator that makes the memory of its result."""
    return _is_pointwise(node) and not any(x.is_out for x in node.target._schema.arguments)  # type: ignore[union-attr]


def _is_view(node: fx.Node) -> bool:
    kinds = (operator.getitem, aten.reshape.default, aten._unsafe_view.default)
    return getattr(node.target, "is_view", False) or node.target in kinds


def _is_alike(x: fx.Node, node: fx.Node) -> bool:
    """Whether a value has the shape and the dtype of another."""
    one, other = x.meta["val"], node.meta["val"]
    sizes = [[str(n) for n in value.shape] for value in (one, other)]
    return sizes[0] == sizes[1] and one.dtype == other.dtype


def _is_of_columns(node: fx.Node) -> bool:
    """Whether all that is concatenated comes from operators that could write it there."""
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    value: Tensor = node.meta["val"]
    assert isinstance(parts, (list, tuple))
    return (
        value.dim() == 2
        and dim in (1, -1)
        and len(set(parts)) == len(parts)
        and all(
            isinstance(x, fx.Node)
            and _is_pointwise(x)
            and with_out(x.target) is not None  # type: ignore[arg-type]
            and len(x.users) == 1
            and x.meta["val"].dtype == value.dtype
            and any(_has_rows_of(y, node) for y in x.all_input_nodes)
            for x in parts
        )
    )


def _write_into(node: fx.Node) -> None:
    graph, width = node.graph, int(node.meta["val"].shape[1])
    parts: Any = node.args[0]
    first = next(x for x in graph.nodes if x in parts)
    like = next(x for x in first.all_input_nodes if _has_rows_of(x, node))
    with graph.inserting_before(first):
        whole = graph.call_function(_empty_rows, (like, width, node.meta["val"].dtype))
    start = 0
    for x in parts:
        columns = int(x.meta["val"].shape[1])
        with graph.inserting_before(x):
            place = graph.call_function(aten.narrow.default, (whole, 1, start, columns))
        _write_to(x, place)
        start += columns
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _has_rows_of(x: fx.Node, node: fx.Node) -> bool:
    value: Any = x.meta.get("val")
    is_matrix = isinstance(value, Tensor) and value.dim() == 2
    return is_matrix and str(value.shape[0]) == str(node.meta["val"].shape[0])


def _empty_rows(like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty(like.shape[0], width, dtype=dtype)
