"""Operators that travel around a ring: the same result as one device, whichever side travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gloo import Ranks
from moptrace import Layout, rings
from moptrace.collectives import Communicator
from moptrace.kernels import attention as attention_kernel
from moptrace.kernels.embedding_rows import embedding_rows
from moptrace.kernels.vocab_projection import vocab_projection
from moptrace.rings import RINGS, Exchange, Seat, Start, Wait, bytes_sent, drive_together

WHOLE = torch.ops.moptrace.vocab_projection.default
OPTIONS = (0.5, 3.0)  # scale and soft cap


def operands(tokens: int, words: int, bias: bool, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    targets = torch.randint(-1, words, (tokens,), generator=generator)
    return [draw(tokens, 6), draw(words, 6), draw(words) if bias else None, targets]


def scored(results: tuple[Tensor, ...], start: int = 0) -> Tensor:
    """A sum in which every result of every token counts differently."""
    lse, chosen, total = results
    place = torch.arange(start, start + len(lse), dtype=torch.float64)
    return (lse * (place + 1).sin() + chosen * (place + 2).cos() + total.tanh() * place).sum()


def gradients(tensors: list[Any]) -> list[Tensor]:
    return [x.grad for x in tensors if isinstance(x, Tensor) and x.is_floating_point()]


def of_one_device(given: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    hidden, weight, bias, targets = given
    scale, softcap = OPTIONS
    results = vocab_projection(hidden, weight, targets, bias, scale=scale, softcap=softcap)
    scored(results).backward()
    return [x.detach() for x in results], gradients(given)


def parts(given: list[Any], ranks: int) -> list[list[Any]]:
    """Each rank's tokens and words."""
    layout = Layout.of(ranks)

    def cut(x: Tensor | None) -> list[Any]:
        if x is None:
            return [None] * ranks
        pieces = x.detach().split(list(layout.sizes(len(x), "dp")))
        return [piece.clone().requires_grad_(x.requires_grad) for piece in pieces]

    return [list(own) for own in zip(*map(cut, given), strict=True)]


def compare(have: list[list[Tensor]], want: list[Tensor]) -> None:
    for pieces, whole in zip(zip(*have, strict=True), want, strict=True):
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-12, atol=1e-12)


@given(
    ranks=st.integers(1, 5),
    tokens=st.integers(0, 17),
    words=st.integers(1, 17),
    bias=st.booleans(),
)
def test_ranks_in_lock_step_compute_what_one_device_does(
    ranks: int, tokens: int, words: int, bias: bool
) -> None:
    given = operands(tokens, words, bias)
    want, want_gradients = of_one_device(given)
    row, layout = RINGS[WHOLE], Layout.of(ranks)
    seats = [Seat.seen_by(Communicator(layout, rank), "dp") for rank in range(ranks)]
    owns = [(*own, *OPTIONS, tokens, words) for own in parts(given, ranks)]
    with torch.no_grad():
        pairs = list(zip(seats, owns, strict=True))
        results = drive_together([row.forward(seat, *own) for seat, own in pairs])
        compare(results, want)
        starts = [sum(layout.sizes(tokens, "dp")[:rank]) for rank in range(ranks)]
        upstream: list[list[Tensor]] = []
        for own, start in zip(results, starts, strict=True):
            leaves = [x.clone().requires_grad_() for x in own]
            with torch.enable_grad():
                upstream.append(list(torch.autograd.grad(scored(tuple(leaves), start), leaves)))
        found = drive_together(
            [
                row.backward(seat, own, kept, gradient)
                for (seat, own), kept, gradient in zip(pairs, results, upstream, strict=True)
            ]
        )
    compare([[g for g in own if g is not None] for own in found], want_gradients)


def on_a_rank(ranks: int, tokens: int, words: int) -> tuple[list[Tensor], list[Tensor]]:
    """What one real rank gets, on its own part."""
    import torch.distributed as dist

    layout = Layout.of(ranks)
    given = parts(operands(tokens, words, bias=True), ranks)[dist.get_rank()]
    with Communicator.connect(layout, range(ranks)):
        results = RINGS[WHOLE].op(*given, *OPTIONS, tokens, words, "dp")
        start = sum(layout.sizes(tokens, "dp")[: dist.get_rank()])
        scored(results, start).backward()
    return [x.detach() for x in results], gradients(given)


