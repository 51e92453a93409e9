"""Step time and peak memory of attention to a long context, on four gloo ranks, side by side.

    python benchmarks/context.py
    python benchmarks/context.py --tokens 16384 --rounds 5

Layers of causal attention between projections are trained on one sequence that is split over the
ranks: by moptrace with a ring, with a ring whose ranks keep their own tokens (no zig-zag), with
Ulysses and with gathered tokens; and by torch. In torch 2.13, ``context_parallel`` knows the
attention kernels of CUDA alone, so that its ring (``_templated_ring_attention``) is called here
with the CPU's kernel, on tokens that lie in its zig-zag order beforehand.

A round runs one step of each way, one after the other, on the same ranks; a time is the median over
rounds, its ratio the median of the rounds' ratios to torch's ring. *Seconds* are those of the
slowest rank. *Busiest* is the processor time of the rank that computes most, which is what the step
would take if each rank had a processor of its own; ranks share them here. *Peak* is the most memory
that a rank takes during a step above what it had before it (VmHWM), in processes of their own. The
losses must agree to 1e-4 first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from torch.distributed.tensor.experimental._context_parallel import _attention as of_torch

from moptrace import Plan, parallelize, rings
from peaks import forget_peak, peak
from report import publish

RANKS = 4
TOLERANCE = 1e-4
WAYS = ("torch's ring", "ring", "ring without zig-zag", "ulysses", "gather")
aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of its one sequence."""

    tokens: int
    width: int
    heads: int
    groups: int
    layers: int

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens, width {self.width}, {self.heads} heads, {self.groups} of "
            f"keys, {self.layers} layers"
        )


@dataclass(frozen=True)
class Measured:
    """What one rank took for one step."""

    loss: float
    seconds: float
    busy: float
    bytes: int = 0


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Layers(nn.Module):
    """Attention between projections; the loss is the mean square of what comes out."""

    def __init__(self, shape: Shape, attend: Attend = attend):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.attend = shape, attend
        each = shape.width // shape.heads
        out = shape.width + 2 * shape.groups * each
        self.mix = nn.ModuleList(nn.Linear(shape.width, out) for _ in range(shape.layers))
        self.out = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> Tensor:
        s = self.shape
        for mix, out in zip(self.mix, self.out, strict=True):
            heads = mix(x).unflatten(-1, (s.heads + 2 * s.groups, -1)).transpose(1, 2)
            mixed = self.attend(*heads.split([s.heads, s.groups, s.groups], 1))
            x = x + out(mixed.transpose(1, 2).flatten(2))
        return x.square().mean()


# --- the ways -------------------------------------------------------------------------------------


