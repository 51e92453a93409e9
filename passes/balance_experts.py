"""Let ranks with too many rows lend experts, and their rows, to ranks with few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

import moptrace.kernels.balancing  # noqa: F401  registers the operators
from moptrace import roles
from moptrace.balance import Balance
from moptrace.core import Level, Pass, Program, copy_node
from moptrace.passes.drop_tokens import rows_of
from moptrace.passes.fuse_experts import VIEWS
from moptrace.placement import INVARIANT, PARTIAL, Kind, Layout, Placement, Rows, Shard, View
from moptrace.rules import operands

__all__ = ["balance_experts"]

aten, ops = torch.ops.aten, torch.ops.moptrace


def balance_experts(balance: Balance | None) -> Pass:
    """Send excess rows of a rank, with the weights of their experts, to ranks that have fewer.

    Of each layer, every rank gathers how many rows each rank has for each expert, and all make the
    same plan of it (``plan_balance``). Every rank has places for its own experts and a number of
    guests; tokens are dispatched to places, as they were to experts; weights of guests come from
    their owners, to which their gradients return; and what an expert does is done at every place.
    So one exchange of integers is added to a layer, of counts, and one for each parameter of its
    experts, in which nothing is sent while nobody has guests. A parameter is copied to where its
    guests' come. Chunks of tokens have one plan, and places in the same proportions.

    Groups of ``ep`` plan apart; ranks of ``etp``, which compute the same rows, together.

    Requires: a local program. Ensures: the same function. Where rows do not travel, every rank has
    all experts, and a note says so.
    Source: Least-Loaded Expert Parallelism (arXiv 2601.17111).
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        assert program.layout is not None
        plans: dict[Any, _Plan] = {}
        notes: list[str] = []
        for dispatch in graph.find_nodes(op="call_function", target=ops.dispatch.default):
            if balance is None:
                continue
            if not (exchanges := _exchanges_of(dispatch)):
                notes.append("every rank has all experts, so there is no load to balance")
                continue
            chosen = dispatch.args[1]
            if chosen not in plans:
                plans[chosen] = _Plan(balance, program.layout, dispatch, exchanges[0])
            notes.append(_Layer(dispatch, exchanges, plans[chosen]).rewrite())
        result = program.with_graph(graph) if plans else program
        for note in dict.fromkeys(notes):
            result = result.with_note(note)
        return result

    return Pass("balance_experts", rewrite, (("balance", balance),), takes=(Level.LOCAL,))


def _exchanges_of(dispatch: fx.Node) -> list[fx.Node]:
    """The exchanges of a dispatch's counts, perhaps along several names of the same ranks."""
    users = (user for counts in _counts_of(dispatch) for user in counts.users)
    return [user for user in users if user.target is ops.exchange_counts.default]


def _counts_of(dispatch: fx.Node) -> list[fx.Node]:
    return [x for x in dispatch.users if x.args == (dispatch, 1)]


# --- the plan -------------------------------------------------------------------------------------


