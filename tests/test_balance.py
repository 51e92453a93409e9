"""Experts that ranks lend each other: whoever computes a row, the step is the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moptrace.simulate
from double import InFloat64
from gloo import Ranks
from moptrace import Balance, Dropping, Plan, Program, errors, parallelize, roles, trace, train_step
from moptrace.check import check
from moptrace.collectives import Communicator
from moptrace.core import chain
from moptrace.explain import explain
from moptrace.kernels.balancing import least_loaded, plan_balance, spread_pairs
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.drop_tokens import drop_tokens
from moptrace.passes.recompute import regather
from moptrace.placement import Layout, chunk_sizes
from moptrace.testing import (
    ModelSpec,
    SimulatedSteps,
    Step,
    assert_same_step,
    assert_same_weights,
    eager_step,
    simulated_step,
    unsharded_step,
    whole_state,
)
from subjects import batch, step_on_a_rank, subject
from sweeps import sweep
from test_train_step import ADAMW, Eager, all_of, assert_close

ops = torch.ops.moptrace


# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The counts of each source, and what a plan may do."""

    table: list[list[int]]
    sizes: tuple[int, ...]
    places: int
    threshold: float
    cap: float
    rows: int

    @property
    def counts(self) -> list[int]:
        return [sum(column) for column in zip(*self.table, strict=True)]

    @property
    def limits(self) -> tuple[float, float, int]:
        return self.threshold, self.cap, self.rows

    def owned(self) -> list[range]:
        ends = [sum(self.sizes[: r + 1]) for r in range(len(self.sizes))]
        return [range(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts, ranks = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    sizes = chunk_sizes(experts, (ranks,))
    loads = st.sampled_from([0, 0, 1, 3, 7, 40])
    row = st.lists(loads, min_size=experts, max_size=experts)
    table = draw(st.lists(row, min_size=ranks, max_size=ranks))
    guests = draw(st.none() | st.integers(1, 3))
    balance = Balance(
        draw(st.sampled_from([1.0, 1.3, 2.0])),
        draw(st.sampled_from([1.0, 1.1, 1.5])),
        draw(st.sampled_from([1, 5, 30])),
        guests,
    )
    limits = balance.threshold, balance.cap, balance.rows
    return Case(table, sizes, balance.places(sizes), *limits)


@settings(deadline=None)
@given(cases())
def test_no_rank_is_over_the_cap_unless_nothing_fits(case: Case) -> None:
    held = least_loaded(case.counts, case.sizes, case.places, *case.limits)
    for expert, count in enumerate(case.counts):  # every row is computed once
        assert sum(own.get(expert, 0) for own in held) == count
    loads = [sum(own.values()) for own in held]
    native = [sum(case.counts[e] for e in own) for own in case.owned()]
    mean = sum(native) / len(native)
    if max(native) <= case.threshold * mean:
        assert loads == native and [len(own) for own in held] == list(case.sizes)
        return
    limit = math.ceil(case.cap * mean - 1e-9)
    room = [limit - load for load, own in zip(loads, held, strict=True) if len(own) < case.places]
    for load, before, own, experts in zip(loads, native, held, case.owned(), strict=True):
        assert len(own) <= case.places and list(own)[: len(experts)] == list(experts)
        guests = [count for expert, count in own.items() if expert not in experts]
        assert all(count >= case.rows for count in guests)
        assert load <= max(limit, before)
        movable = max((own[e] for e in experts), default=0)
        assert min(load - limit, movable, max(room, default=0)) < case.rows


@settings(deadline=None)
@given(cases())
def test_each_source_divides_its_rows_as_all_do(case: Case) -> None:
    held = least_loaded(case.counts, case.sizes, case.places, *case.limits)
    table = torch.tensor(case.table)
    shares, hosts = plan_balance(table, case.sizes, case.places, *case.limits)
    assert int(shares.min()) >= 0
    for expert, count in enumerate(case.counts):
        mine = (hosts == expert).nonzero().flatten()
        assert torch.equal(shares[:, mine].sum(1), table[:, expert])
        for place in mine.tolist():
            quota = held[place // case.places][expert]
            assert shares[:, place].sum() == quota
            even = table[:, expert] * quota / max(count, 1)
            assert (shares[:, place] - even).abs().max() < 2
    assert shares[:, hosts < 0].sum() == 0
    for own, here in zip(case.owned(), hosts.view(-1, case.places).tolist(), strict=True):
        guests = [e for e in here[len(own) :] if e >= 0]
        assert here[: len(own)] == list(own) and guests == sorted(guests)
    again = plan_balance(table.view(1, *table.shape), case.sizes, case.places, *case.limits)
    assert torch.equal(again[0][0], shares) and torch.equal(again[1], hosts)


@settings(deadline=None)
@given(cases(), st.integers(0, 9), st.booleans())
def test_every_pair_goes_to_a_place_of_its_expert(case: Case, seed: int, some: bool) -> None:
    shares, hosts = plan_balance(torch.tensor(case.table), case.sizes, case.places, *case.limits)
    for source, own in zip(case.table, shares, strict=True):
        number = len(source)
        pairs = torch.arange(number).repeat_interleave(torch.tensor(source))
        pairs = torch.cat([pairs, torch.full((3 * some,), number)])  # some have no row
        generator = torch.Generator().manual_seed(seed)
        experts = pairs[torch.randperm(len(pairs), generator=generator)].view(-1, 1)
        places = spread_pairs(experts, own, hosts, number)
        chosen = torch.cat([hosts, torch.tensor([number])])
        assert torch.equal(chosen[places], experts)
        assert torch.equal(places.flatten().bincount(minlength=len(hosts))[: len(hosts)], own)


def test_the_operators_are_registered_correctly() -> None:
    table = torch.tensor([[90, 2, 4, 4], [80, 0, 1, 3]])
    torch.library.opcheck(ops.plan_balance.default, (table, [2, 2], 3, 1.3, 1.0, 1))
    shares, hosts = plan_balance(table, [2, 2], 3, 1.3, 1.0, 1)
    experts = torch.arange(4).repeat_interleave(table[0]).view(-1, 2)
    torch.library.opcheck(ops.spread_pairs.default, (experts, shares[0], hosts, 4))
    torch.library.opcheck(ops.count_pairs.default, (experts, 4))


@pytest.mark.parametrize("chunks", [2, 3, 10, 13])
def test_any_part_of_the_tokens_is_balanced_as_all_are(chunks: int) -> None:
    """Neighbours and every K-th token alike: where halves alternate, odd and even would not be."""
    table = torch.tensor([[6000, 0, 0, 0]])
    shares, hosts = plan_balance(table, [1, 1, 1, 1], 2, 1.3, 1.0, 1)
    places = spread_pairs(torch.zeros(6000, 1, dtype=torch.int64), shares[0], hosts, 4).flatten()
    parts = [places[i::chunks] for i in range(chunks)] + list(places.chunk(chunks))
    for part in parts:
        loads = part.bincount(minlength=8).view(4, 2).sum(1)
        assert int(loads.max()) <= len(part) / 4 * 1.04 + 1


# --- many ranks -----------------------------------------------------------------------------------

SPEC = ModelSpec(experts=5, biases=True, shared="gated", attention="fused", balance=0.1)
EAGERLY = Balance(threshold=1.0, rows=1)


@cache
def traced(spec: ModelSpec) -> Program:
    return canonical()(trace(spec.build(), some_batch(7)))


def some_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(13, (8, 12), generator=generator)
    labels = torch.randint(13, (8, 12), generator=generator)
    labels[0, 2:] = -100
    return {"input_ids": ids, "labels": labels}


def local(spec: ModelSpec, ranks: int, plan: Plan) -> Program:
    return sharded(plan.resolve(ranks, [spec.experts]), ranks)(traced(spec))


def assert_same(spec: ModelSpec, ranks: int, plan: Plan, fed: dict[str, Tensor]) -> None:
    model, program = spec.build(), local(spec, ranks, plan)
    assert program.graph.find_nodes(op="call_function", target=ops.send_experts.default)
    found = replace(simulated_step(program, whole_state(model), fed), buffers={})
    assert_same_step(found, eager_step(model, fed))


def balanced(**options: Any) -> Plan:
    return Plan(**{"balance": EAGERLY, **options})


PLANS = (
    (2, balanced(ep=2)),
    (3, balanced(ep=3, cp=3, context="ring")),
    (4, balanced(ep=2)),
    (4, balanced(ep=4)),
    (4, balanced(ep=2, etp=2)),
    (8, balanced(ep=2, etp=2, count_tokens=True)),
    (4, balanced(ep=2, edp="replicate", dp_replicate=2)),
    (8, balanced(ep=2, cp=2, tp=2, recompute_experts=True)),
    (4, balanced(ep=4, expert_tokens=7)),
    (4, balanced(ep=2, expert_tokens=7, expert_chunks="contiguous", recompute_experts=False)),
    (4, balanced(ep=4, balance=replace(EAGERLY, guests=1))),
    (8, balanced(ep=8)),  # three ranks have no expert
)
QUICK = PLANS[1:3] + PLANS[5:10] + PLANS[11:]


@pytest.mark.parametrize(("ranks", "plan"), sweep(PLANS, QUICK), ids=str)
def test_lent_experts_compute_the_same_step(ranks: int, plan: Plan) -> None:
    assert_same(SPEC, ranks, plan, some_batch(1))


def test_what_is_dropped_is_not_balanced() -> None:
    plan = balanced(ep=4, dropping=Dropping(0.75))
    reduced = drop_tokens(plan.dropping, groups=((4, 1),))(traced(SPEC))
    whole = whole_state(SPEC.build())
    want = unsharded_step(reduced, whole, some_batch(1))
    assert_same_step(simulated_step(local(SPEC, 4, plan), whole, some_batch(1)), want)


def adversary(kind: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    fed = some_batch(1)
    if kind == "all tokens alike":
        fed["input_ids"][:] = 3
        return replace(SPEC, attention=""), fed
    if kind == "the first ranks' tokens alike":
        fed["input_ids"][:7] = 3
        return replace(SPEC, attention=""), fed
    return replace(SPEC, router="one_for_all", k=1), fed  # a router that sees no token


@pytest.mark.parametrize(
    "kind", ["all tokens alike", "the first ranks' tokens alike", "all to one expert"]
)
@pytest.mark.parametrize("plan", [balanced(ep=4), balanced(ep=2, etp=2, expert_tokens=9)], ids=str)
def test_under_adverse_routers(kind: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, fed = adversary(kind)
    came = watched(monkeypatch, "send_rows")
    assert_same(spec, 4, plan, fed)
    if plan.expert_tokens is None and kind == "all to one expert":
        assert max(came) == 96 // 4  # the mean


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The rows that every rank gets in each collective of a name, forward and backward."""
    seen: list[int] = []
    run = moptrace.simulate._mean

    def watching(row: Any, *rest: Any) -> tuple[Tensor, ...]:
        results = run(row, *rest)
        if row.name == name:
            seen.extend(len(x) for x in results)
        return results

    monkeypatch.setattr(moptrace.simulate, "_mean", watching)
    return seen


@pytest.mark.parametrize("name", sweep(["mixtral", "gpt_oss", "deepseek_v3"], quick=["gpt_oss"]))
def test_models_of_hugging_face(name: str) -> None:
    model, program = subject(name)
    whole, plan = whole_state(model), balanced(ep=2).resolve(4, [])
    with InFloat64():
        want = unsharded_step(program, whole, batch(1))
        found = simulated_step(sharded(plan, 4)(program), whole, batch(1))
    assert_same_step(found, want)


@pytest.mark.parametrize("plan", [balanced(ep=4), balanced(ep=2, etp=2)], ids=str)
def test_real_ranks(ranks: Callable[[int], Ranks], plan: Plan) -> None:
    model, fed = subject("OneHotEinsum")[0], batch(1)
    want = replace(eager_step(model, fed), buffers={})
    for loss, gradients in ranks(4)(step_on_a_rank, "OneHotEinsum", model.state_dict(), plan, fed):
        assert_same_step(Step(loss, gradients, {}), want)


# --- training steps -------------------------------------------------------------------------------

SMALL = ModelSpec(
    layers=("moe", "moe"), hidden=8, vocabulary=16, experts=4, router="one_for_all", k=1,
    style="canonical", biases=True,
)  # fmt: skip
SCHEDULES = {
    "overlapped": overlapped(),
    "gathered again": chain(regather(), overlapped()),
    "computed again": chain(checkpoint(collectives=True), overlapped()),
}


@pytest.mark.parametrize("name", sweep(SCHEDULES, ["gathered again", "computed again"]))
def test_steps_train_as_the_model_alone(name: str) -> None:
    plan = balanced(ep=2, expert_tokens=10 if name == "overlapped" else None)
    model, make = SMALL.build(), all_of(ADAMW)
    simulated = SimulatedSteps(
        local(SMALL, 4, plan), whole_state(model), make, 0.5, 2, SCHEDULES[name]
    )
    if name == "gathered again":
        nodes = [n for n in simulated.programs[0].nodes if "send_experts" in map(str, n.args[:1])]
        assert len({roles.role(n).backward for n in nodes}) == 2
    eager = Eager(model, make, 0.5)
    for number in range(2):
        fed = [some_batch(2 * number), some_batch(2 * number + 1)]
        fed = [{k: v.where(v >= 0, 0) for k, v in each.items()} for each in fed]
        loss, norm = simulated.step(*fed)
        want, want_norm = eager.step({k: torch.cat([f[k] for f in fed]) for k in fed[0]})
        assert_close(loss, want)
        assert_close(norm, want_norm)
    assert_same_weights(simulated.weights(), whole_state(eager.model))


def on_rank_trains(compiled: bool = False) -> None:
    spec = replace(SMALL, layers=("moe",))
    fed = [{k: v.where(v >= 0, 0) for k, v in some_batch(i).items()} for i in range(2)]
    mesh = init_device_mesh("cpu", (4,))
    example = {k: v[:2] for k, v in fed[0].items()}
    model = parallelize(spec.build(), mesh, balanced(ep=4, expert_tokens=10), batch=example)
    step = train_step(model, ADAMW(model.parameters()), max_norm=0.5, compile=compiled)
    eager = Eager(spec.build(), all_of(ADAMW), 0.5)
    for each in fed:
        want, norm = eager.step(each)
        assert_close(step(**model.local_batch(each)), want)
        assert_close(step.grad_norm, norm)
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


def test_real_ranks_train(ranks: Callable[[int], Ranks]) -> None:
    ranks(4)(on_rank_trains)


# --- what it costs --------------------------------------------------------------------------------


def test_below_the_threshold_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were sent")

    monkeypatch.setattr(dist, "all_to_all_single", never)
    table = torch.tensor([[5, 6, 7, 4], [5, 5, 5, 5]])
    _, hosts = plan_balance(table, [2, 2], 3, 1.3, 1.0, 1)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with Communicator(Layout.of(2, ep=2), 1, {"ep": None}):
        out = ops.send_experts.default(x, hosts, "ep", 3, 4)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.equal(out[:2], x) and not out[2].any()
    assert torch.equal(gradient, 2 * x)


def test_gradients_come_home_in_float32() -> None:
    """Three halves of a bfloat16's last bit round to two bits, and to none one by one."""
    hosts = torch.tensor([0, -1, 1, 0, 2, 0, 3, 0])
    small = 2.0**-8
    parts = [torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)]
    parts += [torch.tensor([[0.0], [small]], dtype=torch.bfloat16) for _ in range(3)]
    row = moptrace.simulate.COLLECTIVES["return_experts"]
    found = row.meaning(parts, (1, 1, 1, 1), [hosts] * 4, 2, 4)
    assert float(found[0]) == 1 + 4 * small
    assert float(parts[0][0] + parts[1][1] + parts[2][1] + parts[3][1]) == 1


def test_explain_says_what_may_move() -> None:
    told = explain(local(replace(SPEC, biases=False), 4, Plan(ep=2, balance=Balance())))
    assert told.collectives["send_experts"] == told.collectives["return_experts"]
    assert all(t.bytes == 0 for t in told.traffic if t.kind in ("send_experts", "return_experts"))
    (note,) = (note for note in told.notes if "guests" in note)
    weights = 3 * SPEC.width * SPEC.hidden * 8
    assert note.startswith("where a rank has over 1.3 times the mean of rows")
    assert f"up to 3 guests on each rank, {3 * weights:,} bytes" in note
    assert "experts split over" in told.row(roles.Component.EXPERTS).parallelism


def test_a_note_says_that_there_is_nothing_to_balance() -> None:
    assert "every rank has all experts" in explain(local(SPEC, 4, balanced(ep=1))).notes[-1]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: Balance(threshold=0.9), "threshold=0.9 is below the mean"),
        (lambda: Balance(cap=math.nan), "cap=nan is below the mean"),
        (lambda: Balance(guests=0), "would move nothing"),
        (lambda: Balance(rows=0), "would move nothing"),
        (
            lambda: balanced(ep=2, dispatcher="all-gather").resolve(4, [4]),
            "say dispatcher='all-to-all', or balance=None",
        ),
        (
            lambda: balanced(ep=2, dropping=Dropping(1.0, pad=True)).resolve(4, [4]),
            "say pad=False, or balance=None",
        ),
    ],
)
def test_what_does_not_fit_is_refused(plan: Callable[[], Any], message: str) -> None:
    with pytest.raises(errors.PlanError, match=message):
        plan()


# --- broken on purpose ----------------------------------------------------------------------------


def edited(program: Program, target: Any, edit: Callable[[Any], None]) -> Program:
    graph, _ = program.copy_graph()
    edit(graph.find_nodes(op="call_function", target=target)[0])
    return program.with_graph(graph)


def without_plan(node: Any) -> None:
    """Rows are sorted by place, and said to be by token of a group's common experts."""
    placement = roles.placement(node)
    roles.set_role(
        node, placements=(placement.with_kind("edp", roles.placement(node.args[0]).kind("edp")),)
    )


def with_owners_weights(node: Any) -> None:
    """Places are taken for the owners' experts."""
    node.replace_all_uses_with(node.args[0])


@pytest.mark.parametrize(
    ("target", "edit"),
    [
        (ops.group_rows.default, without_plan),
        (ops.send_experts.default, with_owners_weights),
    ],
)
def test_the_checker_sees_that_groups_have_places_of_their_own(target: Any, edit: Any) -> None:
    program = local(SPEC, 4, balanced(ep=2))
    check(program)
    with pytest.raises(errors.CheckError):
        check(edited(program, target, edit))
