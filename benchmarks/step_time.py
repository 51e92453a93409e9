"""Step time of moptrace, FSDP2 and hand-written expert parallelism, side by side in one run.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --shape very-fine coarse large-vocabulary long-context
    python benchmarks/step_time.py --systems fsdp2 by-hand --tokens 512 --no-gate

Four gloo ranks train the model of ``models.py`` from the same weights on the same tokens. moptrace
does it in three ways: through autograd, and by ``train_step`` as one graph, as it is and compiled.
``SHAPES`` are the models; in the long context, ranks share one sequence, and FSDP2 and the step by
hand attend with torch's ring.
Every system must first give the single-process model's loss, its gradients and its loss after one
optimizer step to 1e-4; then the systems take turns, so that whatever else the machine does meets
all of them. FSDP2 is tuned in the same run and its best setting is compared. The exit status is 1
when a system is wrong, or moptrace's fastest way slower than ``GATES`` allow: ``--no-gate`` only
reports that.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.status import Status
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import by_hand
from by_hand import ByHand, FastExperts, Ring
from models import Experts, MoEConfig, MoEDecoder
from report import command, device, markdown, versions

RANKS = 4
LENGTH = 512  # of a sequence
TOLERANCE = 1e-4
LEARNING_RATE = 1e-4
COMPILE_LIMIT = 120.0  # seconds
TRAIN_STEPS = {"train-step": False, "train-step-compiled": True}  # and whether it is compiled
SYSTEMS = ("fsdp2", "by-hand", "moptrace", *TRAIN_STEPS)


@dataclass(frozen=True)
class Shape:
    """A model, its tokens per rank, and what moptrace must reach with them.

    ``gates`` are moptrace's fastest way's speed over another system's, by tokens (None: any).
    ``shares``: the ranks share each sequence. ``splits_words``: by hand, the vocabulary too.
    """

    config: MoEConfig
    tokens: tuple[int, ...]
    gates: dict[tuple[str, int | None], float]
    shares: bool = False
    splits_words: bool = False

    @property
    def plan(self) -> dict[str, Any]:
        ring = {"cp": RANKS, "context": "ring"} if self.shares else {}
        words = {"logits_bytes": 0} if self.splits_words else {}
        return {"ep": RANKS, **ring, **words}


BY_HAND: tuple[str, int | None] = ("by-hand", None)
SHAPES = {
    "fine": Shape(
        MoEConfig(), (512, 4096), {BY_HAND: 0.95, ("fsdp2", 512): 10.4, ("fsdp2", 4096): 8.2}
    ),
    "very-fine": Shape(MoEConfig(experts=128, top_k=8, expert_hidden=128), (512,), {BY_HAND: 1.0}),
    "coarse": Shape(MoEConfig(experts=8, expert_hidden=1024), (512,), {BY_HAND: 1.0}),
    "large-vocabulary": Shape(
        MoEConfig(experts=8, vocabulary=65536), (512,), {BY_HAND: 1.0}, splits_words=True
    ),
    "long-context": Shape(MoEConfig(experts=8), (2048,), {BY_HAND: 1.0}, shares=True),
}

# The same for every system. Each step allocates its gradients and gathered weights anew. "libc",
# the C library as it comes and as users have it, gives that memory back to the kernel each time and
# pays for the page faults; "reuse" keeps it in the process. FSDP2 gains most by that.
ALLOCATORS: dict[str, dict[str, str]] = {
    "libc": {},
    "reuse": {
        "THP_MEM_ALLOC_ENABLE": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    },
}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...] | None
    layers: int
    rounds: int
    systems: tuple[str, ...]
    allocator: str
    gate: bool
    results: Path

    def cases(self) -> Iterator[tuple[str, Shape, int]]:
        for name in self.shapes:
            shape = SHAPES[name]
            shape = replace(shape, config=replace(shape.config, layers=self.layers))
            for tokens in self.tokens or shape.tokens:
                yield name, shape, tokens


# ------------------------------------------------------------------------------------- systems


class System(ABC):
    """One way to train the model; every rank holds a part of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward and AdamW on this rank's tokens; the loss as ``backward`` gives it."""
        self.optimizer.zero_grad()
        loss = self.backward(batch)
        self.optimizer.step()
        return loss

    def backward(self, batch: Batch) -> Tensor:
        """Leave the global mean loss's gradients in the parameters; return that loss."""
        loss = self.model(**batch)
        loss.backward()
        return loss.detach()

    def first_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A step as ``step`` does it, and the gradients that it took."""
        loss = self.backward(batch)
        gradients = self.full_gradients()
        self.optimizer.step()
        return loss, gradients

    @abstractmethod
    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient under the single-device model's names, on every rank."""


