"""The backward of experts that updates parameters while their gradients are in cache.

The gradient of a stack of experts is as large as the parameter. Written by backward and read by the
optimizer, it goes through memory twice, and nothing else needs it. Here the gradient of one expert
is made, that expert's part of the parameter and of its state is updated, and the gradient of the
next expert takes the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from moptrace.kernels.as_one import as_one
from moptrace.kernels.expert_function import (
    SUM_TO,
    ExpertOperator,
    Sink,
    extracted,
    is_sum,
    results_of,
)
from moptrace.kernels.grouped_mm import spans
from moptrace.kernels.selection import choose

__all__ = ["InPlace", "Update", "UpdatingExperts"]

aten, ops = torch.ops.aten, torch.ops.moptrace


@dataclass(frozen=True, eq=False)
class Update:
    """What an optimizer makes of the gradient that is the result number ``result`` of a backward.

    ``graph`` takes the gradient, then as many tensors of its shape as ``parts`` says, then numbers.
    It returns new values of the first of those tensors. It treats every element alike, so that it
    may be run on the parts of one expert.
    """

    result: int
    graph: fx.Graph
    parts: int

    @property
    def operands(self) -> int:
        """The tensors and numbers beside the gradient."""
        return len(self.graph.find_nodes(op="placeholder")) - 1

    @cached_property
    def written(self) -> int:
        """The tensors that get new values."""
        return len(results_of(self.graph))

    @cached_property
    def in_place(self) -> Callable[..., None]:
        """The graph as a function that writes the new values over the old ones."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, copies)
        _, *given = (copies[x] for x in self.graph.find_nodes(op="placeholder"))
        old = {copies[new]: x for new, x in zip(results_of(self.graph), given, strict=False)}
        for node in graph.find_nodes(op="call_function", target=ops.fused_adam.default):
            operands = (node.args[0], *node.args[2])
            picks = list(node.users)
            own = all(old.get(pick) is operands[pick.args[1]] for pick in picks)
            if own and len(picks) == len(operands) and all(len(x.users) == 1 for x in operands):
                node.target = ops.fused_adam_.default
                for pick in picks:
                    del old[pick]
                    graph.erase_node(pick)
        for new, x in old.items():
            graph.call_function(aten.copy_.default, (x, new))
        graph.output(None)
        return fx.GraphModule(torch.nn.Module(), graph)


