"""What each pass over a training step gains: as recorded, scheduled, and compiled, in one run.

    python benchmarks/schedule.py
    python benchmarks/schedule.py --tokens 2048 --bandwidth 0.2

Gloo ranks of one machine share memory, so there is little to hide. Here every exchange also takes
the time that a link of ``--bandwidth`` GB/s and ``--latency`` microseconds would: each rank has one
link, which carries one exchange after another, and a rank that waits for one sleeps until it would
have come. Nothing else is changed. A step with a link that takes no time says what a step costs
without communication; what a step takes above it is exposed.

All schedules run in the same processes, on the same weights and tokens, and take turns. They must
give the same losses, bit by bit, and those that are compiled to ``TOLERANCE``. The exit status is 1
where they do not, or where all passes of the schedule expose more than ``MOST`` of what the
unscheduled step does. What compiling gains is in the time of a step, which has less to hide behind.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from models import MoEConfig, MoEDecoder
from moptrace import Plan, collectives, parallelize, train_step
from moptrace.core import Pass, chain
from moptrace.passes.compile_regions import compile_regions
from moptrace.passes.default import overlapped
from moptrace.passes.overlap import overlap
from moptrace.passes.start_and_wait import start_and_wait
from moptrace.step import TrainStep
from report import publish

MOST = 0.7  # of the exposed time of the unscheduled step
CONFIG = MoEConfig(hidden=256, experts=16, expert_hidden=512, vocabulary=1024)
TOLERANCE = 1e-5
NO_LINK = "no link"
ALL, COMPILED = "all together", "all, compiled"
SCHEDULES: dict[str, Pass | None] = {
    "as recorded": None,
    "gathers ahead": chain(start_and_wait(), overlap(ahead=0, prefetch=2, cover=0, reach=0)),
    "early and late": chain(start_and_wait(), overlap(prefetch=0, cover=0)),
    ALL: overlapped(),
    COMPILED: chain(overlapped(), compile_regions()),
}


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    ranks: int
    tokens: int
    chunks: int
    bandwidth: float
    latency: float
    rounds: int

    @property
    def plan(self) -> Plan:
        chunk = self.tokens // self.chunks if self.chunks > 1 else None
        return Plan(ep=self.ranks, expert_tokens=chunk, recompute_experts=False)


class Link:
    """A rank's link: when what is sent now would have come."""

    def __init__(self, options: Options):
        self.options = options
        self.is_on = False
        self.free = 0.0

    def carry(self, bytes_: int) -> float:
        if not self.is_on:
            return 0.0
        takes = self.options.latency * 1e-6 + bytes_ / (self.options.bandwidth * 1e9)
        self.free = max(self.free, time.perf_counter()) + takes
        return self.free


class Late:
    """The work of a process group that is not done before its time."""

    def __init__(self, work: Any, due: float):
        self.work, self.due = work, due

    def wait(self) -> None:
        self.work.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))


@contextmanager
def linked(link: Link) -> Iterator[None]:
    """All collectives that data travels in go over the link."""
    functions = [
        (dist, "all_to_all_single", 1),
        (dist, "all_reduce", 0),
        (collectives, "_all_gather", 0),
        (collectives, "_reduce_scatter", 1),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in functions]
    others = (link.options.ranks - 1) / link.options.ranks

    def late(run: Any, at: int) -> Any:
        def running(*args: Any, async_op: bool = False, **options: Any) -> Any:
            work = run(*args, async_op=async_op, **options)
            if not async_op:
                return work
            return Late(work, link.carry(int(args[at].nbytes * others)))

        return running

    for (place, name, run), (_, _, at) in zip(before, functions, strict=True):
        setattr(place, name, late(run, at))
    try:
        yield
    finally:
        for place, name, run in before:
            setattr(place, name, run)


# --- one rank -------------------------------------------------------------------------------------


