"""Models that many tests put on many ranks: their canonical programs, traced once, and batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

import models
from double import InFloat64
from moptrace import Plan, Program, parallel, parallelize, trace
from moptrace.liveness import lifetimes, sizes_of_values
from moptrace.parallel import ParallelModule
from moptrace.passes.default import canonical
from moptrace.testing import SimulatedSteps

__all__ = [
    "assert_same_bits",
    "batch",
    "most_prefetched",
    "step_on_a_rank",
    "subject",
    "traced_once",
]


def most_prefetched(program: Program) -> int:
    """The most bytes that have come from the host, or are on their way, at once."""
    spans, sizes = lifetimes(program), sizes_of_values(program)
    alive: dict[fx.Node, int] = {}
    most = 0
    for node in program.nodes:
        if node.target is torch.ops.moptrace.prefetch.default:
            alive[node] = sizes[node]
        most = max(most, sum(alive.values()))
        for gone in [x for x in alive if spans[x] is node]:
            del alive[gone]
    return most


def batch(seed: int, size: int = 12, length: int = 12) -> dict[str, Tensor]:
    """A global batch, whose first sequence has no label for the later ranks that share it."""
    fed = models.batch(seed, size=size, length=length)
    fed["labels"][0, 2:] = -100
    return fed


def assert_same_bits(
    one: SimulatedSteps, other: SimulatedSteps, fed: Iterable[Sequence[dict[str, Tensor]]]
) -> None:
    """Loss and norm, if taken, of every step on its micro-batches, and the weights after all."""
    for batches in fed:
        for a, b in zip(one.step(*batches), other.step(*batches), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    weights = other.weights()
    assert all(torch.equal(x, weights[name]) for name, x in one.weights().items())


@cache
def subject(name: str, length: int = 12) -> tuple[nn.Module, Program]:
    """A model and its canonical program, traced on a batch of 12 sequences.

    The reference of a Hugging Face model computes its experts in an eager loop.
    """
    if name in models.FAMILIES:
        model, traced = models.build(f"{name}, eager"), models.build(f"{name}, grouped_mm")
        traced.load_state_dict(model.state_dict())
    else:
        model = traced = models.build(name)
    with InFloat64():
        return model, canonical()(trace(traced, batch(0, length=length)))


_canonical: dict[object, Program] = {}


@contextmanager
def traced_once(name: object) -> Iterator[None]:
    """Let one capture of a model serve all plans, as it would on one of them."""
    capture, make = ParallelModule._capture, parallel.canonical

    def captured(self: ParallelModule, batch: Any) -> Program:
        key = (name, parallel._key(self.training, parallel._global(batch, self._batch_parts)))
        if key not in _canonical:
            _canonical[key] = make()(capture(self, batch))
        return _canonical[key]

    ParallelModule._capture = captured  # type: ignore[method-assign]
    parallel.canonical = lambda: lambda program: program  # type: ignore[assignment]
    try:
        yield
    finally:
        ParallelModule._capture = capture  # type: ignore[method-assign]
        parallel.canonical = make


def step_on_a_rank(
    name: str, state: dict[str, Tensor], plan: Plan, fed: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """On one of the real ranks: the loss and all gradients of a global batch."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    model = models.build(name)
    model.load_state_dict(state)
    ranks = dist.get_world_size()
    parts = plan.cp * plan.tp
    example = {k: v[: len(v) * parts // ranks, : v.shape[1] // parts] for k, v in fed.items()}
    with InFloat64(), traced_once(name):
        mesh = init_device_mesh("cpu", (ranks,))
        parallel = parallelize(model, mesh, plan, batch=example)
        loss, _ = parallel(**parallel.local_batch(fed))
        loss.backward()
        found, shapes = parallel.full_gradients(), parallel.full_state_dict()
    unused = {n: torch.zeros_like(shapes[n]) for n, g in found.items() if g is None}
    return loss.detach(), {n: g for n, g in found.items() if g is not None} | unused
