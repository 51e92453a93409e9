"""When ranks lend experts to each other: ``Plan(balance=...)``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moptrace.errors import PlanError

__all__ = ["Balance"]


@dataclass(frozen=True)
class Balance:
    """Excess rows of an overloaded rank are computed elsewhere, with their expert's weights.

    Nothing is dropped, and the result is that of the model: which rank computes a row is all that
    changes. In each layer, and each group of ``ep``, all ranks make the same plan of the same
    counts. Below the threshold no row and no weight moves.

    ``threshold``: balance where the fullest rank has over so many times the mean of rows.
    ``cap``: move rows away from ranks that have over so many times the mean, as far as there is
    room for them below that elsewhere.
    ``rows``: the fewest rows for which an expert's weights are sent.
    ``guests``: the most experts of others that a rank computes, which bounds its weights; by
    default its own divided by ``ep``, and one more: its share of the experts of a rank to which all
    rows go, and a large one to fill up with.

    Source: Least-Loaded Expert Parallelism (arXiv 2601.17111), whose lambda, alpha and m these are.

    >>> Balance().places([16] * 8)
    19
    """

    threshold: float = 1.3
    cap: float = 1.0
    rows: int = 1024
    guests: int | None = None

    def __post_init__(self) -> None:
        for name, what in (("threshold", "balance only above it"), ("cap", "fill ranks up to it")):
            if not (math.isfinite(given := getattr(self, name)) and given >= 1):
                raise PlanError(
                    f"{name}={given} is below the mean load, which some rank always has; "
                    f"{what}, so give 1 or more"
                )
        if self.rows < 1 or (self.guests is not None and self.guests < 1):
            raise PlanError(
                f"rows={self.rows}, guests={self.guests} would move nothing; give 1 or more, or "
                "balance=None"
            )

    def places(self, sizes: Sequence[int]) -> int:
        """The experts that every rank has place for, where they own so many."""
        own = max(sizes)
        guests = math.ceil(own / len(sizes)) + 1 if self.guests is None else self.guests
        return own + guests
