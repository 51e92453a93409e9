"""Let the micro-batches of a step follow one another through the stages."""

from __future__ import annotations

import heapq
from typing import Any

from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, copy_node
from moptrace.errors import PassError
from moptrace.roles import Component
from moptrace.stages import Task, hop, in_order, share, stages_of

__all__ = ["pipeline"]


def pipeline() -> Pass:
    """Order a step's nodes as the stages take turns, and share what all of them return.

    Each stage does one forward and one backward in turn (``stages.in_order``). The loss and new
    values of buffers are shared; gradients stay with the stage that has the parameter. The order is
    one of all stages, so that what one of them takes has always left another one before: whoever
    follows it cannot wait for ever.

    Requires: ``differentiate``, of a program with stages. Ensures: the same operators on the same
    values.
    """

    def rewrite(program: Program) -> Program:
        if program.layout is None or program.layout.stages == 1:
            raise PassError("pipeline() orders the stages of a program, and this one has none")
        shared = _shared(program)
        order = _order(shared, program.layout.stages)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in order:
            copies[node] = copy_node(graph, node, copies.__getitem__)
        return shared.with_graph(graph)

    return Pass("pipeline", rewrite, takes=(Level.STEP,), needs=("differentiate",))


def _shared(program: Program) -> Program:
    """The program with everyone's copies of what all ranks return; a weight hops once."""
    graph, _ = program.copy_graph()
    known: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=hop):
        first = known.setdefault(node.args, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    stage = stages_of(program)
    end = graph.output_node()
    results: list[Any] = list(end.args[0])  # type: ignore[arg-type]
    for at, (output, node) in enumerate(
        zip(program.signature.outputs, program.outputs, strict=True)
    ):
        result, owner = results[at], stage[node]
        if output.gradient is None and owner is not None:
            with graph.inserting_before(end):
                made = graph.call_function(share, (result, owner))
            roles.set_value(made, roles.value(result))
            roles.copy_role(made, of=result, micro_batch=None)
            results[at] = made
    end.args = (tuple(results),)
    return program.with_graph(graph)


def _order(program: Program, stages: int) -> list[fx.Node]:
    """All nodes, each as soon as its turn has come and its operands are there."""
    stage = stages_of(program)
    micro_batches = 1 + max((roles.role(n).micro_batch or 0 for n in program.nodes), default=0)
    turn = {task: number for number, task in enumerate(in_order(stages, micro_batches))}
    ranks: dict[fx.Node, tuple[int, int]] = {}
    number, backward = -1, False  # of the micro-batch
    for place, node in enumerate(program.nodes):
        role = roles.role(node)
        if role.micro_batch is not None and role.micro_batch != number:
            number, backward = role.micro_batch, False
        backward = backward or (number >= 0 and role.backward)
        after = number >= 0 and (role.micro_batch is None or role.component in _LAST)
        if node.op == "output" or after:
            when = len(turn)
        elif number < 0:
            when = -1
        else:
            when = turn[Task(stage[node] or 0, number, backward)]
        ranks[node] = (when, place)
    return _sorted(program, ranks)


_LAST = (Component.CLIPPING, Component.OPTIMIZER)


def _sorted(program: Program, ranks: dict[fx.Node, tuple[int, int]]) -> list[fx.Node]:
    """The nodes in the order of their ranks, but none before its operands."""
    missing = {node: len(node.all_input_nodes) for node in program.nodes}
    ready = [(ranks[node], node) for node in program.nodes if not missing[node]]
    heapq.heapify(ready)
    found: list[fx.Node] = []
    while ready:
        _, node = heapq.heappop(ready)
        found.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, (ranks[user], user))
    # Graph inputs stay in the order of the signature, and the output comes last.
    given = [node for node in program.nodes if node.op == "placeholder"]
    return [*given, *(node for node in found if node.op != "placeholder")]
