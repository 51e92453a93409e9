"""Mixed precision: what ranks compute is what one device computes with the same casts."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moptrace import MixedPrecisionPolicy, Plan, Program, errors, roles, trace
from moptrace.passes.default import canonical, sharded
from moptrace.passes.mixed_precision import compute_routers, mixed_precision
from moptrace.precision import convert
from moptrace.roles import Component
from moptrace.testing import (
    ModelSpec,
    SimulatedRanks,
    SimulatedSteps,
    Step,
    assert_same_step,
    computed_as,
    dtypes_of,
    eager_step,
    whole_state,
)
from sweeps import sweep
from test_train_step import ADAMW, Eager, all_of

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SPEC = ModelSpec(
    biases=True, shared="gated", attention="grouped", heads=4, balance=0.1, style="loop_where"
)
PLANS = (
    (4, Plan(ep=2)),
    (4, Plan(ep=2, edp="replicate")),
    (4, Plan(tp=2, ep=4)),
    (4, Plan(tp=4, ep=1)),
    (4, Plan(cp=2, ep=2)),
    (4, Plan(cp=2, ep=2, context="ring")),
    (4, Plan(vp=2, ep=1, logits_bytes=0, embedding_bytes=0)),
    (4, Plan(dp_replicate=2, ep=4, expert_tokens=12)),
    (8, Plan(tp=2, cp=2, dp_replicate=2, ep=4, vp=2, context="ring", logits_bytes=0)),
    # 13 words over vp=4, which are the ranks of cp and tp.
    (8, Plan(tp=2, cp=2, dp_replicate=4, ep=1, vp=4, logits_bytes=0, embedding_bytes=0)),
)
many_plans = pytest.mark.parametrize(("ranks", "plan"), sweep(PLANS, quick=PLANS[::2]), ids=str)
some_plans = pytest.mark.parametrize(("ranks", "plan"), sweep(PLANS, quick=PLANS[::4]), ids=str)


def tokens(seed: int = 0, size: int = 8, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SPEC.vocabulary, (size, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return {"input_ids": ids, "labels": labels}


@cache
def traced(held: torch.dtype, policy: MixedPrecisionPolicy, spec: ModelSpec = SPEC) -> Program:
    return canonical()(trace(convert(spec.build(held), policy), tokens(7)))


def local(held: torch.dtype, policy: MixedPrecisionPolicy, ranks: int, plan: Plan) -> Program:
    chosen = replace(plan, mixed_precision=policy).resolve(ranks, [])
    masters = dtypes_of(SPEC.build(held))
    return sharded(chosen, ranks, masters=masters)(traced(held, policy))


@cache
def wanted(held: torch.dtype, policy: MixedPrecisionPolicy) -> Step:
    return eager_step(computed_as(SPEC.build(held), policy), tokens())


def step_of(held: torch.dtype, policy: MixedPrecisionPolicy, ranks: int, plan: Plan) -> Step:
    program = local(held, policy, ranks, plan)
    return SimulatedRanks(program, whole_state(SPEC.build(held))).step(tokens())


def assert_rounded_once(have: Step, want: Step) -> None:
    """Float32 gradients of a computation in float64: equal but where 1e-10 crosses a tie."""
    assert have.loss.dtype == F64
    assert abs(float(have.loss - want.loss)) <= 1e-10 * abs(float(want.loss))
    largest = max(float(g.abs().max()) for g in want.gradients.values())
    different, elements = 0, 0
    for name, gradient in want.gradients.items():
        assert have.gradients[name].dtype == F32
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        off = (have.gradients[name].double() - gradient.double()).abs()
        different += int((off > 1e-10 * scale).sum())
        elements += off.numel()
    assert different <= elements // 2000, f"{different} of {elements} elements were rounded before"
    assert_same_step(have, want, tolerance=1.3e-7)


# --- parameters -----------------------------------------------------------------------------------


@many_plans
def test_float32_parameters_of_a_model_computed_in_float64(ranks: int, plan: Plan) -> None:
    policy = MixedPrecisionPolicy(param_dtype=F64)
    assert_rounded_once(step_of(F32, policy, ranks, plan), wanted(F32, policy))


@some_plans
def test_gradients_added_up_in_more_bits_than_the_model_computes_in(ranks: int, plan: Plan) -> None:
    policy = MixedPrecisionPolicy(param_dtype=F32, reduce_dtype=F64)
    have, want = step_of(F64, policy, ranks, plan), wanted(F64, policy)
    assert {g.dtype for g in have.gradients.values()} == {F64}
    assert_same_step(have, want, tolerance=2e-5)


def test_a_sum_over_ranks_keeps_what_fewer_bits_would_drop() -> None:
    """Two ranks' gradients, 256 and 1 in bfloat16: their sum, 257, needs nine bits."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum()

    batch = {"x": torch.tensor([[256.0, 256.0], [1.0, 1.0]])}
    found: dict[Any, Tensor] = {}
    for copies in (1, 2):
        for reduced in (None, F32):
            policy = MixedPrecisionPolicy(BF16, reduced)
            plan = Plan(dp_replicate=copies, mixed_precision=policy).resolve(2, [])
            program = canonical()(trace(convert(Scale(), policy), batch))
            program = sharded(plan, 2, masters={"weight": F32})(program)
            step = SimulatedRanks(program, whole_state(Scale())).step(batch)
            found[copies, reduced] = step.gradients["weight"]
    for copies in (1, 2):
        assert found[copies, F32].tolist() == [257.0, 257.0]
        assert found[copies, None].tolist() == [256.0, 256.0]


