"""Updates on the host: the same bits, beside everything else, where they are cheaper."""

from __future__ import annotations

import math
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from moptrace import Program, errors, train_step
from moptrace.core import Pass, chain
from moptrace.costs import Machine
from moptrace.errors import PassError
from moptrace.kernels.host_memory import finish_copies, prefetch, run_on_host, wait_prefetch
from moptrace.kernels.host_update import HostUpdate
from moptrace.liveness import peak_memory, sizes_of_values
from moptrace.passes.stream_state import stream_state
from moptrace.passes.update_on_host import update_on_host
from moptrace.testing import assert_same_weights, whole_state
from moptrace.timeline import predict
from subjects import assert_same_bits, most_prefetched
from sweeps import sweep
from test_defer_updates import program_of, steps
from test_train_step import ADAMW, SMALL, Eager, Pools, all_of, assert_close, batch_of, parallel_of

ops = torch.ops.moptrace

BUCKET = 2_100  # bytes: no parameter has more state
CPU = torch.device("cpu")


def on_host(gradients: bool = False, slots: int = 2, **options: Any) -> Pass:
    return chain(
        update_on_host(bucket=BUCKET, slots=slots, **options),
        stream_state(BUCKET, slots, gradients),
    )


def updates_of(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes if isinstance(node.target, HostUpdate)]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW, fused", {"updates": "forward", "max_norm": None, "state": on_host(gradients=True)}),
    ("AdamW", {"updates": "after", "max_norm": 0.5, "accumulate": 2, "state": on_host()}),
    ("AdamW", {"updates": "backward", "max_norm": None, "state": on_host()}),
    ("AdamW", {"updates": "forward", "max_norm": 0.5, "state": on_host()}),
    ("AdamW, fused", {"updates": "forward", "max_norm": 0.5, "state": on_host()}),
    ("Adam, amsgrad", {"updates": "after", "max_norm": None, "state": on_host(slots=1)}),
]


@pytest.mark.parametrize(("name", "options"), sweep(CASES, quick=CASES[:2]))
def test_the_steps_are_bitwise_the_same(name: str, options: dict[str, Any]) -> None:
    accumulate = options.get("accumulate", 1)
    plain = steps(name, options["max_norm"], accumulate=accumulate)
    there = steps(name, **options)
    fed = [[batch_of(3 * seed + i) for i in range(accumulate)] for seed in range(4)]
    assert_same_bits(plain, there, fed[:3])
    there.step(*fed[3])
    assert len(updates_of(there.programs[0])) == len(SMALL_PARAMETERS)


SMALL_PARAMETERS = program_of("after").signature.parameters


# --- beside everything else -----------------------------------------------------------------------


def test_whoever_starts_an_update_goes_on_and_whoever_needs_it_waits() -> None:
    go, parameter = threading.Event(), torch.ones(4)

    def update(x: Tensor) -> None:
        assert go.wait(timeout=30) and not torch.is_grad_enabled()
        x.add_(1)

    run_on_host(update, (parameter,), (parameter,))
    fetched = prefetch(parameter, CPU)
    assert parameter.tolist() == [1] * 4, "it does not wait for the update"
    go.set()
    assert wait_prefetch(fetched).tolist() == [2] * 4


def test_updates_run_in_order_and_can_be_waited_for() -> None:
    x, want = torch.zeros((), dtype=torch.int64), 0
    for number in range(50):
        run_on_host(lambda x, n: x.mul_(3).add_(n).remainder_(101), (x, torch.tensor(number)), (x,))
        want = (want * 3 + number) % 101
    finish_copies()
    assert int(x) == want


def test_what_an_update_raises_is_raised_where_it_is_waited_for() -> None:
    def update(x: Tensor) -> None:
        raise ValueError("no update")

    x = torch.zeros(2)
    run_on_host(update, (x,), (x,))
    fetched = prefetch(x, CPU)
    with pytest.raises(ValueError, match="no update"):
        wait_prefetch(fetched)


