"""What backward gathers or computes again: the same bits, and less memory between."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from moptrace import Plan, Program, roles, trace
from moptrace.liveness import peak_memory
from moptrace.passes.default import canonical, sharded
from moptrace.passes.recompute import regather
from moptrace.testing import ModelSpec, SimulatedSteps, whole_state
from subjects import assert_same_bits
from sweeps import sweep

ops = torch.ops.moptrace

# Large experts, so that the gathered weights are most of the memory.
SPEC = ModelSpec(
    layers=("moe", "moe", "moe"), width=16, hidden=64, vocabulary=16, experts=4, style="canonical"
)

PLAN = Plan(ep=2)


def batch_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 16, (4, 4), generator=generator)
    return {"input_ids": ids, "labels": ids}


@cache
def local(plan: Plan = PLAN) -> Program:
    return sharded(plan, 4)(canonical()(trace(SPEC.build(), batch_of(9))))


def steps(schedule: object = None, accumulate: int = 1, plan: Plan = PLAN) -> SimulatedSteps:
    def make(named: dict[str, Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(named.values(), lr=0.01)

    state = whole_state(SPEC.build())
    return SimulatedSteps(local(plan), state, make, 1.0, accumulate, schedule)  # type: ignore[arg-type]


def gathers(program: Program, backward: bool) -> list[int]:
    """The bytes of the gathered weights."""
    return [
        roles.tensor(node).numel() * roles.tensor(node).element_size()
        for node in program.nodes
        if node.target is ops.all_gather.default and roles.role(node).backward == backward
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_is_bitwise_the_same(accumulate: int) -> None:
    assert_same_bits(steps(None, accumulate), steps(regather(), accumulate), batches_of(accumulate))


def batches_of(accumulate: int) -> list[list[dict[str, Tensor]]]:
    fed = [batch_of(seed) for seed in range(2 * accumulate)]
    return [fed[:accumulate], fed[accumulate:]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_backward_gathers_what_its_forward_did(accumulate: int) -> None:
    program = steps(None, accumulate).programs[0]
    again = regather()(program)
    assert gathers(program, backward=True) == []
    assert gathers(again, backward=False) == gathers(program, backward=False)
    used = sorted(gathers(again, backward=True))
    assert len(used) >= 9 * accumulate  # three weights of three layers
    assert len(used) % accumulate == 0


def test_only_what_is_large_is_gathered_again() -> None:
    program = steps().programs[0]
    sizes = gathers(program, backward=False)
    limit = max(sizes) - 1
    some = gathers(regather(above=limit)(program), backward=True)
    assert some and all(size > limit for size in some)
    assert gathers(regather(above=max(sizes))(program), backward=True) == []


def test_the_peak_is_lower() -> None:
    program = steps().programs[0]
    before, after = peak_memory(program), peak_memory(regather()(program))
    assert after.bytes < 0.95 * before.bytes


def test_every_expert_weight_is_gathered_twice() -> None:
    program = regather()(steps().programs[0])
    names = {p.name for p in program.signature.parameters}
    sources = [n.all_input_nodes[0] for n in program.nodes if n.target is ops.all_gather.default]
    gathered = [x.name for x in sources if x.name in names]
    assert len(set(gathered)) == 9 and all(gathered.count(name) == 2 for name in gathered)


# --- regions --------------------------------------------------------------------------------------

KEPT = replace(PLAN, expert_tokens=2, recompute_experts=False)
AGAIN = replace(PLAN, expert_tokens=2, recompute_experts=True)


@pytest.mark.parametrize("accumulate", sweep([1, 2], quick=[1]))
def test_regions_computed_again_give_the_same_bits(accumulate: int) -> None:
    plain, again = steps(None, accumulate, KEPT), steps(regather(), accumulate, AGAIN)
    assert_same_bits(plain, again, batches_of(accumulate))


def test_backward_sends_the_rows_of_regions_again() -> None:
    def sent(program: Program, backward: bool) -> int:
        """How often rows go to experts; of the backward, the transposes of returns are apart."""
        sends = [n for n in program.nodes if n.target is ops.send_rows.default]
        return len([n for n in sends if roles.role(n).backward == backward])

    kept, again = (steps(plan=plan).programs[0] for plan in (KEPT, AGAIN))
    assert (
        sent(kept, backward=False) == sent(again, backward=False) == 6
    )  # two chunks, three layers
    assert sent(again, backward=True) - sent(kept, backward=True) == 6
    assert not any(roles.role(n).recompute for n in again.nodes if roles.role(n).backward)


def test_the_peak_is_lower_with_regions() -> None:
    plain, again = (steps(plan=plan) for plan in (KEPT, AGAIN))
    program = local(AGAIN)
    assert any(roles.role(node).recompute for node in program.nodes)
    assert peak_memory(again.programs[0]).bytes < peak_memory(plain.programs[0]).bytes
