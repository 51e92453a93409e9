"""Rows of a table by their numbers, and the sums of gradients that go back to them.

``torch.embedding`` adds up the gradients of a row in the dtype of the table. Here they are added in
float32 at least, and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["embedding_rows", "sum_by_id"]

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define("embedding_rows(Tensor weight, Tensor ids, int padding_idx) -> Tensor")


def embedding_rows(weight: Tensor, ids: Tensor, padding_idx: int = -1) -> Tensor:
    """The row of the weight for each id.

    weight [V, D], ids int64 or int32 of any shape [...] -> [..., D].

    Requires: ids in [0, V), else IndexError on a CPU. Ensures: the gradient of row ``padding_idx``
    is zero, and that of every other row is the sum over its ids, taken in float32 at least.

    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> embedding_rows(weight, torch.tensor([1, 0, 1])).sum().backward()
    >>> weight.grad
    tensor([[1., 1.],
            [2., 2.]])
    """
    return torch.ops.moptrace.embedding_rows.default(weight, ids, padding_idx)


def sum_by_id(rows: Tensor, ids: Tensor, length: int, padding_idx: int = -1) -> Tensor:
    """For each id in [0, length) the sum of its rows, in float32 at least.

    rows [N, D], ids [N] -> [length, D]. Ensures: zeros for ``padding_idx``; the same sum, to the
    last bit, in every run.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not length or not ids.numel():
        return wide.new_zeros(length, rows.shape[1])
    # It sorts on a GPU, where index_add adds in the order in which threads come.
    return torch.ops.aten.embedding_dense_backward(wide, ids, length, padding_idx, False)


@torch.library.impl(_LIBRARY, "embedding_rows", "CompositeExplicitAutograd")
def _(weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    return torch.ops.aten.embedding.default(weight, ids)


@torch.library.register_fake("moptrace::embedding_rows", lib=_LIBRARY)
def _(weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ids, ctx.padding_idx = inputs
    ctx.length, ctx.dtype = weight.shape[0], weight.dtype
    ctx.save_for_backward(ids)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    rows = gradient.reshape(ids.numel(), gradient.shape[-1])
    found = sum_by_id(rows, ids.flatten(), ctx.length, ctx.padding_idx)
    return found.to(ctx.dtype), None, None


torch.library.register_autograd(
    "moptrace::embedding_rows", _differentiate, setup_context=_save, lib=_LIBRARY
)
