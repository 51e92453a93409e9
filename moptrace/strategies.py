"""Hypothesis strategies: small Mixture-of-Experts models, meshes, plans and batches.

A drawn model is described by a ``ModelSpec``, a value that prints as the call that makes it, so a
failing example can be pasted into a test. Use them from ``moptrace.testing``. They need the extra
``test`` (Hypothesis); ``ModelSpec`` itself does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moptrace.balance import Balance
from moptrace.dropping import RULES, SCOPES, Dropping
from moptrace.errors import PlanError
from moptrace.kernels.grouped_mm import expert_rows, grouped_mm
from moptrace.kernels.routing import combine, dispatch
from moptrace.plan import Plan

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["ModelSpec", "batches", "meshes", "model_specs", "moe_models", "plans"]


@dataclass(frozen=True)
class ModelSpec:
    """A small language model: what it is made of, and how its author wrote the experts.

    ``layers`` names each layer's feed-forward block, ``"moe"`` or ``"dense"``. ``style`` is a key
    of ``STYLES``, ``router`` of ``ROUTERS``, ``gating`` of ``GATINGS``. ``shared`` is ``""``,
    ``"plain"`` or ``"gated"``. ``balance`` scales a load-balancing loss over the whole batch.
    """

    layers: tuple[str, ...] = ("moe",)
    width: int = 8
    hidden: int = 6
    vocabulary: int = 13
    experts: int = 5
    k: int = 2
    style: str = "loop_where"
    router: str = "softmax"
    gating: str = "swiglu"
    biases: bool = False
    shared: str = ""
    attention: str = ""
    heads: int = 2
    tied: bool = False
    balance: float = 0.0
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float64) -> SmallModel:
        """The model, with parameters decided by ``seed``."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return SmallModel(self).to(dtype)


# --- routers: tokens [N, d] -> weights [N, k], experts [N, k], probabilities [N, E] ---------------