class UpdatingExperts(ExpertOperator):
    """A backward with updates: ``f(counts, *tensors, *operands of the updates)``, a tuple.

    ``counts`` and ``tensors`` are those of ``backward``. The results are its own, without the
    gradients that ``updates`` take, and then the new values. Those gradients must be sums over each
    expert's rows, as the graph of ``backward`` returns them. ``in_place`` is the same operator, but
    that it writes the new values over the old ones.
    """

    def __init__(self, backward: ExpertOperator, updates: Sequence[Update]):
        name = f"{backward.__name__}_and_update"
        own = backward.constants, backward.operands, backward.rounds
        super().__init__(name, backward.graph, *own)
        self.backward, self.updates = backward, tuple(updates)
        taken = {update.result for update in updates}
        returned = results_of(self.graph)
        self.taken = [returned[update.result] for update in updates]
        assert all(map(is_sum, self.taken))
        self.left = [i for i in range(len(returned)) if i not in taken]
        sizes = [update.operands for update in updates]
        edges = pairwise(accumulate(sizes, initial=1 + len(self.operands)))
        self.spans = [slice(*edge) for edge in edges]

    @cached_property
    def overwrites(self) -> tuple[tuple[int, int], ...]:
        """The operands that get new values, and the numbers of the results that these are."""
        places = [
            span.start + i
            for update, span in zip(self.updates, self.spans, strict=True)
            for i in range(update.written)
        ]
        return tuple(zip(places, range(len(self.left), len(self.left) + len(places)), strict=True))

    @cached_property
    def in_place(self) -> InPlace:
        return InPlace(self)

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        if is_fake(arguments[0]):
            return as_one(self, *arguments)
        values = list(arguments)
        for place, _ in self.overwrites:
            values[place] = values[place].clone()
        return self.in_place(*values)

    def shapes(self, *operands: Any) -> tuple[Tensor, ...]:
        own = super().shapes(*operands[: 1 + len(self.operands)])
        new = (torch.empty_like(operands[place]) for place, _ in self.overwrites)
        return (*(own[i] for i in self.left), *new)

    def only(self, outputs: Sequence[int]) -> tuple[UpdatingExperts, tuple[int, ...]]:
        """Some of the results that are left, and all new values."""
        new = range(len(self.left), len(self.left) + len(self.overwrites))
        assert set(new) <= set(outputs), "an update whose result nobody wants"
        left = [self.left[i] for i in outputs if i not in new]
        wanted = sorted([*left, *(update.result for update in self.updates)])
        backward, taken = self.backward.only(wanted)
        updates = [replace(x, result=wanted.index(x.result)) for x in self.updates]
        states = range(self.spans[0].start, self.spans[-1].stop)
        return UpdatingExperts(backward, updates), (*taken, *states)

    @cached_property
    def rows(self) -> Callable[..., tuple[Any, ...]]:
        """All rows at once: the results that are left, then what the other sums are made of."""
        left = [results_of(self.graph)[i] for i in self.left]
        summed = [x for node in self.taken for x in node.args[:-1]]
        inputs = self.graph.find_nodes(op="placeholder")
        graph = extracted(self.graph, inputs, [], [], [*left, *summed])
        return fx.GraphModule(self.constants, graph)

    def run(self, own: Sequence[Tensor], sinks: Sequence[Sink]) -> tuple[Any, ...]:
        """The results that are left; a sink takes each of the others."""
        counts, rows = own[0], own[self.example]
        if choose("expert_function", own[self.typical], rows, counts) == "expertwise":
            return self.expertwise.run(own, dict(zip(self.taken, sinks, strict=True)))
        # The sums come last: nothing reads a parameter once a part of it is new.
        found = iter(self.rows(*own))
        left = tuple(next(found) for _ in self.left)
        for node, sink in zip(self.taken, sinks, strict=True):
            summed = [next(found) for _ in node.args[:-1]]
            for expert, span in enumerate(spans(counts, rows.shape[0])):
                place, count = sink.place(expert), span.stop - span.start
                if count:
                    SUM_TO[node.target](*(x[span] for x in summed), count, place)
                else:
                    place.zero_()
                sink.take(expert)
        return left


class InPlace:
    """An ``UpdatingExperts`` that returns, as new values, the tensors that it wrote them to."""

    def __init__(self, operator: UpdatingExperts):
        self.__name__ = f"{operator.__name__}_"
        self.operator = operator

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        operator = self.operator
        sinks = [
            _Updated(update, arguments[span], node.meta["val"].dtype)
            for update, span, node in zip(
                operator.updates, operator.spans, operator.taken, strict=True
            )
        ]
        left = operator.run(arguments[: 1 + len(operator.operands)], sinks)
        return (*left, *(arguments[place] for place, _ in operator.overwrites))


class _Updated:
    """The sink of a gradient: it updates one expert's parts, all with one piece of memory."""

    def __init__(self, update: Update, operands: Sequence[Any], dtype: torch.dtype):
        parts, self.numbers = operands[: update.parts], operands[update.parts :]
        self.update = update.in_place
        self.parts = [*zip(*(x.unbind() for x in parts), strict=True)]
        self.gradient = parts[0].new_empty(parts[0].shape[1:], dtype=dtype)

    def place(self, expert: int) -> Tensor:
        return self.gradient

    def take(self, expert: int) -> None:
        self.update(self.gradient, *self.parts[expert], *self.numbers)
