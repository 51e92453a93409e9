"""Divide a model's layers among pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeAlias

from torch import Tensor, fx

from moptrace import roles
from moptrace.activations import layer_entries
from moptrace.core import Level, Pass, Program, copy_node
from moptrace.costs import Machine, operator_costs
from moptrace.errors import PassError, PlanError
from moptrace.rules import rule_for
from moptrace.stages import hop

__all__ = ["split_stages"]


def split_stages(stages: int, layers: Sequence[int] | None = None) -> Pass:
    """Give each node to the ranks of one of ``stages``, and let values hop where a stage ends.

    Layers are found by structure (``activations.py``) and divided in order: ``layers`` says how
    many each stage has; by default the slowest stage's operators take as little time as they can,
    with what comes before the layers on the first stage and what follows them on the last. What
    else depends on parameters and on the batch, such as an auxiliary loss, is computed where the
    last of its operands is. What depends on parameters alone is computed by each stage that needs
    it, from a parameter that hops there from its owner, the first of them. What depends on the
    batch alone is computed by everyone. A buffer that the graph updates belongs to the stage that
    computes its new value.

    Requires: a local program. Ensures: the same values and gradients; all operands of a node are of
    one stage, or everyone's. Raises PlanError if there are fewer layers than stages, or ``layers``
    are not as many as there are.
    """

    def rewrite(program: Program) -> Program:
        if stages == 1:
            return program
        return _Split(program, stages, layers).apply()

    options = (("stages", stages), ("layers", None if layers is None else tuple(layers)))
    return Pass("split_stages", rewrite, options, takes=(Level.LOCAL,))


class _Split:
    """The walk that writes each node for the stages that need it.

    A node is *everyone's*, if it follows from the batch and constants alone, *of weights*, if it
    follows from parameters and updated buffers alone, or *computed* from both.
    """

    def __init__(self, program: Program, stages: int, layers: Sequence[int] | None):
        self.program, self.signature = program, program.signature
        new = zip(self.signature.outputs, program.outputs, strict=True)
        updated = {output.buffer: node for output, node in new if output.buffer}
        self.updates = {b.name: updated[b.fqn] for b in self.signature.buffers if b.fqn in updated}
        held = {*(p.name for p in self.signature.parameters), *self.updates}
        given = {x.name for x in self.signature.inputs}
        self.weighted = _following(program, held)
        self.computed = self.weighted & _following(program, given)
        entries = layer_entries(program)
        needed = self._layers(entries)
        self.layers = _divided(program, needed, len(entries) - 1, stages, layers)
        stage = [number for number, count in enumerate(self.layers) for _ in range(count)]
        stage.append(stages - 1)  # of what follows the layers
        self.needed = {node: {stage[i] for i in own} for node, own in needed.items()}
        self.graph = fx.Graph()
        self.copies: dict[tuple[fx.Node, int | None], fx.Node] = {}

    def _layers(self, entries: Sequence[fx.Node]) -> dict[fx.Node, set[int]]:
        """The layers that need each node that is not everyone's; those after the last count as one.

        A computed node belongs to one: the last of its operands', or before the layers the first of
        its users'.
        """
        if not entries:
            return {}
        next_layer = {entry: number for number, entry in enumerate(entries)}
        found: dict[fx.Node, set[int]] = {entries[0]: {0}}
        for node in self.program.nodes:
            before = [x for x in node.all_input_nodes if x in found]
            if before and node in self.computed and node not in found:
                found[node] = {max(next_layer.get(x, min(found[x])) for x in before)}
        for node in reversed(list(self.program.nodes)):
            if node in self.weighted and node not in found and node.op != "output":
                layers = {layer for user in node.users for layer in found.get(user, ())} or {0}
                found[node] = {min(layers)} if node in self.computed else layers
        return found

    def apply(self) -> Program:
        for node in self.program.nodes:
            if node.op == "output":
                results = [self._at(x, self._home(x)) for x in self.program.outputs]
                self.graph.output(tuple(results))
            elif node.op == "placeholder" or node not in self.weighted:
                self._copy(node, self._home(node))
            else:
                for stage in sorted(self.needed[node]):
                    self._copy(node, stage)
        homes = {
            node.name: self._home(node) for node in self.program.graph.find_nodes(op="placeholder")
        }
        parameters = (replace(p, stage=homes[p.name]) for p in self.signature.parameters)
        buffers = (replace(b, stage=homes[b.name]) for b in self.signature.buffers)
        signature = replace(self.signature, parameters=tuple(parameters), buffers=tuple(buffers))
        assert self.program.layout is not None
        layout = replace(self.program.layout, layers=self.layers)
        return self.program.with_graph(self.graph, signature=signature, layout=layout)

    def _home(self, node: fx.Node) -> int | None:
        """The stage that has a value before it hops anywhere; None if everyone has it."""
        if node.op == "placeholder" and node.name in self.updates:
            node = self.updates[node.name]
        return min(self.needed[node]) if node in self.needed else None

    def _copy(self, node: fx.Node, stage: int | None) -> None:
        copy = copy_node(self.graph, node, lambda x: self._at(x, stage))
        self.copies[node, stage] = copy

    def _at(self, node: fx.Node, stage: int | None) -> fx.Node:
        """A value on a stage, to which it hops if it must."""
        for known in (stage, None):
            if (node, known) in self.copies:
                return self.copies[node, known]
        home = self._home(node)
        if not isinstance(roles.value(node), Tensor):
            raise PassError(
                f"%{node.name} is no tensor, so it cannot go from stage {home} to {stage}: "
                f"{roles.where(node)}. Compute it in both layers, or say Plan(pp=1)."
            )
        made = self.graph.call_function(hop, (self.copies[node, home], home, stage))
        roles.set_value(made, roles.value(node))
        roles.copy_role(made, of=node, recompute="", rule=None)
        roles.set_role(made, rule=rule_for(made))
        self.copies[node, stage] = made
        return made


def _following(program: Program, names: set[str]) -> set[fx.Node]:
    """The graph inputs of these names and everything that follows from them."""
    found: set[fx.Node] = set()
    for node in program.nodes:
        if node.name in names or any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def _divided(
    program: Program,
    needed: Mapping[fx.Node, set[int]],
    count: int,
    stages: int,
    layers: Sequence[int] | None,
) -> tuple[int, ...]:
    """How many of ``count`` layers each stage has."""
    if count < stages:
        raise PlanError(
            f"pp={stages} stages need a layer each, and {max(count, 0)} were found, each of which "
            "ends with a feed-forward network or experts; choose a smaller pp"
        )
    if layers is not None:
        if len(layers) != stages or sum(layers) != count or min(layers) < 1:
            raise PlanError(
                f"pp_layers={tuple(layers)} does not divide {count} layers among pp={stages} "
                f"stages: give {stages} numbers of 1 or more that add up to {count}"
            )
        return tuple(layers)
    seconds = [0.0] * (count + 1)
    for node, cost in operator_costs(program, Machine()).items():
        for layer in needed.get(node, ()):
            seconds[layer] += cost
    return _balanced([*seconds[:-2], seconds[-2] + seconds[-1]], stages)


def _balanced(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """The lengths of so many runs of ``costs``, of which the costliest costs least.

    Among equals the sum of squares decides.

    >>> _balanced([1, 1, 1, 3], 2), _balanced([5, 1, 1, 1, 1], 3)
    ((3, 1), (1, 2, 2))
    """
    total = [0.0, *accumulate(costs)]

    def extended(known: _Division, cut: int, end: int) -> _Division:
        most, squares, lengths = known
        own = total[end] - total[cut]
        return max(most, own), squares + own * own, (*lengths, end - cut)

    best: list[_Division] = [extended((0.0, 0.0, ()), 0, end) for end in range(len(total))]
    for part in range(2, parts + 1):
        best = [
            min((extended(best[cut], cut, end) for cut in range(part - 1, end)), default=_NONE)
            for end in range(len(total))
        ]
    return best[-1][2]


_Division: TypeAlias = tuple[float, float, tuple[int, ...]]  # the most, the squares, the lengths
_NONE: _Division = (math.inf, math.inf, ())
