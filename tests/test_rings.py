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
from moptrace.kernels.vocab_projection import vocab_projection
from moptrace.rings import RINGS, Seat, Start, Wait, bytes_sent, drive_together

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
