"""The training step as one graph: ``step = moptrace.train_step(model, optimizer)``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as ReplicateDim
from torch.distributed.tensor import Shard as ShardDim
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils import _pytree as pytree

from moptrace.activations import communicates
from moptrace.collectives import start
from moptrace.core import Output, Pass, Program, chain
from moptrace.costs import Machine
from moptrace.errors import StepError
from moptrace.executable import executable
from moptrace.explain import Explanation
from moptrace.kernels.host_memory import finish_copies
from moptrace.kernels.host_update import bring_back
from moptrace.liveness import Peak, peak_memory
from moptrace.parallel import ParallelModule, part_of_batch
from moptrace.passes.apply_optimizer import apply_optimizer, learning_rate, state_tensors
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.clip_gradients import NORM, clip_gradients
from moptrace.passes.compile_regions import compile_regions
from moptrace.passes.default import overlapped
from moptrace.passes.defer_updates import defer_updates, leave_updates, pending_updates
from moptrace.passes.differentiate import differentiate
from moptrace.passes.fit_activations import fit_activations
from moptrace.passes.fuse_updates import fuse_updates
from moptrace.passes.offload import offload
from moptrace.passes.pipeline import pipeline
from moptrace.passes.recompute import recompute
from moptrace.passes.stream_state import stream_state
from moptrace.passes.take_stage import take_stage
from moptrace.passes.update_early import update_early
from moptrace.passes.update_on_host import update_on_host
from moptrace.placement import Placement, Shard
from moptrace.timeline import Timeline, measure, predict, write
from moptrace.updates import PENDING, Updates, makes_state

__all__ = ["StepExplanation", "Stepper", "TrainStep", "several", "train_step"]

_OVERLAPPED = overlapped()

# How an entry of a parameter's state is kept, of which a rank has a part, and how ranks hold it.
Like = Callable[[str, Tensor, Placement | None], Tensor]

# What ``train_step`` takes for ``updates`` and ``state``, and the pass that it means. Updates in
# the next forward depend on whether there are any.
_UPDATES = {"after": None, "backward": update_early(), "forward": None}
_STATE = {"device": None, "host": stream_state()}


def train_step(
    model: ParallelModule,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    max_norm: float | None = None,
    accumulate: int = 1,
    activations: str | int | Pass = "keep",
    updates: str = "after",
    state: str | Pass = "device",
    updates_on: str = "device",
    schedule: Pass | None = _OVERLAPPED,
    compile: bool = False,
) -> TrainStep:
    """Forward, loss, backward, reductions, clipping and optimizer as one graph.

    ``model`` is what ``parallelize`` returned, ``optimizer`` any ``torch.optim`` optimizer of its
    parameters, or several of different ones, such as Muon for matrices and AdamW for the rest. What
    treats every element alike works on shards, and what needs whole matrices, as Muon does, is
    computed by an owner of each (``passes.apply_optimizer``). Gradients are scaled down to a global
    norm of ``max_norm``, the norm that the unsharded model has; None leaves them. With
    ``accumulate`` micro-batches to a step, the loss is the mean over all their tokens.

    ``activations`` says what is kept from forward to backward: ``"keep"`` everything,
    ``"checkpoint"`` what enters each layer, ``"offload"`` that in the memory of the host; a number
    of bytes, within which the step's peak is brought at the least cost (``fit_activations``); or a
    pass, such as ``passes.checkpoint.checkpoint("attention")``.

    ``updates`` says when the optimizer works: ``"after"`` backward; in ``"backward"``, on each
    parameter as soon as its gradient is final, which clipping does not allow, and on experts one by
    one, so that the gradients of all of them are never there (``passes.fuse_updates``); or in the
    ``"forward"`` of the next step, on each parameter just before its first use. The last leaves
    updates pending between steps: ``step.flush()`` finishes them, and whatever reads the model or
    the optimizer through their own methods calls it first. ``state="host"`` keeps the optimizer's
    state in the memory of the host and brings it to the device in buckets, two at a time; a pass
    says otherwise, such as ``passes.stream_state.stream_state(bucket=2**28, slots=3)``. Then
    ``updates_on="host"`` runs the updates there, too, by the optimizer's own operators on the CPU:
    gradients go to the host, and new parameters come back. ``"cheaper"`` decides for each bucket
    (``passes.update_on_host``). No choice changes a bit of the result, but for what one and the
    same operator of torch makes on a GPU and on a CPU.

    ``schedule`` is a pass, or a chain of passes, over what results: by default collectives start
    early, and are waited for late, while others compute (``passes.default.overlapped``); with None
    they run where they stand. Gathering parameters again in backward is ``chain(regather(),
    overlapped())``. With ``compile``, what lies between products and collectives, and the
    optimizer, runs in kernels that Inductor makes.

        step = moptrace.train_step(model, optimizer, max_norm=1.0)
        loss = step(input_ids=ids, labels=labels)

    The call updates parameters, buffers and optimizer state. They are those of ``model`` and
    ``optimizer``: schedulers, ``state_dict``, ``torch.distributed.checkpoint`` and ordinary steps
    through ``backward`` work before, between and after.

    Raises StepError for parameters that are not the model's, that the loss does not depend on, for
    optimizers that cannot be recorded, and for a number of bytes within which no choice is.
    """
    policy = _policy(activations, schedule)
    if isinstance(activations, int) and model.plan.pp > 1:
        raise StepError(
            f"activations={activations!r} is a bound on the memory of a step whose forward comes "
            "before its backward, and the stages of Plan(pp=) take turns with both; say "
            "'checkpoint' or 'offload', or a pass"
        )
    passes = [*([schedule] if schedule else []), *([compile_regions()] if compile else [])]
    scheduled = chain(*passes) if passes else None
    place = _place(state, updates_on, schedule)
    return TrainStep(model, optimizer, max_norm, accumulate, scheduled, updates, place, policy)


def _policy(activations: str | int | Pass, schedule: Pass | None) -> Pass | None:
    """The pass that ``train_step(activations=)`` names, and that comes before the schedule."""
    if isinstance(activations, Pass):
        return activations
    if isinstance(activations, int) and not isinstance(activations, bool) and activations > 0:
        return fit_activations(activations, then=schedule)
    known = {"keep": None, "checkpoint": checkpoint(), "offload": chain(checkpoint(), offload())}
    if activations not in known:
        raise StepError(
            f"activations={activations!r} is none of {', '.join(map(repr, known))}, a positive "
            "number of bytes, or a pass"
        )
    return known[activations]


def _place(state: str | Pass, updates_on: str, schedule: Pass | None) -> str | Pass:
    """The pass that ``train_step(state=, updates_on=)`` name together."""
    cheaper = update_on_host(choose=True, then=schedule)
    known = {"device": None, "host": update_on_host(), "cheaper": cheaper}
    there = _chosen("updates_on", updates_on, known)
    if there is None:
        return state
    stream = state if isinstance(state, Pass) else _chosen("state", state, _STATE)
    if stream is None:
        raise StepError(
            f"updates_on={updates_on!r} runs updates where the optimizer's state is, and with "
            f"state={state!r} that is the device; say state='host' as well"
        )
    return chain(there, stream)


def _chosen(name: str, choice: Any, known: Mapping[str, Pass | None]) -> Pass | None:
    if choice not in known:
        raise StepError(f"{name}={choice!r} is none of {', '.join(map(repr, known))}")
    return known[choice]


@dataclass(frozen=True)
class StepExplanation:
    """The table of ``model.explain()``, the step's ``timeline()`` and its ``peak_memory()``."""

    model: Explanation
    timeline: Timeline
    peak: Peak

    def __str__(self) -> str:
        return f"{self.model}\n\n{self.timeline}\n\npeak on this rank: {self.peak}"


class TrainStep:
    """A training step that is one graph; made by ``moptrace.train_step``.

    Every new shape of the batch is traced once. The optimizer's part is traced anew when its state
    changes in kind (in its first step, where it makes its state) or an option other than the
    learning rate changes.
    """

    def __init__(
        self,
        model: ParallelModule,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        max_norm: float | None,
        accumulate: int,
        schedule: Pass | None,
        updates: str = "after",
        state: str | Pass = "device",
        activations: Pass | None = None,
    ):
        if accumulate < 1:
            raise StepError(f"a step has one micro-batch or more, not accumulate={accumulate}")
        self.model, self.optimizer = model, optimizer
        self.accumulate = accumulate
        self._schedule = schedule
        names = _names(model, several(optimizer))
        trained = (name for parameter, name in names.items() if parameter.requires_grad)
        self._stepper = Stepper(
            optimizer,
            names,
            max_norm,
            accumulate * model.plan.divisions,
            schedule,
            model.rank,
            updates,
            state,
            activations,
            model.stage,
            model.of_all_stages(trained),
        )
        for each in self._stepper.optimizers:
            each.register_step_pre_hook(lambda *_: self._settle())
            each.register_state_dict_pre_hook(lambda *_: self._settle())
            each.register_load_state_dict_pre_hook(lambda *_: self._settle())
        self._versions: dict[str, int] = {}  # of what updates were left for, by path
        self._runs: dict[Program, fx.GraphModule] = {}
        self._waiting: list[dict[str, Any]] = []
        self._program: Program | None = None
        self.grad_norm: Tensor | None = None

    @property
    def program(self) -> Program:
        """The program of the step that ran last."""
        if self._program is None:
            raise StepError("no step has run yet: step.program is traced for the first batch")
        return self._program

    def timeline(self, machine: Machine | None = None) -> Timeline:
        """What the step that ran last would do when on a machine, by default one like an H100."""
        return predict(self.program, machine)

    def trace(self, path: str | Path, *args: Any, **kwargs: Any) -> Tensor:
        """Run a step as a call does, and write what ran when on this rank, for Perfetto.

        The file has two processes: the step as it was measured, node by node, and as
        ``timeline()`` predicts it. Returns the loss.
        """
        batch = self.model.named(args, kwargs)
        measured: list[Timeline] = []

        def run(module: fx.GraphModule, arguments: Sequence[Tensor]) -> Any:
            results, found = measure(module, arguments, torch.device(self.model.device))
            measured.append(found)
            return results

        loss = self._step(self._parts([batch], self.accumulate), run)
        write(path, {"measured": measured[0], "predicted": self.timeline()})
        return loss

    def explain(self, machine: Machine | None = None) -> StepExplanation:
        """What the step that ran last does: component by component, when, and in how much memory.

        ``machine`` is the one that ``timeline`` assumes.
        """
        return StepExplanation(self.model.explain(), self.timeline(machine), self.peak_memory())

    def peak_memory(self) -> Peak:
        """The most bytes that the step's values take on this rank, and the tensors alive then."""
        return peak_memory(self.program)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step on this rank's part of a batch; returns the loss of the global batch.

        With several micro-batches to a step, the batch has the sequences of all of them: its first
        dimension is divided. ``grad_norm`` is then the norm of the gradients before clipping.
        """
        batch = self.model.named(args, kwargs)
        return self._step(self._parts([batch], self.accumulate))

    def add(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Give one micro-batch; the last one of a step runs it and returns the loss, else None."""
        self._waiting.append(self.model.named(args, kwargs))
        if len(self._waiting) < self.accumulate:
            return None
        given, self._waiting = self._waiting, []
        return self._step(self._parts(given))

    def _parts(self, batches: Sequence[Mapping[str, Any]], each: int = 1) -> list[dict[str, Any]]:
        """The micro-batches of a step: of each batch so many, and of these the pipeline's."""
        count = each * self.model.plan.divisions
        return [part_of_batch(batch, i, count) for batch in batches for i in range(count)]

    def _step(
        self,
        batches: Sequence[Mapping[str, Any]],
        run: Callable[[fx.GraphModule, Sequence[Tensor]], Any] | None = None,
    ) -> Tensor:
        model = self.model
        if len({model.traced_for(batch) for batch in batches}) > 1:
            raise StepError(
                "the micro-batches of a step have different shapes, so they are different programs;"
                " pad them to one length and ignore the padding with label -100"
            )
        if model.unfinished != self.flush or self._stepper.must_flush:
            model.flush()
        program = self._stepper.program(model.local_program(batches[0]), model.device)
        inputs = [
            x.to(model.device)
            for batch in batches
            for x in pytree.tree_leaves(batch)
            if isinstance(x, Tensor)
        ]
        with self._all_updates_or_none(program):
            results = self._run(program, inputs, run)
        model.communicator.step += 1
        self._program = program
        left = [output for output in program.signature.outputs if output.updates is None]
        made = zip(left, results, strict=True)
        self.grad_norm = self._stepper.finish(program, made, self._like)
        model.unfinished = None
        if self._stepper.pending:
            model.unfinished = self.flush
            self._versions = {path: x._version for path, x in self._updated(program)}
        return results[0]

    def flush(self) -> None:
        """Run the updates that the last step left for the next one; nothing if there are none.

        Needed only before parameters are read one by one: calls of the model, ``state_dict``,
        loading, and the methods of the optimizer do it.
        """
        if self._stepper.pending:
            program = self._stepper.unfinished()
            self._check_untouched(program)
            self._run(program, ())
        self._forget()

    def _settle(self) -> None:
        """Before the optimizer's own methods: nothing waits, and nothing is on its way."""
        self.model.flush()
        finish_copies()

    def _run(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        run: Callable[[fx.GraphModule, Sequence[Tensor]], Any] | None = None,
    ) -> Any:
        if program not in self._runs:
            self._check_order(program)
            self._runs[program] = executable(program, self.model.device)
        module, arguments = self._runs[program], [*self._held(program), *inputs]
        started: Any = module.started
        with torch.no_grad(), self.model.communicator:
            try:
                results = run(module, arguments) if run else module(*arguments)
                self.model.communicator.settle()
                return results
            except Exception:
                bring_back(started)
                raise
            finally:
                started.clear()

    def _held(self, program: Program) -> list[Tensor]:
        """What a program takes beside the batch: parameters, buffers, the optimizer's state."""
        signature = program.signature
        parameters = [_own(self.model.get_parameter(p.fqn)) for p in signature.parameters]
        buffers = [self.model.get_buffer(b.fqn) for b in signature.buffers]
        if self.model.device.type == "cuda":
            self._stepper.send_to_host(program)
        return [*parameters, *buffers, *self._stepper.states(program)]

    @contextmanager
    def _all_updates_or_none(self, program: Program) -> Iterator[None]:
        """If a batch is refused while pending updates run, finish them, and refuse it then."""
        if not self._stepper.pending:
            yield
            return
        self._check_untouched(program)
        try:
            yield
        except Exception:
            try:
                if left := self._stepper.not_among(self._written(program)):
                    self._run(left, ())
            finally:
                self._forget()
            raise

    def _check_untouched(self, program: Program) -> None:
        """Updates belong to the values that the last step left."""
        if written := self._written(program):
            self._forget()
            raise StepError(
                f"{', '.join(sorted(written)[:3])} and perhaps others were written while the last "
                "step's update of them was pending; that update is dropped. Call step.flush() "
                "before you write to parameters or to the optimizer's state."
            )

    def _written(self, program: Program) -> set[str]:
        """The paths of what was written since the last step left updates of it."""
        updated = self._updated(program)
        return {path for path, x in updated if self._versions.get(path, x._version) != x._version}

    def _updated(self, program: Program) -> Iterator[tuple[str, Tensor]]:
        """What pending updates belong to: parameters, their state, and what waits, by path.

        Buffers and learning rates are the user's to write at any time.
        """
        signature, held = program.signature, self._held(program)
        for parameter, x in zip(signature.parameters, held, strict=False):
            yield parameter.fqn, x
        states = held[len(signature.parameters) + len(signature.buffers) :]
        for state, x in zip(signature.states, states, strict=True):
            if state.parameter is not None or state.path.startswith(PENDING):
                yield state.path, x

    def _forget(self) -> None:
        self._stepper.flushed()
        self.model.unfinished = None

    def _check_order(self, program: Program) -> None:
        """Ranks that run collectives in different orders would wait for ever."""
        order = order_of_collectives(program)
        if order and (orders := self.model.differences(order)):
            at, names = next((i, x) for i, x in enumerate(zip_longest(*orders)) if len({*x}) > 1)
            raise StepError(
                f"the ranks' steps differ from collective {at} on, which from rank 0 on is "
                f"{', '.join(map(str, names))}. Give all ranks one schedule, whose decisions do "
                "not depend on a rank's own sizes."
            )

    def _like(self, fqn: str, value: Tensor, held: Placement | None) -> Tensor:
        """A new entry of the state, as the ranks hold it."""
        parameter = self.model.get_parameter(fqn)
        if not isinstance(parameter, DTensor) or held is None:
            return value
        kinds = (held.expressed_in(self.model.layout.storage) or held).kinds
        dims = {kind.dim for kind in kinds if isinstance(kind, Shard)}
        shape = [parameter.shape[d] if d in dims else n for d, n in enumerate(value.shape)]
        # DTensor.from_local would bring what is on the host to the device of the mesh.
        strides = torch.empty(shape, device="meta").stride()
        meta = TensorMeta(torch.Size(shape), strides, value.dtype)
        places = tuple(ShardDim(k.dim) if isinstance(k, Shard) else ReplicateDim() for k in kinds)
        spec = DTensorSpec(parameter.device_mesh, places, tensor_meta=meta)
        return DTensor(value, spec, requires_grad=False)


