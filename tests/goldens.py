"""Goldens: prints that must not change unseen. ``MOPTRACE_UPDATE_GOLDEN=1`` writes them instead."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["GOLDEN", "assert_golden"]

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("MOPTRACE_UPDATE_GOLDEN") == "1"


def assert_golden(stem: str, text: str) -> None:
    """Compare a print with the file ``golden/<stem>.txt``."""
    file = GOLDEN / f"{stem}.txt"
    if UPDATE:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "if that is meant: MOPTRACE_UPDATE_GOLDEN=1"
