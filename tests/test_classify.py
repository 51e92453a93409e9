"""Classification: every node has a component, found by operators and data flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import models
from moptrace import roles
from moptrace.core import Level, Program
from moptrace.errors import PassError
from moptrace.passes.classify import classify
from moptrace.passes.raise_experts import raise_experts
from moptrace.roles import Component
from moptrace.trace import trace
from sweeps import sweep

aten = torch.ops.aten
FAMILIES = [f"{family}, grouped_mm" for family in models.FAMILIES]
# One of each way to compute experts; tests/test_raise_experts.py brings all to one spelling.
QUICK = [
    *FAMILIES, "dense", "LoopWhere", "SortSlices", "OneHotEinsum", "DenseEinsum",
    "LoopSkipEmpty, tied", "LoopWhere, balanced", "SortSlices, balanced",
]  # fmt: skip
STYLES = sweep([*models.MODELS, *FAMILIES, "dense"], quick=QUICK)


def classified(model: nn.Module, batch: Any = None, **options: Any) -> Program:
    return classify()(raise_experts()(trace(model, batch or models.batch(0), **options)))


@cache
def built(style: str) -> Program:
    return classified(models.build(style))


def parameters(program: Program) -> dict[str, tuple[Component | None, int | None]]:
    """Component and block of every parameter that the graph reads, by name."""
    nodes = {n.name: n for n in program.nodes if n.op == "placeholder" and n.users}
    return {
        p.fqn: (roles.component(nodes[p.name]), roles.role(nodes[p.name]).block)
        for p in program.signature.parameters
        if p.name in nodes
    }


def of(program: Program, target: Any) -> list[fx.Node]:
    return [n for n in program.nodes if getattr(n.target, "overloadpacket", None) is target]


@pytest.mark.parametrize("style", STYLES)
def test_every_node_has_a_component(style: str):
    program = built(style)
    assert program.level is Level.CANONICAL
    for node in program.nodes:
        if node.op == "call_function":
            assert roles.component(node) is not None, node.format_node()


# The last word but one of a parameter's name says what our own test models and Hugging Face's
# mean by it. Classification never reads names, so they can check it.
MEANS: list[tuple[str, Component]] = [
    ("embed", Component.EMBEDDING),
    ("head", Component.VOCAB),
    ("shared", Component.SHARED_EXPERT),
    ("routed.w", Component.EXPERTS),
    ("routed.b", Component.EXPERTS),
    ("experts.", Component.EXPERTS),
    ("feed_forward.b", Component.EXPERTS),
    ("router", Component.ROUTER),
    ("mlp.gate.", Component.ROUTER),
    ("attention_norm", Component.NORM),
    ("layernorm", Component.NORM),
    ("attention", Component.ATTENTION),
    ("self_attn", Component.ATTENTION),
    ("norm", Component.NORM),
]
INNER = ("q_a_layernorm", "kv_a_layernorm", "q_norm", "k_norm")  # norms inside of attention
SEVERAL = {  # parameters that two components read, and so are nobody's
    "LoopSkipEmpty, tied": {"embedding.weight"},
    "LoopWhere, balanced": {f"layers.{i}.feed_forward.router.gate.weight" for i in (0, 1)},
    "SortSlices, balanced": {"layers.1.feed_forward.router.gate.weight"},
}


@pytest.mark.parametrize("style", STYLES)
def test_parameters_get_the_component_that_their_names_say(style: str):
    for name, (component, _) in parameters(built(style)).items():
        if name in SEVERAL.get(style, set()):
            assert component is None, name
            continue
        if any(inner in name for inner in INNER):
            assert component in (Component.ATTENTION, Component.NORM), name
            continue
        expected = next((means for part, means in MEANS if part in name), None)
        if expected is not None:
            assert component is expected, name


@pytest.mark.parametrize("style", ["LoopMask", "mixtral, grouped_mm", "deepseek_v3, grouped_mm"])
def test_blocks_are_numbered_in_order(style: str):
    program = built(style)
    found = [roles.role(n).block for n in of(program, torch.ops.moptrace.combine)]
    assert found == list(range(len(found)))
    for name, (component, block) in parameters(program).items():
        if component in (Component.ROUTER, Component.EXPERTS, Component.SHARED_EXPERT):
            layer = int(name.partition("layers.")[2].split(".")[0])
            assert block == layer - (2 - len(found))
        else:
            assert block is None


def test_the_canonical_operators_are_anchors():
    program = built("LoopWhere")
    ops = torch.ops.moptrace
    for target, component in {
        ops.dispatch: Component.DISPATCH,
        ops.grouped_mm: Component.EXPERTS,
        ops.combine: Component.COMBINE,
        aten.topk: Component.ROUTER,
        aten.scaled_dot_product_attention: Component.ATTENTION,
        aten.embedding: Component.EMBEDDING,
        aten.rsqrt: Component.NORM,
        aten.cross_entropy_loss: Component.LOSS,
    }.items():
        assert of(program, target)
        assert {roles.component(n) for n in of(program, target)} == {component}


def test_a_dense_model_has_a_dense_mlp():
    found = Counter(component for component, _ in parameters(built("dense")).values())
    assert found == {
        Component.EMBEDDING: 1,
        Component.NORM: 5,
        Component.ATTENTION: 4,
        Component.DENSE_MLP: 6,
        Component.VOCAB: 1,
    }


def test_the_gate_of_a_shared_expert_belongs_to_it():
    names = parameters(built("SortSplit, gated shared expert"))
    assert names["layers.1.feed_forward.gate.weight"] == (Component.SHARED_EXPERT, 1)


def test_an_auxiliary_loss_is_told_from_the_loss():
    program = built("LoopWhere, balanced")
    tags = {roles.component(n) for n in of(program, aten.one_hot)}
    assert tags == {Component.AUX_LOSS}
    assert roles.component(program.loss) is Component.LOSS
    assert {roles.component(n) for n in of(program, aten.cross_entropy_loss)} == {Component.LOSS}


# ---- Spellings of the head and the loss ----------------------------------------------------------


class Head(nn.Module):
    """A model whose loss is computed from its head by a given function."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.model = models.LanguageModel(models.LoopWhere).double()
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.model(input_ids, labels)[1], labels)


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)


