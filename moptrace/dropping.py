"""Which tokens experts leave out when too many choose them: ``Plan(dropping=...)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from moptrace.errors import PlanError
from moptrace.placement import Layout

__all__ = ["Dropping"]

RULES = ("probability", "position")
SCOPES = ("sub-sequence", "sequence", "batch")


@dataclass(frozen=True)
class Dropping:
    """A capacity for each expert, and which pairs of a token and its choice are dropped beyond it.

    This is the one option under which a model does not compute what it computes on one device
    without it: a dropped pair adds nothing to its token, and gets no gradient. The weights of the
    token's other pairs stay as the router gave them. What is computed is that of one device with
    the same rule; auxiliary losses see all choices.

    ``capacity_factor``: of the pairs of n tokens with k choices each, an expert of E keeps at most
    C = capacity_factor * n * k / E, rounded up.
    ``by``: ``"probability"`` keeps an expert's pairs with the highest weights of the router, and of
    equal ones the first; ``"position"`` its first pairs, in the order of tokens in the batch.
    ``over``: which n tokens compete. ``"sub-sequence"``: each rank's own, so what is dropped
    depends on how many ranks share a batch, and nothing is sent to decide. ``"sequence"``: those of
    the ranks that share sequences (``cp`` and ``tp``), together. ``"batch"``: all, so what is
    dropped does not depend on the plan. The last two gather the pairs' experts and weights. With
    micro-batches, tokens of one compete.
    ``pad``: each rank sends each expert exactly C rows, some of them of no token. No sizes are
    exchanged, and all shapes are known beforehand. Tokens then compete within a rank.

    Source: Liu et al., MoE Parallel Folding (2025), section 3.3; GShard (2020), section 3.2.

    >>> Dropping(1.25).capacity(tokens=64, choices=2, experts=8)
    20
    """

    capacity_factor: float
    by: str = "probability"
    over: str = "sub-sequence"
    pad: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.capacity_factor) and self.capacity_factor > 0):
            raise PlanError(
                f"capacity_factor={self.capacity_factor} is no share of the pairs that an expert "
                "gets on average; give a number above 0, such as 1.25, or dropping=None to keep all"
            )
        for name, words in (("by", RULES), ("over", SCOPES)):
            if (given := getattr(self, name)) not in words:
                raise PlanError(f"{name} is {' or '.join(map(repr, words))}, not {given!r}")
        if self.pad and self.over != "sub-sequence":
            raise PlanError(
                f"pad=True with over={self.over!r}: one rank may keep all C pairs of an expert, so "
                "each would send that many rows to every expert, almost all of them empty. Say "
                "over='sub-sequence', where C is a rank's own, or pad=False"
            )

    def capacity(self, tokens: int, choices: int, experts: int) -> int:
        """The most pairs that an expert keeps of so many tokens with so many choices each.

        The factor counts as it is written: 1.1 of 10 are 11.
        """
        return math.ceil(Fraction(str(self.capacity_factor)) * tokens * choices / experts)

    def along(self, layout: Layout) -> list[tuple[str, bool]]:
        """The axes of tokens, and whether they compete along each, in the order to move them.

        Inner slices are gathered first, and taken last.
        """
        axes = [axis.name for axis in layout.tokens.axes if axis.size > 1]
        wide = {"sub-sequence": (), "sequence": ("cp", "tp"), "batch": tuple(axes)}[self.over]
        together = [(axis, True) for axis in reversed(axes) if axis in wide]
        return together + [(axis, False) for axis in axes if axis not in wide]