class _Plan:
    """The nodes that make one plan: of each choice of experts, before its first dispatch."""

    def __init__(self, balance: Balance, layout: Layout, dispatch: fx.Node, exchange: fx.Node):
        self.layout, self.balance = layout, balance
        self.axis: str = exchange.args[1]  # type: ignore[assignment]
        self.experts: int = dispatch.args[2]  # type: ignore[assignment]
        self.sizes = layout.sizes(self.experts, self.axis)
        self.places = balance.places(self.sizes)
        counted = roles.placement(exchange)
        assert counted is not None
        said = layout.said_along(counted, self.axis)
        assert said is not None
        self.view = said.view
        at = self.view.index(self.axis)
        self.past = list(self.view.spans())[at][1]
        self.inner = [axis.name for axis in self.view.axes[at + 1 :] if axis.size > 1]
        self.write(dispatch)

    @property
    def number(self) -> int:
        """The places of all ranks."""
        return len(self.sizes) * self.places

    def write(self, dispatch: fx.Node) -> None:
        """The counts of all ranks that share experts; what goes where; what each place is for."""
        chosen = dispatch.args[1]
        assert isinstance(chosen, fx.Node)
        like = roles.tensor(chosen)
        call = _Caller(dispatch)
        partial = Placement.uniform(self.view, PARTIAL)
        counts = call(ops.count_pairs.default, chosen, self.experts)
        self.counts = call.describe(counts, like.new_empty(self.experts), partial)
        table, held = self.counts, partial
        # The ranks inside, which compute what comes to any of them, are the slower dimension.
        axes = [self.axis, *reversed(self.inner)]
        for axis in axes:
            ranks, shape = self.layout.size(axis), roles.tensor(table).shape
            row = call(aten.unsqueeze.default, table, 0)
            call.describe(row, like.new_empty(1, *shape), held.with_kind(axis, Shard(0)))
            table = call(ops.all_gather_invariant.default, row, axis, 0, ranks)
            held = held.with_kind(axis, INVARIANT)
            call.describe(table, like.new_empty(ranks, *shape), held)
        options = self.balance
        limits = (options.threshold, options.cap, options.rows)
        plan = call(ops.plan_balance.default, table, list(self.sizes), self.places, *limits)
        shape = (*roles.tensor(table).shape[:-1], self.number)
        values = like.new_empty(shape), like.new_empty(self.number)
        kinds = self._of_groups(Shard(len(axes))), self._of_groups(Shard(0))
        call.describe(plan, values, *kinds)
        shares, self.hosts = (call.item(plan, at) for at in (0, 1))
        held = kinds[0]
        for dim, axis in enumerate(reversed(axes)):
            ranks = self.layout.size(axis)
            shares, shape = call(ops.take_shard.default, shares, axis, dim, ranks), list(shape)
            shape[dim], held = 1, held.with_kind(axis, Shard(dim))
            call.describe(shares, like.new_empty(shape), held)
        own = call(aten.reshape.default, shares, [self.number])
        call.describe(own, like.new_empty(self.number), self._of_groups(Shard(0), PARTIAL))
        spread = call(ops.spread_pairs.default, chosen, own, self.hosts, self.experts)
        self.choices = call.describe(spread, like, *roles.placements(chosen))

    def groups(self, view: View) -> list[str]:
        """The axes of a view along which ranks plan apart: those outside of the experts' ranks."""
        pairs = zip(view.axes, view.spans(), strict=True)
        return [axis.name for axis, (low, _) in pairs if low >= self.past and axis.size > 1]

    def _of_groups(self, kind: Kind, others: Kind = INVARIANT) -> Placement:
        """How ranks hold what each group has of its own."""
        held = Placement.uniform(self.view, others)
        for axis in self.groups(self.view):
            held = held.with_kind(axis, kind)
        return held


@dataclass(frozen=True)
class _Caller:
    """Writes nodes for a layer's dispatch, before it."""

    dispatch: fx.Node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self.dispatch.graph.inserting_before(self.dispatch):
            return self.dispatch.graph.call_function(target, args)

    def item(self, source: fx.Node, at: int) -> fx.Node:
        with self.dispatch.graph.inserting_before(self.dispatch):
            node = self.dispatch.graph.call_function(getitem, (source, at))
        return self.describe(node, roles.value(source)[at], roles.placements(source)[at])

    def describe(self, node: fx.Node, value: Any, *placements: Placement | None) -> fx.Node:
        roles.copy_role(node, of=self.dispatch, rule=None, placements=placements)
        roles.set_value(node, value)
        return node


# --- a layer --------------------------------------------------------------------------------------