class TorchRing(torch.autograd.Function):
    """The algorithm of ``context_parallel``, with the kernel of the CPU."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        op: Any = aten._scaled_dot_product_flash_attention_for_cpu.default
        given = (query, key, value)
        out, lse, *_ = of_torch._templated_ring_attention(
            dist.group.WORLD, 2, op, *given, is_causal=True
        )
        ctx.save_for_backward(*given, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

        def op(grad_out: Tensor, dropout_p: float = 0.0, **given: Any) -> Any:
            return (*flash(grad_out.contiguous(), dropout_p=dropout_p, **given), None)

        found = of_torch._templated_ring_attention_backward(
            dist.group.WORLD, 2, op, gradient, "grad_out", query, key, value, out, lse, True
        )
        return found[:3]


def by_torch(rank: int, shape: Shape) -> Callable[[], Tensor]:
    """Whole parameters on each rank; their gradients are averaged."""
    model = Layers(shape, TorchRing.apply)
    halves = sequence(shape).chunk(2 * RANKS, 1)
    own = torch.cat([halves[rank], halves[2 * RANKS - 1 - rank]], 1)

    def step() -> Tensor:
        model.zero_grad()
        loss = model(own) / RANKS
        loss.backward()
        for x in (loss.detach(), *(p.grad for p in model.parameters())):
            dist.all_reduce(x)
        return loss.detach()

    return step


def by_moptrace(rank: int, shape: Shape, context: str) -> Callable[[], Tensor]:
    mesh = init_device_mesh("cpu", (RANKS,))
    own = sequence(shape).chunk(RANKS, 1)[rank]
    plan = Plan(ep=1, cp=RANKS, context=context)
    model = parallelize(Layers(shape), mesh, plan, batch={"x": own})

    def step() -> Tensor:
        model.zero_grad()
        loss = model(x=own)
        loss.backward()
        return loss.detach()

    return step


def sequence(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, shape.tokens, shape.width, generator=generator)


def build(way: str, rank: int, shape: Shape) -> Callable[[], Tensor]:
    if way == "torch's ring":
        return by_torch(rank, shape)
    context = way.split()[0]
    step = by_moptrace(rank, shape, context)
    if way != "ring without zig-zag":
        return step

    def unbalanced() -> Tensor:
        with no_exchange():
            return step()

    return unbalanced


@contextmanager
def no_exchange() -> Iterator[None]:
    """Ranks attend with the tokens that they have: nothing seems to be gained by an exchange."""
    estimate = rings._most_work
    rings._most_work = lambda *_: 1
    rings._places.cache_clear()
    try:
        yield
    finally:
        rings._most_work = estimate
        rings._places.cache_clear()


# --- measuring ------------------------------------------------------------------------------------


def measured(step: Callable[[], Tensor]) -> Measured:
    dist.barrier()
    before, started, worked = forget_peak(), time.perf_counter(), time.process_time()
    loss = step()
    seconds, busy = time.perf_counter() - started, time.process_time() - worked
    return Measured(loss.item(), seconds, busy, peak() - before)


def on_a_rank(rank: int, folder: str, shape: Shape, ways: tuple[str, ...], rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        steps = {way: build(way, rank, shape) for way in ways}
        for step in steps.values():
            step()
        found = {way: list[Measured]() for way in ways}
        for _ in range(rounds):
            for way, step in steps.items():
                found[way].append(measured(step))
        torch.save(found, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def run(shape: Shape, ways: tuple[str, ...], rounds: int) -> list[dict[str, list[Measured]]]:
    """For each rank and way, what each round took."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_a_rank, (folder, shape, ways, rounds), nprocs=RANKS)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(RANKS)]


# --- the report -----------------------------------------------------------------------------------


def table(shape: Shape, timed: list[dict[str, list[Measured]]], peaks: dict[str, int]) -> Table:
    shown = Table(title=str(shape))
    shown.add_column("attention")
    for column in ("seconds", "of torch's", "busiest", "of torch's", "peak MiB"):
        shown.add_column(column, justify="right")

    def slowest(way: str, what: str) -> list[float]:
        rounds = zip(*(own[way] for own in timed), strict=True)
        return [max(getattr(one, what) for one in ranks) for ranks in rounds]

    for way in WAYS:
        cells = [way if way == WAYS[0] else f"moptrace, {way}"]
        for what in ("seconds", "busy"):
            have, other = slowest(way, what), slowest(WAYS[0], what)
            ratio = statistics.median(a / b for a, b in zip(have, other, strict=True))
            cells += [f"{statistics.median(have):.2f}", f"{ratio:.2f}x"]
        shown.add_row(*cells, f"{peaks[way] / 2**20:,.0f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given: Any = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    shape = Shape(given.tokens, given.width, given.heads, given.groups, given.layers)
    console, peaks = Console(), dict[str, int]()
    with console.status("time"):
        timed = run(shape, WAYS, given.rounds)
    for way in WAYS:
        with console.status(f"memory: {way}"):
            peaks[way] = max(own[way][0].bytes for own in run(shape, (way,), 1))
    losses = [own[way][0].loss for own in timed for way in WAYS]
    error = max(losses) / min(losses) - 1
    shown = table(shape, timed, peaks)
    failures: list[str] = []
    if not error <= TOLERANCE:
        failures.append(f"the losses differ by {error:.1e}, over {TOLERANCE:.0e}")
    facts = [f"{RANKS} gloo ranks, 1 thread each", f"the losses agree to {error:.1e}"]
    publish(console, "context", "Long context", facts, [shown], failures)


if __name__ == "__main__":
    main()
