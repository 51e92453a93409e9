"""Tokens go to their experts in chunks: the same step, and a bound on what comes to a rank."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import models
import moptrace.simulate
from double import InFloat64
from gloo import Ranks
from moptrace import Plan, Program, errors, roles, trace
from moptrace.collectives import Collective
from moptrace.kernels import chunks
from moptrace.passes.chunk_experts import chunk_experts
from moptrace.passes.default import canonical, sharded
from moptrace.recompute import Region, with_regions
from moptrace.roles import Component
from moptrace.rules import rule_for
from moptrace.testing import (
    SimulatedRanks,
    Step,
    assert_same_step,
    eager_step,
    simulated_step,
    whole_state,
)
from subjects import batch, step_on_a_rank, subject
from sweeps import sweep

ops = torch.ops.moptrace

# 144 tokens in all. Chunks of one size and of two, of more tokens than a rank has, and one for all.
PLANS = (
    (1, Plan(ep=1, expert_tokens=50)),
    (4, Plan(ep=2, expert_tokens=7)),
    (4, Plan(ep=4, expert_tokens=10, expert_chunks="contiguous")),
    (6, Plan(ep=3, edp="replicate", expert_tokens=9, recompute_experts=False)),
    (4, Plan(ep=4, tp=2, expert_tokens=100)),
    (4, Plan(ep=2, cp=2, recompute_experts=True)),
)


def local(name: str, world: int, plan: Plan) -> Program:
    with InFloat64():
        return sharded(plan.resolve(world, []), world)(subject(name)[1])


@pytest.mark.parametrize(("world", "plan"), PLANS, ids=str)
@pytest.mark.parametrize(
    "name", sweep(["LoopWhere", "gpt_oss", "deepseek_v3"], quick=["LoopWhere"])
)
def test_the_step_is_the_same(name: str, world: int, plan: Plan) -> None:
    model, _ = subject(name)
    fed = batch(1)
    with InFloat64():
        want = eager_step(model, fed)
        found = simulated_step(local(name, world, plan), whole_state(model), fed)
    assert_same_step(found, want)


def test_the_step_is_the_same_on_real_ranks(ranks: Callable[[int], Ranks]) -> None:
    model, _ = subject("OneHotEinsum")
    fed, plan = batch(1), Plan(ep=2, expert_tokens=10)
    want = eager_step(model, fed)
    for loss, gradients in ranks(4)(step_on_a_rank, "OneHotEinsum", model.state_dict(), plan, fed):
        assert_same_step(Step(loss, gradients, {}), want)


def test_one_chunk_computes_the_same_bits_as_none() -> None:
    model, _ = subject("gpt_oss")
    with InFloat64():
        one, other = (
            simulated_step(local("gpt_oss", 4, plan), whole_state(model), batch(1))
            for plan in (Plan(ep=2), Plan(ep=2, recompute_experts=True))
        )
    assert torch.equal(one.loss, other.loss)
    assert all(torch.equal(g, other.gradients[name]) for name, g in one.gradients.items())


# --- the bound ------------------------------------------------------------------------------------


def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that come to each rank, each time that rows are sent."""
    seen: list[int] = []
    run = moptrace.simulate._mean

    def watched(row: Collective, *rest: Any) -> tuple[Tensor, ...]:
        results = run(row, *rest)
        seen.extend(len(x) for x in results if row.name == "send_rows")
        return results

    monkeypatch.setattr(moptrace.simulate, "_mean", watched)
    return seen


def test_no_rank_gets_more_rows_than_the_bound_under_any_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal tokens choose equal experts: every row of the batch goes to one or two experts."""
    model, _ = subject("mixtral")
    fed = batch(1)
    fed["input_ids"][:] = 3
    seen = arrivals(monkeypatch)
    choices = 2
    for plan, bound in (
        (Plan(ep=4), 144 * choices),
        (Plan(ep=4, expert_tokens=6), 4 * 6 * choices),
    ):
        seen.clear()
        program = local("mixtral", 4, plan)
        with InFloat64():
            simulated_step(program, whole_state(model), fed)
        assert bound / 2 <= max(seen) <= bound
    said = "in 6 chunks of at most 6: under any router, no more than 48 rows (6,144 bytes)"
    assert any(said in note for note in program.notes)


class Kept:
    """The bytes that autograd keeps from forward to backward, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() < 0:  # not in backward
            storage = x.untyped_storage()
            self.storages[storage._cdata] = storage
        return x

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def kept_by(plan: Plan) -> int:
    simulated = SimulatedRanks(local("mixtral", 4, plan), whole_state(subject("mixtral")[0]))
    kept = Kept()
    with InFloat64(), torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x):
        simulated.step(batch(1))
    return kept.bytes


