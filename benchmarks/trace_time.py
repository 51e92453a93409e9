"""Time and peak memory to trace and shard very large models, and to make training steps of them.

    python benchmarks/trace_time.py
    python benchmarks/trace_time.py --models qwen3-235b --what capture step --world-size 96

All layers of the Hugging Face models, parameters on the meta device, bfloat16, 4,096 tokens per
rank. "pipeline" goes down to the program that a rank runs forward, and "step" on to the graph that
``train_step`` runs: backward, clipping, AdamW, and a schedule. "stage" is the same of one of eight
pipeline stages, with sixteen micro-batches. Next to them, "capture" is the least
that any tracer does: one ``make_fx`` of the same forward on fake tensors, with nothing kept and
nothing rewritten. Each figure comes from a fresh process of one thread, in seconds of processor
time, which others on the machine hardly change, and leaves out importing libraries and building the
model. The exit status is 1 when something takes more than its limits; ``--no-gate`` only reports.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from report import command, device, markdown, versions

if TYPE_CHECKING:  # imported where it is measured
    from moptrace import Program

T = TypeVar("T")
Parts: TypeAlias = Generator[tuple[str, int], None, T]  # the name of a part, and the nodes after it

LENGTH = 4096  # tokens per rank, one sequence
STAGES, MICRO_BATCHES = 8, 16  # of "stage"
# In seconds and gigabytes.
LIMITS = {"pipeline": (60.0, 4.0), "step": (180.0, 10.0), "stage": (300.0, 10.0)}


# -------------------------------------------------------------------------------------- models


def qwen3_235b() -> nn.Module:
    """Qwen3-235B-A22B."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=151_936,
            hidden_size=4096,
            intermediate_size=12_288,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,  # type: ignore[call-arg]  # it takes more than it declares
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
            norm_topk_prob=True,
        )
    )


def deepseek_v3() -> nn.Module:
    """DeepSeek-V3, 671B: the defaults of its configuration."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config())


def kimi_k2() -> nn.Module:
    """1T parameters in the shape of Kimi-K2."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=163_840,
            num_attention_heads=64,
            num_key_value_heads=64,
            n_routed_experts=384,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3-235b": qwen3_235b,
    "deepseek-v3-671b": deepseek_v3,
    "kimi-k2-1t": kimi_k2,
}


# ---------------------------------------------------------------------------- what is measured


def pipeline(model: nn.Module, batch: dict[str, Tensor], ranks: int) -> Parts[Program]:
    """moptrace's default passes down to the local program; the nodes after each part."""
    import moptrace
    from moptrace.passes.default import canonical, sharded
    from moptrace.passes.shard_parameters import expert_counts

    program = moptrace.trace(model, batch)
    yield "trace", len(program.graph.nodes)
    program = canonical()(program)
    yield "classify", len(program.graph.nodes)
    plan = moptrace.Plan().resolve(ranks, expert_counts(program))
    program = sharded(plan, ranks)(program)
    assert program.level is moptrace.Level.LOCAL
    yield f"place, localise (ep={plan.ep})", len(program.graph.nodes)
    return program


def step(model: nn.Module, batch: dict[str, Tensor], ranks: int) -> Parts[Program]:
    """The pipeline, and the passes of ``train_step(model, AdamW, max_norm=1.0)``."""
    from moptrace.core import chain
    from moptrace.passes.apply_optimizer import apply_optimizer
    from moptrace.passes.clip_gradients import clip_gradients
    from moptrace.passes.default import overlapped
    from moptrace.passes.differentiate import differentiate

    program = yield from pipeline(model, batch, ranks)
    program = differentiate()(program)
    yield "differentiate", len(program.graph.nodes)
    names = {nn.Parameter(x): name for name, x in own_parts(program).items()}
    optimizer = apply_optimizer(torch.optim.AdamW(names), names)
    for part in chain(clip_gradients(1.0), optimizer, overlapped()):
        program = part(program)
        yield part.name.replace("_", " "), len(program.graph.nodes)
    return program