class _Layer:
    """What follows from one dispatch, until its rows are combined."""

    def __init__(self, dispatch: fx.Node, exchanges: Sequence[fx.Node], plan: _Plan):
        self.dispatch, self.exchanges, self.plan = dispatch, exchanges, plan
        self.hosted: dict[fx.Node, fx.Node] = {}
        self.bytes = 0

    def rewrite(self) -> str:
        """Dispatch to places, and bring what experts have there; a note of what that may take."""
        dispatch, plan = self.dispatch, self.plan
        for counts in _counts_of(dispatch):  # who else asks is told of experts
            counts.replace_all_uses_with(plan.counts, lambda user: not _moves(user))
        dispatch.args = (dispatch.args[0], plan.choices, plan.number, *dispatch.args[3:])
        rows, counts, order = roles.value(dispatch)
        roles.set_value(dispatch, (rows, counts.new_empty(plan.number), order))
        for node in _counts_of(dispatch):
            roles.set_value(node, roles.value(dispatch)[1])
        self._count_places()
        inside = self._between_sorts()
        for node in inside:
            self._at_places(node, inside)
        guests = plan.places - max(plan.sizes)
        return (
            f"where a rank has over {plan.balance.threshold} times the mean of rows, others "
            f"compute some of them: up to {guests} guests on each rank, {guests * self.bytes:,} "
            "bytes of weights in a layer"
        )

    def _count_places(self) -> None:
        """Tables and counts of a rank's experts are of its places, which each group has apart."""
        users = [u for counts in _counts_of(self.dispatch) for u in counts.users]
        for node in users:
            if node.target in (*_MOVES, ops.exchange_counts.default):
                self._lengthen(node)
        left = [*self.exchanges]
        while left:
            node = left.pop()
            value = roles.tensor(node)
            roles.set_value(node, value.new_empty(*value.shape[:-1], self.plan.places))
            self._split(node, PARTIAL, Shard(value.dim() - 1))
            left += [user for user in node.users if user.target in _OF_COUNTS]

    def _lengthen(self, node: fx.Node) -> None:
        """A collective of rows or counts names the number of experts."""
        at = [argument.name for argument in node.target._schema.arguments].index("length")  # type: ignore[union-attr]
        node.update_arg(at, self.plan.number)

    def _between_sorts(self) -> dict[fx.Node, None]:
        """The nodes with rows sorted by expert, in order."""
        found: dict[fx.Node, None] = {}
        for node in rows_of([self.dispatch]):
            starts = node.target is ops.group_rows.default and node.args[1] in self.exchanges
            follows = any(x in found for x in node.all_input_nodes)
            if starts or (follows and node.target is not ops.ungroup_rows.default):
                found[node] = None
        return found

    def _at_places(self, node: fx.Node, inside: dict[fx.Node, None]) -> None:
        self._split(node, Rows("token"), Rows("expert"))
        if (rule := roles.role(node).rule) is None:
            return
        for at, (x, dims) in enumerate(zip(operands(node), rule.operands, strict=True)):
            if dims[:1] == ("e",) and at != rule.counts and x not in inside:
                node.replace_input_with(x, self._host(x, node))

    def _split(self, node: fx.Node, before: Kind, after: Kind) -> None:
        """Groups have apart what they had together."""
        placements: list[Placement | None] = []
        for placement in roles.placements(node):
            for axis in self.plan.groups(placement.view) if placement else ():
                if placement and placement.kind(axis) == before:
                    placement = placement.with_kind(axis, after)
            placements.append(placement)
        roles.set_role(node, placements=tuple(placements))

    def _host(self, x: fx.Node, user: fx.Node) -> fx.Node:
        """What the experts at a rank's places have, given what its own have."""
        if x in self.hosted:
            return self.hosted[x]
        plan, graph = self.plan, x.graph
        value = roles.tensor(x)
        placement = roles.placement(x)
        said = plan.layout.said_along(placement, plan.axis) if placement else None
        assert said is not None
        for axis in plan.groups(said.view):
            said = said.with_kind(axis, Shard(0))
        if _keeps_experts(x):  # before it is viewed, it lies as it is sent
            source = self._host(x.all_input_nodes[0], user)
            with graph.inserting_after(source):
                new = copy_node(graph, x, lambda _: source)
        else:
            with graph.inserting_after(max(x, plan.hosts)):
                args = (x, plan.hosts, plan.axis, plan.places, plan.experts)
                new = graph.call_function(ops.send_experts.default, args)
            self.bytes += value[:1].numel() * value.element_size()
            roles.copy_role(new, of=user, rule=None)
        roles.set_role(new, placements=(said,))
        roles.set_value(new, value.new_empty(plan.places, *value.shape[1:]))
        self.hosted[x] = new
        return new


_MOVES = (ops.send_rows.default, ops.return_rows.default)
_OF_COUNTS = (aten.sum.dim_IntList, aten.unsqueeze.default, ops.all_gather_invariant.default)


def _moves(user: fx.Node) -> bool:
    """Whether a user of a dispatch's counts sends rows by them."""
    return user.target in (*_MOVES, ops.exchange_counts.default)


def _keeps_experts(x: fx.Node) -> bool:
    """Whether a node is a view that has the experts where its operand has them."""
    rule = roles.role(x).rule
    return x.target in VIEWS and rule is not None and rule.operands[0][0] == rule.results[0][0]
