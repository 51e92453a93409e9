"""Write forward and backward of the program that a rank runs as one flat graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from moptrace import roles, state
from moptrace.collectives import Communicator, collective
from moptrace.core import Level, Output, Pass, Program, Signature, ancestors, erase_dead
from moptrace.errors import StepError
from moptrace.joint import Recording, Tape, record, splice, wrap_draws
from moptrace.random import draw
from moptrace.roles import Role
from moptrace.trace import OutputIndex

__all__ = ["differentiate"]

aten = torch.ops.aten


def differentiate(
    trained: Sequence[str] | None = None,
    micro_batches: int = 1,
    *,
    rank: int = 0,
    device: torch.device | str = "cpu",
) -> Pass:
    """Add the backward: the graph returns the loss, new values of buffers, and gradients.

    ``trained`` names the parameters whose gradients are wanted; by default all that require
    gradients and that the loss depends on. With several ``micro_batches`` the graph takes the
    inputs of each, runs forward and backward of one after another, and adds up the gradients. The
    loss is then the mean over all their tokens: where a loss is divided by a number that the batch
    alone decides, such as that of the labels that count, all micro-batches' numbers are added
    first. Every other term, such as a load-balancing loss, is averaged over the micro-batches.
    Buffers go from one micro-batch to the next.

    The reductions of gradients are the transposes of the forward's collectives. Numbers of routed
    rows stay symbolic. Sizes are those of ``rank``: where all ranks' shards have equal sizes their
    graphs are the same.

    Requires: a local program. Ensures: the same loss and gradients as autograd through it. Raises
    StepError for a trained parameter that the loss does not depend on.
    """

    def rewrite(program: Program) -> Program:
        assert program.layout is not None
        signature = program.signature
        forward = _Forward(program, micro_batches, torch.device(device))
        wanted = [
            p
            for p in signature.parameters
            if p.requires_grad and (trained is None or p.fqn in trained)
        ]
        found: list[str] = []

        def run(tape: Tape, **values: Tensor) -> list[Tensor]:
            loss, gradients = forward.run(tape, values, [values[p.name] for p in wanted])
            unreached = [p.fqn for p, g in zip(wanted, gradients, strict=True) if g is None]
            if unreached and trained is not None:
                raise StepError(
                    f"the loss does not depend on {', '.join(unreached)}, so there is no gradient "
                    "to step with. Leave these parameters out of the optimizer, or freeze them "
                    "with requires_grad_(False) before parallelize."
                )
            found.extend(p.fqn for p, g in zip(wanted, gradients, strict=True) if g is not None)
            updated = [values[b.name] for b in forward.updated]
            return [loss, *updated, *(g for g in gradients if g is not None)]

        examples = _examples(program, rank, {p.name for p in wanted})
        totals = {_total(n): roles.tensor(n).to("meta") for n in forward.divisors}
        with Communicator(program.layout, rank):
            recording = record(run, {**examples, **totals}, program.constants, device)
            if micro_batches > 1:
                counts = record(forward.count, examples, program.constants, device)
                recording = _unrolled(forward, recording, counts)
        outputs = (
            Output("loss"),
            *(Output(b.fqn, buffer=b.fqn, updates=b.name) for b in forward.updated),
            *(Output(f"gradient of {name}", gradient=name) for name in found),
        )
        result = replace(
            program,
            graph=recording.graph,
            constants=recording.constants,
            signature=_joint_signature(signature, outputs, micro_batches),
        )
        _place_inputs(program, result, micro_batches)
        return result

    options = (("micro_batches", micro_batches),)
    return Pass("differentiate", rewrite, options, takes=(Level.LOCAL,), gives=Level.STEP)


# --- inputs and outputs ---------------------------------------------------------------------------


def _of_micro_batch(name: str, number: int, micro_batches: int) -> str:
    return name if micro_batches == 1 else f"{name}_of_{number}"


def _joint_signature(
    signature: Signature, outputs: tuple[Output, ...], micro_batches: int
) -> Signature:
    inputs = tuple(
        replace(
            entry,
            name=_of_micro_batch(entry.name, number, micro_batches),
            path=entry.path if micro_batches == 1 else f"{number}.{entry.path}",
        )
        for number in range(micro_batches)
        for entry in signature.inputs
    )
    _, alone = pytree.tree_flatten(0)
    return replace(
        signature,
        inputs=inputs,
        outputs=outputs,
        loss=0,
        outputs_spec=alone,
        results=(OutputIndex(0),),
    )


def _examples(program: Program, rank: int, trained: set[str]) -> dict[str, Tensor]:
    """A meta tensor of the rank's own shape for every input of one micro-batch's step."""
    layout, signature = program.layout, program.signature
    assert layout is not None
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}

    def own(entry: Any) -> Tensor:
        placement = roles.placement(nodes[entry.name])
        assert placement is not None, f"%{entry.name} is not placed"
        shape = state.own_shape(entry.shape, placement, layout, rank)
        wanted = entry.name in trained
        return torch.empty(shape, dtype=entry.dtype, device="meta", requires_grad=wanted)

    return {x.name: own(x) for x in (*signature.parameters, *signature.buffers, *signature.inputs)}


def _place_inputs(before: Program, after: Program, micro_batches: int) -> None:
    """The step's inputs are held as the local program's."""
    old = {node.name: node for node in before.graph.find_nodes(op="placeholder")}
    new = {node.name: node for node in after.graph.find_nodes(op="placeholder")}
    signature = before.signature
    for entry in (*signature.parameters, *signature.buffers):
        roles.copy_role(new[entry.name], of=old[entry.name])
    for number in range(micro_batches):
        for entry in signature.inputs:
            name = _of_micro_batch(entry.name, number, micro_batches)
            roles.copy_role(new[name], of=old[entry.name])


# --- micro-batches --------------------------------------------------------------------------------


def _total(count: fx.Node) -> str:
    """The name of the input that is a count's sum over the micro-batches."""
    return f"total_of_{count.name}"


