"""Compute in backward again what a step would keep from forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from moptrace import roles
from moptrace.activations import rows_of_dispatch
from moptrace.collectives import collective
from moptrace.core import Level, Pass, Program, copy_node, erase_dead

__all__ = ["computed_again", "dispatched", "recompute", "regather"]

aten = torch.ops.aten


def recompute() -> Pass:
    """Let each backward compute the values of marked regions again (``Role.recompute``).

    What goes into a region is kept; its values are free after their last use in forward. Of a
    region, backward computes what it needs, just before it needs it.

    Requires: a step. Ensures: the same operators on the same values.
    """

    def rewrite(program: Program) -> Program:
        if not any(roles.role(node).recompute for node in program.nodes):
            return program
        return computed_again(program, lambda node: bool(roles.role(node).recompute))

    return Pass("recompute", rewrite, takes=(Level.STEP,), needs=("differentiate",))


def regather(above: int = 0) -> Pass:
    """Let each backward gather the parameters that it needs, of more than ``above`` bytes, again.

    What forward gathered is then free after its last use in forward, at the price of one more
    ``all_gather`` (FSDP's resharding after forward). What is computed from parameters alone, such
    as the unpacking of a bucket or a transpose, is computed again with it.

    Requires: a step. Ensures: the same operators on the same values.
    """

    def rewrite(program: Program) -> Program:
        names = {p.name for p in program.signature.parameters}
        outputs = zip(program.signature.outputs, program.outputs, strict=True)
        new = {node.name for output, node in outputs if output.updates in names}
        gathered: dict[fx.Node, bool] = {}  # for all values made of parameters alone

        def is_gathered(node: fx.Node) -> bool:
            """Is a forward value made of parameters alone, and was one of them gathered for it?"""
            if node.name in names or node.name in new:  # new: updated at the start of the step
                gathered[node] = False
            elif node.op != "call_function" or node.is_impure() or not node.all_input_nodes:
                return False
            elif all(x in gathered for x in _of_parameters(node)):
                row = collective(node.target)
                large = row is not None and row.name in _GATHERS and _bytes(node) > above
                gathered[node] = large or any(gathered[x] for x in node.all_input_nodes)
            return gathered.get(node, False)

        return computed_again(program, is_gathered)

    return Pass("regather", rewrite, (("above", above),), (Level.STEP,), needs=("differentiate",))


_GATHERS = ("all_gather", "all_gather_cast", "send_experts")
_AFTER_BACKWARD = (roles.Component.CLIPPING, roles.Component.OPTIMIZER)


def computed_again(program: Program, is_again: Callable[[fx.Node], bool]) -> Program:
    """Backward nodes take copies of some forward nodes; asked of every forward node, in order.

    Each backward has one copy of a node, just before the first node that needs it. Copies are in
    the order of the forward, so that collectives among them are on every rank. The rows of a
    dispatch are taken by the order that it decided in forward.
    """
    graph, _ = program.copy_graph()
    place = {node: at for at, node in enumerate(graph.nodes)}
    chosen: set[fx.Node] = set()
    copies: dict[fx.Node, fx.Node] = {}  # made by the present backward

    def again(value: fx.Node, user: fx.Node) -> fx.Node:
        missing: set[fx.Node] = set()
        left = [value]
        while left:
            node = left.pop()
            if node in chosen and node not in copies and node not in missing:
                missing.add(node)
                left += _needed_again(node)
        with graph.inserting_before(user):
            for node in sorted(missing, key=place.__getitem__):
                copies[node] = made = _copied(graph, node, copies)
                roles.set_role(made, backward=True, recompute="")
        return copies.get(value, value)

    for node in list(graph.nodes):
        if roles.role(node).backward:
            for operand in node.all_input_nodes:
                if operand in chosen:
                    node.replace_input_with(operand, again(operand, node))
            continue
        if is_again(node):
            chosen.add(node)
        if node.op == "call_function" and roles.component(node) not in _AFTER_BACKWARD:
            copies.clear()  # the next micro-batch's forward
    erase_dead(graph)
    return program.with_graph(graph)


def _of_parameters(node: fx.Node) -> list[fx.Node]:
    """The operands of which a value is made; who has which experts is decided once."""
    row = collective(node.target)
    return node.all_input_nodes[:1] if row and row.lends_experts else node.all_input_nodes


def _needed_again(node: fx.Node) -> list[fx.Node]:
    return [*dispatched(node)] if rows_of_dispatch(node) else node.all_input_nodes


def _copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    if not rows_of_dispatch(node):
        return copy_node(graph, node, lambda x: copies.get(x, x))
    tokens, experts, order = (copies.get(x, x) for x in dispatched(node))
    choices = roles.tensor(experts).shape[1]
    token = graph.call_function(aten.floor_divide.default, (order, choices))
    roles.copy_role(token, of=order, backward=True)
    roles.set_value(token, roles.value(order))
    rows = graph.call_function(aten.index_select.default, (tokens, 0, token))
    roles.copy_role(rows, of=node)
    roles.set_value(rows, roles.value(node))
    return rows


def dispatched(rows: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The tokens of a dispatch, the experts that they chose, and the order of its rows."""
    dispatch = rows.args[0]
    assert isinstance(dispatch, fx.Node)
    tokens, experts = dispatch.args[:2]
    order = next((x for x in dispatch.users if x.args == (dispatch, 2)), None)
    assert isinstance(tokens, fx.Node) and isinstance(experts, fx.Node) and order is not None
    return tokens, experts, order


def _bytes(node: fx.Node) -> int:
    value = roles.tensor(node)
    return value.numel() * value.element_size()
