"""Tag every node with its component, by operators and data flow alone.

The *main path* is what leads from embedded tokens to the loss. A node of it past which no edge
jumps is a *cut*: in a model with residual connections the cuts are the values of the residual
stream, and what lies between two of them is one sublayer. Anchors say what a sublayer is
(canonical Mixture-of-Experts operators, a product of two activations, a norm, products with
parameters); everything else takes the component of what it feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.passes.axes import RESHAPES, argument, contraction, is_pointwise, packet, shape
from moptrace.roles import Component

__all__ = ["classify"]

aten = torch.ops.aten
ops = torch.ops.moptrace


def classify() -> Pass:
    """Give every node its component and, in Mixture-of-Experts blocks, the block's number.

    Requires: ``raise_experts``.
    Ensures: every node has a component, except inputs and parameters that several components read.
    """
    return Pass(
        "classify", _classify, takes=(Level.CAPTURED,), gives=Level.CANONICAL,
        needs=("raise_experts",),
    )  # fmt: skip


def _classify(program: Program) -> Program:
    graph, mapping = program.copy_graph()
    state = {x.name for x in (*program.signature.parameters, *program.signature.buffers)}
    model = _Model.of(graph, mapping[program.loss], state)
    for rule in (embedding, vocabulary_and_loss, experts, sublayers, auxiliary_losses):
        rule(model)
    model.spread()
    return program.with_graph(graph)


# ---- The graph, read once ------------------------------------------------------------------------


@dataclass
class _Model:
    graph: fx.Graph
    loss: fx.Node
    place: dict[fx.Node, int]
    fixed: set[fx.Node]  # made of parameters, buffers and constants alone
    active: set[fx.Node]  # depends on embedded tokens
    terms: list[fx.Node] = field(default_factory=list)  # what the loss adds up
    main_terms: list[fx.Node] = field(default_factory=list)
    main: list[fx.Node] = field(default_factory=list)
    on_main: set[fx.Node] = field(default_factory=set)
    width: int = 0

    @classmethod
    def of(cls, graph: fx.Graph, loss: fx.Node, state: set[str]) -> _Model:
        place: dict[fx.Node, int] = {}
        fixed: set[fx.Node] = set()
        active: set[fx.Node] = set()
        for number, node in enumerate(graph.nodes):
            place[node] = number
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "placeholder" and node.name in state):
                fixed.add(node)
            elif node.op == "placeholder":
                value = roles.value(node)
                if isinstance(value, Tensor) and value.is_floating_point():
                    active.add(node)
            elif node.op == "call_function":
                if all(n in fixed for n in inputs):
                    fixed.add(node)
                elif _embeds(node, fixed) or any(n in active for n in inputs):
                    active.add(node)
        model = cls(graph, loss, place, fixed, active)
        model._find_main_path()
        return model

    def _find_main_path(self) -> None:
        self.terms = _terms(self.loss)
        last = {term: self._last_projection(term) for term in self.terms}
        entropies = [t for t in self.terms if self._has_entropy(t)]
        self.main_terms = entropies or [max(self.terms, key=lambda t: last[t])]
        leading = set(_ancestors(self.main_terms, lambda n: n in self.active))
        self.main = sorted(leading, key=self.place.__getitem__)
        self.on_main = leading
        first = next((n for n in self.main if isinstance(roles.value(n), Tensor)), None)
        self.width = shape(first)[-1] if first is not None and shape(first) else 0

    def _last_projection(self, term: fx.Node) -> int:
        found = [self.place[n] for n in self.until_projections([term]) if self.projects(n)]
        return max(found, default=-1)

    def _has_entropy(self, term: fx.Node) -> bool:
        return any(
            packet(n) in (aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd, aten.nll_loss2d)
            for n in self.until_projections([term])
        )

    def projects(self, node: fx.Node) -> bool:
        """Whether the node multiplies activations with a parameter."""
        product = contraction(node)
        if product is None or node.target is ops.grouped_mm.default:
            return False
        return any(x in self.fixed for x in product.operands) and any(
            x in self.active for x in product.operands
        )

    def until_projections(self, starts: Iterable[fx.Node]) -> list[fx.Node]:
        """What leads to ``starts``, back to the products with parameters."""
        return _ancestors(
            starts, lambda n: n.op == "call_function", stop=lambda n: self.projects(n)
        )

    def tag(self, node: fx.Node, component: Component, block: int | None = None) -> None:
        """Give a node that has none a component."""
        if roles.component(node) is None and node.op == "call_function":
            roles.set_role(node, component=component, block=block)

    def spread(self) -> None:
        """Give what is left the component of what it feeds, else of what feeds it."""
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and roles.component(node) is None:
                _copy_first(node, node.users)
        for node in self.graph.nodes:
            if node.op == "call_function" and roles.component(node) is None:
                _copy_first(node, node.all_input_nodes)
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                continue
            found = {(roles.component(u), roles.role(u).block) for u in node.users} - {(None, None)}
            if len({component for component, _ in found}) == 1:
                component, block = next(iter(found))
                roles.set_role(node, component=component, block=block if len(found) == 1 else None)


def _copy_first(node: fx.Node, others: Iterable[fx.Node]) -> None:
    source = next((n for n in others if roles.component(n) is not None), None)
    if source is not None:
        roles.set_role(node, component=roles.component(source), block=roles.role(source).block)


def _ancestors(
    starts: Iterable[fx.Node],
    inside: Callable[[fx.Node], bool],
    stop: Callable[[fx.Node], bool] = lambda _: False,
) -> list[fx.Node]:
    """The nodes from which ``starts`` are computed, staying inside; not past one that stops."""
    seen: dict[fx.Node, None] = {}
    stack = [n for n in starts if inside(n)]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        if not stop(node):
            stack.extend(n for n in node.all_input_nodes if n not in seen and inside(n))
    return list(seen)


def _embeds(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Whether the node looks tokens up in a table of parameters."""
    if packet(node) is aten.embedding:
        return node.args[0] in fixed
    if packet(node) not in (aten.index, aten.index_select) or node.args[0] not in fixed:
        return False
    value = roles.value(node)
    return (
        isinstance(value, Tensor) and value.is_floating_point() and node.args[0].op == "placeholder"
    )  # type: ignore[union-attr]


