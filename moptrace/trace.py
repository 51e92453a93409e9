"""Capture a model and its loss as one functional graph: the captured level.

The model runs once under fake CPU tensors, inside two modes of torch: ``make_fx`` before dispatch,
which records whole operators (``linear``, ``scaled_dot_product_attention``), and functionalisation,
which turns in-place writes into values. A third mode, ``_Recorder``, notes where each node comes
from and answers what fake tensors cannot.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from threading import get_ident
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import sympy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
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
from moptrace.core import Buffer, Input, Level, Output, Parameter, Program, Signature, erase_dead
from moptrace.errors import TraceError
from moptrace.kernels.grouped_mm import grouped_mm

__all__ = ["CustomFunction", "Evaluation", "OutputIndex", "call", "evaluate", "rebuild", "trace"]

aten = torch.ops.aten


class OutputIndex(int):
    """Stands for a tensor in ``Signature.results``: the index of a graph output."""


def trace(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
) -> Program:
    """Capture the forward and loss of a model on one device as a program.

    ``batch`` is a mapping of keyword arguments, a sequence of positional ones, or one tensor. Its
    tensors may be real or fake; everything else in it is a constant of the program. Parameters and
    buffers may be real, meta or fake, on any device: only their shapes and dtypes are read, and the
    model is left as it was.

    The loss is the returned scalar, the first element of the returned tuple, or the entry ``loss``
    of the returned mapping. With ``loss_fn``, the entries of ``batch`` that ``model.forward`` does
    not accept are passed to ``loss_fn(output, **entries)`` and the program returns
    ``(loss, output)``. Returned objects that are neither tensors nor constants, such as caches,
    become None; a model whose configuration has ``use_cache`` is called with ``use_cache=False``
    unless the batch says otherwise.

    Loops over experts are unrolled. Whether an expert has tokens is answered yes wherever the model
    asks (``idx.numel() == 0``, ``mask.any()``, a count of zero), so skipping an expert without
    tokens must be nothing but a saving. An expert without tokens gets zero gradients, not None.

    Errors: ``TraceError`` with the user's line, the reason, and what to change.
    """
    args, kwargs = _arguments(batch)
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise TraceError("trace runs outside torch.autocast. Convert the model: model.bfloat16().")
    call = _Call.of(model, args, kwargs, loss_fn)
    with _untouched(model):
        try:
            return _capture(model, call, args, kwargs)
        except TraceError:
            raise
        except Exception as error:
            raise _explained(model, error) from error


def call(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Any] | Tensor,
    loss_fn: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """Run the model itself, eagerly, as ``trace`` reads it: the loss, and what it returned."""
    args, kwargs = _arguments(batch)
    return _Call.of(model, args, kwargs, loss_fn)(args, kwargs)


class Evaluation(NamedTuple):
    """What a program computes: the user's output, the loss, and new values of buffers by name."""

    output: Any
    loss: Tensor
    buffers: dict[str, Tensor]


def evaluate(
    program: Program,
    state: Mapping[str, Tensor],
    batch: Mapping[str, Any] | Sequence[Any] | Tensor,
) -> Evaluation:
    """Run a program of level placed or before on one device, differentiably.

    ``state`` holds parameters and buffers by fully qualified name. A stacked parameter is stacked
    from the user's own parameters.
    """
    if program.level > Level.PLACED:
        raise TraceError(f"evaluate runs programs up to level placed, got {program.level}")
    signature = program.signature
    tensors = [_state_of(x, state) for x in (*signature.parameters, *signature.buffers)]
    tensors += inputs_of(signature, batch)
    root = nn.Module()
    for name, constant in program.constants.items():
        setattr(root, name, constant)
    values = fx.Interpreter(root, graph=program.graph).run(*tensors)
    updates = {o.buffer: v for o, v in zip(signature.outputs, values, strict=True) if o.buffer}
    return Evaluation(rebuild(signature, values), values[signature.loss], updates)


def inputs_of(
    signature: Signature, batch: Mapping[str, Any] | Sequence[Any] | Tensor
) -> list[Tensor]:
    """The tensors of a batch in the order of the graph's inputs.

    Errors: ``TraceError`` if the batch differs from the traced one in more than its tensors.
    """
    leaves, spec = pytree.tree_flatten_with_path(_arguments(batch))
    if spec != signature.inputs_spec:
        raise TraceError(
            f"the batch is built differently from the traced one: got {spec}, traced "
            f"{signature.inputs_spec}. Trace again with a batch like this one."
        )
    expected = {x.path for x in signature.inputs}
    for (path, leaf), traced in zip(leaves, signature.leaves, strict=True):
        if _path_name(path) not in expected and leaf != traced:
            raise TraceError(
                f"the program was traced with the constant {_path_name(path)}={traced!r}, got "
                f"{leaf!r}. Trace again with this value."
            )
    found = {_path_name(path): leaf for path, leaf in leaves}
    return [found[x.path] for x in signature.inputs]


def rebuild(signature: Signature, values: Sequence[Any]) -> Any:
    """The user's output, such as a ModelOutput, from the values of the graph's outputs."""
    leaves = [values[x] if isinstance(x, OutputIndex) else x for x in signature.results]
    return pytree.tree_unflatten(leaves, signature.outputs_spec)


