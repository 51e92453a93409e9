"""Wrong gradients that real systems have shipped, put back one by one.

``regressions.md`` is the table of the reports. Each of them is first computed right here, in
float64 and with raw gradients, under the layout that it needs; then its bug is put back, by editing
the local program or by changing a part of moptrace while it runs, and must be noticed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gloo import Ranks
from moptrace import Plan, Program, collectives, rings, roles, trace
from moptrace.check import check
from moptrace.collectives import COLLECTIVES
from moptrace.errors import CheckError
from moptrace.kernels import aten_routing, routing
from moptrace.passes.default import canonical, sharded
from moptrace.placement import Shard
from moptrace.rules import rule_for
from moptrace.testing import (
    ModelSpec,
    SimulatedSteps,
    Step,
    assert_same_step,
    assert_same_training,
    assert_same_weights,
    eager_step,
    eager_training,
    simulated_step,
    simulated_training,
    whole_state,
)

aten, ops = torch.ops.aten, torch.ops.moptrace
WORDS = 13

# --- models ---------------------------------------------------------------------------------------

MOE = ModelSpec(
    style="canonical", experts=5, biases=True, shared="gated", attention="fused", balance=0.1
)


class Words(nn.Module):
    """An embedding and a projection; ``ahead`` further losses look one more word ahead each."""

    def __init__(self, tied: bool = False, smoothing: float = 0.0, ahead: int = 0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, 6)
        self.mix = nn.Linear(6, 6)
        self.heads = nn.ModuleList([nn.Linear(6, WORDS, bias=False) for _ in range(ahead + 1)])
        if tied:
            self.heads[0].weight = self.embedding.weight
        self.smoothing = smoothing
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.mix(self.embedding(input_ids)).tanh()
        losses: list[Tensor] = []
        for head in self.heads:
            rows = head(x).flatten(0, 1)
            smoothing = self.smoothing
            losses.append(F.cross_entropy(rows, labels.flatten(), label_smoothing=smoothing))
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return torch.stack(losses).sum()


class Counting(Words):
    """Remembers in buffers how many labels it saw, and how often each word came."""

    seen: Tensor
    words: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("words", torch.zeros(WORDS, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        self.seen += (labels != -100).sum()
        self.words += F.one_hot(input_ids, WORDS).to(self.words).sum((0, 1))
        return super().forward(input_ids, labels)


class Sequences(Words):
    """A router with an auxiliary loss that balances each sequence, the mean of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False, dtype=torch.float64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        probabilities = self.gate(self.embedding(input_ids)).softmax(-1)
        share = F.one_hot(probabilities.argmax(-1), 4).to(probabilities).mean(1)
        penalty = (4 * share * probabilities.mean(1)).sum(-1).mean()
        return super().forward(input_ids, labels) + 0.1 * penalty


def frozen() -> nn.Module:
    """The router, the embedding and one matrix of the experts are not trained."""
    model = MOE.build()
    block = model.layers[0].block
    for parameter in (model.embedding.weight, block.router.gate.weight, block.up):
        parameter.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "moe": MOE.build,
    "no biases": replace(MOE, biases=False).build,
    "few experts": replace(MOE, experts=4).build,
    "ten experts": ModelSpec(style="loop_mask", experts=10, hidden=2, k=1).build,
    "twelve experts": ModelSpec(style="loop_mask", experts=12, hidden=2, k=1).build,
    "latent attention": replace(MOE, attention="latent").build,
    "frozen": frozen,
    "words": Words,
    "tied words": partial(Words, tied=True),
    "smoothed words": partial(Words, smoothing=0.1),
    "words further ahead": partial(Words, ahead=1),
    "counted words": Counting,
    "balanced sequences": Sequences,
}


def some_batch(seed: int, size: int, length: int, ignored: str = "") -> dict[str, Tensor]:
    """Random tokens. The first sequences lack "some" labels, "half" of them or "all"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (size, length), generator=generator)
    labels = torch.randint(WORDS, (size, length), generator=generator)
    if ignored:
        first, kept = {"some": (size // 4, 1), "half": (size // 2, length // 2), "all": (size, 0)}[
            ignored
        ]
        labels[:first, kept:] = -100
    return {"input_ids": ids, "labels": labels}


# --- cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model under a plan, and the size of its batch."""

    model: str
    ranks: int
    plan: Plan
    size: int = 8
    length: int = 4
    ignored: str = "some"

    @property
    def batch(self) -> dict[str, Tensor]:
        """Not the batch that the model was traced with."""
        return some_batch(1, self.size, self.length, self.ignored)

    @property
    def traced(self) -> tuple[nn.Module, Program]:
        return traced(self.model, self.size, self.length)

    @property
    def home(self) -> str:
        """The axis of all ranks."""
        layout = self.local.layout
        assert layout is not None
        return layout.home.axes[0].name

    @property
    def local(self) -> Program:
        """The local program in which every parameter still has a gather of its own."""
        program = local(self)
        made = {p.made_by.name: p for p in program.history if p.made_by is not None}
        return made["localize"]

    def step(self, program: Program) -> Step:
        return simulated_step(program, whole_state(self.traced[0]), self.batch)


@cache
def traced(name: str, size: int, length: int) -> tuple[nn.Module, Program]:
    model = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, canonical()(trace(model, some_batch(0, size, length)))


@cache
def local(it: Setting) -> Program:
    return sharded(it.plan, it.ranks)(it.traced[1])


@cache
def right(it: Setting) -> Step:
    before = copy.deepcopy(it.traced[0].state_dict())
    step = eager_step(it.traced[0], it.batch)
    it.traced[0].load_state_dict(before)  # without the updates of its buffers
    return step


PutBack = Callable[[Setting, pytest.MonkeyPatch], Program]


@dataclass(frozen=True)
class Case:
    """A bug that was reported.

    ``put_back`` gives the program with the bug. ``wrong`` is a pattern of what the comparison then
    finds. The loss is right all the same where it is ``silent``. The checker refuses the program
    where it is ``refused`` (None: it should). ``times`` is how much too large the wrong values are,
    where it is their scale that is wrong, and ``more`` how much larger the loss is.
    ``hidden_in`` is a setting in which nothing changes.
    """

    reports: str
    setting: Setting
    put_back: PutBack
    wrong: str
    silent: bool = False
    refused: bool | None = False
    times: float | None = None
    more: float | None = None
    hidden_in: Setting | None = None


def refused(program: Program) -> bool:
    try:
        check(program)
    except CheckError:
        return True
    return False


# --- editing a program ----------------------------------------------------------------------------


def edited(program: Program, change: Callable[[fx.Graph], None]) -> Program:
    """The program after a change to its graph, which must show when it is printed."""
    graph, _ = program.copy_graph()
    change(graph)
    result = program.with_graph(graph)
    assert str(result) != str(program)
    return result


def changing(change: Callable[[fx.Graph, Setting], None]) -> PutBack:
    """Put a bug back into the local program."""
    return lambda it, _: edited(it.local, lambda graph: change(graph, it))


def before_sharding(change: Callable[[fx.Graph], None]) -> PutBack:
    """Put a bug back into the canonical program, before it is sharded."""
    return lambda it, _: sharded(it.plan, it.ranks)(edited(it.traced[1], change))


def patching(patch: Callable[[pytest.MonkeyPatch], None]) -> PutBack:
    """Put a bug back into moptrace while the program runs."""

    def put_back(it: Setting, monkeypatch: pytest.MonkeyPatch) -> Program:
        program = it.local
        patch(monkeypatch)
        return program

    return put_back


def overload(op: Any) -> Any:
    return op.default if isinstance(op, torch._ops.OpOverloadPacket) else op


def found(graph: fx.Graph, target: Any, of: str = "", axis: str = "") -> list[fx.Node]:
    """The calls of an operator, on a parameter whose name has ``of`` in it, along an axis."""
    nodes = [n for n in graph.nodes if n.target is overload(target)]
    if of:
        nodes = [n for n in nodes if re.search(of, str(n.args[0]))]
    nodes = [n for n in nodes if not axis or n.args[1] == axis]
    assert nodes, f"no {target} of {of!r} along {axis!r}"
    return nodes


def parameters(graph: fx.Graph, pattern: str) -> list[fx.Node]:
    nodes = [n for n in graph.nodes if n.op == "placeholder" and re.search(pattern, n.name)]
    assert nodes, f"no parameter like {pattern!r}"
    return nodes


def put(node: fx.Node, op: Any, *rest: Any) -> fx.Node:
    """Apply an operator to a node's result, for all that use it."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        new = node.graph.call_function(overload(op), (node, *rest))
    roles.set_value(new, roles.value(node))
    roles.copy_role(new, of=node, rule=rule_for(new))
    for user in users:
        user.replace_input_with(node, new)
    return new


def call(after: fx.Node, op: Any, *args: Any) -> fx.Node:
    with after.graph.inserting_after(after):
        new = after.graph.call_function(overload(op), args)
    roles.set_value(new, roles.value(after))
    roles.copy_role(new, of=after, rule=rule_for(new))
    return new


def converted(x: fx.Node, name: str, axis: str, it: Setting) -> fx.Node:
    """Tokens, in dimension 0, that a collective gathers or splits along an axis."""
    layout, row = it.local.layout, COLLECTIVES[name]
    placement = roles.placement(x)
    assert layout is not None and placement is not None and row.target is not None
    new = call(x, row.op, x, axis, 0, roles.tensor(x).shape[0] * layout.size(axis))
    said = layout.said_along(placement, axis)
    assert said is not None
    kind = Shard(0) if row.target is Shard else row.target()
    roles.set_role(new, placements=(said.with_kind(axis, kind),))
    return new


def scale_gradient(node: fx.Node, factor: float) -> None:
    """The same value, with a gradient that many times as large."""
    users = list(node.users)
    large = call(node, aten.mul.Scalar, node, factor)
    detached = call(large, aten.detach.default, node)
    rest = call(detached, aten.mul.Scalar, detached, factor - 1)
    same = call(rest, aten.sub.Tensor, large, rest)
    for user in users:
        user.replace_input_with(node, same)


def scale_value(node: fx.Node, factor: float) -> fx.Node:
    """A value that many times as large, with the same gradient."""
    users = list(node.users)
    detached = call(node, aten.detach.default, node)
    rest = call(detached, aten.mul.Scalar, detached, 1 - factor)
    other = call(rest, aten.sub.Tensor, node, rest)
    for user in users:
        user.replace_input_with(node, other)
    return other


def remove(node: fx.Node) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


# --- the bugs -------------------------------------------------------------------------------------

EXPERTS = r"block_(gate|up|down)(_bias)?$"  # parameters, as the graph calls them
OF_EXPERTS = r"gradient of layers\.0\.block\.(gate|up|down)(_bias)?:"
ROUTER = r"router_gate_weight$"
OF_ROUTER = r"gradient of layers\.0\.block\.router\.gate\.weight:"
OF_ATTENTION = r"gradient of layers\.0\.attention\."
RANKS_DIFFER = r"differs between rank 0 and rank \d"

IN_GROUPS = Setting("moe", 4, Plan(ep=2))
ALIKE = Setting("moe", 4, Plan(ep=2, edp="replicate"))
OVER_ALL = Setting("moe", 4, Plan(ep=4))
RING = Setting("moe", 4, Plan(ep=2, cp=2, context="ring", logits_bytes=0))
ULYSSES = Setting("moe", 4, Plan(ep=2, cp=2, context="ulysses"))
GATHER = Setting("moe", 4, Plan(ep=2, cp=2, context="gather"))
TENSOR = Setting("moe", 4, Plan(ep=2, tp=2))
LATENT = Setting("latent attention", 2, Plan(ep=1, tp=2))
HIDDEN_UNITS = Setting("moe", 4, Plan(ep=2, etp=2))
FUSED = Plan(ep=1, logits_bytes=0)
TWO_WAYS = Plan(ep=1, cp=2, logits_bytes=0)


def experts_times_ep(graph: fx.Graph, it: Setting) -> None:
    assert it.plan.ep
    for node in parameters(graph, EXPERTS):
        scale_gradient(node, it.plan.ep)


def no_sum_over_replicas(graph: fx.Graph, it: Setting) -> None:
    for node in found(graph, ops.vary, EXPERTS, "edp"):
        remove(node)


def sum_over_the_wrong_group(graph: fx.Graph, it: Setting) -> None:
    for node in found(graph, ops.vary, EXPERTS, "edp"):
        node.update_arg(1, "ep")


def router_called_whole(graph: fx.Graph, it: Setting) -> None:
    for node in found(graph, ops.all_gather, ROUTER):
        node.target = ops.all_gather_invariant.default


def router_detached(graph: fx.Graph, it: Setting) -> None:
    for node in found(graph, ops.all_gather, ROUTER):
        put(node, aten.detach)


def no_gradient_of(name: str) -> PutBack:
    """A collective without a backward."""
    row = collectives.COLLECTIVES[name]
    return patching(
        lambda patch: patch.setitem(collectives._BY_OP, row.op, replace(row, transpose=None))
    )


def leaking_slots(graph: fx.Graph, it: Setting) -> None:
    """Slots of experts that are elsewhere add nothing, but their weights get a gradient."""
    (node,) = found(graph, ops.combine)
    weights = node.args[2]
    assert isinstance(weights, fx.Node)
    scale_gradient(weights, 1.5)


def labels_of_the_wrong_slice(graph: fx.Graph, it: Setting) -> None:
    """Each rank takes a slice of the tokens of all sequences, and not one of each sequence."""
    for node in found(graph, ops.take_shard, axis="cp"):
        opened, joined = node.args[0], next(iter(node.users))
        assert isinstance(opened, fx.Node) and opened.target is aten.unflatten.int
        flat, length = opened.args[0], math.prod(roles.tensor(opened).shape[:2])
        node.args = (flat, "cp", 0, length)
        joined.replace_all_uses_with(node)
        graph.erase_node(joined)
        graph.erase_node(opened)


def mispaired(graph: fx.Graph, it: Setting) -> None:
    (node,) = found(graph, ops.combine)
    weights = node.args[2]
    assert isinstance(weights, fx.Node)
    node.update_arg(2, call(weights, aten.flip.default, weights, [1]))


def names_as_strings(it: Setting, _: pytest.MonkeyPatch) -> Program:
    program = it.local
    stacks = tuple(
        replace(p, stacked=tuple(sorted(p.stacked))) for p in program.signature.parameters
    )
    return replace(program, signature=replace(program.signature, parameters=stacks))


def rows_as_they_arrive(graph: fx.Graph, it: Setting) -> None:
    for op in (ops.group_rows, ops.ungroup_rows):
        for node in found(graph, op):
            remove(node)


def bias_without_its_weight(graph: fx.Graph) -> None:
    (node,) = found(graph, ops.combine)
    added, order, weights = node.args
    assert isinstance(added, fx.Node) and isinstance(weights, fx.Node)
    rows, bias = added.args
    node.update_arg(0, rows)
    users = list(node.users)
    ones = call(weights, aten.ones_like.default, weights)
    alone = call(node, ops.combine.default, bias, order, ones)
    total = call(alone, aten.add.Tensor, node, alone)
    for user in users:
        user.replace_input_with(node, total)


def last_one_wins(patch: pytest.MonkeyPatch) -> None:
    """What arrives with a load is dropped instead of added."""
    patch.setattr(rings, "_added", lambda one, other: other)


def shown_loss_halved(graph: fx.Graph, it: Setting) -> None:
    (results,) = graph.output_node().args
    assert isinstance(results, (tuple, list)) and isinstance(results[0], fx.Node)
    scale_value(results[0], 1 / it.plan.cp)


def reduced_twice(graph: fx.Graph, it: Setting) -> None:
    for node in found(graph, ops.all_gather, "embedding_weight$"):
        put(node, ops.vary, node.args[1])


def whole_weight_as_a_shard(graph: fx.Graph, it: Setting) -> None:
    """Every rank has the whole vocabulary, and the loss takes it for a part."""
    (node,) = found(graph, ops.ring_vocab_projection)
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    node.update_arg(1, call(weight, ops.all_gather.default, weight, it.home, 0, WORDS))
    node.update_arg(7, WORDS * it.ranks)


def smoothing_over_the_shard(graph: fx.Graph, it: Setting) -> None:
    (node,) = [n for n in found(graph, aten.mul.Tensor) if n.args[1] == 0.1 / WORDS]
    node.update_arg(1, 0.1 / -(-WORDS // it.ranks))


def local_shift(patch: pytest.MonkeyPatch) -> None:
    """Probabilities over the words of one shard instead of the whole vocabulary."""
    whole, statistics = rings.vocab_shard_gradients, rings.vocab_shard_statistics

    def of_the_shard(
        hidden: Tensor, weight: Tensor, targets: Tensor, *bias: Tensor, **how: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = {k: how[k] for k in ("start", "scale", "softcap")}
        own = statistics(hidden, weight, targets, *bias, **options)
        how["shift"] = rings.log_sum_exp(own)
        return whole(hidden, weight, targets, *bias, **how)

    patch.setattr(rings, "vocab_shard_gradients", of_the_shard)


def offset_of_the_wrong_shard(patch: pytest.MonkeyPatch) -> None:
    right_one = rings._Vocabulary.start
    patch.setattr(rings._Vocabulary, "start", lambda self, holder: right_one(self, self.seat.at))


def means(graph: fx.Graph) -> list[fx.Node]:
    """Losses as a sum over all ranks divided by a count over all ranks."""
    reduced = ops.all_reduce_invariant.default
    nodes = [n for n in found(graph, aten.div.Tensor) if isinstance(n.args[1], fx.Node)]
    assert nodes and all(x.target is reduced for n in nodes for x in n.all_input_nodes)
    return nodes


def mean_of_means(graph: fx.Graph, it: Setting) -> None:
    """Each rank divides by the number of its own labels."""
    for node in means(graph):
        total, count = node.all_input_nodes
        node.args = (total.args[0], count.args[0])
        put(put(node, ops.all_reduce_invariant, it.home), aten.div.Tensor, it.ranks)


def last_count_times_cp(graph: fx.Graph, it: Setting) -> None:
    node = means(graph)[-1]
    count = node.args[1]
    assert isinstance(count, fx.Node)
    node.update_arg(1, call(count, aten.mul.Tensor, count, it.plan.cp))


def updates(graph: fx.Graph, buffer: str) -> fx.Node:
    """What all ranks add to a buffer."""
    (node,) = [n for n in found(graph, aten.add.Tensor) if str(n.args[0]) == buffer]
    reduced = node.args[1]
    assert isinstance(reduced, fx.Node)
    return reduced


def seen_times_cp(graph: fx.Graph, it: Setting) -> None:
    put(updates(graph, "seen"), aten.mul.Tensor, it.plan.cp)


def counts_of_each_rank(graph: fx.Graph, it: Setting) -> None:
    remove(updates(graph, "words"))


def counts_of_each_rank_of_tp(graph: fx.Graph, it: Setting) -> None:
    """Counts are reduced over ``dp`` alone."""
    updates(graph, "words").update_arg(1, "dp")


def counts_reduced_in_place_and_again(graph: fx.Graph, it: Setting) -> None:
    put(updates(graph, "words"), ops.all_reduce_invariant, it.home)


def exchanged_on_the_wrong_axis(graph: fx.Graph, it: Setting) -> None:
    """Ulysses splits the tokens once more and joins the heads, where it should do the reverse."""
    for node in found(graph, ops.all_to_all, axis="cp"):
        x, axis, split, cut, join, length = node.args
        node.args = (x, axis, join, cut, split, length)


def gathered_on_the_wrong_axis(graph: fx.Graph, it: Setting) -> None:
    """Heads are gathered where tokens should be: a rank's tokens attend to one another alone."""
    (attention,) = found(graph, aten.scaled_dot_product_attention)
    for node in attention.all_input_nodes:
        heads = roles.tensor(node).shape[1]
        node.args = (node.args[0], "cp", 1, heads * it.plan.cp)


def balance_of_dp(graph: fx.Graph, it: Setting) -> None:
    """The auxiliary loss averages over the ranks that split sequences, and forgets ``cp``."""
    nodes = [n for n in found(graph, aten.div.Tensor) if n.args[1] == it.ranks]
    assert len(nodes) == 2
    for node in nodes:
        node.update_arg(1, it.ranks // it.plan.cp)


def balance_of_each_rank(graph: fx.Graph, it: Setting) -> None:
    """The auxiliary loss is that of each rank's own tokens, averaged."""
    first, second = [n for n in found(graph, aten.div.Tensor) if n.args[1] == it.ranks]
    (reduced,) = first.users
    (product,) = reduced.users
    product.args = (first.args[0], second.args[0])
    put(put(product, ops.all_reduce_invariant, it.home), aten.div.Tensor, it.ranks)


def sequences_as_one(graph: fx.Graph, it: Setting) -> None:
    """The tokens of all of a rank's sequences count as those of one."""
    for node in [n for n in found(graph, aten.mean.dim) if n.args[1] == [1]]:
        node.replace_all_uses_with(call(node, aten.mean.dim, node.args[0], [0, 1], True))
        graph.erase_node(node)


def balance(graph: fx.Graph) -> fx.Node:
    """The auxiliary loss with its coefficient."""
    (node,) = [n for n in found(graph, aten.mul.Tensor) if n.args[1] == MOE.balance]
    return node


def balance_by_own_tokens(graph: fx.Graph, it: Setting) -> None:
    """The gradient of the auxiliary loss is scaled by the tokens of one rank of ``tp``."""
    scale_gradient(balance(graph), 1 / it.plan.tp)


def tokens_called_whole(graph: fx.Graph, it: Setting) -> None:
    """Of tokens that ranks of ``etp`` gathered, the gradient of own hidden units is all."""
    (dispatch,), (combine,) = found(graph, ops.dispatch), found(graph, ops.combine)
    for node in (dispatch.args[0], combine.args[2]):
        assert isinstance(node, fx.Node) and node.target is ops.all_gather.default
        node.target = ops.all_gather_invariant.default


def own_rows(parts: list[Tensor], sizes: tuple[int, ...], tables: list[Tensor]) -> list[Tensor]:
    """What a rank has of its own rows, where the terms of all ranks should be added up."""
    apart = [routing.ungroup_rows(part, tables[0]) for part in parts]
    return [x.split(tables[0].sum(1).tolist())[at] for at, x in enumerate(apart)]


def rows_called_whole(patch: pytest.MonkeyPatch) -> None:
    """The same of rows."""
    gather, scatter = COLLECTIVES["all_gather_rows"], COLLECTIVES["reduce_scatter_rows"]
    patch.setitem(COLLECTIVES, "own_rows", replace(scatter, name="own_rows", meaning=own_rows))
    patch.setitem(collectives._BY_OP, gather.op, replace(gather, transpose="own_rows"))


def shared_key_called_whole(graph: fx.Graph, it: Setting) -> None:
    """The gradient that a rank's heads give the key that all heads share is all of it."""
    gathers = found(graph, ops.all_gather)
    (node,) = [n for n in gathers if any(u.target is aten.expand.default for u in n.users)]
    node.target = ops.all_gather_invariant.default


def experts_of_the_same_tokens(graph: fx.Graph, it: Setting) -> None:
    """All ranks of ``tp`` have the same tokens, and each sends all of them to their experts."""
    (dispatch,), (combine,) = found(graph, ops.dispatch), found(graph, ops.combine)
    users = list(combine.users)
    for node, at in ((dispatch, 0), (dispatch, 1), (combine, 2)):
        own = node.args[at]
        assert isinstance(own, fx.Node)
        node.update_arg(at, converted(own, "all_gather_invariant", "tp", it))
    own = converted(combine, "take_shard", "tp", it)
    for user in users:
        user.replace_input_with(combine, own)


def router_of_the_same_tokens(graph: fx.Graph, it: Setting) -> None:
    """All ranks of ``tp`` route the same tokens, and the router's gradients are added up."""
    (weight,) = found(graph, ops.all_gather, ROUTER)
    (linear,) = weight.users
    users, own = list(linear.users), linear.args[0]
    assert isinstance(own, fx.Node)
    linear.update_arg(0, converted(own, "all_gather_invariant", "tp", it))
    routed = converted(linear, "take_shard", "tp", it)
    for user in users:
        user.replace_input_with(linear, routed)


def scattered_on_the_wrong_axis(graph: fx.Graph, it: Setting) -> None:
    """Sums are scattered along the hidden dimension, and a view takes that for tokens."""
    node = found(graph, ops.reduce_scatter, axis="tp")[0]
    shape = list(roles.tensor(node).shape)
    node.args = (node.args[0], "tp", 2, shape[2])
    put(node, aten.reshape, shape)


def sum_over_the_group_of_tokens(graph: fx.Graph, it: Setting) -> None:
    for node in found(graph, ops.vary, EXPERTS, "edp"):
        node.update_arg(1, "dp")


def bias_before_the_sum(graph: fx.Graph, it: Setting) -> None:
    """Each rank of ``etp`` adds the second bias to its terms of all their rows."""
    (scatter,), (rows,) = found(graph, ops.reduce_scatter_rows), found(graph, ops.all_gather_rows)
    (added,) = [user for user in scatter.users if user.target is aten.add.Tensor]
    product, bias = scatter.args[0], added.args[1]
    assert isinstance(product, fx.Node) and isinstance(bias, fx.Node)
    terms = call(bias, ops.expert_rows, bias.args[0], product.args[2], rows)
    roles.set_role(terms, placements=roles.placements(rows))
    total = call(terms, aten.add.Tensor, product, terms)
    roles.set_role(total, placements=roles.placements(product))
    added.replace_all_uses_with(call(total, ops.reduce_scatter_rows, total, *scatter.args[1:]))
    graph.erase_node(added)


def tied_twice(graph: fx.Graph, it: Setting) -> None:
    """The gradient of a tied weight counts once for each of its names."""
    for node in parameters(graph, "^embedding_weight$"):
        scale_gradient(node, 2)


CASES = (
    Case(
        "pytorch#160285, titan#1551, titan#1793",
        IN_GROUPS, changing(experts_times_ep), OF_EXPERTS, silent=True, times=2,
    ),
    Case("Megatron#5956", OVER_ALL, changing(experts_times_ep), OF_EXPERTS, silent=True, times=4),
    Case(
        "Automodel#3135", ALIKE, changing(no_sum_over_replicas), RANKS_DIFFER, refused=True,
    ),
    Case(
        "Megatron#1628, Megatron#6080",
        Setting("few experts", 4, Plan(ep=2, edp="replicate")),
        changing(sum_over_the_wrong_group), RANKS_DIFFER, refused=True,
    ),
    Case(
        "titan#2416", IN_GROUPS, changing(router_called_whole), OF_ROUTER, silent=True,
        refused=True,
    ),
    Case(
        "transformers#48205, partial sums", IN_GROUPS, no_gradient_of("send_rows"), OF_ATTENTION,
        silent=True,
    ),
    Case("Automodel#2995, router", IN_GROUPS, changing(router_detached), OF_ROUTER, silent=True),
    Case("transformers#48687", IN_GROUPS, changing(leaking_slots), OF_ROUTER, silent=True),
    Case(
        "titan#3604", RING, changing(labels_of_the_wrong_slice), "loss:", refused=True,
        hidden_in=replace(RING, size=2, ignored=""),
    ),
    Case("transformers#45473", IN_GROUPS, changing(mispaired), "loss:"),
    Case(
        "titan#1918", Setting("twelve experts", 4, Plan(ep=2)), names_as_strings, "loss:",
        hidden_in=Setting("ten experts", 4, Plan(ep=2)),
    ),
    Case(
        "Megatron!2824", Setting("few experts", 4, Plan(ep=2)), changing(rows_as_they_arrive),
        "loss:", refused=True, hidden_in=Setting("few experts", 4, Plan(ep=4)),
    ),
    Case("Megatron#5850", IN_GROUPS, before_sharding(bias_without_its_weight), "loss:"),
    Case(
        "Megatron#1764", Setting("words", 4, Plan(ep=1, cp=2), ignored="half"),
        changing(mean_of_means), "loss:", refused=True,
        hidden_in=Setting("words", 4, Plan(ep=1, cp=2), ignored=""),
    ),
    Case(
        "titan#3412", Setting("words", 4, FUSED), patching(last_one_wins), "gradient of heads",
        silent=True,
    ),
    Case(
        "titan#3412, tokens", Setting("words", 4, FUSED, size=4, length=3),
        patching(last_one_wins), r"gradient of embedding\.weight:", silent=True,
    ),
    Case(
        "titan#3280, titan#3329", Setting("words", 4, TWO_WAYS), changing(shown_loss_halved),
        "loss:", times=1 / 2,
    ),
    Case(
        "titan#3822", Setting("words", 4, FUSED), changing(reduced_twice),
        r"gradient of embedding\.weight:", silent=True, refused=True, times=4,
    ),
    Case(
        "Megatron#7452-2", Setting("words", 4, FUSED), changing(whole_weight_as_a_shard), "loss:",
        refused=True, more=math.log(4),
    ),
    Case(
        "Megatron#737", Setting("smoothed words", 4, FUSED), changing(smoothing_over_the_shard),
        "loss:",
    ),
    Case(
        "ml-cross-entropy#42", Setting("words", 4, FUSED), patching(local_shift),
        r"gradient of embedding\.weight:", silent=True,
    ),
    Case(
        "ml-cross-entropy#42, offset", Setting("words", 4, FUSED),
        patching(offset_of_the_wrong_shard), "loss:",
    ),
    Case(
        "titan#2206", Setting("words", 4, Plan(ep=1)), changing(mean_of_means), "loss:",
        refused=True, hidden_in=Setting("words", 4, Plan(ep=1), ignored=""),
    ),
    Case(
        "Megatron#3959, Megatron#7498", Setting("words further ahead", 4, Plan(ep=1, cp=2)),
        changing(last_count_times_cp), r"gradient of heads\.1\.weight:",
    ),
    Case(
        "titan#3257, titan#2990", Setting("counted words", 4, Plan(ep=1, cp=2)),
        changing(seen_times_cp), "buffer seen:", silent=True,
    ),
    Case(
        "titan#3206", ULYSSES, changing(exchanged_on_the_wrong_axis), "loss:", refused=True,
    ),
    Case(
        "titan#3681", GATHER, changing(gathered_on_the_wrong_axis), "loss:", refused=True,
    ),
    Case(
        "Megatron#1464", RING, patching(last_one_wins), OF_ATTENTION, silent=True,
    ),
    Case("Megatron#2237", RING, changing(balance_of_dp), "loss:"),
    Case("Megatron#5798", IN_GROUPS, changing(balance_of_each_rank), "loss:", refused=True),
    Case(
        "titan#4154", Setting("counted words", 4, Plan(ep=1)), changing(counts_of_each_rank),
        "the buffer words differs", refused=True,
    ),
    Case(
        "titan#4154, tensor parallel", Setting("counted words", 4, Plan(ep=1, tp=2)),
        changing(counts_of_each_rank_of_tp), "the buffer words differs", refused=True,
    ),
    Case(
        "Megatron#7452-10", Setting("counted words", 4, Plan(ep=1)),
        changing(counts_reduced_in_place_and_again), "buffer words:", silent=True, refused=True,
        times=4,
    ),
    Case(
        "Megatron#5696", Setting("balanced sequences", 4, Plan(ep=1)), changing(sequences_as_one),
        "loss:", refused=True,
        hidden_in=Setting("balanced sequences", 4, Plan(ep=1), size=4),
    ),
    Case(
        "Megatron#5047", TENSOR, changing(balance_by_own_tokens), OF_ROUTER, silent=True,
        hidden_in=IN_GROUPS,
    ),
    Case(
        "titan#4054", Setting("moe", 2, Plan(ep=1, etp=2, dispatcher="all-gather")),
        changing(tokens_called_whole), OF_ROUTER, silent=True, refused=True,
    ),
    Case("titan#1878", HIDDEN_UNITS, patching(rows_called_whole), OF_ATTENTION, silent=True),
    Case(
        "titan#1373", LATENT, changing(shared_key_called_whole),
        r"gradient of layers\.0\.attention\.shared\.", silent=True, refused=True,
    ),
    Case(
        "Automodel#2995, tokens", TENSOR, changing(experts_of_the_same_tokens), OF_EXPERTS,
        silent=True, refused=True, times=2,
    ),
    Case(
        "DeepSpeed#8064", TENSOR, changing(router_of_the_same_tokens), OF_ROUTER, silent=True,
        refused=True, times=2,
    ),
    Case(
        "DeepSpeed#8195", TENSOR, changing(scattered_on_the_wrong_axis), "loss:", refused=True,
    ),
    Case(
        "Megatron!2564", Setting("few experts", 4, Plan(ep=1, etp=2, edp="replicate")),
        changing(sum_over_the_group_of_tokens), OF_EXPERTS, silent=True, refused=True,
        hidden_in=Setting("few experts", 4, Plan(ep=1, etp=2, tp=2, edp="replicate")),
    ),
    Case("titan#4245", HIDDEN_UNITS, changing(bias_before_the_sum), "loss:", refused=True),
    Case(
        "titan#3174", Setting("tied words", 4, FUSED), changing(tied_twice),
        r"gradient of (embedding|heads\.0)\.weight:", silent=True, times=2,
    ),
)  # fmt: skip

by_report = pytest.mark.parametrize("case", CASES, ids=lambda case: case.reports)


@by_report
def test_the_step_is_right(case: Case) -> None:
    for it in (case.setting, case.hidden_in):
        if it is not None:
            assert_same_step(it.step(it.local), right(it))
            assert not refused(it.local)


@by_report
def test_the_bug_put_back_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    it = case.setting
    broken = case.put_back(it, monkeypatch)
    assert case.refused in (refused(broken), None)
    wrong = noticed(it, broken, case.times or 1)
    assert any(re.search(case.wrong, name) for name in wrong), wrong
    if case.silent:
        assert "loss:" not in wrong
    if case.more:
        loss = right(it).loss + case.more
        torch.testing.assert_close(it.step(broken).loss, loss, rtol=1e-12, atol=0)
    if case.times:
        assert all(re.search(case.wrong, name) for name in wrong), wrong


def noticed(it: Setting, program: Program, times: float) -> list[str]:
    """What the comparison finds wrong, each so many times too large where there is a number."""
    try:
        have = it.step(program)
    except AssertionError as error:  # a value that the ranks should share
        return [str(error)]
    want = right(it)
    with pytest.raises(AssertionError, match="values differ"):
        assert_same_step(have, want)
    pairs = [(f"gradient of {k}:", have.gradients[k], v) for k, v in want.gradients.items()]
    pairs += [(f"buffer {k}:", v, want.buffers[k]) for k, v in have.buffers.items()]
    pairs += [("loss:", have.loss, want.loss)]
    wrong = [(name, a, b) for name, a, b in pairs if not torch.allclose(a, b, 1e-9, 1e-12)]
    if times != 1:
        assert all(torch.allclose(a, b * times, 1e-9, 1e-12) for _, a, b in wrong)
    return [name for name, _, _ in wrong]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.hidden_in], ids=lambda case: case.reports
)
def test_where_the_bug_does_not_show(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the setting in which it is noticed is needed."""
    it = case.hidden_in
    assert it is not None
    assert_same_step(it.step(case.put_back(it, monkeypatch)), right(it))


# --- experts without tokens -----------------------------------------------------------------------


class LeavesOut(torch.optim.SGD):
    """As if an expert that no token chose had the gradient None."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.grad.any():
                    parameter.grad = None
        super().step(closure)


def test_automodel_2995_experts_without_tokens() -> None:
    """Their gradient is zeros and not None, so momentum and weight decay reach them."""
    model = ModelSpec(style="loop_where", experts=4, k=1, router="one_for_all").build()
    program = sharded(Plan(ep=4), 4)(canonical()(trace(model, some_batch(0, 8, 4))))
    batches = [some_batch(seed, 8, 4, "some") for seed in (1, 2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    assert_same_training(program, model, batches, partial(torch.optim.SGD, **options))
    _, want = eager_training(model, batches, partial(torch.optim.SGD, **options))
    _, have = simulated_training(
        program, whole_state(model), batches, partial(LeavesOut, **options)
    )
    with pytest.raises(AssertionError, match=r"experts\.\d"):
        experts = {name: value for name, value in have.items() if "experts" in name}
        assert_same_weights(experts, want)


def test_transformers_48205_rows_past_the_last_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that leave rows over are an error, not rows that nobody wrote."""

    def short(graph: fx.Graph) -> None:
        for node in found(graph, aten.sum.dim_IntList):
            if node.args[0].target is ops.exchange_counts.default:  # type: ignore[union-attr]
                put(node, aten.clamp, None, 1)

    it = Setting("no biases", 4, Plan(ep=2))
    assert_same_step(it.step(it.local), right(it))
    broken = edited(it.local, short)
    with pytest.raises(ValueError, match="the counts add up to"):
        it.step(broken)
    kernels = importlib.import_module("moptrace.kernels.grouped_mm")
    monkeypatch.setattr(kernels, "_sizes", lambda counts, total: counts.tolist())
    with pytest.raises(AssertionError, match="differ"):
        assert_same_step(it.step(broken), right(it))


def test_transformers_48687_pairs_without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of a dropped pair gets no gradient, and what no pair's slot holds goes nowhere."""
    experts = torch.tensor([[0, 1], [0, 2], [3, 1]])  # of three: the third token's first is dropped

    def gradients() -> tuple[Tensor, Tensor]:
        x, weights = torch.rand(3, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True)
        rows, _, order = routing.dispatch(x, experts, 3, True, None, 2)
        written = (order < experts.numel()).unsqueeze(1)
        result = routing.combine(rows.where(written, torch.nan), order, weights, True)
        of_x, of_weights = torch.autograd.grad(result.sum(), [x, weights])
        assert result.isfinite().all() and of_x.isfinite().all()
        return of_x, of_weights

    assert gradients()[1][2, 0] == 0
    monkeypatch.setattr(aten_routing, "_choices", with_the_first_row)
    assert gradients()[1][2, 0] != 0


def with_the_first_row(
    rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool
) -> Iterator[Tensor]:
    position = order.new_zeros(tokens * choices + 1).scatter(0, order, torch.arange(len(order)))
    for j in range(choices):
        yield rows[position[:-1].view(tokens, choices)[:, j]]


# --- steps ----------------------------------------------------------------------------------------

LEARNING_RATE = 1.0  # so that a step subtracts the raw gradients


def steps(it: Setting, program: Program, accumulate: int = 1) -> SimulatedSteps:
    """Training steps that report the norm, and clip nothing."""
    whole = whole_state(it.traced[0])
    return SimulatedSteps(
        program,
        whole,
        lambda named: torch.optim.SGD([*named.values()], LEARNING_RATE),
        max_norm=math.inf,
        accumulate=accumulate,
    )


def test_automodel_3359_the_auxiliary_loss_of_micro_batches() -> None:
    """It is averaged over them; added up, its gradient is too large, and the loss is right."""
    it = Setting("few experts", 2, Plan(ep=2))
    sgd = partial(torch.optim.SGD, lr=LEARNING_RATE)
    _, want = eager_training(it.traced[0], [it.batch], sgd)

    def after_one(program: Program, micro_batches: int) -> dict[str, Tensor]:
        made = steps(it, program, micro_batches)
        loss, _ = made.step(*[it.batch] * micro_batches)
        torch.testing.assert_close(loss, right(it).loss, rtol=1e-12, atol=0)
        return made.weights()

    def added_up(micro_batches: int) -> Program:
        return edited(it.local, lambda graph: scale_gradient(balance(graph), micro_batches))

    assert_same_weights(after_one(it.local, 2), want)
    assert_same_weights(after_one(added_up(1), 1), want)
    with pytest.raises(AssertionError, match=r"router\.gate\.weight"):
        assert_same_weights(after_one(added_up(2), 2), want)


def test_megatron_7530_the_norm_has_the_sinks_of_all_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each rank of ``tp`` has those of its own heads; with the first rank's alone it is less."""
    it = LATENT
    want = nn.utils.get_total_norm(list(right(it).gradients.values()))
    _, norm = steps(it, it.local).step(it.batch)
    torch.testing.assert_close(norm, want, rtol=1e-12, atol=0)

    clipping = importlib.import_module("moptrace.passes.clip_gradients")
    whole = clipping._norm
    at = [p.fqn.endswith("sinks") for p in it.local.signature.parameters].index(True)

    def of_the_first(gradients: list[Tensor], *how: Any) -> Tensor:
        first = COLLECTIVES["count_once"].op(gradients[at], "tp")
        return whole([*gradients[:at], first, *gradients[at + 1 :]], *how)

    monkeypatch.setattr(clipping, "_norm", of_the_first)
    _, less = steps(it, it.local).step(it.batch)
    assert less is not None and less < want * (1 - 1e-6)


# --- labels ---------------------------------------------------------------------------------------

LOSSES = {"whole logits": Plan(ep=1), "ring": FUSED, "ring, cp": TWO_WAYS}


@pytest.mark.parametrize("label", [WORDS, -1])
@pytest.mark.parametrize("loss", LOSSES)
def test_titan_4297_a_label_that_does_not_exist(loss: str, label: int) -> None:
    """An error as on one device, and not a loss of zero with a gradient."""
    it = Setting("words", 4, LOSSES[loss])
    model, _ = it.traced
    fed = it.batch
    fed["labels"][5, 2] = label
    for run in (partial(eager_step, model), partial(simulated_step, it.local, whole_state(model))):
        with pytest.raises(IndexError):
            run(fed)
    if loss == "whole logits":
        return

    def unchecked(graph: fx.Graph) -> None:
        (node,) = found(graph, ops.kept_tokens)
        node.target, node.args = aten.ne.Scalar, (node.args[0], -100)

    silent = simulated_step(edited(it.local, unchecked), whole_state(model), fed)
    assert silent.loss.isfinite()


@pytest.mark.parametrize("loss", LOSSES)
def test_aiter_5165_no_label_at_all(loss: str) -> None:
    """The loss is that of one device, 0 / 0; a count that is kept above zero hides it."""
    it = Setting("words", 4, LOSSES[loss], ignored="all")
    model, _ = it.traced
    fed = {**it.batch, "labels": torch.full_like(it.batch["labels"], -100)}
    have, want = simulated_step(it.local, whole_state(model), fed), eager_step(model, fed)
    assert want.loss.isnan()
    torch.testing.assert_close(have.loss, want.loss, equal_nan=True)
    torch.testing.assert_close(have.gradients, want.gradients, equal_nan=True)

    def at_least_one(graph: fx.Graph) -> None:
        (node,) = means(graph)
        count = node.args[1]
        assert isinstance(count, fx.Node)
        node.update_arg(1, call(count, aten.clamp.default, count, 1))

    hidden = simulated_step(edited(it.local, at_least_one), whole_state(model), fed)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(hidden.loss, want.loss, equal_nan=True)


# --- frozen parameters ----------------------------------------------------------------------------


def test_deepspeed_8214_frozen_parameters() -> None:
    """They have no gradient, and keep their values; trained by mistake, they would shrink."""
    it = Setting("frozen", 4, Plan(ep=2))
    model, _ = it.traced
    frozen_names = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen_names) == 3
    have = it.step(it.local)
    assert_same_step(have, right(it))
    assert set(have.gradients) == set(right(it).gradients)
    assert not frozen_names & set(have.gradients)
    decay = partial(torch.optim.SGD, lr=0.1, weight_decay=0.1)
    assert_same_training(it.local, model, [it.batch], decay)
    trained = tuple(replace(p, requires_grad=True) for p in it.local.signature.parameters)
    broken = replace(it.local, signature=replace(it.local.signature, parameters=trained))
    assert set(it.step(broken).gradients) > set(right(it).gradients)
    with pytest.raises(AssertionError, match="embedding"):
        assert_same_training(broken, model, [it.batch], decay)


# --- real ranks: norms and checkpoints ------------------------------------------------------------

SAVED = ModelSpec(style="loop_where", experts=5, tied=True)


def on_rank(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What a rank finds after one step, and with bugs put back."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from moptrace import ParallelModule, parallelize

    original = SAVED.build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    example = {k: v[: len(v) // dist.get_world_size()] for k, v in batch.items()}
    wrapped = parallelize(copy.deepcopy(original), mesh, Plan(ep=2), batch=example)
    update = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    wrapped(**wrapped.local_batch(batch))[0].backward()
    named = dict(wrapped.named_parameters())

    def norm(of: list[nn.Parameter]) -> Tensor:
        total = nn.utils.clip_grad_norm_(of, max_norm=1e9)
        return total.full_tensor() if isinstance(total, DTensor) else total

    facts: dict[str, Any] = {
        "norm": norm(list(named.values())),
        "norm without experts": norm([p for name, p in named.items() if "experts" not in name]),
    }
    update.step()
    facts["state"] = wrapped.full_state_dict()
    (stack,) = [p for name, p in named.items() if "stacked.gate.weight" in name]
    assert isinstance(stack, DTensor)
    guessed = DTensor.from_local(
        stack.to_local().detach(), stack.device_mesh, stack.placements, run_check=False
    )
    facts["shape"], facts["shape without metadata"] = tuple(stack.shape), tuple(guessed.shape)

    whole = ParallelModule._gather

    def of_one_expert_rank(self: ParallelModule, held: Tensor, parameter: Any) -> Tensor:
        if not parameter.stacked:
            return whole(self, held, parameter)
        held = held.to_local()  # type: ignore[attr-defined]
        placement = self.layout.normalised(self._stored[parameter.name])
        place = collectives.COLLECTIVES["place_shard"].op
        with self._communicator:
            for axis in placement.view.axes:
                for dim in range(held.dim()):
                    if axis in placement.axes_of_dim(dim):
                        held = place(held, axis.name, dim, parameter.shape[dim])
        return held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParallelModule, "_gather", of_one_expert_rank)
        facts["state of one expert rank"] = wrapped.full_state_dict()

    other = {name: value + 1 for name, value in facts["state"].items()}
    missing = {name: value for name, value in other.items() if "experts.4.up" not in name}
    with contextlib.suppress(KeyError):
        wrapped.load_full_state_dict(missing)
        facts["loaded without an expert"] = True
    facts["state after a refusal"] = wrapped.full_state_dict()
    wrapped.load_full_state_dict(facts["state"] | missing)
    facts["state with an expert left out"] = wrapped.full_state_dict()
    wrapped.load_full_state_dict(other)
    facts["other"] = wrapped.full_state_dict()
    return facts


@pytest.fixture(scope="module")
def fed() -> dict[str, Tensor]:
    return some_batch(1, 8, 4, "some")


@pytest.fixture(scope="module")
def facts(ranks: Callable[[int], Ranks], fed: dict[str, Tensor]) -> dict[str, Any]:
    """What every rank found; all of them the same."""
    first, second = ranks(2)(on_rank, fed)
    for name in ("norm", "state", "other"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    return first


def test_megatron_5916_the_norm_has_the_experts(
    facts: dict[str, Any], fed: dict[str, Tensor]
) -> None:
    model = SAVED.build()
    gradients = eager_step(model, fed).gradients
    once = [gradients[name] for name, _ in model.named_parameters()]
    want = torch.nn.utils.get_total_norm(once)
    torch.testing.assert_close(facts["norm"], want, rtol=1e-12, atol=0)
    assert not torch.allclose(facts["norm without experts"], want, rtol=1e-3)


def after_a_step(fed: dict[str, Tensor]) -> dict[str, Tensor]:
    _, weights = eager_training(SAVED.build(), [fed], partial(torch.optim.SGD, lr=0.1))
    return weights


def test_kempnerforge_202_all_expert_ranks_are_saved(
    facts: dict[str, Any], fed: dict[str, Tensor]
) -> None:
    want = after_a_step(fed)
    assert set(facts["state"]) == set(SAVED.build().state_dict())
    assert_same_weights(facts["state"], want)
    with pytest.raises(AssertionError, match=r"experts\.\d"):
        assert_same_weights(facts["state of one expert rank"], want)


def test_titan_2227_a_dtensor_knows_its_shape(facts: dict[str, Any]) -> None:
    """Five experts on two ranks: what a shard's own shape suggests is six."""
    assert facts["shape"] == (5, SAVED.hidden, SAVED.width)
    assert facts["shape without metadata"] != facts["shape"]


def test_titan_3764_both_names_of_a_tied_weight_are_saved(
    facts: dict[str, Any], fed: dict[str, Tensor]
) -> None:
    """With one value, that of after the step; a name that kept the value of before is noticed."""
    names, want = ("embedding.weight", "head.weight"), after_a_step(fed)
    for saved in (facts["state"], facts["other"]):
        assert torch.equal(*(saved[name] for name in names))
    assert_same_weights({name: facts["state"][name] for name in names}, want)
    stale = {**facts["state"], "head.weight": SAVED.build().state_dict()["head.weight"]}
    with pytest.raises(AssertionError, match=r"head\.weight"):
        assert_same_weights(stale, want)


def test_automodel_2682_a_state_without_an_expert_is_refused(facts: dict[str, Any]) -> None:
    """And changes nothing; filled up with what was there, it is another model."""
    assert "loaded without an expert" not in facts
    assert_same_weights(facts["state after a refusal"], facts["state"], tolerance=0.0)
    want = {name: value + 1 for name, value in facts["state"].items()}
    assert_same_weights(facts["other"], want, tolerance=0.0)
    with pytest.raises(AssertionError, match=r"experts\.4\.up"):
        assert_same_weights(facts["state with an expert left out"], want)


# --- the table ------------------------------------------------------------------------------------


def test_the_table_names_every_test() -> None:
    table = (Path(__file__).parent / "regressions.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", table))
    own = {name for name in globals() if re.match(r"test_[a-z]+_\d+_", name)}
    assert own <= named <= set(globals())
    assert {case.reports for case in CASES} == set(re.findall(r"`([\w-]+[#!]\d[^`]*)`", table))
