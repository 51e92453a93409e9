"""Compile what lies between products, collectives and other operators with kernels of their own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.compiled import CompiledRegion
from moptrace.core import Level, Pass, Program, connected, copy_node
from moptrace.liveness import is_view
from moptrace.roles import Component

__all__ = ["compile_regions"]

aten = torch.ops.aten


def compile_regions(components: Collection[Component] | None = None, least: int = 4) -> Pass:
    """Make one operator of each run of ``least`` or more that Inductor can fuse, and compile it.

    A run is made of pointwise operators, reductions and their views that stand one after another,
    in ``components`` if given, and that depend on each other. Nothing else changes its place, so a
    schedule stays as it was. Runs that differ only in sizes are compiled once, for all sizes: one
    kernel updates all matrices, whatever the optimizer. Inductor keeps what it compiled on disk,
    for other processes.

    Views of what a run does not make stay outside of it. So a result never looks at the memory of
    an operand, and a new value may be written over an old one where ``liveness`` says so.

    Requires: a step. Ensures: the same function; rounding may differ, as Inductor keeps
    intermediate values and fuses multiplications with additions.
    """

    def rewrite(program: Program) -> Program:
        runs = [run for run in _runs(program, components) if len(run.nodes) >= least]
        if not runs:
            return program
        regions = _regions(runs)
        graph = _written(program, {run.nodes[-1]: (run, regions[run.key]) for run in runs})
        return program.with_graph(graph)

    shown = () if components is None else (("components", sorted(map(str, components))),)
    options = (*shown, ("least", least))
    return Pass("compile_regions", rewrite, options, (Level.STEP, Level.SCHEDULED))


# --- finding runs ---------------------------------------------------------------------------------


class _Run:
    """Operators that may become one, in order."""

    def __init__(self, nodes: list[fx.Node]):
        self.nodes = nodes
        inside = set(nodes)
        operands = [x for node in nodes for x in node.all_input_nodes if x not in inside]
        self.operands = list(dict.fromkeys(operands))
        self.results = [x for x in nodes if any(user not in inside for user in x.users)]
        self.body = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for number, x in enumerate(self.operands):
            new[x] = self.body.placeholder(f"x{number}")
        for node in nodes:
            new[node] = self._copied(node, new)
        self.body.output(tuple(new[x] for x in self.results))

    def _copied(self, node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node:
        """A node of the body. A number that changes must be a factor, not an option.

        Inductor compiles again for each value of an option.
        """
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
        inner, factor = _SCALED.get(target), kwargs.get("value")
        if inner is None or not isinstance(factor, fx.Node):
            return self.body.call_function(target, args, kwargs)
        x, a, b = args
        term = self.body.call_function(inner, (a, b))
        term = self.body.call_function(aten.mul.Tensor, (term, factor))
        return self.body.call_function(aten.add.Tensor, (x, term))

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for runs that one kernel for all sizes can serve.

        That tells apart which sizes are equal, which are 1, and the order in memory.
        """
        sizes: dict[str, int] = {}
        kinds: list[Any] = []
        for x in self.operands:
            value = roles.value(x)
            if not isinstance(value, Tensor):
                kinds.append(type(value))
                continue
            pattern = [n if n == "1" else sizes.setdefault(n, len(sizes)) for n in _sizes(value)]
            kinds.append((value.dtype, *pattern, value.is_contiguous()))
        return str(self.body), tuple(kinds)

    @property
    def shapes(self) -> tuple[Any, ...]:
        values = [roles.value(x) for x in self.operands]
        return tuple(_sizes(x) if isinstance(x, Tensor) else None for x in values)


def _sizes(x: Tensor) -> tuple[str, ...]:
    return tuple(map(str, x.shape))


def _runs(program: Program, components: Collection[Component] | None) -> Iterator[_Run]:
    """The parts of every run between which no value goes."""
    run: dict[fx.Node, None] = {}
    for node in program.nodes:
        is_wanted = components is None or roles.component(node) in components
        looks_inside = _is_view(node) and node.args[0] in run
        if is_wanted and (_is_fusible(node) or looks_inside):
            run[node] = None
        elif not _is_free(node) or any(x in run for x in node.all_input_nodes):
            yield from map(_Run, connected(run))
            run = {}


def _is_fusible(node: fx.Node) -> bool:
    """Whether Inductor writes the operator into a kernel with others."""
    value = roles.value(node)
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, Tensor):
        return False
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    pointwise = torch.Tag.pointwise in node.target.tags
    return value.dim() > 0 and not is_random and (pointwise or node.target in _REDUCTIONS)


def _is_view(node: fx.Node) -> bool:
    return is_view(node) and isinstance(roles.value(node), Tensor)


def _is_free(node: fx.Node) -> bool:
    """Whether a node that does not depend on a run may come before it: a view, or a number."""
    if node.op != "call_function":
        return node.op != "output"
    value = roles.value(node)
    if isinstance(value, Tensor):
        is_number = value.dim() == 0 and torch.Tag.pointwise in getattr(node.target, "tags", ())
        return is_number or _is_view(node)
    return node.target in _NUMBERS


# --- writing them ---------------------------------------------------------------------------------


def _regions(runs: list[_Run]) -> dict[tuple[Any, ...], CompiledRegion]:
    """One region for each kind of run; it varies if its sizes do."""
    shapes: dict[tuple[Any, ...], set[Any]] = {}
    first: dict[tuple[Any, ...], _Run] = {}
    for run in runs:
        shapes.setdefault(run.key, set()).add(run.shapes)
        first.setdefault(run.key, run)
    return {
        key: CompiledRegion(
            f"compiled_{number}",
            run.body,
            varies=len(shapes[key]) > 1 or any(_is_symbolic(x) for x in run.operands),
            place=roles.where(run.nodes[0]),
        )
        for number, (key, run) in enumerate(first.items())
    }


def _is_symbolic(node: fx.Node) -> bool:
    value = roles.value(node)
    if isinstance(value, Tensor):
        return any(isinstance(n, torch.SymInt) for n in value.shape)
    return not isinstance(value, (int, float, bool))


def _written(program: Program, at: dict[fx.Node, tuple[_Run, CompiledRegion]]) -> fx.Graph:
    """The graph with each run as one call, where its last node was."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    inside = {node for run, _ in at.values() for node in run.nodes}
    for node in program.nodes:
        if node in at:
            run, region = at[node]
            call = graph.call_function(region, tuple(new[x] for x in run.operands))
            roles.copy_role(call, of=node, rule=None, placements=())
            roles.set_value(call, tuple(roles.value(x) for x in run.results))
            for number, result in enumerate(run.results):
                new[result] = graph.call_function(operator.getitem, (call, number))
                roles.set_value(new[result], roles.value(result))
                roles.copy_role(new[result], of=result)
        elif node not in inside:
            new[node] = copy_node(graph, node, new.__getitem__)
    return graph


# x + value * inner(a, b)
_SCALED: dict[Any, Any] = {
    aten.addcdiv.default: aten.div.Tensor,
    aten.addcmul.default: aten.mul.Tensor,
}
_REDUCTIONS = (
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.amax.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten.linalg_vector_norm.default,
)
_NUMBERS: tuple[Callable[..., Any], ...] = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.pow,
    operator.neg,
    aten._local_scalar_dense.default,
    aten.sym_size.int,
)
