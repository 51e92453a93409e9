"""Dispatchers: capacities, of which one device with the same rule is the measure, and gathers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from double import InFloat64
from gloo import Ranks
from moptrace import Dropping, Plan, Program, errors, roles, trace
from moptrace.collectives import collective
from moptrace.explain import explain
from moptrace.kernels import reference
from moptrace.kernels.routing import keep_pairs
from moptrace.liveness import peak_memory, shape_of, symbols_of
from moptrace.passes.default import canonical, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.drop_tokens import drop_tokens
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

ops = torch.ops.moptrace
SEQUENCES, LENGTH = 8, 12  # of a batch
Groups = tuple[tuple[int, int], ...]


# --- which pairs are kept -------------------------------------------------------------------------


@st.composite
def choices(draw: st.DrawFn) -> tuple[Any, ...]:
    """Few scores for many pairs, so that most are equal to others."""
    experts, k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sequences, length = draw(st.sampled_from([(2, 6), (4, 3), (1, 4), (0, 4)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(experts, (sequences * length, k))
    scores = torch.randint(3, ids.shape) / draw(st.sampled_from([1.0, -3.0]))
    halves, parts = (2 - sequences % 2, 1), (2 - length % 2, sequences or 1)
    groups = draw(st.sampled_from([(), halves, (*halves, *parts)]))
    kind = draw(st.sampled_from([torch.float64, torch.bfloat16]))
    given = draw(st.sampled_from([None, scores.to(kind)]))
    return ids, given, experts, draw(st.integers(1, 5)), groups


@settings(max_examples=60, deadline=None)
@given(choices())
def test_an_expert_keeps_its_best_or_first_pairs_of_each_group(arguments: tuple[Any, ...]) -> None:
    kept, counts = keep_pairs(*arguments)
    meant = reference.keep_pairs(*arguments)
    assert torch.equal(kept, meant[0]) and torch.equal(counts, meant[1])


@pytest.mark.parametrize("by", ["probability", "position"])
def test_the_operator_is_registered_correctly(by: str) -> None:
    torch.manual_seed(0)
    scores = torch.rand(12, 2, dtype=torch.float64) if by == "probability" else None
    arguments = (torch.randint(3, (12, 2)), scores, 3, 2, (2, 1, 3, 2))
    torch.library.opcheck(ops.keep_pairs.default, arguments)


def test_groups_that_do_not_divide_the_tokens_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"\[5, 1\] do not divide 12 tokens"):
        keep_pairs(torch.zeros(12, 1, dtype=torch.int64), None, 1, 2, (5, 1))


def test_the_same_sum_in_another_order_does_not_decide() -> None:
    """Equal tokens have scores that differ in their last bit, and the first is kept."""
    scores = torch.tensor([[0.3], [0.1 + 0.2]], dtype=torch.float64)
    assert scores[1] > scores[0]
    kept, _ = keep_pairs(torch.zeros(2, 1, dtype=torch.int64), scores, 1, 1)
    assert kept.flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("factor", "capacity"), [(1, 10), (1.1, 11), (1.0001, 11), (0.01, 1), (2.5, 25)]
)
def test_a_capacity_counts_as_it_is_written(factor: float, capacity: int) -> None:
    """In binary, 1.1 * 10 is more than 11."""
    assert Dropping(factor).capacity(tokens=20, choices=2, experts=4) == capacity


# --- one device: against a model whose author drops -----------------------------------------------

SPEC = ModelSpec(experts=5, biases=True, shared="gated", attention="fused", balance=0.1)


@cache
def traced(spec: ModelSpec) -> Program:
    return canonical()(trace(spec.build(), some_batch(7)))


def some_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(13, (SEQUENCES, LENGTH), generator=generator)
    labels = torch.randint(13, (SEQUENCES, LENGTH), generator=generator)
    labels[0, 2:] = -100
    return {"input_ids": ids, "labels": labels}


def dropping_author(spec: ModelSpec, factor: float, by: str, groups: int) -> torch.nn.Module:
    """The model with a router that sets the weights of dropped pairs to zero, one by one."""
    model = spec.build()

    def forward(router: Any, x: Tensor) -> tuple[Tensor, ...]:
        logits = router.gate(x)
        weights, experts = router.choose(logits, router.k, router.bias)
        kept = torch.zeros_like(weights, dtype=torch.bool)
        size = len(x) // groups
        capacity = math.ceil(factor * size * router.k / spec.experts)
        for start in range(0, len(x), size):
            for e in range(spec.experts):
                own = [(n, j) for n, j in (experts == e).nonzero().tolist() if start <= n]
                own = [(n, j) for n, j in own if n < start + size]
                if by == "probability":
                    own.sort(key=lambda at: float(weights[at].detach().float()), reverse=True)
                for at in own[:capacity]:
                    kept[at] = True
        return weights.where(kept, 0), experts, logits.softmax(-1)

    for layer in model.layers:
        layer.block.router.forward = partial(forward, layer.block.router)  # type: ignore
    return model


@pytest.mark.parametrize("by", ["probability", "position"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("style", ["loop_where", "canonical", "one_hot"])
def test_one_device_computes_what_an_author_would_write(by: str, groups: int, style: str) -> None:
    spec, fed = replace(SPEC, style=style), some_batch(1)
    program = drop_tokens(Dropping(0.75, by=by), groups=((groups, 1),))(traced(spec))
    found = unsharded_step(program, whole_state(spec.build()), fed)
    assert_same_step(found, eager_step(dropping_author(spec, 0.75, by, groups), fed))
    assert found.loss != eager_step(spec.build(), fed).loss


def test_what_drops_nothing_is_the_model_itself() -> None:
    model, fed = SPEC.build(), some_batch(1)
    plan = Plan(ep=2, dropping=Dropping(5.0, pad=True))  # five experts: all tokens may choose one
    found = simulated_step(local(SPEC, 4, plan), whole_state(model), fed)
    assert_same_step(found, eager_step(model, fed))


# --- many ranks -----------------------------------------------------------------------------------


def groups_of(plan: Plan, ranks: int) -> Groups:
    """How ranks share the tokens [SEQUENCES, LENGTH] of a batch, flattened, where they compete."""
    if plan.dropping is None:
        return ()
    among: Groups = ((ranks // (plan.cp * plan.tp), 1),)
    within: Groups = ((plan.cp, SEQUENCES), (plan.tp, SEQUENCES))
    return {"batch": (), "sequence": among, "sub-sequence": among + within}[plan.dropping.over]


def reduced(plan: Plan, ranks: int, program: Program) -> Program:
    """The model of one device with a plan's rule."""
    return drop_tokens(plan.dropping, groups=groups_of(plan, ranks))(program)


