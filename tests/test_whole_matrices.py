"""Optimizers that need whole matrices: one owner computes each, and the result is one device's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from gloo import Ranks
from moptrace import Program, errors, roles, train_step
from moptrace.collectives import COLLECTIVES
from moptrace.kernels.matrix_function import MatrixFunction
from moptrace.roles import Component
from moptrace.testing import SimulatedSteps, assert_same_weights, whole_state
from moptrace.whole_matrices import Cut
from sweeps import sweep
from test_train_step import (
    ADAMW,
    SMALL,
    Eager,
    Named,
    all_of,
    assert_close,
    assert_same_steps,
    batch_of,
    local_program,
    parallel_of,
)

Pools = Callable[[int], Ranks]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
UNEVEN = replace(SMALL, hidden=6, vocabulary=19, experts=5)
STACKED = replace(SMALL, style="canonical")  # the user's own parameters are [E, d, f]


class Orthogonal(torch.optim.Optimizer):
    """A user's own Muon, in the dtype of the gradients; matrices and stacks of them."""

    def __init__(self, params: Any, lr: float = 0.02):
        super().__init__(params, {"lr": lr, "decay": 0.1, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p]
                if not held:
                    held["momentum"] = torch.zeros_like(p)
                held["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(held["momentum"], group["momentum"])
                if p.dim() >= 2:
                    update = self.orthogonal(update) * max(1, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"])

    def orthogonal(self, x: Tensor) -> Tensor:
        is_high = x.shape[-2] > x.shape[-1]
        x = x.mT if is_high else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(3):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if is_high else x


class ByRow(torch.optim.Optimizer):
    """Divides each row by a mean of its squares that it keeps, and all by a norm of the weights."""

    def __init__(self, params: Any, lr: float = 0.02, trust: bool = False):
        super().__init__(params, {"lr": lr, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p]
                squares = p.grad.square().mean(-1, keepdim=True)
                if not held:
                    held["rows"] = torch.zeros_like(squares)
                held["rows"].lerp_(squares, 0.1)
                update = p.grad / (held["rows"].sqrt() + 1e-3)
                scale = (p.norm() + 1e-3).item() if group["trust"] else 1.0
                p.add_(update, alpha=-group["lr"] * scale)


def muon_and_adamw(named: Named) -> Sequence[torch.optim.Optimizer]:
    """As users of Muon do. Its constructor refuses stacked experts, which it takes as a group."""
    matrices = {n: x for n, x in named.items() if "weight" in n and x.dim() > 1}
    muon = torch.optim.Muon([x for x in matrices.values() if x.dim() == 2], lr=0.02)
    if stacked := [x for x in matrices.values() if x.dim() == 3]:
        muon.add_param_group({"params": stacked})
    return muon, ADAMW([x for n, x in named.items() if n not in matrices])


class Several(torch.optim.Optimizer):
    """Several optimizers that one device calls as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([p for part in parts for p in part.param_groups[0]["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


ADAFACTOR = partial(torch.optim.Adafactor, lr=0.05, eps=(1e-3, 1e-3), weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[[Named], Optimizers]] = {
    "Orthogonal": all_of(Orthogonal),
    "Muon and AdamW": muon_and_adamw,
    "Adafactor": all_of(ADAFACTOR),
    "ByRow": all_of(ByRow),
    "ByRow, trust": all_of(partial(ByRow, trust=True)),
}
PLANS: tuple[dict[str, Any], ...] = (
    {"ep": 2, "etp": 2},
    {"ep": 2, "tp": 2},
    {"ep": 2, "edp": "replicate", "vp": 2, "logits_bytes": 0},
    {"ep": 4, "dp_replicate": 2},
    {"ep": 1, "etp": 2, "edp": "shard"},
    {"ep": 2, "cp": 2, "dp_replicate": 4, "edp": "replicate"},
)


def eager(spec: Any, make: Callable[[Named], Optimizers], max_norm: float | None = None) -> Eager:
    def one(named: Named) -> torch.optim.Optimizer:
        made = make(named)
        return made if isinstance(made, torch.optim.Optimizer) else Several(made)

    return Eager(spec.build(), one, max_norm)


def simulated(spec: Any, plan: Mapping[str, Any], make: Any, *options: Any, **more: Any) -> Any:
    local = local_program(spec, 4, **plan)
    return SimulatedSteps(local, whole_state(spec.build()), make, *options, **more)


QUICK = [(plan, name) for plan, name in zip(PLANS, [*OPTIMIZERS, "Orthogonal"], strict=True)]


@pytest.mark.parametrize(
    ("plan", "name"),
    sweep([(plan, name) for plan in PLANS for name in OPTIMIZERS], quick=QUICK),
    ids=str,
)
def test_ten_steps_are_those_of_one_device(plan: dict[str, Any], name: str) -> None:
    make = OPTIMIZERS[name]
    assert_same_steps(
        simulated(SMALL, plan, make, 0.5), eager(SMALL, make, 0.5), [batch_of(i) for i in range(10)]
    )


@pytest.mark.parametrize("name", sweep(OPTIMIZERS, quick=("Orthogonal",)))
@pytest.mark.parametrize("spec", [UNEVEN, STACKED], ids=["uneven", "stacked"])
def test_shards_of_any_size_and_the_users_own_stacks(spec: Any, name: str) -> None:
    make = OPTIMIZERS[name]
    if spec is STACKED and name == "Muon and AdamW":
        pytest.skip("torch.optim.Muon takes matrices alone")
    steps = [batch_of(i) for i in range(3)]
    assert_same_steps(simulated(spec, {"ep": 2}, make), eager(spec, make), steps)
