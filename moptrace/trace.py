"""Capture a model and its loss as one functional graph: the captured level.

The model runs once under fake CPU tensors, inside two modes of torch: ``make_fx`` before dispatch,
which records whole operators (``linear``, ``scaled_dot_product_attention``), and functionalisation,
which turns in-place writes into values. A third mode, ``Recorder`` (``recorder.py``), notes where
each node comes from and answers what fake tensors cannot.
"""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import (
    get_proxy_mode,
    make_fx,
)
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
)
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.cleaning import cleaned
from moptrace.core import Buffer, Input, Level, Output, Parameter, Program, Signature
from moptrace.errors import TraceError
from moptrace.fake import fake_mode
from moptrace.recorder import LIBRARIES, CustomFunction, GenericShapes, Recorder, Refusal, unwrapped
from moptrace.routing_facts import Facts

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
    shapes = GenericShapes()
    mode = fake_mode(shapes)
    fakes = [_fake(x, mode) for x in (*(s.tensor for s in slots), *(x for _, x in inputs))]
    results: _Results | None = None

    def forward(*flat: Tensor) -> list[Tensor]:
        nonlocal results
        tracer = _tracer()
        shapes.facts = Facts(tracer.graph, (t.requires_grad for t in fakes))
        recorder = Recorder(model, tracer, shapes.facts, call.packed(args, kwargs))
        with FunctionalTensorMode(pre_dispatch=True, export=True):
            wrapped = [FunctionalTensor.to_functional(t) for t in flat]
            for slot, tensor in zip(slots, wrapped, strict=False):
                slot.put(tensor)
            rest = iter(wrapped[len(slots) :])
            values = [next(rest) if isinstance(x, Tensor) else x for _, x in leaves]
            with recorder.recording():
                loss, output = call(*pytree.tree_unflatten(values, spec))
            results = _Results.of(loss, output)
            now = [unwrapped(slot.get()) for slot in slots]
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
    graph, names = cleaned(traced.graph, wanted)
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
                tensors.append(unwrapped(leaf))
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


# Errors


_DATA_DEPENDENT = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)


def _explained(model: nn.Module, error: Exception) -> TraceError:
    """The error as the user should see it: their line, the reason, and what to change."""
    if isinstance(error, Refusal):
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
        if not frame.f_code.co_filename.startswith(LIBRARIES)
    ]
    if not lines:
        return ""
    file, line = lines[-1]
    return f" at {file}:{line} ({linecache.getline(file, line).strip()})"
