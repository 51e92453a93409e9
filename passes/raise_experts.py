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
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, erase_dead
from moptrace.errors import RoleError
from moptrace.passes.axes import (
    RESHAPES,
    contraction,
    is_pointwise,
    kinds,
    numel,
    packet,
    permutation,
    shape,
    tensors,
)
from moptrace.passes.row_domains import Domains, Position, Rows, Sum, is_literal
from moptrace.passes.row_emitter import features_of, refusal
from moptrace.passes.row_lowering import Lowering
from moptrace.passes.row_rules import interpret
from moptrace.passes.stacked_parameters import Stacks

__all__ = ["WITHOUT_EXPERTS", "raise_experts"]

aten = torch.ops.aten
ops = torch.ops.moptrace

WITHOUT_EXPERTS = "no Mixture-of-Experts block found: treated as a dense model"


def raise_experts() -> Pass:
    """Bring every Mixture-of-Experts block to ``dispatch``, the experts' operators, ``combine``.

    Requires: a captured program.
    Ensures: the same loss and gradients; tokens reach experts only through the operators of
    ``moptrace.kernels``; parameters that were separate for each expert are one, whose
    ``stacked`` names are in expert order.
    Raises ``RoleError`` where experts are selected in a way that cannot be raised.
    """
    return Pass("raise_experts", _raise_experts, takes=(Level.CAPTURED,))


def _raise_experts(program: Program) -> Program:
    graph, _ = program.copy_graph()
    _share_views(graph)
    domains = interpret(graph)
    stacks = Stacks(graph, program.signature)
    raiser = _Raiser(graph, domains, stacks)
    for node in list(graph.nodes):
        if raiser.ends_here(node):
            raiser.rewrite_end(node)
    erase_dead(graph)
    signature = stacks.finish(program.signature)
    _refuse_leftovers(graph, domains)
    result = program.with_graph(graph, signature=signature)
    routed = any(node.target is ops.combine.default for node in graph.nodes)
    return result if routed else result.with_note(WITHOUT_EXPERTS)


def _share_views(graph: fx.Graph) -> None:
    """Make equal views of one parameter one node, as where a loop takes them anew for each expert.

    Ensures: what corresponding nodes of experts are pieces of is the same node.
    """
    views: dict[Any, fx.Node] = {}
    fixed = {node for node in graph.nodes if node.op == "placeholder"}
    for node in list(graph.nodes):
        if node.op != "call_function" or (node.args[:1] and node.args[0] not in fixed):
            continue
        if packet(node) in RESHAPES or permutation(node) is not None:
            first = views.setdefault((node.target, repr((node.args, node.kwargs))), node)
            fixed.add(first)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


@dataclass
class _Raiser(Lowering):
    """Finds where blocks end and writes them."""

    def ends_here(self, node: fx.Node) -> bool:
        """Whether the node is a finished value for each token that code outside uses."""
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
                raise self._without_tokens(node)
            result = self._combined(rows, node, meaning)
            base = meaning.base if isinstance(meaning, Sum) else None
            if base is not None:
                result = self.emit(aten.add.Tensor, self.replaced.get(base, base), result)
        node.replace_all_uses_with(result)
        self.replaced[node] = result

    def _without_tokens(self, node: fx.Node) -> RoleError:
        """The error for experts whose rows do not come from a value for each token."""
        if any(math.prod(shape(n)[1:]) > 1 for n in self.graph.nodes if self._pairs_of(n)):
            return refusal(
                node, "experts that read a value for each pair of a token and its expert",
                "bring tokens to their experts once, and add up the results for each token before "
                "anything else, such as attention, uses them",
            )  # fmt: skip
        return refusal(node, "a Mixture-of-Experts block that reads no tokens")

    def _pairs_of(self, node: fx.Node) -> bool:
        order = self.dispatches[self.routing].order
        return node.target is ops.pair_rows.default and node.args[1] is order

    def _rows_of_end(self, node: fx.Node, meaning: Rows) -> fx.Node:
        form = self.lower((node,), meaning.dims, finished=True)
        return self.as_rows(form, features_of(node, meaning.dims))

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
            result = self.emit(
                aten.permute.default, result, [order.index(d) for d in range(len(order))]
            )
        if roles.tensor(result).dtype != roles.tensor(node).dtype:
            result = self.emit(aten._to_copy.default, result, dtype=roles.tensor(node).dtype)
        return result