def steps(options: Options) -> dict[str, TrainStep]:
    """A step for each schedule, each with a model and an optimizer of its own."""
    mesh = init_device_mesh("cpu", (options.ranks,))
    whole = MoEDecoder(CONFIG).reset_parameters()
    found: dict[str, TrainStep] = {}
    for name, schedule in SCHEDULES.items():
        model = parallelize(copy.deepcopy(whole), mesh, options.plan, batch=batch(options, 0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        found[name] = train_step(model, optimizer, max_norm=1.0, schedule=schedule)
    return found


def batch(options: Options, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(CONFIG.vocabulary, (1, options.tokens + 1), generator=generator)
    return {"input_ids": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}


def on_a_rank(rank: int, folder: str, options: Options) -> None:
    torch.set_num_threads(1)
    gc.disable()
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=options.ranks)
    try:
        link = Link(options)
        with linked(link):
            own = batch(options, rank)
            systems = steps(options)
            losses = {
                name: [step(**own).item() for _ in range(3)] for name, step in systems.items()
            }
            seconds: dict[str, list[float]] = {NO_LINK: [], **{name: [] for name in systems}}
            for _ in range(options.rounds):
                for name in seconds:
                    link.is_on = name != NO_LINK
                    step = systems[name if link.is_on else "as recorded"]
                    dist.barrier()
                    started = time.perf_counter()
                    step(**own)
                    dist.barrier()
                    seconds[name].append(time.perf_counter() - started)
        peaks = {name: step.peak_memory().bytes for name, step in systems.items()}
        torch.save((losses, seconds, peaks), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


# --- the report -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--chunks", type=int, default=2, help="of the tokens of a layer of experts")
    parser.add_argument("--bandwidth", type=float, default=0.1, help="of a rank's link, in GB/s")
    parser.add_argument("--latency", type=float, default=20.0, help="in microseconds")
    parser.add_argument("--rounds", type=int, default=15)
    options = Options(**vars(parser.parse_args()))
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console()
    with console.status("training"), tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_a_rank, (folder, options), nprocs=options.ranks)
        losses, seconds, peaks = torch.load(f"{folder}/0", weights_only=False)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    exposed = {name: medians[name] - medians[NO_LINK] for name in SCHEDULES}
    whole = exposed["as recorded"]
    failures = [
        f"{name}: the losses are not those of the step as recorded"
        for name in SCHEDULES
        if name != COMPILED and losses[name] != losses["as recorded"]
    ]
    pairs = zip(losses[COMPILED], losses["as recorded"], strict=True)
    if max(abs(a / b - 1) for a, b in pairs) > TOLERANCE:
        failures.append(f"{COMPILED}: the losses differ by more than {TOLERANCE}")
    if exposed[ALL] > MOST * whole:
        failures.append(f"{exposed[ALL] / whole:.0%} of communication is exposed, over {MOST:.0%}")
    shown = Table(title=f"{options.tokens:,} tokens a rank, {CONFIG}, in {options.chunks} chunks")
    shown.add_column("schedule")
    for column in ("step ms", "speed", "exposed ms", "of all", "predicted peak MiB"):
        shown.add_column(column, justify="right")
    shown.add_row(NO_LINK, f"{medians[NO_LINK] * 1e3:,.0f}", "", "0", "", "")
    for name in SCHEDULES:
        shown.add_row(
            name,
            f"{medians[name] * 1e3:,.0f}",
            f"{medians['as recorded'] / medians[name]:.2f}x",
            f"{exposed[name] * 1e3:,.0f}",
            f"{exposed[name] / whole:.0%}",
            f"{peaks[name] / 2**20:,.0f}",
        )
    facts = [
        f"{options.ranks} gloo ranks, 1 thread each, ep={options.ranks}",
        f"medians of {options.rounds} rounds",
        f"each rank's link: {options.bandwidth} GB/s, {options.latency} microseconds",
    ]
    publish(console, "schedule", "The schedule of a step", facts, [shown], failures)


if __name__ == "__main__":
    main()
