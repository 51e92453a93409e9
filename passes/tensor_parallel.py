"""Tensor parallel: heads and hidden units over the ranks of an axis, found by structure."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.infer import carried, factor_at
from moptrace.passes.axes import packet, shape
from moptrace.passes.context_parallel import HEADS, TOKENS, call, exchange_heads, repeat_heads
from moptrace.passes.shard_parameters import batch_sizes
from moptrace.placement import REPLICATE, Kind, Layout, Shard
from moptrace.reshard import constrain
from moptrace.rules import Rule, operands, rule_for

__all__ = ["tensor_parallel"]

aten, ops = torch.ops.aten, torch.ops.moptrace


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
        finder = _Finder(graph, {p.name for p in program.signature.parameters}, ranks)
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


# --- what lies between two products ---------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A product of activations with a weight: the operands' positions, and the rule."""

    node: fx.Node
    rule: Rule
    tokens: int
    weight: int

    @classmethod
    def of(cls, node: fx.Node, own: set[fx.Node]) -> _Product | None:
        """The node as a product of one activation with one weight; None if it is none."""
        rule = rule_for(node) if node.op == "call_function" and node.target in _PRODUCTS else None
        if rule is None:
            return None
        inputs = [(i, x) for i, x in enumerate(operands(node)) if i not in rule.added]
        tokens = [i for i, x in inputs if x not in own]
        weights = [i for i, x in inputs if x in own]
        if len(tokens) != 1 or len(weights) != 1:
            return None
        return cls(node, rule, tokens[0], weights[0])

    def summed_dim(self) -> int | None:
        """The dimension of the tokens that the product sums over."""
        kept = {factor for dims in self.rule.results for factor in dims}
        weight = self.rule.operands[self.weight]
        dims = self.rule.operands[self.tokens]
        found = [d for d, factor in enumerate(dims) if factor in weight and factor not in kept]
        return found[0] if len(found) == 1 and self.rule.summed else None


_PRODUCTS = {
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default,
    aten.einsum.default,
}  # fmt: skip


@dataclass
class _Region:
    """What one dimension reaches back to from the product that sums over it.

    ``weights`` are the parameters with the dimension, and where they have it; ``first`` the
    products that make it; ``entries`` values from outside that have it already.
    """

    last: _Product
    inside: dict[fx.Node, Shard] = field(default_factory=dict[fx.Node, Shard])
    first: list[_Product] = field(default_factory=list[_Product])
    weights: dict[fx.Node, Shard] = field(default_factory=dict[fx.Node, Shard])
    entries: dict[fx.Node, Shard] = field(default_factory=dict[fx.Node, Shard])

    @property
    def adds_up(self) -> bool:
        """Whether something inside goes over all of the dimension, as a norm's mean does."""
        return any(user not in self.nodes for node in self.inside for user in node.users)

    @property
    def nodes(self) -> set[fx.Node]:
        """What the ranks share, the last product included."""
        return {*self.inside, self.last.node}


