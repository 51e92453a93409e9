"""Small Mixture-of-Experts language models, written in the many ways that people write them.

``MODELS`` maps the name of a style to a function that builds a model of it; every model is called
as ``model(**batch(...))`` and returns ``(loss, logits)``. ``HUGGING_FACE`` does the same for tiny
configurations of Hugging Face families. There are at least eleven experts, so that the order of
experts as strings ("10" < "2") differs from their order as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moptrace import strategies

VOCABULARY = 37


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a model: ``width`` d, ``hidden`` f, ``experts`` E, ``k`` experts a token."""

    width: int = 8
    hidden: int = 6
    experts: int = 12
    k: int = 2
    layers: int = 2
    heads: int = 2
    vocabulary: int = VOCABULARY


SIZES = Sizes()


def batch(
    seed: int = 0, *, size: int = 2, length: int = 5, vocabulary: int = VOCABULARY
) -> dict[str, Tensor]:
    """Random tokens and labels, one label in five ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, length)
    ids = torch.randint(vocabulary, shape, generator=generator)
    labels = torch.randint(vocabulary, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.2
    return {"input_ids": ids, "labels": labels.masked_fill(ignored, -100)}


class LoopedExperts(nn.Module):
    """Four small experts in a loop; ``between`` makes ``used`` numbers of what their first product
    makes of a token, for their second one.
    """

    def __init__(self, between: Callable[[Tensor], Tensor], used: int = 6) -> None:
        super().__init__()
        self.between = between
        self.embedding = nn.Embedding(11, 8)
        self.gate = nn.Linear(8, 4, bias=False)
        self.up = nn.ModuleList(nn.Linear(8, 6) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(used, 8) for _ in range(4))
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, at = torch.where(chosen == number)
            y.index_add_(0, token, down(self.between(up(x[token]))) * weights[token, at, None])
        return nn.functional.cross_entropy(self.head(x + y), labels.flatten())


# ---- Routers: tokens [..., d] -> weights [..., k], experts [..., k] ------------------------------


class SoftmaxRouter(nn.Module):
    """Softmax over all experts, then top-k, renormalised."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.k = s.k
        self.gate = nn.Linear(s.width, s.experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = torch.topk(self.gate(x).softmax(-1), self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts


class TopKSoftmaxRouter(SoftmaxRouter):
    """Top-k of the logits, then softmax over the chosen ones."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, experts = torch.topk(self.gate(x), self.k, dim=-1, sorted=False)
        return logits.softmax(-1), experts


class PlainSoftmaxRouter(SoftmaxRouter):
    """Softmax over all experts, then top-k, not renormalised."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(self.gate(x).softmax(-1), self.k, dim=-1)


class SigmoidGroupRouter(nn.Module):
    """Sigmoid scores, a correction bias that only selects, and expert groups (DeepSeek-V3)."""

    def __init__(self, s: Sizes, groups: int = 4, kept: int = 2):
        super().__init__()
        self.k, self.groups, self.kept = s.k, groups, kept
        self.weight = nn.Parameter(torch.randn(s.experts, s.width) / math.sqrt(s.width))
        self.register_buffer("bias", torch.randn(s.experts) / 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.weight).sigmoid()
        choice = scores + self.bias
        grouped = choice.unflatten(-1, (self.groups, -1))
        best = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.kept, dim=-1)[1]
        mask = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1.0)
        masked = grouped.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).flatten(-2)
        experts = masked.topk(self.k, dim=-1)[1]
        weights = scores.gather(-1, experts)
        return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), experts


