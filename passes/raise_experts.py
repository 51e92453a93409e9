"""Rewrite every Mixture-of-Experts block, however it is written, to one canonical spelling.

``row_domains`` says what the rows of each value stand for. A block begins where tokens are brought
to experts and ends where the experts' results are a value for each token again. From each such end
this pass walks back and writes the experts' function once more on rows sorted by expert::

    rows, counts, order = dispatch(x, experts, E)
    ...                                        # the expert's own operators, row by row
    y   = combine(rows, order, weights)

One walk serves every style, because it follows E corresponding nodes at a time: one node where the
model already computes all experts together, and E nodes, one for each expert, where it loops. At
each step the E nodes must be the same operator; the parameters in which they differ become one
parameter, stacked in the order of the experts' numbers.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

import moptrace.kernels.grouped_mm
import moptrace.kernels.routing  # noqa: F401  registers the operators
from moptrace import roles
from moptrace.core import Level, Parameter, Pass, Program, Signature, erase_dead
from moptrace.errors import RoleError
from moptrace.passes.row_domains import (
    RESHAPES,
    Contraction,
    Dims,
    Domains,
    Index,
    Position,
    Routing,
    Rows,
    Space,
    Sum,
    argument,
    carried,
    contraction,
    is_pointwise,
    kinds,
    packet,
    permutation,
    positions,
    reshaped,
    shape,
    substituted,
    tensors,
    unified,
)

__all__ = ["raise_experts"]

aten = torch.ops.aten
ops = torch.ops.moptrace

Nodes = tuple[fx.Node, ...]

WITHOUT_EXPERTS = "no Mixture-of-Experts block found: treated as a dense model"


def raise_experts() -> Pass:
    """Bring every Mixture-of-Experts block to ``dispatch``, the experts' operators, ``combine``.

    Requires: a captured program.
    Ensures: the same loss and gradients; tokens reach experts only through the operators of
    ``moptrace.kernels``; parameters that were separate for each expert are one, with its ``stacked``
    names in expert order.
    Raises ``RoleError`` where experts are selected in a way that cannot be raised.
    """
    return Pass("raise_experts", _raise_experts, takes=(Level.CAPTURED,))


def _raise_experts(program: Program) -> Program:
    graph, _ = program.copy_graph()
    domains = Domains.of(graph)
    stacks = _Stacks(graph, program.signature)
    raiser = _Raiser(graph, domains, stacks)
    blocks = 0
    for node in list(graph.nodes):
        if raiser.ends_here(node):
            raiser.rewrite_end(node)
            blocks += 1
    erase_dead(graph)
    signature = stacks.finish(program.signature)
    _refuse_leftovers(graph, domains)
    result = program.with_graph(graph, signature=signature)
    return result if blocks else result.with_note(WITHOUT_EXPERTS)


# ---- Rewriting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """A value in canonical form: ``node`` is [S, *features] if ``kind`` is "rows", [E, *features]
    if it is "experts", and as it was if it is "plain". "one" is the constant 1 and has no node.
    """

    kind: str
    node: fx.Node | None = None

    @property
    def value(self) -> fx.Node:
        assert self.node is not None
        return self.node


_ONE = _Form("one")


@dataclass
class _Dispatch:
    """The dispatch nodes of one routing; ``waits`` while the tokens of the first are not known."""

    ids: fx.Node
    first: fx.Node
    counts: fx.Node
    order: fx.Node
    rows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    waits: bool = True


@dataclass
class _Raiser:
    graph: fx.Graph
    domains: Domains
    stacks: _Stacks
    done: dict[tuple[Nodes, Dims], _Form] = field(default_factory=dict)
    dispatches: dict[Routing, _Dispatch] = field(default_factory=dict)
    pair_values: dict[fx.Node, fx.Node] = field(default_factory=dict)  # [S, 1...] -> [N, k]
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    routing: Routing = field(init=False)
    author: fx.Node = field(init=False)

    # -- where a block ends

    def ends_here(self, node: fx.Node) -> bool:
        """Whether the node is a finished value for each token, and code outside the block uses it."""
        meaning = self.domains.meaning.get(node)
        if not isinstance(meaning, Rows) or not meaning.total:
            return False
        return any(not self._stays_inside(meaning, user) for user in node.users)

    def _stays_inside(self, meaning: Rows, user: fx.Node) -> bool:
        found = self.domains.meaning.get(user)
        if not isinstance(found, Rows) or found.routing is not meaning.routing:
            return False
        if isinstance(meaning, Sum):
            continued = isinstance(found, Sum) and found.previous is meaning
            return continued or "branch" in kinds(found.dims)
        return not meaning.done

    def rewrite_end(self, node: fx.Node) -> None:
        meaning: Rows = self.domains.meaning[node]
        self.routing, self.author = meaning.routing, node
        with self.graph.inserting_before(node):
            rows = self._rows_of_end(node, meaning)
            if self.routing in self.dispatches and self.dispatches[self.routing].waits:
                raise _error(node, "a Mixture-of-Experts block that reads no tokens")
            result = self._combined(rows, node, meaning)
            base = meaning.base if isinstance(meaning, Sum) else None
            if base is not None:
                result = self.emit(aten.add.Tensor, self.replaced.get(base, base), result)
        node.replace_all_uses_with(result)
        self.replaced[node] = result

    def _rows_of_end(self, node: fx.Node, meaning: Rows) -> fx.Node:
        form = self.lower((node,), meaning.dims, finished=True)
        return self.as_rows(form, _features(node, meaning.dims))

    def _combined(self, rows: fx.Node, node: fx.Node, meaning: Rows) -> fx.Node:
        """``combine``, with the weights taken out of a final product where there is one."""
        record = self.record()
        tokens = roles.tensor(record.ids).shape[0]
        weights = None
        if packet(rows) is aten.mul and len(rows.args) == 2:
            for value, weight in (rows.args, rows.args[::-1]):
                pairs = self.pair_values.get(weight)  # type: ignore[arg-type]
                if pairs is None or not isinstance(value, fx.Node) or shape(value) != shape(rows):
                    continue
                rows, weights = value, pairs
                break
        if weights is None:
            example = roles.tensor(rows)
            weights = self.emit(
                aten.ones.default, [tokens, self.routing.k], dtype=example.dtype,
                device=example.device,
            )  # fmt: skip
        result = self.emit(ops.combine.default, rows, record.order, weights)
        lead = [d for d, space in enumerate(meaning.dims) if space]
        rest = [d for d, space in enumerate(meaning.dims) if not space]
        order = [*lead, *rest]
        sizes = [shape(node)[d] for d in order]
        result = self.reshape(result, sizes)
        if order != sorted(order):
            result = self.emit(aten.permute.default, result, [order.index(d) for d in range(len(order))])
        if roles.tensor(result).dtype != roles.tensor(node).dtype:
            result = self.emit(aten._to_copy.default, result, dtype=roles.tensor(node).dtype)
        return result

    # -- writing nodes

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

    def record(self) -> _Dispatch:
        """The dispatch of the current routing; its tokens may become known later."""
        if self.routing in self.dispatches:
            return self.dispatches[self.routing]
        routing = self.routing
        if routing.experts is None:
            raise _error(self.author, "a choice among an unknown number of experts")
        ids = self.reshape(routing.ids, [-1, routing.k] if routing.tokens else [1, routing.k])
        if roles.tensor(ids).dtype != torch.int64:
            ids = self.emit(aten._to_copy.default, ids, dtype=torch.int64)
        # A stand-in for the tokens gives the example values; ``tokens`` puts the real ones here.
        first = self.emit(ops.dispatch.default, ids, ids, routing.experts)
        counts, order = (self.emit(operator.getitem, first, i) for i in (1, 2))
        self.dispatches[routing] = _Dispatch(ids, first, counts, order)
        return self.dispatches[routing]

    def tokens(self, source: fx.Node, dims: Dims) -> fx.Node:
        """The rows of a value for each token."""
        record = self.record()
        if source in record.rows:
            return record.rows[source]
        if record.waits:
            with self.graph.inserting_before(record.first):
                x = self._tokens_first(source, dims)
            record.first.args = (x, record.ids, self.routing.experts)
            example = roles.tensor(x)
            rows = example.new_empty(shape(record.order)[0], *example.shape[1:])
            roles.set_value(record.first, (rows, *roles.value(record.first)[1:]))
            record.waits, dispatch = False, record.first
        else:
            x = self._tokens_first(source, dims)
            dispatch = self.emit(ops.dispatch.default, x, record.ids, self.routing.experts)
        record.rows[source] = self.emit(operator.getitem, dispatch, 0)
        return record.rows[source]

    def _tokens_first(self, source: fx.Node, dims: Dims) -> fx.Node:
        """[N, *features] from dimensions in any order."""
        return self._axes_first(source, dims, self.routing.tokens, 1)

    def _axes_first(self, source: fx.Node, dims: Dims, axes: Space, lead: int) -> fx.Node:
        """Bring the dimensions of ``axes`` to the front, in that order, as ``lead`` dimensions."""
        place = {axis: i for i, axis in enumerate(axes)}
        labelled = sorted((place[dims[d][0]], d) for d in range(len(dims)) if dims[d])
        order = [d for _, d in labelled] + [d for d in range(len(dims)) if not dims[d]]
        if [a for d in order for a in dims[d]] != list(axes):
            raise self._lost(source)
        features = _features(source, dims)
        if order != sorted(order):
            source = self.emit(aten.permute.default, source, order)
        sizes = [math.prod(a.size or 1 for a in self.routing.tokens)]
        if lead == 2:
            sizes.append(self.routing.k)
        return self.reshape(source, [*sizes, *features])

    def as_rows(self, form: _Form, features: Sequence[int]) -> fx.Node:
        """[S, *features], whatever the form was."""
        order = self.record().order
        if form.kind == "rows":
            return form.value
        if form.kind == "experts":
            return self.emit(ops.expert_rows.default, form.value, self.record().counts, order)
        sizes = [shape(order)[0], *features]
        if form.kind == "one":
            example = roles.tensor(self.author)
            return self.emit(aten.ones.default, sizes, dtype=example.dtype, device=example.device)
        return self.emit(aten.expand.default, form.value, sizes)

    # -- walking back

    def lower(self, nodes: Nodes, dims: Dims, *, finished: bool = False) -> _Form:
        """The canonical form of corresponding nodes whose dimensions carry ``dims``."""
        if len(nodes) > 1 and all(n is nodes[0] for n in nodes):
            nodes = nodes[:1]
        own = self.domains.rows(nodes[0])
        if own is not None or finished:
            mine = own.dims if own else self.domains.meaning[nodes[0]].dims
            dims = tuple(
                pushed if "range" in kinds((here,)) or not here else here
                for here, pushed in zip(mine, dims, strict=True)
            )
        key = (nodes, dims)
        if key not in self.done:
            self.done[key] = self._lower(nodes, dims, own, finished)
        return self.done[key]

    def _lower(self, nodes: Nodes, dims: Dims, own: Rows | None, finished: bool) -> _Form:
        node = nodes[0]
        if own is not None and own.on is not None:
            return _ONE if own.on == 1 else _Form("plain", self._constant(node, own.on))
        meaning = self.domains.meaning.get(node)
        if len(nodes) == 1 and isinstance(meaning, Sum) and (own is not None or finished):
            return self._lower_sum(node, meaning)
        if len(nodes) > 1 and (form := self._lower_varying(nodes, dims, own)) is not None:
            return form
        if own is None and not finished and len(nodes) == 1:
            form = self._lower_opaque(node, dims)
            if form is not None:
                return form
        return self._lower_operator(nodes, dims)

    def _constant(self, node: fx.Node, value: Any) -> fx.Node:
        example = roles.tensor(node)
        return self.emit(
            aten.full.default, [1] * example.dim(), value, dtype=example.dtype, device=example.device
        )

    def _lower_sum(self, node: fx.Node, meaning: Sum) -> _Form:
        pieces = meaning.pieces
        if pieces[0][0] is None:
            if len(pieces) > 1:
                raise _error(node, "the rows of all experts added more than once")
            return self.lower((pieces[0][1],), pieces[0][2])
        numbers = [number for number, _, _ in pieces]
        expected = self.routing.experts or len(pieces)
        if sorted(numbers) != list(range(expected)):  # type: ignore[type-var]
            raise _error(
                node, f"a sum over experts {_listed(numbers)} of {expected}",
                "add the rows of every expert exactly once",
            )  # fmt: skip
        self.routing.experts = expected
        ordered = sorted(pieces, key=lambda piece: piece[0] or 0)
        return self.lower(tuple(rows for _, rows, _ in ordered), ordered[0][2])

    def _lower_varying(self, nodes: Nodes, dims: Dims, own: Rows | None) -> _Form | None:
        """Nodes that differ from expert to expert, other than by their operands."""
        first = nodes[0]
        if (found := _pieces_of_one(nodes)) is not None:
            source, dim = found
            if own is None or own.expert is not None:
                wider = (*dims[:dim], (self.routing.expert,), *dims[dim:])
                return self.lower((source,), wider)
            parent = self.domains.rows(source)
            if parent is not None:
                return self.lower((source,), parent.dims)
        if _same_slices(nodes):
            source: fx.Node = first.args[0]  # type: ignore[assignment,no-redef]
            parent = self.domains.rows(source)
            if parent is not None and "sorted" in kinds(parent.dims):
                return self.lower((source,), parent.dims)
            if (dim := _column(nodes)) is not None:
                return self._lower_columns(nodes, dims, dim)
        if own is None and not any(dims):
            if (stacked := self.stacks.parameter(nodes)) is not None:
                return _Form("experts", stacked)
            if not _mappable(nodes):
                return _Form("experts", self.emit(aten.stack.default, list(nodes), 0))
        return None

    def _lower_columns(self, nodes: Nodes, dims: Dims, dim: int) -> _Form:
        """Slices of width 1, number 0, 1, ... of a dimension of experts: the dimension stays, as 1."""
        source: Any = nodes[0].args[0]
        form = self.lower((source,), (*dims[:dim], (self.routing.expert,), *dims[dim + 1 :]))
        if form.kind in ("one", "plain"):
            return form
        sizes = [shape(form.value)[0], *_features(nodes[0], dims)]
        return _Form(form.kind, self.reshape(form.value, sizes))

    def _lower_opaque(self, node: fx.Node, dims: Dims) -> _Form | None:
        """A value that the routing did not make: tokens, weights of pairs, parameters of experts."""
        node = self.replaced.get(node, node)
        meaning = self.domains.meaning.get(node)
        if isinstance(meaning, Sum):
            raise _error(node, "the sum of experts' rows read before it is complete")
        found = kinds(dims)
        routing = self.routing
        if not found:
            return _Form("plain", node)
        if found == {"expert"}:
            return _Form("experts", self._experts_first(node, dims))
        if found == {"token"} and carried(dims) == set(routing.tokens):
            features = _features(node, dims)
            below = _operand_dims(node, dims) if packet(node) in RESHAPES else None
            if below is not None:
                return self._moved((node,), dims, self.lower((tensors(node)[0],), below[0]))
            if math.prod(features) > 1:
                return _Form("rows", self.tokens(node, dims))
            pairs = self._tokens_first(node, dims)
            pairs = self.emit(aten.unsqueeze.default, pairs, 1)
            pairs = self.emit(aten.expand.default, pairs, [-1, routing.k, *[-1] * len(features)])
            return _Form("rows", self.pair_rows(pairs))
        if found <= {"token", "slot"} and carried(dims) == set(routing.pairs):
            if (peeled := self._peeled(node, dims)) is not None:
                return peeled
            return _Form("rows", self.pair_rows(self._axes_first(node, dims, routing.pairs, 2)))
        if found == {"token", "expert"} and math.prod(_features(node, dims)) == 1:
            return self._matrix(node, dims)
        return None

    def _experts_first(self, node: fx.Node, dims: Dims) -> fx.Node:
        at = next(d for d, space in enumerate(dims) if space)
        size = shape(node)[at]
        if self.routing.experts not in (None, size):
            raise _error(node, f"parameters of {size} experts for a choice of {self.routing.experts}")
        self.routing.experts = size
        return node if at == 0 else self.emit(aten.movedim.int, node, at, 0)

    def pair_rows(self, pairs: fx.Node) -> fx.Node:
        """Values [N, k, *features] as rows; those without features may become combine's weights."""
        rows = self.emit(ops.pair_rows.default, pairs, self.record().order)
        if math.prod(shape(pairs)[2:]) == 1:
            self.pair_values[rows] = self.reshape(pairs, list(shape(pairs)[:2]))
        return rows

    def _peeled(self, node: fx.Node, dims: Dims) -> _Form | None:
        """Tokens that were repeated for each slot are tokens."""
        if packet(node) in (aten.index, aten.index_select) and self.domains.maps(node):
            return self._gather((node,), dims)
        below = _operand_dims(node, dims)
        if below is None or len(tensors(node)) != 1 or math.prod(_features(node, dims)) == 1:
            return None
        source = tensors(node)[0]
        if packet(node) not in (*RESHAPES, aten.clone, aten.expand, aten.repeat_interleave):
            return None
        if "slot" in kinds(below[0]):
            inner = self._peeled(source, below[0])
            return None if inner is None else self._moved((node,), dims, inner)
        if carried(below[0]) != set(self.routing.tokens):
            return None
        return self._moved((node,), dims, self.lower((source,), below[0]))

    def _matrix(self, node: fx.Node, dims: Dims) -> _Form:
        """The entries of a matrix of tokens and experts at the selected pairs."""
        axes = (*self.routing.tokens, self.routing.expert)
        place = {axis: i for i, axis in enumerate(axes)}
        order = sorted((d for d in range(len(dims)) if dims[d]), key=lambda d: place[dims[d][0]])
        order += [d for d in range(len(dims)) if not dims[d]]
        if [a for d in order for a in dims[d]] != list(axes):
            raise self._lost(node)
        record = self.record()
        features = _features(node, dims)
        if order != sorted(order):
            node = self.emit(aten.permute.default, node, order)
        matrix = self.reshape(node, [shape(record.ids)[0], self.routing.experts or -1])
        pairs = self.emit(aten.gather.default, matrix, 1, record.ids)
        return _Form("rows", self.pair_rows(self.reshape(pairs, [*shape(record.ids), *features])))

    # -- one operator

    def _lower_operator(self, nodes: Nodes, dims: Dims) -> _Form:
        node = nodes[0]
        self._check_alike(nodes)
        rule = _LOWER.get(packet(node))
        if rule is not None:
            return rule(self, nodes, dims)
        if is_pointwise(node):
            return self._pointwise(nodes, dims)
        if contraction(node) is not None:
            return self._contraction(nodes, dims)
        below = _operand_dims(node, dims)
        if below is not None and len(tensors(node)) == 1:
            return self._moved(nodes, dims, self.lower(_operands(nodes, 0), below[0]))
        if positions(node) is not None:
            return self._along(nodes, dims)
        raise self._lost(node)

    def _lost(self, node: fx.Node) -> RoleError:
        return _error(
            node, f"{node.target} in the computation of experts",
            "compute each expert row by row, from its own tokens and parameters",
        )  # fmt: skip

    def _check_alike(self, nodes: Nodes) -> None:
        """Experts that are not the same function cannot be grouped."""
        first = nodes[0]
        for number, other in enumerate(nodes):
            if other.target is not first.target or other.op != first.op:
                raise _error(
                    other, f"expert {number} computes {other.target} where expert 0 computes "
                    f"{first.target} ({roles.where(first)})",
                    "give every expert the same function; only parameters may differ",
                )  # fmt: skip
        if len(nodes) > 1 and packet(first) not in _LOWER and packet(first) not in RESHAPES:
            wanted = _constants(first)
            for number, other in enumerate(nodes):
                if _constants(other) != wanted:
                    raise _error(
                        other, f"expert {number} uses other constants than expert 0 in {first.target}",
                        "make the constants a parameter or buffer of each expert",
                    )  # fmt: skip

    def _fitted(self, form: _Form, x: fx.Node, dims: Dims, result: Dims) -> fx.Node | None:
        """The operand ``x`` of a broadcasting operator, its features aligned with the result's."""
        sizes, labels = shape(x), dims
        missing = len(result) - len(sizes)
        features = [
            1 if d < missing else sizes[d - missing]
            for d, space in enumerate(result)
            if not space
        ]
        if form.kind == "one":
            return None
        if form.kind == "plain":
            if all(not result[d + missing] for d in range(len(sizes))):
                return form.value
            return self.reshape(form.value, features)
        del labels
        return self.reshape(form.value, [shape(form.value)[0], *features])

    def _pointwise(self, nodes: Nodes, dims: Dims) -> _Form:
        node = nodes[0]
        operands = tensors(node)
        below = [_broadcast_dims(shape(x), dims) for x in operands]
        chosen = self._chosen_branch(nodes, dims)
        if chosen is not None:
            return chosen
        forms = [self.lower(_operands(nodes, i), below[i]) for i in range(len(operands))]
        fitted = [
            self._fitted(form, x, d, dims)
            for form, x, d in zip(forms, operands, below, strict=True)
        ]
        if packet(node) is aten.mul and (form := _without_ones(forms, fitted)) is not None:
            return self._widened(form, node, dims)
        if len(forms) == 1 and forms[0].kind == "one":
            return _ONE
        present = {form.kind for form in forms} - {"plain"}
        kind = "rows" if present - {"experts"} else ("experts" if present else "plain")
        arguments: list[fx.Node] = []
        for form, value, x in zip(forms, fitted, operands, strict=True):
            if form.kind == "experts" and kind == "rows":
                assert value is not None
                value = self.as_rows(_Form("experts", value), ())
            if value is None:
                value = self.as_rows(form, [1] * len(_features(node, dims)))
            del x
            arguments.append(value)
        result = self._with_operands(node, arguments)
        if len(arguments) == 1 and arguments[0] in self.pair_values and packet(node) is aten._to_copy:
            pairs = self._with_operands(node, [self.pair_values[arguments[0]]])
            self.pair_values[result] = pairs
        return _Form(kind, result)

    def _chosen_branch(self, nodes: Nodes, dims: Dims) -> _Form | None:
        """``where`` and ``masked_fill`` by the selection itself take one of their values."""
        node = nodes[0]
        if packet(node) is aten.masked_fill:
            mask = self.domains.rows(node.args[1])
            if mask is not None and mask.on is not None and not mask.on:
                place = 0
                return self.lower(_operands(nodes, place), _broadcast_dims(shape(tensors(node)[0]), dims))
        if packet(node) is aten.where:
            mask = self.domains.rows(node.args[0])
            if mask is not None and mask.on is not None:
                taken = node.args[1] if mask.on else node.args[2]
                if isinstance(taken, fx.Node) and shape(taken) == shape(node):
                    place = tensors(node).index(taken)
                    return self.lower(_operands(nodes, place), dims)
        return None

    def _widened(self, form: _Form, node: fx.Node, dims: Dims) -> _Form:
        features = _features(node, dims)
        if form.kind == "one" or list(shape(form.value)[1:]) == list(features):
            return form
        if form.kind == "plain":
            return form
        value = self.emit(aten.expand.default, form.value, [shape(form.value)[0], *features])
        return _Form(form.kind, value)

    def _with_operands(self, node: fx.Node, operands: Sequence[fx.Node], **changes: Any) -> fx.Node:
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

    def _moved(self, nodes: Nodes, dims: Dims, form: _Form) -> _Form:
        """Views, permutations and copies: only the order and sizes of features can change."""
        node = nodes[0]
        if form.kind in ("one", "plain"):
            if form.kind == "one":
                return form
            return _Form("plain", self._with_operands(node, [form.value]))
        source = tensors(node)[0]
        value = form.value
        order = permutation(node)
        if order is not None:
            below = _operand_dims(node, dims)
            assert below is not None
            features = [d for d in range(len(order)) if not below[0][d]]
            moved = [features.index(d) for d in order if not below[0][d]]
            if moved != sorted(moved):
                value = self.emit(aten.permute.default, value, [0, *[m + 1 for m in moved]])
        elif packet(node) is aten.clone:
            value = form.value
        elif packet(node) in (aten.expand, aten.repeat):
            below = _operand_dims(node, dims)
            assert below is not None
            fitted = self._fitted(form, source, below[0], dims)
            assert fitted is not None
            value, wanted = fitted, [shape(value)[0], *_features(node, dims)]
            if list(shape(value)) != wanted:
                value = self.emit(aten.expand.default, value, wanted)
        else:
            value = self.reshape(value, [shape(value)[0], *_features(node, dims)])
        return _Form(form.kind, value)

    def _along(self, nodes: Nodes, dims: Dims) -> _Form:
        """Softmax, norm, split, slice and their like on features; sums over slots and experts."""
        node = nodes[0]
        along = positions(node)
        assert along is not None
        operands = tensors(node)
        below = [self._dims_below(x, i, nodes, along, dims) for i, x in enumerate(operands)]
        forms = [self.lower(_operands(nodes, i), below[i]) for i in range(len(operands))]
        if None in along.kept:  # stack
            labelled = [not space for space in below[0]]
            if dims[along.mixed[0]]:
                raise self._lost(node)
        else:
            labelled = [not space for space in below[0]]
            routing_dims = [d for d in along.mixed if below[0][d]]
            if routing_dims:
                mixed = [d for d in along.mixed if not below[0][d]]
                if packet(node) not in (aten.sum, aten.any) or any(shape(operands[0])[d] != 1 for d in mixed):
                    raise self._lost(node)
                if forms[0].kind == "one":
                    return _ONE
                return _Form("rows", self.reshape(
                    self.as_rows(forms[0], _features(operands[0], below[0])),
                    [shape(self.record().order)[0], *_features(node, dims)],
                ))  # fmt: skip
        present = {form.kind for form in forms} - {"plain"}
        if not present:
            return _Form("plain", self._with_operands(node, [form.value for form in forms]))
        kind = "experts" if present == {"experts"} and len(operands) == 1 else "rows"
        values: list[fx.Node] = []
        for i, form in enumerate(forms):
            whole = i == 0 or along.place is not None
            if kind == "experts" or (form.kind == "plain" and not whole):
                values.append(form.value)
            elif form.kind == "experts" and not whole and packet(node) in _NORMS:
                return self._norm_by_hand(nodes, dims, forms)
            else:
                values.append(self.as_rows(form, _features(operands[i], below[i])))
        if along.place is None:
            return _Form(kind, self._with_operands(node, values))

        def place(d: int) -> int:
            return 1 + sum(labelled[:d])

        given = argument(node, along.place, "dim")
        mixed = [place(d) for d in along.mixed]
        args = list(node.args)
        if len(args) > along.place:
            args[along.place] = mixed[0] if isinstance(given, int) else mixed
            return _Form(kind, self._relocated(node, tuple(args), {}, values))
        changes = {"dim": mixed[0] if given is None or isinstance(given, int) else mixed}
        if given is None and packet(node) in (aten.sum, aten.mean, aten.any, aten.all):
            raise self._lost(node)
        return _Form(kind, self._relocated(node, tuple(args), changes, values))

    def _relocated(
        self, node: fx.Node, args: tuple[Any, ...], changes: dict[str, Any], values: list[fx.Node]
    ) -> fx.Node:
        supply = iter(values)
        kwargs = {**node.kwargs, **changes}
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda x: next(supply) if isinstance(roles.value(x), Tensor) else x, (args, kwargs)
        )
        author, self.author = self.author, node
        try:
            return self.emit(node.target, *args, **kwargs)
        finally:
            self.author = author

    def _dims_below(
        self, x: fx.Node, place: int, nodes: Nodes, along: Any, dims: Dims
    ) -> Dims:
        own = self.domains.rows(x)
        if own is not None:
            return own.dims
        rank = len(shape(x))
        if along.place is None and place > 0:
            return ((),) * rank
        result: list[Space] = [()] * rank
        for d, source in enumerate(along.kept):
            if source is not None and source < rank:
                result[source] = dims[d]
        return tuple(result)

    def _norm_by_hand(self, nodes: Nodes, dims: Dims, forms: Sequence[_Form]) -> _Form:
        """A norm whose weights differ from expert to expert: normalise, then scale each row."""
        node = nodes[0]
        args = list(node.args[:2])
        args[0] = self.as_rows(forms[0], ())
        eps = argument(node, 4 if packet(node) is aten.layer_norm else 3, "eps")
        author, self.author = self.author, node
        if packet(node) is aten.layer_norm:
            result = self.emit(aten.layer_norm.default, *args, None, None, *([eps] if eps else []))
        else:
            result = self.emit(aten.rms_norm.default, *args, None, eps)
        for form, target in zip(forms[1:], (aten.mul.Tensor, aten.add.Tensor), strict=False):
            value = form.value if form.kind == "plain" else self.as_rows(form, ())
            result = self.emit(target, result, value)
        self.author = author
        return _Form("rows", result)

    def _contraction(self, nodes: Nodes, dims: Dims) -> _Form:
        """Products with experts' parameters become grouped products."""
        node = nodes[0]
        product = contraction(node)
        assert product is not None
        spaces = dict(zip(product.result, dims, strict=True))
        for x, letters in zip(product.operands, product.letters, strict=True):
            own = self.domains.rows(x)
            for letter, space in zip(letters, own.dims if own else (), strict=bool(own)):
                if space and "range" not in kinds((space,)):
                    spaces[letter] = space
        if product.grouped:
            spaces[product.grouped] = (self.routing.expert,)
        factors: list[_Factor] = []
        for i, (x, letters) in enumerate(zip(product.operands, product.letters, strict=True)):
            below = tuple(
                () if n == 1 and isinstance(n, int) else spaces.get(letter, ())
                for letter, n in zip(letters, shape(x), strict=True)
            )
            members = tuple(_operand_of(n, x_i) for n, x_i in zip(nodes, _product_operand(nodes, i), strict=True))
            form = self.lower(members, below)
            free = [letter for letter in letters if not spaces.get(letter)]
            if form.kind == "one":
                continue
            value = self._only(form, letters, below, free, shape(x))
            factors.append(_Factor(form.kind, value, free))
        result = [letter for letter in product.result if not spaces.get(letter)]
        sizes = _features(node, dims)
        author, self.author = self.author, node
        value = self._product(node, factors, result, sizes)
        if product.bias is not None:
            x = product.bias
            below = _broadcast_dims(shape(x), dims)
            members = tuple(contraction(n).bias for n in nodes)  # type: ignore[union-attr]
            form = self.lower(members, below)  # type: ignore[arg-type]
            bias = self._fitted(form, x, below, dims)
            assert bias is not None
            if form.kind == "experts" and value.kind == "rows":
                bias = self.as_rows(_Form("experts", bias), ())
            value = _Form(value.kind, self.emit(aten.add.Tensor, value.value, bias))
        self.author = author
        return value

    def _only(
        self, form: _Form, letters: Sequence[str], below: Dims, free: Sequence[str], sizes: Sequence[int]
    ) -> fx.Node:
        """Drop dimensions of size 1 that stand for a routing axis of the other operands."""
        kept = [n for letter, n in zip(letters, sizes, strict=True) if letter in free]
        lead = [] if form.kind == "plain" else [shape(form.value)[0]]
        return self.reshape(form.value, [*lead, *kept])

    def _product(
        self, node: fx.Node, factors: list[_Factor], result: list[str], sizes: Sequence[int]
    ) -> _Form:
        weights = [f for f in factors if f.kind == "experts" and len(f.letters) > 1]
        scalars = [f for f in factors if f.kind == "rows" and not f.letters]
        inputs = [f for f in factors if f.kind == "rows" and f.letters]
        others = [f for f in factors if f not in weights and f not in scalars and f not in inputs]
        if not weights and not inputs and not scalars:
            if others and all(f.kind == "plain" for f in others):
                return _Form("plain", self._einsum(others, result, ""))
            return _Form("rows", self._einsum([self._row_factor(f) for f in others], result, "s"))
        if not inputs and scalars:
            inputs, scalars = scalars, []
        if not weights:
            value = self._einsum([self._row_factor(f) for f in (*inputs, *others)], result, "s")
        elif len(weights) == 1 and len(inputs) == 1 and not others:
            value = self._grouped(node, inputs[0], weights[0], result)
        else:
            raise _error(
                node, "a product of experts' weights with more than one other factor",
                "multiply each expert's rows by one of its matrices at a time",
            )  # fmt: skip
        value = self.reshape(value, [shape(value)[0], *sizes])
        for scalar in scalars:
            factor = self.reshape(scalar.node, [shape(value)[0], *[1] * len(sizes)])
            value = self.emit(aten.mul.Tensor, value, factor)
        return _Form("rows", value)

    def _row_factor(self, factor: _Factor) -> _Factor:
        if factor.kind == "experts":
            return replace(factor, kind="rows", node=self.as_rows(_Form("experts", factor.node), ()))
        return factor

    def _einsum(self, factors: Sequence[_Factor], result: Sequence[str], lead: str) -> fx.Node:
        if len(factors) == 1 and list(factors[0].letters) == list(result):
            return factors[0].node
        names = {n: chr(ord("A") + i) for i, n in enumerate(dict.fromkeys(
            letter for f in factors for letter in (*f.letters, *result)
        ))}  # fmt: skip
        spelled = [
            (lead if f.kind == "rows" else "") + "".join(names[x] for x in f.letters) for f in factors
        ]
        equation = f"{','.join(spelled)}->{lead}{''.join(names[x] for x in result)}"
        return self.emit(aten.einsum.default, equation, [f.node for f in factors])

    def _grouped(
        self, node: fx.Node, rows: _Factor, weight: _Factor, result: Sequence[str]
    ) -> fx.Node:
        """``grouped_mm`` with the contracted features of both flattened in one order."""
        size = dict(zip(weight.letters, shape(weight.node)[1:], strict=True))
        size.update(zip(rows.letters, shape(rows.node)[1:], strict=True))
        inner = [x for x in weight.letters if x in rows.letters and x not in result]
        outer = [x for x in weight.letters if x not in inner]
        rest = [x for x in rows.letters if x not in inner and size[x] != 1]
        if rest or any(x not in result for x in outer if size[x] != 1):
            raise _error(
                node, "a product that is not one matrix of each expert times its rows",
                "multiply rows [S, K] by one matrix [K, N] of each expert at a time",
            )  # fmt: skip
        outer = [x for x in result if x in outer]
        x = self._ordered(rows, [*(y for y in rows.letters if y not in inner), *inner])
        x = self.reshape(x, [shape(x)[0], math.prod(size[y] for y in inner)])
        w = self._ordered(weight, [*inner, *(y for y in weight.letters if y not in (*inner, *outer)), *outer])
        w = self.reshape(
            w, [shape(w)[0], math.prod(size[y] for y in inner), math.prod(size[y] for y in outer)]
        )
        return self.emit(ops.grouped_mm.default, x, w, self.record().counts)

    def _ordered(self, factor: _Factor, letters: Sequence[str]) -> fx.Node:
        order = [0, *(1 + list(factor.letters).index(x) for x in letters)]
        if order == sorted(order):
            return factor.node
        moved = [i for i, d in enumerate(order) if i != d]
        if len(moved) == 2:
            return self.emit(aten.transpose.int, factor.node, *moved)
        return self.emit(aten.permute.default, factor.node, order)

    # -- operators with a meaning of their own

    def _gather(self, nodes: Nodes, dims: Dims) -> _Form:
        """A gather by routing is an evaluation of its source at the pairs."""
        node = nodes[0]
        source = node.args[0]
        found = self.domains.maps(node)
        if found is None:
            raise self._lost(node)
        first, maps = found
        width = len(maps[0].dims)
        change = unified(maps[0].dims, dims[first : first + width])
        if change is None:
            raise self._lost(node)
        targets = [substituted(m.to, change) for m in maps]
        own = self.domains.rows(source)
        below = (*dims[:first], *targets, *dims[first + width :])
        if own is not None:
            below = tuple(b or o for b, o in zip(below, own.dims, strict=True))
        members = tuple(n.args[0] for n in nodes)
        return self.lower(members, below)  # type: ignore[arg-type]

    def _stack(self, nodes: Nodes, dims: Dims) -> _Form:
        """A stack of every expert's result: each pair takes that of its own expert."""
        node = nodes[0]
        at = argument(node, 1, "dim", 0) % len(dims)
        if len(nodes) > 1 or kinds((dims[at],)) != {"expert"}:
            return self._along(nodes, dims)
        members: Any = tuple(node.args[0])  # type: ignore[arg-type]
        expected = self.routing.experts or len(members)
        if len(members) != expected:
            raise _error(node, f"a stack of {len(members)} experts for a choice of {expected}")
        self.routing.experts = expected
        return self.lower(members, (*dims[:at], *dims[at + 1 :]))

    def _matrix_of_weights(self, nodes: Nodes, dims: Dims) -> _Form:
        """``zeros.scatter(-1, ids, weights)`` at the selected pairs is ``weights``."""
        node = nodes[0]
        ids, source = node.args[2], node.args[3]
        meaning = self.domains.index(ids)
        if not isinstance(source, fx.Node) or meaning is None or len(nodes) > 1:
            raise self._lost(node)
        if meaning.to != (self.routing.expert,):  # a permutation of rows
            own = self.domains.rows(source)
            assert own is not None
            return self.lower((source,), own.dims)
        if shape(source) != shape(ids):
            return self._matrix(node, dims)
        return self.lower((source,), meaning.dims)

    def _written(self, nodes: Nodes, dims: Dims) -> _Form:
        raise self._lost(nodes[0])

    def _softmax(self, nodes: Nodes, dims: Dims) -> _Form:
        """A softmax over experts is read at the selected pairs."""
        node = nodes[0]
        rank = len(dims)
        along = positions(node)
        assert along is not None
        if kinds((dims[along.mixed[0] % rank],)) == {"expert"} and len(nodes) == 1:
            return self._matrix(node, dims)
        return self._along(nodes, dims)

    def _getitem(self, nodes: Nodes, dims: Dims) -> _Form:
        """One result of an operator with several."""
        sources = tuple(n.args[0] for n in nodes)
        form = self.lower_outputs(sources, nodes, dims)  # type: ignore[arg-type]
        return _Form(form.kind, self.emit(operator.getitem, form.value, nodes[0].args[1]))

    def lower_outputs(self, sources: Nodes, nodes: Nodes, dims: Dims) -> _Form:
        own = self.domains.meaning.get(sources[0])
        dims = own.dims if isinstance(own, Rows) else dims
        unique = sources[:1] if all(s is sources[0] for s in sources) else sources
        key = (unique, dims)
        if key not in self.done:
            self._check_alike(unique)
            self.done[key] = self._along(unique, dims)
        return self.done[key]


