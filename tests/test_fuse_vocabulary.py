"""The vocabulary's loss without the logits, in every spelling that models use."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
from gloo import Ranks
from moptrace import Plan, Program, trace
from moptrace.passes.default import canonical, sharded
from moptrace.passes.fuse_vocabulary import LogitsWarning, fuse_vocabulary
from moptrace.testing import SimulatedRanks, assert_same_step, eager_step, whole_state

WORDS, WIDTH, SIZE, LENGTH = 23, 6, 12, 5
PROJECTION = torch.ops.moptrace.vocab_projection.default
FUSED = {"logits_bytes": 0}

Loss = Callable[[Tensor, Tensor], Tensor]


class Words(nn.Module):
    """An embedding, a projection, and a loss of its logits."""

    def __init__(self, loss: Loss, bias: bool = False, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.loss = [loss]
        self.double()

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(self.embedding(input_ids).tanh())
        return self.loss[0](logits, labels), logits


def batch(seed: int = 0) -> dict[str, Tensor]:
    return models.batch(seed, size=SIZE, length=LENGTH, vocabulary=WORDS)


def flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.flatten(0, 1), labels.flatten()


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*flat(logits, labels))


def shifted_by_slices(logits: Tensor, labels: Tensor) -> Tensor:
    shifted = logits[..., :-1, :].contiguous().view(-1, WORDS)
    return F.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))


def shifted_by_padding(logits: Tensor, labels: Tensor) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.double().view(-1, WORDS), labels.view(-1))


def classes_second(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels)


def classes_permuted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.permute(0, 2, 1), labels)


def log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits, -1).view(-1, WORDS), labels.view(-1))


def log_softmax_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(logits.view(-1, WORDS), dim=-1), labels.view(-1))


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*flat(logits, labels), label_smoothing=0.1)


def summed_by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(*flat(logits, labels), reduction="none")
    return each.sum() / (labels != -100).sum()


def of_each_token(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return (each * torch.arange(LENGTH).to(each)).mean()


def weighted_classes(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2, WORDS, dtype=logits.dtype)
    return F.cross_entropy(*flat(logits, labels), weight=weight)


def another_ignored_label(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), ignore_index=3)


def scaled(logits: Tensor, labels: Tensor) -> Tensor:
    return plain(logits * 0.3 / 2, labels)


def capped(logits: Tensor, labels: Tensor) -> Tensor:
    return plain(torch.tanh(logits / 0.7) * 0.7, labels)


def scaled_and_capped(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.double() * 0.4
    logits = logits / 0.7
    return plain(torch.tanh(logits) * 0.7, labels)


def with_z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    lse = torch.logsumexp(logits, dim=-1)
    return plain(logits, labels) + 1e-2 * (lse**2).mean()


def with_masked_z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    rows, labels = flat(logits, labels)
    each = F.cross_entropy(rows, labels, reduction="none", ignore_index=-100)
    return (each + 1e-2 * rows.logsumexp(-1).square() * (labels != -100)).sum() / 7


SPELLINGS = (
    plain, shifted_by_slices, shifted_by_padding, classes_second, classes_permuted, log_softmax,
    log_softmax_of_rows, smoothed, summed_by_hand, of_each_token, weighted_classes,
    another_ignored_label, scaled, capped, scaled_and_capped, with_z_loss, with_masked_z_loss,
)  # fmt: skip


def fused(program: Program) -> list[str]:
    return [str(node) for node in program.nodes if node.target is PROJECTION]


def holds_logits(program: Program) -> bool:
    """Whether any tensor of the program is as large as the logits."""
    values = [n.meta["val"] for n in program.nodes if n.op == "call_function"]
    return any(isinstance(v, Tensor) and v.numel() >= SIZE * (LENGTH - 1) * WORDS for v in values)


def assert_fused_and_same(model: nn.Module, **other: Loss) -> None:
    fed = batch(1)
    program = canonical()(trace(model, batch(), **other))
    want = eager_step(model, fed, **other)
    without = fuse_vocabulary()(program)
    assert fused(without) and not holds_logits(without)
    for ranks in (1, 3, 4):
        local = sharded(Plan(ep=1, **FUSED), ranks)(program)
        assert_same_step(SimulatedRanks(local, whole_state(model)).step(fed), want)


@pytest.mark.parametrize("loss", SPELLINGS, ids=lambda loss: loss.__name__)
def test_every_spelling_is_fused_and_the_same(loss: Loss) -> None:
    assert_fused_and_same(Words(loss))


def test_a_projection_with_a_bias() -> None:
    assert_fused_and_same(Words(smoothed, bias=True))


def test_a_tied_projection() -> None:
    assert_fused_and_same(Words(plain, tied=True))


class ByMatmul(Words):
    def logits(self, x: Tensor) -> Tensor:
        return x @ self.head.weight.t()


class ByMm(Words):
    def logits(self, x: Tensor) -> Tensor:
        return torch.mm(x.view(-1, WIDTH), self.head.weight.transpose(0, 1)).view(*x.shape[:2], -1)


class Stored(Words):
    """The weight lies as [D, V]."""

    def __init__(self, loss: Loss):
        super().__init__(loss)
        self.table = nn.Parameter(torch.randn(WIDTH, WORDS, dtype=torch.float64))

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.table


@pytest.mark.parametrize("kind", [ByMatmul, ByMm, Stored], ids=lambda kind: kind.__name__)
def test_every_spelling_of_the_product(kind: type[Words]) -> None:
    model = kind(plain)
    for unused in set(model.parameters()) - _used(model):
        unused.requires_grad_(False)
    assert_fused_and_same(model)


def _used(model: nn.Module) -> set[nn.Parameter]:
    model.zero_grad()
    model(**batch())[0].backward()
    found = {p for p in model.parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_a_loss_function_of_the_users_own() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Words(plain)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner.logits(self.inner.embedding(input_ids))

    assert_fused_and_same(Logits(), loss_fn=shifted_by_padding)


# --- what is left alone ---------------------------------------------------------------------------


def used_elsewhere(logits: Tensor, labels: Tensor) -> Tensor:
    return plain(logits, labels) + 1e-3 * logits.abs().mean()


def detached(logits: Tensor, labels: Tensor) -> Tensor:
    return plain(logits.detach() + 0 * logits, labels) + logits.square().mean()


def capped_twice(logits: Tensor, labels: Tensor) -> Tensor:
    for _ in range(2):
        logits = torch.tanh(logits / 0.7) * 0.7
    return plain(logits, labels)


def scaled_after_the_cap(logits: Tensor, labels: Tensor) -> Tensor:
    return plain(torch.tanh(logits / 0.7) * 0.7 * 2, labels)


def narrowed(logits: Tensor, labels: Tensor) -> Tensor:
    return plain(logits.float(), labels).double()


def of_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels.clamp(min=0), WORDS).to(logits)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


@pytest.mark.parametrize(
    "loss",
    [used_elsewhere, detached, capped_twice, scaled_after_the_cap, narrowed, of_probabilities],
    ids=lambda f: f.__name__,
)
def test_logits_that_are_needed_stay(loss: Loss) -> None:
    model, fed = Words(loss), batch(1)
    program = canonical()(trace(model, batch()))
    assert not fused(fuse_vocabulary()(program))
    local = sharded(Plan(ep=1, **FUSED), 3)(program)
    want = eager_step(model, fed)
    assert_same_step(SimulatedRanks(local, whole_state(model)).step(fed), want)


def test_small_logits_stay_whole() -> None:
    program = canonical()(trace(Words(plain), batch()))
    bytes_ = SIZE * LENGTH * WORDS * 8
    assert fuse_vocabulary(at_least=bytes_ + 1)(program) is program
    assert fused(fuse_vocabulary(at_least=bytes_)(program))


# --- the model's output ---------------------------------------------------------------------------


def test_logits_that_are_only_returned_are_dropped() -> None:
    program = fuse_vocabulary()(canonical()(trace(Words(plain), batch())))
    assert len(program.outputs) == 1
    assert program.signature.results[program.signature.loss + 1] is None


def test_logits_that_are_asked_for_are_kept_with_a_warning_of_their_bytes() -> None:
    program = canonical()(trace(Words(plain), batch()))
    with pytest.warns(LogitsWarning, match=f"{SIZE * LENGTH * WORDS * 8:,} bytes"):
        kept = fuse_vocabulary(keep_logits=True)(program)
    assert fused(kept)
    assert len(kept.outputs) == 2
    assert "held whole" in kept.notes[-1]


def test_a_label_that_does_not_exist_is_an_error() -> None:
    model, fed = Words(plain), batch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local = sharded(Plan(ep=1, **FUSED), 2)(canonical()(trace(model, batch())))
    fed["labels"][3, 2] = WORDS
    with pytest.raises(IndexError, match=f"label {WORDS} of token"):
        SimulatedRanks(local, whole_state(model)).step(fed)


# --- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x._base is None:
                self.elements = max(self.elements, x.numel())
        return result


def test_no_rank_ever_holds_its_tokens_times_the_vocabulary() -> None:
    words, tokens, width, ranks = 50_000, 512, 4, 2

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(words, width)
            self.head = nn.Linear(width, words, bias=False)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return plain(self.head(self.embedding(input_ids)), labels)

    model = Large()
    ids = torch.randint(words, (ranks, tokens))
    fed = {"input_ids": ids, "labels": ids.roll(1, 1)}
    program = canonical()(trace(model, fed))
    assert program.signature.results
    local = sharded(Plan(ep=1), ranks)(program)  # large enough to be fused by default
    with Largest() as largest:
        step = SimulatedRanks(local, whole_state(model)).step(fed)
    assert largest.elements < operator.floordiv(tokens * words, 4)
    want = eager_step(model, fed)
    assert math.isclose(float(step.loss), float(want.loss), rel_tol=1e-5)


# --- on real ranks --------------------------------------------------------------------------------


def outputs_of_a_rank(fed: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The logits that a rank returns while training, and in evaluation; and the loss there."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from moptrace import parallelize

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallel = parallelize(
        Words(plain), mesh, Plan(**FUSED), batch={k: v[:6] for k, v in fed.items()}
    )
    own = parallel.local_batch(fed)
    _, training = parallel(**own)
    parallel.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LogitsWarning)
        loss, evaluating = parallel(**own)
    return training, evaluating.detach(), loss.detach()


def test_logits_are_there_in_evaluation_and_not_while_training(
    ranks: Callable[[int], Ranks],
) -> None:
    fed = batch(1)
    want, logits = Words(plain)(**fed)
    answers = ranks(2)(outputs_of_a_rank, fed)
    assert [training for training, _, _ in answers] == [None, None]
    torch.testing.assert_close(torch.cat([kept for _, kept, _ in answers]), logits.detach())
    for _, _, loss in answers:
        torch.testing.assert_close(loss, want.detach())
