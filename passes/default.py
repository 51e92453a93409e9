"""The pipeline that ``parallelize`` runs, on one screen."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moptrace.core import Pass, chain
from moptrace.passes.balance_experts import balance_experts
from moptrace.passes.bucket_gathers import bucket_gathers
from moptrace.passes.causal_convolutions import causal_convolutions
from moptrace.passes.chunk_experts import chunk_experts
from moptrace.passes.classify import classify
from moptrace.passes.context_parallel import context_parallel
from moptrace.passes.count_tokens import count_tokens
from moptrace.passes.drop_tokens import drop_tokens, group_tokens
from moptrace.passes.expert_tensor_parallel import expert_tensor_parallel
from moptrace.passes.fold_router_weights import fold_router_weights
from moptrace.passes.fuse_embedding import fuse_embedding
from moptrace.passes.fuse_experts import fuse_experts
from moptrace.passes.fuse_vocabulary import fuse_vocabulary
from moptrace.passes.gather_tokens import gather_tokens
from moptrace.passes.localize import localize
from moptrace.passes.mixed_precision import compute_routers, mixed_precision
from moptrace.passes.normalize_losses import normalize_losses
from moptrace.passes.overlap import overlap
from moptrace.passes.place import place
from moptrace.passes.raise_experts import raise_experts
from moptrace.passes.replicated_tokens import report_replicated_tokens
from moptrace.passes.shard_parameters import shard_batch, shard_parameters
from moptrace.passes.split_stages import split_stages
from moptrace.passes.start_and_wait import start_and_wait
from moptrace.passes.tensor_parallel import tensor_parallel
from moptrace.passes.vocabulary_parallel import vocabulary_parallel
from moptrace.placement import Placement
from moptrace.plan import Plan

__all__ = ["canonical", "default", "overlapped", "sharded"]


def default(plan: Plan, world_size: int) -> Pass:
    """From the captured program of one device to the program of each rank."""
    return chain(canonical(), sharded(plan, world_size), name="default")


def canonical() -> Pass:
    """One spelling for each component, every node tagged. Depends on the model alone."""
    return chain(
        raise_experts(),
        classify(),
        normalize_losses(),
        name="canonical",
    )


def sharded(
    plan: Plan,
    world_size: int,
    keep_logits: bool = False,
    stored: Mapping[str, Placement] | None = None,
    masters: Mapping[str, torch.dtype] | None = None,
) -> Pass:
    """From the canonical program to the local one, under a resolved plan for W ranks.

    ``stored`` are the placements of parameters that exist already, by name, and ``masters`` the
    dtypes in which they are held, by the user's names.
    """
    layout, policy = plan.layout(world_size), plan.mixed_precision
    ranks = layout.world_size  # of a stage
    return chain(
        compute_routers(policy.router_dtype),
        drop_tokens(plan.dropping, layout),
        fold_router_weights(plan.fold_router_weights),
        *([count_tokens()] if plan.count_tokens else []),
        tensor_parallel(layout),
        expert_tensor_parallel(layout),
        *([gather_tokens(layout)] if plan.dispatcher == "all-gather" else []),
        context_parallel(layout, plan.context),
        causal_convolutions(layout),
        fuse_vocabulary(plan.logits_bytes * ranks, keep_logits or plan.keep_logits),
        fuse_embedding(ranks, plan.embedding_bytes),
        vocabulary_parallel(layout),
        shard_parameters(layout, plan.edp, stored),
        shard_batch(layout),
        mixed_precision(policy, masters or {}),
        place(),
        group_tokens(plan.dropping),
        report_replicated_tokens(asked=plan.context == "gather"),
        localize(pad=plan.dropping is not None and plan.dropping.pad),
        balance_experts(plan.balance),
        chunk_experts(plan.expert_tokens, plan.expert_chunks, bool(plan.recompute_experts)),
        split_stages(plan.pp, plan.pp_layers),
        bucket_gathers(),
        fuse_experts(),
        name="sharded",
    )


def overlapped() -> Pass:
    """A finished step whose collectives travel while others compute."""
    return chain(start_and_wait(), overlap(), name="overlapped")
