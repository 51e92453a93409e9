"""Run a step's updates in the forward of the next step."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Output, Pass, Program, State, copy_node
from moptrace.placement import Placement
from moptrace.roles import Component
from moptrace.updates import PENDING, Updates, add_state

__all__ = ["defer_updates", "leave_updates", "pending_updates"]

aten = torch.ops.aten


def leave_updates() -> Pass:
    """A step without its updates: what these take are outputs, which wait for the next step.

    Gradients, their norm and learning rates are copied, since the next step overwrites them.

    Requires: ``apply_optimizer``. Ensures: the same loss and norm; nothing is updated.
    """
    return _pass("leave_updates", takes=False, leaves=True)


def pending_updates(only: Collection[str] | None = None) -> Pass:
    """The updates alone, of what a step left: of all parameters, or of ``only`` these.

    Requires: ``apply_optimizer``. Ensures: the operators of the step's own updates. The program
    takes no batch, and has no loss.
    """
    return _pass("pending_updates", takes=True, leaves=False, only=only)


def defer_updates() -> Pass:
    """A step that begins with the updates which the last one left, and leaves its own.

    Each update runs just before the first use of its parameter, so the copies of a state that is in
    the memory of the host can be hidden by the forward of the layers before. Clipping stays exact:
    the norm is known before any update runs.

    Requires: ``apply_optimizer``, of an optimizer whose state exists. Ensures: with
    ``leave_updates`` in the first step and ``pending_updates`` after the last, the same operators
    on the same values.
    """
    return _pass("defer_updates", takes=True, leaves=True)


def _pass(name: str, takes: bool, leaves: bool, only: Collection[str] | None = None) -> Pass:
    def rewrite(program: Program) -> Program:
        return _Rotation(program, takes, leaves, only).program()

    options = () if only is None else (("only", tuple(only)),)
    return Pass(name, rewrite, options, (Level.STEP,), needs=("apply_optimizer",))


class _Rotation:
    """The walk that puts a step together anew: the updates of what waits, then the rest."""

    def __init__(
        self, program: Program, takes: bool, leaves: bool, only: Collection[str] | None = None
    ):
        self.old, self.takes, self.leaves = program, takes, leaves
        self.updates = Updates(program)
        taken = self.updates.outputs if takes else ()
        self.fqns = [fqn for fqn in taken if only is None or fqn in only]
        self.graph = fx.Graph()
        self.before: dict[fx.Node, fx.Node] = {}  # what updates read
        self.after: dict[fx.Node, fx.Node] = {}  # what the rest reads
        self.waiting: list[State] = []  # for each operand of the updates
        names = {p.name for p in program.signature.parameters}
        inputs = program.graph.find_nodes(op="placeholder")
        self.parameters = {node.name: node for node in inputs if node.name in names}
        self.left = {x.fqn: x for x in self.updates.updates if x.fqn in self.fqns}  # not yet run

    def program(self) -> Program:
        self._copy_inputs()
        outputs: list[tuple[Output, fx.Node]] = []
        if self.leaves:
            self._copy_rest()
            outputs += [(output, self.after[node]) for output, node in self.updates.others]
        for fqn in list(self.left):
            self._update(fqn)
        for fqn in self.fqns:
            outputs += [(o, self.before[node]) for o, node in self.updates.outputs[fqn]]
        if self.leaves:
            outputs += self._left_for_later()
        self.graph.output(tuple(node for _, node in outputs))
        for node in self.graph.find_nodes(op="get_attr"):
            if not node.users:
                self.graph.erase_node(node)
        signature = self.old.signature
        signature = replace(
            signature,
            states=(*signature.states, *(self.waiting if self.takes else ())),
            inputs=signature.inputs if self.leaves else (),
            outputs=tuple(output for output, _ in outputs),
            loss=signature.loss if self.leaves else -1,
        )
        return self.old.with_graph(self.graph, signature=signature)

    def _copy_inputs(self) -> None:
        batch = {x.name for x in self.old.signature.inputs}
        given = [node for node in self.old.nodes if node.op in ("placeholder", "get_attr")]
        for node in given:
            if node.name not in batch:
                self.before[node] = self.after[node] = copy_node(self.graph, node)
        for node, operand in self.updates.operands.items():
            path, value = PENDING + operand.path, roles.tensor(node)
            name = re.sub(r"\W", "_", path)
            state = State(name, path, tuple(value.shape), value.dtype, operand.parameter)
            if self.takes:
                held = self._held(operand.parameter, value)
                self.before[node], state = add_state(self.graph, self.old, state, value, held)
            self.waiting.append(state)
        if self.leaves:
            for node in given:
                if node.name in batch:
                    self.after[node] = copy_node(self.graph, node)

    def _held(self, fqn: str | None, value: torch.Tensor) -> Placement | None:
        """How the ranks hold what waits for a parameter: a gradient as that, a number alike."""
        if fqn is None:
            return None
        parameter = self.parameters[self.old.signature.parameter(fqn).name]
        return roles.placement(parameter) if roles.tensor(parameter).shape == value.shape else None

    def _copy_rest(self) -> None:
        """Everything but the updates; each of these runs before the first use of its parameter."""
        owner = {p.name: p.fqn for p in self.old.signature.parameters}
        for node in self.old.nodes:
            if node.op != "call_function" or node in self.updates.nodes:
                continue
            for operand in node.all_input_nodes:
                if operand.op == "placeholder" and owner.get(operand.name) in self.left:
                    self._update(owner[operand.name])
            self.after[node] = copy_node(self.graph, node, self.after.__getitem__)

    def _update(self, fqn: str) -> None:
        for node in self.left.pop(fqn).nodes:
            if node not in self.before:
                self.before[node] = copy_node(self.graph, node, self.before.__getitem__)
        for output, new in self.updates.outputs[fqn]:
            if output.updates in self.parameters:
                self.after[self.parameters[output.updates]] = self.before[new]

    def _left_for_later(self) -> list[tuple[Output, fx.Node]]:
        """What waits for the next step, over what waited for this one."""
        found: list[tuple[Output, fx.Node]] = []
        for operand, state in zip(self.updates.operands, self.waiting, strict=True):
            node = self.after[operand]
            if not self.takes:
                node = self.graph.call_function(aten.clone.default, (node,))
                roles.copy_role(node, of=operand, component=Component.OPTIMIZER)
                roles.set_value(node, roles.value(operand))
            old = state.name if self.takes else None
            found.append((Output(state.path, state_of=state.parameter, updates=old), node))
        return found
