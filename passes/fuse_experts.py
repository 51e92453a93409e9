"""Make one operator of what an expert does with its rows."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from moptrace import roles
from moptrace.core import Level, Pass, Program, connected
from moptrace.kernels.expert_function import ExpertFunction, Operand, expert_function
from moptrace.placement import Shard
from moptrace.rules import Rule, argument, operands, rule_for

__all__ = ["fuse_experts"]

aten, ops = torch.ops.aten, torch.ops.moptrace

PRODUCT, EXPERT_ROWS = ops.grouped_mm.default, ops.expert_rows.default
DISPATCH, TOKEN_ROWS = ops.dispatch.default, ops.token_rows.default
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
VIEWS = (aten.transpose.int, aten.permute.default)

Kind = Literal["rows", "experts", "all", "tokens"]
Key = tuple[fx.Node, Kind]

_NAMES: dict[Kind, str] = {
    "rows": "rows", "tokens": "tokens", "experts": "parameter", "all": "constant"
}  # fmt: skip


def fuse_experts() -> Pass:
    """Replace the operators from an expert's first product to its last by an ``ExpertFunction``.

    A region is made of the grouped products of one dispatch and of the operators between and after
    them that treat each row alone, as their rules say: an activation, a gate, a clamp, a cast, a
    bias. It then runs expert by expert, on the rows of one expert while they are in cache. Regions
    that differ in nothing but their operands share one function. A single product stays as it is,
    and so does a region that cannot be run or differentiated expert by expert, with a note.

    Where the rows come straight from a dispatch, and nothing else uses them, the region takes the
    tokens and their order instead: it gathers rows as it needs them, forward and backward, and
    there is no copy of all.

    Requires: a local program. Ensures: the same values and gradients.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        known: dict[Any, ExpertFunction | ValueError] = {}
        notes: list[str] = []
        changed = False
        for body in [_Body(region) for region in _regions(graph)]:
            if body.key not in known:
                known[body.key] = _made(body, name=f"expert_function_{len(known)}")
            function = known[body.key]
            if isinstance(function, ExpertFunction):
                _replace(body, function)
                changed = True
            else:
                place = roles.where(next(iter(body.region.rows)))
                notes.append(f"the experts at {place} run one operator after another: {function}")
        result = program.with_graph(graph) if changed else program
        for note in notes:
            result = result.with_note(note)
        return result

    return Pass("fuse_experts", rewrite, takes=(Level.LOCAL,))


def _made(body: _Body, name: str) -> ExpertFunction | ValueError:
    try:
        return expert_function(body.graph, list(body.given.values()), name)
    except ValueError as error:
        return error


