"""Operators on rows that are ordered by expert: grouped products, biases and sums.

Every operator is registered in the ``moptrace`` namespace with a fake implementation, and with a
backward made of operators that have a backward themselves, so derivatives exist to any order.
``moptrace.kernels.reference`` says what each means. S rows are ordered by expert, and ``counts[e]``
of them belong to expert e.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm as grouped_product

from moptrace.kernels import onednn, triton_grouped_mm
from moptrace.kernels.selection import choose

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


# how a grouped product is computed

# oneDNN compiles and keeps a kernel for every shape, so row counts are rounded up to few sizes.
ROW_MULTIPLE = 16


def _widened(span: slice, total: int) -> slice:
    """A round number of rows around those of ``span``, or ``span`` if there are too few in all.

    A row's product depends on no other row, so the neighbours' rows serve and nothing is copied.

    >>> _widened(slice(3, 8), 100), _widened(slice(90, 100), 100), _widened(slice(2, 5), 9)
    (slice(3, 19, None), slice(84, 100, None), slice(2, 5, None))
    """
    width = span.stop - span.start
    width += -width % ROW_MULTIPLE
    start = min(span.start, total - width)
    return slice(start, start + width) if start >= 0 else span


def _padded(rows: Tensor) -> Tensor:
    """The rows with zeros after them, up to a round number, for a product that sums over them."""
    missing = -rows.shape[0] % ROW_MULTIPLE
    return torch.constant_pad_nd(rows, (0, 0, 0, missing)) if missing else rows


def _offsets(counts: Tensor, total: int) -> Tensor:
    """Where each expert's rows end, as torch's grouped product wants it."""
    if counts.device.type == "cpu":  # elsewhere, to look at the counts would stall the device
        _sizes(counts, total)
    return counts.cumsum(0, dtype=torch.int32)


def _sizes(counts: Tensor, total: int) -> list[int]:
    """How many rows each expert has."""
    sizes = counts.tolist()
    if sum(sizes) != total:
        raise ValueError(f"the counts add up to {sum(sizes)}, but there are {total} rows: {sizes}")
    return sizes


def spans(counts: Tensor, total: int) -> list[slice]:
    """Where each expert's rows are."""
    return [slice(*edges) for edges in pairwise(accumulate(_sizes(counts, total), initial=0))]


def _check_experts(param: Tensor, counts: Tensor) -> None:
    torch._check(
        param.shape[0] == counts.shape[0],
        lambda: f"{param.shape[0]} experts have parameters, but {counts.shape[0]} have counts",
    )


# grouped_mm


@torch.library.impl(_LIBRARY, "grouped_mm", "CompositeExplicitAutograd")
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    if (implementation := choose("grouped_mm", rows, weight)) == "triton":
        return triton_grouped_mm.grouped_mm(rows, weight, counts)
    if 0 in rows.stride():  # an expanded gradient
        rows = rows.contiguous()
        implementation = choose("grouped_mm", rows, weight)
    total, width = rows.shape[0], weight.shape[2]
    if implementation == "torch":
        return grouped_product(rows, weight, offs=_offsets(counts, total))
    result = rows.new_empty(total, width)
    for span, matrix in zip(spans(counts, total), weight.unbind(), strict=True):
        if span.start == span.stop:
            continue
        if implementation == "onednn":
            wide = _widened(span, total)
            own = slice(span.start - wide.start, span.stop - wide.start)
            result[span] = onednn.multiply(rows[wide], matrix)[own]
        else:
            torch.mm(rows[span], matrix, out=result[span])
    return result


@torch.library.register_fake("moptrace::grouped_mm", lib=_LIBRARY)
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    _check_experts(weight, counts)
    torch._check(
        rows.dtype == weight.dtype and rows.shape[1] == weight.shape[1],
        lambda: (
            f"rows {list(rows.shape)} in {rows.dtype} cannot be multiplied by the experts' "
            f"matrices {list(weight.shape)} in {weight.dtype}"
        ),
    )
    return rows.new_empty(rows.shape[0], weight.shape[2])


def _save_grouped_mm(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, weight, counts = inputs
    ctx.save_for_backward(
        rows if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        counts,
    )
    ctx.is_transposed = weight.stride(1) == 1 and weight.stride(2) != 1


def _differentiate_grouped_mm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, counts = ctx.saved_tensors
    of_rows = of_weight = None
    if ctx.needs_input_grad[0]:
        of_rows = grouped_mm(grad, weight.transpose(1, 2), counts)
    if ctx.needs_input_grad[1] and ctx.is_transposed:  # contiguous where the parameter is
        of_weight = grouped_outer(grad, rows, counts).transpose(1, 2)
    elif ctx.needs_input_grad[1]:
        of_weight = grouped_outer(rows, grad, counts)
    return of_rows, of_weight, None


torch.library.register_autograd(
    "moptrace::grouped_mm", _differentiate_grouped_mm, setup_context=_save_grouped_mm, lib=_LIBRARY
)


# grouped_outer


@torch.library.impl(_LIBRARY, "grouped_outer", "CompositeExplicitAutograd")
def _(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    if (implementation := choose("grouped_outer", a, b)) == "triton":
        return triton_grouped_mm.grouped_outer(a, b, counts)
    if 0 in (*a.stride(), *b.stride()):
        a, b = (x.contiguous() if 0 in x.stride() else x for x in (a, b))
        implementation = choose("grouped_outer", a, b)
    if implementation == "torch":
        return grouped_product(a.t(), b, offs=_offsets(counts, a.shape[0]))
    result = a.new_empty(counts.shape[0], a.shape[1], b.shape[1])
    for span, out in zip(spans(counts, a.shape[0]), result.unbind(), strict=True):
        if span.start == span.stop:
            out.zero_()
        elif implementation == "onednn":
            out.copy_(onednn.multiply(_padded(a[span]).t(), _padded(b[span])))
        else:
            torch.mm(a[span].t(), b[span], out=out)
    return result


@torch.library.register_fake("moptrace::grouped_outer", lib=_LIBRARY)
def _(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    torch._check(
        a.dtype == b.dtype and a.shape[0] == b.shape[0],
        lambda: f"rows {list(a.shape)} in {a.dtype} do not match rows {list(b.shape)} in {b.dtype}",
    )
    return a.new_empty(counts.shape[0], a.shape[1], b.shape[1])


def _save_grouped_outer(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_grouped_outer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, counts = ctx.saved_tensors
    of_a = grouped_mm(b, grad.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    of_b = grouped_mm(a, grad, counts) if ctx.needs_input_grad[1] else None
    return of_a, of_b, None


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
    _check_experts(param, counts)
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
    if rows.is_cuda:  # one kernel, deterministic, and no stall to learn the counts
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total = torch.segment_reduce(exact, "sum", lengths=counts, axis=0, unsafe=True)
        return total.to(rows.dtype)
    # index_add_ is up to three times faster, but adds in sequence: a larger error than eager's.
    result = rows.new_empty(counts.shape[0], *rows.shape[1:])
    for span, out in zip(spans(counts, rows.shape[0]), result.unbind(), strict=True):
        torch.sum(rows[span], 0, out=out)
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
