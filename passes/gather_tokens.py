"""Bring all tokens to the ranks of the experts, instead of each token to those of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.passes.context_parallel import call
from moptrace.passes.drop_tokens import leave_out, rows_of
from moptrace.passes.regions import ask
from moptrace.placement import INVARIANT, REPLICATE, Layout, Placement, Rows, Shard
from moptrace.reshard import constrain

__all__ = ["gather_tokens", "is_gathered"]

aten, ops = torch.ops.aten, torch.ops.moptrace

NUMBERS = 4  # the operand of a dispatch that says which experts a rank has


def gather_tokens(layout: Layout) -> Pass:
    """Gather tokens, their choices and weights along ``ep``, and add up what ranks make of them.

    Each rank takes from all tokens the rows of its own experts, and the terms of each token are
    summed where the token came from. No sizes are exchanged, and what moves does not depend on the
    router. Of n tokens with k choices on each rank, (ep - 1) * n come to it, where an all-to-all
    brings about n * k * (ep - 1) / ep rows: less where k is more than ep. Ranks of ``etp`` need the
    same rows, so tokens are gathered along it as well, and rows are not.

    Requires: ``expert_tensor_parallel``, if experts are shared along ``etp``. Ensures: the same
    function. Where their hidden units are not, ranks of ``etp`` would compute the same rows: such a
    block keeps its dispatch, with a note. So do all blocks where ranks that share experts hold
    tokens of several sequences, but not all of any, as with ``tp=3`` beside ``etp=2``.
    """

    def rewrite(program: Program) -> Program:
        sizes = {axis.name: axis.size for axis in layout.experts.axes}
        axes = [name for name in ("ep", "etp") if sizes.get(name, 1) > 1]
        graph, _ = program.copy_graph()
        found = graph.find_nodes(op="call_function", target=ops.dispatch.default)
        if not axes or not found:
            return program
        split = _of_tokens(layout)
        if unsaid := [axis for axis in axes if layout.said_along(split, axis) is None]:
            return program.with_note(
                f"the ranks of {' and '.join(unsaid)} hold parts of several sequences, no slice of "
                "the batch, so tokens are sent to experts and not gathered; they would be where "
                "the ranks that share experts share one sequence, or each has whole ones"
            )
        notes: list[str] = []
        for node in found:
            rows = rows_of([node])
            if "etp" in axes and not any(_asks(row, str(REPLICATE)) for row in rows):
                notes.append(
                    f"ranks of etp do not share the experts of block {roles.role(node).block}, so "
                    f"its tokens are sent to them and not gathered ({roles.where(node)})"
                )
                continue
            for row in rows:
                if _asks(row, str(Rows("token"))):  # all have all rows: what they add up may wait
                    row.replace_all_uses_with(row.args[0])  # type: ignore[arg-type]
                    graph.erase_node(row)
            _gather(node, axes)
            along = " and ".join(f"{axis}={sizes[axis]}" for axis in axes)
            notes.append(f"experts take their tokens from those gathered along {along}")
        program = program.with_graph(graph)
        for note in dict.fromkeys(notes):
            program = program.with_note(note)
        return program

    return Pass("gather_tokens", rewrite, (("layout", str(layout)),), (Level.CANONICAL,))


def is_gathered(dispatch: fx.Node) -> bool:
    """Whether a dispatch takes rows of some experts from all tokens."""
    return len(dispatch.args) > NUMBERS and dispatch.args[NUMBERS] is not None


def _of_tokens(layout: Layout) -> Placement:
    """How tokens [sequences, length] are split."""
    kinds = (Shard(0) if axis.name == "dp" else Shard(1) for axis in layout.tokens.axes)
    return Placement(layout.tokens, tuple(kinds))


def _asks(node: fx.Node, kind: str) -> bool:
    """Whether rows are asked to be held so along ``etp``."""
    return node.target is constrain and node.args[1:] == ("etp", kind)


def _gather(dispatch: fx.Node, axes: Sequence[str]) -> None:
    x, experts, number = dispatch.args[:3]
    assert isinstance(x, fx.Node) and isinstance(experts, fx.Node) and isinstance(number, int)
    with dispatch.graph.inserting_before(dispatch):
        numbers = dispatch.graph.call_function(
            aten.arange.default, (number,), {"device": roles.tensor(experts).device}
        )
    roles.copy_role(numbers, of=dispatch)
    roles.set_value(numbers, roles.tensor(experts).new_empty(number))
    numbers = call(dispatch, constrain, numbers, "ep", str(Shard(0)))
    tokens, choices = x, experts
    for axis in reversed(axes):  # inner slices first
        tokens = call(dispatch, constrain, tokens, axis, str(REPLICATE))
        choices = call(dispatch, constrain, choices, axis, str(INVARIANT))
    dispatch.args = (tokens, choices, number, True, numbers)
    leave_out(dispatch)
    orders = [user for user in dispatch.users if user.args == (dispatch, 2)]
    for end in [user for order in orders for user in order.users]:
        result, users = end, {*end.users}
        for axis in axes if end.target is ops.combine.default else ():
            result = ask(result, axis, x, users) or result
