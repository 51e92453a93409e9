"""The one line: ``model = moptrace.parallelize(model, mesh)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moptrace.errors import MoptraceError, TraceError
from moptrace.parallel import ParallelModule
from moptrace.plan import Plan

__all__ = ["made_up", "parallelize"]

EXAMPLE_LENGTH = 16  # tokens of the made-up sequence when no batch is given


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Plan | None = None,
    *,
    batch: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Any] | None = None,
    seed: int | None = None,
) -> ParallelModule:
    """Make a single-device model train on all ranks of a mesh, computing the same function.

    ``model`` returns a loss: a scalar, a tuple that starts with one, or a mapping or ModelOutput
    with ``loss``. It is not changed. A model that returns no loss needs
    ``loss_fn(output, **rest)``; entries of the batch that ``forward`` does not take go there.
    Parameters may be on the meta device; give them values with ``load_full_state_dict``. Ranks that
    were initialised differently all take the first rank's values.

    ``mesh`` is any DeviceMesh; its dimension names, if any, set the sizes of the plan. ``plan``
    defaults to ``Plan()``, which chooses. ``batch`` is an example of what one rank will be fed, by
    argument name, real or fake; without it token ids are made up for every required argument of
    ``forward``, and for labels. ``seed`` decides the draws of random operators (default: the first
    rank's ``torch.initial_seed()``).

    Collective: every rank of the mesh calls it. Raises PlanError (plan and mesh do not fit),
    TraceError (the model cannot be captured) or RoleError (experts that are not understood).
    """
    names = mesh.mesh_dim_names
    wanted = (plan or Plan()).merged(Plan.from_mesh(names, tuple(mesh.mesh.shape)))
    shape = (wanted.divisions, EXAMPLE_LENGTH)
    example = dict(batch) if batch is not None else made_up(model, loss_fn, shape)
    try:
        return ParallelModule(model, mesh, wanted, example, loss_fn, seed)
    except TraceError as error:
        if batch is not None:
            raise
        raise TraceError(
            f"{error}\nThe model was traced with made-up token ids for {', '.join(example)}. If "
            "that is not what it takes, pass batch= with an example of one rank's batch."
        ) from error


def made_up(
    model: nn.Module,
    loss_fn: Callable[..., Any] | None = None,
    shape: tuple[int, int] = (1, EXAMPLE_LENGTH),
) -> dict[str, Any]:
    """Token ids for every required argument, and for optional labels."""
    parameters = inspect.signature(model.forward).parameters
    ids = torch.zeros(shape, dtype=torch.int64)
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    optional = [name for name in ("input_ids", "labels", "targets") if name in parameters]
    if loss_fn is not None:
        _, *rest = inspect.signature(loss_fn).parameters.values()
        required += [p.name for p in rest if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        optional = [name for name in optional if name == "input_ids"]
    chosen = dict.fromkeys([*required, *optional])
    if not chosen:
        raise MoptraceError(
            "the model's forward has no required argument to make an example of; pass batch= with "
            "an example of one rank's batch"
        )
    return {name: ids.clone() for name in chosen}