def local(spec: ModelSpec, ranks: int, plan: Plan) -> Program:
    return sharded(plan.resolve(ranks, [spec.experts]), ranks)(traced(spec))


def assert_same(spec: ModelSpec, ranks: int, plan: Plan, fed: dict[str, Tensor]) -> None:
    whole = whole_state(spec.build())
    want = unsharded_step(reduced(plan, ranks, traced(spec)), whole, fed)
    assert_same_step(simulated_step(local(spec, ranks, plan), whole, fed), want)


PADDED = Dropping(1.0, pad=True)
GATHERING = Plan(dispatcher="all-gather")
PLANS = (
    (4, Plan(ep=2, dropping=Dropping(1.0))),
    (4, Plan(ep=4, dropping=Dropping(0.5, by="position"))),
    (8, Plan(ep=4, cp=2, tp=2, dropping=Dropping(0.75))),
    (8, Plan(ep=4, cp=2, tp=2, dropping=Dropping(0.75, over="sequence"))),
    (8, Plan(ep=4, cp=2, tp=2, context="ring", dropping=Dropping(0.75, over="batch"))),
    (4, Plan(ep=2, etp=2, expert_tokens=7, dropping=Dropping(1.0))),
    (1, Plan(ep=1, expert_tokens=50, dropping=Dropping(0.75, by="position"))),
    (8, Plan(ep=8, dropping=PADDED)),  # three ranks have no expert
    (8, Plan(ep=2, etp=2, dropping=PADDED)),
    (4, Plan(ep=4, tp=2, recompute_experts=True, dropping=PADDED)),
    (8, replace(GATHERING, ep=8)),
    (8, replace(GATHERING, ep=2, tp=2, edp="replicate")),
    (8, replace(GATHERING, ep=4, cp=2, tp=2, expert_tokens=20)),
    (4, replace(GATHERING, ep=2, etp=2, dropping=Dropping(1.0))),
    (4, replace(GATHERING, ep=2, etp=2, dropping=PADDED)),
    (4, replace(GATHERING, ep=4, dropping=Dropping(0.75, over="batch"))),
    (6, replace(GATHERING, tp=3, etp=2)),  # no slices of the batch: sent
)
QUICK = PLANS[3:8] + PLANS[9:]


