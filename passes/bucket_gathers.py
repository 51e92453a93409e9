"""Gather many parameters with one collective."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, erase_dead
from moptrace.kernels.packing import packed_length
from moptrace.placement import INVARIANT, Layout, Placement, Shard
from moptrace.rules import Rule, rule_for

__all__ = ["bucket_gathers"]

aten, ops = torch.ops.aten, torch.ops.moptrace


def bucket_gathers(size: int = 64 << 20) -> Pass:
    """Merge the gathers of parameters along one axis into buckets of about ``size`` bytes.

    The shards are packed into one buffer, the buffer is gathered, and the whole parameters are
    unpacked where the first of them is needed. Backward, by the transposes, packs the gradients
    and reduce-scatters them once, and adds up those of copies once. A bucket has one axis, one
    dtype to move and one to add up gradients in. Weights of experts, which stay split along ``ep``
    after the gather, are large already and keep their own collectives.

    Requires: a local program. Ensures: the same values; fewer, larger collectives.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        assert program.layout is not None
        changed = False
        stages = {p.name: p.stage for p in program.signature.parameters}
        for bucket in list(_buckets(graph, size, stages)):
            if len(bucket) > 1:
                _merge(graph, bucket, program.layout)
                changed = True
        return program.with_graph(graph) if changed else program

    return Pass("bucket_gathers", rewrite, (("size", size),), takes=(Level.LOCAL,))


@dataclass(frozen=True)
class _Gather:
    """One gather of a parameter: of its ``shard`` as it is stored, cast to ``dtype``.

    ``copies`` is the axis along which shards are copied.
    """

    node: fx.Node
    shard: fx.Node
    dtype: torch.dtype
    copies: str | None
    axis: str
    dim: int
    length: int

    @property
    def shape(self) -> list[int]:
        return list(roles.tensor(self.node).shape)


_Key: TypeAlias = tuple[int, str, str | None, torch.dtype, torch.dtype, torch.dtype]
_GATHERS = (ops.all_gather.default, ops.all_gather_cast.default)


def _buckets(graph: fx.Graph, size: int, stages: Mapping[str, int]) -> Iterator[list[_Gather]]:
    """Gathers of one stage, axis and set of dtypes in program order, cut where a bucket is full."""
    filling: dict[_Key, list[_Gather]] = {}
    bytes_: dict[_Key, int] = {}
    for node in graph.nodes:
        gather = _gather(node)
        if gather is None:
            continue
        whole = roles.tensor(node)
        dtypes = (roles.tensor(gather.shard).dtype, gather.dtype, whole.dtype)
        key = (stages[gather.shard.name], gather.axis, gather.copies, *dtypes)
        filling.setdefault(key, []).append(gather)
        bytes_[key] = bytes_.get(key, 0) + whole.numel() * whole.element_size()
        if bytes_[key] >= size:
            yield filling.pop(key)
            bytes_.pop(key)
    yield from filling.values()


def _gather(node: fx.Node) -> _Gather | None:
    if node.target not in _GATHERS:
        return None
    shard, axis, dim, *_, length = node.args
    assert isinstance(shard, fx.Node) and isinstance(axis, str)
    assert isinstance(dim, int) and isinstance(length, int)
    copies = None
    if shard.target is ops.vary.default:
        shard, copies = shard.all_input_nodes[0], str(shard.args[1])
    dtype = roles.tensor(shard).dtype
    if shard.target is aten._to_copy.default:
        shard = shard.all_input_nodes[0]
    if shard.op != "placeholder" or _split_elsewhere(node):
        return None
    return _Gather(node, shard, dtype, copies, axis, dim, length)


def _split_elsewhere(node: fx.Node) -> bool:
    """Whether ranks along another axis hold other parts, perhaps of another size: experts do."""
    placement = roles.placement(node)
    assert placement is not None
    pairs = zip(placement.view.axes, placement.kinds, strict=True)
    return any(isinstance(kind, Shard) and axis.size > 1 for axis, kind in pairs)


def _merge(graph: fx.Graph, bucket: list[_Gather], layout: Layout) -> None:
    first = bucket[0]
    axis, parts = first.axis, layout.size(first.axis)
    sizes = [list(layout.sizes(g.length, axis)) for g in bucket]
    dims = [g.dim for g in bucket]
    shapes = [g.shape for g in bucket]
    numels = [packed_length(*entry) for entry in zip(shapes, dims, sizes, strict=True)]
    own, total = sum(numels), sum(numels) * parts
    whole_placement = roles.placement(first.node)
    whole_placement = whole_placement and layout.said_along(whole_placement, axis)
    assert whole_placement is not None
    flat_placement = whole_placement.with_kind(axis, Shard(0))
    stored, example = roles.tensor(first.shard), roles.tensor(first.node)
    moved = example.new_empty(own, dtype=first.dtype)
    with graph.inserting_before(first.node):
        flat = graph.call_function(ops.pack.default, ([g.shard for g in bucket], numels))
        own_placement = flat_placement
        if first.copies is not None:
            said = layout.said_along(flat_placement, first.copies)
            assert said is not None
            own_placement = said.with_kind(first.copies, INVARIANT)
        _describe(flat, first, stored.new_empty(own), (own_placement,), _pack_rule(bucket))
        if first.dtype != stored.dtype:
            flat = graph.call_function(aten._to_copy.default, (flat,), {"dtype": first.dtype})
            roles.set_value(flat, moved)
            _describe(flat, first, moved, (own_placement,), rule_for(flat))
        if first.copies is not None:
            flat = graph.call_function(ops.vary.default, (flat, first.copies))
            _describe(flat, first, moved, (flat_placement,), None)
        dtypes = first.node.args[3:-1]  # of a gather that casts
        gathered = graph.call_function(first.node.target, (flat, axis, 0, *dtypes, total))  # type: ignore[arg-type]
        _describe(gathered, first, example.new_empty(total), (whole_placement,), None)
        args = (gathered, parts, shapes, dims, sizes)
        wholes = graph.call_function(ops.unpack.default, args)
        values = [roles.value(g.node) for g in bucket]
        placements = tuple(roles.placement(g.node) for g in bucket)
        _describe(wholes, first, values, placements, _unpack_rule(bucket))
        for position, gather in enumerate(bucket):
            item = graph.call_function(operator.getitem, (wholes, position))
            roles.set_value(item, roles.value(gather.node))
            roles.copy_role(item, of=gather.node)
            gather.node.replace_all_uses_with(item)
    for gather in bucket:
        graph.erase_node(gather.node)
    erase_dead(graph)


def _describe(
    node: fx.Node,
    like: _Gather,
    value: object,
    placements: tuple[Placement | None, ...],
    rule: Rule | None,
) -> None:
    roles.set_value(node, value)
    roles.set_role(node, placements=placements, rule=rule, module=roles.role(like.node).module)


def _pack_rule(bucket: list[_Gather]) -> Rule:
    """Each shard is split along its own dimension, and the buffer along its only one."""
    return Rule(
        tuple(
            tuple("p" if d == g.dim else f"W{i}D{d}" for d in range(len(g.shape)))
            for i, g in enumerate(bucket)
        ),
        (("p",),),
        frozenset(range(len(bucket))),
    )


def _unpack_rule(bucket: list[_Gather]) -> Rule:
    outs = tuple(tuple(f"W{i}D{d}" for d in range(len(g.shape))) for i, g in enumerate(bucket))
    return Rule((("F",),), outs, frozenset({0}))
