"""Every sharding rule is true: shards in, the operator on each, and its results put together.

``SAMPLES`` holds calls of every operator in ``RULES``. For every factor that a call's rule lets be
split, the operands are split over two and three ranks as the rule says, evenly or not, the placed
and localised call runs on simulated ranks, and results and gradients must be those of the whole
call. Operands through which the rule lets a pending sum pass are given as terms of a sum.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import Layout, Level, Pass, Program, roles
from moptrace.core import Buffer, Output, Parameter, Signature
from moptrace.passes.localize import localize
from moptrace.passes.place import place
from moptrace.placement import INVARIANT, PARTIAL, Kind, Placement, Shard
from moptrace.reshard import cast_whole
from moptrace.rules import JOINT, RULES, Rule, operands, rule_for
from moptrace.simulate import simulate

aten, ops = torch.ops.aten, torch.ops.moptrace


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of an operator on real tensors. Floating ones get gradients."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    differentiable: bool = True  # False where torch has no derivative: compared by value

    @property
    def tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [x for x in leaves if isinstance(x, Tensor)]

    def __str__(self) -> str:
        shapes = ", ".join(str(list(x.shape)) for x in self.tensors)
        return f"{self.op}({shapes})"


def call(op: Any, *args: Any, **kwargs: Any) -> Sample:
    return Sample(op, args, kwargs)


def value(op: Any, *args: Any, **kwargs: Any) -> Sample:
    return Sample(op, args, kwargs, differentiable=False)


_generator = torch.Generator().manual_seed(0)


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


def whole_numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=_generator)


def yes_or_no(*shape: int) -> Tensor:
    return whole_numbers(2, *shape).bool()


def _pointwise() -> Iterator[Sample]:
    x, y = real(6, 5), real(6, 5)
    for binary in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        yield call(binary, x, y)
        yield call(binary, x, real(5))
        yield call(binary, real(6, 1), y)
        yield call(binary, real(1, 6, 1), real(4, 1, 5))
    yield call(aten.maximum.default, x, y)
    yield call(aten.where.self, yes_or_no(6, 5), x, y)
    yield call(aten.where.self, yes_or_no(5), x, real(6, 1))
    yield call(aten.masked_fill.Scalar, x, yes_or_no(6, 5), 0.5)
    yield call(aten.addcmul.default, x, y, real(5))
    yield call(aten.mul.Scalar, x, 3.0)
    yield call(aten.add.Scalar, x, 3.0)
    yield call(aten.pow.Tensor_Scalar, x, 2)
    for unary in (aten.silu, aten.gelu, aten.sigmoid, aten.exp, aten.tanh, aten.relu, aten.neg):
        yield call(unary.default, x)
    yield call(aten.clone.default, x)
    yield call(aten.detach.default, x)
    yield call(aten.contiguous.default, x)
    yield value(aten.copy.default, x, y)
    yield call(aten.lift_fresh_copy.default, x)
    for both in (aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor):
        yield call(both, yes_or_no(6, 5), yes_or_no(6, 1))
    yield call(aten._to_copy.default, x, dtype=torch.float32)
    yield call(aten._to_copy.default, x, dtype=torch.int64)
    yield call(aten.type_as.default, x, y)
    yield call(aten.type_as.default, x, real(3))
    yield call(aten._to_copy.default, yes_or_no(6, 5), dtype=torch.float64)


def _views() -> Iterator[Sample]:
    x = real(6, 4, 5)
    for view in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        yield call(view, x, [24, 5])
        yield call(view, x, [6, 20])
        yield call(view, x, [-1, 5])
        yield call(view, x, [6, 2, 2, 5])
        yield call(view, x, [1, 6, 4, 5, 1])
        yield call(view, x, [12, 2, 5])
        yield call(view, real(24, 5), [6, 4, 5])
        yield call(view, real(5, 4), [5, 2, 2])
        yield call(view, real(1, 6, 4), [6, 4])
        yield call(view, real(6), [2, 3])
    yield call(aten.flatten.using_ints, x, 0, 1)
    yield call(aten.flatten.using_ints, x)
    for swap in (aten.transpose.int, aten.swapaxes.default):
        yield call(swap, x, 0, 2)
        yield call(swap, x, -1, 1)
    yield call(aten.permute.default, x, [2, 0, 1])
    yield call(aten.t.default, real(6, 5))
    yield call(aten.t.default, real(6))
    yield call(aten.numpy_T.default, real(6, 5))
    yield call(aten.expand.default, real(6, 1, 5), [6, 4, 5])
    yield call(aten.expand.default, real(6, 5), [3, 6, 5])
    yield call(aten.expand.default, real(6, 1, 5), [-1, 4, -1])
    yield call(aten.expand.default, real(5, 1), [5, 4])
    yield call(aten.unsqueeze.default, x, 1)
    yield call(aten.unsqueeze.default, x, -1)
    yield call(aten.squeeze.dim, real(6, 1, 5), 1)
    yield call(aten.squeeze.dims, real(1, 6, 1), [0, 2])
    yield call(aten.squeeze.default, real(6, 1, 5))
    yield call(aten.squeeze.default, real(3, 1, 2))
    yield call(aten.view_as_real.default, torch.view_as_complex(real(6, 5, 2)))
    yield value(aten.view_as_complex.default, real(6, 5, 2))


def _parts() -> Iterator[Sample]:
    x = real(6, 4, 5)
    yield call(aten.slice.Tensor, x, 1, 1, 3)
    yield call(aten.slice.Tensor, x, 0, 0, 6)
    yield call(aten.slice.Tensor, x, 0, 0, 2**63 - 1)
    yield call(aten.slice.Tensor, x, -1, 0, 5, 2)
    yield call(aten.select.int, x, 1, 2)
    yield call(aten.select.int, x, -1, 0)
    yield call(aten.unbind.int, x, 1)
    yield call(aten.unbind.int, x)
    yield call(aten.split.Tensor, x, 2, 1)
    yield call(aten.split.Tensor, x, 4)
    yield call(aten.split_with_sizes.default, x, [1, 3], 1)
    yield call(aten.chunk.default, x, 2, -1)
    yield call(aten.tensor_split.sections, x, 3, 1)
    yield call(aten.tensor_split.indices, x, [1, 3], 1)
    yield call(aten.cat.default, [real(6, 4), real(6, 2)], 1)
    yield call(aten.cat.default, [real(6, 4), real(2, 4)])
    yield call(aten.stack.default, [real(6, 4), real(6, 4)], 1)
    yield call(aten.stack.default, [real(6, 4), real(6, 4)], -1)
    yield call(aten.pad.default, x, [1, 2])
    yield call(aten.pad.default, x, [0, 0, 2, 0], "constant", 1.5)
    yield call(aten.constant_pad_nd.default, x, [0, 1, 1, 0], 0.0)
    yield call(aten.constant_pad_nd.default, x, [0, 1], 2.0)
    yield call(aten.roll.default, x, [1], [1])
    yield call(aten.roll.default, x, [2])
    yield call(aten.flip.default, x, [0, -1])
    yield call(aten.repeat.default, real(6, 4), [1, 2])
    yield call(aten.repeat.default, real(6, 4), [2, 1, 1])
    yield call(aten.repeat_interleave.self_int, real(6, 4), 2, 1)
    yield call(aten.repeat_interleave.self_int, real(6, 4), 2)
    yield call(aten.slice_scatter.default, x, real(6, 2, 5), 1, 1, 3)
    yield call(aten.select_scatter.default, x, real(6, 5), 1, 2)
    yield call(aten.tril.default, x)
    yield call(aten.triu.default, x, 1)


def _reductions() -> Iterator[Sample]:
    x = real(6, 4, 5)
    for total in (aten.sum, aten.mean):
        yield call(total.default, x)
        yield call(total.dim, x, [1]) if total is aten.mean else call(total.dim_IntList, x, [1])
        over = total.dim if total is aten.mean else total.dim_IntList
        yield call(over, x, [0, -1], True)
        yield call(over, x, None)
    yield call(aten.sum.default, yes_or_no(6, 5))
    for extreme in (aten.amax, aten.amin):
        yield call(extreme.default, x, [1])
        yield call(extreme.default, x, [0, 2], True)
    for name in (aten.max, aten.min, aten.median):
        yield call(name.default, x)
        yield call(name.dim, x, 1)
        yield call(name.dim, x, -1, True)
    yield call(aten.max.other, x, real(6, 4, 5))
    yield call(aten.min.other, x, real(5))
    for name in (aten.any, aten.all):
        yield call(name.default, yes_or_no(6, 5))
        yield call(name.dim, yes_or_no(6, 5), 1)
    for name in (aten.argmax, aten.argmin):
        yield call(name.default, x)
        yield call(name.default, x, 1)
        yield call(name.default, x, -1, True)
    yield call(aten.logsumexp.default, x, [1])
    yield call(aten.logsumexp.default, x, [-1], True)
    yield call(aten.prod.default, x)
    yield call(aten.prod.dim_int, x, 1)
    for name in (aten.var, aten.std):
        yield call(name.default, x)
        yield call(name.default, x, False)
        yield call(name.dim, x, [1])
        yield call(name.dim, x, [1], True, True)
        yield call(name.correction, x, [-1], correction=0, keepdim=True)
    yield call(aten.linalg_vector_norm.default, x)
    yield call(aten.linalg_vector_norm.default, x, 2, [-1], True)
    yield call(aten.norm.Scalar, x, 2)
    yield call(aten.norm.ScalarOpt_dim, x, 2, [1], True)
    for name in (aten.cumsum, aten.cumprod, aten.logcumsumexp):
        yield call(name.default, x, 1)
    yield value(aten.diff.default, x)
    yield value(aten.diff.default, x, 1, 1, real(6, 1, 5))
    yield value(aten.histc.default, real(6), 4, -1.0, 1.0)
    yield value(aten.histc.default, real(6), 4)
    yield value(aten.bincount.default, whole_numbers(4, 6), None, 4)
    yield value(aten.bincount.default, whole_numbers(4, 6), real(6), 4)


def _products() -> Iterator[Sample]:
    yield call(aten.linear.default, real(6, 4, 5), real(3, 5))
    yield call(aten.linear.default, real(6, 5), real(4, 5), real(4))
    yield call(aten.linear.default, real(5), real(4, 5))
    yield call(aten.matmul.default, real(6, 4), real(4, 5))
    yield call(aten.matmul.default, real(3, 6, 4), real(4, 5))
    yield call(aten.matmul.default, real(3, 1, 6, 4), real(2, 4, 5))
    yield call(aten.matmul.default, real(6), real(6))
    yield call(aten.matmul.default, real(6, 4), real(4))
    yield call(aten.matmul.default, real(4), real(4, 6))
    yield call(aten.matmul.default, real(4), real(3, 4, 6))
    yield call(aten.matmul.default, real(3, 6, 4), real(4))
    yield call(aten.mm.default, real(6, 4), real(4, 5))
    yield call(aten.bmm.default, real(3, 6, 4), real(3, 4, 5))
    yield call(aten.mv.default, real(6, 4), real(4))
    yield call(aten.dot.default, real(6), real(6))
    yield call(aten.outer.default, real(6), real(4))
    yield call(aten.addmm.default, real(5), real(6, 4), real(4, 5))
    yield call(aten.addmm.default, real(6, 5), real(6, 4), real(4, 5))
    lower = (real(6, 4, 4) + 4 * torch.eye(4)).tril()
    yield call(aten.linalg_solve_triangular.default, lower, real(6, 4, 5), upper=False)
    yield call(aten.einsum.default, "bi,bij->bj", [real(6, 4), real(6, 4, 5)])
    yield call(aten.einsum.default, "end,nke,nk->nd", [real(4, 6, 5), real(6, 2, 4), real(6, 2)])
    yield call(aten.einsum.default, "ij->ji", [real(6, 4)])
    yield call(aten.einsum.default, "ii->i", [real(6, 6)])
    yield call(aten.einsum.default, "...i,ij->...j", [real(6, 4), real(4, 5)])
    attention = aten.scaled_dot_product_attention.default
    q, k, v = real(4, 6, 3, 4), real(4, 6, 5, 4), real(4, 6, 5, 2)
    yield call(attention, q, k, v)
    yield call(attention, q, k, v, real(4, 1, 3, 5))
    grouped = real(4, 2, 5, 4), real(4, 2, 5, 4)
    yield call(attention, q, *grouped, enable_gqa=True)
    same = real(4, 6, 5, 4)
    keys, no_mask = (real(4, 6, 5, 4), real(4, 6, 5, 4)), (None, None)
    yield call(ops.attention.default, same, *keys, *no_mask, None, 0, 0.5)
    yield call(ops.attention.default, same, *grouped, *no_mask, None, None, 0.5)
    yield call(ops.attention.default, q, *grouped, *no_mask, None, None, 0.5)
    documents = whole_numbers(2, 4, 5)
    for mask in (None, real(4, 6, 5, 5), real(1, 6, 5, 5), real(4, 1, 1, 5)):
        yield call(ops.attention.default, same, *keys, mask, documents, 2, 0, 0.5)
        yield call(ops.attention.default, same, *grouped, mask, documents[:1], None, 1, 0.5)
    yield call(attention, q, k, v, yes_or_no(3, 5).logical_or(torch.eye(3, 5).bool()))
    yield call(attention, q, k[:, :2], v[:, :2], None, 0.0, False, enable_gqa=True)
    yield call(attention, q, k[:, :, :3], v[:, :, :3], None, 0.0, True)
    yield call(aten.conv1d.default, real(6, 4, 7), real(3, 4, 2), real(3))
    yield call(ops.causal_conv1d.default, real(6, 4, 13), real(4, 2, 2), real(4), 2, 2)
    yield call(ops.causal_conv1d.default, real(6, 4, 7), real(3, 4, 2), None, 1, 1)
    yield call(aten.conv1d.default, real(4, 7), real(3, 4, 2))
    yield call(aten.conv2d.default, real(6, 4, 5, 5), real(3, 4, 2, 2))
    convolution = ([1], [0], [1], False, [0], 1)
    yield call(aten.convolution.default, real(6, 4, 7), real(3, 4, 2), None, *convolution)


def _selections() -> Iterator[Sample]:
    x = real(6, 4, 5)
    yield call(aten.layer_norm.default, x, [5], real(5), real(5))
    yield call(aten.layer_norm.default, x, [4, 5])
    yield call(aten.rms_norm.default, x, [5], real(5))
    yield call(aten.native_layer_norm.default, x, [5], real(5), None, 1e-5)
    for name in (aten.softmax.int, aten.log_softmax.int):
        yield call(name, x, -1)
        yield call(name, x, 1)
    for name in (aten._softmax.default, aten._log_softmax.default):
        yield call(name, x, 2, False)
    yield call(aten.glu.default, real(6, 4))
    yield call(aten.glu.default, real(4, 6), 0)
    yield call(aten.topk.default, x, 2)
    yield call(aten.topk.default, x, 2, 1)
    yield call(aten.sort.default, x)
    yield call(aten.sort.stable, x, stable=True, dim=1)
    yield call(aten.argsort.default, x)
    yield call(aten.argsort.stable, x, stable=True, dim=1)
    yield call(aten.gather.default, x, 2, whole_numbers(5, 6, 4, 2))
    yield call(aten.gather.default, x, 1, whole_numbers(4, 6, 7, 3))
    index = whole_numbers(5, 6, 4, 2)
    index[..., 1] = (index[..., 0] + 1) % 5
    yield call(aten.scatter.src, x, 2, index, real(6, 4, 2))
    yield value(aten.scatter.src, x, 2, index, real(6, 4, 5))
    yield value(aten.scatter.src, x, 2, index[:4], real(6, 4, 5))
    yield value(aten.scatter.src, x, 2, index, real(8, 4, 2))
    yield call(aten.scatter.value, x, 2, index, 1.5)
    yield call(aten.scatter_add.default, x, 2, index, real(6, 4, 2))
    yield value(aten.scatter_add.default, x, 2, index, real(9, 4, 2))
    yield call(aten.scatter_reduce.two, x, 2, index, real(6, 4, 2), "amax")
    yield call(aten.index.Tensor, x, [whole_numbers(6, 3)])
    yield call(aten.index.Tensor, x, [None, whole_numbers(4, 6)])
    yield call(aten.index.Tensor, x, [whole_numbers(6, 6), whole_numbers(4, 6)])
    yield call(aten.index.Tensor, x, [whole_numbers(6, 4), None, whole_numbers(5, 4)])
    yield call(aten.index.Tensor, x, [whole_numbers(6, 6, 1), whole_numbers(4, 4)])
    yield call(aten.index.Tensor, x, [None, whole_numbers(4, 6), whole_numbers(5, 6)])
    yield call(aten.index.Tensor, real(6, 4), [whole_numbers(2, 3, 6, 4)[0]])
    yield call(aten.index.Tensor, real(6, 4), [yes_or_no(6)])
    yield call(aten.index_select.default, x, 1, whole_numbers(4, 6))
    yield call(aten.index_put.default, x, [torch.tensor([4, 1])], real(2, 4, 5))
    yield call(aten.index_put.default, x, [torch.tensor([4, 1])], real(4, 5))
    yield call(aten.index_put.default, x, [whole_numbers(6, 7)], real(7, 4, 5), True)
    yield call(aten.index_put.default, x, [torch.tensor([4, 1]), torch.tensor([2, 3])], real(2, 1))
    yield call(aten.index_add.default, x, 1, whole_numbers(4, 7), real(6, 7, 5))
    yield call(aten.embedding.default, real(7, 4), whole_numbers(7, 6, 3))
    yield call(ops.embedding_rows.default, real(7, 4), whole_numbers(7, 6, 3), -1)
    yield call(ops.embedding_rows.default, real(7, 4), whole_numbers(7, 6), 2)
    yield call(aten.embedding.default, real(7, 4), whole_numbers(7, 6), 2)
    yield call(aten.embedding.default, real(7, 4), whole_numbers(7, 6), -1, True)
    yield call(aten.one_hot.default, whole_numbers(4, 6, 3), 4)


def _losses() -> Iterator[Sample]:
    logits, labels = real(6, 5), whole_numbers(5, 6)
    labels[2] = -100
    yield value(ops.kept_tokens.default, labels, 5, -100)
    yield call(ops.vocab_projection.default, real(6, 4), real(7, 4), None, labels, 0.5, None)
    yield call(ops.vocab_projection.default, real(6, 4), real(7, 4), real(7), labels, 1.0, 2.0)
    for reduction in (0, 2):
        yield call(aten.cross_entropy_loss.default, logits, labels, None, reduction)
        yield value(aten.cross_entropy_loss.default, logits, labels, real(5).abs(), reduction)
        yield call(aten.cross_entropy_loss.default, logits, labels, None, reduction, -100, 0.1)
        yield call(aten.cross_entropy_loss.default, logits, real(6, 5).softmax(-1), None, reduction)
        yield call(
            aten.cross_entropy_loss.default, real(6, 5, 4), whole_numbers(5, 6, 4), None, reduction
        )
        scores = logits.log_softmax(-1)
        yield call(aten.nll_loss.default, scores, labels, None, reduction)
        yield call(aten.nll_loss_nd.default, scores, labels, None, reduction)
    yield call(aten.cross_entropy_loss.default, logits, labels)


def _random() -> Iterator[Sample]:
    """Random operators where their draws cannot matter."""
    x = real(6, 4, 5)
    yield call(aten.dropout.default, x, 0.0, True)
    yield call(aten.dropout.default, x, 0.5, False)
    yield call(aten.native_dropout.default, real(6, 5), 0.0, True)
    yield call(aten.feature_dropout.default, x, 0.0, True)
    yield call(aten.bernoulli.default, yes_or_no(6, 4).double())
    certain = torch.nn.functional.one_hot(whole_numbers(4, 6), 4).double()
    yield call(aten.multinomial.default, certain, 1)
    yield call(aten.multinomial.default, certain[0], 1)


def _fills() -> Iterator[Sample]:
    x = real(6, 4)
    for name in (aten.zeros_like, aten.ones_like):
        yield call(name.default, x)
    yield call(aten.full_like.default, x, 2.0)
    yield call(aten.new_zeros.default, x, [3, 2])
    yield call(aten.new_ones.default, x, [6])
    yield call(aten.new_full.default, x, [6, 4], 2.0)
    yield call(aten.zeros.default, [6, 4])
    yield call(aten.ones.default, [6])
    yield call(aten.full.default, [6, 4], 2.0)
    yield call(aten.arange.default, 6)
    yield call(aten.scalar_tensor.default, 2.0)
    yield call(aten.eye.default, 4)
    yield call(aten.linspace.default, 0, 1, 6)


SAMPLES = [
    sample
    for group in (
        _pointwise, _views, _parts, _reductions, _products, _selections, _losses, _random, _fills,
    )
    for sample in group()
]  # fmt: skip

# Entries of RULES that SAMPLES cannot call, and why that is right.
ELSEWHERE: dict[Any, str] = {
    operator.getitem: "takes its placement from its tuple, and has no rule of its own",
    ops.dispatch: "gives routed rows: see the tests of routed rows below",
    ops.keep_pairs: "its groups are the ranks' tokens: see test_dispatchers.py",
    ops.pair_rows: "takes routed rows",
    ops.grouped_mm: "takes routed rows",
    ops.expert_rows: "takes routed rows",
    ops.combine: "takes routed rows",
    cast_whole: "stands in placed programs alone: see test_mixed_precision.py",
    ops.hop: "goes from one pipeline stage to another: see test_pipeline.py",
    ops.fused_adam: "of an optimizer: see test_train_step.py",
    aten.empty: "its values are anything",
    aten.empty_like: "its values are anything",
    aten.new_empty: "its values are anything",
    aten.rand: "draws; ranks draw apart, see test_random.py",
    aten.randn: "draws",
    aten.rand_like: "draws",
    aten.randn_like: "draws",
}


def test_every_rule_is_exercised_or_excused() -> None:
    called = {sample.op.overloadpacket for sample in SAMPLES}
    assert set(RULES) - called == set(ELSEWHERE)


# --- one call as a program ------------------------------------------------------------------------


def _program(sample: Sample, kinds: list[Kind], layout: Layout) -> Program:
    """The call, with its operands held as given, and a loss made of its results."""
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for number, (x, kind) in enumerate(zip(sample.tensors, kinds, strict=True)):
        node = graph.placeholder(f"x{number}")
        roles.set_value(node, x)
        roles.set_role(node, placements=(Placement.uniform(layout.home, kind),))
        nodes.append(node)

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        values = pytree.tree_map_only(fx.Node, roles.value, (args, kwargs))
        roles.set_value(node, target(*values[0], **values[1]))
        return node

    remaining = iter(nodes)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda _: next(remaining), (list(sample.args), sample.kwargs)
    )
    result = add(sample.op, *args, **kwargs)
    value = roles.value(result)
    outs = [result] if isinstance(value, Tensor) else [
        add(operator.getitem, result, i) for i in range(len(value))
    ]  # fmt: skip
    loss = add(aten.zeros.default, [], dtype=torch.float64)
    for out in outs:
        if roles.tensor(out).is_floating_point():
            loss = add(aten.add.Tensor, loss, add(aten.sum.default, add(aten.sin.default, out)))
    graph.output((loss, *outs))
    roles.set_value(graph.output_node(), None)
    # A parameter is never stored as terms of a sum; such operands stand for activations.
    trained = {
        n
        for n, x, kind in zip(nodes, sample.tensors, kinds, strict=True)
        if x.is_floating_point() and kind != PARTIAL
    }
    held = [(n, tuple(x.shape), x.dtype) for n, x in zip(nodes, sample.tensors, strict=True)]
    parameters = tuple(Parameter(n.name, n.name, *rest) for n, *rest in held if n in trained)
    buffers = tuple(Buffer(n.name, n.name, *rest) for n, *rest in held if n not in trained)
    by_kind = {p.name for p in parameters}
    order = [n for n in nodes if n.name in by_kind] + [n for n in nodes if n.name not in by_kind]
    for node in reversed(order):
        next(iter(graph.nodes)).prepend(node)
    spec = pytree.tree_structure(0)
    signature = Signature(
        parameters, buffers, (), tuple(Output(str(i)) for i in range(len(outs) + 1)),
        0, spec, (), spec, (),
    )  # fmt: skip
    program = Program(graph, signature, Level.CANONICAL, layout)
    for name in ("shard_parameters", "shard_batch"):
        program = Pass(name, lambda p: p.with_graph(p.copy_graph()[0]))(program)
    return program


def _results(sample: Sample) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results and gradients of the whole call, on one device."""
    wanted = [sample.differentiable and x.is_floating_point() for x in sample.tensors]
    own = [
        x.detach().clone().requires_grad_(w) for x, w in zip(sample.tensors, wanted, strict=True)
    ]
    remaining = iter(own)
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda _: next(remaining), (list(sample.args), sample.kwargs)
    )
    result = sample.op(*args, **kwargs)
    outs = [result] if isinstance(result, Tensor) else list(result)
    losses = [x.sin().sum() for x in outs if x.requires_grad]
    if losses:
        sum(losses).backward()  # type: ignore[union-attr]
    return [x.detach() for x in outs], [x.grad for x in own]


