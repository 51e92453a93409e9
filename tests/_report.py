"""Counts that the closing lines of a test session show."""

from __future__ import annotations

from collections import Counter

examples: Counter[str] = Counter()
remarks: list[str] = []


def record_examples(number: int = 1, *, of: str = "equivalence") -> None:
    """Count examples of a property that a test has just checked.

    One traced model serves several meshes and plans, so a test counts what it checked itself;
    Hypothesis counts only the models.
    """
    examples[of] += number


def remark(line: str) -> None:
    """Show a line at the end of the session, such as how many mutants a test has caught."""
    remarks.append(line)
