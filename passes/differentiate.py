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
from moptrace.core import Level, Output, Pass, Program, Signature, ancestors
from moptrace.errors import StepError
from moptrace.joint import Tape, record, wrap_draws
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
            losses, gradients = forward.run(tape, values, [values[p.name] for p in wanted])
            unreached = [p.fqn for p, g in zip(wanted, gradients, strict=True) if g is None]
            if unreached and trained is not None:
                raise StepError(
                    f"the loss does not depend on {', '.join(unreached)}, so there is no gradient "
                    "to step with. Leave these parameters out of the optimizer, or freeze them "
                    "with requires_grad_(False) before parallelize."
                )
            found.extend(p.fqn for p, g in zip(wanted, gradients, strict=True) if g is not None)
            updated = [values[b.name] for b in forward.updated]
            return [losses, *updated, *(g for g in gradients if g is not None)]

        examples = _examples(program, micro_batches, rank, {p.name for p in wanted})
        with Communicator(program.layout, rank):
            recording = record(run, examples, program.constants, device)
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


def _examples(
    program: Program, micro_batches: int, rank: int, trained: set[str]
) -> dict[str, Tensor]:
    """A meta tensor of the rank's own shape for every input of the step."""
    layout, signature = program.layout, program.signature
    assert layout is not None
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}

    def own(entry: Any) -> Tensor:
        placement = roles.placement(nodes[entry.name])
        assert placement is not None, f"%{entry.name} is not placed"
        shape = state.own_shape(entry.shape, placement, layout, rank)
        wanted = entry.name in trained
        return torch.empty(shape, dtype=entry.dtype, device="meta", requires_grad=wanted)

    held = {x.name: own(x) for x in (*signature.parameters, *signature.buffers)}
    for number in range(micro_batches):
        for entry in signature.inputs:
            held[_of_micro_batch(entry.name, number, micro_batches)] = own(entry)
    return held


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


# --- running the local program --------------------------------------------------------------------


class _Forward:
    """Runs a local program's nodes on traced tensors, micro-batch by micro-batch."""

    def __init__(self, program: Program, micro_batches: int, device: torch.device):
        self.program, self.signature = program, program.signature
        self.micro_batches, self.device = micro_batches, device
        written = {o.buffer for o in self.signature.outputs if o.buffer}
        self.updated = [b for b in self.signature.buffers if b.fqn in written]
        self.sites = 1 + max((n.args[1] for n in program.nodes if n.target is draw), default=0)  # type: ignore[type-var]
        self.counts = _counts(program) if micro_batches > 1 else {}

    def run(
        self, tape: Tape, values: dict[str, Tensor], wanted: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and the gradients of ``wanted``; new values of buffers go into ``values``."""
        totals = self._totals(tape, values)
        losses: list[Tensor] = []
        sums: list[Tensor | None] = [None] * len(wanted)
        for number in range(self.micro_batches):
            outputs = self._outputs(tape, values, number, totals)
            last = replace(roles.role(self.program.loss), micro_batch=number)
            tape.work_on(_of_backward(last))
            loss = outputs[self.signature.loss]
            if self.micro_batches > 1:
                loss = loss / self.micro_batches
            losses.append(loss.detach())
            if wanted:
                found = torch.autograd.grad(loss, wanted, allow_unused=True)
                sums = [_added(a, b) for a, b in zip(sums, found, strict=True)]
            self._update_buffers(values, outputs)
        return sum(losses[1:], losses[0]), sums

    def _update_buffers(self, values: dict[str, Tensor], outputs: Sequence[Tensor]) -> None:
        names = {b.fqn: b.name for b in self.updated}
        for output, value in zip(self.signature.outputs, outputs, strict=True):
            if output.buffer is not None:
                values[names[output.buffer]] = value.detach()

    def _outputs(
        self,
        tape: Tape,
        values: Mapping[str, Tensor],
        number: int,
        totals: Mapping[fx.Node, Tensor],
    ) -> list[Tensor]:
        run = _Run(self, values, number)
        for node in self.program.nodes:
            if node.op == "output":
                return [run.values[x] for x in self.program.outputs]
            if node in self.counts:
                x = run.values[node.args[0]] * self.micro_batches
                run.values[node] = torch.div(x, totals[self.counts[node]])
            else:
                run.visit(tape, node, replace(roles.role(node), micro_batch=number))
        raise AssertionError("the graph has no output")

    def _totals(self, tape: Tape, values: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        """The numbers by which losses are divided, added up over the micro-batches."""
        totals: dict[fx.Node, Tensor] = {}
        needed = ancestors(self.counts.values())
        for number in range(self.micro_batches if needed else 0):
            run = _Run(self, values, number)
            for node in self.program.nodes:
                if node in needed:
                    run.visit(tape, node, roles.role(node))
            for count in dict.fromkeys(self.counts.values()):
                own = run.values[count]
                totals[count] = totals[count] + own if count in totals else own
        return totals


class _Run:
    """The values of the local program's nodes in one micro-batch."""

    def __init__(self, forward: _Forward, given: Mapping[str, Tensor], number: int):
        self.forward, self.given, self.number = forward, given, number
        self.inputs = {x.name for x in forward.signature.inputs}
        self.values: dict[Any, Any] = {}
        self.rows: dict[tuple[Any, str], Any] = {}

    def visit(self, tape: Tape, node: fx.Node, role: Role) -> None:
        tape.work_on(role)
        if node.op == "placeholder":
            name = node.name
            if name in self.inputs:
                name = _of_micro_batch(name, self.number, self.forward.micro_batches)
            self.values[node] = self.given[name]
        elif node.op == "get_attr":
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
            sites, several = self.forward.sites, self.forward.micro_batches
            wrap_draws(tape, site + self.number * sites, axes, sites * several)
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


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


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
