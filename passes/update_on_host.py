"""Run updates in the memory of the host, where the optimizer's state is."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from moptrace import roles
from moptrace.activations import communicates
from moptrace.core import (
    Level,
    Output,
    Pass,
    Program,
    State,
    ancestors,
    args_of,
    chain,
    erase_dead,
    identity,
    written,
)
from moptrace.costs import Machine, operator_costs
from moptrace.errors import PassError
from moptrace.kernels.host_update import HostUpdate
from moptrace.kernels.matrix_function import MatrixFunction
from moptrace.passes.divide_updates import divide_updates
from moptrace.passes.stream_state import stream_state
from moptrace.roles import Component
from moptrace.timeline import predict
from moptrace.updates import PENDING, Update, Updates, in_parts, makes_state

__all__ = ["update_on_host"]

ops = torch.ops.moptrace

BUCKET = 2**26  # bytes of state


def update_on_host(
    choose: bool = False,
    bucket: int = BUCKET,
    slots: int = 2,
    machine: Machine | None = None,
    then: Pass | None = None,
) -> Pass:
    """Run updates in the memory of the host, where the optimizer's state is.

    What an update takes from the device, the gradient and the parameter, goes to the host as soon
    as it is final. There the optimizer's own operators run, in a thread of their own, and write
    over the state. The new parameter comes back just before it is used, or at the end of the step;
    no more than ``slots`` buckets of parameters, with up to ``bucket`` bytes of state each, are on
    their way at once. Counts of steps stay where they are.

    With ``choose``, each bucket is updated where the step waits less for it, on the assumed
    ``machine``: on the device, to which its state comes and from which it goes (``stream_state``),
    or on the host. Where neither is waited for, it is the device. All on one of them is tried, too,
    and of the three steps the one that is predicted to be the shortest, after ``then``, is taken;
    that is the schedule that follows.

    What needs whole matrices, or other ranks, is updated on the device, with a note.

    Requires: ``apply_optimizer``, and ``stream_state`` afterwards for what stays on the device.
    Ensures: the same operators on the same values. Raises PassError without a slot or a byte.
    Source: ZeRO-Offload; Deep Optimizer States (which divides updates between both).
    """
    if bucket < 1 or slots < 1:
        raise PassError(f"update_on_host needs a byte and a slot at least, not {bucket=}, {slots=}")

    def rewrite(program: Program) -> Program:
        if makes_state(program):
            return program

        def moved(chosen: Callable[[_Buckets], _Buckets]) -> Program:
            return _ToHost(program, bucket, slots, chosen).program()

        if not choose:
            return moved(lambda buckets: buckets)
        assumed = machine or Machine()
        ways = (lambda _: [], _Choice(program, assumed, slots).of, lambda buckets: buckets)
        scheduled = chain(stream_state(bucket, slots), then or identity())
        return min(map(moved, ways), key=lambda way: predict(scheduled(way), assumed).seconds)

    options = (("choose", choose), ("bucket", bucket), ("slots", slots))
    move = Pass("update_on_host", rewrite, options, (Level.STEP,), needs=("apply_optimizer",))
    return chain(divide_updates(bucket), move)


@dataclass(frozen=True)
class _Task:
    """The update of one parameter, or of a part of it, which may run on the host."""

    parameter: fx.Node
    held: tuple[fx.Node, ...]  # its state that is on the host
    given: tuple[fx.Node, ...]  # what comes from elsewhere: a gradient, and numbers
    nodes: tuple[fx.Node, ...]  # what leads to the results
    results: tuple[tuple[Output, fx.Node], ...]  # the new parameter, then its new state
    counts: tuple[fx.Node, ...]  # what leads to new counts of steps
    first: fx.Node | None  # what reads the new parameter first in the rest of the step
    write: fx.Node | None  # what writes a part of the parameter

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return (self.parameter, *self.held, *self.given)

    @property
    def new(self) -> fx.Node:
        return self.results[0][1]


def _counts(update: Update, pairs: Iterable[tuple[Output, fx.Node]]) -> tuple[fx.Node, ...]:
    """What leads from old counts of steps to new ones, if that is all it takes."""
    needed = ancestors(node for _, node in pairs if not roles.tensor(node).dim())
    found = tuple(node for node in update.nodes if node in needed)
    taken = (x for node in found for x in node.all_input_nodes if x not in found)
    return found if all(x.op != "call_function" for x in taken) else ()


_Buckets: TypeAlias = list[list[_Task]]


def _whole(x: fx.Node) -> fx.Node:
    """The tensor of which an operand is a part, or all."""
    return args_of(x)[0] if x.target is ops.block.default else x


class _ToHost:
    """The walk that moves updates."""

    def __init__(
        self,
        program: Program,
        bucket: int,
        slots: int,
        chosen: Callable[[_Buckets], _Buckets],
    ):
        self.old, self.slots = program, slots
        self.place = {node: at for at, node in enumerate(program.nodes)}
        inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        self.parameters = {p.fqn: inputs[p.name] for p in program.signature.parameters}
        self.states = {
            inputs[s.name]: s
            for s in program.signature.states
            if s.parameter is not None and not s.path.startswith(PENDING)
        }
        updates = Updates(program)
        found = {u.fqn: list(self._tasks(u, updates.outputs[u.fqn])) for u in updates.updates}
        self.stay = [fqn for fqn, tasks in found.items() if not tasks]
        end = program.graph.output_node()
        order = {
            task: (self.place[task.first or end], self.place[task.new])
            for tasks in found.values()
            for task in tasks
        }
        tasks = sorted(order, key=order.__getitem__)
        self.buckets = chosen(_in_buckets(tasks, bucket))
        self.graph, self.copies = program.copy_graph()
        moving = {node for tasks in self.buckets for task in tasks for node in task.counts}
        stays = (node for node in program.nodes if node not in moving)
        first = next(node for node in stays if node.op not in ("placeholder", "get_attr"))
        self.first = self.copies[first]  # what inputs alone make is put before it
        self.sent: dict[fx.Node, fx.Node] = {}
        self.behind: dict[fx.Node, fx.Node] = {}  # the last node that was put behind another
        self.functions: dict[object, HostUpdate] = {}
        self.counted: set[fx.Node] = set()

    def _tasks(self, update: Update, pairs: Sequence[tuple[Output, fx.Node]]) -> Iterator[_Task]:
        """Of every part; none for an update that stays on the device."""
        if any(communicates(x) or isinstance(x.target, MatrixFunction) for x in update.nodes):
            return
        whole = self.parameters[update.fqn]
        pairs = sorted(pairs, key=lambda pair: pair[0].updates != whole.name)
        final = pairs[0][1]
        readers = [x for x in final.users if x not in update.nodes and x.op != "output"]
        first = min(readers, key=self.place.__getitem__, default=None)
        counts = _counts(update, pairs)
        writes = written(final)
        for results, write in zip(in_parts(pairs), writes or [None], strict=True):
            needed = ancestors(node for _, node in results)
            parts = (x for x in update.nodes if x in needed and x.target is not ops.block.default)
            nodes = tuple(parts)
            taken = dict.fromkeys(x for node in nodes for x in node.all_input_nodes)
            taken = [x for x in taken if x not in nodes and x.op != "get_attr"]
            held = tuple(x for x in taken if _whole(x) in self.states and roles.tensor(x).dim())
            own = [x for x in taken if _whole(x) is whole]
            if not held or len(own) != 1:
                return
            given = tuple(x for x in taken if x not in (*own, *held))
            before = write if write is not None and first else first
            yield _Task(own[0], held, given, nodes, tuple(results), counts, before, write)

    def program(self) -> Program:
        waits: list[fx.Node] = []  # of every bucket, before what reads it first
        for number, tasks in enumerate(self.buckets):
            starts = [self._start(task) for task in tasks]
            before = [self._reader(task) for task in tasks]
            early = (waits[max(number - self.slots + 1, 0) :] or [self._reader(*tasks)])[0]
            comes = [self._fetch(*pair, early) for pair in zip(tasks, starts, strict=True)]
            came = [self._wait(*three) for three in zip(tasks, comes, before, strict=True)]
            waits.append(came[0])
        erase_dead(self.graph)
        moved = {_whole(x).name for tasks in self.buckets for task in tasks for x in task.held}
        signature = self.old.signature
        states = tuple(replace(s, host=s.host or s.name in moved) for s in signature.states)
        result = self.old.with_graph(self.graph, signature=replace(signature, states=states))
        if self.stay:
            names = f"{', '.join(self.stay[:3])}{' and others' if self.stay[3:] else ''}"
            result = result.with_note(
                f"{names} are updated on the device: without state there is nothing on the host, "
                "and what needs whole matrices needs other ranks"
            )
        return result

    def _start(self, task: _Task) -> fx.Node:
        """Send what the update takes, and start it; returns the new parameter, on the host."""
        place = self.place.__getitem__
        sources = [_whole(x) for x in task.given]
        latest = max(sources, key=place, default=task.parameter)
        large = [x for x in sources if roles.tensor(x).dim()]
        gradient = max(large, key=place, default=latest)
        wholes = [self._send(x, behind=x) for x in sources]
        pairs = zip(task.given, wholes, strict=True)
        given = [self._at_hand(x, whole, latest) for x, whole in pairs]
        sent = self._send(_whole(task.parameter), behind=gradient)
        parameter = self._at_hand(task.parameter, sent, latest)
        held = [self._at_hand(x, self.copies[_whole(x)], latest) for x in task.held]
        started = self._put(self._function(task), (parameter, *held, *given), latest)
        roles.set_value(started, tuple(roles.value(node) for _, node in task.results))
        self._count(task, latest)
        picks: list[fx.Node] = []
        for number, (_, node) in enumerate(task.results):
            picks.append(self._put(operator.getitem, (started, number), latest))
            roles.copy_role(picks[-1], of=node)
            roles.set_value(picks[-1], roles.value(node))
            if number:
                self.copies[node].replace_all_uses_with(picks[-1])
        return picks[0]

    def _count(self, task: _Task, behind: fx.Node) -> None:
        """Count the step with the state, so that both are known where a step fails later on."""
        for node in (x for x in task.counts if x not in self.counted):
            self.counted.add(node)
            if behind.op == "placeholder":
                self.first.prepend(self.copies[node])
            else:
                self.behind[behind].append(self.copies[node])
                self.behind[behind] = self.copies[node]

    def _at_hand(self, x: fx.Node, whole: fx.Node, behind: fx.Node) -> fx.Node:
        """What is taken of a tensor on the host: all of it, or a part."""
        if x.target is not ops.block.default:
            return whole
        _, starts, sizes = x.args
        part = self._put(ops.block.default, (whole, starts, sizes), behind)
        roles.set_value(part, roles.value(x))
        return part

    def _send(self, x: fx.Node, behind: fx.Node) -> fx.Node:
        """What the host takes of the device, or of numbers that are written elsewhere."""
        if x not in self.sent:
            self.sent[x] = self._put(ops.offload.default, (self.copies[x],), behind)
            roles.set_value(self.sent[x], roles.value(x))
        return self.sent[x]

    def _put(self, target: Any, args: tuple[Any, ...], behind: fx.Node) -> fx.Node:
        """A new node right after what is known with another, and after what was put there."""
        if behind.op == "placeholder":
            at = self.graph.inserting_before(self.first)
        else:
            at = self.graph.inserting_after(self.behind.get(behind, self.copies[behind]))
        with at:
            made = self.graph.call_function(target, args)
        self.behind[behind] = made
        roles.copy_role(made, of=behind, component=Component.OPTIMIZER)
        return made

    def _reader(self, *tasks: _Task) -> fx.Node:
        """The first node that reads a new parameter of these."""
        readers = [task.first for task in tasks if task.first]
        end = self.old.graph.output_node()
        return self.copies[min(readers, key=self.place.__getitem__, default=end)]

    def _fetch(self, task: _Task, new: fx.Node, before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            device = roles.tensor(task.new).device
            made = self.graph.call_function(ops.prefetch.default, (new,), {"device": device})
        return _like(made, task.new)

    def _wait(self, task: _Task, fetched: fx.Node, before: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            made = self.graph.call_function(ops.wait_prefetch.default, (fetched,))
        self.copies[task.new].replace_all_uses_with(made)
        if task.write is not None and not task.first:
            self._write_last(task, made)
        return _like(made, task.new)

    def _write_last(self, task: _Task, after: fx.Node) -> None:
        """Write a part, which only the end of the step needs, after all others."""
        assert task.write is not None
        write, end = self.copies[task.write], self.graph.output_node()
        before, part, starts = args_of(write)
        write.replace_all_uses_with(before)
        results = list(args_of(end)[0])
        number = self.old.signature.outputs.index(task.results[0][0])
        write.args = results[number], part, starts
        results[number] = write
        end.args = (tuple(results),)
        after.append(write)

    def _function(self, task: _Task) -> HostUpdate:
        """The update as an operator; those of the same operators on the same shapes are one."""
        body = self._body(task)
        inputs = body.graph.find_nodes(op="placeholder")
        values = [roles.tensor(node) for node in inputs]
        key = str(body.graph), tuple((tuple(x.shape), x.dtype) for x in values)
        if key not in self.functions:
            self.functions[key] = HostUpdate(f"update_{len(self.functions)}", body)
        return self.functions[key]

    def _body(self, task: _Task) -> Program:
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        names = {task.parameter: "parameter"}
        keys = {x: self.states[_whole(x)].path.split(".")[-1] for x in task.held}
        names |= {x: re.sub(r"\W", "_", key) for x, key in keys.items()}
        states: list[State] = []
        for x in task.operands:
            new[x] = graph.placeholder(names.get(x, "given"))
            new[x].target = new[x].name
            value = roles.tensor(x)
            states.append(State(new[x].name, new[x].name, tuple(value.shape), value.dtype))
        for node in task.nodes:
            for x in node.all_input_nodes:
                if x.op == "get_attr" and x not in new:
                    new[x] = graph.get_attr(str(x.target))
            args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
            new[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        for old, made in new.items():
            roles.copy_role(made, of=old)
            roles.set_value(made, roles.value(old))
        replaced = {_whole(x).name: new[x].name for x in (task.parameter, *task.held)}
        outputs = tuple(
            Output(replaced[o.updates or ""], updates=replaced[o.updates or ""])
            for o, _ in task.results
        )
        graph.output(tuple(new[node] for _, node in task.results))
        signature = replace(
            self.old.signature,
            parameters=(),
            buffers=(),
            states=tuple(states),
            inputs=(),
            outputs=outputs,
            loss=-1,
        )
        kept = {str(x.target) for x in graph.find_nodes(op="get_attr")}
        constants = {name: x for name, x in self.old.constants.items() if name in kept}
        return self.old.with_graph(graph, signature=signature, constants=constants, notes=())


def _in_buckets(tasks: Iterable[_Task], bucket: int) -> _Buckets:
    """Neighbours with up to so many bytes of state together."""
    found: _Buckets = []
    room = 0
    for task in tasks:
        size = _bytes(task.held)
        if not found or size > room:
            found.append([])
            room = bucket
        found[-1].append(task)
        room -= size
    return found


def _bytes(nodes: Iterable[fx.Node]) -> int:
    values = [roles.tensor(node) for node in nodes]
    return sum(x.numel() * x.element_size() for x in values)


def _like(made: fx.Node, of: fx.Node) -> fx.Node:
    roles.copy_role(made, of=of)
    roles.set_value(made, roles.value(of))
    return made


def _by_parameter(buckets: _Buckets) -> list[_Buckets]:
    """Buckets with parts of one parameter are one choice."""
    found: list[_Buckets] = []
    for own in buckets:
        if found and _whole(found[-1][-1][-1].parameter) is _whole(own[0].parameter):
            found[-1].append(own)
        else:
            found.append([own])
    return found


class _Choice:
    """Bucket by bucket, whether the step waits less if the host updates it.

    Four things are busy beside the step's operators: both ways between host and device, the host,
    and the slots. When a bucket's gradients are there, and when its parameters are needed, is known
    from the step without any of it.
    """

    def __init__(self, program: Program, machine: Machine, slots: int):
        self.machine, self.slots = machine, slots
        self.times = _times(program, machine)
        self.costs = operator_costs(program, machine)
        self.end = self.times[program.graph.output_node()]
        # Until when each is busy; gradients leave when they are there, before state goes back.
        self.up = self.sent = self.down = self.host = 0.0
        self.left: list[float] = []  # when each bucket that came to the device had left it

    def of(self, buckets: _Buckets) -> _Buckets:
        """Those that the host updates; of a parameter all parts or none."""
        found: _Buckets = []
        for together in _by_parameter(buckets):
            tasks = [task for own in together for task in own]
            found += together if self._host_is_better(tasks) else []
        return found

    def _host_is_better(self, tasks: Sequence[_Task]) -> bool:
        machine = self.machine
        given = [x for task in tasks for x in task.given]
        large = [x for x in given if roles.tensor(x).dim()]
        known = max((self.times[x] for x in large), default=0.0)
        ready = max((self.times[x] for x in given), default=0.0)
        needed = min((self.times[task.first] for task in tasks if task.first), default=self.end)
        state = _bytes(x for task in tasks for x in task.held) / machine.host
        new = _bytes(task.new for task in tasks) / machine.host
        leaves = new + _bytes(large) / machine.host
        work = sum(self.costs[x] for task in tasks for x in task.nodes)

        free = self.left[-self.slots] if len(self.left) >= self.slots else 0.0
        arrived = max(self.up, free) + state
        updated = max(arrived, ready) + work
        left = max(self.down, updated) + state

        sent = max(self.sent, known) + leaves
        computed = max(self.host, sent, ready) + work * machine.memory / machine.host_memory
        back = max(self.up, computed) + new
        if max(back - needed, 0.0) < max(left - needed, 0.0):
            self.sent, self.host, self.up = sent, computed, back
            self.down = max(self.down + leaves, sent)
            return True
        self.up, self.down = arrived, left
        self.left.append(left)
        return False


def _times(program: Program, machine: Machine) -> dict[fx.Node, float]:
    """When every node has run, on a machine where nothing of the optimizer takes time."""
    ends = {span.name: span.end for span in predict(program, machine).spans}
    times: dict[fx.Node, float] = {}
    clock = 0.0
    for node in program.nodes:
        clock = max(clock, ends.get(node.name, 0.0))
        times[node] = clock
    return times
