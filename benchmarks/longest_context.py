"""The longest context that four gloo ranks can train within so much memory each.

    python benchmarks/longest_context.py
    python benchmarks/longest_context.py --limit 1.5 --words 32768

A small Mixture-of-Experts model takes training steps, forward, backward and fused AdamW, on one
sequence a rank (FSDP2) or on one sequence that the ranks share (FSDP2 with torch's ring attention,
moptrace), of any length. FSDP2 shards each layer, and computes layers again in backward
(``torch.utils.checkpoint``); its longest context is found by bisection. moptrace then has to train
``--times`` as many tokens; it computes layers again too (``activations="checkpoint"``), and how far
it would go is a straight line through two measured lengths.

What counts is all that a rank's process takes (VmHWM), Python and torch included, in its second
step, which has the optimizer's state. A process that goes beyond the limit ends itself. Before
anything is compared, the three must agree about the loss of a short sequence after a step to 1e-4.
The exit status is 1 where moptrace needs more memory than the limit, or its predicted peak is off
by more than 10%.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from by_hand import Ring
from models import MoEConfig, MoEDecoder
from peaks import forget_peak, peak
from report import publish

RANKS = 4
TOLERANCE, SLACK = 1e-4, 0.1
SYSTEMS = ("FSDP2", "FSDP2 + context parallel", "moptrace")
SHORT = 64 * RANKS  # tokens of the sequence on which all must agree


@dataclass(frozen=True)
class Trial:
    """One system's steps on a sequence of so many tokens, with a limit in bytes."""

    system: str
    tokens: int
    config: MoEConfig
    limit: int
    chunk: int


@dataclass(frozen=True)
class Found:
    """What a rank found: the loss after a step, its peak, the peak that was predicted of it."""

    loss: float
    bytes: int
    seconds: float
    predicted: int | None = None


Step = Callable[[], Tensor]


# --- the systems ----------------------------------------------------------------------------------


