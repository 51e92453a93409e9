"""The training step as one graph: ``step = moptrace.train_step(model, optimizer)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from moptrace.activations import communicates
from moptrace.collectives import start
from moptrace.core import Output, Pass, Program, chain
from moptrace.costs import Machine
from moptrace.errors import StepError
from moptrace.liveness import Peak, peak_memory, write_backs
from moptrace.parallel import ParallelModule
from moptrace.passes.apply_optimizer import apply_optimizer, learning_rate, state_tensors
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.clip_gradients import NORM, clip_gradients
from moptrace.passes.compile_regions import compile_regions
from moptrace.passes.default import overlapped
from moptrace.passes.differentiate import differentiate
from moptrace.passes.fit_activations import fit_activations
from moptrace.passes.offload import offload
from moptrace.passes.recompute import recompute
from moptrace.passes.shard_parameters import batch_sizes, is_split
from moptrace.timeline import Timeline, measure, predict, write

__all__ = ["Stepper", "TrainStep", "train_step"]

_OVERLAPPED = overlapped()


def train_step(
    model: ParallelModule,
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: float | None = None,
    accumulate: int = 1,
    activations: str | int | Pass = "keep",
    schedule: Pass | None = _OVERLAPPED,
    compile: bool = False,
) -> TrainStep:
    """Forward, loss, backward, reductions, clipping and optimizer as one graph.

    ``model`` is what ``parallelize`` returned, ``optimizer`` any ``torch.optim`` optimizer of its
    parameters that treats every element alike. Gradients are scaled down to a global norm of
    ``max_norm``, the norm that the unsharded model has; None leaves them. With ``accumulate``
    micro-batches to a step, the loss is the mean over all their tokens.

    ``activations`` says what is kept from forward to backward: ``"keep"`` everything,
    ``"checkpoint"`` what enters each layer, ``"offload"`` that in the memory of the host; a number
    of bytes, within which the step's peak is brought at the least cost (``fit_activations``); or a
    pass, such as ``passes.checkpoint.checkpoint("attention")``. ``schedule`` is a pass, or a chain
    of passes, over what results: by default collectives start early, and are waited for late, while
    others compute (``passes.default.overlapped``); with None they run where they stand. Gathering
    parameters again in backward is ``chain(regather(), overlapped())``. With ``compile``, what lies
    between products and collectives, and the optimizer, runs in kernels that Inductor makes.

        step = moptrace.train_step(model, optimizer, max_norm=1.0)
        loss = step(input_ids=ids, labels=labels)

    The call updates parameters, buffers and optimizer state. They are those of ``model`` and
    ``optimizer``: schedulers, ``state_dict``, ``torch.distributed.checkpoint`` and ordinary steps
    through ``backward`` work before, between and after.

    Raises StepError for parameters that are not the model's, that the loss does not depend on, for
    optimizers that cannot be recorded, and for a number of bytes within which no choice is.
    """
    passes = [*_policy(activations, schedule), *([schedule] if schedule else [])]
    passes += [compile_regions()] if compile else []
    return TrainStep(model, optimizer, max_norm, accumulate, chain(*passes) if passes else None)


def _policy(activations: str | int | Pass, schedule: Pass | None) -> list[Pass]:
    """The passes that ``train_step(activations=)`` names, and that come before the schedule."""
    if isinstance(activations, Pass):
        return [activations]
    if isinstance(activations, int) and not isinstance(activations, bool) and activations > 0:
        return [fit_activations(activations, then=schedule)]
    known = {"keep": [], "checkpoint": [checkpoint()], "offload": [checkpoint(), offload()]}
    if activations not in known:
        raise StepError(
            f"activations={activations!r} is none of {', '.join(map(repr, known))}, a positive "
            "number of bytes, or a pass"
        )
    return known[activations]


class TrainStep:
    """A training step that is one graph; made by ``moptrace.train_step``.

    Every new shape of the batch is traced once. The optimizer's part is traced anew when its state
    changes in kind (in its first step, where it makes its state) or an option other than the
    learning rate changes.
    """

    def __init__(
        self,
        model: ParallelModule,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None,
        accumulate: int,
        schedule: Pass | None,
    ):
        if accumulate < 1:
            raise StepError(f"a step has one micro-batch or more, not accumulate={accumulate}")
        self.model, self.optimizer = model, optimizer
        self.accumulate = accumulate
        self._schedule = schedule
        self._stepper = Stepper(
            optimizer, _names(model, optimizer), max_norm, accumulate, schedule, model.rank
        )
        self._runs: dict[int, fx.GraphModule] = {}
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

        loss = self._step([_part(batch, i, self.accumulate) for i in range(self.accumulate)], run)
        write(path, {"measured": measured[0], "predicted": self.timeline()})
        return loss

    def peak_memory(self) -> Peak:
        """The most bytes that the step's values take on this rank, and the tensors alive then."""
        return peak_memory(self.program)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step on this rank's part of a batch; returns the loss of the global batch.

        With several micro-batches to a step, the batch has the sequences of all of them: its first
        dimension is divided. ``grad_norm`` is then the norm of the gradients before clipping.
        """
        batch = self.model.named(args, kwargs)
        return self._step([_part(batch, i, self.accumulate) for i in range(self.accumulate)])

    def add(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Give one micro-batch; the last one of a step runs it and returns the loss, else None."""
        self._waiting.append(self.model.named(args, kwargs))
        if len(self._waiting) < self.accumulate:
            return None
        given, self._waiting = self._waiting, []
        return self._step(given)

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
        program = self._stepper.program(model.local_program(batches[0]), model.device)
        if id(program) not in self._runs:
            self._check_order(program)
            self._runs[id(program)] = executable(program, model.device)
        inputs = [
            x.to(model.device)
            for batch in batches
            for x in pytree.tree_leaves(batch)
            if isinstance(x, Tensor)
        ]
        signature = program.signature
        parameters = [_own(model.get_parameter(p.fqn)) for p in signature.parameters]
        buffers = [model.get_buffer(b.fqn) for b in signature.buffers]
        states = self._stepper.states(program)
        with torch.no_grad(), model.communicator:
            module, arguments = self._runs[id(program)], [*parameters, *buffers, *states, *inputs]
            results = run(module, arguments) if run else module(*arguments)
            model.communicator.step += 1
        self._program = program
        left = [output for output in signature.outputs if output.updates is None]
        self.grad_norm = self._stepper.finish(zip(left, results, strict=True), self._like)
        return results[0]

    def _check_order(self, program: Program) -> None:
        """Ranks that run collectives in different orders would wait for ever."""
        orders = self.model.differences(order_of_collectives(program))
        if orders:
            at, names = next((i, x) for i, x in enumerate(zip_longest(*orders)) if len({*x}) > 1)
            raise StepError(
                f"the ranks' steps differ from collective {at} on, which from rank 0 on is "
                f"{', '.join(map(str, names))}. Give all ranks one schedule, whose decisions do "
                "not depend on a rank's own sizes."
            )

    def _like(self, fqn: str, value: Tensor) -> Tensor:
        """A new entry of the state is held as its parameter, if it is of that shape."""
        parameter = self.model.get_parameter(fqn)
        if not isinstance(parameter, DTensor) or _own(parameter).shape != value.shape:
            return value
        return DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


