"""Operators that compute while their operands travel between the ranks of one axis.

Some operators are split twice over the same ranks: every rank has its own tokens *and* its own part
of a weight, and each token needs all of the weight. Neither side is ever gathered. One of them
travels: a rank works on what it holds while it already sends that on to the next rank. Where a
token needs one row of the weight and no more, it asks that row's owner for it instead.

Such an operator is written once, as a pair of coroutines (forward and backward) that yield
``Start``, ``Exchange`` and ``Wait`` and say nothing of process groups. ``drive`` runs one over a
process group; ``drive_together`` runs those of all ranks of a group in lock step, in one process.
So the simulator runs the very code that real ranks run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import moptrace.kernels.vocab_projection  # noqa: F401  registers the operator of one device
from moptrace import roles
from moptrace.collectives import Communicator
from moptrace.kernels.attention import Sight, Span, add_attention, add_gradients, nothing_seen
from moptrace.kernels.causal_conv1d import convolve, convolve_backward
from moptrace.kernels.embedding_rows import sum_by_id
from moptrace.kernels.linear_cross_entropy import (
    VocabStatistics,
    log_sum_exp,
    merge_statistics,
    vocab_shard_gradients,
    vocab_shard_statistics,
)
from moptrace.placement import Layout, chunk_sizes

__all__ = [
    "RINGS",
    "Exchange",
    "Journey",
    "Ring",
    "Seat",
    "Start",
    "Wait",
    "bytes_sent",
    "drive",
    "drive_together",
    "ring",
    "ring_backward",
    "ring_places",
    "workspace",
]

Tensors: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Start:
    """Begin to send tensors to the next rank, and to receive the previous rank's into buffers.

    Neither may be touched before the ``Wait``.
    """

    send: Tensors
    into: Tensors


@dataclass(frozen=True)
class Exchange:
    """Begin to send some leading rows of a tensor to each rank, and to receive some from each.

    Rank r gets the next ``out[r]`` rows of ``send``; its own come to the next ``back[r]`` of
    ``into``. Neither may be touched before the ``Wait``.
    """

    send: Tensor
    out: tuple[int, ...]
    into: Tensor
    back: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """Wait until a transfer is over: the answer that ``Start`` or ``Exchange`` got."""

    transfer: Any


Journey: TypeAlias = Generator[Start | Exchange | Wait, Any, Any]


@dataclass(frozen=True)
class Seat:
    """The place of a rank on its axis: the ``at``-th of ``ranks``."""

    at: int
    ranks: int
    sizes_of: Callable[[int], Sequence[int]]

    @classmethod
    def of(cls, axis: str) -> Seat:
        """The seat of the active communicator's rank."""
        return cls.seen_by(Communicator.current(), axis)

    @classmethod
    def seen_by(cls, rank: Communicator, axis: str) -> Seat:
        """The seat of one rank."""
        return cls(rank.coordinate(axis), rank.size(axis), lambda n: rank.sizes(n, axis))

    def holder(self, hop: int) -> int:
        """Whose operand is here after so many hops."""
        return (self.at - hop) % self.ranks


# --- running the coroutines -----------------------------------------------------------------------


def drive(journey: Journey, axis: str) -> Any:
    """Run one rank's coroutine over the axis's process group; return its result."""
    here = Communicator.current()
    answer: Any = None
    while True:
        try:
            answer = _done(journey.send(answer), here, axis)
        except StopIteration as end:
            return end.value


def _done(request: Any, here: Communicator, axis: str) -> Any:
    """Do what a coroutine asks for; keeps nothing, so that what has travelled is free."""
    group, at = here.groups[axis], here.coordinate(axis)
    if isinstance(request, Wait):
        return [work.wait() for work in request.transfer]
    if isinstance(request, Exchange):
        sizes = [list(request.back), list(request.out)]
        return [
            dist.all_to_all_single(request.into, request.send, *sizes, group=group, async_op=True)
        ]
    onward, back = (dist.get_global_rank(group, (at + d) % here.size(axis)) for d in (1, -1))
    moves = [dist.P2POp(dist.isend, x, onward, group) for x in request.send if x.numel()]
    moves += [dist.P2POp(dist.irecv, x, back, group) for x in request.into if x.numel()]
    return dist.batch_isend_irecv(moves) if moves else []


