"""The operators of ``moptrace.kernels.routing`` by ATen, on every device and in every dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moptrace.kernels.logit_blocks import exact

__all__ = [
    "combine",
    "dispatch",
    "group_rows",
    "pair_dots",
    "pair_rows",
    "picked",
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
    """Sort the pairs by their experts, and copy each one's token."""
    pairs = experts.flatten()
    if numbers is not None:
        num_experts = numbers.shape[0]
        own = pairs - numbers[:1] if num_experts else torch.zeros_like(pairs)
        pairs = own.masked_fill((own < 0) | (own >= num_experts), num_experts)
    order = _sorted(pairs, num_experts)
    # Unlike bincount, scatter_add refuses an expert that does not exist and needs no device sync.
    counts = pairs.new_zeros(num_experts + some).scatter_add_(0, pairs, torch.ones_like(pairs))
    if some:
        counts = counts[:num_experts].clone()
    if capacity is not None:
        order = _slots(pairs.index_select(0, order), order, counts, capacity)
        counts = torch.full_like(counts, capacity)
    elif some:
        order = order[: int(counts.sum())].clone()
    return picked(x, order, experts.shape[1], some), counts, order


# From so many numbers on, torch counts them instead of comparing: one pass for each of their bytes.
_COUNTED = 32_768


def _sorted(pairs: Tensor, largest: int) -> Tensor:
    """The pairs ordered by their experts, of which ``largest`` has the largest number."""
    narrow = pairs
    if pairs.device.type == "cpu" and len(pairs) >= _COUNTED:
        if largest < 2**8:
            narrow = pairs.to(torch.uint8)
        elif largest < 2**15:
            narrow = pairs.to(torch.int16)
    return narrow.argsort(stable=True)


def _slots(sorted_: Tensor, order: Tensor, counts: Tensor, capacity: int) -> Tensor:
    """The pairs of so many rows for each expert, from the pairs in order of their experts."""
    start = torch.cat([counts.cumsum(0) - counts, counts.sum().view(1)])
    place = torch.arange(order.shape[0], device=order.device) - start.index_select(0, sorted_)
    total = counts.shape[0] * capacity
    nowhere = (sorted_ == counts.shape[0]) | (place >= capacity)
    slot = (sorted_ * capacity + place).masked_fill(nowhere, total)
    return order.new_full((total + 1,), order.shape[0]).scatter_(0, slot, order)[:total].clone()


def pair_rows(values: Tensor, order: Tensor, some: bool) -> Tensor:
    """Bring one value for each pair into the order of the rows."""
    return picked(values.flatten(0, 1), order, 1, some)


def token_rows(x: Tensor, order: Tensor, choices: int, some: bool) -> Tensor:
    """Copy each token once for each of its pairs."""
    return picked(x, order, choices, some)


def sum_rows(rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool) -> Tensor:
    """Add up each token's rows, one choice at a time."""
    result = rows.new_zeros(tokens, *rows.shape[1:], dtype=exact(rows.dtype))
    for chosen in _choices(rows, order, tokens, choices, some):
        result.add_(chosen)
    return result.to(rows.dtype)


def combine(rows: Tensor, order: Tensor, weights: Tensor, some: bool) -> Tensor:
    """Sum each token's rows with its weights, one choice at a time."""
    dtype = torch.result_type(rows, weights)
    scale = _with_dims(weights, rows.dim() - 1)
    result = rows.new_zeros(weights.shape[0], *rows.shape[1:], dtype=exact(dtype))
    # One choice at a time: a [N, k, D] copy costs more in page faults than k passes over [N, D].
    for j, chosen in enumerate(_choices(rows, order, weights.shape[0], weights.shape[1], some)):
        result.addcmul_(chosen, scale[:, j])
    return result.to(dtype)


def weigh_rows(x: Tensor, order: Tensor, weights: Tensor, some: bool) -> Tensor:
    """Copy each token once for each of its pairs, times the pair's weight."""
    rows = picked(x, order, weights.shape[1], some).to(torch.result_type(x, weights))
    scale = picked(weights.flatten(), order, 1, some)
    rows.mul_(_with_dims(scale, x.dim() - 1))
    return rows.masked_fill_(_with_dims(order == weights.numel(), x.dim() - 1), 0) if some else rows


def pair_dots(x: Tensor, rows: Tensor, order: Tensor, choices: int, some: bool) -> Tensor:
    """Multiply each token with each of its rows, one choice at a time."""
    dtype = torch.result_type(x, rows)
    features = math.prod(x.shape[1:])
    flat = x.reshape(x.shape[0], features).to(exact(dtype))
    result = flat.new_empty(x.shape[0], choices)
    for j, chosen in enumerate(_choices(rows, order, x.shape[0], choices, some)):
        torch.sum(flat * chosen.view(x.shape[0], features), 1, out=result[:, j])
    return result.to(dtype)


def group_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (source, expert) to (expert, source)."""
    if rows.device.type != "cpu" or not table.numel():
        return rows.index_select(0, _transposition(table, rows.shape[0]))
    parts = rows.split(table.flatten().tolist())  # which elsewhere would stall the device
    experts = table.shape[1]
    return torch.cat([part for expert in range(experts) for part in parts[expert::experts]])


def ungroup_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (expert, source) to (source, expert)."""
    return group_rows(rows, table.t())


# index arithmetic


def picked(x: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    """What each row has of ``x``, which has a part for so many pairs each."""
    if some:
        if not x.shape[0]:
            return x.new_zeros(order.shape[0], *x.shape[1:])
        order = order.masked_fill(order == x.shape[0] * choices, 0)
    # Without choices there are still the rows of no pair that a capacity makes.
    return x.index_select(0, order if choices <= 1 else order // choices)


def _choices(
    rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool
) -> Iterator[Tensor]:
    """For each of their choices, the tokens' rows; zeros where a pair has none."""
    pairs = tokens * choices
    numbers = torch.arange(order.shape[0], device=order.device)
    if not some:
        position = torch.empty_like(order).scatter_(0, order, numbers).view(tokens, choices)
        yield from (rows.index_select(0, position[:, j]) for j in range(choices))
        return
    position = order.new_full((pairs + 1,), -1).scatter_(0, order, numbers)[:pairs]
    position = position.view(tokens, choices)
    for j in range(choices):
        if not rows.shape[0]:
            yield rows.new_zeros(tokens, *rows.shape[1:])
            continue
        own = rows.index_select(0, position[:, j].clamp(min=0))
        yield own.masked_fill_(_with_dims(position[:, j] < 0, rows.dim() - 1), 0)


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