class Stepper:
    """The step programs of one rank, and the optimizer whose state they read and write.

    ``names`` gives the fully qualified name of every parameter of the optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
        max_norm: float | None = None,
        micro_batches: int = 1,
        schedule: Pass | None = None,
        rank: int = 0,
    ):
        self.optimizer, self.names = optimizer, names
        self.max_norm, self.micro_batches = max_norm, micro_batches
        self.schedule, self.rank = schedule, rank
        self._parameters = {name: parameter for parameter, name in names.items()}
        self._gradients: dict[Program, Program] = {}
        self._programs: dict[Any, Program] = {}

    def program(self, local: Program, device: torch.device | str = "cpu") -> Program:
        """The step of a local program, for the optimizer as it is now."""
        key = (local, self._kind())
        if key not in self._programs:
            if local not in self._gradients:
                self._gradients[local] = self._with_gradients(local, device)
            finish = [apply_optimizer(self.optimizer, self.names)]
            finish += [self.schedule] if self.schedule else []
            self._programs[key] = chain(*finish)(self._gradients[local])
        return self._programs[key]

    def _with_gradients(self, local: Program, device: torch.device | str) -> Program:
        trained = [name for name, p in self._parameters.items() if p.requires_grad]
        passes = [
            differentiate(trained, self.micro_batches, rank=self.rank, device=device),
            recompute(),
        ]
        if self.max_norm is not None:
            passes.append(clip_gradients(self.max_norm))
        return chain(*passes)(local)

    def _kind(self) -> tuple[Any, ...]:
        """What the optimizer's part is traced for: options by value, state by shape and dtype."""
        options = tuple(
            (key, isinstance(x, Tensor) if key == "lr" else repr(x))
            for group in self.optimizer.param_groups
            for key, x in group.items()
            if key not in ("params", "initial_lr")
        )
        state = tuple(
            (
                self.names[p],
                *((key, x.dtype) for key, x in state_tensors(self.optimizer, p).items()),
            )
            for group in self.optimizer.param_groups
            for p in group["params"]
        )
        return (options, state)

    def states(self, program: Program) -> list[Tensor]:
        """The optimizer's tensors, in the order of the program's inputs."""
        groups = self.optimizer.param_groups
        held = {
            f"{name}.{key}": x
            for name, p in self._parameters.items()
            for key, x in state_tensors(self.optimizer, p).items()
        }
        rates = {f"groups.{i}.lr": learning_rate(g) for i, g in enumerate(groups)}
        return [(held | rates)[entry.path] for entry in program.signature.states]

    def finish(
        self, made: Iterable[tuple[Output, Tensor]], like: Callable[[str, Tensor], Tensor]
    ) -> Tensor | None:
        """Keep the state that the optimizer made; returns the norm of the gradients, if taken.

        ``made`` are the outputs that replace nothing. ``like(parameter, value)`` is how an entry of
        a parameter's state is held.
        """
        norm = None
        for output, value in made:
            if output.path == NORM:
                norm = value
            elif output.state_of is not None:
                key = output.path.removeprefix(f"{output.state_of}.")
                self.optimizer.state[self._parameters[output.state_of]][key] = like(
                    output.state_of, value
                )
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask
        return norm


