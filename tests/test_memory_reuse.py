"""Operators that write where memory is: the same values, whatever the graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from moptrace.kernels.memory_reuse import reuse_memory

aten = torch.ops.aten

UNARY = (aten.silu.default, aten.neg.default, aten.sigmoid.default)
BINARY = (aten.mul.Tensor, aten.add.Tensor, aten.silu_backward.default, aten.maximum.default)
ROWS = WIDTH = 4  # so that a transposed view has the shape of its source


def fresh(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.t() @ x


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda x: x.meta["val"]))
    return node


@st.composite
def graphs(draw: st.DrawFn) -> fx.Graph:
    """Arithmetic on rows, on views of them, and on what lies side by side."""
    graph = fx.Graph()
    values = [graph.placeholder(f"x{i}") for i in range(2)]
    for node in values:
        node.meta["val"] = torch.empty(ROWS, WIDTH)

    def one() -> fx.Node:
        return draw(st.sampled_from(values))

    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["unary", "binary", "sides", "fresh", "flipped"]))
        if kind == "unary":
            values.append(call(graph, draw(st.sampled_from(UNARY)), one()))
        elif kind == "binary":
            values.append(call(graph, draw(st.sampled_from(BINARY)), one(), one()))
        elif kind == "fresh":
            values.append(call(graph, fresh, one(), one()))
        elif kind == "flipped":
            values.append(call(graph, aten.transpose.int, one(), 0, 1))
        else:
            halves = call(graph, aten.split.Tensor, one(), WIDTH // 2, 1)
            low, high = (call(graph, operator.getitem, halves, i) for i in range(2))
            parts = [call(graph, draw(st.sampled_from(BINARY)), a, low) for a in (low, high)]
            values.append(call(graph, aten.cat.default, parts, draw(st.sampled_from([1, -1]))))
    results = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    graph.output(tuple(results))
    return graph


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_any_graph_gives_the_same_and_leaves_its_inputs(graph: fx.Graph) -> None:
    inputs = [torch.rand(ROWS, WIDTH, dtype=torch.float32) for _ in range(2)]
    want = fx.GraphModule(nn.Module(), graph)(*inputs)
    reused = fx.Graph()
    reused.output(reused.graph_copy(graph, {}))
    reuse_memory(reused, fresh=(fresh,))
    given_ = [x.clone() for x in inputs]
    found = fx.GraphModule(nn.Module(), reused)(*given_)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given_, inputs, strict=True))


def gated() -> fx.Graph:
    """What the backward of a gate does with a product and the two halves of another."""
    graph = fx.Graph()
    product, hidden = (graph.placeholder(name) for name in ("product", "hidden"))
    product.meta["val"], hidden.meta["val"] = (
        torch.empty(ROWS, WIDTH),
        torch.empty(ROWS, WIDTH // 2),
    )
    halves = call(graph, aten.split.Tensor, product, WIDTH // 2, 1)
    gate, up = (call(graph, operator.getitem, halves, i) for i in range(2))
    of_hidden = call(graph, aten.neg.default, hidden)
    of_up = call(graph, aten.mul.Tensor, of_hidden, call(graph, aten.silu.default, gate))
    of_silu = call(graph, aten.mul.Tensor, of_hidden, up)
    of_gate = call(graph, aten.silu_backward.default, of_silu, gate)
    graph.output((call(graph, aten.cat.default, [of_gate, of_up], 1),))
    return graph


def test_a_gate_writes_its_gradients_side_by_side() -> None:
    graph = gated()
    reuse_memory(graph)
    targets = [node.target for node in graph.nodes]
    assert aten.cat.default not in targets
    assert targets.count(aten.mul.out) == 2
    assert targets.count(aten.silu_backward.grad_input) == 1
    assert targets.count(aten.silu.default) == targets.count(aten.neg.default) == 1
