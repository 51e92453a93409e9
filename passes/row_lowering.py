"""Walk back from the end of a block and write its computation on rows sorted by expert.

One walk serves every style, because it follows E corresponding nodes at a time: one node where the
model already computes all experts together, and E nodes, one for each expert, where it loops. At
each step the E nodes must be the same operator.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.passes.axes import (
    OF_ONE,
    RESHAPES,
    Dims,
    Space,
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
    tensors,
)
from moptrace.passes.row_domains import Rows, Sum
from moptrace.passes.row_emitter import ONE, Form, features_of, refusal
from moptrace.passes.row_moves import maps_of, substituted, unified
from moptrace.passes.row_products import Products, broadcast_dims
from moptrace.passes.stacked_parameters import Nodes

__all__ = ["Lowering"]

aten = torch.ops.aten
ops = torch.ops.moptrace


@dataclass
class Lowering(Products):
    """``lower`` gives the canonical form of corresponding nodes."""

    def lower(self, nodes: Nodes, dims: Dims, *, finished: bool = False) -> Form:
        """The canonical form of corresponding nodes whose dimensions carry ``dims``."""
        first = nodes[0]
        if all(n is first for n in nodes):
            nodes = (first,)
        own = self.domains.rows(first)
        if own is not None or finished:
            mine = own.dims if own else self.domains.meaning[first].dims
            dims = tuple(
                pushed if "range" in kinds((here,)) or not here else here
                for here, pushed in zip(mine, dims, strict=True)
            )
        key = (nodes, dims)
        if key not in self.done:
            self.done[key] = self._lower(nodes, dims, own, finished)
        return self.done[key]

    def _lower(self, nodes: Nodes, dims: Dims, own: Rows | None, finished: bool) -> Form:
        node = nodes[0]
        if own is not None and own.on is not None:
            return ONE if own.on == 1 else Form("plain", self._constant(node, own))
        meaning = self.domains.meaning.get(node)
        if len(nodes) == 1 and isinstance(meaning, Sum) and (own is not None or finished):
            return self._lower_sum(node, meaning)
        if own is not None and (sorted_ := self._sorted_source(nodes, own)) is not None:
            return self.lower((sorted_,), self.domains.meaning[sorted_].dims)
        if len(nodes) > 1 and (form := self._lower_varying(nodes, dims, own)) is not None:
            return form
        if own is None and not finished and len(nodes) == 1:
            form = self._lower_opaque(node, dims)
            if form is not None:
                return form
        return self._lower_operator(nodes, dims)

    def _constant(self, node: fx.Node, own: Rows) -> fx.Node:
        example = roles.tensor(node)
        sizes = [1 if space else n for n, space in zip(shape(node), own.dims, strict=True)]
        return self.emit(
            aten.full.default, sizes, own.on, dtype=example.dtype, device=example.device
        )

    def _lower_sum(self, node: fx.Node, meaning: Sum) -> Form:
        pieces = meaning.pieces
        if pieces[0][0] is None:
            if len(pieces) > 1:
                raise refusal(node, "the rows of all experts added more than once")
            return self.lower((pieces[0][1],), pieces[0][2])
        numbers = [number for number, _, _ in pieces]
        expected = self.routing.experts or len(pieces)
        if sorted(numbers) != list(range(expected)):  # type: ignore[type-var]
            raise refusal(
                node, f"a sum over experts {listed(numbers)} of {expected}",
                "add the rows of every expert exactly once",
            )  # fmt: skip
        self.routing.experts = expected
        ordered = sorted(pieces, key=lambda piece: piece[0] or 0)
        return self.lower(tuple(rows for _, rows, _ in ordered), ordered[0][2])

    def _lower_varying(self, nodes: Nodes, dims: Dims, own: Rows | None) -> Form | None:
        """Nodes that differ from expert to expert, other than by their operands."""
        if (found := _pieces_of_one(nodes)) is not None:
            source, dim = found
            if own is None or own.expert is not None:
                wider = (*dims[:dim], (self.routing.expert,), *dims[dim:])
                return self.lower((source,), wider)
        if _same_slices(nodes) and (dim := _column(nodes)) is not None:
            return self._lower_columns(nodes, dims, dim)
        if own is None and not any(dims):
            if (stacked := self.stacks.parameter(nodes)) is not None:
                return Form("experts", stacked)
            if not _mappable(nodes):
                return Form("experts", self.emit(aten.stack.default, list(nodes), 0))
        return None

    def _sorted_source(self, nodes: Nodes, own: Rows) -> fx.Node | None:
        """The sorted rows of which the nodes are the rows of expert 0, 1, ..."""
        if "branch" not in kinds(own.dims):
            return None
        if _same_slices(nodes):
            source: Any = nodes[0].args[0]
        elif (found := _pieces_of_one(nodes)) is not None:
            source = found[0]
        else:
            return None
        parent = self.domains.rows(source)
        return source if parent is not None and "sorted" in kinds(parent.dims) else None

    def _lower_columns(self, nodes: Nodes, dims: Dims, dim: int) -> Form:
        """Slices 0:1, 1:2, ... of a dimension of experts: the dimension stays, with size 1."""
        source: Any = nodes[0].args[0]
        form = self.lower((source,), (*dims[:dim], (self.routing.expert,), *dims[dim + 1 :]))
        if form.kind in ("one", "plain"):
            return form
        sizes = [shape(form.value)[0], *features_of(nodes[0], dims)]
        return Form(form.kind, self.reshape(form.value, sizes))

    def _lower_opaque(self, node: fx.Node, dims: Dims) -> Form | None:
        """A value that routing did not make: tokens, weights of pairs, parameters."""
        node = self.replaced.get(node, node)
        meaning = self.domains.meaning.get(node)
        if isinstance(meaning, Sum):
            raise refusal(node, "the sum of experts' rows read before it is complete")
        found = kinds(dims)
        routing = self.routing
        if not found:
            return Form("plain", node)
        if found == {"expert"}:
            return Form("experts", self.experts_first(node, dims))
        if found == {"token"} and carried(dims) == set(routing.tokens):
            features = features_of(node, dims)
            below = _operand_dims(node, dims) if packet(node) in RESHAPES else None
            if below is not None:
                return self._moved((node,), dims, self.lower((tensors(node)[0],), below[0]))
            if math.prod(features) > 1:
                return Form("rows", self.tokens(node, dims))
            pairs = self.tokens_first(node, dims)
            pairs = self.emit(aten.unsqueeze.default, pairs, 1)
            pairs = self.emit(aten.expand.default, pairs, [-1, routing.k, *[-1] * len(features)])
            return Form("rows", self.pair_rows(pairs))
        if found <= {"token", "slot"} and carried(dims) == set(routing.pairs):
            if (peeled := self._peeled(node, dims)) is not None:
                return peeled
            return Form("rows", self.pair_rows(self.axes_first(node, dims, routing.pairs, 2)))
        if found == {"token", "expert"} and math.prod(features_of(node, dims)) == 1:
            return self.matrix_pairs(node, dims)
        return None

    def _peeled(self, node: fx.Node, dims: Dims) -> Form | None:
        """Tokens that were repeated for each slot are tokens."""
        if packet(node) in (aten.index, aten.index_select) and maps_of(self.domains, node):
            return self._gather((node,), dims)
        below = _operand_dims(node, dims)
        if below is None or len(tensors(node)) != 1 or math.prod(features_of(node, dims)) == 1:
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

    def _lower_operator(self, nodes: Nodes, dims: Dims) -> Form:
        node = nodes[0]
        self._check_alike(nodes)
        rule = _LOWER.get(packet(node))
        if rule is not None:
            return rule(self, nodes, dims)
        if is_pointwise(node):
            return self._pointwise(nodes, dims)
        if contraction(node) is not None:
            return self.product(nodes, dims)
        below = _operand_dims(node, dims)
        if below is not None and len(tensors(node)) == 1:
            return self._moved(nodes, dims, self.lower(_operands(nodes, 0), below[0]))
        if positions(node) is not None:
            return self._along(nodes, dims)
        raise self.lost(node)

    def _check_alike(self, nodes: Nodes) -> None:
        """Experts that are not the same function cannot be grouped."""
        first = nodes[0]
        for number, other in enumerate(nodes):
            if other.target is not first.target or other.op != first.op:
                raise refusal(
                    other, f"expert {number} computes {other.target} where expert 0 computes "
                    f"{first.target} ({roles.where(first)})",
                    "give every expert the same function; only parameters may differ",
                )  # fmt: skip
        if len(nodes) > 1 and packet(first) not in _LOWER and packet(first) not in RESHAPES:
            wanted = _constants(first)
            for number, other in enumerate(nodes):
                if _constants(other) != wanted:
                    raise refusal(
                        other, f"experts 0 and {number} differ in constants of {first.target}",
                        "make the constants a parameter or buffer of each expert",
                    )  # fmt: skip

    def _pointwise(self, nodes: Nodes, dims: Dims) -> Form:
        node = nodes[0]
        operands = tensors(node)
        below = [broadcast_dims(shape(x), dims) for x in operands]
        chosen = self._chosen_branch(nodes, dims)
        if chosen is not None:
            return chosen
        forms = [self.lower(_operands(nodes, i), below[i]) for i in range(len(operands))]
        fitted = [self.fitted(form, x, dims) for form, x in zip(forms, operands, strict=True)]
        if packet(node) is aten.mul and (form := _without_ones(forms, fitted)) is not None:
            return self._widened(form, node, dims)
        if len(forms) == 1 and forms[0].kind == "one":
            return ONE
        present = {form.kind for form in forms} - {"plain"}
        kind = "rows" if present - {"experts"} else ("experts" if present else "plain")
        arguments: list[fx.Node] = []
        for form, value in zip(forms, fitted, strict=True):
            if form.kind == "experts" and kind == "rows":
                assert value is not None
                value = self.as_rows(Form("experts", value), ())
            if value is None:
                value = self.as_rows(form, [1] * len(features_of(node, dims)))
            arguments.append(value)
        result = self.with_operands(node, arguments)
        if (
            len(arguments) == 1
            and arguments[0] in self.pair_values
            and packet(node) is aten._to_copy
        ):
            pairs = self.with_operands(node, [self.pair_values[arguments[0]]])
            self.pair_values[result] = pairs
        return Form(kind, result)

    def _chosen_branch(self, nodes: Nodes, dims: Dims) -> Form | None:
        """``where`` and ``masked_fill`` by the selection itself take one of their values."""
        node = nodes[0]
        if packet(node) is aten.masked_fill:
            mask = self.domains.rows(node.args[1])
            if mask is not None and mask.on is not None and not mask.on:
                place = 0
                return self.lower(
                    _operands(nodes, place), broadcast_dims(shape(tensors(node)[0]), dims)
                )
        if packet(node) is aten.where:
            mask = self.domains.rows(node.args[0])
            if mask is not None and mask.on is not None:
                taken = node.args[1] if mask.on else node.args[2]
                if isinstance(taken, fx.Node) and shape(taken) == shape(node):
                    place = tensors(node).index(taken)
                    return self.lower(_operands(nodes, place), dims)
        return None

    def _widened(self, form: Form, node: fx.Node, dims: Dims) -> Form:
        features = features_of(node, dims)
        if form.kind == "one" or list(shape(form.value)[1:]) == list(features):
            return form
        if form.kind == "plain":
            return form
        value = self.emit(aten.expand.default, form.value, [shape(form.value)[0], *features])
        return Form(form.kind, value)

    def _moved(self, nodes: Nodes, dims: Dims, form: Form) -> Form:
        """Views, permutations and copies: only the order and sizes of features can change."""
        node = nodes[0]
        if form.kind in ("one", "plain"):
            if form.kind == "one":
                return form
            return Form("plain", self.with_operands(node, [form.value]))
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
            fitted = self.fitted(form, source, dims)
            assert fitted is not None
            value, wanted = fitted, [shape(value)[0], *features_of(node, dims)]
            if list(shape(value)) != wanted:
                value = self.emit(aten.expand.default, value, wanted)
        else:
            value = self.reshape(value, [shape(value)[0], *features_of(node, dims)])
        return Form(form.kind, value)

    def _along(self, nodes: Nodes, dims: Dims) -> Form:
        """Softmax, norm, split, slice and their like on features; sums over slots and experts."""
        node = nodes[0]
        along = positions(node)
        assert along is not None
        operands = tensors(node)
        below = [self._dims_below(x, i, nodes, along, dims) for i, x in enumerate(operands)]
        forms = [self.lower(_operands(nodes, i), below[i]) for i in range(len(operands))]
        features = [not space for space in below[0]]
        if None in along.kept:  # stack
            if dims[along.mixed[0]]:
                raise self.lost(node)
        else:
            routing_dims = [d for d in along.mixed if below[0][d]]
            if routing_dims:
                mixed = [d for d in along.mixed if not below[0][d]]
                if packet(node) not in (aten.sum, aten.any) or any(
                    shape(operands[0])[d] != 1 for d in mixed
                ):
                    raise self.lost(node)
                if forms[0].kind == "one":
                    return ONE
                return Form("rows", self.reshape(
                    self.as_rows(forms[0], features_of(operands[0], below[0])),
                    [shape(self.record().order)[0], *features_of(node, dims)],
                ))  # fmt: skip
        present = {form.kind for form in forms} - {"plain"}
        if not present:
            return Form("plain", self.with_operands(node, [form.value for form in forms]))
        kind = "experts" if present == {"experts"} and len(operands) == 1 else "rows"
        if packet(node) in OF_ONE and all(shape(operands[0])[d] == 1 for d in along.mixed):
            if roles.tensor(operands[0]).dtype == roles.tensor(node).dtype:
                return self._moved(nodes, dims, forms[0])
        values: list[fx.Node] = []
        for i, form in enumerate(forms):
            whole = i == 0 or along.place is not None
            if kind == "experts" or (form.kind == "plain" and not whole):
                values.append(form.value)
            elif form.kind == "experts" and not whole and packet(node) in _NORMS:
                return self._norm_by_hand(nodes, dims, forms)
            else:
                values.append(self.as_rows(form, features_of(operands[i], below[i])))
        if along.place is None:
            return Form(kind, self.with_operands(node, values))

        def place(d: int) -> int:
            return 1 + sum(features[:d])

        given = argument(node, along.place, "dim")
        mixed = [place(d) for d in along.mixed]
        args = list(node.args)
        if len(args) > along.place:
            args[along.place] = mixed[0] if isinstance(given, int) else mixed
            return Form(kind, self.with_arguments(node, tuple(args), {}, values))
        changes = {"dim": mixed[0] if given is None or isinstance(given, int) else mixed}
        if given is None and packet(node) in (aten.sum, aten.mean, aten.any, aten.all):
            raise self.lost(node)
        return Form(kind, self.with_arguments(node, tuple(args), changes, values))

    def _dims_below(self, x: fx.Node, place: int, nodes: Nodes, along: Any, dims: Dims) -> Dims:
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

    def _norm_by_hand(self, nodes: Nodes, dims: Dims, forms: Sequence[Form]) -> Form:
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
        return Form("rows", result)

    def _gather(self, nodes: Nodes, dims: Dims) -> Form:
        """A gather by routing is an evaluation of its source at the pairs."""
        node = nodes[0]
        source = node.args[0]
        found = maps_of(self.domains, node)
        if found is None:
            raise self.lost(node)
        first, maps = found
        width = len(maps[0].dims)
        change = unified(maps[0].dims, dims[first : first + width])
        if change is None:
            raise self.lost(node)
        targets = [substituted(m.to, change) for m in maps]
        own = self.domains.rows(source)
        below = (*dims[:first], *targets, *dims[first + width :])
        if own is not None:
            below = tuple(b or o for b, o in zip(below, own.dims, strict=True))
        members = tuple(n.args[0] for n in nodes)
        return self.lower(members, below)  # type: ignore[arg-type]

    def _stack(self, nodes: Nodes, dims: Dims) -> Form:
        """A stack of every expert's result: each pair takes that of its own expert."""
        node = nodes[0]
        at = argument(node, 1, "dim", 0) % len(dims)
        if len(nodes) > 1 or kinds((dims[at],)) != {"expert"}:
            return self._along(nodes, dims)
        members: Any = tuple(node.args[0])  # type: ignore[arg-type]
        expected = self.routing.experts or len(members)
        if len(members) != expected:
            raise refusal(node, f"a stack of {len(members)} experts for a choice of {expected}")
        self.routing.experts = expected
        return self.lower(members, (*dims[:at], *dims[at + 1 :]))

    def _matrix_of_weights(self, nodes: Nodes, dims: Dims) -> Form:
        """``zeros.scatter(-1, ids, weights)`` at the selected pairs is ``weights``."""
        node = nodes[0]
        ids, source = node.args[2], node.args[3]
        meaning = self.domains.index(ids)
        if not isinstance(source, fx.Node) or meaning is None or len(nodes) > 1:
            raise self.lost(node)
        if meaning.to != (self.routing.expert,):  # a permutation of rows
            own = self.domains.rows(source)
            assert own is not None
            return self.lower((source,), own.dims)
        if not isinstance(ids, fx.Node) or shape(source) != shape(ids):
            return self.matrix_pairs(node, dims)
        return self.lower((source,), meaning.dims)

    def _softmax(self, nodes: Nodes, dims: Dims) -> Form:
        """A softmax over experts is read at the selected pairs."""
        node = nodes[0]
        rank = len(dims)
        along = positions(node)
        assert along is not None
        if kinds((dims[along.mixed[0] % rank],)) == {"expert"} and len(nodes) == 1:
            return self.matrix_pairs(node, dims)
        return self._along(nodes, dims)

    def _getitem(self, nodes: Nodes, dims: Dims) -> Form:
        """One result of an operator with several."""
        sources = tuple(n.args[0] for n in nodes)
        form = self.lower_outputs(sources, nodes, dims)  # type: ignore[arg-type]
        return Form(form.kind, self.emit(operator.getitem, form.value, nodes[0].args[1]))

    def lower_outputs(self, sources: Nodes, nodes: Nodes, dims: Dims) -> Form:
        own = self.domains.meaning.get(sources[0])
        dims = own.dims if isinstance(own, Rows) else dims
        unique = sources[:1] if all(s is sources[0] for s in sources) else sources
        key = (unique, dims)
        if key not in self.done:
            self._check_alike(unique)
            self.done[key] = self._along(unique, dims)
        return self.done[key]