# --- finding a region -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """Nodes in order, each with the operands that are rows, and the counts of experts' rows."""

    counts: fx.Node
    rows: dict[fx.Node, list[fx.Node]]

    @property
    def given(self) -> list[fx.Node]:
        """The rows that the region takes."""
        found = (x for own in self.rows.values() for x in own if x not in self.rows)
        return list(dict.fromkeys(found))

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that others use."""
        return [node for node in self.rows if any(user not in self.rows for user in node.users)]

    @property
    def first_user(self) -> fx.Node:
        """The first node that uses a result."""
        return min(user for node in self.rows for user in node.users if user not in self.rows)

    @property
    def is_movable(self) -> bool:
        """Whether all operands are there before a result is used; results must be tensors."""
        given = {x for node in self.rows for x in node.all_input_nodes if x not in self.rows}
        tensors = all(isinstance(roles.value(x), Tensor) for x in self.results)
        return tensors and max(given) < self.first_user


@dataclass(frozen=True)
class _Dispatch:
    """A dispatch whose rows one region alone uses."""

    node: fx.Node

    @property
    def tokens(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def order(self) -> fx.Node:
        return next(x for x in self.node.users if x.args[1] == 2)

    @property
    def choices(self) -> int:
        return roles.tensor(self.node.args[1]).shape[1]  # type: ignore[arg-type]

    @property
    def some(self) -> bool:
        return bool(argument(self.node, 3, "some", False))

    def drop_rows(self) -> None:
        """Let it order the choices alone: dispatch these, and nobody takes their rows."""
        node, experts = self.node, self.node.args[1]
        rows, counts, order = roles.value(node)
        choices = roles.tensor(experts)  # type: ignore[arg-type]
        node.update_arg(0, experts)
        rows = choices.new_empty(rows.shape[0], *choices.shape[1:])
        roles.set_value(node, (rows, counts, order))
        roles.set_role(node, rule=rule_for(node))


def _dispatch_of(rows: fx.Node, region: _Region) -> _Dispatch | None:
    """The dispatch that rows come from, if the region uses them and nobody else does.

    Not where it leaves out the experts of other ranks: its tokens may be more than their rows.
    """
    source: Any = rows.args[0] if rows.target is operator.getitem else None
    if source is None or source.target is not DISPATCH or rows.args[1] != 0:
        return None
    is_own = all(user in region.rows for user in rows.users)
    has_order = any(x.args[1] == 2 and x < region.first_user for x in source.users)
    has_all = argument(source, 4, "numbers", None) is None
    return _Dispatch(source) if is_own and has_order and has_all else None


def _regions(graph: fx.Graph) -> Iterator[_Region]:
    """The regions of two products or more."""
    rows: dict[fx.Node, list[fx.Node]] = {}
    counts: dict[fx.Node, fx.Node] = {}  # of the experts whose rows a node has
    for node in graph.nodes:
        own = _row_operands(node, rows)
        found = {counts[x] for x in own if x in counts}
        if node.target is PRODUCT:
            found = {node.args[2]}
        elif node.target is EXPERT_ROWS:
            found = {node.args[1]}
        if len(found) == 1:
            rows[node], counts[node] = own, found.pop()
    for nodes in connected(_members(rows)):
        region = _Region(counts[nodes[0]], {node: rows[node] for node in nodes})
        if sum(node.target is PRODUCT for node in nodes) > 1 and region.is_movable:
            yield region


def _row_operands(node: fx.Node, known: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """The operands whose rows become the rows of the result; none if these are not kept apart."""
    rule: Rule | None = roles.role(node).rule
    if node.target is PRODUCT:
        return operands(node)[:1]
    if node.target is operator.getitem and rule is None:
        return [x for x in node.all_input_nodes if x in known]
    if rule is None or rule.random or rule.average or rule.counts is not None or rule.together:
        return []
    firsts = {dims[0] if dims else None for dims in rule.results}
    factor = firsts.pop()
    is_alone = not firsts and factor is not None and rule.splittable(factor, 1)
    if not is_alone or "device" in node.kwargs or _is_divided(node):
        return []
    found: list[fx.Node] = []
    for x, dims in zip(operands(node), rule.operands, strict=True):
        if dims and dims[0] == factor:
            found.append(x)
        elif any(factor in (dim or "").split(".") for dim in dims) or not _spreads(node, x):
            return []
    return found


def _spreads(node: fx.Node, x: fx.Node) -> bool:
    """Whether an operand is the same for all rows, and may be given once for each of them.

    A tensor without dimensions has no say in the dtype of a result; one of rows has.
    """
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    dtypes = {roles.tensor(x).dtype for x in operands(node)}
    return is_pointwise and (roles.tensor(x).dim() > 0 or len(dtypes) == 1)


def _is_divided(node: fx.Node) -> bool:
    """Whether ranks have slices of the rows, of which an expert's function knows nothing."""
    return any(
        axis.size > 1
        for placement in roles.placements(node)
        if placement is not None
        for axis in placement.axes_of_dim(0)
    )


