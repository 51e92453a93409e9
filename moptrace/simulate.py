"""Run a local or a step program on many simulated ranks, in one process and in lock step.

Every rank's values are ordinary tensors. Each rank runs by itself from one collective to the next,
as a coroutine; there all meet. A collective runs once for each of its groups, by its definition in
``collectives.py``, and differentiates by its transpose there, exactly as on real ranks. So a
program with a wrong reduction gives wrong gradients here too.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from moptrace.collectives import (
    COLLECTIVES,
    Collective,
    Communicator,
    Pending,
    collective,
    start,
)
from moptrace.core import Level, Program
from moptrace.placement import Layout
from moptrace.recompute import Region, recomputed, with_regions
from moptrace.rings import Journey, Ring, Seat, drive_together, ring, ring_backward
from moptrace.stages import receive, received, send, shared

__all__ = ["simulate"]


def simulate(
    program: Program | Sequence[Program],
    arguments: Sequence[Mapping[str, Tensor]],
    seed: int = 0,
    step: int = 0,
) -> list[list[Any]]:
    """Run all ranks of a program.

    ``arguments[r]`` maps the name of every graph input to what rank ``r`` holds. Returns each
    rank's graph outputs. Differentiable: ``torch.autograd.backward`` of all ranks' losses runs
    every rank's backward, each from its own loss. Ranks whose shards are of different shapes have
    step programs of their own, which agree in their collectives: ``program`` has one for each then.
    Of programs of pipeline stages there is one for each rank too, stage by stage.
    """
    programs = [program] * len(arguments) if isinstance(program, Program) else list(program)
    layout = programs[0].layout
    assert layout is not None and len(arguments) == len(programs)
    assert len(arguments) == layout.world_size * (1 if programs[0].stage is None else layout.stages)
    ranks = [Communicator(layout, number % layout.world_size) for number in range(len(programs))]
    for rank, own in zip(ranks, programs, strict=True):
        rank.seed, rank.step, rank.stage = seed, step, own.stage or 0
    graphs = [own.graph for own in programs]
    if programs[0].level == Level.LOCAL:  # autograd differentiates it
        graphs = [with_regions(graphs[0])] * len(ranks)
    given = [{**p.constants, **own} for p, own in zip(programs, arguments, strict=True)]
    return [list(results) for results in _run(graphs, given, ranks)]


def _run(
    graphs: Sequence[fx.Graph],
    arguments: Sequence[Mapping[str, Any]],
    ranks: Sequence[Communicator],
) -> list[tuple[Any, ...]]:
    """Each rank's results of its graph; ``arguments`` are its placeholders and constants."""
    runs = [_rank(*own) for own in zip(graphs, arguments, ranks, strict=True)]
    stages = [list(own) for _, own in groupby(range(len(runs)), lambda r: ranks[r].stage)]
    mail = _Mail(ranks)
    results: dict[int, tuple[Any, ...]] = {}
    requests: dict[int, _Meeting] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(runs)))
    while answers:
        for rank, answer in answers.items():
            try:
                requests[rank] = runs[rank].send(answer)
            except StopIteration as end:
                results[rank] = end.value
        answers = mail.answers(requests)
        for own in stages:
            if not any(rank in answers for rank in own) and all(rank in requests for rank in own):
                targets = {requests[rank].target for rank in own}
                if len(targets) == 1 and not targets & _MAIL:
                    args = [requests[rank].args for rank in own]
                    found = _meet(targets.pop(), args, [ranks[rank] for rank in own])
                    answers |= dict(zip(own, found, strict=True))
        for rank in answers:
            del requests[rank]
    waiting = {rank: request.target for rank, request in requests.items()}
    assert not waiting, f"the ranks' programs differ: they wait for ever, {waiting}"
    return [results[rank] for rank in range(len(runs))]


