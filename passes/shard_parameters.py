"""Choose where parameters, buffers and the batch live, before anything is computed from them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.errors import PlanError
from moptrace.placement import INVARIANT, Kind, Layout, Placement, Shard, View, parse_kind
from moptrace.reshard import constrain
from moptrace.rules import operands, rule_for

__all__ = [
    "BATCH_DIM",
    "batch_parts",
    "batch_sizes",
    "expert_counts",
    "expert_dims",
    "is_split",
    "shard_batch",
    "shard_parameters",
    "storage",
]


def shard_parameters(
    layout: Layout, edp: str = "shard", stored: Mapping[str, Placement] | None = None
) -> Pass:
    """Shard every parameter over all ranks, along the dimension that its use asks for first.

    An expert weight is split by expert over ``ep``, by hidden units over ``etp``, and over ``edp``
    along another dimension (``edp="shard"``) or held alike there (``edp="replicate"``). A weight
    that is asked to be split over an axis (``constrain``) is, and along another dimension over the
    other ranks. Every other parameter is split along dimension 0, over all ranks or over
    ``dp_shard``; scalars are held alike. ``stored`` says it instead, by parameter, for a model that
    exists already.

    Requires: a canonical program. Ensures: every parameter and buffer has a placement.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        experts = expert_dims(graph)
        for parameter in program.signature.parameters:
            node = nodes[parameter.name]
            held = (stored or {}).get(parameter.name)
            if held is None:
                dim = experts.get(parameter.name)
                asked = [] if dim is None else [("ep", Shard(dim))]
                held = storage(parameter.shape, [*asked, *_asked(node)], layout, edp)
            roles.set_role(node, placements=(layout.normalised(held),))
        for buffer in program.signature.buffers:
            alike = Placement.uniform(layout.home, INVARIANT)
            roles.set_role(nodes[buffer.name], placements=(alike,))
        return program.with_graph(graph, layout=layout)

    options = (("layout", str(layout)), ("edp", edp))
    return Pass("shard_parameters", rewrite, options, takes=(Level.CANONICAL,))


def _asked(parameter: fx.Node) -> Iterator[tuple[str, Shard]]:
    """The axes along which a use of a parameter asks for a split of one of its dimensions."""
    for user in parameter.users:
        if user.target is constrain:
            axis, kind = str(user.args[1]), parse_kind(str(user.args[2]))
            if isinstance(kind, Shard):
                yield axis, kind


def storage(
    shape: tuple[int, ...], asked: Sequence[tuple[str, Shard]], layout: Layout, edp: str
) -> Placement:
    """How the ranks hold a parameter between its uses."""
    if not shape:
        return Placement.uniform(layout.home, INVARIANT)
    alike = {"dp_replicate"} | ({"edp"} if edp == "replicate" else set[str]())
    for view in (layout.experts, layout.tensor, layout.vocabulary, layout.home):
        held = _split_as_asked(shape, asked, view, alike)
        if held is not None and held.expressed_in(layout.storage) is not None:
            return held
    kinds = (INVARIANT if axis.name in alike else Shard(0) for axis in layout.dense.axes)
    return Placement(layout.dense, tuple(kinds))


def _split_as_asked(
    shape: tuple[int, ...], asked: Sequence[tuple[str, Shard]], view: View, alike: set[str]
) -> Placement | None:
    """Dimensions split over the axes that ask for it, and others over the rest of the view.

    Evenly if any dimension is; a dimension that two axes split must be. What is asked for in blocks
    cannot be stored so: another dimension is split then, and exchanged for it before use.
    """
    kinds: dict[str, Kind] = {}
    for axis, kind in asked:
        if any(entry.name == axis for entry in view.axes) and kind.blocks == 1:
            if kind not in kinds.values():
                kinds.setdefault(axis, kind)
    if not kinds:
        return None
    taken = {kind.dim for kind in kinds.values() if isinstance(kind, Shard)}
    parts = {d: 1 for d in range(len(shape)) if d not in taken}
    if not parts and len(view.axes) > 1 and "ep" not in kinds:
        return None
    blocked = {(axis, kind.dim) for axis, kind in asked if kind.blocks > 1}
    for entry in reversed(view.axes):
        if entry.name in kinds:
            continue
        others = [d for d in parts if (entry.name, d) not in blocked]
        even = [d for d in others if shape[d] % (parts[d] * entry.size) == 0]
        free = [d for d in others if parts[d] == 1]
        dim = next(iter((*even, *free)), None)
        kinds[entry.name] = INVARIANT if dim is None or entry.name in alike else Shard(dim)
        if dim is not None and entry.name not in alike:
            parts[dim] *= entry.size
    return Placement(view, tuple(kinds[entry.name] for entry in view.axes))


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
    if node.target is constrain:
        yield from _origins(node.args[0], dim)
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
    """Split the batch: sequences over ``dp``, and the tokens of each over ``cp`` and ``tp``.

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
        _, parts = batch_parts(layout)
        if sizes[1] is not None and sizes[1] % parts:
            names = " and ".join(str(axis) for axis in layout.tokens.axes if axis.name != "dp")
            raise PlanError(
                f"sequences of {sizes[1]} tokens cannot be split over {names}; pad them to "
                f"{-(-sizes[1] // parts) * parts} and ignore the padding with label -100"
            )
        for entry in program.signature.inputs:
            kinds = tuple(
                Shard(dim) if is_split(entry.shape, dim, sizes) else INVARIANT
                for dim in (BATCH_DIM[axis.name] for axis in layout.tokens.axes)
            )
            placement = layout.normalised(Placement(layout.tokens, kinds))
            roles.set_role(nodes[entry.name], placements=(placement,))
        return replace(program, graph=graph, layout=layout)

    return Pass("shard_batch", rewrite, (("layout", str(layout)),), takes=(Level.CANONICAL,))


# The dimension of the batch that the ranks along an axis of the tokens' view share.
BATCH_DIM = {"dp": 0, "cp": 1, "tp": 1}


def batch_parts(layout: Layout) -> tuple[int, int]:
    """Into how many parts the sequences of a batch are divided, and the tokens of each.

    >>> batch_parts(Layout.of(8, cp=2, tp=2))
    (2, 4)
    """
    parts = [1, 1]
    for axis in layout.tokens.axes:
        parts[BATCH_DIM[axis.name]] *= axis.size
    return parts[0], parts[1]


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
