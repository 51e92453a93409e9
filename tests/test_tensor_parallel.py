"""Tensor parallel: heads and hidden units on several ranks, found by structure; the same step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from double import InFloat64
from gloo import Ranks
from moptrace import Plan, Program, errors, roles, trace
from moptrace.collectives import collective
from moptrace.passes.default import canonical, sharded
from moptrace.passes.tensor_parallel import tensor_parallel
from moptrace.reshard import constrain
from moptrace.roles import Component
from moptrace.testing import (
    ModelSpec,
    Step,
    assert_same_step,
    eager_step,
    simulated_step,
    unsharded_step,
    whole_state,
)
from subjects import batch, step_on_a_rank, subject
from sweeps import sweep

# Eight plans in which every axis takes part, with every other mechanism beside it.
PLANS = (
    (2, Plan(tp=2, ep=2)),
    (4, Plan(tp=4, ep=2, logits_bytes=0)),
    (4, Plan(tp=2, cp=2, ep=4)),
    (8, Plan(tp=2, cp=2, ep=4, context="ring", vp=4, logits_bytes=0, embedding_bytes=0)),
    (6, Plan(tp=3, ep=3, edp="replicate")),
    (8, Plan(tp=2, dp_replicate=2, ep=4)),
    (4, Plan(dp_replicate=2, ep=1)),
    (6, Plan(vp=3, ep=6, logits_bytes=0, embedding_bytes=0)),
)
HAND_WRITTEN = ("LoopWhere", "SortSlices", "OneHotEinsum")


NAMES = (*models.FAMILIES, *HAND_WRITTEN)
# Every plan with one model; the other pairs are slow.
CHOSEN = [tuple(range(part, len(PLANS), 4)) for part in range(4)]
QUICK = list(zip(("gpt_oss", "deepseek_v3", "LoopWhere", "SortSlices"), CHOSEN, strict=True))


@pytest.mark.parametrize(("name", "chosen"), sweep(product(NAMES, CHOSEN), QUICK))
def test_every_mixture_of_parallelisms_computes_the_same_step(
    name: str, chosen: tuple[int, ...]
) -> None:
    model, program = subject(name)
    fed = batch(1)
    with InFloat64():
        want = eager_step(model, fed)
        for ranks, plan in (PLANS[number] for number in chosen):
            local = sharded(plan.resolve(ranks, []), ranks)(program)
            assert_same_step(simulated_step(local, whole_state(model), fed), want)


# --- what is found --------------------------------------------------------------------------------


def split_weights(name: str, ranks: int = 2) -> set[str]:
    """The parameters that are asked to be split, with the dimension."""
    _, program = subject(name)
    layout = Plan(tp=ranks, ep=1).resolve(ranks, []).layout(ranks)
    written = tensor_parallel(layout)(program)
    names = {p.name: p.fqn for p in program.signature.parameters}
    found: set[str] = set()
    for node in written.nodes:
        if node.target is constrain and node.args[0].name in names:  # type: ignore[union-attr]
            fqn = names[node.args[0].name].removeprefix("model.layers.0.")  # type: ignore[union-attr]
            found.add(f"{fqn.removesuffix('.weight')} {node.args[2]}")
    return {entry for entry in found if "layers.1" not in entry}


def test_attention_is_split_by_heads() -> None:
    columns = {f"self_attn.{x}_proj shard(0)" for x in "qkv"}
    assert split_weights("mixtral") == {*columns, "self_attn.o_proj shard(1)"}


def test_a_norm_over_all_heads_is_split_with_them() -> None:
    columns = {
        f"self_attn.{x} shard(0)" for x in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm")
    }
    assert split_weights("olmoe") == {*columns, "self_attn.o_proj shard(1)"}


def test_latents_stay_whole_and_shared_experts_are_split() -> None:
    found = split_weights("deepseek_v3")
    assert {"self_attn.q_b_proj shard(0)", "self_attn.kv_b_proj shard(0)"} <= found
    assert {"mlp.up_proj shard(0)", "mlp.down_proj shard(1)"} <= found  # the dense first layer
    assert not any("_a_proj" in entry or "layernorm" in entry for entry in found)


def test_biases_and_sinks_are_split_with_their_heads() -> None:
    found = split_weights("gpt_oss")
    assert {"self_attn.sinks shard(0)", "self_attn.q_proj.bias shard(0)"} <= found
    assert "self_attn.o_proj.bias shard(0)" not in found


def moved(program: Program, component: Component) -> Counter[str]:
    """The collectives on activations of a component, along ``tp``."""
    found: Counter[str] = Counter()
    for node in program.nodes:
        row = collective(node.target)
        if row and roles.component(node) is component and "tp" in node.args:
            operand = node.args[0]
            assert isinstance(operand, torch.fx.Node)
            if roles.tensor(operand).is_floating_point() and operand.op != "placeholder":
                found[row.name] += 1
    return found


def test_tokens_are_gathered_once_and_sums_scattered_once() -> None:
    _, program = subject("mixtral")
    local = sharded(Plan(tp=2, ep=4).resolve(4, []), 4)(program)
    layers = 2
    assert moved(local, Component.NORM) == {"all_gather": layers}
    assert moved(local, Component.ATTENTION) == {"reduce_scatter": layers}


def test_weights_are_stored_as_they_are_used() -> None:
    """Only the ranks with the same heads gather them, and nobody all heads."""
    _, program = subject("mixtral")
    local = sharded(Plan(tp=2, ep=4).resolve(4, []), 4)(program)
    held = {n.name: str(roles.placement(n)) for n in local.nodes if n.op == "placeholder"}
    assert held["model_layers_0_self_attn_q_proj_weight"] == "fsdp: shard(1), tp: shard(0)"
    assert held["model_layers_0_self_attn_o_proj_weight"] == "fsdp: shard(0), tp: shard(1)"
    gathers = [n for n in local.nodes if n.target is torch.ops.moptrace.all_gather.default]
    own = [n for n in gathers if "self_attn_q_proj" in n.args[0].name]  # type: ignore[union-attr]
    assert [n.args[1] for n in own] == ["fsdp"] * 2


# --- hand-written layers of every shape -----------------------------------------------------------


class Mlp(nn.Module):
    """Token ids through an embedding and one layer; ``layer`` maps width 6 to width 6."""

    def __init__(self, layer: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(11, 6), layer()
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        logits = (x + self.layer(x)) @ self.embedding.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Fused(nn.Module):
    """Gate and value in one weight, biases on both sides."""

    def __init__(self, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(6, 2 * hidden), nn.Linear(hidden, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Transposed(nn.Module):
    """Weights stored input first, flattened tokens, ``addmm``."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))
        self.bias, self.end = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.flatten(0, 1), self.up).relu()
        return torch.addmm(self.end, flat, self.down).view(x.shape)


