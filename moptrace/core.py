"""Programs and passes: read this first.

A ``Program`` is an immutable value: one torch.fx graph, the meaning of its inputs and outputs, the
level it is written at, and the program it was made from. A ``Pass`` is a value too: a named pure
function from program to program. ``chain`` composes passes into a pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _node_list
from torch.utils._pytree import TreeSpec

import moptrace.kernels.blocks  # noqa: F401  registers the operators
from moptrace import roles
from moptrace.errors import PassError
from moptrace.kernels.as_one import Operator
from moptrace.placement import Layout, Placement

__all__ = [
    "Buffer",
    "Input",
    "Level",
    "Output",
    "Parameter",
    "Pass",
    "Program",
    "Signature",
    "State",
    "chain",
    "identity",
]


class Level(IntEnum):
    """What a program's graph says, from the user's model down to what a rank runs."""

    CAPTURED = 0  # forward and loss, ATen, global shapes, one device
    CANONICAL = 1  # one spelling for each component, every node tagged
    PLACED = 2  # every tensor placed; a reshard node wherever a placement changes
    LOCAL = 3  # per-rank shapes and explicit collectives; the same graph on every rank
    STEP = 4  # forward, loss, backward, reductions, clipping and optimizer
    SCHEDULED = 5  # buckets, early issue and late wait, streams, offload

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A graph input that is a parameter of the user's model.

    ``fqn`` is its fully qualified name and ``aliases`` the other names of a tied parameter.
    ``stacked`` lists the user's parameters, in expert order, whose stack along a new dimension 0
    this one is; empty for a parameter of the user's own shape. ``stage`` is the pipeline stage
    whose ranks hold it.
    """

    name: str
    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = True
    aliases: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    stage: int = 0


@dataclass(frozen=True, slots=True)
class Buffer:
    """A graph input that is a buffer of the user's model, or one that a pass ``added``.

    An added buffer starts at zero. One that the graph updates belongs to a pipeline ``stage``, from
    which all ranks get the value after a step; None for others, which all ranks have alike.
    """

    name: str
    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool = True
    aliases: tuple[str, ...] = ()
    added: bool = False
    stage: int | None = None


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input that is a tensor of the user's batch; ``path`` is its place there."""

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class State:
    """A graph input that is a tensor of the optimizer: a moment, a count of steps, a learning rate.

    ``path`` is ``<parameter>.<key>``, or ``groups.<number>.lr``. ``parameter`` is the fully
    qualified name of the parameter that the entry belongs to, None for a group's. ``host`` is
    whether it is kept in the memory of the host.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: str | None = None
    host: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """A graph output: a tensor that the model returns, a gradient, or a new value.

    ``buffer`` is the fully qualified name of the buffer whose new value this is, ``gradient`` that
    of the parameter whose gradient it is, and ``state_of`` that of the parameter to whose optimizer
    state it belongs. ``updates`` is the name of the graph input that it replaces after the step:
    None for a returned tensor, and for a state that the optimizer makes in its first step.
    ``held`` is how the ranks hold such a state, None for one that all ranks have.
    """

    path: str
    buffer: str | None = None
    gradient: str | None = None
    state_of: str | None = None
    updates: str | None = None
    held: Placement | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """The meaning of a graph's inputs and outputs, in the graph's order.

    ``inputs_spec`` is the pytree of ``(args, kwargs)`` with which the user calls the model;
    ``leaves`` are its leaves, with ``None`` in place of each tensor. ``outputs_spec`` and
    ``results`` say the same of what the model returns, where each tensor is the index of a graph
    output. ``loss`` is the index of the loss among the graph's outputs.
    """

    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    loss: int
    inputs_spec: TreeSpec = field(repr=False)
    leaves: tuple[Any, ...] = field(repr=False)
    outputs_spec: TreeSpec = field(repr=False)
    results: tuple[Any, ...] = field(repr=False)
    states: tuple[State, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the graph's placeholders, in order."""
        entries = (*self.parameters, *self.buffers, *self.states, *self.inputs)
        return tuple(x.name for x in entries)

    def parameter(self, fqn: str) -> Parameter:
        """The parameter with this fully qualified name; KeyError if there is none."""
        for found in self.parameters:
            if fqn == found.fqn or fqn in found.aliases:
                return found
        raise KeyError(fqn)