@pytest.mark.parametrize(("tokens", "words"), [(13, 7), (5, 22), (3, 2)])
def test_real_ranks_compute_what_one_device_does(
    ranks: Callable[[int], Ranks], tokens: int, words: int
) -> None:
    want, want_gradients = of_one_device(operands(tokens, words, bias=True))
    answers = ranks(4)(on_a_rank, 4, tokens, words)
    compare([results for results, _ in answers], want)
    compare([found for _, found in answers], want_gradients)


@pytest.mark.parametrize(("tokens", "words"), [(40, 8), (8, 40)])
def test_the_smaller_side_travels(tokens: int, words: int) -> None:
    seat = Seat.seen_by(Communicator(Layout.of(4), 0), "dp")
    hidden, weight, _, targets = parts(operands(tokens, words, bias=False), 4)[0]
    given = (hidden, weight, None, targets, *OPTIONS, tokens, words)
    with torch.no_grad():
        sent = bytes_sent(RINGS[WHOLE].forward(seat, *given))
    float_, of_each = 8, min(tokens, words) // 4
    alone = of_each * 6 * float_ * 3  # three hops of a matrix
    beside = of_each * (3 * float_ + 4 * 4 * float_) if tokens < words else 0
    assert sent == alone + beside


def test_a_ring_out_of_step_is_an_error_and_not_a_hang() -> None:
    def eager() -> Any:
        yield Start((), ())

    def late() -> Any:
        yield Wait(((), ()))

    with pytest.raises(RuntimeError, match="different steps"):
        drive_together([eager(), late()])


def test_what_is_sent_must_not_change_before_the_wait() -> None:
    def careless(value: float) -> Any:
        own, buffer = torch.tensor([value]), torch.empty(1)
        transfer = yield Start((own,), (buffer,))
        own.add_(1.0)
        assert buffer.isnan().all()  # nothing has arrived yet
        yield Wait(transfer)
        return buffer.item()

    assert drive_together([careless(1.0), careless(5.0)]) == [6.0, 2.0]


# --- exchanges, and the embedding that is looked up by them ---------------------------------------

ROWS = torch.ops.moptrace.embedding_rows.default


