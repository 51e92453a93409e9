"""Computing in float64 throughout, for models that ask for float32 in places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class InFloat64(TorchFunctionMode):
    """Where a model casts to float32 (norms, routers, the loss), cast to float64 instead.

    Otherwise float32 roundings, and not the passes, would decide how equal two results are. Eager
    references and captures run inside it alike.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = pytree.tree_map(
            lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)
