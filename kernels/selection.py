"""Which implementation of an operator runs: the first row of the table that fits its operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moptrace.kernels import onednn, triton_jit

__all__ = ["ONEDNN_WIDTH", "TABLE", "Choice", "choose"]

float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


_IN_TRITON = ("triton", "tiled")


class Choice(NamedTuple):
    """An implementation, and the operands that it is for.

    The device and the dtype are those of the first operand; None stands for any. ``when`` is asked
    about all operands.
    """

    implementation: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    when: Callable[..., bool] | None = None

    def fits(self, *operands: Tensor) -> bool:
        x = operands[0]
        return (
            self.device in (None, x.device.type)
            and (self.dtypes is None or x.dtype in self.dtypes)
            and (self.implementation not in _IN_TRITON or triton_jit.is_available)
            and (self.when is None or self.when(*operands))
        )


def choose(operator: str, *operands: Tensor) -> str:
    """The implementation for these operands.

    >>> choose("linear_cross_entropy", torch.zeros(2, 3, dtype=torch.float64))
    'blocks'
    """
    return next(choice.implementation for choice in TABLE[operator] if choice.fits(*operands))


# oneDNN's calls cost more than products that are narrower than this.
ONEDNN_WIDTH = 64


def _is_wide(rows: Tensor, matrix: Tensor) -> bool:
    """Whether oneDNN multiplies the rows of one expert faster: rows [.., K], matrix [.., K, N]."""
    return matrix.shape[-1] >= ONEDNN_WIDTH and onednn.is_faster()


def _is_native(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped product takes these operands and gives a contiguous result."""
    size = a.element_size()
    fits = a.dtype == b.dtype and b.shape[-1] * size % 16 == 0
    return fits and _is_aligned(a) and _is_aligned(b)


def _is_aligned(x: Tensor) -> bool:
    """Whether matrices are dense along one dimension and step by multiples of 16 bytes."""
    *batch, row, column = x.stride()
    rows, columns = x.shape[-2:]
    by_row = column == 1 and row >= max(columns, 1)
    by_column = row == 1 and column >= max(rows, 1)
    steps = [*batch, row if by_row else column]
    size = x.element_size()
    dense = (by_row or by_column) and all(step * size % 16 == 0 for step in steps)
    return dense and x.data_ptr() % 16 == 0


# Triton multiplies no float64. On a CPU torch's own grouped product is a loop too, in C++: at E=64,
# K=256, N=512 as fast as ours, and up to twice as fast where matrices are tiny.
_GROUPED = (
    Choice("onednn", "cpu", (float32,), _is_wide),
    Choice("torch", "cpu", (float32, bfloat16, float16), _is_native),
    Choice("torch", "cuda", (bfloat16,), _is_native),
    Choice("triton", "cuda", (float16, bfloat16, float32)),
    Choice("loop"),
)

# Rows of an average expert from which it pays to run expert by expert. With fewer, the calls cost
# more than what the cache saves: benchmarks/step_time.py at 512 tokens (64 rows) and 4,096 (512).
EXPERTWISE_ROWS = 128


def _is_many(_: Tensor, rows: Tensor, counts: Tensor) -> bool:
    return rows.shape[0] >= EXPERTWISE_ROWS * counts.shape[0]


def _are_alike(*operands: Tensor) -> bool:
    """Whether all have one dtype."""
    return len({x.dtype for x in operands}) == 1


def _fit_float32(*operands: Tensor) -> bool:
    """Whether float32 has every number of every operand."""
    return all(x.dtype in (float16, bfloat16, float32) for x in operands)


# One kernel for what takes ATen several; a product of moved rows is formed on the way.
_MOVES = (Choice("triton", "cuda", (float16, bfloat16, float32, float64)), Choice("aten"))

TABLE: dict[str, tuple[Choice, ...]] = {
    "linear_cross_entropy": (
        Choice("triton", "cuda", (float16, bfloat16, float32)),
        Choice("blocks"),
    ),
    "fused_adam": (  # torch's own is what it must equal, bit by bit, and takes one dtype
        Choice("torch", when=_are_alike),
        Choice("triton", "cuda", when=_fit_float32),
        Choice("torch"),
    ),
    "fused_adam, by chance": (Choice("triton", "cuda", when=_fit_float32), Choice("torch")),
    "merge_attention": (Choice("triton", "cuda", (float32, float64)), Choice("aten")),
    "dispatch": _MOVES,
    "pair_rows": _MOVES,
    "combine": _MOVES,
    "weigh_rows": _MOVES,
    "token_rows": _MOVES,
    "sum_rows": _MOVES,
    "pair_dots": _MOVES,
    "group_rows": _MOVES,
    "ungroup_rows": _MOVES,
    "expert_function": (
        Choice("tiled", "cuda", (float16, bfloat16, float32)),
        Choice("expertwise", "cpu", when=_is_many),
        Choice("whole"),
    ),
    "grouped_mm": _GROUPED,
    "grouped_outer": _GROUPED,
    "mm": (Choice("onednn", "cpu", (float32,), _is_wide), Choice("torch")),  # of one expert's rows
}
