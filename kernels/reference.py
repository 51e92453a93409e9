"""What every operator means, in plain PyTorch that autograd differentiates by itself.

Nothing here is fast. Each function has the name, the arguments and the result of an operator in
``moptrace.kernels.routing``, ``moptrace.kernels.grouped_mm``,
``moptrace.kernels.linear_cross_entropy`` or ``moptrace.kernels.merge_attention``, whose docstrings
give the shapes.
The tests hold the operators to these functions in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "combine",
    "dispatch",
    "expert_rows",
    "group_rows",
    "group_sum",
    "grouped_mm",
    "grouped_outer",
    "keep_pairs",
    "linear_cross_entropy",
    "merge_attention",
    "pair_dots",
    "pair_rows",
    "sum_rows",
    "token_rows",
    "ungroup_rows",
    "vocab_shard_gradients",
    "vocab_shard_statistics",
    "weigh_rows",
]


def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    some: bool = False,
    numbers: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token once for each expert it chose, ordered by expert."""
    pairs = experts.flatten()
    order: list[Tensor] = []
    for e in range(num_experts) if numbers is None else numbers.tolist():
        own = (pairs == e).nonzero().flatten()
        if capacity is not None:
            own = torch.cat([own, own.new_full((capacity - len(own),), len(pairs))])
        order.append(own)
    counts = torch.tensor([len(own) for own in order], dtype=torch.int64)
    found = torch.cat([*order, pairs.new_empty(0)])
    token = found // max(experts.shape[1], 1)
    return _and_first(x)[token.where(found < len(pairs), len(x))], counts, found


