"""Update experts in their backward, one expert's parameters after another."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.activations import communicates
from moptrace.core import Level, Pass, Program, ancestors, copy_node
from moptrace.kernels.expert_function import ExpertOperator, is_sum, results_of
from moptrace.kernels.updating_experts import Update, UpdatingExperts
from moptrace.liveness import storages
from moptrace.roles import Component
from moptrace.updates import is_elementwise

__all__ = ["fuse_updates"]


def fuse_updates() -> Pass:
    """Let the backward of experts update each expert's parameters as soon as it has the gradient.

    No gradient of all experts is made, and what one expert's update reads is in cache: the
    operators of the optimizer run on parts of ``[1, ...]``, from an optimizer like AdamW, fused or
    not, that treats every element alike. A gradient that others need too, or that is not final
    where it is made, is left as it is: one that is reduced over ranks, scaled by clipping, summed
    over micro-batches, or of experts that run by other kernels (on a GPU).

    Requires: ``apply_optimizer``. Ensures: the same operators on the same values; nothing reads a
    parameter or its state after it was updated.
    """

    def rewrite(program: Program) -> Program:
        found = _Found(program)
        return program.with_graph(found.written()) if found.updates else program

    return Pass("fuse_updates", rewrite, takes=(Level.STEP,), needs=("apply_optimizer",))


@dataclass(frozen=True)
class _Update:
    """The nodes from a gradient to new values, and what they take beside the gradient."""

    gradient: fx.Node
    nodes: tuple[fx.Node, ...]
    parts: tuple[fx.Node, ...]  # the inputs of the gradient's shape; the first get new values
    numbers: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]  # the new values

    def graph(self) -> fx.Graph:
        graph = fx.Graph()
        given = (self.gradient, *self.parts, *self.numbers)
        new = {node: graph.placeholder(node.name) for node in given}
        for node in self.nodes:
            new[node] = copy_node(graph, node, new.__getitem__)
        graph.output(tuple(new[x] for x in self.results))
        return graph


class _Found:
    """The updates of a program that the backwards of experts may do, by backward."""

    def __init__(self, program: Program):
        self.program = program
        self.place = {node: at for at, node in enumerate(program.nodes)}
        self.end = program.graph.output_node()
        outputs = zip(program.outputs, program.signature.outputs, strict=True)
        self.replaced = {node: output.updates for node, output in outputs}
        self.last_reader: dict[fx.Node, int] = {}
        self.root = storages(program)
        self.updates: dict[fx.Node, list[_Update]] = {}
        for node in program.nodes:
            if type(node.target) is ExpertOperator:
                every = (self._update(node, node.target, pick) for pick in node.users)
                if some := [update for update in every if update is not None]:
                    self.updates[node] = some

    def _update(
        self, backward: fx.Node, operator_: ExpertOperator, gradient: fx.Node
    ) -> _Update | None:
        """The update that takes a gradient, if the backward that gives it may do that."""
        number: Any = gradient.args[1]
        nodes = self._nodes(gradient)
        if nodes is None or not is_sum(results_of(operator_.graph)[number]):
            return None
        own = {gradient, *nodes}
        given = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in own)
        parts = [x for x in given if _is_of(x, roles.tensor(gradient).shape)]
        numbers = tuple(x for x in given if x not in parts)
        results = [x for x in nodes if self.end in x.users]
        names = [self.replaced[x] for x in results]
        parts.sort(key=lambda x: names.index(x.name) if x.name in names else len(names))
        if [x.name for x in parts[: len(names)]] != names:
            return None  # a new value for what the update does not read, such as new state
        before = ancestors(numbers)
        if (
            not all(map(_is_number, numbers))
            or any(x.op != "placeholder" for x in parts)
            or any(self._is_read(x, after=backward, but=own) for x in parts)
            or backward in before
            or any(communicates(x) for x in before)
        ):
            return None
        return _Update(gradient, tuple(nodes), tuple(parts), numbers, tuple(results))

    def _nodes(self, gradient: fx.Node) -> list[fx.Node] | None:
        """What makes new values with a gradient, if it is arithmetic on each element alone."""
        shape, found = roles.tensor(gradient).shape, set[fx.Node]()
        left = list(gradient.users)
        while left:
            node = left.pop()
            if node in found:
                continue
            if node is self.end or not _treats_alike(node, shape):
                return None
            found.add(node)
            left += [user for user in node.users if user is not self.end]
            made = (
                x for x in node.all_input_nodes if x.op == "call_function" and x is not gradient
            )
            left += [x for x in made if _is_of(x, shape)]
        return sorted(found, key=self.place.__getitem__) or None

    def _is_read(self, x: fx.Node, after: fx.Node, but: set[fx.Node]) -> bool:
        """Whether something reads an input, or a view of it, after a node."""
        left, seen = [x], set[fx.Node]()
        while left:
            for user in left.pop().users:
                if user in seen or user in but:
                    continue
                if user is self.end or self.place[user] > self.place[after]:
                    return True
                seen.add(user)
                left += [user] if self.root[user] is self.root[x] else []
        return False

    def written(self) -> fx.Graph:
        """The program's graph with the updates inside of the backwards."""
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        gone = {x for every in self.updates.values() for u in every for x in (u.gradient, *u.nodes)}
        for node in self.program.nodes:
            if node in self.updates:
                early = ancestors(x for update in self.updates[node] for x in update.numbers)
                for x in sorted(early - new.keys(), key=self.place.__getitem__):
                    new[x] = copy_node(graph, x, new.__getitem__)
                self._replace(node, graph, new)
            elif node not in new and node not in gone:
                new[node] = copy_node(graph, node, new.__getitem__)
        return graph

    def _replace(self, node: fx.Node, graph: fx.Graph, new: dict[fx.Node, fx.Node]) -> None:
        updates, backward = self.updates[node], node.target
        assert isinstance(backward, ExpertOperator)
        made = UpdatingExperts(backward, [_as_operand(update) for update in updates])
        taken = [x for update in updates for x in (*update.parts, *update.numbers)]
        given: Any = (*node.args, *taken)
        call = graph.call_function(made, tuple(new[x] for x in given))
        roles.copy_role(call, of=node)
        picks = {pick.args[1]: pick for pick in node.users}
        values = roles.value(node)
        results = [x for update in updates for x in update.results]
        roles.set_value(call, (*(values[i] for i in made.left), *map(roles.value, results)))
        for number, old in enumerate([*(picks.get(i) for i in made.left), *results]):
            if old is not None:
                new[old] = pick = graph.call_function(operator.getitem, (call, number))
                pick.meta = dict(old.meta)


def _as_operand(update: _Update) -> Update:
    number: Any = update.gradient.args[1]
    return Update(number, update.graph(), len(update.parts))


def _is_number(node: fx.Node) -> bool:
    value = roles.value(node)
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _treats_alike(node: fx.Node, shape: torch.Size) -> bool:
    """Whether it is an optimizer's arithmetic on each element of tensors of this shape."""
    alone = is_elementwise(node) or node.target is operator.getitem
    return alone and roles.component(node) is Component.OPTIMIZER and _is_of(node, shape)


def _is_of(node: fx.Node, shape: torch.Size) -> bool:
    """Whether a node gives one or several tensors of this shape."""
    value = roles.value(node)
    each = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(x, torch.Tensor) and x.shape == shape for x in each)