@dataclass(frozen=True)
class _Factor:
    kind: str
    node: fx.Node
    letters: Sequence[str]


_NORMS = (aten.layer_norm, aten.rms_norm)
_LOWER: dict[Any, Callable[[_Raiser, Nodes, Dims], _Form]] = {
    **dict.fromkeys((aten.index, aten.index_select, aten.embedding, aten.gather), _Raiser._gather),
    **dict.fromkeys((aten.softmax, aten._softmax), _Raiser._softmax),
    aten.stack: _Raiser._stack,
    aten.scatter: _Raiser._matrix_of_weights,
    operator.getitem: _Raiser._getitem,
}


def _features(node: fx.Node, dims: Dims) -> list[int]:
    return [n for n, space in zip(shape(node), dims, strict=True) if not space]


def _broadcast_dims(sizes: Sequence[Any], result: Dims) -> Dims:
    """The axes of an operand that broadcasts to ``result``."""
    offset = len(result) - len(sizes)
    return tuple(
        () if isinstance(n, int) and n == 1 else result[d + offset] for d, n in enumerate(sizes)
    )


def _operand_dims(node: fx.Node, dims: Dims) -> list[Dims] | None:
    """The axes of the operand of a view, permutation, repeat or copy, from those of its result."""
    operands = tensors(node)
    if not operands:
        return None
    sizes = shape(operands[0])
    if packet(node) in RESHAPES:
        below = reshaped(shape(node), dims, sizes)
        return None if below is None else [below]
    if (order := permutation(node)) is not None:
        return [tuple(dims[order.index(d)] for d in range(len(order)))]
    if packet(node) is aten.expand:
        return [_broadcast_dims(sizes, dims)]
    if packet(node) is aten.clone:
        return [dims]
    if packet(node) is aten.repeat:
        lead = len(dims) - len(sizes)
        return [tuple(_trailing(dims[d + lead], n) for d, n in enumerate(sizes))]
    if packet(node) is aten.repeat_interleave and isinstance(node.args[1], int):
        dim = argument(node, 2, "dim")
        if dim is None:
            return None
        return [tuple(_leading(s, n) if d == dim % len(sizes) else s for d, (s, n) in enumerate(zip(dims, sizes, strict=True)))]
    return None