class _Mail:
    """What pipeline stages send each other: each rank, with the ranks of its place elsewhere."""

    def __init__(self, ranks: Sequence[Communicator]):
        self.ranks = ranks
        self.sent: dict[tuple[int, int, int], Tensor] = {}  # to a stage's rank, by hop

    def answers(self, requests: Mapping[int, _Meeting]) -> dict[int, Any]:
        """Of the ranks that ask for what can be done now."""
        found: dict[int, Any] = {}
        for number, request in requests.items():
            here = self.ranks[number]
            if request.target is send:
                x, target, hop = request.args
                self.sent[target, here.rank, hop] = x.detach().clone()
                found[number] = None
            elif request.target is received:
                address = (here.stage, here.rank, request.args[0])
                if address in self.sent:
                    found[number] = self.sent.pop(address)
        alike = [n for n, request in requests.items() if request.target is shared]
        if len(alike) == len(self.ranks):
            for number in alike:
                own = [n for n in alike if self.ranks[n].rank == self.ranks[number].rank]
                (x,) = (x for n in own if (x := requests[n].args[0]) is not None)
                found[number] = x.detach().clone()
        return found


@dataclass(frozen=True)
class _Meeting:
    """What a rank's program asks for that takes all ranks: an operator, and the rank's operands."""

    target: Any
    args: tuple[Any, ...]


def _rank(
    graph: fx.Graph, given: Mapping[str, Any], rank: Communicator
) -> Generator[_Meeting, Any, tuple[Any, ...]]:
    """Run one rank's graph between meetings, and return its results."""
    values: dict[fx.Node, Any] = {}
    remaining = {node: len(node.users) for node in graph.nodes}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            values[node] = given[str(node.target)]
            continue
        positional: Any
        keywords: Any
        positional, keywords = map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return positional[0]
        if node.target is receive:
            values[node] = positional[-1]  # the number of the hop
        elif _takes_all(node.target):
            values[node] = yield _Meeting(node.target, positional)
        else:
            with rank:
                values[node] = node.target(*positional, **keywords)  # type: ignore[operator]
        for used in node.all_input_nodes:
            remaining[used] -= 1
            if not remaining[used]:
                del values[used]
    raise AssertionError("the graph has no output")


_MAIL = {send, received, shared}


def _takes_all(target: Any) -> bool:
    """Whether an operator is one of several ranks."""
    if isinstance(target, Region) or target is start or target in _MAIL:
        return True
    return any(row(target) is not None for row in (collective, ring, ring_backward))


def _meet(target: Any, args: list[tuple[Any, ...]], ranks: Sequence[Communicator]) -> Sequence[Any]:
    """The result of an operator of several ranks, for each of them."""
    if isinstance(target, Region):
        return _again(target, args, ranks)
    if target is start:
        names = {own[0] for own in args}
        assert len(names) == 1, f"the ranks start different collectives: {names}"
        outs = _together(COLLECTIVES[names.pop()], [own[1:] for own in args], ranks[0].layout)
        return [Pending(None, partial(_itself, out)) for out in outs]
    if (row := collective(target)) is not None:
        return _together(row, args, ranks[0].layout)
    if (round_trip := ring(target)) is not None:
        return _around(round_trip, args, ranks)
    round_trip = ring_backward(target)
    assert round_trip is not None
    return _back_around(round_trip, args, ranks)


def _itself(x: Tensor) -> Tensor:
    return x


def _together(row: Collective, args: list[tuple[Any, ...]], layout: Layout) -> list[Any]:
    """Run a collective for each of its groups."""
    axis = next(x for x in args[0] if isinstance(x, str))
    results: list[Any] = [None] * len(args)
    for group in layout.view_of(axis).groups(axis):
        members = [row.without_size(args[r]) for r in group]
        tensors = [[x for x in own if isinstance(x, Tensor)] for own in members]
        extra = tuple(x for x in members[0] if not isinstance(x, (Tensor, str)))
        beside = tuple(list(column) for column in list(zip(*tensors, strict=True))[1:])
        outs = _LockStep.apply(row, layout, axis, beside, extra, *(own[0] for own in tensors))
        for r, out in zip(group, outs, strict=True):
            results[r] = out
    return results


