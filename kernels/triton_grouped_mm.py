"""Grouped products in Triton: the counts stay on the device, and nothing is copied or padded.

A program of ``grouped_mm`` owns a tile of one expert's rows; which rows these are, it reads from a
table that ``row_tiles`` makes on the device. There is room in it for as many tiles as any counts
can need, so the host never learns the counts; programs without rows return at once. A program of
``grouped_outer`` owns a tile of one expert's matrix and adds up over the expert's rows. So each
result has one owner and every sum one order: no atomics, the same bits each time. Operands are read
by their strides, transposed or expanded as they may be. Offsets are 64-bit.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false
# Triton has no types, and is not there on every machine.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moptrace.kernels.triton_jit import ceil, jit, tl

__all__ = ["grouped_mm", "grouped_outer", "row_tiles", "tile_sizes"]


def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``moptrace.kernels.grouped_mm.grouped_mm`` for float16, bfloat16 and float32.

    rows [S, K], weight [E, K, N], counts int64 [E] -> [S, N], added up in float32.
    """
    total, inside = rows.shape
    outside = weight.shape[2]
    result = rows.new_empty(total, outside)
    if not result.numel():
        return result
    tile = tile_sizes(rows.dtype)
    tiles = row_tiles(counts, total, tile["ROWS"])
    columns = ceil(outside, tile["COLUMNS"])
    _product_kernel[(tiles.shape[1] * columns,)](
        rows,
        weight,
        result,
        tiles,
        tiles.shape[1],
        inside,
        outside,
        *rows.stride(),
        *weight.stride(),
        **tile,
    )
    return result


def grouped_outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """``moptrace.kernels.grouped_mm.grouped_outer`` for float16, bfloat16 and float32.

    a [S, K], b [S, N], counts int64 [E] -> [E, K, N], added up in float32.
    """
    (total, height), width = a.shape, b.shape[1]
    experts = counts.shape[0]
    result = a.new_empty(experts, height, width)
    if not result.numel():
        return result
    tile = outer_sizes(a.dtype)
    blocks = ceil(height, tile["HEIGHT"]) * ceil(width, tile["WIDTH"])
    _outer_kernel[(blocks, experts)](
        a,
        b,
        result,
        counts,
        total,
        experts,
        height,
        width,
        *a.stride(),
        *b.stride(),
        EXPERTS=power_of_two(experts),
        **tile,
    )
    return result


def row_tiles(counts: Tensor, rows: int, size: int) -> Tensor:
    """Which rows each tile of at most ``size`` has, for any counts of so many rows.

    counts int64 [E] -> int64 [3, ceil(S / size) + E]: the expert of a tile, its first row, and
    where the expert's rows end. A tile that is not needed ends at row 0.
    """
    experts = counts.shape[0]
    number = ceil(rows, size) + experts
    tiles = counts.new_empty(3, number)
    _tiles_kernel[(ceil(number, _TILES),)](
        counts.contiguous(),
        tiles,
        rows,
        experts,
        number,
        SIZE=size,
        TILES=_TILES,
        EXPERTS=power_of_two(experts),
    )
    return tiles


# launches

_TILES = 16  # of a program that makes the table


def power_of_two(n: int) -> int:
    """The least power of two that is no less; Triton's blocks are of these sizes.

    >>> power_of_two(5), power_of_two(8), power_of_two(0)
    (8, 8, 1)
    """
    return 1 << max(n - 1, 0).bit_length()


def tile_sizes(dtype: torch.dtype, results: int = 1) -> dict[str, Any]:
    """The sizes of a tile of rows, of so many tiles of results, and of the sum's pieces."""
    if dtype is torch.float32:
        return {"ROWS": 64, "COLUMNS": 64 if results < 3 else 32, "DEPTH": 32, "num_warps": 4}
    return {"ROWS": 128, "COLUMNS": 128 if results < 2 else 64, "DEPTH": 64, "num_warps": 8}


