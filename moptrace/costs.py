"""How long operators take on an assumed machine, from the shapes in the graph.

An operator takes as long as its products or its traffic with memory, whichever is longer, and as
what it sends to other ranks. Numbers of routed rows are symbols; they count as under balanced
routing, as they do in ``liveness.py``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.activations import communicates
from moptrace.core import Program
from moptrace.kernels.expert_function import ExpertOperator
from moptrace.kernels.host_update import HostUpdate
from moptrace.kernels.matrix_function import MatrixFunction
from moptrace.kernels.triton_expert_function import RowKernel
from moptrace.liveness import shape_of, sizes_of_values, storages, symbols_of

__all__ = ["Machine", "operations", "operator_costs", "products", "seconds_on_host"]

aten, ops = torch.ops.aten, torch.ops.moptrace

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Machine:
    """What a rank is assumed to do in a second: the defaults are of the order of one H100.

    ``flops`` of matrix products; bytes of its memory (``memory``), to other ranks (``link``), to or
    from the memory of the host (``host``), and of that memory, where the host computes
    (``host_memory``; MoP's AdamW on a CPU, shared by eight ranks, moves as many). ``latency`` are
    the seconds that a collective takes beside what it sends.
    """

    flops: float = 4e14
    memory: float = 2e12
    link: float = 5e10
    host: float = 2.5e10
    host_memory: float = 2e10
    latency: float = 1e-5


def operator_costs(program: Program, machine: Machine) -> dict[fx.Node, float]:
    """The seconds that every node takes of the device; to pick a result, or view it, none."""
    symbols, sizes, root = symbols_of(program), sizes_of_values(program), storages(program)

    def written(node: fx.Node) -> int:
        return sizes[node] or sum(sizes[user] for user in node.users)  # of a tuple, its elements

    found: dict[fx.Node, float] = {}
    for node in program.nodes:
        runs_here = node.op == "call_function" and not isinstance(node.target, HostUpdate)
        if not runs_here or root[node] is not node or node.target is operator.getitem:
            found[node] = 0.0
            continue
        moved = sum(sizes[x] for x in node.all_input_nodes) + written(node)
        computed = operations(node, symbols) / machine.flops
        sent = written(node) / machine.link if communicates(node) else 0.0
        found[node] = max(computed, moved / machine.memory) + sent
    return found


def seconds_on_host(update: HostUpdate, machine: Machine) -> float:
    """How long the host takes for an update: each operator moves what it takes and gives."""
    there = replace(machine, memory=machine.host_memory)
    return sum(operator_costs(update.body, there).values())


def products(node: fx.Node) -> int:
    """How many products of matrices an operator makes; attention counts as one."""
    if isinstance(node.target, (ExpertOperator, RowKernel)):
        return len(node.target.products)
    if isinstance(node.target, MatrixFunction):
        return sum(map(products, node.target.graph.nodes))
    return _count(node.target) is not None


def operations(node: fx.Node, symbols: Mapping[Any, int]) -> float:
    """The floating-point operations of an operator's matrix products."""
    given = pytree.tree_leaves((node.args, node.kwargs))  # a product of a matrix with itself
    values = pytree.tree_leaves([roles.value(x) for x in given if isinstance(x, fx.Node)])
    shapes = [shape_of(x, symbols) for x in values if isinstance(x, Tensor)]
    if isinstance(node.target, (ExpertOperator, RowKernel)):
        example: Any = node.args[node.target.example]
        rows = shape_of(roles.tensor(example), symbols)[0]
        return 2.0 * rows * sum(a * b for a, b in node.target.products)
    if isinstance(node.target, MatrixFunction):
        matrices = roles.value(node)[0].shape[0]
        return matrices * sum(operations(x, symbols) for x in node.target.graph.nodes)
    count = _count(node.target)
    return count(shapes) if count is not None else 0.0


def _count(target: Any) -> Callable[[list[Shape]], float] | None:
    if "attention" in getattr(target, "__name__", str(target)):
        return _attention
    return _PRODUCTS.get(target)


def _product(shapes: list[Shape]) -> float:
    """Of ``[..., m, k]`` and ``[..., k, n]``; of rows and their experts' weights alike."""
    a, b = shapes[-2:]
    return 2.0 * math.prod(a) * b[-1]


def _linear(shapes: list[Shape]) -> float:
    """Of ``[..., k]`` and ``[n, k]``."""
    x, weight = shapes[:2]
    return 2.0 * math.prod(x) * weight[0]


def _grouped(shapes: list[Shape]) -> float:
    return _product(shapes[:2])


def _attention(shapes: list[Shape]) -> float:
    """Of queries ``[..., s, d]``, keys ``[..., t, d]`` and values ``[..., t, e]``."""
    query, key, value = shapes[:3]
    return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_PRODUCTS: dict[Any, Callable[[list[Shape]], float]] = {
    aten.mm.default: _product,
    aten.addmm.default: _product,
    aten.bmm.default: _product,
    aten.baddbmm.default: _product,
    aten.matmul.default: _product,
    aten.linear.default: _linear,
    ops.vocab_projection.default: _linear,
    ops.grouped_mm.default: _grouped,
    ops.grouped_outer.default: _grouped,
}
