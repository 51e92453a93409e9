"""Updates that wait for the next forward: the same bits, whoever looks in between."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import fx
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from moptrace import Plan, Program, errors, parallelize, roles, train_step
from moptrace.core import Pass, chain
from moptrace.liveness import peak_memory, sizes_of_values
from moptrace.passes.default import overlapped
from moptrace.passes.recompute import regather
from moptrace.passes.stream_state import stream_state
from moptrace.roles import Component
from moptrace.testing import SimulatedSteps, assert_same_weights, whole_state
from moptrace.updates import PENDING
from subjects import assert_same_bits
from sweeps import sweep
from test_train_step import (
    ADAMW,
    OPTIMIZERS,
    SMALL,
    Eager,
    Pools,
    all_of,
    assert_close,
    batch_of,
    local_program,
    parallel_of,
)

STREAMED = stream_state(bucket=500)
HIDDEN = chain(regather(), overlapped())


def steps(name: str = "AdamW", max_norm: float | None = 0.5, **options: Any) -> SimulatedSteps:
    local = local_program(SMALL, 2, ep=2)
    whole = whole_state(SMALL.build())
    return SimulatedSteps(local, whole, all_of(OPTIMIZERS[name]), max_norm, **options)


CASES = [
    ("AdamW", 0.5, 1, None, "device"),
    ("AdamW", 0.5, 2, HIDDEN, STREAMED),
    ("SGD", None, 1, HIDDEN, "device"),  # there is no state
    ("AdamW, lr a tensor", None, 4, None, STREAMED),
]


@pytest.mark.parametrize(
    ("name", "max_norm", "accumulate", "schedule", "state"), sweep(CASES, quick=CASES[:2])
)
def test_the_steps_are_bitwise_the_same(
    name: str, max_norm: float | None, accumulate: int, schedule: Pass | None, state: Any
) -> None:
    plain = steps(name, max_norm, accumulate=accumulate)
    options: dict[str, Any] = {"schedule": schedule, "updates": "forward", "state": state}
    late = steps(name, max_norm, accumulate=accumulate, **options)
    fed = [batch_of(seed) for seed in range(5 * accumulate)]
    parts = [fed[i : i + accumulate] for i in range(0, len(fed), accumulate)]
    assert_same_bits(plain, late, parts)


def program_of(updates: str = "forward", count: int = 3, **options: Any) -> Program:
    """The program of a step after some others: with the optimizer's state, and what waits."""
    simulated = steps(updates=updates, **options)
    for number in range(count):
        simulated.step(batch_of(number))
    return simulated.programs[0]


def test_each_update_runs_just_before_its_parameter_is_used() -> None:
    program = program_of()
    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    names = {p.name for p in program.signature.parameters}
    place = {node: at for at, node in enumerate(program.nodes)}
    for output, new in zip(program.signature.outputs, program.outputs, strict=True):
        if output.updates not in names:
            continue
        first = min((u for u in new.users if u.op != "output"), key=place.__getitem__)
        between = [x for x in program.nodes if place[new] < place[x] < place[first]]
        assert {roles.component(x) for x in between} <= {Component.OPTIMIZER, Component.CLIPPING}
        readers = {roles.component(x) for x in inputs[output.updates].users}
        assert readers == {Component.OPTIMIZER}, "forward reads the old value"


def test_only_what_waits_takes_more_memory() -> None:
    """Forward reads a new value where the old one was."""
    late, plain = program_of("forward"), program_of("after")
    inputs = late.graph.find_nodes(op="placeholder")
    waits = {s.name for s in late.signature.states if s.path.startswith(PENDING)}
    sizes = sizes_of_values(late)
    waiting = sum(sizes[node] for node in inputs if node.name in waits)
    assert peak_memory(late).bytes == peak_memory(plain).bytes + waiting


def test_forward_gathers_and_backward_gathers_again() -> None:
    def gathers(program: Program) -> list[fx.Node]:
        return [n for n in program.nodes if n.target is torch.ops.moptrace.all_gather.default]

    again = chain(regather())
    plain, late = program_of("after", schedule=again), program_of("forward", schedule=again)
    assert len(gathers(late)) == len(gathers(plain)) > len(gathers(program_of("after")))


