"""Run each update in backward, as soon as its gradient is final."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, copy_node
from moptrace.errors import PassError
from moptrace.roles import Component
from moptrace.updates import Updates

__all__ = ["update_early"]


def update_early() -> Pass:
    """Run each update in backward, as soon as its gradient is final; then that is free.

    Requires: ``apply_optimizer``, and gradients that are not clipped: a norm is known only after
    the last of them. Ensures: the same operators on the same values. Raises PassError where
    gradients are clipped.
    """

    def rewrite(program: Program) -> Program:
        updates = Updates(program)
        if any(roles.component(node) == Component.CLIPPING for node in updates.nodes):
            raise PassError(
                "update_early updates parameters before the last gradient is known, and clipping "
                "needs the norm of all of them. Leave the updates for the next step's forward "
                '(defer_updates; train_step(updates="forward")), or do not clip.'
            )
        place = {node: at for at, node in enumerate(program.nodes)}
        ready: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for update in updates.updates:
            taken = {x for node in update.nodes for x in node.all_input_nodes}
            ready[max(taken - updates.nodes, key=place.__getitem__)] += update.nodes
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in program.nodes:
            for each in (*(() if node in updates.nodes else (node,)), *ready[node]):
                copies[each] = copy_node(graph, each, copies.__getitem__)
        return program.with_graph(graph)

    return Pass("update_early", rewrite, takes=(Level.STEP,), needs=("apply_optimizer",))