@dataclass(frozen=True)
class Setting:
    """A choice of what FSDP2 can be tuned over."""

    reshard: bool
    compiled: bool
    experts: type[Experts] = FastExperts

    def __str__(self) -> str:
        kernel = "experts as by hand" if self.experts is FastExperts else "F.grouped_mm experts"
        return (
            f"reshard_after_forward={self.reshard}, {'compiled' if self.compiled else 'eager'}, "
            f"{kernel}"
        )


class Fsdp2(System):
    """``fully_shard`` on each layer and on the root."""

    def __init__(self, shape: Shape, whole: MoEDecoder, setting: Setting) -> None:
        model = MoEDecoder(shape.config, setting.experts)
        model.load_state_dict(whole.state_dict())
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.layers:
            if shape.shares:
                layer.attention = Ring(layer.attention)
            if setting.compiled:
                layer.compile()
            fully_shard(layer, mesh=mesh, reshard_after_forward=setting.reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=setting.reshard)
        super().__init__(model)

    def full_gradients(self) -> dict[str, Tensor]:
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return {name: g.full_tensor() for name, g in gradients.items() if isinstance(g, DTensor)}


class HandWritten(System):
    """``by_hand.py``."""

    model: ByHand

    def __init__(self, shape: Shape, whole: MoEDecoder) -> None:
        super().__init__(ByHand(shape.config, whole, shape.splits_words, shape.shares))

    def backward(self, batch: Batch) -> Tensor:
        return self.model.backward(**batch)

    def full_gradients(self) -> dict[str, Tensor]:
        return self.model.full_gradients()


class Moptrace(System):
    """``moptrace.parallelize`` on the single-device model."""

    def __init__(self, shape: Shape, whole: MoEDecoder) -> None:
        import moptrace

        mesh = init_device_mesh("cpu", (RANKS,))
        plan = moptrace.Plan(**shape.plan)
        self.parallel = moptrace.parallelize(whole, mesh, plan=plan)
        super().__init__(self.parallel)

    def full_gradients(self) -> dict[str, Tensor]:
        gradients = self.parallel.full_gradients()
        return {name: g for name, g in gradients.items() if g is not None}


class TrainStep(Moptrace):
    """``moptrace.train_step``: forward, backward and AdamW as one graph."""

    def __init__(self, shape: Shape, whole: MoEDecoder, compiled: bool) -> None:
        import moptrace

        super().__init__(shape, whole)
        self.train = moptrace.train_step(
            self.parallel, self.optimizer, updates="backward", compile=compiled
        )

    def step(self, batch: Batch) -> Tensor:
        return self.train(**batch)

    def first_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradients are what AdamW's first step puts into its first moment."""
        loss = self.train(**batch)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moment = self.optimizer.state[parameter]["exp_avg"]
                parameter.grad = moment / (1 - group["betas"][0])
        gradients = self.full_gradients()
        self.optimizer.zero_grad()
        return loss, gradients


# ------------------------------------------------------------------------------------ checking


@dataclass(frozen=True)
class Reference:
    """What the single-process model gives on the global batch."""

    loss: float
    gradients: dict[str, Tensor]
    next_loss: float


