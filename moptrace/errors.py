"""The errors that users see. Each says what is wrong, where, and what to write instead."""

from __future__ import annotations

__all__ = [
    "CheckError",
    "CompileWarning",
    "MoptraceError",
    "PassError",
    "PlacementError",
    "PlanError",
    "RoleError",
    "StepError",
    "TraceError",
]


class MoptraceError(Exception):
    """Base of every error that moptrace raises on purpose."""


class TraceError(MoptraceError):
    """The model cannot be captured as one graph."""


class RoleError(MoptraceError):
    """A component, such as a Mixture-of-Experts block, was not recognised."""


class PlacementError(MoptraceError):
    """A tensor cannot be placed as the plan asks."""


class PlanError(MoptraceError):
    """The plan and the mesh do not fit each other."""


class StepError(MoptraceError):
    """A model and its optimizer cannot be captured as one training step."""


class PassError(MoptraceError):
    """A pass was applied to a program that it does not accept."""


class CheckError(MoptraceError):
    """A program is not well formed. This is a defect of the pass that made it."""


class CompileWarning(UserWarning):
    """A part of a step runs one operator after another, because it cannot be compiled."""