def _unrolled(forward: _Forward, one: Recording, counts: Recording) -> Recording:
    """The step of all micro-batches, one after another, from that of ``one``.

    All of them compute the same on their own inputs, so it is recorded once and copied. ``counts``
    are the numbers by which one divides its losses.
    """
    signature, several = forward.signature, forward.micro_batches
    graph, constants = fx.Graph(), dict[str, Any]()
    known = {node.name: node for node in one.graph.find_nodes(op="placeholder")}

    def given(name: str, like: str) -> fx.Node:
        made = graph.placeholder(name)
        roles.set_value(made, roles.value(known[like]))
        return made

    held = {x.name: given(x.name, x.name) for x in (*signature.parameters, *signature.buffers)}
    inputs = [
        {x.name: given(_of_micro_batch(x.name, number, several), x.name) for x in signature.inputs}
        for number in range(several)
    ]
    totals: dict[str, fx.Node] = {}
    for own in inputs if forward.divisors else ():
        found = splice(graph, counts, held | own, constants)
        for divisor, count in zip(forward.divisors, found, strict=True):
            totals[_total(divisor)] = _added(graph, totals.get(_total(divisor)), count)
    loss: fx.Node | None = None
    gradients: list[fx.Node | None] = []
    for number, own in enumerate(inputs):
        first = graph._root.prev
        results = splice(graph, one, held | own | totals, constants)
        node = first.next
        while node.op != "root":
            roles.set_role(node, micro_batch=number)
            if node.target is draw:
                op, site, *rest = node.args
                node.args = (op, site + number * forward.sites, *rest)  # type: ignore[operator]
            node = node.next
        found, *results = results
        loss = _added(graph, loss, found)
        held |= {b.name: x for b, x in zip(forward.updated, results, strict=False)}
        results = results[len(forward.updated) :]
        pairs = zip(gradients or [None] * len(results), results, strict=True)
        gradients = [_added(graph, before, gradient) for before, gradient in pairs]
    graph.output((loss, *(held[b.name] for b in forward.updated), *gradients))
    erase_dead(graph)
    return Recording(graph, constants)


def _added(graph: fx.Graph, one: fx.Node | None, other: fx.Node) -> fx.Node:
    if one is None:
        return other
    total = graph.call_function(aten.add.Tensor, (one, other))
    roles.set_value(total, roles.value(other))
    roles.copy_role(total, of=other)
    return total


# --- running the local program --------------------------------------------------------------------