class SwitchRouter(SoftmaxRouter):
    """The single best expert, by argmax; weights and experts have no slot dimension."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).softmax(-1).max(dim=-1)


# ---- Experts: one module each, or stacked parameters ---------------------------------------------


class GatedExpert(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.w1 = nn.Linear(s.width, s.hidden, bias=False)
        self.w2 = nn.Linear(s.hidden, s.width, bias=False)
        self.w3 = nn.Linear(s.width, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class BiasedExpert(nn.Sequential):
    """Linear, GELU, linear, with biases."""

    def __init__(self, s: Sizes):
        super().__init__(nn.Linear(s.width, s.hidden), nn.GELU(), nn.Linear(s.hidden, s.width))


class NormedExpert(nn.Module):
    """An expert with a norm, a clamp, a learned scale and a residual of its own."""

    def __init__(self, s: Sizes):
        super().__init__()
        self.norm = nn.LayerNorm(s.width)
        self.up = nn.Linear(s.width, 2 * s.hidden)
        self.down = nn.Linear(s.hidden, s.width)
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).clamp(-2, 2).chunk(2, dim=-1)
        return self.scale * self.down((up + 1) * gate * torch.sigmoid(1.7 * gate)) + x


class ModuleExperts(nn.Module):
    """A router and a ``ModuleList`` of experts; the subclasses differ in how tokens reach them."""

    flatten = True

    def __init__(
        self,
        s: Sizes,
        router: Callable[[Sizes], nn.Module] = SoftmaxRouter,
        expert: Callable[[Sizes], nn.Module] = GatedExpert,
    ):
        super().__init__()
        self.E = s.experts
        self.router = router(s)
        self.experts = nn.ModuleList([expert(s) for _ in range(s.experts)])

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.flatten:
            x = x.reshape(-1, shape[-1])
        weights, chosen = self.router(x)
        return self.mix(x, weights, chosen).reshape(shape)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


class LoopWhere(ModuleExperts):
    """``torch.where`` and ``index_add_``."""

    mix = strategies.LoopWhere.mix


class LoopSkipEmpty(ModuleExperts):
    """``nonzero``, with a branch for an expert that got no token, and ``out[i] +=``."""

    mix = strategies.LoopSkipEmpty.mix


class LoopMask(ModuleExperts):
    """Boolean-mask indexing and assignment."""

    mix = strategies.LoopMask.mix


class LoopMaskThreeDimensional(LoopMask):
    """The same on tokens [B, T, d] that are never flattened."""

    flatten = False


class LoopOneHot(ModuleExperts):
    """``one_hot(...).permute`` and ``torch.where`` of each expert's mask (Mixtral's first form)."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(chosen, self.E).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            rows = x[None, token].reshape(-1, x.shape[-1])
            out.index_add_(0, token, expert(rows) * weights[token, slot, None])
        return out


class LoopRepeat(ModuleExperts):
    """Tokens repeated k times and assigned by flat mask (DeepSeek's first form)."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.view(-1)
        repeated = x.repeat_interleave(chosen.shape[-1], dim=0)
        out = torch.empty_like(repeated)
        for e, expert in enumerate(self.experts):
            out[flat == e] = expert(repeated[flat == e])
        return (out.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class LoopWeightFirst(ModuleExperts):
    """The weight multiplies the expert's input, and the output is scattered with expanded ids."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            rows = expert(torch.index_select(x, 0, token) * weights[token, slot][:, None])
            out = out.scatter_add(0, token[:, None].expand_as(rows), rows)
        return out


class LoopSwitch(ModuleExperts):
    """One expert a token, with [N] ids, masks and a residual written in place."""

    def __init__(self, s: Sizes, **how: Any):
        super().__init__(s, **{"router": SwitchRouter, **how})

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token = chosen == e
            out[token] = out[token] + expert(x[token]) * weights[token, None]
        return out


class DenseLoop(ModuleExperts):
    """Every expert computes every token; a [N, E] matrix, zero outside the top-k, weights them."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        matrix = torch.zeros(*x.shape[:-1], self.E, dtype=x.dtype).scatter(-1, chosen, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + matrix[..., e, None] * expert(x)
        return out


class DenseLoopThreeDimensional(DenseLoop):
    """The same on tokens [B, T, d] that are never flattened."""

    flatten = False


class DenseStack(ModuleExperts):
    """Every expert computes every token; the results are stacked and summed by one einsum."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        matrix = (F.one_hot(chosen, self.E).to(x.dtype) * weights.unsqueeze(-1)).sum(dim=1)
        results = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.einsum("ne,ned->nd", matrix, results)


class StackedExperts(nn.Module):
    """A router and expert parameters stacked along dimension 0."""

    flatten = True

    def __init__(self, s: Sizes, router: Callable[[Sizes], nn.Module] = SoftmaxRouter):
        super().__init__()
        self.E, self.k = s.experts, s.k
        self.router = router(s)
        self.w1 = nn.Parameter(torch.randn(s.experts, s.width, s.hidden) / math.sqrt(s.width))
        self.w3 = nn.Parameter(torch.randn(s.experts, s.width, s.hidden) / math.sqrt(s.width))
        self.w2 = nn.Parameter(torch.randn(s.experts, s.hidden, s.width) / math.sqrt(s.hidden))
        self.b1 = nn.Parameter(torch.randn(s.experts, s.hidden) / 10)
        self.b2 = nn.Parameter(torch.randn(s.experts, s.width) / 10)

    forward = ModuleExperts.forward

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        raise NotImplementedError


