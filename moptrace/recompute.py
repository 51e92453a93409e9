"""Regions of a program whose values are computed again in backward instead of kept.

A pass gives nodes the name of a region (``Role.recompute``). Where autograd differentiates the
program, each region becomes one call that keeps nothing but its operands; in backward it runs once
more, collectives included, and is differentiated then. Random operators draw the same numbers
again, because a draw is decided by the step, the place and the shard (``random.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.collectives import Communicator
from moptrace.core import copy_node

__all__ = ["Region", "recomputed", "with_regions"]


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a graph as one operator: a graph of its own, which returns a tuple."""

    name: str
    graph: fx.Graph

    @property
    def __name__(self) -> str:  # as fx writes the target of a call
        return "region"

    @cached_property
    def run(self) -> Callable[..., tuple[Any, ...]]:
        return fx.GraphModule(torch.nn.Module(), self.graph)

    def __call__(self, *operands: Tensor) -> tuple[Any, ...]:
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in operands)):
            return self.run(*operands)
        here = Communicator.current()
        moment = here.seed, here.step

        def run(*xs: Tensor) -> tuple[Any, ...]:
            with here, here.at(*moment):
                return self.run(*xs)

        return recomputed(run, operands)


def recomputed(run: Callable[..., tuple[Any, ...]], operands: Sequence[Tensor]) -> tuple[Any, ...]:
    """The results of ``run(*operands)``, of which backward keeps the operands and runs it again."""
    return _Recomputed.apply(run, *operands)


class _Recomputed(torch.autograd.Function):
    """A function that keeps nothing but its operands for backward."""

    @staticmethod
    def forward(ctx: Any, run: Any, *operands: Tensor) -> tuple[Any, ...]:
        ctx.run = run
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)
        results = run(*operands)
        ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            own = [x.detach() for x in ctx.saved_tensors]
            leaves = [
                x.requires_grad_() for x, is_wanted in zip(own, wanted, strict=True) if is_wanted
            ]
            results = ctx.run(*own)
        given = {
            result: gradient
            for result, gradient in zip(results, gradients, strict=True)
            if gradient is not None and result.requires_grad
        }
        if not given:
            return None, *(None for _ in wanted)
        found = iter(torch.autograd.grad([*given], leaves, [*given.values()], allow_unused=True))
        return None, *(next(found) if is_wanted else None for is_wanted in wanted)


# --- cutting regions out --------------------------------------------------------------------------


def with_regions(graph: fx.Graph) -> fx.Graph:
    """The graph with every region as one call, where its last node was.

    Requires: nothing outside of a region that depends on it comes before its last node, and it
    takes tensors alone.
    """
    members: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if name := roles.role(node).recompute:
            members.setdefault(name, []).append(node)
    if not members:
        return graph
    last = {nodes[-1]: name for name, nodes in members.items()}
    result, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if not roles.role(node).recompute:
            new[node] = copy_node(result, node, new.__getitem__)
        elif node in last:
            _call(result, last[node], members[last[node]], new)
    return result


def _call(
    graph: fx.Graph, name: str, nodes: Sequence[fx.Node], new: dict[fx.Node, fx.Node]
) -> None:
    """Write a call of a region at the end of a graph; its results stand for those of its nodes."""
    inside = dict.fromkeys(nodes)
    operands = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in inside)
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    body, own = fx.Graph(), dict[fx.Node, fx.Node]()
    for x in operands:
        own[x] = body.placeholder(x.name)
    for node in nodes:
        own[node] = copy_node(body, node, own.__getitem__)
    body.output(tuple(own[node] for node in results))
    call = graph.call_function(Region(name, body), tuple(new[x] for x in operands))
    for number, node in enumerate(results):
        new[node] = graph.call_function(getitem, (call, number))
        roles.copy_role(new[node], of=node)