def reference(whole: MoEDecoder, batch: Batch) -> Reference:
    """Loss, gradients, and the loss after one AdamW step, on the batch of all ranks."""
    model = copy.deepcopy(whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    loss = model(**batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    with torch.no_grad():
        return Reference(loss.item(), gradients, model(**batch).item())


def disagreement(system: System, expected: Reference | None, batch: Batch) -> float:
    """The largest difference from the reference, relative to the largest value; on every rank."""
    first, gradients = system.first_step(batch)
    loss, next_loss = mean_over_ranks(first), mean_over_ranks(system.step(batch))
    worst = torch.zeros(())
    if expected is not None:
        if gradients.keys() != expected.gradients.keys():
            missing = sorted(gradients.keys() ^ expected.gradients.keys())
            raise SystemExit(f"{type(system).__name__}: gradients differ in names: {missing}")
        errors = [
            abs(loss / expected.loss - 1),
            abs(next_loss / expected.next_loss - 1),
            *(
                float((gradients[name] - g).abs().max() / g.abs().max())
                for name, g in expected.gradients.items()
            ),
        ]
        worst = torch.tensor(max(errors))
    dist.broadcast(worst, 0)
    return worst.item()


def mean_over_ranks(loss: Tensor) -> float:
    """FSDP2 returns each rank's own loss, the others the global one: the mean serves all."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / RANKS


# -------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Seconds:
    """A step's time from all ranks ready to all ranks done, and the processor time of all ranks."""

    wall: float
    processor: float


def timed_step(system: System, batch: Batch) -> Seconds:
    dist.barrier()
    start, used = time.perf_counter(), time.process_time()
    system.step(batch)
    dist.barrier()
    wall, used = time.perf_counter() - start, time.process_time() - used
    times = torch.tensor([wall / RANKS, used], dtype=torch.float64)
    dist.all_reduce(times)
    return Seconds(*times.tolist())


# ------------------------------------------------------------------------------------- one rank


@dataclass
class Outcome:
    """What one shape and number of tokens per rank gave."""

    name: str
    shape: Shape
    tokens: int
    disagreements: dict[str, float]
    tuning: dict[str, str]
    seconds: dict[str, list[Seconds]]

    def median(self, system: str) -> float:
        return statistics.median(s.wall for s in self.seconds[system])

    def processor(self, system: str) -> float:
        return statistics.median(s.processor for s in self.seconds[system])

    def ratio(self, fast: str, slow: str) -> float:
        """How many times as fast ``fast`` is."""
        return self.median(slow) / self.median(fast)

    def failures(self) -> list[str]:
        """The gates that moptrace misses with its fastest way."""
        found: list[str] = []
        ours = [system for system in ("moptrace", *TRAIN_STEPS) if system in self.seconds]
        for (other, tokens), least in self.shape.gates.items():
            if ours and other in self.seconds and tokens in (None, self.tokens):
                ratio, fastest = max((self.ratio(system, other), system) for system in ours)
                if ratio < least:
                    found.append(
                        f"{self.name}: {fastest} runs at {ratio:.2f}x the speed of {other} at "
                        f"{self.tokens:,} tokens, under {least}x"
                    )
        return found


def batches(tokens: int, shape: Shape) -> tuple[Batch, dict[str, list[Batch]]]:
    """The batch of all ranks, and each rank's, as moptrace and the other systems have it.

    ``[B, T]`` tokens and the labels, the next ones. A sequence that is shared lies in chunks, and
    for torch's ring in its zig-zag order.
    """
    generator = torch.Generator().manual_seed(1)
    length = RANKS * tokens if shape.shares else min(tokens, LENGTH)
    size = (RANKS * tokens // length, length + 1)
    text = torch.randint(shape.config.vocabulary, size, generator=generator)
    whole = {"input_ids": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}

    def parts(x: Tensor) -> list[Tensor]:
        return [part.contiguous() for part in x.chunk(RANKS, 1 if shape.shares else 0)]

    def zig_zag(x: Tensor) -> Tensor:
        halves = x.chunk(2 * RANKS, 1)
        order = [half for rank in range(RANKS) for half in (rank, 2 * RANKS - 1 - rank)]
        return torch.cat([halves[half] for half in order], 1)

    def of_ranks(whole: Batch) -> list[Batch]:
        values = zip(*(parts(x) for x in whole.values()), strict=True)
        return [dict(zip(whole, own, strict=True)) for own in values]

    ordered = {key: zig_zag(x) for key, x in whole.items()} if shape.shares else whole
    return whole, {"moptrace": of_ranks(whole), "others": of_ranks(ordered)}


@dataclass
class Bench:
    """All systems at one shape and number of tokens per rank, on one rank."""

    options: Options
    name: str
    shape: Shape
    tokens: int
    status: Status

    def __post_init__(self) -> None:
        self.whole = MoEDecoder(self.shape.config).reset_parameters()
        batch, every = batches(self.tokens, self.shape)
        self.batches = {key: own[dist.get_rank()] for key, own in every.items()}
        self.say("the single-process model")
        self.expected = reference(self.whole, batch) if dist.get_rank() == 0 else None
        self.disagreements: dict[str, float] = {}
        self.tuning: dict[str, str] = {}

    def say(self, what: str) -> None:
        self.status.update(f"{self.name}, {self.tokens:,} tokens per rank: {what}")

    def batch(self, system: System) -> Batch:
        return self.batches["moptrace" if isinstance(system, Moptrace) else "others"]

    def checked(self, name: str, system: System) -> System:
        """The system, once it is known to compute the model's function."""
        error = disagreement(system, self.expected, self.batch(system))
        self.disagreements[name] = error
        if not error <= TOLERANCE:
            raise SystemExit(
                f"{name} is off by {error:.1e} at {self.tokens:,} tokens, over {TOLERANCE:.0e}"
            )
        return system

    def fsdp2(self, setting: Setting) -> System:
        self.say(f"FSDP2, {setting}")
        return self.checked(f"fsdp2, {setting}", Fsdp2(self.shape, self.whole, setting))

    def tuned_fsdp2(self, no_compile: str | None) -> System:
        """FSDP2 in its fastest setting: each is tried for two steps, one setting at a time."""
        settings = [Setting(reshard, compiled=False) for reshard in (True, False)]
        settings.append(Setting(reshard=False, compiled=False, experts=Experts))
        if no_compile is None:
            settings += [replace(s, compiled=True) for s in settings if s.experts is FastExperts]
        else:
            self.tuning["compiled"] = no_compile
        seconds: dict[Setting, float] = {}
        for setting in settings:
            system = self.fsdp2(setting)
            batch = self.batch(system)
            seconds[setting] = min(timed_step(system, batch).wall for _ in range(2))
            self.tuning[str(setting)] = f"{seconds[setting] * 1e3:,.0f} ms"
            del system
            gc.collect()
        return self.fsdp2(min(seconds, key=seconds.__getitem__))

    def system(self, name: str, no_compile: str | None) -> System:
        if name == "fsdp2":
            return self.tuned_fsdp2(no_compile)
        self.say(name)
        if name == "by-hand":
            return self.checked(name, HandWritten(self.shape, self.whole))
        if name in TRAIN_STEPS:
            return self.checked(name, TrainStep(self.shape, self.whole, TRAIN_STEPS[name]))
        return self.checked(name, Moptrace(self.shape, self.whole))

    def one_round(self, systems: dict[str, System]) -> Iterator[tuple[str, Seconds]]:
        """The systems' steps in turn: one of FSDP2, three of each fast system."""
        for turn in range(3):
            for name, system in systems.items():
                if name != "fsdp2" or turn == 0:
                    yield name, timed_step(system, self.batch(system))

    def measure(self, no_compile: str | None) -> Outcome:
        """Check, tune and time every system."""
        systems = {name: self.system(name, no_compile) for name in self.options.systems}
        for name, system in systems.items():
            self.say(f"warming up {name}")
            for _ in range(1 if name == "fsdp2" else 5):
                system.step(self.batch(system))
        timings: dict[str, list[Seconds]] = {name: [] for name in systems}
        for done in range(self.options.rounds):
            self.say(f"timing, round {done + 1} of {self.options.rounds}")
            for name, seconds in self.one_round(systems):
                timings[name].append(seconds)
        return Outcome(self.name, self.shape, self.tokens, self.disagreements, self.tuning, timings)


@contextmanager
def process_group(rank: int, rendezvous: str) -> Iterator[None]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    gc.disable()  # a collection in one rank's step is a wait in all others'
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_rank(rank: int, rendezvous: str, options: Options, no_compile: str | None) -> None:
    """What each process of the benchmark does; rank 0 reports, and exits with the verdict."""
    failures: list[str] = []
    with process_group(rank, rendezvous):
        console = Console(quiet=rank != 0)
        kernel = by_hand.choose_matmul()
        outcomes: list[Outcome] = []
        with console.status("starting") as status:
            for name, shape, tokens in options.cases():
                bench = Bench(options, name, shape, tokens, status)
                outcomes.append(bench.measure(no_compile))
                console.print(*tables(outcomes[-1]))
        failures = [failure for outcome in outcomes for failure in outcome.failures()]
        if rank == 0:
            write_results(options, outcomes, kernel, failures)
            console.print(f"written to {options.results}")
            for failure in failures:
                console.print(f"[red]{failure}")
    if rank == 0 and failures and options.gate:
        sys.exit(1)


def try_compile(rank: int, rendezvous: str, options: Options) -> None:
    """One compiled FSDP2 step of each case, which also fills the compiler's cache."""
    with process_group(rank, rendezvous):
        for _, shape, tokens in options.cases():
            whole = MoEDecoder(shape.config).reset_parameters()
            system = Fsdp2(shape, whole, Setting(reshard=True, compiled=True))
            system.step(batches(tokens, shape)[1]["others"][rank])


def why_no_compile(options: Options) -> str | None:
    """None if FSDP2 with torch.compile works within the limit, else the reason."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(try_compile, (f"{folder}/store", options), nprocs=RANKS, join=False)
        assert context is not None
        deadline = time.monotonic() + COMPILE_LIMIT
        try:
            while time.monotonic() < deadline:
                if context.join(timeout=1.0):
                    return None
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            return f"failed: {str(error).strip().splitlines()[-1][:200]}"
        for process in filter(None, context.processes):
            process.kill()
            process.join()
    return f"gave up after {COMPILE_LIMIT:.0f} s of compiling"


# ------------------------------------------------------------------------------------ reporting


def tables(outcome: Outcome) -> tuple[Table, ...]:
    """The step times, the ratio of each pair, and how FSDP2 was tuned."""
    times = Table(title=f"{outcome.name}, {outcome.tokens:,} tokens per rank")
    times.add_column("system")
    for column in ("median ms", "best ms", "worst ms", "CPU ms, all ranks", "tokens/s", "error"):
        times.add_column(column, justify="right")
    for name, seconds in outcome.seconds.items():
        walls = [s.wall for s in seconds]
        errors = [e for key, e in outcome.disagreements.items() if key.split(",")[0] == name]
        shown = (outcome.median(name), min(walls), max(walls), outcome.processor(name))
        times.add_row(
            name,
            *(f"{value * 1e3:,.0f}" for value in shown),
            f"{RANKS * outcome.tokens / outcome.median(name):,.0f}",
            f"{max(errors):.1e}",
        )
    pairs = Table(title="times as fast, by medians")
    for column in ("system", "as", "ratio", "by CPU time"):
        pairs.add_column(column, justify="left" if column in ("system", "as") else "right")
    names = list(outcome.seconds)
    for place, slow in enumerate(names):
        for fast in names[place + 1 :]:
            less = outcome.processor(slow) / outcome.processor(fast)
            pairs.add_row(fast, slow, f"{outcome.ratio(fast, slow):.2f}x", f"{less:.2f}x")
    tuned = Table(title="FSDP2, each setting (better of two steps)")
    tuned.add_column("setting")
    tuned.add_column("step", justify="right")
    for setting, result in outcome.tuning.items():
        tuned.add_row(setting, result)
    return (times, pairs, tuned) if outcome.tuning else (times, pairs)


def write_results(
    options: Options, outcomes: list[Outcome], kernel: str, failures: list[str]
) -> None:
    text = [
        f"# Step time, {date.today()}",
        "",
        f"- command: `{command()}`",
        f"- device: {device()}; {RANKS} gloo ranks, 1 thread each",
        f"- versions: {versions('torch')}",
        f"- timing: {options.rounds} interleaved rounds, medians; AdamW(fused=True) included",
        f"- memory allocator: {options.allocator}; experts by hand: {kernel} matmul",
        f"- verdict: {'; '.join(failures) or 'every check and gate holds'}",
        "",
    ]
    for outcome in outcomes:
        text += [f"## {outcome.name}, {outcome.tokens:,} tokens per rank", ""]
        text += [f"{outcome.shape.config}; float32", ""]
        text += [markdown(table) for table in tables(outcome)]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text("\n".join(text))


def parse() -> Options:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["fine"])
    parser.add_argument("--tokens", type=int, nargs="+", help="per rank; by default the shape's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--layers", type=int, default=MoEConfig.layers)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="libc")
    parser.add_argument("--no-gate", action="store_true", help="only report")
    given = parser.parse_args()
    return Options(
        shapes=tuple(given.shape),
        tokens=tuple(given.tokens) if given.tokens else None,
        layers=given.layers,
        rounds=given.rounds,
        systems=tuple(name for name in SYSTEMS if name in given.systems),
        allocator=given.allocator,
        gate=not given.no_gate,
        results=Path(__file__).parent / "results" / f"step_time-{date.today()}.md",
    )


def main() -> None:
    options = parse()
    os.environ.update(OMP_NUM_THREADS="1", **ALLOCATORS[options.allocator])
    console = Console()
    no_compile: str | None = None
    if "fsdp2" in options.systems:
        with console.status("compiling FSDP2's layers"):
            no_compile = why_no_compile(options)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(run_rank, (f"{folder}/store", options, no_compile), nprocs=RANKS)
        except mp.ProcessExitedException as error:
            sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
