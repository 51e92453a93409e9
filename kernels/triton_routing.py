"""The operators of ``moptrace.kernels.routing`` in Triton: each moves its rows once.

Tokens are sorted by expert as one counts: a program numbers some pairs among those of the same
expert in its block, a scan over (expert, block) says where each block's begin, and every pair is
written to its place. A place depends on the pairs before it and on nothing else, so pairs of an
expert keep their order; there are no atomics. What multiplies rows reads them where they lie. No
row, and no token, is written by two programs, so the order of every sum is fixed. Offsets are
64-bit; rows may lie in memory as they like.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false
# Triton has no types, and is not there on every machine.

from __future__ import annotations

import math

import torch
from torch import Tensor

from moptrace.kernels.triton_jit import ceil, jit, power_of_two, tl

__all__ = [
    "combine",
    "dispatch",
    "group_rows",
    "pair_dots",
    "pair_rows",
    "sum_rows",
    "token_rows",
    "ungroup_rows",
    "weigh_rows",
]


def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    some: bool,
    numbers: Tensor | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the pairs by their experts, counting, and copy each one's token."""
    pairs, first = experts.flatten().contiguous(), None
    if numbers is not None:
        num_experts = numbers.shape[0]
        first = numbers if num_experts else numbers.new_zeros(1)
    total, blocks = pairs.shape[0], ceil(pairs.shape[0], _PAIRS)
    # A row for each expert, for the pairs of none, and for those of an expert that is not there.
    table = pairs.new_zeros(num_experts + 2, blocks)
    ranks = torch.empty_like(pairs, dtype=torch.int32)
    given = pairs, pairs if first is None else first, ranks, table
    options = {"HAS_FIRST": first is not None, "SOME": some, "PAIRS": _PAIRS}
    if total:
        _count_kernel[(blocks,)](*given, total, num_experts, **options, OTHERS=_OTHERS)
    counts = table.sum(1)
    exists = counts[num_experts + some :].sum() == 0
    torch._assert_async(exists, "a token chose an expert that does not exist")
    counts = counts[:num_experts].clone()
    if capacity is not None:
        counts.fill_(capacity)
        order = pairs.new_full((num_experts * capacity,), total)
    else:
        order = pairs.new_empty(int(counts.sum()) if some else total)
    if total:
        ends = table.view(-1).cumsum(0)
        sizes = total, len(order), num_experts, 0 if capacity is None else capacity
        options["HAS_CAPACITY"] = capacity is not None
        _place_kernel[(blocks,)](*given, ends, order, *sizes, **options)
    return _moved(x, order, experts.shape[1], some), counts, order


def pair_rows(values: Tensor, order: Tensor, some: bool) -> Tensor:
    """Bring one value for each pair into the order of the rows."""
    return _moved(values.flatten(0, 1), order, 1, some)


def token_rows(x: Tensor, order: Tensor, choices: int, some: bool) -> Tensor:
    """Copy each token once for each of its pairs."""
    return _moved(x, order, choices, some)


def sum_rows(rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool) -> Tensor:
    """Read each token's rows, and write their sum."""
    return combine(rows, order, rows.new_ones(tokens, choices), some)


def combine(rows: Tensor, order: Tensor, weights: Tensor, some: bool) -> Tensor:
    """Read each token's rows, and write their weighted sum."""
    tokens, choices = weights.shape
    dtype = torch.result_type(rows, weights)
    result = rows.new_empty(tokens, *rows.shape[1:], dtype=dtype)
    flat = _flat(rows)
    if result.numel():
        tile = _tile(flat.shape[1], "TOKENS")
        _combine_kernel[(ceil(tokens, tile["TOKENS"]),)](
            flat,
            _positions(order, weights.numel(), some),
            weights.contiguous(),
            result,
            tokens,
            choices,
            flat.shape[1],
            *flat.stride(),
            IS_DOUBLE=dtype is torch.float64,
            **tile,
        )
    return result


def weigh_rows(x: Tensor, order: Tensor, weights: Tensor, some: bool) -> Tensor:
    """Copy each token once for each of its pairs, times the pair's weight."""
    return _moved(x, order, weights.shape[1], some, weights)


def pair_dots(x: Tensor, rows: Tensor, order: Tensor, choices: int, some: bool) -> Tensor:
    """Read each token with its rows, and write their dot products."""
    tokens = x.shape[0]
    result = x.new_empty(tokens, choices, dtype=torch.result_type(x, rows))
    flat, of_rows = _flat(x), _flat(rows)
    if result.numel():
        tile = _tile(flat.shape[1], "TOKENS")
        _dots_kernel[(ceil(tokens, tile["TOKENS"]),)](
            flat,
            of_rows,
            _positions(order, tokens * choices, some),
            result,
            tokens,
            choices,
            flat.shape[1],
            *flat.stride(),
            *of_rows.stride(),
            IS_DOUBLE=result.dtype is torch.float64,
            **tile,
        )
    return result


