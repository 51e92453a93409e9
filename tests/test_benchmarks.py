"""Every benchmark can be started: what it imports is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_what_benchmarks_import_is_there() -> None:
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    assert "step_time" in names
    lines = [f"import {name}; print({name!r})" for name in names]
    command = [sys.executable, "-c", "\n".join(lines)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, timeout=300)
    assert run.stdout.split() == names, run.stderr
