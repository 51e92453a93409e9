"""Take every collective in which data travels apart: what starts it, and what waits for it."""

from __future__ import annotations

from torch import fx

from moptrace import roles
from moptrace.collectives import collective, start, wait
from moptrace.core import Level, Pass, Program

__all__ = ["start_and_wait"]


def start_and_wait() -> Pass:
    """Write each collective in which data travels as ``start`` and ``wait``, side by side.

    Nothing runs in between yet: ``overlap`` moves them apart. What is sent stays in memory until
    the wait, and what comes takes memory from the start on.

    Requires: a step. Ensures: the same operators on the same values, in the same order.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        for node in list(graph.nodes):
            row = collective(node.target)
            if row is not None and row.travels:
                _take_apart(node, row.name)
        return program.with_graph(graph)

    return Pass("start_and_wait", rewrite, takes=(Level.STEP,), gives=Level.SCHEDULED)


def _take_apart(node: fx.Node, name: str) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        started = graph.call_function(start, (name, *node.args), node.kwargs)
        waited = graph.call_function(wait, (started,))
    for made in (started, waited):
        roles.set_value(made, roles.value(node))
        roles.copy_role(made, of=node)
    node.replace_all_uses_with(waited)
    graph.erase_node(node)
