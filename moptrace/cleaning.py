"""From what was recorded to a graph of values only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx

from moptrace import roles
from moptrace.core import (
    args_of,
    erase_dead,
)
from moptrace.errors import TraceError

__all__ = ["cleaned"]

aten = torch.ops.aten

_DROPPED = {
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_ALIASES = {aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}


_NEW = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}


def cleaned(traced: fx.Graph, wanted: Sequence[str]) -> tuple[fx.Graph, list[str]]:
    """A graph of values only, and the names of its placeholders.

    Drops assertions, aliases, switches of the gradient mode and dead code. What was computed
    without gradients is detached where it is used with them.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    names: list[str] = []
    suspended: set[fx.Node] = set()  # nodes of the new graph computed without gradients
    detached: dict[fx.Node, fx.Node] = {}
    enabled = True

    def use(old: fx.Node) -> fx.Node:
        node = copies[old]
        if not enabled or node not in suspended:
            return node
        if node not in detached:
            detached[node] = _like(graph.call_function(aten.detach.default, (node,)), node)
        return detached[node]

    for old in traced.nodes:
        if old.target is torch._C._set_grad_enabled:
            enabled = args_of(old)[0]
        elif old.target is torch.amp.autocast_mode._enter_autocast and args_of(old)[2]:
            raise TraceError(
                f"forward turns on autocast: {roles.where(old)}. Convert the model instead, for "
                f"example with model.bfloat16()."
            )
        elif old.target in _ALIASES or _detaches_constant(old, copies):
            copies[old] = copies[args_of(old)[0]]
        elif old.op == "placeholder":
            copies[old] = _like(graph.placeholder(_identifier(wanted[len(names)])), old)
            names.append(copies[old].name)
            copies[old].target = names[-1]  # fx keeps names apart, and generates code from targets
        elif old.op == "output":
            graph.output(tuple(use(x) for x in args_of(old)[0]))
        elif old.target is aten.copy.default:
            copies[old] = _copied(graph, old, use(args_of(old)[1]))
        elif old.target not in _DROPPED:
            target: Any = old.target
            options: Any
            args, options = fx.map_arg((args_of(old), old.kwargs), use)
            if target in _NEW:  # of the tensor it asks for, only the type matters: say that instead
                target, (_, *args) = _NEW[target], args
                result = roles.tensor(old)
                options = {"dtype": result.dtype, "device": result.device}
            new = graph.create_node(old.op, target, tuple(args), options, old.name)
            copies[old] = _like(new, old)
            if not enabled and _is_differentiable(new):
                suspended.add(new)
    erase_dead(graph)
    roles.sign(graph, "")
    return graph, names


def _like(new: fx.Node, old: fx.Node) -> fx.Node:
    roles.set_value(new, roles.value(old))
    roles.copy_role(new, of=old)
    return new


def _copied(graph: fx.Graph, old: fx.Node, source: fx.Node) -> fx.Node:
    """What ``old``, a functionalised ``destination.copy_(source)``, computes.

    The operator ``aten.copy`` itself has no derivative.
    """
    result, given = roles.tensor(old), roles.tensor(source)
    new = source
    if result.dtype != given.dtype:
        new = graph.call_function(aten._to_copy.default, (new,), {"dtype": result.dtype})
        _like(new, old)
        roles.set_value(new, given.to(result.dtype))
    if result.shape != given.shape:
        new = graph.call_function(aten.expand.default, (new, list(result.shape)))
        _like(new, old)
    return new


def _detaches_constant(node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> bool:
    if node.target is not aten.detach.default:
        return False
    source = copies[args_of(node)[0]]
    return source.op == "get_attr" or not _is_differentiable(source)


def _is_differentiable(node: fx.Node) -> bool:
    value = roles.value(node)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name if name[:1].isalpha() else f"input_{name}")
