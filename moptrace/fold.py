"""Runs of like regions in a list: how a print shows one layer for many.

A region is like the one before it if its items have the same keys in the same order. Between nodes
of a graph it must be wired alike too.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

import moptrace.kernels.packing  # noqa: F401  registers the operators

__all__ = ["Run", "runs", "wired_alike"]


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` regions of ``period`` items each, one after another."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count

    @property
    def hidden(self) -> int:
        return self.period * (self.count - 1)


_TRIES = 8  # how many later nodes of the same key are tried as the start of the next region


def runs(
    keys: Sequence[Hashable],
    start: int = 0,
    stop: int | None = None,
    verified: Callable[[Run], Run] = lambda run: run,
) -> Iterator[Run]:
    """Runs of equal regions in ``keys[start:stop]`` that hide two items or more, left to right.

    ``verified`` may shorten a run to what is equal in other ways too. The time is linear: ranges
    are compared by the hashes of prefixes.

    >>> [(run.start, run.period, run.count) for run in runs("xabcabcabcy")]
    [(1, 3, 3)]
    """
    stop = len(keys) if stop is None else stop
    later: dict[Hashable, list[int]] = defaultdict(list)
    for position in range(start, stop):
        later[keys[position]].append(position)
    rank = {position: i for places in later.values() for i, position in enumerate(places)}
    same = _equal_ranges(keys, start, stop)
    at = start
    while at < stop:
        places, number = later[keys[at]], rank[at]
        best = Run(at, 1, 1)
        for other in places[number + 1 : number + 1 + _TRIES]:
            period, count = other - at, 1
            while at + (count + 1) * period <= stop and same(at, at + count * period, period):
                count += 1
            found = Run(at, period, count)
            if found.stop > best.stop and found.hidden > 1:
                best = found
        run = verified(best) if best.count > 1 else best
        if run.hidden > 1:
            yield run
        at = run.stop


def _equal_ranges(
    keys: Sequence[Hashable], start: int, stop: int
) -> Callable[[int, int, int], bool]:
    """Compare two ranges of keys in constant time."""
    modulus, base = (1 << 61) - 1, 1_000_003
    numbers: dict[Hashable, int] = {}
    prefix, power = [0], [1]
    for position in range(start, stop):
        number = numbers.setdefault(keys[position], len(numbers) + 1)
        prefix.append((prefix[-1] * base + number) % modulus)
        power.append(power[-1] * base % modulus)

    def window(at: int, length: int) -> int:
        at -= start
        return (prefix[at + length] - prefix[at] * power[length]) % modulus

    return lambda a, b, length: window(a, length) == window(b, length)


def wired_alike(nodes: Sequence[fx.Node], index: Mapping[fx.Node, int]) -> Callable[[Run], Run]:
    """Shorten a run of ``nodes`` to the regions that are wired like the one before them.

    ``index`` says where in ``nodes`` each node is.
    """

    def verified(run: Run) -> Run:
        for position in range(run.start + run.period, run.stop):
            if not _alike(nodes[position - run.period], nodes[position], run, index):
                return Run(run.start, run.period, (position - run.start) // run.period)
        return run

    return verified


def _alike(a: fx.Node, b: fx.Node, run: Run, index: Mapping[fx.Node, int]) -> bool:
    """Operands are the same, one region apart, both weights, or carried in by the first region."""
    mine, theirs = a.all_input_nodes, b.all_input_nodes
    if len(mine) != len(theirs):
        return False
    first = index[a] < run.start + run.period
    for x, y in zip(mine, theirs, strict=True):
        here, there = index.get(x, -1), index.get(y, -1)
        if (_is_weight(x) and _is_weight(y)) or (x is y and here < run.start):
            continue
        carried = first and here < run.start <= there < run.start + run.period
        if not carried and (here < 0 or there - here != run.period):
            return False
    return True


def _is_weight(node: fx.Node) -> bool:
    """Whether a layer finds this node ready, whatever its place: an input, or out of a bucket."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source.op == "placeholder" or source.target is torch.ops.moptrace.unpack.default
