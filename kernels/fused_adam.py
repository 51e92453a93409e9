"""The update of Adam and AdamW as one operator, which is torch's own fused kernel where that fits.

``apply_optimizer`` records it for optimizers that were made with ``fused=True``. In a graph it
returns new values; where nothing needs the old ones, a step runs the version in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moptrace.kernels import triton_fused_adam
from moptrace.kernels.selection import choose
from moptrace.kernels.stochastic_rounding import round_stochastically

__all__ = ["Recorded", "fused_adam"]

_OPTIONS = (
    "*, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize, "
    "bool decoupled, int? seed=None, int offset=0"
)
_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    f"fused_adam(Tensor x, Tensor grad, Tensor[] moments, Tensor step, Tensor lr, {_OPTIONS})"
    " -> Tensor[]"
)
_LIBRARY.define(
    "fused_adam_(Tensor(a!) x, Tensor grad, Tensor(b!)[] moments, Tensor step, Tensor lr, "
    f"{_OPTIONS}) -> ()"
)


def fused_adam(
    x: Tensor, grad: Tensor, moments: Sequence[Tensor], step: Tensor, lr: Tensor, **options: Any
) -> list[Tensor]:
    """The new values of a parameter and of its moments, after a step.

    x, grad and moments [*D]; step and lr [] -> [x, *moments], each [*D]. ``moments`` are those of
    the gradient and of its square, and with ``amsgrad`` the largest of the latter. ``step`` counts
    this step already. ``options`` are torch.optim.Adam's; ``decoupled`` says that decay is AdamW's.

    Each value keeps its dtype. Where all have one, the result is that of torch's fused kernel, bit
    by bit; where they differ, such as moments in float32 of a parameter in bfloat16, it is formed
    in float32 at least, and rounded once. With a ``seed``, a parameter in bfloat16 is rounded up or
    down by chance (``stochastic_rounding``): other draws for each step and each of its numbers,
    which ``offset`` counts from, so that shards of a parameter draw what the whole would.

    Raises: ValueError for a seed and a parameter in another dtype.
    """
    return torch.ops.moptrace.fused_adam.default(x, grad, moments, step, lr, **options)


@torch.library.impl(_LIBRARY, "fused_adam_", "CompositeExplicitAutograd")
def _(
    x: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    *,
    seed: int | None = None,
    offset: int = 0,
    **options: Any,
) -> None:
    if seed is not None and x.dtype != torch.bfloat16:
        raise ValueError(f"only bfloat16 is rounded by chance; without a seed {x.dtype} is exact")
    operator = "fused_adam" if seed is None else "fused_adam, by chance"
    if choose(operator, x, grad, *moments) == "triton":
        triton_fused_adam.update(x, grad, moments, step, lr, seed=seed, offset=offset, **options)
        return
    values = x, grad, *moments
    if seed is None and len({value.dtype for value in values}) == 1:
        _update_alike(*values, step=step, lr=lr, **options)
        return
    dtype = reduce(torch.promote_types, [value.dtype for value in values], torch.float32)
    wide = [value.to(dtype, copy=True) for value in values]
    _update_alike(*wide, step=step, lr=lr, **options)
    if seed is not None:
        wide[0] = round_stochastically(wide[0].float(), seed, step, offset)
    for value, new in zip((x, *moments), (wide[0], *wide[2:]), strict=True):
        value.copy_(new)


def _update_alike(
    x: Tensor,
    grad: Tensor,
    *moments: Tensor,
    step: Tensor,
    lr: Tensor,
    decoupled: bool,
    **options: Any,
) -> None:
    """Torch's fused kernel, which takes values of one dtype."""
    update: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
    largest = list(moments[2:])
    rate = lr if lr.is_cuda else float(lr)
    update([x], [grad], [moments[0]], [moments[1]], largest, [step], lr=rate, **options)


@torch.library.impl(_LIBRARY, "fused_adam", "CompositeExplicitAutograd")
def _(
    x: Tensor, grad: Tensor, moments: Sequence[Tensor], step: Tensor, lr: Tensor, **options: Any
) -> list[Tensor]:
    new, *others = [value.clone() for value in (x, *moments)]
    torch.ops.moptrace.fused_adam_.default(new, grad, others, step, lr, **options)
    return [new, *others]


@torch.library.register_fake("moptrace::fused_adam", lib=_LIBRARY)
def _(
    x: Tensor, grad: Tensor, moments: Sequence[Tensor], step: Tensor, lr: Tensor, **options: Any
) -> list[Tensor]:
    return [torch.empty_like(value) for value in (x, *moments)]


class Recorded(TorchFunctionMode):
    """While it is active, torch's fused kernels of Adam and AdamW are calls of ``fused_adam``.

    ``lr`` is the learning rate as a tensor, since one that torch was given as a number would be a
    constant of what is recorded.
    """

    def __init__(self, lr: Tensor):
        super().__init__()
        self.lr = lr

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func not in (torch._fused_adam_, torch._fused_adamw_):
            return func(*args, **options)
        for name in ("lr", "grad_scale", "found_inf"):
            options.pop(name, None)
        options["decoupled"] = func is torch._fused_adamw_
        parameters, gradients, *moments, steps = args
        for number, (x, grad) in enumerate(zip(parameters, gradients, strict=True)):
            held = [kind[number] for kind in moments if kind]
            new = fused_adam(x, grad, held, steps[number], self.lr, **options)
            for old, value in zip((x, *held), new, strict=True):
                old.copy_(value)
        return None