def _rule(sample: Sample) -> Rule | None:
    program = _program(sample, [INVARIANT] * len(sample.tensors), Layout.of(1))
    return rule_for(next(n for n in program.graph.nodes if n.target is sample.op))


def _terms(x: Tensor, parts: int) -> list[Tensor]:
    terms = [torch.randn(x.shape, generator=_generator, dtype=x.dtype) for _ in range(parts - 1)]
    return [*terms, x - sum(terms)]


def _run(sample: Sample, kinds: list[Kind], parts: int) -> None:
    """Place, localise and simulate the call; compare results and gradients with the whole one."""
    layout = Layout.of(parts)
    placed = place()(_program(sample, kinds, layout))
    program = localize()(placed)
    node = next(n for n in placed.graph.nodes if n.target is sample.op)
    for x, kind in zip(operands(node), kinds, strict=True):
        kept = roles.placement(x)
        assert kept is not None
        assert kind == INVARIANT or kept.kinds[0] == kind, f"{x} was not used as it was held"
    arguments: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    for number, (x, kind) in enumerate(zip(sample.tensors, kinds, strict=True)):
        terms = _terms(x, parts) if kind == PARTIAL else [x] * parts
        for rank, own in enumerate(arguments):
            part = _own_part(terms[rank], kind, rank, parts).detach().clone()
            own[f"x{number}"] = part.requires_grad_(
                sample.differentiable and part.is_floating_point()
            )
    outputs = simulate(program, arguments)
    want, gradients = _results(sample)
    for position, whole in enumerate(want, start=1):
        placement = roles.placement(program.outputs[position])
        assert placement is not None
        have = _whole([own[position].detach() for own in outputs], placement.kinds[0])
        assert have.shape == whole.shape, "result"
        close = 1e-10 if whole.dtype == torch.float64 else 1e-6
        assert torch.allclose(have.to(whole.dtype), whole, rtol=close, atol=close), "result"
    losses = [own[0] for own in outputs]
    if PARTIAL in kinds or not losses[0].requires_grad:
        return
    torch.autograd.backward(losses)
    for number, (gradient, kind) in enumerate(zip(gradients, kinds, strict=True)):
        if gradient is not None:
            parts_ = [own[f"x{number}"].grad for own in arguments]
            zeros = [own[f"x{number}"] * 0 for own in arguments]
            held = [z if g is None else g for g, z in zip(parts_, zeros, strict=True)]
            have = _whole(held, kind)
            assert torch.allclose(have, gradient, rtol=1e-10, atol=1e-10), f"gradient {number}"