def _members(rows: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """The nodes that lie between products, and those that follow from these alone."""
    follows: set[fx.Node] = set()  # a product; the others follow from parameters alone
    for node, own in rows.items():
        if node.target is PRODUCT or any(x in follows for x in own):
            follows.add(node)
    members: set[fx.Node] = set()
    for node in reversed(rows):
        leads = any(user in members and node in rows[user] for user in node.users)
        if node.target is PRODUCT or leads:
            members.add(node)
    for node, own in rows.items():
        if node in follows and all(x in members or (x in rows and x not in follows) for x in own):
            members.add(node)
    for node in reversed(rows):
        if node not in follows and all(user in members for user in node.users):
            members.add(node)
    return [node for node in rows if node in members]


# --- writing it -----------------------------------------------------------------------------------


class _Body:
    """A region as a graph of its own, and what it takes from outside: the value, and how."""

    def __init__(self, region: _Region):
        self.region = region
        self.dispatches = {x: own for x in region.given if (own := _dispatch_of(x, region))}
        self.views: list[fx.Node] = []  # of parameters, which become part of the region
        self.given = dict(sorted(self._given(), key=lambda x: list(_NAMES).index(x[0][1])))
        self.graph = fx.Graph()
        self.counts = self.graph.placeholder("counts")
        self.new = {
            key: self.graph.placeholder(f"{_NAMES[key[1]]}_{i}") for i, key in enumerate(self.given)
        }
        for rows, dispatch in self.dispatches.items():
            self.new[rows, "rows"] = self._gathered(dispatch)
        for node in region.rows:
            self.new[node, "rows"] = self._copied(node)
        self.graph.output(tuple(self.new[x, "rows"] for x in region.results))

    @property
    def key(self) -> Any:
        """The same for regions that differ in nothing but their operands."""
        return str(self.graph), tuple(self.given.values())

    def _given(self) -> Iterator[tuple[Key, Operand]]:
        for node, rows in self.region.rows.items():
            if node.target is EXPERT_ROWS:
                yield self._operand(self._unviewed(node.args[0]), "experts")
                continue
            for x in rows:
                if x in self.dispatches:
                    yield self._operand(self.dispatches[x].tokens, "tokens")
                    yield self._operand(self.dispatches[x].order, "rows")
                elif x not in self.region.rows:
                    yield self._operand(x, "rows")
            if node.target is PRODUCT:
                yield self._operand(self._unviewed(node.args[1]), "experts")
                continue
            for x in operands(node):
                if x not in rows:
                    yield self._operand(x, "all")

    def _operand(self, x: fx.Node, kind: Kind) -> tuple[Key, Operand]:
        value = roles.tensor(x)
        shape = value.shape if kind == "all" else value.shape[1:]
        return (x, kind), Operand(kind, tuple(shape), value.dtype)

    def _unviewed(self, x: Any) -> fx.Node:
        """The parameter of which a node is a view that only this region uses."""
        rule = roles.role(x).rule
        is_own = all(user in self.region.rows for user in x.users)
        if x.target in VIEWS and is_own and rule.operands[0][0] == rule.results[0][0]:
            self.views.append(x)
            return self._unviewed(x.args[0])
        return x

    def _copied(self, node: fx.Node) -> fx.Node:
        target: Any = node.target
        xs: Any = node.args
        if node.target is PRODUCT:
            args = (self.new[xs[0], "rows"], self._part(xs[1]), self.counts)
            return self.graph.call_function(PRODUCT, args)
        if node.target is EXPERT_ROWS:
            return self._repeated(self._part(xs[0]))
        if (piece := _lonely_piece(node)) is not None:
            dim, start, end = piece
            args = (self.new[xs[0].args[0], "rows"], dim, start, end)
            return self.graph.call_function(aten.slice.Tensor, args)
        value = roles.value(node)
        rank = value.dim() if isinstance(value, Tensor) else 0

        def mine(x: fx.Node) -> fx.Node:
            return self.new.get((x, "rows")) or self._spread(x, rank)

        args, kwargs = map_arg((node.args, node.kwargs), mine)
        return self.graph.call_function(target, args, kwargs)

    def _part(self, x: fx.Node) -> fx.Node:
        """What experts have parts of: an operand, or a view of one."""
        if (x, "experts") not in self.new:
            view: Any = x.target
            args = map_arg(x.args, self._part)
            self.new[x, "experts"] = self.graph.call_function(view, args)
        return self.new[x, "experts"]

    def _gathered(self, dispatch: _Dispatch) -> fx.Node:
        """The rows of a dispatch, of its tokens."""
        tokens, order = self.new[dispatch.tokens, "tokens"], self.new[dispatch.order, "rows"]
        args = (tokens, order, dispatch.choices, dispatch.some)
        return self.graph.call_function(TOKEN_ROWS, args)

    def _repeated(self, part: fx.Node) -> fx.Node:
        rows = next(self.new[key] for key in self.given if key[1] == "rows")
        return self.graph.call_function(EXPERT_ROWS, (part, self.counts, rows))

    def _spread(self, x: fx.Node, rank: int) -> fx.Node:
        """What is the same for all, once for each row of a tensor of so many dimensions.

        As a parameter of each expert, so that gradients too are sums for each expert.
        """
        call, shape = self.graph.call_function, list(roles.tensor(x).shape)
        shape = shape[1:] if len(shape) == rank else [1] * (rank - 1 - len(shape)) + shape
        one = call(aten.view.default, (self.new[x, "all"], [1, *shape]))
        experts = call(aten.sym_size.int, (self.counts, 0))
        return self._repeated(call(aten.expand.default, (one, [experts, *shape])))


def _lonely_piece(node: fx.Node) -> tuple[int, int, int] | None:
    """The slice that a piece of a split is, where other pieces are not used.

    Autograd has no gradient for those, and makes zeros of them for numbers of rows it knows alone.
    """
    source = node.args[0] if node.target is operator.getitem else None
    if not isinstance(source, fx.Node) or source.target not in _SPLITS:
        return None
    pieces: Any = roles.value(source)
    if len({str(user.args[1]) for user in source.users}) == len(pieces):
        return None
    dim: int = argument(source, 2, "dim", 0) % pieces[0].dim()
    start = sum(piece.shape[dim] for piece in pieces[: node.args[1]])  # type: ignore[misc]
    return dim, start, start + pieces[node.args[1]].shape[dim]  # type: ignore[index]


def _replace(body: _Body, function: ExpertFunction) -> None:
    region, results = body.region, body.region.results
    last = next(node for node in reversed(region.rows) if node.target is PRODUCT)
    graph = last.graph
    with graph.inserting_before(region.first_user):
        call = graph.call_function(function, (region.counts, *(x for x, _ in body.given)))
        roles.copy_role(call, of=last, rule=_rule(body), placements=_placements(results))
        if len(results) == 1:
            roles.set_value(call, roles.value(results[0]))
            found = [call]
        else:
            roles.set_value(call, tuple(roles.value(x) for x in results))
            found = [graph.call_function(operator.getitem, (call, i)) for i in range(len(results))]
    for new, node in zip(found, results, strict=True):
        if new is not call:
            roles.copy_role(new, of=node, rule=None)
            roles.set_value(new, roles.value(node))
        node.replace_all_uses_with(new, lambda user: user not in region.rows)
    for node in reversed(region.rows):
        graph.erase_node(node)
    for rows, dispatch in body.dispatches.items():
        graph.erase_node(rows)
        dispatch.drop_rows()
    for node in body.views:
        if not node.users:
            graph.erase_node(node)


def _placements(nodes: list[fx.Node]) -> tuple[Any, ...]:
    return tuple(roles.placement(node) for node in nodes)


def _rule(body: _Body) -> Rule:
    """Rows are split as their experts are, hidden units as they were; nothing else is."""
    first: dict[Kind, tuple[str, ...]] = {
        "rows": ("s|e",), "tokens": ("s",), "experts": ("e",), "all": ()
    }  # fmt: skip
    quantum: dict[str, int] = {}

    def dims(x: fx.Node, kind: Kind, name: str) -> tuple[str, ...]:
        rest = range(len(first[kind]), roles.tensor(x).dim())
        return (*first[kind], *(_shared(x, d, quantum) or f"{name}D{d}" for d in rest))

    ins = [dims(x, kind, f"W{i}") for i, (x, kind) in enumerate(body.given)]
    outs = [dims(x, "rows", f"R{i}") for i, x in enumerate(body.region.results)]
    return Rule((("e",), *ins), tuple(outs), summed=True, counts=0, quantum=quantum)


def _shared(x: fx.Node, dim: int, quantum: dict[str, int]) -> str | None:
    """The factor of a dimension of which ranks have their shares; none where each has it whole.

    It is named for the ranks, as operands may be placed in views with other names for them.
    """
    placement = roles.placement(x)
    if placement is None:
        return None
    spans: list[tuple[int, int]] = []  # of the ranks along each axis; neighbours are one
    blocks = 1
    for (low, high), kind in zip(placement.view.spans(), placement.kinds, strict=True):
        if isinstance(kind, Shard) and kind.dim == dim and low < high:
            joined = spans.pop()[1] if spans and spans[-1][0] == high else high
            spans.append((low, joined))
            blocks = kind.blocks
    if not spans:
        return None
    factor = "of_" + "_".join(f"{low}to{high}" for low, high in spans)
    if blocks == 1:
        return factor
    quantum[f"B{blocks}"] = blocks
    return f"B{blocks}.{factor}"
