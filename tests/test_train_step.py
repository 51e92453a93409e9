"""The training step as one graph: the same losses, norms, weights and state as on one device."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from _report import record_examples
from gloo import Ranks
from moptrace import ParallelModule, Plan, Program, errors, parallelize, roles, trace, train_step
from moptrace.passes.clip_gradients import clip_gradients
from moptrace.passes.default import canonical, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.regather import regather
from moptrace.roles import Component
from moptrace.testing import (
    ModelSpec,
    SimulatedRanks,
    SimulatedSteps,
    assert_same_weights,
    batches,
    meshes,
    model_specs,
    plans,
    whole_state,
)

Pools = Callable[[int], Ranks]
Named = Mapping[str, Tensor]
Make = Callable[[Named], torch.optim.Optimizer]

# With eps far above the rounding of float64: what divides by a gradient's size would turn the
# rounding of a gradient that is nearly zero into a step.
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, eps=1e-4)
SMALL = ModelSpec(layers=("moe", "dense"), biases=True, shared="gated", attention=True)


class Averaged(torch.optim.Optimizer):
    """A user's own: momentum whose weight grows with a count of steps, and the sign of it."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr, "decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                held = self.state[p]
                if not held:
                    held["step"] = torch.zeros(())
                    held["mean"] = torch.zeros_like(p)
                held["step"] += 1
                held["mean"].lerp_(p.grad, 1 / (1 + held["step"].item()))
                p.mul_(1 - group["lr"] * group["decay"])
                p.sub_(group["lr"] * torch.tanh(10 * held["mean"]))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": ADAMW,
    "AdamW, fused": partial(ADAMW, fused=True),
    "AdamW, lr a tensor": partial(ADAMW, lr=torch.tensor(0.01, dtype=torch.float64)),
    "Adam, amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True, eps=1e-4),
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.2, nesterov=False),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05, eps=1e-4),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, eps=1e-4),
    "Averaged": partial(Averaged, lr=0.01),
}


def batch_of(seed: int, size: int = 8, length: int = 6) -> dict[str, Tensor]:
    """Other labels are ignored in every batch, and most by the first ranks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 13, (size, length), generator=generator)
    labels = ids.clone()
    labels[: size // 2, 2 + seed % 3 :] = -100
    return {"input_ids": ids, "labels": labels}


@cache
def local_program(spec: ModelSpec, ranks: int, size: int = 8, **options: Any) -> Program:
    plan = Plan(**options).resolve(ranks, [spec.experts])
    return sharded(plan, ranks)(canonical()(trace(spec.build(), batch_of(99, size))))


def all_of(make: Callable[..., torch.optim.Optimizer]) -> Make:
    return lambda named: make(list(named.values()))


class Eager:
    """The unsharded model in eager PyTorch, as a user would train it."""

    def __init__(self, model: nn.Module, make: Make, max_norm: float | None = None):
        self.model, self.max_norm = copy.deepcopy(model), max_norm
        self.optimizer = make(dict(self.model.named_parameters()))

    def step(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        self.optimizer.zero_grad()
        loss = self.model(**batch)[0]
        loss.backward()
        return loss.detach(), self.finish()

    def finish(self) -> Tensor | None:
        """Clip and update; an expert that no token chose has a gradient of zeros, as in a graph."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = None
        if self.max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return norm


def assert_close(have: Tensor | None, want: Tensor | None) -> None:
    assert have is not None and want is not None
    torch.testing.assert_close(have, want, rtol=1e-10, atol=0.0)


def assert_same_steps(simulated: SimulatedSteps, eager: Eager, steps: Sequence[Any]) -> None:
    for batch in steps:
        loss, norm = simulated.step(batch)
        want_loss, want_norm = eager.step(batch)
        assert_close(loss, want_loss)
        if want_norm is not None:
            assert_close(norm, want_norm)
    assert_same_weights(simulated.weights(), whole_state(eager.model))


# --- any model, mesh, plan, optimizer -------------------------------------------------------------

LENGTH = 6
EXAMPLES = 60
SCHEDULES = (None, regather())


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_any_step_is_that_of_one_device(data: st.DataObject) -> None:
    spec = data.draw(model_specs(), label="model")
    size = data.draw(st.sampled_from([4, 6]), label="sequences")
    ranks = data.draw(meshes(size).filter(lambda n: n <= 4), label="ranks")
    plan = data.draw(plans(ranks, LENGTH), label="plan")
    make = all_of(OPTIMIZERS[data.draw(st.sampled_from(sorted(OPTIMIZERS)), label="optimizer")])
    max_norm = data.draw(st.sampled_from([None, 0.3, math.inf]), label="max_norm")
    schedule = data.draw(st.sampled_from(SCHEDULES), label="schedule")
    traced, *fed = (data.draw(batches(spec.vocabulary, size, LENGTH)) for _ in range(3))
    model = spec.build()
    local = sharded(plan, ranks)(canonical()(trace(model, traced)))
    simulated = SimulatedSteps(local, whole_state(model), make, max_norm, schedule=schedule)
    assert_same_steps(simulated, Eager(model, make, max_norm), fed)
    record_examples(of="training step")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_of_any_elementwise_optimizer(name: str) -> None:
    make = all_of(OPTIMIZERS[name])
    model = SMALL.build()
    local = local_program(SMALL, 4, ep=2)
    simulated = SimulatedSteps(local, whole_state(model), make, max_norm=0.5)
    assert_same_steps(simulated, Eager(model, make, 0.5), [batch_of(i) for i in range(10)])
