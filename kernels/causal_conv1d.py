"""A convolution over the tokens of a sequence that sees no later tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["causal_conv1d", "convolve", "convolve_backward"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, int dilation, int groups) -> Tensor"
)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1, groups: int = 1
) -> Tensor:
    """``F.conv1d`` of ``x`` with as many zeros before it as the kernel reaches back.

    x [B, C, T], weight [D, C / groups, k], bias [D] -> [B, D, T].

    >>> causal_conv1d(torch.ones(1, 1, 3), torch.ones(1, 1, 2))
    tensor([[[1., 2., 2.]]])
    """
    return torch.ops.moptrace.causal_conv1d.default(x, weight, bias, dilation, groups)


def convolve(
    before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int
) -> Tensor:
    """The convolution of ``x`` after the tokens that the kernel reaches, [B, C, (k-1) dilation]."""
    return F.conv1d(torch.cat([before, x], -1), weight, bias, dilation=dilation, groups=groups)


def convolve_backward(
    gradient: Tensor,
    before: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of ``before``, ``x``, ``weight`` and ``bias``."""
    of_tokens, of_weight, of_bias = torch.ops.aten.convolution_backward.default(
        gradient, torch.cat([before, x], -1), weight, None if bias is None else list(bias.shape),
        [1], [0], [dilation], False, [0], groups, [True, True, bias is not None],
    )  # fmt: skip
    reach = before.shape[-1]
    return of_tokens[..., :reach], of_tokens[..., reach:], of_weight, of_bias


def _zeros_before(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], (weight.shape[-1] - 1) * dilation)


@torch.library.impl(_LIBRARY, "causal_conv1d", "CompositeExplicitAutograd")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, groups: int) -> Tensor:
    return convolve(_zeros_before(x, weight, dilation), x, weight, bias, dilation, groups)


@torch.library.register_fake("moptrace::causal_conv1d", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    before = _zeros_before(x, weight, ctx.dilation)
    _, *found = convolve_backward(gradient, before, x, weight, bias, ctx.dilation, ctx.groups)
    return *found, None, None


torch.library.register_autograd(
    "moptrace::causal_conv1d", _differentiate, setup_context=_save, lib=_LIBRARY
)