def group_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (source, expert) to (expert, source)."""
    index = table.new_empty(rows.shape[0])
    if len(index):
        _transposition_kernel[(table.numel(), _SHARES)](
            table, index, *table.shape, *table.stride(), CELLS=_CELLS, SHARES=_SHARES
        )
    return _moved(rows, index, 1, some=False)


def ungroup_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (expert, source) to (source, expert)."""
    return group_rows(rows, table.t())


# launches

_PAIRS = 256  # that a program sorts
_OTHERS = 64  # with which it compares them at a time
_CELLS = 256  # of a table that a program adds up at a time, and rows whose places it writes
_SHARES = 8  # programs that share the rows of a cell


def _tile(width: int, rows: str) -> dict[str, int]:
    """How many rows and columns a program has at a time."""
    columns = min(power_of_two(width), 512)
    return {rows: min(4096 // columns, 256), "WIDTH": columns}


def _flat(x: Tensor) -> Tensor:
    """A matrix with these rows: a view where there is one."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _moved(
    x: Tensor, order: Tensor, choices: int, some: bool, weights: Tensor | None = None
) -> Tensor:
    """What each row has of ``x``, which has a part for so many pairs each, times its weight."""
    dtype = x.dtype if weights is None else torch.result_type(x, weights)
    result = x.new_empty(order.shape[0], *x.shape[1:], dtype=dtype)
    if not x.shape[0]:
        return result.zero_()
    flat = _flat(x)
    if result.numel():
        tile = _tile(flat.shape[1], "ROWS")
        _move_kernel[(ceil(len(order), tile["ROWS"]),)](
            flat,
            order.contiguous(),
            flat if weights is None else weights.contiguous(),
            result,
            len(order),
            len(flat) * choices,
            max(choices, 1),  # without any there are still the rows that a capacity makes
            flat.shape[1],
            *flat.stride(),
            HAS_WEIGHTS=weights is not None,
            SOME=some,
            IS_DOUBLE=dtype is torch.float64,
            **tile,
        )
    return result


def _positions(order: Tensor, pairs: int, some: bool) -> Tensor:
    """The row of each pair; -1 where it has none."""
    found = order.new_full((pairs,), -1) if some else order.new_empty(pairs)
    if len(order):
        _invert_kernel[(ceil(len(order), 1024),)](
            order.contiguous(), found, len(order), pairs, ROWS=1024
        )
    return found


# kernels


@jit
def _row_of(chosen, first, pair, total, experts, HAS_FIRST: tl.constexpr, SOME: tl.constexpr):
    """The row of the table that counts each pair."""
    expert = tl.load(chosen + pair, mask=pair < total, other=-1)
    if HAS_FIRST:
        expert -= tl.load(first)
        expert = tl.where((expert >= 0) & (expert < experts), expert, experts)
    else:
        exists = (expert >= 0) & (expert < experts + (1 if SOME else 0))
        expert = tl.where(exists, expert, experts + 1)
    return expert.to(tl.int32)


@jit
def _count_kernel(
    chosen,
    first,
    ranks,
    table,
    total,
    experts,
    HAS_FIRST: tl.constexpr,
    SOME: tl.constexpr,
    PAIRS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    own = _row_of(chosen, first, pair, total, experts, HAS_FIRST, SOME)
    number = tl.zeros((PAIRS,), dtype=tl.int32)
    rank = tl.zeros((PAIRS,), dtype=tl.int32)
    for start in range(0, PAIRS, OTHERS):
        other = block * PAIRS + start + tl.arange(0, OTHERS)
        row = _row_of(chosen, first, other, total, experts, HAS_FIRST, SOME)
        is_same = (own[:, None] == row[None, :]) & (other < total)[None, :]
        number += tl.sum(is_same.to(tl.int32), 1)
        rank += tl.sum((is_same & (other[None, :] < pair[:, None])).to(tl.int32), 1)
    tl.store(ranks + pair, rank, mask=pair < total)
    # The pairs of one expert all write the same number.
    cell = own.to(tl.int64) * tl.num_programs(0) + block
    tl.store(table + cell, number.to(tl.int64), mask=pair < total)


@jit
def _place_kernel(
    chosen,
    first,
    ranks,
    table,
    ends,
    order,
    total,
    rows,
    experts,
    capacity,
    HAS_FIRST: tl.constexpr,
    SOME: tl.constexpr,
    HAS_CAPACITY: tl.constexpr,
    PAIRS: tl.constexpr,
):
    block, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < total
    own = _row_of(chosen, first, pair, total, experts, HAS_FIRST, SOME).to(tl.int64)
    cell = own * blocks + block
    place = tl.load(ends + cell, mask=is_pair, other=0)
    place += tl.load(ranks + pair, mask=is_pair, other=0)
    place -= tl.load(table + cell, mask=is_pair, other=0)
    if HAS_CAPACITY:
        place -= tl.load(ends + own * blocks - 1, mask=is_pair & (own > 0), other=0)
        has_row = (own < experts) & (place < capacity)
        place += own * capacity
    else:
        has_row = place < rows  # those of no expert come last
    tl.store(order + place, pair, mask=is_pair & has_row)


@jit
def _invert_kernel(order, found, rows, pairs, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.load(order + row, mask=row < rows, other=0)
    tl.store(found + pair, row, mask=(row < rows) & (pair < pairs))


@jit
def _move_kernel(
    x,
    order,
    weights,
    result,
    rows,
    pairs,
    choices,
    width,
    row_stride,
    column_stride,
    HAS_WEIGHTS: tl.constexpr,
    SOME: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    pair = tl.load(order + row, mask=is_row, other=0)
    has_value = is_row
    if SOME:
        is_pair = pair < pairs
        pair = tl.where(is_pair, pair, 0)
        if HAS_WEIGHTS:
            has_value = is_row & is_pair
    token = pair // choices
    if HAS_WEIGHTS:
        weight = tl.load(weights + pair, mask=has_value, other=0.0)
        weight = weight.to(tl.float64 if IS_DOUBLE else tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        is_column = column < width
        value = tl.load(
            x + token[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride,
            mask=has_value[:, None] & is_column[None, :],
            other=0.0,
        )
        if HAS_WEIGHTS:
            value = value.to(weight.dtype) * weight[:, None]
        tl.store(
            result + row[:, None] * width + column[None, :],
            value.to(result.dtype.element_ty),
            mask=is_row[:, None] & is_column[None, :],
        )


@jit
def _combine_kernel(
    values,
    positions,
    weights,
    result,
    tokens,
    choices,
    width,
    row_stride,
    column_stride,
    IS_DOUBLE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    EXACT: tl.constexpr = tl.float64 if IS_DOUBLE else tl.float32
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        is_column = column < width
        total = tl.zeros((TOKENS, WIDTH), dtype=EXACT)
        for choice in range(choices):
            pair = token * choices + choice
            row = tl.load(positions + pair, mask=is_token, other=-1)
            weight = tl.load(weights + pair, mask=is_token, other=0.0).to(EXACT)
            value = tl.load(
                values + row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride,
                mask=(row >= 0)[:, None] & is_column[None, :],
                other=0.0,
            )
            total += value.to(EXACT) * weight[:, None]
        tl.store(
            result + token[:, None] * width + column[None, :],
            total.to(result.dtype.element_ty),
            mask=is_token[:, None] & is_column[None, :],
        )


@jit
def _dots_kernel(
    x,
    values,
    positions,
    result,
    tokens,
    choices,
    width,
    token_stride,
    column_stride,
    row_stride,
    row_column_stride,
    IS_DOUBLE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    EXACT: tl.constexpr = tl.float64 if IS_DOUBLE else tl.float32
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    for choice in range(choices):
        pair = token * choices + choice
        row = tl.load(positions + pair, mask=is_token, other=-1)
        total = tl.zeros((TOKENS, WIDTH), dtype=EXACT)
        for start in range(0, width, WIDTH):
            column = (start + tl.arange(0, WIDTH)).to(tl.int64)
            mask = (row >= 0)[:, None] & (column < width)[None, :]
            a = tl.load(
                x + token[:, None] * token_stride + column[None, :] * column_stride,
                mask=mask,
                other=0.0,
            )
            b = tl.load(
                values + row[:, None] * row_stride + column[None, :] * row_column_stride,
                mask=mask,
                other=0.0,
            )
            total += a.to(EXACT) * b.to(EXACT)
        dots = tl.sum(total, 1)
        tl.store(result + pair, dots.to(result.dtype.element_ty), mask=is_token)


@jit
def _transposition_kernel(
    table,
    index,
    sources,
    experts,
    source_stride,
    expert_stride,
    CELLS: tl.constexpr,
    SHARES: tl.constexpr,
):
    source, expert = tl.program_id(0) // experts, tl.program_id(0) % experts
    start, end = tl.zeros((), dtype=tl.int64), tl.zeros((), dtype=tl.int64)
    for first in range(0, sources * experts, CELLS):
        cell = first + tl.arange(0, CELLS)
        its_source, its_expert = cell // experts, cell % experts
        rows = tl.load(
            table + its_source * source_stride + its_expert * expert_stride,
            mask=cell < sources * experts,
            other=0,
        )
        is_before = (its_source < source) | ((its_source == source) & (its_expert < expert))
        start += tl.sum(tl.where(is_before, rows, 0))
        is_before = (its_expert < expert) | ((its_expert == expert) & (its_source < source))
        end += tl.sum(tl.where(is_before, rows, 0))
    rows = tl.load(table + source * source_stride + expert * expert_stride)
    for first in range(tl.program_id(1) * CELLS, rows, SHARES * CELLS):
        row = first + tl.arange(0, CELLS)
        tl.store(index + end + row, start + row, mask=row < rows)