class _Forward:
    """Runs a local program's nodes on the traced tensors of one micro-batch of several."""

    def __init__(self, program: Program, micro_batches: int, device: torch.device):
        self.program, self.signature = program, program.signature
        self.micro_batches, self.device = micro_batches, device
        written = {o.buffer for o in self.signature.outputs if o.buffer}
        self.updated = [b for b in self.signature.buffers if b.fqn in written]
        self.sites = 1 + max((n.args[1] for n in program.nodes if n.target is draw), default=0)  # type: ignore[type-var]
        self.counts = _counts(program) if micro_batches > 1 else {}
        self.divisors = list(dict.fromkeys(self.counts.values()))

    def run(
        self, tape: Tape, values: dict[str, Tensor], wanted: list[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The loss and the gradients of ``wanted``; new values of buffers go into ``values``."""
        outputs = self._outputs(tape, values)
        tape.work_on(_of_backward(roles.role(self.program.loss)))
        loss = outputs[self.signature.loss]
        if self.micro_batches > 1:
            loss = loss / self.micro_batches
        found: Sequence[Tensor | None] = []
        if wanted:
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        names = {b.fqn: b.name for b in self.updated}
        for output, value in zip(self.signature.outputs, outputs, strict=True):
            if output.buffer is not None:
                values[names[output.buffer]] = value.detach()
        return loss.detach(), found

    def count(self, tape: Tape, **values: Tensor) -> list[Tensor]:
        """The numbers by which losses are divided."""
        needed = ancestors(self.divisors)
        run = _Run(self, values)
        for node in self.program.nodes:
            if node in needed:
                run.visit(tape, node)
        return [run.values[x] for x in self.divisors]

    def _outputs(self, tape: Tape, values: Mapping[str, Tensor]) -> list[Tensor]:
        run = _Run(self, values)
        for node in self.program.nodes:
            if node.op == "output":
                return [run.values[x] for x in self.program.outputs]
            if node in self.counts:  # by all micro-batches' number instead of its own
                x = run.values[node.args[0]] * self.micro_batches
                run.values[node] = torch.div(x, values[_total(self.counts[node])])
            else:
                run.visit(tape, node)
        raise AssertionError("the graph has no output")


class _Run:
    """The values of the local program's nodes in one micro-batch."""

    def __init__(self, forward: _Forward, given: Mapping[str, Tensor]):
        self.forward, self.given = forward, given
        self.values: dict[Any, Any] = {}
        self.rows: dict[tuple[Any, str], Any] = {}

    def visit(self, tape: Tape, node: fx.Node) -> None:
        role = roles.role(node)
        tape.work_on(role)
        if node.op in ("placeholder", "get_attr"):
            self.values[node] = self.given[str(node.target)]
        else:
            self.values[node] = result = self._call(tape, node)
            tape.follow(result, _of_backward(role))

    def _call(self, tape: Tape, node: fx.Node) -> Any:
        target: Any = node.target
        args: Any
        kwargs: Any
        args, kwargs = map_arg((node.args, node.kwargs), self.values.__getitem__)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.forward.device}
        if target is draw:
            op, site, axes, *args = args
            result = op(*args, **kwargs)
            wrap_draws(tape, site, axes, self.forward.sites * self.forward.micro_batches)
            return result
        if (row := collective(target)) is not None and row.moves_rows:
            return self._move_rows(node, row.name, str(row.transpose), args)
        return target(*args, **kwargs)

    def _move_rows(self, node: fx.Node, name: str, back: str, args: tuple[Any, ...]) -> Tensor:
        """As many rows come as were sent the other way, or as came before by the same table."""
        table = next(x for x in reversed(node.args) if isinstance(x, fx.Node))
        size = self.rows.get((table, name))
        result: Tensor = collective(node.target).op(*args, size)  # type: ignore[union-attr]
        self.rows[table, name] = result.shape[0]
        self.rows[table, back] = args[0].shape[0]
        return result


def _of_backward(role: Role) -> Role:
    return replace(role, backward=True, recompute="")


_DIVISIONS = (aten.div.Tensor, aten.true_divide.Tensor)


def _counts(program: Program) -> dict[fx.Node, fx.Node]:
    """Divisions by a number that the batch alone decides, each with that number."""
    given = {x.name for x in program.signature.inputs}
    alone: set[fx.Node] = set()  # nodes that depend on nothing but the batch
    found: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        if node.op == "placeholder" and node.name in given:
            alone.add(node)
        elif node.op == "call_function" and node.all_input_nodes:
            if all(x in alone or x.op == "get_attr" for x in node.all_input_nodes):
                alone.add(node)
            elif node.target in _DIVISIONS:
                count = node.args[1]
                if isinstance(count, fx.Node) and count in alone and not roles.tensor(count).dim():
                    found[node] = count
    return found
