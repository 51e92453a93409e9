"""The most memory that a process takes during a step, measured by the kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

__all__ = ["Measured", "forget_peak", "measured", "peak"]


@dataclass(frozen=True)
class Measured:
    """One step: the loss, the peak memory above what was in use before, in bytes, and seconds."""

    loss: float
    bytes: int
    seconds: float


def measured(step: Callable[[], Tensor]) -> Measured:
    """Run one step."""
    before, started = forget_peak(), time.perf_counter()
    loss = step()
    return Measured(loss.item(), peak() - before, time.perf_counter() - started)


def peak() -> int:
    """The most memory that this process has taken since ``forget_peak``."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "this benchmark reads VmHWM, which Linux has"
    return int(found[1]) * 1024


def forget_peak() -> int:
    """Start to measure; returns the memory that is in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
