"""Peak memory of a rank: the loss over a large vocabulary, plain and by moptrace, in one run.

    python benchmarks/memory.py
    python benchmarks/memory.py --tokens 1024 --words 32768

The plain loss is ``F.cross_entropy(F.linear(...))`` on one process, forward and backward. moptrace
runs the same model on four gloo ranks with as many tokens on each, and once more with half of
them. What counts is the most memory that a process takes during a step above what it had before,
which was the tokens and the weight; the kernel measures it (VmHWM), each run in processes of its
own. The losses must agree to 1e-4 first. The exit status is 1 where moptrace takes more than 1/P
of the plain peak and 10%.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from peaks import Measured, measured
from report import publish

RANKS = 4
SLACK = 1.1  # over 1/P
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """The sizes of one projection: tokens of each rank, width, words."""

    tokens: int
    width: int
    words: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens a rank, width {self.width:,}, {self.words:,} words"


class Projection(nn.Module):
    """Hidden states in, the loss over the vocabulary out."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.head = nn.Linear(shape.width, shape.words, bias=False)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def weight(shape: Shape) -> Tensor:
    """The same whole weight whoever makes it."""
    generator = torch.Generator().manual_seed(1)
    return torch.empty(shape.words, shape.width).normal_(0.0, 0.02, generator=generator)


def tokens(shape: Shape) -> dict[str, Tensor]:
    """The same hidden states and labels for every rank: the mean over ranks is that of one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, shape.tokens, shape.width, generator=generator)
    labels = torch.randint(shape.words, (1, shape.tokens), generator=generator)
    return {"hidden": hidden, "labels": labels}


# --- the two ways ---------------------------------------------------------------------------------


def plain(rank: int, folder: str, shape: Shape) -> None:
    """One rank's tokens on the whole weight, with all their logits; the loss of these tokens."""
    torch.set_num_threads(1)
    model = Projection(shape)
    with torch.no_grad():
        model.head.weight.copy_(weight(shape))
    batch = tokens(shape)

    def step() -> Tensor:
        loss = model(**batch)
        loss.backward()
        return loss.detach()

    torch.save(measured(step), f"{folder}/plain")


def by_moptrace(rank: int, folder: str, shape: Shape) -> None:
    """The same on four ranks, which all have the first rank's tokens: the mean is the same loss."""
    import moptrace

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        with torch.device("meta"):
            model = Projection(shape)
        batch = tokens(shape)
        mesh = init_device_mesh("cpu", (RANKS,))
        parallel = moptrace.parallelize(model, mesh, moptrace.Plan(logits_bytes=0), batch=batch)
        parallel.load_full_state_dict({"head.weight": weight(shape)})

        def step() -> Tensor:
            loss = parallel(**batch)
            loss.backward()
            return loss.detach()

        torch.save(measured(step), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def run(function: Callable[..., None], ranks: int, shape: Shape) -> list[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(function, (folder, shape), nprocs=ranks)
        names = ["plain"] if function is plain else [str(rank) for rank in range(ranks)]
        return [torch.load(f"{folder}/{name}", weights_only=False) for name in names]


# --- the report -----------------------------------------------------------------------------------


def table(shape: Shape, whole: Measured, ours: Measured, half: Measured) -> Table:
    shown = Table(title=str(shape))
    shown.add_column("loss over the vocabulary")
    for column in ("peak MiB", "of the plain one", "seconds"):
        shown.add_column(column, justify="right")
    rows: list[tuple[str, Measured]] = [
        ("plain, one process", whole),
        (f"moptrace, {RANKS} ranks, the fullest", ours),
        ("moptrace, half the tokens", half),
    ]
    for name, one in rows:
        part = f"1/{whole.bytes / one.bytes:.1f}"
        shown.add_row(name, f"{one.bytes / 2**20:,.0f}", part, f"{one.seconds:,.1f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--words", type=int, default=131072)
    given: Any = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    shape, console = Shape(given.tokens, given.width, given.words), Console()
    with console.status("the plain loss"):
        (whole,) = run(plain, 1, shape)
    with console.status(f"moptrace on {RANKS} ranks"):
        ours = max(run(by_moptrace, RANKS, shape), key=lambda one: one.bytes)
    with console.status("half the tokens"):
        fewer = Shape(shape.tokens // 2, shape.width, shape.words)
        half = max(run(by_moptrace, RANKS, fewer), key=lambda one: one.bytes)
    error = abs(ours.loss / whole.loss - 1)
    failures: list[str] = []
    if not error <= TOLERANCE:
        failures.append(f"the losses differ by {error:.1e}, over {TOLERANCE:.0e}")
    if ours.bytes > whole.bytes / RANKS * SLACK:
        failures.append(f"moptrace takes more than 1/{RANKS} of the plain peak and 10%")
    shown = table(shape, whole, ours, half)
    facts = [f"{RANKS} gloo ranks, 1 thread each", f"the losses agree to {error:.1e}"]
    publish(console, "memory", "Peak memory", facts, [shown], failures)


if __name__ == "__main__":
    main()
