"""What a loss needs of the logits of every token, without the logits.

Cross entropy, its label smoothing and the z-loss are functions of three numbers for each token, so
a graph that has these needs no logits: the rest of its loss is ordinary arithmetic on [N] tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moptrace.kernels.linear_cross_entropy import (
    log_sum_exp,
    vocab_shard_gradients,
    vocab_shard_statistics,
)

__all__ = ["vocab_projection"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "vocab_projection(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float scale, "
    "float? softcap) -> (Tensor, Tensor, Tensor)"
)


def vocab_projection(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's log-sum-exp of the logits, the logit of its target, and the sum of its logits.

    hidden [N, D], weight [V, D], targets int64 [N], bias [V] -> three of [N], in float32 at least.

    The logits are ``scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(logits / softcap)``
    where a cap is given. Requires: one dtype for hidden, weight and bias. A target outside [0, V)
    has the target logit 0. Ensures: no more of the logits exists at once than a block of them.

    >>> hidden, weight = torch.zeros(1, 2), torch.zeros(4, 2)
    >>> lse, target_logit, _ = vocab_projection(hidden, weight, torch.tensor([3]))
    >>> lse - target_logit
    tensor([1.3863])
    """
    return torch.ops.moptrace.vocab_projection.default(
        hidden, weight, bias, targets, scale, softcap
    )


@torch.library.impl(_LIBRARY, "vocab_projection", "CompositeExplicitAutograd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    found = vocab_shard_statistics(hidden, weight, targets, bias, scale=scale, softcap=softcap)
    return log_sum_exp(found), found.target_logit, found.sum_logits


@torch.library.register_fake("moptrace::vocab_projection", lib=_LIBRARY)
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    one, two, three = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
    return one, two, three


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[0])


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, lse = ctx.saved_tensors
    of_exp, of_target, of_sum = gradients
    needed = tuple(ctx.needs_input_grad[:3])
    found = vocab_shard_gradients(
        hidden,
        weight,
        targets,
        bias,
        shift=lse,
        of_exp=of_exp,
        of_target=of_target,
        of_sum=of_sum,
        scale=ctx.scale,
        softcap=ctx.softcap,
        output_mask=needed,
    )
    kept = (g if is_needed else None for g, is_needed in zip(found, needed, strict=True))
    return *kept, None, None, None


torch.library.register_autograd(
    "moptrace::vocab_projection", _differentiate, setup_context=_save, lib=_LIBRARY
)