class SortSlices(StackedExperts):
    """Sort, ``bincount(...).tolist()``, a loop over slices, ``cat``."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.flatten()
        order = flat.argsort()
        counts = torch.bincount(flat, minlength=self.E).tolist()
        token = order // chosen.shape[-1]
        rows, outputs, start = x[token], [], 0
        for e, count in enumerate(counts):
            part = rows[start : start + count]
            start += count
            hidden = F.silu(part @ self.w1[e] + self.b1[e]) * (part @ self.w3[e])
            outputs.append(hidden @ self.w2[e] + self.b2[e])
        scaled = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, scaled)


class SortSplit(StackedExperts):
    """Sort, ``split`` by counts, results written back through the inverse permutation."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = torch.sort(chosen.view(-1), stable=True)
        counts = ids.bincount(minlength=self.E).tolist()
        parts = x[order // self.k].split(counts)
        results = [
            F.relu(part @ w1).square() @ w2 + b2
            for part, w1, w2, b2 in zip(
                parts, self.w1.unbind(), self.w2.unbind(), self.b2.unbind(), strict=True
            )
        ]
        unsorted = torch.cat(results)[torch.argsort(order)].view(-1, self.k, x.shape[-1])
        return torch.einsum("nkd,nk->nd", unsorted, weights)


class SortSlicesInPlace(StackedExperts):
    """Sort and write each expert's slice of a buffer, then scatter the buffer back to pairs."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=self.E).cumsum(0).tolist()
        rows = x[order.div(self.k, rounding_mode="floor")]
        out, start = torch.zeros_like(rows), 0
        for e, end in enumerate(ends):
            hidden = torch.tanh(rows[start:end] @ self.w1[e])
            out[start:end] = hidden @ self.w2[e] + self.b2[e]
            start = end
        pairs = torch.empty_like(out)
        pairs[order] = out
        return (pairs.view(*chosen.shape, -1) * weights[..., None]).sum(1)


class OneHotEinsum(StackedExperts):
    """Dispatch and combine by einsum with one-hot matrices, without a capacity."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        hot = F.one_hot(chosen, self.E).to(x.dtype)
        sent = torch.einsum("nke,nd->end", hot, x)
        hidden = F.gelu(torch.einsum("end,edf->enf", sent, self.w1) + self.b1[:, None])
        result = torch.einsum("enf,efd->end", hidden, self.w2) + self.b2[:, None]
        return torch.einsum("end,nke,nk->nd", result, hot, weights)


class DenseEinsum(StackedExperts):
    """All experts on all tokens by einsum over stacked weights, on tokens [B, T, d]."""

    flatten = False

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        matrix = torch.zeros(*x.shape[:-1], self.E, dtype=x.dtype)
        matrix.scatter_(-1, chosen, weights)
        gate = torch.einsum("btd,edf->btef", x, self.w1)
        up = torch.einsum("btd,edf->btef", x, self.w3)
        result = torch.einsum("btef,efd->bted", F.silu(gate) * up, self.w2) + self.b2
        return (result * matrix.unsqueeze(-1)).sum(-2)


class DenseBmm(StackedExperts):
    """All experts on all tokens by ``bmm``; a softmax that is -inf outside the top-k."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        keep = torch.zeros(x.shape[0], self.E, dtype=torch.bool).scatter(1, chosen, True)
        logits = F.linear(x, self.router.gate.weight)
        matrix = logits.masked_fill(~keep, float("-inf")).softmax(-1)
        every = x.unsqueeze(0).expand(self.E, -1, -1)
        hidden = torch.bmm(every, self.w1) + self.b1.unsqueeze(1)
        gate, up = hidden.relu(), torch.bmm(every, self.w3)
        result = torch.bmm(gate * up, self.w2)
        return (result * matrix.t().unsqueeze(-1)).sum(dim=0)


class DenseWeightFirst(StackedExperts):
    """Weights on the input of experts that map zero to zero, on repeated tokens (Llama 4)."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        empty = torch.full((x.shape[0], self.E), float("-inf"), dtype=x.dtype)
        scores = torch.sigmoid(empty.scatter(1, chosen, weights)).transpose(0, 1)
        repeated = x.repeat(self.E, 1) * scores.reshape(-1, 1)
        every = repeated.view(self.E, -1, x.shape[-1])
        hidden = F.silu(torch.bmm(every, self.w1)) * torch.bmm(every, self.w3)
        return torch.bmm(hidden, self.w2).view(self.E, -1, x.shape[-1]).sum(dim=0)


class GatherBmm(StackedExperts):
    """Each pair gathers its expert's weights, then ``bmm``."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.reshape(-1)
        token = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, self.k).reshape(-1)
        rows = x[token]
        hidden = F.silu(torch.bmm(rows.unsqueeze(1), self.w1[flat]).squeeze(1) + self.b1[flat])
        result = torch.bmm(hidden.unsqueeze(1), self.w2[flat]).squeeze(1)
        weighted = result * weights.reshape(-1, 1)
        return weighted.view(x.shape[0], self.k, -1).sum(dim=1)


class GatherEinsum(StackedExperts):
    """Each pair gathers its expert's weights, then einsum over [N, k]."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("nd,nkdf->nkf", x, self.w1[chosen]) + self.b1[chosen])
        result = torch.einsum("nkf,nkfd->nkd", hidden, self.w2[chosen])
        return torch.einsum("nkd,nk->nd", result, weights)


class Capacity(StackedExperts):
    """GShard's dispatch with a capacity: pairs beyond it are dropped. moptrace refuses it."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        capacity = 4
        hot = F.one_hot(chosen, self.E)
        position = hot.flatten(0, 1).cumsum(0).view_as(hot) * hot - 1
        kept = (position < capacity) & (position >= 0)
        slots = F.one_hot(position.clamp(0, capacity - 1), capacity) * kept.unsqueeze(-1)
        combine = (slots.to(x.dtype) * weights[:, :, None, None]).sum(1)
        sent = torch.einsum("nec,nd->ecd", combine.bool().to(x.dtype), x)
        hidden = F.silu(torch.einsum("ecd,edf->ecf", sent, self.w1))
        return torch.einsum("nec,ecd->nd", combine, torch.einsum("ecf,efd->ecd", hidden, self.w2))


class NotRowWise(LoopWhere):
    """An expert that mixes the tokens it gets, so that it is no function of one row."""

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            rows = x[token]
            rows = rows - rows.mean(dim=0, keepdim=True)
            out.index_add_(0, token, expert(rows) * weights[token, slot, None])
        return out


class SharedExpert(nn.Module):
    """A routed block and an expert that every token visits, optionally gated."""

    def __init__(self, routed: nn.Module, s: Sizes, *, gated: bool = False):
        super().__init__()
        self.routed, self.shared = routed, GatedExpert(s)
        self.gate = nn.Linear(s.width, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared(x)
        if self.gate is not None:
            shared = shared * torch.sigmoid(self.gate(x))
        return self.routed(x) + shared


# ---- The language model around them --------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width) + torch.randn(width) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.heads = s.heads
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.out = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class DenseMlp(GatedExpert):
    """The feed-forward block of a dense layer."""


class Layer(nn.Module):
    def __init__(self, s: Sizes, feed_forward: nn.Module):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(s.width), Attention(s)
        self.norm, self.feed_forward = RMSNorm(s.width), feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.norm(x))


class LanguageModel(nn.Module):
    """Embedding, layers of attention and a feed-forward block, head, shifted cross entropy."""

    def __init__(
        self,
        block: Callable[[Sizes], nn.Module],
        s: Sizes = SIZES,
        *,
        dense_layers: int = 0,
        tied: bool = False,
        balance: float = 0.0,
    ):
        super().__init__()
        blocks = [DenseMlp(s) if i < dense_layers else block(s) for i in range(s.layers)]
        self.balance = balance
        self.embedding = nn.Embedding(s.vocabulary, s.width)
        self.layers = nn.ModuleList([Layer(s, b) for b in blocks])
        self.norm = RMSNorm(s.width)
        self.head = nn.Linear(s.width, s.vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x, penalty = self.embedding(input_ids), None
        for layer in self.layers:
            x = layer(x)
            if self.balance and isinstance(layer.feed_forward, ModuleExperts | StackedExperts):
                term = load_balance(layer.feed_forward.router, x, layer.feed_forward.E)
                penalty = term if penalty is None else penalty + term
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if penalty is not None:
            loss = loss + self.balance * penalty
        return loss, logits


def load_balance(router: nn.Module, x: Tensor, experts: int) -> Tensor:
    """Switch Transformer's auxiliary loss: share of pairs times mean probability, per expert."""
    probabilities = router.gate(x).softmax(-1).flatten(0, 1)
    chosen = probabilities.topk(router.k, dim=-1)[1]
    share = F.one_hot(chosen, experts).to(x.dtype).sum(1).mean(0)
    return experts * (share * probabilities.mean(0)).sum()


class LogitsOnly(nn.Module):
    """A model that returns logits, for ``loss_fn=``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model(input_ids, labels)[1]


Build = Callable[[], nn.Module]


def _language_model(block: Callable[[Sizes], nn.Module], **how: Any) -> Build:
    return partial(LanguageModel, block, **how)


def _shared(block: Callable[[Sizes], nn.Module], **how: Any) -> Callable[[Sizes], nn.Module]:
    return lambda s: SharedExpert(block(s), s, **how)


MODULE_STYLES: tuple[type[ModuleExperts], ...] = (
    LoopWhere, LoopSkipEmpty, LoopMask, LoopMaskThreeDimensional, LoopOneHot, LoopRepeat,
    LoopWeightFirst, LoopSwitch, DenseLoop, DenseLoopThreeDimensional, DenseStack,
)  # fmt: skip
STACKED_STYLES: tuple[type[StackedExperts], ...] = (
    SortSlices, SortSplit, SortSlicesInPlace, OneHotEinsum, DenseEinsum, DenseBmm,
    DenseWeightFirst, GatherBmm, GatherEinsum,
)  # fmt: skip

# One style each, and then what routers, experts and surroundings add to a style.
MODELS: dict[str, Build] = {
    **{style.__name__: _language_model(style) for style in (*MODULE_STYLES, *STACKED_STYLES)},
    "LoopWhere, group-limited sigmoid": _language_model(
        partial(LoopWhere, router=SigmoidGroupRouter, expert=BiasedExpert)
    ),
    "LoopMask, top-k then softmax": _language_model(
        partial(LoopMask, router=TopKSoftmaxRouter, expert=NormedExpert)
    ),
    "LoopWhere, one expert a token": _language_model(
        partial(LoopWhere, router=PlainSoftmaxRouter, expert=BiasedExpert), s=Sizes(k=1)
    ),
    "SortSlices, three experts a token": _language_model(SortSlices, s=Sizes(k=3)),
    "DenseLoop, biases": _language_model(partial(DenseLoop, expert=BiasedExpert)),
    "LoopOneHot, shared expert": _language_model(_shared(LoopOneHot), dense_layers=1),
    "SortSplit, gated shared expert": _language_model(_shared(SortSplit, gated=True)),
    "LoopSkipEmpty, tied": _language_model(LoopSkipEmpty, tied=True),
    "LoopWhere, balanced": _language_model(LoopWhere, balance=0.01),
    "SortSlices, balanced": _language_model(SortSlices, balance=0.01, dense_layers=1),
}

REFUSED: dict[str, Build] = {
    "Capacity": _language_model(Capacity),
    "NotRowWise": _language_model(NotRowWise),
}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of ``MODELS``, ``REFUSED`` or ``HUGGING_FACE``, with parameters fixed by ``seed``."""
    torch.manual_seed(seed)
    everything: dict[str, Build] = {**MODELS, **REFUSED, **HUGGING_FACE, "dense": dense}
    return everything[name]().to(dtype)


def dense() -> nn.Module:
    """A model without any expert."""
    return LanguageModel(DenseMlp)


# ---- Hugging Face --------------------------------------------------------------------------------

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    num_experts_per_tok=2, pad_token_id=0,
)  # fmt: skip


