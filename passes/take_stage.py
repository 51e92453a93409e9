"""Write what the ranks of one pipeline stage run."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, copy_node, erase_dead
from moptrace.errors import PassError
from moptrace.stages import hop, receive, received, send, share, shared, stages_of

__all__ = ["take_stage"]


def take_stage(stage: int) -> Pass:
    """Keep the nodes of one stage, and those of everyone that it needs.

    A value that hops away is sent as soon as it is there, and so is all that the other stage takes
    before it. One that comes is asked for a task (the forward or the backward of a micro-batch)
    before the one that takes it, so that it travels meanwhile. Parameters and gradients of other
    stages are gone; the batch and buffers are everyone's inputs.

    Requires: ``pipeline``. Ensures: what all stages' programs compute together is what the program
    computes. Raises PassError if there is no such stage.
    """

    def rewrite(program: Program) -> Program:
        assert program.layout is not None
        if not 0 <= stage < program.layout.stages:
            raise PassError(f"there is no stage {stage} among {program.layout.stages}")
        return _Taken(program, stage).apply()

    options = (("stage", stage),)
    return Pass("take_stage", rewrite, options, (Level.STEP,), needs=("pipeline",))


class _Taken:
    """The walk that copies the nodes of one stage."""

    def __init__(self, program: Program, stage: int):
        self.program, self.stage = program, stage
        self.of = stages_of(program)
        self.numbers = {
            node: number for number, node in enumerate(n for n in program.nodes if n.target is hop)
        }
        self.leaving: dict[Any, deque[fx.Node]] = defaultdict(deque)  # by where they go, in order
        for node in self.numbers:
            if node.args[1] == stage:
                self.leaving[node.args[2]].append(node)
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.asked: dict[fx.Node, fx.Node] = {}

    def apply(self) -> Program:
        signature = self.program.signature
        parameters = tuple(p for p in signature.parameters if p.stage == self.stage)
        own = {p.fqn for p in parameters}
        kept = [
            (output, node)
            for output, node in zip(signature.outputs, self.program.outputs, strict=True)
            if output.gradient is None or output.gradient in own
        ]
        given, *tasks = self._tasks()
        for node in given:
            self.copies[node] = copy_node(self.graph, node)
        self._send()
        for task, following in zip_longest(tasks, tasks[1:], fillvalue=[]):
            for coming in following:
                if coming.target is hop and coming not in self.asked:
                    self._ask(coming)
            for node in task:
                self._write(node)
                self._send()
        self.graph.output(tuple(self.copies[node] for _, node in kept))
        erase_dead(self.graph)
        signature = replace(
            signature, parameters=parameters, outputs=tuple(output for output, _ in kept)
        )
        return self.program.with_graph(self.graph, signature=signature, stage=self.stage)

    def _tasks(self) -> list[list[fx.Node]]:
        """The stage's inputs, then its other nodes in runs of one micro-batch and direction."""
        found: list[list[fx.Node]] = [[]]
        turned: set[int | None] = set()  # micro-batches whose backward has begun
        last: Any = None
        buffers = {b.name for b in self.program.signature.buffers}  # which everyone holds
        for node in self.program.nodes:
            is_own = self.of[node] in (None, self.stage) or node.name in buffers
            if node.op == "output" or not is_own:
                continue
            role = roles.role(node)
            if role.backward:
                turned.add(role.micro_batch)
            key = (role.micro_batch, role.micro_batch in turned)
            if node.op != "placeholder" and key != last:
                found.append([])
                last = key
            found[-1].append(node)
        return found

    def _ask(self, node: fx.Node) -> None:
        value = roles.tensor(node)
        args = (list(value.shape), value.dtype, node.args[1], self.numbers[node])
        self.asked[node] = self._made(receive, args, node, {"device": value.device})

    def _write(self, node: fx.Node) -> None:
        if node.target is hop:
            if node not in self.asked:
                self._ask(node)
            self.copies[node] = self._made(received, (self.asked[node],), node)
        elif node.target is share:
            value, source = roles.tensor(node), node.args[1]
            x = self.copies[node.all_input_nodes[0]] if source == self.stage else None
            args = (x, list(value.shape), value.dtype, source)
            self.copies[node] = self._made(shared, args, node, {"device": value.device})
        else:
            self.copies[node] = copy_node(self.graph, node, self.copies.__getitem__)

    def _send(self) -> None:
        """Send what is there, to each stage in the order in which that takes it."""
        for target, hops in self.leaving.items():
            while hops and (x := hops[0].all_input_nodes[0]) in self.copies:
                away = hops.popleft()
                args = (self.copies[x], target, self.numbers[away])
                roles.set_value(self._made(send, args, away), None)

    def _made(
        self,
        target: Any,
        args: Sequence[Any],
        like: fx.Node,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        made = self.graph.call_function(target, tuple(args), kwargs)
        roles.set_value(made, roles.value(like))
        roles.copy_role(made, of=like)
        return made