def drive_together(journeys: Sequence[Journey]) -> list[Any]:
    """Run the coroutines of all ranks of one axis in lock step; return their results.

    As on real ranks, a buffer has its values only after the wait, and what was sent is read late.
    """
    answers: list[Any] = [None] * len(journeys)
    while True:
        requests: list[Any] = []
        for journey, answer in zip(journeys, answers, strict=True):
            try:
                requests.append(journey.send(answer))
            except StopIteration as end:
                requests.append(end)
        kinds = {type(request) for request in requests}
        if len(kinds) != 1:
            raise RuntimeError("the ranks of a ring took different steps: they would wait for ever")
        if kinds == {StopIteration}:
            return [end.value for end in requests]
        if kinds == {Start}:
            for request in requests:
                _spoil(*request.into)
            answers = [(requests[rank - 1].send, own.into) for rank, own in enumerate(requests)]
            continue
        if kinds == {Exchange}:
            for request in requests:
                _spoil(request.into)
            answers = _exchanged(requests)
            continue
        for request in requests:
            for sent, buffer in zip(*request.transfer, strict=True):
                buffer.copy_(sent)


def _spoil(*buffers: Tensor) -> None:
    for buffer in buffers:
        buffer.fill_(float("nan") if buffer.is_floating_point() else -1)


def _exchanged(requests: Sequence[Exchange]) -> list[tuple[Tensors, Tensors]]:
    """For each rank what the others send to it, and where that goes."""
    sent = [request.send.split(list(request.out)) for request in requests]
    transfers: list[tuple[Tensors, Tensors]] = []
    for rank, request in enumerate(requests):
        if request.back != tuple(other.out[rank] for other in requests):
            raise RuntimeError("the ranks of an exchange disagree about how many rows move")
        arriving = tuple(pieces[rank] for pieces in sent)
        transfers.append((arriving, request.into.split(list(request.back))))
    return transfers


def bytes_sent(journey: Journey, at: int = 0) -> int:
    """The bytes that the ``at``-th rank sends, by running its coroutine alone on fake tensors.

    Requires: no ``Exchange`` of as many rows as values say: ``Ring.costs`` has those bytes.
    """
    total, answer = 0, None
    try:
        while True:
            total += _sent(journey.send(answer), at)
            answer = ()
    except StopIteration:
        return total


def _sent(request: Any, at: int) -> int:
    if isinstance(request, Start):
        return sum(x.numel() * x.element_size() for x in request.send)
    if isinstance(request, Exchange):
        rows = sum(request.out) - request.out[at]
        return rows * request.send[:1].numel() * request.send.element_size()
    return 0


class _Held(TorchDispatchMode):
    """The most bytes that tensors made in it hold at once, but for those of ``given``."""

    def __init__(self, given: Any):
        super().__init__()
        self.most = 0
        known = (x.untyped_storage() for x in pytree.tree_leaves(given) if isinstance(x, Tensor))
        self.known = {StorageWeakRef(storage) for storage in known}
        self.held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = (x for x in pytree.tree_leaves(found) if isinstance(x, Tensor))
        for storage in (x.untyped_storage() for x in made):
            if (ref := StorageWeakRef(storage)) not in self.known:
                self.held[ref] = storage.nbytes()
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired()}
        self.most = max(self.most, sum(self.held.values()))
        return found


