"""What experts compute, as graphs: one for each thing that may be special about an expert."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from moptrace.kernels.expert_function import ExpertFunction, Operand, expert_function

aten, ops = torch.ops.aten, torch.ops.moptrace


class Writer:
    """Writes the graph of an expert's function of width d and hidden width f."""

    def __init__(self, d: int, f: int, dtype: torch.dtype):
        self.d, self.f, self.dtype = d, f, dtype
        self.graph = fx.Graph()
        self.counts = self.graph.placeholder("counts")
        self.operands: list[Operand] = []
        self.rows = self.operand("rows", d)

    def operand(self, kind: Any, *shape: int, dtype: torch.dtype | None = None) -> fx.Node:
        self.operands.append(Operand(kind, shape, dtype or self.dtype))
        return self.graph.placeholder(f"x{len(self.operands)}")

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def product(self, rows: fx.Node, weight: fx.Node) -> fx.Node:
        return self(ops.grouped_mm.default, rows, weight, self.counts)

    def linear(self, rows: fx.Node, inside: int, outside: int) -> fx.Node:
        """A product with a parameter that is stored as ``nn.Linear`` does."""
        weight = self.operand("experts", outside, inside)
        return self.product(rows, self(aten.transpose.int, weight, 1, 2))

    def bias(self, rows: fx.Node, width: int) -> fx.Node:
        own = self.operand("experts", width)
        each = self(ops.expert_rows.default, own, self.counts, self.rows)
        return self(aten.add.Tensor, rows, each)

    def halves(self, rows: fx.Node) -> tuple[fx.Node, fx.Node]:
        both = self(aten.split.Tensor, rows, self.f, 1)
        return self(operator.getitem, both, 0), self(operator.getitem, both, 1)

    def made(self, *results: fx.Node) -> ExpertFunction:
        self.graph.output(results)
        return expert_function(self.graph, self.operands)


def swiglu(w: Writer) -> ExpertFunction:
    gate, up = w.halves(w.linear(w.rows, w.d, 2 * w.f))
    return w.made(w.linear(w(aten.mul.Tensor, w(aten.silu.default, gate), up), w.f, w.d))


def clamped_with_biases(w: Writer) -> ExpertFunction:
    """As in gpt-oss; the gradient of a clamp has a constant in it."""
    gate, up = w.halves(w.bias(w.linear(w.rows, w.d, 2 * w.f), 2 * w.f))
    gate, up = w(aten.clamp.default, gate, None, 0.7), w(aten.clamp.default, up, -0.7, 0.7)
    gated = w(aten.mul.Tensor, gate, w(aten.sigmoid.default, w(aten.mul.Tensor, gate, 1.702)))
    hidden = w(aten.mul.Tensor, w(aten.add.Tensor, up, 1), gated)
    return w.made(w.bias(w.linear(hidden, w.f, w.d), w.d))


def squared_relu(w: Writer) -> ExpertFunction:
    """No gate, and weights that are stored as they are used."""
    hidden = w.product(w.rows, w.operand("experts", w.d, w.f))
    hidden = w(aten.pow.Tensor_Scalar, w(aten.relu.default, hidden), 2)
    return w.made(w.product(hidden, w.operand("experts", w.f, w.d)))


def three_products_and_two_results(w: Writer) -> ExpertFunction:
    one = w(aten.tanh.default, w.linear(w.rows, w.d, w.f))
    two = w(aten.gelu.default, w.linear(one, w.f, w.f))
    return w.made(w.linear(two, w.f, w.d), one)


def one_weight_twice(w: Writer) -> ExpertFunction:
    weight = w.operand("experts", w.d, w.d)
    hidden = w(aten.silu.default, w.product(w.rows, weight))
    return w.made(w.product(w(aten.add.Tensor, hidden, w.rows), weight))


def in_a_wider_type(w: Writer) -> ExpertFunction:
    """The activation in float64, which is exact for all narrower types."""
    hidden = w(aten._to_copy.default, w.linear(w.rows, w.d, w.f), dtype=torch.float64)
    hidden = w(aten._to_copy.default, w(aten.exp.default, hidden), dtype=w.dtype)
    return w.made(w.linear(hidden, w.f, w.d))