def by_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    rows, wanted = shifted(logits, labels)
    return F.nll_loss(rows.log_softmax(-1), wanted)


def by_softcap(logits: Tensor, labels: Tensor) -> Tensor:
    rows, wanted = shifted(30 * torch.tanh(logits / 30), labels)
    return F.cross_entropy(rows.float(), wanted, label_smoothing=0.1)


def by_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    rows, wanted = shifted(logits, labels)
    kept = wanted != -100
    picked = rows.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
    return ((rows.logsumexp(-1) - picked) * kept).sum() / kept.sum()


def by_sum(logits: Tensor, labels: Tensor) -> Tensor:
    rows, wanted = shifted(logits, labels)
    return F.cross_entropy(rows, wanted, reduction="sum") / (wanted != -100).sum()


def with_z_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return by_log_softmax(logits, labels) + 1e-3 * logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize(
    "loss",
    [by_log_softmax, by_softcap, by_logsumexp, by_sum, with_z_loss],
    ids=lambda f: f.__name__,
)
def test_vocabulary_and_loss_are_found(loss: Callable[[Tensor, Tensor], Tensor]):
    program = classified(Head(loss))
    tags = parameters(program)
    assert tags["model.head.weight"] == (Component.VOCAB, None)
    assert tags["model.norm.weight"] == (Component.NORM, None)
    assert [n for n, (c, _) in tags.items() if c is Component.VOCAB] == ["model.head.weight"]
    assert roles.component(program.loss) is Component.LOSS


def test_a_loss_function_given_to_trace():
    model = models.LogitsOnly(models.build("LoopMask"))
    batch = models.batch(0)
    program = classified(
        model, {**batch, "target": batch["labels"]}, loss_fn=lambda out, target: by_sum(out, target)
    )
    assert parameters(program)["model.head.weight"] == (Component.VOCAB, None)


def test_classify_needs_raised_experts():
    with pytest.raises(PassError, match="raise_experts"):
        classify()(trace(models.build("dense"), models.batch(0)))


def test_the_pass_leaves_its_input_alone():
    program = raise_experts()(trace(models.build("LoopMask"), models.batch(0)))
    classify()(program)
    assert all(roles.component(n) is None for n in program.nodes)