def several(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers of a step, of which one may be given alone."""
    found = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
    if not found:
        raise StepError("a step needs an optimizer: train_step(model, optimizer), or several")
    return found


class Stepper:
    """The step programs of one rank, and the optimizers whose state they read and write.

    ``names`` gives the fully qualified name of every parameter of the optimizers. ``rank`` is the
    rank's number in its pipeline ``stage``, and ``trained`` are the parameters of all stages'
    optimizers, by default those of this one's. Steppers of ranks whose parts have the same sizes
    may share ``of_all_stages``, the gradients that each of their stages is taken from.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        names: Mapping[Tensor, str],
        max_norm: float | None = None,
        micro_batches: int = 1,
        schedule: Pass | None = None,
        rank: int = 0,
        updates: str = "after",
        state: str | Pass = "device",
        activations: Pass | None = None,
        stage: int = 0,
        trained: Collection[str] | None = None,
        of_all_stages: dict[Program, Program] | None = None,
    ):
        self.optimizers, self.names = several(optimizer), names
        self.max_norm, self.micro_batches = max_norm, micro_batches
        self.rank, self.stage = rank, stage
        self._trained = trained
        self._of_all_stages = {} if of_all_stages is None else of_all_stages
        self._activations = activations
        self.defers = updates == "forward"
        self.pending: dict[str, Tensor] = {}  # what updates take that the next step runs, by path
        self._early = _chosen("updates", updates, _UPDATES)
        self._stream = state if isinstance(state, Pass) else _chosen("state", state, _STATE)
        self._schedule = schedule
        self._parameters = {name: parameter for parameter, name in names.items()}
        self._optimizer_of = {
            p: each
            for each in self.optimizers
            for group in each.param_groups
            for p in group["params"]
        }
        self._held: dict[str, Placement | None] = {}  # how the ranks hold state that was made here
        self._gradients: dict[Program, Program] = {}
        self._finished: dict[Any, Program] = {}  # with the optimizer, in the order of the step
        self._programs: dict[Any, Program] = {}
        # The kind of optimizer, and the finished step, that a program was made for and of.
        self._sources: dict[Program, tuple[Any, Program]] = {}
        self._left: tuple[Any, Program] | None = None  # those of the step that left updates

    def program(self, local: Program, device: torch.device | str = "cpu") -> Program:
        """The step of a local program, for the optimizer as it is now."""
        kind = self._kind()
        finished = self._finish(local, kind, device)
        how = self._early
        if self.defers and not makes_state(finished):
            how = defer_updates() if self.pending else leave_updates()
        fused = fuse_updates() if how is self._early and how is not None else None
        late = None if self._is_pipelined(local) else self._activations
        program = self._made(finished, how, self._stream, fused, late, self._schedule)
        self._sources[program] = (kind, finished)
        return program

    def unfinished(self, only: Collection[str] | None = None) -> Program:
        """The updates that the last step left, of all parameters or of these alone."""
        assert self._left is not None
        return self._made(self._left[1], pending_updates(only), self._stream)

    def _made(self, finished: Program, how: Pass | None, *others: Pass | None) -> Program:
        if (key := (finished, how)) not in self._programs:
            self._programs[key] = chain(*(p for p in (how, *others) if p))(finished)
        return self._programs[key]

    @property
    def must_flush(self) -> bool:
        """Whether updates wait that were left for an optimizer with other options."""
        return bool(self.pending) and (self._left is None or self._left[0] != self._kind())

    def not_among(self, written: Collection[str]) -> Program | None:
        """The pending updates that have not run, if what has these paths was written."""
        assert self._left is not None
        found: list[str] = []
        for fqn, pairs in Updates(self._left[1]).outputs.items():
            own = [output.path in written for output, _ in pairs]
            if any(own) and not all(own):
                raise StepError(
                    f"the step failed in the midst of the update of {fqn}, whose state is lost; "
                    "load the last checkpoint"
                )
            found += [] if any(own) else [fqn]
        return self.unfinished(found) if found else None

    def _finish(self, local: Program, kind: Any, device: torch.device | str) -> Program:
        if (local, kind) not in self._finished:
            if local not in self._gradients:
                self._gradients[local] = self._with_gradients(local, device)
            updates: list[Pass] = []
            groups = 0
            for optimizer in self.optimizers:
                updates.append(apply_optimizer(optimizer, self.names, self._held, groups))
                groups += len(optimizer.param_groups)
            self._finished[local, kind] = chain(*updates)(self._gradients[local])
        return self._finished[local, kind]

    def _with_gradients(self, local: Program, device: torch.device | str) -> Program:
        own = [name for name, p in self._parameters.items() if p.requires_grad]
        trained = sorted(self._trained) if self._trained is not None else own
        passes = [
            differentiate(trained, self.micro_batches, rank=self.rank, device=device),
            recompute(),
        ]
        if self.max_norm is not None:
            passes.append(clip_gradients(self.max_norm))
        if self._is_pipelined(local):
            # Layers are seen while a micro-batch's nodes stand together, and of all stages.
            passes += [self._activations] if self._activations else []
            if local not in self._of_all_stages:
                self._of_all_stages[local] = chain(*passes, pipeline())(local)
            return take_stage(self.stage)(self._of_all_stages[local])
        return chain(*passes)(local)

    def _is_pipelined(self, local: Program) -> bool:
        return local.layout is not None and local.layout.stages > 1

    def _kind(self) -> tuple[Any, ...]:
        """What the optimizer's part is traced for: options by value, state by shape and dtype."""
        options = tuple(
            (key, isinstance(x, Tensor) if key == "lr" else repr(x))
            for group in self._groups()
            for key, x in group.items()
            if key not in ("params", "initial_lr")
        )
        state = tuple(
            (
                self.names[p],
                *((key, x.dtype) for key, x in state_tensors(optimizer, p).items()),
            )
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        )
        return (options, state)

    def states(self, program: Program) -> list[Tensor]:
        """The optimizer's tensors, in the order of the program's inputs."""
        held = {
            f"{name}.{key}": x
            for name, p in self._parameters.items()
            for key, x in state_tensors(self._optimizer_of[p], p).items()
        }
        rates = {f"groups.{i}.lr": learning_rate(g) for i, g in enumerate(self._groups())}
        given = held | rates | self.pending
        return [given[entry.path] for entry in program.signature.states]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def send_to_host(self, program: Program) -> None:
        """Move the state that a program expects on the host there, from a GPU."""
        for entry in program.signature.states:
            if entry.host and entry.parameter and not entry.path.startswith(PENDING):
                parameter = self._parameters[entry.parameter]
                state = self._optimizer_of[parameter].state[parameter]
                key = entry.path.removeprefix(f"{entry.parameter}.")
                old = state[key]
                if (value := _own(old)).device.type == "cuda":
                    value = value.cpu().pin_memory()
                    spec = old._spec if isinstance(old, DTensor) else None
                    state[key] = DTensor(value, spec, requires_grad=False) if spec else value

    def finish(
        self,
        program: Program,
        made: Iterable[tuple[Output, Tensor]],
        like: Like,
    ) -> Tensor | None:
        """Keep what a step made beside the loss; returns the norm of the gradients, if taken.

        ``made`` are the outputs that replace nothing. ``like(parameter, value, held)`` is how an
        entry of a parameter's state is kept, which the ranks hold so.
        """
        norm = None
        for output, value in made:
            if output.path == NORM:
                norm = value
            elif output.path.startswith(PENDING):
                self.pending[output.path] = value
            elif output.state_of is not None:
                key = output.path.removeprefix(f"{output.state_of}.")
                parameter = self._parameters[output.state_of]
                kept = like(output.state_of, value, output.held)
                self._optimizer_of[parameter].state[parameter][key] = kept
                self._held[output.path] = output.held
        if self.pending:
            self._left = self._sources.get(program)
        for optimizer in self.optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask
        return norm

    def flushed(self) -> None:
        """Nothing waits any more."""
        self.pending.clear()
        self._left = None


