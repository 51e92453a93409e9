"""The optimizer's state on the host: the same bits, and no more than some buckets on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moptrace import Program, roles, train_step
from moptrace.errors import PassError
from moptrace.liveness import peak_memory, sizes_of_values
from moptrace.passes.stream_state import stream_state
from subjects import assert_same_bits, most_prefetched
from sweeps import sweep
from test_defer_updates import program_of, steps
from test_train_step import ADAMW, SMALL, Pools, batch_of, parallel_of

ops = torch.ops.moptrace

BUCKET = 2_100  # bytes: no parameter has more
ORDERS: list[dict[str, Any]] = [
    {"updates": "after"},
    {"updates": "forward"},
    {"updates": "backward", "max_norm": None},
]


@pytest.mark.parametrize("slots", sweep([1, 2, 3], quick=[2]))
@pytest.mark.parametrize("order", ORDERS, ids=lambda x: x["updates"])
def test_no_more_than_the_slots_are_on_the_device(order: dict[str, Any], slots: int) -> None:
    program = program_of(**order, state=stream_state(BUCKET, slots))
    most = most_prefetched(program)
    assert (slots - 1) * BUCKET / 2 < most <= slots * BUCKET


def test_the_state_takes_the_memory_of_the_host() -> None:
    device, host = program_of(), program_of(state=stream_state(BUCKET))
    inputs, sizes = host.graph.find_nodes(op="placeholder"), sizes_of_values(host)
    away = {state.name for state in host.signature.states if state.host}
    on_host = sum(sizes[node] for node in inputs if node.name in away)
    assert peak_memory(host).host_bytes == on_host > 0
    assert peak_memory(host).bytes <= peak_memory(device).bytes - on_host + 2 * BUCKET


def test_the_next_bucket_comes_while_one_is_updated() -> None:
    program = program_of("after", state=stream_state(BUCKET))
    place = {node: at for at, node in enumerate(program.nodes)}
    waits = [node for node in program.nodes if node.target is ops.wait_prefetch.default]
    ahead = [place[wait] - place[wait.all_input_nodes[0]] for wait in waits]
    updates = sum(n.target is ops.offload.default for n in program.nodes) // 2
    length = len([n for n in program.nodes if roles.component(n) == "optimizer"]) // updates
    assert sum(distance > length for distance in ahead) > len(ahead) / 2


def test_gradients_that_wait_can_be_on_the_host_too() -> None:
    def bytes_of(program: Program) -> int:
        return peak_memory(program).bytes

    policy = stream_state(BUCKET, gradients=True)
    program = program_of(state=policy)
    waits = [s for s in program.signature.states if s.path.startswith("pending.") and s.shape]
    assert waits and all(state.host for state in waits)
    assert bytes_of(program) < bytes_of(program_of(state=stream_state(BUCKET)))
    away = steps(updates="forward", state=policy)
    assert_same_bits(steps(), away, [[batch_of(seed)] for seed in range(4)])


def test_a_parameter_that_is_larger_than_a_bucket_is_noted() -> None:
    program = program_of(state=stream_state(bucket=8))
    assert any("buckets of 8 bytes, but one parameter's has" in note for note in program.notes)


@pytest.mark.parametrize("options", [{"bucket": 0}, {"slots": 0}], ids=str)
def test_nothing_fits_into_nothing(options: dict[str, int]) -> None:
    with pytest.raises(PassError, match="a byte and a slot at least"):
        stream_state(**options)


def on_rank() -> None:
    """State is written in place, where ``optimizer.state`` has it."""
    model = parallel_of(SMALL, 2)
    optimizer = ADAMW(model.parameters())
    step = train_step(model, optimizer, state="host")
    seen: list[list[int]] = []
    for number in range(3):
        step(**model.local_batch(batch_of(number)))
        moments = [entry["exp_avg"] for entry in optimizer.state.values()]
        seen.append([x.to_local().data_ptr() for x in moments])
    assert seen[1] == seen[2]


def test_new_state_is_written_where_the_old_one_was(ranks: Pools) -> None:
    ranks(2)(on_rank)
