"""Write the program that each rank runs: its own shapes, and a collective for every reshard."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.collectives import COLLECTIVES, conversion
from moptrace.core import Level, Pass, Program, copy_node, erase_dead
from moptrace.errors import PlacementError
from moptrace.infer import travels
from moptrace.passes.drop_tokens import keeper
from moptrace.passes.gather_tokens import is_gathered
from moptrace.placement import (
    INVARIANT,
    PARTIAL,
    REPLICATE,
    Kind,
    Layout,
    Placement,
    Rows,
    Shard,
    View,
    own_blocks,
    parse_kind,
)
from moptrace.random import draw
from moptrace.reshard import cast_whole, reshard, route
from moptrace.rings import RINGS
from moptrace.rules import SIZE_ARGUMENT, Rule, argument, operands

__all__ = ["local_shape", "localize"]

aten, ops = torch.ops.aten, torch.ops.moptrace


def localize(pad: bool = False) -> Pass:
    """Replace global shapes by each rank's own and every reshard by a differentiable collective.

    The graph stays the same on all ranks: it names axes, and the rank's position along them is
    read when it runs. Requires: a placed program. Ensures: ranks that run the graph together
    compute the placed program's function, and its gradients by the collectives' transposes.

    With ``pad``, a rank that keeps at most so many pairs of each expert (``drop_tokens``) makes so
    many rows for it, some of them of no token. So every number of rows is known.
    """

    def rewrite(program: Program) -> Program:
        assert program.layout is not None
        localizer = _Localizer(program.layout, pad)
        for node in program.graph.nodes:
            localizer.visit(node)
        erase_dead(localizer.graph)
        return program.with_graph(localizer.graph)

    options = (("pad", True),) if pad else ()
    return Pass("localize", rewrite, options, takes=(Level.PLACED,), gives=Level.LOCAL)


def local_shape(
    shape: torch.Size | tuple[int, ...], placement: Placement, layout: Layout
) -> tuple[int, ...]:
    """The shape that the first rank holds, the largest where ranks differ.

    Routed rows, whose number is known only when the program runs, keep their global number.
    """
    return tuple(_local_size(size, dim, placement, layout) for dim, size in enumerate(shape))


def _local_size(size: int, dim: int, placement: Placement, layout: Layout) -> int:
    for axis in placement.axes_of_dim(dim):
        if axis.size > 1:
            size = layout.sizes(size, axis.name)[0]
    return size


class _Localizer:
    """The state of one walk that writes the local graph."""

    def __init__(self, layout: Layout, pad: bool = False):
        self.layout, self.pad = layout, pad
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.tables: dict[tuple[fx.Node, str], fx.Node] = {}
        self.site = 0

    def visit(self, node: fx.Node) -> None:
        if node.target is reshard:
            self.new[node] = self._collective(node)
        elif node.target is route:
            self.new[node] = self._route(node)
        elif node.target is cast_whole:
            self.new[node] = self._cast(node)
        elif node.op == "call_function":
            self.new[node] = self._operator(node)
        else:
            self.new[node] = self._copy(node)

    # --- ordinary operators ---

    def _copy(self, node: fx.Node) -> fx.Node:
        new = copy_node(self.graph, node, self.new.__getitem__)
        roles.set_value(new, self._local_value(node))
        return new

    def _local_value(self, node: fx.Node) -> Any:
        value = roles.value(node)
        placed = roles.placements(node)
        if isinstance(value, Tensor) and placed and placed[0]:
            return _resized(value, local_shape(value.shape, placed[0], self.layout))
        if isinstance(value, (tuple, list)) and len(placed) == len(value):
            return tuple(
                _resized(v, local_shape(v.shape, p, self.layout))
                if isinstance(v, Tensor) and p
                else v
                for v, p in zip(value, placed, strict=True)
            )
        return value

    def _operator(self, node: fx.Node) -> fx.Node:
        rule: Rule | None = roles.role(node).rule
        new = self._copy(node)
        self._shrink_sizes(node, new)
        if rule is not None and rule.random:
            self._seed(node, new)
        if node.target in RINGS:
            self._ring(node, new, rule)
        if node.target is ops.keep_pairs.default:
            new.args = new.args[:4]  # a rank has one group
        if node.target is ops.dispatch.default and (slots := self._slots(node)):
            new.args = (*new.args[:3], True, *(new.args[4:] or [None]), slots)
        if rule is not None and rule.average:
            return self._averaged(node, new, rule)
        return new

    def _shrink_sizes(self, node: fx.Node, new: fx.Node) -> None:
        packet: Any = getattr(node.target, "overloadpacket", None)
        if packet in (aten.split, aten.split_with_sizes):
            dim = argument(node, 2, "dim", 0)
            lengths = [piece.shape[dim] for piece in roles.value(new)]
            new.update_arg(1, lengths[0] if packet is aten.split else lengths)
        if packet in (aten.view, aten._unsafe_view):
            new.target = aten.reshape.default  # a part of a value may lie otherwise in memory
        at = SIZE_ARGUMENT.get(packet)
        placement = roles.placement(node)
        if packet is aten.squeeze:  # a split dimension may have become 1 as well
            whole = roles.tensor(node.all_input_nodes[0]).shape
            given = node.args[1] if len(node.args) > 1 else range(len(whole))
            dims = [given] if isinstance(given, int) else list(given)  # type: ignore[arg-type]
            new.target = aten.squeeze.dims
            new.args = (new.args[0], [d for d in dims if whole and whole[d] == 1])
        if at is None or placement is None:
            return
        if packet is aten.expand:  # the ranks' shares may differ: keep what is there
            own = [-1 if placement.axes_of_dim(d) else n for d, n in enumerate(new.args[1])]  # type: ignore
            new.update_arg(1, own)
            return
        sizes = [
            self._size(entry, dim, roles.tensor(node).shape[dim], placement)
            for dim, entry in enumerate(new.args[at])  # type: ignore[arg-type]
        ]
        new.update_arg(at, sizes)

    def _size(self, entry: Any, dim: int, size: int, placement: Placement) -> Any:
        if isinstance(entry, fx.Node) or entry == -1:
            return entry
        if dim == 0 and any(isinstance(kind, Rows) for kind in placement.kinds):
            return -1
        return _local_size(size, dim, placement, self.layout)

    def _seed(self, node: fx.Node, new: fx.Node) -> None:
        placement = roles.placements(node)[0]
        assert placement is not None
        axes = [
            axis.name
            for axis, kind in zip(placement.view.axes, placement.kinds, strict=True)
            if isinstance(kind, (Shard, Rows)) and axis.size > 1
        ]
        new.args = (node.target, self.site, tuple(axes), *new.args)  # type: ignore[assignment]
        new.target = draw
        self.site += 1

    def _ring(self, node: fx.Node, new: fx.Node, rule: Rule | None) -> None:
        """An operator whose operands are split twice over one axis travels around it."""
        placed = [roles.placement(x) for x in operands(node)]
        said = [p for p in (roles.placements(node)[0], *placed) if p is not None]
        assert rule is not None and len(said) == len(placed) + 1
        view = self.layout.common_view(said)
        axes: list[str] = []
        for axis in view.axes:
            result, *kinds = (_in(view, p).kind(axis.name) for p in said)
            if axis.size > 1 and travels(rule, result, kinds):
                axes.append(axis.name)
        if not axes:
            return
        around = self.layout.spanning(view, axes)
        if around is None:
            raise PlacementError(
                f"{node.target} would travel around {' and '.join(axes)}, which are no one axis of "
                f"{self.layout} ({roles.where(node)})"
            )
        row = RINGS[node.target]
        shared = [self._shared(x, view, axes) for x in operands(node)]
        new.target = row.op
        new.args = (*new.args, *row.lengths(*shared), around)

    def _shared(self, x: fx.Node, view: View, axes: Sequence[str]) -> Tensor:
        """A tensor as large as what the ranks along some axes have of it together."""
        placement = roles.placement(x)
        assert placement is not None
        shape = list(roles.tensor(x).shape)
        for dim in range(len(shape)):
            for other in _in(view, placement).axes_of_dim(dim):
                if other.name not in axes and other.size > 1:
                    shape[dim] = _divided_size(shape[dim], other.size, x)
        return _resized(roles.tensor(x), tuple(shape))

    def _averaged(self, node: fx.Node, new: fx.Node, rule: Rule) -> fx.Node:
        """A mean over a split dimension: the mean of the ranks' means, all of equal size."""
        placement = roles.placement(node)
        operand = roles.placement(node.all_input_nodes[0])
        assert placement is not None and operand is not None
        operand = operand.expressed_in(placement.view) or operand
        placement = placement.expressed_in(operand.view) or placement
        parts = math.prod(
            axis.size
            for axis, before, after in zip(
                operand.view.axes, operand.kinds, placement.kinds, strict=True
            )
            if isinstance(before, Shard) and after == PARTIAL
        )
        if parts == 1:
            return new
        return self._call(node, aten.div.Tensor, (new, parts), _divided(rule))

    # --- collectives ---

    def _collective(self, node: fx.Node) -> fx.Node:
        x, axis, source, target = node.args
        assert isinstance(x, fx.Node) and isinstance(axis, str)
        before, after = parse_kind(str(source)), parse_kind(str(target))
        if before == PARTIAL and self._slots(x):
            return self._counts_of_slots(node, axis, after)
        if _counts_rows(x) and before == PARTIAL and after == Shard(0):
            self._table(x, axis)
        table = self.tables.get(self._key(x, axis))
        if before == PARTIAL and table is not None:  # which says the counts of all ranks
            return self._call(node, aten.sum.dim_IntList, (table, [0]), None)
        name = conversion(before, after)
        assert name is not None, f"no collective from {source} to {target}"
        for end, kind in ((x, before), (node, after)):
            if isinstance(kind, Shard) and (blocks := own_blocks(self._said(end, axis), axis)) != 1:
                assert blocks is not None
                return self._blocked(node, name, axis, Shard(kind.dim, blocks))
        arguments = _arguments(name, before, after, axis, lambda dim: self._length(x, dim, axis))
        return self._call(node, COLLECTIVES[name].op, (self.new[x], *arguments), None)

    def _cast(self, node: fx.Node) -> fx.Node:
        """A gather of what is cast afterwards is one collective, which casts first."""
        x, dtype = node.args
        assert isinstance(x, fx.Node)
        gather = self.new[x]
        before = self.new.get(x.args[0]) if x.target is reshard else None  # type: ignore[call-overload]
        if before is None or gather.target is not ops.all_gather.default:
            rule = roles.role(node).rule
            new = self._call(node, aten._to_copy.default, (gather,), rule)
            new.update_kwarg("dtype", dtype)
            return new
        _, axis, dim, length = gather.args
        arguments = (before, axis, dim, dtype, roles.tensor(x).dtype, length)
        return self._call(node, ops.all_gather_cast.default, arguments, None)

    def _blocked(self, node: fx.Node, name: str, axis: str, split: Shard) -> fx.Node:
        """A collective over each block of a dimension, which becomes one of its own."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        dim, blocks = split.dim, split.blocks
        shape = list(roles.tensor(x).shape)
        length = shape[dim] // blocks
        rule = _blocks_apart(len(shape), dim, blocks, length)
        apart = [*shape[:dim], blocks, length, *shape[dim + 1 :]]
        value = roles.tensor(x).new_empty(apart)

        def opened_kind(kind: Kind) -> Kind:
            if not isinstance(kind, Shard) or kind.dim < dim:
                return kind
            if kind.dim > dim:
                return Shard(kind.dim + 1, kind.blocks)
            inside = kind.blocks >= blocks  # it splits every block, not the blocks
            return Shard(dim + 1, kind.blocks // blocks) if inside else kind

        def described(new: fx.Node, of: fx.Node) -> fx.Node:
            placement = self._said(of, axis)
            shown = Placement(placement.view, tuple(map(opened_kind, placement.kinds)))
            roles.set_role(new, placements=(shown,))
            roles.set_value(new, _resized(value, local_shape(value.shape, shown, self.layout)))
            return new

        pairs = zip(self._said(x, axis).view.axes, self._said(x, axis).kinds, strict=True)
        others = [(a.size, opened_kind(k)) for a, k in pairs if a.name != axis]
        own = [*apart]
        for at in (dim, dim + 1):
            for count in (n for n, kind in others if isinstance(kind, Shard) and kind.dim == at):
                own[at] = _divided_size(own[at], count, node)
        cut = (self.new[x], dim, [own[dim], -1])  # the ranks' shares of other dimensions may differ
        opened = described(self._call(x, aten.unflatten.int, cut, rule), x)
        before, after = (opened_kind(self._said(end, axis).kind(axis)) for end in (x, node))
        arguments = _arguments(name, before, after, axis, own.__getitem__)
        row = COLLECTIVES[name].op
        moved = described(self._call(node, row, (opened, *arguments), None), node)
        joined = (moved, dim, dim + 1)
        return self._call(node, aten.flatten.using_ints, joined, _reversed(rule))

    def _route(self, node: fx.Node) -> fx.Node:
        x, counts, axis, source, target = node.args
        assert isinstance(x, fx.Node) and isinstance(counts, fx.Node) and isinstance(axis, str)
        before, after = parse_kind(str(source)), parse_kind(str(target))
        if slots := self._slots(counts):
            return self._route_slots(node, axis, (before, after), slots)
        if name := conversion(before, after):
            table = self._table_of_all(counts, axis)
            return self._call(node, COLLECTIVES[name].op, (self.new[x], table, axis), None)
        table, own = self._table(counts, axis), self.new[counts]
        experts = roles.tensor(counts).shape[0]
        arrival = self._with_kind(node, axis, Rows("arrival"))
        if before == Rows("token"):
            rows = self.new[x]
            sent = self._call(node, ops.send_rows.default, (rows, own, table, axis, experts), None)
            roles.set_role(sent, placements=(arrival,))
            return self._call(node, ops.group_rows.default, (sent, table), None)
        rows = self._call(node, ops.ungroup_rows.default, (self.new[x], table), None)
        roles.set_role(rows, placements=(arrival,))
        return self._call(node, ops.return_rows.default, (rows, own, table, axis, experts), None)

    def _key(self, counts: fx.Node, axis: str) -> tuple[fx.Node, str]:
        """What a table is found by: one serves all names of the same ranks."""
        names = (a.name for view in self.layout.views for a in view.axes)
        return counts, next(name for name in names if self.layout.same_ranks(name, axis))

    def _table(self, counts: fx.Node, axis: str) -> fx.Node:
        """How many rows of each own expert come from each rank."""
        key = self._key(counts, axis)
        if key not in self.tables:
            experts = roles.tensor(counts).shape[0]
            args = (self.new[counts], axis, experts)
            table = self._call(counts, ops.exchange_counts.default, args, None)
            ranks, own = self.layout.size(axis), self.layout.sizes(experts, axis)[0]
            roles.set_value(table, roles.tensor(counts).new_empty(ranks, own))
            roles.set_role(table, placements=(self._with_kind(counts, axis, Shard(1)),))
            self.tables[key] = table
        return self.tables[key]

    def _table_of_all(self, counts: fx.Node, axis: str) -> fx.Node:
        """How many rows of each own expert every rank has."""
        key = self._key(counts, axis)
        if key not in self.tables:
            ranks, (own,) = self.layout.size(axis), self._local_value(counts).shape
            held = self._said(counts, axis)
            kinds = (Shard(1) if kind == Shard(0) else kind for kind in held.kinds)
            one = Placement(held.view, tuple(kinds)).with_kind(axis, Shard(0))
            row = self._call(counts, aten.unsqueeze.default, (self.new[counts], 0), None)
            gather = COLLECTIVES["all_gather_invariant"].op
            table = self._call(counts, gather, (row, axis, 0, ranks), None)
            whole = one.with_kind(axis, INVARIANT)
            for node, placement, length in ((row, one, 1), (table, whole, ranks)):
                roles.set_value(node, roles.tensor(counts).new_empty(length, own))
                roles.set_role(node, placements=(placement,))
            self.tables[key] = table
        return self.tables[key]

    # --- rows of which every expert has as many ---

    def _slots(self, node: fx.Node) -> int:
        """The rows that a rank has for each expert, given a dispatch or counts of it; or 0."""
        ranks = 1  # from which rows have come
        while self.pad and node.target in (operator.getitem, reshard):
            if node.target is reshard and parse_kind(str(node.args[2])) == PARTIAL:
                ranks *= self.layout.size(str(node.args[1]))
            node = node.all_input_nodes[0]
        if not self.pad or node.target is not ops.dispatch.default:
            return 0
        if is_gathered(node):  # from as many ranks as the experts are shared by
            ranks *= math.prod(axis.size for axis in self.layout.experts.axes[1:])
        keep = keeper(node)
        capacity = keep.args[3] if keep else None
        assert isinstance(capacity, int), f"nothing bounds the rows of {node.format_node()}"
        return capacity * ranks

    def _counts_of_slots(self, node: fx.Node, axis: str, after: Kind) -> fx.Node:
        """The counts of all ranks together: each has the same."""
        x, parts = node.args[0], self.layout.size(axis)
        assert isinstance(x, fx.Node)
        whole = self._call(node, aten.mul.Tensor, (self.new[x], parts), None)
        if not isinstance(after, Shard):
            return whole
        roles.set_role(whole, placements=(self._with_kind(node, axis, INVARIANT),))
        length = self._length(node, after.dim, axis)
        return self._call(node, ops.take_shard.default, (whole, axis, after.dim, length), None)

    def _route_slots(
        self, node: fx.Node, axis: str, kinds: tuple[Kind, Kind], slots: int
    ) -> fx.Node:
        """Rows move as ``_route`` moves them, but in known numbers."""
        x, counts = node.args[:2]
        assert isinstance(x, fx.Node) and isinstance(counts, fx.Node)
        experts = roles.tensor(counts).shape[0]
        names: dict[tuple[Kind, Kind], str] = {
            (Rows("token"), Rows("expert")): "send_slots",
            (Rows("expert"), Rows("token")): "return_slots",
            (Rows("token"), REPLICATE): "all_gather_slots",
            (PARTIAL, Rows("token")): "reduce_scatter_slots",
        }
        arguments = (self.new[x], axis, slots, experts)
        return self._call(node, COLLECTIVES[names[kinds]].op, arguments, None)

    def _length(self, node: fx.Node, dim: int, axis: str) -> int:
        """The size of a dimension that the ranks of an axis share: what the others leave of it."""
        size = roles.tensor(node).shape[dim]
        for other in self._said(node, axis).axes_of_dim(dim):
            if other.name != axis:
                size = _divided_size(size, other.size, node)
        return size

    def _said(self, node: fx.Node, axis: str) -> Placement:
        """The node's placement in the view of an axis."""
        placement = roles.placement(node)
        said = self.layout.said_along(placement, axis) if placement else None
        assert said is not None, f"{node.format_node()} says nothing along {axis}"
        return said

    def _with_kind(self, node: fx.Node, axis: str, kind: Kind) -> Placement:
        """The node's placement with another kind along one axis."""
        return self._said(node, axis).with_kind(axis, kind)

    def _call(self, node: fx.Node, target: Any, args: tuple[Any, ...], rule: Any) -> fx.Node:
        """A new node that stands for ``node``."""
        new = self.graph.call_function(target, args)
        roles.copy_role(new, of=node, rule=rule)
        roles.set_value(new, self._local_value(node))
        return new