def keep_pairs(
    experts: Tensor,
    scores: Tensor | None,
    num_experts: int,
    capacity: int,
    groups: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Each group of tokens in turn, and of it each expert's pairs, best first."""
    parts = [torch.arange(experts.shape[0])]
    for count, blocks in zip(groups[::2], groups[1::2], strict=True):
        length = experts.shape[0] // blocks
        for before, other in zip(groups[::2], groups[1::2], strict=True):
            if (before, other) == (count, blocks):
                break
            length //= before if other == blocks else 1
        step = length // count
        parts = [p[(p % length) // step == i] for p in parts for i in range(count)]
    kept = torch.full_like(experts, num_experts)
    for tokens in parts:
        for e in range(num_experts):
            pairs = [(int(n), j) for n in tokens for j in range(experts.shape[1])]
            queue = [pair for pair in pairs if experts[pair] == e]
            if scores is not None:
                queue.sort(key=lambda pair: -float(scores[pair].float()))
            for pair in queue[:capacity]:
                kept[pair] = e
    return kept, torch.stack([(experts == e).sum() for e in range(num_experts)])


def pair_rows(values: Tensor, order: Tensor, some: bool = False) -> Tensor:
    """One value for each (token, choice) pair, in the order of the rows."""
    return _and_first(values.flatten(0, 1))[order]


def token_rows(x: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    """Each token once for each of its pairs."""
    if not some:
        return x[order // max(choices, 1)]
    token = order // max(choices, 1)
    return _and_first(x)[token.where(order < len(x) * choices, len(x))]


def sum_rows(rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool = False) -> Tensor:
    """Each token's rows, brought back and added up."""
    return combine(rows, order, rows.new_ones(tokens, choices), some)


def combine(rows: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    """Each token's rows, brought back and summed with its weights."""
    pairs = _pairs(rows, order, weights.numel()).unflatten(0, weights.shape)
    return (pairs * weights[(...,) + (None,) * (pairs.dim() - 2)]).sum(1)


def weigh_rows(x: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    """Each token once for each of its pairs, times the pair's weight."""
    pairs = (x.unsqueeze(1) * weights[(...,) + (None,) * (x.dim() - 1)]).flatten(0, 1)
    return _and(pairs, torch.zeros(()))[order]


def pair_dots(x: Tensor, rows: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    """Each token's dot products with its rows."""
    pairs = _pairs(rows, order, x.shape[0] * choices).unflatten(0, (x.shape[0], choices))
    return (x.unsqueeze(1) * pairs).reshape(*pairs.shape[:2], math.prod(x.shape[1:])).sum(2)


def _pairs(rows: Tensor, order: Tensor, number: int) -> Tensor:
    """The row of each pair, or zeros."""
    return rows.new_zeros(number + 1, *rows.shape[1:]).index_copy(0, order, rows)[:number]


def _and(x: Tensor, last: Tensor) -> Tensor:
    """``x`` and one more."""
    whole = last.to(x.dtype).expand(len(x) + 1, *x.shape[1:])
    return whole.index_copy(0, torch.arange(len(x)), x)


def _and_first(x: Tensor) -> Tensor:
    """``x`` and what a row of no pair has: the first of ``x`` once more."""
    return _and(x, x[0].detach() if len(x) else torch.zeros(()))


def group_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Rows ordered by (source, expert), reordered by (expert, source)."""
    expert = torch.arange(table.shape[1]).repeat(table.shape[0]).repeat_interleave(table.flatten())
    return rows[expert.argsort(stable=True)]


def ungroup_rows(rows: Tensor, table: Tensor) -> Tensor:
    """The inverse of ``group_rows``."""
    expert = torch.arange(table.shape[1]).repeat(table.shape[0]).repeat_interleave(table.flatten())
    return rows[expert.argsort(stable=True).argsort()]


def grouped_mm(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each row times its expert's matrix."""
    return (rows.unsqueeze(1) @ weight[_expert(counts)]).squeeze(1)


def grouped_outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """For each expert, the sum over its rows of the outer product of ``a`` and ``b``."""
    return group_sum(a.unsqueeze(2) * b.unsqueeze(1), counts)


def expert_rows(param: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """Each expert's parameter, once for each of its rows."""
    return param[_expert(counts)]


def group_sum(rows: Tensor, counts: Tensor) -> Tensor:
    """For each expert, the sum of its rows."""
    total = rows.new_zeros(counts.shape[0], *rows.shape[1:])
    return total.index_add(0, _expert(counts), rows)


def _expert(counts: Tensor) -> Tensor:
    """The expert of each row."""
    return torch.arange(counts.shape[0]).repeat_interleave(counts)


def merge_attention(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs' mean, weighted by the exponentials that each is a mean of; their sum's log."""
    both = torch.stack([lse, other_lse])
    merged = both.logsumexp(0)
    is_seen = merged > -math.inf
    shares = (both - merged.where(is_seen, 0)).exp().unsqueeze(-1)
    return (shares * torch.stack([out, other])).sum(0), merged


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
    reduction: str = "sum",
) -> Tensor:
    """The cross entropy of the capped, scaled logits, and the z-loss of the tokens that count."""
    logits = _logits(hidden, weight, bias, scale, softcap)
    losses = torch.nn.functional.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    losses = losses + (z_loss * logits.logsumexp(1).square()).where(targets != ignore_index, 0)
    return losses.sum() if reduction == "sum" else losses


def vocab_shard_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    start: int = 0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The maximum of each token's logits, the sum of exp(logit - max), the label's, their sum."""
    logits = _logits(hidden, weight, bias, scale, softcap)
    nothing = logits.new_full((logits.shape[0], 1), -torch.inf)
    top = torch.cat([logits, nothing], 1).amax(1).detach()
    is_label = torch.arange(weight.shape[0]) == (targets - start).unsqueeze(1)
    return (
        top,
        (logits - top.unsqueeze(1)).exp().sum(1),
        logits.where(is_label, 0).sum(1),
        logits.sum(1),
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
) -> tuple[Tensor, ...]:
    """The gradients of hidden, weight and, if there is one, bias, given that of each logit."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    with torch.enable_grad():
        logits = _logits(leaves[0], leaves[1], leaves[2] if leaves[2:] else None, scale, softcap)
    is_label = torch.arange(weight.shape[0]) == (targets - start).unsqueeze(1)
    of_logits = of_exp.unsqueeze(1) * (logits.detach() - shift.unsqueeze(1)).exp()
    of_logits = of_logits + of_sum.unsqueeze(1) + of_target.unsqueeze(1) * is_label
    return torch.autograd.grad(logits, leaves, of_logits)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """One number for each token and word: a projection, then the scale, then the cap."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
