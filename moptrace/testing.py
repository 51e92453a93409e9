"""Compare a program of many ranks with the model it was made from.

For writers of passes too. ``assert_same_function`` runs a local program on simulated ranks and
compares the loss, every parameter's gradient and the updated buffers with the unsharded model;
``assert_same_training`` compares every weight after some optimizer steps. ``moe_models``,
``meshes``, ``plans`` and ``batches`` are Hypothesis strategies, for claims such as "any model, any
mesh, any plan".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moptrace import roles, state
from moptrace.core import Output, Pass, Program
from moptrace.placement import INVARIANT, Placement, Shard
from moptrace.precision import MixedPrecisionPolicy, convert
from moptrace.simulate import simulate
from moptrace.state import sizes_of_rank
from moptrace.step import Stepper, several
from moptrace.strategies import ModelSpec, batches, meshes, model_specs, moe_models, plans
from moptrace.trace import call, evaluate, inputs_of

__all__ = [
    "ModelSpec",
    "SimulatedRanks",
    "SimulatedSteps",
    "Step",
    "assert_same_function",
    "assert_same_step",
    "assert_same_training",
    "assert_same_weights",
    "batches",
    "computed_as",
    "dtypes_of",
    "eager_step",
    "eager_training",
    "meshes",
    "model_specs",
    "moe_models",
    "plans",
    "simulated_step",
    "simulated_training",
    "unsharded_step",
    "whole_state",
]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

Batch: TypeAlias = Mapping[str, Any] | Sequence[Any] | Tensor
LossFunction: TypeAlias = Callable[..., Tensor] | None
MakeOptimizer: TypeAlias = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Step:
    """One forward and backward: the loss, every gradient by the user's name, updated buffers."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


# --- the unsharded model --------------------------------------------------------------------------


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer under all of their names."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def computed_as(model: nn.Module, policy: MixedPrecisionPolicy) -> nn.Module:
    """The model as a policy computes it on one device; its parameters are the model's own.

    Routers are computed as the rest is (``precision.convert``).
    """
    return _ComputedAs(model, policy)


class _ComputedAs(nn.Module):
    def __init__(self, model: nn.Module, policy: MixedPrecisionPolicy):
        super().__init__()
        self._modules, self._parameters = model._modules, model._parameters
        self._buffers = model._buffers
        self._policy = policy
        self._inside = [convert(copy.deepcopy(model), policy)]  # in a list: its state is not ours

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cast = {n: p.to(self._policy.computed_in(p.dtype)) for n, p in self.named_parameters()}
        state = cast | dict(self.named_buffers())
        return torch.func.functional_call(self._inside[0], state, args, kwargs)


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """In what each parameter is held, under all of its names: the ``masters`` of ``sharded``."""
    return {n: p.dtype for n, p in model.named_parameters(remove_duplicate=False)}


def eager_step(model: nn.Module, batch: Batch, loss_fn: LossFunction = None) -> Step:
    """The step of the user's own model, on one device, through eager autograd.

    A parameter that eager autograd leaves without a gradient has a gradient of zeros here, as it
    has in a graph (an expert that no token chose).
    """
    model.zero_grad(set_to_none=True)
    loss, _ = call(model, batch, loss_fn)
    loss.backward()
    named = model.named_parameters(remove_duplicate=False)
    gradients = {n: _gradient(p) for n, p in named if p.requires_grad}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers(remove_duplicate=False)}
    return Step(loss.detach(), gradients, buffers)


