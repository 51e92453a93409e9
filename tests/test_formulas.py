"""The formulas of a plan against what its collectives send, and what liveness says is held."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import moptrace.simulate
from double import InFloat64
from goldens import assert_golden
from meter import Meter
from moptrace import mechanisms as of
from moptrace import roles
from moptrace.balance import Balance
from moptrace.collectives import Collective, collective
from moptrace.core import Pass, Program
from moptrace.dropping import Dropping
from moptrace.errors import PassError, PlanError
from moptrace.explain import explain
from moptrace.formulas import Estimate, estimate
from moptrace.kernels.expert_function import ExpertOperator
from moptrace.liveness import lifetimes, sizes_of_values, storages
from moptrace.mechanisms import MECHANISMS, SYMBOLS
from moptrace.passes.default import canonical, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.recompute import recompute
from moptrace.placement import Layout
from moptrace.plan import Plan
from moptrace.precision import MixedPrecisionPolicy, convert
from moptrace.sites import Model
from moptrace.testing import ModelSpec, SimulatedRanks, dtypes_of, whole_state
from moptrace.trace import trace
from subjects import subject
from sweeps import sweep
from test_tensor_parallel import batch

aten, ops = torch.ops.aten, torch.ops.moptrace

QWEN, MLA, LOOP, OLMOE = "qwen3_moe", "deepseek_v3", "LoopWhere", "olmoe"
PADDED = Dropping(1.5, pad=True)
PLANS: tuple[tuple[str, int, Plan], ...] = (
    (QWEN, 4, Plan(ep=2)),
    (LOOP, 4, Plan(ep=1, logits_bytes=0)),
    (QWEN, 6, Plan(tp=2, ep=3, vp=6, logits_bytes=0)),
    (QWEN, 4, Plan(vp=2, ep=2, logits_bytes=0, dp_replicate=2, edp="replicate")),
    (MLA, 4, Plan(tp=2, ep=4)),
    (OLMOE, 4, Plan(tp=2, ep=4)),
    (LOOP, 4, Plan(tp=4, ep=2, logits_bytes=0)),
    (QWEN, 8, Plan(tp=2, cp=2, ep=2, etp=2, context="ring", logits_bytes=0)),
    (QWEN, 4, Plan(cp=2, ep=2, dropping=Dropping(1.0, over="sequence"))),
    (QWEN, 12, Plan(cp=3, ep=4, context="ring")),
    (LOOP, 4, Plan(ep=2, expert_tokens=5)),
    (QWEN, 4, Plan(ep=2, dispatcher="all-gather")),
    (QWEN, 4, Plan(ep=2, etp=2, dropping=PADDED)),
    (QWEN, 4, Plan(ep=2, etp=2, balance=Balance())),
    (QWEN, 4, Plan(ep=2, etp=2, fold_router_weights=True)),
)
RARE = [p for p in PLANS if p[0] == OLMOE or p[1] == 12 or p[2].tp == 4]
# Those are enough for every mechanism; these are for their combinations.
MORE = tuple(
    (name, world, Plan(tp=tp, cp=cp, ep=ep, etp=etp, context=context, logits_bytes=logits))
    for name, (world, tp, cp), (ep, etp), (context, logits) in product(
        (QWEN, MLA, LOOP, OLMOE),
        ((4, 1, 2), (4, 2, 2), (12, 2, 3)),
        ((1, 1), (2, 2), (4, 1)),
        (("ulysses", 0), ("ring", 1 << 20)),
    )
)


@cache
def sites(name: str) -> Model:
    return Model(subject(name)[1])


@cache
def local(name: str, world: int, plan: Plan) -> Program:
    with InFloat64():
        return sharded(plan.resolve(world, []), world)(subject(name)[1])


def estimated(name: str, world: int, plan: Plan) -> Estimate:
    with InFloat64():
        return estimate(sites(name), plan.resolve(world, []), world)


# --- what moves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "world", "plan"), sweep(PLANS, quick=[p for p in PLANS if p not in RARE]), ids=str
)
def test_formulas_are_what_collectives_send(
    name: str, world: int, plan: Plan, meter: Meter
) -> None:
    """To the byte: where rows are routed, the mean of the ranks, which no routing changes.

    But a capacity leaves fewer rows than expected.
    """
    meter.world = world
    with InFloat64():
        ranks = SimulatedRanks(local(name, world, plan), whole_state(subject(name)[0]))
        ranks.step(batch(seed=1))
    sent = {kind: n for kind, n in meter.bytes.items() if n}
    found = dict(estimated(name, world, plan).moved)
    if plan.dropping and not plan.dropping.pad:  # fewer rows are left where routing is not balanced
        for kind in ("send_rows", "return_rows"):
            assert 0.5 * found[kind] < sent[kind] < found[kind]
            found[kind] = sent[kind]
    assert found == pytest.approx(sent, abs=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world", "plan"), MORE, ids=str)
def test_formulas_are_what_explain_counts(name: str, world: int, plan: Plan) -> None:
    counted = explain(local(name, world, plan))
    found = estimated(name, world, plan)
    moved = {t.kind: t.bytes for t in counted.traffic if t.bytes}
    assert found.moved == pytest.approx(moved, abs=1)
    assert found.stored == counted.parameter_bytes


@cache
def small(**options: Any) -> Program:
    """Eight sequences of eight tokens; sizes that four ranks do not divide."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(13, (2, 8, 8), generator=generator)
    fed = {"input_ids": ids[0], "labels": ids[1]}
    return canonical()(trace(ModelSpec(layers=("dense", "moe"), **options).build(), fed))


