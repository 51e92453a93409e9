"""The updates of a training step: what its optimizer computes, parameter by parameter.

A step ends with updates. They read parameters, the optimizer's state, and a few *operands* that
come from elsewhere: gradients, their norm, learning rates. Everything that only new values depend
on belongs to them, the scaling of clipped gradients included. So a step can be cut in two, before
its updates, and what crosses the cut is the operands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

import moptrace.kernels.fused_adam  # noqa: F401  registers the operator
from moptrace import roles
from moptrace.core import Output, Program, State, ancestors, args_of, written
from moptrace.placement import INVARIANT, Placement
from moptrace.roles import Component

__all__ = [
    "PENDING",
    "Operand",
    "Update",
    "Updates",
    "add_state",
    "in_parts",
    "is_elementwise",
    "makes_state",
    "written",
]

aten = torch.ops.aten

PENDING = "pending."  # what the paths of values begin with that wait for the next step

_AFTER_BACKWARD = (Component.CLIPPING, Component.OPTIMIZER)


@dataclass(frozen=True)
class Update:
    """The nodes of the new values of one parameter and its state, in order.

    Some are those of other parameters too, such as the factor of clipping.
    """

    fqn: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Operand:
    """What updates take from elsewhere.

    ``path`` names it alike in every step of one model and optimizer, and ``parameter`` is the one
    whose update takes it first, None for a learning rate.
    """

    path: str
    parameter: str | None


class Updates:
    """The updates of a finished step, in their order, and their operands.

    Where a step begins with updates that the last one left, they are these, and what it leaves
    itself is among the ``others``.
    """

    def __init__(self, program: Program):
        self.program = program
        self.outputs: dict[str, list[tuple[Output, fx.Node]]] = defaultdict(list)
        self.others: list[tuple[Output, fx.Node]] = []
        fqns = {p.name: p.fqn for p in program.signature.parameters}
        for output, node in zip(program.signature.outputs, program.outputs, strict=True):
            fqn = output.state_of or fqns.get(output.updates or "")
            fqn = None if output.path.startswith(PENDING) else fqn
            (self.outputs[fqn] if fqn else self.others).append((output, node))
        self.nodes = self._nodes()
        self.updates = tuple(self._by_parameter())
        self.operands = self._operands()

    def _nodes(self) -> set[fx.Node]:
        others = {node for _, node in self.others}
        new = {node for pairs in self.outputs.values() for _, node in pairs}  # read by forward, too
        found: set[fx.Node] = set()
        end = self.program.graph.output_node()
        for node in reversed(self.program.nodes):
            if roles.component(node) in _AFTER_BACKWARD and node.op == "call_function":
                alone = node in new or all(u in found or u is end for u in node.users)
                if alone and node not in others:
                    found.add(node)
        return found

    def _by_parameter(self) -> list[Update]:
        found: list[Update] = []
        place = {node: at for at, node in enumerate(self.program.nodes)}
        for fqn, pairs in self.outputs.items():
            own = ancestors(node for _, node in pairs) & self.nodes
            found.append(Update(fqn, tuple(sorted(own, key=place.__getitem__))))
        return found

    def _operands(self) -> dict[fx.Node, Operand]:
        signature = self.program.signature
        stay = {p.name for p in signature.parameters}
        own = (s for s in signature.states if s.parameter is not None)
        stay |= {s.name for s in own if not s.path.startswith(PENDING)}
        rates = {s.name: s.path for s in signature.states}
        found: dict[fx.Node, Operand] = {}
        for update in self.updates:
            number = 0
            for operand in (x for node in update.nodes for x in node.all_input_nodes):
                if operand in self.nodes or operand in found or operand.op == "get_attr":
                    continue
                if operand.op == "placeholder" and operand.name in stay:
                    continue
                if operand.name in rates:
                    found[operand] = Operand(rates[operand.name], None)
                    continue
                found[operand] = Operand(f"{update.fqn}.operand_{number}", update.fqn)
                number += 1
        return found


def in_parts(pairs: Sequence[tuple[Output, fx.Node]]) -> list[list[tuple[Output, fx.Node]]]:
    """The new values of an update that have dimensions: of each part, where they are divided."""
    large = [pair for pair in pairs if roles.tensor(pair[1]).dim()]
    writes = [written(node) for _, node in large]
    if not all(writes):
        return [large]
    outputs = [output for output, _ in large]
    return [
        list(zip(outputs, (args_of(node)[1] for node in part), strict=True))
        for part in zip(*writes, strict=True)
    ]


def is_elementwise(node: fx.Node) -> bool:
    """Whether an operator gives each element from those at its place, or from none."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in _ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


# Beside pointwise operators.
_ELEMENTWISE = (
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.clone,
    aten._to_copy,
    aten.copy,
    torch.ops.moptrace.fused_adam,
)


def makes_state(program: Program) -> bool:
    """Whether the optimizer has yet to make its state, which its first step does."""
    return any(o.state_of and o.updates is None for o in program.signature.outputs)


def add_state(
    graph: fx.Graph,
    program: Program,
    state: State,
    example: torch.Tensor,
    held: Placement | None,
) -> tuple[fx.Node, State]:
    """Add a graph input that a step keeps beside its parameters, where the graph inserts.

    It is placed as it is ``held``, or alike on all ranks. Returns the state with the name that the
    input got: ``state.name``, if that was free.
    """
    assert program.layout is not None
    placement = held or Placement.uniform(program.layout.home, INVARIANT)
    node = graph.placeholder(state.name)
    node.target = node.name  # another one where the name was taken
    roles.set_value(node, example)
    roles.set_role(node, component=Component.OPTIMIZER, placements=(placement,))
    return node, replace(state, name=node.name)