class _LockStep(torch.autograd.Function):
    """One collective over one group; its backward is the transpose in the table."""

    @staticmethod
    def forward(
        ctx: Any,
        row: Collective,
        layout: Layout,
        axis: str,
        beside: tuple[list[Tensor], ...],
        extra: tuple[Any, ...],
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.row, ctx.layout, ctx.axis, ctx.beside, ctx.extra = row, layout, axis, beside, extra
        outs = _mean(row, layout, axis, beside, extra, parts)
        if not outs[0].is_floating_point():
            ctx.mark_non_differentiable(*outs)
        return outs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        nothing = (None,) * 5
        if ctx.row.transpose is None:
            return (*nothing, *(None for _ in gradients))
        transpose = COLLECTIVES[ctx.row.transpose]
        extra = ctx.row.transpose_arguments((ctx.axis, *ctx.extra))[1:]
        if ctx.beside:
            extra = ctx.extra
        return (*nothing, *_mean(transpose, ctx.layout, ctx.axis, ctx.beside, extra, gradients))


def _around(row: Ring, args: list[tuple[Any, ...]], ranks: Sequence[Communicator]) -> list[Any]:
    """Run a ring for each of its groups."""
    axis = args[0][-1]
    results: list[Any] = [None] * len(args)
    for group in ranks[0].layout.view_of(axis).groups(axis):
        seats = [Seat.seen_by(ranks[r], axis) for r in group]
        members = [args[r][:-1] for r in group]
        operands = [x for own in members for x in own[: row.operands] if x is not None]
        outs = _RingInLockStep.apply(row, seats, members, *operands)
        each = len(outs) // len(group)
        for i, r in enumerate(group):
            results[r] = row.returned(outs[i * each : (i + 1) * each])
    return results


def _back_around(
    row: Ring, args: list[tuple[Any, ...]], ranks: Sequence[Communicator]
) -> list[Any]:
    """Run the backward of a ring for each of its groups."""
    axis = args[0][-1]
    results: list[Any] = [None] * len(args)
    for group in ranks[0].layout.view_of(axis).groups(axis):
        journeys: list[Journey] = []
        for r in group:
            gradients, found, *given, _ = args[r]
            journeys.append(row.backward(Seat.seen_by(ranks[r], axis), given, found, gradients))
        for r, found in zip(group, drive_together(journeys), strict=True):
            results[r] = row.found(found)
    return results


def _again(
    region: Region, args: list[tuple[Any, ...]], ranks: Sequence[Communicator]
) -> list[tuple[Any, ...]]:
    """Run a region, once more in backward."""
    count = len(args[0])

    def run(*operands: Any) -> tuple[Any, ...]:
        names = [node.name for node in region.graph.find_nodes(op="placeholder")]
        parts = [operands[r * count : (r + 1) * count] for r in range(len(ranks))]
        given = [dict(zip(names, own, strict=True)) for own in parts]
        return tuple(x for own in _run([region.graph] * len(ranks), given, ranks) for x in own)

    outs = recomputed(run, [x for own in args for x in own])
    each = len(outs) // len(ranks)
    return [outs[r * each : (r + 1) * each] for r in range(len(ranks))]


class _RingInLockStep(torch.autograd.Function):
    """The coroutines of all ranks of one group, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, row: Ring, seats: list[Seat], members: list[tuple[Any, ...]], *operands: Tensor
    ) -> tuple[Tensor, ...]:
        found = drive_together(
            [row.forward(seat, *own) for seat, own in zip(seats, members, strict=True)]
        )
        ctx.row, ctx.seats, ctx.members = row, seats, members
        ctx.results = found = [tuple(own) for own in found]
        return tuple(x for own in found for x in own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        each = len(gradients) // len(ctx.seats)
        journeys = [
            ctx.row.backward(seat, own, results, gradients[i * each : (i + 1) * each])
            for i, (seat, own, results) in enumerate(
                zip(ctx.seats, ctx.members, ctx.results, strict=True)
            )
        ]
        found = drive_together(journeys)
        of_operands = [
            gradient
            for own, gradients in zip(ctx.members, found, strict=True)
            for x, gradient in zip(own[: ctx.row.operands], gradients, strict=True)
            if x is not None
        ]
        return None, None, None, *of_operands


def _mean(
    row: Collective,
    layout: Layout,
    axis: str,
    beside: tuple[list[Tensor], ...],
    extra: tuple[Any, ...],
    parts: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """What a collective means, with the sizes of the slices that it makes."""
    length = extra[-1] if extra else 0
    sizes = layout.sizes(length, axis)
    if row.name == "all_to_all":
        sizes = layout.sizes(extra[1], axis)
    outs = row.meaning([x.detach() for x in parts], sizes, *beside, *extra)
    fresh = {id(x) for x in parts}
    return tuple(x.clone() if id(x) in fresh or x._is_view() else x for x in outs)
