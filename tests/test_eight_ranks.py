"""Plans that mix every kind of parallelism, on eight real ranks: the step of one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from gloo import Ranks
from moptrace import MixedPrecisionPolicy, Plan, parallelize
from moptrace.testing import ModelSpec, Step, assert_same_step, computed_as, eager_step
from sweeps import sweep

RANKS = 8
SPEC = ModelSpec(
    experts=6, biases=True, shared="gated", attention="grouped", heads=4, tied=True, balance=0.1
)
MIXED = MixedPrecisionPolicy(param_dtype=torch.float64)
PLANS = (
    Plan(tp=2, cp=2, ep=4, vp=2, context="ring", logits_bytes=0),
    Plan(dp_replicate=2, ep=8, mixed_precision=MIXED),
    Plan(cp=4, ep=2, context="ulysses"),
    Plan(tp=4, dp_replicate=2, ep=2, edp="replicate", mixed_precision=MIXED),
    Plan(vp=4, ep=4, logits_bytes=0, embedding_bytes=0),
    Plan(pp=2, tp=2, ep=4, mixed_precision=MIXED),
    Plan(pp=4, ep=2, micro_batches=2, logits_bytes=0, embedding_bytes=0),
)


def tokens() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, SPEC.vocabulary, (8, 8), generator=generator)
    labels = ids.clone()
    labels[:4, 3:] = -100  # the first ranks have fewer labels that matter
    return {"input_ids": ids, "labels": labels}


def on_rank_a_step(plan: Plan) -> None:
    held = torch.float64 if plan.mixed_precision.param_dtype is None else torch.float32
    # A load-balancing loss is a mean over micro-batches; without stages there is one.
    staged = replace(SPEC, layers=("moe", "dense", "moe", "dense"), balance=0.0)
    model = (SPEC if plan.pp == 1 else staged).build(held)
    want = eager_step(computed_as(model, plan.mixed_precision), tokens())
    model.zero_grad()
    sequences = plan.cp * plan.tp
    share = len(tokens()["labels"]) * sequences * plan.pp // RANKS
    fed = {k: x[:share, : 8 // sequences] for k, x in tokens().items()}
    wrapped = parallelize(model, init_device_mesh("cpu", (RANKS,)), plan, batch=fed)
    loss, _ = wrapped(**wrapped.local_batch(tokens()))
    loss.backward()
    whole = wrapped.full_gradients()
    have = Step(loss.detach(), {n: whole[n] for n in want.gradients}, {})  # type: ignore[misc]
    torch.testing.assert_close(have.loss, want.loss, rtol=1e-10, atol=0)
    assert {g.dtype for g in have.gradients.values()} == {held}
    assert_same_step(have, want, 1e-10 if held == torch.float64 else 3e-7)


@pytest.mark.parametrize("plan", sweep(PLANS, quick=PLANS[:1]), ids=str)
def test_mixed_plans_compute_the_step_of_one_device(
    plan: Plan, ranks: Callable[[int], Ranks]
) -> None:
    ranks(RANKS)(on_rank_a_step, plan)
