"""The module that ``parallelize`` returns: an ``nn.Module`` with ``DTensor`` parameters."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as ReplicateDim
from torch.distributed.tensor import Shard as ShardDim
from torch.utils import _pytree as pytree

from moptrace import roles, state
from moptrace.collectives import COLLECTIVES, Communicator
from moptrace.core import Parameter, Program, chain
from moptrace.errors import MoptraceError, StepError
from moptrace.passes.default import canonical, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.pipeline import pipeline
from moptrace.passes.recompute import recompute
from moptrace.passes.shard_parameters import (
    BATCH_DIM,
    batch_parts,
    batch_sizes,
    expert_counts,
    is_split,
)
from moptrace.passes.take_stage import take_stage
from moptrace.placement import Layout, Placement, Shard, View
from moptrace.plan import Plan
from moptrace.precision import convert
from moptrace.stages import DOWN, STAGES, UP
from moptrace.trace import rebuild, trace

if TYPE_CHECKING:
    from moptrace.explain import Explanation

__all__ = ["ManyShapesWarning", "ParallelModule", "part_of_batch"]

log = logging.getLogger("moptrace")
MANY_SHAPES = 8
EVERYONE = "everyone"  # the group of all ranks


class ManyShapesWarning(UserWarning):
    """Many input shapes are being traced."""


class ParallelModule(nn.Module):
    """A model of which every rank computes its part; made by ``moptrace.parallelize``.

    Feed each rank its own sequences (``local_batch``), all ranks the same number and length of
    them. Every rank returns what the model returned, for its own sequences; the loss is that of
    the global batch, and gradients are those of that loss. Parameters keep their names and are
    ``DTensor``; the experts of a loop are stacked into one parameter whose name says ``stacked``.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        plan: Plan,
        batch: Mapping[str, Any],
        loss_fn: Callable[..., Any] | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        skeleton = convert(_skeleton(model), plan.mixed_precision)
        self._skeleton = [skeleton]  # in a list, so that its parameters stay its own
        self._argument_names = _argument_names(model)
        self._loss_fn = loss_fn
        self._programs: dict[Any, Program] = {}
        self._of_stages: dict[tuple[Program, bool], Program] = {}  # with a backward, or without
        self._runs: dict[Program, fx.GraphModule] = {}
        self.mesh = mesh
        self.train(model.training)
        ranks: list[int] = mesh.mesh.flatten().tolist()
        self._world = len(ranks)
        of_sequence = plan.cp * plan.tp
        self._batch_parts = (self._world // (plan.pp * of_sequence) or 1, of_sequence)
        batch = part_of_batch(batch, 0, plan.divisions)
        self._canonical = canonical()(self._capture(batch))
        self.plan = plan.resolve(self._world, expert_counts(self._canonical))
        self.layout = self.plan.layout(self._world)
        self.storage_mesh = _storage_mesh(mesh, self.layout, self.plan.pp)
        self._communicator = _connect(self.storage_mesh, self.layout, ranks)
        self._communicator.seed = self._agreed_seed(seed)
        self._stored: dict[str, Placement] = {}
        named = model.named_parameters(remove_duplicate=False)
        self._masters = {name: parameter.dtype for name, parameter in named}
        self._program = self._sharded(self._canonical)
        assert self._program.layout is not None
        self.layout = self._program.layout
        self.plan = replace(self.plan, pp_layers=self.layout.layers or None)
        self._parameters_of_all = self._program.signature.parameters
        self._stored = _stored(self._program)
        self._programs[self.traced_for(batch)] = self._program
        self._register(model)
        self.unfinished: Callable[[], None] | None = None  # updates that a step left
        self.register_state_dict_pre_hook(lambda *_: self.flush())
        self.register_load_state_dict_pre_hook(lambda *_: self.flush())

    # --- parameters and buffers ---

    def _register(self, model: nn.Module) -> None:
        whole = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        _make_equal({**whole, **buffers}, self._everyone, self._device)
        for parameter in self.own_parameters:
            value = state.stack(parameter, whole).detach()
            self._attach(parameter, self._shard(value, parameter))
        for buffer in self._program.signature.buffers:
            if buffer.added:
                value = torch.zeros(buffer.shape, dtype=buffer.dtype)
            else:
                value = buffers[buffer.fqn].detach()
            device = value.device if value.is_meta else self._device
            value = value.to(device, copy=True)
            for name in (buffer.fqn, *buffer.aliases):
                state.attach(self, name, value, buffer.persistent)

    def _attach(self, parameter: Parameter, value: DTensor) -> None:
        held = nn.Parameter(value, parameter.requires_grad)
        for name in (parameter.fqn, *parameter.aliases):
            state.attach(self, name, held, persistent=True)

    def _shard(self, whole: Tensor, parameter: Parameter) -> DTensor:
        """This rank's part of a whole tensor, as a ``DTensor``; nothing is sent."""
        placement = self._stored[parameter.name]
        part = state.own_part(whole, placement, self._communicator.rank)
        device = part.device if part.is_meta else self._device
        return DTensor.from_local(
            part.to(device, copy=True, memory_format=torch.contiguous_format),
            self.storage_mesh,
            [ShardDim(k.dim) if isinstance(k, Shard) else ReplicateDim() for k in placement.kinds],
            run_check=False,
            shape=whole.shape,
            stride=torch.empty(whole.shape, device="meta").stride(),
        )

    @property
    def own_parameters(self) -> list[Parameter]:
        """The parameters of this rank's stage."""
        return [p for p in self._parameters_of_all if p.stage == self.stage]

    @property
    def _group(self) -> Any:
        """The ranks of this one's stage."""
        return self._communicator.groups[self.layout.home.axes[0].name]

    @property
    def _everyone(self) -> Any:
        """The ranks of all stages."""
        return self._communicator.groups[EVERYONE]

    @property
    def _device(self) -> torch.device:
        kind = self.mesh.device_type
        return (
            torch.device(kind, torch.cuda.current_device())
            if kind == "cuda"
            else torch.device(kind)
        )

    # --- running ---

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run this rank's part of the global batch; returns what the model returned."""
        self.flush()
        batch = self.named(args, kwargs)
        if self.plan.pp > 1:
            return self._run_stage(batch)
        leaves = pytree.tree_leaves(batch)
        program = self.local_program(batch)
        if program not in self._runs:
            self._runs[program] = program.module(self._device)
        run, signature = self._runs[program], program.signature
        parameters = [self.get_parameter(p.fqn) for p in signature.parameters]
        buffers = [self.get_buffer(b.fqn) for b in signature.buffers]
        tensors = [x.to(self._device) for x in leaves if isinstance(x, Tensor)]
        with self._communicator:
            outputs = run(*_local_parts(parameters), *buffers, *tensors)
            self._communicator.step += 1
        self._update_buffers(program, outputs)
        self._program = program
        return rebuild(signature, outputs)

    @torch.no_grad()
    def _update_buffers(self, program: Program, outputs: Sequence[Tensor]) -> None:
        for output, value in zip(program.signature.outputs, outputs, strict=True):
            if output.buffer is not None:
                self.get_buffer(output.buffer).copy_(value)

    def _run_stage(self, batch: Mapping[str, Any]) -> Any:
        """Run this rank's stage on all micro-batches; returns what the model does, with the loss.

        Stages take turns with forward and backward, so gradients are there when the loss is.
        """
        count = self.plan.divisions
        parts = [part_of_batch(batch, number, count) for number in range(count)]
        local = self.local_program(parts[0])
        program = self._of_stage(local, torch.is_grad_enabled())
        if program not in self._runs:
            self._runs[program] = program.module(self._device)
        buffers = [self.get_buffer(b.fqn) for b in program.signature.buffers]
        inputs = [x.to(self._device) for x in pytree.tree_leaves(parts) if isinstance(x, Tensor)]

        def run(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
            with self._communicator:
                outputs: Sequence[Tensor] = self._runs[program](*parameters, *buffers, *inputs)
                self._communicator.settle()
                self._communicator.step += 1
            self._update_buffers(program, outputs)
            return outputs

        names = [output.gradient for output in program.signature.outputs]
        held = [p.fqn for p in program.signature.parameters]
        place = [names.index(name) if name in names else None for name in held]
        parameters = [self.get_parameter(name) for name in held]
        # A stage whose parameters are all frozen has a loss to call backward on, as the others do.
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        loss = _Pipelined.apply(run, place, anchor, *parameters)
        self._program = local
        outputs: list[Any] = [None] * len(local.signature.outputs)
        outputs[local.signature.loss] = loss
        return rebuild(local.signature, outputs)

    def _of_stage(self, local: Program, backward: bool) -> Program:
        """What this rank's stage runs of all micro-batches, with gradients or without."""
        key = (local, backward)
        if key not in self._of_stages:
            trained = None if backward else ()
            divided = differentiate(
                trained, self.plan.divisions, rank=self.rank, device=self._device
            )
            steps = chain(divided, recompute(), pipeline(), take_stage(self.stage))
            self._of_stages[key] = steps(local)
        return self._of_stages[key]

    def flush(self) -> None:
        """Run the updates that a training step left for its next call; nothing if there are none.

        The model's and the optimizer's own methods call it before they read or change anything.
        """
        if self.unfinished is not None:
            self.unfinished()

    def local_program(self, batch: Mapping[str, Any]) -> Program:
        """The program that a rank runs on a batch of this shape; traced if the shape is new."""
        key = self.traced_for(batch)
        self._check_batches(key)
        if key not in self._programs:
            self._build(key, batch)
        return self._programs[key]

    def traced_for(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a program is traced for: batches of which this is equal run the same one."""
        return _key(self.training, batch)

    @property
    def communicator(self) -> Communicator:
        """The process groups of this rank."""
        return self._communicator

    @property
    def rank(self) -> int:
        """This rank's number on the mesh; with pipeline stages, among those of its stage."""
        return self._communicator.rank

    @property
    def stage(self) -> int:
        """The pipeline stage of this rank."""
        return self._communicator.stage

    def of_all_stages(self, names: Iterable[str]) -> set[str]:
        """The names that the ranks of all stages give. Collective."""
        own = list(names)
        every: list[Any] = [own] * self.plan.pp
        if self.plan.pp > 1:
            dist.all_gather_object(every, own, group=self._communicator.groups[STAGES])
        return {name for found in every for name in found}

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients down to a global 2-norm of ``max_norm``; returns what it was.

        As ``torch.nn.utils.clip_grad_norm_``, which sees the parameters of this rank's pipeline
        stage alone: where there are several (``Plan(pp=)``), use this one. Collective.
        """
        own = [p for p in self.parameters() if p.grad is not None]
        gradients = [p.grad for p in own if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.plan.pp > 1:
            squares = norm.to(self._device).square()
            dist.all_reduce(squares, group=self._communicator.groups[STAGES])
            norm = squares.sqrt()
        torch.nn.utils.clip_grads_with_norm_(own, max_norm, norm)
        return norm

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._device

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, so that a call is the same however it is written."""
        if len(args) > len(self._argument_names):
            raise TypeError(f"forward takes {self._argument_names}, got {len(args)} values")
        return {**dict(zip(self._argument_names, args, strict=False)), **kwargs}

    def differences(self, key: Any, of_all_stages: bool = False) -> list[Any]:
        """What each rank of a stage gives for ``key``; nothing if that is the same. Collective."""
        group = self._everyone if of_all_stages else self._group
        digest = hashlib.blake2b(repr(key).encode(), digest_size=6).digest()
        mine = int.from_bytes(digest, "big")
        extremes = torch.tensor([mine, -mine], device=self._device)
        every: list[Any] = [None] * dist.get_world_size(group)
        if len(every) > 1:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        if extremes[0] == -extremes[1]:
            return []
        dist.all_gather_object(every, key, group=group)
        return every

    def _check_batches(self, key: Any) -> None:
        """Every rank must feed the same shapes, else collectives would wait for ever."""
        if not (every := self.differences(key, of_all_stages=True)):
            return
        shown = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(every))
        raise MoptraceError(
            "the ranks were fed batches of different shapes, so they would run different "
            f"programs:\n{shown}\nGive every rank the same number of sequences of the same "
            "length: pad the last batch and ignore the padding with label -100."
        )

    def _build(self, key: Any, batch: Mapping[str, Any]) -> None:
        started = time.monotonic()
        self._programs[key] = self._sharded(canonical()(self._capture(batch)))
        log.info("traced a new input shape in %.1f s: %s", time.monotonic() - started, key)
        if len(self._programs) == MANY_SHAPES:
            warnings.warn(
                f"{MANY_SHAPES} input shapes were traced, and every further one costs a trace. "
                "Pad the sequences to a few lengths, or sort them into buckets by length.",
                ManyShapesWarning,
                stacklevel=5,
            )

    def _sharded(self, program: Program) -> Program:
        """The local program; a model that is not being trained keeps its logits."""
        keep = not self.training
        return sharded(self.plan, self._world, keep, self._stored, self._masters)(program)

    def _capture(self, batch: Mapping[str, Any]) -> Program:
        """Capture the model on the global batch of which ``batch`` is one rank's part."""
        model = self._skeleton[0]
        model.train(self.training)
        return trace(model, _global(batch, self._batch_parts), loss_fn=self._loss_fn)

    # --- looking at it ---

    @property
    def program(self) -> Program:
        """The local program that ran last; before the first call, that of the example batch."""
        return self._program

    def explain(self) -> Explanation:
        """Component by component: its parallelism, memory and bytes moved."""
        from moptrace.explain import explain

        return explain(self.program, self.stage, self.plan)

    def extra_repr(self) -> str:
        return f"{self.layout}, {self.plan}"

    # --- batches and whole tensors ---

    def local_batch(self, batch: Any) -> Any:
        """This rank's part of a global batch: its share of the sequences, and of their tokens.

        Raises MoptraceError where the ranks cannot share them evenly.
        """
        leaves = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
        sizes = batch_sizes([tuple(x.shape) for x in leaves])
        parts = batch_parts(self.layout)
        for count, size, what in zip(parts, sizes, ("sequences", "tokens"), strict=True):
            if size is not None and size % count:
                padded = -(-size // count) * count
                raise MoptraceError(
                    f"a batch of {size} {what} cannot be shared by {count} ranks; pad it to "
                    f"{padded} {what} and ignore the padding with label -100"
                )

        def own(x: Any) -> Any:
            if isinstance(x, Tensor):
                split = [is_split(x.shape, dim, sizes) for dim in (0, 1)]
                for axis in self.layout.tokens.axes:
                    if split[dim := BATCH_DIM[axis.name]]:
                        x = x.chunk(axis.size, dim)[self._communicator.coordinate(axis.name)]
            return x

        return pytree.tree_map(own, batch)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and persistent buffer, whole, under the user's own names.

        Stacked experts are unstacked. Collective: every rank calls it and gets all of it.
        """
        self.flush()
        whole = self._whole(lambda parameter: parameter)
        for buffer in self._canonical.signature.buffers:
            if buffer.persistent:
                for name in (buffer.fqn, *buffer.aliases):
                    whole[name] = self.get_buffer(buffer.fqn).clone()
        return whole

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Every parameter's gradient, whole, under the user's names; None where there is none.

        An expert that no token chose has a gradient of zeros. Collective.
        """
        return self._whole(lambda parameter: parameter.grad)

    def _whole(self, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for parameter in self._parameters_of_all:
            whole = None
            if parameter.stage == self.stage:
                held = of(self.get_parameter(parameter.fqn))
                whole = None if held is None else self._gather(held.detach(), parameter)
            found.update(state.unstack(parameter, self._shared(whole, parameter)))
        return found

    def _shared(self, whole: Tensor | None, parameter: Parameter) -> Tensor | None:
        """What the ranks of a parameter's stage have of it, on those of all stages."""
        if self.plan.pp == 1:
            return whole
        group = self._communicator.groups[STAGES]
        known: list[Any] = [None if whole is None else whole.dtype]
        dist.broadcast_object_list(known, group=group, group_src=parameter.stage)
        if known[0] is None:
            return None
        if whole is None:
            whole = torch.empty(parameter.shape, dtype=known[0], device=self._device)
        dist.broadcast(whole, group=group, group_src=parameter.stage)
        return whole

    def _gather(self, held: Tensor, parameter: Parameter) -> Tensor:
        """The whole tensor of which every rank holds a part."""
        assert isinstance(held, DTensor)
        stored = self._stored[parameter.name]
        said = (stored.expressed_in(view) for view in self.layout.views)
        placement = min((p for p in said if p is not None), key=_splits)  # each dimension once
        whole = held.to_local()
        with self._communicator:
            for axis, kind in zip(placement.view.axes, placement.kinds, strict=True):
                if isinstance(kind, Shard) and axis.size > 1:
                    length = parameter.shape[kind.dim]
                    whole = COLLECTIVES["all_gather"].op(whole, axis.name, kind.dim, length)
        return whole

    @torch.no_grad()
    def load_full_state_dict(self, whole: Mapping[str, Tensor]) -> None:
        """Take whole tensors under the user's own names; every rank keeps its part.

        Raises KeyError for missing names and ValueError for unknown ones or other shapes, before
        anything is changed.
        """
        self.flush()
        signature = self._canonical.signature
        persistent = [b for b in signature.buffers if b.persistent]
        needed = [n for p in signature.parameters for n in state.user_names(p)]
        needed += [b.fqn for b in persistent]
        aliases = {a for x in (*signature.parameters, *persistent) for a in x.aliases}
        if missing := [name for name in needed if name not in whole]:
            raise KeyError(f"the state has no {', '.join(missing)}")
        if unknown := [name for name in whole if name not in {*needed, *aliases}]:
            raise ValueError(f"the model has no {', '.join(unknown)}")
        values = {p.name: state.stack(p, whole) for p in signature.parameters}
        for parameter in self.own_parameters:
            value = values[parameter.name]
            held = self.get_parameter(parameter.fqn)
            part = self._shard(value.to(held.dtype), parameter)
            if held.is_meta:
                self._attach(parameter, part)
            else:
                held.copy_(part)
        for buffer in persistent:
            self.get_buffer(buffer.fqn).copy_(whole[buffer.fqn])

    def _agreed_seed(self, seed: int | None) -> int:
        """The first rank's seed, so that replicas of a value draw alike."""
        mine = torch.initial_seed() if seed is None else seed
        agreed = torch.tensor([mine & (2**62 - 1)], device=self._device)
        dist.broadcast(agreed, group=self._everyone, group_src=0)
        return int(agreed)


class _LocalParts(torch.autograd.Function):
    """The local parts of all parameters at once; gradients become ``DTensor`` like the parameters.

    ``DTensor.to_local`` does the same one by one, at many times the cost for small parameters.
    """

    @staticmethod
    def forward(ctx: Any, *parameters: DTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.specs = [(p.device_mesh, p.placements, p.shape, p.stride()) for p in parameters]
        return tuple(p._local_tensor.detach() for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[DTensor | None, ...]:
        return tuple(
            None if gradient is None else _sharded(gradient, *spec)
            for gradient, spec in zip(gradients, ctx.specs, strict=True)
        )


class _Pipelined(torch.autograd.Function):
    """The loss of all stages and micro-batches, whose gradients come with it.

    ``place`` says which of the results is the gradient of each parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        place: Sequence[int | None],
        anchor: Tensor,
        *parameters: DTensor,
    ) -> Tensor:
        outputs = run([p._local_tensor for p in parameters])
        ctx.place, ctx.outputs = place, outputs
        ctx.specs = [(p.device_mesh, p.placements, p.shape, p.stride()) for p in parameters]
        return outputs[0].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (scale,) = gradients
        pairs = zip(ctx.place, ctx.specs, strict=True)
        scaled = (
            None if at is None else _sharded(ctx.outputs[at] * scale, *spec) for at, spec in pairs
        )
        return None, None, None, *scaled


def _sharded(part: Tensor, mesh: DeviceMesh, placements: Any, shape: Any, stride: Any) -> DTensor:
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
    )


def part_of_batch(batch: Mapping[str, Any], number: int, parts: int) -> dict[str, Any]:
    """One micro-batch of a batch whose sequences are divided among so many."""
    leaves = [x for x in pytree.tree_leaves(dict(batch)) if isinstance(x, Tensor)]
    sizes = batch_sizes([tuple(x.shape) for x in leaves])
    if sizes[0] is not None and sizes[0] % parts:
        raise StepError(
            f"a rank's batch of {sizes[0]} sequences cannot be divided into {parts} micro-batches; "
            f"give a multiple of {parts}, or say train_step(accumulate=) or Plan(micro_batches=)"
        )

    def own(x: Any) -> Any:
        if isinstance(x, Tensor) and is_split(x.shape, 0, sizes):
            return x.chunk(parts)[number]
        return x

    return pytree.tree_map(own, dict(batch))


def _local_parts(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _LocalParts.apply(*parameters) if parameters else ()


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers take no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _argument_names(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


def _key(training: bool, batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a program is traced for: shapes and dtypes of tensors, everything else by value."""
    leaves, spec = pytree.tree_flatten(dict(batch))
    shapes = (
        f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
        if isinstance(x, Tensor)
        else repr(x)
        for x in leaves
    )
    return ("train" if training else "eval", str(spec), *shapes)


def _global(batch: Mapping[str, Any], ranks: Sequence[int]) -> dict[str, Any]:
    """Fake tensors of the global shapes: of so many ranks' sequences, and tokens of each."""
    leaves = [x for x in pytree.tree_leaves(dict(batch)) if isinstance(x, Tensor)]
    sizes = batch_sizes([tuple(x.shape) for x in leaves])

    def grown(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = list(x.shape)
        for dim, count in enumerate(ranks):
            if is_split(x.shape, dim, sizes):
                shape[dim] *= count
        return torch.empty(shape, dtype=x.dtype, device="meta")

    return pytree.tree_map(grown, dict(batch))


def _splits(placement: Placement) -> int:
    """How many axes split a tensor so placed."""
    pairs = zip(placement.view.axes, placement.kinds, strict=True)
    return sum(isinstance(kind, Shard) and axis.size > 1 for axis, kind in pairs)


def _stored(program: Program) -> dict[str, Placement]:
    """How every parameter is held, in the view of storage."""
    assert program.layout is not None
    names = {parameter.name for parameter in program.signature.parameters}
    held: dict[str, Placement] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            placement = roles.placement(node)
            stored = placement.expressed_in(program.layout.storage) if placement else None
            assert stored is not None, f"%{node.name} cannot be stored as {placement}"
            held[node.name] = stored
    return held


def _storage_mesh(mesh: DeviceMesh, layout: Layout, stages: int) -> DeviceMesh:
    """The ranks of this one's stage, cut as storage is."""
    sizes = [axis.size for axis in layout.storage.axes]
    names = tuple(axis.name for axis in layout.storage.axes)
    if stages == 1:
        return DeviceMesh(mesh.device_type, mesh.mesh.reshape(sizes), mesh_dim_names=names)
    ranks = mesh.mesh.reshape([stages, *sizes])
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("pp", *names))[names]


def _connect(storage_mesh: DeviceMesh, layout: Layout, ranks: Sequence[int]) -> Communicator:
    """The process groups of every axis of every view; those of the storage mesh exist already.

    ``ranks`` are those of all pipeline stages.
    """
    stage, me = divmod(list(ranks).index(dist.get_rank()), layout.world_size)
    everyone = list(ranks) == list(range(dist.get_world_size()))
    first = stage * layout.world_size
    own_stage = list(ranks)[first : first + layout.world_size]
    made: dict[tuple[int, ...], Any] = {}
    for axis in layout.storage.axes:
        made[_members(layout.storage, axis.name, me)] = storage_mesh.get_group(axis.name)
    if everyone and own_stage == list(ranks):
        made[tuple(range(len(ranks)))] = dist.group.WORLD
    groups: dict[str, Any] = {}
    for view in layout.views:
        for axis in view.axes:
            members = _members(view, axis.name, me)
            if members not in made:
                own = [own_stage[i] for i in members]
                made[members] = dist.new_group(own, use_local_synchronization=True)
            groups[axis.name] = made[members]
    groups[EVERYONE] = groups[layout.home.axes[0].name]
    if own_stage != list(ranks):
        whole = dist.group.WORLD if everyone else None
        groups[EVERYONE] = whole or dist.new_group(list(ranks), use_local_synchronization=True)
        beside = list(ranks)[me :: layout.world_size]
        for name in (STAGES, UP, DOWN):
            groups[name] = dist.new_group(beside, use_local_synchronization=True)
    communicator = Communicator(layout, me, groups)
    communicator.stage = stage
    return communicator


def _members(view: View, axis: str, rank: int) -> tuple[int, ...]:
    """The ranks that differ from this one only along an axis."""
    return next(tuple(group) for group in view.groups(axis) if rank in group)


def _make_equal(tensors: Mapping[str, Tensor], group: Any, device: torch.device) -> None:
    """Give every rank the first rank's values where ranks were initialised differently."""
    real = [t for t in tensors.values() if not t.is_meta]
    if not real or dist.get_world_size(group) == 1:
        return
    sums = torch.stack([_checksum(t) for t in real]).to(device)
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    for tensor, differs in zip(real, (low != high).tolist(), strict=True):
        if differs:
            value = tensor.detach().to(device, copy=True)
            dist.broadcast(value, group=group, group_src=0)
            with torch.no_grad():
                tensor.copy_(value)


def _checksum(tensor: Tensor) -> Tensor:
    """A number that differs between differently initialised tensors."""
    flat = tensor.detach().flatten()
    weights = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.float64)
    return torch.dot(torch.nan_to_num(flat.to(torch.float64)), weights.remainder_(8191.0))
