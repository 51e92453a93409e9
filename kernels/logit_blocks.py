"""The logits of tokens over a part of the vocabulary, swept in blocks of ATen operators.

One block of logits exists at a time. ``statistics`` folds each into an online log-sum-exp;
``gradients`` computes it again, turns it into its own gradient and multiplies that into the
gradients of tokens, weight and bias. Both run on every device and in every floating-point type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moptrace.kernels import onednn

__all__ = ["LogitGradient", "Shard", "exact", "gradients", "shiftable", "statistics"]

# Bytes of logits at a time where the caller does not say, on a CPU for each thread: it is fastest
# while they stay near its cache. A GPU needs large products to be busy.
_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}

# Beside a block lies at most one tensor of its shape, a copy of it.
_BUFFERS = 2

# With more tokens at a time the products are no faster.
_TOKENS = 512


@dataclass(frozen=True)
class Shard:
    """Logits that are not computed yet: scale * (hidden @ weight.T + bias), then capped.

    hidden [N, D], weight [V, D], bias [V], labels int64 [N] counted from the weight's first row.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    scale: float
    softcap: float | None
    block_bytes: int | None


class LogitGradient(NamedTuple):
    """The gradient of token n's logit z: of_exp[n] * exp(z - shift[n]) + of_sum[n].

    At the label it is greater by of_target[n]. Each is [N].
    """

    shift: Tensor
    of_exp: Tensor
    of_target: Tensor
    of_sum: Tensor