def _trailing(space: Space, size: int) -> Space:
    for cut in range(len(space) + 1):
        if math.prod(a.size or 0 for a in space[cut:]) == size:
            return space[cut:]
    return space


def _leading(space: Space, size: int) -> Space:
    for cut in range(len(space) + 1):
        if math.prod(a.size or 0 for a in space[:cut]) == size:
            return space[:cut]
    return space


def _operands(nodes: Nodes, place: int) -> Nodes:
    return tuple(tensors(n)[place] for n in nodes)


def _product_operand(nodes: Nodes, place: int) -> Nodes:
    return tuple(contraction(n).operands[place] for n in nodes)  # type: ignore[union-attr]


def _operand_of(_: fx.Node, x: fx.Node) -> fx.Node:
    return x


def _without_ones(forms: Sequence[_Form], fitted: Sequence[fx.Node | None]) -> _Form | None:
    """A product with 1."""
    if len(forms) != 2 or not any(form.kind == "one" for form in forms):
        return None
    other = 1 if forms[0].kind == "one" else 0
    value = fitted[other]
    return _ONE if value is None else _Form(forms[other].kind, value)


def _constants(node: fx.Node) -> list[Any]:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [x for x in leaves if not isinstance(x, fx.Node)]


def _pieces_of_one(nodes: Nodes) -> tuple[fx.Node, int] | None:
    """If the nodes are number 0, 1, ... of one tensor along a dimension: that tensor and dimension."""
    first = nodes[0]
    if packet(first) is aten.select:
        source, dim = first.args[:2]
        same = all(n.target is first.target and n.args[:2] == (source, dim) for n in nodes)
        numbers = [n.args[2] for n in nodes] if same else []
    elif first.target is operator.getitem and isinstance(first.args[0], fx.Node):
        pieces = first.args[0]
        if packet(pieces) not in (aten.unbind, aten.split, aten.split_with_sizes):
            return None
        same = all(n.target is first.target and n.args[0] is pieces for n in nodes)
        numbers = [n.args[1] for n in nodes] if same else []
        source, dim = pieces.args[0], 0
        if packet(pieces) is aten.unbind:
            dim = argument(pieces, 1, "dim", 0)
    else:
        return None
    if numbers != list(range(len(nodes))) or not isinstance(source, fx.Node):
        return None
    return source, int(dim) % len(shape(source))  # type: ignore[call-overload]


