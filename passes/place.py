"""Place every value, and write a reshard wherever a placement changes."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from moptrace import roles
from moptrace.collectives import conversion
from moptrace.core import Level, Pass, Program, copy_node, erase_dead
from moptrace.errors import PlacementError
from moptrace.infer import Held, infer, satisfies, token_blocks
from moptrace.placement import (
    INVARIANT,
    PARTIAL,
    REPLICATE,
    Axis,
    Invariant,
    Kind,
    Partial,
    Placement,
    Replicate,
    Rows,
    Shard,
    View,
    own_blocks,
    parse_kind,
)
from moptrace.reshard import cast_whole, constrain, reshard, route
from moptrace.rules import Rule, operands, results, rule_for

__all__ = ["ReplicationWarning", "place"]

aten = torch.ops.aten


class ReplicationWarning(UserWarning):
    """An operator without a sharding rule runs on whole values on every rank."""


def place() -> Pass:
    """Follow the placements of parameters and batch through the graph.

    Each operator's rule says which placements it takes and gives; where an operand is held in
    another way, a ``reshard`` (or ``route``, for routed rows) is written before the operator. An
    operator without a rule gets whole values on every rank, with a ``ReplicationWarning`` that says
    what that costs. Sums that are pending at the outputs are added up.

    Requires: placements on all parameters, buffers and inputs. Ensures: every tensor is placed,
    the loss is invariant, and on one device the program computes what it did.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        placer = _Placer(graph, program)
        for node in list(graph.nodes):
            placer.visit(node)
        placer.outputs(program)
        erase_dead(graph)
        program = program.with_graph(graph)
        for note in placer.notes:
            warnings.warn(note, ReplicationWarning, stacklevel=2)
            program = program.with_note(note)
        return program

    return Pass(
        "place",
        rewrite,
        takes=(Level.CANONICAL,),
        gives=Level.PLACED,
        needs=("shard_parameters", "shard_batch"),
    )


_FILLS = {aten.zeros, aten.ones, aten.full, aten.empty}
_REARRANGES = {
    aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
}  # fmt: skip
_DETACHES = {aten.detach.default}
# The changes of routed rows along an axis, and how the counts of rows so held are held.
_ROUTES = {
    (Rows("token"), Rows("expert")),
    (Rows("expert"), Rows("token")),
    (Rows("token"), REPLICATE),
    (PARTIAL, Rows("token")),
}
_COUNTED: dict[Kind, Kind] = {Rows("token"): PARTIAL, Rows("expert"): Shard(0)}


_ACTIVATION = 1 << 40  # elements of what carries no gradient that one of an activation outweighs


