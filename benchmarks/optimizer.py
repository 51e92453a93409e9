"""The optimizer's part of a step: streamed from the host, or run there, next to copying alone.

    python benchmarks/optimizer.py
    python benchmarks/optimizer.py --hidden 2048 --expert-hidden 1536 --experts 64 --layers 8

Of one model on one rank, side by side in one run: the updates of a step with the optimizer's state
on the device, as plain operators and by torch's fused kernel; the same streamed from the memory of
the host in buckets; run on the host, where the state is; what a user would do instead, torch's
fused AdamW on the CPU with the gradients copied there and the parameters back (parameters that are
masters on the host, which are not sent there); and the floor, copies of as many bytes as the state
has to the device and back. Without a GPU the memory of the host is the device's, so copies cost as
much again as the update, and the verdict asks only that every way gives the same weights; on a GPU,
that streaming takes at most 1.15 of the floor.

A second table predicts, for one rank of a large model, when it matters where and when updates run:
how long a step is, and how much of it waits for copies and for the host, by tokens a rank. A third
predicts how fast a host has to be for its updates to pay: the step, and the share of the state that
is updated there, by the bytes of its memory that it moves in a second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from models import MoEConfig, MoEDecoder
from moptrace import MixedPrecisionPolicy, Plan, Program, parallelize, trace, train_step
from moptrace.core import Pass, chain
from moptrace.costs import Machine
from moptrace.kernels.host_update import HostUpdate
from moptrace.passes.apply_optimizer import apply_optimizer
from moptrace.passes.clip_gradients import clip_gradients
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.defer_updates import defer_updates
from moptrace.passes.differentiate import differentiate
from moptrace.passes.stream_state import stream_state
from moptrace.passes.update_on_host import update_on_host
from moptrace.state import sizes_of_rank
from moptrace.timeline import WAITING, Timeline, predict
from report import publish

LIMIT = 1.15  # of the floor, on a GPU
BYTES_OF_STATE = 8  # of a parameter: two moments in float32


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, run: Callable[[], Any], before: Callable[[], Any]) -> float:
    """How long ``run`` takes, after ``before``."""
    before()
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


class Step:
    """A step that leaves its updates, which ``update`` runs alone."""

    def __init__(self, config: MoEConfig, device: torch.device, state: Any, fused: bool):
        torch.manual_seed(0)
        ids = torch.arange(64, device=device).view(1, 64) % config.vocabulary
        self.batch = {"input_ids": ids, "labels": ids}
        model = MoEDecoder(config).reset_parameters()
        mesh = init_device_mesh(device.type, (1,))
        self.model = parallelize(model, mesh, Plan(ep=1), batch=self.batch)
        parameters = self.model.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, fused=fused, foreach=False)
        self.step = train_step(self.model, optimizer, max_norm=1.0, updates="forward", state=state)
        for _ in range(2):  # the first makes the state, the second leaves its updates
            self.leave()

    def leave(self) -> None:
        self.step(**self.batch)

    def update(self) -> None:
        self.step.flush()

    def weights(self) -> list[Tensor]:
        return [x.detach().cpu().clone() for x in self.model.full_state_dict().values()]


class OnTheCPU:
    """Parameters and gradients on the device, everything else by torch's fused AdamW on the CPU."""

    def __init__(self, like: Step, device: torch.device):
        held = [p.to_local().detach().clone() for p in like.model.parameters()]  # type: ignore[attr-defined]
        self.held, self.gradients = held, [torch.randn_like(p) for p in held]
        pin = device.type == "cuda"
        self.masters = [torch.empty_like(p, device="cpu", pin_memory=pin).copy_(p) for p in held]
        for master in self.masters:
            master.grad = torch.empty_like(master, pin_memory=pin)
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3, fused=True)
        self.device = device
        self.update()

    def update(self) -> None:
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            assert master.grad is not None
            master.grad.copy_(gradient, non_blocking=True)
        synchronize(self.device)
        self.optimizer.step()
        for held, master in zip(self.held, self.masters, strict=True):
            held.copy_(master, non_blocking=True)


class Copies:
    """The state's bytes to the device and back, both ways at once."""

    def __init__(self, parameters: int, device: torch.device):
        pin = device.type == "cuda"
        size = parameters * BYTES_OF_STATE // 4
        self.host, self.sent = (torch.ones(size, pin_memory=pin) for _ in range(2))
        self.there, self.came = (torch.ones(size, device=device) for _ in range(2))
        self.streams = [torch.cuda.Stream(device) for _ in range(2)] if pin else []

    def update(self) -> None:
        pairs = ((self.came, self.host), (self.sent, self.there))
        if not self.streams:
            for to, of in pairs:
                to.copy_(of)
        for stream, (to, of) in zip(self.streams, pairs, strict=False):
            with torch.cuda.stream(stream):
                to.copy_(of, non_blocking=True)


# --- predicted ------------------------------------------------------------------------------------

RANKS = 8
LARGE = MoEConfig(4, 2048, 16, 64, 8, 1536, vocabulary=32_768)
TOKENS = (256, 1_024, 4_096, 16_384, 65_536)
RATES = (5e9, 1e10, 2e10, 4e10, 8e10, 1.6e11)  # bytes of the host's memory in a second
STREAMED = stream_state(2**28)


def on_host(choose: bool = False, machine: Machine | None = None) -> Pass:
    return chain(update_on_host(choose, 2**28, machine=machine, then=overlapped()), STREAMED)


ORDERS: dict[str, list[Pass]] = {
    "state on the device": [],
    "streamed, after": [STREAMED],
    "on the host, after": [on_host()],
    "cheaper, after": [on_host(choose=True)],
    "streamed, in forward": [defer_updates(), STREAMED],
    "on the host, in forward": [defer_updates(), on_host()],
    "cheaper, in forward": [defer_updates(), on_host(choose=True)],
}


