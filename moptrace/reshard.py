"""Changes of placement as placed programs write them: the identity on one device."""

from __future__ import annotations

from torch import Tensor

__all__ = ["constrain", "reshard", "route"]


def constrain(x: Tensor, axis: str, kind: str) -> Tensor:
    """Ask that ``x`` be held in this way along one axis of the ranks; the value is the same.

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
