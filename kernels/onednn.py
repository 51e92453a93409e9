"""The faster product of float32 matrices on a CPU.

On some processors oneDNN multiplies float32 matrices twice as fast as the library behind
``torch.mm``, which torch uses for them. The first product on a CPU times both, and the process
keeps to the faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["is_faster", "multiply"]


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [K, N] -> [M, N], by oneDNN, which compiles and keeps a kernel for every shape.

    Requires: float32 on a CPU, and ``is_faster()``.
    """
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


@cache
def is_faster() -> bool:
    """Whether oneDNN wins on one expert's matrices on this CPU, timed once."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    a, b = torch.ones(64, 256), torch.ones(1024, 256).t()

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        times: list[float] = []
        for _ in range(10):
            start = time.perf_counter()
            product(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(multiply) < 0.8 * seconds(torch.mm)
