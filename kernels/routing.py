"""Operators that move tokens: to their experts, between ranks' orders, and back.

Every operator is registered in the ``moptrace`` namespace with a fake implementation, and with a
backward made of operators that have a backward themselves. ``moptrace.kernels.reference`` says
what each one means. N tokens choose k experts each, so there are S = N*k rows; D and F stand for
any number of trailing dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["combine", "dispatch", "group_rows", "pair_rows", "ungroup_rows"]

# Library.define costs two thirds of what custom_op does at every call, and is the same node.
_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "dispatch(Tensor x, Tensor experts, SymInt num_experts) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("pair_rows(Tensor values, Tensor order) -> Tensor")
_LIBRARY.define("combine(Tensor rows, Tensor order, Tensor weights) -> Tensor")
_LIBRARY.define("group_rows(Tensor rows, Tensor table) -> Tensor")
_LIBRARY.define("ungroup_rows(Tensor rows, Tensor table) -> Tensor")


def dispatch(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once for each expert it chose, and order the copies by expert.

    x [N, *D], experts int64 [N, k] -> rows [S, *D], counts int64 [E], order int64 [S].

    Requires: every entry of ``experts`` lies in [0, num_experts).
    Ensures: row i is the pair ``order[i]`` = n*k + j of token n and its choice j; pairs of the same
    expert keep their order; ``counts[e]`` rows belong to expert e.
    """
    return torch.ops.moptrace.dispatch.default(x, experts, num_experts)


def pair_rows(values: Tensor, order: Tensor) -> Tensor:
    """Bring one value for each pair into the order of the rows.

    values [N, k, *F], order [S] -> [S, *F].
    """
    return torch.ops.moptrace.pair_rows.default(values, order)


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Sum each token's rows with its weights.

    rows [S, *D], order [S], weights [N, k] -> [N, *D].

    Ensures: the product is formed in, and the result has, the dtype that the two promote to.
    """
    return torch.ops.moptrace.combine.default(rows, order, weights)


def group_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (source, expert) to (expert, source).

    rows [S, *D], table int64 [P, C] -> [S, *D].

    Requires: ``table[p, c]`` rows came from source p for expert c; they add up to S.
    """
    return torch.ops.moptrace.group_rows.default(rows, table)