def finished(tokens: int) -> Program:
    """The step of one of the ranks, of a model whose parameters have no memory."""
    with torch.device("meta"):
        model = MoEDecoder(LARGE)
    ids = torch.empty(RANKS, tokens, dtype=torch.int64, device="meta")
    traced = canonical()(trace(model, {"input_ids": ids, "labels": ids}))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    masters = {name: p.dtype for name, p in model.named_parameters()}
    plan = Plan(ep=RANKS, mixed_precision=policy).resolve(RANKS, [LARGE.experts])
    local = sharded(plan, RANKS, masters=masters)(traced)
    shards = {
        p.fqn: torch.nn.Parameter(torch.empty(shape, device="meta"))
        for p, shape in zip(local.signature.parameters, sizes_of_rank(local, 0), strict=False)
    }
    optimizer = torch.optim.AdamW(shards.values(), lr=1e-3)
    optimizer.param_groups[0]["fused"] = True  # which torch does not let parameters without memory
    for shard in shards.values():
        moments = {key: torch.empty_like(shard) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[shard] = {"step": torch.zeros(()), **moments}
    names = {shard: name for name, shard in shards.items()}
    passes = [differentiate(shards), clip_gradients(1.0), apply_optimizer(optimizer, names)]
    return chain(*passes)(local)


def waits(timeline: Timeline) -> float:
    """The share of a step that waits for copies, and for what the host has to do before."""
    spans = (s for s in timeline.spans if s.lane == WAITING and s.kind.startswith("copy"))
    return sum(span.seconds for span in spans) / timeline.seconds


def crossover(machine: Machine) -> Table:
    """How long a step is, and how much of it waits for the state, by tokens of a rank."""
    table = Table(title=f"Predicted, one of {RANKS} ranks, {LARGE}, bfloat16, {machine}")
    table.add_column("tokens a rank", justify="right")
    for name in ORDERS:
        table.add_column(f"ms (waits), {name}", justify="right")
    for tokens in track(TOKENS, "predicting", transient=True):
        step, cells = finished(tokens), [f"{tokens:,}"]
        for passes in ORDERS.values():
            timeline = predict(chain(*passes, overlapped())(step), machine)
            cells.append(f"{timeline.seconds * 1e3:,.1f} ({waits(timeline):.0%})")
        table.add_row(*cells)
    return table


def pays(tokens: int) -> Table:
    """From which speed of the host on updates are better there, all of them or some."""
    table = Table(title=f"Predicted, updates after backward, {tokens:,} tokens a rank")
    names = ("GB/s of the host", "ms, streamed", "ms, on the host", "ms, cheaper", "there")
    for column in names:
        table.add_column(column, justify="right")
    step = finished(tokens)
    for rate in track(RATES, "predicting", transient=True):
        machine = Machine(host_memory=rate)
        ways = (STREAMED, on_host(), on_host(True, machine))
        programs = [chain(way, overlapped())(step) for way in ways]
        milliseconds = [f"{predict(p, machine).seconds * 1e3:,.1f}" for p in programs]
        every, some = (
            sum(isinstance(node.target, HostUpdate) for node in p.nodes) for p in programs[1:]
        )
        table.add_row(f"{rate / 1e9:,.0f}", *milliseconds, f"{some / every:.0%}")
    return table


# --- measured -------------------------------------------------------------------------------------


def measured(config: MoEConfig, device: torch.device, rounds: int) -> tuple[Table, list[str]]:
    """Every way to update, in turn; and what is wrong."""
    bucket = stream_state(2**26)
    there = chain(update_on_host(bucket=2**26), bucket)
    steps = {
        "moptrace, state on the device": Step(config, device, "device", False),
        "moptrace, state on the device, fused": Step(config, device, "device", True),
        "moptrace, streamed": Step(config, device, bucket, False),
        "moptrace, streamed, fused": Step(config, device, bucket, True),
        "moptrace, on the host": Step(config, device, there, False),
        "moptrace, on the host, fused": Step(config, device, there, True),
    }
    first = next(iter(steps.values()))
    parameters = sum(p.to_local().numel() for p in first.model.parameters())  # type: ignore[attr-defined]
    floor = "the floor: copies of the state"
    ways: dict[str, Any] = {
        **steps,
        "torch's fused AdamW on the CPU, with copies": OnTheCPU(first, device),
        floor: Copies(parameters, device),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(rounds), "measuring", transient=True):
        for name, way in ways.items():
            leave = getattr(way, "leave", lambda: None)
            times[name].append(seconds(device, way.update, leave))
    median = {name: statistics.median(found) for name, found in times.items()}
    table = Table(title=f"Updates of {parameters:,} parameters, {config}, median of {rounds}")
    for column in ("way", "ms", "of the floor"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, found in median.items():
        table.add_row(name, f"{found * 1e3:,.1f}", f"{found / median[floor]:.2f}")
    whole = first.weights()
    failures = [
        f"{name}: other weights than with the state on the device"
        for name, step in steps.items()
        for pair in [zip(step.weights(), whole, strict=True)]
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pair)
    ]
    ratio = min(median[name] for name in steps if "streamed" in name) / median[floor]
    if device.type == "cuda" and ratio > LIMIT:
        failures.append(f"streaming takes {ratio:.2f} of the floor, more than {LIMIT}")
    return table, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--expert-hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    config = MoEConfig(given.layers, given.hidden, 8, given.experts, 2, given.expert_hidden)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{folder}/store", rank=0, world_size=1)
        try:
            table, failures = measured(config, device, given.rounds)
        finally:
            dist.destroy_process_group()
    facts = [f"parameters and state in float32, on {device.type}"]
    tables = [table, crossover(Machine()), pays(1_024)]
    publish(Console(), "optimizer", "The optimizer's part of a step", facts, tables, failures)


if __name__ == "__main__":
    main()
