"""Rounding to bfloat16 by chance, so that what is too small for a step is not lost each time.

A number between two neighbours becomes the upper one as likely as it is near to it, so its
expectation is the number. The bits are those of Philox4x32-10, a function of a seed and a counter
(Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011): the same on every device, in
Triton too, and for a shard the same as for the part of the whole that it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_bits", "round_stochastically"]

_WORD = 2**32 - 1
_CHUNK = 2**16  # numbers at a time, whose words stay in the cache of a CPU


def round_stochastically(x: Tensor, seed: int, step: Tensor, offset: int = 0) -> Tensor:
    """Round float32 numbers to bfloat16, up or down by chance.

    x [*D], step [] -> [*D]. ``offset`` is the place of the first number in what is drawn for.

    Ensures: a number that bfloat16 has stays; nan and infinities stay; unbiased.

    >>> halfway = torch.full((1000,), 1 + 2**-8)
    >>> rounded = round_stochastically(halfway, seed=0, step=torch.tensor(1.0))
    >>> sorted(set(rounded.tolist())), round(float(rounded.float().mean()), 3)
    ([1.0, 1.0078125], 1.004)
    """
    result = torch.empty_like(x, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    size = _CHUNK if x.device.type == "cpu" else max(x.numel(), 1)
    parts = zip(x.reshape(-1).split(size), result.view(-1).split(size), strict=True)
    for number, (part, rounded) in enumerate(parts):
        bits = random_bits(offset + number * size, len(part), seed, step.to(x.device))
        carried = part.contiguous().view(torch.int32) + bits
        carried = (carried & ~0xFFFF).view(torch.float32)
        rounded.copy_(carried.where(part.isfinite(), part))
    return result


def random_bits(first: int, number: int, seed: int, step: Tensor) -> Tensor:
    """Sixteen bits for each of the places from ``first`` on: int32 [number] in [0, 2**16).

    step [] is on their device. Eight places share what Philox makes of (place // 8, step).

    >>> [hex(x) for x in random_bits(0, 2, 0, torch.tensor(0)).tolist()]
    ['0xe8d5', '0x6627']
    """
    groups = torch.arange(first // 8, -(-(first + number) // 8), device=step.device)
    words = _philox(groups, step.to(torch.int64), seed)
    halves = [half.to(torch.int32) for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).view(-1)[first % 8 :][:number]


def _philox(place: Tensor, step: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter (place, step), int64 in [0, 2**32)."""
    c0, c1 = place & _WORD, place >> 32
    c2, c3 = step.expand_as(place), torch.zeros_like(place)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        (high, low), (other_high, other_low) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = other_high ^ c1 ^ k0, other_low, high ^ c3 ^ k1, low
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of the product of two words."""
    high, low = (b >> 16) * a, (b & 0xFFFF) * a  # of 48 bits
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & _WORD
