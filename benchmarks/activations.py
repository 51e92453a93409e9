"""Peak memory of a training step by what it keeps: predicted from the graph, and measured.

    python benchmarks/activations.py
    python benchmarks/activations.py --tokens 2048 --layers 2

The same model takes the same steps on gloo ranks of one machine under every policy, each in
processes of its own. What counts is the most memory that a process takes during a step above what
it had before: the kernel measures it (VmHWM), and ``step.peak_memory()`` predicts it, less the
step's inputs. Without a GPU the memory of the host is the same memory, so what is sent there counts
in both. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_), or what one step
leaves would be there before the next; and it is float64, because oneDNN, which multiplies float32,
keeps memory for every number of rows that an expert has had. The exit status is 1 where prediction
and measurement differ by more than 10%, or the losses by a bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

from models import MoEConfig, MoEDecoder
from peaks import Measured, measured
from report import publish

RANKS = 2
SLACK = 0.1
CONFIG = MoEConfig(layers=4, hidden=256, experts=8, expert_hidden=512, vocabulary=2048)


@dataclass(frozen=True)
class Case:
    """A policy; a number is a part of the bytes that everything kept would take."""

    config: MoEConfig
    tokens: int
    activations: str | float


@dataclass(frozen=True)
class Found:
    """The last step, and the bytes that were predicted: above its inputs, in all, on the host."""

    step: Measured
    above: int
    whole: int
    host: int


def one_rank(rank: int, folder: str, case: Case, whole: int) -> None:
    from moptrace import Plan, parallelize, train_step
    from moptrace.liveness import sizes_of_values

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        generator = torch.Generator().manual_seed(rank)
        ids = torch.randint(case.config.vocabulary, (1, case.tokens), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        model = MoEDecoder(case.config).reset_parameters().double()
        mesh = init_device_mesh("cpu", (RANKS,))
        model = parallelize(model, mesh, Plan(ep=RANKS), batch=batch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        asked: Any = case.activations
        given = int(asked * whole) if isinstance(asked, float) else asked
        step = train_step(model, optimizer, max_norm=1.0, activations=given)
        for _ in range(2):  # the first one makes the optimizer's state
            step(**batch)
        found, peak = measured(lambda: step(**batch)), step.peak_memory()
        sizes = sizes_of_values(step.program)
        inputs = sum(sizes[node] for node in step.program.graph.find_nodes(op="placeholder"))
        above = peak.bytes + peak.host_bytes - inputs
        torch.save(Found(found, above, peak.bytes, peak.host_bytes), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def fullest(case: Case, whole: int = 0) -> Found:
    """The rank that takes most memory."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_rank, (folder, case, whole), nprocs=RANKS)
        found = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(RANKS)]
    return max(found, key=lambda one: one.step.bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank")
    parser.add_argument("--layers", type=int, default=CONFIG.layers)
    given: Any = parser.parse_args()
    limit = str(1 << 17)
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": limit, "MALLOC_TRIM_THRESHOLD_": limit}
    config = replace(CONFIG, layers=given.layers)
    shown = Table(title=f"{given.tokens:,} tokens a rank, {config}, ep={RANKS}")
    shown.add_column("activations")
    for column in ("predicted MiB", "measured MiB", "of kept", "on the host MiB", "seconds"):
        shown.add_column(column, justify="right")
    failures: list[str] = []
    console, kept = Console(), None
    for activations in ("keep", "checkpoint", "offload", 0.8):
        name = f"{activations:.0%} of the bytes" if isinstance(activations, float) else activations
        with console.status(name):
            found = fullest(Case(config, given.tokens, activations), kept.whole if kept else 0)
        kept = kept or found
        error = found.above / found.step.bytes - 1
        if abs(error) > SLACK:
            failures.append(f"{name}: the prediction is off by {error:+.0%}")
        if found.step.loss != kept.step.loss:
            failures.append(f"{name}: the loss is {found.step.loss}, not {kept.step.loss}")
        cells = [f"{x / 2**20:,.0f}" for x in (found.above, found.step.bytes)]
        part = f"{found.step.bytes / kept.step.bytes:.0%}"
        host = f"{found.host / 2**20:,.0f}"
        shown.add_row(name, *cells, part, host, f"{found.step.seconds:,.1f}")
    facts = [f"{RANKS} gloo ranks, 1 thread each, float64; bytes above the step's inputs"]
    publish(console, "activations", "Peak memory of a training step", facts, [shown], failures)


if __name__ == "__main__":
    main()
