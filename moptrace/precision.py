"""Which dtype parameters, gradients and results have: ``Plan(mixed_precision=...)``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moptrace.errors import PlanError

__all__ = ["MixedPrecisionPolicy", "convert"]


@dataclass(frozen=True)
class MixedPrecisionPolicy:
    """The dtypes of a step, with the names and meanings of FSDP2's policy.

    ``param_dtype``: what parameters are cast to before they are gathered, and so what forward and
    backward compute in; None leaves each parameter's own. The model's parameters, which the
    optimizer steps and checkpoints hold, keep their dtype, and their gradients arrive in it.
    ``reduce_dtype``: in what dtype gradients are added up between ranks; None for ``param_dtype``,
    and nothing narrower. What travels in rings, and the tokens of a looked-up embedding, are added
    up in float32 at least in any case.
    ``output_dtype``: what floating-point results of the model's forward are cast to, for the
    ``loss_fn`` too.
    ``cast_forward_inputs``: whether floating-point inputs of forward are cast to ``param_dtype``.
    ``router_dtype``: what routers compute in, from their own parameters to the weights of the
    chosen experts; FSDP2 has no word for it.

    Buffers keep their dtype, as in FSDP2: a running bias of a router, or the frequencies of rotary
    embeddings, would lose bits that no master copy keeps. What the model casts by itself (norms and
    losses in float32) stays as it is written.

    Raises PlanError for a dtype that is not floating-point, and a ``reduce_dtype`` with fewer bits.

    >>> import torch
    >>> policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    >>> policy.computed_in(torch.float32), policy.computed_in(torch.int64)
    (torch.bfloat16, torch.int64)
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True
    router_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            dtype = getattr(self, entry.name)
            if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
                raise PlanError(f"{entry.name} is a floating-point dtype, not {dtype}")
        if self.param_dtype is not None:
            self.reduced_in(self.param_dtype)

    def computed_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a parameter held in ``dtype`` is used."""
        return self.param_dtype or dtype if dtype.is_floating_point else dtype

    def reduced_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of a parameter used in ``dtype`` are added up."""
        wide = self.reduce_dtype or dtype
        if torch.promote_types(wide, dtype) != wide:
            raise PlanError(
                f"gradients in {dtype} would lose bits in reduce_dtype={wide}; leave it None to "
                "add them up as they are, or choose a wider dtype, such as torch.float32"
            )
        return wide


def convert(model: nn.Module, policy: MixedPrecisionPolicy) -> nn.Module:
    """Make a model compute on one device as the policy says, in place; returns it.

    Parameters are then held in the dtype in which they are used, and forward casts its inputs and
    results. Routers are computed as the rest is: they are found in the graph, not in the model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(policy.computed_in(parameter.dtype))
    if policy.param_dtype is not None and policy.cast_forward_inputs:
        into = partial(_cast, policy.param_dtype)
        model.register_forward_pre_hook(partial(_cast_inputs, into), with_kwargs=True)
    if policy.output_dtype is not None:
        model.register_forward_hook(partial(_cast_output, partial(_cast, policy.output_dtype)))
    return model


def _cast(dtype: torch.dtype, x: Any) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _cast_inputs(into: Any, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return pytree.tree_map(into, args), pytree.tree_map(into, kwargs)


def _cast_output(into: Any, _module: nn.Module, _args: Any, output: Any) -> Any:
    return pytree.tree_map(into, output)
