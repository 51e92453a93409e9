"""Any model, any mesh, any plan: the same function as on one device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from _report import record_examples
from double import InFloat64
from moptrace import MixedPrecisionPolicy, Plan, Program, roles, trace
from moptrace.passes.default import canonical, sharded
from moptrace.passes.drop_tokens import drop_tokens
from moptrace.placement import Shard
from moptrace.precision import convert
from moptrace.testing import (
    SimulatedRanks,
    Step,
    assert_same_step,
    assert_same_training,
    assert_same_weights,
    batches,
    computed_as,
    dtypes_of,
    eager_step,
    meshes,
    model_specs,
    plans,
    simulated_step,
    unsharded_step,
    whole_state,
)
from sweeps import WITHOUT_SHRINKING, sweep

LENGTH = 12  # of a sequence: cp * tp may be any divisor
PLANS_PER_MODEL = 8  # a model is traced once and run under several plans


# --- the property ---------------------------------------------------------------------------------


# A dtype to hold parameters in, and the policy: what is computed is float64 in any case.
PRECISIONS = (
    (torch.float64, MixedPrecisionPolicy()),
    (torch.float32, MixedPrecisionPolicy(param_dtype=torch.float64)),
)
STEPS = 3  # under the last plan of each model; one under the others
MAX_NORM = 0.5


@settings(
    max_examples=-(-settings.default.max_examples // PLANS_PER_MODEL), phases=WITHOUT_SHRINKING
)
@given(st.data())
def test_any_model_on_any_mesh_under_any_plan_computes_the_same_step(data: st.DataObject) -> None:
    spec = data.draw(model_specs(), label="model")
    size = data.draw(st.sampled_from([6, 8, 12, 16]), label="sequences")
    traced, *fed = (data.draw(batches(spec.vocabulary, size, LENGTH)) for _ in range(1 + STEPS))
    held, policy = data.draw(st.sampled_from(PRECISIONS), label="precision")
    model = spec.build(held)
    program = canonical()(trace(convert(copy.deepcopy(model), policy), traced))
    reference = Clipped(computed_as(copy.deepcopy(model), policy))
    wanted = [reference.step(batch) for batch in fed[: STEPS if held == torch.float64 else 1]]
    for number in range(PLANS_PER_MODEL):
        ranks = data.draw(meshes(size, largest=16), label=f"ranks {number}")
        plan = data.draw(plans(ranks, LENGTH, len(spec.layers)), label=f"plan {number}")
        plan = replace(plan, mixed_precision=policy)
        local = sharded(plan, ranks, masters=dtypes_of(model))(program)
        simulated = SimulatedRanks(local, whole_state(model))
        meant = wanted if number == PLANS_PER_MODEL - 1 else wanted[:1]
        if plan.dropping:
            dropped = drop_tokens(plan.dropping, groups=groups_of(plan, ranks, size))(program)
            single = Clipped(copy.deepcopy(model), partial(unsharded, dropped))
            meant = [single.step(batch) for batch in fed[: len(meant)]]
        for batch, want in zip(fed, meant, strict=False):
            assert_same_clipped_step(simulated, batch, want)
        record_examples()


def groups_of(plan: Plan, ranks: int, sequences: int) -> tuple[tuple[int, int], ...]:
    """How the ranks of a plan share a batch [sequences, length], flattened, where they compete."""
    assert plan.dropping is not None
    among = [(ranks // (plan.pp * plan.cp * plan.tp), 1)]  # sequences, and then the tokens of each
    within = [(plan.cp, sequences), (plan.tp, sequences)]
    groups = {"batch": [], "sequence": among, "sub-sequence": among + within}[plan.dropping.over]
    return tuple((parts, blocks) for parts, blocks in groups if parts > 1)


def unsharded(program: Program, model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """The step of a program that computes in float64, on one device; sets the model's gradients."""
    whole = {n: x.double() if x.is_floating_point() else x for n, x in whole_state(model).items()}
    step = unsharded_step(program, whole, batch)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.grad = step.gradients[name].to(parameter.dtype)
    named = model.named_parameters(remove_duplicate=False)
    return replace(step, gradients={n: p.grad.clone() for n, p in named if p.grad is not None})


@dataclass(frozen=True)
class Wanted:
    """A step of one device: raw gradients, their norm, and the weights after it."""

    step: Step
    norm: Tensor
    weights: dict[str, Tensor]


class Clipped:
    """Eager training with a limit to the norm of gradients."""

    def __init__(self, model: nn.Module, step: Callable[..., Step] = eager_step):
        self.model, self.one_step = model, step
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(self, batch: dict[str, Tensor]) -> Wanted:
        step = self.one_step(self.model, batch)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        return Wanted(step, norm, whole_state(self.model))


def assert_same_clipped_step(
    simulated: SimulatedRanks, batch: dict[str, Tensor], want: Wanted
) -> None:
    """Loss and norm to 1e-10; what float32 holds is rounded once, from float64."""
    step = simulated.step(batch)
    held = next(iter(want.step.gradients.values())).dtype
    tolerance = 1e-10 if held == torch.float64 else 3e-7
    torch.testing.assert_close(step.loss, want.step.loss, rtol=1e-10, atol=0)
    assert_same_step(step, want.step, tolerance)
    norm = norm_of_shards(simulated)
    torch.testing.assert_close(norm, want.norm.double(), rtol=tolerance, atol=0)
    for rank in range(len(simulated.ranks)):
        for shard in simulated.parameters(rank):
            if shard.grad is not None:
                shard.grad *= min(1.0, MAX_NORM / (float(norm) + 1e-6))
        torch.optim.SGD(simulated.parameters(rank), lr=0.1).step()
    assert_same_weights(simulated.weights(), want.weights, tolerance)


