"""The update of Adam and AdamW in Triton: each number is read once, and written once.

The arithmetic is that of torch's fused kernel for a GPU (fused_adam_utils.cuh of torch 2.13), in
float32, operation by operation: where that multiplies and adds in one, so does this.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false
# Triton has no types, and is not there on every machine.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moptrace.kernels.triton_jit import ceil, jit, tl

__all__ = ["update"]

_BLOCK = 1024


def update(
    x: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool,
    seed: int | None,
    offset: int,
) -> None:
    """Change a parameter and its moments in place, each in its own dtype.

    Requires: no float64; bfloat16 for a parameter that is rounded by ``seed``.
    """
    if not x.numel():
        return
    held = [x, *moments]
    dense = [value.contiguous() for value in held]
    one = torch.ones((), device=x.device)
    # Torch's kernel takes powers of float32 numbers, and so does this operator on a GPU.
    step = step.to(x.device, torch.float32)
    corrections = [one - torch.pow(one * beta, step) for beta in (beta1, beta2)]
    options: dict[str, Any] = {
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "eps": eps,
        "seed": 0 if seed is None else seed,
        "offset": offset,
        "DECAYS": weight_decay != 0,
        "DECOUPLED": decoupled,
        "MAXIMIZE": maximize,
        "AMSGRAD": amsgrad,
        "STOCHASTIC": seed is not None,
        "BLOCK": _BLOCK,
    }
    largest = dense[3] if amsgrad else dense[2]
    _update_kernel[(ceil(x.numel(), _BLOCK),)](
        dense[0],
        grad.contiguous(),
        *dense[1:3],
        largest,
        lr.to(x.device, torch.float32),
        step,
        *corrections,
        x.numel(),
        **options,
    )
    for value, new in zip(held, dense, strict=True):
        if value is not new:
            value.copy_(new)


@jit
def _update_kernel(
    x,
    grad,
    first,
    second,
    largest,
    lr,
    step,
    correction1,
    correction2,
    total,
    beta1,
    beta2,
    weight_decay,
    eps,
    seed,
    offset,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < total
    value = tl.load(x + place, mask=is_there, other=0.0).to(tl.float32)
    slope = tl.load(grad + place, mask=is_there, other=0.0).to(tl.float32)
    mean = tl.load(first + place, mask=is_there, other=0.0).to(tl.float32)
    square = tl.load(second + place, mask=is_there, other=0.0).to(tl.float32)
    rate = tl.load(lr)
    if MAXIMIZE:
        slope = -slope
    if DECAYS:
        if DECOUPLED:
            value = tl.fma(-(rate * weight_decay), value, value)
        else:
            slope = tl.fma(value, weight_decay, slope)
    mean = tl.fma(beta1, mean, tl.fma(-beta1, slope, slope))
    squared = slope * slope
    square = tl.fma(beta2, square, tl.fma(-beta2, squared, squared))
    bound = square
    if AMSGRAD:
        bound = tl.load(largest + place, mask=is_there, other=0.0).to(tl.float32)
        bound = tl.maximum(bound, square)
        tl.store(largest + place, bound.to(largest.dtype.element_ty), mask=is_there)
    scale = tl.div_rn(tl.sqrt_rn(bound), tl.sqrt_rn(tl.load(correction2))) + eps
    value -= tl.div_rn(tl.div_rn(rate, tl.load(correction1)) * mean, scale)
    tl.store(first + place, mean.to(first.dtype.element_ty), mask=is_there)
    tl.store(second + place, square.to(second.dtype.element_ty), mask=is_there)
    if STOCHASTIC:
        group, lane = (place + offset) // 8, (place + offset) % 8
        count = tl.full((BLOCK,), 0, dtype=tl.int32) + tl.load(step).to(tl.int32)
        low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
        a, b, c, d = tl.philox(seed, low, high, count, tl.zeros_like(count))
        word = tl.where(lane < 4, tl.where(lane < 2, a, b), tl.where(lane < 6, c, d))
        bits = tl.where(lane % 2 == 0, word, word >> 16) & 0xFFFF
        carried = (value.to(tl.uint32, bitcast=True) + bits) >> 16
        rounded = carried.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        # Of infinities and nan, nothing is carried; of others, nothing is left to round.
        value = tl.where(tl.abs(value) < float("inf"), rounded.to(tl.float32), value)
    tl.store(x + place, value.to(x.dtype.element_ty), mask=is_there)