@dataclass(frozen=True, eq=False)
class Program:
    """One graph with its meaning, its level, and where it came from.

    Never changed: a pass takes a copy with ``copy_graph``, edits that, and returns a new program
    with ``with_graph``. ``constants`` are the tensors that the graph's ``get_attr`` nodes name.
    ``stage`` is the pipeline stage whose ranks run it; None for the program of all stages.
    """

    graph: fx.Graph
    signature: Signature
    level: Level
    layout: Layout | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stage: int | None = None
    previous: Program | None = None
    made_by: Pass | None = None

    @property
    def nodes(self) -> _node_list:
        return self.graph.nodes

    @property
    def history(self) -> tuple[Program, ...]:
        """Every program from the captured one to this one."""
        before = self.previous.history if self.previous else ()
        return (*before, self)

    @property
    def loss(self) -> fx.Node:
        """The node that computes the loss."""
        return self.outputs[self.signature.loss]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The nodes that the graph returns."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def copy_graph(self) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """A copy of the graph to edit, and the map from this graph's nodes to its own."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            mapping[node] = copy_node(graph, node, mapping.__getitem__)
        return graph, mapping

    def with_graph(self, graph: fx.Graph, **changes: Any) -> Program:
        """A program like this one with another graph, and other fields if given."""
        return replace(self, graph=graph, **changes)

    def with_note(self, note: str) -> Program:
        """Add a remark that ``explain`` shows, such as what a fallback costs."""
        return replace(self, notes=(*self.notes, note))

    def module(self, device: torch.device | str = "cpu") -> fx.GraphModule:
        """The graph as a callable module on ``device`` that takes its placeholders in order."""
        from moptrace.recompute import with_regions

        root = torch.nn.Module()
        for name, constant in self.constants.items():
            setattr(root, name, constant.to(device))
        graph, _ = self.copy_graph()
        for node in graph.nodes:  # programs are traced on the CPU
            if "device" in node.kwargs:
                node.update_kwarg("device", torch.device(device))
        if self.level == Level.LOCAL:  # autograd differentiates it
            graph = with_regions(graph)
        return fx.GraphModule(root, graph, class_name=f"{self.level}".capitalize())

    def diff(self, other: Program | None = None, block: int | None = None) -> str:
        """What changed since ``other``, by default since the program before the last pass.

        ``block`` shows one Mixture-of-Experts block alone.
        """
        from moptrace.diff import diff

        return diff(other or self.previous or self, self, block)

    def __str__(self) -> str:
        from moptrace.render import render

        return render(self)

    def _repr_html_(self) -> str:
        from moptrace.render import render_html

        return render_html(self)


