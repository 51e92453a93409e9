"""Each expert's tokens are counted over the global batch, whatever the plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import models
from double import InFloat64
from gloo import Ranks
from moptrace import Plan, errors, trace
from moptrace.passes.count_tokens import count_tokens
from moptrace.passes.default import canonical, sharded
from moptrace.testing import SimulatedRanks, SimulatedSteps, whole_state
from subjects import batch, subject

PLANS = (
    (1, Plan(ep=1)),
    (4, Plan(ep=2, expert_tokens=7)),
    (4, Plan(ep=4, cp=2)),
    (6, Plan(ep=3, tp=2, edp="replicate")),
)


@cache
def counted(seed: int) -> Tensor:
    """By the router's own logits: the tokens of each of 12 experts in two layers, [2, 12]."""
    model = models.build("mixtral, eager")
    with torch.no_grad(), InFloat64():
        logits = model.model(**_without_labels(batch(seed)), output_router_logits=True)
    chosen = [x.topk(2).indices.flatten() for x in logits.router_logits]
    return torch.stack([x.bincount(minlength=12) for x in chosen])


def _without_labels(fed: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in fed.items() if k != "labels"}


@pytest.mark.parametrize(("world", "plan"), PLANS, ids=str)
def test_counts_add_up_over_ranks_and_steps(world: int, plan: Plan) -> None:
    model, program = subject("mixtral")
    with InFloat64():
        local = sharded(plan.resolve(world, []), world)(count_tokens()(program))
        assert not any("at once: node" in note for note in local.notes)
        simulated = SimulatedRanks(local, whole_state(model))
        for seeds in ((1,), (1, 2)):
            found = simulated.step(batch(seeds[-1])).buffers["tokens_per_expert"]
            assert torch.equal(found, sum(map(counted, seeds)))
    assert found.sum() == 2 * 144 * 2 * 2  # layers, tokens, choices, steps


def test_a_step_counts_all_of_its_micro_batches() -> None:
    model, program = subject("mixtral")
    sgd = partial(torch.optim.SGD, lr=0.0)
    with InFloat64():
        local = sharded(Plan(ep=2, count_tokens=True).resolve(2, []), 2)(program)
        steps = SimulatedSteps(
            local, whole_state(model), lambda named: sgd(named.values()), accumulate=2
        )
        steps.step(batch(1), batch(2))
    assert torch.equal(steps.ranks.ranks[1]["tokens_per_expert"], counted(1) + counted(2))


def counts_on_a_rank(state: dict[str, Tensor]) -> list[Tensor]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from moptrace import parallelize

    model = models.build("mixtral, grouped_mm")
    model.load_state_dict(state)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fed = batch(1)
    with InFloat64():
        plan = Plan(ep=2, count_tokens=True)
        parallel = parallelize(model, mesh, plan, batch={k: v[:6] for k, v in fed.items()})
        parallel(**parallel.local_batch(fed))
        once = parallel.tokens_per_expert.clone()
        parallel.tokens_per_expert.zero_()
        parallel(**parallel.local_batch(batch(2)))
    assert not any("tokens_per_expert" in name for name in parallel.state_dict())
    assert set(parallel.full_state_dict()) == set(state)
    return [once, parallel.tokens_per_expert]


def test_a_parallel_model_has_the_counts(ranks: Callable[[int], Ranks]) -> None:
    for found in ranks(2)(counts_on_a_rank, subject("mixtral")[0].state_dict()):
        assert torch.equal(found[0], counted(1)) and torch.equal(found[1], counted(2))


class Uneven(nn.Module):
    """Two blocks of different numbers of experts."""

    def __init__(self) -> None:
        super().__init__()
        sizes = models.Sizes()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(Experts(sizes.width, number) for number in (4, 6))
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids).flatten(0, 1)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x), labels.flatten())


class Experts(nn.Module):
    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, number, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, at = torch.where(chosen == number)
            y.index_add_(0, token, expert(x[token]) * weights[token, at, None])
        return y


def test_blocks_of_different_numbers_of_experts_have_counts_of_their_own() -> None:
    torch.manual_seed(0)
    model, fed = Uneven().double(), batch(1)
    local = sharded(Plan(ep=2, count_tokens=True), 2)(canonical()(trace(model, fed)))
    found = SimulatedRanks(local, whole_state(model)).step(fed).buffers
    shapes = {name: list(x.shape) for name, x in found.items()}
    assert shapes == {"tokens_per_expert_4": [1, 4], "tokens_per_expert_6": [1, 6]}
    assert all(int(x.sum()) == 288 for x in found.values())


def test_a_name_that_is_taken_is_refused() -> None:
    program = count_tokens()(subject("mixtral")[1])
    with pytest.raises(errors.PassError, match="has a tensor named 'tokens_per_expert' already"):
        count_tokens()(program)