class _Router(nn.Module):
    bias: Tensor

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.k, self.choose = spec.k, ROUTERS[spec.router]
        self.gate = nn.Linear(spec.width, spec.experts, bias=False)
        self.register_buffer("bias", torch.randn(spec.experts) / 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gate(x)
        return (*self.choose(logits, self.k, self.bias), logits.softmax(-1))


def _softmax(logits: Tensor, k: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(logits.softmax(-1), k, dim=-1)


def _renormalised(logits: Tensor, k: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = torch.topk(logits.softmax(-1), k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def _softmax_of_chosen(logits: Tensor, k: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    chosen, experts = torch.topk(logits, k, dim=-1)
    return chosen.softmax(-1), experts


def _corrected_sigmoid(logits: Tensor, k: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The bias decides which experts are chosen, and is no part of their weights."""
    scores = logits.sigmoid()
    experts = torch.topk(scores + bias, k, dim=-1)[1]
    weights = scores.gather(-1, experts)
    return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), experts


def _one_for_all(logits: Tensor, k: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Every token goes to the same experts, so that one rank gets all and others none."""
    experts = torch.topk(bias.expand_as(logits), k, dim=-1)[1]
    return logits.sigmoid().gather(-1, experts), experts


ROUTERS: dict[str, Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]] = {
    "softmax": _softmax,
    "renormalised": _renormalised,
    "softmax_of_chosen": _softmax_of_chosen,
    "corrected_sigmoid": _corrected_sigmoid,
    "one_for_all": _one_for_all,
}

# How an expert's two projections of its input become its hidden value.
GATINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "clamped": lambda gate, up: gate.clamp(max=1.5) * torch.sigmoid(1.7 * gate) * (up + 1),
    "square": lambda gate, up: F.relu(gate).square() + up,
}


# --- experts: one module each, or stacked parameters ----------------------------------------------


class _Expert(nn.Module):
    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.gated = GATINGS[spec.gating]
        self.gate = nn.Linear(spec.width, spec.hidden, bias=spec.biases)
        self.up = nn.Linear(spec.width, spec.hidden, bias=spec.biases)
        self.down = nn.Linear(spec.hidden, spec.width, bias=spec.biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x), self.up(x)))


class _Block(nn.Module):
    """A router and its experts; subclasses say how tokens reach them."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec, self.router = spec, _Router(spec)
        self.shared = _Expert(spec) if spec.shared else None
        self.shared_gate = nn.Linear(spec.width, 1) if spec.shared == "gated" else None
        self.make_experts(spec)

    def make_experts(self, spec: ModelSpec) -> None:
        raise NotImplementedError

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen, probabilities = self.router(tokens)
        out = self.mix(tokens, weights, chosen)
        if self.shared is not None:
            beside = self.shared(tokens)
            if self.shared_gate is not None:
                beside = beside * self.shared_gate(tokens).sigmoid()
            out = out + beside
        share = F.one_hot(chosen, self.spec.experts).to(x.dtype).sum(1).mean(0)
        penalty = self.spec.experts * (share * probabilities.mean(0)).sum()
        return out.view(x.shape), penalty


class _ModuleBlock(_Block):
    def make_experts(self, spec: ModelSpec) -> None:
        self.experts = nn.ModuleList([_Expert(spec) for _ in range(spec.experts)])


class LoopWhere(_ModuleBlock):
    """A loop over experts with ``torch.where`` and ``index_add_``."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class LoopSkipEmpty(_ModuleBlock):
    """``nonzero``, a branch for experts without tokens, and an indexed sum in place."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            pairs = (chosen == e).nonzero()
            if pairs.numel() == 0:
                continue
            token, slot = pairs[:, 0], pairs[:, 1]
            out[token] += weights[token, slot].unsqueeze(-1) * expert(x[token])
        return out


class LoopMask(_ModuleBlock):
    """Boolean masks."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = chosen == e
            token = hit.any(dim=-1)
            weight = (weights * hit).sum(-1)
            out[token] += expert(x[token]) * weight[token].unsqueeze(-1)
        return out


class DenseLoop(_ModuleBlock):
    """Every expert computes every token; a matrix that is zero outside the top-k weights them."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        matrix = torch.zeros(x.shape[0], len(self.experts), dtype=x.dtype)
        matrix = matrix.scatter(-1, chosen, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + matrix[:, e, None] * expert(x)
        return out


class _StackedBlock(_Block):
    def make_experts(self, spec: ModelSpec) -> None:
        self.gated = GATINGS[spec.gating]
        e, d, f = spec.experts, spec.width, spec.hidden
        self.gate = nn.Parameter(torch.randn(e, d, f) / math.sqrt(d))
        self.up = nn.Parameter(torch.randn(e, d, f) / math.sqrt(d))
        self.down = nn.Parameter(torch.randn(e, f, d) / math.sqrt(f))
        self.gate_bias = nn.Parameter(torch.randn(e, f) / 10) if spec.biases else None
        self.down_bias = nn.Parameter(torch.randn(e, d) / 10) if spec.biases else None


class Canonical(_StackedBlock):
    """moptrace's own operators, as somebody who knows them would write."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        rows, counts, order = dispatch(x, chosen, self.spec.experts)
        gate = grouped_mm(rows, self.gate, counts)
        if self.gate_bias is not None:
            gate = gate + expert_rows(self.gate_bias, counts, rows)
        rows = grouped_mm(self.gated(gate, grouped_mm(rows, self.up, counts)), self.down, counts)
        if self.down_bias is not None:
            rows = rows + expert_rows(self.down_bias, counts, rows)
        return combine(rows, order, weights)


class SortSlices(_StackedBlock):
    """Sort, ``bincount(...).tolist()``, a loop over slices, ``cat``."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.flatten()
        order = flat.argsort()
        counts = torch.bincount(flat, minlength=self.spec.experts).tolist()
        token = order // chosen.shape[-1]
        rows, outputs, start = x[token], [], 0
        for e, count in enumerate(counts):
            part = rows[start : start + count]
            start += count
            gate = part @ self.gate[e]
            if self.gate_bias is not None:
                gate = gate + self.gate_bias[e]
            out = self.gated(gate, part @ self.up[e]) @ self.down[e]
            if self.down_bias is not None:
                out = out + self.down_bias[e]
            outputs.append(out)
        scaled = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, scaled)


class OneHot(_StackedBlock):
    """Dispatch and combine by einsum with one-hot matrices, without a capacity."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        hot = F.one_hot(chosen, self.spec.experts).to(x.dtype)
        sent = torch.einsum("nke,nd->end", hot, x)
        gate = torch.einsum("end,edf->enf", sent, self.gate)
        if self.gate_bias is not None:
            gate = gate + self.gate_bias[:, None]
        hidden = self.gated(gate, torch.einsum("end,edf->enf", sent, self.up))
        out = torch.einsum("enf,efd->end", hidden, self.down)
        if self.down_bias is not None:
            out = out + self.down_bias[:, None]
        return torch.einsum("end,nke,nk->nd", out, hot, weights)


STYLES: dict[str, type[_Block]] = {
    "loop_where": LoopWhere,
    "loop_skip_empty": LoopSkipEmpty,
    "loop_mask": LoopMask,
    "dense_loop": DenseLoop,
    "sort_slices": SortSlices,
    "one_hot": OneHot,
    "canonical": Canonical,
}


# --- the language model around them ---------------------------------------------------------------


class _Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(width) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


HEAD = 2  # elements of a head


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


class _FusedAttention(nn.Module):
    """One product for queries, keys and values."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.qkv = nn.Linear(spec.width, 3 * spec.heads * HEAD)
        self.out = nn.Linear(spec.heads * HEAD, spec.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(y) for y in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class _GroupedAttention(nn.Module):
    """A head of keys for every two of queries, or one for all; both normed; a bias at the end."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.groups = spec.heads // 2 if spec.heads % 2 == 0 else 1
        self.q = nn.Linear(spec.width, spec.heads * HEAD)
        self.kv = nn.Linear(spec.width, 2 * self.groups * HEAD, bias=False)
        self.norm = _Norm(HEAD)
        self.out = nn.Linear(spec.heads * HEAD, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (_heads(y) for y in self.kv(x).chunk(2, -1))
        q, k = self.norm(_heads(self.q(x))), self.norm(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class _LatentAttention(nn.Module):
    """Queries and keys from a small latent, a part of each key shared by all heads, and sinks."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        wide = spec.heads * HEAD
        self.down, self.norm = nn.Linear(spec.width, 3, bias=False), _Norm(3)
        self.q, self.kv = nn.Linear(3, 2 * wide), nn.Linear(3, 2 * wide)
        self.shared = nn.Linear(spec.width, HEAD)
        self.sinks = nn.Parameter(torch.randn(spec.heads))
        self.out = nn.Linear(wide, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        heads, latent = len(self.sinks), self.norm(self.down(x))
        q = self.q(latent).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (_heads(y) for y in self.kv(latent).chunk(2, -1))
        shared = self.shared(x).unsqueeze(1).expand(-1, heads, -1, -1)
        scores = q @ torch.cat([k, shared], -1).transpose(-1, -2)
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
        sinks = self.sinks.view(1, -1, 1, 1).expand(len(x), -1, scores.shape[2], -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.out((weights @ v).transpose(1, 2).flatten(-2))


ATTENTIONS = {"fused": _FusedAttention, "grouped": _GroupedAttention, "latent": _LatentAttention}


class _Layer(nn.Module):
    def __init__(self, spec: ModelSpec, kind: str):
        super().__init__()
        self.attention = ATTENTIONS[spec.attention](spec) if spec.attention else None
        self.norm = _Norm(spec.width)
        self.block = STYLES[spec.style](spec) if kind == "moe" else _Expert(spec)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.attention is not None:
            x = x + self.attention(x)
        out = self.block(self.norm(x))
        if isinstance(out, tuple):
            return x + out[0], out[1]
        return x + out, None


class SmallModel(nn.Module):
    """Embedding, layers, head, shifted cross entropy; returns ``(loss, logits)``."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.layers = nn.ModuleList([_Layer(spec, kind) for kind in spec.layers])
        self.norm = _Norm(spec.width)
        self.head = nn.Linear(spec.width, spec.vocabulary, bias=False)
        if spec.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(input_ids)
        penalties: list[Tensor] = []
        for layer in self.layers:
            x, penalty = layer(x)
            if penalty is not None:
                penalties.append(penalty)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if self.spec.balance:
            for penalty in penalties:
                loss = loss + self.spec.balance * penalty
        return loss, logits

    def __repr__(self) -> str:
        return f"{self.spec}.build()"


# --- the strategies -------------------------------------------------------------------------------


def _hypothesis() -> Any:
    try:
        import hypothesis.strategies
    except ImportError as error:
        raise ImportError(
            "the strategies of moptrace.testing need Hypothesis: pip install 'moptrace[test]'"
        ) from error
    return hypothesis.strategies


def model_specs(styles: tuple[str, ...] = tuple(STYLES)) -> SearchStrategy[ModelSpec]:
    """Descriptions of small models, simplest first: shrinking removes what a failure needs not."""
    st = _hypothesis()

    @st.composite
    def specs(draw: Any) -> ModelSpec:
        experts = draw(st.integers(1, 9))
        layers = draw(st.lists(st.sampled_from(["moe", "dense"]), min_size=1, max_size=3))
        style = draw(st.sampled_from(styles))
        return ModelSpec(
            layers=tuple(layers) if "moe" in layers else (*layers, "moe"),
            width=draw(st.sampled_from([4, 6, 8])),
            hidden=draw(st.integers(2, 7)),
            vocabulary=draw(st.integers(5, 17)),
            experts=experts,
            k=draw(st.integers(1, min(experts, 3))),
            style=style,
            router=draw(st.sampled_from(list(ROUTERS))),
            gating=draw(st.sampled_from(list(GATINGS))),
            biases=draw(st.booleans()),
            shared=draw(st.sampled_from(["", "plain", "gated"])),
            attention=draw(st.sampled_from(["", *ATTENTIONS])),
            heads=draw(st.sampled_from([2, 4, 1, 3])),
            tied=draw(st.booleans()),
            balance=draw(st.sampled_from([0.0, 0.1])),
            seed=draw(st.integers(0, 9)),
        )

    return specs()


def moe_models(styles: tuple[str, ...] = tuple(STYLES)) -> SearchStrategy[SmallModel]:
    """Small models in float64, called as ``model(input_ids, labels)``; they print as their spec."""
    return model_specs(styles).map(ModelSpec.build)


def meshes(batch_size: int = 24, largest: int = 8) -> SearchStrategy[int]:
    """Numbers of ranks that can share a batch of this many sequences."""
    return _hypothesis().sampled_from([w for w in range(1, largest + 1) if batch_size % w == 0])


def plans(world_size: int, length: int = 1, layers: int = 1) -> SearchStrategy[Plan]:
    """Plans for this many ranks, sequences of this length, and models of so many layers, resolved.

    Any number of pipeline stages, and for their ranks every ``ep * etp``, every ``cp * tp`` that
    divides the length, each way to attend, the vocabulary over all ranks or some, dense weights
    copied or not, experts alike or sharded over ``edp``, the loss from whole logits or from blocks
    of them, embeddings gathered or looked up where their rows are, tokens sent to their experts at
    once or in chunks, kept for backward or not, weighed in their experts or after them, gathered
    instead, dropped beyond a capacity, or lent with their experts. A plan that does not fit is
    changed where it says so.
    """
    st = _hypothesis()
    stages = [n for n in range(1, layers + 1) if world_size % n == 0]

    def of_stages(pp: int) -> SearchStrategy[Plan]:
        of_one = _plans_of_stage(world_size // pp, length)
        return of_one.map(lambda plan: replace(plan, pp=pp, micro_batches=pp))

    return st.sampled_from(stages).flatmap(of_stages)


def _plans_of_stage(world_size: int, length: int) -> SearchStrategy[Plan]:
    st = _hypothesis()
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]

    def shared(others: int) -> list[int]:
        return [d for d in divisors if world_size % (d * others) == 0]

    @st.composite
    def tokens(draw: Any) -> dict[str, int]:
        tp = draw(st.sampled_from([d for d in divisors if length % d == 0]))
        cp = draw(st.sampled_from([d for d in shared(tp) if length % (d * tp) == 0]))
        words = divisors if cp * tp == 1 else sorted({tp, cp * tp, world_size}, reverse=True)
        copies = draw(st.sampled_from(shared(tp)))
        return {"tp": tp, "cp": cp, "vp": draw(st.sampled_from(words)), "dp_replicate": copies}

    @st.composite
    def experts(draw: Any) -> dict[str, int]:
        ep = draw(st.sampled_from(divisors))
        return {"ep": ep, "etp": draw(st.sampled_from(shared(ep)))}

    def resolved(tokens: Any, experts: Any, **fields: Any) -> Plan:
        plan = Plan(**tokens, **experts, **fields)
        if plan.dropping and plan.dropping.pad:
            plan = replace(plan, expert_tokens=None, balance=None)
        if plan.dispatcher == "all-gather":
            plan = replace(plan, balance=None)
        for change in ({}, {"dispatcher": "all-to-all"}, {"vp": world_size}):
            plan = replace(plan, **change)
            try:
                return plan.resolve(world_size, [])
            except PlanError as error:
                last = error
        raise last

    dropping = st.builds(
        lambda factor, by, over, pad: Dropping(factor, by, "sub-sequence" if pad else over, pad),
        st.sampled_from([1.0, 0.3, 2.0]),
        st.sampled_from(RULES),
        st.sampled_from(SCOPES),
        st.booleans(),
    )

    return st.builds(
        resolved,
        tokens(),
        experts(),
        context=st.sampled_from(["ulysses", "ring", "gather"]),
        edp=st.sampled_from(["shard", "replicate"]),
        logits_bytes=st.sampled_from([0, Plan.logits_bytes]),
        embedding_bytes=st.sampled_from([0, Plan.embedding_bytes]),
        dispatcher=st.sampled_from(["all-to-all", "all-to-all", "all-gather"]),
        dropping=st.none() | dropping,
        balance=st.sampled_from([None, Balance(1.0, rows=1), Balance(1.5, 1.2, 7, guests=1)]),
        expert_tokens=st.sampled_from([None, 17, 40]),
        expert_chunks=st.sampled_from(["strided", "contiguous"]),
        recompute_experts=st.sampled_from([None, True, False]),
        fold_router_weights=st.booleans(),
    )


def batches(vocabulary: int, size: int = 24, length: int = 3) -> SearchStrategy[dict[str, Tensor]]:
    """Global batches with ignored labels: none, some, or all of many sequences.

    Ranks then have different numbers of labels that matter, and some ranks none. The first
    sequence keeps at least one, so that a mean exists.
    """
    st = _hypothesis()

    def make(seed: int, ignored: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (size, length)
        ids = torch.randint(vocabulary, shape, generator=generator)
        labels = torch.randint(vocabulary, shape, generator=generator)
        drop = torch.rand(shape, generator=generator) < 0.3
        if ignored == "sequences":
            drop = (torch.rand(size, 1, generator=generator) < 0.7).expand(shape).clone()
        if ignored != "none":
            drop[0, -1] = False
            labels = labels.masked_fill(drop, -100)
        return {"input_ids": ids, "labels": labels}

    kinds = st.sampled_from(["none", "tokens", "sequences"])
    return st.builds(make, st.integers(0, 99), kinds)