UNEVEN = (
    (4, Plan(ep=4, tp=2)),
    (4, Plan(ep=2, vp=2, logits_bytes=0)),
    (4, Plan(ep=1, cp=2, context="ring", logits_bytes=0, embedding_bytes=0)),
)


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 6, "biases": True, "tied": True},
        {"experts": 5, "attention": "fused", "heads": 4, "balance": 0.1, "shared": "gated"},
    ],
    ids=str,
)
def test_uneven_slices_count_as_the_longest(options: dict[str, Any]) -> None:
    program = small(**options)
    model = Model(program)
    for world, plan in UNEVEN:
        plan = plan.resolve(world, [])
        counted = explain(sharded(plan, world)(program))
        found = estimate(model, plan, world)
        moved = {t.kind: t.bytes for t in counted.traffic if t.bytes}
        assert found.moved == pytest.approx(moved, abs=1), plan
        assert found.stored == counted.parameter_bytes, plan


OTHERS: tuple[tuple[dict[str, Any], Plan], ...] = (
    ({"attention": "fused", "heads": 3, "width": 6}, Plan(tp=2, ep=2)),  # exchanges heads
    ({"attention": "fused", "heads": 4}, Plan(ep=2, edp="replicate")),
    ({"vocabulary": 300}, Plan(ep=2, logits_bytes=0)),  # its tokens travel
)


@pytest.mark.parametrize(("options", "plan"), OTHERS, ids=str)
def test_formulas_of_rarer_choices_are_what_explain_counts(
    options: dict[str, Any], plan: Plan
) -> None:
    program, plan = small(**options), plan.resolve(4, [])
    counted = explain(sharded(plan, 4)(program))
    moved = {t.kind: t.bytes for t in counted.traffic if t.bytes}
    assert estimate(program, plan, 4).moved == pytest.approx(moved, abs=1)


class Centred(nn.Module):
    """Every token sees the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(6, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x - x.mean((0, 1))).square().mean()


def test_a_sum_that_every_token_uses_is_added_up_backward_too() -> None:
    program = canonical()(trace(Centred(), {"x": torch.ones(4, 8, 6)}))
    plan = Plan().resolve(4, [])
    counted = explain(sharded(plan, 4)(program), plan=plan)
    moved = {t.kind: t.bytes for t in counted.traffic if t.bytes}
    assert counted.formulas.moved == pytest.approx(moved, abs=1)
    assert counted.formulas.of(of.SUMS).bytes["all_reduce backward"]


def test_what_follows_attention_on_whole_tokens_is_not_in_a_formula() -> None:
    """Where no plan's mechanism serves, both numbers are printed: these differ."""
    plan = Plan(cp=2, context="gather").resolve(4, [])
    found = explain(local(QWEN, 4, plan), plan=plan).formulas
    assert found.counted is not None
    assert found.moved["all_gather"] == found.counted["all_gather"]
    assert found.moved["all_reduce"] < found.counted["all_reduce"]


