"""Collectives that travel while others compute: the same bits, one order, bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh

from gloo import Ranks
from moptrace import Plan, Program, parallelize, roles, trace, train_step
from moptrace.collectives import start, wait
from moptrace.core import Level, chain
from moptrace.costs import products
from moptrace.errors import PassError
from moptrace.kernels.expert_function import ExpertOperator
from moptrace.liveness import peak_memory, write_backs
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.overlap import overlap
from moptrace.passes.recompute import regather
from moptrace.passes.start_and_wait import start_and_wait
from moptrace.testing import ModelSpec, SimulatedSteps, assert_same_weights, whole_state
from subjects import assert_same_bits
from sweeps import sweep
from test_train_step import ADAMW, Eager, all_of, assert_close

ops = torch.ops.moptrace

SPEC = ModelSpec(
    layers=("moe", "moe"), width=16, hidden=32, vocabulary=16, experts=4, shared="gated",
    style="canonical",
)  # fmt: skip
ONE = replace(SPEC, layers=("moe",))
CHUNKED = Plan(ep=4, expert_tokens=8, recompute_experts=False)
OVERLAPPED = overlapped()


def batch_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 16, (8, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


@cache
def local(plan: Plan, ranks: int = 4, spec: ModelSpec = SPEC) -> Program:
    return sharded(plan.resolve(ranks, []), ranks)(canonical()(trace(spec.build(), batch_of(9))))


def steps(
    plan: Plan, schedule: object, accumulate: int = 1, ranks: int = 4, spec: ModelSpec = SPEC
) -> SimulatedSteps:
    given = local(plan, ranks, spec)
    state = whole_state(spec.build())
    return SimulatedSteps(given, state, all_of(ADAMW), 1.0, accumulate, schedule)  # type: ignore[arg-type]


@cache
def step(plan: Plan, schedule: object = None) -> Program:
    return steps(plan, schedule).programs[0]


# --- the same values ------------------------------------------------------------------------------

UNEVEN = replace(ONE, hidden=6, vocabulary=19, experts=5, shared="")

CASES: dict[str, tuple[Plan, int, ModelSpec]] = {
    "chunks and a shared expert": (CHUNKED, 1, ONE),
    "micro-batches": (Plan(ep=4), 2, ONE),
    "regions computed again": (replace(CHUNKED, recompute_experts=True), 1, ONE),
    "tensor parallel": (Plan(tp=2, ep=2, expert_tokens=8), 1, ONE),
    "a ring": (Plan(cp=2, ep=2, etp=2, context="ring", vp=2), 1, ONE),
    "copies": (Plan(dp_replicate=2, ep=2, edp="replicate"), 1, ONE),
    "shards of other sizes": (Plan(ep=4), 1, UNEVEN),
}


QUICK = ("micro-batches", "a ring", "shards of other sizes")


@pytest.mark.parametrize("name", sweep(CASES, QUICK))
def test_the_step_is_bitwise_the_same(name: str) -> None:
    plan, accumulate, spec = CASES[name]
    plain = steps(plan, None, accumulate, spec=spec)
    moved = steps(plan, OVERLAPPED, accumulate, spec=spec)
    fed = [batch_of(seed) for seed in range(2 * accumulate)]
    assert_same_bits(moved, plain, [fed[:accumulate], fed[accumulate:]])
    for before, after in zip(plain.programs, moved.programs, strict=True):
        assert after.level is Level.SCHEDULED
        assert sorted(_operators(after)) == sorted(_operators(before))


def _operators(program: Program) -> list[str]:
    """What is computed, whoever starts it; once for each node."""
    return [
        str(getattr(ops, str(n.args[0])).default if n.target is start else n.target)
        for n in program.nodes
        if n.op == "call_function" and n.target is not wait
    ]


def test_ranks_start_their_collectives_in_one_order() -> None:
    programs = steps(Plan(ep=4), OVERLAPPED, spec=UNEVEN).programs
    assert len({id(program) for program in programs}) > 1
    orders = [[n.args[0] for n in p.nodes if n.target is start] for p in programs]
    assert all(order == orders[0] for order in orders)


# --- what runs meanwhile --------------------------------------------------------------------------


def between(program: Program, name: str, backward: bool) -> Iterator[list[fx.Node]]:
    """For each collective of a name the nodes that run while it travels."""
    nodes = list(program.nodes)
    for at, node in enumerate(nodes):
        if node.target is start and node.args[0] == name and _is_backward(node) == backward:
            (waited,) = node.users
            yield nodes[at + 1 : nodes.index(waited)]


def _is_backward(node: fx.Node) -> bool:
    return roles.role(node).backward


def _products(nodes: list[fx.Node]) -> int:
    return sum(products(node) for node in nodes)


@pytest.mark.parametrize("backward", [False, True])
def test_a_chunk_travels_while_another_is_worked_on(backward: bool) -> None:
    program = step(CHUNKED, OVERLAPPED)
    experts = [
        sum(isinstance(n.target, ExpertOperator) for n in nodes)
        for nodes in between(program, "send_rows", backward)
    ]
    assert len(experts) == 4  # two chunks of two layers
    assert sum(n > 0 for n in experts) >= 2
    plain = step(CHUNKED, start_and_wait())
    assert not any(_products(x) for x in between(plain, "send_rows", backward))


def test_a_shared_expert_runs_while_tokens_travel() -> None:
    program = step(Plan(ep=4), OVERLAPPED)
    for nodes in between(program, "send_rows", backward=False):
        assert any("shared" in _module(n) for n in nodes if _products([n]))


def _module(node: fx.Node) -> str:
    return roles.role(node).module


def test_gradients_are_reduced_while_backward_goes_on() -> None:
    program = step(Plan(ep=2), OVERLAPPED)
    travelling = list(between(program, "reduce_scatter", backward=True))
    assert sum(_products(nodes) > 0 for nodes in travelling) >= len(travelling) / 2


def test_parameters_are_gathered_before_they_are_needed() -> None:
    program = step(Plan(ep=2), OVERLAPPED)
    covered = [_products(nodes) > 0 for nodes in between(program, "all_gather", backward=False)]
    assert sum(covered) >= 3


# --- what bounds it -------------------------------------------------------------------------------


@cache
def split_step() -> Program:
    """Chunks, and weights of experts that are gathered, in backward again."""
    return step(replace(CHUNKED, ep=2), chain(regather(), start_and_wait()))


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_so_many_are_on_their_way_at_most(ahead: int, prefetch: int) -> None:
    program = overlap(ahead, prefetch, cover=0)(split_step())
    names = {p.name for p in program.signature.parameters}
    flying: list[fx.Node] = []
    rows, gathers = [0], [0]
    for node in program.nodes:
        if node.target is start:
            flying.append(node)
        elif node.target is wait:
            flying.remove(node.all_input_nodes[0])
        rows.append(sum(n.args[0] == "send_rows" for n in flying))
        if products(node):  # those that it does not need itself
            gathers.append(sum(str(n.args[1]) in names for n in flying))
    assert not flying
    assert max(rows) == min(ahead + 1, 2)  # of two chunks
    assert max(gathers) == min(prefetch, ahead + 1)


def test_nothing_of_backward_runs_in_forward() -> None:
    plan = replace(CHUNKED, recompute_experts=True)
    moved, plain = (steps(plan, x, spec=ONE).programs[0] for x in (OVERLAPPED, None))
    flags = [_is_backward(n) for n in moved.nodes if n.op == "call_function"]
    before = [_is_backward(n) for n in plain.nodes if n.op == "call_function"]
    changes = sum(a != b for a, b in pairwise(flags))
    assert changes == sum(a != b for a, b in pairwise(before))


def test_memory_grows_by_what_travels() -> None:
    plain, moved = peak_memory(step(CHUNKED)), peak_memory(step(CHUNKED, OVERLAPPED))
    assert moved.bytes < 1.15 * plain.bytes


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(PassError, match="not ahead=-1, reach=-2"):
        overlap(ahead=-1, reach=-2)


def test_what_is_sent_is_not_overwritten_before_the_wait() -> None:
    simulated = steps(Plan(ep=2), OVERLAPPED)
    simulated.step(batch_of(0))
    program = simulated.programs[0]
    position = {node: at for at, node in enumerate(program.nodes)}
    written = {old: after for after, pairs in write_backs(program).items() for old, _ in pairs}
    sent = 0
    for old, after in written.items():
        for user in old.users:
            if user.target is start:
                (waited,) = user.users
                assert position[waited] <= position[after]
                sent += 1
    assert sent


# --- real ranks -----------------------------------------------------------------------------------


def on_rank() -> None:
    mesh = init_device_mesh("cpu", (4,))
    own = {k: v[:2] for k, v in batch_of(99).items()}
    model = parallelize(ONE.build(), mesh, CHUNKED, batch=own)
    optimizer = ADAMW(model.parameters())
    run = train_step(model, optimizer, max_norm=0.5, schedule=OVERLAPPED)
    eager = Eager(ONE.build(), all_of(ADAMW), 0.5)
    for number in range(2):
        loss = run(**model.local_batch(batch_of(number)))
        want, norm = eager.step(batch_of(number))
        assert_close(loss.detach(), want)
        assert_close(run.grad_norm, norm)
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


def test_real_ranks_take_the_same_steps(ranks: Callable[[int], Ranks]) -> None:
    ranks(4)(on_rank)