def _split(rule: Rule, dims: Sequence[str | None], factor: str) -> Kind:
    """How an operand with these dimensions is held when the factor is split."""
    for at, dim in enumerate(dims):
        names = (dim or "").split(".")
        if factor in names:
            slower = names[: names.index(factor)]
            return Shard(at, math.prod(rule.quantum[name] for name in slower))
    return INVARIANT


def _own_part(x: Tensor, kind: Kind, rank: int, parts: int) -> Tensor:
    if not isinstance(kind, Shard):
        return x
    blocks = x.unflatten(kind.dim, (kind.blocks, -1))
    length = -(-blocks.shape[kind.dim + 1] // parts)
    return blocks[_at(kind.dim + 1, slice(rank * length, (rank + 1) * length))].flatten(
        kind.dim, kind.dim + 1
    )


def _whole(parts: list[Tensor], kind: Kind) -> Tensor:
    if not isinstance(kind, Shard):
        assert all(torch.equal(part, parts[0]) for part in parts), "replicas differ"
        return parts[0]
    pieces = [part.unflatten(kind.dim, (kind.blocks, -1)) for part in parts]
    return torch.cat(pieces, kind.dim + 1).flatten(kind.dim, kind.dim + 1)


def _at(dim: int, entry: slice) -> tuple[slice, ...]:
    return (*(slice(None) for _ in range(dim)), entry)


def _fits(rule: Rule, sample: Sample) -> bool:
    results = [x.dim() for x in _results(sample)[0]]
    return [len(dims) for dims in rule.operands] == [x.dim() for x in sample.tensors] and [
        len(dims) for dims in rule.results
    ] == results


def _cases(sample: Sample) -> Iterator[tuple[str, list[Kind], int]]:
    """Every way in which the rule lets the call be split or summed, on two and three ranks."""
    rule = _rule(sample)
    if rule is None or not _fits(rule, sample):
        return
    named = (f for dims in rule.operands for dim in dims if dim for f in dim.split("."))
    factors = dict.fromkeys(named)
    for parts in (2, 3):
        for factor in factors:
            if rule.splittable(factor, parts):
                kinds = [_split(rule, dims, factor) for dims in rule.operands]
                yield f"split {factor} over {parts}", kinds, parts
    floating = [x.is_floating_point() for x in sample.tensors]
    if rule.linear == JOINT:
        if all(floating):
            yield "pending sums", [PARTIAL] * len(floating), 2
        return
    for position in rule.linear:
        if position < len(floating) and floating[position]:
            kinds = [PARTIAL if i == position else INVARIANT for i in range(len(floating))]
            yield f"a pending sum in operand {position}", kinds, 2


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_rule_names_every_dimension(sample: Sample) -> None:
    rule = _rule(sample)
    assert rule is None or _fits(rule, sample), str(rule)


CASES = [
    (sample, name, kinds, parts)
    for sample in SAMPLES
    for name, kinds, parts in _cases(sample)
]  # fmt: skip


@pytest.mark.parametrize(
    ("sample", "kinds", "parts"),
    [pytest.param(s, kinds, parts, id=f"{s}, {name}") for s, name, kinds, parts in CASES],
)
def test_shards_make_the_whole(sample: Sample, kinds: list[Kind], parts: int) -> None:
    _run(sample, kinds, parts)


# --- routed rows ----------------------------------------------------------------------------------
# The rows of the canonical operators carry two factors: tokens, and experts.

TOKENS, EXPERTS, CHOICES, WIDTH = 12, 5, 2, 4


def _expert_layer(
    x: Tensor, chosen: Tensor, weights: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    rows, counts, order = ops.dispatch(x, chosen, EXPERTS)
    rows = ops.grouped_mm(rows, weight, counts) + ops.expert_rows(bias, counts, rows)
    rows = rows * ops.pair_rows(weights, order).unsqueeze(-1)
    return ops.combine(rows, order, torch.ones_like(weights)), counts


@pytest.mark.parametrize("parts", [2, 3])
def test_routed_rows_split_by_token_make_the_whole(parts: int) -> None:
    x, chosen = real(TOKENS, WIDTH), whole_numbers(EXPERTS, TOKENS, CHOICES)
    weights, weight, bias = real(TOKENS, CHOICES), real(EXPERTS, WIDTH, 3), real(EXPERTS, 3)
    want, counts = _expert_layer(x, chosen, weights, weight, bias)
    own = [_expert_layer(*shards, weight, bias) for shards in zip(
        x.chunk(parts), chosen.chunk(parts), weights.chunk(parts), strict=True
    )]  # fmt: skip
    assert torch.allclose(torch.cat([out for out, _ in own]), want, rtol=1e-10, atol=1e-10)
    assert torch.equal(sum(c for _, c in own), counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [2, 3])
def test_routed_rows_split_by_expert_make_the_whole(parts: int) -> None:
    x, chosen = real(TOKENS, WIDTH), whole_numbers(EXPERTS, TOKENS, CHOICES)
    weight, bias = real(EXPERTS, WIDTH, 3), real(EXPERTS, 3)
    rows, counts, _ = ops.dispatch(x, chosen, EXPERTS)
    want = ops.grouped_mm(rows, weight, counts) + ops.expert_rows(bias, counts, rows)
    owned = [c.sum().item() for c in counts.chunk(parts)]
    own = [
        ops.grouped_mm(r, w, c) + ops.expert_rows(b, c, r)
        for r, w, b, c in zip(
            rows.split(owned), weight.chunk(parts), bias.chunk(parts), counts.chunk(parts),
            strict=True,
        )
    ]  # fmt: skip
    assert torch.allclose(torch.cat(own), want, rtol=1e-10, atol=1e-10)
