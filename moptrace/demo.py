"""Train a real Hugging Face Mixture-of-Experts on four ranks beside one device, step by step."""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moptrace.core import Level
from moptrace.errors import MoptraceError

__all__ = ["LIMIT", "Report", "Settings", "batches", "model", "run", "text"]

VOCABULARY = 256  # bytes
LIMIT = 1e-4  # see run


@dataclass(frozen=True)
class Settings:
    """Everything that both runs must agree on."""

    ranks: int = 4
    steps: int = 30
    sequences: int = 8  # in the global batch
    length: int = 128
    learning_rate: float = 1e-3

    @property
    def tokens(self) -> int:
        """Tokens in a global batch."""
        return self.sequences * self.length


@dataclass
class Report:
    """What one run of the training loop measured, on its first rank."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stored_bytes: int = 0  # parameters, gradients and optimizer state
    peak_bytes: int = 0  # of the process, above what it took before there was a model
    explanation: str = ""
    diff: str = ""


def model() -> nn.Module:
    """A Qwen3-MoE of 20 million parameters, randomly initialised."""
    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    except ModuleNotFoundError as error:
        raise MoptraceError(
            "the demo trains a model of transformers, which is not installed. "
            'Install it with: pip install "moptrace[hf]"'
        ) from error

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,  # pyright: ignore[reportCallIssue]  transformers declares it late
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


def batches(settings: Settings) -> Iterator[dict[str, Tensor]]:
    """Global batches of random windows of the text, the same on every rank."""
    data, generator = text(), torch.Generator().manual_seed(0)
    latest = len(data) - settings.length
    for _ in range(settings.steps):
        starts = torch.randint(latest, (settings.sequences,), generator=generator)
        ids = torch.stack([data[s : s + settings.length] for s in starts.tolist()])
        yield {"input_ids": ids, "labels": ids}


def run(ranks: int = 4, steps: int = 30, console: Console | None = None) -> float:
    """Run the demo, print its report, and return the largest difference between the losses.

    Spawns ``ranks`` processes that talk over gloo. Needs the ``hf`` extra (transformers).

    In float32 both runs add the same numbers, in another order: the losses differ by rounding,
    which was 6.2e-6 at most in 30 steps. ``LIMIT`` leaves room for a token whose last two experts
    are tied to within rounding and which takes the other one, in one of 100,000 such choices.
    """
    console = console or Console()
    settings = Settings(ranks=ranks, steps=steps)
    if settings.sequences % ranks:
        raise MoptraceError(
            f"the demo's {settings.sequences} sequences cannot be shared by {ranks} ranks; "
            "take 2, 4 or 8"
        )
    count = sum(p.numel() for p in model().parameters())
    console.print(
        f"A Qwen3-MoE of {count / 1e6:.1f} million parameters learns the Python standard library's "
        f"own sources, byte by byte, in float32: {settings.tokens:,} tokens a step, {steps} steps. "
        f"First on one device, as Hugging Face wrote it; then through moptrace.parallelize on "
        f"{ranks} ranks over gloo.\n"
    )
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )
    with Progress(*columns, console=console) as progress:
        alone = _in_processes(1, settings, progress)
        together = _in_processes(ranks, settings, progress)
    return _show(console, settings, alone, together)


# --- the report -----------------------------------------------------------------------------------


def _show(console: Console, settings: Settings, alone: Report, together: Report) -> float:
    title = "What the pass that places tensors did to the first Mixture-of-Experts block"
    console.print(f"\n[bold]{title}[/bold]\n")
    console.print(_coloured(together.diff), soft_wrap=True)
    console.print("\n[bold]What runs where, and what it costs[/bold]\n")
    console.print(together.explanation, markup=False, highlight=False, soft_wrap=True)
    console.print("\n[bold]The losses, and what the runs took[/bold]\n")
    difference = max(abs(a - b) for a, b in zip(alone.losses, together.losses, strict=True))
    console.print(_losses(settings, alone, together))
    console.print(_costs(settings, alone, together))
    verdict = "the same function" if difference <= LIMIT else "NOT the same function"
    console.print(
        f"largest difference between the losses: {difference:.1e} (limit {LIMIT:.0e}): {verdict}"
    )
    return difference


def _losses(settings: Settings, alone: Report, together: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "loss, one device", f"loss, {settings.ranks} ranks", "difference"):
        table.add_column(heading, justify="right")
    for step, (a, b) in enumerate(zip(alone.losses, together.losses, strict=True), start=1):
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    return table


def _costs(settings: Settings, alone: Report, together: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("one device", justify="right")
    table.add_column(f"{settings.ranks} ranks", justify="right")
    both = (alone, together)
    speeds = [settings.tokens / statistics.median(r.seconds) for r in both]
    table.add_row("tokens/s", *(f"{speed:,.0f}" for speed in speeds))
    table.add_row(
        "of a rank: parameters, gradients, optimizer state",
        *(_mebibytes(r.stored_bytes) for r in both),
    )
    table.add_row(
        "of a rank: peak, activations and graphs too", *(_mebibytes(r.peak_bytes) for r in both)
    )
    return table


def _coloured(diff: str) -> Text:
    styles = {"+": "green", "-": "red", "~": "yellow"}
    return Text("\n").join(Text(x, styles.get(x[:1], "dim")) for x in diff.splitlines())


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


# --- training -------------------------------------------------------------------------------------


def _in_processes(ranks: int, settings: Settings, progress: Progress) -> Report:
    """Train in ``ranks`` fresh processes; the report of the first."""
    # Threads that wait actively for each other stand still where other programs run beside them.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name = f"{ranks} ranks" if ranks > 1 else "one device"
    task = progress.add_task(name, total=settings.steps, news="starting")
    queue = mp.get_context("spawn").SimpleQueue()
    arguments = (ranks, _free_port(), settings, queue)
    spawned = mp.spawn(_train, arguments, nprocs=ranks, join=False)
    assert spawned is not None
    report: Report | None = None
    while report is None:
        ended = spawned.join(timeout=0.05)  # raises where a rank failed
        while report is None and not queue.empty():
            match queue.get():
                case Report() as report:
                    pass
                case float() as loss:
                    progress.update(task, advance=1, news=f"loss {loss:.4f}")
                case news:
                    progress.update(task, news=news)
        if ended and report is None:
            raise RuntimeError("the ranks ended without a report")
    while not spawned.join():
        pass
    return report


def _train(rank: int, ranks: int, port: int, settings: Settings, queue: Any) -> None:
    """One rank, or the one device."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tell = queue.put if rank == 0 else lambda _: None
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    with torch.device("meta"):
        model()  # imports what a model needs
    before = _peak_bytes()
    trained: Any = model()
    if ranks > 1:
        tell("tracing and placing")
        trained = _parallel(trained, rank, ranks, port)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=settings.learning_rate, fused=True)
    report = Report()
    for batch in batches(settings):
        started = time.perf_counter()
        local = trained.local_batch(batch) if ranks > 1 else batch
        loss = trained(**local).loss
        loss.backward()
        optimizer.step()
        report.losses.append(loss.item())
        report.seconds.append(time.perf_counter() - started)
        report.stored_bytes = _stored_bytes(optimizer)
        optimizer.zero_grad()
        tell(report.losses[-1])
    report.peak_bytes = _peak_bytes() - before
    if ranks > 1:
        report.explanation = str(trained.explain())
        placed = next(p for p in trained.program.history if p.level is Level.PLACED)
        report.diff = placed.diff(block=0)
        dist.destroy_process_group()
    tell(report)


def _parallel(whole: nn.Module, rank: int, ranks: int, port: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    import moptrace

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    return moptrace.parallelize(whole, init_device_mesh("cpu", (ranks,)))


def _stored_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What this rank holds of parameters, gradients and optimizer state."""
    held: list[Any] = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        held += [parameter, parameter.grad, *optimizer.state[parameter].values()]
    tensors = [x for x in held if isinstance(x, Tensor)]
    own = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.numel() * x.element_size() for x in own)


def _peak_bytes() -> int:
    """The most memory that this process has taken so far."""
    status = Path("/proc/self/status")
    if status.exists():  # the portable number below starts at that of the parent process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
