"""Watch a model run while it is traced: where nodes come from, and what fake tensors cannot say."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import get_ident
from types import FrameType, FunctionType
from typing import Any

import sympy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
)
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    _constrain_range_for_size,
)
from torch.fx.node import base_types
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from moptrace import roles
from moptrace.core import (
    args_of,
)
from moptrace.kernels.grouped_mm import grouped_mm
from moptrace.routing_facts import AMOUNTS, UNKNOWN, Fact, Facts, Kind

__all__ = [
    "LIBRARIES",
    "CustomFunction",
    "GenericShapes",
    "Recorder",
    "Refusal",
    "apply_custom_function",
    "unwrapped",
]

aten = torch.ops.aten


class Refusal(Exception):
    """Something that cannot be traced: the reason, and what to change."""

    def __init__(self, reason: str, change: str) -> None:
        super().__init__(reason)
        self.reason, self.change = reason, change


def unwrapped(tensor: Tensor) -> Tensor:
    """The fake tensor within a functional one, with pending writes applied."""
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


# Watching the model run


class Recorder(TorchFunctionMode):
    """Notes the module and source line of every node, and answers what fake tensors cannot."""

    def __init__(self, model: nn.Module, tracer: Any, facts: Facts, packed: bool) -> None:
        super().__init__()
        self.tracer = tracer
        self.names = {id(m): name for name, m in model.named_modules()}
        self.modules = [""]
        self.last: fx.Node = self.tracer.graph._root.prev
        self.facts = facts
        self.packed = packed

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for shim in _SHIMS:
                stack.enter_context(shim(self))
            enter = register_module_forward_pre_hook(self._enter_module)
            stack.callback(enter.remove)
            leave = register_module_forward_hook(self._leave_module, always_call=True)
            stack.callback(leave.remove)
            with self:
                yield
            self.label()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        self.modules.append(self.names.get(id(module), self.modules[-1]))

    def _leave_module(self, *_: Any) -> None:
        self.modules.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            if _Known in types:
                return _on_known(func, args, kwargs)
            if _writes(func):
                self._check_write(args[0])
            answer = _ANSWERS.get(func)
            result = answer(self, *args, **kwargs) if answer else NotImplemented
            return func(*args, **kwargs) if result is NotImplemented else result
        finally:
            self.label()

    def label(self) -> None:
        """Give the nodes made since the last call their module and source line."""
        newest = self.tracer.graph._root.prev
        if newest is self.last:
            return
        frame = _user_frame(sys._getframe())
        source = roles.Source(frame.f_code.co_filename, frame.f_lineno) if frame else None
        node = newest
        while node is not self.last:
            roles.set_role(node, module=self.modules[-1], source=source)
            node = node.prev
        self.last = newest

    def node(self, tensor: Any) -> fx.Node | None:
        """The node that computes a tensor of the model."""
        if not isinstance(tensor, FunctionalTensor):
            return None
        entry = get_proxy_slot(unwrapped(tensor), self.tracer, None)
        return None if entry is None else entry.proxy.node  # type: ignore[attr-defined]

    def fact(self, tensor: Any) -> Fact:
        node = self.node(tensor)
        return UNKNOWN if node is None else self.facts[node]

    def _check_write(self, tensor: Any) -> None:
        """A write that autograd does not see keeps the gradient as if nothing was written."""
        node = self.node(tensor)
        if node is None:
            return
        detached = torch.is_grad_enabled()
        while detached and node.target is not aten.detach.default:
            if not getattr(node.target, "is_view", False):
                return
            node = args_of(node)[0]
        if self.facts.needs_gradient(args_of(node)[0] if detached else node):
            raise Refusal(
                "a tensor that needs gradients is written to where autograd does not see it",
                "Compute a new tensor instead, or clone() it after detach().",
            )


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("requires_grad_", "detach_"):
        return False
    return name == "__setitem__" or (name.endswith("_") and not name.startswith("_"))


LIBRARIES = tuple(os.path.dirname(p) + os.sep for p in (torch.__file__, __file__))


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside torch and moptrace."""
    while frame is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return frame


