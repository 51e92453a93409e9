"""The sweeps of ``moptrace.kernels.logit_blocks`` in Triton: logits never leave the chip.

A program of ``statistics`` owns some tokens and a span of the vocabulary; what the spans' programs
found is merged at the end. In ``gradients`` one kernel owns tokens and loops over words, the other
owns words and loops over tokens. Each adds to rows that no other program touches, so the order of
every sum is fixed: no atomics, the same bits each time. Offsets are 64-bit.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false
# Triton has no types, and is not there on every machine.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moptrace.kernels.logit_blocks import LogitGradient, Shard, shiftable
from moptrace.kernels.triton_jit import ceil, jit, tl

__all__ = ["gradients", "statistics"]


def statistics(shard: Shard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sweep the logits once: their maximum, sum of exponentials, target and sum, each [N].

    Requires: Triton; float16, bfloat16 or float32 operands.
    """
    tokens, words = len(shard.hidden), len(shard.weight)
    tile = _tile(shard.hidden)
    blocks = ceil(tokens, tile["TOKENS"])
    spans = max(min(ceil(_programs(shard.hidden), max(blocks, 1)), ceil(words, tile["WORDS"])), 1)
    span = ceil(ceil(words, tile["WORDS"]), spans) * tile["WORDS"]
    found = shard.hidden.new_empty(4, spans, tokens, dtype=torch.float32)
    if tokens:
        _statistics_kernel[(blocks, spans)](
            *_operands(shard), found, tokens, words, span, **_options(shard), **tile
        )
    top = found[0].amax(0)
    sum_exp = found[1].mul_((found[0] - shiftable(top)).exp_()).sum(0)
    return top, sum_exp, found[2].sum(0), found[3].sum(0)