def _in(view: View, placement: Placement) -> Placement:
    said = placement.expressed_in(view)
    assert said is not None, f"{placement} cannot be said in {view}"
    return said


def _resized(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return value if tuple(value.shape) == shape else value.new_empty(shape)


def _counts_rows(node: fx.Node) -> bool:
    """Whether a node is the counts that dispatch gives."""
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.target is ops.dispatch.default


def _blocks_apart(rank: int, dim: int, blocks: int, length: int) -> Rule:
    """The view that makes the blocks of a dimension a dimension of their own."""
    dims = [f"d{i}" for i in range(rank)]
    apart = (*dims[:dim], "b", dims[dim], *dims[dim + 1 :])
    joined = (*dims[:dim], f"b.{dims[dim]}", *dims[dim + 1 :])
    sizes = {"b": blocks, dims[dim]: length}
    return Rule((joined,), (apart,), frozenset({0}), quantum=sizes)


def _divided_size(size: int, parts: int, node: fx.Node) -> int:
    """The share of another axis of a dimension that two axes split."""
    if size % parts:
        raise PlacementError(
            f"a dimension of {size} is split over two axes, and {parts} ranks of one of them do "
            f"not divide it ({roles.where(node)})"
        )
    return size // parts


def _reversed(rule: Rule) -> Rule:
    return Rule(rule.results, rule.operands, rule.linear, quantum=rule.quantum)


def _divided(rule: Rule) -> Rule:
    return Rule(rule.results, rule.results, frozenset({0}))


def _arguments(
    name: str, source: Kind, target: Kind, axis: str, length: Callable[[int], int]
) -> tuple[Any, ...]:
    """The arguments after the tensor; lengths are those that the axis's ranks share."""
    if name == "all_to_all":
        assert isinstance(source, Shard) and isinstance(target, Shard)
        return (axis, target.dim, length(target.dim), source.dim, length(source.dim))
    if "int dim" not in COLLECTIVES[name].schema:
        return (axis,)
    split = source if isinstance(source, Shard) else target
    assert isinstance(split, Shard)
    return (axis, split.dim, length(split.dim))
