"""Scale gradients down to a global norm in which each element counts once."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.collectives import COLLECTIVES
from moptrace.core import Level, Output, Pass, Program
from moptrace.errors import PassError
from moptrace.joint import Tape, record, splice
from moptrace.placement import Shard
from moptrace.roles import Component, Role
from moptrace.stages import share

__all__ = ["NORM", "clip_gradients"]

NORM = "grad_norm"  # the path of the output
_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


def clip_gradients(max_norm: float) -> Pass:
    """Scale all gradients by one factor so that their global 2-norm is at most ``max_norm``.

    A gradient is held as its parameter is. The squares of what the ranks hold are added up over
    the axes that split the parameter, and over no other: a value that ranks hold alike counts once.
    Squares are added in float32 at least. With ``max_norm=inf`` the norm is returned and nothing is
    scaled.

    Requires: ``differentiate``, and gradients among the graph's outputs. Ensures: what
    ``torch.nn.utils.clip_grad_norm_`` gives for the whole gradients; the norm is an output.
    """

    def rewrite(program: Program) -> Program:
        outputs = program.signature.outputs
        places = [i for i, output in enumerate(outputs) if output.gradient is not None]
        if not places:
            raise PassError(f"clip_gradients({max_norm}) found no gradients to clip")
        inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        clipped_ones = [program.signature.parameter(str(outputs[i].gradient)) for i in places]
        held = [(p.stage, _axes(inputs[p.name])) for p in clipped_ones]
        has_stages = program.layout is not None and program.layout.stages > 1

        def clip(tape: Tape, **gradients: Tensor) -> list[Tensor]:
            tape.work_on(Role(Component.CLIPPING))
            with torch.no_grad():
                norm = _norm(list(gradients.values()), held, has_stages)
                if math.isinf(max_norm):
                    return [norm]
                factor = torch.clamp(max_norm / (norm + _EPSILON), max=1.0)
                return [norm, *(g * factor.to(g.dtype) for g in gradients.values())]

        graph, mapping = program.copy_graph()
        results = [mapping[x] for x in program.outputs]
        operands = {f"gradient_{i}": results[i] for i in places}
        examples = {name: roles.tensor(x) for name, x in operands.items()}
        recording = record(clip, examples)
        graph.erase_node(graph.output_node())
        constants = dict(program.constants)
        norm, *clipped = splice(graph, recording, operands, constants)
        for i, gradient in zip(places, clipped, strict=False):
            results[i] = gradient
        graph.output((*results, norm))
        signature = replace(program.signature, outputs=(*outputs, Output(NORM)))
        return program.with_graph(graph, signature=signature, constants=constants)

    options = (("max_norm", max_norm),)
    return Pass("clip_gradients", rewrite, options, (Level.STEP,), needs=("differentiate",))


def _axes(parameter: fx.Node) -> tuple[str, ...]:
    """The axes over which the ranks hold different elements of a parameter."""
    placement = roles.placement(parameter)
    assert placement is not None
    pairs = zip(placement.view.axes, placement.kinds, strict=True)
    return tuple(a.name for a, kind in pairs if isinstance(kind, Shard) and a.size > 1)


def _norm(
    gradients: list[Tensor], held: list[tuple[int, tuple[str, ...]]], has_stages: bool
) -> Tensor:
    totals: dict[int, Tensor] = {}
    for stage, axes in dict.fromkeys(held):
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
            for g, own in zip(gradients, held, strict=True)
            if own == (stage, axes)
        ]
        squares = torch.stack(norms).square().sum()
        for axis in axes:
            squares = COLLECTIVES["all_reduce_invariant"].op(squares, axis)
        totals[stage] = totals[stage] + squares if stage in totals else squares
    first, *others = [share(x, s) if has_stages else x for s, x in sorted(totals.items())]
    for x in others:
        first = first + x
    return first.sqrt()
