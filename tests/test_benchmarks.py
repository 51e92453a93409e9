"""Every benchmark can be started: what it imports is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
COMMANDS = sorted(
    file.name for file in FOLDER.glob("*.py") if '__name__ == "__main__"' in file.read_text()
)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_says_what_it_takes(name: str) -> None:
    command = [sys.executable, str(FOLDER / name), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout
