"""Where the mechanisms of a plan act on a model: sizes, read from its canonical program.

Reading knows no plan, but for ``Model.shared``: which dimensions so many ranks can share is found
once for each number of ranks. What a mechanism does at a site and what that costs is said in
``formulas.py``. Sizes are of the whole batch.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moptrace import roles, state
from moptrace.collectives import conversion
from moptrace.core import Level, Pass, Program, ancestors, chain
from moptrace.errors import PassError
from moptrace.kernels.attention import Sight
from moptrace.passes.axes import CASTS, RESHAPES, argument, packet
from moptrace.passes.causal_convolutions import causal_convolutions
from moptrace.passes.context_parallel import HEADS, TOKENS, context_parallel
from moptrace.passes.drop_tokens import rows_of
from moptrace.passes.expert_tensor_parallel import expert_tensor_parallel
from moptrace.passes.fold_router_weights import fold_router_weights
from moptrace.passes.fuse_embedding import is_lookup
from moptrace.passes.fuse_vocabulary import fuse_vocabulary, fusions
from moptrace.passes.place import place
from moptrace.passes.regions import PRODUCTS
from moptrace.passes.shard_parameters import (
    batch_sizes,
    expert_dims,
    shard_batch,
    shard_parameters,
)
from moptrace.passes.tensor_parallel import tensor_parallel
from moptrace.placement import PARTIAL, REPLICATE, Kind, Layout, Rows, Shard, parse_kind
from moptrace.reshard import constrain, reshard, route
from moptrace.roles import Component
from moptrace.rules import operands, rule_for

__all__ = [
    "Attention",
    "Block",
    "Change",
    "Lookup",
    "Model",
    "Movement",
    "Projection",
    "Shared",
    "Weight",
]

aten, ops = torch.ops.aten, torch.ops.moptrace
_SDPA, _PRODUCT = aten.scaled_dot_product_attention.default, ops.grouped_mm.default


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: its ``name`` in the graph, and the user's names of it.

    ``experts`` is its dimension that counts experts, if it has one. ``used`` is whether any
    operator takes it, and ``kept`` whether backward needs it again: not if it is only added, or
    looked up.
    """

    name: str
    fqns: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    component: Component | None
    experts: int | None
    trained: bool
    used: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention core: ``heads`` of queries, and ``groups`` of keys before any is repeated.

    ``query`` and ``value`` are the widths of a head. ``wide`` is how many heads of keys the
    operator takes, which the model may have repeated. ``travels`` is whether keys can go around a
    ring; ``sight`` is the window that queries then see, and ``fixed`` whether a mask keeps tokens
    in their places.
    """

    sequences: int
    length: int
    heads: int
    groups: int
    query: int
    value: int
    itemsize: int
    wide: int
    travels: bool
    sight: Sight
    fixed: bool


@dataclass(frozen=True, slots=True)
class Block:
    """One dispatch of tokens to experts; ``first`` of those that share their choices.

    ``sent`` and ``returned`` are the features of a row on its way to the experts and back,
    ``widest`` those sent at once, ``needed`` those returned that backward needs, and ``combined``
    those of what a token gets. ``weighed`` is how many operators take the weights of
    the choices. ``between`` are the features of the results of the experts' first products, and
    ``parameters`` the bytes of what one expert has.
    """

    name: str
    first: bool
    tokens: int
    choices: int
    experts: int
    width: int
    itemsize: int
    sent: float
    widest: float
    returned: float
    needed: float
    weighed: int
    combined: int
    between: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection of tokens onto words whose logits nothing but a loss needs, of ``labels``."""

    weight: str
    bias: str | None
    tokens: int
    labels: int
    width: int
    words: int
    itemsize: int
    logits_bytes: int


@dataclass(frozen=True, slots=True)
class Lookup:
    """The lookups of an embedding's weight, with the number of ``ids`` in each.

    ``projected`` is whether the weight is used otherwise, by projections onto a vocabulary alone;
    ``whole`` whether anything else needs it.
    """

    weight: str
    ids: tuple[int, ...]
    words: int
    width: int
    itemsize: int
    projected: bool
    whole: bool


@dataclass(frozen=True, slots=True)
class Change:
    """A value that a collective adds up, or makes whole, wherever tokens are split.

    ``value`` is its name in the graph, and ``trained`` whether it has a gradient, which the
    transpose moves.
    """

    value: str
    collective: str
    bytes: int
    trained: bool

    @property
    def is_sum(self) -> bool:
        """Whether it, or its gradient, is a sum over the ranks."""
        return self.collective in ("all_reduce", "all_reduce_invariant", "vary")


@dataclass(frozen=True, slots=True)
class Movement:
    """A value of tokens that is moved along ``tp``, by one collective and its transpose.

    ``kept`` is whether backward needs it: not if it is only rearranged afterwards.
    """

    collective: str
    bytes: int
    itemsize: int
    kept: bool


@dataclass(frozen=True)
class Shared:
    """What so many ranks of ``tp`` or ``etp`` share.

    ``asked`` are the splits of weights that this takes, by name; ``moved`` are tokens, and ``rows``
    for each dispatch the features of a row that are gathered, and added up. ``heads`` is whether
    the ranks share heads of attention.
    """

    asked: Mapping[str, tuple[Shard, ...]] = field(default_factory=dict[str, tuple[Shard, ...]])
    moved: tuple[Movement, ...] = ()
    rows: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    heads: bool = False


class Model:
    """The sites of a canonical program, each kind read when it is first asked for."""

    def __init__(self, program: Program):
        """Raises PassError for a program that was not made from a canonical one."""
        from moptrace.passes.default import canonical

        names = {step.name for step in canonical()}
        made = (p for p in reversed(program.history) if p.made_by and p.made_by.name in names)
        found = next((p for p in made if p.level == Level.CANONICAL), None)
        if found is None:
            raise PassError(
                f"formulas are of a canonical program, and this one, at level {program.level}, was "
                "made from none: apply moptrace.passes.default.canonical() first"
            )
        self.program = found
        self._shared: dict[tuple[str, int], Shared] = {}
        self._found: dict[tuple[str, bool], tuple[Change, ...]] = {}

    @cached_property
    def folded(self) -> Model:
        """The sites of the program with the weights of routers inside of the experts."""
        model = Model(self.program)
        model.program = fold_router_weights()(self.program)
        return model

    @cached_property
    def batch(self) -> tuple[int, int]:
        """The number of sequences, and of tokens in each; 1 where inputs have none."""
        sequences, length = batch_sizes([x.shape for x in self.program.signature.inputs])
        return sequences or 1, length or 1

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        nodes = {node.name: node for node in self._nodes(None, "placeholder")}
        experts = expert_dims(self.program.graph)
        return tuple(
            Weight(
                name=p.name,
                fqns=tuple(state.user_names(p)),
                shape=p.shape,
                dtype=p.dtype,
                component=roles.component(nodes[p.name]),
                experts=experts.get(p.name),
                trained=p.requires_grad,
                used=bool(nodes[p.name].users),
                kept=_is_kept(nodes[p.name]),
            )
            for p in self.program.signature.parameters
        )

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Read from rings, which say what they see; what cannot be a ring stays what it was."""
        program = context_parallel(Layout.of(2, cp=2), "ring")(self.program)
        found = [node for node in program.nodes if node.target in (_SDPA, _ATTENTION)]
        return tuple(map(_attention, self._nodes(_SDPA), found))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        seen: set[Any] = set()
        found: list[Block] = []
        for dispatch in self._nodes(ops.dispatch.default):
            found.append(_block(dispatch, dispatch.args[1] not in seen, self._routes))
            seen.add(dispatch.args[1])
        return tuple(found)

    @cached_property
    def _routes(self) -> Mapping[str, _Route]:
        found: dict[str, _Route] = defaultdict(_Route)
        for node in _placed(self.program, Layout.of(2, ep=2)).nodes:
            if node.target is route:
                rows, counts = node.all_input_nodes
                dispatch = counts.all_input_nodes[0].name
                arrives = parse_kind(str(node.args[4])) == Rows("expert")
                route_ = found[dispatch]
                (route_.there if arrives else route_.back).append(_features(rows))
        return found

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(
            Projection(
                weight=_parameter(fusion.weight),
                bias=None if fusion.bias is None else _parameter(fusion.bias),
                tokens=fusion.tokens,
                labels=roles.tensor(fusion.loss.args[1]).numel(),  # type: ignore[arg-type]
                width=(hidden := roles.tensor(fusion.hidden)).shape[-1],
                words=roles.tensor(fusion.weight).numel() // hidden.shape[-1],
                itemsize=hidden.element_size(),
                logits_bytes=fusion.bytes,
            )
            for fusion in fusions(self.program.graph)
        )

    @cached_property
    def lookups(self) -> tuple[Lookup, ...]:
        projecting = {node for fusion in fusions(self.program.graph) for node in fusion.chain}
        found: dict[str, list[fx.Node]] = {}
        for node in self.program.nodes:
            if is_lookup(node) and node.all_input_nodes[0].op == "placeholder":
                found.setdefault(node.all_input_nodes[0].name, []).append(node)
        return tuple(self._lookup(nodes, projecting) for nodes in found.values())

    def _lookup(self, nodes: list[fx.Node], projecting: set[fx.Node]) -> Lookup:
        weight = nodes[0].all_input_nodes[0]
        table, others = roles.tensor(weight), {*weight.users} - {*nodes}
        return Lookup(
            weight=weight.name,
            ids=tuple(roles.tensor(node.all_input_nodes[1]).numel() for node in nodes),
            words=table.shape[0],
            width=table.shape[1],
            itemsize=table.element_size(),
            projected=bool(others),
            whole=not others <= projecting,
        )

    def along_batch(self, fused: bool) -> tuple[Change, ...]:
        """What is added up or made whole where the sequences of a batch are split.

        ``fused`` is whether logits over a vocabulary are, so that they are no values of the graph.
        """
        return self._changes(Layout.of(2), fused)

    def along_sequences(self, fused: bool) -> tuple[Change, ...]:
        """What is added up or made whole where the tokens of each sequence are split."""
        length = self.batch[1]
        parts = next((d for d in range(2, length + 1) if length % d == 0), None)
        return self._changes(Layout.of(parts, cp=parts), fused) if parts else ()

    def _changes(self, layout: Layout, fused: bool) -> tuple[Change, ...]:
        key = str(layout), fused
        if key not in self._found:
            program = fuse_vocabulary()(self.program) if fused else self.program
            self._found[key] = tuple(_changes(_placed(program, layout)))
        return self._found[key]

    def shared(self, axis: str, ranks: int) -> Shared:
        """What ``ranks`` ranks of ``tp`` or ``etp`` share."""
        key = axis, ranks
        if key not in self._shared:
            self._shared[key] = _shared(self.program, axis, ranks) if ranks > 1 else Shared()
        return self._shared[key]

    def _nodes(self, target: Any, op: str = "call_function") -> list[fx.Node]:
        return list(self.program.graph.find_nodes(op=op, target=target, sort=True))


# --- reading nodes --------------------------------------------------------------------------------

_ATTENTION = ops.attention.default
_ADDS = (aten.add, aten.embedding)
_VIEWS = {*CASTS, *RESHAPES, aten.t, aten.transpose, aten.permute, aten.expand}


def _is_kept(x: fx.Node) -> bool:
    """Whether a gradient is made of a value: not if it is only added, or rows are taken of it."""
    for user in x.users:
        rule = rule_for(user) if user.op == "call_function" else None
        if packet(user) in _VIEWS or user.target is ops.expert_rows.default:
            if _is_kept(user):
                return True
        elif packet(user) not in _ADDS:
            if rule is None or operands(user).index(x) not in rule.added:
                return True
    return False


def _attention(model: fx.Node, node: fx.Node) -> Attention:
    query, key, value = (roles.tensor(x) for x in node.args[:3])  # type: ignore[arg-type]
    ring = node.target is _ATTENTION
    mask: Any = argument(node, 3, "mask" if ring else "attn_mask")
    left, right = node.args[5:7] if ring else (None, None)
    return Attention(
        sequences=query.shape[0],
        length=query.shape[-2],
        heads=query.shape[-3],
        groups=key.shape[-3],
        query=query.shape[-1],
        value=value.shape[-1],
        itemsize=query.element_size(),
        wide=roles.tensor(model.args[1]).shape[-3],  # type: ignore[arg-type]
        travels=ring,
        sight=Sight(left, right),  # type: ignore[arg-type]
        fixed=mask is not None and roles.tensor(mask).shape[-2] > 1,
    )


@dataclass(frozen=True, slots=True)
class _Route:
    """The features of a row that go to its expert, and that come back, each time that some do."""

    there: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)


def _block(dispatch: fx.Node, first: bool, routes: Mapping[str, _Route]) -> Block:
    x, chosen = (roles.tensor(node) for node in dispatch.all_input_nodes[:2])
    rows = rows_of([dispatch])
    ends = [node for node in rows if node.target is ops.combine.default]
    weighing = [n for n in ends if n.args[2].target is not aten.ones.default]  # type: ignore[union-attr]
    weights: list[Any] = [n.args[2] for n in weighing]
    weights += [n.args[0] for n in rows if n.target is _PAIR_ROWS]
    products = [node for node in rows if node.target is _PRODUCT]
    first_ones = [n for n in products if not ancestors([n.args[0]]) & {*products}]  # type: ignore[list-item]
    taken = [n.args[1] for n in products]
    taken += [n.args[0] for n in rows if n.target is ops.expert_rows.default]
    needed = {x for x in ancestors(taken) if x.op == "placeholder"}  # type: ignore[arg-type]
    experts: int = dispatch.args[2]  # type: ignore[assignment]
    path = routes.get(dispatch.name, _Route())
    return Block(
        name=dispatch.name,
        first=first,
        tokens=chosen.shape[0],
        choices=chosen.shape[1],
        experts=experts,
        width=x.shape[-1],
        itemsize=x.element_size(),
        sent=sum(path.there),
        widest=max(path.there, default=0),
        returned=sum(path.back),
        needed=sum(path.back) if weighing else 0,
        weighed=len({*weights}),
        combined=sum(roles.tensor(end).shape[-1] for end in ends),
        between=sum(roles.tensor(n).shape[-1] for n in first_ones),
        parameters=sum(_bytes(p) for p in needed) // experts,
    )


_PAIR_ROWS = ops.pair_rows.default


def _placed(program: Program, layout: Layout) -> Program:
    """The program on so few ranks that every change of placement shows once."""
    steps = chain(
        context_parallel(layout),
        causal_convolutions(layout),
        shard_parameters(layout),
        shard_batch(layout),
        place(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever makes the local program is told
        return steps(program)


def _changes(program: Program) -> Iterator[Change]:
    """Changes of values that depend on the batch, other than swaps of what is split."""
    parameters = {p.name: p.requires_grad for p in program.signature.parameters}
    own: set[fx.Node] = set()
    trained: set[fx.Node] = set()
    for node in program.nodes:
        inputs = node.all_input_nodes
        if node.name in parameters or (inputs and all(x in own for x in inputs)):
            own.add(node)
        if parameters.get(node.name) or (trained.intersection(inputs) and _is_floating(node)):
            trained.add(node)
        if node.target is reshard and node not in own:
            name = conversion(*(parse_kind(str(kind)) for kind in node.args[2:4]))
            if name is not None and name != "all_to_all":
                yield Change(_origin(node), name, _bytes(node), node in trained)


def _origin(node: fx.Node) -> str:
    """The name of the value that was moved."""
    while node.target is reshard:
        node = node.all_input_nodes[0]
    return node.name


def _is_floating(node: fx.Node) -> bool:
    values = pytree.tree_leaves(roles.value(node))
    return any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in values)


_SHARING: Mapping[str, Callable[[int], Pass]] = {
    "tp": lambda ranks: tensor_parallel(Layout.of(ranks, tp=ranks)),
    "etp": lambda ranks: expert_tensor_parallel(Layout.of(ranks, etp=ranks)),
}


def _shared(program: Program, axis: str, ranks: int) -> Shared:
    sharing = _SHARING[axis](ranks)(program)
    graph = sharing.graph
    weights = {p.name for p in program.signature.parameters}
    asked: dict[str, tuple[Shard, ...]] = {}
    moved: dict[tuple[fx.Node, str], Movement] = {}
    for node in graph.find_nodes(op="call_function", target=constrain):
        x, along, kind = _request(node)
        if along == axis and x.name in weights and isinstance(kind, Shard):
            asked[x.name] = (*asked.get(x.name, ()), kind)
        elif along == axis == "tp" and (name := _movement(x, node, kind)):
            moved[x, name] = _moved(name, x, node, ranks)
    if axis == "tp":
        placed = _placed(sharing, Layout.of(ranks, tp=ranks))
        moved |= {
            (node, ""): _moved("all_reduce", node, node, ranks) for node in _statistics(placed)
        }
    dispatches = graph.find_nodes(op="call_function", target=ops.dispatch.default)
    attentions = graph.find_nodes(op="call_function", target=_SDPA)
    return Shared(
        asked=asked,
        moved=tuple(moved.values()),
        rows={node.name: _rows_shared(node) for node in dispatches} if axis == "etp" else {},
        heads=axis == "tp" and any(_shares_heads(node) for node in attentions),
    )


def _moved(collective: str, x: fx.Node, after: fx.Node, ranks: int) -> Movement:
    """``ranks`` may share heads of attention unevenly: then one returns more than its part."""
    kept, bytes_ = any(packet(user) not in _VIEWS for user in after.users), _bytes(x)
    if x.target is _SDPA:
        heads = roles.tensor(x).shape[HEADS]
        bytes_ = bytes_ // heads * math.ceil(heads / ranks) * ranks
    return Movement(collective, bytes_, roles.tensor(x).element_size(), kept)


def _statistics(placed: Program) -> Iterator[fx.Node]:
    """What each token adds up over shares of its features, as a norm over all heads does."""
    for node in placed.nodes:
        if node.target is reshard and node.args[2] == str(PARTIAL):
            if roles.tensor(node).dim() > 1 and not isinstance(
                parse_kind(str(node.args[3])), Shard
            ):
                yield node


def _request(constrained: fx.Node) -> tuple[fx.Node, str, Kind]:
    """What a ``constrain`` asks for: of which value, along which axis, and how it is held."""
    x, axis, kind = constrained.args
    while isinstance(x, fx.Node) and x.target is constrain:
        x = x.args[0]
    assert isinstance(x, fx.Node)
    return x, str(axis), parse_kind(str(kind))


def _movement(x: fx.Node, constrained: fx.Node, kind: Kind) -> str | None:
    """The collective along ``tp`` that brings tokens where they are asked for; None for none."""
    if kind == REPLICATE:
        return "all_gather"
    attentions = [node for node in (x, *constrained.users) if node.target is _SDPA]
    if any(_exchanges(node) for node in attentions):
        return "all_to_all"
    return "reduce_scatter" if x.target in PRODUCTS else None


def _shares_heads(attention: fx.Node) -> bool:
    query: Any = attention.args[0]
    return query.target is constrain and query.args[1:] == ("tp", str(Shard(HEADS)))


def _exchanges(attention: fx.Node) -> bool:
    """Whether an attention swaps tokens for heads along ``tp``, and back."""
    back = ("tp", str(Shard(TOKENS)))
    after = [user for user in attention.users if user.target is constrain]
    return _shares_heads(attention) and any(user.args[1:] == back for user in after)


def _rows_shared(dispatch: fx.Node) -> tuple[float, float]:
    """The features of a row that are gathered along ``etp``, and of one that is added up."""
    found: dict[tuple[fx.Node, str], float] = {}
    for node in rows_of([dispatch]):
        if node.target is constrain:
            x, axis, kind = _request(node)
            if axis == "etp" and kind in (REPLICATE, Rows("token")):
                found[x, str(kind)] = _features(x)
    gathered = sum(n for (_, kind), n in found.items() if kind == str(REPLICATE))
    return gathered, sum(found.values()) - gathered


def _parameter(x: fx.Node) -> str:
    """The name of the parameter of which a value is a view."""
    while x.op != "placeholder":
        x = x.all_input_nodes[0]
    return x.name


def _features(rows: fx.Node) -> float:
    """How many elements a row has."""
    value = roles.tensor(rows)
    return math.prod(value.shape[1:])


def _bytes(x: fx.Node) -> int:
    value = roles.tensor(x)
    return value.numel() * value.element_size()