def order_of_collectives(program: Program) -> list[str]:
    """What the ranks must run in one order: each operator that takes several of them, by name."""
    names: list[str] = []
    for node in program.nodes:
        if node.target is start:
            names.append(str(node.args[0]))
        elif communicates(node):
            names.append(str(node.target))
    return names


def executable(program: Program, device: torch.device | str) -> fx.GraphModule:
    """The program as a module that writes new values over old ones as early as it may.

    It takes the program's inputs in order and returns the outputs that replace none of them.
    """
    module = program.module(device)
    nodes = dict(zip(program.nodes, module.graph.nodes, strict=True))
    for after, pairs in write_backs(program).items():
        for old, new in reversed(pairs):
            with module.graph.inserting_after(nodes[after]):
                module.graph.call_function(torch.ops.aten.copy_.default, (nodes[old], nodes[new]))
    kept = [
        nodes[node]
        for output, node in zip(program.signature.outputs, program.outputs, strict=True)
        if output.updates is None
    ]
    module.graph.output_node().args = (tuple(kept),)
    module.recompile()
    return module


def _names(model: ParallelModule, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The names of the optimizer's parameters; StepError if one is not the model's."""
    of = {id(model.get_parameter(p.fqn)): p.fqn for p in model.program.signature.parameters}
    names: dict[Tensor, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in of:
                raise StepError(
                    f"group {number} of the optimizer holds a parameter of shape "
                    f"{list(parameter.shape)} that is not the parallel model's. Make the optimizer "
                    "after parallelize, from its result: torch.optim.AdamW(model.parameters())."
                )
            names[parameter] = of[id(parameter)]
    return names


def _part(batch: Mapping[str, Any], number: int, parts: int) -> dict[str, Any]:
    """One micro-batch of a batch whose sequences are divided among so many."""
    leaves = [x for x in pytree.tree_leaves(dict(batch)) if isinstance(x, Tensor)]
    sizes = batch_sizes([tuple(x.shape) for x in leaves])
    if sizes[0] is not None and sizes[0] % parts:
        raise StepError(
            f"a rank's batch of {sizes[0]} sequences cannot be divided into {parts} micro-batches; "
            f"give a multiple of {parts}"
        )

    def own(x: Any) -> Any:
        if isinstance(x, Tensor) and is_split(x.shape, 0, sizes):
            return x.chunk(parts)[number]
        return x

    return pytree.tree_map(own, dict(batch))


def _own(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x.detach()
