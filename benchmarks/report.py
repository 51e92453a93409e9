"""What every benchmark says about its run, and tables as Markdown."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

__all__ = ["command", "device", "markdown", "publish", "versions"]


def publish(
    console: Console,
    name: str,
    title: str,
    facts: Sequence[str],
    tables: Sequence[Table],
    failures: Sequence[str] = (),
) -> NoReturn:
    """Show the tables, write them with all that made them to ``results``, and exit.

    ``facts`` are lines about the run; the exit status is 1 where there are ``failures``.
    """
    for table in tables:
        console.print(table)
    results = Path(__file__).parent / "results" / f"{name}-{date.today()}.md"
    results.parent.mkdir(exist_ok=True)
    lines = [
        f"command: `{command()}`",
        f"device: {device()}",
        f"versions: {versions('torch')}",
        *facts,
        f"verdict: {'; '.join(failures) or 'every check holds'}",
    ]
    head = [f"# {title}, {date.today()}", "", *(f"- {line}" for line in lines), ""]
    results.write_text("\n".join([*head, *map(markdown, tables)]))
    console.print(f"written to {results}")
    for failure in failures:
        console.print(f"[red]{failure}")
    sys.exit(1 if failures else 0)


def command() -> str:
    """How this benchmark was started, from the repository's root."""
    script = Path(sys.argv[0])
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])


def device() -> str:
    """The processor and its cores."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(*packages: str) -> str:
    """Python's version and those of packages."""
    found = [f"{package} {version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def markdown(table: Table) -> str:
    """A rich table as Markdown."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    header, *rows = zip(*columns, strict=True)
    rule = ["--:" if column.justify == "right" else "---" for column in table.columns]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
    return "\n".join([f"### {table.title}", "", *lines, ""])
