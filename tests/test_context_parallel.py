"""Context parallel: the tokens of each sequence on several ranks, and the same step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from double import InFloat64
from gloo import Ranks
from moptrace import Plan, Program, errors, roles, trace
from moptrace.collectives import collective
from moptrace.kernels.attention import attention
from moptrace.passes.default import canonical, sharded
from moptrace.rings import ring
from moptrace.testing import (
    SimulatedRanks,
    Step,
    assert_same_step,
    eager_step,
    simulated_step,
    whole_state,
)

LENGTH, SIZE = 8, 4
PLANS = (
    (2, Plan(ep=1, cp=2, context="ulysses", logits_bytes=0)),
    (4, Plan(ep=4, cp=2, context="ring", logits_bytes=0)),
    (4, Plan(ep=2, cp=4, context="ring")),
    (4, Plan(ep=2, cp=4, context="ulysses")),
    (8, Plan(ep=4, cp=2, edp="replicate", context="gather")),
    (6, Plan(ep=3, cp=2, logits_bytes=0)),
)


def batch(seed: int, size: int = SIZE) -> dict[str, Tensor]:
    fed = models.batch(seed, size=size, length=LENGTH)
    fed["labels"][0, 2:] = -100  # of the first sequence, the later ranks have no label
    return fed


@cache
def subject(name: str) -> tuple[nn.Module, Program]:
    if name in models.FAMILIES:
        model, traced = models.build(f"{name}, eager"), models.build(f"{name}, grouped_mm")
        traced.load_state_dict(model.state_dict())
    else:
        model = traced = models.build(name)
    with InFloat64():
        return model, canonical()(trace(traced, batch(0, size=12)))


@pytest.mark.parametrize(
    "name",
    [*models.FAMILIES, "LoopWhere", "SortSlices, balanced", "OneHotEinsum", "DenseWeightFirst"],
)
def test_every_way_to_attend_computes_the_same_step(name: str) -> None:
    model, program = subject(name)
    fed = batch(1, size=12)
    with InFloat64():
        want = eager_step(model, fed)
        for ranks, plan in PLANS:
            local = sharded(plan, ranks)(program)
            assert_same_step(simulated_step(local, whole_state(model), fed), want)


def movements(program: Program) -> list[str]:
    """What moves activations: the collectives on anything but parameters and routed rows."""
    found: list[str] = []
    for node in program.nodes:
        row = collective(node.target) or ring(node.target)
        operand = node.args[0] if row else None
        if row is None or "rows" in row.name or row.name == "exchange_counts":
            continue
        if operand.op == "placeholder" or roles.role(node).component is None:  # type: ignore
            continue
        if roles.tensor(operand).is_floating_point() and roles.tensor(operand).dim():  # type: ignore
            found.append(row.name)
    return [name for name in found if name not in ("all_gather", "take_shard")]


def test_only_attention_moves_activations() -> None:
    _, program = subject("qwen3_moe")
    layers = 2
    ulysses = sharded(Plan(ep=2, cp=2, context="ulysses", logits_bytes=0), 4)(program)
    assert movements(ulysses) == ["all_to_all"] * 4 * layers + ["ring_vocab_projection"]
    ring_ = sharded(Plan(ep=2, cp=2, context="ring", logits_bytes=0), 4)(program)
    assert movements(ring_) == ["ring_attention"] * layers + ["ring_vocab_projection"]
    gathers = [n for n in ulysses.nodes if n.target == torch.ops.moptrace.all_gather.default]
    packed = [n for n in gathers if n.args[0].target == torch.ops.moptrace.pack.default]  # type: ignore
    assert all(n.args[0].op == "placeholder" for n in gathers if n not in packed)  # type: ignore


# --- attention of every shape ---------------------------------------------------------------------


class Attends(nn.Module):
    """One layer of attention of ``heads`` heads, with ``groups`` heads of keys."""

    def __init__(self, heads: int, groups: int, **how: Any):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.groups, self.how = heads, groups, how
        self.embedding = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.randn(LENGTH, 6))
        self.q = nn.Linear(6, heads * 4)
        self.kv = nn.Linear(6, 2 * groups * 4)
        self.out = nn.Linear(heads * 4, 6)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.positions
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, 4).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.groups, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.mixed(q, k, v).transpose(1, 2).flatten(2))
        return F.cross_entropy((x @ self.embedding.weight.t()).flatten(0, 1), labels.flatten())

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.heads != self.groups
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **self.how)


class Windowed(Attends):
    """A sliding window, as an explicit mask."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        apart = place[:, None] - place[None, :]
        mask = (apart >= 0) & (apart < 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Products(Attends):
    """Softmax of products, with a sink."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 2
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
        sink = torch.zeros(*scores.shape[:-1], 1, dtype=scores.dtype)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class Convolves(Attends):
    """A causal convolution over tokens beside the attention."""

    def __init__(self, heads: int, groups: int):
        super().__init__(heads, groups, is_causal=True)
        self.filter = nn.Parameter(torch.randn(6, 1, 3, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = F.pad(self.embedding(input_ids).transpose(1, 2), (2, 0))
        x = F.conv1d(x, self.filter, groups=6).transpose(1, 2)
        extra = F.cross_entropy((x @ self.embedding.weight.t()).flatten(0, 1), labels.flatten())
        return extra + super().forward(input_ids, labels)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "causal": lambda: Attends(4, 4, is_causal=True),
    "not causal": lambda: Attends(4, 4),
    "scaled": lambda: Attends(2, 2, is_causal=True, scale=0.3),
    "grouped heads": lambda: Attends(4, 2, is_causal=True),
    "fewer heads of keys than ranks": lambda: Attends(6, 2, is_causal=True),
    "one head of keys": lambda: Attends(4, 1, is_causal=True),
    "heads that do not divide": lambda: Attends(3, 3, is_causal=True),
    "fewer heads than ranks": lambda: Attends(1, 1, is_causal=True),
    "a window": lambda: Windowed(4, 4),
    "products and a sink": lambda: Products(4, 4),
    "a convolution": lambda: Convolves(4, 2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["ulysses", "ring", "gather"])
def test_attention_of_every_shape(name: str, how: str) -> None:
    model = MODELS[name]()
    ids = torch.randint(11, (SIZE, LENGTH), generator=torch.Generator().manual_seed(1))
    fed = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    want = eager_step(model, fed)
    program = canonical()(trace(model, fed))
    for ranks, cp in ((2, 2), (4, 4), (4, 2)):
        local = sharded(Plan(ep=1, cp=cp, context=how), ranks)(program)
        assert_same_step(simulated_step(local, whole_state(model), fed), want)


def test_attention_by_parts_is_torchs_own() -> None:
    q = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    have, _ = attention(q, k, v, is_causal=True, scale=0.4)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(have, want)
    weight = torch.randn_like(want)
    found = torch.autograd.grad((have * weight).sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad((want * weight).sum(), (q, k, v)))
    with torch.device("meta"):
        assert attention(q.to("meta"), k.to("meta"), v.to("meta"))[0].shape == want.shape


# --- real ranks, and bad input --------------------------------------------------------------------


def on_a_rank(
    name: str, state: dict[str, Tensor], plan: Plan, fed: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from moptrace import parallelize

    model = models.build(name)
    model.load_state_dict(state)
    ranks = dist.get_world_size()
    parts = plan.cp * plan.tp
    example = {k: v[: len(v) * parts // ranks, : v.shape[1] // parts] for k, v in fed.items()}
    with InFloat64():
        mesh = init_device_mesh("cpu", (ranks,))
        parallel = parallelize(model, mesh, plan, batch=example)
        loss, _ = parallel(**parallel.local_batch(fed))
        loss.backward()
        found = parallel.full_gradients()
    return loss.detach(), {n: g for n, g in found.items() if g is not None}


@pytest.mark.parametrize("how", ["ulysses", "ring"])
def test_real_ranks_compute_the_same_step(ranks: Callable[[int], Ranks], how: str) -> None:
    model, _ = subject("LoopWhere")
    fed = batch(1, size=12)
    want = eager_step(model, fed)
    plan = Plan(ep=2, cp=2, context=how, logits_bytes=0)
    for loss, gradients in ranks(4)(on_a_rank, "LoopWhere", model.state_dict(), plan, fed):
        assert_same_step(Step(loss, gradients, {}), want)


def test_a_length_that_the_ranks_do_not_divide_says_what_to_pad_to() -> None:
    _, program = subject("LoopWhere")
    with pytest.raises(errors.PlanError, match="8 tokens cannot be split over cp=3; pad them to 9"):
        sharded(Plan(ep=1, cp=3), 3)(program)


def test_an_unknown_way_to_attend_is_refused() -> None:
    _, program = subject("LoopWhere")
    with pytest.raises(errors.PlanError, match="say one of 'ulysses', 'ring', 'gather'"):
        sharded(Plan(ep=1, cp=2, context="rings"), 2)(program)


def test_the_rows_of_a_step_are_simulated_in_order() -> None:
    """Ranks along ``cp`` hold consecutive tokens of the same sequences."""
    _, program = subject("LoopWhere")
    local = sharded(Plan(ep=1, cp=2), 4)(program)
    held = SimulatedRanks(local, whole_state(subject("LoopWhere")[0]))._held["input_ids"]
    assert str(held) == "dp: shard(0), cp: shard(1)"