@dataclass(frozen=True)
class Pass:
    """A named pure function from program to program.

    Requires: the program is at one of the levels ``takes`` and every pass named in ``needs`` is in
    its history. Ensures: the result is checked; it is at level ``gives`` (the same level if None).
    ``options`` are for printing and comparing; ``rewrite`` has them bound.

    >>> from moptrace.core import identity
    >>> print(identity())
    identity()
    """

    name: str
    rewrite: Callable[[Program], Program] = field(compare=False, repr=False)
    options: tuple[tuple[str, Any], ...] = ()
    takes: tuple[Level, ...] = tuple(Level)
    gives: Level | None = None
    needs: tuple[str, ...] = ()
    parts: tuple[Pass, ...] = ()

    def __call__(self, program: Program) -> Program:
        from moptrace.check import check

        if self.parts:
            return self.rewrite(program)
        self._check_requirements(program)
        result = self.rewrite(program)
        if result is program:
            return program
        roles.sign(result.graph, self.name)
        result = replace(result, previous=program, made_by=self, level=self._level(program))
        check(result)
        return result

    def _level(self, program: Program) -> Level:
        return program.level if self.gives is None else self.gives

    def _check_requirements(self, program: Program) -> None:
        if program.level not in self.takes:
            wanted = " or ".join(map(str, self.takes))
            raise PassError(
                f"{self} takes a program at level {wanted}, got {program.level}. "
                f"It was made by: {_made_by(program)}"
            )
        ran = {p.made_by.name for p in program.history if p.made_by}
        for need in self.needs:
            if need not in ran:
                raise PassError(
                    f"{self} needs {need} first. The program was made by: {_made_by(program)}"
                )

    def __iter__(self) -> Iterator[Pass]:
        """The primitive passes, in order."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part

    def __str__(self) -> str:
        if self.parts:
            return f"{self.name}({', '.join(map(str, self.parts))})"
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options)})"


def chain(*passes: Pass, name: str = "chain") -> Pass:
    """Apply passes one after another.

    >>> print(chain(identity(), identity()))
    chain(identity(), identity())
    """

    def rewrite(program: Program) -> Program:
        for step in passes:
            program = step(program)
        return program

    return Pass(name, rewrite, parts=passes)


def identity() -> Pass:
    """The pass that changes nothing."""
    return Pass("identity", lambda program: program)


def _made_by(program: Program) -> str:
    return " -> ".join(str(p.made_by) if p.made_by else "trace" for p in program.history)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments, of whatever type."""
    return node.args


def copy_node(
    graph: fx.Graph, node: fx.Node, operand: Callable[[fx.Node], Any] = lambda x: x
) -> fx.Node:
    """Copy a node, of any graph, to the insertion point of this one; ``operand`` maps its operands.

    ``Graph.node_copy`` does the same in twice the time: it looks through all operands for symbolic
    numbers, to warn of them.
    """
    args, kwargs = fx.map_arg(node.args, operand), fx.map_arg(node.kwargs, operand)
    new = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
    new._update_args_kwargs(args, kwargs)
    new.meta = node.meta.copy()
    return new


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they depend on."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def connected(nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    """The parts of some nodes between which there is no edge, each in the order of the nodes."""
    part: dict[fx.Node, set[fx.Node]] = {}
    ordered = list(nodes)
    for node in ordered:
        joined = {node}.union(*(part[x] for x in node.all_input_nodes if x in part))
        part.update(dict.fromkeys(joined, joined))
    together: dict[int, list[fx.Node]] = defaultdict(list)
    for node in ordered:
        together[id(part[node])].append(node)
    yield from together.values()


def written(value: fx.Node) -> list[fx.Node]:
    """The nodes that write a value block by block, in order; none if it is made at once."""
    found: list[fx.Node] = []
    while value.target is torch.ops.moptrace.write_block.default:
        found.append(value)
        value = args_of(value)[0]
    return found[::-1]


def erase_dead(graph: fx.Graph, keep: Sequence[fx.Node] = ()) -> None:
    """Remove nodes whose results nothing uses, if they do nothing else; placeholders stay.

    An ``Operator`` is left to give what is used of its results. A random operator does nothing
    else: which numbers others draw does not depend on it.
    """
    kept = set(keep)
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node in kept:
            continue
        if node.users:
            if isinstance(node.target, Operator):
                _narrow(node, node.target)
        elif is_random(node) or not node.is_impure():
            graph.erase_node(node)


def _narrow(node: fx.Node, operator: Operator) -> None:
    """Let a node give those of its results alone that are used."""
    picks: list[Any] = list(node.users)  # each takes one result
    used = sorted({pick.args[1] for pick in picks})
    values = roles.value(node)
    if len(used) == len(values):
        return
    node.target, taken = operator.only(used)  # type: ignore[assignment]
    node.args = tuple(node.args[i] for i in taken)
    roles.set_value(node, tuple(values[i] for i in used))
    for pick in picks:
        pick.args = (node, used.index(pick.args[1]))


def is_random(node: fx.Node) -> bool:
    """Whether the node's operator may draw numbers; attention may, even where it drops nothing."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