def workspace(node: fx.Node, layout: Layout) -> int:
    """The bytes that a ring needs while it runs, beside its operands and results; else 0.

    Found by running the first rank's coroutine alone on fake tensors. What the kernels need that it
    calls is not counted. Where values decide how many rows move, it is what is expected to.
    """
    forward, back = ring(node.target), ring_backward(node.target)
    if (row := forward or back) is None:
        return 0
    values: Any = map_arg(node.args, roles.value)
    *arguments, axis = values
    seat = Seat(0, layout.size(axis), lambda n: layout.sizes(n, axis))
    gradients, results, *given = arguments if back is not None else ((), (), *arguments)
    if row.costs is not None:
        return sum(row.costs(seat, *given)[back is not None])
    held = _Held(arguments)
    with held:
        if back is None:
            bytes_sent(row.forward(seat, *given))
        else:
            bytes_sent(row.backward(seat, tuple(given), tuple(results), tuple(gradients)))
    made = (x for x in pytree.tree_leaves(roles.value(node)) if isinstance(x, Tensor))
    return max(held.most - sum(x.numel() * x.element_size() for x in made), 0)


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """An operator that computes while its operands travel.

    ``whole`` is the operator of one device that it splits. ``forward(seat, *arguments)`` returns
    the results; ``backward(seat, arguments, results, gradients)`` returns the gradients of the
    first ``operands`` arguments, None for one that is None; no other argument has a gradient. Both
    are coroutines. The arguments are those of ``whole``, and then ``lengths`` of the global
    operands: the sizes that are split.
    ``costs(seat, *arguments)`` are the bytes that a rank is expected to send in each exchange,
    forward and backward, for an operator that exchanges rows: how many depends on values.
    """

    name: str
    schema: str
    whole: Any
    operands: int
    lengths: Callable[..., tuple[int, ...]]
    forward: Callable[..., Journey]
    backward: Callable[..., Journey]
    costs: Callable[..., tuple[tuple[int, ...], tuple[int, ...]]] | None = None

    @property
    def op(self) -> Any:
        """The operator as local graphs call it."""
        return getattr(torch.ops.moptrace, self.name).default

    @property
    def backward_op(self) -> Any:
        """The operator as the backward of a step calls it.

        ``(gradients, results, *arguments of op)`` -> the gradients of the operands that there are.
        """
        return getattr(torch.ops.moptrace, f"{self.name}_backward").default

    def returned(self, results: Tensors) -> Any:
        """The results of a coroutine as the operator returns them: alone if there is but one."""
        return results if len(self.whole._schema.returns) > 1 else results[0]

    def found(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of a backward coroutine as the operator returns them."""
        return [x.contiguous() for x in gradients if x is not None]


def ring(target: object) -> Ring | None:
    """The row of the table for a local graph's target, or None for another operator."""
    return _BY_OP.get(target)


def ring_backward(target: object) -> Ring | None:
    """The row of the table of which a graph's target is the backward, or None."""
    return _BY_BACKWARD.get(target)


# --- once around ----------------------------------------------------------------------------------


def around(
    seat: Seat,
    load: Tensors,
    sizes: Sequence[int],
    work: Callable[[Tensors, int], Tensors],
    join: Callable[[Tensors, Tensors], Tensors],
    reach: int | None = None,
) -> Journey:
    """Take every rank's ``load`` around the ring; return what all ranks made of this one's.

    ``work(load, holder)`` is called with the load of every rank, ``sizes[holder]`` long; with a
    ``reach``, on so many ranks after the holder and no others. What it returns travels on with the
    load, is combined with the next rank's by ``join``, and comes home after the last hop. The next
    load is on its way while a rank works on this one.
    """
    last = seat.ranks - 1 if reach is None else reach
    done: Tensors = ()
    moving = None
    for hop in range(last + 1):
        coming, cargo = load, done
        following = None
        if hop < last:
            coming = _buffers(load, sizes[seat.holder(hop + 1)])
            following = yield Start(load, coming)
        done = work(load, seat.holder(hop))
        if moving is not None:
            yield Wait(moving)
            done = join(cargo, done)
        if done and hop < last:
            done = tuple(x.contiguous() for x in done)
            cargo = _buffers(done, sizes[seat.holder(hop + 1)])
            moving, done = (yield Start(done, cargo)), cargo
        if following is not None:
            yield Wait(following)
            load = coming
    if not done or not last:
        return done
    home = _buffers(done, sizes[seat.at])
    yield from hand_over(seat, done, seat.holder(last), home, (seat.at + last) % seat.ranks)
    return home


def hand_over(seat: Seat, send: Tensors, to: int, into: Tensors, giver: int) -> Journey:
    """Give tensors to one rank, and fill buffers with those of the rank that gives to this one."""
    ranks, transfers = range(seat.ranks), list[Any]()
    for x, buffer in zip(send, into, strict=True):
        out = tuple(len(x) * (rank == to) for rank in ranks)
        back = tuple(len(buffer) * (rank == giver) for rank in ranks)
        transfers.append((yield Exchange(x.contiguous(), out, buffer, back)))
    for transfer in transfers:
        yield Wait(transfer)


def _buffers(like: Tensors, length: int) -> Tensors:
    return tuple(x.new_empty(length, *x.shape[1:]) for x in like)


def _added(one: Tensors, other: Tensors) -> Tensors:
    return tuple(a.add_(b) for a, b in zip(one, other, strict=True))


# --- the vocabulary -------------------------------------------------------------------------------
# Every rank has n of the N tokens and v of the V rows of the weight. What is smaller travels: the
# weight's rows where n > v, else the tokens with what is known of them.


@dataclass(frozen=True)
class _Vocabulary:
    """The sizes and options of one projection, on one rank."""

    seat: Seat
    tokens: int
    words: int
    scale: float
    softcap: float | None

    @property
    def weights_travel(self) -> bool:
        return self.tokens > self.words

    def start(self, holder: int) -> int:
        """The first row of a rank's part of the weight."""
        return sum(self.seat.sizes_of(self.words)[:holder])

    def around(
        self,
        of_tokens: Tensors,
        of_words: Tensors,
        work: Callable[[Tensors, Tensors, int], tuple[Tensors, Tensors]],
        join: Callable[[Tensors, Tensors], Tensors],
    ) -> Journey:
        """Bring all tokens and all words together; return what is made of this rank's own.

        ``work(tokens, words, start)`` gives a result for the tokens and one for the words, and
        ``join`` combines two of the tokens'; those of the words are added.
        """
        stays: Tensors = ()

        def on_words(load: Tensors, holder: int) -> Tensors:
            nonlocal stays
            mine, done = work(of_tokens, load, self.start(holder))
            stays = join(stays, mine) if stays else mine
            return done

        def on_tokens(load: Tensors, holder: int) -> Tensors:
            nonlocal stays
            done, mine = work(load, of_words, self.start(self.seat.at))
            stays = _added(stays, mine) if stays else mine
            return done

        if self.weights_travel:
            sizes = self.seat.sizes_of(self.words)
            home = yield from around(self.seat, of_words, sizes, on_words, _added)
            return stays, home
        sizes = self.seat.sizes_of(self.tokens)
        home = yield from around(self.seat, of_tokens, sizes, on_tokens, join)
        return home, stays


def _vocabulary_forward(
    seat: Seat,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    tokens: int,
    words: int,
) -> Journey:
    """Each token's log-sum-exp, target logit and sum of logits over the whole vocabulary."""
    here = _Vocabulary(seat, tokens, words, scale, softcap)

    def work(of_tokens: Tensors, of_words: Tensors, start: int) -> tuple[Tensors, Tensors]:
        rows, labels = of_tokens
        options = {"start": start, "scale": scale, "softcap": softcap}
        return vocab_shard_statistics(rows, of_words[0], labels, *of_words[1:], **options), ()

    def join(one: Tensors, other: Tensors) -> Tensors:
        return merge_statistics(VocabStatistics(*one), VocabStatistics(*other))

    found, _ = yield from here.around((hidden, targets), _given(weight, bias), work, join)
    statistics = VocabStatistics(*found)
    return log_sum_exp(statistics), statistics.target_logit, statistics.sum_logits


def _vocabulary_backward(
    seat: Seat,
    arguments: tuple[Any, ...],
    results: Tensors,
    gradients: Sequence[Tensor | None],
) -> Journey:
    """The gradients of hidden, weight and bias from those of the three results."""
    hidden, weight, bias, targets, scale, softcap, tokens, words = arguments
    here = _Vocabulary(seat, tokens, words, scale, softcap)
    shift = results[0]
    of_results = [torch.zeros_like(shift) if g is None else g.contiguous() for g in gradients]

    def work(of_tokens: Tensors, of_words: Tensors, start: int) -> tuple[Tensors, Tensors]:
        rows, labels, lse, of_exp, of_target, of_sum = of_tokens
        of_rows, *of_weights = vocab_shard_gradients(
            rows,
            of_words[0],
            labels,
            *of_words[1:],
            shift=lse,
            of_exp=of_exp,
            of_target=of_target,
            of_sum=of_sum,
            start=start,
            scale=scale,
            softcap=softcap,
            dtype=shift.dtype,  # sums over ranks are rounded once, at their end
        )
        return (of_rows,), tuple(of_weights[: len(of_words)])

    of_tokens = (hidden, targets, shift, *of_results)
    (of_hidden,), of_words = yield from here.around(of_tokens, _given(weight, bias), work, _added)
    of_weight, *of_bias = (x.to(weight.dtype) for x in of_words)
    return of_hidden.to(hidden.dtype), of_weight, of_bias[0] if of_bias else None


def _given(*tensors: Tensor | None) -> Tensors:
    return tuple(x.contiguous() for x in tensors if x is not None)


# --- attention ------------------------------------------------------------------------------------
# Queries stay, keys and values travel, as [T, B, h, d]; their gradients come home with them. Where
# attention is causal the last rank would have most to do and the first the least, and all would
# wait for the last. There, ranks first exchange the second halves of their tokens, the first rank
# with the last and so on (zig-zag), and bring the results back.


Spans: TypeAlias = tuple[Span, ...]


@dataclass(frozen=True)
class _Places:
    """The tokens that each rank has while it attends, in the order in which it has them.

    ``are_exchanged``: whether these are not those that it has outside attention. ``reach``: how far
    on the ring the last rank is that sees some of a rank's keys.
    """

    spans: tuple[Spans, ...]
    are_exchanged: bool
    reach: int


@cache
def _places(sizes: Sequence[int], window: Sight, fixed: bool) -> _Places:
    """Where attention in a window happens; halves are exchanged where that saves a tenth.

    ``fixed`` tokens stay where they are: a mask lies with its queries.
    """
    spans: tuple[Spans, ...] = tuple(
        (Span(stop - n, stop),) for n, stop in zip(sizes, accumulate(sizes), strict=True)
    )
    if not fixed and len(set(sizes)) == 1:
        halves = [_halves(span) for (span,) in spans]
        mirrored = tuple((a, b) for (a, _), (_, b) in zip(halves, halves[::-1], strict=True))
        if 1.1 * _most_work(mirrored, window) < _most_work(spans, window):
            return _Places(mirrored, True, _reach(mirrored, window))
    return _Places(spans, False, _reach(spans, window))


def ring_places(tokens: int, ranks: int, sight: Sight, fixed: bool) -> tuple[int, int]:
    """To how many other ranks keys travel, and how many of a rank's tokens change places before.

    >>> ring_places(16, 4, Sight(right=0), fixed=False)
    (3, 2)
    """
    sizes = tuple(chunk_sizes(tokens, (ranks,)))
    places = _places(sizes, sight, fixed)
    kept = places.spans[0][0].length if places.are_exchanged else sizes[0]
    return places.reach, sizes[0] - kept


def _halves(span: Span) -> tuple[Span, Span]:
    """The first is the longer one."""
    middle = span.start + -(-span.length // 2)
    return Span(span.start, middle), Span(middle, span.stop)


def _most_work(spans: Sequence[Spans], window: Sight) -> int:
    """The scores of the busiest rank, if each query of a span has as many as its middle one."""
    every = Span(0, max(span.stop for own in spans for span in own))

    def scores(span: Span) -> int:
        middle = (span.start + span.stop) // 2
        return span.length * window.keys_of(Span(middle, middle + 1), every).length

    return max(sum(map(scores, own)) for own in spans)


def _reach(spans: Sequence[Spans], window: Sight) -> int:
    hops = [
        (rank - holder) % len(spans)
        for rank, own in enumerate(spans)
        for holder, others in enumerate(spans)
        if any(window.keys_of(queries, keys).length for queries in own for keys in others)
    ]
    return max(hops, default=0)


@dataclass(frozen=True)
class _Attention:
    """One rank's part of attention: what its queries see, and the sizes of all ranks' parts."""

    seat: Seat
    sizes: tuple[int, ...]
    sight: Sight
    scale: float

    @classmethod
    def of(cls, seat: Seat, tokens: int, sight: Sight, scale: float) -> _Attention:
        sizes = tuple(seat.sizes_of(tokens))
        return cls(seat, sizes, replace(sight, first=sum(sizes[: seat.at])), scale)

    @property
    def places(self) -> _Places:
        mask, window = self.sight.mask, Sight(self.sight.left, self.sight.right)
        return _places(self.sizes, window, mask is not None and mask.shape[2] > 1)

    def meetings(self, holder: int) -> Iterator[tuple[Span, slice, Span, slice]]:
        """Queries of this rank with keys of ``holder``, and where these are held."""
        spans = self.places.spans
        for queries, rows in _held(spans[self.seat.at]):
            for keys, columns in _held(spans[holder]):
                yield queries, rows, keys, columns

    def exchanged(self, *tensors: Tensor) -> Journey:
        """Tensors ``[T, ...]`` of this rank's tokens as those that it attends with, or back."""
        if not self.places.are_exchanged:
            return tensors
        kept = self.places.spans[self.seat.at][0].length
        mirror = self.seat.ranks - 1 - self.seat.at
        found = tuple(torch.empty_like(x) for x in tensors)
        for x, new in zip(tensors, found, strict=True):
            new[:kept] = x[:kept]
        moved = tuple(x[kept:] for x in tensors)
        yield from hand_over(self.seat, moved, mirror, tuple(x[kept:] for x in found), mirror)
        return found


def _held(spans: Spans) -> Iterator[tuple[Span, slice]]:
    """Each of the spans and where it is held, one after the other."""
    start = 0
    for span in spans:
        yield span, slice(start, start + span.length)
        start += span.length


def _attention_forward(
    seat: Seat,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    tokens: int,
) -> Journey:
    here = _Attention.of(seat, tokens, Sight(left, right, mask, documents), scale)
    query, *load = yield from here.exchanged(*_tokens_first(query, key, value))
    query = _heads_first(query)
    total = nothing_seen(query, value.shape[-1])

    def work(load: Tensors, holder: int) -> Tensors:
        for queries, rows, keys, columns in here.meetings(holder):
            out, lse = (x[:, :, rows] for x in total)
            key, value = (_heads_first(x)[:, :, columns] for x in load)
            own = query[:, :, rows], key, value
            add_attention((out, lse), *own, queries, keys, here.sight, scale)
        return ()

    yield from around(seat, tuple(load), here.sizes, work, _added, here.places.reach)
    out, lse = yield from here.exchanged(*_tokens_first(total[0].to(query.dtype), total[1]))
    return _heads_first(out), _heads_first(lse)


def _attention_backward(
    seat: Seat,
    arguments: tuple[Any, ...],
    results: Tensors,
    gradients: Sequence[Tensor | None],
) -> Journey:
    query, key, value, mask, documents, left, right, scale, tokens = arguments
    here = _Attention.of(seat, tokens, Sight(left, right, mask, documents), scale)
    gradient = torch.zeros_like(results[0]) if gradients[0] is None else gradients[0]
    moved = yield from here.exchanged(*_tokens_first(key, value, gradient, query, *results))
    load, beside = moved[:2], tuple(_heads_first(x) for x in moved[2:])
    of_query = torch.zeros_like(beside[1], dtype=results[1].dtype)

    def work(load: Tensors, holder: int) -> Tensors:
        of_load = tuple(torch.zeros_like(x, dtype=of_query.dtype) for x in load)
        for queries, rows, keys, columns in here.meetings(holder):
            key, value, of_key, of_value = (
                _heads_first(x)[:, :, columns] for x in (*load, *of_load)
            )
            upstream, own, out, lse = (x[:, :, rows] for x in beside)
            given = upstream, own, key, value, out, lse, queries, keys, here.sight, scale
            add_gradients((of_query[:, :, rows], of_key, of_value), *given)
        return of_load

    found = yield from around(seat, load, here.sizes, work, _added, here.places.reach)
    home = [x.to(query.dtype) for x in (*_tokens_first(of_query), *found)]
    of_query, of_key, of_value = map(_heads_first, (yield from here.exchanged(*home)))
    return of_query, of_key, of_value


def _tokens_first(*tensors: Tensor) -> Tensors:
    return tuple(x.movedim(2, 0).contiguous() for x in tensors)


def _heads_first(x: Tensor) -> Tensor:
    return x.movedim(0, 2)


# --- convolutions over tokens ---------------------------------------------------------------------
# A kernel reaches back to a few tokens of the rank before; their gradients go back there.


def _convolution_forward(
    seat: Seat,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    groups: int,
    tokens: int,
) -> Journey:
    before = yield from _tokens_before(seat, x, (weight.shape[-1] - 1) * dilation)
    return (convolve(before, x, weight, bias, dilation, groups),)


def _convolution_backward(
    seat: Seat,
    arguments: tuple[Any, ...],
    results: Tensors,
    gradients: Sequence[Tensor | None],
) -> Journey:
    x, weight, bias, dilation, groups, _ = arguments
    before = yield from _tokens_before(seat, x, (weight.shape[-1] - 1) * dilation)
    assert gradients[0] is not None, "the only result has a gradient"
    of_before, of_x, of_weight, of_bias = convolve_backward(
        gradients[0], before, x, weight, bias, dilation, groups
    )
    own = of_before.movedim(2, 0)[: 0 if seat.at == 0 else None]
    of_x, reach = of_x.clone(), before.shape[-1]
    theirs = own.new_empty(0 if seat.at + 1 == seat.ranks else reach, *own.shape[1:])
    previous, following = ((seat.at + d) % seat.ranks for d in (-1, 1))
    yield from hand_over(seat, (own,), previous, (theirs,), following)
    of_x[..., x.shape[-1] - len(theirs) :] += theirs.movedim(0, 2)
    return of_x, of_weight, of_bias


def _tokens_before(seat: Seat, x: Tensor, reach: int) -> Journey:
    """The last tokens [B, C, reach] of the rank before; zeros before the first."""
    last = x[..., x.shape[-1] - reach :].movedim(2, 0)
    before = torch.zeros_like(last, memory_format=torch.contiguous_format)
    send = last[: 0 if seat.at + 1 == seat.ranks else None].contiguous()
    into = before[: 0 if seat.at == 0 else None]
    yield Wait((yield Start((send,), (into,))))
    return before.movedim(0, 2)


# --- the embedding --------------------------------------------------------------------------------
# Every rank has some of the ids and v of the V rows of the weight. It asks for each row that it
# needs once, and gets it from the rank that has it; gradients go the same way back. A rank learns
# from the others how many rows they want, so the number of ids may differ as it likes.


@dataclass(frozen=True)
class _Requests:
    """What a rank asks of every rank, and what every rank asks of it.

    ``place[i]`` is where the i-th id is among the distinct ids that are asked for, in their order;
    ``asked`` are the rows, of this rank's own, that the others want.
    """

    place: Tensor
    distinct: int
    mine: tuple[int, ...]
    theirs: tuple[int, ...]
    asked: Tensor


def _exchange(x: Tensor, out: tuple[int, ...], back: tuple[int, ...]) -> Journey:
    """Rows change ranks; return those that came, by rank."""
    into = x.new_empty(sum(back), *x.shape[1:])
    transfer = yield Exchange(x.contiguous(), out, into, back)
    yield Wait(transfer)
    return into


def _requests(seat: Seat, ids: Tensor, words: int) -> Journey:
    """Ask every rank for the rows that it has of this rank's ids.

    An id that no rank has is an IndexError on every rank: the one that found it says so in place
    of its counts, so that no other waits for rows that never come.
    """
    bounds = list(accumulate(seat.sizes_of(words), initial=0))
    distinct, place = ids.flatten().unique(return_inverse=True)  # sorted, so by owner too
    at = torch.searchsorted(distinct, distinct.new_tensor(bounds)).tolist()
    unknown = at[0] > 0 or at[-1] < len(distinct)
    mine = tuple(end - start for start, end in pairwise(at))
    once = (1,) * seat.ranks
    said = torch.tensor([-1] * seat.ranks if unknown else mine, device=ids.device)
    heard = tuple((yield from _exchange(said, once, once)).tolist())
    if unknown:
        wrong = int(distinct[0] if at[0] else distinct[-1])
        raise IndexError(f"id {wrong} has no row: the embedding weight has {words}, from 0")
    if min(heard) < 0:
        rank = heard.index(-1)
        raise IndexError(f"rank {rank} has an id without a row: the embedding weight has {words}")
    asked = yield from _exchange(distinct, mine, heard)
    return _Requests(place.flatten(), len(distinct), mine, heard, asked - bounds[seat.at])


def _embedding_forward(
    seat: Seat, weight: Tensor, ids: Tensor, padding_idx: int, words: int
) -> Journey:
    """The row of each id, from the rank that has it."""
    here = yield from _requests(seat, ids, words)
    rows = yield from _exchange(weight[here.asked], here.theirs, here.mine)
    return (rows[here.place].view(*ids.shape, weight.shape[1]),)


def _embedding_backward(
    seat: Seat,
    arguments: tuple[Any, ...],
    results: Tensors,
    gradients: Sequence[Tensor | None],
) -> Journey:
    """The gradient of the rank's own rows, in which every rank's gradients of these are added.

    The ids are asked for again, which moves little beside their rows and keeps nothing until then.
    """
    weight, ids, padding_idx, words = arguments
    gradient = gradients[0] if gradients[0] is not None else torch.zeros_like(results[0])
    here = yield from _requests(seat, ids, words)
    sums = sum_by_id(gradient.reshape(ids.numel(), weight.shape[1]), here.place, here.distinct)
    theirs = yield from _exchange(sums, here.mine, here.theirs)
    start = sum(seat.sizes_of(words)[: seat.at])
    own = padding_idx - start if 0 <= padding_idx - start < len(weight) else -1
    return (sum_by_id(theirs, here.asked, len(weight), own).to(weight.dtype),)


def _embedding_costs(
    seat: Seat, weight: Tensor, ids: Tensor, padding_idx: int, words: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Counts, ids and rows, each way, if every id is as likely: (P-1)/P of the distinct ones."""
    distinct = words * (1 - (1 - 1 / words) ** ids.numel())
    elsewhere = distinct * (seat.ranks - 1) / seat.ranks
    wide = torch.promote_types(weight.dtype, torch.float32)

    def of(dtype: torch.dtype) -> tuple[int, ...]:
        row = weight.shape[1] * dtype.itemsize
        counts = (seat.ranks - 1) * torch.int64.itemsize
        return counts, round(elsewhere * ids.element_size()), round(elsewhere * row)

    return of(weight.dtype), of(wide)


# --- registration ---------------------------------------------------------------------------------

_RINGS = (
    Ring(
        "ring_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? documents, int? left, "
        "int? right, float scale, int tokens, str axis) -> (Tensor, Tensor)",
        torch.ops.moptrace.attention.default,
        3,
        lambda query, *_: (query.shape[2],),
        _attention_forward,
        _attention_backward,
    ),
    Ring(
        "ring_causal_conv1d",
        "(Tensor x, Tensor weight, Tensor? bias, int dilation, int groups, int tokens, str axis) "
        "-> Tensor",
        torch.ops.moptrace.causal_conv1d.default,
        3,
        lambda x, *_: (x.shape[2],),
        _convolution_forward,
        _convolution_backward,
    ),
    Ring(
        "ring_vocab_projection",
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, float? softcap, "
        "int tokens, int words, str axis) -> (Tensor, Tensor, Tensor)",
        torch.ops.moptrace.vocab_projection.default,
        3,
        lambda hidden, weight, *_: (hidden.shape[0], weight.shape[0]),
        _vocabulary_forward,
        _vocabulary_backward,
    ),
    Ring(
        "ring_embedding_rows",
        "(Tensor weight, Tensor ids, int padding_idx, int words, str axis) -> Tensor",
        torch.ops.moptrace.embedding_rows.default,
        1,
        lambda weight, *_: (weight.shape[0],),
        _embedding_forward,
        _embedding_backward,
        _embedding_costs,
    ),
)
RINGS: dict[Any, Ring] = {row.whole: row for row in _RINGS}
_library = torch.library.Library("moptrace", "FRAGMENT")


def _register(row: Ring) -> None:
    _library.define(row.name + row.schema)
    inputs = row.schema[1:].split(") -> ")[0]
    _library.define(
        f"{row.name}_backward(Tensor?[] gradients, Tensor[] results, {inputs}) -> Tensor[]"
    )

    def run(*arguments: Any) -> Any:
        *given, axis = arguments
        return row.returned(drive(row.forward(Seat.of(axis), *given), axis))

    def shape(*arguments: Any) -> Any:
        return row.whole(*arguments[: len(row.whole._schema.arguments)])

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor | Tensors) -> None:
        results = (output,) if isinstance(output, Tensor) else output
        ctx.communicator = Communicator.current()
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *results)
        ctx.rest = [x for x in inputs if not isinstance(x, Tensor)]

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        count = sum(ctx.is_tensor)
        tensors, rest = iter(ctx.saved_tensors[:count]), iter(ctx.rest)
        *given, axis = [next(tensors) if is_tensor else next(rest) for is_tensor in ctx.is_tensor]
        with ctx.communicator:
            results = list(ctx.saved_tensors[count:])
            found = iter(row.backward_op(list(gradients), results, *given, axis))
        of_operands = [None if x is None else next(found) for x in given[: row.operands]]
        return *of_operands, *[None] * (len(ctx.is_tensor) - row.operands)

    def run_backward(gradients: Sequence[Tensor | None], results: Any, *arguments: Any) -> Any:
        *given, axis = arguments
        journey = row.backward(Seat.of(axis), tuple(given), tuple(results), tuple(gradients))
        return row.found(drive(journey, axis))

    def shape_backward(gradients: Any, results: Any, *arguments: Any) -> list[Tensor]:
        return [torch.empty_like(x) for x in arguments[: row.operands] if x is not None]

    _library.impl(row.name, run, "CompositeExplicitAutograd")
    _library.impl(f"{row.name}_backward", run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moptrace::{row.name}", shape, lib=_library)
    torch.library.register_fake(f"moptrace::{row.name}_backward", shape_backward, lib=_library)
    torch.library.register_autograd(
        f"moptrace::{row.name}", backward, setup_context=remember, lib=_library
    )


for _row in _RINGS:
    _register(_row)

_BY_OP: dict[object, Ring] = {row.op: row for row in _RINGS}
_BY_BACKWARD: dict[object, Ring] = {row.backward_op: row for row in _RINGS}
