"""Attention where the tokens of a sequence lie on several ranks."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.errors import PlanError
from moptrace.passes.axes import argument, shape
from moptrace.placement import Layout, Shard, chunk_sizes
from moptrace.reshard import constrain

__all__ = ["HEADS", "TOKENS", "call", "context_parallel", "exchange_heads", "repeat_heads"]

aten, ops = torch.ops.aten, torch.ops.moptrace
HEADS, TOKENS = 1, 2  # dimensions of [B, h, T, d]
WAYS = ("ulysses", "ring", "gather")


def context_parallel(layout: Layout, how: str = "ulysses") -> Pass:
    """Say how attention reaches the tokens of other ranks of the axis ``cp``.

    ``"ulysses"``: before attention, ranks exchange tokens for heads (all-to-all), so that each has
    all tokens of its share of the heads, and back after it (Jacobs et al., DeepSpeed Ulysses,
    2023). Heads need not divide evenly, and keys of grouped heads are repeated where ``cp`` does
    not divide them; where a rank would get no head, a ring serves. ``"ring"``: each rank keeps its
    queries, and keys and values travel around the ranks (Liu et al., Ring Attention, 2023);
    attention with a mask or dropout takes ulysses. ``"gather"``: every rank computes all of it, as
    it does where neither fits. Attention written as products and a softmax needs none of these: it
    keeps its queries, and its keys are gathered.

    Outside attention every rank keeps its own tokens. Requires: ``classify``. Ensures: the same
    values on one device.
    """
    if how not in WAYS:
        raise PlanError(f"context={how!r}: say one of {', '.join(map(repr, WAYS))}")

    def rewrite(program: Program) -> Program:
        sizes = {axis.name: axis.size for axis in layout.tokens.axes}
        if sizes.get("cp", 1) == 1 or how == "gather":
            return program
        graph, _ = program.copy_graph()
        found = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default]
        for node in found:
            apart = sizes["tp"] if _splits_heads(node) else 1
            enough = len(shape(node)) == 4 and _suffice(node, sizes["cp"], apart)
            if _is_plain(node) and (how == "ring" or not enough):
                _ring(node)
            elif enough:
                exchange_heads(node, "cp", sizes["cp"], apart)
        return program.with_graph(graph) if found else program

    return Pass("context_parallel", rewrite, (("how", how),), takes=(Level.CANONICAL,))


def _splits_heads(node: fx.Node) -> bool:
    """Whether the heads are split over ``tp`` already."""
    query: Any = node.args[0]
    return query.target is constrain and query.args[1:] == ("tp", str(Shard(HEADS)))


def _suffice(node: fx.Node, ranks: int, blocks: int) -> bool:
    """Whether each rank gets a head; of each block of heads, where they have blocks."""
    heads = shape(node)[HEADS] // blocks
    return heads % ranks == 0 if blocks > 1 else min(chunk_sizes(heads, (ranks,))) > 0


def _is_plain(node: fx.Node) -> bool:
    """Whether attention has neither a mask nor dropout."""
    masked = argument(node, 3, "attn_mask") is not None
    return len(shape(node)) == 4 and not masked and not argument(node, 4, "dropout_p", 0.0)


def _ring(node: fx.Node) -> None:
    width = shape(node.args[0])[-1]  # type: ignore[arg-type]
    scale = argument(node, 6, "scale") or 1 / math.sqrt(width)
    causal = bool(argument(node, 5, "is_causal", False))
    both = call(node, ops.attention.default, *node.args[:3], causal, scale)
    with node.graph.inserting_before(node):
        out = node.graph.call_function(operator.getitem, (both, 0))
    roles.set_value(out, roles.value(both)[0])
    roles.copy_role(out, of=node)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)


def exchange_heads(node: fx.Node, axis: str, ranks: int, blocks: int = 1) -> None:
    """Attention on all tokens of some of the heads: of each of the ``blocks`` that others split."""
    query, key, value, *rest = node.args
    heads, groups = shape(query)[HEADS], shape(key)[HEADS]  # type: ignore[arg-type]
    if heads != groups and (groups % (ranks * blocks) or heads % (ranks * blocks)):
        key, value = (repeat_heads(node, x, heads // groups) for x in (key, value))
        node.update_kwarg("enable_gqa", False)
        rest = [*rest[:4]]
    kind = str(Shard(HEADS, blocks))
    split = [call(node, constrain, x, axis, kind) for x in (query, key, value)]
    node.args = (*split, *rest)
    users = list(node.users)
    with node.graph.inserting_after(node):
        back = node.graph.call_function(constrain, (node, axis, str(Shard(TOKENS))))
    roles.set_value(back, roles.value(node))
    roles.copy_role(back, of=node)
    for user in users:
        user.replace_input_with(node, back)


def repeat_heads(node: fx.Node, x: Any, times: int) -> fx.Node:
    """Keys or values of grouped heads, once for each head."""
    batch, groups, tokens, width = shape(x)
    apart = call(node, aten.unsqueeze.default, x, 2)
    wide = call(node, aten.expand.default, apart, [batch, groups, times, tokens, width])
    return call(node, aten.reshape.default, wide, [batch, groups * times, tokens, width])


def call(node: fx.Node, op: Any, *args: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(op, args)
    roles.set_value(new, op(*pytree.tree_map_only(fx.Node, roles.value, args)))
    roles.copy_role(new, of=node)
    return new