def _same_slices(nodes: Nodes) -> bool:
    first = nodes[0]
    return packet(first) is aten.slice and all(
        n.target is first.target and n.args[0] is first.args[0] for n in nodes
    )


def _column(nodes: Nodes) -> int | None:
    """The dimension of which the nodes are slices 0:1, 1:2, ..., covering it."""
    first = nodes[0]
    dim = int(argument(first, 1, "dim", 0))
    bounds = [(argument(n, 2, "start") or 0, argument(n, 3, "end")) for n in nodes]
    if any(argument(n, 1, "dim", 0) != dim for n in nodes) or shape(first)[dim] != 1:
        return None
    starts = [start for start, _ in bounds]
    covered = shape(first.args[0])[dim] == len(nodes)  # type: ignore[arg-type]
    return dim if covered and starts == list(range(len(nodes))) else None


def _mappable(nodes: Nodes) -> bool:
    """Whether corresponding values can be computed from stacked operands by the same operator."""
    first = nodes[0]
    if first.op != "call_function" or any(n.target is not first.target for n in nodes):
        return False
    if first.target is operator.getitem:
        return _mappable(tuple(n.args[0] for n in nodes))  # type: ignore[arg-type]
    simple = is_pointwise(first) or packet(first) in RESHAPES or permutation(first) is not None
    return bool(tensors(first)) and (simple or positions(first) is not None)


