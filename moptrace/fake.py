"""Fake tensors whose sizes may be symbols."""

from __future__ import annotations

from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode, _BypassDispatchCache
from torch.fx.experimental.symbolic_shapes import ShapeEnv

__all__ = ["fake_mode"]


def fake_mode(shapes: ShapeEnv) -> FakeTensorMode:
    """A mode for fake tensors with the symbols of ``shapes``, in which real ones may occur.

    What torch remembers of an operator on symbols serves these symbols alone, and is hardly asked
    for again; to write it down takes up to a third of the time to trace a loop over experts. So
    only operators on numbers are remembered.

    >>> import torch
    >>> with fake_mode(ShapeEnv()):
    ...     torch.ones(2, 3) @ torch.ones(3, 4)
    FakeTensor(..., size=(2, 4))
    """
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    remember = mode._make_cache_entry

    def remember_numbers(state: Any, *call: Any) -> Any:
        if state.cache_on_shape_env():
            raise _BypassDispatchCache("symbols")
        return remember(state, *call)

    # Not a subclass: torch finds the fake version of a higher-order operator by the very class.
    mode._make_cache_entry = remember_numbers  # type: ignore[method-assign]
    return mode
