"""Parts of a tensor that are written one after another.

In a graph, ``write_block`` returns a new tensor. Where nothing else reads the old one, a step
writes into that (``liveness.blocks_in_place``), so that a large tensor is never there twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["block", "write_block"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define("block(Tensor(a) x, int[] starts, int[] sizes) -> Tensor(a)")
_LIBRARY.define("write_block(Tensor x, Tensor part, int[] starts) -> Tensor")


def block(x: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A part of a tensor, as a view: of its first dimensions so many from these places on.

    x [D0, D1, ..., *D] -> [*sizes, *D].

    >>> block(torch.arange(12).view(3, 4), [1], [2])
    tensor([[ 4,  5,  6,  7],
            [ 8,  9, 10, 11]])
    """
    return torch.ops.moptrace.block.default(x, starts, sizes)


def write_block(x: Tensor, part: Tensor, starts: Sequence[int]) -> Tensor:
    """The tensor with another part from these places of its first dimensions on."""
    return torch.ops.moptrace.write_block.default(x, part, starts)


@torch.library.impl(_LIBRARY, "block", "CompositeExplicitAutograd")
def _(x: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        x = x.narrow(dim, start, size)
    return x


@torch.library.impl(_LIBRARY, "write_block", "CompositeExplicitAutograd")
def _(x: Tensor, part: Tensor, starts: Sequence[int]) -> Tensor:
    result = x.clone()
    block(result, starts, part.shape[: len(starts)]).copy_(part)
    return result


@torch.library.register_fake("moptrace::write_block", lib=_LIBRARY)
def _(x: Tensor, part: Tensor, starts: Sequence[int]) -> Tensor:
    return torch.empty_like(x)
