"""Divide the tokens of a rank among chunks, and put them together again.

Each function returns new tensors or views, is differentiable, and works for numbers of tokens that
the number of chunks does not divide: the first chunks then have one more. Which tokens belong
together matters where a sequence has hard parts: tokens that follow one another often choose the
same experts, so chunks of every K-th token are more alike than chunks of neighbours (FEMP,
PipelinedLLEP).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["join_contiguous", "join_strided", "split_contiguous", "split_strided"]


def split_strided(x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Chunk c takes the tokens c, c + chunks, c + 2 chunks, ...: views of x.

    x [N, *D], chunks = K -> K tensors, the c-th [ceil((N - c) / K), *D].

    >>> [c.tolist() for c in split_strided(torch.arange(5), 2)]
    [[0, 2, 4], [1, 3]]
    """
    if x.shape[0] % chunks == 0:  # one write in backward, where slices would take K
        return x.unflatten(0, (-1, chunks)).unbind(1)
    return tuple(x[chunk::chunks] for chunk in range(chunks))


def join_strided(parts: Sequence[Tensor]) -> Tensor:
    """Undo ``split_strided``.

    >>> join_strided(split_strided(torch.arange(5), 2)).tolist()
    [0, 1, 2, 3, 4]
    """
    sizes = [part.shape[0] for part in parts]
    if len(set(sizes)) == 1:
        return torch.stack(list(parts), 1).flatten(0, 1)
    return torch.cat(list(parts)).index_select(0, _places(sizes, parts[0].device))


def _places(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Where each token is when the chunks lie one after another."""
    token = torch.arange(sum(sizes), device=device)
    chunk, at = token % len(sizes), token // len(sizes)
    shorter = (chunk - sizes.count(max(sizes))).clamp(min=0)  # chunks before it that lack a token
    return chunk * max(sizes) - shorter + at


def split_contiguous(x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """Each chunk takes neighbours: views of x.

    x [N, *D], chunks = K -> K tensors, the first N % K of them with one token more.

    >>> [c.tolist() for c in split_contiguous(torch.arange(5), 2)]
    [[0, 1, 2], [3, 4]]
    """
    return x.tensor_split(chunks)


def join_contiguous(parts: Sequence[Tensor]) -> Tensor:
    """Undo ``split_contiguous``.

    >>> join_contiguous(split_contiguous(torch.arange(5), 2)).tolist()
    [0, 1, 2, 3, 4]
    """
    return torch.cat(list(parts))
