"""The most memory that a process takes during a step, measured by the kernel."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["Measured", "measured", "most"]


@dataclass(frozen=True)
class Measured:
    """One step: the loss, the peak memory above what was in use before, in bytes, and seconds."""

    loss: float
    bytes: int
    seconds: float


def measured(step: Callable[[], Tensor]) -> Measured:
    """Run one step."""
    before, started = _forget_peak(), time.perf_counter()
    loss = step()
    return Measured(loss.item(), _peak() - before, time.perf_counter() - started)


def most(run: Callable[[], object]) -> int:
    """The most bytes that a call takes above what is in use; freed memory is given back before."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _forget_peak()
    run()
    return _peak() - before


def _peak() -> int:
    """The most memory that this process has taken since ``_forget_peak``."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "this benchmark reads VmHWM, which Linux has"
    return int(found[1]) * 1024


def _forget_peak() -> int:
    """Start to measure; returns the memory that is in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()
