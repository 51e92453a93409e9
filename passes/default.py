"""The pipeline that ``parallelize`` runs, on one screen."""

from __future__ import annotations

from moptrace.core import Pass, chain
from moptrace.passes.bucket_gathers import bucket_gathers
from moptrace.passes.classify import classify
from moptrace.passes.localize import localize
from moptrace.passes.normalize_losses import normalize_losses
from moptrace.passes.place import place
from moptrace.passes.raise_experts import raise_experts
from moptrace.passes.shard_parameters import shard_batch, shard_parameters
from moptrace.placement import Layout

__all__ = ["canonical", "default", "sharded"]


def default(layout: Layout, edp: str = "shard") -> Pass:
    """From the captured program of one device to the program of each rank."""
    return chain(canonical(), sharded(layout, edp), name="default")


def canonical() -> Pass:
    """One spelling for each component, every node tagged. Depends on the model alone."""
    return chain(
        raise_experts(),
        classify(),
        normalize_losses(),
        name="canonical",
    )


def sharded(layout: Layout, edp: str = "shard") -> Pass:
    """From the canonical program to the local one, for one layout of the ranks."""
    return chain(
        shard_parameters(layout, edp),
        shard_batch(layout),
        place(),
        localize(),
        bucket_gathers(),
        name="sharded",
    )
