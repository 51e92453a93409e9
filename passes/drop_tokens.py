"""Give every expert a capacity, and drop the tokens beyond it before they are sent."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, ancestors
from moptrace.dropping import Dropping
from moptrace.errors import PlanError
from moptrace.passes.axes import RESHAPES
from moptrace.passes.context_parallel import call
from moptrace.placement import INVARIANT, Layout, Placement, Shard
from moptrace.reshard import constrain
from moptrace.rules import SIZE_ARGUMENT

__all__ = ["drop_tokens", "group_tokens", "keeper", "leave_out", "rows_of", "share_kept"]

aten, ops = torch.ops.aten, torch.ops.moptrace

Groups = tuple[tuple[int, int], ...]


def drop_tokens(
    dropping: Dropping | None, layout: Layout | None = None, groups: Groups = ()
) -> Pass:
    """Drop the pairs of a token and its choice that are beyond the capacity of their expert.

    ``keep_pairs`` marks them among the router's choices, so they have no row and do not travel.
    ``groups`` of tokens compete apart: pairs (parts, blocks) as ``keep_pairs`` takes them. With a
    ``layout``, the tokens of its ranks compete apart unless ``dropping`` says otherwise; once they
    are placed, ``group_tokens`` writes which groups these are.

    Requires: ``classify``. Ensures: what the model computes where dropped pairs add nothing.
    Raises PlanError for experts of which no weights are known, if these decide.
    """

    def rewrite(program: Program) -> Program:
        if dropping is None:
            return program
        graph, _ = program.copy_graph()
        layers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=ops.dispatch.default):
            layers[node.args[1]].append(node)
        for experts, dispatches in layers.items():
            _drop(dropping, experts, dispatches, layout, groups)
        return program.with_graph(graph) if layers else program

    options = (("dropping", dropping), ("layout", str(layout)), ("groups", groups))
    return Pass("drop_tokens", rewrite, options, (Level.CANONICAL,), needs=("classify",))


def group_tokens(dropping: Dropping | None) -> Pass:
    """Write which tokens compete for an expert, as they are placed, and how many it keeps of them.

    Requires: ``place``. Ensures: on one device, the same choice as on all ranks together.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        found = graph.find_nodes(op="call_function", target=ops.keep_pairs.default)
        if dropping is None or not found:
            return program
        notes: dict[str, None] = {}
        for node in found:
            placement = roles.placements(node)[0]
            assert placement is not None
            groups = tuple(_groups(placement))
            node.args = (*node.args[:3], *_limits(dropping, node, groups))  # type: ignore[assignment]
            notes[_told(dropping, node, groups)] = None
        program = program.with_graph(graph)
        for note in notes:
            program = program.with_note(note)
        return program

    return Pass("group_tokens", rewrite, (("dropping", dropping),), (Level.PLACED,))


def _groups(placement: Placement) -> Iterator[tuple[int, int]]:
    for axis, kind in zip(placement.view.axes, placement.kinds, strict=True):
        if isinstance(kind, Shard) and axis.size > 1:
            yield axis.size, kind.blocks


def _limits(dropping: Dropping, keep: fx.Node, groups: Groups) -> tuple[int, list[int]]:
    """The arguments of ``keep_pairs`` that say how many pairs an expert keeps, and of which."""
    tokens, choices = roles.tensor(keep.args[0]).shape  # type: ignore[arg-type]
    tokens //= math.prod(parts for parts, _ in groups)
    capacity = dropping.capacity(tokens, choices, keep.args[2])  # type: ignore[arg-type]
    return capacity, [number for pair in groups for number in pair]


def _told(dropping: Dropping, keep: fx.Node, groups: Groups) -> str:
    tokens, choices = roles.tensor(keep.args[0]).shape  # type: ignore[arg-type]
    number = math.prod(parts for parts, _ in groups)
    which = {"probability": "highest weights", "position": "first positions"}[dropping.by]
    of = f"each of {number} groups of {tokens // number}" if number > 1 else f"all {tokens}"
    return (
        f"an expert keeps at most {keep.args[3]} of the {tokens // number * choices} pairs of "
        f"{of} tokens, those with the {which} (capacity factor {dropping.capacity_factor}); the "
        "others are dropped, so this is not the model without a capacity"
    )


# --- one choice of experts ------------------------------------------------------------------------

# The operators that go between pairs and rows, and how many operands they have.
_OF_PAIRS: dict[Any, int] = {ops.pair_rows.default: 2, ops.combine.default: 3}