def norm_of_shards(simulated: SimulatedRanks) -> Tensor:
    """The norm of all gradients from the ranks' parts: what several ranks hold counts once."""
    total = torch.zeros((), dtype=torch.float64)
    for number, parameter in enumerate(simulated.signature.parameters):
        node = next(n for n in simulated.program.nodes if n.name == parameter.name)
        placement = roles.placement(node)
        assert placement is not None
        pairs = zip(placement.view.axes, placement.kinds, strict=True)
        copies = math.prod(axis.size for axis, kind in pairs if not isinstance(kind, Shard))
        for rank in range(len(simulated.ranks)):
            gradient = simulated.parameters(rank)[number].grad
            if gradient is not None:
                total += gradient.double().square().sum() / copies
    return total.sqrt()


# --- five Hugging Face families and three hand-written models -------------------------------------

HAND_WRITTEN = ("LoopWhere", "OneHotEinsum", "SortSlices")
NAMES = (*models.FAMILIES, *HAND_WRITTEN)
LAYOUTS = [(w, ep) for w in (1, 2, 3, 4, 8) for ep in range(1, w + 1) if w % ep == 0]
SEQUENCES = 24  # a multiple of every number of ranks


def uneven_batch(seed: int) -> dict[str, Tensor]:
    """Most sequences repeat one token, so that routing is uneven; ranks ignore different labels."""
    batch = models.batch(seed, size=SEQUENCES, length=4)
    batch["input_ids"][SEQUENCES // 3 :] = 5
    batch["labels"][: SEQUENCES // 8, 1:] = -100  # of eight ranks, the first has no label at all
    return batch


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its canonical program, and its step on a batch that it was not traced with."""

    model: nn.Module
    program: Program
    batch: dict[str, Tensor]
    want: Step

    def local(self, ranks: int, ep: int, edp: str, **options: int) -> Program:
        return sharded(Plan(ep=ep, edp=edp, **options), ranks)(self.program)


@cache
def subject(name: str, implementation: str = "grouped_mm") -> Subject:
    """The reference of a Hugging Face model computes its experts in an eager loop."""
    if name in models.FAMILIES:
        model = models.build(f"{name}, eager")
        traced = models.build(f"{name}, {implementation}")
        traced.load_state_dict(model.state_dict())
    else:
        model = traced = models.build(name)
    batch = uneven_batch(seed=1)
    with InFloat64():
        program = canonical()(trace(traced, models.batch(seed=7, size=SEQUENCES, length=4)))
        return Subject(model, program, batch, eager_step(model, batch))


# In `make test` each model has every second layout, and each layout half of the models.
HALVES = [(name, at % 2) for at, name in enumerate(NAMES)]


@pytest.mark.parametrize(("name", "half"), sweep(product(NAMES, (0, 1)), HALVES))
def test_every_mesh_and_expert_split_computes_the_same_step(name: str, half: int) -> None:
    it = subject(name)
    for number, (ranks, ep) in list(enumerate(LAYOUTS))[half::2]:
        edp, bytes_ = ("shard", "replicate")[number // 2 % 2], (0, 64 << 20)[number // 4 % 2]
        local = it.local(ranks, ep, edp, logits_bytes=bytes_, embedding_bytes=bytes_)
        assert_same_step(simulated_step(local, whole_state(it.model), it.batch), it.want)
        record_examples()


IMPLEMENTATIONS = list(product(models.FAMILIES, ("eager", "batched_mm")))
QUICK = [(n, ("eager", "batched_mm")[at % 2]) for at, n in enumerate(models.FAMILIES)]


@pytest.mark.parametrize(("name", "implementation"), sweep(IMPLEMENTATIONS, QUICK))
def test_however_transformers_computes_experts(name: str, implementation: str) -> None:
    it = subject(name, implementation)
    have = simulated_step(it.local(4, 2, "shard"), whole_state(it.model), it.batch)
    assert_same_step(have, it.want)
    record_examples()


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    # With eps far above the rounding of float64: AdamW divides by a gradient's size, and would turn
    # the rounding of a gradient that is nearly zero into a step.
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, eps=1e-4),
}


@pytest.mark.parametrize("name", sweep(NAMES, quick=("gpt_oss",)))
def test_three_steps_of_an_optimizer_give_the_same_weights(name: str) -> None:
    it = subject(name)
    steps = [uneven_batch(seed) for seed in (1, 2, 3)]
    for optimizer in OPTIMIZERS.values():
        for ranks, ep, edp in ((2, 2, "shard"), (4, 2, "replicate"), (3, 3, "shard")):
            with InFloat64():
                assert_same_training(it.local(ranks, ep, edp), it.model, steps, optimizer)
            record_examples()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_compared_is_float64(name: str) -> None:
    it = subject(name)
    assert it.want.loss.dtype == torch.float64
    assert {g.dtype for g in it.want.gradients.values()} == {torch.float64}


def test_an_expert_that_no_token_chose_has_a_gradient_of_zeros() -> None:
    it = subject("LoopWhere")
    it.model.zero_grad(set_to_none=True)
    batch = {**it.batch, "input_ids": torch.full_like(it.batch["input_ids"], 5)}
    want = eager_step(it.model, batch)
    unused = [n for n, g in want.gradients.items() if "experts" in n and not g.any()]
    have = simulated_step(it.local(4, 4, "shard"), whole_state(it.model), batch)
    assert unused
    assert all(not have.gradients[name].any() for name in unused)
    assert_same_step(have, want)
