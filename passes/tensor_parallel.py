"""Tensor parallel: heads and hidden units over the ranks of an axis, found by structure."""

from __future__ import annotations

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.passes.axes import packet, shape
from moptrace.passes.context_parallel import HEADS, TOKENS, exchange_heads, repeat_heads
from moptrace.passes.regions import Finder, Region, ask
from moptrace.passes.shard_parameters import batch_sizes
from moptrace.placement import REPLICATE, Layout, Shard
from moptrace.rules import operands

__all__ = ["tensor_parallel"]

aten = torch.ops.aten


def tensor_parallel(layout: Layout) -> Pass:
    """Split what lies between two products with weights over the ranks of the axis ``tp``.

    Where a product sums over a dimension that other products with weights have made, and whose
    positions nothing in between mixes (the heads of attention, the hidden units of an MLP), each
    rank computes its share of that dimension: the first products take their share of the weight's
    rows and whole tokens, the last its share of the columns, and gives terms of a sum (Shoeybi et
    al., Megatron-LM, 2019). Outside, the ranks share the tokens of each sequence (Korthikanti et
    al., 2022), so tokens are gathered before and sums scattered after.

    Written as ``constrain`` on the tokens, weights and results; how gradients are reduced follows.
    Keys and values of fewer heads than ranks are repeated. A head count that ``tp`` does not divide
    keeps its weights whole: attention then exchanges tokens for heads if there are enough, and is
    computed by all ranks alike if not, with a note.

    Requires: ``classify``. Ensures: the same values on one device.
    """

    def rewrite(program: Program) -> Program:
        sizes = {axis.name: axis.size for axis in layout.tokens.axes}
        ranks = sizes.get("tp", 1)
        if ranks == 1:
            return program
        graph, _ = program.copy_graph()
        attentions = [node for node in graph.nodes if node.target is _SDPA]
        for node in attentions:
            _repeat_few_heads(node, ranks)
        finder = Finder(graph, {p.name for p in program.signature.parameters}, ranks)
        regions = list(finder.regions())
        batch = batch_sizes([x.shape for x in program.signature.inputs])
        for region in regions:
            _write(region, batch)
        split = {node for region in regions for node in region.inside}
        kept = [node for node in attentions if node not in split]
        notes = [_keep_weights(node, ranks, alone=sizes.get("cp", 1) == 1) for node in kept]
        program = program.with_graph(graph)
        for note in filter(None, notes):
            program = program.with_note(note)
        return program

    return Pass("tensor_parallel", rewrite, (("layout", str(layout)),), takes=(Level.CANONICAL,))


_SDPA = aten.scaled_dot_product_attention.default


# --- saying so ------------------------------------------------------------------------------------


def _write(region: Region, batch: tuple[int | None, int | None]) -> None:
    """Ask for whole tokens before the region, a share of the dimension inside, and tokens after."""
    for product in region.first:
        ask(operands(product.node)[product.tokens], "tp", REPLICATE, {product.node})
    for weight, kind in region.weights.items():
        ask(weight, "tp", kind, region.nodes)
    for value, kind in region.entries.items():
        if (expansion := _expansion(value)) is not None:
            ask(expansion.all_input_nodes[0], "tp", REPLICATE, {expansion})
        ask(value, "tp", kind, region.nodes)
    for node, kind in region.inside.items():
        if node.target is _SDPA and kind == Shard(HEADS):  # said so that context parallelism knows
            ask(node.all_input_nodes[0], "tp", kind, {node})
    end = region.last.node
    if (after := _split_of_tokens(shape(end), batch)) is not None:
        ask(end, "tp", after, set(end.users))


def _expansion(value: fx.Node) -> fx.Node | None:
    """The ``expand`` that a value comes from, through changes of shape alone."""
    while packet(value) in (aten.reshape, aten.view, aten.clone, aten._unsafe_view):
        value = value.all_input_nodes[0]
    return value if packet(value) is aten.expand else None


def _split_of_tokens(shape: tuple[int, ...], batch: tuple[int | None, int | None]) -> Shard | None:
    """How the tokens of each sequence are split in a value of this shape, where it says."""
    sequences, length = batch
    if sequences is None or length is None:
        return None
    if shape[:2] == (sequences, length):
        return Shard(1)
    return Shard(0, blocks=sequences) if shape[:1] == (sequences * length,) else None


def _repeat_few_heads(node: fx.Node, ranks: int) -> None:
    """Give each head its own keys where there are too few heads of keys to split."""
    query, key, value, *rest = node.args
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node) and isinstance(value, fx.Node)
    if len(shape(query)) != 4:
        return
    heads, groups = shape(query)[HEADS], shape(key)[HEADS]
    if heads != groups and groups % ranks and heads % ranks == 0:
        wide = (repeat_heads(node, x, heads // groups) for x in (key, value))
        node.args = (query, *wide, *rest)
        node.update_kwarg("enable_gqa", False)


def _keep_weights(node: fx.Node, ranks: int, alone: bool) -> str | None:
    """Attention whose heads the ranks do not divide; a note if they all compute all of it."""
    heads = shape(node)[HEADS] if len(shape(node)) == 4 else 0
    if alone and heads >= ranks:
        exchange_heads(node, "tp", ranks)
        return None
    for x in node.all_input_nodes:
        ask(x, "tp", REPLICATE, {node})
    if heads:
        ask(node, "tp", Shard(TOKENS), set(node.users))
    return (
        f"attention of {heads} heads cannot be split over tp={ranks}, so these ranks compute all "
        f"of it alike ({roles.where(node)}); choose a tp that divides the heads"
    )