@pytest.mark.parametrize("reduced", [None, torch.float32])
def test_weights_move_in_what_they_are_cast_to(reduced: torch.dtype | None) -> None:
    held = ModelSpec(experts=4, attention="fused").build(torch.float32)
    policy = MixedPrecisionPolicy(torch.bfloat16, reduced)
    masters = dtypes_of(held)
    ids = torch.zeros(8, 8, dtype=torch.int64)
    program = canonical()(trace(convert(held, policy), {"input_ids": ids, "labels": ids}))
    plan = Plan(ep=2, dp_replicate=2, mixed_precision=policy).resolve(4, [])
    counted = explain(sharded(plan, 4, masters=masters)(program), plan=plan)
    moved = {t.kind: t.bytes for t in counted.traffic if t.bytes}
    assert counted.formulas.moved == pytest.approx(moved, abs=1)
    assert counted.formulas.stored == counted.parameter_bytes
    assert counted.formulas.moved == estimate(program, plan, 4, masters).moved


def test_rows_of_an_embedding_are_expected_and_bounded(meter: Meter) -> None:
    world, plan = 4, Plan(ep=2, logits_bytes=0, embedding_bytes=0)
    meter.world = world
    with InFloat64():
        ranks = SimulatedRanks(local(QWEN, world, plan), whole_state(subject(QWEN)[0]))
        ranks.step(batch(seed=1))
    found = estimated(QWEN, world, plan)
    fetched = meter.bytes["ring"] - found.moved["ring"]  # the meter knows no operators
    assert found.moved["all_to_all"] == pytest.approx(fetched, rel=0.2)
    assert fetched <= found.worst_moved["all_to_all"]


# --- under any router -----------------------------------------------------------------------------


