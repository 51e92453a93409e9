"""Updates that need whole matrices: found by structure, and computed by one owner of each matrix.

An optimizer's step is recorded on a whole parameter, as one device would run it; of a stack of
experts on one expert's. A rank has a part of it. Most of what an optimizer computes, momentum,
decay, the addition of the update, treats every element alike, and is done on parts. The rules by
which operators are sharded (``rules.py``) say what is not: a product, a norm, an inverse of
something that is split. ``Cut`` finds these nodes, and what lies between them. ``apply`` writes the
update: nodes outside run on parts; what goes into the cut is gathered to the *owner* of the matrix,
which computes it, once; what comes out of it goes back, to each rank its part. Owners are numbers
in the graph (``collectives.py``, ``gather_matrices``), so all ranks have one graph.

So the state that is elementwise, such as momentum, stays sharded, and what is sent is what the
optimizer makes of it: Muon's update in the dtype that it multiplies.

Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; Liu et al.,
Muon is Scalable for LLM Training, 2025, section 2.3 (Distributed Muon).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.collectives import COLLECTIVES
from moptrace.core import Parameter, ancestors, copy_node
from moptrace.costs import operations, products
from moptrace.errors import StepError
from moptrace.joint import Recording, name_of, splice
from moptrace.kernels.matrix_function import MatrixFunction
from moptrace.liveness import is_view
from moptrace.placement import INVARIANT, Axis, Placement, Shard
from moptrace.roles import Component
from moptrace.rules import SIZE_ARGUMENT, operands, rule_for
from moptrace.updates import is_elementwise

__all__ = ["Cut", "Matrix", "Owners", "apply", "matrix_function"]

aten = torch.ops.aten

Position: TypeAlias = "int | tuple[int | None, ...] | None"  # of a split, in each result


@dataclass(frozen=True)
class Matrix:
    """How the ranks hold what an optimizer updates at once: a parameter, or each of its experts.

    ``shape`` is that of one whole matrix (of a parameter of any number of dimensions), ``own``
    that of a rank's part. ``stack`` is how many a rank has of stacked experts, None for a parameter
    of the user's own, and ``most`` how many any rank has. ``splits`` are the axes that split a
    dimension, slowest first, and ``replicas`` those along which ranks have the same.
    """

    shape: tuple[int, ...]
    own: tuple[int, ...]
    stack: int | None
    most: int
    splits: tuple[tuple[Axis, int], ...]
    replicas: tuple[Axis, ...]

    @classmethod
    def of(cls, parameter: Parameter, placement: Placement, own: Sequence[int]) -> Matrix:
        """Of a parameter that is placed so, and of which a rank has a part of this shape."""
        lead = bool(parameter.stacked)
        pairs = list(zip(placement.view.axes, placement.kinds, strict=True))
        groups = math.prod(axis.size for axis in placement.axes_of_dim(0))
        return cls(
            tuple(parameter.shape[lead:]),
            tuple(own[lead:]),
            own[0] if lead else None,
            -(-parameter.shape[0] // groups) if lead else 1,
            tuple(
                (axis, kind.dim - lead)
                for axis, kind in pairs
                if isinstance(kind, Shard) and kind.dim >= lead and axis.size > 1
            ),
            tuple(axis for axis, kind in pairs if kind == INVARIANT and axis.size > 1),
        )


class Cut:
    """Which nodes of a recorded update need whole matrices: ``whole``.

    ``each`` names the inputs of which every expert of a stack has its own, and ``split`` those of
    the parameter's shape. A node needs a whole matrix if no rule lets it run on a rank's part, if
    it lies between two that do, or if it follows from one and from nothing that is split. With
    replicas, ranks divide work that has products of matrices.
    """

    def __init__(
        self, recording: Recording, matrix: Matrix, split: Collection[str], each: Collection[str]
    ):
        self.recording, self.matrix = recording, matrix
        self.nodes = [n for n in recording.graph.nodes if n.op == "call_function"]
        self.inputs = {n.name: n for n in recording.graph.find_nodes(op="placeholder")}
        self.results: tuple[fx.Node, ...] = tuple(recording.graph.output_node().args[0])  # type: ignore
        self.stacks = matrix.stack is not None
        self.each = self._of_each({self.inputs[name] for name in each})
        heavy = any(products(node) for node in self.nodes)
        self.replicas = matrix.replicas if heavy else ()
        divided = {dim for _, dim in matrix.splits}
        if self.replicas:
            divided = set(range(len(matrix.shape)))
        self.at: dict[int, dict[fx.Node, Position]] = {}  # where the splits of a dimension are
        self.free: dict[int, set[fx.Node]] = {}  # what may be held in any way: it follows from ...
        self.mixing: dict[int, set[fx.Node]] = {}  # ... nodes that need all of the dimension
        for dim in sorted(divided):
            self._follow(dim, [self.inputs[name] for name in split])
        self.mixed = {dim for dim, nodes in self.mixing.items() if nodes}
        self.whole = self._closed(self._needed())
        self.stages = self._stages() if self.whole else ()

    def _of_each(self, inputs: set[fx.Node]) -> set[fx.Node]:
        """What every expert of a stack has of its own."""
        found = set(inputs) if self.stacks else set[fx.Node]()
        for node in self.nodes if self.stacks else ():
            if self._creates(node) or any(x in found for x in node.all_input_nodes):
                found.add(node)
        return found

    def _creates(self, node: fx.Node) -> bool:
        """Whether a node makes a constant of the parameter's shape, such as zeros for a moment."""
        value, shape = roles.value(node), self.matrix.shape
        makes = _packet(node) in _CREATING and isinstance(value, Tensor)
        return bool(makes and shape and tuple(value.shape) == shape)

    # --- one dimension ---

    def _follow(self, dim: int, split: Sequence[fx.Node]) -> None:
        at: dict[fx.Node, Position] = dict.fromkeys(split, dim)
        free, mixing = set[fx.Node](), set[fx.Node]()
        self.at[dim], self.free[dim], self.mixing[dim] = at, free, mixing
        for node in self.nodes:
            if node.target is operator.getitem:
                source, number = node.args
                assert isinstance(source, fx.Node) and isinstance(number, int)
                if source in at:
                    position = at[source]
                    at[node] = position[number] if isinstance(position, tuple) else position
                elif source in free:
                    free.add(node)
            elif _packet(node) in _CREATING:  # of an operand, if any, only the type matters
                if self._creates(node):
                    at[node] = dim
            elif not any(x in at for x in node.all_input_nodes):
                if any(x in free for x in node.all_input_nodes):
                    free.add(node)
            elif products(node) and any(x in free for x in node.all_input_nodes):
                mixing.add(node)  # to send factors to all ranks would cost more than the product
                free.add(node)
            elif (position := self._position(node, dim)) is not None:
                at[node] = position
            else:
                mixing.add(node)
                free.add(node)

    def _position(self, node: fx.Node, dim: int) -> Position:
        """Where the results of an operator on parts are split; None if it needs all of them."""
        factor, rule = self.factor(node, dim), rule_for(node)
        if factor is None or rule is None:
            return None
        found: list[int | None] = []
        for dims in rule.results:
            if dims.count(factor) != 1:
                return None
            found.append(dims.index(factor))
        return tuple(found) if isinstance(roles.value(node), (tuple, list)) else found[0]

    def factor(self, node: fx.Node, dim: int) -> str | None:
        """What an operator's rule calls the split dimension, if it may stay split there."""
        rule, xs = rule_for(node), operands(node)
        if rule is None or len(xs) != len(rule.operands):
            return None
        at, free = self.at[dim], self.free[dim]
        pairs = list(zip(xs, rule.operands, strict=True))
        named = {dims[at[x]] for x, dims in pairs if x in at}  # type: ignore[index]
        name = named.pop() if len(named) == 1 else None
        if name is None or not rule.splittable(name, 1) or len(re.split("[|.]", name)) > 1:
            return None
        for x, dims in pairs:
            carried = [d for d, text in enumerate(dims) if text and name in re.split("[|.]", text)]
            if not carried:
                continue
            is_alone = len(carried) == 1 and dims[carried[0]] == name
            if not is_alone or not (x in free or at.get(x) == carried[0]):
                return None
        return name

    # --- what is needed whole ---

    def _needed(self) -> set[fx.Node]:
        found = {node for free in self.free.values() for node in free}
        for node in self.nodes:
            if node in self.each and not self._runs_on_stacks(node):
                found.add(node)
        for number, node in enumerate(self.results):
            for dim, at in self.at.items() if node.op == "call_function" else ():
                wanted = dim if number == 0 or self.is_like_parameter(node) else None
                if at.get(node) != wanted and node not in self.free[dim]:
                    found.add(node)
                    self.mixed.add(dim)
        for node in [n for n in found if not _is_tensor(n)]:  # a number is read outside, and inside
            found.remove(node)
            for x in node.all_input_nodes if node in self._reading else ():
                if x.op == "placeholder":
                    raise StepError(
                        f"the optimizer's step reads a number from a parameter or its gradient "
                        f"({node.target}), of which each rank has a part. Compute with tensors."
                    )
                found.add(x)
        return found

    @property
    def _reading(self) -> set[fx.Node]:
        """Nodes that make numbers of what is split."""
        mixing = {node for nodes in self.mixing.values() for node in nodes}
        return {node for node in mixing if not _is_tensor(node)}

    def _runs_on_stacks(self, node: fx.Node) -> bool:
        """Whether an operator on one expert's tensors is the same on those of all, stacked."""
        if node.target is operator.getitem:
            return self._runs_on_stacks(node.all_input_nodes[0])
        if self._creates(node):
            return True
        rank = len(self.matrix.shape)
        own = [roles.value(x) for x in node.all_input_nodes if x in self.each]
        others = [roles.value(x) for x in node.all_input_nodes if x not in self.each]
        alike = all(not isinstance(x, Tensor) or x.dim() == 0 for x in others)
        value = roles.value(node)
        results = value if isinstance(value, (tuple, list)) else [value]
        alike &= all(isinstance(x, Tensor) and x.dim() == rank for x in (*own, *results))
        return alike and is_elementwise(node)

    def _closed(self, needed: set[fx.Node]) -> set[fx.Node]:
        """With what lies between, and views for it alone, which need not be sent beside others."""
        if not needed:
            return needed
        before, after = ancestors(needed), set(needed)
        for node in self.nodes:
            if any(x in after for x in node.all_input_nodes):
                after.add(node)
        found = {n for n in self.nodes if n in before and n in after and _is_tensor(n)}
        for node in reversed(self.nodes):
            if is_view(node) and found.issuperset(node.users):
                found.add(node)
        return found

    def is_like_parameter(self, node: fx.Node) -> bool:
        """Whether an entry of the state is held as the parameter is."""
        of_each = node in self.each if self.stacks else True
        return of_each and tuple(roles.tensor(node).shape) == self.matrix.shape

    # --- how a matrix comes together ---

    def _stages(self) -> tuple[Stage, ...]:
        """First the replicas share the work; then come the slices of the inner axes first."""
        found = [Stage(axis, None, 0, 0) for axis in self.replicas]
        sizes = dict(enumerate(self.matrix.own))
        for at, (axis, dim) in reversed(list(enumerate(self.matrix.splits))):
            if dim in self.mixed:
                outer = math.prod(a.size for a, d in self.matrix.splits[:at] if d == dim)
                length = self.matrix.shape[dim] // outer if outer > 1 else self.matrix.shape[dim]
                found.append(Stage(axis, dim, sizes[dim], length))
                sizes[dim] = length
        return tuple(found)

    def shape(
        self, node: fx.Node, value: Tensor, number: int = 0, inside: bool = False
    ) -> list[int]:
        """The shape of what a rank has of a value: inside the cut of one matrix, outside of all."""
        shape = list(value.shape)
        for dim in {d for _, d in self.matrix.splits}:
            position = self.at[dim].get(node)
            position = position[number] if isinstance(position, tuple) else position
            if position is not None and not (inside and dim in self.mixed):
                shape[position] = self.matrix.own[dim]
        if node in self.each and not inside:
            assert self.matrix.stack is not None
            shape.insert(0, self.matrix.stack)
        return shape

    def layout(self, node: fx.Node, user: fx.Node | None) -> dict[int, int]:
        """How a user outside takes a result of the cut: which dimension is which, of those split.

        The optimizer's results, without a user, are as the parameter is, or whole.
        """
        found: dict[int, int] = {}
        for dim in self.mixed:
            position: Any = self.at[dim].get(node)
            if user is None:
                position = dim if node is self.results[0] or self.is_like_parameter(node) else None
            elif position is None and user in self.at[dim]:
                rule, name = rule_for(user), self.factor(user, dim)
                assert rule is not None
                dims = rule.operands[operands(user).index(node)]
                position = dims.index(name) if name and name in dims else None
            if position is not None:
                found[dim] = position
        return found

    @property
    def cost(self) -> float:
        """The operations on one matrix, to balance owners by."""
        values = pytree.tree_leaves([roles.value(node) for node in self.whole])
        written = sum(x.numel() for x in values if isinstance(x, Tensor))
        return written + sum(operations(node, {}) for node in self.whole)


