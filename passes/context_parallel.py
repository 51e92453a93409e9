"""Attention where the tokens of a sequence lie on several ranks."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.core import Level, Pass, Program, erase_dead
from moptrace.errors import PlanError
from moptrace.passes.attention_masks import Seen, read_mask
from moptrace.passes.axes import CASTS, RESHAPES, argument, packet, shape
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
    attention with dropout or with a mask that is trained takes ulysses. ``"gather"``: every rank
    computes all of it, as it does where neither fits. Attention written as products and a softmax
    needs none of these: it keeps its queries, and its keys are gathered.

    Keys that are repeated for the heads of their group move before they are repeated. A mask that
    compares positions or documents is read (``attention_masks.py``) and not made in a ring.

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
        trained = {p.name for p in program.signature.parameters if p.requires_grad}
        found = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default]
        for node in found:
            apart = sizes["tp"] if _splits_heads(node) else 1
            enough = len(shape(node)) == 4 and _suffice(node, sizes["cp"], apart)
            if _can_travel(node, trained) and (how == "ring" or not enough):
                _ring(node)
            elif enough:
                exchange_heads(node, "cp", sizes["cp"], apart)
        erase_dead(graph)
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


def _can_travel(node: fx.Node, trained: set[str]) -> bool:
    """Whether attention has no dropout, and no mask that gets a gradient."""
    mask = argument(node, 3, "attn_mask")
    dropout = argument(node, 4, "dropout_p", 0.0)
    return len(shape(node)) == 4 and not dropout and not (mask and _reached(mask, trained))


def _reached(node: fx.Node, names: set[str]) -> bool:
    """Whether a node is made of inputs with some names."""
    waiting, seen = [node], {node}
    while waiting:
        for x in (here := waiting.pop()).all_input_nodes:
            waiting.extend({x} - seen)
            seen.add(x)
        if here.op == "placeholder" and here.name in names:
            return True
    return False


def _ring(node: fx.Node) -> None:
    query, key, value = _operands(node)
    key, value = _before_repeats(key, value) or (key, value)
    seen = _seen(node)
    mask, documents = None, None
    if seen.rest:
        both = functools.partial(call, node, aten.bitwise_and.Tensor)
        mask = _with_dims(node, functools.reduce(both, seen.rest), 4)
    if seen.documents:
        documents = _with_dims(node, seen.documents[0], 2)
    scale = argument(node, 6, "scale") or 1 / math.sqrt(shape(query)[-1])
    given = (query, key, value, mask, documents, seen.left, seen.right, scale)
    results = call(node, ops.attention.default, *given)
    with node.graph.inserting_before(node):
        out = node.graph.call_function(operator.getitem, (results, 0))
    roles.set_value(out, roles.value(results)[0])
    roles.copy_role(out, of=node)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)


def exchange_heads(node: fx.Node, axis: str, ranks: int, blocks: int = 1) -> None:
    """Attention on all tokens of some of the heads: of each of the ``blocks`` that others split."""
    query, key, value = _operands(node)
    heads, rest = shape(query)[HEADS], list(node.args[3:])
    if argument(node, 3, "attn_mask") is not None and _seen(node) == Seen(right=0):
        rest = [None, argument(node, 4, "dropout_p", 0.0), True]
        node.kwargs = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
    split = functools.partial(call, node, constrain)
    how = (axis, str(Shard(HEADS, blocks)))
    before = _before_repeats(key, value)
    apart: tuple[fx.Node, fx.Node] = before or (key, value)
    groups = shape(apart[0])[HEADS]
    if groups % (ranks * blocks) == 0 and heads % (ranks * blocks) == 0:
        pair = [split(x, *how) for x in apart]
        if before:
            pair = [repeat_heads(node, x, heads // groups) for x in pair]
    else:
        if shape(key)[HEADS] != heads:
            key, value = (repeat_heads(node, x, heads // groups) for x in (key, value))
            node.update_kwarg("enable_gqa", False)
        pair = [split(x, *how) for x in (key, value)]
    node.args = (split(query, *how), *pair, *rest)
    users = list(node.users)
    with node.graph.inserting_after(node):
        back = node.graph.call_function(constrain, (node, axis, str(Shard(TOKENS))))
    roles.set_value(back, roles.value(node))
    roles.copy_role(back, of=node)
    for user in users:
        user.replace_input_with(node, back)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value."""
    names = ("query", "key", "value")
    query, key, value = (argument(node, at, name) for at, name in enumerate(names))
    return query, key, value


def _seen(node: fx.Node) -> Seen:
    """Which keys the queries of an attention see."""
    mask: fx.Node | None = argument(node, 3, "attn_mask")
    if mask is None:
        return Seen(right=0 if argument(node, 5, "is_causal", False) else None)
    query, key, _ = _operands(node)
    seen = read_mask(mask)
    plain = len(seen.documents) < 2 and shape(query)[TOKENS] == shape(key)[TOKENS]
    return seen if plain else Seen(rest=(mask,))


def _before_repeats(key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Keys and values before each is repeated for the heads of its group, if both are."""
    sources = _before_repeat(key), _before_repeat(value)
    one, other = sources
    return (one, other) if one is not None and other is not None else None


def _before_repeat(x: fx.Node) -> fx.Node | None:
    """[B, g, T, d], if ``x`` has each of its heads several times, one after the other."""
    if packet(x) is aten.repeat_interleave:
        along_heads = argument(x, 2, "dim") == HEADS and isinstance(x.args[1], int)
        return x.args[0] if along_heads else None  # type: ignore[return-value]
    wide: Any = x.args[0] if packet(x) in RESHAPES else None
    while isinstance(wide, fx.Node) and packet(wide) in CASTS:
        wide = wide.args[0]
    apart: Any = wide.args[0] if wide is not None and packet(wide) is aten.expand else None
    if wide is None or apart is None or packet(apart) not in RESHAPES:
        return None
    source: Any = apart.args[0]
    batch, groups, times, *rest = shape(wide)
    fits = shape(x) == (batch, groups * times, *rest) and shape(source) == (batch, groups, *rest)
    return source if fits and shape(apart) == (batch, groups, 1, *rest) else None


def repeat_heads(node: fx.Node, x: fx.Node, times: int) -> fx.Node:
    """Keys or values of grouped heads, once for each head."""
    batch, groups, tokens, width = shape(x)
    apart = call(node, aten.unsqueeze.default, x, 2)
    wide = call(node, aten.expand.default, apart, [batch, groups, times, tokens, width])
    return call(node, aten.reshape.default, wide, [batch, groups * times, tokens, width])


def _with_dims(node: fx.Node, x: fx.Node, dims: int) -> fx.Node:
    """``x`` with so many dimensions, the new ones of size 1."""
    sizes = shape(x)
    if len(sizes) == dims:
        return x
    return call(node, aten.reshape.default, x, [*[1] * (dims - len(sizes)), *sizes])


def call(node: fx.Node, op: Any, *args: Any) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(op, args)
    roles.set_value(new, op(*pytree.tree_map_only(fx.Node, roles.value, args)))
    roles.copy_role(new, of=node)
    return new