def hugging_face(family: str, implementation: str = "grouped_mm", **changes: Any) -> nn.Module:
    """A tiny model of one of five families, with its experts computed by ``implementation``."""
    import transformers as hf

    one = dict(_COMMON, experts_implementation=implementation, **changes)
    match family:
        case "mixtral":
            config = hf.MixtralConfig(**one, num_local_experts=12)
            return hf.MixtralForCausalLM(config)
        case "qwen3_moe":
            config = hf.Qwen3MoeConfig(
                **one, num_experts=12, moe_intermediate_size=8, head_dim=4, norm_topk_prob=True
            )
            return hf.Qwen3MoeForCausalLM(config)
        case "deepseek_v3":
            config = hf.DeepseekV3Config(
                **{**one, "num_key_value_heads": 4}, n_routed_experts=12, moe_intermediate_size=8,
                n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1,
                kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=4,
                v_head_dim=8, norm_topk_prob=True,
            )  # fmt: skip
            return hf.DeepseekV3ForCausalLM(config)
        case "gpt_oss":
            config = hf.GptOssConfig(**one, num_local_experts=12, head_dim=4, sliding_window=4)
            return hf.GptOssForCausalLM(config)
        case "olmoe":
            return hf.OlmoeForCausalLM(hf.OlmoeConfig(**one, num_experts=12))
    raise KeyError(family)


FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
HUGGING_FACE: dict[str, Build] = {
    f"{family}, {implementation}": partial(hugging_face, family, implementation)
    for family in FAMILIES
    for implementation in ("grouped_mm", "eager", "batched_mm")
}