def table(words: int, ids: list[int]) -> tuple[Tensor, Tensor, int]:
    """A weight, ids of which the second half repeats the first, and the padding."""
    generator = torch.Generator().manual_seed(words + len(ids))
    weight = torch.randn(words, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    drawn = torch.randint(words, (sum(ids),), generator=generator)
    drawn[sum(ids) // 2 :] = drawn[: -(-sum(ids) // 2)].clone()
    return weight, drawn, words // 2


def weighted(rows: Tensor, start: int = 0) -> Tensor:
    place = torch.arange(3 * start, 3 * (start + len(rows)), dtype=torch.float64)
    return (rows.flatten() * (place + 1).sin()).sum()


def looked_up(words: int, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The rows and the weight's gradient on one device."""
    weight, drawn, padding = table(words, ids)
    rows = embedding_rows(weight, drawn, padding)
    weighted(rows).backward()
    eager = weight.detach().clone().requires_grad_()
    weighted(torch.nn.functional.embedding(drawn, eager, padding)).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, eager.grad, rtol=1e-12, atol=1e-12)
    return rows.detach(), weight.grad


def own_rows(words: int, ids: list[int], rank: int) -> tuple[Tensor, Tensor, int]:
    """What one of the ranks has: its words, and as many ids as the list says."""
    weight, drawn, padding = table(words, ids)
    words_of = Layout.of(len(ids)).sizes(words, "dp")
    mine = weight.detach().split(list(words_of))[rank].clone().requires_grad_()
    return mine, drawn.split(ids)[rank], padding


@given(words=st.integers(1, 17), ids=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_rows_are_fetched_and_gradients_sent_back(words: int, ids: list[int]) -> None:
    want, want_gradient = looked_up(words, ids)
    row, layout = RINGS[ROWS], Layout.of(len(ids))
    seats = [Seat.seen_by(Communicator(layout, rank), "dp") for rank in range(len(ids))]
    owns = [(*own_rows(words, ids, rank), words) for rank in range(len(ids))]
    with torch.no_grad():
        results = drive_together([row.forward(s, *own) for s, own in zip(seats, owns, strict=True)])
        compare(results, [want])
        place = (torch.arange(want.numel(), dtype=torch.float64) + 1).sin().view_as(want)
        found = drive_together(
            [
                row.backward(seat, own, kept, (upstream,))
                for seat, own, kept, upstream in zip(
                    seats, owns, results, place.split(ids), strict=True
                )
            ]
        )
    compare(found, [want_gradient])


def looked_up_on_a_rank(words: int, ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    import torch.distributed as dist

    layout, rank = Layout.of(len(ids)), dist.get_rank()
    weight, own, padding = own_rows(words, ids, rank)
    with Communicator.connect(layout, range(len(ids))):
        rows = RINGS[ROWS].op(weight, own, padding, words, "dp")
        weighted(rows, sum(ids[:rank])).backward()
    assert weight.grad is not None
    return [rows.detach()], [weight.grad]


@pytest.mark.parametrize(
    ("words", "ids"), [(13, [5, 5, 5, 5]), (5, [9, 0, 2, 7]), (2, [0, 0, 1, 0])]
)
def test_real_ranks_fetch_the_rows_of_one_device(
    ranks: Callable[[int], Ranks], words: int, ids: list[int]
) -> None:
    want, want_gradient = looked_up(words, ids)
    answers = ranks(4)(looked_up_on_a_rank, words, ids)
    compare([rows for rows, _ in answers], [want])
    compare([gradients for _, gradients in answers], [want_gradient])


def test_a_row_is_sent_once_to_a_rank_however_often_its_id_comes() -> None:
    layout, row = Layout.of(2), RINGS[ROWS]
    requests: list[Exchange] = []

    def watched(journey: Any) -> Any:
        answer = None
        while True:
            try:
                request = journey.send(answer)
            except StopIteration as end:
                return end.value
            requests.extend([request] if isinstance(request, Exchange) else [])
            answer = yield request

    seats = [Seat.seen_by(Communicator(layout, rank), "dp") for rank in range(2)]
    owns = [(torch.zeros(3, 4), torch.tensor([5, 5, 5, 0, 5]), -1, 6) for _ in seats]
    both = zip(seats, owns, strict=True)
    drive_together([watched(row.forward(seat, *own)) for seat, own in both])
    assert [request.out for request in requests] == [(1, 1)] * 6  # counts, ids, rows; both ranks


def test_gradients_of_all_ranks_are_added_in_float32_and_rounded_once() -> None:
    layout, row = Layout.of(3), RINGS[ROWS]
    seats = [Seat.seen_by(Communicator(layout, rank), "dp") for rank in range(3)]
    narrow = {"dtype": torch.bfloat16}
    ids = torch.ones(300, dtype=torch.int64)  # a sum of ones in bfloat16 ends at 256
    journeys = [
        row.backward(
            seat, (torch.zeros(1, 2, **narrow), ids, -1, 3), (), (torch.ones(300, 2, **narrow),)
        )
        for seat in seats
    ]
    found = [of_weight.tolist() for (of_weight,) in drive_together(journeys)]
    assert found == [[[0, 0]], [[900, 900]], [[0, 0]]]


def test_ranks_that_disagree_about_the_rows_are_an_error_and_not_a_hang() -> None:
    def sends(one: int, other: int) -> Any:
        yield Exchange(torch.zeros(one + other), (one, other), torch.zeros(2), (1, 1))

    with pytest.raises(RuntimeError, match="disagree about how many rows"):
        drive_together([sends(1, 1), sends(2, 1)])


# --- attention ------------------------------------------------------------------------------------

ATTENTION = torch.ops.moptrace.attention.default
WINDOWS = ((None, None), (None, 0), (2, 0), (0, 0), (1, 1), (6, 0))


@dataclass(frozen=True)
class Attends:
    """Attention of a window, on sequences of one length, perhaps with documents and a mask."""

    tokens: int
    window: tuple[int | None, int | None] = (None, 0)
    documents: bool = False
    mask: str = ""  # "rows" for each query, or "padding" for all alike
    groups: int = 2

    def operands(self) -> list[Any]:
        """Query, key, value, mask, documents, and then the options."""
        generator = torch.Generator().manual_seed(self.tokens)

        def draw(heads: int) -> Tensor:
            shape = (2, heads, self.tokens, 3)
            return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

        shape = {"rows": (2, 1, self.tokens, self.tokens), "padding": (2, 1, 1, self.tokens)}
        mask = None
        if self.mask:
            mask = torch.rand(shape[self.mask], generator=generator) > 0.3
        starts = torch.rand(2, self.tokens, generator=generator) > 0.7
        documents = starts.cumsum(1) if self.documents else None
        return [draw(4), draw(self.groups), draw(self.groups), mask, documents, *self.window, 0.4]

    def one_device(self) -> tuple[list[Tensor], list[Tensor]]:
        given = self.operands()
        results = ATTENTION(*given)
        (results[0] * self.upstream()).sum().backward()
        return [x.detach() for x in results], [x.grad for x in given[:3]]

    def upstream(self) -> Tensor:
        return torch.arange(24 * self.tokens, dtype=torch.float64).sin().view(2, 4, -1, 3)

    def parts(self, ranks: int) -> list[list[Any]]:
        """The operands of each rank; a mask lies with its queries."""
        sizes = list(Layout.of(ranks).sizes(self.tokens, "dp"))
        *tensors, mask, documents, left, right, scale = self.operands()
        cut = [x.detach().split(sizes, 2) for x in tensors]
        masks = mask.split(sizes, 2) if self.mask == "rows" else [mask] * ranks
        beside = (documents, left, right, scale, self.tokens)
        return [[*own, m, *beside] for *own, m in zip(*cut, masks, strict=True)]


def seats(ranks: int) -> list[Seat]:
    return [Seat.seen_by(Communicator(Layout.of(ranks), rank), "dp") for rank in range(ranks)]


def joined(have: list[tuple[Tensor | None, ...]], want: list[Tensor]) -> None:
    """The ranks' tokens, one after the other, are those of one device."""
    for pieces, whole in zip(zip(*have, strict=True), want, strict=False):
        torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=1e-12, atol=1e-12)  # type: ignore


@given(
    ranks=st.integers(1, 5),
    case=st.builds(
        Attends,
        tokens=st.integers(1, 21),
        window=st.sampled_from(WINDOWS),
        documents=st.booleans(),
        mask=st.sampled_from(("", "rows", "padding")),
        groups=st.sampled_from((1, 2, 4)),
    ),
)
def test_attention_around_a_ring_is_that_of_one_device(ranks: int, case: Attends) -> None:
    want, want_gradients = case.one_device()
    row, owns = RINGS[ATTENTION], case.parts(ranks)
    upstream = case.upstream().split(list(Layout.of(ranks).sizes(case.tokens, "dp")), 2)
    with torch.no_grad():
        pairs = list(zip(seats(ranks), owns, strict=True))
        results = drive_together([row.forward(seat, *own) for seat, own in pairs])
        joined(results, want)
        every = zip(pairs, results, upstream, strict=True)
        found = drive_together(
            [row.backward(seat, own, kept, (up, None)) for (seat, own), kept, up in every]
        )
    joined([own[:3] for own in found], want_gradients)


def attends_on_a_rank(case: Attends) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    import torch.distributed as dist

    ranks, rank = dist.get_world_size(), dist.get_rank()
    sizes = list(Layout.of(ranks).sizes(case.tokens, "dp"))
    *operands, tokens = case.parts(ranks)[rank]
    leaves = [x.contiguous().requires_grad_() for x in operands[:3]]
    with Communicator.connect(Layout.of(ranks), range(ranks)):
        out, lse = RINGS[ATTENTION].op(*leaves, *operands[3:], tokens, "dp")
        (out * case.upstream().split(sizes, 2)[rank]).sum().backward()
    return (out.detach(), lse), tuple(x.grad for x in leaves if x.grad is not None)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        Attends(16),
        Attends(13),
        Attends(16, documents=True),
        Attends(16, (3, 0), mask="padding"),
        Attends(16, (None, None), mask="rows"),
    ],
    ids=str,
)
def test_real_ranks_attend_as_one_device(
    ranks: Callable[[int], Ranks], world: int, case: Attends
) -> None:
    want, want_gradients = case.one_device()
    answers = ranks(world)(attends_on_a_rank, case)
    joined([results for results, _ in answers], want)
    joined([gradients for _, gradients in answers], want_gradients)


class Watch:
    """Counts the scores that each rank computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.scores: dict[int, list[float]] = {}
        self.rank = 0
        tiles = attention_kernel.Sight.tiles

        def counted(sight: Any, *args: Any) -> Any:
            for tile in tiles(sight, *args):
                share = 0.5 if tile.is_causal else 1.0
                self.scores[self.rank][-1] += share * tile.queries.length * tile.keys.length
                yield tile

        monkeypatch.setattr(attention_kernel.Sight, "tiles", counted)

    def run(self, journeys: list[Any]) -> None:
        """Run each rank alone; ``scores[rank]`` are those between one transfer and the next."""
        for rank, journey in enumerate(journeys):
            self.rank, self.scores[rank] = rank, [0.0]
            for _ in journey:
                self.scores[rank].append(0.0)

    def totals(self) -> list[float]:
        return [sum(own) for own in self.scores.values()]


def imbalance(work: list[float]) -> float:
    return max(work) * len(work) / sum(work)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_of_a_causal_ring_compute_equally_many_scores(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank keeps the first half of its tokens and exchanges the second with its mirror image."""
    case, row = Attends(16 * ranks), RINGS[ATTENTION]
    watch, owns = Watch(monkeypatch), case.parts(ranks)
    results = [(own[0], own[0][..., 0]) for own in owns]
    pairs = list(zip(seats(ranks), owns, strict=True))
    with torch.no_grad():
        for journeys in (
            [row.forward(seat, *own) for seat, own in pairs],
            [
                row.backward(seat, tuple(own), kept, (None, None))
                for (seat, own), kept in zip(pairs, results, strict=True)
            ],
        ):
            watch.run(journeys)
            assert imbalance(watch.totals()) <= 1.1
            hops = zip(*watch.scores.values(), strict=True)
            assert all(imbalance(list(hop)) <= 1.1 for hop in hops if any(hop))  # none waits
        monkeypatch.setattr(rings, "_most_work", lambda *_: 1)  # nothing to gain: as they are
        rings._places.cache_clear()
        watch.run([row.forward(seat, *own) for seat, own in pairs])
        rings._places.cache_clear()
    assert imbalance(watch.totals()) >= 1.4


@pytest.mark.parametrize(
    ("case", "hops", "halves"),
    [
        (Attends(32), 3, 1),
        (Attends(32, (None, None)), 3, 0),
        (Attends(32, (8, 0)), 1, 0),  # eight tokens on a rank: its own and those of the one before
        (Attends(32, (9, 0)), 2, 0),
        (Attends(32, (0, 0)), 0, 0),
        (Attends(32, mask="rows"), 3, 0),
    ],
    ids=str,
)
def test_keys_travel_as_far_as_they_are_seen(case: Attends, hops: int, halves: int) -> None:
    owns, row = case.parts(4), RINGS[ATTENTION]
    with torch.no_grad():
        sent = bytes_sent(row.forward(seats(4)[0], *owns[0]))
    query, key, value, float_ = *owns[0][:3], 8
    both = key.numel() + value.numel()
    exchanged = query.numel() * 2 + both + query[..., 0].numel()  # there, and the results back
    assert sent == float_ * (hops * both + halves * exchanged // 2)


# --- convolutions ---------------------------------------------------------------------------------

CONVOLUTION = torch.ops.moptrace.causal_conv1d.default


def filtered(tokens: int, bias: bool) -> list[Any]:
    """Two sequences of four channels, a filter of three tokens in two groups, dilated."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    return [draw(2, 4, tokens), draw(6, 2, 3), draw(6) if bias else None, 2, 2]


@given(ranks=st.integers(1, 4), each=st.integers(4, 7), bias=st.booleans())
def test_a_convolution_gets_the_tokens_before(ranks: int, each: int, bias: bool) -> None:
    given = filtered(ranks * each, bias)
    want = CONVOLUTION(*given)
    eager = F.conv1d(F.pad(given[0], (4, 0)), *given[1:3], dilation=2, groups=2)
    torch.testing.assert_close(want, eager, rtol=1e-12, atol=1e-12)
    upstream = torch.arange(want.numel(), dtype=torch.float64).sin().view_as(want)
    (want * upstream).sum().backward()
    row = RINGS[CONVOLUTION]
    owns = [
        (x, *(None if y is None else y.detach() for y in given[1:3]), 2, 2, ranks * each)
        for x in given[0].detach().split(each, 2)
    ]
    with torch.no_grad():
        pairs = list(zip(seats(ranks), owns, strict=True))
        results = drive_together([row.forward(seat, *own) for seat, own in pairs])
        torch.testing.assert_close(torch.cat([y for (y,) in results], 2), want)
        every = zip(pairs, results, upstream.split(each, 2), strict=True)
        found = drive_together(
            [row.backward(seat, own, kept, (up,)) for (seat, own), kept, up in every]
        )
    of_x, of_weight, of_bias = zip(*found, strict=True)
    torch.testing.assert_close(torch.cat(of_x, 2), given[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(of_weight), given[1].grad, rtol=1e-12, atol=1e-12)
    if bias:
        torch.testing.assert_close(sum(of_bias), given[2].grad, rtol=1e-12, atol=1e-12)
