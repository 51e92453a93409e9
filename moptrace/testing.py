"""Compare a program of many ranks with the model it was made from.

For writers of passes too: ``assert_same_function`` runs a local program on simulated ranks and
compares the loss, the gradient of every parameter and the updated buffers with the unsharded model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moptrace import roles, state
from moptrace.core import Program
from moptrace.placement import INVARIANT, Placement, Shard
from moptrace.simulate import simulate
from moptrace.trace import evaluate, inputs_of

__all__ = ["Step", "assert_same_function", "assert_same_step", "eager_step", "simulated_step"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Step:
    """One forward and backward: the loss, every gradient by the user's name, updated buffers."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def eager_step(model: nn.Module, batch: Mapping[str, Any], loss_fn: Any = None) -> Step:
    """The step of the user's own model, on one device, through eager autograd.

    A parameter that eager autograd leaves without a gradient has a gradient of zeros here, as it
    has in a graph (an expert that no token chose).
    """
    model.zero_grad(set_to_none=True)
    if loss_fn is not None:
        from moptrace.trace import call

        loss = call(model, batch, loss_fn)
    else:
        output = model(**batch)
        loss = output if isinstance(output, Tensor) else output[0]
    loss.backward()
    gradients = {n: _gradient(p) for n, p in model.named_parameters(remove_duplicate=False)}
    return Step(loss.detach(), gradients, {n: b.detach() for n, b in model.named_buffers()})


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()


def unsharded_step(program: Program, whole: Mapping[str, Tensor], batch: Any) -> Step:
    """The step of a program of level placed or before, on one device."""
    own = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in whole.items()}
    result = evaluate(program, own, batch)
    result.loss.backward()
    gradients = {
        name: _gradient(own[name])
        for parameter in program.signature.parameters
        for name in state.user_names(parameter)
    }
    return Step(result.loss.detach(), gradients, {k: v.detach() for k, v in result.buffers.items()})


def simulated_step(
    program: Program, whole: Mapping[str, Tensor], batch: Mapping[str, Any], seed: int = 0
) -> Step:
    """The step of a local program on simulated ranks, put together from all of them.

    ``whole`` has parameters and buffers under the user's names; ``batch`` is the global batch.
    Raises AssertionError where ranks disagree about a value that they must share.
    """
    layout, signature = program.layout, program.signature
    assert layout is not None
    placed = {n.name: roles.placement(n) for n in program.graph.nodes if n.op == "placeholder"}
    held = {name: p.expressed_in(layout.experts) for name, p in placed.items() if p is not None}
    wholes = {p.name: state.stack(p, whole) for p in signature.parameters}
    wholes |= {b.name: whole[b.fqn] for b in signature.buffers}
    wholes |= dict(
        zip([x.name for x in signature.inputs], inputs_of(signature, batch), strict=True)
    )
    trained = {p.name for p in signature.parameters if p.requires_grad}
    arguments: list[dict[str, Tensor]] = []
    for rank in range(layout.world_size):
        own = {n: _part(wholes[n], held[n], rank).detach().clone() for n in signature.names}
        for name in trained:
            own[name].requires_grad_()
        arguments.append(own)
    outputs = simulate(program, arguments, seed)
    losses = [own[signature.loss] for own in outputs]
    torch.autograd.backward(losses)
    gradients: dict[str, Tensor] = {}
    for parameter in signature.parameters:
        if parameter.requires_grad:
            parts = [_gradient(own[parameter.name]) for own in arguments]
            gradient = _assembled(parts, held[parameter.name], parameter.fqn)
            gradients.update(
                {k: v for k, v in state.unstack(parameter, gradient).items() if v is not None}
            )
    buffers = {
        o.buffer: _agreed([own[i].detach() for own in outputs], o.buffer)
        for i, o in enumerate(signature.outputs)
        if o.buffer is not None
    }
    return Step(_agreed([x.detach() for x in losses], "the loss"), gradients, buffers)


def _part(whole: Tensor, placement: Placement | None, rank: int) -> Tensor:
    assert placement is not None
    return state.own_part(whole, placement, rank)


def _assembled(parts: list[Tensor], placement: Placement | None, name: str) -> Tensor:
    assert placement is not None
    for axis, kind in zip(placement.view.axes, placement.kinds, strict=True):
        if kind == INVARIANT:
            for group in placement.view.groups(axis.name):
                _agreed([parts[r] for r in group], f"the gradient of {name}")
        else:
            assert isinstance(kind, Shard)
    return state.assemble(parts, placement)


def _agreed(values: list[Tensor], what: str) -> Tensor:
    """The value that all ranks share; AssertionError if they do not."""
    for rank, value in enumerate(values):
        assert torch.equal(value, values[0]), f"{what} differs between rank 0 and rank {rank}"
    return values[0]


def assert_same_step(have: Step, want: Step, tolerance: float | None = None) -> None:
    """Compare loss, every gradient and every updated buffer; AssertionError names the worst.

    Differences are relative to the largest element of the wanted tensor, or to 1e-3 of the largest
    gradient where a gradient is (nearly) zero.
    """
    limit = tolerance if tolerance is not None else TOLERANCE[want.loss.dtype]
    largest = max((float(g.abs().max()) for g in want.gradients.values() if g.numel()), default=1.0)
    faults = [_difference("loss", have.loss, want.loss, 0.0)]
    for name, gradient in want.gradients.items():
        assert name in have.gradients, f"{name} has no gradient"
        faults.append(_difference(f"gradient of {name}", have.gradients[name], gradient, largest))
    for name, buffer in have.buffers.items():
        faults.append(_difference(f"buffer {name}", buffer, want.buffers[name], 0.0))
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
    program: Program, model: nn.Module, batch: Mapping[str, Any], tolerance: float | None = None
) -> None:
    """Assert that a local program's simulated ranks compute the model's step on a global batch."""
    whole = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    before = {k: v.detach().clone() for k, v in whole.items()}
    want = eager_step(model, batch)
    assert_same_step(simulated_step(program, before, batch), want, tolerance)