def _state_of(wanted: Parameter | Buffer, state: Mapping[str, Tensor]) -> Tensor:
    if isinstance(wanted, Parameter) and wanted.stacked:
        return torch.stack([state[name] for name in wanted.stacked])
    for name in (wanted.fqn, *wanted.aliases):
        if name in state:
            return state[name]
    raise TraceError(f"the state has no entry {wanted.fqn!r}")


# The call: what goes to the model and what to the loss function


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(batch), {}
    raise TraceError(
        f"the batch must be a mapping of keyword arguments, a sequence of positional arguments, or "
        f"a tensor, got {type(batch).__name__}"
    )


@dataclass(frozen=True)
class _Call:
    """How to compute (loss, output) from the arguments that the user gave."""

    model: nn.Module
    loss_fn: Callable[..., Tensor] | None
    positional: int | None = None  # how many positional arguments are the model's; None means all
    for_loss: frozenset[str] = frozenset()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss_fn: Callable[..., Tensor] | None,
    ) -> _Call:
        parameters = inspect.signature(model.forward).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        extra = {}
        if "use_cache" in named - kwargs.keys() and hasattr(
            getattr(model, "config", None), "use_cache"
        ):
            extra["use_cache"] = False
        if loss_fn is None:
            return _Call(model, None, extra=extra)
        kinds = [p.kind for p in parameters]
        count = sum(k in (k.POSITIONAL_ONLY, k.POSITIONAL_OR_KEYWORD) for k in kinds)
        positional = None if inspect.Parameter.VAR_POSITIONAL in kinds else count
        refused = kwargs.keys() - named
        if inspect.Parameter.VAR_KEYWORD in kinds:
            refused &= _named_parameters(loss_fn)
        return _Call(model, loss_fn, positional, frozenset(refused), extra)

    def packed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the batch says where each token stands, as packed sequences must."""
        own = {k: v for k, v in kwargs.items() if k not in self.for_loss}
        bound = inspect.signature(self.model.forward).bind_partial(*args[: self.positional], **own)
        return bound.arguments.get("position_ids") is not None

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss, and what the program returns to the user."""
        own = {k: v for k, v in kwargs.items() if k not in self.for_loss}
        output = self.model(*args[: self.positional], **own, **self.extra)
        if self.loss_fn is None:
            return _loss_of(output), output
        rest = () if self.positional is None else args[self.positional :]
        loss = self.loss_fn(output, *rest, **{k: kwargs[k] for k in self.for_loss})
        return _checked_loss(loss, "loss_fn returned"), (loss, output)


def _named_parameters(function: Callable[..., Any]) -> set[str]:
    target = function.forward if isinstance(function, nn.Module) else function
    return set(inspect.signature(target).parameters)