# ---- What was not understood ---------------------------------------------------------------------


def _refuse_leftovers(graph: fx.Graph, domains: Domains) -> None:
    """Raise an error for the first node that still selects experts in the user's own way."""
    for node in graph.nodes:
        if isinstance(domains.meaning.get(node), Position) and _limits(node):
            raise refusal(
                node, "a capacity: pairs are dropped whose place in their expert's queue is "
                "beyond a limit",
                "keep every pair (a dropless block: no cumulative position, no capacity factor); "
                "dropping is an option of moptrace, not of the model",
            )  # fmt: skip
    for node in graph.nodes:
        if node in domains.refusals:
            raise refusal(node, domains.refusals[node])
    for node in graph.nodes:
        if node not in domains.meaning:
            continue
        meaning = domains.meaning[node]
        if node.target is ops.grouped_mm.default or _selects(node, meaning):
            raise refusal(node, "rows of experts whose results are not added up for each token")
        if (
            isinstance(meaning, Rows)
            and not meaning.done
            and _weighs_values(node, meaning, domains)
        ):
            raise refusal(
                node, "a selection of experts by which values of tokens are multiplied, but whose "
                "results are not added up over all experts",
            )  # fmt: skip
    for node in graph.nodes:
        if node.target is ops.grouped_mm.default and roles.role(node).made_by:
            raise refusal(
                node, "a grouped product whose rows were not sorted by a known choice of experts"
            )


def _limits(node: fx.Node) -> bool:
    return any(
        packet(user) in (aten.lt, aten.le, aten.gt, aten.ge, aten.one_hot, aten.clamp)
        for user in node.users
    )


def _selects(node: fx.Node, meaning: Any) -> bool:
    if not isinstance(meaning, Rows) or not kinds(meaning.dims) & {"sorted", "branch"}:
        return False
    return math.prod(n for n in features_of(node, meaning.dims) if isinstance(n, int)) > 1


def _weighs_values(node: fx.Node, meaning: Rows, domains: Domains) -> bool:
    """Whether a matrix of tokens and experts goes on to multiply values of more features.

    Routers and auxiliary losses use such matrices too, but not on wider values; and in sparse
    attention a softmax comes first. Weights that experts outside the selection have too are no
    selection any more: such a model is dense.
    """
    if "token" not in kinds(meaning.dims) or meaning.off:
        return False
    if meaning.expert is None and "expert" not in kinds(meaning.dims):
        return False
    if meaning.routing.experts == 1:
        return False
    size = numel(node)
    stack, seen = [node], set[fx.Node]()
    while stack:
        for user in stack.pop().users:
            if user in seen or _fills_in(user, domains):
                continue
            seen.add(user)
            product = packet(user) is aten.mul or contraction(user) is not None
            if product and any(numel(x) > size for x in tensors(user)) and not _routes(user):
                return True
            if (
                is_pointwise(user)
                or packet(user)
                in (
                    *RESHAPES,
                    aten.select,
                    aten.slice,
                    aten.unbind,
                )
                or permutation(user) is not None
                or user.target is operator.getitem
            ):
                stack.append(user)
    return False


def _fills_in(node: fx.Node, domains: Domains) -> bool:
    """Whether a sum gives weights to the experts outside a selection, which has zeros there."""
    if packet(node) not in (aten.add, aten.sub):
        return False
    operands = [domains.rows(x) for x in node.args]
    if None not in operands:
        return False
    selection = next((rows for rows in operands if rows is not None), None)
    other = node.args[operands.index(None)]
    nothing = is_literal(other) and other == 0
    return selection is not None and selection.off == 0 and not nothing


def _routes(node: fx.Node, depth: int = 6) -> bool:
    """Whether a value only goes on to choose experts."""
    if packet(node) in (aten.topk, aten.argmax, aten.max, aten.sort):
        return True
    if depth == 0 or contraction(node) is not None or not node.users:
        return False
    return all(_routes(user, depth - 1) for user in node.users)
