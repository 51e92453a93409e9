"""Gather many parameters with one collective."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, erase_dead
from moptrace.kernels.packing import packed_length
from moptrace.placement import INVARIANT, Layout, Placement, Shard
from moptrace.rules import Rule

__all__ = ["bucket_gathers"]

ops = torch.ops.moptrace


def bucket_gathers(size: int = 64 << 20) -> Pass:
    """Merge the gathers of parameters along one axis into buckets of about ``size`` bytes.

    The shards are packed into one buffer, the buffer is gathered, and the whole parameters are
    unpacked where the first of them is needed. Backward, by the transposes, packs the gradients
    and reduce-scatters them once, and adds up those of copies once. A bucket has one axis and one
    dtype. Weights of experts, which
    stay split along ``ep`` after the gather, are large already and keep their own collectives.

    Requires: a local program. Ensures: the same values; fewer, larger collectives.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        assert program.layout is not None
        changed = False
        for bucket in list(_buckets(graph, size)):
            if len(bucket) > 1:
                _merge(graph, bucket, program.layout)
                changed = True
        return program.with_graph(graph) if changed else program

    return Pass("bucket_gathers", rewrite, (("size", size),), takes=(Level.LOCAL,))


@dataclass(frozen=True)
class _Gather:
    """One ``all_gather`` of a parameter; ``copies`` is the axis along which shards are copied."""

    node: fx.Node
    shard: fx.Node
    copies: str | None
    axis: str
    dim: int
    length: int

    @property
    def shape(self) -> list[int]:
        return list(roles.tensor(self.node).shape)


_Key: TypeAlias = tuple[str, str | None, torch.dtype]


def _buckets(graph: fx.Graph, size: int) -> Iterator[list[_Gather]]:
    """Gathers of one axis and dtype in program order, cut where a bucket is full."""
    filling: dict[_Key, list[_Gather]] = {}
    bytes_: dict[_Key, int] = {}
    for node in graph.nodes:
        gather = _gather(node)
        if gather is None:
            continue
        whole = roles.tensor(node)
        key = (gather.axis, gather.copies, whole.dtype)
        filling.setdefault(key, []).append(gather)
        bytes_[key] = bytes_.get(key, 0) + whole.numel() * whole.element_size()
        if bytes_[key] >= size:
            yield filling.pop(key)
            bytes_.pop(key)
    yield from filling.values()


def _gather(node: fx.Node) -> _Gather | None:
    if node.target is not ops.all_gather.default:
        return None
    shard, axis, dim, length = node.args
    assert isinstance(shard, fx.Node) and isinstance(axis, str)
    assert isinstance(dim, int) and isinstance(length, int)
    copies = None
    if shard.target is ops.vary.default:
        shard, copies = shard.all_input_nodes[0], str(shard.args[1])
    if shard.op != "placeholder" or _split_elsewhere(node):
        return None
    return _Gather(node, shard, copies, axis, dim, length)


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
    example = roles.tensor(first.node)
    with graph.inserting_before(first.node):
        flat = graph.call_function(ops.pack.default, ([g.shard for g in bucket], numels))
        _describe(flat, first, example.new_empty(own), (flat_placement,), _pack_rule(bucket))
        if first.copies is not None:
            said = layout.said_along(flat_placement, first.copies)
            assert said is not None
            roles.set_role(flat, placements=(said.with_kind(first.copies, INVARIANT),))
            flat = graph.call_function(ops.vary.default, (flat, first.copies))
            _describe(flat, first, example.new_empty(own), (flat_placement,), None)
        gathered = graph.call_function(ops.all_gather.default, (flat, axis, 0, total))
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