# ---- Parameters ----------------------------------------------------------------------------------


class _Stacks:
    """Parameters that are separate for each expert, and the one parameter that each set becomes."""

    def __init__(self, graph: fx.Graph, signature: Signature):
        self.graph = graph
        self.placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        self.known = {p.name: p for p in signature.parameters}
        self.names = {p.fqn for p in signature.parameters}
        self.stacked: dict[Nodes, tuple[fx.Node, Parameter]] = {}
        self.members: dict[fx.Node, tuple[fx.Node, int]] = {}
        values = [roles.value(n) for n in self.placeholders.values()]
        self.mode: Any = detect_fake_mode(values)

    def parameter(self, nodes: Nodes) -> fx.Node | None:
        """The stacked parameter of these placeholders, None if they cannot be one parameter."""
        if nodes in self.stacked:
            return self.stacked[nodes][0]
        parts = [self.known.get(n.name) for n in nodes if n.op == "placeholder"]
        if len(parts) != len(nodes) or len(set(nodes)) != len(nodes) or None in parts:
            return None
        found = [p for p in parts if p is not None]
        first = found[0]
        alike = {(p.shape, p.dtype, p.requires_grad) for p in found}
        if len(alike) != 1 or any(n in self.members for n in nodes):
            return None
        fqn = self._name([p.fqn for p in found])
        parameter = Parameter(
            fqn.replace(".", "_"), fqn, (len(found), *first.shape), first.dtype,
            first.requires_grad, stacked=tuple(p.fqn for p in found),
        )  # fmt: skip
        with self.graph.inserting_before(nodes[0]):
            node = self.graph.placeholder(parameter.name)
        parameter = replace(parameter, name=node.name)
        with self.mode, torch.no_grad():
            roles.set_value(node, torch.stack([roles.tensor(n) for n in nodes]))
        roles.copy_role(node, of=nodes[0])
        self.stacked[nodes] = (node, parameter)
        self.members.update({n: (node, e) for e, n in enumerate(nodes)})
        return node

    def _name(self, fqns: Sequence[str]) -> str:
        """``layers.0.experts.7.w1`` for every expert: ``layers.0.experts.stacked.w1``."""
        columns = list(zip(*(fqn.split(".") for fqn in fqns), strict=False))
        parts = [
            column[0] if len(set(column)) == 1 else _common(column) for column in columns
        ]
        name = candidate = ".".join(parts)
        number = 1
        while candidate in self.names:
            number += 1
            candidate = f"{name}_{number}"
        self.names.add(candidate)
        return candidate

    def finish(self, signature: Signature) -> Signature:
        """Remove the separate parameters; whatever still reads one reads its part of the stack."""
        at = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        firsts = {nodes[0]: entry for nodes, entry in self.stacked.items()}
        parameters: list[Parameter] = []
        for parameter in signature.parameters:
            node = self.placeholders[parameter.name]
            if node in firsts:
                parameters.append(firsts[node][1])
            if node not in self.members:
                parameters.append(parameter)
                continue
            stack, number = self.members[node]
            if node.users and at is not None:
                with self.graph.inserting_before(at):
                    part = self.graph.call_function(aten.select.int, (stack, 0, number))
                roles.set_value(part, roles.value(node))
                roles.copy_role(part, of=node)
                node.replace_all_uses_with(part)
            self.graph.erase_node(node)
        return replace(signature, parameters=tuple(parameters))


