"""Operators that move tokens: to their experts, between ranks' orders, and back.

Every operator is registered in the ``moptrace`` namespace with a fake implementation, and with a
backward made of operators that have a backward themselves, so derivatives exist to any order and
their graph reads like the forward's. ``moptrace.kernels.reference`` says what each means. N tokens
choose k experts each, so there are S = N*k rows; D and F are any number of trailing dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "combine",
    "dispatch",
    "group_rows",
    "pair_dots",
    "pair_rows",
    "ungroup_rows",
    "weigh_rows",
]

# Library.define costs two thirds of what custom_op does at every call, and is the same node.
_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "dispatch(Tensor x, Tensor experts, SymInt num_experts) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("pair_rows(Tensor values, Tensor order) -> Tensor")
_LIBRARY.define("combine(Tensor rows, Tensor order, Tensor weights) -> Tensor")
_LIBRARY.define("weigh_rows(Tensor x, Tensor order, Tensor weights) -> Tensor")
_LIBRARY.define("pair_dots(Tensor x, Tensor rows, Tensor order, SymInt choices) -> Tensor")
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


def weigh_rows(x: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Copy each token once for each of its pairs, times the pair's weight: ``combine``'s transpose.

    x [N, *D], order [S], weights [N, k] -> [S, *D].
    """
    return torch.ops.moptrace.weigh_rows.default(x, order, weights)


