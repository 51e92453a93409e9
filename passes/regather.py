"""Gather parameters again in backward instead of keeping them from forward."""

from __future__ import annotations

from torch import fx

from moptrace import roles
from moptrace.collectives import collective
from moptrace.core import Level, Pass, Program, erase_dead

__all__ = ["regather"]


def regather(above: int = 0) -> Pass:
    """Let each backward gather the parameters that it needs, of more than ``above`` bytes, again.

    What forward gathered is then free after its last use in forward, at the price of one more
    ``all_gather`` (FSDP's resharding after forward). What is computed from parameters alone, such
    as the unpacking of a bucket or a transpose, is computed again with it.

    Requires: a step. Ensures: the same operators on the same values.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        _Regather(program, graph, above).run()
        erase_dead(graph)
        return program.with_graph(graph)

    return Pass("regather", rewrite, (("above", above),), (Level.STEP,), needs=("differentiate",))


class _Regather:
    """One walk over a graph; ``copies`` are the values that the present backward has made again."""

    def __init__(self, program: Program, graph: fx.Graph, above: int):
        self.graph = graph
        self.parameters = {p.name for p in program.signature.parameters}
        self.above = above
        self.made_of_gathers: dict[fx.Node, bool] = {}  # for all values made of parameters alone
        self.copies: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in self.parameters:
                self.made_of_gathers[node] = False
            if node.op != "call_function":
                continue
            if not roles.role(node).backward:
                self._note(node)
                if roles.component(node) not in _AFTER_BACKWARD:
                    self.copies.clear()  # the next micro-batch's forward
                continue
            for operand in node.all_input_nodes:
                if self.made_of_gathers.get(operand):
                    node.replace_input_with(operand, self._again(operand, node))

    def _note(self, node: fx.Node) -> None:
        """Is a forward value made of parameters alone, and was one of them gathered for it?"""
        if node.is_impure() or not node.all_input_nodes:
            return
        if all(x in self.made_of_gathers for x in node.all_input_nodes):
            row = collective(node.target)
            large = row is not None and row.name in _GATHERS and _bytes(node) > self.above
            inherited = any(self.made_of_gathers[x] for x in node.all_input_nodes)
            self.made_of_gathers[node] = large or inherited

    def _again(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """The same value computed once more, before ``user``."""
        if value.op == "placeholder":
            return value
        if value not in self.copies:
            with self.graph.inserting_before(user):
                made = self.graph.node_copy(value, lambda x: self._again(x, user))
            roles.set_role(made, backward=True)
            self.copies[value] = made
        return self.copies[value]


_GATHERS = ("all_gather", "all_gather_cast")
_AFTER_BACKWARD = (roles.Component.CLIPPING, roles.Component.OPTIMIZER)


def _bytes(node: fx.Node) -> int:
    value = roles.tensor(node)
    return value.numel() * value.element_size()