def _common(column: Sequence[str]) -> str:
    """One name for the parts of names in which experts differ."""
    patterns = {re.sub(r"\d+", "stacked", part) for part in column}
    return patterns.pop() if len(patterns) == 1 else "stacked"


# ---- What was not understood ---------------------------------------------------------------------


def _error(node: fx.Node, what: str, instead: str = "") -> RoleError:
    advice = instead or (
        "gather tokens by a top-k's indices, apply the same function of one row in every expert, "
        "and add the weighted results back"
    )
    return RoleError(
        f"This Mixture-of-Experts block cannot be raised: found {what}, at {roles.where(node)}. "
        f"Write instead: {advice}."
    )


def _listed(numbers: Sequence[int | None]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown}, ..." if len(numbers) > 6 else shown


def _refuse_leftovers(graph: fx.Graph, domains: Domains) -> None:
    """Raise an error for the first node that still selects experts in the user's own way."""
    for node in graph.nodes:
        if isinstance(domains.meaning.get(node), Position) and _limits(node):
            raise _error(
                node, "a capacity: pairs whose place in their expert's queue is beyond a limit are dropped",
                "keep every pair (a dropless block: no cumulative position, no capacity factor); "
                "dropping is an option of moptrace, not of the model",
            )  # fmt: skip
    for node in graph.nodes:
        if node in domains.refusals:
            raise _error(node, domains.refusals[node])
    for node in graph.nodes:
        if node not in domains.meaning:
            continue
        meaning = domains.meaning[node]
        if node.target is ops.grouped_mm.default or _selects(node, meaning):
            raise _error(node, "rows of experts whose results are not added up for each token")
        if isinstance(meaning, Rows) and not meaning.done and _weighs_values(node, meaning):
            raise _error(
                node, "a selection of experts by which values of tokens are multiplied, but whose "
                "results are not added up over all experts",
            )  # fmt: skip
    for node in graph.nodes:
        if node.target is ops.grouped_mm.default and roles.role(node).made_by:
            raise _error(node, "a grouped product whose rows were not sorted by a known choice of experts")


