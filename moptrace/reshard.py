"""Changes of placement as placed programs write them: the identity on one device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cast_whole", "constrain", "reshard", "route"]


def cast_whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another dtype, as its users hold it: placements change before the cast.

    So gradients of all users are cast back before they are added up, in the dtype of ``x``. A
    gather before it is one collective with it, which casts first and moves ``dtype``.
    """
    return x.to(dtype)


def constrain(x: Tensor, axis: str, kind: str | Tensor) -> Tensor:
    """Ask that ``x`` be held in this way along one axis of the ranks; the value is the same.

    A tensor in place of a kind asks that ``x`` be held as that one is.

    A canonical program may say so anywhere; ``place`` writes the ``reshard`` that it takes.
    """
    return x


def reshard(x: Tensor, axis: str, source: str, target: str) -> Tensor:
    """Hold ``x`` in another way along one axis of the ranks; the value is the same.

    ``source`` and ``target`` are printed kinds of placement (``placement.parse_kind``).
    """
    return x


def route(rows: Tensor, counts: Tensor, axis: str, source: str, target: str) -> Tensor:
    """Move routed rows along one axis: to the ranks of their experts, to all ranks, or back.

    ``counts`` are the rows of each expert that a rank has, by token along this axis and held as the
    rows along the others. On one device all rows are in one place already.
    """
    return rows
