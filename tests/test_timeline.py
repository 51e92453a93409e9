"""When everything in a step runs: predicted, measured, and written for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from gloo import Ranks
from moptrace import Plan, Program, parallelize, train_step
from moptrace.collectives import wait
from moptrace.core import Pass
from moptrace.costs import Machine
from moptrace.passes.default import overlapped
from moptrace.passes.stream_state import stream_state
from moptrace.timeline import OPERATORS, WAITING, Span, Timeline, predict, write
from test_defer_updates import program_of
from test_overlap import ONE, batch_of, steps

# Slow enough that communication and computation take about as long.
MACHINE = Machine(flops=1e10, memory=1e10, link=5e8, latency=1e-6)
PLAN = Plan(ep=2, expert_tokens=8, recompute_experts=False)


@cache
def step(schedule: Pass | None) -> Program:
    return steps(PLAN, schedule, spec=ONE).programs[0]


OVERLAPPED = overlapped()


TWO_ORDERS = ("after", "forward")


def steps_of_updates(updates: str) -> Program:
    return program_of(updates, state=stream_state(bucket=2_100))


def lane(timeline: Timeline, name: str) -> list[tuple[float, float]]:
    return [(span.begin, span.end) for span in timeline.spans if span.lane == name]


@pytest.mark.parametrize("schedule", [None, OVERLAPPED], ids=str)
def test_one_thing_after_another_runs_on_a_lane(schedule: Pass | None) -> None:
    timeline = predict(step(schedule), MACHINE)
    axes = {span.lane for span in timeline.spans} - {OPERATORS, WAITING}
    assert axes == {"dp", "ep", "edp"}
    ours = sorted(lane(timeline, OPERATORS) + lane(timeline, WAITING))
    for spans in (ours, *(lane(timeline, axis) for axis in axes)):
        assert all(b >= a - 1e-12 for (_, a), (b, _) in pairwise(spans))
    work = sum(b - a for a, b in lane(timeline, OPERATORS))
    assert timeline.seconds == pytest.approx(work + timeline.exposed)


def test_copies_of_a_state_on_the_host_have_lanes_and_are_waited_for() -> None:
    after, forward = (
        predict(steps_of_updates(updates), replace(MACHINE, host=2e7)) for updates in TWO_ORDERS
    )
    for timeline in (after, forward):
        for name in ("to the host", "to the device"):
            spans = lane(timeline, name)
            assert spans and all(b >= a - 1e-12 for (_, a), (b, _) in pairwise(spans))
    waits = [
        sum(s.seconds for s in t.spans if s.kind == "copy to the device" and s.lane == WAITING)
        for t in (after, forward)
    ]
    assert 0 < waits[1] < waits[0], "forward hides the copies"


def test_without_a_schedule_all_that_travels_is_exposed() -> None:
    plain, moved = predict(step(None), MACHINE), predict(step(OVERLAPPED), MACHINE)
    assert plain.exposed == pytest.approx(plain.travelling)
    assert moved.travelling == pytest.approx(plain.travelling)
    assert moved.exposed < 0.9 * plain.exposed
    assert moved.seconds < plain.seconds


def test_a_faster_link_exposes_less() -> None:
    slow, fast = (predict(step(OVERLAPPED), Machine(link=x)).exposed for x in (1e8, 1e9))
    assert fast < slow


def test_it_prints_what_takes_how_long() -> None:
    timeline = predict(step(OVERLAPPED), MACHINE)
    text = str(timeline)
    shown = f"{timeline.seconds * 1e3:,.3f} ms a step, of which {timeline.exposed * 1e3:,.3f}"
    assert text.startswith(shown)
    for kind in ("experts", "optimizer", "send_rows ep", "reduce_scatter edp"):
        assert f"\n {kind} " in text


def test_it_says_what_runs_beside_what_travels() -> None:
    spans = [
        Span("a", "experts", OPERATORS, 0.0, 2.0),
        Span("x", "send_rows ep", "ep", 1.0, 4.0),
        Span("b", "attention", OPERATORS, 2.0, 3.5),
        Span("x", "send_rows ep", WAITING, 3.5, 4.0),
        Span("c", "norm", OPERATORS, 4.0, 5.0),
    ]
    timeline = Timeline(tuple(spans))
    assert timeline.beside("send_rows ep") == {"attention": 1.5, "experts": 1.0}
    assert "attention, experts" in str(timeline)
    plain, moved = predict(step(None), MACHINE), predict(step(OVERLAPPED), MACHINE)
    assert not plain.beside("send_rows ep")
    assert sum(moved.beside("send_rows ep").values()) > 0


def test_perfetto_reads_every_lane(tmp_path: Path) -> None:
    timeline = predict(step(OVERLAPPED), MACHINE)
    write(tmp_path / "step.json", {"predicted": timeline})
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"predicted", OPERATORS, WAITING, "ep"} <= names
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(timeline.spans)
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(timeline.seconds * 1e6)


def on_rank(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    own = {k: v[:4] for k, v in batch_of(99).items()}
    path = Path(folder) / f"{mesh.get_rank()}.json"
    losses: list[list[torch.Tensor]] = []
    for traced in (False, True):
        model = parallelize(ONE.build(), mesh, Plan(ep=2), batch=own)
        run = train_step(model, torch.optim.SGD(model.parameters(), 0.1), schedule=OVERLAPPED)
        given = [model.local_batch(batch_of(seed)) for seed in range(3)]
        losses.append([run(**given[0])])
        losses[-1] += [run.trace(path, **given[1]) if traced else run(**given[1]), run(**given[2])]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    events = json.loads(path.read_text())["traceEvents"]
    measured = [e for e in events if e["ph"] == "X" and e["pid"] == 0]
    predicted = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    waits = [node for node in run.program.nodes if node.target is wait]
    assert {node.name for node in waits} <= {e["name"] for e in measured}
    assert measured and predicted and all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    shown = str(run.explain())
    for part in (run.model.explain(), run.timeline(), run.peak_memory()):
        assert str(part) in shown


def test_a_step_is_measured_while_it_runs(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    ranks(2)(on_rank, str(tmp_path))
