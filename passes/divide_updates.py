"""Update large parameters part by part."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.core import Level, Pass, Program, ancestors, erase_dead, written
from moptrace.errors import PassError
from moptrace.kernels.blocks import block
from moptrace.roles import Component
from moptrace.updates import PENDING, Update, Updates, is_elementwise

__all__ = ["divide_updates"]

ops = torch.ops.moptrace


def divide_updates(bucket: int, gradients: bool = False) -> Pass:
    """Update parameters with more than ``bucket`` bytes of state part by part.

    A part is a block of the parameter's first dimensions, of the parameter, its gradient and its
    state alike; with ``gradients``, these count as state. The new values of one part are written
    before those of the next are computed. So what an update needs beside the parameter and its
    state is of the size of a part, and passes that bring state to the device, or run updates on the
    host, do so part by part.

    What does not treat every element alike is left in one piece, as is the first step, which makes
    the state.

    Requires: ``apply_optimizer``. Ensures: the same operators on the same values. Raises PassError
    without a byte.
    """
    if bucket < 1:
        raise PassError(f"divide_updates needs a byte of state at least, not {bucket=}")

    def rewrite(program: Program) -> Program:
        return _Division(program, bucket, gradients).program()

    options = (("bucket", bucket), ("gradients", gradients))
    return Pass("divide_updates", rewrite, options, (Level.STEP,), needs=("apply_optimizer",))


Part = tuple[tuple[int, ...], tuple[int, ...]]  # where it starts, and its sizes


def _parts(shape: Sequence[int], most: int) -> Iterator[Part]:
    """Blocks of the first dimensions with so many elements at most, in order.

    >>> list(_parts((4, 3), 6))
    [((0,), (2,)), ((2,), (2,))]
    >>> list(_parts((2, 3), 2))
    [((0, 0), (1, 2)), ((0, 2), (1, 1)), ((1, 0), (1, 2)), ((1, 2), (1, 1))]
    """
    inner = math.prod(shape[1:])
    if inner > most:
        for place in range(shape[0]):
            for starts, sizes in _parts(shape[1:], most):
                yield (place, *starts), (1, *sizes)
        return
    size = most // inner
    for start in range(0, shape[0], size):
        yield (start,), (min(size, shape[0] - start),)


class _Division:
    def __init__(self, program: Program, bucket: int, gradients: bool):
        self.old, self.bucket, self.gradients = program, bucket, gradients
        self.updates = Updates(program)
        self.graph, self.copies = program.copy_graph()
        self.place = {node: at for at, node in enumerate(program.nodes)}
        self.inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        self.parameters = {p.fqn: self.inputs[p.name] for p in program.signature.parameters}
        self.state = {
            s.parameter: [
                self.inputs[x.name]
                for x in program.signature.states
                if x.parameter == s.parameter and x.shape and not x.path.startswith(PENDING)
            ]
            for s in program.signature.states
        }

    def program(self) -> Program:
        divided = False
        for update in self.updates.updates:
            most = self._most(update)
            if most is not None:
                self._divide(update, list(_parts(self._shape(update), most)))
                divided = True
        if not divided:
            return self.old
        erase_dead(self.graph)
        return self.old.with_graph(self.graph)

    def _shape(self, update: Update) -> tuple[int, ...]:
        return tuple(roles.tensor(self.parameters[update.fqn]).shape)

    def _most(self, update: Update) -> int | None:
        """How many elements of a parameter are updated at once; None for all of them."""
        shape, state = self._shape(update), self.state.get(update.fqn, [])
        taken = {x for node in update.nodes for x in node.all_input_nodes if _is_large(x)}
        given = taken - {*update.nodes, *state, self.parameters[update.fqn]}
        counted = [*state, *(given if self.gradients else ())]
        each = sum(roles.tensor(x).element_size() for x in counted)
        most = self.bucket // max(each, 1)
        outputs = self.updates.outputs[update.fqn]
        if not most or math.prod(shape) <= most or any(written(node) for _, node in outputs):
            return None
        fits = all(self._is_alike(node, shape) for node in (*state, *update.nodes))
        replaces = all(o.updates is not None for o, _ in outputs)
        return most if fits and replaces else None

    def _is_alike(self, node: fx.Node, shape: tuple[int, ...]) -> bool:
        """Whether a node makes numbers of numbers, or each element of elements at its place."""
        if not _is_large(node):
            return not any(map(_is_large, node.all_input_nodes))
        if node.target is operator.getitem:
            return True
        values = pytree.tree_leaves([roles.value(x) for x in (node, *node.all_input_nodes)])
        shapes = {tuple(x.shape) for x in values if isinstance(x, torch.Tensor) and x.dim()}
        return (node.op == "placeholder" or is_elementwise(node)) and shapes == {shape}

    def _divide(self, update: Update, parts: Sequence[Part]) -> None:
        outputs = [(o, x) for o, x in self.updates.outputs[update.fqn] if _is_large(x)]
        needed = ancestors(node for _, node in outputs)
        nodes = [x for x in update.nodes if x in needed and _is_large(x)]
        new = {x: self.copies[self.inputs[o.updates or ""]] for o, x in outputs}
        last = self.copies[max(update.nodes, key=self.place.__getitem__)]
        with self.graph.inserting_before(last.next):
            for starts, sizes in parts:
                made: dict[fx.Node, fx.Node] = {}
                for node in nodes:
                    for x in node.all_input_nodes:
                        if x not in made and _is_large(x):
                            args = (self.copies[x], starts, sizes)
                            made[x] = self._like(node, ops.block.default, args)
                            roles.set_value(made[x], block(roles.tensor(x), starts, sizes))
                    made[node] = self._part(node, made, starts, sizes)
                for _, x in outputs:
                    args = (new[x], made[x], starts)
                    new[x] = self._like(x, ops.write_block.default, args)
                    roles.set_value(new[x], roles.value(x))
        for _, x in outputs:
            self.copies[x].replace_all_uses_with(new[x])

    def _part(
        self,
        node: fx.Node,
        made: Mapping[fx.Node, fx.Node],
        starts: Sequence[int],
        sizes: Sequence[int],
    ) -> fx.Node:
        """What a node computes, of a part of each large operand."""

        def operand(x: fx.Node) -> fx.Node:
            return made[x] if x in made else self.copies[x]

        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        part = self._like(node, node.target, args, kwargs)  # type: ignore[arg-type]
        values = pytree.tree_map(lambda x: block(x, starts, sizes), roles.value(node))
        roles.set_value(part, values)
        return part

    def _like(self, of: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        roles.copy_role(made, of=of, component=Component.OPTIMIZER)
        return made


def _is_large(node: fx.Node) -> bool:
    """Whether a node makes a tensor with dimensions, or several."""
    values = pytree.tree_leaves(roles.value(node))
    return any(isinstance(x, torch.Tensor) and x.dim() for x in values)