def _terms(loss: fx.Node) -> list[fx.Node]:
    """The terms of a loss: what scalar arithmetic combines."""
    found: list[fx.Node] = []
    stack = [loss]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = [n for n in node.all_input_nodes if isinstance(roles.value(n), Tensor)]
        scalars = [n for n in inputs if not shape(n) and n.op == "call_function"]
        if scalars and len(scalars) == len(inputs) and packet(node) in _ADDING:
            stack.extend(scalars)
        else:
            found.append(node)
    return found


_ADDING = {
    aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten._to_copy, aten.clone, aten.where,
    aten.nan_to_num,
}  # fmt: skip


# ---- Anchors -------------------------------------------------------------------------------------


def embedding(model: _Model) -> None:
    """A look-up of the batch's integers in a table of parameters."""
    for node in model.graph.nodes:
        if node.op == "call_function" and _embeds(node, model.fixed):
            model.tag(node, Component.EMBEDDING)


def vocabulary_and_loss(model: _Model) -> None:
    """The product with a parameter from which the loss is computed, and what comes after it."""
    behind = model.until_projections(model.main_terms)
    if model.loss not in model.main_terms:
        model.tag(model.loss, Component.LOSS)
    for node in behind:
        if model.projects(node):
            model.tag(node, Component.VOCAB)
        elif node not in model.fixed:
            model.tag(node, Component.LOSS)


def experts(model: _Model) -> None:
    """Canonical blocks, numbered in order, with their routers and shared experts."""
    combines = [n for n in model.graph.nodes if n.target is ops.combine.default]
    for block, combine in enumerate(combines):
        _expert_block(model, block, combine)


def _expert_block(model: _Model, block: int, combine: fx.Node) -> None:
    rows, _, weights = combine.args
    assert isinstance(rows, fx.Node) and isinstance(weights, fx.Node)
    model.tag(combine, Component.COMBINE, block)
    routed, tokens = [weights], list[fx.Node]()

    def is_gate(node: fx.Node) -> bool:
        return node.target in (ops.dispatch.default, ops.pair_rows.default)

    inside = _ancestors([rows], lambda n: n.op == "call_function", stop=is_gate)
    for node in sorted(inside, key=model.place.__getitem__):
        if node.target is ops.dispatch.default:
            for result in node.users:
                model.tag(result, Component.DISPATCH, block)
            tokens.append(node.args[0])  # type: ignore[arg-type]
            routed.append(node.args[1])  # type: ignore[arg-type]
        elif node.target is ops.pair_rows.default:
            routed.append(node.args[0])  # type: ignore[arg-type]
        component = Component.DISPATCH if is_gate(node) else Component.EXPERTS
        model.tag(node, component, block)
    source = min((_stripped(x) for x in tokens), key=model.place.__getitem__)
    start = model.place[source]
    for x in tokens:
        for node in _ancestors([x], lambda n: n.op == "call_function", stop=lambda n: n is source):
            if model.place[node] > start and node not in model.fixed:
                model.tag(node, Component.DISPATCH, block)
    router = _ancestors(
        routed, lambda n: n.op == "call_function" and (model.place[n] > start or n in model.fixed)
    )
    for node in router:
        model.tag(node, Component.ROUTER, block)
    _after_combine(model, block, combine, start)


def _stripped(node: fx.Node) -> fx.Node:
    """The value of which this is a view or cast."""
    while packet(node) in (*RESHAPES, aten._to_copy, aten.clone) and node.op == "call_function":
        node = node.args[0]  # type: ignore[assignment]
    return node


