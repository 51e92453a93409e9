"""What a training step keeps from forward for its backward, layer by layer.

A step is one *phase* for each micro-batch: its forward, then its backward. Of a phase's forward,
the *main path* leads from the embedded tokens to the loss; a node of it past which no edge jumps is
a *cut*, which with residual connections is a value of the residual stream. (Single numbers may pass
by: terms of the loss.) A layer ends with the first cut after its feed-forward network or experts,
so that one value enters it. Nothing here reads a name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.collectives import collective
from moptrace.core import Program, is_random
from moptrace.liveness import storages
from moptrace.random import draw
from moptrace.rings import ring, ring_backward
from moptrace.roles import Component
from moptrace.stages import hop, share

__all__ = [
    "Activations",
    "Phase",
    "communicates",
    "decides",
    "layer_entries",
    "rows_of_dispatch",
]

ops = torch.ops.moptrace

_FEED_FORWARD = (
    Component.EXPERTS,
    Component.SHARED_EXPERT,
    Component.COMBINE,
    Component.DENSE_MLP,
)
_AFTER_BACKWARD = (Component.CLIPPING, Component.OPTIMIZER)


@dataclass(frozen=True)
class Phase:
    """The forward and the backward of one micro-batch, in order.

    Of the forward, the nodes that depend on parameters and on the batch. ``entries`` are the values
    that enter its layers, and the one that leaves the last.
    """

    forward: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]

    @cached_property
    def layer_of(self) -> dict[fx.Node, int]:
        """The layer of every forward node; a value that enters a layer belongs to it.

        What comes before the first layer has number -1, and what follows the last the next one.
        """
        found: dict[fx.Node, int] = {}
        layer, entries = -1, set(self.entries)
        for node in self.forward:
            layer += node in entries
            found[node] = layer
        return found

    @property
    def layers(self) -> int:
        return max(len(self.entries) - 1, 0)

    def is_in_layer(self, node: fx.Node) -> bool:
        return 0 <= self.layer_of[node] < self.layers

    @cached_property
    def starts(self) -> dict[int, fx.Node]:
        """The backward node with which each layer's backward starts: the first that reads it."""
        found: dict[int, fx.Node] = {}
        for node in self.backward:
            for operand in node.all_input_nodes:
                layer = self.layer_of.get(operand)
                if layer is not None:
                    found.setdefault(layer, node)
        return found


class Activations:
    """The phases of a step, and which of their values may be computed again."""

    def __init__(self, program: Program):
        self.program = program
        self.root = storages(program)
        self.active = _active(program)
        self.phases = tuple(self._phases())

    def may_be_again(self, node: fx.Node, collectives: bool) -> bool:
        """Whether backward may compute the results of a forward node once more.

        What is made of parameters alone, or of the batch alone, is left (``regather`` is for the
        former). A decision is made once, and so is what is not a tensor, such as a number of rows.
        """
        if node not in self.active or node.op != "call_function":
            return False
        if (node.is_impure() and not is_random(node)) or node.target is ops.offload.default:
            return False
        if node.target is operator.getitem:
            source: Any = node.args[0]
            return self.may_be_again(source, collectives) or rows_of_dispatch(node)
        results = pytree.tree_leaves(roles.value(node))
        if decides(node) or not any(isinstance(x, Tensor) for x in results):
            return False
        if communicates(node):
            return collectives and all(x.is_floating_point() for x in results)
        return True

    @property
    def kept(self) -> list[fx.Node]:
        """The forward values that backward needs: those with memory of their own, in order."""
        found: dict[fx.Node, None] = {}
        for phase in self.phases:
            for node in phase.forward:
                if any(roles.role(user).backward for user in node.users):
                    found[self.root[node]] = None
        return list(found)

    def _phases(self) -> Iterator[Phase]:
        main = _main_path(self.program, self.active)
        forward: list[fx.Node] = []
        backward: list[fx.Node] = []
        for node in self.program.nodes:
            if node.op != "call_function" or roles.component(node) in _AFTER_BACKWARD:
                continue
            if roles.role(node).backward:
                backward.append(node)
                continue
            if backward:
                yield _phase(forward, backward, main)
                forward, backward = [], []
            if node in self.active:
                forward.append(node)
        if backward:
            yield _phase(forward, backward, main)


