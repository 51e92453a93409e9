"""Large parameters are updated part by part: the same bits, and never twice in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moptrace import Program, train_step
from moptrace.core import Pass, chain, written
from moptrace.errors import PassError
from moptrace.executable import executable
from moptrace.kernels.host_memory import finish_copies
from moptrace.liveness import blocks_in_place, peak_memory
from moptrace.passes.divide_updates import divide_updates
from moptrace.passes.stream_state import stream_state
from moptrace.passes.update_on_host import update_on_host
from moptrace.testing import assert_same_weights, whole_state
from subjects import assert_same_bits, most_prefetched
from sweeps import sweep
from test_defer_updates import program_of, steps
from test_train_step import ADAMW, SMALL, Eager, Pools, all_of, assert_close, batch_of, parallel_of

ops, aten = torch.ops.moptrace, torch.ops.aten

BUCKET = 600  # bytes: a third of the parameters have more state


def on_host(bucket: int = BUCKET) -> Pass:
    return chain(update_on_host(bucket=bucket), stream_state(bucket, gradients=True))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"updates": "after", "max_norm": 0.5, "state": stream_state(BUCKET)}),
    ("AdamW, fused", {"updates": "forward", "max_norm": 0.5, "state": on_host()}),
    ("Adam, amsgrad", {"updates": "backward", "max_norm": None, "state": stream_state(BUCKET)}),
    ("AdamW", {"updates": "backward", "max_norm": None, "state": on_host()}),
    ("SGD, momentum", {"updates": "forward", "max_norm": 0.5, "state": stream_state(100)}),
]


@pytest.mark.parametrize(("name", "options"), sweep(CASES, quick=CASES[:2]))
def test_the_steps_are_bitwise_the_same(name: str, options: dict[str, Any]) -> None:
    divided = steps(name, **options)
    assert_same_bits(steps(name, options["max_norm"]), divided, [[batch_of(n)] for n in range(3)])
    assert any(written(node) for p in program_history(divided) for node in p.outputs)


def program_history(simulated: Any) -> list[Program]:
    return list(simulated.steppers[0]._programs.values())


@pytest.mark.parametrize("gradients", [False, True], ids=["state", "with gradients"])
def test_no_more_than_the_slots_are_on_the_device(gradients: bool) -> None:
    program = program_of("forward", state=stream_state(BUCKET, gradients=gradients))
    most = most_prefetched(program)
    assert BUCKET < most <= 2 * BUCKET
    assert not any("is not divided" in note for note in program.notes)


@pytest.mark.parametrize("updates", ["after", "forward"])
def test_nothing_is_there_twice(updates: str) -> None:
    """What an update needs beside the parameter and its state is of the size of a part."""
    whole = program_of(updates, name="AdamW, fused", state=stream_state(4_000))
    divided = program_of(updates, name="AdamW, fused", state=stream_state(BUCKET))
    writes = [node for node in divided.nodes if node.target is ops.write_block.default]
    assert writes and blocks_in_place(divided).keys() == set(writes)
    assert peak_memory(divided).bytes <= peak_memory(whole).bytes
    assert peak_memory(divided).host_bytes == peak_memory(whole).host_bytes
    module = executable(divided, "cpu")
    targets = [node.target for node in module.graph.nodes]
    assert ops.write_block.default not in targets and ops.fused_adam.default not in targets
    assert "fused_adam_" in str(module.graph)


def test_a_block_that_is_read_later_is_not_written_over() -> None:
    program = program_of("after", state=stream_state(BUCKET))
    graph, copies = program.copy_graph()
    write = next(iter(blocks_in_place(program)))
    base = blocks_in_place(program)[write]
    same = [x for x, old in blocks_in_place(program).items() if old is base]
    others = len(blocks_in_place(program)) - len(same)
    output = graph.output_node()
    with graph.inserting_before(output):
        late = graph.call_function(aten.neg.default, (copies[base],))
    late.meta = dict(copies[base].meta)
    loss = output.args[0][0]  # type: ignore[index]
    with graph.inserting_before(output):
        read = graph.call_function(aten.add.Tensor, (loss, late))
    read.meta = dict(loss.meta)  # type: ignore[union-attr]
    output.args = ((read, *output.args[0][1:]),)  # type: ignore[index]
    assert len(blocks_in_place(program.with_graph(graph))) == others


def test_what_mixes_elements_is_left_in_one_piece() -> None:
    class Normed(torch.optim.SGD):
        """Momentum, with its own norm."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    held = self.state[p]
                    if not held:
                        held["mean"] = torch.zeros_like(p)
                    held["mean"].mul_(0.9).add_(p.grad)
                    p.sub_(group["lr"] * torch.cumsum(held["mean"], 0))

    assert not any(written(x) for x in divided_by(Normed).outputs)
    assert any(written(x) for x in divided_by(torch.optim.SGD, momentum=0.9).outputs)


def divided_by(kind: Any, **options: Any) -> Program:
    """The step of a linear layer of one rank."""
    from moptrace.testing import SimulatedSteps
    from test_train_step import local_program

    simulated = SimulatedSteps(
        local_program(SMALL, 1),
        whole_state(SMALL.build()),
        all_of(lambda params: kind(params, lr=0.1, **options)),
        state=divide_updates(100),
    )
    for number in range(2):
        simulated.step(batch_of(number))
    return simulated.programs[0]


def test_there_is_a_byte_at_least() -> None:
    with pytest.raises(PassError, match="a byte of state at least"):
        divide_updates(0)


# --- real ranks -----------------------------------------------------------------------------------


def on_rank(place: str, updates: str) -> None:
    """Parts are written where the parameters and their state are."""
    model = parallel_of(SMALL, 2)
    optimizer = ADAMW(model.parameters(), fused=True)
    state = on_host() if place == "host" else stream_state(BUCKET, gradients=True)
    max_norm = None if updates == "backward" else 0.5
    step = train_step(model, optimizer, max_norm=max_norm, updates=updates, state=state)
    eager = Eager(SMALL.build(), all_of(ADAMW), max_norm)
    where: list[list[int]] = []
    for seed in range(4):
        want, _ = eager.step(batch_of(seed))
        assert_close(step(**model.local_batch(batch_of(seed))), want)
        finish_copies()
        held: list[Tensor] = [entry["exp_avg"].to_local() for entry in optimizer.state.values()]
        where.append([x.data_ptr() for x in held])
    assert where[1] == where[-1]
    assert any(written(node) for node in step.program.outputs)
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))
    assert isinstance(next(model.parameters()), nn.Parameter)


RANKS = [("device", "forward"), ("host", "forward"), ("host", "backward"), ("device", "after")]


@pytest.mark.parametrize(("place", "updates"), sweep(RANKS, quick=RANKS[:3]))
def test_ranks_train_as_one_device(place: str, updates: str, ranks: Pools) -> None:
    ranks(2)(on_rank, place, updates)
