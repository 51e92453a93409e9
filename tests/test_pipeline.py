"""Pipeline stages: the same step as the ranks of one stage would compute alone."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from gloo import Ranks
from moptrace import Plan, Program, errors, parallelize, trace, train_step
from moptrace.check import check
from moptrace.core import Pass, chain
from moptrace.explain import explain
from moptrace.passes import checkpoint as checkpoint_pass
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.offload import offload
from moptrace.passes.recompute import regather
from moptrace.stages import hop, in_order, receive, received, send, share, shared, stages_of
from moptrace.testing import (
    ModelSpec,
    SimulatedSteps,
    Step,
    assert_same_function,
    assert_same_step,
    assert_same_weights,
    eager_step,
    whole_state,
)
from sweeps import sweep
from test_train_step import ADAMW, all_of

Pools = Callable[[int], Ranks]

# The embedding is also the last stage's, and each layer's router has a term of the loss.
SPEC = ModelSpec(
    layers=("moe", "dense", "moe"),
    hidden=8,
    vocabulary=16,
    experts=4,
    shared="gated",
    attention="fused",
    tied=True,
    balance=0.1,
)
MICRO_BATCHES = 3


def batch_of(seed: int, sequences: int = 4, words: int = SPEC.vocabulary) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (sequences, 6), generator=generator)
    labels = ids.clone()
    labels[0, 2:] = -100
    return {"input_ids": ids, "labels": labels}


@cache
def program(spec: ModelSpec = SPEC) -> Program:
    return canonical()(trace(spec.build(), batch_of(99)))


def local(plan: Plan, ranks: int, spec: ModelSpec = SPEC) -> Program:
    return sharded(plan.resolve(ranks, [spec.experts]), ranks)(program(spec))


# --- when a stage does what -----------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (3, 5), (4, 2), (5, 9)])
def test_forward_and_backward_take_turns(stages: int, micro_batches: int) -> None:
    order = in_order(stages, micro_batches)
    assert len(set(order)) == len(order) == 2 * stages * micro_batches
    place = {(t.stage, t.micro_batch, t.backward): at for at, t in enumerate(order)}
    for (stage, number, backward), at in place.items():
        before = [(stage, number, False)] if backward else []
        neighbour = stage + 1 if backward else stage - 1
        before += [(neighbour, number, backward)] if 0 <= neighbour < stages else []
        assert all(place[x] < at for x in before)
    for stage in range(stages):
        kept, most = 0, 0
        for task in order:
            if task.stage == stage:
                kept += -1 if task.backward else 1
                most = max(most, kept)
        assert most == min(stages - stage, micro_batches)  # of which something is kept


# --- which stage has what -------------------------------------------------------------------------


def test_layers_are_divided_in_order_and_their_parameters_with_them() -> None:
    staged = local(Plan(pp=2, pp_layers=(1, 2)), 2)
    assert staged.layout is not None and staged.layout.layers == (1, 2)
    stage = {p.fqn: p.stage for p in staged.signature.parameters}
    for name, owner in stage.items():
        layer = re.match(r"layers\.(\d)", name)
        first = name.startswith("embedding") if layer is None else layer[1] == "0"
        assert owner == int(not first), name
    hops = Counter((n.args[1], n.args[2]) for n in staged.nodes if n.target is hop)
    # The tied weight, the residual stream, and the routers' terms of the loss.
    assert set(hops) == {(0, 1)} and hops[0, 1] >= 3


def test_the_default_division_balances_the_work() -> None:
    spec = ModelSpec(layers=("dense",) * 6, vocabulary=13)
    assert local(Plan(pp=3), 3, spec).layout.layers == (2, 2, 2)  # type: ignore[union-attr]
    wide = ModelSpec(layers=("dense",) * 6, vocabulary=13_000)  # the projection is the last stage's
    assert local(Plan(pp=2), 2, wide).layout.layers == (5, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan(pp=4), "pp=4 stages need a layer each, and 3 were found"),
        (
            Plan(pp=2, pp_layers=(2, 2)),
            r"pp_layers=\(2, 2\) does not divide 3 layers.* add up to 3",
        ),
        (Plan(pp=2, pp_layers=(3,)), "give 2 numbers"),
        (Plan(pp=2, pp_layers=(0, 3)), "of 1 or more"),
    ],
)
def test_layers_that_cannot_be_divided_so_are_refused(plan: Plan, match: str) -> None:
    with pytest.raises(errors.PlanError, match=match):
        local(plan, plan.pp)


def test_a_program_with_stages_computes_the_step_of_one_device() -> None:
    assert_same_function(local(Plan(pp=3, ep=2), 6), SPEC.build(), batch_of(1))


def test_the_checker_misses_every_hop_that_is_gone_or_doubled() -> None:
    staged = local(Plan(pp=3, count_tokens=True), 3)
    hops = [node.name for node in staged.nodes if node.target is hop]
    assert len(hops) > 4
    for name in hops:
        for doubled in (False, True):
            graph, _ = staged.copy_graph()
            node = next(n for n in graph.nodes if n.name == name)
            if doubled:
                with graph.inserting_after(node):
                    again = graph.node_copy(node)
                node.replace_all_uses_with(again)
                again.args = (node, *node.args[1:])
            else:
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
            with pytest.raises(errors.CheckError, match=r"a stage does not have|is stage"):
                check(staged.with_graph(graph))


# --- the same step --------------------------------------------------------------------------------

BUFFERED = ModelSpec(layers=("moe", "moe"), router="corrected_sigmoid", hidden=8, vocabulary=16)
CASES: dict[str, tuple[ModelSpec, int, Plan, dict[str, Any]]] = {
    "two stages": (SPEC, 4, Plan(pp=2, ep=2), {}),
    "three stages": (SPEC, 3, Plan(pp=3, count_tokens=True), {"schedule": overlapped()}),
    "uneven shards": (
        ModelSpec(layers=("moe", "dense"), vocabulary=13, experts=5),
        4,
        Plan(pp=2, ep=2),
        {"schedule": overlapped()},
    ),
    "tensor parallel": (SPEC, 4, Plan(pp=2, tp=2), {"schedule": overlapped()}),
    "context parallel": (SPEC, 4, Plan(pp=2, cp=2, context="ring", logits_bytes=0), {}),
    "chunks, computed again": (SPEC, 4, Plan(pp=2, ep=2, expert_tokens=7), {}),
    "layers computed again": (
        SPEC,
        2,
        Plan(pp=2),
        {"activations": checkpoint_pass.checkpoint(), "schedule": overlapped()},
    ),
    "activations on the host": (
        SPEC,
        3,
        Plan(pp=3),
        {"activations": chain(checkpoint_pass.checkpoint(), offload()), "schedule": overlapped()},
    ),
    "weights gathered again": (SPEC, 4, Plan(pp=2), {"schedule": chain(regather(), overlapped())}),
    "updates in forward": (
        SPEC,
        4,
        Plan(pp=2, ep=2),
        {"updates": "forward", "state": "host", "schedule": overlapped()},
    ),
    "updates in backward": (SPEC, 2, Plan(pp=2), {"updates": "backward", "max_norm": None}),
    "a buffer that is read": (BUFFERED, 2, Plan(pp=2), {"schedule": overlapped()}),
}
QUICK = ("uneven shards", "activations on the host")


@pytest.mark.parametrize("name", sweep(CASES, QUICK))
def test_stages_compute_what_one_would(name: str) -> None:
    spec, ranks, plan, how = CASES[name]
    whole, make = whole_state(spec.build()), all_of(ADAMW)

    def steps(chosen: Plan, count: int, **options: Any) -> SimulatedSteps:
        given = {"max_norm": 0.3, "accumulate": MICRO_BATCHES, **options}
        return SimulatedSteps(local(chosen, count, spec), whole, make, **given)

    alone = replace(plan, pp=1)
    plain = {k: x for k, x in how.items() if k == "max_norm"}
    words = spec.vocabulary
    fed = [[batch_of(10 * n + i, words=words) for i in range(MICRO_BATCHES)] for n in range(3)]
    one, several = steps(alone, ranks // plan.pp, **plain), steps(plan, ranks, **how)
    for batches in fed:
        for a, b in zip(one.step(*batches), several.step(*batches), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-13, atol=0)
    assert_same_weights(several.weights(), one.weights(), 1e-13)


@cache
def of_stages(
    plan: Plan, ranks: int, schedule: Pass | None, micro_batches: int = MICRO_BATCHES
) -> list[Program]:
    """The program of each stage's first rank."""
    made = SimulatedSteps(
        local(plan, ranks),
        whole_state(SPEC.build()),
        all_of(ADAMW),
        max_norm=0.3,
        accumulate=micro_batches,
        schedule=schedule,
    )
    return made.programs[:: ranks // plan.pp]


@pytest.mark.parametrize("schedule", [None, overlapped()], ids=["as it is", "overlapped"])
def test_what_goes_one_way_is_taken_in_the_order_in_which_it_leaves(schedule: Pass | None) -> None:
    programs = of_stages(Plan(pp=3), 3, schedule)
    for one, other in permutations(range(3), 2):
        left = [n.args[2] for n in programs[one].nodes if n.target is send and n.args[1] == other]
        came = [
            n.args[3] for n in programs[other].nodes if n.target is receive and n.args[2] == one
        ]
        assert left == came
        assert left or abs(one - other) != 1
    everyone = [[n.args[1:] for n in p.nodes if n.target is shared] for p in programs]
    assert everyone[0] == everyone[1] == everyone[2] != []


def test_what_comes_is_asked_for_before_another_micro_batch_s_work() -> None:
    second = of_stages(Plan(pp=3), 3, None)[1]
    place = {node: at for at, node in enumerate(second.nodes)}
    products = [place[n] for n in second.nodes if "mm" in str(n.target)]
    takes = [(place[n.all_input_nodes[0]], place[n]) for n in second.nodes if n.target is received]
    hidden = [any(asked < at < taken for at in products) for asked, taken in takes]
    assert sum(hidden) >= len(hidden) // 2


def test_a_lost_message_is_noticed() -> None:
    steps = SimulatedSteps(
        local(Plan(pp=2), 2), whole_state(SPEC.build()), all_of(ADAMW), accumulate=1
    )
    first, second = steps.programs
    graph, _ = first.copy_graph()
    graph.erase_node(next(n for n in graph.nodes if n.target is send))
    steps._run = partial(_with, [first.with_graph(graph), second], steps._run)  # type: ignore
    with pytest.raises(AssertionError, match="wait for ever"):
        steps.step(batch_of(0))


def _with(programs: list[Program], run: Any, _: Any, batches: Any) -> Any:
    return run(programs, batches)


def test_explain_counts_what_leaves_a_stage() -> None:
    plan = Plan(pp=3)
    staged, programs = local(plan, 3), of_stages(plan, 3, None, 1)
    elements = 0
    for stage, own in enumerate(programs):
        sent = [n.all_input_nodes[0].meta["val"] for n in own.nodes if n.target is send]
        told = explain(staged, stage)
        traffic = next(t for t in told.traffic if t.kind == "hop")
        assert traffic.count == len(sent)
        assert traffic.bytes == sum(x.numel() * x.element_size() for x in sent)
        elements += told.parameters
        assert f"stage {stage} of 3" in str(told)
    assert elements == sum(p.numel() for p in SPEC.build().parameters())


def test_the_norm_has_every_stage_s_part() -> None:
    (*_, own) = of_stages(Plan(pp=3), 3, None)
    flat = next(p for p in own.history if p.made_by and p.made_by.name == "pipeline")
    stage = stages_of(flat)
    shares = [n for n in flat.nodes if n.target is share and n.meta["val"].dim() == 0]
    assert {n.args[1] for n in shares} == {0, 1, 2}
    assert all(stage[n] is None for n in shares)


# --- real ranks -----------------------------------------------------------------------------------


def on_rank(plan: Plan, folder: str) -> None:
    """An ordinary loop, then a training step, beside one device; then a checkpoint."""
    ranks = dist.get_world_size()
    plan = replace(plan, micro_batches=2, count_tokens=True)
    fed = [batch_of(n, 8) for n in range(5)]
    own = {k: x[: 8 * plan.pp // ranks] for k, x in fed[0].items()}
    mesh = init_device_mesh("cpu", (ranks,))
    spec = replace(SPEC, balance=0.0)  # which is a mean over micro-batches
    model, eager = parallelize(spec.build(), mesh, plan, batch=own), spec.build()
    update, reference = ADAMW(model.parameters()), ADAMW(eager.parameters())
    step = train_step(model, update, max_norm=0.3, updates="forward", state="host")
    assert len(list(model.parameters())) < len(list(eager.parameters()))
    for number, whole in enumerate(fed):
        want = eager_step(eager, whole)
        norm = torch.nn.utils.clip_grad_norm_(eager.parameters(), 0.3)
        local_batch = model.local_batch(whole)
        with torch.no_grad():
            torch.testing.assert_close(model(**local_batch)[0], want.loss, rtol=1e-10, atol=0)
        if number < 2:
            loss, logits = model(**local_batch)
            assert logits is None
            (2 * loss / 2).backward()
            found = model.full_gradients()
            if number == 0:
                have = {n: g for n, g in found.items() if g is not None}
                assert_same_step(Step(loss.detach(), have, {}), want)
            taken = model.clip_grad_norm_(0.3)
            update.step()
            update.zero_grad()
        else:
            loss = step(**local_batch)
            assert step.grad_norm is not None
            taken = step.grad_norm
        torch.testing.assert_close(loss.detach(), want.loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(taken, norm, rtol=1e-10, atol=0)
        reference.step()
        reference.zero_grad()
    assert_same_weights(model.full_state_dict(), whole_state(eager))
    per_forward = 8 * 6 * SPEC.k * SPEC.layers.count("moe")
    assert int(model.get_buffer("tokens_per_expert").sum()) == 2 * len(fed) * per_forward
    on_rank_checkpoint(model, update, eager, folder)


def on_rank_checkpoint(model: Any, update: Any, eager: Any, folder: str) -> None:
    """Each stage saves what it has, under the parameters' names, and loads it again."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, moments = get_state_dict(model, update, options=flat)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    count = {n: x.detach().clone() for n, x in moments.items() if isinstance(x, Tensor)}
    whole = model.full_state_dict()
    model.load_full_state_dict({n: torch.zeros_like(x) for n, x in whole.items()})
    assert all(not p.detach().to_local().any() for p in model.parameters())
    for state in update.state.values():
        state["exp_avg"].zero_()
    weights, moments = get_state_dict(model, update, options=flat)
    saved = {"model": weights, "optimizer": moments}
    checkpoint.load(saved, checkpoint_id=folder)
    set_state_dict(
        model,
        update,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=flat,
    )
    assert_same_weights(model.full_state_dict(), whole_state(eager))
    _, moments = get_state_dict(model, update, options=flat)
    for name, x in count.items():
        have, want = (t.to_local() if isinstance(t, DTensor) else t for t in (moments[name], x))
        assert torch.equal(have, want)


REAL = [(4, Plan(pp=2, ep=2)), (2, Plan(pp=2)), (3, Plan(pp=3)), (4, Plan(pp=2, tp=2))]


@pytest.mark.parametrize(("count", "plan"), sweep(REAL, REAL[:1]), ids=str)
def test_stages_of_real_ranks(count: int, plan: Plan, ranks: Pools) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks(count)(on_rank, plan, folder)