class _Finder:
    """The search for regions that the ranks can share."""

    def __init__(self, graph: fx.Graph, parameters: set[str], ranks: int):
        self.graph, self.ranks = graph, ranks
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.own: set[fx.Node] = set()  # parameters, and what is made of them alone
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node.name in parameters or (inputs and all(x in self.own for x in inputs)):
                self.own.add(node)
        self.rows: set[fx.Node] = set()  # routed: their experts have a parallelism of their own
        for node in graph.nodes:
            if node.target is ops.dispatch.default or self.rows.intersection(node.all_input_nodes):
                if node.target is not ops.combine.default:
                    self.rows.add(node)

    def _product(self, node: fx.Node) -> _Product | None:
        return None if node in self.rows else _Product.of(node, self.own)

    def regions(self) -> Iterator[_Region]:
        """Regions that share no node; those first in which each rank needs only its own share."""
        found = [region for node in self.graph.nodes if (region := self._region(node))]
        taken: set[fx.Node] = set()
        for region in sorted(found, key=lambda region: region.adds_up):
            if not region.nodes & taken:
                taken |= region.nodes
                yield region

    def _region(self, node: fx.Node) -> _Region | None:
        """The region that ends in a product."""
        last = self._product(node)
        dim = last.summed_dim() if last else None
        if last is None or dim is None:
            return None
        region = _Region(last)
        tokens, weight = (operands(node)[i] for i in (last.tokens, last.weight))
        summed = last.rule.operands[last.tokens][dim]
        at = last.rule.operands[last.weight].index(summed)
        if shape(tokens)[dim] < self.ranks or not self._follow(tokens, Shard(dim), region):
            return None
        if not region.first or not self._follow(weight, Shard(at), region):
            return None
        return None if self._escapes(region) else region

    def _follow(self, x: fx.Node, kind: Shard, region: _Region) -> bool:
        """Follow a split back from a value to the weights that it comes from."""
        end = self.order[region.last.node]
        pending, seen = [(x, kind)], dict[fx.Node, Shard]()
        while pending:
            node, kind = pending.pop()
            if seen.setdefault(node, kind) != kind:
                return False  # two uses would split it in two ways
            if node in region.inside or node in region.entries:
                continue
            if node in self.own and node.op == "placeholder":
                if region.weights.setdefault(node, kind) != kind:
                    return False
                continue
            if node not in self.own and any(self.order[user] > end for user in node.users):
                return False  # it lives on: the stream between layers
            sources = self._sources(node, kind)
            if sources is None:
                if node in self.own:
                    return False
                region.entries[node] = kind
                continue
            region.inside[node] = kind
            if node.target is operator.getitem:
                region.inside[node.all_input_nodes[0]] = kind
            product = self._product(node)
            if product and operands(node)[product.tokens] not in (x for x, _ in sources):
                region.first.append(product)
            pending += sources
        return True

    def _sources(self, node: fx.Node, kind: Shard) -> list[tuple[fx.Node, Shard]] | None:
        """The operands with a result's split dimension, and where; None if it must be whole."""
        number = 0
        if node.target is operator.getitem and isinstance(at := node.args[1], int):
            node, number = node.all_input_nodes[0], at
        rule = rule_for(node) if node.op == "call_function" else None
        if rule is None or number >= len(rule.results):
            return None
        split = factor_at(rule, rule.results[number][kind.dim], kind.blocks)
        if split is None or not rule.splittable(split.factor, self.ranks, split.blocks):
            return None
        found: list[tuple[fx.Node, Shard]] = []
        for x, dims in zip(operands(node), rule.operands, strict=True):
            held = carried(rule, dims, split)
            if isinstance(held, Shard):
                found.append((x, held))
        return found or None

    def _escapes(self, region: _Region) -> bool:
        """Whether what is made inside is used elsewhere: after the end, or by other products."""
        end = self.order[region.last.node]
        pending, seen = [n for n in region.inside if n not in self.own], {region.last.node}
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            elsewhere = node not in region.inside and self._product(node) is not None
            if elsewhere or self.order[node] > end:
                return True
            pending += node.users
        return False


# --- saying so ------------------------------------------------------------------------------------


def _write(region: _Region, batch: tuple[int | None, int | None]) -> None:
    """Ask for whole tokens before the region, a share of the dimension inside, and tokens after."""
    for product in region.first:
        _ask(operands(product.node)[product.tokens], REPLICATE, {product.node})
    for weight, kind in region.weights.items():
        _ask(weight, kind, region.nodes)
    for value, kind in region.entries.items():
        if (expansion := _expansion(value)) is not None:
            _ask(expansion.all_input_nodes[0], REPLICATE, {expansion})
        _ask(value, kind, region.nodes)
    for node, kind in region.inside.items():
        if node.target is _SDPA and kind == Shard(HEADS):  # said so that context parallelism knows
            _ask(node.all_input_nodes[0], kind, {node})
    end = region.last.node
    if (after := _split_of_tokens(shape(end), batch)) is not None:
        _ask(end, after, set(end.users))


def _ask(value: fx.Node, kind: Kind, users: AbstractSet[fx.Node]) -> None:
    """Write ``constrain`` between a value and some of its users."""
    using = [user for user in value.users if user in users]
    if not using:
        return
    asked = call(min(using), constrain, value, "tp", str(kind))
    for user in using:
        user.replace_input_with(value, asked)


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
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
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
        _ask(x, REPLICATE, {node})
    if heads:
        _ask(node, Shard(TOKENS), set(node.users))
    return (
        f"attention of {heads} heads cannot be split over tp={ranks}, so these ranks compute all "
        f"of it alike ({roles.where(node)}); choose a tp that divides the heads"
    )
