"""Which ranks compute which experts' rows, when some experts have too many: operators on counts.

Each of P ranks along an axis owns some experts, and has ``places`` for as many: its own first, in
order, then guests, whose owners send their weights. Place v is one of rank v // places. Every rank
plans alike, from the same table of counts; nothing here moves.

``least_loaded`` decides on Python integers, one for each expert and rank. What has an entry for
each row is done by operators on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["count_pairs", "least_loaded", "plan_balance", "spread_pairs"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define("count_pairs(Tensor experts, SymInt num_experts) -> Tensor")
_LIBRARY.define(
    "plan_balance(Tensor table, int[] sizes, int places, float threshold, float cap, int rows) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "spread_pairs(Tensor experts, Tensor shares, Tensor hosts, SymInt num_experts) -> Tensor"
)

# Of so many consecutive integers, one has no divisor in common with a number below 3e9, the square
# of which is still an int64: such a number has at most nine prime divisors (Jacobsthal's function).
_GAP = 40
_GOLDEN = (math.sqrt(5) - 1) / 2


def least_loaded(
    counts: Sequence[int],
    sizes: Sequence[int],
    places: int,
    threshold: float = 1.3,
    cap: float = 1.0,
    rows: int = 1024,
) -> list[dict[int, int]]:
    """How many rows of which experts each rank computes.

    ``counts[e]`` are the rows of expert e; rank r owns the next ``sizes[r]`` experts. If the
    fullest rank has over ``threshold`` times the mean, rows go to the rank that has least from
    those that have over ``cap`` times the mean, rounded up, until no more fit below that. Less than
    ``rows`` rows of an expert are not moved, since they would not pay for its weights. A guest's
    rows do not move on, so no rank gets over the cap by its guests.

    The giver's largest expert moves first, which takes fewest guests. A rank has ``places`` for
    experts, so if some rank is left over the cap, small ones are tried first, as long as the
    largest can fill up after them; whichever way leaves the fullest rank with less counts.

    Returns, for each rank, the rows of each expert that has a place there: all of its own and its
    guests. Source: Least-Loaded Expert Parallelism (arXiv 2601.17111), algorithm 1, where a rank
    may have any number of guests.

    >>> least_loaded([90, 2, 4, 4], sizes=[2, 2], places=3, rows=1)
    [{0: 48, 1: 2}, {2: 4, 3: 4, 0: 42}]
    """
    held: list[dict[int, int]] = []
    first = 0
    for size in sizes:
        held.append({e: counts[e] for e in range(first, first + size)})
        first += size
    total, ranks = sum(counts), len(sizes)
    if _fullest(held) * ranks <= Fraction(str(threshold)) * total:
        return held
    limit = math.ceil(Fraction(str(cap)) * total / ranks)
    found = _lent(held, limit, places, max(rows, 1), _largest)
    if _fullest(found) > limit:
        found = min(found, _lent(held, limit, places, max(rows, 1), _smallest), key=_fullest)
    return found


_Held: TypeAlias = list[dict[int, int]]  # the rows of each expert at each rank


def _fullest(held: _Held) -> int:
    return max(sum(own.values()) for own in held)


def _lent(
    held: _Held,
    limit: int,
    places: int,
    rows: int,
    choose: Callable[[Mapping[int, int], int, int], int],
) -> _Held:
    """Move rows until no rank is over the limit, or nothing fits any more."""
    owned = [list(experts) for experts in held]
    held = [dict(own) for own in held]
    loads = [sum(own.values()) for own in held]
    givers = [rank for rank in range(len(held)) if loads[rank] > limit]
    open_ = [rank for rank in range(len(held)) if len(held[rank]) < places]
    while open_:
        to = min(open_, key=loads.__getitem__)
        for giver in sorted(givers, key=loads.__getitem__, reverse=True):
            own = {e: n for e in owned[giver] if (n := held[giver][e]) >= rows}
            wanted = min(limit - loads[to], loads[giver] - limit)
            if own and wanted >= rows:
                break
        else:
            open_.remove(to)
            continue
        expert = choose(own, wanted, places - len(held[to]))
        moved = min(own[expert], wanted)
        held[giver][expert] -= moved
        held[to][expert] = moved
        loads[giver] -= moved
        loads[to] += moved
        if len(held[to]) == places:
            open_.remove(to)
    return held


def _largest(rows: Mapping[int, int], wanted: int, places: int) -> int:
    return max(rows, key=rows.__getitem__)


def _smallest(rows: Mapping[int, int], wanted: int, places: int) -> int:
    """The smallest expert that gives so many rows in so many places, with those that have most."""
    order = sorted(rows, key=rows.__getitem__)
    large = max(len(order) - places + 1, 1)
    others = sum(rows[e] for e in order[large:])
    return next((e for e in order[:large] if rows[e] + others >= wanted), order[-1])


def count_pairs(experts: Tensor, num_experts: int) -> Tensor:
    """How many pairs of a token and its choice each expert has.

    experts int64 [N, k] -> int64 [E]. The number E, of pairs without a row, is not counted.
    """
    return torch.ops.moptrace.count_pairs.default(experts, num_experts)


def plan_balance(
    table: Tensor, sizes: Sequence[int], places: int, threshold: float, cap: float, rows: int
) -> tuple[Tensor, Tensor]:
    """Who computes the rows of every rank, by ``least_loaded``, and what each place is for.

    table int64 [*S, E] -> shares int64 [*S, P * places], hosts int64 [P * places].

    ``table[s, e]`` rows of expert e come from rank s. Ensures: ``hosts[v]`` is the expert at place
    v, -1 at an empty one; a rank's own experts come first, then guests, both in order.
    ``shares[s, v]`` of the rows from rank s go to place v, so many that each source divides an
    expert's rows among its places as all sources together do, up to a rounding.
    """
    return torch.ops.moptrace.plan_balance.default(table, sizes, places, threshold, cap, rows)


def spread_pairs(experts: Tensor, shares: Tensor, hosts: Tensor, num_experts: int) -> Tensor:
    """Send each pair to a place of the expert that it chose, instead of to the expert.

    experts int64 [N, k], shares int64 [V], hosts int64 [V] -> int64 [N, k].

    Requires: ``shares`` adds up, over the places of each expert, to its pairs. Ensures: place v has
    ``shares[v]`` pairs, all of expert ``hosts[v]``. Those of one expert are spread evenly: about
    the same share of any run of its pairs, and of any K-th ones, goes to a place, so chunks of
    tokens are balanced as all together. The number E, of pairs without a row, becomes V.
    """
    return torch.ops.moptrace.spread_pairs.default(experts, shares, hosts, num_experts)


@torch.library.impl(_LIBRARY, "count_pairs", "CompositeExplicitAutograd")
def _(experts: Tensor, num_experts: int) -> Tensor:
    return _counted(experts.flatten(), num_experts)


@torch.library.register_fake("moptrace::count_pairs", lib=_LIBRARY)
def _(experts: Tensor, num_experts: int) -> Tensor:
    return experts.new_empty(num_experts)


def _counted(pairs: Tensor, num_experts: int) -> Tensor:
    counts = pairs.new_zeros(num_experts + 1)
    return counts.scatter_add_(0, pairs, torch.ones_like(pairs))[:num_experts].clone()


# plan_balance


@torch.library.impl(_LIBRARY, "plan_balance", "CompositeExplicitAutograd")
def _(
    table: Tensor, sizes: Sequence[int], places: int, threshold: float, cap: float, rows: int
) -> tuple[Tensor, Tensor]:
    given = table.flatten(0, -2).cpu()
    held = least_loaded(given.sum(0).tolist(), sizes, places, threshold, cap, rows)
    hosts: list[int] = []
    placed: list[list[tuple[int, int]]] = [[] for _ in range(given.shape[1])]
    for size, experts in zip(sizes, held, strict=True):
        own, guests = list(experts)[:size], sorted(list(experts)[size:])
        for expert in (*own, *guests):
            placed[expert].append((len(hosts), experts[expert]))
            hosts.append(expert)
        hosts += [-1] * (places - len(experts))
    shares = given.new_zeros(given.shape[0], len(hosts))
    shares[:, [parts[0][0] for parts in placed]] = given
    for expert, parts in enumerate(placed):
        if len(parts) > 1:
            left = [quota for _, quota in parts]
            divided = [_divided(count, left) for count in given[:, expert].tolist()]
            shares[:, [place for place, _ in parts]] = given.new_tensor(divided)
    shape = (*table.shape[:-1], len(hosts))
    return shares.view(shape).to(table.device), table.new_tensor(hosts)


def _divided(rows: int, left: list[int]) -> list[int]:
    """Of what is ``left`` of each quota, ``rows`` in proportion; taken from it.

    Roundings go to the largest remainders, so quotas end at zero with the last of the rows.
    """
    total = max(sum(left), 1)
    taken = [rows * quota // total for quota in left]
    by_remainder = sorted(range(len(left)), key=lambda at: -(rows * left[at] % total))
    for at in by_remainder[: rows - sum(taken)]:
        taken[at] += 1
    for at, share in enumerate(taken):
        left[at] -= share
    return taken


@torch.library.register_fake("moptrace::plan_balance", lib=_LIBRARY)
def _(
    table: Tensor, sizes: Sequence[int], places: int, threshold: float, cap: float, rows: int
) -> tuple[Tensor, Tensor]:
    number = len(sizes) * places
    return table.new_empty(*table.shape[:-1], number), table.new_empty(number)


# spread_pairs


@torch.library.impl(_LIBRARY, "spread_pairs", "CompositeExplicitAutograd")
def _(experts: Tensor, shares: Tensor, hosts: Tensor, num_experts: int) -> Tensor:
    pairs, number = experts.flatten(), hosts.shape[0]
    expert_of = hosts.masked_fill(hosts < 0, num_experts)
    by_expert = expert_of.argsort(stable=True)  # empty places last
    if bool((_counted(expert_of, num_experts) == 1).all()):  # nobody has guests
        home = by_expert[: num_experts + 1].clone()
        home[num_experts] = number
        return home.index_select(0, pairs).view(experts.shape)
    # The places of an expert divide the queue of its pairs: each takes a run of it.
    ends = shares.index_select(0, by_expert).cumsum(0)
    counts = _counted(pairs, num_experts + 1)
    start = counts.cumsum(0) - counts
    order = pairs.argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.shape[0], device=order.device)
    own_start = start.index_select(0, pairs)
    queue = (position - own_start) * _strides(counts).index_select(0, pairs)
    queue = own_start + queue % counts.index_select(0, pairs)
    at = torch.searchsorted(ends, queue, right=True).clamp_(max=number - 1)
    place = by_expert.index_select(0, at).masked_fill(pairs == num_experts, number)
    return place.view(experts.shape)


def _strides(counts: Tensor) -> Tensor:
    """For each number a multiplier that permutes its residues, near the golden section of it."""
    candidates = (counts * _GOLDEN).long()[:, None] + torch.arange(1, _GAP + 1).to(counts)
    first = (torch.gcd(candidates, counts[:, None]) == 1).int().argmax(1, keepdim=True)
    return candidates.gather(1, first).squeeze(1)


@torch.library.register_fake("moptrace::spread_pairs", lib=_LIBRARY)
def _(experts: Tensor, shares: Tensor, hosts: Tensor, num_experts: int) -> Tensor:
    return experts.new_empty(experts.shape)
