"""The step of a ring in Triton: each number of an output is read once, and written once."""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false
# Triton has no types, and is not there on every machine.

from __future__ import annotations

from torch import Tensor

from moptrace.kernels.triton_jit import ceil, jit, power_of_two, tl

__all__ = ["merge"]


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Write attention to the keys of either to ``out`` and ``lse``, whatever their strides."""
    rows, width = lse.numel(), out.shape[-1]
    if not rows:
        return
    columns = min(power_of_two(width), 256)
    tile = {"ROWS": 4096 // columns, "WIDTH": columns}
    _merge_kernel[(ceil(rows, tile["ROWS"]),)](
        out,
        lse,
        other,
        other_lse,
        rows,
        *out.shape[1:],
        *out.stride(),
        *lse.stride(),
        *other.stride(),
        *other_lse.stride(),
        **tile,
    )


@jit
def _merge_kernel(
    out,
    lse,
    other,
    other_lse,
    rows,
    heads,
    length,
    width,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    out_column_stride,
    lse_batch_stride,
    lse_head_stride,
    lse_token_stride,
    other_batch_stride,
    other_head_stride,
    other_token_stride,
    other_column_stride,
    other_lse_batch_stride,
    other_lse_head_stride,
    other_lse_token_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    token, head, batch = row % length, row // length % heads, row // length // heads
    lse += batch * lse_batch_stride + head * lse_head_stride + token * lse_token_stride
    other_lse += batch * other_lse_batch_stride + head * other_lse_head_stride
    other_lse += token * other_lse_token_stride
    a = tl.load(lse, mask=is_row, other=0.0)
    b = tl.load(other_lse, mask=is_row, other=0.0)
    top = tl.maximum(a, b)
    shift = tl.where(top == float("-inf"), 0.0, top)  # of no key, -inf - -inf is nan
    total = tl.exp(a - shift) + tl.exp(b - shift)
    some = tl.where(total == 0.0, 1.0, total)
    share, other_share = tl.exp(a - shift) / some, tl.exp(b - shift) / some
    tl.store(lse, top + tl.log(some), mask=is_row)
    out += (batch * out_batch_stride + head * out_head_stride + token * out_token_stride)[:, None]
    other += (batch * other_batch_stride + head * other_head_stride)[:, None]
    other += (token * other_token_stride)[:, None]
    for start in range(0, width, WIDTH):
        column = (start + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
        mask = is_row[:, None] & (column < width)
        own = tl.load(out + column * out_column_stride, mask=mask, other=0.0)
        their = tl.load(other + column * other_column_stride, mask=mask, other=0.0)
        merged = own * share[:, None] + their * other_share[:, None]
        tl.store(out + column * out_column_stride, merged, mask=mask)
