"""The vocabulary projection and its cross entropy in one: logits exist only as blocks.

The logits of N tokens over V words are the largest tensor of a training step. Here they are
computed block by block, each block is used and overwritten by the next, and what remains of a token
is four numbers: its statistics. Those of two parts of the vocabulary merge, so a vocabulary whose
rows lie on several ranks needs nothing else. The backward computes the blocks again.

With the logits y = scale * (hidden @ weight.T + bias), capped to z = softcap * tanh(y / softcap)
where a cap is given, and with the log-sum-exp taken over the whole vocabulary, a token's loss is
that of ``torch.nn.functional.cross_entropy`` with label smoothing, and the z-loss:

    lse - (1 - label_smoothing) * z[target] - label_smoothing * mean(z) + z_loss * lse**2

Everything is exact: no part of a gradient is dropped for being small, as Cut Cross-Entropy does by
default, unless ``skip_below`` asks for that. ``moptrace.kernels.reference`` says what each operator
means.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moptrace.kernels import logit_blocks, triton_linear_cross_entropy
from moptrace.kernels.logit_blocks import LogitGradient, Shard, exact, shiftable
from moptrace.kernels.selection import choose

__all__ = [
    "VocabStatistics",
    "kept_tokens",
    "linear_cross_entropy",
    "log_sum_exp",
    "loss_from_statistics",
    "merge_statistics",
    "vocab_shard_gradients",
    "vocab_shard_statistics",
]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "vocab_shard_statistics(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "SymInt start, float scale, float? softcap, int? block_bytes) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "vocab_shard_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "Tensor shift, Tensor of_exp, Tensor of_target, Tensor of_sum, SymInt start, float scale, "
    "float? softcap, int? block_bytes, ScalarType? dtype, bool[] output_mask, "
    "float skip_below=0.0) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("kept_tokens(Tensor targets, SymInt vocab_size, int ignore_index) -> Tensor")
_LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
    "int ignore_index, float label_smoothing, float? softcap, float scale, float z_loss, "
    "int? block_bytes, float skip_below=0.0) -> (Tensor, Tensor)"
)


class VocabStatistics(NamedTuple):
    """What is kept of each token's logits over a part of the vocabulary, each [N].

    ``max`` is the largest logit, -inf where there is none; it is a shift, not a result, and counts
    as a constant in derivatives. ``sum_exp`` is the sum of exp(logit - max). ``target_logit`` is
    the logit of the label, 0 where the label lies in another part. ``sum_logits`` is the sum of the
    logits, which label smoothing needs.
    """

    max: Tensor
    sum_exp: Tensor
    target_logit: Tensor
    sum_logits: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: Literal["sum", "none"] = "sum",
    block_bytes: int | None = None,
    skip_below: float = 0.0,
) -> Tensor:
    """Project tokens onto the vocabulary and take the cross entropy, without the logits.

    hidden [N, D], weight [V, D], targets int64 [N], bias [V] -> [] or, with "none", [N].

    Requires: one dtype of float16, bfloat16, float32, float64 for hidden, weight and bias.
    Ensures: a token whose target is ``ignore_index`` has exactly no loss and no gradient; the
    result is in float32, or float64 for float64; logits, sums and gradients are formed in that
    dtype and gradients rounded once. At any time, all logits that exist take at most
    ``block_bytes``: by default 4 MiB for each thread of a CPU; Triton keeps them on the chip and
    ignores the number. Beside them are the tokens in that dtype and a few blocks of rows of the
    weight. It is differentiable once.

    With ``skip_below`` the gradients are **not exact**: blocks of logits are left out of them in
    which no logit's gradient is more than so much of its token's loss's, which saves two of the
    three products of a backward where most words are hopeless (Cut Cross-Entropy's filter, whose
    threshold is 2**-12). The loss stays exact.

    Raises: IndexError for another target outside [0, V); on CUDA a device-side assertion.
    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (2025).

    >>> hidden, weight = torch.zeros(3, 2), torch.zeros(4, 2)
    >>> linear_cross_entropy(hidden, weight, torch.tensor([0, 3, -100]), reduction="none")
    tensor([1.3863, 1.3863, 0.0000])
    """
    losses, _ = torch.ops.moptrace.linear_cross_entropy.default(
        hidden,
        weight,
        bias,
        targets,
        ignore_index,
        label_smoothing,
        softcap,
        scale,
        z_loss,
        block_bytes,
        skip_below,
    )
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    raise ValueError(f'the reduction is "sum" or "none", not "{reduction}"')


def vocab_shard_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    start: int = 0,
    softcap: float | None = None,
    scale: float = 1.0,
    block_bytes: int | None = None,
) -> VocabStatistics:
    """Summarise each token's logits over the rows [start, start + V_s) of the vocabulary.

    hidden [N, D], weight [V_s, D], targets int64 [N], bias [V_s] -> four of [N].

    Requires: one dtype for hidden, weight and bias; ``targets`` count from the vocabulary's start,
    and those outside this shard may be anything. V_s may be 0.
    Ensures: float32 at least. Differentiable once, with ``max`` as a constant: right for every
    function of the statistics that does not change with the shift, such as the loss. Autograd
    rounds this shard's part of the gradient of ``hidden`` to its dtype; to add parts before they
    are rounded, call ``vocab_shard_gradients`` with ``dtype=torch.float32``.

    >>> hidden, weight = torch.ones(1, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> vocab_shard_statistics(hidden, weight[1:], torch.tensor([2]), start=1)
    VocabStatistics(max=tensor([2.]), sum_exp=tensor([1.3679]), target_logit=tensor([2.]), \
sum_logits=tensor([3.]))
    """
    return VocabStatistics(
        *torch.ops.moptrace.vocab_shard_statistics.default(
            hidden, weight, bias, targets, start, scale, softcap, block_bytes
        )
    )


def vocab_shard_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor,
    of_exp: Tensor,
    of_target: Tensor,
    of_sum: Tensor,
    start: int = 0,
    softcap: float | None = None,
    scale: float = 1.0,
    block_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
    skip_below: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate any function of one shard's statistics, computing its logits once more.

    hidden [N, D], weight [V_s, D], targets int64 [N], bias [V_s], shift, of_exp, of_target and
    of_sum [N] -> gradients [N, D], [V_s, D] and [V_s]; that of a bias that is not there, and one
    that ``output_mask`` does not ask for, is empty.

    The gradient of token n's logit v is ``of_exp[n] * exp(z - shift[n]) + of_sum[n]``, and
    ``of_target[n]`` more where v is the target. For a loss the shift is the log-sum-exp over the
    whole vocabulary, so that the exponential is the probability.

    Requires: the last four in the dtype of the statistics; no logit much larger than its shift.
    Ensures: accumulated in float32 at least; returned in ``dtype``, or else in the operands' own.
    The sum over all shards of the first is the gradient of ``hidden``. Deterministic. With
    ``skip_below``, blocks are left out in which no logit's gradient is more than that times the
    size of its token's ``of_exp``.

    >>> hidden, weight = torch.ones(1, 2), torch.zeros(2, 2)
    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> lse = torch.tensor([2.0]).log()
    >>> vocab_shard_gradients(
    ...     hidden, weight, torch.tensor([1]), shift=lse, of_exp=one, of_target=-one, of_sum=zero
    ... )[1]
    tensor([[ 0.5000,  0.5000],
            [-0.5000, -0.5000]])
    """
    return torch.ops.moptrace.vocab_shard_gradients.default(
        hidden,
        weight,
        bias,
        targets,
        shift,
        of_exp,
        of_target,
        of_sum,
        start,
        scale,
        softcap,
        block_bytes,
        dtype,
        list(output_mask),
        skip_below,
    )


def merge_statistics(a: VocabStatistics, b: VocabStatistics) -> VocabStatistics:
    """Summarise two parts of the vocabulary as one; associative, commutative, differentiable.

    >>> one_word = torch.zeros(1), torch.ones(1), torch.zeros(1), torch.zeros(1)
    >>> merge_statistics(VocabStatistics(*one_word), VocabStatistics(*one_word)).sum_exp
    tensor([2.])
    """
    top = torch.maximum(a.max, b.max)
    shift = shiftable(top)
    return VocabStatistics(
        top,
        a.sum_exp * (a.max - shift).exp() + b.sum_exp * (b.max - shift).exp(),
        a.target_logit + b.target_logit,
        a.sum_logits + b.sum_logits,
    )


def log_sum_exp(statistics: VocabStatistics) -> Tensor:
    """Take the logarithm of the sum of a token's exponentials: [N].

    >>> log_sum_exp(VocabStatistics(*torch.tensor([[3.0], [1.0], [0.0], [0.0]])))
    tensor([3.])
    """
    return statistics.max + statistics.sum_exp.log()


def loss_from_statistics(
    statistics: VocabStatistics,
    targets: Tensor,
    vocab_size: int,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Form each token's loss from its statistics over the whole vocabulary.

    statistics of [N], targets int64 [N] -> [N], 0 where the target is ``ignore_index``.

    Requires: ``vocab_size`` is that of the whole vocabulary, whose shards were all merged.
    Raises: IndexError for a target outside [0, vocab_size); on CUDA a device-side assertion.

    >>> statistics = VocabStatistics(*torch.tensor([[0.0], [4.0], [0.0], [0.0]]))
    >>> loss_from_statistics(statistics, torch.tensor([3]), 4)
    tensor([1.3863])
    """
    kept = kept_tokens(targets, vocab_size, ignore_index)
    lse = log_sum_exp(statistics)
    losses = lse - (1 - label_smoothing) * statistics.target_logit
    if label_smoothing:  # without it, a word that its bias of -inf rules out costs nothing
        losses = losses - statistics.sum_logits * (label_smoothing / vocab_size)
    if z_loss:
        losses = losses + z_loss * lse.square()
    return losses.where(kept, 0)


def kept_tokens(targets: Tensor, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """Say which tokens have a label, and refuse labels that do not exist: bool [N].

    targets int64 [N]. An operator, so that a graph keeps the check together with its result.

    Raises: IndexError for a target that is neither in [0, vocab_size) nor ``ignore_index``; on CUDA
    a device-side assertion, as ``torch.nn.functional.cross_entropy`` does.

    >>> kept_tokens(torch.tensor([0, -100, 4]), 5)
    tensor([ True, False,  True])
    """
    return torch.ops.moptrace.kept_tokens.default(targets, vocab_size, ignore_index)


_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton_linear_cross_entropy, "blocks": logit_blocks}


def _implementation(hidden: Tensor) -> Any:
    return _IMPLEMENTATIONS[choose("linear_cross_entropy", hidden)]


def _shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    options: tuple[float, float | None, int | None],
) -> Shard:
    _check_operands(hidden, weight, bias, targets)
    return Shard(hidden, weight, bias, targets - start if start else targets, *options)


# kept_tokens


@torch.library.impl(_LIBRARY, "kept_tokens", "CompositeExplicitAutograd")
def _(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    kept = targets != ignore_index
    exists = ((targets >= 0) & (targets < vocab_size)).logical_or_(~kept)
    if targets.device.type != "cpu":  # to look at the answer would stall the device
        torch._assert_async(exists.all(), "a label is neither in the vocabulary nor ignored")
    elif not exists.all():
        token = int(exists.logical_not().nonzero()[0, 0])
        raise IndexError(
            f"label {int(targets[token])} of token {token} does not exist: labels lie in "
            f"[0, {vocab_size}), or are {ignore_index} where a token is to be ignored"
        )
    return kept


@torch.library.register_fake("moptrace::kept_tokens", lib=_LIBRARY)
def _(targets: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return torch.empty_like(targets, dtype=torch.bool)


# vocab_shard_statistics


@torch.library.impl(_LIBRARY, "vocab_shard_statistics", "CompositeExplicitAutograd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    start: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shard = _shard(hidden, weight, bias, targets, start, options)
    return _implementation(hidden).statistics(shard)


@torch.library.register_fake("moptrace::vocab_shard_statistics", lib=_LIBRARY)
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_operands(hidden, weight, bias, targets)
    return _one_each(hidden), _one_each(hidden), _one_each(hidden), _one_each(hidden)


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[0])
    ctx.options = tuple(options)
    ctx.mark_non_differentiable(output[0])


def _differentiate_statistics(ctx: Any, _: Tensor, *of_sums: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, top = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    computed = torch.ops.moptrace.vocab_shard_gradients.default(
        hidden, weight, bias, targets, top, *of_sums, *ctx.options, None, needed
    )
    return *_needed(computed, needed), *[None] * 5


torch.library.register_autograd(
    "moptrace::vocab_shard_statistics",
    _differentiate_statistics,
    setup_context=_save_statistics,
    lib=_LIBRARY,
)


# vocab_shard_gradients


@torch.library.impl(_LIBRARY, "vocab_shard_gradients", "CompositeExplicitAutograd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shift: Tensor,
    of_exp: Tensor,
    of_target: Tensor,
    of_sum: Tensor,
    start: int,
    scale: float,
    softcap: float | None,
    block_bytes: int | None,
    dtype: torch.dtype | None,
    output_mask: list[bool],
    skip_below: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    shard = _shard(hidden, weight, bias, targets, start, (scale, softcap, block_bytes))
    of_logits = LogitGradient(shiftable(shift), of_exp, of_target, of_sum)
    outputs = _empty_gradients(hidden, weight, bias, dtype, output_mask)
    output_mask = [output_mask[0], output_mask[1], output_mask[2] and bias is not None]
    needed = _needed(outputs, output_mask)
    _implementation(hidden).gradients(shard, of_logits, *needed, skip_below=skip_below)
    return outputs


@torch.library.register_fake("moptrace::vocab_shard_gradients", lib=_LIBRARY)
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _check_operands(hidden, weight, bias, targets)
    return _empty_gradients(hidden, weight, bias, *others[8:10])


def _empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor | None, is_needed: bool) -> Tensor:
        if x is None or not is_needed:
            return hidden.new_empty(0, dtype=dtype)
        return x.new_empty(x.shape, dtype=dtype)

    return like(hidden, output_mask[0]), like(weight, output_mask[1]), like(bias, output_mask[2])


def _needed(tensors: tuple[Tensor, ...], mask: list[bool]) -> list[Tensor | None]:
    return [x if is_needed else None for x, is_needed in zip(tensors, mask, strict=True)]


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "the loss over a vocabulary can be differentiated once: for derivatives of second order, "
        "use torch.nn.functional.cross_entropy on the logits"
    )


torch.library.register_autograd("moptrace::vocab_shard_gradients", _refuse, lib=_LIBRARY)


# linear_cross_entropy


@torch.library.impl(_LIBRARY, "linear_cross_entropy", "CompositeExplicitAutograd")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
    z_loss: float,
    block_bytes: int | None,
    skip_below: float = 0.0,
) -> tuple[Tensor, Tensor]:
    statistics = vocab_shard_statistics(
        hidden, weight, targets, bias, softcap=softcap, scale=scale, block_bytes=block_bytes
    )
    losses = loss_from_statistics(
        statistics,
        targets,
        len(weight),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return losses, log_sum_exp(statistics)


@torch.library.register_fake("moptrace::linear_cross_entropy", lib=_LIBRARY)
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    _check_operands(hidden, weight, bias, targets)
    return _one_each(hidden), _one_each(hidden)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, *options = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, output[1])
    ctx.options = tuple(options)
    ctx.set_materialize_grads(False)


# The gradients could be computed in the forward, which has the logits already, and only be scaled
# here. The backward computes the logits once more instead, one product of four, because then
# nothing as large as the weight is held between the two, a forward that nobody differentiates costs
# what it should, and each token's loss may have a gradient of its own. (To compute them in the
# forward, a block must also hold all words, and the weight's gradient is swept once for each.)
def _differentiate_loss(
    ctx: Any, of_loss: Tensor | None, of_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, lse = ctx.saved_tensors
    ignore_index, label_smoothing, softcap, scale, z_loss, block_bytes, skip_below = ctx.options
    of_loss = torch.zeros_like(lse) if of_loss is None else of_loss
    of_loss = of_loss.where(targets != ignore_index, 0)
    of_exp = of_loss * (1 + 2 * z_loss * lse) if z_loss else of_loss
    needed = list(ctx.needs_input_grad[:3])
    computed = torch.ops.moptrace.vocab_shard_gradients.default(
        hidden,
        weight,
        bias,
        targets,
        lse,
        of_exp if of_lse is None else of_exp + of_lse,
        of_loss * (label_smoothing - 1),
        of_loss * (-label_smoothing / weight.shape[0] if label_smoothing else 0.0),
        0,
        scale,
        softcap,
        block_bytes,
        None,
        needed,
        skip_below,
    )
    return *_needed(computed, needed), *[None] * 8


torch.library.register_autograd(
    "moptrace::linear_cross_entropy",
    _differentiate_loss,
    setup_context=_save_loss,
    lib=_LIBRARY,
)


# shapes


def _one_each(hidden: Tensor) -> Tensor:
    """A number for each token, without values."""
    return hidden.new_empty(hidden.shape[0], dtype=exact(hidden.dtype))


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    torch._check(
        hidden.dim() == weight.dim() == 2
        and hidden.dtype == weight.dtype
        and hidden.dtype.is_floating_point,
        lambda: (
            f"tokens {list(hidden.shape)} in {hidden.dtype} cannot be projected by a weight "
            f"{list(weight.shape)} in {weight.dtype}: both are matrices of one floating-point dtype"
        ),
    )
    torch._check(
        hidden.shape[1] == weight.shape[1],
        lambda: f"tokens are {hidden.shape[1]} wide, but rows of the weight {weight.shape[1]}",
    )
    torch._check(
        targets.dtype is torch.int64 and targets.dim() == 1,
        lambda: f"labels are int64 [N], not {targets.dtype} {list(targets.shape)}",
    )
    torch._check(
        targets.shape[0] == hidden.shape[0],
        lambda: f"there are {hidden.shape[0]} tokens, but {targets.shape[0]} labels",
    )
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.dtype == weight.dtype,
            lambda: f"the bias is [V] in {weight.dtype}, not {list(bias.shape)} in {bias.dtype}",
        )
        torch._check(
            bias.shape[0] == weight.shape[0],
            lambda: f"the bias has {bias.shape[0]} words, but the weight {weight.shape[0]}",
        )
