"""Write the nodes of a canonical block: values on rows sorted by expert."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

import moptrace.kernels.grouped_mm
import moptrace.kernels.routing  # noqa: F401  registers the operators
from moptrace import roles
from moptrace.errors import RoleError
from moptrace.passes.axes import RESHAPES, Dims, Space, packet, shape
from moptrace.passes.row_domains import Domains, Routing
from moptrace.passes.stacked_parameters import Nodes, Stacks

__all__ = ["ONE", "Emitter", "Form", "features_of", "refusal"]

aten = torch.ops.aten
ops = torch.ops.moptrace


def refusal(node: fx.Node, what: str, instead: str = "") -> RoleError:
    advice = instead or (
        "gather tokens by a top-k's indices, apply the same function of one row in every expert, "
        "and add the weighted results back"
    )
    return RoleError(
        f"This Mixture-of-Experts block cannot be raised: found {what}, at {roles.where(node)}. "
        f"Write instead: {advice}."
    )


def features_of(node: fx.Node, dims: Dims) -> list[Any]:
    return [n for n, space in zip(shape(node), dims, strict=True) if not space]


@dataclass(frozen=True)
class Form:
    """A value in canonical form: ``node`` is [S, *features] if ``kind`` is "rows", [E, *features]
    if it is "experts", and as it was if it is "plain". "one" is the constant 1 and has no node.
    """

    kind: str
    node: fx.Node | None = None

    @property
    def value(self) -> fx.Node:
        assert self.node is not None
        return self.node


@dataclass
class Dispatch:
    """The dispatch nodes of one routing; ``waits`` while the tokens of the first are not known."""

    ids: fx.Node
    first: fx.Node
    counts: fx.Node
    order: fx.Node
    rows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    waits: bool = True


ONE = Form("one")


@dataclass
class Emitter:
    """Writes nodes in the place of ``author``, for the block of ``routing``."""

    graph: fx.Graph
    domains: Domains
    stacks: Stacks
    done: dict[tuple[Nodes, Dims], Form] = field(default_factory=dict)
    dispatches: dict[Routing, Dispatch] = field(default_factory=dict)
    pair_values: dict[fx.Node, fx.Node] = field(default_factory=dict)  # [S, 1...] -> [N, k]
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    routing: Routing = field(init=False)
    author: fx.Node = field(init=False)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node with its example value, in the place of ``author``."""
        node = self.graph.call_function(target, args, kwargs)
        values, keywords = pytree.tree_map_only(fx.Node, roles.value, (args, kwargs))
        mode = detect_fake_mode(pytree.tree_leaves((values, keywords))) or self.stacks.mode
        with mode, torch.no_grad():
            roles.set_value(node, target(*values, **keywords))
        roles.copy_role(node, of=self.author)
        return node

    def reshape(self, node: fx.Node, sizes: Sequence[int]) -> fx.Node:
        if shape(node) == tuple(sizes):
            return node
        before = node
        while packet(before) in RESHAPES and isinstance(before.args[0], fx.Node):
            before = before.args[0]
            if shape(before) == tuple(sizes):
                return before
        result = self.emit(aten.reshape.default, before, list(sizes))
        if node in self.pair_values and math.prod(sizes[1:]) == 1:
            self.pair_values[result] = self.pair_values[node]
        return result

    def record(self) -> Dispatch:
        """The dispatch of the current routing; its tokens may become known later."""
        if self.routing in self.dispatches:
            return self.dispatches[self.routing]
        routing = self.routing
        if routing.experts is None:
            raise refusal(self.author, "a choice among an unknown number of experts")
        tokens = math.prod(a.size or 1 for a in routing.tokens)
        ids = self.reshape(routing.ids, [tokens, routing.k])
        if roles.tensor(ids).dtype != torch.int64:
            ids = self.emit(aten._to_copy.default, ids, dtype=torch.int64)
        # A stand-in for the tokens gives the example values; ``tokens`` puts the real ones here.
        first = self.emit(ops.dispatch.default, ids, ids, routing.experts)
        counts, order = (self.emit(operator.getitem, first, i) for i in (1, 2))
        self.dispatches[routing] = Dispatch(ids, first, counts, order)
        return self.dispatches[routing]

    def tokens(self, source: fx.Node, dims: Dims) -> fx.Node:
        """The rows of a value for each token."""
        record = self.record()
        if source in record.rows:
            return record.rows[source]
        if record.waits:
            with self.graph.inserting_before(record.first):
                x = self.tokens_first(source, dims)
            record.first.args = (x, record.ids, self.routing.experts)
            example = roles.tensor(x)
            rows = example.new_empty(shape(record.order)[0], *example.shape[1:])
            roles.set_value(record.first, (rows, *roles.value(record.first)[1:]))
            record.waits, dispatch = False, record.first
        else:
            x = self.tokens_first(source, dims)
            dispatch = self.emit(ops.dispatch.default, x, record.ids, self.routing.experts)
        record.rows[source] = self.emit(operator.getitem, dispatch, 0)
        return record.rows[source]

    def tokens_first(self, source: fx.Node, dims: Dims) -> fx.Node:
        """[N, *features] from dimensions in any order."""
        return self.axes_first(source, dims, self.routing.tokens, 1)

    def axes_first(self, source: fx.Node, dims: Dims, axes: Space, lead: int) -> fx.Node:
        """Bring the dimensions of ``axes`` to the front, in that order, as ``lead`` dimensions."""
        place = {axis: i for i, axis in enumerate(axes)}
        labelled = sorted((place[dims[d][0]], d) for d in range(len(dims)) if dims[d])
        order = [d for _, d in labelled] + [d for d in range(len(dims)) if not dims[d]]
        if [a for d in order for a in dims[d]] != list(axes):
            raise self.lost(source)
        features = features_of(source, dims)
        if order != sorted(order):
            source = self.emit(aten.permute.default, source, order)
        sizes = [math.prod(a.size or 1 for a in self.routing.tokens)]
        if lead == 2:
            sizes.append(self.routing.k)
        return self.reshape(source, [*sizes, *features])

    def as_rows(self, form: Form, features: Sequence[int]) -> fx.Node:
        """[S, *features], whatever the form was."""
        record, order = self.record(), self.record().order
        if form.kind == "rows":
            return form.value
        if form.kind == "experts":  # with rows that go to the experts anyway, if there are any
            rows = next(iter(record.rows.values()), order)
            return self.emit(ops.expert_rows.default, form.value, record.counts, rows)
        sizes = [shape(order)[0], *features]
        if form.kind == "one":
            example = roles.tensor(self.author)
            return self.emit(aten.ones.default, sizes, dtype=example.dtype, device=example.device)
        return self.emit(aten.expand.default, form.value, sizes)

    def pair_rows(self, pairs: fx.Node) -> fx.Node:
        """Values [N, k, *features] as rows; those without features may become combine's weights."""
        rows = self.emit(ops.pair_rows.default, pairs, self.record().order)
        if math.prod(shape(pairs)[2:]) == 1:
            self.pair_values[rows] = self.reshape(pairs, list(shape(pairs)[:2]))
        return rows

    def experts_first(self, node: fx.Node, dims: Dims) -> fx.Node:
        at = next(d for d, space in enumerate(dims) if space)
        size = shape(node)[at]
        if self.routing.experts not in (None, size):
            raise refusal(
                node, f"parameters of {size} experts for a choice of {self.routing.experts}"
            )
        self.routing.experts = size
        return node if at == 0 else self.emit(aten.movedim.int, node, at, 0)

    def matrix_pairs(self, node: fx.Node, dims: Dims) -> Form:
        """The entries of a matrix of tokens and experts at the selected pairs."""
        axes = (*self.routing.tokens, self.routing.expert)
        place = {axis: i for i, axis in enumerate(axes)}
        order = sorted((d for d in range(len(dims)) if dims[d]), key=lambda d: place[dims[d][0]])
        order += [d for d in range(len(dims)) if not dims[d]]
        if [a for d in order for a in dims[d]] != list(axes):
            raise self.lost(node)
        record = self.record()
        features = features_of(node, dims)
        if order != sorted(order):
            node = self.emit(aten.permute.default, node, order)
        matrix = self.reshape(node, [shape(record.ids)[0], self.routing.experts or -1])
        pairs = self.emit(aten.gather.default, matrix, 1, record.ids)
        return Form("rows", self.pair_rows(self.reshape(pairs, [*shape(record.ids), *features])))

    def fitted(self, form: Form, x: fx.Node, result: Dims) -> fx.Node | None:
        """The operand ``x`` of a broadcasting operator, its features aligned with the result's."""
        sizes = shape(x)
        missing = len(result) - len(sizes)
        features = [
            1 if d < missing else sizes[d - missing] for d, space in enumerate(result) if not space
        ]
        if form.kind == "one":
            return None
        if form.kind == "plain":
            if all(not result[d + missing] for d in range(len(sizes))):
                return form.value
            return self.reshape(form.value, features)
        return self.reshape(form.value, [shape(form.value)[0], *features])

    def with_operands(self, node: fx.Node, operands: Sequence[fx.Node], **changes: Any) -> fx.Node:
        """The same operator on other tensors."""
        supply = iter(operands)
        args, kwargs = pytree.tree_map_only(
            fx.Node,
            lambda x: next(supply) if isinstance(roles.value(x), Tensor) else x,
            (node.args, node.kwargs),
        )
        author, self.author = self.author, node
        try:
            return self.emit(node.target, *args, **{**kwargs, **changes})
        finally:
            self.author = author

    def with_arguments(
        self, node: fx.Node, args: tuple[Any, ...], changes: dict[str, Any], values: list[fx.Node]
    ) -> fx.Node:
        supply = iter(values)
        kwargs = {**node.kwargs, **changes}
        args, kwargs = pytree.tree_map_only(
            fx.Node,
            lambda x: next(supply) if isinstance(roles.value(x), Tensor) else x,
            (args, kwargs),
        )
        author, self.author = self.author, node
        try:
            return self.emit(node.target, *args, **kwargs)
        finally:
            self.author = author

    def lost(self, node: fx.Node) -> RoleError:
        return refusal(
            node, f"{node.target} in the computation of experts",
            "compute each expert row by row, from its own tokens and parameters",
        )  # fmt: skip
