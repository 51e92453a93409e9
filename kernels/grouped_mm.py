"""Operators on rows that are ordered by expert: grouped products, biases and sums.

Every operator is registered in the ``moptrace`` namespace with a fake implementation, and with a
backward made of operators that have a backward themselves. ``moptrace.kernels.reference`` says
what each one means. S rows are ordered by expert and ``counts[e]`` of them belong to expert e.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["expert_rows", "group_sum", "grouped_mm", "grouped_outer"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define("grouped_mm(Tensor rows, Tensor weight, Tensor counts) -> Tensor")
_LIBRARY.define("grouped_outer(Tensor a, Tensor b, Tensor counts) -> Tensor")
_LIBRARY.define("expert_rows(Tensor param, Tensor counts, Tensor rows) -> Tensor")
_LIBRARY.define("group_sum(Tensor rows, Tensor counts) -> Tensor")


def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply each row by its expert's matrix.

    rows [S, K], weight [E, K, N], counts int64 [E] -> [S, N].

    Requires: ``counts`` adds up to S; one dtype. A transposed weight is used as it lies.
    """
    return torch.ops.moptrace.grouped_mm.default(rows, weight, counts)


def grouped_outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """For each expert, multiply the transpose of its rows of ``a`` by its rows of ``b``.

    a [S, K], b [S, N], counts int64 [E] -> [E, K, N]; zero for an expert without rows.
    """
    return torch.ops.moptrace.grouped_outer.default(a, b, counts)


def expert_rows(param: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """Repeat each expert's parameter once for each of its rows.

    param [E, *F], counts int64 [E], rows [S, ...] -> [S, *F]; ``rows`` only gives S.
    """
    return torch.ops.moptrace.expert_rows.default(param, counts, rows)


def group_sum(rows: Tensor, counts: Tensor) -> Tensor:
    """Sum the rows of each expert, in float32 at least.

    rows [S, *F], counts int64 [E] -> [E, *F]; zero for an expert without rows.
    """
    return torch.ops.moptrace.group_sum.default(rows, counts)


# grouped_mm


@torch.library.impl(_LIBRARY, "grouped_mm", "CompositeExplicitAutograd")
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    result = rows.new_empty(rows.shape[0], weight.shape[2])
    sizes = counts.tolist()
    for own, matrix, out in zip(_split(rows, sizes), weight, _split(result, sizes), strict=True):
        torch.mm(own, matrix, out=out)
    return result


@torch.library.register_fake("moptrace::grouped_mm", lib=_LIBRARY)
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


def _save_grouped_mm(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_grouped_mm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, counts = ctx.saved_tensors
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = grouped_mm(grad, weight.transpose(1, 2), counts)
    if ctx.needs_input_grad[1]:
        if weight.stride(1) == 1 and weight.stride(2) != 1:  # a transposed view: keep its layout
            grad_weight = grouped_outer(grad, rows, counts).transpose(1, 2)
        else:
            grad_weight = grouped_outer(rows, grad, counts)
    return grad_rows, grad_weight, None


torch.library.register_autograd(
    "moptrace::grouped_mm", _differentiate_grouped_mm, setup_context=_save_grouped_mm, lib=_LIBRARY
)


# grouped_outer


@torch.library.impl(_LIBRARY, "grouped_outer", "CompositeExplicitAutograd")
def _(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    result = a.new_empty(counts.shape[0], a.shape[1], b.shape[1])
    sizes = counts.tolist()
    for left, right, out in zip(_split(a, sizes), _split(b, sizes), result, strict=True):
        torch.mm(left.t(), right, out=out)
    return result


@torch.library.register_fake("moptrace::grouped_outer", lib=_LIBRARY)
def _(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    return a.new_empty(counts.shape[0], a.shape[1], b.shape[1])


def _save_grouped_outer(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_grouped_outer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, counts = ctx.saved_tensors
    grad_a = grouped_mm(b, grad.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    grad_b = grouped_mm(a, grad, counts) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None


torch.library.register_autograd(
    "moptrace::grouped_outer",
    _differentiate_grouped_outer,
    setup_context=_save_grouped_outer,
    lib=_LIBRARY,
)


# expert_rows and group_sum


@torch.library.impl(_LIBRARY, "expert_rows", "CompositeExplicitAutograd")
def _(param: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    return param.repeat_interleave(counts, dim=0, output_size=rows.shape[0])


@torch.library.register_fake("moptrace::expert_rows", lib=_LIBRARY)
def _(param: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    return param.new_empty(rows.shape[0], *param.shape[1:])


def _save_expert_rows(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_expert_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return group_sum(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd(
    "moptrace::expert_rows",
    _differentiate_expert_rows,
    setup_context=_save_expert_rows,
    lib=_LIBRARY,
)


@torch.library.impl(_LIBRARY, "group_sum", "CompositeExplicitAutograd")
def _(rows: Tensor, counts: Tensor) -> Tensor:
    result = rows.new_empty(counts.shape[0], *rows.shape[1:])
    for own, out in zip(_split(rows, counts.tolist()), result, strict=True):
        torch.sum(own, 0, out=out)
    return result


@torch.library.register_fake("moptrace::group_sum", lib=_LIBRARY)
def _(rows: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(counts.shape[0], *rows.shape[1:])


def _save_group_sum(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_group_sum(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, counts = ctx.saved_tensors
    return expert_rows(grad, counts, rows), None


torch.library.register_autograd(
    "moptrace::group_sum", _differentiate_group_sum, setup_context=_save_group_sum, lib=_LIBRARY
)


def _split(rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """Each expert's rows, as a view."""
    return rows.split(sizes) if sizes else ()
