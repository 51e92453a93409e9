"""Operators that travel around a ring: the same result as one device, whichever side travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gloo import Ranks
from moptrace import Layout
from moptrace.collectives import Communicator
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
    assert all(of_ids is None for _, of_ids in found)
    compare([[of_weight] for of_weight, _ in found], [want_gradient])


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
    found = [of_weight.tolist() for of_weight, _ in drive_together(journeys)]
    assert found == [[[0, 0]], [[900, 900]], [[0, 0]]]


def test_ranks_that_disagree_about_the_rows_are_an_error_and_not_a_hang() -> None:
    def sends(one: int, other: int) -> Any:
        yield Exchange(torch.zeros(one + other), (one, other), torch.zeros(2), (1, 1))

    with pytest.raises(RuntimeError, match="disagree about how many rows"):
        drive_together([sends(1, 1), sends(2, 1)])