def stage(model: nn.Module, batch: dict[str, Tensor], ranks: int) -> Parts[Program]:
    """The graph of one of ``STAGES`` pipeline stages, which take turns with ``MICRO_BATCHES``."""
    import moptrace
    from moptrace.core import chain
    from moptrace.passes.apply_optimizer import apply_optimizer
    from moptrace.passes.clip_gradients import clip_gradients
    from moptrace.passes.default import canonical, overlapped, sharded
    from moptrace.passes.differentiate import differentiate
    from moptrace.passes.pipeline import pipeline as take_turns
    from moptrace.passes.shard_parameters import expert_counts
    from moptrace.passes.take_stage import take_stage

    own = {name: x[: ranks // STAGES] for name, x in batch.items()}
    program = canonical()(moptrace.trace(model, own))
    yield "trace, classify", len(program.graph.nodes)
    plan = moptrace.Plan(pp=STAGES, micro_batches=MICRO_BATCHES)
    program = sharded(plan.resolve(ranks, expert_counts(program)), ranks)(program)
    yield f"place, localise, {STAGES} stages", len(program.graph.nodes)
    program = differentiate(micro_batches=MICRO_BATCHES)(program)
    yield f"differentiate, {MICRO_BATCHES} micro-batches", len(program.graph.nodes)
    program = chain(clip_gradients(1.0), take_turns())(program)
    yield "clip gradients, take turns", len(program.graph.nodes)
    program = take_stage(STAGES // 2)(program)
    yield "take stage", len(program.graph.nodes)
    names = {nn.Parameter(x): name for name, x in own_parts(program).items()}
    program = chain(apply_optimizer(torch.optim.AdamW(names), names), overlapped())(program)
    yield "apply optimizer, overlapped", len(program.graph.nodes)
    return program


def own_parts(program: Program) -> dict[str, Tensor]:
    """A rank's part of each parameter, on the meta device."""
    from moptrace import roles

    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    values = {p.fqn: roles.tensor(inputs[p.name]) for p in program.signature.parameters}
    return {n: torch.empty(x.shape, dtype=x.dtype, device="meta") for n, x in values.items()}


def capture(model: nn.Module, batch: dict[str, Tensor], ranks: int) -> Parts[None]:
    """One pre-dispatch ``make_fx`` of forward and loss on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        fake = {name: torch.empty_like(tensor) for name, tensor in batch.items()}

        def forward(state: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, state, (), {**batch, "use_cache": False}).loss

        with no_packed_sequences():
            traced = make_fx(forward, pre_dispatch=True, _allow_non_fake_inputs=True)(state, fake)
    yield "capture", len(traced.graph.nodes)


@contextmanager
def no_packed_sequences() -> Iterator[None]:
    """Keep transformers from asking for the values of fake position ids."""
    from transformers import masking_utils

    kept = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = kept


WHAT: dict[str, Callable[[nn.Module, dict[str, Tensor], int], Parts[Any]]] = {
    "capture": capture,
    "pipeline": pipeline,
    "step": step,
    "stage": stage,
}


@dataclass(frozen=True)
class Part:
    """One part of a measurement: its processor time, and the nodes of the graph after it."""

    name: str
    seconds: float
    nodes: int


@dataclass(frozen=True)
class Measurement:
    """What a fresh process took, or why it failed."""

    model: str
    what: str
    parameters: int = 0
    parts: tuple[Part, ...] = ()
    gigabytes: float = 0.0
    error: str | None = None

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def failures(self) -> list[str]:
        if self.error is not None:
            return [f"{self.model}, {self.what}: {self.error}"]
        if self.what not in LIMITS:
            return []
        seconds, gigabytes = LIMITS[self.what]
        over = {
            f"{self.seconds:.1f} s, over {seconds:.0f}": self.seconds > seconds,
            f"{self.gigabytes:.2f} GB, over {gigabytes:.0f}": self.gigabytes > gigabytes,
        }
        found = [text for text, failed in over.items() if failed]
        return [f"{self.model}, {self.what}, took {text}" for text in found]


def measure_here(name: str, what: str, ranks: int) -> Measurement:
    """The measurement, in this process."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = MODELS[name]().bfloat16()
    tokens = torch.zeros(ranks, LENGTH, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens}
    parts: list[Part] = []
    start = time.process_time()
    for part, nodes in WHAT[what](model, batch, ranks):
        now = time.process_time()
        parts.append(Part(part, now - start, nodes))
        start = now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    parameters = sum(p.numel() for p in model.parameters())
    return Measurement(name, what, parameters, tuple(parts), peak * unit / 1e9)


def measure(name: str, what: str, ranks: int) -> Measurement:
    """The measurement, in a fresh process."""
    worker = [sys.executable, __file__, "--worker", what, "--models", name]
    done = subprocess.run(
        [*worker, "--world-size", str(ranks)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Measurement(name, what, error=reason)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["parts"] = tuple(Part(**part) for part in found["parts"])
    return Measurement(**found)


# ------------------------------------------------------------------------------------ reporting


def table(measurements: list[Measurement], ranks: int) -> Table:
    result = Table(title=f"{ranks} ranks, {LENGTH:,} tokens per rank")
    for column in ("model", "parameters", "part", "CPU seconds", "nodes", "peak GB"):
        result.add_column(column, justify="left" if column in ("model", "part") else "right")
    for m in measurements:
        if m.error is not None:
            result.add_row(m.model, "", m.what, "failed", "", "")
            continue
        shown = f"{m.parameters / 1e9:,.0f}B"
        parts = list(m.parts)
        if len(parts) > 1:
            parts.append(Part(m.what, m.seconds, parts[-1].nodes))
        for part in parts:
            last = part is parts[-1]
            result.add_row(
                m.model,
                shown,
                part.name,
                f"{part.seconds:.1f}",
                f"{part.nodes:,}",
                f"{m.gigabytes:.2f}" if last else "",
                end_section=last,
            )
    return result


def write_results(text: Table, failures: list[str], what: list[str]) -> Path:
    part = "" if what == list(WHAT) else f"-{'-'.join(what)}"
    path = Path(__file__).parent / "results" / f"trace_time-{date.today()}{part}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "\n".join(
            [
                f"# Trace time, {date.today()}",
                "",
                f"- command: `{command()}`",
                f"- device: {device()}, 1 thread",
                f"- versions: {versions('torch', 'transformers')}",
                *(f"- limits of a {w}: {s:.0f} s, {gb:.0f} GB" for w, (s, gb) in LIMITS.items()),
                f"- verdict: {'; '.join(failures) or 'within the limits'}",
                "",
                markdown(text),
            ]
        )
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--world-size", type=int, default=96)
    parser.add_argument("--no-gate", action="store_true", help="only report")
    parser.add_argument("--worker", choices=WHAT, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(asdict(measure_here(given.models[0], given.worker, given.world_size))))
        return
    console = Console()
    measurements: list[Measurement] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in given.models:
            for what in given.what:
                task = progress.add_task(f"{name}: {what}", total=1)
                measurements.append(measure(name, what, given.world_size))
                progress.update(task, completed=1)
    result = table(measurements, given.world_size)
    failures = [failure for m in measurements for failure in m.failures()]
    console.print(result)
    console.print(f"written to {write_results(result, failures, given.what)}")
    for failure in failures:
        console.print(f"[red]{failure}", highlight=False)
    if failures and not given.no_gate:
        sys.exit(1)


if __name__ == "__main__":
    main()
