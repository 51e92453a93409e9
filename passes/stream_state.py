"""Keep the optimizer's state in the memory of the host, and bring it to the device in buckets."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, State, args_of, chain, written
from moptrace.errors import PassError
from moptrace.kernels.host_update import HostUpdate
from moptrace.passes.divide_updates import divide_updates
from moptrace.updates import PENDING

__all__ = ["stream_state"]

ops = torch.ops.moptrace

BUCKET = 2**26  # bytes of state
_WRITES = (ops.write_block.default,)


def stream_state(bucket: int = BUCKET, slots: int = 2, gradients: bool = False) -> Pass:
    """Keep the optimizer's state in the memory of the host, and bring it to the device in buckets.

    The state of parameters that are updated one after another, up to ``bucket`` bytes of it, comes
    and goes together; a parameter with more is updated part by part (``divide_updates``). While one
    bucket is updated, the next ``slots - 1`` are on their way to the device, and those before go
    back; no more than ``slots`` are there at once. With ``gradients``, those that wait for the next
    step (``defer_updates``) leave as backward produces them, and come back with the state. Counts
    of steps and learning rates stay where they are.

    Requires: ``apply_optimizer``. Ensures: the same operators on the same values. Raises PassError
    without a slot or a byte.
    Source: Mixture-of-Parallelisms (OffloadStreamAdamW).
    """
    if bucket < 1 or slots < 1:
        raise PassError(f"stream_state needs a byte and a slot at least, not {bucket=}, {slots=}")

    def rewrite(program: Program) -> Program:
        return _Stream(program, bucket, slots, gradients).program()

    options = (("bucket", bucket), ("slots", slots), ("gradients", gradients))
    stream = Pass("stream_state", rewrite, options, (Level.STEP,), needs=("apply_optimizer",))
    return chain(divide_updates(bucket, gradients), stream)


@dataclass(frozen=True)
class _Group:
    """What the update of a parameter, or of a part, reads on the host, and what reads it first."""

    held: tuple[fx.Node, ...]
    first: fx.Node

    @property
    def bytes(self) -> int:
        values = [roles.tensor(node) for node in self.held]
        return sum(x.numel() * x.element_size() for x in values)


def _is_on_host(node: fx.Node) -> bool:
    """Whether a value is made there, by an update that runs there."""
    source = node.all_input_nodes[0] if node.target is operator.getitem else node
    return isinstance(source.target, HostUpdate)


class _Stream:
    """The walk that writes the copies."""

    def __init__(self, program: Program, bucket: int, slots: int, gradients: bool):
        self.old, self.bucket, self.slots, self.gradients = program, bucket, slots, gradients
        self.graph, self.copies = program.copy_graph()

    def program(self) -> Program:
        states = [
            replace(s, host=s.host or self._moves(s.path, s.parameter, len(s.shape)))
            for s in self.old.signature.states
        ]
        self._leave_on_host([s.name for s in states if s.host])
        self._send_new()
        buckets = self._buckets(self._groups([s for s in states if s.host]))
        back: dict[fx.Node, fx.Node] = {}
        for number, own in enumerate(buckets):
            early = buckets[max(number - self.slots + 1, 0)][0].first
            for node in (node for group in own for node in group.held):
                device = {"device": roles.tensor(node).device}
                there = node
                if node.op != "placeholder":
                    there = self._copy(node, ops.block.default, node.args, {}, before=early)
                back[node] = self._copy(node, ops.prefetch.default, (there,), device, before=early)
        for group in (group for own in buckets for group in own):
            for node in group.held:
                users = [u for u in node.users if u.target not in (*_WRITES, ops.prefetch.default)]
                args = (back[node],)
                here = self._copy(node, ops.wait_prefetch.default, args, {}, before=group.first)
                for user in users:
                    user.replace_input_with(node, here)
                if not node.users and node.op != "placeholder":
                    self.graph.erase_node(node)
        signature = replace(self.old.signature, states=tuple(states))
        result = self.old.with_graph(self.graph, signature=signature)
        largest = max((group.bytes for own in buckets for group in own), default=0)
        if largest > self.bucket:
            result = result.with_note(
                f"the optimizer's state comes in buckets of {self.bucket:,} bytes, but one "
                f"parameter's has {largest:,}, and is not divided"
            )
        return result

    def _moves(self, path: str, parameter: str | None, dims: int) -> bool:
        """Whether an entry of the state is kept on the host."""
        waits = path.startswith(PENDING)
        return parameter is not None and dims > 0 and (self.gradients or not waits)

    def _send_new(self) -> None:
        """Every new entry goes to the host as soon as it is known."""
        end = self.graph.output_node()
        results = list(end.args[0])  # type: ignore[call-overload]
        for number, output in enumerate(self.old.signature.outputs):
            node = results[number]
            of = output.state_of
            moves = of is not None and self._moves(output.path, of, roles.tensor(node).dim())
            for write in written(node) if moves else ():
                old, part, starts = args_of(write)
                write.args = old, self._sent(part), starts
            if moves and not written(node):
                results[number] = self._sent(node)
        end.args = (tuple(results),)

    def _sent(self, new: fx.Node) -> fx.Node:
        if _is_on_host(new):
            return new
        return self._copy(new, ops.offload.default, (new,), {}, before=new.next)

    def _leave_on_host(self, names: Collection[str]) -> None:
        """Updates on the host find there what would be sent to them."""
        for node in self.graph.find_nodes(op="call_function", target=ops.offload.default):
            (sent,) = node.all_input_nodes
            if sent.name in names:
                node.replace_all_uses_with(sent)
                self.graph.erase_node(node)

    def _groups(self, states: Sequence[State]) -> list[_Group]:
        """In the order in which updates run."""
        place = {node: at for at, node in enumerate(self.graph.nodes)}
        inputs = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        held: dict[Any, list[fx.Node]] = defaultdict(list)
        for state in states:
            node = inputs[state.name]
            readers = [user for user in node.users if user.target not in _WRITES]
            is_divided = all(user.target is ops.block.default for user in readers)
            for x in readers if is_divided else [node]:
                starts = tuple(args_of(x)[1]) if is_divided else ()
                if not all(isinstance(user.target, HostUpdate) for user in x.users):
                    held[state.parameter, starts].append(x)
        groups = [
            _Group(tuple(own), min((u for x in own for u in x.users), key=place.__getitem__))
            for own in held.values()
        ]
        return sorted(groups, key=lambda group: place[group.first])

    def _buckets(self, groups: Sequence[_Group]) -> list[list[_Group]]:
        found: list[list[_Group]] = []
        room = 0
        for group in groups:
            if not found or group.bytes > room:
                found.append([])
                room = self.bucket
            found[-1].append(group)
            room -= group.bytes
        return found

    def _copy(self, of: fx.Node, target: Any, args: Any, kwargs: Any, before: fx.Node) -> fx.Node:
        """A node that copies a value, or waits for the copy."""
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, args, kwargs)
        roles.copy_role(made, of=of)
        roles.set_value(made, roles.value(of))
        return made
