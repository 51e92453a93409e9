"""What runs when in a training step: predicted from its graph, or measured while it runs.

    print(step.timeline())
    step.trace("step.json", input_ids=ids, labels=labels)  # open it in https://ui.perfetto.dev

A step has one *lane* on which operators run one after another, and beside it one for each axis, on
which collectives travel one after another, one for each way between the device and the host, and
one for the host, where it computes updates.
Where an operator needs what has not come, the first lane waits: that time is *exposed*.
"""

from __future__ import annotations

import json
import operator
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import fx

from moptrace import roles
from moptrace.collectives import COLLECTIVES, Collective, collective, start, wait
from moptrace.core import Program
from moptrace.costs import Machine, operator_costs, seconds_on_host
from moptrace.explain import printed
from moptrace.kernels.host_update import HostUpdate
from moptrace.liveness import sizes_of_values

__all__ = ["Span", "Timeline", "measure", "predict", "write"]

ops = torch.ops.moptrace

OPERATORS, WAITING = "operators", "waiting"  # lanes; the others are axes, and those of the host
ON_HOST = "on the host"
HOST_COPIES = {ops.offload.default: "to the host", ops.prefetch.default: "to the device"}


@dataclass(frozen=True, slots=True)
class Span:
    """A node at work from ``begin`` to ``end``, in seconds, on a lane.

    ``kind`` is the component of an operator, and of a collective its name and axis.
    """

    name: str
    kind: str
    lane: str
    begin: float
    end: float
    backward: bool = False

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Timeline:
    """All spans of a step, by their beginnings."""

    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """How long the step takes."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def exposed(self) -> float:
        """How long operators wait for what travels."""
        return sum(span.seconds for span in self.spans if span.lane == WAITING)

    @property
    def travelling(self) -> float:
        """How long collectives travel, all axes together."""
        return sum(x.seconds for x in self.spans if x.lane not in (OPERATORS, WAITING))

    def beside(self, kind: str) -> dict[str, float]:
        """The seconds for which each component's operators run while this kind travels, most first.

        An operator that hides two collectives at once counts for both.
        """
        work = [span for span in self.spans if span.lane == OPERATORS]
        begins = [span.begin for span in work]
        found: dict[str, float] = defaultdict(float)
        for travel in self.spans:
            if travel.kind != kind or travel.lane in (OPERATORS, WAITING):
                continue
            first = max(bisect_right(begins, travel.begin) - 1, 0)
            for span in work[first : bisect_left(begins, travel.end)]:
                both = min(span.end, travel.end) - max(span.begin, travel.begin)
                found[span.kind] += max(both, 0.0)
        return dict(sorted((pair for pair in found.items() if pair[1]), key=lambda x: -x[1]))

    def __str__(self) -> str:
        """The time of every component and collective, how much of it the step waits for, and what
        runs meanwhile."""
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title=f"{_shown(self.seconds)} ms a step, of which {_shown(self.exposed)} are exposed",
            title_justify="left",
        )
        table.add_column("ms")
        for column in ("forward", "backward", "exposed"):
            table.add_column(column, justify="right")
        table.add_column("beside")
        work = [span for span in self.spans if span.lane == OPERATORS]
        travels = [span for span in self.spans if span.lane not in (OPERATORS, WAITING)]
        waits = _sums(span for span in self.spans if span.lane == WAITING)
        for spans in (work, travels):
            before, after = (
                _sums(x for x in spans if not x.backward),
                _sums(x for x in spans if x.backward),
            )
            for kind in sorted({x.kind for x in spans}, key=lambda k: -(before[k] + after[k])):
                times = (_shown(found[kind]) for found in (before, after, waits))
                hidden = list(self.beside(kind))[:3] if spans is travels else []
                table.add_row(kind, *times, ", ".join(hidden))
            table.add_section()
        return printed(table)


def _sums(spans: Iterable[Span]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for span in spans:
        found[span.kind] += span.seconds
    return found


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}" if seconds else ""


def write(path: str | Path, timelines: Mapping[str, Timeline]) -> None:
    """Write timelines as trace events, one process for each, which Perfetto and Chrome show."""
    events: list[dict[str, Any]] = []
    for process, (name, timeline) in enumerate(timelines.items()):
        lanes = list(dict.fromkeys([OPERATORS, WAITING, *(s.lane for s in timeline.spans)]))
        named = [(0, "process_name", name), *((i, "thread_name", x) for i, x in enumerate(lanes))]
        for thread, what, text in named:
            labelled = {"name": what, "ph": "M", "pid": process, "tid": thread}
            events.append({**labelled, "args": {"name": text}})
        for span in timeline.spans:
            at = {"pid": process, "tid": lanes.index(span.lane)}
            took = {"ts": span.begin * 1e6, "dur": span.seconds * 1e6}
            events += [{"name": span.name, "cat": span.kind, "ph": "X", **at, **took}]
    Path(path).write_text(json.dumps({"traceEvents": events}))


# --- predicted ------------------------------------------------------------------------------------


def predict(program: Program, machine: Machine | None = None) -> Timeline:
    """What runs when on a machine of which the speeds are given.

    An operator takes as long as its products or its traffic with memory (``costs.py``), a
    collective as long as what a rank sends, and a copy to or from the host as long as its bytes,
    as does an update there of the host's own memory.
    What travels in a ring is hidden by the ring's work.

    Requires: a step.
    """
    assumed = machine or Machine()
    costs, sizes = operator_costs(program, assumed), sizes_of_values(program)
    assert program.layout is not None
    spans: list[Span] = []
    clock = 0.0
    busy: dict[str, float] = defaultdict(float)  # until when an axis is
    arrival: dict[fx.Node, float] = {}
    kinds: dict[fx.Node, str] = {}

    def travels(node: fx.Node, kind: str, lane: str, seconds: float) -> None:
        """Start what goes on a lane of its own, once what it takes has come."""
        come = max((arrival.get(x, 0.0) for x in node.all_input_nodes), default=0.0)
        begin = max(clock, busy[lane], come)
        arrival[node] = begin + seconds
        # What the host's own thread sends, once it has made it, is not in the way of others before.
        busy[lane] = max(clock, busy[lane]) + seconds if _made_on_host(node) else arrival[node]
        spans.append(_span(node, kind, lane, begin, begin + seconds))
        kinds[node] = kind

    def waits(node: fx.Node, started: fx.Node) -> None:
        nonlocal clock
        if arrival[started] > clock:
            spans.append(_span(node, kinds[started], WAITING, clock, arrival[started]))
            clock = arrival[started]

    for node in program.nodes:
        if node.target is wait or node.target is ops.wait_prefetch.default:
            started = node.all_input_nodes[0]
            if started in arrival:
                waits(node, started)
        elif (row := _row(node)) is not None:
            args = node.args[1:] if node.target is start else node.args
            axis = _axis(args)
            parts = program.layout.size(axis)
            sent = _sent(row, sizes[args[0]], sizes[node], parts)
            seconds = assumed.latency + sent / assumed.link if parts > 1 else 0.0
            travels(node, f"{row.name} {axis}", axis, seconds)
            if node.target is not start:
                waits(node, node)
        elif node.target in HOST_COPIES:
            lane = HOST_COPIES[node.target]
            travels(node, f"copy {lane}", lane, sizes[node] / assumed.host)
        elif isinstance(node.target, HostUpdate):
            seconds = seconds_on_host(node.target, assumed)
            travels(node, f"update {ON_HOST}", ON_HOST, seconds)
            arrival.update((user, arrival[node]) for user in node.users)
        elif costs[node] > 0:
            begin, clock = clock, clock + costs[node]
            spans.append(_span(node, _component(node), OPERATORS, begin, clock))
    return Timeline(tuple(sorted(spans, key=lambda span: span.begin)))


def _made_on_host(node: fx.Node) -> bool:
    """Whether a copy to the device is of what the host has made."""
    source = node.all_input_nodes[0]
    made = source.all_input_nodes[0] if source.target is operator.getitem else source
    return node.target is ops.prefetch.default and isinstance(made.target, HostUpdate)


def _row(node: fx.Node) -> Collective | None:
    """The collective that a node runs, starts or waits for, if data travels in it."""
    if node.target is wait:
        node = node.all_input_nodes[0]
    row = COLLECTIVES[str(node.args[0])] if node.target is start else collective(node.target)
    return row if row is not None and row.travels else None


def _axis(arguments: Iterable[Any]) -> str:
    return next(x for x in arguments if isinstance(x, str))


def _sent(row: Collective, given: int, came: int, parts: int) -> float:
    """The bytes that a rank sends to others, where it has ``given`` and gets ``came``."""
    if row.lends_experts:
        return 0  # expected, as of rows: every rank has as many
    others = (parts - 1) / parts
    if row.name.startswith("all_reduce"):
        return 2 * others * given
    if row.name == "all_gather_rows":
        return (parts - 1) * given
    return others * (came if row.name.startswith("all_gather") else given)


def _component(node: fx.Node) -> str:
    return str(roles.component(node) or "other")


def _span(node: fx.Node, kind: str, lane: str, begin: float, end: float) -> Span:
    return Span(node.name, kind, lane, begin, end, roles.role(node).backward)


# --- measured -------------------------------------------------------------------------------------


def measure(
    module: fx.GraphModule, arguments: Iterable[Any], device: torch.device
) -> tuple[Any, Timeline]:
    """Run a step's graph node by node, and say what ran when; also returns its results.

    A collective's span goes from its start to the end of the wait for it: when it came before that
    is not known. On a GPU, the times are those of its stream of operators.
    """
    run = _Measuring(module, _mark_on_gpu if device.type == "cuda" else _mark)
    results = run.run(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return results, run.timeline()


def _mark() -> float:
    return time.perf_counter()


def _mark_on_gpu() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _Measuring(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mark: Callable[[], Any]):
        super().__init__(module)
        self.mark = mark
        self.begin = mark()
        self.marks: dict[fx.Node, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.mark()
        result = super().run_node(n)
        self.marks[n] = before, self.mark()
        return result

    def timeline(self) -> Timeline:
        spans: list[Span] = []
        for node, marks in self.marks.items():
            begin, end = (self._since(mark) for mark in marks)
            row = _row(node) if node.op == "call_function" else None
            if row is None:
                if node.op == "call_function":
                    spans.append(_span(node, _component(node), OPERATORS, begin, end))
                continue
            started = node.all_input_nodes[0] if node.target is wait else node
            axis = _axis(started.args[1:] if started.target is start else started.args)
            kind, sent = f"{row.name} {axis}", self._since(self.marks[started][0])
            if node.target is start:
                spans.append(_span(node, kind, OPERATORS, begin, end))
            else:
                spans.append(_span(node, kind, WAITING, begin, end))
                spans.append(_span(started, kind, axis, sent, end))
        return Timeline(tuple(sorted(spans, key=lambda span: span.begin)))

    def _since(self, mark: Any) -> float:
        if isinstance(mark, float):
            return mark - self.begin
        return self.begin.elapsed_time(mark) * 1e-3