def gradients(
    shard: Shard,
    of_logits: LogitGradient,
    of_hidden: Tensor | None,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    skip_below: float = 0.0,
) -> None:
    """Sweep the logits once for each operand and write the gradients that are asked for.

    of_hidden [N, D], of_weight [V, D], of_bias [V] are written; None is skipped. Blocks are left
    out in which no logit's gradient is more than ``skip_below`` times the size of ``of_exp``.

    Requires: Triton; float16, bfloat16 or float32 operands.
    Ensures: accumulated in float32 and rounded once; deterministic. For bfloat16 and float16 each
    logit's gradient is rounded to that dtype before it is multiplied, as eager does.
    """
    tokens, words = len(shard.hidden), len(shard.weight)
    coefficients = [x.contiguous() for x in of_logits]
    tile, options = _tile(shard.hidden), _options(shard)
    options |= {"skip_below": skip_below, "IS_EXACT": not skip_below}
    if of_hidden is not None:
        total = _accumulator(of_hidden, tokens)
        if tokens:
            _hidden_kernel[(ceil(tokens, tile["TOKENS"]),)](
                *_operands(shard), *coefficients, total, tokens, words, **options, **tile
            )
        if total is not of_hidden:
            of_hidden.copy_(total)
    if of_weight is None and of_bias is None:
        return
    # The float32 sums of some rows at a time: those of all would be larger than the weight.
    rows = max(_ROW_BYTES // (4 * max(shard.weight.shape[1], 1)), 1)
    rows = min(max(rows // tile["WORDS"], 1) * tile["WORDS"], words)
    for first in range(0, words, max(rows, 1)):
        here = slice(first, min(first + rows, words))
        of_rows = None if of_weight is None else of_weight[here]
        sums = shard.hidden if of_rows is None else _accumulator(of_rows, here.stop - first)
        of_words = sums.new_zeros(here.stop - first, dtype=torch.float32)
        _weight_kernel[(ceil(here.stop - first, tile["WORDS"]),)](
            *_operands(shard),
            *coefficients,
            sums,
            of_words,
            tokens,
            here.stop,
            first,
            HAS_SUMS=of_rows is not None,
            **options,
            **tile,
        )
        if of_rows is not None and sums is not of_rows:
            of_rows.copy_(sums)
        if of_bias is not None:
            of_bias[here] = of_words


# launches

# Float32 sums of the weight's gradient at a time: enough rows for every processor of a GPU.
_ROW_BYTES = 256 << 20


def _programs(x: Tensor) -> int:
    """How many programs keep the device busy."""
    if not x.is_cuda:
        return 4
    return 4 * torch.cuda.get_device_properties(x.device).multi_processor_count


def _tile(x: Tensor) -> dict[str, Any]:
    """The sizes of a block of logits and of the pieces that its products are added up from."""
    if x.dtype is torch.float32:
        return {"TOKENS": 64, "WORDS": 64, "WIDTH": 32, "num_warps": 4}
    return {"TOKENS": 128, "WORDS": 128, "WIDTH": 64, "num_warps": 8}


def _operands(shard: Shard) -> tuple[Any, ...]:
    """The tensors, with the strides of the two matrices, and the width."""
    hidden, weight = shard.hidden.contiguous(), shard.weight.contiguous()
    bias = weight if shard.bias is None else shard.bias.contiguous()
    return hidden, weight, bias, shard.labels.contiguous(), hidden.shape[1]


def _options(shard: Shard) -> dict[str, Any]:
    return {
        "scale": shard.scale,
        "softcap": 1.0 if shard.softcap is None else shard.softcap,
        "HAS_BIAS": shard.bias is not None,
        "HAS_CAP": shard.softcap is not None,
    }


def _accumulator(like: Tensor, rows: int) -> Tensor:
    """Zeros to add to in float32: the result itself where it has that dtype."""
    if like.dtype is torch.float32 and like.is_contiguous():
        return like.zero_()
    return like.new_zeros(rows, like.shape[1], dtype=torch.float32)


# kernels


@jit
def _logits(
    hidden,
    weight,
    bias,
    width,
    token,
    word,
    is_token,
    is_word,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of capped logits, and the derivative of each by its product."""
    logits = tl.zeros((TOKENS, WORDS), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        is_column = column < width
        a = tl.load(
            hidden + token[:, None] * width + column[None, :],
            mask=is_token[:, None] & is_column[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + word[:, None] * width + column[None, :],
            mask=is_word[:, None] & is_column[None, :],
            other=0.0,
        )
        # By default a GPU rounds float32 operands to ten bits here.
        logits = tl.dot(a, tl.trans(b), logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias + word, mask=is_word, other=0.0).to(tl.float32)[None, :]
    logits *= scale
    slope = tl.full((TOKENS, WORDS), scale, dtype=tl.float32)
    if HAS_CAP:
        # tanh by the logistic function, which never overflows: exact to the rounding of the cap.
        tanh = 2 * tl.sigmoid(2 * logits / softcap) - 1
        logits = softcap * tanh
        slope *= 1 - tanh * tanh
    return logits, slope


@jit
def _of_products(
    logits,
    slope,
    labels,
    shift,
    of_exp,
    of_target,
    of_sum,
    token,
    word,
    is_token,
    is_word,
    skip_below,
    IS_EXACT: tl.constexpr,
):
    """The gradient of a tile of products of tokens and words, and whether it counts."""
    label = tl.load(labels + token, mask=is_token, other=-1)
    shift = tl.load(shift + token, mask=is_token, other=0.0)[:, None]
    of_exp = tl.load(of_exp + token, mask=is_token, other=0.0)[:, None]
    of_target = tl.load(of_target + token, mask=is_token, other=0.0)[:, None]
    of_sum = tl.load(of_sum + token, mask=is_token, other=0.0)[:, None]
    # Words that are not there are multiplied by rows of zeros, so all must be finite.
    is_there = is_token[:, None] & is_word[None, :]
    grad = of_exp * tl.exp(tl.where(is_there, logits - shift, 0.0)) + of_sum
    grad += tl.where(word[None, :] == label[:, None], of_target, 0.0)
    counts = True
    if not IS_EXACT:
        excess = tl.abs(grad) - skip_below * tl.abs(of_exp)
        counts = tl.max(tl.where(is_there, excess, 0.0)) > 0
    return grad * slope, counts


@jit
def _statistics_kernel(
    hidden,
    weight,
    bias,
    labels,
    width,
    found,
    tokens,
    words,
    span,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    label = tl.load(labels + token, mask=is_token, other=-1)
    top = tl.full((TOKENS,), float("-inf"), dtype=tl.float32)
    sum_exp = tl.zeros((TOKENS,), dtype=tl.float32)
    target_logit = tl.zeros((TOKENS,), dtype=tl.float32)
    sum_logits = tl.zeros((TOKENS,), dtype=tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, words), WORDS):
        word = start + tl.arange(0, WORDS).to(tl.int64)
        is_word = word < words
        logits, _ = _logits(
            hidden,
            weight,
            bias,
            width,
            token,
            word,
            is_token,
            is_word,
            scale,
            softcap,
            HAS_BIAS,
            HAS_CAP,
            TOKENS,
            WORDS,
            WIDTH,
        )
        is_label = (word[None, :] == label[:, None]) & is_word[None, :]
        target_logit += tl.sum(tl.where(is_label, logits, 0.0), 1)
        sum_logits += tl.sum(tl.where(is_word[None, :], logits, 0.0), 1)
        logits = tl.where(is_word[None, :], logits, float("-inf"))
        after = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(after == float("-inf"), 0.0, after)
        sum_exp = sum_exp * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = after
    spans = tl.num_programs(1).to(tl.int64)
    found += tl.program_id(1).to(tl.int64) * tokens + token
    tl.store(found, top, mask=is_token)
    tl.store(found + spans * tokens, sum_exp, mask=is_token)
    tl.store(found + 2 * spans * tokens, target_logit, mask=is_token)
    tl.store(found + 3 * spans * tokens, sum_logits, mask=is_token)


@jit
def _hidden_kernel(
    hidden,
    weight,
    bias,
    labels,
    width,
    shift,
    of_exp,
    of_target,
    of_sum,
    total,
    tokens,
    words,
    scale,
    softcap,
    skip_below,
    IS_EXACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS).to(tl.int64)
        is_word = word < words
        logits, slope = _logits(
            hidden,
            weight,
            bias,
            width,
            token,
            word,
            is_token,
            is_word,
            scale,
            softcap,
            HAS_BIAS,
            HAS_CAP,
            TOKENS,
            WORDS,
            WIDTH,
        )
        grad, counts = _of_products(
            logits,
            slope,
            labels,
            shift,
            of_exp,
            of_target,
            of_sum,
            token,
            word,
            is_token,
            is_word,
            skip_below,
            IS_EXACT,
        )
        grad = grad.to(weight.dtype.element_ty)
        if counts:
            for part in range(0, width, WIDTH):
                column = part + tl.arange(0, WIDTH)
                is_column = column < width
                b = tl.load(
                    weight + word[:, None] * width + column[None, :],
                    mask=is_word[:, None] & is_column[None, :],
                    other=0.0,
                )
                own = total + token[:, None] * width + column[None, :]
                mask = is_token[:, None] & is_column[None, :]
                before = tl.load(own, mask=mask, other=0.0)
                tl.store(own, tl.dot(grad, b, before, input_precision="ieee"), mask=mask)
            tl.debug_barrier()  # another thread of this program may load what one has stored


@jit
def _weight_kernel(
    hidden,
    weight,
    bias,
    labels,
    width,
    shift,
    of_exp,
    of_target,
    of_sum,
    total,
    of_words,
    tokens,
    words,
    first,
    scale,
    softcap,
    skip_below,
    IS_EXACT: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    word = first + row
    is_word = word < words
    of_word = tl.zeros((WORDS,), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS).to(tl.int64)
        is_token = token < tokens
        logits, slope = _logits(
            hidden,
            weight,
            bias,
            width,
            token,
            word,
            is_token,
            is_word,
            scale,
            softcap,
            HAS_BIAS,
            HAS_CAP,
            TOKENS,
            WORDS,
            WIDTH,
        )
        grad, counts = _of_products(
            logits,
            slope,
            labels,
            shift,
            of_exp,
            of_target,
            of_sum,
            token,
            word,
            is_token,
            is_word,
            skip_below,
            IS_EXACT,
        )
        if counts:
            of_word += tl.sum(grad, 0)
            if HAS_SUMS:
                of_words_first = tl.trans(grad.to(hidden.dtype.element_ty))
                for part in range(0, width, WIDTH):
                    column = part + tl.arange(0, WIDTH)
                    is_column = column < width
                    a = tl.load(
                        hidden + token[:, None] * width + column[None, :],
                        mask=is_token[:, None] & is_column[None, :],
                        other=0.0,
                    )
                    own = total + row[:, None] * width + column[None, :]
                    mask = is_word[:, None] & is_column[None, :]
                    before = tl.load(own, mask=mask, other=0.0)
                    sums = tl.dot(of_words_first, a, before, input_precision="ieee")
                    tl.store(own, sums, mask=mask)
                tl.debug_barrier()  # another thread of this program may load what one has stored
    tl.store(of_words + row, of_word, mask=is_word)