class GenericShapes(ShapeEnv):
    """Answers questions about how many tokens an expert has as if it had some.

    Any number of tokens must give the same answer: whether there are none is answered, whether
    there are more than ten is not. Questions that torch's own operators ask are answered for two
    tokens or more, and numbers of tokens that differ.
    """

    facts: Facts

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluate_expr(orig_expr, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            answer = self._generic_answer(orig_expr)
            if answer is None:
                raise
            return answer

    def _generic_answer(self, question: sympy.Basic) -> sympy.Basic | None:
        self.facts.refresh()
        free = (s for s in question.free_symbols if isinstance(s, sympy.Symbol))
        symbols = sorted(free, key=lambda s: (len(s.name), s.name))
        kinds = [self.facts.symbols.get(s, Kind.UNKNOWN) for s in symbols]
        routed = all(k in AMOUNTS for k in kinds)
        sized = all(
            k in AMOUNTS or s in self.size_like for s, k in zip(symbols, kinds, strict=True)
        )
        asked_by_torch = _asked_by_torch()
        if not (routed or (asked_by_torch and sized)):
            return None
        answers = set()
        for scale in (2, 1009, 1_000_003) if asked_by_torch else (1, 2, 1009):
            alike = [scale * (i + 1) if k is Kind.POSITION else scale for i, k in enumerate(kinds)]
            apart = [scale + 2 * i for i in range(len(kinds))]
            for sizes in (apart,) if asked_by_torch else (alike, apart):
                answers.add(question.subs(dict(zip(symbols, sizes, strict=True))))
        return answers.pop() if len(answers) == 1 else None


_SYMBOLIC = tuple(
    os.path.join(os.path.dirname(torch.__file__), p) for p in ("__init__.py", "fx" + os.sep)
)


def _asked_by_torch() -> bool:
    """Whether the innermost frame outside symbolic arithmetic is one of torch's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_SYMBOLIC):
            return file.startswith(LIBRARIES)
        frame = frame.f_back
    return False


# What fake tensors cannot answer


class _Known(Tensor):
    """A tensor whose values are known while tracing: the numbers of all the experts."""


def _on_known(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute with known tensors alone; as arguments of other operators they become numbers."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not all(isinstance(t, _Known) for t in tensors):
        args, kwargs = pytree.tree_map_only(_Known, _as_python, (args, kwargs))
        return func(*args, **kwargs)
    with _disable_current_modes(), torch._C.DisableTorchFunctionSubclass():
        args, kwargs = pytree.tree_map_only(_Known, lambda t: t.as_subclass(Tensor), (args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Iterator):
            return iter([x.as_subclass(_Known) for x in result])
        return pytree.tree_map_only(Tensor, lambda t: t.as_subclass(_Known), result)


def _as_python(tensor: Tensor) -> Any:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return tensor.as_subclass(Tensor).tolist()


def _grouped_mm(
    recorder: Recorder,
    rows: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch's grouped product takes no float64, and its fake takes bfloat16 alone."""
    if rows.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None:
        return NotImplemented
    ends = offs.to(torch.int64)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    result = grouped_mm(rows, weight, counts)
    return result if out_dtype is None else result.to(out_dtype)


def _item(recorder: Recorder, tensor: Tensor) -> Any:
    """``if mask.any()``: generically every expert has tokens. Their number may size a slice."""
    kind = recorder.fact(tensor).kind
    if kind in (Kind.BUSY, Kind.IDLE) and tensor.dim() == 0:
        return kind is Kind.BUSY
    if kind not in AMOUNTS:
        return NotImplemented
    number = tensor.item()
    if isinstance(number, torch.SymInt):
        _constrain_range_for_size(number)
    return number


def _sliced(recorder: Recorder, tensor: Tensor, index: Any) -> Any:
    numbers = _numbers(recorder, index)
    return NotImplemented if numbers is index else tensor[numbers]


def _slice_written(recorder: Recorder, tensor: Tensor, index: Any, values: Any) -> Any:
    numbers = _numbers(recorder, index)
    if numbers is index:
        return NotImplemented
    tensor[numbers] = values
    return None


def _numbers(recorder: Recorder, index: Any) -> Any:
    """The index with numbers for the tensors in ``rows[start:end]``."""
    if isinstance(index, tuple):
        entries = tuple(_numbers(recorder, entry) for entry in index)
        return entries if any(a is not b for a, b in zip(entries, index, strict=True)) else index
    if not isinstance(index, slice):
        return index
    ends = (index.start, index.stop, index.step)
    if not any(isinstance(end, Tensor) for end in ends):
        return index
    return slice(*(_number(recorder, end) if isinstance(end, Tensor) else end for end in ends))


def _number(recorder: Recorder, tensor: Tensor) -> Any:
    number = _item(recorder, tensor)
    return tensor.item() if number is NotImplemented else number


def _nonzero(recorder: Recorder, mask: Tensor, *, as_tuple: bool = False, **rest: Any) -> Any:
    """The experts that have tokens: generically, all that can be chosen."""
    fact = recorder.fact(mask)
    if rest or mask.dim() != 1 or (fact.kind, fact.experts) != (Kind.BUSY, 0):
        return NotImplemented
    number = min(mask.shape[0], fact.among or mask.shape[0])
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        experts = torch.arange(number)
        return (experts.as_subclass(_Known),) if as_tuple else experts[:, None].as_subclass(_Known)


def _where(recorder: Recorder, mask: Tensor, *values: Any, **named: Any) -> Any:
    return NotImplemented if values or named else _nonzero(recorder, mask, as_tuple=True)


def _integer(recorder: Recorder, tensor: Tensor) -> Any:
    raise Refusal(
        "int() and range() take numbers that are known, not traced tensors",
        "Leave int() out: a number from x.item() or x.tolist() can slice and split tensors.",
    )


def _length(recorder: Recorder, tensor: Tensor) -> Any:
    if tensor.dim() and isinstance(tensor.shape[0], torch.SymInt):
        raise Refusal("len() cannot depend on the data", "Write x.shape[0] instead of len(x).")
    return NotImplemented


def _data(recorder: Recorder, tensor: Tensor) -> Tensor:
    """Before dispatch, ``x.data`` is not seen to cut gradients."""
    return tensor.detach()


def _requires_grad(recorder: Recorder, tensor: Tensor) -> Any:
    """Before dispatch, no tensor requires gradients."""
    node = recorder.node(tensor)
    return NotImplemented if node is None else recorder.facts.needs_gradient(node)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch._grouped_mm: _grouped_mm,
    Tensor.__bool__: _item,
    Tensor.__int__: _integer,
    Tensor.__index__: _integer,
    Tensor.__len__: _length,
    Tensor.item: _item,
    Tensor.__getitem__: _sliced,
    Tensor.__setitem__: _slice_written,
    Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
    torch.argwhere: _nonzero,
    Tensor.argwhere: _nonzero,
    torch.where: _where,
    Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
}
if hasattr(torch.nn.functional, "grouped_mm"):
    _ANSWERS[torch.nn.functional.grouped_mm] = _grouped_mm