def test_no_routing_sends_more_than_the_worst_and_one_as_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where all tokens choose the same experts, of one rank, the others send every row."""
    most: Counter[str] = Counter()
    run = moptrace.simulate._mean

    def sent(
        row: Collective, layout: Layout, axis: str, beside: Any, extra: Any, parts: Sequence[Tensor]
    ) -> Any:
        results = run(row, layout, axis, beside, extra, parts)
        if row.moves_rows and row.name in ("send_rows", "return_rows"):
            came = [table.sum(1).tolist() for table in beside[1]]  # by rank, from every rank
            away = [sum(n[rank] for n in came) - came[rank][rank] for rank in range(len(came))]
            back = [sum(n) - n[rank] for rank, n in enumerate(came)]
            rows = max(away if row.name == "send_rows" else back)
            most[row.name] += rows * math.prod(parts[0].shape[1:]) * parts[0].element_size()
        return results

    monkeypatch.setattr(moptrace.simulate, "_mean", sent)
    whole = whole_state(subject(QWEN)[0])
    for name, value in whole.items():
        if name.endswith("mlp.gate.weight"):
            value.zero_()  # all experts are as likely for every token, and the first win
    with InFloat64():
        SimulatedRanks(local(QWEN, 2, Plan(ep=2)), whole).step(batch(seed=1))
    worst = estimated(QWEN, 2, Plan(ep=2)).worst_moved
    assert most == {kind: worst[kind] for kind in ("send_rows", "return_rows")}


def test_chunks_have_the_bound_of_the_pass() -> None:
    world, plan = 4, Plan(ep=2, etp=2, expert_tokens=5)
    notes = " ".join(local(QWEN, world, plan).notes)
    told = re.search(r"no more than ([\d,]+) rows \(([\d,]+) bytes\)", notes)
    assert told is not None
    bound = estimated(QWEN, world, plan).of(of.BOUND)
    assert bound.bytes["buffer"] == int(told[2].replace(",", ""))


# --- what is held ---------------------------------------------------------------------------------

_REARRANGES = {
    aten.clone.default, operator.getitem, ops.unpack.default, ops.group_rows.default,
    ops.ungroup_rows.default, ops.take_replicated.default,
}  # fmt: skip


class Held:
    """What a step holds on a rank, from lifetimes: gradients, and what forward leaves to backward.

    ``kept`` are values that a collective brought, or that are such values rearranged.
    """

    def __init__(self, program: Program):
        step = recompute()(differentiate()(program))
        self.sizes, self.root = sizes_of_values(step), storages(step)
        order = {node: number for number, node in enumerate(step.nodes)}
        start = next(order[node] for node in step.nodes if roles.role(node).backward)
        brought, made = set[fx.Node](), set[fx.Node]()
        self.buffer = 0
        for node in step.nodes:
            if order[node] < start and node.op == "call_function":
                self._sort(node, brought, made)
        spans = lifetimes(step)
        left = {n for n, last in spans.items() if order[n] < start <= order[last]}
        self.kept = sum(self.sizes[node] for node in left & brought)
        self.made = sum(self.sizes[node] for node in left & made)
        pairs = zip(step.signature.outputs, step.outputs, strict=True)
        self.gradients = sum(self.sizes[node] for out, node in pairs if out.gradient is not None)

    def _sort(self, node: fx.Node, brought: set[fx.Node], made: set[fx.Node]) -> None:
        row, source = collective(node.target), next(iter(node.all_input_nodes), None)
        packed = any(user.target is ops.unpack.default for user in node.users)
        if row is not None and row.travels and "all_reduce" not in row.name:
            brought.add(node)
            self.buffer = max(self.buffer, 0 if packed else self.sizes[node])
        elif source in brought and (self.root[node] is not node or node.target in _REARRANGES):
            brought.add(node)
            if source.target is ops.unpack.default:  # type: ignore[union-attr]
                self.buffer = max(self.buffer, self.sizes[node])
        elif node.target is aten._log_softmax.default:
            made.add(node)
        elif isinstance(getattr(source, "target", None), ExpertOperator):
            if all(roles.role(user).backward for user in node.users):  # its result is a row
                made.add(node)


HELD = [p for p in PLANS if p[2].balance is None]
RINGS = (of.RING, of.WORDS, of.TRAVELLERS, of.LOOKUP, of.BOUND)  # in no graph, or under any router


@pytest.mark.parametrize(
    ("name", "world", "plan"),
    sweep(HELD, quick=HELD[1::2]),
    ids=str,
)
def test_memory_is_that_of_lifetimes(name: str, world: int, plan: Plan) -> None:
    """To the byte."""
    program, found = local(name, world, plan), estimated(name, world, plan)
    with InFloat64():
        held = Held(program)
    assert found.stored == explain(program).parameter_bytes
    assert (found.gradients, found.kept, found.made) == (held.gradients, held.kept, held.made)
    others = [cost for cost in found.costs if cost.mechanism not in RINGS]
    assert max(cost.bytes.get("buffer", 0) for cost in others) == held.buffer


# --- the table ------------------------------------------------------------------------------------


def test_every_mechanism_is_chosen_by_a_plan_that_is_tried() -> None:
    more = ((QWEN, 4, Plan(ep=2, embedding_bytes=0)), (QWEN, 4, Plan(cp=2, context="gather")))
    tried = [estimated(*case) for case in (*PLANS, *more)]
    tried += [estimate(small(**options), plan.resolve(4, []), 4) for options, plan in OTHERS]
    chosen = {cost.mechanism for found in tried for cost in found.costs}
    assert chosen == {*MECHANISMS}


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
def test_a_mechanism_is_well_formed(mechanism: of.Mechanism) -> None:
    assert set(mechanism.symbols) <= SYMBOLS.keys()
    kinds = [sent.kind for sent in mechanism.sent]
    assert len(kinds) == len(set(kinds)), "one entry for each kind of collective"
    assert mechanism.expressions and mechanism.source


def test_the_formulas_of_a_known_model_need_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = product((1, 2, 4), (1, 2), (1, 2))
    plans = [Plan(ep=ep, tp=tp, cp=cp, logits_bytes=0) for ep, tp, cp in sizes]
    before = [estimated(QWEN, 4, plan) for plan in plans]

    def refuse(*_: Any) -> Any:
        raise AssertionError("a pass ran")

    monkeypatch.setattr(Pass, "__call__", refuse)
    assert [estimated(QWEN, 4, plan).moved for plan in plans] == [e.moved for e in before]


def test_formulas_are_printed_beside_what_was_counted() -> None:
    plan = Plan(tp=2, cp=2, ep=2, etp=2, context="ring", logits_bytes=0).resolve(8, [])
    found = explain(local(QWEN, 8, plan), plan=plan)
    assert_golden("formulas", f"{found.formulas}\n")
    assert str(explain(local(QWEN, 8, plan))) == str(found)
    assert found.formulas.counted == {t.kind: t.bytes for t in found.traffic}
    assert math.isclose(sum(found.formulas.moved.values()), found.bytes_moved, abs_tol=10)


def test_formulas_need_a_plan_without_stages_and_a_canonical_program() -> None:
    with pytest.raises(PassError, match=r"explain\(program, plan=a resolved plan\)"):
        _ = explain(local(QWEN, 4, Plan(ep=2))).formulas
    with pytest.raises(PlanError, match="pipeline"):
        estimate(sites(QWEN), Plan(pp=2), 4)
    linear = trace(nn.Sequential(nn.Linear(2, 2)), (torch.ones(2, 2),), loss_fn=torch.sum)
    with pytest.raises(PassError, match="was made from none"):
        Model(linear)