def scaled_for_all(w: Writer) -> ExpertFunction:
    """A scale that all experts share."""
    hidden = w.linear(w.rows, w.d, w.f)
    one = w(aten.view.default, w.operand("all", w.f), [1, w.f])
    experts = w(aten.sym_size.int, w.counts, 0)
    each = w(aten.expand.default, one, [experts, w.f])
    each = w(ops.expert_rows.default, each, w.counts, w.rows)
    return w.made(w.linear(w(aten.mul.Tensor, hidden, each), w.f, w.d))


def normalised(w: Writer) -> ExpertFunction:
    """A row of zeros has no direction: padding must reach neither results nor gradients."""
    hidden = w.linear(w.rows, w.d, w.f)
    length = w(
        aten.sqrt.default, w(aten.sum.dim_IntList, w(aten.square.default, hidden), [1], True)
    )
    return w.made(w.linear(w(aten.div.Tensor, hidden, length), w.f, w.d))


def interleaved(w: Writer) -> ExpertFunction:
    """Gate and up take turns, and a router's weight is multiplied in before the last product."""
    weight = w.operand("rows")
    both = w.bias(w.linear(w.rows, w.d, 2 * w.f), 2 * w.f)
    last = 2**63 - 1
    gate = w(aten.slice.Tensor, both, 1, 0, last, 2)
    up = w(aten.slice.Tensor, both, 1, 1, last, 2)
    hidden = w(aten.mul.Tensor, w(aten.gelu.default, gate, approximate="tanh"), up)
    hidden = w(aten.mul.Tensor, hidden, w(aten.unsqueeze.default, weight, 1))
    return w.made(w.linear(hidden, w.f, w.d))


def gate_and_up_apart(w: Writer) -> ExpertFunction:
    """Two products of rows that are scaled first, each with a weight of the router's."""
    scaled = w(aten.mul.Tensor, w.rows, w.operand("rows", 1))
    gate, up = w.linear(scaled, w.d, w.f), w.linear(scaled, w.d, w.f)
    return w.made(w.linear(w(aten.mul.Tensor, w(aten.silu.default, gate), up), w.f, w.d))


def in_pairs(w: Writer) -> ExpertFunction:
    """Gate and up are the last dimension of three."""
    pairs = w(aten.view.default, w.linear(w.rows, w.d, 2 * w.f), [-1, w.f, 2])
    pairs = w(aten.mul.Tensor, pairs, 0.5)
    gate, up = (w(aten.select.int, pairs, -1, i) for i in range(2))
    return w.made(w.linear(w(aten.mul.Tensor, w(aten.silu.default, gate), up), w.f, w.d))


def gathered(w: Writer, choices: int = 1, some: bool = False) -> ExpertFunction:
    """Rows are copies of tokens that are made where they are used."""
    w.operands[0] = replace(w.operands[0], kind="tokens")
    order = w.operand("rows", dtype=torch.int64)
    w.rows = w(ops.token_rows.default, w.rows, order, choices, some)
    gate, up = w.halves(w.linear(w.rows, w.d, 2 * w.f))
    return w.made(w.linear(w(aten.mul.Tensor, w(aten.silu.default, gate), up), w.f, w.d))


def gathered_for_some(w: Writer) -> ExpertFunction:
    """Not every token has a row for each of its choices."""
    return gathered(w, 2, True)


FUNCTIONS = (
    swiglu, clamped_with_biases, squared_relu, three_products_and_two_results, one_weight_twice,
    in_a_wider_type, scaled_for_all, normalised, interleaved, gate_and_up_apart, in_pairs,
    gathered, gathered_for_some,
)  # fmt: skip


def leaves(function: ExpertFunction, counts: list[int]) -> list[Tensor]:
    """Operands, of as many tokens as there are rows; integers are an order of these."""
    torch.manual_seed(0)
    rows = sum(counts)
    first = {"rows": [rows], "experts": [len(counts)], "all": [], "tokens": [rows]}
    return [
        torch.randn(*first[x.kind], *x.shape, dtype=x.dtype).requires_grad_()
        if x.dtype.is_floating_point
        else torch.randperm(rows)
        for x in function.operands
    ]
