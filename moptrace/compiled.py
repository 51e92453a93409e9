"""A part of a graph as one operator that Inductor compiles."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import FailOnRecompileLimitHit

from moptrace.errors import CompileWarning

__all__ = ["CompiledRegion"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class CompiledRegion:
    """A function ``f(*operands)`` that returns a tuple; ``graph`` is what it means.

    It is compiled when it is first called, for all sizes if it ``varies``. Where Inductor cannot
    compile it, the graph runs as it is, after a CompileWarning that says why. ``place`` leads to
    the user's code. Not differentiable.
    """

    name: str
    graph: fx.Graph
    varies: bool = True
    place: str = ""
    _run: Callable[..., Any] | None = field(default=None, init=False, repr=False)

    @property
    def __name__(self) -> str:  # as fx writes the target of a call
        return self.name

    def __call__(self, *operands: Any) -> Any:
        if self._run is None:
            self._run = self._compiled(operands)
        try:
            return self._run(*operands)
        except FailOnRecompileLimitHit as error:  # other sizes, for which it was compiled too often
            self._run = self._as_it_is(error)
            return self._run(*operands)

    def _compiled(self, operands: tuple[Any, ...]) -> Callable[..., Any]:
        meaning = fx.GraphModule(torch.nn.Module(), self.graph)
        compiled = torch.compile(meaning, dynamic=self.varies or None, fullgraph=True)
        began = time.monotonic()
        try:
            compiled(*operands)
        except Exception as error:
            return self._as_it_is(error)
        log.info("compiled %s in %.1f s", self.name, time.monotonic() - began)
        return compiled

    def _as_it_is(self, error: Exception) -> Callable[..., Any]:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{self.name} ({self.place}) runs one operator after another, because it cannot be "
            f"compiled: {type(error).__name__}: {reason}",
            CompileWarning,
            stacklevel=4,
        )
        return fx.GraphModule(torch.nn.Module(), self.graph)
