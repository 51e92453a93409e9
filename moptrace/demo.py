"""Train a real Hugging Face Mixture-of-Experts on four ranks beside one device, step by step."""

from __future__ import annotations

import os
import resource
import socket
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from moptrace.core import Level

__all__ = ["Report", "run"]

VOCABULARY = 256  # bytes


@dataclass
class Report:
    """What one run of a training loop measured."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    parameter_bytes: int = 0
    explanation: str = ""
    diff: str = ""


@dataclass(frozen=True)
class _Settings:
    """One demo: everything that both runs must agree on."""

    ranks: int = 4
    steps: int = 30
    sequences: int = 8  # in the global batch
    length: int = 128
    learning_rate: float = 1e-3


def model() -> nn.Module:
    """A Qwen3-MoE of about 19 million parameters, randomly initialised."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        moe_intermediate_size=256,
        num_experts=24,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


def text() -> Tensor:
    """The bytes of the Python standard library's own sources: real text, present everywhere."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return torch.frombuffer(bytearray(sources), dtype=torch.uint8).long()


def batches(settings: _Settings) -> Iterator[dict[str, Tensor]]:
    """Global batches of random windows of the text, the same on every rank."""
    data, generator = text(), torch.Generator().manual_seed(0)
    for _ in range(settings.steps):
        starts = torch.randint(
            len(data) - settings.length, (settings.sequences,), generator=generator
        )
        ids = torch.stack([data[s : s + settings.length] for s in starts.tolist()])
        yield {"input_ids": ids, "labels": ids}


def run(ranks: int = 4, steps: int = 30, console: Console | None = None) -> float:
    """Run the demo, print its report, and return the largest difference between the losses.

    Spawns ``ranks`` processes that talk over gloo. Needs the ``hf`` extra (transformers).
    """
    console = console or Console()
    settings = _Settings(ranks=ranks, steps=steps)
    console.print(
        f"Training {_millions(model())} million parameters of Qwen3-MoE on the standard "
        f"library's sources: one device, then {ranks} ranks over gloo."
    )
    with Progress(console=console, transient=True) as progress:
        alone = _in_processes(1, settings, progress)
        together = _in_processes(ranks, settings, progress)
    return _show(console, settings, alone, together)


def _show(console: Console, settings: _Settings, alone: Report, together: Report) -> float:
    console.print("\nWhat the expert pass did to the first block:\n")
    console.print(together.diff, markup=False, highlight=False)
    console.print("\nHow each component runs now:\n")
    console.print(together.explanation, markup=False, highlight=False)
    losses = Table("step", "loss, one device", f"loss, {settings.ranks} ranks", "difference")
    differences = [abs(a - b) for a, b in zip(alone.losses, together.losses, strict=True)]
    for step, (a, b) in enumerate(zip(alone.losses, together.losses, strict=True)):
        losses.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    console.print(losses)
    tokens = settings.sequences * settings.length
    summary = Table("", "one device", f"{settings.ranks} ranks")
    summary.add_row("tokens/s", *(f"{tokens / _median(r.seconds):,.0f}" for r in (alone, together)))
    summary.add_row(
        "parameters per rank, MiB",
        *(f"{r.parameter_bytes / 2**20:.1f}" for r in (alone, together)),
    )
    summary.add_row(
        "peak memory per process, MiB",
        *(f"{r.peak_bytes / 2**20:,.0f}" for r in (alone, together)),
    )
    console.print(summary)
    console.print(f"largest difference between the losses: {max(differences):.1e}")
    return max(differences)


def _in_processes(ranks: int, settings: _Settings, progress: Progress) -> Report:
    """Train in ``ranks`` fresh processes; the report of the first."""
    task = progress.add_task(f"{ranks} rank{'s' * (ranks > 1)}", total=settings.steps)
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    port = _free_port()
    spawned = mp.spawn(
        _train, args=(ranks, port, settings, queue), nprocs=ranks, join=False, start_method="spawn"
    )
    assert spawned is not None
    report: Report | None = None
    while report is None:
        if spawned.join(timeout=0.05) and queue.empty():
            raise RuntimeError("the ranks ended without a report")
        while not queue.empty():
            message = queue.get()
            if isinstance(message, Report):
                report = message
            else:
                progress.advance(task)
    while not spawned.join(timeout=5):
        pass
    return report


def _train(rank: int, ranks: int, port: int, settings: _Settings, queue: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    trained: Any = model()
    if ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh

        import moptrace

        trained = moptrace.parallelize(trained, init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=settings.learning_rate, fused=True)
    report = Report()
    for batch in batches(settings):
        started = time.perf_counter()
        local = trained.local_batch(batch) if ranks > 1 else batch
        loss = trained(**local).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report.seconds.append(time.perf_counter() - started)
        report.losses.append(loss.item())
        if rank == 0:
            queue.put("step")
    report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report.parameter_bytes = sum(_local(p).numel() * p.element_size() for p in trained.parameters())
    if ranks > 1:
        report.explanation = str(trained.explain())
        placed = next(p for p in trained.program.history if p.level is Level.PLACED)
        report.diff = placed.diff(block=0)
    if rank == 0:
        queue.put(report)
    dist.destroy_process_group()


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _millions(trained: nn.Module) -> int:
    return round(sum(p.numel() for p in trained.parameters()) / 1e6)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