def test_backward_computes_rows_again_instead_of_keeping_them() -> None:
    """Of 144 tokens, 288 rows of 16 go to two layers' experts, which make 32 and 16 units of them.

    A product's result, its activation, what comes and what goes back: more than 64 numbers a row.
    """
    rows = 2 * 288 * 8
    everything = kept_by(Plan(ep=2, expert_tokens=9, recompute_experts=False))
    assert everything - kept_by(Plan(ep=2, expert_tokens=9)) > rows * 64


def test_routing_is_not_computed_again() -> None:
    graph = with_regions(local("deepseek_v3", 4, Plan(ep=2, expert_tokens=9)).graph)
    regions = [node.target for node in graph.nodes if isinstance(node.target, Region)]
    inside = [node for region in regions for node in region.graph.nodes]
    assert len(regions) == 4 and {n.target for n in inside} >= {ops.send_rows.default}
    computed = [node for node in inside if node.op == "call_function"]
    assert Component.ROUTER not in map(roles.component, computed)


def noisy(hidden: Tensor) -> Tensor:
    return torch.dropout(hidden.relu(), 0.5, train=True)


def test_a_draw_is_the_same_again_and_another_in_each_chunk() -> None:
    torch.manual_seed(0)
    model = models.LoopedExperts(noisy).double()
    fed = {k: v.clamp(max=10) for k, v in batch(1).items()}
    fed["input_ids"][:] = 3  # equal tokens differ by their draws alone
    program = canonical()(trace(model, fed))
    steps = [
        simulated_step(
            sharded(Plan(ep=2, expert_tokens=24, recompute_experts=again).resolve(2, []), 2)(
                program
            ),
            whole_state(model),
            fed,
        )
        for again in (False, True)
    ]
    assert torch.equal(steps[0].loss, steps[1].loss)
    for name, gradient in steps[0].gradients.items():
        torch.testing.assert_close(steps[1].gradients[name], gradient, rtol=1e-12, atol=1e-12)


# --- what it is made of ---------------------------------------------------------------------------


@given(st.integers(0, 20), st.integers(1, 7), st.sampled_from(["strided", "contiguous"]))
def test_each_token_is_in_one_chunk_and_comes_back_to_its_place(
    tokens: int, number: int, order: str
) -> None:
    split, join = (getattr(chunks, f"{name}_{order}") for name in ("split", "join"))
    x = torch.arange(2.0 * tokens).view(tokens, 2).requires_grad_()
    parts = split(x, number)
    assert [len(part) for part in parts] == [-(-(tokens - i) // number) for i in range(number)]
    joined = join(parts)
    assert torch.equal(joined, x)
    (gradient,) = torch.autograd.grad(joined, x, x.detach().cos())
    assert torch.equal(gradient, x.cos())


def test_rows_that_something_else_uses_are_not_divided() -> None:
    program = local("mixtral", 2, Plan(ep=2))
    graph, _ = program.copy_graph()
    (first, *_) = graph.find_nodes(op="call_function", target=ops.dispatch.default)
    rows = next(x for x in first.users if x.target is getitem and x.args[1] == 0)
    with graph.inserting_before(graph.output_node()):
        kept = graph.call_function(torch.ops.aten.relu.default, (rows,))
    roles.copy_role(kept, of=rows)
    roles.set_value(kept, roles.value(rows))
    roles.set_role(kept, rule=rule_for(kept))
    result = chunk_experts(10)(program.with_graph(graph))
    assert "all tokens of block 0 go to their experts at once" in result.notes[-2]
    assert "in 8 chunks of at most 9" in result.notes[-1]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(expert_tokens=0), "leaves no token to a chunk"),
        (Plan(expert_chunks="halves"), "is 'strided' or 'contiguous', not 'halves'"),
    ],
)
def test_a_plan_without_sense_is_refused(plan: Plan, says: str) -> None:
    with pytest.raises(errors.PlanError, match=says):
        plan.resolve(2, [4])