@some_plans
def test_a_policy_that_asks_for_what_is_there_changes_nothing(ranks: int, plan: Plan) -> None:
    same = MixedPrecisionPolicy(F64, F64, router_dtype=F64)
    program = local(F64, same, ranks, plan)
    assert str(program) == str(local(F64, MixedPrecisionPolicy(), ranks, plan))
    made_by = {p.made_by.name for p in program.history if p.made_by}
    assert not made_by & {"mixed_precision", "compute_routers"}


def test_only_parameters_of_another_dtype_are_cast_and_the_history_shows_it() -> None:
    program = local(F32, MixedPrecisionPolicy(BF16), 4, Plan(ep=2))
    made = next(p for p in program.history if p.made_by and p.made_by.name == "mixed_precision")
    casts = [n for n in made.nodes if n.target is torch.ops.aten._to_copy.default]
    assert len([n for n in casts if n.args[0].op == "placeholder"]) == len(
        made.signature.parameters
    )
    assert {p.dtype for p in made.signature.parameters} == {F32}
    assert {b.dtype for b in made.signature.buffers} == {F32}  # as in FSDP2
    assert "_to_copy" in made.diff()


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduced", [pytest.param(None, marks=pytest.mark.slow), F64])
def test_three_steps_with_master_weights_and_clipping(reduced: torch.dtype | None) -> None:
    policy, make = MixedPrecisionPolicy(F32, reduced), all_of(ADAMW)
    model = SPEC.build(F64)
    program = local(F64, policy, 4, Plan(ep=2, dp_replicate=2))
    simulated = SimulatedSteps(program, whole_state(model), make, max_norm=0.3)
    eager = Eager(computed_as(model, policy), make, max_norm=0.3)
    for seed in range(3):
        loss, norm = simulated.step(tokens(seed))
        want, want_norm = eager.step(tokens(seed))
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        assert norm is not None and norm.dtype == F64
        torch.testing.assert_close(norm, want_norm, rtol=1e-5, atol=0)
    for name, weight in simulated.weights().items():
        assert weight.dtype == F64
        torch.testing.assert_close(weight, whole_state(eager.model)[name], rtol=0, atol=1e-5)


def test_every_reduction_of_a_step_is_in_the_dtype_that_was_asked_for() -> None:
    """In the graph of a whole step: gathers in bfloat16, and gradients of parameters in float32."""
    program = local(F32, MixedPrecisionPolicy(BF16, F32), 4, Plan(ep=2, dp_replicate=2))
    held = whole_state(SPEC.build(F32))
    (step, *_) = SimulatedSteps(program, held, all_of(partial(torch.optim.SGD, lr=0.1))).programs
    moved: dict[str, set[torch.dtype]] = {}
    for node in step.nodes:
        name = str(node.target).removeprefix("moptrace.").removesuffix(".default")
        if name in ("all_gather_cast", "reduce_scatter_cast", "all_gather", "reduce_scatter"):
            moved.setdefault(name, set()).add(roles.tensor(node).dtype)
    assert moved == {"all_gather_cast": {BF16}, "reduce_scatter_cast": {F32}}


