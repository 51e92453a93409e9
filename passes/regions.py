"""What lies between two products with weights: the dimension that ranks can share, by structure."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import fx

from moptrace.infer import carried, factor_at
from moptrace.passes.axes import shape
from moptrace.passes.context_parallel import call
from moptrace.placement import Kind, Shard
from moptrace.reshard import constrain
from moptrace.rules import Rule, operands, rule_for

__all__ = ["PRODUCTS", "Finder", "Product", "Region", "ask"]

aten, ops = torch.ops.aten, torch.ops.moptrace


@dataclass(frozen=True)
class Product:
    """A product of activations with a weight: the operands' positions, and the rule."""

    node: fx.Node
    rule: Rule
    tokens: int
    weight: int

    @classmethod
    def of(cls, node: fx.Node, own: set[fx.Node]) -> Product | None:
        """The node as a product of one activation with one weight; None if it is none."""
        rule = rule_for(node) if node.op == "call_function" and node.target in PRODUCTS else None
        if rule is None:
            return None
        beside = {*rule.added, rule.counts}
        inputs = [(i, x) for i, x in enumerate(operands(node)) if i not in beside]
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


PRODUCTS = {
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default,
    aten.einsum.default, ops.grouped_mm.default,
}  # fmt: skip


@dataclass
class Region:
    """What one dimension reaches back to from the product that sums over it.

    ``weights`` are the parameters with the dimension, and where they have it; ``first`` the
    products that make it; ``entries`` values from outside that have it already.
    """

    last: Product
    inside: dict[fx.Node, Shard] = field(default_factory=dict[fx.Node, Shard])
    first: list[Product] = field(default_factory=list[Product])
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


class Finder:
    """The search for regions that so many ranks can share: of routed rows, or of all else."""

    def __init__(self, graph: fx.Graph, parameters: set[str], ranks: int, routed: bool = False):
        self.graph, self.ranks, self.routed = graph, ranks, routed
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.own: set[fx.Node] = set()  # parameters, and what is made of them alone
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node.name in parameters or (inputs and all(x in self.own for x in inputs)):
                self.own.add(node)
        self.rows: set[fx.Node] = set()  # routed, and what says which they are
        for node in graph.nodes:
            if node.target is ops.dispatch.default or self.rows.intersection(node.all_input_nodes):
                if node.target is not ops.combine.default:
                    self.rows.add(node)

    def _product(self, node: fx.Node) -> Product | None:
        """The node as a product; of routed rows, as one with the matrix of each row's expert."""
        if self.routed != (node.target is ops.grouped_mm.default):
            return None
        return Product.of(node, self.own) if (node in self.rows) == self.routed else None

    def regions(self) -> Iterator[Region]:
        """Regions that share no node; those first in which each rank needs only its own share."""
        found = [region for node in self.graph.nodes if (region := self._region(node))]
        taken: set[fx.Node] = set()
        for region in sorted(found, key=lambda region: region.adds_up):
            if not region.nodes & taken:
                taken |= region.nodes
                yield region

    def _region(self, node: fx.Node) -> Region | None:
        """The region that ends in a product."""
        last = self._product(node)
        dim = last.summed_dim() if last else None
        if last is None or dim is None:
            return None
        region = Region(last)
        tokens, weight = (operands(node)[i] for i in (last.tokens, last.weight))
        summed = last.rule.operands[last.tokens][dim]
        at = last.rule.operands[last.weight].index(summed)
        if shape(tokens)[dim] < self.ranks or not self._follow(tokens, Shard(dim), region):
            return None
        if self.routed and shape(tokens)[dim] % self.ranks:
            return None  # what runs expert by expert is made once for all ranks
        if not region.first or not self._follow(weight, Shard(at), region):
            return None
        return None if self._escapes(region) else region

    def _follow(self, x: fx.Node, kind: Shard, region: Region) -> bool:
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

    def _escapes(self, region: Region) -> bool:
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


def ask(
    value: fx.Node, axis: str, kind: Kind | fx.Node, users: AbstractSet[fx.Node]
) -> fx.Node | None:
    """Write ``constrain`` along an axis between a value and some of its users."""
    using = [user for user in value.users if user in users]
    if not using:
        return None
    asked = call(
        min(using), constrain, value, axis, kind if isinstance(kind, fx.Node) else str(kind)
    )
    for user in using:
        user.replace_input_with(value, asked)
    return asked