def outer_sizes(dtype: torch.dtype) -> dict[str, Any]:
    """The sizes of a tile of a matrix, and of the rows that are added up at a time."""
    if dtype is torch.float32:
        return {"HEIGHT": 64, "WIDTH": 64, "ROWS": 32, "num_warps": 4}
    return {"HEIGHT": 128, "WIDTH": 128, "ROWS": 64, "num_warps": 8}


# kernels


@jit
def _tiles_kernel(
    counts,
    tiles,
    rows,
    experts,
    number,
    SIZE: tl.constexpr,
    TILES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    expert = tl.arange(0, EXPERTS)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    needed = (count + SIZE - 1) // SIZE
    is_past = (tl.cumsum(needed, 0)[None, :] <= tile[:, None]) & (expert < experts)[None, :]
    own = tl.sum(is_past.to(tl.int64), 1)
    start = tl.sum(tl.where(is_past, count[None, :], 0), 1)
    first = tl.sum(tl.where(is_past, needed[None, :], 0), 1)
    length = tl.load(counts + own, mask=own < experts, other=0)
    # Whatever the counts are, nothing is read or written past the rows.
    stop = tl.where(own < experts, tl.minimum(start + length, rows), 0)
    is_tile = tile < number
    tl.store(tiles + tile, own, mask=is_tile)
    tl.store(tiles + number + tile, start + (tile - first) * SIZE, mask=is_tile)
    tl.store(tiles + 2 * number + tile, stop, mask=is_tile)


@jit
def place(tiles, columns):
    """The tile of rows and the block of columns of a program: neighbours share what they read."""
    program = tl.program_id(0).to(tl.int64)
    group = program // (8 * columns)
    size = tl.minimum(tiles - group * 8, 8)
    within = program % (8 * columns)
    return group * 8 + within % size, within // size


@jit
def span_of(counts, expert, rows, experts, EXPERTS: tl.constexpr):
    """Where an expert's rows start and end."""
    each = tl.arange(0, EXPERTS)
    count = tl.load(counts + each, mask=each < experts, other=0)
    start = tl.sum(tl.where(each < expert, count, 0), 0)
    return start, tl.minimum(start + tl.load(counts + expert), rows)


@jit
def _product_kernel(
    rows,
    weight,
    result,
    tiles,
    number,
    inside,
    outside,
    rows_step,
    rows_column,
    weight_step,
    weight_row,
    weight_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile, block = place(number, tl.cdiv(outside, COLUMNS))
    expert = tl.load(tiles + tile)
    row = tl.load(tiles + number + tile) + tl.arange(0, ROWS)
    stop = tl.load(tiles + 2 * number + tile)
    if stop == 0:
        return
    is_row = row < stop
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < outside
    weight += expert * weight_step
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inside, DEPTH):
        depth = start + tl.arange(0, DEPTH).to(tl.int64)
        is_depth = depth < inside
        a = tl.load(
            rows + row[:, None] * rows_step + depth[None, :] * rows_column,
            mask=is_row[:, None] & is_depth[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + depth[:, None] * weight_row + column[None, :] * weight_column,
            mask=is_depth[:, None] & is_column[None, :],
            other=0.0,
        )
        # By default a GPU rounds float32 operands to ten bits here.
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(
        result + row[:, None] * outside + column[None, :],
        total,
        mask=is_row[:, None] & is_column[None, :],
    )


@jit
def _outer_kernel(
    a,
    b,
    result,
    counts,
    rows,
    experts,
    height,
    width,
    a_step,
    a_column,
    b_step,
    b_column,
    EXPERTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(width, WIDTH)
    line = (tl.program_id(0) // blocks).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    column = (tl.program_id(0) % blocks).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    is_line = line < height
    is_column = column < width
    first, stop = span_of(counts, expert, rows, experts, EXPERTS)
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for start in range(first, stop, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        is_row = row < stop
        left = tl.load(
            a + row[:, None] * a_step + line[None, :] * a_column,
            mask=is_row[:, None] & is_line[None, :],
            other=0.0,
        )
        right = tl.load(
            b + row[:, None] * b_step + column[None, :] * b_column,
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    tl.store(
        result + (expert * height + line[:, None]) * width + column[None, :],
        total,
        mask=is_line[:, None] & is_column[None, :],
    )
