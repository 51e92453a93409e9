"""Multiply with the router's weights inside the experts: backward needs none of their results."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, ancestors
from moptrace.passes.context_parallel import call

__all__ = ["fold_router_weights"]

aten, ops = torch.ops.aten, torch.ops.moptrace

PRODUCT = ops.grouped_mm.default

# An operand of a node: the node, and which argument of it.
Seat = tuple[fx.Node, int]


def fold_router_weights(asked: bool = True) -> Pass:
    """Let each row's weight go into the last product of its expert instead of coming after it.

    A token's result is the sum of its experts' results, each times a weight. The gradient of a
    weight is the dot product of that result with the token's gradient, so all results, k for each
    token, are kept for backward. A row's weight goes through everything that is linear in the row:
    through a sum and a bias to the operand of the product before. There it is multiplied with the
    hidden units, which backward forms anyway, and no result of an expert is kept.

    Requires: ``classify``. Ensures: the same function; a sum of rounded numbers has them rounded
    elsewhere. Experts whose last operators are not linear in the row stay as they are, with a note.
    Source: Guo et al., SonicMoE (2025), dS = <dO W2^T, A>; here for any expert.
    """

    def rewrite(program: Program) -> Program:
        if not asked:
            return program
        graph, _ = program.copy_graph()
        notes: list[str] = []
        changed = False
        for combine in graph.find_nodes(op="call_function", target=ops.combine.default):
            if combine.args[2].target is aten.ones.default:  # weighed elsewhere, or not at all
                continue
            if reason := _obstacle(combine):
                notes.append(
                    f"the weights of the experts' results at {roles.where(combine)} are not "
                    f"folded: {reason}"
                )
                continue
            _fold(combine)
            changed = True
        result = program.with_graph(graph) if changed else program
        for note in dict.fromkeys(notes):
            result = result.with_note(note)
        return result

    options = (("asked", asked),)
    return Pass("fold_router_weights", rewrite, options, (Level.CANONICAL,), needs=("classify",))


def _obstacle(combine: fx.Node) -> str:
    """Why the weights of a combine cannot be folded; empty if they can."""
    _, order, weights = combine.args[:3]
    assert isinstance(order, fx.Node) and isinstance(weights, fx.Node)
    if not _reaches_product(_seats(combine, 0)):
        return "no product comes before them through which they could go"
    if ancestors([weights]).intersection(order.all_input_nodes):  # the dispatch
        return "they depend on what the experts compute"
    return ""


def _seats(user: fx.Node, at: int) -> list[Seat]:
    """Where to multiply rows, so that an operand comes out multiplied."""
    node = user.args[at]
    assert isinstance(node, fx.Node)
    if len(node.users) > 1:  # another one wants it as it is
        return [(user, at)]
    packet: Any = getattr(node.target, "overloadpacket", None)
    if node.target is PRODUCT:
        return [(node, 0)]
    rows = [i for i, x in enumerate(node.args) if _is_rows_of(node, x)]
    if packet in (aten.add, aten.sub) and len(rows) == 2:
        return [*_seats(node, 0), *_seats(node, 1)]
    if packet in (aten.neg, aten._to_copy, aten.div) and rows[:1] == [0]:
        return _seats(node, 0)
    if packet is aten.mul:  # either factor
        ways = [_seats(node, i) for i in rows]
        return next(filter(_reaches_product, ways), [(user, at)])
    return [(user, at)]


def _reaches_product(seats: list[Seat]) -> bool:
    return any(node.target is PRODUCT for node, _ in seats)


def _is_rows_of(node: fx.Node, x: Any) -> bool:
    """Whether an argument is a tensor of the result's shape, and so has its rows."""
    is_tensor = isinstance(x, fx.Node) and isinstance(roles.value(x), torch.Tensor)
    return is_tensor and roles.tensor(x).shape == roles.tensor(node).shape


def _fold(combine: fx.Node) -> None:
    _, order, weights, *some = combine.args
    assert isinstance(order, fx.Node) and isinstance(weights, fx.Node)
    seats = _seats(combine, 0)
    first = min(user for user, _ in seats)
    needed = ancestors([order, weights])
    for node in [node for node in combine.graph.nodes if node in needed and first < node]:
        first.prepend(node)
    of_rows = call(first, ops.pair_rows.default, weights, order, *some)
    for user, at in seats:
        _multiply(user, at, of_rows)
    one = roles.tensor(weights)
    with combine.graph.inserting_before(combine):
        ones = combine.graph.call_function(
            aten.ones.default, (list(one.shape),), {"dtype": one.dtype, "device": one.device}
        )
    roles.set_value(ones, torch.ones_like(one))
    roles.copy_role(ones, of=combine)
    combine.update_arg(2, ones)


def _multiply(user: fx.Node, at: int, of_rows: fx.Node) -> None:
    """Multiply the rows that a node takes; the result has the dtype that they had."""
    rows = user.args[at]
    assert isinstance(rows, fx.Node)
    while roles.tensor(of_rows).dim() < roles.tensor(rows).dim():
        of_rows = call(user, aten.unsqueeze.default, of_rows, -1)
    result = call(user, aten.mul.Tensor, rows, of_rows)
    dtype = roles.tensor(rows).dtype
    if roles.tensor(result).dtype != dtype:
        example = roles.tensor(result).to(dtype)
        with user.graph.inserting_before(user):
            result = user.graph.call_function(aten._to_copy.default, (result,), {"dtype": dtype})
        roles.set_value(result, example)
        roles.copy_role(result, of=user)
    user.update_arg(at, result)