def _after_combine(model: _Model, block: int, combine: fx.Node, start: int) -> None:
    """Follow the result to where it joins the residual stream; what is added to it is shared."""
    node = combine
    while True:
        users = [u for u in node.users if u in model.on_main]
        if len(users) != 1 or not (is_pointwise(users[0]) or packet(users[0]) in RESHAPES):
            return
        node, before = users[0], node
        if roles.component(node) is not None:
            return
        others = [n for n in node.all_input_nodes if n is not before and n in model.active]
        joins = False
        for other in others:
            shared = _ancestors(
                [other],
                lambda n: (
                    n in model.active and model.place[n] > start and roles.component(n) is None
                ),
            )
            if any(model.projects(n) for n in shared):
                for member in shared:
                    model.tag(member, Component.SHARED_EXPERT, block)
            elif model.place[other] <= start:
                joins = True
        model.tag(node, Component.COMBINE, block)
        if joins:
            return


# ---- Sublayers -----------------------------------------------------------------------------------


def sublayers(model: _Model) -> None:
    """Norms, attention and dense feed-forward networks between the cuts of the main path."""
    for members in _between_cuts(model):
        norms = [n for r in members if roles.component(r) is None for n in _norm(model, r)]
        for node in norms:
            model.tag(node, Component.NORM)
        open_ = [n for n in members if roles.component(n) is None]
        if any(_mixes_tokens(model, n) for n in open_):
            kind = Component.ATTENTION
        elif any(model.projects(n) for n in open_):
            kind = Component.DENSE_MLP
        else:
            continue
        for node in open_:
            model.tag(node, kind)


def _between_cuts(model: _Model) -> list[list[fx.Node]]:
    """Consecutive nodes of the main path, each group ending in a cut."""
    number = {node: i for i, node in enumerate(model.main)}
    groups: list[list[fx.Node]] = [[]]
    reach = 0
    for i, node in enumerate(model.main):
        groups[-1].append(node)
        if reach <= i:
            groups.append([])
        reach = max([reach, *(number[u] for u in node.users if u in number)])
    return groups


def _mixes_tokens(model: _Model, node: fx.Node) -> bool:
    """Attention's core: a fused one, a product of two activations, or a recurrence over time."""
    if "attention" in str(node.target).rpartition("::")[2].partition(".default")[0]:
        return True
    if packet(node) in (aten.conv1d, aten.convolution, aten.cumsum, aten.logcumsumexp):
        return True
    product = contraction(node)
    return product is not None and sum(x in model.active for x in product.operands) > 1


_WHOLE_NORMS = {aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm}
_REDUCTIONS = {aten.mean, aten.var, aten.var_mean, aten.sum, aten.linalg_vector_norm}


def _norm(model: _Model, root: fx.Node) -> list[fx.Node]:
    """The nodes of a norm over the model's width, given its central node; empty for other nodes."""
    if packet(root) in _WHOLE_NORMS:
        sizes = argument(root, 1, "normalized_shape")
        return [root] if list(sizes)[-1:] == [model.width] else []
    if packet(root) not in (aten.rsqrt, aten.sqrt, aten.pow, aten.reciprocal):
        return []
    found = [root]
    node = root
    while packet(node) not in _REDUCTIONS:
        inputs = [n for n in node.all_input_nodes if n in model.active]
        if len(inputs) != 1 or not (is_pointwise(node) or packet(node) in RESHAPES):
            return []
        node = inputs[0]
        found.append(node)
    source = node.all_input_nodes[0]
    if not shape(source) or shape(source)[-1] != model.width or shape(node)[-1:] == (model.width,):
        return []
    while is_pointwise(source) and packet(source) in (
        aten.pow,
        aten.square,
        aten.mul,
        aten.abs,
        aten.sub,
    ):
        found.append(source)
        source = next((n for n in source.all_input_nodes if n in model.active), source)
    if packet(source) is aten._to_copy:
        found.append(source)
    return [*found, *_scaled(model, root)]


def _scaled(model: _Model, root: fx.Node) -> list[fx.Node]:
    """What a norm does after its statistic: scale, cast, and the learned weight and bias."""
    found: list[fx.Node] = []
    frontier = [u for u in root.users if is_pointwise(u)]
    first = True
    while len(frontier) == 1:
        node = frontier[0]
        others = [n for n in node.all_input_nodes if n in model.active]
        if not is_pointwise(node) or (not first and len(others) > 1):
            break
        if not first and packet(node) not in (aten._to_copy, aten.mul, aten.add):
            break
        found.append(node)
        first = shape(node)[-1:] != (model.width,)
        frontier = list(node.users)
    return found


def auxiliary_losses(model: _Model) -> None:
    """Terms of the loss other than the main one, and what only they need."""
    extra = [t for t in model.terms if t not in model.main_terms]
    needed = _ancestors(
        extra, lambda n: n.op == "call_function" and n not in model.on_main and n not in model.fixed
    )
    for node in needed:
        model.tag(node, Component.AUX_LOSS)
    combining = _ancestors(
        [model.loss], lambda n: n.op == "call_function" and roles.component(n) is None
    )
    for node in combining:
        if node not in model.fixed:
            model.tag(node, Component.LOSS)
