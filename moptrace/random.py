"""Random operators on many ranks: replicas of a value draw alike, shards differ.

The draws of a step are decided by one seed, the number of the step, the operator's place in the
graph, and the rank's position along the axes that split the result. They are not the draws that one
device would make; one seed reproduces them on any ranks of the same layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moptrace.collectives import Communicator

__all__ = ["draw"]


def draw(op: Callable[..., Any], site: int, axes: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Call a random operator with the generator seeded for this step, place and shard.

    ``axes`` are those that split the result: ranks that differ along them draw differently.
    """
    here = Communicator.current()
    place = [here.seed, here.step, site, *(here.coordinate(axis) for axis in axes)]
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    with _seeded(int.from_bytes(digest, "little") >> 1):
        return op(*args, **kwargs)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