def eager_training(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: MakeOptimizer,
    loss_fn: LossFunction = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses and the final weights of a copy of the model after a step on each batch.

    A gradient that eager autograd leaves out is zeros, as in a graph: weight decay and momentum
    then reach an expert that no token chose.
    """
    model = copy.deepcopy(model)
    update = optimizer(list(model.parameters()))
    losses: list[Tensor] = []
    for batch in batches:
        losses.append(eager_step(model, batch, loss_fn).loss)
        _fill_gradients(model.parameters())
        update.step()
    return losses, whole_state(model)


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()


def _fill_gradients(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = _gradient(parameter)


def unsharded_step(program: Program, whole: Mapping[str, Tensor], batch: Batch) -> Step:
    """The step of a program of level placed or before, on one device."""
    own = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in whole.items()}
    result = evaluate(program, own, batch)
    result.loss.backward()
    gradients: dict[str, Tensor] = {}
    for parameter in program.signature.parameters:
        if parameter.requires_grad:
            for name in state.user_names(parameter):
                gradients |= dict.fromkeys((name, *parameter.aliases), _gradient(own[name]))
    return Step(result.loss.detach(), gradients, {k: v.detach() for k, v in result.buffers.items()})


# --- simulated ranks ------------------------------------------------------------------------------


class SimulatedRanks:
    """All ranks of a local program in one process, each with its own shards.

    ``whole`` has parameters and buffers under the user's names. Every reading of a value that ranks
    must share raises AssertionError where they disagree.
    """

    def __init__(self, program: Program, whole: Mapping[str, Tensor], seed: int = 0):
        assert program.layout is not None
        self.program, self.signature, self.seed = program, program.signature, seed
        self.steps = 0
        self._held: dict[str, Placement] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                placement = roles.placement(node)
                assert placement is not None, f"%{node.name} is not placed"
                stored = placement.expressed_in(program.layout.storage)
                self._held[node.name] = stored or placement
        wholes = {p.name: state.stack(p, whole) for p in self.signature.parameters}
        for buffer in self.signature.buffers:
            new = torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.added else None
            wholes[buffer.name] = whole[buffer.fqn] if new is None else new
        self.ranks = [self._parts(wholes, rank) for rank in range(program.layout.world_size)]
        for own in self.ranks:
            for parameter in self.signature.parameters:
                own[parameter.name].requires_grad_(parameter.requires_grad)

    def _parts(self, wholes: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        return {name: self.part(name, whole, rank) for name, whole in wholes.items()}

    def part(self, name: str, whole: Tensor, rank: int) -> Tensor:
        """What a rank holds of a graph input."""
        return state.own_part(whole, self._held[name], rank).detach().clone()

    def parameters(self, rank: int) -> list[Tensor]:
        """The shards of one rank, for its optimizer."""
        return [self.ranks[rank][p.name] for p in self.signature.parameters]

    def step(self, batch: Batch) -> Step:
        """Forward and backward of every rank on its part of a global batch; buffers are updated."""
        inputs = dict(
            zip(
                [x.name for x in self.signature.inputs],
                inputs_of(self.signature, batch),
                strict=True,
            )
        )
        for own in self.ranks:
            for parameter in self.signature.parameters:
                own[parameter.name].grad = None
        arguments = [own | self._parts(inputs, rank) for rank, own in enumerate(self.ranks)]
        outputs = simulate(self.program, arguments, self.seed, self.steps)
        self.steps += 1
        losses = [own[self.signature.loss] for own in outputs]
        torch.autograd.backward(losses)
        return Step(
            _agreed([x.detach() for x in losses], "the loss"),
            self._gradients(),
            self._updated(outputs),
        )

    def weights(self) -> dict[str, Tensor]:
        """Every parameter, whole, under the user's names."""
        return self._assembled(lambda shard: shard.detach(), trained=False)

    def _gradients(self) -> dict[str, Tensor]:
        return self._assembled(_gradient, trained=True)

    def _assembled(self, of: Callable[[Tensor], Tensor], trained: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for parameter in self.signature.parameters:
            if trained and not parameter.requires_grad:
                continue
            parts = [of(own[parameter.name]) for own in self.ranks]
            whole = _assemble(parts, self._held[parameter.name], parameter.fqn)
            pieces = state.unstack(parameter, whole)
            found |= {name: piece for name, piece in pieces.items() if piece is not None}
        return found

    def _updated(self, outputs: list[list[Any]]) -> dict[str, Tensor]:
        names = {b.fqn: b.name for b in self.signature.buffers}
        updated: dict[str, Tensor] = {}
        for position, output in enumerate(self.signature.outputs):
            if output.buffer is not None:
                values = [own[position].detach() for own in outputs]
                updated[output.buffer] = _agreed(values, f"the buffer {output.buffer}")
                for own, value in zip(self.ranks, values, strict=True):
                    own[names[output.buffer]] = value.clone()
        return updated


class SimulatedSteps:
    """The training step of all ranks of a local program in one process, as ``train_step`` runs it.

    ``optimizer`` makes the optimizer, or several, of one rank from its shards by fully qualified
    name; the other options are those of ``train_step``.
    """

    def __init__(
        self,
        local: Program,
        whole: Mapping[str, Tensor],
        optimizer: Callable[
            [dict[str, Tensor]], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
        ],
        max_norm: float | None = None,
        accumulate: int = 1,
        schedule: Pass | None = None,
        seed: int = 0,
        updates: str = "after",
        state: str | Pass = "device",
        activations: Pass | None = None,
    ):
        assert local.layout is not None
        self.local = local
        self.ranks = SimulatedRanks(local, whole, seed)
        made: list[tuple[int, int, tuple[torch.optim.Optimizer, ...], dict[Tensor, str]]] = []
        for stage in range(local.layout.stages):
            for rank, own in enumerate(self.ranks.ranks):
                owned = [p for p in local.signature.parameters if p.stage == stage]
                shards = {p.fqn: own[p.name] for p in owned}
                names = {shard: name for name, shard in shards.items()}
                update = several(optimizer(shards))
                groups = [group for each in update for group in each.param_groups]
                held = {p: names[p] for group in groups for p in group["params"]}
                made.append((stage, rank, update, held))
        trained = {name for *_, held in made for p, name in held.items() if p.requires_grad}
        sizes = [sizes_of_rank(local, rank) for _, rank, *_ in made]
        shared: dict[Any, dict[Program, Program]] = {own: {} for own in sizes}
        self.steppers = [
            Stepper(
                update,
                held,
                max_norm,
                accumulate,
                schedule,
                rank,
                updates,
                state,
                activations,
                stage,
                trained,
                shared[own],
            )
            for (stage, rank, update, held), own in zip(made, sizes, strict=True)
        ]
        kinds = [(s.stage, own) for s, own in zip(self.steppers, sizes, strict=True)]
        self._like = [kinds.index(own) for own in kinds]

    @property
    def programs(self) -> list[Program]:
        """The step program of each rank; ranks whose parts have the same sizes share one."""
        return [self.steppers[rank].program(self.local) for rank in self._like]

    def step(self, *batches: Batch) -> tuple[Tensor, Tensor | None]:
        """A step of every rank on global micro-batches; returns the loss, and the norm if taken."""
        if self.steppers[0].must_flush:
            self.flush()
        programs = self.programs
        made = self._run(programs, batches)
        self.ranks.steps += 1
        finished = zip(self.steppers, programs, made, strict=True)
        norms = [s.finish(program, own, lambda _, value, __: value) for s, program, own in finished]
        loss = _agreed([own[0][1] for own in made], "the loss")
        taken = [x for x in norms if x is not None]
        return loss, _agreed(taken, "the norm") if taken else None

    def flush(self) -> None:
        """Run the updates that the last step left for the next one, if there are any."""
        if self.steppers[0].pending:
            self._run([self.steppers[rank].unfinished() for rank in self._like], ())
            for stepper in self.steppers:
                stepper.flushed()

    def _run(
        self, programs: Sequence[Program], batches: Sequence[Batch]
    ) -> list[list[tuple[Output, Tensor]]]:
        """Run every rank, and take its new values; returns its other outputs."""
        held = [self._arguments(r, program, batches) for r, program in enumerate(programs)]
        with torch.no_grad():
            outputs = simulate(programs, held, self.ranks.seed, self.ranks.steps)
        made: list[list[tuple[Output, Tensor]]] = []
        for program, values, own in zip(programs, outputs, held, strict=True):
            pairs = list(zip(program.signature.outputs, values, strict=True))
            made.append([(o, x.clone()) for o, x in pairs if o.updates is None])
            for output, value in pairs:
                if output.updates is not None:
                    own[output.updates].detach().copy_(value)
        return made

    def _arguments(
        self, rank: int, program: Program, batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        signature = program.signature
        inputs = [x for batch in batches for x in inputs_of(self.local.signature, batch)]
        of_local = [x.name for x in self.local.signature.inputs] * len(batches)
        at = self.steppers[rank].rank  # in its stage
        parts = [self.ranks.part(name, x, at) for name, x in zip(of_local, inputs, strict=True)]
        states = self.steppers[rank].states(program)
        return {
            **self.ranks.ranks[at],
            **dict(zip([x.name for x in signature.inputs], parts, strict=True)),
            **dict(zip([x.name for x in signature.states], states, strict=True)),
        }

    def weights(self) -> dict[str, Tensor]:
        """Every parameter, whole, under the user's names."""
        self.flush()
        return self.ranks.weights()


def simulated_step(
    program: Program, whole: Mapping[str, Tensor], batch: Batch, seed: int = 0
) -> Step:
    """The step of a local program on simulated ranks, put together from all of them.

    ``whole`` has parameters and buffers under the user's names; ``batch`` is the global batch.
    Raises AssertionError where ranks disagree about a value that they must share.
    """
    return SimulatedRanks(program, whole, seed).step(batch)


def simulated_training(
    program: Program,
    whole: Mapping[str, Tensor],
    batches: Sequence[Batch],
    optimizer: MakeOptimizer,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses and the final weights after a step on each batch, each rank with its optimizer."""
    ranks = SimulatedRanks(program, whole)
    updates = [optimizer(ranks.parameters(rank)) for rank in range(len(ranks.ranks))]
    losses: list[Tensor] = []
    for batch in batches:
        losses.append(ranks.step(batch).loss)
        for rank in range(len(ranks.ranks)):
            _fill_gradients(ranks.parameters(rank))
        for update in updates:
            update.step()
    return losses, ranks.weights()


def _assemble(parts: list[Tensor], placement: Placement, name: str) -> Tensor:
    for axis, kind in zip(placement.view.axes, placement.kinds, strict=True):
        if kind == INVARIANT:
            for group in placement.view.groups(axis.name):
                _agreed([parts[r] for r in group], name)
        else:
            assert isinstance(kind, Shard), f"{name} is stored as {kind}"
    return state.assemble(parts, placement)


def _agreed(values: list[Tensor], what: str) -> Tensor:
    """The value that all ranks share; AssertionError if they do not."""
    for rank, value in enumerate(values):
        alike = torch.allclose(value, values[0], rtol=0, atol=0, equal_nan=True)
        assert alike, f"{what} differs between rank 0 and rank {rank}"
    return values[0]


# --- comparison -----------------------------------------------------------------------------------


def assert_same_step(have: Step, want: Step, tolerance: float | None = None) -> None:
    """Compare loss, every gradient and every updated buffer; AssertionError names the worst.

    Buffers that a pass added are no part of the model: ``want`` lacks them.
    Differences are relative to the largest element of the wanted tensor, or to 1e-3 of the largest
    gradient where a gradient is (nearly) zero.
    """
    limit = tolerance if tolerance is not None else TOLERANCE[want.loss.dtype]
    largest = max((float(g.abs().max()) for g in want.gradients.values() if g.numel()), default=1.0)
    faults = [_difference("loss", have.loss, want.loss, 0.0)]
    for name, gradient in want.gradients.items():
        assert name in have.gradients, f"{name} has no gradient"
        faults.append(_difference(f"gradient of {name}", have.gradients[name], gradient, largest))
    for name in have.buffers.keys() & want.buffers.keys():
        difference = _difference(f"buffer {name}", have.buffers[name], want.buffers[name], 0.0)
        faults.append(difference)
    _report(faults, limit)


def assert_same_weights(
    have: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float | None = None
) -> None:
    """Compare every tensor of ``have`` with the one of that name; AssertionError names the worst.

    Differences are relative to the largest element of the wanted tensor.
    """
    faults = [_difference(name, value, want[name], 0.0) for name, value in have.items()]
    dtype = next(v.dtype for v in want.values() if v.is_floating_point())
    _report(faults, tolerance if tolerance is not None else TOLERANCE[dtype])


def _report(faults: list[tuple[float, str]], limit: float) -> None:
    wrong = sorted((f for f in faults if not f[0] <= limit), reverse=True)
    shown = "\n".join(f"  {what}: off by {error:.2e} relative" for error, what in wrong[:10])
    assert not wrong, (
        f"{len(wrong)} of {len(faults)} values differ by more than {limit:g}:\n{shown}"
    )


def _difference(what: str, have: Tensor, want: Tensor, largest: float) -> tuple[float, str]:
    assert have.shape == want.shape, f"{what} has shape {have.shape}, not {want.shape}"
    if not want.numel():
        return 0.0, what
    have, want = have.to(torch.float64), want.to(torch.float64)
    scale = max(float(want.abs().max()), 1e-3 * largest, 1e-30)
    return float((have - want).abs().max()) / scale, what


def assert_same_function(
    program: Program,
    model: nn.Module,
    batch: Batch,
    tolerance: float | None = None,
    loss_fn: LossFunction = None,
) -> None:
    """Assert that a local program's simulated ranks compute the model's step on a global batch."""
    before = whole_state(model)
    want = eager_step(model, batch, loss_fn)
    have = simulated_step(program, before, batch)
    assert_same_step(have, want, tolerance)


def assert_same_training(
    program: Program,
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: MakeOptimizer,
    tolerance: float | None = None,
) -> None:
    """Assert the same losses and final weights, from an optimizer step on each batch.

    ``optimizer`` makes the optimizer of one rank's shards, and of the whole parameters:

        assert_same_training(program, model, batches, lambda p: torch.optim.AdamW(p, lr=0.01))
    """
    have_losses, have = simulated_training(program, whole_state(model), batches, optimizer)
    want_losses, want = eager_training(model, batches, optimizer)
    limit = tolerance if tolerance is not None else TOLERANCE[want_losses[0].dtype]
    pairs = enumerate(zip(have_losses, want_losses, strict=True), start=1)
    _report([_difference(f"loss of step {n}", a, b, 0.0) for n, (a, b) in pairs], limit)
    assert_same_weights(have, want, tolerance)
