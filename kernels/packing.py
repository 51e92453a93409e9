"""Many shards in one flat buffer, so that one collective moves them all.

``pack`` lays a rank's shards end to end, each padded to the widest rank's, so that the buffers of
all ranks have one length. ``unpack`` turns the gathered buffers back into whole tensors. Each is
linear, and its backward is the other's layout in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["packed_length"]

_library = torch.library.Library("moptrace", "FRAGMENT")
_library.define("pack(Tensor[] shards, int[] numels) -> Tensor")
_library.define(
    "unpack(Tensor flat, int parts, int[][] shapes, int[] dims, int[][] sizes) -> Tensor[]"
)
_library.define(
    "pack_whole(Tensor[] wholes, int parts, int[][] shapes, int[] dims, int[][] sizes) -> Tensor"
)
_library.define("slice_shards(Tensor flat, int[] numels, int[][] shapes) -> Tensor[]")


def packed_length(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> int:
    """The elements that one shard takes in the buffer, padding included.

    >>> packed_length((10, 3), 0, (3, 3, 3, 1))
    9
    """
    return max(sizes) * math.prod(n for d, n in enumerate(shape) if d != dim)


def _pack(shards: Sequence[Tensor], numels: Sequence[int]) -> Tensor:
    flat = shards[0].new_empty(sum(numels))
    start = 0
    for shard, numel in zip(shards, numels, strict=True):
        flat[start : start + shard.numel()] = shard.reshape(-1)
        flat[start + shard.numel() : start + numel] = 0
        start += numel
    return flat


def _slice_shards(
    flat: Tensor, numels: Sequence[int], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    starts = [sum(numels[:i]) for i in range(len(numels))]
    return [
        flat[start : start + math.prod(shape)].view(list(shape)).clone()
        for start, shape in zip(starts, shapes, strict=True)
    ]


def _blocks(
    flat: Tensor, parts: int, shape: Sequence[int], dim: int, sizes: Sequence[int], start: int
) -> list[Tensor]:
    """The parts of the buffers that hold one tensor's shards, as views."""
    rows = flat.view(parts, -1)
    blocks: list[Tensor] = []
    for rank, size in enumerate(sizes):
        local = [*shape[:dim], size, *shape[dim + 1 :]]
        blocks.append(rows[rank, start : start + math.prod(local)].view(local))
    return blocks


def _unpack(
    flat: Tensor,
    parts: int,
    shapes: Sequence[Sequence[int]],
    dims: Sequence[int],
    sizes: Sequence[Sequence[int]],
) -> list[Tensor]:
    wholes: list[Tensor] = []
    start = 0
    for shape, dim, size in zip(shapes, dims, sizes, strict=True):
        wholes.append(torch.cat(_blocks(flat, parts, shape, dim, size, start), dim))
        start += packed_length(shape, dim, size)
    return wholes


def _pack_whole(
    wholes: Sequence[Tensor],
    parts: int,
    shapes: Sequence[Sequence[int]],
    dims: Sequence[int],
    sizes: Sequence[Sequence[int]],
) -> Tensor:
    lengths = [packed_length(*entry) for entry in zip(shapes, dims, sizes, strict=True)]
    flat = wholes[0].new_zeros(parts * sum(lengths))
    start = 0
    for whole, shape, dim, size, length in zip(wholes, shapes, dims, sizes, lengths, strict=True):
        blocks = _blocks(flat, parts, shape, dim, size, start)
        for block, piece in zip(blocks, whole.split(list(size), dim), strict=True):
            block.copy_(piece)
        start += length
    return flat


for _name, _run in (
    ("pack", _pack),
    ("unpack", _unpack),
    ("pack_whole", _pack_whole),
    ("slice_shards", _slice_shards),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")


def _fake_pack(shards: Sequence[Tensor], numels: Sequence[int]) -> Tensor:
    return shards[0].new_empty(sum(numels))


def _fake_unpack(
    flat: Tensor,
    parts: int,
    shapes: Sequence[Sequence[int]],
    dims: Sequence[int],
    sizes: Sequence[Sequence[int]],
) -> list[Tensor]:
    return [flat.new_empty(list(shape)) for shape in shapes]


def _fake_pack_whole(
    wholes: Sequence[Tensor],
    parts: int,
    shapes: Sequence[Sequence[int]],
    dims: Sequence[int],
    sizes: Sequence[Sequence[int]],
) -> Tensor:
    lengths = [packed_length(*entry) for entry in zip(shapes, dims, sizes, strict=True)]
    return wholes[0].new_empty(parts * sum(lengths))


def _fake_slice_shards(
    flat: Tensor, numels: Sequence[int], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    return [flat.new_empty(list(shape)) for shape in shapes]


for _name, _fake in (
    ("pack", _fake_pack),
    ("unpack", _fake_unpack),
    ("pack_whole", _fake_pack_whole),
    ("slice_shards", _fake_slice_shards),
):
    torch.library.register_fake(f"moptrace::{_name}", _fake, lib=_library)


def _remember_pack(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    shards, ctx.numels = inputs
    ctx.shapes = [list(shard.shape) for shard in shards]


def _backward_pack(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.moptrace.slice_shards(gradient, ctx.numels, ctx.shapes), None


def _remember_unpack(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *ctx.layout = inputs


def _backward_unpack(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    example = next(g for g in gradients if g is not None)
    whole = [
        example.new_zeros(list(shape)) if g is None else g
        for g, shape in zip(gradients, ctx.layout[1], strict=True)
    ]
    return (torch.ops.moptrace.pack_whole(whole, *ctx.layout), None, None, None, None)


torch.library.register_autograd(
    "moptrace::pack", _backward_pack, setup_context=_remember_pack, lib=_library
)
torch.library.register_autograd(
    "moptrace::unpack", _backward_unpack, setup_context=_remember_unpack, lib=_library
)
