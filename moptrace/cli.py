"""The command line: ``moptrace demo`` and ``moptrace inspect MODEL``."""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from moptrace.api import made_up
from moptrace.core import Program
from moptrace.errors import MoptraceError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a Mixture-of-Experts model on many devices by rewriting its graph.",
)


class Shown(StrEnum):
    """What ``inspect --level`` takes."""

    CAPTURED = "captured"
    CANONICAL = "canonical"
    PLACED = "placed"
    LOCAL = "local"


@app.command()
def demo(
    ranks: Annotated[int, typer.Option(min=2, help="Processes to train on.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 30,
) -> None:
    """Train a Hugging Face MoE on several ranks beside one device and compare every loss."""
    from moptrace import demo as demonstration

    difference = demonstration.run(ranks, steps, _console())
    if not difference <= demonstration.LIMIT:
        raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A transformers configuration class such as Qwen3MoeConfig, or package.module:"
            "function, which makes a module, or a module and a global batch by argument name.",
        ),
    ],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to plan for; none are started.")] = 8,
    ep: Annotated[int | None, typer.Option(help="Ranks that share the experts.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per rank.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128,
    level: Annotated[Shown, typer.Option(help="The level of the graph.")] = Shown.LOCAL,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph as well.")] = False,
) -> None:
    """Show what moptrace would do to a model, with fake parameters and without starting ranks."""
    console = _console()
    with _doing(console, "building the model"):
        made, example = _make(model, (batch * ranks, length))
    program = _programs(console, made, example, ranks, ep)
    if graph:
        wanted = next(p for p in reversed(program.history) if str(p.level) == level.value)
        console.print(str(wanted), markup=False, highlight=False, soft_wrap=True)
    _explain(console, program)


def _programs(
    console: Console, model: nn.Module, batch: Mapping[str, Any], ranks: int, ep: int | None
) -> Program:
    """The local program, with its whole history."""
    from moptrace.passes.default import canonical, sharded
    from moptrace.passes.shard_parameters import expert_counts
    from moptrace.plan import Plan
    from moptrace.trace import trace

    with _doing(console, "tracing"):
        program = trace(model, batch)
    with _doing(console, "recognising its components"):
        program = canonical()(program)
    plan = Plan(ep=ep).resolve(ranks, expert_counts(program))
    with _doing(console, "placing it on the ranks"):
        return sharded(plan, ranks)(program)


def _explain(console: Console, program: Program) -> None:
    from moptrace.explain import explain

    console.print(str(explain(program)), markup=False, highlight=False, soft_wrap=True)


# --- making a model -------------------------------------------------------------------------------


def _make(name: str, shape: tuple[int, int]) -> tuple[nn.Module, Mapping[str, Any]]:
    """A model on the meta device and a global batch; token ids of ``shape`` if it gives none."""
    made = _from_function(name) if ":" in name else _from_transformers(name)
    match made:
        case nn.Module():
            return made, made_up(made, shape=shape)
        case (nn.Module() as module, Mapping() as batch):
            return module, batch
        case _:
            raise typer.BadParameter(
                f"{name} returned {type(made).__name__}; it must return a torch.nn.Module, or a "
                "module and a global batch by argument name"
            )


def _from_function(name: str) -> Any:
    """Call package.module:function; the current folder counts as one to import from."""
    module_name, _, function = name.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"there is no module {error.name}; MODEL is package.module:function, importable from "
            "the current folder or installed"
        ) from error
    finally:
        sys.path.remove(here)
    maker = getattr(module, function, None)
    if not callable(maker):
        raise typer.BadParameter(
            f"{module_name} has no function {function!r}.{_nearest(function, vars(module))}"
        )
    with torch.device("meta"):
        return maker()


def _from_transformers(name: str) -> nn.Module:
    """The language model of a configuration class, with its default sizes."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"{name} would be a class of transformers, which is not installed: "
            'pip install "moptrace[hf]". For a model of your own, give package.module:function'
        ) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PretrainedConfig)):
        known = [x for x in dir(transformers) if x.endswith("Config")]
        raise typer.BadParameter(
            f"transformers has no configuration class {name!r}.{_nearest(name, known)} For a "
            "model of your own, give package.module:function"
        )
    config: Any = kind()
    config.use_cache = False  # a cache is of no use in training, and is not a tensor
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True  # else the load-balancing loss is left out
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise typer.BadParameter(
            f"{name} is not the configuration of a causal language model"
        ) from error


def _nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(found)}?" if found else ""


# --- the terminal ---------------------------------------------------------------------------------


def _console() -> Console:
    """Standard output; wide when it is not a terminal, so that tables in files do not wrap."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


@contextmanager
def _doing(console: Console, what: str) -> Iterator[None]:
    """Show a spinner and the time while something is done, and the time that it took."""
    started = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(what, total=None)
        yield
    console.print(f"[dim]{what}: {time.perf_counter() - started:.1f} s[/dim]", highlight=False)


def main() -> None:
    """Run the command; moptrace's own errors are messages, not tracebacks."""
    try:
        app()
    except MoptraceError as error:
        Console(stderr=True).print(f"[bold red]error[/bold red] {error}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
