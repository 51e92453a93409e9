"""What an optimizer computes of a whole matrix, as one operator over the matrices that a rank owns.

``moptrace.whole_matrices`` cuts it out of the optimizer's recorded step. The owners of matrices are
numbers in a graph that is the same on every rank, so how many matrices come to a rank is known only
when it runs. For each of them the operators of the optimizer run one after another, on the very
matrix that one device would have; a rank without a matrix runs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from moptrace import roles
from moptrace.core import ancestors, copy_node
from moptrace.kernels.as_one import Operator, as_one

__all__ = ["MatrixFunction"]


class MatrixFunction(Operator):
    """``f(*operands)`` over the matrices of a rank: a tuple of stacks, one for each result.

    graph's placeholders [*D], results [*R] -> operands [K, *D] where ``each`` says so, [*D] where
    all matrices share one; results [K, *R].

    Requires: an operand of which each matrix has its own. Ensures: for every matrix what ``graph``
    computes; K may be 0. Not differentiable.
    """

    def __init__(
        self,
        name: str,
        graph: fx.Graph,
        each: Sequence[bool],
        constants: Mapping[str, Any] | None = None,
    ):
        self.__name__ = name
        self.graph, self.each = graph, tuple(each)
        self.constants = dict(constants or {})
        self._modules: dict[torch.device, fx.GraphModule] = {}

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        example = operands[self.each.index(True)]
        if is_fake(example):
            return as_one(self, *operands)
        run = self._module(example.device)
        results: list[tuple[Tensor, ...]] = []
        for number in range(example.shape[0]):
            own = zip(operands, self.each, strict=True)
            results.append(run(*(x[number] if each else x for x, each in own)))
        if not results:
            return tuple(example.new_empty(0, *x.shape, dtype=x.dtype) for x in self.examples)
        return tuple(torch.stack(list(column)) for column in zip(*results, strict=True))

    def shapes(self, *operands: Tensor) -> tuple[Tensor, ...]:
        count = operands[self.each.index(True)].shape[0]
        example = operands[self.each.index(True)]
        return tuple(example.new_empty(count, *x.shape, dtype=x.dtype) for x in self.examples)

    @cached_property
    def examples(self) -> tuple[Tensor, ...]:
        """The shapes and dtypes of one matrix's results."""
        return tuple(roles.tensor(node) for node in self._outputs)

    @property
    def _outputs(self) -> tuple[fx.Node, ...]:
        returned = self.graph.output_node().args[0]
        assert isinstance(returned, tuple)
        return returned  # type: ignore[return-value]

    def only(self, outputs: Sequence[int]) -> tuple[MatrixFunction, tuple[int, ...]]:
        wanted = [self._outputs[i] for i in outputs]
        needed = ancestors(wanted)
        inputs = self.graph.find_nodes(op="placeholder")
        # Some operand must say how many matrices there are.
        number = self.each.index(True)
        taken = tuple(i for i, x in enumerate(inputs) if x in needed or i == number)
        kept = {inputs[i] for i in taken} | needed
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            if node in kept and node.op != "output":
                copies[node] = copy_node(graph, node, copies.__getitem__)
        graph.output(tuple(copies[x] for x in wanted))
        each = [self.each[i] for i in taken]
        return MatrixFunction(self.__name__, graph, each, self.constants), taken

    def _module(self, device: torch.device) -> fx.GraphModule:
        """The graph as a function of one matrix; it was traced on the CPU."""
        if device not in self._modules:
            graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
            for node in self.graph.nodes:
                copies[node] = copy_node(graph, node, copies.__getitem__)
                if "device" in node.kwargs:
                    copies[node].update_kwarg("device", device)
            root = torch.nn.Module()
            for name, constant in self.constants.items():
                setattr(root, name, constant.to(device))
            self._modules[device] = fx.GraphModule(root, graph)
        return self._modules[device]