@pytest.mark.parametrize(("ranks", "plan"), sweep(PLANS, QUICK), ids=str)
def test_ranks_drop_and_gather_as_one_device(ranks: int, plan: Plan) -> None:
    assert_same(SPEC, ranks, plan, some_batch(1))


def adversary(kind: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    fed = some_batch(1)
    if kind == "all tokens alike":  # equal scores, of which the first are kept
        fed["input_ids"][:] = 3
        return replace(SPEC, attention=""), fed
    if kind == "the first ranks' tokens alike":
        fed["input_ids"][:7] = 3
        return replace(SPEC, attention=""), fed
    return replace(SPEC, router="one_for_all", k=1), fed  # a router that sees no token


@pytest.mark.parametrize(
    "kind", ["all tokens alike", "the first ranks' tokens alike", "all to one expert"]
)
@pytest.mark.parametrize(
    "plan",
    [
        Plan(ep=4, dropping=Dropping(1.0)),
        Plan(ep=4, dropping=Dropping(0.001, over="batch")),
        Plan(ep=2, etp=2, dropping=Dropping(1.0, pad=True)),
        replace(GATHERING, ep=4, dropping=Dropping(0.001, by="position", pad=True)),
        replace(GATHERING, ep=4),
    ],
    ids=str,
)
def test_under_adverse_routers(kind: str, plan: Plan) -> None:
    spec, fed = adversary(kind)
    assert_same(spec, 4, plan, fed)


@pytest.mark.parametrize("name", sweep(["mixtral", "gpt_oss", "deepseek_v3"], quick=["gpt_oss"]))
@pytest.mark.parametrize("plan", [Plan(ep=2, dropping=PADDED), replace(GATHERING, ep=4)], ids=str)
def test_models_of_hugging_face(name: str, plan: Plan) -> None:
    model, program = subject(name)
    whole = whole_state(model)
    with InFloat64():
        want = unsharded_step(reduced(plan, 4, program), whole, batch(1))
        found = simulated_step(sharded(plan.resolve(4, []), 4)(program), whole, batch(1))
    assert_same_step(found, want)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(ep=2, etp=2, dropping=PADDED),
        Plan(ep=4, dropping=Dropping(0.75, over="batch")),
        replace(GATHERING, ep=2, etp=2),
    ],
    ids=str,
)
def test_real_ranks(ranks: Callable[[int], Ranks], plan: Plan) -> None:
    model, program = subject("OneHotEinsum")
    want = unsharded_step(reduced(plan, 4, program), whole_state(model), batch(1))
    state, fed = model.state_dict(), batch(1)
    for loss, gradients in ranks(4)(step_on_a_rank, "OneHotEinsum", state, plan, fed):
        assert_same_step(Step(loss, gradients, {}), replace(want, buffers={}))


# --- the step: shapes, chunks, counts -------------------------------------------------------------

EVEN = replace(SPEC, experts=4, hidden=8, width=8, vocabulary=16)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(ep=2, dropping=Dropping(0.75)),
        Plan(ep=2, etp=2, dropping=PADDED),
        Plan(ep=2, expert_tokens=20, dropping=Dropping(0.75, over="batch")),
        replace(GATHERING, ep=2, recompute_experts=True),
    ],
    ids=str,
)
def test_the_training_step_is_that_of_one_device(plan: Plan) -> None:
    model = EVEN.build()
    sgd = partial(torch.optim.SGD, lr=0.1)
    steps = SimulatedSteps(
        local(EVEN, 4, plan), whole_state(model), lambda named: sgd(list(named.values()))
    )
    whole = whole_state(model)
    single = reduced(plan, 4, traced(EVEN))
    for seed in (1, 2):
        want = unsharded_step(single, whole, some_batch(seed))
        loss, _ = steps.step(some_batch(seed))
        torch.testing.assert_close(loss, want.loss, rtol=1e-10, atol=0)
        whole |= {n: whole[n] - 0.1 * g for n, g in want.gradients.items()}
    assert_same_weights(steps.weights(), whole)


STATIC = (
    Plan(ep=2, dropping=PADDED),
    Plan(ep=2, etp=2, dropping=PADDED),
    replace(GATHERING, ep=2, etp=2, dropping=PADDED),
)