def _loss_of(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise TraceError(
                f"the model returned no loss: its output has the entries {', '.join(output)}. Put "
                f"what the loss needs into the batch (labels=... for a Hugging Face model), or "
                f"give trace(model, batch, loss_fn=...)."
            )
        return _checked_loss(output["loss"], "the entry 'loss' of the model's output is")
    if isinstance(output, (tuple, list)) and output:
        return _checked_loss(output[0], "the first element that the model returned is")
    return _checked_loss(output, "the model returned")


def _checked_loss(loss: Any, subject: str) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point():
        return loss
    got = (
        f"a {loss.dtype} tensor of shape {list(loss.shape)}"
        if isinstance(loss, Tensor)
        else (f"an object of type {type(loss).__name__}")
    )
    raise TraceError(
        f"no loss: {subject} {got}, but the loss must be a scalar tensor of a floating-point "
        f"dtype. Return the loss from forward (a scalar, (loss, ...), or {{'loss': ...}}), or give "
        f"trace(model, batch, loss_fn=...)."
    )


# The capture


def _capture(
    model: nn.Module, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program:
    parameters = _slots(model, "_parameters")
    buffers = _slots(model, "_buffers")
    slots = [*parameters, *buffers]
    leaves, spec = pytree.tree_flatten_with_path((args, kwargs))
    inputs = [(_path_name(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    shapes = _GenericShapes()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fakes = [_fake(x, mode) for x in (*(s.tensor for s in slots), *(x for _, x in inputs))]
    results: _Results | None = None

    def forward(*flat: Tensor) -> list[Tensor]:
        nonlocal results
        tracer = _tracer()
        shapes.facts = _Facts(tracer.graph, (t.requires_grad for t in fakes))
        recorder = _Recorder(model, tracer, shapes.facts, call.packed(args, kwargs))
        with FunctionalTensorMode(pre_dispatch=True, export=True):
            wrapped = [FunctionalTensor.to_functional(t) for t in flat]
            for slot, tensor in zip(slots, wrapped, strict=False):
                slot.put(tensor)
            rest = iter(wrapped[len(slots) :])
            values = [next(rest) if isinstance(x, Tensor) else x for _, x in leaves]
            with recorder.recording():
                loss, output = call(*pytree.tree_unflatten(values, spec))
            results = _Results.of(loss, output)
            now = [_plain(slot.get()) for slot in slots]
        for slot, before, after in zip(parameters, flat, now, strict=False):
            if before is not after:
                raise TraceError(
                    f"forward writes to the parameter {slot.fqn}. Update parameters in the "
                    f"optimizer step, or register it as a buffer."
                )
        for slot, before, after in zip(
            buffers, flat[len(parameters) :], now[len(parameters) :], strict=False
        ):
            if before is not after:
                results.update(slot.fqn, after)
        return results.tensors

    with mode, torch.enable_grad():
        traced = make_fx(forward, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    assert results is not None
    wanted = [*(s.fqn for s in slots), *(name for name, _ in inputs)]
    graph, names = _cleaned(traced.graph, wanted)
    named = iter(names)
    signature = Signature(
        parameters=tuple(s.parameter(next(named)) for s in parameters),
        buffers=tuple(s.buffer(next(named)) for s in buffers),
        inputs=tuple(Input(next(named), n, tuple(x.shape), x.dtype) for n, x in inputs),
        outputs=tuple(results.outputs),
        loss=results.loss,
        inputs_spec=spec,
        leaves=tuple(None if isinstance(x, Tensor) else x for _, x in leaves),
        outputs_spec=results.spec,
        results=results.leaves,
    )
    return Program(graph, signature, Level.CAPTURED, constants=_constants(traced, graph))


def _tracer() -> Any:
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer


def _constants(traced: fx.GraphModule, graph: fx.Graph) -> dict[str, Any]:
    found = {n.target: getattr(traced, n.target) for n in graph.find_nodes(op="get_attr")}
    for node in graph.find_nodes(op="get_attr"):
        if getattr(found[node.target], "requires_grad", False):
            raise TraceError(
                f"a tensor that requires grad is used but is no parameter of the model: "
                f"{next(map(roles.where, node.users))}. Register it with nn.Parameter."
            )
    return found


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake CPU tensor like this one, which may be real, meta or fake and on any device."""
    if type(tensor) not in (Tensor, nn.Parameter, FakeTensor, nn.Buffer):
        raise TraceError(
            f"trace takes ordinary tensors, got a {type(tensor).__name__} of shape "
            f"{list(tensor.shape)}. Trace the model before it is distributed or quantised."
        )
    with mode:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, requires_grad=tensor.requires_grad
        )


def _plain(tensor: Tensor) -> Tensor:
    """The fake tensor within a functional one, with pending writes applied."""
    if not isinstance(tensor, FunctionalTensor):
        return tensor
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


def _path_name(path: Sequence[Any]) -> str:
    """``input_ids`` for a keyword argument, ``0`` for a positional one, ``0.x`` below that."""
    keys = (
        next(v for k in ("key", "idx", "name") if (v := getattr(p, k, None)) is not None)
        for p in path[1:]
    )
    return ".".join(map(str, keys))


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer with all its names and the module dictionaries that hold it."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    persistent: bool = True

    @property
    def fqn(self) -> str:
        return self.names[0]

    def put(self, tensor: Tensor) -> None:
        for holder, key in self.owners:
            holder[key] = tensor

    def get(self) -> Tensor:
        holder, key = self.owners[0]
        return holder[key]

    def parameter(self, name: str) -> Parameter:
        t = self.tensor
        aliases = tuple(self.names[1:])
        return Parameter(name, self.fqn, tuple(t.shape), t.dtype, t.requires_grad, aliases)

    def buffer(self, name: str) -> Buffer:
        t = self.tensor
        aliases = tuple(self.names[1:])
        return Buffer(name, self.fqn, tuple(t.shape), t.dtype, self.persistent, aliases)


def _slots(model: nn.Module, kind: str) -> list[_Slot]:
    """The model's parameters or buffers, each once however many names it has."""
    slots: dict[int, _Slot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        holder: dict[str, Tensor | None] = getattr(module, kind)
        for key, tensor in holder.items():
            if tensor is None:
                continue
            persistent = key not in module._non_persistent_buffers_set
            slot = slots.setdefault(id(tensor), _Slot(tensor, persistent=persistent))
            slot.names.append(f"{path}.{key}" if path else key)
            slot.owners.append((holder, key))
    return list(slots.values())


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back every attribute that tracing or the model's forward changes on a module.

    Containers that modules hold (parameters, buffers, hooks, lists of losses) are put back too.
    """
    saved = [(m, dict(m.__dict__)) for m in model.modules()]
    contents = [
        (value, value.copy())
        for _, attributes in saved
        for value in attributes.values()
        if isinstance(value, (dict, list, set))
    ]
    try:
        yield
    finally:
        for container, before in contents:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        for module, attributes in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)


@dataclass
class _Results:
    """What the model returned: the tensors, and how to build the user's output from them."""

    tensors: list[Tensor]
    outputs: list[Output]
    loss: int
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @staticmethod
    def of(loss: Tensor, output: Any) -> _Results:
        flat, spec = pytree.tree_flatten_with_path(output)
        tensors: list[Tensor] = []
        outputs: list[Output] = []
        leaves: list[Any] = []
        index = -1
        for path, leaf in flat:
            if isinstance(leaf, Tensor):
                if leaf is loss:
                    index = len(tensors)
                leaves.append(OutputIndex(len(tensors)))
                outputs.append(Output(_path_name((None, *path))))
                tensors.append(_plain(leaf))
            else:
                leaves.append(_constant_or_none(leaf))
        return _Results(tensors, outputs, index, spec, tuple(leaves))

    def update(self, buffer: str, tensor: Tensor) -> None:
        self.tensors.append(tensor)
        self.outputs.append(Output(buffer, buffer=buffer))


_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)


def _constant_or_none(leaf: Any) -> Any:
    if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise TraceError(
            "the model returns a Python number that depends on the data. Return a tensor instead."
        )
    return leaf if isinstance(leaf, _CONSTANTS) else None


# Watching the model run


class _Recorder(TorchFunctionMode):
    """Notes the module and source line of every node, and answers what fake tensors cannot."""

    def __init__(self, model: nn.Module, tracer: Any, facts: _Facts, packed: bool) -> None:
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
        entry = get_proxy_slot(_plain(tensor), self.tracer, None)
        return None if entry is None else entry.proxy.node  # type: ignore[attr-defined]

    def fact(self, tensor: Any) -> _Fact:
        node = self.node(tensor)
        return _UNKNOWN if node is None else self.facts[node]

    def _check_write(self, tensor: Any) -> None:
        """A write that autograd does not see keeps the gradient as if nothing was written."""
        node = self.node(tensor)
        if node is None:
            return
        detached = torch.is_grad_enabled()
        while detached and node.target is not aten.detach.default:
            if not getattr(node.target, "is_view", False):
                return
            node = _args(node)[0]
        if self.facts.needs_gradient(_args(node)[0] if detached else node):
            raise _Refusal(
                "a tensor that needs gradients is written to where autograd does not see it",
                "Compute a new tensor instead, or clone() it after detach().",
            )


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("requires_grad_", "detach_"):
        return False
    return name == "__setitem__" or (name.endswith("_") and not name.startswith("_"))


_LIBRARIES = tuple(os.path.dirname(p) + os.sep for p in (torch.__file__, __file__))


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside torch and moptrace."""
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return frame


# What is known of integers without data


class _Kind(Enum):
    UNKNOWN = "it depends on floating-point values"
    PLAIN = "it does not depend on routing"
    CHOICE = "experts that were chosen, or positions of tokens"
    MASK = "for each token, whether an expert was chosen"
    COUNT = "how many tokens an expert has"
    POSITION = "where the rows of an expert begin or end"
    BUSY = "whether an expert has tokens"
    IDLE = "whether an expert has none"


@dataclass(frozen=True, slots=True)
class _Fact:
    """The kind of a number or tensor, and which dimension runs over the experts, if one does.

    ``among`` is the number of experts of which a choice can be, where a top-k decides it.
    """

    kind: _Kind
    experts: int | None = None
    among: int | None = None


_UNKNOWN, _PLAIN, _CHOICE = _Fact(_Kind.UNKNOWN), _Fact(_Kind.PLAIN), _Fact(_Kind.CHOICE)
_AMOUNTS = (_Kind.COUNT, _Kind.POSITION)


class _Facts:
    """Facts about the nodes of a graph that is being made, found in order and on demand."""

    def __init__(self, graph: fx.Graph, needs_gradient: Iterable[bool]) -> None:
        self.graph = graph
        self.inputs = iter(needs_gradient)
        self.known: dict[fx.Node, _Fact] = {}
        self.symbols: dict[sympy.Symbol, _Kind] = {}
        self.differentiable: set[fx.Node] = set()
        self.enabled = True
        self.last: fx.Node = graph._root

    def __getitem__(self, node: fx.Node) -> _Fact:
        self.refresh()
        return self.known[node]

    def needs_gradient(self, node: fx.Node) -> bool:
        self.refresh()
        return node in self.differentiable

    def refresh(self) -> None:
        while self.last.next is not self.graph._root:
            self.last = self.last.next
            self._add(self.last)

    def _add(self, node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            self.enabled = bool(_args(node)[0])
        self.known[node] = fact = _fact(node, self.known)
        example = roles.value(node)
        if node.op == "placeholder":
            if next(self.inputs):
                self.differentiable.add(node)
        elif self.enabled and node.target is not aten.detach.default:
            is_integer = isinstance(example, Tensor) and not example.is_floating_point()
            if not is_integer and any(n in self.differentiable for n in node.all_input_nodes):
                self.differentiable.add(node)
        sizes = example.shape if isinstance(example, Tensor) else (example,)
        for size in sizes:
            if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                for symbol in size.node.expr.free_symbols - self.symbols.keys():
                    self.symbols[symbol] = self._symbol_kind(node, fact)

    def _symbol_kind(self, node: fx.Node, fact: _Fact) -> _Kind:
        if node.target in (aten.item.default, aten._local_scalar_dense.default):
            return fact.kind
        kinds = {self.known[n].kind for n in node.all_input_nodes}
        routed = kinds & {_Kind.MASK, _Kind.COUNT, _Kind.POSITION, _Kind.CHOICE}
        return _Kind.COUNT if routed else _Kind.UNKNOWN


def _fact(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    if node.op != "call_function":
        example = roles.value(node)
        exact = isinstance(example, Tensor) and not example.is_floating_point()
        return _PLAIN if exact else _UNKNOWN
    facts = [known[n] for n in node.all_input_nodes]
    rule = _FACT_RULES.get(node.target)
    if rule is not None and facts:
        return rule(node, known)
    kinds = {f.kind for f in facts}
    if _Kind.UNKNOWN in kinds:
        return _UNKNOWN
    return _PLAIN if kinds <= {_Kind.PLAIN} else _CHOICE


_FactRule = Callable[[fx.Node, Mapping[fx.Node, _Fact]], _Fact]


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _rank(node: Any) -> int:
    return roles.tensor(node).dim()


def _same(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    return known[_args(node)[0]]


def _selection(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    """Indices of the largest values: a choice, unless only the batch's own integers are sorted."""
    source = _args(node)[0]
    if known[source].kind is _Kind.PLAIN:
        return _PLAIN
    if node.target is not aten.topk.default:
        return _CHOICE
    dim = _args(node)[2] if len(_args(node)) > 2 else -1
    return replace(_CHOICE, among=roles.tensor(source).shape[dim])


def _element(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    parent, index = _args(node)
    if parent.target in _SELECTIONS and index == 0:  # the values, not the indices
        return known[_args(parent)[0]]
    return known[parent]


def _moved(where: Callable[[fx.Node, int], int | None]) -> _FactRule:
    """The rule of an operator that only moves or removes dimensions."""

    def rule(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
        fact = known[_args(node)[0]]
        if fact.experts is None:
            return fact
        return replace(fact, experts=where(node, fact.experts))

    return rule


def _permuted(node: fx.Node, dim: int) -> int:
    rank = _rank(node)
    return [d % rank for d in _args(node)[1]].index(dim)


def _transposed(node: fx.Node, dim: int) -> int:
    first, second = (d % _rank(node) for d in _args(node)[1:3])
    return {first: second, second: first}.get(dim, dim)


def _unsqueezed(node: fx.Node, dim: int) -> int:
    return dim + (_args(node)[1] % _rank(node) <= dim)


def _without(node: fx.Node, dim: int) -> int | None:
    removed = (_args(node)[1] if len(_args(node)) > 1 else 0) % _rank(_args(node)[0])
    return None if removed == dim else dim - (removed < dim)


def _viewed(node: fx.Node, dim: int) -> int | None:
    before, after = roles.tensor(_args(node)[0]).shape, roles.tensor(node).shape
    if dim == 0 and after[:1] == before[:1]:
        return 0
    if dim == len(before) - 1 and after[-1:] == before[-1:]:
        return len(after) - 1
    return None


def _reduced(total: _Kind) -> _FactRule:
    """Sums and any: over all tokens they tell about experts, over fewer still about tokens."""

    def rule(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
        fact = known[_args(node)[0]]
        if fact.kind not in (_Kind.MASK, _Kind.COUNT, _Kind.BUSY):
            return fact if fact.kind in (_Kind.UNKNOWN, _Kind.PLAIN) else _CHOICE
        rank = _rank(_args(node)[0])
        dims = _args(node)[1] if len(_args(node)) > 1 else None
        dims = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
        gone = {d % rank for d in dims} if rank else set()
        keep = len(_args(node)) > 2 and _args(node)[2]
        experts = fact.experts
        if experts in gone:
            experts = None
        elif experts is not None and not keep:
            experts -= sum(d < experts for d in gone)
        left = set(range(rank)) - gone - {fact.experts}
        kind = _Kind.MASK if left and fact.kind is _Kind.MASK else total
        return replace(fact, kind=kind, experts=experts)

    return rule


_POSITIVE = {("gt", 0), ("ge", 1), ("ne", 0)}
_NEGATIVE = {("eq", 0), ("lt", 1), ("le", 0)}


_SYNONYMS = {
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
}


def _comparison(node: fx.Node) -> str:
    operator_: Any = node.target
    name: str = operator_._schema.name.removeprefix("aten::")
    return _SYNONYMS.get(name, name)


def _compared(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    name = _comparison(node)
    left, right = _args(node)[:2]
    fact = known[left]
    if isinstance(right, fx.Node):
        return _compared_tensors(name, node, known)
    if fact.kind in (_Kind.UNKNOWN, _Kind.PLAIN):
        return fact
    if fact.kind is _Kind.CHOICE:
        return _Fact(_Kind.MASK)
    positive = (name, right) in _POSITIVE or (
        fact.kind in (_Kind.BUSY, _Kind.MASK, _Kind.IDLE) and (name, right) == ("eq", 1)
    )
    if not positive and (name, right) not in _NEGATIVE:
        return _CHOICE
    if fact.kind is _Kind.MASK:
        return fact if positive else _CHOICE
    busy = positive != (fact.kind is _Kind.IDLE)
    return replace(fact, kind=_Kind.BUSY if busy else _Kind.IDLE)


def _compared_tensors(name: str, node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    left, right = _args(node)[:2]
    kinds = {known[left].kind, known[right].kind}
    if _Kind.UNKNOWN in kinds:
        return _UNKNOWN
    if kinds == {_Kind.PLAIN}:
        return _PLAIN
    if _Kind.POSITION in kinds and kinds <= set(_AMOUNTS):  # an expert's first and last row
        return _Fact(_Kind.BUSY if name in ("ne", "lt", "gt") else _Kind.IDLE)
    if kinds <= {_Kind.CHOICE, _Kind.PLAIN}:
        choice, others = (left, right) if known[left].kind is _Kind.CHOICE else (right, left)
        return _Fact(_Kind.MASK, _only_dim_of(others, choice, _rank(node)))
    return _CHOICE


def _only_dim_of(others: fx.Node, choice: fx.Node, rank: int) -> int | None:
    """The dimension over which ``others`` (all the experts) varies and ``choice`` does not."""
    shapes = [(1,) * (rank - _rank(n)) + tuple(roles.tensor(n).shape) for n in (others, choice)]
    dims = [d for d, (a, b) in enumerate(zip(*shapes, strict=True)) if a != 1 and b == 1]
    return dims[0] if len(dims) == 1 else None


def _one_hot(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    fact = known[_args(node)[0]]
    if fact.kind is not _Kind.CHOICE:
        return fact
    return replace(fact, kind=_Kind.MASK, experts=_rank(node) - 1)


def _scattered(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    """Marks or counts put where the choices point."""
    kinds = {known[n].kind for n in node.all_input_nodes}
    if kinds != {_Kind.PLAIN, _Kind.CHOICE} or known[_args(node)[0]].kind is not _Kind.PLAIN:
        return _UNKNOWN if _Kind.UNKNOWN in kinds else _PLAIN if kinds == {_Kind.PLAIN} else _CHOICE
    rank = _rank(node)
    if rank == 1:
        return _Fact(_Kind.COUNT, 0)
    dim = _args(node)[1]
    return _Fact(_Kind.MASK, dim % rank) if isinstance(dim, int) else _CHOICE


def _counted(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    fact = known[_args(node)[0]]
    return _Fact(_Kind.COUNT, 0) if fact.kind is _Kind.CHOICE else fact


def _accumulated(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    fact = known[_args(node)[0]]
    return replace(fact, kind=_Kind.POSITION) if fact.kind is _Kind.COUNT else _CHOICE


def _summed(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    facts = [known[n] for n in node.all_input_nodes]
    kinds = {f.kind for f in facts}
    if _Kind.UNKNOWN in kinds:
        return _UNKNOWN
    if kinds & set(_AMOUNTS) and kinds <= {*_AMOUNTS, _Kind.PLAIN}:
        return replace(facts[0], kind=_Kind.POSITION)
    return _PLAIN if kinds == {_Kind.PLAIN} else _CHOICE


def _difference(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    facts = [known[n] for n in node.all_input_nodes]
    if all(f.kind in _AMOUNTS for f in facts):
        return replace(facts[0], kind=_Kind.COUNT)
    return _UNKNOWN if _UNKNOWN in facts else _CHOICE


def _conjunction(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    facts = [known[n] for n in node.all_input_nodes]
    if _Kind.UNKNOWN in {f.kind for f in facts}:
        return _UNKNOWN
    masks = [f for f in facts if f.kind is _Kind.MASK]
    return masks[0] if masks else facts[0] if len({f.kind for f in facts}) == 1 else _CHOICE


def _negated(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    fact = known[_args(node)[0]]
    swapped = {_Kind.BUSY: _Kind.IDLE, _Kind.IDLE: _Kind.BUSY, _Kind.MASK: _Kind.CHOICE}
    return replace(fact, kind=swapped.get(fact.kind, fact.kind))


def _looked_up(node: fx.Node, known: Mapping[fx.Node, _Fact]) -> _Fact:
    """An integer table of the model, read at the batch's integers, chooses experts too."""
    kinds = {known[n].kind for n in node.all_input_nodes}
    if _Kind.UNKNOWN in kinds:
        return _UNKNOWN
    table = _args(node)[0]
    if table.op == "placeholder" or kinds != {_Kind.PLAIN}:
        return _CHOICE
    return _PLAIN


def _overloads(rules: Mapping[str, _FactRule]) -> dict[Any, _FactRule]:
    found: dict[Any, _FactRule] = {}
    for names, rule in rules.items():
        for name in names.split():
            packet = getattr(aten, name, None)
            if packet is not None:
                found |= {getattr(packet, overload): rule for overload in packet.overloads()}
    return found


_SELECTIONS = _overloads({"topk sort max min kthvalue mode": _selection})
_FACT_RULES: dict[Any, _FactRule] = {
    **_SELECTIONS,
    **_overloads(
        {
            "argmax argmin argsort multinomial": _selection,
            "_to_copy to clone detach alias contiguous lift_fresh lift_fresh_copy slice expand "
            "item _local_scalar_dense": _same,
            "permute": _moved(_permuted),
            "transpose": _moved(_transposed),
            "unsqueeze": _moved(_unsqueezed),
            "select unbind": _moved(_without),
            "view reshape flatten squeeze _unsafe_view": _moved(_viewed),
            "sum count_nonzero": _reduced(_Kind.COUNT),
            "any": _reduced(_Kind.BUSY),
            "eq ne lt le gt ge greater greater_equal less less_equal not_equal": _compared,
            "one_hot": _one_hot,
            "scatter scatter_add index_add index_put": _scattered,
            "bincount histc": _counted,
            "cumsum": _accumulated,
            "add": _summed,
            "sub diff": _difference,
            "mul bitwise_and bitwise_or logical_and logical_or": _conjunction,
            "bitwise_not logical_not": _negated,
            "index gather index_select": _looked_up,
        }
    ),
    operator.getitem: _element,
    operator.add: _summed,
    operator.sub: _difference,
}


class _GenericShapes(ShapeEnv):
    """Answers questions about how many tokens an expert has as if it had some.

    Any number of tokens must give the same answer: whether there are none is answered, whether
    there are more than ten is not. Questions that torch's own operators ask are answered for two
    tokens or more, and numbers of tokens that differ.
    """

    facts: _Facts

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
        kinds = [self.facts.symbols.get(s, _Kind.UNKNOWN) for s in symbols]
        routed = all(k in _AMOUNTS for k in kinds)
        sized = all(
            k in _AMOUNTS or s in self.size_like for s, k in zip(symbols, kinds, strict=True)
        )
        asked_by_torch = _asked_by_torch()
        if not (routed or (asked_by_torch and sized)):
            return None
        answers = set()
        for scale in (2, 1009, 1_000_003) if asked_by_torch else (1, 2, 1009):
            alike = [scale * (i + 1) if k is _Kind.POSITION else scale for i, k in enumerate(kinds)]
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
            return file.startswith(_LIBRARIES)
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
    recorder: _Recorder,
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


def _item(recorder: _Recorder, tensor: Tensor) -> Any:
    """``if mask.any()``: generically every expert has tokens. Their number may size a slice."""
    kind = recorder.fact(tensor).kind
    if kind in (_Kind.BUSY, _Kind.IDLE) and tensor.dim() == 0:
        return kind is _Kind.BUSY
    if kind not in _AMOUNTS:
        return NotImplemented
    number = tensor.item()
    if isinstance(number, torch.SymInt):
        _constrain_range_for_size(number)
    return number


def _sliced(recorder: _Recorder, tensor: Tensor, index: Any) -> Any:
    numbers = _numbers(recorder, index)
    return NotImplemented if numbers is index else tensor[numbers]


def _slice_written(recorder: _Recorder, tensor: Tensor, index: Any, values: Any) -> Any:
    numbers = _numbers(recorder, index)
    if numbers is index:
        return NotImplemented
    tensor[numbers] = values
    return None


def _numbers(recorder: _Recorder, index: Any) -> Any:
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


def _number(recorder: _Recorder, tensor: Tensor) -> Any:
    number = _item(recorder, tensor)
    return tensor.item() if number is NotImplemented else number


def _nonzero(recorder: _Recorder, mask: Tensor, *, as_tuple: bool = False, **rest: Any) -> Any:
    """The experts that have tokens: generically, all that can be chosen."""
    fact = recorder.fact(mask)
    if rest or mask.dim() != 1 or (fact.kind, fact.experts) != (_Kind.BUSY, 0):
        return NotImplemented
    number = min(mask.shape[0], fact.among or mask.shape[0])
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        experts = torch.arange(number)
        return (experts.as_subclass(_Known),) if as_tuple else experts[:, None].as_subclass(_Known)


def _where(recorder: _Recorder, mask: Tensor, *values: Any, **named: Any) -> Any:
    return NotImplemented if values or named else _nonzero(recorder, mask, as_tuple=True)


def _integer(recorder: _Recorder, tensor: Tensor) -> Any:
    raise _Refusal(
        "int() and range() take numbers that are known, not traced tensors",
        "Leave int() out: a number from x.item() or x.tolist() can slice and split tensors.",
    )


def _length(recorder: _Recorder, tensor: Tensor) -> Any:
    if tensor.dim() and isinstance(tensor.shape[0], torch.SymInt):
        raise _Refusal("len() cannot depend on the data", "Write x.shape[0] instead of len(x).")
    return NotImplemented


def _data(recorder: _Recorder, tensor: Tensor) -> Tensor:
    """Before dispatch, ``x.data`` is not seen to cut gradients."""
    return tensor.detach()


def _requires_grad(recorder: _Recorder, tensor: Tensor) -> Any:
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
    recorder: _Recorder, function: Any, apply: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Run the function on fake tensors, unseen by the trace, and record the call as one node."""
    if function is torch.utils.checkpoint.CheckpointFunction:  # (run, preserve_rng_state, *args)
        return args[0](*args[2:])  # what to recompute is decided later, by a pass
    tracer = recorder.tracer
    plain = pytree.tree_map_only(FunctionalTensor, _plain, args)
    fake_mode = next(t for t in pytree.tree_leaves(plain) if isinstance(t, FakeTensor)).fake_mode
    with _disable_current_modes(), torch._C.DisableTorchFunction(), fake_mode, torch.no_grad():
        results = apply(function, *plain)
    given = {id(t) for t in pytree.tree_leaves(plain) if isinstance(t, Tensor)}
    if any(id(r) in given for r in pytree.tree_leaves(results) if isinstance(r, Tensor)):
        raise _Refusal(
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


def _causal_attention(recorder: _Recorder) -> AbstractContextManager[None]:
    """transformers looks into ``position_ids`` for packed sequences, and makes a mask where it
    cannot look. Those it makes itself have none, so attention stays causal without a mask."""
    masks = sys.modules.get("transformers.masking_utils")
    if recorder.packed or not hasattr(masks, "find_packed_sequence_indices"):
        return nullcontext()
    return _replaced(masks, "find_packed_sequence_indices", lambda *args, **kwargs: None)


def _fake_to_transformers(recorder: _Recorder) -> AbstractContextManager[None]:
    """transformers looks into masks unless they are fake; functional tensors are fake too."""
    utils = sys.modules.get("transformers.utils.import_utils")
    original = getattr(utils, "is_fake_tensor", None)
    if original is None:
        return nullcontext()
    is_fake = lambda x: isinstance(x, FunctionalTensor) or original(x)  # noqa: E731
    return _replaced(utils, "is_fake_tensor", is_fake)


@contextmanager
def _bincount_size(recorder: _Recorder) -> Iterator[None]:
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
def _custom_functions(recorder: _Recorder) -> Iterator[None]:
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


_RECORDING: list[tuple[_Recorder, Callable[..., Any], int]] = []


def _exchangeable_apply() -> Any:
    class Exchanged:  # gives the function a closure over __class__, as the original has
        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            _ = __class__  # type: ignore[name-defined]
            from moptrace.trace import apply_custom_function

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


# Errors


class _Refusal(Exception):
    """Something that cannot be traced: the reason, and what to change."""

    def __init__(self, reason: str, change: str) -> None:
        super().__init__(reason)
        self.reason, self.change = reason, change


_DATA_DEPENDENT = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)


def _explained(model: nn.Module, error: Exception) -> TraceError:
    """The error as the user should see it: their line, the reason, and what to change."""
    if isinstance(error, _Refusal):
        reason, change = error.reason, error.change
    elif isinstance(error, _DATA_DEPENDENT):
        reason = "Python needs a value that depends on the data, so other data could go another way"
        change = (
            "Compute both outcomes and choose with torch.where, or multiply by a mask. Only "
            "whether an expert has tokens may be asked: idx.numel() == 0, mask.any(), "
            "counts.tolist() with torch.bincount(experts, minlength=num_experts)."
        )
    elif isinstance(error, UnsupportedOperatorException):
        reason = f"the operator {error.func} has no fake implementation"
        change = "Register one with torch.library.register_fake."
    else:
        first_line = str(error).strip().partition("\n")[0]
        reason = f"forward raised {type(error).__name__}: {first_line}"
        change = "Check that the model runs eagerly on this batch."
    return TraceError(f"cannot trace {type(model).__name__}{_user_line(error)}: {reason}. {change}")


def _user_line(error: Exception) -> str:
    """``at file:line (code)``, the innermost line of the user's that raised the error."""
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(_LIBRARIES)
    ]
    if not lines:
        return ""
    file, line = lines[-1]
    return f" at {file}:{line} ({linecache.getline(file, line).strip()})"


# Cleaning the graph

_DROPPED = {
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_ALIASES = {aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}


_NEW = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}


def _cleaned(traced: fx.Graph, wanted: Sequence[str]) -> tuple[fx.Graph, list[str]]:
    """A graph of values only, and the names of its placeholders.

    Drops assertions, aliases, switches of the gradient mode and dead code. What was computed
    without gradients is detached where it is used with them.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    names: list[str] = []
    suspended: set[fx.Node] = set()  # nodes of the new graph computed without gradients
    detached: dict[fx.Node, fx.Node] = {}
    enabled = True

    def use(old: fx.Node) -> fx.Node:
        node = copies[old]
        if not enabled or node not in suspended:
            return node
        if node not in detached:
            detached[node] = _like(graph.call_function(aten.detach.default, (node,)), node)
        return detached[node]

    for old in traced.nodes:
        if old.target is torch._C._set_grad_enabled:
            enabled = _args(old)[0]
        elif old.target is torch.amp.autocast_mode._enter_autocast and _args(old)[2]:
            raise TraceError(
                f"forward turns on autocast: {roles.where(old)}. Convert the model instead, for "
                f"example with model.bfloat16()."
            )
        elif old.target in _ALIASES or _detaches_constant(old, copies):
            copies[old] = copies[_args(old)[0]]
        elif old.op == "placeholder":
            copies[old] = _like(graph.placeholder(_identifier(wanted[len(names)])), old)
            names.append(copies[old].name)
            copies[old].target = names[-1]  # fx keeps names apart, and generates code from targets
        elif old.op == "output":
            graph.output(tuple(use(x) for x in _args(old)[0]))
        elif old.target is aten.copy.default:
            copies[old] = _copied(graph, old, use(_args(old)[1]))
        elif old.target not in _DROPPED:
            args, kwargs = fx.map_arg((_args(old), old.kwargs), use)
            target: Any = old.target
            if target in _NEW:  # of the tensor it asks for, only the type matters: say that instead
                target, (_, *args) = _NEW[target], args
                result = roles.tensor(old)
                kwargs = {"dtype": result.dtype, "device": result.device}
            new = graph.create_node(old.op, target, tuple(args), kwargs, old.name)
            copies[old] = _like(new, old)
            if not enabled and _is_differentiable(new):
                suspended.add(new)
    erase_dead(graph)
    roles.sign(graph, "")
    return graph, names


def _like(new: fx.Node, old: fx.Node) -> fx.Node:
    roles.set_value(new, roles.value(old))
    roles.copy_role(new, of=old)
    return new


def _copied(graph: fx.Graph, old: fx.Node, source: fx.Node) -> fx.Node:
    """What ``old``, a functionalised ``destination.copy_(source)``, computes.

    The operator ``aten.copy`` itself has no derivative.
    """
    result, given = roles.tensor(old), roles.tensor(source)
    new = source
    if result.dtype != given.dtype:
        new = graph.call_function(aten._to_copy.default, (new,), {"dtype": result.dtype})
        _like(new, old)
        roles.set_value(new, given.to(result.dtype))
    if result.shape != given.shape:
        new = graph.call_function(aten.expand.default, (new, list(result.shape)))
        _like(new, old)
    return new


def _detaches_constant(node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> bool:
    if node.target is not aten.detach.default:
        return False
    source = copies[_args(node)[0]]
    return source.op == "get_attr" or not _is_differentiable(source)


def _is_differentiable(node: fx.Node) -> bool:
    value = roles.value(node)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name if name[:1].isalpha() else f"input_{name}")