def _limits(node: fx.Node) -> bool:
    return any(
        packet(user) in (aten.lt, aten.le, aten.gt, aten.ge, aten.one_hot, aten.clamp)
        for user in node.users
    )


def _selects(node: fx.Node, meaning: Any) -> bool:
    if not isinstance(meaning, Rows) or not kinds(meaning.dims) & {"sorted", "branch"}:
        return False
    return math.prod(n for n in _features(node, meaning.dims) if isinstance(n, int)) > 1


def _weighs_values(node: fx.Node, meaning: Rows) -> bool:
    """Whether a matrix of tokens and experts goes on to multiply values of more features.

    Routers and auxiliary losses use such matrices too, but not on wider values; and in sparse
    attention a softmax comes first.
    """
    if "token" not in kinds(meaning.dims):
        return False
    if meaning.expert is None and "expert" not in kinds(meaning.dims):
        return False
    size = _numel(node)
    stack, seen = [node], set[fx.Node]()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            product = packet(user) is aten.mul or contraction(user) is not None
            if product and any(_numel(x) > size for x in tensors(user)) and not _routes(user):
                return True
            if is_pointwise(user) or packet(user) in (*RESHAPES, aten.select, aten.slice, aten.unbind):
                stack.append(user)
            elif permutation(user) is not None or user.target is operator.getitem:
                stack.append(user)
    return False


def _numel(node: fx.Node) -> int:
    return math.prod(n for n in shape(node) if isinstance(n, int))


def _routes(node: fx.Node, depth: int = 6) -> bool:
    """Whether a value only goes on to choose experts."""
    if packet(node) in (aten.topk, aten.argmax, aten.max, aten.sort):
        return True
    if depth == 0 or contraction(node) is not None or not node.users:
        return False
    return all(_routes(user, depth - 1) for user in node.users)
