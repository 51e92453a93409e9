"""An optimizer's update in the memory of the host, as one operator.

In a graph it returns new values. A rank runs it beside everything else (``beside``): where its
operands are, once they have come, while the device computes and this program goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, fx

from moptrace.core import Program
from moptrace.kernels.host_memory import finish_copies, run_on_host

__all__ = ["HostUpdate", "Started", "bring_back"]

Started: TypeAlias = list[tuple[Tensor, Tensor]]  # parameters, or parts, and the host's new values


class HostUpdate:
    """``f(*operands)``: the new values of a parameter and its state, as a tuple.

    ``body`` is the program of the update: its inputs are the operands, in order, and its outputs
    the results, each of which replaces an input.

    Requires: operands in the memory of the host.
    """

    def __init__(self, name: str, body: Program):
        self.__name__ = name
        self.body = body
        names = [node.name for node in body.graph.find_nodes(op="placeholder")]
        self.replaced = tuple(names.index(o.updates or "") for o in body.signature.outputs)
        self._module = body.module("cpu")

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return self._module(*operands)

    def beside(self, run: fx.GraphModule, started: Started) -> Callable[..., tuple[Tensor, ...]]:
        """The operator as ``run``, which writes new values over the operands that they replace.

        It returns at once; ``host_memory`` knows of the results that they are not there yet. It
        takes the parameter itself before its operands, and notes in ``started`` what belongs there.
        """
        return _Beside(self, run, started)


class _Beside:
    def __init__(self, update: HostUpdate, run: fx.GraphModule, started: Started):
        self.__name__ = update.__name__
        self.replaced, self.run, self.started = update.replaced, run, started

    def __call__(self, home: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        results = tuple(operands[at] for at in self.replaced)
        run_on_host(self.run, operands, results)
        self.started.append((home, results[0]))
        return results


def bring_back(started: Started) -> None:
    """Finish updates that were started, of a step that failed before it wrote the parameters."""
    if started:
        finish_copies()
    for home, new in started:
        home.copy_(new)
