"""Triton, on machines that have it.

Modules with kernels import ``jit``, ``tl`` and ``triton`` from here, so that they can be imported
everywhere. ``TRITON_INTERPRET=1`` in the environment runs the kernels on a CPU, as the tests do.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["ceil", "is_available", "jit", "power_of_two", "tl", "triton"]

triton: Any
tl: Any
jit: Callable[[Any], Any]

try:
    import triton
    import triton.language as tl
except ImportError:
    is_available = False
    triton = tl = None
    jit = lambda function: function  # noqa: E731
else:
    is_available = True
    jit = triton.jit


def ceil(a: int, b: int) -> int:
    """How many blocks of ``b`` hold ``a``.

    >>> ceil(5, 4)
    2
    """
    return -(-a // b)


def power_of_two(a: int) -> int:
    """The least power of two that is not less than ``a``: a block's size must be one.

    >>> power_of_two(5)
    8
    """
    return 1 << max(a - 1, 0).bit_length()