def sizes_of(program: Program) -> list[Any]:
    values = [v for n in program.nodes for v in _several(roles.value(n)) if isinstance(v, Tensor)]
    return [size for value in values for size in value.shape]


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@pytest.mark.parametrize("plan", STATIC, ids=str)
def test_padded_rows_have_known_numbers(plan: Plan) -> None:
    """In forward and backward: nothing is counted, and nothing is as long as routing says."""
    step = differentiate()(local(EVEN, 4, plan))
    moved = {row.name for n in step.nodes if (row := collective(n.target)) is not None}
    assert not moved & {"exchange_counts", "send_rows", "all_gather_rows", "reduce_scatter_rows"}
    assert all(isinstance(size, int) for size in sizes_of(step))
    unpadded = replace(plan, dropping=replace(PADDED, pad=False))
    step = differentiate()(local(EVEN, 4, unpadded))
    assert not all(isinstance(size, int) for size in sizes_of(step))


def test_gathered_tokens_need_no_sizes() -> None:
    """What moves is as long as the batch says, though the rows of a rank's experts are not."""
    step = differentiate()(local(EVEN, 4, replace(GATHERING, ep=2, etp=2)))
    moved = [n for n in step.nodes if collective(n.target) is not None]
    assert not any(collective(n.target).moves_rows for n in moved)  # type: ignore[union-attr]
    assert not any(n.target is ops.exchange_counts.default for n in moved)
    assert all(isinstance(s, int) for n in moved for s in roles.tensor(n.args[0]).shape[1:])  # type: ignore


@pytest.mark.parametrize(
    ("plan", "rows"),
    [
        (Plan(ep=2, dropping=Dropping(0.5)), 24),  # of 24 tokens with two choices each
        (replace(GATHERING, ep=2), 48),  # half of two ranks' pairs
        (replace(GATHERING, ep=2, dropping=Dropping(0.25)), 12),
    ],
    ids=str,
)
def test_the_peak_of_memory_counts_the_rows_that_are_expected(plan: Plan, rows: int) -> None:
    step = differentiate()(local(EVEN, 4, plan))
    expected = symbols_of(step)
    (dispatch,) = step.graph.find_nodes(op="call_function", target=ops.dispatch.default)
    assert shape_of(roles.value(dispatch)[0], expected) == (rows, 8)
    assert peak_memory(step).bytes > 0


def test_dropped_pairs_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    import moptrace.simulate

    sent: list[int] = []
    run = moptrace.simulate._mean

    def watched(row: Any, *rest: Any) -> tuple[Tensor, ...]:
        if row.name == "send_rows":
            sent.append(sum(len(x) for x in rest[-1]))
        return run(row, *rest)

    monkeypatch.setattr(moptrace.simulate, "_mean", watched)
    plan = Plan(ep=4, dropping=Dropping(0.5, over="batch"))
    simulated_step(local(SPEC, 4, plan), whole_state(SPEC.build()), some_batch(1))
    capacity = math.ceil(0.5 * 96 * 2 / 5)
    assert sent and max(sent) <= 5 * capacity < 96 * 2


@pytest.mark.parametrize("pad", [False, True])
def test_counts_are_those_of_the_choices(pad: bool) -> None:
    """A balancing rule must see how many tokens an expert would have had."""
    model, fed = SPEC.build(), some_batch(1)
    whole = whole_state(model)
    for dispatcher in ("all-to-all", "all-gather"):
        plan = Plan(ep=2, count_tokens=True, dispatcher=dispatcher)
        chosen = simulated_step(local(SPEC, 4, plan), whole, fed).buffers["tokens_per_expert"]
        assert chosen.sum() == 96 * 2
        plan = replace(plan, dropping=Dropping(0.5, pad=pad))
        found = simulated_step(local(SPEC, 4, plan), whole, fed).buffers["tokens_per_expert"]
        assert torch.equal(found, chosen)


# --- what is said ---------------------------------------------------------------------------------