@dataclass(frozen=True)
class Stage:
    """The axis along which matrices are gathered: of which dimension, from a size to a length.

    Without a dimension, along which the ranks have the same, and each takes those it owns.
    """

    axis: Axis
    dim: int | None
    size: int
    length: int


class Owners:
    """Deals out matrices: each to the rank, along some axes, that has least to do so far."""

    def __init__(self) -> None:
        self._loads: dict[tuple[str, ...], list[float]] = {}

    def choose(self, cut: Cut) -> tuple[int, ...]:
        """The first owner along the axis of each stage; the others of a stack follow in turn."""
        sizes = [stage.axis.size for stage in cut.stages]
        names = tuple(stage.axis.name for stage in cut.stages)
        loads = self._loads.setdefault(names, [0.0] * math.prod(sizes))
        least = min(range(len(loads)), key=loads.__getitem__)
        first = tuple(_digits(least, sizes))
        for number in range(cut.matrix.most):
            place = 0
            turns = zip(first, _digits(number % len(loads), sizes), sizes, strict=True)
            for start, turn, size in reversed(list(turns)):
                place = place * size + (start + turn) % size
            loads[place] += cut.cost
        return first


def _digits(number: int, sizes: Sequence[int]) -> Iterator[int]:
    for size in sizes:
        yield number % size
        number //= size


