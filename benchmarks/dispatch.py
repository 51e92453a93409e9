"""Peak memory of the rank to which every token goes: experts at once and in chunks, in one run.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --tokens 2048 --chunk 256

The shape is that of FEMP's dispatch experiment (65,536 tokens a rank, width 7,168, experts of
2,048, 128 of them, top-8, over 8 ranks, chunks of 6,554), with everything but the number of choices
and of chunks divided to fit four ranks of one machine. Two routers: one that spreads tokens evenly,
and one that sends every token to the experts of the first rank. Each rank does one step, forward
and backward, of a layer of experts, under several plans: all tokens at once, in chunks of which
backward keeps everything, in chunks that backward computes again, and with experts that ranks lend
each other (``Balance``), at once and in chunks. What counts is the most memory that the fullest
rank takes above what it had before, which was tokens and weights (VmHWM). All must give the same
loss. The exit status is 1 where chunks take over 41% (published: 52.66 to 21.43 GiB) of the peak of
all at once, or where more rows come to a rank than the plan's bound: with balance, the threshold.
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
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moptrace
from models import Experts, MoEConfig, Router
from moptrace import Balance, Plan
from peaks import Measured, measured
from report import publish

RANKS = 4
BALANCE = Balance()
MOST = 0.41  # of the peak of all tokens at once
TOLERANCE = 1e-5
CONFIG = MoEConfig(hidden=448, experts=32, top_k=8, expert_hidden=128)


@dataclass(frozen=True)
class Case:
    """One run: a router, tokens of each rank, and a plan by name."""

    router: str
    tokens: int
    name: str
    plan: Plan


@dataclass(frozen=True)
class Found:
    """What one rank saw: its step, and the most rows that came to it at once."""

    step: Measured
    rows: int


class Layer(nn.Module):
    """Tokens in, a loss of what their experts make of them out."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(CONFIG), Experts(CONFIG)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, 1)
        return (self.experts(x, *self.router(x)) ** 2).mean()


def weights(router: str) -> dict[str, Tensor]:
    """The same whole weights whoever makes them; ``"one rank"`` prefers the first experts."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.empty(x.shape).normal_(0.0, 0.05, generator=generator)
        for name, x in meta_layer().state_dict().items()
    }
    if router == "one rank":
        state["router.weight"][:, 0] = 0.0
        state["router.weight"][: CONFIG.top_k, 0] = 1.0
    return state


def meta_layer() -> Layer:
    with torch.device("meta"):
        return Layer()


def one_rank(rank: int, folder: str, case: Case) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        generator = torch.Generator().manual_seed(rank)
        batch = {"hidden": torch.randn(1, case.tokens, CONFIG.hidden, generator=generator)}
        batch["hidden"][..., 0] = 20.0  # what the adversarial router looks at
        mesh = init_device_mesh("cpu", (RANKS,))
        parallel = moptrace.parallelize(meta_layer(), mesh, case.plan, batch=batch)
        parallel.load_full_state_dict(weights(case.router))
        rows = watched()

        def step() -> Tensor:
            loss = parallel(**batch)
            loss.backward()
            return loss.detach()

        torch.save(Found(measured(step), max(rows)), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def watched() -> list[int]:
    """Rows that come to this rank, each time that some are exchanged."""
    seen: list[int] = []
    send = dist.all_to_all_single

    def watching(output: Tensor, given: Tensor, *rest: Any, **options: Any) -> Any:
        if output.dim() == 2 and output.shape[1] == CONFIG.hidden:
            seen.append(len(output))
        return send(output, given, *rest, **options)

    dist.all_to_all_single = watching
    return seen


def fullest(case: Case) -> Found:
    """The rank that takes most memory, with the most rows that any rank got."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_rank, (folder, case), nprocs=RANKS)
        found = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(RANKS)]
    most = max(found, key=lambda one: one.step.bytes)
    return replace(most, rows=max(one.rows for one in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank")
    parser.add_argument("--chunk", type=int, default=820, help="tokens of a chunk")
    given: Any = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    plans = {
        "all at once": Plan(ep=RANKS),
        "chunks, kept": Plan(ep=RANKS, expert_tokens=given.chunk, recompute_experts=False),
        "chunks, computed again": Plan(ep=RANKS, expert_tokens=given.chunk),
        "balanced": Plan(ep=RANKS, balance=BALANCE),
        "balanced chunks": Plan(ep=RANKS, balance=BALANCE, expert_tokens=given.chunk),
    }
    shown = Table(
        title=f"{given.tokens:,} tokens a rank, width {CONFIG.hidden}, {CONFIG.experts} experts of "
        f"{CONFIG.expert_hidden}, top-{CONFIG.top_k}, ep={RANKS}, chunks of {given.chunk:,}"
    )
    for column in ("router", "experts"):
        shown.add_column(column)
    for column in ("peak MiB", "of all at once", "most rows at once", "seconds"):
        shown.add_column(column, justify="right")
    failures: list[str] = []
    console = Console()
    for router in ("even", "one rank"):
        whole: Measured | None = None
        for name, plan in plans.items():
            with console.status(f"{router}: {name}"):
                found = fullest(Case(router, given.tokens, name, plan))
            step = found.step
            whole = whole or step
            part = step.bytes / whole.bytes
            if abs(step.loss / whole.loss - 1) > TOLERANCE:
                failures.append(f"{router}, {name}: the loss is {step.loss}, not {whole.loss}")
            mean = (plan.expert_tokens or given.tokens) * CONFIG.top_k
            bound = mean * (BALANCE.threshold if plan.balance else RANKS)
            if found.rows > bound:
                failures.append(f"{router}, {name}: {found.rows:,} rows came, over {bound:,.0f}")
            if name == "chunks, computed again" and router == "one rank" and part > MOST:
                failures.append(f"{router}, {name}: {part:.0%} of all at once, over {MOST:.0%}")
            cells = f"{step.bytes / 2**20:,.0f}", f"{part:.0%}", f"{found.rows:,}"
            shown.add_row(router, name, *cells, f"{step.seconds:,.1f}")
    facts = [
        f"{RANKS} gloo ranks, 1 thread each",
        (
            f"bound on the rows that come to a rank at once in a chunk: {RANKS} times, balanced "
            f"{BALANCE.threshold} times {given.chunk * CONFIG.top_k:,}"
        ),
    ]
    publish(console, "dispatch", "Peak memory of dispatch", facts, [shown], failures)


if __name__ == "__main__":
    main()