def ungroup_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (expert, source) back to (source, expert): undo ``group_rows``.

    rows [S, *D], table int64 [P, C] -> [S, *D].
    """
    return torch.ops.moptrace.ungroup_rows.default(rows, table)


# dispatch


@torch.library.impl(_LIBRARY, "dispatch", "CompositeExplicitAutograd")
def _(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    # Unlike bincount, scatter_add refuses an expert that does not exist and needs no device sync.
    counts = pairs.new_zeros(num_experts).scatter_add_(0, pairs, torch.ones_like(pairs))
    return x.index_select(0, _token(order, experts.shape[1])), counts, order


@torch.library.register_fake("moptrace::dispatch", lib=_LIBRARY)
def _(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = experts.shape[0] * experts.shape[1]
    order = experts.new_empty(pairs)
    return x.new_empty(pairs, *x.shape[1:]), experts.new_empty(num_experts), order


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.pairs = inputs[1].shape


def _differentiate_dispatch(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # Gather, then sum over a token's choices: deterministic, unlike index_add on a GPU.
    (order,) = ctx.saved_tensors
    return grad.index_select(0, _inverse(order)).unflatten(0, ctx.pairs).sum(1), None, None


torch.library.register_autograd(
    "moptrace::dispatch", _differentiate_dispatch, setup_context=_save_dispatch, lib=_LIBRARY
)


# pair_rows


@torch.library.impl(_LIBRARY, "pair_rows", "CompositeExplicitAutograd")
def _(values: Tensor, order: Tensor) -> Tensor:
    return values.flatten(0, 1).index_select(0, order)


@torch.library.register_fake("moptrace::pair_rows", lib=_LIBRARY)
def _(values: Tensor, order: Tensor) -> Tensor:
    return values.new_empty(order.shape[0], *values.shape[2:])


def _save_pair_rows(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.pairs = inputs[0].shape[:2]


def _differentiate_pair_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (order,) = ctx.saved_tensors
    return grad.index_select(0, _inverse(order)).unflatten(0, ctx.pairs), None


torch.library.register_autograd(
    "moptrace::pair_rows", _differentiate_pair_rows, setup_context=_save_pair_rows, lib=_LIBRARY
)


# combine


@torch.library.impl(_LIBRARY, "combine", "CompositeExplicitAutograd")
def _(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    dtype = torch.result_type(rows, weights)
    features = rows.shape[1:]
    pairs = rows.index_select(0, _inverse(order)).view(*weights.shape, math.prod(features))
    result = torch.bmm(weights.unsqueeze(1).to(dtype), pairs.to(dtype))
    return result.view(weights.shape[0], *features)


@torch.library.register_fake("moptrace::combine", lib=_LIBRARY)
def _(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    dtype = torch.result_type(rows, weights)
    return rows.new_empty(weights.shape[0], *rows.shape[1:], dtype=dtype)


def _save_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, order, weights = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, order, weights)
    ctx.dtype = rows.dtype


def _differentiate_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, order, weights = ctx.saved_tensors
    of_rows = grad.index_select(0, _token(order, weights.shape[1]))
    grad_rows = grad_weights = None
    if ctx.needs_input_grad[0]:
        scale = weights.flatten().index_select(0, order)
        grad_rows = (of_rows * scale.view(-1, *[1] * (grad.dim() - 1))).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        scale = (of_rows * rows).flatten(1).sum(1) if grad.dim() > 1 else of_rows * rows
        grad_weights = scale.index_select(0, _inverse(order)).view(weights.shape).to(weights.dtype)
    return grad_rows, None, grad_weights


torch.library.register_autograd(
    "moptrace::combine", _differentiate_combine, setup_context=_save_combine, lib=_LIBRARY
)


# group_rows and ungroup_rows


@torch.library.impl(_LIBRARY, "group_rows", "CompositeExplicitAutograd")
def _(rows: Tensor, table: Tensor) -> Tensor:
    return rows.index_select(0, _transposition(table, rows.shape[0]))


@torch.library.impl(_LIBRARY, "ungroup_rows", "CompositeExplicitAutograd")
def _(rows: Tensor, table: Tensor) -> Tensor:
    return rows.index_select(0, _transposition(table.t(), rows.shape[0]))


@torch.library.register_fake("moptrace::group_rows", lib=_LIBRARY)
@torch.library.register_fake("moptrace::ungroup_rows", lib=_LIBRARY)
def _(rows: Tensor, table: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _save_table(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_group_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return ungroup_rows(grad, *ctx.saved_tensors), None


def _differentiate_ungroup_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return group_rows(grad, *ctx.saved_tensors), None


torch.library.register_autograd(
    "moptrace::group_rows", _differentiate_group_rows, setup_context=_save_table, lib=_LIBRARY
)
torch.library.register_autograd(
    "moptrace::ungroup_rows", _differentiate_ungroup_rows, setup_context=_save_table, lib=_LIBRARY
)


# index arithmetic


def _token(order: Tensor, choices: int) -> Tensor:
    """The token of each row."""
    return order // max(choices, 1)


def _inverse(order: Tensor) -> Tensor:
    """The row of each pair."""
    rows = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter(0, order, rows)


def _transposition(table: Tensor, total: int) -> Tensor:
    """Where each row of the order (c, p) is found in the order (p, c), without a device sync."""
    sizes, moved = table.flatten(), table.t().flatten()
    start = (sizes.cumsum(0) - sizes).view(table.shape).t().flatten()
    shift = start - (moved.cumsum(0) - moved)
    return shift.repeat_interleave(moved, output_size=total) + torch.arange(
        total, device=table.device
    )
