"""The rows of an embedding, fetched from the ranks that have them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
import moptrace
from gloo import Ranks
from moptrace import Layout, Plan, Program, trace
from moptrace.check import check
from moptrace.collectives import Communicator
from moptrace.errors import CheckError
from moptrace.explain import explain
from moptrace.infer import Held, infer
from moptrace.kernels.embedding_rows import embedding_rows, sum_by_id
from moptrace.passes.default import canonical, sharded
from moptrace.passes.fuse_embedding import fuse_embedding
from moptrace.placement import INVARIANT, Rows, Shard
from moptrace.rings import RINGS, Exchange, Seat, drive_together
from moptrace.roles import Component
from moptrace.rules import Rule
from moptrace.simulate import simulate
from moptrace.testing import SimulatedRanks, assert_same_step, eager_step, whole_state

ROWS = torch.ops.moptrace.embedding_rows.default
TRAVELLING = torch.ops.moptrace.ring_embedding_rows.default
FUSED = {"logits_bytes": 0, "embedding_bytes": 0}
WORDS, WIDTH, SIZE, LENGTH = 67, 6, 12, 4


class Words(nn.Module):
    """An embedding, a mixing of the tokens of each sequence, and a loss over the words."""

    def __init__(self, tied: bool = False, **options: bool | int):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.double()

    def rows(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.rows(input_ids).tanh().cumsum(1))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch(seed: int = 0, size: int = SIZE, words: int = WORDS) -> dict[str, Tensor]:
    """Ids of which many repeat, and some are the padding."""
    fed = models.batch(seed, size=size, length=LENGTH, vocabulary=words)
    fed["input_ids"][:, 1] = 3
    fed["input_ids"][0, :] = 5
    return fed


def targets(program: Program) -> list[object]:
    return [node.target for node in program.nodes]


def local(model: nn.Module, ranks: int, fed: dict[str, Tensor], **plan: int) -> Program:
    resolved = Plan(ep=1, **(FUSED | plan))  # type: ignore[arg-type]
    return sharded(resolved, ranks)(canonical()(trace(model, fed)))


def assert_fetched_and_same(model: nn.Module, ranks: int, size: int = SIZE, **plan: int) -> None:
    program, fed = local(model, ranks, batch(size=size), **plan), batch(1, size)
    assert TRAVELLING in targets(program)
    want = eager_step(model, fed)
    have = SimulatedRanks(program, whole_state(model)).step(fed)
    assert_same_step(have, want, tolerance=1e-12)


# --- the same function ----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_ranks_compute_what_one_device_does(ranks: int, tied: bool) -> None:
    assert_fetched_and_same(Words(tied), ranks)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_ranks_with_unequal_batches_or_none(size: int) -> None:
    assert_fetched_and_same(Words(), ranks=4, size=size)


@pytest.mark.parametrize("padding", [3, 0, -1, WORDS - 2])
def test_the_padding_has_no_gradient(padding: int) -> None:
    model = Words(padding_idx=padding)
    assert_fetched_and_same(model, 4)
    gradient = eager_step(model, batch(1)).gradients["embedding.weight"]
    assert not gradient[padding].any()


@pytest.mark.filterwarnings("ignore::moptrace.passes.place.ReplicationWarning")  # cumsum
@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_ranks(cp: int) -> None:
    assert_fetched_and_same(Words(tied=True), 4, cp=cp)


def test_a_weight_that_is_looked_up_twice() -> None:
    class Twice(Words):
        def rows(self, ids: Tensor) -> Tensor:
            return self.embedding(ids) + 0.3 * self.embedding(ids.roll(1, 1).flatten()).view(
                *ids.shape, WIDTH
            )

    assert_fetched_and_same(Twice(tied=True), 4)


def test_a_frozen_weight() -> None:
    model = Words()
    model.embedding.requires_grad_(False)
    assert_fetched_and_same(model, 3)


@pytest.mark.filterwarnings("ignore::moptrace.passes.place.ReplicationWarning")  # cumsum
def test_positions_that_all_ranks_share_are_gathered() -> None:
    class Positions(Words):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(2 * LENGTH, WIDTH, dtype=torch.float64)

        def rows(self, ids: Tensor) -> Tensor:
            return self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))

    assert_fetched_and_same(Positions(), 4)
    assert_fetched_and_same(Positions(), 4, cp=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_added_in_float32_at_least(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 2, dtype=dtype, requires_grad=True)
    ids = torch.ones(1000, dtype=torch.int64)
    embedding_rows(weight, ids).mul(1.0).sum().backward()
    assert weight.grad is not None and weight.grad.dtype is dtype
    assert weight.grad.tolist() == [[0, 0], [1000, 1000], [0, 0]]  # bfloat16 sums stop at 256
    assert sum_by_id(weight.detach(), torch.arange(3), 3).dtype is torch.float32


# --- on real ranks --------------------------------------------------------------------------------


def real_step(cp: int, tied: bool) -> tuple[float, dict[str, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh

    model = Words(tied)
    plan = Plan(cp=cp, **FUSED)  # type: ignore[arg-type]
    parallel = moptrace.parallelize(model, init_device_mesh("cpu", (4,)), plan=plan)
    loss = parallel(**parallel.local_batch(batch(1)))
    loss.backward()
    assert TRAVELLING in targets(parallel.program)
    grads = {n: p.grad.full_tensor() for n, p in parallel.named_parameters() if p.grad is not None}
    return float(loss), grads


@pytest.mark.parametrize(("cp", "tied"), [(1, True), (2, False)])
def test_real_ranks_compute_what_one_device_does(
    ranks: Callable[[int], Ranks], cp: int, tied: bool
) -> None:
    want = eager_step(Words(tied), batch(1))
    for loss, gradients in ranks(4)(real_step, cp, tied):
        assert math.isclose(loss, float(want.loss), rel_tol=1e-12)
        assert gradients
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, want.gradients[name], rtol=1e-12, atol=1e-12)


# --- when it pays ---------------------------------------------------------------------------------


def is_fused(model: nn.Module, ranks: int = 4, at_least: int = 0) -> bool:
    program = canonical()(trace(model, batch()))
    after = fuse_embedding(ranks, at_least)(program)
    assert (after is program) == (ROWS not in targets(after))
    return after is not program


def test_a_small_weight_is_gathered() -> None:
    bytes_ = WORDS * WIDTH * 8
    assert is_fused(Words(), at_least=bytes_)
    assert not is_fused(Words(), at_least=bytes_ + 1)


def test_one_rank_and_ranks_with_more_ids_than_words_gather() -> None:
    assert not is_fused(Words(), ranks=1)
    wide = canonical()(trace(Words(), batch(size=2 * WORDS)))  # 4 ids each for every word
    assert fuse_embedding(8)(wide) is wide
    assert fuse_embedding(9)(wide) is not wide


def test_a_weight_that_is_needed_whole_is_gathered_once() -> None:
    assert is_fused(Words())
    assert not is_fused(Words(tied=True))  # its projection has not been replaced


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_lookups_with_a_gradient_of_their_own_stay(options: dict[str, bool]) -> None:
    assert not is_fused(Words(**options))


# --- memory and traffic ---------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x._base is None:
                self.elements = max(self.elements, x.numel())
        return result


def largest_of_a_step(embedding_bytes: int) -> tuple[int, int]:
    """The largest tensor of a step in forward and backward, for a table of 4,000 words by 8."""
    words, width, ranks = 4_000, 8, 4

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(words, width)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.embedding(input_ids).square().mean()

    model, fed = Table(), {"input_ids": torch.randint(words, (ranks, 16))}
    program = local(model, ranks, fed, embedding_bytes=embedding_bytes)
    simulated = SimulatedRanks(program, whole_state(model))
    arguments = [
        own | {x.name: fed["input_ids"][rank : rank + 1] for x in program.signature.inputs}
        for rank, own in enumerate(simulated.ranks)
    ]
    with Largest() as forward:
        outputs = simulate(program, arguments)
    with Largest() as backward:
        torch.autograd.backward([own[program.signature.loss] for own in outputs])
    return forward.elements, backward.elements


def test_no_rank_ever_holds_the_whole_weight_or_its_gradient() -> None:
    own = 1_000 * 8
    assert min(largest_of_a_step(1 << 30)) >= 4 * own  # gathered: the instrument sees it
    forward, backward = largest_of_a_step(0)
    assert forward < own / 4
    assert backward <= own


def test_the_explanation_has_the_rows_that_move_and_no_gather() -> None:
    found = explain(local(Words(), 4, batch()))
    row = found.row(Component.EMBEDDING)
    assert row.parallelism == "words split over dp=4"
    assert [(t.kind, t.count, t.expected) for t in row.traffic] == [("all_to_all", 6, True)]
    ids, float_ = SIZE * LENGTH // 4, 8
    rows = WORDS * (1 - (1 - 1 / WORDS) ** ids) * 3 / 4  # distinct ids, of other ranks' words
    each_way = 3 * 8 + rows * 8 + rows * WIDTH * float_
    assert row.bytes_moved == pytest.approx(2 * each_way, abs=4)
    assert found.collectives["ring"] == 2  # of the vocabulary, once around each way
    assert "~ expected if every id of an embedding is as likely" in str(found)


def test_an_embedding_that_is_not_trained_sends_no_gradients() -> None:
    model = Words()
    model.embedding.requires_grad_(False)
    (traffic,) = explain(local(model, 4, batch())).row(Component.EMBEDDING).traffic
    assert traffic.count == 3


def test_the_expected_rows_are_those_that_move_if_ids_are_uniform() -> None:
    ranks, words, width, ids = 4, 40, 4, 32
    row, layout = RINGS[ROWS], Layout.of(ranks)
    seats = [Seat.seen_by(Communicator(layout, rank), "dp") for rank in range(ranks)]
    generator = torch.Generator().manual_seed(0)
    expected = row.costs(seats[0], torch.empty(10, width), torch.empty(ids).long(), -1, words)[0]
    moved = [0.0, 0.0, 0.0]
    rounds = 30
    for _ in range(rounds):
        asked = [torch.randint(words, (ids,), generator=generator) for _ in seats]
        journeys = [
            row.forward(seat, torch.zeros(10, width), own, -1, words)
            for seat, own in zip(seats, asked, strict=True)
        ]
        for number, bytes_ in enumerate(exchanged(journeys)):
            moved[number] += bytes_ / ranks / rounds
    assert moved == pytest.approx(list(expected), rel=0.03)


def exchanged(journeys: list) -> list[int]:  # type: ignore[type-arg]
    """The bytes that all ranks send to others in each exchange."""
    sent: list[int] = []

    def watched(rank: int, journey):  # type: ignore[no-untyped-def]
        answer, number = None, 0
        while True:
            try:
                request = journey.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(request, Exchange):
                row = request.send[:1].numel() if len(request.send) else 0
                sent.extend([0] * (number + 1 - len(sent)))
                away = sum(request.out) - request.out[rank]
                sent[number] += away * row * request.send.element_size()
                number += 1
            answer = yield request

    drive_together([watched(r, j) for r, j in enumerate(journeys)])
    return sent


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [WORDS, -1, 10 * WORDS])
def test_an_id_without_a_row_is_an_error(wrong: int) -> None:
    model, fed = Words(), batch(1)
    program = local(model, 3, batch())
    fed["input_ids"][3, 2] = wrong
    with pytest.raises(IndexError, match=re.escape(str(wrong))):
        SimulatedRanks(program, whole_state(model)).step(fed)


def fails_on_every_rank() -> str:
    from torch.distributed.device_mesh import init_device_mesh

    plan = Plan(**FUSED)  # type: ignore[arg-type]
    parallel = moptrace.parallelize(Words(), init_device_mesh("cpu", (4,)), plan=plan)
    good, bad = batch(1), batch(1)
    bad["input_ids"][3, 2] = WORDS  # on the second rank
    try:
        parallel(**parallel.local_batch(bad))
    except IndexError as error:
        parallel(**parallel.local_batch(good))  # the ranks are still in step
        return str(error)
    return "no error"


def test_an_id_without_a_row_is_an_error_on_every_real_rank(ranks: Callable[[int], Ranks]) -> None:
    one, two, *others = ranks(4)(fails_on_every_rank)
    assert f"id {WORDS} has no row" in two
    assert all("rank 1 has an id without a row" in text for text in (one, *others))


def test_ids_of_routed_rows_are_not_split() -> None:
    rule = Rule((("v", "D"), ("i0",)), (("i0", "D"),), frozenset(), frozenset({"v"}))
    rule = replace(rule, together=("i0", "v"))
    routed = Held(Rows("token"), weight=8, differentiable=False)
    demand = infer(rule, [Held(Shard(0)), routed], 2)
    assert demand.operands == (INVARIANT, INVARIANT)


def test_a_lookup_that_does_not_travel_is_refused() -> None:
    program = local(Words(), 4, batch())
    graph, _ = program.copy_graph()
    (node,) = (n for n in graph.nodes if n.target is TRAVELLING)
    node.target, node.args = ROWS, node.args[:3]
    with pytest.raises(CheckError, match="must travel"):
        check(program.with_graph(graph))