def _drop(
    dropping: Dropping,
    experts: fx.Node,
    dispatches: Sequence[fx.Node],
    layout: Layout | None,
    groups: Groups,
) -> None:
    """Write ``keep_pairs`` before the dispatches of these choices."""
    first, number = dispatches[0], dispatches[0].args[2]
    given = [experts]
    if dropping.by == "probability":
        scores = _scores(first, [node for node in rows_of(dispatches) if node.target in _OF_PAIRS])
        _bring_before(first, scores)
        scores = call(first, aten.detach.default, scores)
        pairs = list(roles.tensor(experts).shape)
        given.append(call(first, aten.reshape.default, scores, pairs))
    for axis, whole in dropping.along(layout) if layout else ():
        kind = str(INVARIANT) if whole else first.args[0]
        given = [call(first, constrain, x, axis, kind) for x in given]
    kept = call(first, ops.keep_pairs.default, given[0], *(given[1:] or [None]), number, 1)
    kept.args = (*kept.args[:3], *_limits(dropping, kept, groups))  # type: ignore[assignment]
    choices = call(first, operator.getitem, kept, 0)
    for node in dispatches:
        node.args = (node.args[0], choices, number, True)
        leave_out(node)


def leave_out(dispatch: fx.Node) -> None:
    """Have what follows from a dispatch take as many rows as there are, for some pairs none."""
    for node in rows_of([dispatch]):
        if node.target in _OF_PAIRS:
            node.args = (*node.args[: _OF_PAIRS[node.target]], True)
        packet: Any = getattr(node.target, "overloadpacket", None)
        if packet in SIZE_ARGUMENT and packet in (*RESHAPES, aten.expand):
            node.update_arg(SIZE_ARGUMENT[packet], [-1, *roles.tensor(node).shape[1:]])


def keeper(dispatch: fx.Node) -> fx.Node | None:
    """The ``keep_pairs`` that a dispatch has its choices from, perhaps moved; or None."""
    node = dispatch.args[1]
    while isinstance(node, fx.Node) and node.target is not ops.keep_pairs.default:
        node = next(iter(node.all_input_nodes), None)
    return node  # type: ignore[return-value]


def share_kept(dispatch: fx.Node) -> float:
    """How many of its tokens' pairs have a row if every expert is chosen as often."""
    if (keep := keeper(dispatch)) is None:
        return 1.0
    pairs, experts, capacity = roles.tensor(keep.args[0]).numel(), *keep.args[2:4]  # type: ignore[arg-type]
    return min(1.0, experts * capacity / max(pairs, 1))  # type: ignore[operator]


def rows_of(dispatches: Sequence[fx.Node]) -> list[fx.Node]:
    """What follows from the dispatches until rows are combined, in order."""
    found, over = dict.fromkeys(dispatches), set[fx.Node]()
    for node in dispatches[0].graph.nodes:
        if any(x in found and x not in over for x in node.all_input_nodes):
            found[node] = None
            if node.target is ops.combine.default:
                over.add(node)
    return list(found)


def _scores(dispatch: fx.Node, ends: Sequence[fx.Node]) -> fx.Node:
    """The router's weight of each pair: what its row is multiplied with."""
    pairs = roles.tensor(dispatch.args[1]).shape  # type: ignore[arg-type]
    weights = [n.args[2] for n in ends if n.target is ops.combine.default]
    weights += [n.args[0] for n in ends if n.target is ops.pair_rows.default]
    for x in weights:
        assert isinstance(x, fx.Node)
        value = roles.tensor(x)
        one_each = value.shape[:2] == pairs and value.numel() == pairs.numel()
        if x.target is not aten.ones.default and value.is_floating_point() and one_each:
            return x
    raise PlanError(
        f"the experts' results are added up without weights ({roles.where(dispatch)}), so none of "
        "a full expert's pairs is more probable than another: say Dropping(..., by='position')"
    )


def _bring_before(first: fx.Node, x: fx.Node) -> None:
    """Move what a value is made of to where it is needed, if it comes later."""
    needed = ancestors([x])
    if first in needed:
        raise PlanError(
            f"the weights of the chosen experts depend on what experts compute "
            f"({roles.where(x)}), so they cannot decide whom experts leave out: say "
            "Dropping(..., by='position')"
        )
    for node in [node for node in first.graph.nodes if node in needed and first < node]:
        first.prepend(node)
