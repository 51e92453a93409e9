"""Sweeps of which ``make test`` runs some cases and ``make test-all`` every one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import Phase

# An example of a property that runs many ranks takes seconds, and a search for a smaller one many
# minutes. What failed is printed whole, with what reproduces it.
WITHOUT_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


def sweep(every: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases as parameters, a tuple for several; those not in ``quick`` are marked slow."""
    cases = list(every)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"not among the cases: {unknown}"
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*own, marks=() if case in quick else pytest.mark.slow)
        for case, own in zip(cases, values, strict=True)
    ]
