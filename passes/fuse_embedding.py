"""Look up the rows of an embedding where they are, without gathering its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.passes.axes import argument, shape

__all__ = ["fuse_embedding", "is_lookup"]

aten, ops = torch.ops.aten, torch.ops.moptrace


def fuse_embedding(ranks: int, at_least: int = 0) -> Pass:
    """Replace ``aten.embedding`` of a parameter by ``embedding_rows`` where that moves less.

    A rank then gets the rows of its own tokens instead of the whole weight, in forward, and sends
    back as many gradients instead of the whole weight's. That is less if a rank has fewer ids than
    the weight has rows, and if no other operator needs the whole weight; a tied projection that
    ``fuse_vocabulary`` has replaced does not. ``ranks`` is how many share the ids.

    ``at_least`` leaves alone the weights that have fewer bytes: these are gathered together with
    other small weights. Lookups whose gradient is scaled by frequency or sparse stay as they are.
    Ensures: the same rows; gradients are added up in float32 at least.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        parameters = {parameter.name for parameter in program.signature.parameters}
        changed = False
        for weight in graph.find_nodes(op="placeholder"):
            found = _lookups(weight) if weight.name in parameters else []
            ids = sum(_numel(lookup.args[1]) for lookup in found)
            table = roles.tensor(weight)
            if not found or table.numel() * table.element_size() < at_least:
                continue
            if ranks > 1 and ids < ranks * table.shape[0]:
                changed = True
                for lookup in found:
                    _replace(lookup)
        return program.with_graph(graph) if changed else program

    options = (("ranks", ranks), ("at_least", at_least))
    return Pass("fuse_embedding", rewrite, options, takes=(Level.CANONICAL,))


def _lookups(weight: fx.Node) -> Sequence[fx.Node]:
    """The lookups of a weight; none if anything else needs it whole."""
    found: list[fx.Node] = []
    for user in weight.users:
        if is_lookup(user) and user.args[0] is weight:
            found.append(user)
        elif user.target is not ops.vocab_projection.default or user.args[1] is not weight:
            return []
    return found


def is_lookup(node: fx.Node) -> bool:
    """Whether a node takes rows of a weight, with an ordinary gradient."""
    if node.target is not aten.embedding.default:
        return False
    special = argument(node, 3, "scale_grad_by_freq", False) or argument(node, 4, "sparse", False)
    return not special and all(isinstance(size, int) for size in shape(node))


def _numel(ids: object) -> int:
    assert isinstance(ids, fx.Node)
    return math.prod(roles.tensor(ids).shape)


def _replace(lookup: fx.Node) -> None:
    weight, ids = lookup.args[:2]
    graph, padding = lookup.graph, argument(lookup, 2, "padding_idx", -1)
    with graph.inserting_before(lookup):
        new = graph.call_function(ops.embedding_rows.default, (weight, ids, padding))
    roles.set_value(new, roles.value(lookup))
    roles.copy_role(new, of=lookup)
    lookup.replace_all_uses_with(new)
    graph.erase_node(lookup)