def on_rank(updates: str, max_norm: float | None, updates_on: str) -> None:
    """Steps whose updates run in a thread, and what looks at them in between."""
    model = parallel_of(SMALL, 2)
    optimizer = ADAMW(model.parameters(), fused=True)
    step = train_step(
        model, optimizer, max_norm=max_norm, updates=updates, updates_on=updates_on, state="host"
    )
    eager = Eager(SMALL.build(), all_of(ADAMW), max_norm)
    addresses: list[list[int]] = []
    for seed in range(5):
        want, norm = eager.step(batch_of(seed))
        assert_close(step(**model.local_batch(batch_of(seed))), want)
        if norm is not None:
            assert_close(step.grad_norm, norm)
        held = [entry["exp_avg"].to_local() for entry in optimizer.state.values()]
        addresses.append([x.data_ptr() for x in held])
    assert addresses[1] == addresses[-1], "new state is not where the old one was"
    assert bool(updates_of(step.program)) == (updates_on == "host")
    assert {float(x["step"]) for x in optimizer.state_dict()["state"].values()} == {5.0}
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))
    model(**model.local_batch(batch_of(5)))[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    eager.max_norm = None
    eager.step(batch_of(5))
    eager.max_norm = max_norm
    assert_close(step(**model.local_batch(batch_of(6))), eager.step(batch_of(6))[0])
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


ORDERS = [("forward", 0.5, "host"), ("backward", None, "host"), ("after", 0.5, "host")]


@pytest.mark.parametrize(("updates", "max_norm", "updates_on"), sweep(ORDERS, quick=ORDERS[:2]))
def test_ranks_train_as_one_device(
    updates: str, max_norm: float | None, updates_on: str, ranks: Pools
) -> None:
    ranks(2)(on_rank, updates, max_norm, updates_on)


def on_rank_of_wrong_words() -> None:
    model = parallel_of(SMALL, 2)
    with pytest.raises(errors.StepError, match="is none of"):
        train_step(model, ADAMW(model.parameters()), state="host", updates_on="disk")
    with pytest.raises(errors.StepError, match="say state='host' as well"):
        train_step(model, ADAMW(model.parameters()), updates_on="host")


def test_updates_run_where_the_state_is(ranks: Pools) -> None:
    ranks(2)(on_rank_of_wrong_words)


# --- the graph ------------------------------------------------------------------------------------


def test_gradients_leave_in_backward_and_parameters_come_back_two_buckets_at_a_time() -> None:
    plain, program = program_of("after"), program_of("after", state=on_host())
    sizes, most = sizes_of_values(program), most_prefetched(program)
    assert BUCKET / 4 < most <= 2 * BUCKET / 2  # a parameter has half the bytes of its state
    place = {node: at for at, node in enumerate(program.nodes)}
    first = place[updates_of(program)[0]]
    sent = [n for n in program.nodes if n.target is ops.offload.default and sizes[n] > 8]
    assert len(sent) == 2 * len(SMALL_PARAMETERS)
    assert all(place[node] < first for node in sent), "a gradient waits for the norm"
    inputs = plain.graph.find_nodes(op="placeholder")
    state = sum(sizes_of_values(plain)[x] for x in inputs if "exp_avg" in x.name)
    assert peak_memory(program).bytes <= peak_memory(plain).bytes - state + BUCKET
    assert peak_memory(program).host_bytes >= state


def test_updates_alike_are_one_operator_and_printed_once() -> None:
    program = program_of("after", state=on_host())
    functions = {node.target for node in updates_of(program)}
    shapes = {p.shape for p in SMALL_PARAMETERS}
    assert len(functions) < len(shapes) + 5 < len(SMALL_PARAMETERS)
    text = str(program)
    assert all(text.count(f"{function.__name__}, on the host") == 1 for function in functions)


def test_the_timeline_has_a_lane_for_the_host() -> None:
    program = program_of("after", name="AdamW, fused", max_norm=None, state=on_host())
    timeline = predict(program, Machine(host_memory=1e6))
    spans = [span for span in timeline.spans if span.lane == "on the host"]
    assert len(spans) == len(SMALL_PARAMETERS)
    assert all(a.end <= b.begin for a, b in pairwise(spans))
    elements = sum(math.prod(p.shape) for p in SMALL_PARAMETERS) / 2  # of two ranks
    moved = 7 * 8 * elements  # of a parameter, its gradient and two moments, there and back
    assert sum(span.seconds for span in spans) == pytest.approx(moved / 1e6, rel=0.02)
    assert timeline.seconds >= moved / 1e6, "nobody waits for the host"


@pytest.mark.parametrize(
    ("machine", "share"),
    [
        (Machine(host=1e6, host_memory=1e3), (0, 0)),
        (Machine(host=1e6, host_memory=1.5e6), (0.1, 0.9)),
        (Machine(host=1e15, host_memory=1e14), (1, 1)),
    ],
    ids=["a slow host", "both", "a fast host"],
)
def test_buckets_go_where_they_are_cheaper(machine: Machine, share: tuple[float, float]) -> None:
    least, most = share
    ways = (on_host(choose=True, machine=machine), on_host(), stream_state(BUCKET))
    chosen, *others = (program_of("after", state=way) for way in ways)
    assert least <= len(updates_of(chosen)) / len(SMALL_PARAMETERS) <= most
    shortest = min(predict(program, machine).seconds for program in others)
    assert predict(chosen, machine).seconds <= shortest * (1 + 1e-9)


def test_what_needs_whole_matrices_stays_on_the_device() -> None:
    simulated = steps("SGD", state=on_host())
    for number in range(2):
        simulated.step(batch_of(number))
    assert not updates_of(simulated.programs[0])


@pytest.mark.parametrize("options", [{"bucket": 0}, {"slots": 0}], ids=str)
def test_nothing_fits_into_nothing(options: dict[str, int]) -> None:
    with pytest.raises(PassError, match="a byte and a slot at least"):
        update_on_host(**options)