def order_of_collectives(program: Program) -> list[str]:
    """What the ranks must run in one order: each operator that takes several of them, by name."""
    names: list[str] = []
    for node in program.nodes:
        if node.target is start:
            names.append(str(node.args[0]))
        elif communicates(node):
            names.append(str(node.target))
    return names


def _names(model: ParallelModule, optimizers: Sequence[torch.optim.Optimizer]) -> dict[Tensor, str]:
    """The names of the optimizers' parameters; StepError if one is not the model's, or is twice."""
    of = {id(model.get_parameter(p.fqn)): p.fqn for p in model.own_parameters}
    names: dict[Tensor, str] = {}
    for number, group in enumerate(g for each in optimizers for g in each.param_groups):
        for parameter in group["params"]:
            if parameter in names:
                raise StepError(
                    f"{names[parameter]} is a parameter of two optimizers, which would both update "
                    "it in one step. Give each parameter to one of them."
                )
            if id(parameter) not in of:
                raise StepError(
                    f"group {number} of the optimizer holds a parameter of shape "
                    f"{list(parameter.shape)} that is not the parallel model's. Make the optimizer "
                    "after parallelize, from its result: torch.optim.AdamW(model.parameters())."
                )
            names[parameter] = of[id(parameter)]
    return names


def _own(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x.detach()