# The user's own derivatives


class CustomFunction:
    """A call of the user's own ``torch.autograd.Function``, which keeps its own backward."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = function.__name__
        self.__module__ = function.__module__

    def __call__(self, *args: Any) -> Any:
        return self.function.apply(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CustomFunction) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return f"CustomFunction({self.function.__name__})"


def _record_custom_function(
    recorder: Recorder, function: Any, apply: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Run the function on fake tensors, unseen by the trace, and record the call as one node."""
    if function is torch.utils.checkpoint.CheckpointFunction:  # (run, preserve_rng_state, *args)
        return args[0](*args[2:])  # what to recompute is decided later, by a pass
    tracer = recorder.tracer
    plain = pytree.tree_map_only(FunctionalTensor, unwrapped, args)
    fake_mode = next(t for t in pytree.tree_leaves(plain) if isinstance(t, FakeTensor)).fake_mode
    with _disable_current_modes(), torch._C.DisableTorchFunction(), fake_mode, torch.no_grad():
        results = apply(function, *plain)
    given = {id(t) for t in pytree.tree_leaves(plain) if isinstance(t, Tensor)}
    if any(id(r) in given for r in pytree.tree_leaves(results) if isinstance(r, Tensor)):
        raise Refusal(
            f"{function.__name__} returns one of its own arguments",
            "Return a new tensor from its forward, for example with clone().",
        )
    proxies = pytree.tree_map(lambda x: _proxy(tracer, x), plain)
    proxy = tracer.create_proxy("call_function", CustomFunction(function), proxies, {})
    with disable_proxy_modes_tracing():
        track_tensor_tree(results, proxy, constant=None, tracer=tracer)
    recorder.label()
    return pytree.tree_map_only(Tensor, FunctionalTensor.to_functional, results)