def sequence(trial: Trial) -> tuple[Tensor, Tensor]:
    """Tokens and the next ones, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(trial.config.vocabulary, (1, trial.tokens + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


class Again(nn.Module):
    """A layer that backward computes again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def fsdp2(trial: Trial, shares: bool) -> tuple[Step, None]:
    model = MoEDecoder(trial.config).reset_parameters()
    ids, labels = sequence(trial)
    if shares:
        halves = [x.chunk(2 * RANKS, 1) for x in (ids, labels)]
        rank = dist.get_rank()
        ids, labels = (torch.cat([h[rank], h[2 * RANKS - 1 - rank]], 1) for h in halves)
    mesh = init_device_mesh("cpu", (RANKS,))
    for number, layer in enumerate(model.layers):
        if shares:
            layer.attention = Ring(layer.attention)
        model.layers[number] = Again(layer)
        fully_shard(model.layers[number], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(ids, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, None


def by_moptrace(trial: Trial) -> tuple[Step, Callable[[], int]]:
    from moptrace import Plan, parallelize, train_step
    from moptrace.liveness import sizes_of_values

    with torch.device("meta"):
        model = MoEDecoder(trial.config)
    ids, labels = (x.chunk(RANKS, 1)[dist.get_rank()] for x in sequence(trial))
    batch = {"input_ids": ids.contiguous(), "labels": labels.contiguous()}
    plan = Plan(
        cp=RANKS, ep=RANKS, context="ring", logits_bytes=0, expert_tokens=trial.chunk,
        fold_router_weights=True,
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (RANKS,))
    parallel = parallelize(model, mesh, plan, batch=batch)
    parallel.load_full_state_dict(MoEDecoder(trial.config).reset_parameters().state_dict())
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3, fused=True)
    step = train_step(parallel, optimizer, activations="checkpoint")

    def above() -> int:
        """The predicted peak above what the step is given."""
        sizes, found = sizes_of_values(step.program), step.peak_memory()
        inputs = sum(sizes[node] for node in step.program.graph.find_nodes(op="placeholder"))
        return found.bytes + found.host_bytes - inputs

    return lambda: step(**batch), above


def build(trial: Trial) -> tuple[Step, Callable[[], int] | None]:
    if trial.system == "moptrace":
        return by_moptrace(trial)
    return fsdp2(trial, shares=trial.system != "FSDP2")


# --- one trial ------------------------------------------------------------------------------------


def watch(limit: int) -> None:
    """End this process when it has taken more than the limit."""

    def look() -> None:
        while True:
            if peak() > limit:
                os._exit(1)
            time.sleep(0.02)

    threading.Thread(target=look, daemon=True).start()


def one_rank(rank: int, folder: str, trial: Trial) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        watch(trial.limit)
        step, predicted = build(trial)
        step()
        before = forget_peak()
        started = time.perf_counter()
        loss = step()
        dist.all_reduce(loss)  # FSDP2's are those of each rank
        seconds = time.perf_counter() - started
        told = None if predicted is None else before + predicted()
        torch.save(Found(loss.item() / RANKS, peak(), seconds, told), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def run(trial: Trial) -> Found | None:
    """What the fullest rank found; None where one went beyond the limit."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(one_rank, (folder, trial), nprocs=RANKS, join=False)
        assert context is not None
        try:
            while not context.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException):
            if any(process.exitcode == 1 for process in context.processes):
                return None  # the others only miss the one that ended
            raise
        found = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(RANKS)]
    return max(found, key=lambda one: one.bytes)


def longest(trial: Trial, resolution: float = 0.05) -> tuple[int, Found]:
    """The longest context within the limit, by doubling and bisection, and what it took."""
    fits, too_long, best = 0, None, None
    tokens = trial.tokens
    while too_long is None or too_long - fits > max(resolution * fits, 2 * RANKS):
        found = run(replace(trial, tokens=tokens))
        if found is None:
            too_long = tokens
        else:
            fits, best = tokens, found
        middle = 2 * fits if too_long is None else (fits + too_long) // 2
        tokens = max(middle // (2 * RANKS), 1) * 2 * RANKS
        if tokens in (fits, too_long):
            break
    if best is None:
        raise SystemExit(f"{trial.system} trains no context at all within {trial.limit:,} bytes")
    return fits, best


# --- the report -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, default=4.0, help="GiB a rank")
    parser.add_argument("--times", type=int, default=32, help="of FSDP2's context, for moptrace")
    parser.add_argument("--words", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=4096, help="tokens sent to experts at once")
    given: Any = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    config = MoEConfig(
        layers=2, hidden=given.hidden, experts=16, expert_hidden=2 * given.hidden,
        vocabulary=given.words,
    )  # fmt: skip
    base = Trial("", SHORT, config, int(given.limit * 2**30), given.chunk)
    console, failures = Console(), list[str]()
    with console.status("the loss of a short sequence"):
        losses = [short.loss for s in SYSTEMS if (short := run(replace(base, system=s)))]
    error = max(losses) / min(losses) - 1
    if len(losses) < len(SYSTEMS) or not error <= TOLERANCE:
        failures.append(f"the losses of a short sequence are {losses}")
    rows: list[tuple[str, int, Found]] = []
    for system in SYSTEMS[:2]:
        with console.status(f"{system}: bisection"):
            tokens, found = longest(replace(base, system=system, tokens=1024))
        rows.append((system, tokens, found))
        console.print(f"{system}: {tokens:,} tokens")
    alone, shared = rows[0][1], rows[1][1]
    ours: list[tuple[int, Found]] = []
    for tokens in (alone * given.times // 2, alone * given.times):
        tokens -= tokens % (2 * RANKS)
        with console.status(f"moptrace, {tokens:,} tokens"):
            found = run(replace(base, system="moptrace", tokens=tokens))
        if found is None:
            failures.append(f"moptrace does not train {tokens:,} tokens within the limit")
            break
        assert found.predicted is not None
        ours.append((tokens, found))
        rows.append(("moptrace", tokens, found))
        if abs(off := found.predicted / found.bytes - 1) > SLACK:
            failures.append(f"the prediction at {tokens:,} tokens is off by {off:+.0%}")
    facts = [f"{RANKS} gloo ranks, 1 thread each; {config}; at most {given.limit:g} GiB a rank"]
    facts.append(f"the losses of {SHORT} tokens after a step agree to {error:.1e}")
    if len(ours) == 2:
        (half, less), (whole, more) = ours
        line = (more.bytes - less.bytes) / (whole - half)
        reach = int(whole + (base.limit - more.bytes) / line)
        facts.append(f"a line through moptrace's two lengths meets the limit at {reach:,} tokens")
    shown = Table(title=f"longest context within {given.limit:g} GiB a rank")
    shown.add_column("system")
    for column in ("tokens", "of FSDP2", "of FSDP2 + CP", "peak MiB", "predicted MiB", "seconds"):
        shown.add_column(column, justify="right")
    for system, tokens, found in rows:
        told = "" if found.predicted is None else f"{found.predicted / 2**20:,.0f}"
        ratios = (f"{tokens / other:.1f}x" for other in (alone, shared))
        cells = (f"{found.bytes / 2**20:,.0f}", told, f"{found.seconds:,.1f}")
        shown.add_row(system, f"{tokens:,}", *ratios, *cells)
    publish(console, "longest_context", "Longest context", facts, [shown], failures)


if __name__ == "__main__":
    main()