_NORMS = (aten.layer_norm, aten.rms_norm)
_LOWER: dict[Any, Callable[[Lowering, Nodes, Dims], Form]] = {
    **dict.fromkeys((aten.index, aten.index_select, aten.embedding, aten.gather), Lowering._gather),
    **dict.fromkeys((aten.softmax, aten._softmax), Lowering._softmax),
    aten.stack: Lowering._stack,
    aten.scatter: Lowering._matrix_of_weights,
    operator.getitem: Lowering._getitem,
}


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
        return [broadcast_dims(sizes, dims)]
    if packet(node) is aten.clone:
        return [dims]
    if packet(node) is aten.repeat:
        lead = len(dims) - len(sizes)
        return [tuple(_trailing(dims[d + lead], n) for d, n in enumerate(sizes))]
    if packet(node) is aten.repeat_interleave and isinstance(node.args[1], int):
        dim = argument(node, 2, "dim")
        if dim is None:
            return None
        return [
            tuple(
                _leading(s, n) if d == dim % len(sizes) else s
                for d, (s, n) in enumerate(zip(dims, sizes, strict=True))
            )
        ]
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


def _without_ones(forms: Sequence[Form], fitted: Sequence[fx.Node | None]) -> Form | None:
    """A product with 1."""
    if len(forms) != 2 or not any(form.kind == "one" for form in forms):
        return None
    other = 1 if forms[0].kind == "one" else 0
    value = fitted[other]
    return ONE if value is None else Form(forms[other].kind, value)


def _constants(node: fx.Node) -> list[Any]:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [x for x in leaves if not isinstance(x, fx.Node)]


def _pieces_of_one(nodes: Nodes) -> tuple[fx.Node, int] | None:
    """The tensor and dimension of which the nodes are number 0, 1, ..."""
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


def listed(numbers: Sequence[int | None]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown}, ..." if len(numbers) > 6 else shown
