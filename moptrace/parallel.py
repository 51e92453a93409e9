"""The module that ``parallelize`` returns: an ``nn.Module`` with ``DTensor`` parameters."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
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
from moptrace.core import Parameter, Program
from moptrace.errors import MoptraceError
from moptrace.passes.default import canonical, sharded
from moptrace.passes.shard_parameters import (
    BATCH_DIM,
    batch_parts,
    batch_sizes,
    expert_counts,
    is_split,
)
from moptrace.placement import Layout, Placement, Shard, View
from moptrace.plan import Plan
from moptrace.precision import convert
from moptrace.trace import rebuild, trace

if TYPE_CHECKING:
    from moptrace.explain import Explanation

__all__ = ["ManyShapesWarning", "ParallelModule"]

log = logging.getLogger("moptrace")
MANY_SHAPES = 8


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
        self._runs: dict[Program, fx.GraphModule] = {}
        self.mesh = mesh
        self.train(model.training)
        ranks: list[int] = mesh.mesh.flatten().tolist()
        self._world = len(ranks)
        self._batch_parts = (self._world // (plan.cp * plan.tp) or 1, plan.cp * plan.tp)
        self._canonical = canonical()(self._capture(batch))
        self.plan = plan.resolve(self._world, expert_counts(self._canonical))
        self.layout = self.plan.layout(self._world)
        self.storage_mesh = _storage_mesh(mesh, self.layout)
        self._communicator = _connect(self.storage_mesh, self.layout, ranks)
        self._communicator.seed = self._agreed_seed(seed)
        self._stored: dict[str, Placement] = {}
        named = model.named_parameters(remove_duplicate=False)
        self._masters = {name: parameter.dtype for name, parameter in named}
        self._program = self._sharded(self._canonical)
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
        _make_equal({**whole, **buffers}, self._group, self._device)
        for parameter in self._canonical.signature.parameters:
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
    def _group(self) -> Any:
        return self._communicator.groups[self.layout.home.axes[0].name]

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
        for output, value in zip(signature.outputs, outputs, strict=True):
            if output.buffer is not None:
                with torch.no_grad():
                    self.get_buffer(output.buffer).copy_(value)
        self._program = program
        return rebuild(signature, outputs)

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
        """This rank's number on the mesh."""
        return self._communicator.rank

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._device

    def named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name, so that a call is the same however it is written."""
        if len(args) > len(self._argument_names):
            raise TypeError(f"forward takes {self._argument_names}, got {len(args)} values")
        return {**dict(zip(self._argument_names, args, strict=False)), **kwargs}

    def differences(self, key: Any) -> list[Any]:
        """What each rank gives for ``key``, if they differ; nothing if not. Collective."""
        digest = hashlib.blake2b(repr(key).encode(), digest_size=6).digest()
        mine = int.from_bytes(digest, "big")
        extremes = torch.tensor([mine, -mine], device=self._device)
        every: list[Any] = [None] * self._world
        if self._world > 1:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        if extremes[0] == -extremes[1]:
            return []
        dist.all_gather_object(every, key, group=self._group)
        return every

    def _check_batches(self, key: Any) -> None:
        """Every rank must feed the same shapes, else collectives would wait for ever."""
        if not (every := self.differences(key)):
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

        return explain(self.program, self.plan)

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
        for parameter in self._canonical.signature.parameters:
            held = of(self.get_parameter(parameter.fqn))
            whole = None if held is None else self._gather(held.detach(), parameter)
            found.update(state.unstack(parameter, whole))
        return found

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
        values = [state.stack(p, whole) for p in signature.parameters]
        for parameter, value in zip(signature.parameters, values, strict=True):
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
        dist.broadcast(agreed, group=self._group, group_src=0)
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
            None
            if gradient is None
            else DTensor.from_local(
                gradient.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride
            )
            for gradient, (mesh, placements, shape, stride) in zip(
                gradients, ctx.specs, strict=True
            )
        )


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


def _storage_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    axes = layout.storage.axes
    ranks = mesh.mesh.reshape([axis.size for axis in axes])
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=tuple(axis.name for axis in axes))


def _connect(storage_mesh: DeviceMesh, layout: Layout, ranks: Sequence[int]) -> Communicator:
    """The process groups of every axis of every view; those of the storage mesh exist already."""
    me = list(ranks).index(dist.get_rank())
    everyone = ranks == list(range(dist.get_world_size()))
    made: dict[tuple[int, ...], Any] = {}
    for axis in layout.storage.axes:
        made[_members(layout.storage, axis.name, me)] = storage_mesh.get_group(axis.name)
    if everyone:
        made[tuple(range(len(ranks)))] = dist.group.WORLD
    groups: dict[str, Any] = {}
    for view in layout.views:
        for axis in view.axes:
            members = _members(view, axis.name, me)
            if members not in made:
                own = [ranks[i] for i in members]
                made[members] = dist.new_group(own, use_local_synchronization=True)
            groups[axis.name] = made[members]
    return Communicator(layout, me, groups)


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
