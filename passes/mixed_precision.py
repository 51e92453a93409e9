"""Compute in one dtype, and keep parameters in another."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_aggregate, map_arg

from moptrace import roles, state
from moptrace.core import Level, Parameter, Pass, Program
from moptrace.precision import MixedPrecisionPolicy
from moptrace.reshard import cast_whole
from moptrace.roles import Component

__all__ = ["compute_routers", "mixed_precision"]

aten = torch.ops.aten


def mixed_precision(policy: MixedPrecisionPolicy, masters: Mapping[str, torch.dtype]) -> Pass:
    """Take parameters in the dtypes in which they are held; cast them to those of the graph.

    ``masters`` are the held dtypes by the user's names; a parameter that is not named is held as
    the graph has it. The cast comes before a gather, so that a gather moves what the graph
    computes in, and its gradient is cast back after the reduction. With a wider ``reduce_dtype``
    the gradient is cast up before it: the parameter is cast to that, and from that by
    ``cast_whole``.

    Requires: a canonical program whose parameters have the dtypes in which they are used
    (``precision.convert``). Ensures: the same function of the cast parameters; where no dtype
    differs, the same program. Raises PlanError for a narrower ``reduce_dtype``.
    """

    def rewrite(program: Program) -> Program:
        graph, mapping = program.copy_graph()
        nodes = {old.name: mapping[old] for old in program.graph.find_nodes(op="placeholder")}
        parameters: list[Parameter] = []
        for parameter in program.signature.parameters:
            held = _held(parameter, masters)
            parameters.append(replace(parameter, dtype=held))
            if parameter.dtype.is_floating_point:
                _cast_parameter(graph, nodes[parameter.name], held, policy)
        if len(graph.nodes) == len(program.graph.nodes):
            return program
        signature = replace(program.signature, parameters=tuple(parameters))
        return program.with_graph(graph, signature=signature)

    return Pass("mixed_precision", rewrite, (("policy", policy),), (Level.CANONICAL,))


def _held(parameter: Parameter, masters: Mapping[str, torch.dtype]) -> torch.dtype:
    """What the ranks hold a parameter in: of several that are stacked, what holds them all."""
    first, *others = (masters.get(name, parameter.dtype) for name in state.user_names(parameter))
    for other in others:
        first = torch.promote_types(first, other)
    return first


def _cast_parameter(
    graph: fx.Graph, node: fx.Node, held: torch.dtype, policy: MixedPrecisionPolicy
) -> None:
    used = roles.tensor(node).dtype
    reduced = policy.reduced_in(used)
    users = list(node.users)
    roles.set_value(node, roles.tensor(node).to(held))
    if not users:
        return
    x = node
    with graph.inserting_before(min(users, key=lambda user: user._sort_key)):
        if reduced != used:
            x = _cast(graph, x, reduced)
            x = _described(graph.call_function(cast_whole, (x, used)), x, used)
        else:
            x = _cast(graph, x, used)
    for user in users if x is not node else ():
        user.replace_input_with(node, x)


def _cast(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    if roles.tensor(x).dtype == dtype:
        return x
    return _described(graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype}), x, dtype)


def _described(new: fx.Node, of: fx.Node, dtype: torch.dtype) -> fx.Node:
    roles.copy_role(new, of=of, placements=(), rule=None)
    roles.set_value(new, roles.tensor(of).to(dtype))
    return new


# --- routers --------------------------------------------------------------------------------------


def compute_routers(dtype: torch.dtype | None) -> Pass:
    """Compute every router in ``dtype`` where it computes in fewer bits; None leaves them.

    Routers are what ``classify`` found to be: what leads from the tokens to the choice of experts
    and to their weights. What comes in is cast, and what goes out is cast back. A parameter that
    routers alone use is taken in ``dtype``, not rounded in between. Casts within a router to fewer
    bits are left out.

    Requires: ``classify``. Ensures: every value of a router has ``dtype`` or more bits.
    """

    def rewrite(program: Program) -> Program:
        if dtype is None:
            return program
        graph, _ = program.copy_graph()
        parameters = {parameter.name for parameter in program.signature.parameters}
        widening = _Routers(graph, dtype, parameters)
        for node in list(graph.nodes):
            widening.visit(node)
        if not widening.narrow:
            return program
        taken = tuple(
            replace(p, dtype=dtype) if p.name in widening.taken else p
            for p in program.signature.parameters
        )
        return program.with_graph(graph, signature=replace(program.signature, parameters=taken))

    options = (("dtype", dtype),)
    return Pass("compute_routers", rewrite, options, (Level.CANONICAL,), needs=("classify",))


class _Routers:
    """One walk over a graph; ``narrow`` are the dtypes that changed values of routers had."""

    def __init__(self, graph: fx.Graph, dtype: torch.dtype, parameters: set[str]):
        self.graph, self.dtype, self.parameters = graph, dtype, parameters
        self.mode = detect_fake_mode([roles.value(node) for node in graph.nodes])
        self.narrow: dict[fx.Node, torch.dtype] = {}
        self.taken: set[str] = set()
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        if node.name in self.parameters:
            alone = bool(node.users) and all(map(_in_router, node.users))
            if alone and self._is_narrow(node):
                self.taken.add(node.name)
                self._widen(node, roles.tensor(node).to(self.dtype))
        elif node.op == "call_function" and _in_router(node):
            for x in node.all_input_nodes:
                if self._is_narrow(x):
                    node.replace_input_with(x, self._cast(x, self.dtype, before=node))
            node.args = _widened(node.args, self.dtype)
            node.kwargs = _widened(node.kwargs, self.dtype)
            args, kwargs = map_arg((node.args, node.kwargs), roles.value)
            with self.mode or nullcontext():
                self._widen(node, node.target(*args, **kwargs))  # type: ignore[operator]
        else:
            for x in node.all_input_nodes:
                if x in self.narrow:
                    node.replace_input_with(x, self._cast(x, self.narrow[x], before=node))

    def _is_narrow(self, node: fx.Node) -> bool:
        value = roles.value(node)
        return isinstance(value, Tensor) and _is_narrow(value.dtype, self.dtype)

    def _widen(self, node: fx.Node, value: Any) -> None:
        before = roles.value(node)
        if isinstance(value, Tensor) and value.dtype != before.dtype:
            self.narrow[node] = before.dtype
        roles.set_value(node, value)

    def _cast(self, x: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        if (x, dtype) not in self.casts:
            with self.graph.inserting_before(before):
                self.casts[x, dtype] = new = _cast(self.graph, x, dtype)
            user = roles.role(before)
            roles.set_role(new, component=user.component, block=user.block)
        return self.casts[x, dtype]


def _in_router(node: fx.Node) -> bool:
    return roles.component(node) == Component.ROUTER


def _is_narrow(dtype: torch.dtype, wide: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != wide and torch.promote_types(dtype, wide) == wide


def _widened(arguments: Any, wide: torch.dtype) -> Any:
    """The arguments of an operator that is told the dtype of its result."""
    return map_aggregate(
        arguments,
        lambda x: wide if isinstance(x, torch.dtype) and _is_narrow(x, wide) else x,
    )
