"""The command line: ``moptrace demo`` and ``moptrace inspect MODEL``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def demo(
    ranks: Annotated[int, typer.Option(help="Processes to train on.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 30,
) -> None:
    """Train a Hugging Face MoE on several ranks beside one device and compare every loss."""
    from moptrace import demo as demonstration

    difference = demonstration.run(ranks, steps)
    if difference > 1e-3:
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="'package.module:function' that makes a model, or a transformers config class "
            "such as 'Qwen3MoeConfig'."
        ),
    ],
    ranks: Annotated[int, typer.Option(help="Ranks to plan for; none are started.")] = 8,
    ep: Annotated[int | None, typer.Option(help="Ranks that share the experts.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences per rank.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    level: Annotated[str, typer.Option(help="captured, canonical, placed or local.")] = "local",
    graph: Annotated[bool, typer.Option(help="Print the graph at that level.")] = False,
) -> None:
    """Show what moptrace would do to a model, with fake parameters and without starting ranks."""
    from moptrace.core import Level
    from moptrace.explain import explain
    from moptrace.passes.default import canonical, sharded
    from moptrace.passes.shard_parameters import expert_counts
    from moptrace.plan import Plan
    from moptrace.trace import trace

    console = Console()
    ids = torch.zeros(batch * ranks, length, dtype=torch.int64, device="meta")
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True
    ) as progress:
        progress.add_task("building the model")
        made = _make(model)
        progress.add_task("tracing")
        program = canonical()(trace(made, {"input_ids": ids, "labels": ids}))
        plan = Plan(ep=ep).resolve(ranks, expert_counts(program))
        progress.add_task("placing")
        program = sharded(plan.layout(ranks), plan.edp)(program)
    if graph:
        wanted = next(p for p in reversed(program.history) if p.level is Level[level.upper()])
        console.print(str(wanted), markup=False, highlight=False, soft_wrap=True)
    console.print(str(explain(program)), markup=False, highlight=False, soft_wrap=True)


def _make(name: str) -> nn.Module:
    """A model on the meta device, from a function or a transformers configuration."""
    with torch.device("meta"):
        if ":" in name:
            module, function = name.split(":", 1)
            maker: Callable[[], nn.Module] = getattr(importlib.import_module(module), function)
            return maker()
        import transformers

        if not hasattr(transformers, name):
            raise typer.BadParameter(
                f"transformers has no {name}; give a config class such as Qwen3MoeConfig, or "
                "package.module:function"
            )
        made: Any = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)())
        return made


if __name__ == "__main__":
    app()