class PostNormed(nn.Module):
    """A norm directly after the last product: it needs the sum, not terms of it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(F.gelu(self.up(x))))


class Normed(nn.Module):
    """A norm over the hidden units: each rank has its share, and statistics are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.down(hidden)


class Read(nn.Module):
    """Hidden units that are used past the end of the layer cannot stay split."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.also = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).tanh()
        return self.down(hidden) + self.also(hidden.softmax(-1))


class Mixed(nn.Module):
    """A softmax over the hidden units mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "fused": (lambda: Fused(8), 3),
    "fused, uneven": (lambda: Fused(7), 0),
    "hidden units that do not divide": (
        lambda: nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6)), 3),
    "input first": (Transposed, 3),
    "a norm after": (PostNormed, 3),
    "a norm between": (Normed, 4),
    "read elsewhere": (Read, 0),
    "mixed": (Mixed, 0),
    "dropped out": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0), nn.Linear(8, 6)), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_shape(name: str) -> None:
    layer, split = LAYERS[name]
    model = Mlp(layer)
    ids = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(1))
    fed = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    want, program = eager_step(model, fed), canonical()(trace(model, fed))
    for ranks, plan in ((2, Plan(tp=2)), (4, Plan(tp=2)), (4, Plan(tp=2, cp=2)), (3, Plan(tp=3))):
        plan = plan.resolve(ranks, [])
        written = tensor_parallel(plan.layout(ranks))(program)
        assert_same_step(unsharded_step(written, whole_state(model), fed), want)
        own = {p.name for p in program.signature.parameters}
        asked = [n for n in written.nodes if n.target is constrain and n.args[0].name in own]  # type: ignore[union-attr]
        if ranks == 2:
            assert len(asked) == split
        local = sharded(plan, ranks)(program)
        assert_same_step(simulated_step(local, whole_state(model), fed), want)


def test_a_weight_that_is_gathered_whole_is_not_split_again_before_use() -> None:
    """Three ranks of ``tp`` and four of ``ep`` do not nest, so it is stored over all ranks."""
    model = ModelSpec(width=6, shared="plain").build()
    ids = torch.randint(13, (12, 12), generator=torch.Generator().manual_seed(1))
    fed = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    local = sharded(Plan(tp=3, cp=2, ep=4).resolve(12, []), 12)(canonical()(trace(model, fed)))
    assert_same_step(simulated_step(local, whole_state(model), fed), eager_step(model, fed))


def test_heads_that_do_not_divide_are_exchanged_or_said() -> None:
    _, program = subject("LoopWhere")  # two heads
    exchanged = sharded(Plan(tp=2, ep=1).resolve(2, []), 2)(program)
    assert not exchanged.notes
    alike = sharded(Plan(tp=3, ep=1).resolve(3, []), 3)(program)
    assert any("attention of 2 heads cannot be split over tp=3" in note for note in alike.notes)


# --- real ranks, and bad input --------------------------------------------------------------------


ON_REAL_RANKS = (
    Plan(tp=2, dp_replicate=2, ep=4),
    Plan(tp=2, cp=2, ep=2, context="ring", logits_bytes=0, vp=2, embedding_bytes=0),
    Plan(tp=2, ep=4),
    Plan(dp_replicate=2, ep=2),
    Plan(vp=2, ep=4, logits_bytes=0, embedding_bytes=0),
)


@pytest.mark.parametrize("plan", sweep(ON_REAL_RANKS, quick=ON_REAL_RANKS[:2]), ids=str)
def test_real_ranks_compute_the_same_step(ranks: Callable[[int], Ranks], plan: Plan) -> None:
    model, _ = subject("OneHotEinsum")
    fed = batch(1)
    want = eager_step(model, fed)
    for loss, gradients in ranks(4)(step_on_a_rank, "OneHotEinsum", model.state_dict(), plan, fed):
        assert_same_step(Step(loss, gradients, {}), want)


def test_a_length_that_the_ranks_do_not_divide_says_what_to_pad_to() -> None:
    _, program = subject("LoopWhere")
    with pytest.raises(
        errors.PlanError, match="12 tokens cannot be split over tp=5; pad them to 15"
    ):
        sharded(Plan(tp=5, ep=1).resolve(5, []), 5)(program)
