"""Choose where parameters, buffers and the batch live, before anything is computed from them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Parameter, Pass, Program
from moptrace.errors import PlanError
from moptrace.placement import INVARIANT, Kind, Layout, Placement, Shard
from moptrace.rules import operands, rule_for

__all__ = [
    "batch_sizes",
    "expert_counts",
    "expert_dims",
    "is_split",
    "shard_batch",
    "shard_parameters",
    "storage",
]


def shard_parameters(layout: Layout, edp: str = "shard") -> Pass:
    """Shard every parameter over all ranks; experts over ``ep`` first.

    An expert weight is split by expert over ``ep``, and over ``edp`` along another dimension
    (``edp="shard"``) or held alike there (``edp="replicate"``). Every other parameter is split
    along dimension 0 over all ranks and gathered before use; scalars are held alike.

    Requires: a canonical program. Ensures: every parameter and buffer has a placement.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        experts = expert_dims(graph)
        for parameter in program.signature.parameters:
            node = nodes[parameter.name]
            held = storage(parameter, experts.get(parameter.name), layout, edp)
            roles.set_role(node, placements=(layout.normalised(held),))
        for buffer in program.signature.buffers:
            alike = Placement.uniform(layout.home, INVARIANT)
            roles.set_role(nodes[buffer.name], placements=(alike,))
        return program.with_graph(graph, layout=layout)

    options = (("layout", str(layout)), ("edp", edp))
    return Pass("shard_parameters", rewrite, options, takes=(Level.CANONICAL,))


def storage(
    parameter: Parameter, expert_dim: int | None, layout: Layout, edp: str = "shard"
) -> Placement:
    """How the ranks hold a parameter between its uses, in the view of the experts."""
    view, shape = layout.experts, parameter.shape
    if not shape:
        return Placement.uniform(view, INVARIANT)
    if expert_dim is None:
        return Placement.uniform(view, Shard(0))
    others = [d for d in range(len(shape)) if d != expert_dim]
    beside: Kind = INVARIANT
    if others and edp == "shard":
        parts = view.axes[0].size
        beside = Shard(next((d for d in others if shape[d] % parts == 0), others[0]))
    return Placement(view, (beside, Shard(expert_dim)))


def expert_dims(graph: fx.Graph) -> dict[str, int]:
    """The parameters whose dimension counts experts, by placeholder name, with that dimension.

    Found from the canonical operators backwards: the dimension of a parameter that becomes the
    experts' dimension of a grouped operator's weight.
    """
    found: dict[str, int] = {}
    ops = torch.ops.moptrace
    for node in graph.nodes:
        if node.target not in (ops.grouped_mm.default, ops.expert_rows.default):
            continue
        weight = node.args[1] if node.target is ops.grouped_mm.default else node.args[0]
        found.update((origin.name, dim) for origin, dim in _origins(weight, 0))
    return found


def expert_counts(program: Program) -> list[int]:
    """The number of experts of every expert weight of a canonical program."""
    shapes = {p.name: p.shape for p in program.signature.parameters}
    return [shapes[name][dim] for name, dim in expert_dims(program.graph).items() if name in shapes]


def _origins(node: Any, dim: int) -> Iterator[tuple[fx.Node, int]]:
    """Follow a dimension back to the placeholders that it comes from."""
    if node.op == "placeholder":
        yield node, dim
        return
    number = 0
    if node.target is operator.getitem:  # one of the pieces of a split
        node, number = node.args
    rule = rule_for(node) if node.op == "call_function" else None
    factor = rule.results[number][dim] if rule is not None else None
    if rule is not None and factor is not None:
        for operand, dims in zip(operands(node), rule.operands, strict=True):
            if factor in dims:
                yield from _origins(operand, dims.index(factor))


def shard_batch(layout: Layout) -> Pass:
    """Split the batch: sequences over ``dp``, and the tokens of each over ``cp``.

    The batch size is dimension 0 of the batch's first tensor with two or three dimensions (else of
    the first with more, or with one), and the length is its dimension 1. Every input with that
    dimension 0 is split there, and every one with that dimension 1 there; the others are held alike
    (scalars, and the pairs of tokens of a mask).
    Requires: the ranks divide these sizes.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        sizes = batch_sizes([x.shape for x in program.signature.inputs])
        for axis, size in zip(layout.tokens.axes, sizes, strict=False):
            if axis.name != "dp" and size is not None and size % axis.size:
                raise PlanError(
                    f"sequences of {size} tokens cannot be split over {axis}; pad them to "
                    f"{-(-size // axis.size) * axis.size} and ignore the padding with label -100"
                )
        for entry in program.signature.inputs:
            kinds = tuple(
                Shard(dim) if is_split(entry.shape, dim, sizes) else INVARIANT
                for dim, _ in enumerate(layout.tokens.axes)
            )
            placement = layout.normalised(Placement(layout.tokens, kinds))
            roles.set_role(nodes[entry.name], placements=(placement,))
        return replace(program, graph=graph, layout=layout)

    return Pass("shard_batch", rewrite, (("layout", str(layout)),), takes=(Level.CANONICAL,))


def batch_sizes(shapes: Sequence[tuple[int, ...]]) -> tuple[int | None, int | None]:
    """The number of sequences in a batch of inputs with these shapes, and their length.

    >>> batch_sizes([(), (1, 128), (4, 128)]), batch_sizes([(16,)]), batch_sizes([()])
    ((1, 128), (16, None), (None, None))
    >>> batch_sizes([(4, 1, 128, 128), (4, 128)])
    (4, 128)
    """
    for ranks in ((2, 3), (4, 5), (1,)):  # a mask of pairs of tokens comes last
        for shape in shapes:
            if len(shape) in ranks:
                return shape[0], shape[1] if len(shape) > 1 else None
    return None, None


def is_split(shape: Sequence[int], dim: int, sizes: tuple[int | None, int | None]) -> bool:
    """Whether an input's dimension counts sequences (0) or their tokens (1).

    >>> is_split((1, 128), 0, (4, 128)), is_split((1, 128), 1, (4, 128))
    (False, True)
    """
    return len(shape) > dim and shape[dim] == sizes[dim]
