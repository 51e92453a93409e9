"""Attention to two sets of keys from attention to each: the step of a ring.

What a query got of a set of keys is its output and the log-sum-exp of its scores; each output
counts by its share of the exponentials (Milakov and Gimelshein, Online normalizer calculation for
softmax, 2018; Liu et al., Ring Attention, 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moptrace.kernels import triton_merge_attention
from moptrace.kernels.selection import choose

__all__ = ["merge_attention", "merge_attention_"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "merge_attention(Tensor out, Tensor lse, Tensor other, Tensor other_lse) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "merge_attention_(Tensor(a!) out, Tensor(b!) lse, Tensor other, Tensor other_lse) -> ()"
)


def merge_attention(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of either, given that to each.

    out and other [B, h, S, d], lse and other_lse [B, h, S] -> [B, h, S, d] and [B, h, S].

    Requires: one dtype, float32 or float64. Ensures: symmetric; associative but for rounding. A
    log-sum-exp of -inf is that of no key, whose output counts for nothing.

    >>> ones, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    >>> merge_attention(ones, lse, 3 * ones, lse)
    (tensor([[[[2., 2.]]]]), tensor([[[0.6931]]]))
    """
    return torch.ops.moptrace.merge_attention.default(out, lse, other, other_lse)


def merge_attention_(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """The same, written to ``out`` and ``lse``, which may be parts of larger tensors."""
    torch.ops.moptrace.merge_attention_.default(out, lse, other, other_lse)


@torch.library.impl(_LIBRARY, "merge_attention_", "CompositeExplicitAutograd")
def _(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    if choose("merge_attention", out) == "triton":
        triton_merge_attention.merge(out, lse, other, other_lse)
        return
    merged = torch.logaddexp(lse, other_lse)
    out.mul_(_share(lse, merged)).addcmul_(other, _share(other_lse, merged))
    lse.copy_(merged)


def _share(lse: Tensor, merged: Tensor) -> Tensor:
    """The part of all exponentials that those of some keys have: [B, h, S, 1]."""
    lowest = merged.clamp_min(torch.finfo(merged.dtype).min)  # of no key, -inf - -inf is nan
    return (lse - lowest).exp().unsqueeze(-1)


@torch.library.impl(_LIBRARY, "merge_attention", "CompositeExplicitAutograd")
def _(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    merged = out.clone(), lse.clone()
    merge_attention_(*merged, other, other_lse)
    return merged


@torch.library.register_fake("moptrace::merge_attention", lib=_LIBRARY)
def _(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(lse)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, of_merged: Tensor, of_lse: Tensor) -> tuple[Tensor, ...]:
    out, lse, other, other_lse, merged, merged_lse = ctx.saved_tensors
    found: list[Tensor] = []
    for part, part_lse in ((out, lse), (other, other_lse)):
        share = _share(part_lse, merged_lse)
        of_share = (of_merged * (part - merged)).sum(-1) + of_lse
        found += [of_merged * share, of_share * share.squeeze(-1)]
    return tuple(found)


torch.library.register_autograd(
    "moptrace::merge_attention", _differentiate, setup_context=_save, lib=_LIBRARY
)