def apply(
    graph: fx.Graph,
    cut: Cut,
    given: Mapping[str, fx.Node],
    constants: dict[str, Any],
    first: Sequence[int],
    function: MatrixFunction | None,
) -> list[fx.Node]:
    """Write an update to the end of a graph, applied to what a rank has; returns its results.

    ``given`` are the recording's inputs, ``first`` the owners (``Owners``), and ``function`` what
    ``matrix_function`` made of the cut. Without a cut, and on whole parameters, this is ``splice``.
    """
    matrix = cut.matrix
    if matrix.shape == matrix.own and not (cut.stacks or cut.whole):
        return splice(graph, cut.recording, given, constants)
    return _Writer(graph, cut, given, constants, first, function).results()


class _Writer:
    """The walk that writes one update."""

    def __init__(
        self,
        graph: fx.Graph,
        cut: Cut,
        given: Mapping[str, fx.Node],
        constants: dict[str, Any],
        first: Sequence[int],
        function: MatrixFunction | None,
    ):
        self.graph, self.cut, self.constants = graph, cut, constants
        self.first, self.function = first, function
        self.new = {node: given[name] for name, node in cut.inputs.items()}
        self.computed: dict[fx.Node, fx.Node] = {}  # by owners
        self.sent: dict[Any, fx.Node] = {}
        self.likes: list[fx.Node] = []  # of each stage, what says how many matrices there are

    def results(self) -> list[fx.Node]:
        for node in self.cut.nodes:
            if node not in self.cut.whole and _is_tensor(node):
                self._outside(node)
        return [self._taken(node, None) for node in self.cut.results]

    def _taken(self, node: fx.Node, user: fx.Node | None) -> fx.Node:
        """What a user outside of the cut takes of a node."""
        if node in self.cut.whole:
            return self._sent_back(node, self.cut.layout(node, user))
        return self._outside(node)

    def _outside(self, node: fx.Node) -> fx.Node:
        if node in self.new:
            return self.new[node]
        if node.op == "get_attr":
            self.new[node] = _constant(self.graph, node, self.cut.recording, self.constants)
            return self.new[node]
        for x in node.all_input_nodes:
            self._taken(x, node)
        new = copy_node(self.graph, node, lambda x: self._taken(x, node))
        _resize(new, node, self.cut, inside=False)
        self.new[node] = new
        return new

    # --- the cut ---

    def _sent_back(self, node: fx.Node, layout: dict[int, int]) -> fx.Node:
        """A result of the cut, as a rank needs it."""
        key = (node, tuple(sorted(layout.items())))
        if key in self.sent:
            return self.sent[key]
        if not self.computed:
            self._compute()
        x = self.computed[node]
        stages = list(zip(self.cut.stages, self.first, self.likes, strict=True))
        for stage, first, like in reversed(stages):
            shape = [roles.tensor(like).shape[0], *roles.tensor(x).shape[1:]]
            if stage.dim is None or stage.dim not in layout:
                x = self._call("all_gather_matrices", (x, like, stage.axis.name, first), shape)
                continue
            dim = layout[stage.dim] + 1
            shape[dim] = stage.size
            arguments = (x, like, stage.axis.name, dim, first, stage.length)
            x = self._call("scatter_matrices", arguments, shape)
        if not self.cut.stacks:
            x = self._one(aten.squeeze.dim, x, roles.tensor(x).shape[1:])
        self.sent[key] = x
        return x

    def _compute(self) -> None:
        assert self.function is not None
        taken = _operands(self.cut)
        for x in taken:
            self._outside(x)
        own = [self._at_owner(x) if e else self.new[x] for x, e in taken.items()]
        with_results = self.graph.call_function(self.function, tuple(own))
        examples = [roles.tensor(x) for x in own]
        values = self.function.shapes(*examples)
        roles.set_role(with_results, component=Component.OPTIMIZER)
        roles.set_value(with_results, values)
        for number, node in enumerate(_left(self.cut)):
            result = self.graph.call_function(operator.getitem, (with_results, number))
            roles.set_role(result, component=Component.OPTIMIZER)
            roles.set_value(result, values[number])
            self.computed[node] = result

    def _at_owner(self, node: fx.Node) -> fx.Node:
        """The whole matrices that a rank owns."""
        x = self.new[node]
        if not self.cut.stacks:
            x = self._one(aten.unsqueeze.default, x, (1, *roles.tensor(x).shape))
        begins = not self.likes
        for stage, first in zip(self.cut.stages, self.first, strict=True):
            if begins:
                self.likes.append(x)
            count, *shape = roles.tensor(x).shape
            count = -(-count // stage.axis.size)
            position = None if stage.dim is None else self.cut.at[stage.dim].get(node)
            name = stage.axis.name
            if position is None:
                x = self._call("take_matrices", (x, x, name, first), [count, *shape])
                continue
            assert isinstance(position, int)
            shape[position] = stage.length
            arguments = (x, x, name, position + 1, first, stage.length)
            x = self._call("gather_matrices", arguments, [count, *shape])
        return x

    def _call(self, name: str, arguments: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
        return self._made(COLLECTIVES[name].op, arguments, shape)

    def _one(self, target: Any, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A matrix as a stack of one, or back."""
        return self._made(target, (x, 0), shape)

    def _made(self, target: Any, arguments: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
        new = self.graph.call_function(target, arguments)
        roles.set_role(new, component=Component.OPTIMIZER)
        roles.set_value(new, roles.tensor(arguments[0]).new_empty(tuple(shape)))
        return new


def matrix_function(name: str, cut: Cut) -> MatrixFunction:
    """What owners compute of a matrix, as an operator."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    constants: dict[str, Any] = {}
    taken = _operands(cut)
    for node in taken:
        copies[node] = graph.placeholder(node.name)
        shape = cut.shape(node, roles.tensor(node), inside=True)
        roles.set_value(copies[node], _resized(roles.tensor(node), shape))

    def inside(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "get_attr":
            copies[node] = _constant(graph, node, cut.recording, constants)
        elif node not in copies:  # a number, or a node of the cut
            for x in node.all_input_nodes:
                inside(x)
            copies[node] = copy_node(graph, node, inside)
            _resize(copies[node], node, cut, inside=True)
        return copies[node]

    for node in cut.nodes:
        if node in cut.whole:
            inside(node)
    graph.output(tuple(copies[node] for node in _left(cut)))
    return MatrixFunction(name, graph, list(taken.values()), constants)


def _operands(cut: Cut) -> dict[fx.Node, bool]:
    """The tensors that a cut takes, and whether each matrix has its own."""
    taken: dict[fx.Node, bool] = {}
    seen = set[fx.Node]()

    def visit(node: fx.Node) -> None:
        for x in node.all_input_nodes:
            if x in cut.whole or x in seen or x.op == "get_attr":
                continue
            seen.add(x)
            if not _is_tensor(x):
                visit(x)
            elif cut.stacks:
                taken[x] = x in cut.each
            else:
                taken[x] = any(x in at for at in cut.at.values())

    for node in cut.nodes:
        if node in cut.whole:
            visit(node)
    if not any(taken.values()):
        taken[cut.inputs["parameter"]] = True
    return taken


def _left(cut: Cut) -> list[fx.Node]:
    """The nodes of a cut that are used outside, or are results; through numbers, too."""
    used = set(cut.results)
    for node in cut.nodes:
        if node not in cut.whole:
            used.update(node.all_input_nodes)
    return [node for node in cut.nodes if node in cut.whole and node in used]


# --- nodes ----------------------------------------------------------------------------------------

_CREATING = frozenset(SIZE_ARGUMENT) - {aten.view, aten.reshape, aten._unsafe_view, aten.expand}


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node gives tensors, not a number."""
    return isinstance(roles.value(node), (Tensor, tuple, list))


def _resized(value: Tensor, shape: Sequence[int]) -> Tensor:
    return value if tuple(value.shape) == tuple(shape) else value.new_empty(tuple(shape))


def _resize(new: fx.Node, node: fx.Node, cut: Cut, inside: bool) -> None:
    """Give a copied node the sizes of what a rank has."""
    value = roles.value(node)
    if isinstance(value, Tensor):
        shape = cut.shape(node, value, inside=inside)
        at = SIZE_ARGUMENT.get(_packet(node))
        if at is not None and tuple(shape) != tuple(value.shape):
            new.update_arg(at, shape)
        value = _resized(value, shape)
    elif isinstance(value, (tuple, list)):
        shapes = [cut.shape(node, x, i, inside) for i, x in enumerate(value)]
        value = [_resized(x, shape) for x, shape in zip(value, shapes, strict=True)]
    roles.set_value(new, value)


def _constant(
    graph: fx.Graph, node: fx.Node, recording: Recording, constants: dict[str, Any]
) -> fx.Node:
    """A constant of a recording, in a graph with constants of its own."""
    value = recording.constants[str(node.target)]
    new = graph.get_attr(name_of(value, constants))
    roles.copy_role(new, of=node)
    roles.set_value(new, roles.value(node))
    return new
