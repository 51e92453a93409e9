"""Is a program well formed? Asked after every pass, of its result.

Four questions: is the graph in order and complete; does its signature match; does it keep to its
level; and, once tensors are placed, do the placements add up? The last one re-derives every
operator's demand (``infer.py``) and every collective's conversion (``collectives.py``): a missing,
doubled or wrong collective leaves kinds that do not fit, and with them a wrong gradient. It is
asked up to level local: the backward of a step is made of that program's own derivatives. Of a step
it is asked whether every new value can take the place of the old one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.collectives import COLLECTIVES, collective
from moptrace.core import Level, Program
from moptrace.errors import CheckError
from moptrace.infer import Held, infer, satisfies, token_blocks, travels
from moptrace.placement import (
    INVARIANT,
    PARTIAL,
    REPLICATE,
    Invariant,
    Kind,
    Placement,
    Rows,
    Shard,
    View,
    own_blocks,
    parse_kind,
)
from moptrace.random import draw
from moptrace.reshard import cast_whole, constrain, reshard, route
from moptrace.rings import RINGS
from moptrace.rules import Rule, operands
from moptrace.stages import stages_of

__all__ = ["check"]

ops = torch.ops.moptrace
CONTEXT = 5  # nodes shown on either side of a fault


def check(program: Program) -> None:
    """Raise CheckError, with the neighbourhood of the fault, unless the program is well formed."""
    for rule in (_order, _signature, _level, _stages):
        _report(program, rule(program))
    if program.level >= Level.STEP:
        _report(program, _updates(program))
    elif program.level >= Level.PLACED:
        _report(program, _Placements(program).faults())


# How rows are held before and after they travel.
_ROUTES = {
    "send_rows": ("token", "arrival"),
    "return_rows": ("arrival", "token"),
    "send_slots": ("token", "expert"),
    "return_slots": ("expert", "token"),
}

Faults = Iterator[tuple[fx.Node, str]]


def _report(program: Program, faults: Faults) -> None:
    for node, fault in faults:
        name = program.made_by.name if program.made_by else "trace"
        raise CheckError(
            f"{fault}, at {roles.where(node)}, while checking the {program.level} program that "
            f"{name} made:\n{_neighbourhood(program, node)}"
        )


def _neighbourhood(program: Program, fault: fx.Node) -> str:
    nodes = list(program.graph.nodes)
    at = nodes.index(fault)
    lines: list[str] = []
    for node in nodes[max(at - CONTEXT, 0) : at + CONTEXT + 1]:
        mark = ">" if node is fault else " "
        placed = "; ".join(str(p) for p in roles.placements(node))
        lines.append(f" {mark} {node.format_node()}   {{{placed}}}")
    return "\n".join(lines)


# --- the graph, its signature, its level ----------------------------------------------------------


def _order(program: Program) -> Faults:
    """Every operand is defined before it is used, in this graph; names are unique."""
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in program.graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in seen:
                yield node, f"%{operand.name} is used before it is defined"
        if node.name in names:
            yield node, f"two nodes are named %{node.name}"
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield node, f"{node.op} does not belong in a program"
        if node.op == "get_attr" and str(node.target) not in program.constants:
            yield node, f"the constant {node.target} is missing"
        seen.add(node)
        names.add(node.name)


def _signature(program: Program) -> Faults:
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    end = program.graph.output_node()
    if tuple(node.name for node in inputs) != program.signature.names:
        yield end, "the graph's inputs are not those of its signature"
    outputs = end.args[0]
    if not isinstance(outputs, tuple) or len(outputs) != len(program.signature.outputs):
        yield end, "the graph's outputs are not those of its signature"


def _updates(program: Program) -> Faults:
    """A new value has the shape and dtype of the input that it replaces, each replaced once."""
    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    replaced: set[str] = set()
    for node, output in zip(program.outputs, program.signature.outputs, strict=True):
        if output.updates is None:
            continue
        if output.updates not in inputs or output.updates in replaced:
            yield node, f"%{output.updates} is no input, or is replaced twice"
            continue
        replaced.add(output.updates)
        old, new = roles.tensor(inputs[output.updates]), roles.tensor(node)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            yield node, f"{list(new.shape)} in {new.dtype} cannot replace %{output.updates}"


_SIDES: dict[Level, Callable[[Any], bool]] = {
    Level.CAPTURED: lambda target: collective(target) is None and target not in (reshard, route),
    Level.CANONICAL: lambda target: collective(target) is None and target not in (reshard, route),
    Level.PLACED: lambda target: collective(target) is None and target is not constrain,
    Level.LOCAL: lambda target: target not in (cast_whole, constrain, reshard, route),
}


def _level(program: Program) -> Faults:
    allowed = _SIDES.get(program.level, lambda target: True)
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            yield node, f"{node.target} writes in place; programs are functional"
        if not allowed(node.target):
            yield node, f"{node.target} does not belong at level {program.level}"


def _stages(program: Program) -> Faults:
    """No node takes what another pipeline stage has, and a gradient is where its parameter is."""
    if program.layout is None or program.layout.stages == 1 or program.stage is not None:
        return
    try:
        stages = stages_of(program)
    except ValueError as fault:
        (node,) = fault.args
        found = ", ".join(f"%{x.name}" for x in node.all_input_nodes)
        yield node, f"a stage does not have all of {found}; values go to others by a hop"
        return
    for output, node in zip(program.signature.outputs, program.outputs, strict=True):
        of = {"gradient": output.gradient, "buffer": output.buffer}
        owners = [p for p in program.signature.parameters if p.fqn == of["gradient"]]
        owners += [b for b in program.signature.buffers if b.fqn == of["buffer"]]
        for owner in owners:
            if stages[node] not in (None, owner.stage):
                yield node, f"{owner.fqn} is stage {owner.stage}'s, and this stage {stages[node]}'s"


# --- placements -----------------------------------------------------------------------------------


class _Placements:
    """Re-derives every placement from the rules and the table of collectives."""

    def __init__(self, program: Program):
        assert program.layout is not None
        self.program = program
        self.layout = program.layout
        self.differentiable: set[fx.Node] = set()
        self.tokens: dict[fx.Node, Placement] = {}  # of routed rows, when they were dispatched
        trained = {p.name for p in program.signature.parameters if p.requires_grad}
        for node in program.graph.nodes:
            value = roles.value(node)
            values = value if isinstance(value, (tuple, list)) else [value]
            floating = any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
            reached = any(x in self.differentiable for x in node.all_input_nodes)
            detached = node.target is torch.ops.aten.detach.default
            for x in node.all_input_nodes:
                if x in self.tokens and node.target is not ops.combine.default:
                    self.tokens[node] = self.tokens[x]
            if node.target is ops.dispatch.default:
                tokens = roles.placement(operands(node)[0])
                assert tokens is not None
                self.tokens[node] = tokens
            if node.name in trained or (floating and reached and not detached):
                self.differentiable.add(node)

    def faults(self) -> Faults:
        for node in self.program.graph.nodes:
            if node.op == "output":
                yield from self._outputs(node)
            elif node.op == "call_function":
                yield from self._call(node)
            elif not roles.placements(node):
                yield node, "the tensor has no placement"

    def _call(self, node: fx.Node) -> Faults:
        if node.target is operator.getitem and len(roles.placements(node)) == 1:
            source = roles.placements(node.args[0])  # type: ignore[arg-type]
            if len(source) > 1 and source[node.args[1]] != roles.placement(node):  # type: ignore
                yield node, "the placement is not that of the tuple's element"
            elif len(source) == 1:
                yield from self._operator(node)
        elif node.target in (reshard, route):
            axis, source, target = node.args[-3:]
            kinds = parse_kind(str(source)), parse_kind(str(target))
            yield from self._converts(node, str(axis), *kinds)
        elif (row := collective(node.target)) is not None:
            yield from self._collective(node, row.name)
        elif node.target in (ops.group_rows.default, ops.ungroup_rows.default):
            yield from self._regroups(node)
        else:
            yield from self._operator(node)

    def _operator(self, node: fx.Node) -> Faults:
        rule: Rule | None = roles.role(node).rule
        if rule is None:
            yield from self._without_rule(node)
            return
        inputs = operands(node)
        if node.target is draw:
            inputs = inputs[-len(rule.operands) :] if rule.operands else []
        if len(inputs) != len(rule.operands):
            yield node, f"{len(inputs)} operands, but its rule ({rule}) has {len(rule.operands)}"
            return
        outs = [p for p in roles.placements(node) if p is not None]
        said = [p for x in inputs if (p := roles.placement(x)) is not None] + outs
        if rule.has_tokens:
            said += [self.tokens[x] for x in inputs if x in self.tokens]
        view = self.layout.common_view(said)
        if not all(p.expressed_in(view) for p in said):
            yield node, f"no view can say all of {'; '.join(map(str, said))}"
            return
        for axis in view.axes:
            if axis.size == 1:
                continue
            held = [self._held(x, axis.name, view) for x in inputs]
            demand = infer(rule, held, parts=1)
            if self.program.level >= Level.LOCAL and node.target in RINGS:
                if travels(rule, demand.results[0], [h.kind for h in held]):
                    yield node, f"{node.target} has only its part of what is split and must travel"
            for operand, have, need in zip(inputs, held, demand.operands, strict=True):
                if not satisfies(have, need):
                    yield node, f"%{operand.name} is {have.kind} along {axis.name}, not {need}"
            for given, kind in zip(outs, demand.results, strict=True):
                said = given.expressed_in(view)
                if said is None or not self._same(node, said.kind(axis.name), kind):
                    yield node, f"the result is {given}, but {kind} along {axis.name} follows"

    def _held(self, node: fx.Node, axis: str, view: View) -> Held:
        placement = roles.placement(node)
        said = placement.expressed_in(view) if placement else None
        assert said is not None, f"%{node.name} cannot be said in {view}"
        live = node in self.differentiable
        weight = roles.tensor(node).numel() if live else 0
        blocks = token_blocks(self.tokens.get(node), view, axis)
        return Held(said.kind(axis), weight, live, blocks)

    def _same(self, node: fx.Node, have: Kind, need: Kind) -> bool:
        return satisfies(Held(have, differentiable=node in self.differentiable), need)

    def _without_rule(self, node: fx.Node) -> Faults:
        """Only counts of rows and copies of constants may lack a rule."""
        for operand in operands(node):
            if operand in self.differentiable:
                yield node, f"{node.target} has no rule to say how its gradient is held"

    def _collective(self, node: fx.Node, name: str) -> Faults:
        row = COLLECTIVES[name]
        x = node.args[0]
        assert isinstance(x, fx.Node)
        axis = next(a for a in node.args if isinstance(a, str))
        if name == "exchange_counts":
            if self._kind(x, axis) != PARTIAL:
                yield node, "only counts by token can be exchanged"
            return
        if name in _ROUTES:
            source, target = map(Rows, _ROUTES[name])
            yield from self._converts(node, axis, source, target)
            return
        if row.lends_experts:
            yield from self._lends(node, x, axis)
            return
        source, target = self._kind(x, axis), self._kind(node, axis)
        for kind in (source, target):
            if isinstance(kind, Rows) and kind != Rows("token"):
                yield node, f"{name} works on rows by token, not on {kind}"
        for end, kind, wanted in (("takes", source, row.source), ("gives", target, row.target)):
            if wanted is not None and not isinstance(kind, wanted):
                yield node, f"{name} {end} {wanted.__name__.lower()}, got {kind}"
        sides = node.args[2:3] * 2
        if name == "all_to_all":  # joins what was split, and splits something else
            sides = node.args[4], node.args[2]
        for kind, dim in zip((source, target), sides, strict=False):
            if isinstance(kind, Shard) and kind.dim != dim:
                yield node, f"{name} acts on dimension {dim}, but the operand is {kind}"
        yield from self._others_unchanged(node, x, axis)

    def _lends(self, node: fx.Node, x: fx.Node, axis: str) -> Faults:
        """Experts go to places along an axis; where others have plans of their own, to as many.

        Along an axis that splits the hosts, each rank has places of its own for what all have.
        """
        hosts = node.args[1]
        assert isinstance(hosts, fx.Node)
        if not isinstance(self._kind(hosts, axis), Invariant):
            yield node, f"the ranks along {axis} must have one plan, not {self._kind(hosts, axis)}"
        before = self._said(x, axis)
        plans, after = (self._said(end, axis).expressed_in(before.view) for end in (hosts, node))
        if plans is None or after is None:
            yield node, f"{before.view} cannot say who has which experts"
            return
        for entry in before.view.axes:
            if entry.size == 1:
                continue
            have, need = before.kind(entry.name), after.kind(entry.name)
            if entry.name == axis:
                fits = have == need == Shard(0)
            elif plans.kind(entry.name) == Shard(0):
                fits = self._same(x, have, REPLICATE) and need == Shard(0)
            else:
                fits = isinstance(plans.kind(entry.name), Invariant) and have == need
            if not fits:
                yield node, f"experts cannot go from {have} to {need} along {entry.name} by {plans}"

    def _regroups(self, node: fx.Node) -> Faults:
        """Rows are sorted by expert along an axis, and by place where the table's places differ."""
        order = (Rows("arrival"), Rows("expert"))
        sorts = node.target is ops.group_rows.default
        source, target = order if sorts else reversed(order)
        x, table = node.args
        assert isinstance(x, fx.Node) and isinstance(table, fx.Node)
        placement = roles.placement(x if sorts else node)
        assert placement is not None
        pairs = zip(placement.view.axes, placement.kinds, strict=True)
        found = (axis.name for axis, kind in pairs if kind == Rows("arrival"))
        axis = next(found, placement.view.axes[-1].name)
        counted = self._said(table, axis)
        outer = [a.name for a in counted.view.axes if a.name != axis and a.size > 1]
        placed = {name for name in outer if isinstance(counted.kind(name), Shard)}
        yield from self._converts(node, axis, source, target, placed)
        for name in placed:
            by_token, by_place = (x, node) if sorts else (node, x)
            for end, kind in ((by_token, Rows("token")), (by_place, Rows("expert"))):
                if self._kind(end, name) != kind:
                    yield node, f"%{end.name} is {self._kind(end, name)} along {name}, not {kind}"

    def _converts(
        self, node: fx.Node, axis: str, source: Kind, target: Kind, also: Collection[str] = ()
    ) -> Faults:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if not self._same(x, self._kind(x, axis), source):
            yield node, f"%{x.name} is {self._kind(x, axis)} along {axis}, not {source}"
        if not self._same(node, self._kind(node, axis), target):
            yield node, f"the result is {self._kind(node, axis)} along {axis}, not {target}"
        yield from self._others_unchanged(node, x, axis, also)

    def _others_unchanged(
        self, node: fx.Node, x: fx.Node, axis: str, also: Collection[str] = ()
    ) -> Faults:
        """Along no axis but one, and those that change ``also``."""
        before, after = self._said(x, axis), self._said(node, axis)
        for other, a, b in zip(before.view.axes, before.kinds, after.kinds, strict=True):
            if other.name not in (axis, *also) and other.size > 1 and a != b:
                yield node, f"a change along {axis} also changed {other.name} from {a} to {b}"
        for placement in (before, after):
            if isinstance(placement.kind(axis), Shard) and own_blocks(placement, axis) is None:
                yield node, f"{axis} splits what an axis inside it still splits ({placement})"

    def _kind(self, node: fx.Node, axis: str) -> Kind:
        return self._said(node, axis).kind(axis)

    def _said(self, node: fx.Node, axis: str) -> Placement:
        placement = roles.placement(node)
        said = self.layout.said_along(placement, axis) if placement else None
        if said is None:
            raise CheckError(f"{roles.where(node)}: {placement} says nothing along {axis}")
        return said

    def _outputs(self, end: fx.Node) -> Faults:
        for position, node in enumerate(end.args[0]):  # type: ignore[arg-type]
            assert isinstance(node, fx.Node)
            placement = roles.placement(node)
            whole = position == self.program.signature.loss
            whole |= self.program.signature.outputs[position].buffer is not None
            for axis, kind in zip(placement.view.axes, placement.kinds, strict=True):  # type: ignore
                if axis.size == 1:
                    continue
                if kind == PARTIAL:
                    yield node, f"the output is a pending sum along {axis.name}"
                if (
                    whole
                    and not isinstance(kind, Invariant)
                    and not self._same(node, kind, INVARIANT)
                ):
                    yield node, f"the output must be invariant along {axis.name}, not {kind}"