def test_options_count_from_the_step_in_which_they_are_set() -> None:
    plain, late = steps(), steps(updates="forward")
    for number in range(5):
        for stepper in (*plain.steppers, *late.steppers):
            stepper.optimizers[0].param_groups[0]["weight_decay"] = 0.1 * (number // 2)
            stepper.optimizers[0].param_groups[0]["lr"] = 0.01 * (number + 1)
        assert_same_bits(plain, late, [[batch_of(number)]] if number == 4 else [])
        if number < 4:
            plain.step(batch_of(number))
            late.step(batch_of(number))
    assert_same_bits(plain, late, [])


# --- real ranks -----------------------------------------------------------------------------------


def on_rank(place: str) -> None:
    """Every way to look at the model or the optimizer between steps sees what it should."""
    model = parallel_of(SMALL, 2)
    optimizer = ADAMW(model.parameters())
    state = stream_state(bucket=500, gradients=True) if place == "host" else "device"
    step = train_step(model, optimizer, max_norm=0.5, updates="forward", state=state)
    eager = Eager(SMALL.build(), all_of(ADAMW), 0.5)

    def both(seed: int, size: int = 8) -> None:
        loss = step(**model.local_batch(batch_of(seed, size)))
        want, norm = eager.step(batch_of(seed, size))
        assert_close(loss, want)
        assert_close(step.grad_norm, norm)

    for seed in range(4):
        both(seed)
    assert "pending." in " ".join(s.path for s in step.program.signature.states)
    batch = batch_of(7)
    assert_close(model(**model.local_batch(batch))[0].detach(), eager.model(**batch)[0].detach())
    both(4)
    both(5)
    moments = {float(x["step"]) for x in optimizer.state_dict()["state"].values()}
    assert moments == {6.0}
    both(6, size=4)  # what waits was left by a program of another shape
    both(7)
    both(8, size=4)
    optimizer.zero_grad()
    model(**model.local_batch(batch))[0].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    eager.step(batch)
    both(9)
    other = train_step(model, optimizer, max_norm=0.5)  # finishes what the first one left
    other(**model.local_batch(batch_of(10)))
    eager.step(batch_of(10))
    both(11)
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


@pytest.mark.parametrize("state", sweep(["device", "host"], quick=["host"]))
def test_whoever_looks_sees_finished_updates(state: str, ranks: Pools) -> None:
    ranks(2)(on_rank, state)


def on_rank_of_a_training_loop() -> None:
    """A learning rate in a tensor, and a buffer, are written between steps, as loops do."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = {k: v[:4] for k, v in batch_of(99).items()}
    model = parallelize(SMALL.build(), mesh, Plan(ep=2, count_tokens=True), batch=local)
    rates = [torch.tensor(0.0, dtype=torch.float64) for _ in range(2)]
    eager = Eager(SMALL.build(), all_of(partial(ADAMW, lr=rates[1])))
    step = train_step(model, ADAMW(model.parameters(), lr=rates[0]), updates="forward")
    for number in range(5):
        for rate in rates:
            rate.fill_(0.01 / (number + 1))
        assert_close(step(**model.local_batch(batch_of(number))), eager.step(batch_of(number))[0])
        counts = model.get_buffer("tokens_per_expert")
        assert int(counts.sum()) == 8 * 6 * SMALL.k
        counts.zero_()
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


def test_a_training_loop_writes_rates_and_buffers(ranks: Pools) -> None:
    ranks(2)(on_rank_of_a_training_loop)


def on_rank_of_refused_batches(where: str) -> None:
    """A batch that fails in the midst of the updates is left out, and nothing else."""
    model = parallel_of(SMALL, 2)
    optimizer = ADAMW(model.parameters())
    step = train_step(model, optimizer, updates="forward", state="host", updates_on=where)
    eager = Eager(SMALL.build(), all_of(ADAMW))
    for number in range(6):
        bad = batch_of(50 + number)
        wrong = "labels" if number % 2 else "input_ids"
        bad[wrong] = bad[wrong] + 1000
        with pytest.raises((IndexError, errors.MoptraceError)):
            step(**model.local_batch(bad))
        step(**model.local_batch(batch_of(number)))
        eager.step(batch_of(number))
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_refused_batch_loses_nothing(where: str, ranks: Pools) -> None:
    ranks(2)(on_rank_of_refused_batches, where)


def on_rank_checkpoint(folder: str) -> None:
    model = parallel_of(SMALL, 2)
    optimizer = ADAMW(model.parameters())
    step = train_step(model, optimizer, updates="forward", state="host")
    eager = Eager(SMALL.build(), all_of(ADAMW))
    for number in range(3):
        step(**model.local_batch(batch_of(number)))
        eager.step(batch_of(number))
    weights, moments = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    step(**model.local_batch(batch_of(8)))  # which loading undoes
    weights, moments = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": moments}
    step(**model.local_batch(batch_of(9)))
    checkpoint.load(saved, checkpoint_id=folder)  # into the parameters themselves
    with pytest.raises(errors.StepError, match=r"pending; that update is dropped.*step.flush\(\)"):
        model.state_dict()
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    step(**model.local_batch(batch_of(5)))
    eager.step(batch_of(5))
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_has_finished_updates(ranks: Pools) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks(2)(on_rank_checkpoint, folder)


def on_rank_of_wrong_words() -> None:
    model = parallel_of(SMALL, 2)
    for option in ({"updates": "later"}, {"state": "disk"}):
        with pytest.raises(errors.StepError, match="is none of"):
            train_step(model, ADAMW(model.parameters()), **option)  # type: ignore[arg-type]


def test_what_is_no_choice_is_refused(ranks: Pools) -> None:
    ranks(2)(on_rank_of_wrong_words)
