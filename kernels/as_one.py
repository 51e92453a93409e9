"""A Python object as one operator of a graph.

Traced operators are usually registered by name, once. An operator that is made while passes run,
such as an expert's function, is an object with a graph of its own. ``as_one`` lets it be called on
tensors that are being traced: the call is recorded as one node whose target is the object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, track_tensor_tree
from torch.utils import _pytree as pytree

__all__ = ["Operator", "as_one"]


class Operator(ABC):
    """A function of tensors that returns a tuple of new ones."""

    __name__: str  # as fx writes the target of a call

    @abstractmethod
    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def shapes(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """The call on fake tensors."""

    @abstractmethod
    def only(self, outputs: Sequence[int]) -> tuple[Operator, tuple[int, ...]]:
        """The operator that gives some of the results, and which of the operands that takes."""


def as_one(operator: Operator, *operands: Tensor) -> tuple[Tensor, ...]:
    """Call an operator on fake tensors, below autograd; what traces them sees one call."""
    with torch._C._AutoDispatchBelowAutograd():
        return _call(operator, *operands)


class _Call(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("moptrace_call")

    def __call__(self, operator: Operator, *operands: Tensor) -> tuple[Tensor, ...]:
        return super().__call__(operator, *operands)


_call = _Call()


@_call.py_impl(DispatchKey.CompositeExplicitAutograd)
def _(operator: Operator, *operands: Tensor) -> tuple[Tensor, ...]:
    return operator(*operands)


@_call.py_impl(FakeTensorMode)
def _(mode: FakeTensorMode, operator: Operator, *operands: Tensor) -> tuple[Tensor, ...]:
    with mode:
        return operator.shapes(*operands)


@_call.py_impl(ProxyTorchDispatchMode)
def _(mode: ProxyTorchDispatchMode, operator: Operator, *operands: Tensor) -> Any:
    proxies = pytree.tree_map(mode.tracer.unwrap_proxy, operands)
    call = mode.tracer.create_proxy("call_function", operator, proxies, {})
    return track_tensor_tree(_call(operator, *operands), call, constant=None, tracer=mode.tracer)


@_call.py_functionalize_impl
def _(ctx: Any, operator: Operator, *operands: Tensor) -> Any:
    with ctx.redispatch_to_next():
        return ctx.wrap_tensors(_call(operator, *ctx.unwrap_tensors(operands)))