def decides(node: fx.Node) -> bool:
    """Whether an operator makes integers out of floating-point numbers, or of chance alone.

    Such as a top-k, a comparison, or the dispatch of tokens. A second time it could decide
    otherwise; a random operator that also gives numbers, such as dropout, draws the same again.
    """
    whole = [not _is_real(x) for x in pytree.tree_leaves(roles.value(node))]
    if node.target is draw or is_random(node):
        return all(whole)
    return any(whole) and any(_is_real(roles.value(x)) for x in node.all_input_nodes)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.is_floating_point())


def rows_of_dispatch(node: fx.Node) -> bool:
    """The copies of tokens that follow from the order which a dispatch decided."""
    source = node.args[0] if node.target is operator.getitem else None
    return getattr(source, "target", None) is ops.dispatch.default and node.args[1:] == (0,)


def communicates(node: fx.Node) -> bool:
    """Whether ranks exchange values for this operator."""
    row = collective(node.target)
    if row is not None:
        return row.travels
    if node.target in (hop, share):
        return True
    return ring(node.target) is not None or ring_backward(node.target) is not None


# --- phases and layers ----------------------------------------------------------------------------


def layer_entries(program: Program) -> list[fx.Node]:
    """Of a forward: the values that enter its layers, in order, and the one that leaves the last.

    Nothing where no layer ends in a feed-forward network or experts.
    """
    active = _active(program)
    forward = [n for n in program.nodes if n.op == "call_function" and n in active]
    return _entries(forward, _main_path(program, active))


def _active(program: Program) -> set[fx.Node]:
    """The nodes that depend on parameters and on the batch."""
    parameters = {x.name for x in program.signature.parameters}
    inputs = {x.name for x in program.signature.inputs}
    of_parameters: set[fx.Node] = set()
    of_inputs: set[fx.Node] = set()
    for node in program.nodes:
        operands = node.all_input_nodes
        if node.name in parameters or any(x in of_parameters for x in operands):
            of_parameters.add(node)
        if node.name in inputs or any(x in of_inputs for x in operands):
            of_inputs.add(node)
    return of_parameters & of_inputs


def _main_path(program: Program, active: set[fx.Node]) -> set[fx.Node]:
    """What leads to the loss, and not through auxiliary losses alone."""
    found: set[fx.Node] = set()
    left = [program.loss]
    while left:
        node = left.pop()
        if node not in found and node in active and roles.component(node) != Component.AUX_LOSS:
            found.add(node)
            left += node.all_input_nodes
    return found


def _phase(forward: list[fx.Node], backward: list[fx.Node], main: set[fx.Node]) -> Phase:
    return Phase(tuple(forward), tuple(backward), tuple(_entries(forward, main)))


def _entries(forward: list[fx.Node], main: set[fx.Node]) -> list[fx.Node]:
    """The cut before the first layer, and the cut that ends each layer."""
    path = [node for node in forward if node in main and not _is_number(node)]
    number = {node: i for i, node in enumerate(path)}
    cuts, reach = [-1], 0
    for i, node in enumerate(path):
        if reach <= i:
            cuts.append(i)
        reach = max([reach, *(number[user] for user in node.users if user in number)])
    ends = [
        cut
        for before, cut in pairwise(cuts)
        if any(roles.component(node) in _FEED_FORWARD for node in path[before + 1 : cut + 1])
    ]
    if not ends:
        return []
    embedded = [cut for cut in cuts[1:] if roles.component(path[cut]) == Component.EMBEDDING]
    first = max((cut for cut in embedded if cut < ends[0]), default=cuts[1])
    return [path[cut] for cut in dict.fromkeys([first, *ends])]


def _is_number(node: fx.Node) -> bool:
    value = roles.value(node)
    return isinstance(value, Tensor) and not value.dim()