def _proxy(tracer: Any, value: Any) -> Any:
    """What stands for an argument in the graph; objects that no node can hold become constants."""
    if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return tracer.unwrap_proxy(value)
    if value is None or isinstance(value, base_types):
        return value
    name = tracer.get_fresh_qualname("_custom_argument")
    setattr(tracer.root, name, value)
    return tracer.create_proxy("get_attr", name, (), {})


# Changes to libraries while tracing, each undone afterwards


@contextmanager
def _replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _causal_attention(recorder: Recorder) -> AbstractContextManager[None]:
    """transformers looks into ``position_ids`` for packed sequences, and makes a mask where it
    cannot look. Those it makes itself have none, so attention stays causal without a mask."""
    masks = sys.modules.get("transformers.masking_utils")
    if recorder.packed or not hasattr(masks, "find_packed_sequence_indices"):
        return nullcontext()
    return _replaced(masks, "find_packed_sequence_indices", lambda *args, **kwargs: None)


def _fake_to_transformers(recorder: Recorder) -> AbstractContextManager[None]:
    """transformers looks into masks unless they are fake; functional tensors are fake too."""
    utils = sys.modules.get("transformers.utils.import_utils")
    original = getattr(utils, "is_fake_tensor", None)
    if original is None:
        return nullcontext()
    is_fake = lambda x: isinstance(x, FunctionalTensor) or original(x)  # noqa: E731
    return _replaced(utils, "is_fake_tensor", is_fake)


@contextmanager
def _bincount_size(recorder: Recorder) -> Iterator[None]:
    """The fake of ``bincount`` has an unknown size; experts never need more than ``minlength``."""
    table = fake_impls.op_implementations_dict
    original = table.get(aten.bincount.default)

    def bincount(mode: Any, func: Any, x: Tensor, weights: Any = None, minlength: int = 0) -> Any:
        if not minlength:
            if original is None:
                raise DynamicOutputShapeException(func)
            return original(mode, func, x, weights, minlength)
        if weights is None:
            return x.new_empty(minlength, dtype=torch.int64)
        exact = torch.float32 if weights.dtype == torch.float32 else torch.float64
        return x.new_empty(minlength, dtype=exact)

    table[aten.bincount.default] = bincount
    try:
        yield
    finally:
        del table[aten.bincount.default]
        if original is not None:
            table[aten.bincount.default] = original


@contextmanager
def _custom_functions(recorder: Recorder) -> Iterator[None]:
    """A trace before dispatch would look into custom functions and lose their backward.

    The code of ``Function.apply`` is exchanged, not the attribute: users keep ``f = F.apply``.
    """
    method = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
    code = method.__code__
    original = FunctionType(
        code, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    apply = _exchangeable_apply()
    assert len(apply.__code__.co_freevars) == len(code.co_freevars)
    _RECORDING.append((recorder, original, get_ident()))
    method.__code__ = apply.__code__
    try:
        yield
    finally:
        method.__code__ = code
        _RECORDING.pop()


_RECORDING: list[tuple[Recorder, Callable[..., Any], int]] = []


def _exchangeable_apply() -> Any:
    class Exchanged:  # gives the function a closure over __class__, as the original has
        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            _ = __class__  # type: ignore[name-defined]
            from moptrace.recorder import apply_custom_function

            return apply_custom_function(cls, args, kwargs)

    return Exchanged.apply.__func__


def apply_custom_function(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``Function.apply`` does while a model is traced."""
    recorder, original, thread = _RECORDING[-1]
    leaves = pytree.tree_leaves((args, kwargs))
    traced = any(isinstance(x, FunctionalTensor) for x in leaves)
    if get_ident() != thread or not traced:
        return original(function, *args, **kwargs)
    if function.setup_context is not torch.autograd.Function.setup_context:
        bound = inspect.signature(function.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        args = bound.args
    return _record_custom_function(recorder, function, original, args)


_SHIMS = (_causal_attention, _fake_to_transformers, _bincount_size, _custom_functions)
