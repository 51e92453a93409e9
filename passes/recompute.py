"""Compute in backward again what a step would keep from forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from moptrace import roles
from moptrace.collectives import collective
from moptrace.core import Level, Pass, Program, erase_dead

__all__ = ["recompute", "regather"]


def recompute() -> Pass:
    """Let each backward compute the values of marked regions again (``Role.recompute``).

    What goes into a region is kept; its values are free after their last use in forward. Of a
    region, backward computes what it needs, just before it needs it.

    Requires: a step. Ensures: the same operators on the same values.
    """

    def rewrite(program: Program) -> Program:
        if not any(roles.role(node).recompute for node in program.nodes):
            return program
        return _made_again(program, lambda node: bool(roles.role(node).recompute))

    return Pass("recompute", rewrite, takes=(Level.STEP,), needs=("differentiate",))


def regather(above: int = 0) -> Pass:
    """Let each backward gather the parameters that it needs, of more than ``above`` bytes, again.

    What forward gathered is then free after its last use in forward, at the price of one more
    ``all_gather`` (FSDP's resharding after forward). What is computed from parameters alone, such
    as the unpacking of a bucket or a transpose, is computed again with it.

    Requires: a step. Ensures: the same operators on the same values.
    """

    def rewrite(program: Program) -> Program:
        parameters = {p.name for p in program.signature.parameters}
        gathered: dict[fx.Node, bool] = {}  # for all values made of parameters alone

        def is_gathered(node: fx.Node) -> bool:
            """Is a forward value made of parameters alone, and was one of them gathered for it?"""
            if node.op == "placeholder" and node.name in parameters:
                gathered[node] = False
            elif node.op != "call_function" or node.is_impure() or not node.all_input_nodes:
                return False
            elif all(x in gathered for x in node.all_input_nodes):
                row = collective(node.target)
                large = row is not None and row.name in _GATHERS and _bytes(node) > above
                gathered[node] = large or any(gathered[x] for x in node.all_input_nodes)
            return gathered.get(node, False)

        return _made_again(program, is_gathered)

    return Pass("regather", rewrite, (("above", above),), (Level.STEP,), needs=("differentiate",))


_GATHERS = ("all_gather", "all_gather_cast")
_AFTER_BACKWARD = (roles.Component.CLIPPING, roles.Component.OPTIMIZER)


def _made_again(program: Program, is_again: Callable[[fx.Node], bool]) -> Program:
    """Backward nodes take copies of some forward nodes; asked of every forward node, in order."""
    graph, _ = program.copy_graph()
    chosen: set[fx.Node] = set()
    copies: dict[fx.Node, fx.Node] = {}  # made by the present backward

    def again(value: fx.Node, user: fx.Node) -> fx.Node:
        if value not in chosen:
            return value
        if value not in copies:
            with graph.inserting_before(user):
                made = graph.node_copy(value, lambda x: again(x, user))
            roles.set_role(made, backward=True, recompute="")
            copies[value] = made
        return copies[value]

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


def _bytes(node: fx.Node) -> int:
    value = roles.tensor(node)
    return value.numel() * value.element_size()