# --- inputs and outputs ---------------------------------------------------------------------------


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5, bias=False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs) * self.scale.to(inputs.dtype)


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("output", [None, F32])
def test_inputs_and_outputs_are_cast_where_fsdp_casts_them(output: torch.dtype | None) -> None:
    policy = MixedPrecisionPolicy(BF16, output_dtype=output)
    torch.manual_seed(0)
    batch = {"inputs": torch.randn(4, 6, 4), "labels": torch.randint(5, (4, 6))}
    model = Embedded()
    program = canonical()(trace(convert(copy.deepcopy(model), policy), batch, loss_fn=entropy))
    plan = Plan(mixed_precision=policy).resolve(2, [])
    result = sharded(plan, 2, masters=dtypes_of(model))(program)
    want = eager_step(computed_as(model, policy), batch, entropy)
    have = SimulatedRanks(result, whole_state(model)).step(batch)
    assert_same_step(have, want, tolerance=2e-2)
    assert [x.dtype for x in result.signature.inputs] == [F32, torch.int64]
    kept = sharded(plan, 2, keep_logits=True, masters=dtypes_of(model))(program)
    assert {roles.tensor(x).dtype for x in kept.outputs} == {output or BF16}


def test_inputs_are_left_alone_when_they_are_not_to_be_cast() -> None:
    batch = {"inputs": torch.randn(4, 6, 4), "labels": torch.randint(5, (4, 6))}
    for cast in (True, False):
        policy = MixedPrecisionPolicy(BF16, cast_forward_inputs=cast)
        program = trace(convert(Embedded(), policy), batch, loss_fn=entropy)
        given = next(n for n in program.nodes if n.name == "inputs")
        casts = [u for u in given.users if u.target is torch.ops.aten._to_copy.default]
        assert bool(casts) == cast


def test_logits_that_only_an_output_cast_reads_are_not_made() -> None:
    policy = MixedPrecisionPolicy(BF16, output_dtype=F32)
    program = local(F32, policy, 2, Plan(ep=2, logits_bytes=0))
    assert any("vocab_projection" in str(n.target) for n in program.nodes)


# --- routers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax", "corrected_sigmoid", "softmax_of_chosen"])
def test_routers_compute_in_float32_from_parameters_that_were_not_rounded(router: str) -> None:
    spec = replace(SPEC, router=router)
    policy = MixedPrecisionPolicy(BF16, router_dtype=F32)
    model = spec.build(F32)
    program = compute_routers(F32)(traced(F32, policy, spec))
    program = mixed_precision(policy, dtypes_of(model))(program)
    inside = [n for n in program.nodes if roles.component(n) == Component.ROUTER]
    values = [roles.value(n) for n in inside if isinstance(roles.value(n), Tensor)]
    assert values and not any(value.dtype == BF16 for value in values)
    found = _run(program, whole_state(model), tokens())
    (gate,) = (n for n in inside if n.target is torch.ops.aten.linear.default)
    x, weight = (found[n] for n in gate.args[:2])
    assert torch.equal(weight, model.layers[0].block.router.gate.weight)
    assert torch.equal(found[gate], nn.functional.linear(x.bfloat16().float(), weight))
    weights = next(n for n in program.nodes if "combine" in str(n.target)).args[2]
    assert roles.tensor(weights).dtype == BF16


def _run(program: Program, state: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[Any, Tensor]:
    """Every value of a program on one device."""
    signature = program.signature
    held = [
        torch.stack([state[n] for n in p.stacked]) if p.stacked else state[p.fqn]
        for p in signature.parameters
    ]
    given = [*held, *(state[b.fqn] for b in signature.buffers), *batch.values()]
    interpreter = fx.Interpreter(program.module(), garbage_collect_values=False)
    interpreter.run(*given)
    by_name = {node.name: value for node, value in interpreter.env.items()}
    return {node: by_name[node.name] for node in program.nodes if node.name in by_name}


@some_plans
def test_routers_in_more_bits_under_every_plan(ranks: int, plan: Plan) -> None:
    policy = MixedPrecisionPolicy(F32, router_dtype=F64)
    have, want = step_of(F64, policy, ranks, plan), wanted(F64, policy)
    assert_same_step(have, want, tolerance=2e-5)


# --- refusals -------------------------------------------------------------------------------------


def test_a_policy_that_would_lose_bits_is_refused() -> None:
    with pytest.raises(errors.PlanError, match=r"reduce_dtype=torch\.bfloat16"):
        MixedPrecisionPolicy(F32, BF16)
    with pytest.raises(errors.PlanError, match="param_dtype is a floating-point dtype"):
        MixedPrecisionPolicy(torch.int8)
    with pytest.raises(errors.PlanError, match=r"reduce_dtype=torch\.bfloat16"):
        local(F32, MixedPrecisionPolicy(reduce_dtype=BF16), 2, Plan(ep=2))
