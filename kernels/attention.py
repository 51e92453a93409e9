"""Attention to some of the keys, and how such parts add up to attention to all of them.

A query's attention to a part of the keys is its output there and the log-sum-exp of its scores
there; the parts of a sequence merge by their log-sum-exps (Milakov and Gimelshein, Online
normalizer calculation for softmax, 2018; Liu et al., Ring Attention, 2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["attention", "merge_attention", "part_of_attention", "part_of_gradients"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, bool is_causal, float scale) "
    "-> (Tensor, Tensor)"
)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, with the log-sum-exp of each query's scores.

    query [B, h, S, d], key and value [B, g, T, d] -> [B, h, S, d] and [B, h, S], h a multiple of g.

    With ``is_causal``, S is T and query i attends to keys up to i. The log-sum-exp is in float32 at
    least and carries no gradient.
    """
    return torch.ops.moptrace.attention.default(query, key, value, is_causal, scale)


def part_of_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of attention to these keys alone, both in float32 at least."""
    key, value = (_for_every_head(x, query) for x in (key, value))
    exact = torch.promote_types(query.dtype, torch.float32)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            query, key, value, 0.0, is_causal, scale=scale
        )
        return out.to(exact), lse.to(exact)
    scores = _scores(query, key, is_causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp() @ value.to(exact), lse


def part_of_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys contribute to the gradients, given the output and log-sum-exp of all keys.

    Returns the gradients of query, key and value in float32 at least; those of query add up over
    the parts.
    """
    groups = key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    key, value = (_for_every_head(x, query) for x in (key, value))
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        found = flash(gradient, query, key, value, out, lse, 0.0, is_causal, scale=scale)
        of_query, of_key, of_value = (x.to(exact) for x in found)
    else:
        weights = (_scores(query, key, is_causal, scale) - lse.unsqueeze(-1)).exp()
        gradient, out = gradient.to(exact), out.to(exact)
        of_value = weights.transpose(-1, -2) @ gradient
        of_weights = gradient @ value.to(exact).transpose(-1, -2)
        of_scores = weights * (of_weights - (gradient * out).sum(-1, keepdim=True)) * scale
        of_query = of_scores @ key.to(exact)
        of_key = of_scores.transpose(-1, -2) @ query.to(exact)
    of_key, of_value = (
        x.unflatten(1, (groups, -1)).sum(2) if groups != x.shape[1] else x
        for x in (of_key, of_value)
    )
    return of_query, of_key, of_value


def merge_attention(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Attention to two parts of the keys as attention to both: associative and commutative."""
    lse = torch.logaddexp(one[1], other[1])
    return sum(out * (part - lse).exp().unsqueeze(-1) for out, part in (one, other)), lse  # type: ignore[return-value]


def _for_every_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values of grouped heads, once for each of the query's heads."""
    if x.shape[1] == query.shape[1]:
        return x
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _scores(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(exact) @ key.to(exact).transpose(-1, -2)) * scale
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = part_of_attention(query, key, value, is_causal, scale)
    return out.to(query.dtype), lse


@torch.library.register_fake("moptrace::attention", lib=_LIBRARY)
def _(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse = ctx.saved_tensors
    found = part_of_gradients(
        gradient.contiguous(), query, key, value, out, lse, ctx.is_causal, ctx.scale
    )
    return *(x.to(query.dtype) for x in found), None, None


torch.library.register_autograd(
    "moptrace::attention", _differentiate, setup_context=_save, lib=_LIBRARY
)