class _Placer:
    """The state of one walk through a graph."""

    def __init__(self, graph: fx.Graph, program: Program):
        assert program.layout is not None
        self.graph = graph
        self.layout = program.layout
        self.parameters = {p.name: p for p in program.signature.parameters}
        self.notes: list[str] = []
        self.differentiable: set[fx.Node] = set()
        self.of_parameters: set[fx.Node] = set()  # made of parameters alone
        self.activations: set[fx.Node] = set()  # made of the batch, and differentiable
        self.counts: dict[fx.Node, fx.Node] = {}  # routed rows -> the counts of their dispatch
        self.tokens: dict[fx.Node, Placement] = {}  # routed rows -> how their tokens were split
        self.moved: dict[tuple[fx.Node, str, Kind], fx.Node] = {}

    # --- one node ---

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            roles.set_role(node, placements=(Placement.uniform(self.layout.home, INVARIANT),))
        elif node.op == "call_function":
            self._provenance(node)
            if node.target is constrain:
                self._constrain(node)
            elif node.target is operator.getitem and not isinstance(_value(node.args[0]), Tensor):
                self._getitem(node)
            else:
                self._operator(node)

    def _placeholder(self, node: fx.Node) -> None:
        if not roles.placements(node):
            raise PlacementError(f"{roles.where(node)} has no placement: shard it first")
        if parameter := self.parameters.get(node.name):
            self.of_parameters.add(node)
            if parameter.requires_grad:
                self.differentiable.add(node)

    def _provenance(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        value = _value(node)
        tensors = value if isinstance(value, (tuple, list)) else [value]
        floating = any(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)
        if floating and node.target not in _DETACHES:
            if any(x in self.differentiable for x in inputs):
                self.differentiable.add(node)
        if inputs and all(x in self.of_parameters for x in inputs):
            self.of_parameters.add(node)
        elif node in self.differentiable:
            self.activations.add(node)
        for x in inputs:
            self._inherit(node, x)

    def _inherit(self, node: fx.Node, x: fx.Node) -> None:
        """What is made of routed rows has their counts and their tokens, until it is combined."""
        if node.target is torch.ops.moptrace.combine.default:
            return
        if x in self.counts:
            self.counts[node] = self.counts[x]
        if x in self.tokens:
            self.tokens[node] = self.tokens[x]

    def _constrain(self, node: fx.Node) -> None:
        """Move a value as asked; along an axis of one rank there is nothing to do."""
        x, axis, kind = node.args
        assert isinstance(x, fx.Node) and isinstance(axis, str)
        placement = roles.placement(x)
        now = self.layout.said_along(placement, axis) if placement else None
        if now is None:
            raise PlacementError(f"{roles.where(x)}: {placement} says nothing along {axis}")
        wanted = now.with_kind(axis, asked := self._asked(kind, axis))
        if wanted != now and x in self.of_parameters and isinstance(asked, Shard):
            beside = [a.name for a in now.axes_of_dim(asked.dim)]
            for other in _split_axes(now) if self._splits_as_one(now) else beside:
                if other != axis:  # gathered on the way, so not split again
                    wanted = wanted.with_kind(other, REPLICATE)
        node.replace_all_uses_with(x if wanted == now else self._move(x, now, wanted, node))
        self.graph.erase_node(node)

    def _asked(self, kind: Any, axis: str) -> Kind:
        """A kind that is written, or that of another value."""
        if not isinstance(kind, fx.Node):
            return parse_kind(str(kind))
        placement = roles.placement(kind)
        said = self.layout.said_along(placement, axis) if placement else None
        assert said is not None, f"{roles.where(kind)}: {placement} says nothing along {axis}"
        return said.kind(axis)

    def _getitem(self, node: fx.Node) -> None:
        source, at = node.args
        assert isinstance(source, fx.Node) and isinstance(at, int)
        roles.set_role(node, placements=(roles.placements(source)[at],))
        if source.target is torch.ops.moptrace.dispatch.default and at == 1:
            for sibling in source.users:
                self.counts[sibling] = node
            self.counts[source] = node

    def _operator(self, node: fx.Node) -> None:
        inputs = operands(node)
        rule = rule_for(node)
        if rule is None or not all(r is not None for r in results(node)):
            rule = self._whole(node, inputs)
        view = self._view(inputs, rule)
        for position, x in enumerate(inputs):
            inputs[position] = self._sayable(x, view, before=node)
            if inputs[position] is not x:
                _replace_operand(node, position, inputs[position])
        placed = [self._in_view(x, view) for x in inputs]
        needs: list[list[Kind]] = [[] for _ in inputs]
        gives: list[list[Kind]] = [[] for _ in rule.results]
        for axis in view.axes:
            held = [
                Held(
                    p.kind(axis.name),
                    self._weight(x),
                    x in self.differentiable,
                    token_blocks(self.tokens.get(x), view, axis.name),
                )
                for x, p in zip(inputs, placed, strict=True)
            ]
            demand = infer(rule, held, axis.size)
            for position, (operand, need) in enumerate(zip(held, demand.operands, strict=True)):
                needs[position].append(operand.kind if satisfies(operand, need) else need)
            for position, kind in enumerate(demand.results):
                gives[position].append(kind)
        for position, (x, now) in enumerate(zip(inputs, placed, strict=True)):
            wanted = Placement(view, tuple(needs[position]))
            if wanted != now:
                moved = self._move(x, now, wanted, before=node)
                _replace_operand(node, position, moved)
        outs = tuple(self._in_words(Placement(view, tuple(kinds)), node) for kinds in gives)
        roles.set_role(node, placements=outs, rule=rule)
        if node.target is torch.ops.moptrace.dispatch.default:
            tokens = roles.placement(operands(node)[0])
            assert tokens is not None
            self.tokens[node] = tokens

    def _in_words(self, placement: Placement, node: fx.Node) -> Placement:
        """A result's placement in the home view or that of tokens, where one can say it.

        What is made of parameters stays in the words in which it is stored: several axes split a
        length that they do not divide in other places than one axis does.
        """
        found = self.layout.normalised(placement)
        of_words = found.view == self.layout.vocabulary and node not in self.of_parameters
        return (found.expressed_in(self.layout.tokens) if of_words else None) or found

    def _whole(self, node: fx.Node, inputs: list[fx.Node]) -> Rule:
        """A rule that splits nothing, for an operator that has none."""
        bytes_ = 0
        for x in inputs:
            elements: Any = roles.tensor(x).numel()
            if not isinstance(elements, int):
                raise PlacementError(
                    f"{node.target} works on as many rows as routing gives, outside any "
                    f"Mixture-of-Experts block that was recognised ({roles.where(node)}). Select "
                    "each expert's tokens with torch.where or a sort, as in the examples."
                )
            p = roles.placement(x)
            if p and any(isinstance(k, (Shard, Rows)) for k in p.kinds):
                bytes_ += _bytes(x)
        if bytes_:
            self.notes.append(
                f"{node.target} has no sharding rule, so every rank computes it on whole values: "
                f"{bytes_:,} bytes gathered per step ({roles.where(node)}). "
                "Write a rule in moptrace.rules.RULES, or use an operator that has one."
            )
        dims = tuple(tuple(f"W{i}D{d}" for d in range(_rank(x))) for i, x in enumerate(inputs))
        outs = tuple(
            tuple(f"R{i}D{d}" for d in range(r.dim() if r is not None else 0))
            for i, r in enumerate(results(node))
        )
        return Rule(dims, outs)

    def _weight(self, node: fx.Node) -> int:
        """Activations decide how an operator is split, before masks and positions of any size."""
        if node in self.of_parameters:
            return 0
        return roles.tensor(node).numel() * (_ACTIVATION if node in self.activations else 1)

    def _view(self, inputs: list[fx.Node], rule: Rule) -> View:
        """The view in which an operator sees its operands: one of its tokens, if it has any."""
        placements = [p for x in inputs if (p := roles.placement(x)) is not None]
        tokens = [self.tokens[x] for x in inputs if x in self.tokens] if rule.has_tokens else []
        view = self.layout.common_view([*placements, *tokens])
        if any(p.expressed_in(view) is None for p in tokens):
            return self.layout.common_view(tokens)
        return view

    def _sayable(self, x: fx.Node, view: View, before: fx.Node) -> fx.Node:
        """An operand that a view has no words for: rows go home, the rest is gathered.

        What is gathered stays split along axes that the view has too.
        """
        placement = roles.placement(x)
        assert placement is not None, f"{x.format_node()} is not placed"
        if placement.expressed_in(view) is not None:
            return x
        if all(isinstance(kind, Rows) for kind in placement.kinds):
            home = Placement.uniform(placement.view, Rows("token"))
            return self._move(x, placement, home, before)
        shared = {axis.name for axis in view.axes}
        whole = REPLICATE if x in self.differentiable else INVARIANT
        kinds = tuple(
            kind if axis.name in shared else whole
            for axis, kind in zip(placement.view.axes, placement.kinds, strict=True)
        )
        return self._move(x, placement, Placement(placement.view, kinds), before)

    def _in_view(self, node: fx.Node, view: View) -> Placement:
        placement = roles.placement(node)
        assert placement is not None, f"{node.format_node()} is not placed"
        return self._said(placement, view, node)

    def _said(self, placement: Placement, view: View, node: fx.Node) -> Placement:
        found = placement.expressed_in(view)
        if found is None:
            raise PlacementError(f"{roles.where(node)}: {placement} cannot be said in {view}")
        return found

    # --- changes of placement ---

    def _move(self, x: fx.Node, now: Placement, wanted: Placement, before: fx.Node) -> fx.Node:
        """Convert one axis after another, in the view in which the fewest axes change."""
        changed = [(n, w) for n, w in zip(now.kinds, wanted.kinds, strict=True) if n != w]
        gathers = all(n != PARTIAL and isinstance(w, (Replicate, Invariant)) for n, w in changed)
        under = x.target is cast_whole or (gathers and x.target in _REARRANGES)
        if under and x not in self.activations:
            return self._move_under(x, now, wanted, before)
        simplest = self._simplest(now)
        now, wanted = self._shortest(x, now, wanted)
        if self._splits_as_one(now) and x in self.of_parameters:
            kind = INVARIANT if INVARIANT in wanted.kinds else REPLICATE
            whole = simplest
            for axis in _split_axes(simplest):
                whole = whole.with_kind(axis, kind)
            x = self._move(x, simplest, whole, before)
            now = self._said(whole, now.view, x)
        for axis in now.view.axes:  # before anything is gathered: so gradients are added up late
            if (now.kind(axis.name), wanted.kind(axis.name)) == (INVARIANT, REPLICATE):
                x, now = self._step(x, now, axis, REPLICATE, before)
        for axis in now.view.axes:  # rows go to their experts' ranks before they are gathered there
            if self._goes_to_experts(x, wanted.kind(axis.name)):
                x, now = self._step(x, now, axis, wanted.kind(axis.name), before)
        middle = _untangled(now, wanted)
        for axis in reversed(now.view.axes):  # inner slices are gathered before outer ones
            x, now = self._step(x, now, axis, middle.kind(axis.name), before)
        for axis in now.view.axes:
            x, now = self._step(x, now, axis, wanted.kind(axis.name), before)
        return x

    def _goes_to_experts(self, x: fx.Node, target: Kind) -> bool:
        """Whether rows become those of a rank's experts, or their counts do."""
        return target == Rows("expert") or (self._is_counts(x) and isinstance(target, Shard))

    def _is_counts(self, x: fx.Node) -> bool:
        return self.counts.get(x) is x

    def _shortest(
        self, x: fx.Node, now: Placement, wanted: Placement
    ) -> tuple[Placement, Placement]:
        """Both ends in the words of the view in which the fewest axes change."""
        own = [p.view for p in roles.placements(x) if p is not None]
        views = dict.fromkeys((self.layout.home, *own, *self.layout.views))
        said = [(now.expressed_in(view), wanted.expressed_in(view)) for view in views]
        ways = [(a, b) for a, b in said if a is not None and b is not None]
        return min(
            (*ways, (now, wanted)),
            key=lambda way: sum(
                axis.size > 1 and a != b
                for axis, a, b in zip(way[0].view.axes, way[0].kinds, way[1].kinds, strict=True)
            ),
        )

    def _splits_as_one(self, now: Placement) -> bool:
        """Whether a dimension is split over more ranks than any axis here has, perhaps unevenly.

        None of these axes alone can change it.
        """
        return len(_split_axes(self._simplest(now))) < len(_split_axes(now))

    def _simplest(self, placement: Placement) -> Placement:
        """The placement in the words of the view in which the fewest axes split it."""
        said = (placement.expressed_in(view) for view in self.layout.views)
        return min((p for p in said if p is not None), key=lambda p: len(_split_axes(p)))

    def _step(
        self, x: fx.Node, now: Placement, axis: Axis, target: Kind, before: fx.Node
    ) -> tuple[fx.Node, Placement]:
        """Convert along one axis, once for all uses."""
        source = now.kind(axis.name)
        if axis.size == 1 or source == target:
            return x, now
        now = now.with_kind(axis.name, target)
        key = (x, axis.name, target)
        if key not in self.moved:
            self.moved[key] = self._convert(x, axis.name, source, target, now, before)
        return self.moved[key], now

    def _move_under(
        self, x: fx.Node, now: Placement, wanted: Placement, before: fx.Node
    ) -> fx.Node:
        """Gather before a value is rearranged: once for all uses, and gradients in its layout.

        And before a cast of a parameter to fewer bits, so that gradients are added up in more.
        """
        key = (x, str(wanted), INVARIANT)
        if key not in self.moved:
            source = x.args[0]
            assert isinstance(source, fx.Node)
            held = self._in_view(source, now.view)
            goal = held
            for axis, have, want in zip(now.view.axes, now.kinds, wanted.kinds, strict=True):
                goal = goal if have == want else goal.with_kind(axis.name, want)
            moved = self._move(source, held, goal, before)
            with self.graph.inserting_before(before):
                new = copy_node(self.graph, x, lambda n: moved if n is source else n)
            roles.set_role(new, placements=(self.layout.normalised(wanted),))
            self._provenance(new)
            self.moved[key] = new
        return self.moved[key]

    def _convert(
        self, x: fx.Node, axis: str, source: Kind, target: Kind, now: Placement, before: fx.Node
    ) -> fx.Node:
        with self.graph.inserting_before(before):
            if (source, target) in _ROUTES:
                counts = self._counts_of(x, axis, now, before)
                args = (x, counts, axis, str(source), str(target))
                new = self.graph.call_function(route, args)
            elif _is_fill(x) and isinstance(source, Invariant) and isinstance(target, Shard):
                new = copy_node(self.graph, x)  # each rank fills its own part
                roles.set_role(new, rule=None)
            else:
                step = _first_step(source, target, x, now, axis)
                if step is not None:
                    x = self._convert(x, axis, source, step, now.with_kind(axis, step), before)
                    source = step
                new = self.graph.call_function(reshard, (x, axis, str(source), str(target)))
        roles.set_value(new, _value(x))
        roles.copy_role(new, of=x, placements=(self.layout.normalised(now),), rule=None)
        if x in self.differentiable:
            self.differentiable.add(new)
        if x in self.of_parameters:
            self.of_parameters.add(new)
        if x in self.activations:
            self.activations.add(new)
        self._inherit(new, x)
        return new

    def _counts_of(self, x: fx.Node, axis: str, rows: Placement, before: fx.Node) -> fx.Node:
        """The counts of rows that move along an axis, held as these along the other axes."""
        counts = self.counts[x]
        kinds = [
            PARTIAL if entry.name == axis else _COUNTED.get(kind, REPLICATE)
            for entry, kind in zip(rows.view.axes, rows.kinds, strict=True)
        ]
        now = self._in_view(counts, rows.view)
        return self._move(counts, now, Placement(rows.view, tuple(kinds)), before)

    # --- the end ---

    def outputs(self, program: Program) -> None:
        """Add up pending sums; keep each rank's own part of what is split."""
        end = self.graph.output_node()
        final: list[fx.Node] = []
        for position, node in enumerate(end.args[0]):  # type: ignore[arg-type]
            assert isinstance(node, fx.Node)
            whole = position == program.signature.loss
            whole |= program.signature.outputs[position].buffer is not None
            now = roles.placement(node)
            assert now is not None
            kinds = tuple(_final(kind, whole) for kind in now.kinds)
            wanted = Placement(now.view, kinds)
            final.append(node if wanted == now else self._move(node, now, wanted, end))
        end.args = (tuple(final),)


def _final(kind: Kind, whole: bool) -> Kind:
    if isinstance(kind, Partial) or (whole and isinstance(kind, Shard)):
        return INVARIANT
    return kind


def _first_step(source: Kind, target: Kind, x: fx.Node, after: Placement, axis: str) -> Kind | None:
    """The kind to pass through where no single collective converts; None where one does."""
    if conversion(source, target) and not _needs_whole(source, target, after, axis):
        return None
    for step in (INVARIANT, PARTIAL, REPLICATE):
        if conversion(source, step) and conversion(step, target):
            return step
    kinds = f"{source} to {target}"
    hint = "Routed rows can only be combined again" if isinstance(source, Rows) else "No collective"
    raise PlacementError(f"{hint}: cannot go from {kinds} at {roles.where(x)}")


def _untangled(now: Placement, wanted: Placement) -> Placement:
    """Where to stop on the way: nothing split that an axis outside it is about to split anew.

    Slices along an inner axis are slices of the outer axis's slice. Before the outer split of a
    dimension changes, its inner splits are gathered; they are taken again afterwards.
    """
    kinds: list[Kind] = []
    for position, (have, want) in enumerate(zip(now.kinds, wanted.kinds, strict=True)):
        changing: set[int | None] = set()
        for at, (a, b) in enumerate(zip(now.kinds[:position], wanted.kinds, strict=False)):
            if a != b and now.view.axes[at].size > 1 and not _beside(now, wanted, at):
                changing |= {_split_dim(a), _split_dim(b)}
        changing.discard(None)
        if _split_dim(have) in changing:
            kinds.append(REPLICATE if want == have or _split_dim(want) in changing else want)
        else:
            kinds.append(have if _split_dim(want) in changing else want)
    return Placement(now.view, tuple(kinds))


def _split_axes(placement: Placement) -> list[str]:
    pairs = zip(placement.view.axes, placement.kinds, strict=True)
    return [axis.name for axis, kind in pairs if isinstance(kind, Shard) and axis.size > 1]


def _beside(now: Placement, wanted: Placement, at: int) -> bool:
    """Whether an outer axis splits, before and after, no more than what inner ranks hold."""
    axis = now.view.axes[at].name
    inner_first = Placement(now.view, (*now.kinds[: at + 1], *wanted.kinds[at + 1 :]))
    ends = [p for p in (now, inner_first, wanted) if isinstance(p.kind(axis), Shard)]
    return all(own_blocks(p, axis) is not None for p in ends)


def _split_dim(kind: Kind) -> int | None:
    return kind.dim if isinstance(kind, Shard) else None


def _needs_whole(source: Kind, target: Kind, after: Placement, axis: str) -> bool:
    """Whether a change of split cannot be an exchange: along one dimension, or of two's blocks."""
    if not (isinstance(source, Shard) and isinstance(target, Shard)):
        return False
    ends = [own_blocks(end, axis) for end in (after.with_kind(axis, source), after)]
    return source.dim == target.dim or 1 not in ends or None in ends


def _is_fill(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _FILLS


def _value(node: Any) -> Any:
    return roles.value(node) if isinstance(node, fx.Node) else node


def _rank(node: fx.Node) -> int:
    return roles.tensor(node).dim()


def _bytes(node: fx.Node) -> int:
    value = roles.tensor(node)
    return value.numel() * value.element_size()


def _replace_operand(node: fx.Node, position: int, new: fx.Node) -> None:
    """Put ``new`` in place of the tensor operand at ``position``, counted as ``operands`` does."""
    count = -1

    def swap(x: fx.Node) -> fx.Node:
        nonlocal count
        if isinstance(_value(x), Tensor):
            count += 1
            return new if count == position else x
        return x

    node.args = map_arg(node.args, swap)
    node.kwargs = map_arg(node.kwargs, swap)