def exact(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype in which logits and sums of values of ``dtype`` are formed.

    >>> exact(torch.bfloat16), exact(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def shiftable(top: Tensor) -> Tensor:
    """Replace -inf, the largest of no logits, by a number that can be subtracted from it.

    >>> shiftable(torch.tensor([2.0, -torch.inf]))
    tensor([2., 0.])
    """
    return top.masked_fill(top == -math.inf, 0)


def statistics(shard: Shard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sweep the logits once: their maximum, sum of exponentials, target and sum, each [N].

    >>> logits = torch.tensor([[0.0], [2.0]])
    >>> statistics(Shard(torch.ones(1, 1), logits, None, torch.tensor([0]), 1.0, None, None))
    (tensor([2.]), tensor([1.1353]), tensor([0.]), tensor([2.]))
    """
    blocks = _Blocks.of(shard)
    hidden = blocks.hidden
    top = hidden.new_full((len(hidden),), -math.inf)
    sum_exp, target_logit, sum_logits = (torch.zeros_like(top) for _ in range(3))
    for words in blocks.words():
        for tokens in blocks.tokens:
            logits = words.logits(tokens)
            if shard.softcap is not None:
                logits.div_(shard.softcap).tanh_().mul_(shard.softcap)
            column, is_here = words.targets(tokens)
            found = logits.gather(1, column).squeeze(1)
            target_logit[tokens] += found.where(is_here, 0)
            sum_logits[tokens] += logits.sum(1)
            before = top[tokens]
            after = torch.maximum(before, logits.amax(1))
            shift = shiftable(after)
            rescaled = sum_exp[tokens] * (before - shift).exp_()
            sum_exp[tokens] = rescaled.add_(logits.sub_(shift.unsqueeze(1)).exp_().sum(1))
            top[tokens] = after
            del logits  # or two would exist while the next is computed
    return top, sum_exp, target_logit, sum_logits


def gradients(
    shard: Shard,
    of_logits: LogitGradient,
    of_hidden: Tensor | None,
    of_weight: Tensor | None,
    of_bias: Tensor | None,
    skip_below: float = 0.0,
) -> None:
    """Sweep the logits once and write the gradients that are asked for.

    of_hidden [N, D], of_weight [V, D], of_bias [V] are written; None is skipped. Blocks are left
    out in which no logit's gradient is more than ``skip_below`` times the size of ``of_exp``.

    Ensures: each gradient is accumulated in float32 at least and rounded once.

    >>> shard = Shard(torch.ones(1, 2), torch.zeros(2, 2), None, torch.tensor([1]), 1.0, None, None)
    >>> of_logits = LogitGradient(*torch.tensor([[0.0], [0.5], [-1.0], [0.0]]))
    >>> gradients(shard, of_logits, None, of_weight := torch.empty(2, 2), None)
    >>> of_weight
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    blocks = _Blocks.of(shard)
    hidden, products = blocks.hidden, blocks.products
    total = of_hidden
    if of_hidden is not None:
        wide = of_hidden.dtype == hidden.dtype
        total = of_hidden.zero_() if wide else torch.zeros_like(hidden)
    # The derivative of the scale, once for each token and not once for each logit.
    shift, *coefficients = (x.unsqueeze(1) for x in of_logits)
    of_exp, of_target, of_sum = (x * shard.scale for x in coefficients)
    for words in blocks.words():
        # Transposed, because this product is the faster one with the tokens along its rows.
        of_words = (
            hidden.new_zeros(hidden.shape[1], len(words.weight)) if of_weight is not None else None
        )
        of_word = hidden.new_zeros(len(words.weight)) if of_bias is not None else None
        for tokens in blocks.tokens:
            logits = words.logits(tokens)
            slope = None
            if shard.softcap is not None:
                slope = logits.div_(shard.softcap).tanh_()
                logits = slope * shard.softcap
                slope.square_().neg_().add_(1)
            column, is_here = words.targets(tokens)
            grad = logits.sub_(shift[tokens]).exp_().mul_(of_exp[tokens]).add_(of_sum[tokens])
            grad.scatter_add_(1, column, of_target[tokens].where(is_here.unsqueeze(1), 0))
            if skip_below and (grad.abs() <= skip_below * of_exp[tokens].abs()).all():
                continue
            if slope is not None:
                grad.mul_(slope)
            if total is not None:
                products.add(total[tokens], grad, words.weight)
            if of_words is not None:
                products.add(of_words, hidden[tokens].t(), grad)
            if of_word is not None:
                of_word += grad.sum(0)
            del logits, grad, slope
        if of_weight is not None and of_words is not None:
            of_weight[words.rows] = of_words.t()
        if of_bias is not None and of_word is not None:
            of_bias[words.rows] = of_word
    if of_hidden is not None and total is not None and total is not of_hidden:
        of_hidden.copy_(total)


# blocks


@dataclass(frozen=True)
class _Words:
    """The rows of the weight that one column of blocks is made of."""

    shard: Shard
    hidden: Tensor
    rows: slice
    weight: Tensor
    bias: Tensor | None
    products: _Products

    def logits(self, tokens: slice) -> Tensor:
        """The block of these tokens' scaled logits, which the next one overwrites."""
        logits = self.products.logits(self.hidden[tokens], self.weight)
        if self.bias is not None:
            logits.add_(self.bias)
        return logits if self.shard.scale == 1 else logits.mul_(self.shard.scale)

    def targets(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """For each token a column of the block [n, 1], and whether it is that of its label [n]."""
        column = self.shard.labels[tokens] - self.rows.start
        last = len(self.weight) - 1
        return column.clamp(0, last).unsqueeze(1), (column >= 0) & (column <= last)


@dataclass(frozen=True)
class _Blocks:
    """How the logits of a shard are cut, and what computes them."""

    shard: Shard
    hidden: Tensor
    tokens: list[slice]
    width: int
    products: _Products

    @staticmethod
    def of(shard: Shard) -> _Blocks:
        hidden = shard.hidden.to(exact(shard.hidden.dtype)).contiguous()
        number, device = len(hidden), hidden.device.type
        budget = shard.block_bytes
        if budget is None:
            threads = torch.get_num_threads() if device == "cpu" else 1
            budget = threads * _BLOCK_BYTES.get(device, _BLOCK_BYTES["cuda"])
        logits = max(budget // (_BUFFERS * hidden.element_size()), 1)
        height = _even(number, min(_TOKENS, math.isqrt(logits)))
        width = _even(len(shard.weight), logits // height)
        height = _even(number, logits // width)  # what few words leave, more tokens use
        products = _Products(hidden, logits)
        return _Blocks(shard, hidden, _slices(number, height), width, products)

    def words(self) -> Iterator[_Words]:
        shard, dtype = self.shard, self.hidden.dtype
        for rows in _slices(len(shard.weight), self.width):
            weight = shard.weight[rows].to(dtype).contiguous()
            bias = None if shard.bias is None else shard.bias[rows].to(dtype)
            yield _Words(shard, self.hidden, rows, weight, bias, self.products)


def _even(total: int, size: int) -> int:
    """The size of as few alike slices as cover the total, none larger than ``size``."""
    return math.ceil(total / math.ceil(total / size)) if total else 1


def _slices(total: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, total)) for i in range(0, total, size)]


class _Products:
    """The three matrix products of a block, by the faster of the two libraries of a CPU."""

    def __init__(self, hidden: Tensor, logits: int) -> None:
        self.by_onednn = (
            hidden.device.type == "cpu"
            and hidden.dtype is torch.float32
            and hidden.shape[1] >= 16
            and onednn.is_faster()
        )
        self.block = hidden.new_empty(0 if self.by_onednn else logits)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [n, D] and weight [v, D] -> [n, v], in the one buffer that all blocks share."""
        if self.by_onednn:
            return _onednn(hidden, weight)
        out = self.block[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        return torch.mm(hidden, weight.t(), out=out)

    def add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Add the product of a and b to the total."""
        if self.by_onednn:
            total.add_(_onednn(a, b.t()))
        else:
            torch.addmm(total, a, b, out=total)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """The product of a and the transpose of b."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