def test_explain_says_what_is_dropped_and_what_moves() -> None:
    def told(**options: Any) -> Any:
        return explain(local(EVEN, 4, Plan(ep=2, **options)))

    whole, half = told(), told(dropping=Dropping(0.5))
    bytes_ = [{t.kind: t.bytes for t in x.traffic} for x in (whole, half)]
    assert bytes_[1]["send_rows"] * 2 == bytes_[0]["send_rows"]
    assert any(
        "an expert keeps at most 6 of the 48 pairs of each of 4 groups of 24 tokens, those with "
        "the highest weights" in note
        for note in half.notes
    )
    padded = told(dropping=Dropping(0.5, pad=True))
    exact = {t.kind: t for t in padded.traffic}
    # Half of 4 experts * 6 rows of 8 float64 numbers go to the other rank, and gradients back.
    assert exact["send_slots"].bytes == 2 * (4 * 6 // 2) * 8 * 8
    assert not any(t.expected for t in padded.traffic)
    gathered = told(dispatcher="all-gather")
    assert any("from those gathered along ep=2" in note for note in gathered.notes)
    assert "send_rows" not in gathered.collectives


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: Dropping(0.0), "capacity_factor=0.0 is no share"),
        (lambda: Dropping(math.inf), "dropping=None to keep all"),
        (lambda: Dropping(1.0, by="chance"), "by is 'probability' or 'position', not 'chance'"),
        (lambda: Dropping(1.0, over="rank"), "over is 'sub-sequence' or 'sequence' or 'batch'"),
        (lambda: Dropping(1.0, over="batch", pad=True), "almost all of them empty. Say over='sub-"),
        (
            lambda: Plan(dropping=PADDED, expert_tokens=8).resolve(4, [4]),
            "leave expert_tokens=None, or say pad=False",
        ),
        (lambda: Plan(dispatcher="ring").resolve(4, [4]), "is 'all-to-all' or 'all-gather'"),
        (
            lambda: replace(GATHERING, ep=4, tp=2).resolve(8, [4]),
            r"2 ranks share each sequence.* these would do: ep in \[1, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(plan: Callable[[], Any], message: str) -> None:
    with pytest.raises(errors.PlanError, match=message):
        plan()


class Unweighted(torch.nn.Module):
    """Experts whose results are added up as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, 3)
        self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).topk(2).indices
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, _ = torch.where(chosen == e)
            out = out.index_add(0, token, expert(x[token]))
        return out.square().sum()


def test_without_weights_nothing_is_more_probable() -> None:
    program = canonical()(trace(Unweighted().double(), {"x": torch.randn(6, 4).double()}))
    with pytest.raises(errors.PlanError, match=r"added up without weights.*by='position'"):
        drop_tokens(Dropping(1.0))(program)
    fed = {"x": torch.randn(6, 4).double()}
    dropped = drop_tokens(Dropping(0.5, by="position"))(program)
    whole = whole_state(Unweighted().double())
    assert unsharded_step(dropped, whole, fed).loss != unsharded_step(program, whole, fed).loss


# --- broken on purpose ----------------------------------------------------------------------------


def broken(program: Program, edit: Callable[[fx.Graph], None]) -> Program:
    graph, _ = program.copy_graph()
    edit(graph)
    return program.with_graph(graph)


def decide_alone(graph: fx.Graph) -> None:
    """Each rank drops of its own tokens, with the capacity of the batch."""
    (keep,) = graph.find_nodes(op="call_function", target=ops.keep_pairs.default)
    for at in (0, 1):
        gathered = keep.args[at]
        assert isinstance(gathered, fx.Node)
        assert gathered.target is ops.all_gather_invariant.default
        keep.update_arg(at, gathered.args[0])
    (choices,) = (n for n in keep.users if n.args == (keep, 0))
    (own,) = choices.users
    assert own.target is ops.take_shard.default
    own.replace_all_uses_with(choices)
    graph.erase_node(own)


def decide_by_the_first(graph: fx.Graph) -> None:
    """By the order of the tokens, and not by their weights."""
    (keep,) = graph.find_nodes(op="call_function", target=ops.keep_pairs.default)
    keep.update_arg(1, None)


@pytest.mark.parametrize("edit", [decide_alone, decide_by_the_first])
def test_without_what_decides_the_step_is_another(edit: Callable[[fx.Graph], None]) -> None:
    plan, fed, model = Plan(ep=4, dropping=Dropping(0.5, over="batch")), some_batch(1), EVEN.build()
    program = local(EVEN, 4, plan)
    want = unsharded_step(reduced(plan, 4, traced(EVEN)), whole_state(model), fed)
    assert_same_step(simulated_step(program, whole_state(model), fed), want)
    with pytest.raises(AssertionError, match="values differ"):
        assert_same_step(simulated_step(broken(program, edit), whole_state(model), fed), want)