def pair_dots(x: Tensor, rows: Tensor, order: Tensor, choices: int) -> Tensor:
    """Multiply each token with each of its rows, as dot products: ``combine``'s other transpose.

    x [N, *D], rows [S, *D], order [S], choices = k -> [N, k].
    """
    return torch.ops.moptrace.pair_dots.default(x, rows, order, choices)


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
    _check_tokens(x, experts)
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    # Unlike bincount, scatter_add refuses an expert that does not exist and needs no device sync.
    counts = pairs.new_zeros(num_experts).scatter_add_(0, pairs, torch.ones_like(pairs))
    return x.index_select(0, order // experts.shape[1]), counts, order


@torch.library.register_fake("moptrace::dispatch", lib=_LIBRARY)
def _(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_tokens(x, experts)
    order = experts.new_empty(experts.shape[0] * experts.shape[1])
    return x.new_empty(order.shape[0], *x.shape[1:]), experts.new_empty(num_experts), order


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.pairs = inputs[1].shape
    ctx.set_materialize_grads(False)  # no zeros for the integers


def _differentiate_dispatch(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    (order,) = ctx.saved_tensors
    return combine(grad, order, grad.new_ones(ctx.pairs)), None, None


torch.library.register_autograd(
    "moptrace::dispatch", _differentiate_dispatch, setup_context=_save_dispatch, lib=_LIBRARY
)


# pair_rows


@torch.library.impl(_LIBRARY, "pair_rows", "CompositeExplicitAutograd")
def _(values: Tensor, order: Tensor) -> Tensor:
    _check_order(order, values.shape[0] * values.shape[1])
    return values.flatten(0, 1).index_select(0, order)


@torch.library.register_fake("moptrace::pair_rows", lib=_LIBRARY)
def _(values: Tensor, order: Tensor) -> Tensor:
    _check_order(order, values.shape[0] * values.shape[1])
    return values.new_empty(order.shape[0], *values.shape[2:])


def _save_pair_rows(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape = inputs[0].shape


def _differentiate_pair_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (order,) = ctx.saved_tensors
    return grad.new_empty(grad.shape).index_copy(0, order, grad).view(ctx.shape), None


torch.library.register_autograd(
    "moptrace::pair_rows", _differentiate_pair_rows, setup_context=_save_pair_rows, lib=_LIBRARY
)


# combine, weigh_rows and pair_dots: the three derivatives of one trilinear form,
# the sum over n and j of weights[n, j] * <x[n], rows[position of pair (n, j)]>


@torch.library.impl(_LIBRARY, "combine", "CompositeExplicitAutograd")
def _(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    _check_order(order, rows.shape[0])
    dtype = torch.result_type(rows, weights)
    position = _inverse(order).view(weights.shape)
    scale = _with_dims(weights, rows.dim() - 1)
    result = rows.new_zeros(weights.shape[0], *rows.shape[1:], dtype=_exact(dtype))
    # One choice at a time: a [N, k, D] copy costs more in page faults than k passes over [N, D].
    for j in range(weights.shape[1]):
        result.addcmul_(rows.index_select(0, position[:, j]), scale[:, j])
    return result.to(dtype)


@torch.library.register_fake("moptrace::combine", lib=_LIBRARY)
def _(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    _check_order(order, rows.shape[0])
    _check_order(order, weights.shape[0] * weights.shape[1])
    dtype = torch.result_type(rows, weights)
    return rows.new_empty(weights.shape[0], *rows.shape[1:], dtype=dtype)


def _save_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, order, weights = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, order, weights)
    ctx.dtype = rows.dtype


def _differentiate_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, order, weights = ctx.saved_tensors
    of_rows = of_weights = None
    if ctx.needs_input_grad[0]:
        of_rows = weigh_rows(grad, order, weights).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        of_weights = pair_dots(grad, rows, order, weights.shape[1]).to(weights.dtype)
    return of_rows, None, of_weights


torch.library.register_autograd(
    "moptrace::combine", _differentiate_combine, setup_context=_save_combine, lib=_LIBRARY
)


@torch.library.impl(_LIBRARY, "weigh_rows", "CompositeExplicitAutograd")
def _(x: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    _check_tokens(x, weights)
    rows = x.index_select(0, order // weights.shape[1]).to(torch.result_type(x, weights))
    scale = weights.flatten().index_select(0, order)
    return rows.mul_(_with_dims(scale, x.dim() - 1))


@torch.library.register_fake("moptrace::weigh_rows", lib=_LIBRARY)
def _(x: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    _check_tokens(x, weights)
    _check_order(order, weights.shape[0] * weights.shape[1])
    return x.new_empty(order.shape[0], *x.shape[1:], dtype=torch.result_type(x, weights))


def _save_weigh_rows(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, order, weights = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, order, weights)
    ctx.dtype = x.dtype


def _differentiate_weigh_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, order, weights = ctx.saved_tensors
    of_x = of_weights = None
    if ctx.needs_input_grad[0]:
        of_x = combine(grad, order, weights).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        of_weights = pair_dots(x, grad, order, weights.shape[1]).to(weights.dtype)
    return of_x, None, of_weights


torch.library.register_autograd(
    "moptrace::weigh_rows", _differentiate_weigh_rows, setup_context=_save_weigh_rows, lib=_LIBRARY
)


@torch.library.impl(_LIBRARY, "pair_dots", "CompositeExplicitAutograd")
def _(x: Tensor, rows: Tensor, order: Tensor, choices: int) -> Tensor:
    _check_order(order, rows.shape[0])
    dtype = torch.result_type(x, rows)
    features = math.prod(x.shape[1:])
    position = _inverse(order).view(x.shape[0], choices)
    flat = x.reshape(x.shape[0], features).to(_exact(dtype))
    result = flat.new_empty(x.shape[0], choices)
    for j in range(choices):
        chosen = rows.index_select(0, position[:, j]).view(x.shape[0], features)
        torch.sum(flat * chosen, 1, out=result[:, j])
    return result.to(dtype)


@torch.library.register_fake("moptrace::pair_dots", lib=_LIBRARY)
def _(x: Tensor, rows: Tensor, order: Tensor, choices: int) -> Tensor:
    _check_order(order, rows.shape[0])
    _check_order(order, x.shape[0] * choices)
    return x.new_empty(x.shape[0], choices, dtype=torch.result_type(x, rows))


def _save_pair_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows, order, _ = inputs
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None, rows if ctx.needs_input_grad[0] else None, order
    )
    ctx.dtypes = x.dtype, rows.dtype


def _differentiate_pair_dots(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, rows, order = ctx.saved_tensors
    of_x = of_rows = None
    if ctx.needs_input_grad[0]:
        of_x = combine(rows, order, grad).to(ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        of_rows = weigh_rows(x, order, grad).to(ctx.dtypes[1])
    return of_x, of_rows, None, None


torch.library.register_autograd(
    "moptrace::pair_dots", _differentiate_pair_dots, setup_context=_save_pair_dots, lib=_LIBRARY
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
    (table,) = ctx.saved_tensors
    return ungroup_rows(grad, table), None


def _differentiate_ungroup_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return group_rows(grad, table), None


torch.library.register_autograd(
    "moptrace::group_rows", _differentiate_group_rows, setup_context=_save_table, lib=_LIBRARY
)
torch.library.register_autograd(
    "moptrace::ungroup_rows", _differentiate_ungroup_rows, setup_context=_save_table, lib=_LIBRARY
)


# index arithmetic and checks


def _inverse(order: Tensor) -> Tensor:
    """The row of each pair."""
    rows = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).scatter_(0, order, rows)


def _transposition(table: Tensor, total: int) -> Tensor:
    """Where each row of the order (c, p) is found in the order (p, c), without a device sync."""
    sizes, moved = table.flatten(), table.t().flatten()
    start = (sizes.cumsum(0) - sizes).view(table.shape).t().flatten()
    shift = start - (moved.cumsum(0) - moved)
    index = torch.arange(total, device=table.device)
    return index.add_(shift.repeat_interleave(moved, output_size=total))


def _with_dims(x: Tensor, count: int) -> Tensor:
    """``x`` with ``count`` dimensions of size 1 at its end."""
    return x[(..., *[None] * count)]


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are added up."""
    return torch.promote_types(dtype, torch.float32)


def _check_tokens(x: Tensor, pairs: Tensor) -> None:
    _check(
        x.shape[0] == pairs.shape[0],
        lambda: f"there are {x.shape[0]} tokens, but experts were chosen for {pairs.shape[0]}",
    )


def _check_order(order: Tensor, rows: int) -> None:
    _check(
        order.shape[0] == rows,
        lambda: f"the order is one of {order.shape[0]} (token, choice) pairs, not of {rows} rows",
    )


def _check(fits: bool | torch.SymBool, message: Callable[[], str]) -> None:
    if fits is not True:  # torch._check takes symbols too, but 20 us a call
        torch._check(fits, message)
