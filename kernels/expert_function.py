"""The function of all experts as one operator, which runs expert by expert.

An expert's function is a graph of grouped products and of operators that treat each row alone.
Running one node after another over all rows moves every intermediate result through memory. Here
all nodes run on the rows of one expert while these are in cache, forward and backward; only the
rows that go in and come out, and the results of products, exist for all experts at once. (With
few rows for each expert there is nothing to save, and all rows are done at once.)

The graph is differentiated once, when the operator is made. Its backward consists of the same
operators, and so both are of one kind, ``ExpertOperator``: expert by expert on a CPU, on a GPU by
kernels that are written from the graph (``triton_expert_function.py``), and elsewhere all rows at
once, by the grouped kernels. What goes from forward to backward are rows like any others, so the
two are ordinary nodes of a graph that has both.
``moptrace.kernels.reference`` says what the products mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.node import map_arg

from moptrace.core import ancestors, copy_node
from moptrace.fake import fake_mode
from moptrace.kernels import onednn
from moptrace.kernels.as_one import Operator, as_one
from moptrace.kernels.aten_routing import picked
from moptrace.kernels.grouped_mm import ROW_MULTIPLE, spans
from moptrace.kernels.memory_reuse import reuse_memory
from moptrace.kernels.selection import ONEDNN_WIDTH, choose
from moptrace.kernels.triton_expert_function import Tiled

__all__ = [
    "SUM_TO",
    "ExpertFunction",
    "ExpertOperator",
    "Operand",
    "Sink",
    "expert_function",
    "extracted",
    "is_sum",
    "results_of",
]

aten, ops = torch.ops.aten, torch.ops.moptrace

PRODUCT, OUTER = ops.grouped_mm.default, ops.grouped_outer.default
EXPERT_ROWS, GROUP_SUM = ops.expert_rows.default, ops.group_sum.default
TOKEN_ROWS, SUM_ROWS = ops.token_rows.default, ops.sum_rows.default


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that an expert's function takes.

    It has a row for each pair ("rows" [S, *shape]), a part for each expert ("experts"
    [E, *shape]), or is the same for all ("all" [*shape]). Or it has a row for each token ("tokens"
    [N, *shape]), of which the graph makes rows by ``token_rows``: each expert gathers its own, and
    those of all are nowhere.
    """

    kind: Literal["rows", "experts", "all", "tokens"]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class ExpertFunction:
    """An operator ``f(counts, *tensors)`` that gives rows; made by ``expert_function``.

    counts int64 [E], tensors as ``operands`` say -> rows [S, ...], or a tuple of them if the
    function has several results.

    Requires: ``counts`` adds up to S. Ensures: the value and the derivatives of ``graph``, which is
    what the operator means. From forward to backward it keeps its operands and the results of the
    products that the gradients need; everything else is computed again. The gradient of an expert
    without rows is zero. Differentiable twice: the second time through ``graph``.

    ``forward(counts, *tensors)`` gives the results and then what is kept. ``backward(counts,
    *tensors, *kept, *gradients of the results)`` gives the gradients of the operands ``derived``.
    In a graph that has both, as that of a training step, these two are the nodes.
    """

    name: str
    graph: fx.Graph
    operands: tuple[Operand, ...]
    forward: ExpertOperator = field(repr=False)
    backward: ExpertOperator = field(repr=False)
    derived: tuple[int, ...] = field(repr=False)

    @property
    def __name__(self) -> str:  # as fx writes the target of a call
        return self.name

    @cached_property
    def meaning(self) -> Callable[..., tuple[Tensor, ...]]:
        """The graph as a function that runs one operator after another, over all rows."""
        return fx.GraphModule(torch.nn.Module(), self.graph)

    @cached_property
    def results(self) -> int:
        return len(results_of(self.graph))

    def __call__(self, *arguments: Tensor) -> Any:
        if torch.is_grad_enabled() and any(x.requires_grad for x in arguments):
            results = _Differentiable.apply(self, *arguments)
        else:
            results = self.forward.some(range(self.results), arguments)
        return results if self.results > 1 else results[0]


class _Differentiable(torch.autograd.Function):
    """``ExpertFunction`` under autograd."""

    @staticmethod
    def forward(ctx: Any, function: ExpertFunction, *arguments: Tensor) -> tuple[Tensor, ...]:
        found = function.forward(*arguments)
        ctx.function, ctx.count = function, len(arguments)
        ctx.save_for_backward(*arguments, *found[function.results :])
        return found[: function.results]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        function: ExpertFunction = ctx.function
        arguments = ctx.saved_tensors[: ctx.count]
        wanted = [i for i in function.derived if ctx.needs_input_grad[2 + i]]
        if torch.is_grad_enabled():
            with torch.enable_grad():
                results = function.meaning(*arguments)
            leaves = [arguments[1 + i] for i in wanted]
            found = torch.autograd.grad(
                results, leaves, gradients, create_graph=True, allow_unused=True
            )
        else:
            whole = [g.contiguous() for g in gradients]
            outputs = [function.derived.index(i) for i in wanted]
            found = function.backward.some(outputs, [*ctx.saved_tensors, *whole])
        by_place = dict(zip(wanted, found, strict=True))
        return None, None, *(by_place.get(i) for i in range(ctx.count - 1))


# --- deriving -------------------------------------------------------------------------------------


def expert_function(
    graph: fx.Graph, operands: Sequence[Operand], name: str = "expert_function"
) -> ExpertFunction:
    """Make an operator of a graph, and differentiate it.

    The graph's placeholders are the counts, then ``operands``; it returns a tuple of rows.

    Requires: floating results; the graph has grouped products, ``expert_rows`` and operators that
    treat each row alone. Raises ValueError for a graph whose gradients would need more.

    >>> graph = fx.Graph()
    >>> counts, rows, weight = (graph.placeholder(n) for n in ("counts", "rows", "weight"))
    >>> product = graph.call_function(PRODUCT, (rows, weight, counts))
    >>> _ = graph.output((graph.call_function(aten.relu.default, (product,)),))
    >>> float64 = torch.float64
    >>> operands = [Operand("rows", (2,), float64), Operand("experts", (2, 1), float64)]
    >>> f = expert_function(graph, operands)
    >>> weight = torch.tensor([[[1.0], [1.0]], [[-1.0], [0.0]]], dtype=float64)
    >>> f(torch.tensor([2, 1]), torch.ones(3, 2, dtype=float64), weight).flatten().tolist()
    [2.0, 2.0, 0.0]
    """
    joint, constants = _joint(graph, operands)
    results = len(results_of(graph))
    forward, backward, derived = _parted(joint, len(operands), results, _products(graph))
    given = backward.find_nodes(op="placeholder")[1 + len(operands) :]
    between = [Operand("rows", x.meta["val"].shape[1:], x.meta["val"].dtype) for x in given]
    rounds = any(_is_wide(node) for node in forward.nodes if node.target is PRODUCT)
    found = ExpertFunction(
        name,
        graph,
        tuple(operands),
        ExpertOperator(f"{name}_forward", forward, constants, operands, rounds),
        ExpertOperator(f"{name}_backward", backward, constants, [*operands, *between], rounds),
        derived,
    )
    for part in (found.forward, found.backward):
        _ = part.expertwise  # a ValueError now, not when it runs
    return found


# Every layer, every shape of the batch and every plan have experts that do the same.
_joints: dict[Any, tuple[fx.Graph, dict[str, Tensor]]] = {}


def _joint(graph: fx.Graph, operands: Sequence[Operand]) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Results and gradients in one graph, for any number of rows and experts; its constants."""
    name = {node: f"%{at}" for at, node in enumerate(graph.nodes)}
    written = tuple(
        (node.op, node.target, repr(map_arg((node.args, node.kwargs), name.__getitem__)))
        for node in graph.nodes
    )
    key = (written, tuple(operands))
    if key not in _joints:
        _joints[key] = _differentiated(graph, operands)
    return _joints[key]


def _differentiated(
    graph: fx.Graph, operands: Sequence[Operand]
) -> tuple[fx.Graph, dict[str, Tensor]]:
    run = fx.GraphModule(torch.nn.Module(), graph)
    floating = [x.dtype.is_floating_point for x in operands]

    def step(counts: Tensor, *arguments: Tensor) -> list[Tensor | None]:
        given, gradients = arguments[: len(operands)], arguments[len(operands) :]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(f) for x, f in zip(given, floating, strict=True)]
            results = run(counts, *leaves)
        found = iter(
            torch.autograd.grad(
                results, [x for x in leaves if x.requires_grad], gradients, allow_unused=True
            )
        )
        return [*results, *(next(found) if f else None for f in floating)]

    # Autograd makes real tensors of numbers, such as the zero of a clamp's gradient.
    mode = fake_mode(ShapeEnv())
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
    example = torch.empty(11, 5, 7, dtype=torch.int64)
    rows, experts, tokens = mode.from_tensor(example, symbolic_context=free).shape
    first: dict[str, list[Any]] = {
        "rows": [rows], "experts": [experts], "all": [], "tokens": [tokens]
    }  # fmt: skip
    with mode:
        counts = torch.empty(experts, dtype=torch.int64)
        given = [torch.empty(*first[x.kind], *x.shape, dtype=x.dtype) for x in operands]
        gradients = [torch.empty_like(x) for x in run(counts, *given)]
    if not all(x.is_floating_point() for x in gradients):
        raise ValueError("a result of the experts is not of a floating dtype")
    traced = make_fx(step, _allow_non_fake_inputs=True)(counts, *given, *gradients)
    names = [x.name for x in graph.find_nodes(op="placeholder")]
    names += [f"gradient_{i}" for i in range(len(gradients))]
    for node, name in zip(traced.graph.find_nodes(op="placeholder"), names, strict=True):
        node._rename(name)
    constants: dict[str, Tensor] = {}
    for node in list(traced.graph.nodes):
        if node.op == "get_attr":
            constants[node.target] = getattr(traced, node.target)
        elif (same := _as_it_was(node)) is not None:
            node.replace_all_uses_with(same)
    traced.graph.eliminate_dead_code()
    return traced.graph, constants


def _as_it_was(node: fx.Node) -> fx.Node | None:
    """The node whose value this is: autograd leaves detached ones, and transposes of transposes."""
    x: Any = node.args[0] if node.args else None
    if node.target is aten.detach.default:
        return x
    if node.target is aten.transpose.int and x.target is aten.transpose.int:
        dims = ({d % y.meta["val"].dim() for d in y.args[1:]} for y in (node, x))
        if next(dims) == next(dims):
            return x.args[0]
    return None


def _parted(
    joint: fx.Graph, operands: int, results: int, products: int
) -> tuple[fx.Graph, fx.Graph, tuple[int, ...]]:
    """The forward, which also returns the products to keep; and the backward, which takes them.

    The last are the numbers of the operands whose gradients the backward gives.
    """
    inputs = joint.find_nodes(op="placeholder")
    counts, given, gradients = inputs[0], inputs[1 : operands + 1], inputs[operands + 1 :]
    returned = joint.output_node().args[0]
    assert isinstance(returned, (list, tuple))
    # The forward comes first, so the first products are its own.
    of_forward = [n for n in joint.nodes if n.target is PRODUCT][:products]
    derived = tuple(i for i, x in enumerate(returned[results:]) if x is not None)
    wanted = [returned[results + i] for i in derived]
    backward = extracted(joint, [counts, *given], of_forward, gradients, wanted)
    takes = backward.find_nodes(op="placeholder")
    between = slice(operands + 1, operands + 1 + products)
    needed = [bool(node.users) for node in takes[between]]
    for node, is_needed in zip(takes[between], needed, strict=True):
        if not is_needed:
            backward.erase_node(node)
    kept = [node for node, is_needed in zip(of_forward, needed, strict=True) if is_needed]
    forward = extracted(joint, [counts, *given], [], [], [*returned[:results], *kept])
    return forward, backward, derived


def extracted(
    joint: fx.Graph,
    inputs: Sequence[fx.Node],
    kept: Sequence[fx.Node],
    gradients: Sequence[fx.Node],
    returned: Sequence[Any],
) -> fx.Graph:
    """The part of a graph that computes some of its nodes, given others."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in (*inputs, *kept, *gradients):
        new[node] = graph.placeholder(node.name)
        new[node].meta = dict(node.meta)
    for node in joint.nodes:
        is_known = all(x in new for x in node.all_input_nodes)
        if node.op in ("call_function", "get_attr") and node not in new and is_known:
            new[node] = copy_node(graph, node, new.__getitem__)
    graph.output(tuple(new[x] for x in returned))
    graph.eliminate_dead_code()
    return graph


def _products(graph: fx.Graph) -> int:
    return len([node for node in graph.nodes if node.target is PRODUCT])


def results_of(graph: fx.Graph) -> tuple[Any, ...]:
    returned = graph.output_node().args[0]
    assert isinstance(returned, tuple)
    return returned


# --- running --------------------------------------------------------------------------------------


class ExpertOperator(Operator):
    """A graph over the rows of all experts as one operator: ``f(counts, *tensors)``, a tuple.

    ``tensors`` are the graph's other placeholders, as ``operands`` say. With ``rounds``, an
    expert's rows are padded to a round number where oneDNN multiplies them. Not differentiable.
    """

    def __init__(
        self,
        name: str,
        graph: fx.Graph,
        constants: dict[str, Tensor],
        operands: Sequence[Operand],
        rounds: bool,
    ):
        self.__name__ = name
        self.graph, self.constants = graph, constants
        self.operands, self.rounds = tuple(operands), rounds
        kinds = [x.kind for x in operands]
        self.example = 1 + kinds.index("rows")  # an argument that has all rows
        self.typical = 1 + [x.dtype.is_floating_point for x in operands].index(True)
        self._some: dict[tuple[int, ...], tuple[ExpertOperator, tuple[int, ...]]] = {}

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        counts, rows = arguments[0], arguments[self.example]
        if is_fake(counts) and counts.device.type == "cpu":
            return as_one(self, *arguments)
        # Traced for another device, a graph has the grouped kernels one by one.
        chosen = choose("expert_function", arguments[self.typical], rows, counts)
        return getattr(self, chosen)(*arguments)

    def shapes(self, *operands: Tensor) -> tuple[Tensor, ...]:
        # The graph's own shapes have symbols: for the numbers of experts, of rows and of tokens.
        rows = operands[self.example]
        size: dict[str, Any] = {}
        for node, x in zip(self.graph.find_nodes(op="placeholder"), operands, strict=True):
            size |= {str(node.meta["val"].shape[0]): x.shape[0]} if x.dim() else {}
        found: list[Tensor] = []
        for x in (node.meta["val"] for node in results_of(self.graph)):
            shape = [size.get(str(n), n) for n in x.shape]
            found.append(rows.new_empty_strided(shape, x.stride(), dtype=x.dtype))
        return tuple(found)

    @cached_property
    def whole(self) -> Callable[..., tuple[Tensor, ...]]:
        """All rows at once, by the grouped kernels."""
        return fx.GraphModule(self.constants, self.graph)

    @cached_property
    def tiled(self) -> Tiled:
        """All rows at once, by kernels that are written for this graph."""
        rows = self.graph.find_nodes(op="placeholder")[self.example]
        return Tiled(self.__name__, self.graph, rows, self.constants)

    @cached_property
    def expertwise(self) -> _Expertwise:
        """The rows of one expert after another; ValueError if these do not stay apart."""
        return _Expertwise(self)

    @cached_property
    def products(self) -> list[tuple[int, int]]:
        """The products of matrices: of each, the two sizes that are not the number of rows."""
        pairs = (n.args[:2] for n in self.graph.nodes if n.target in (PRODUCT, OUTER))
        return [(a.meta["val"].shape[-1], b.meta["val"].shape[-1]) for a, b in pairs]

    def only(self, outputs: Sequence[int]) -> tuple[ExpertOperator, tuple[int, ...]]:
        key = tuple(outputs)
        if key not in self._some:
            wanted = [results_of(self.graph)[i] for i in key]
            needed, inputs = ancestors(wanted), self.graph.find_nodes(op="placeholder")
            taken = tuple(i for i, x in enumerate(inputs) if i == 0 or x in needed)
            part = extracted(self.graph, [inputs[i] for i in taken], [], [], wanted)
            given = [self.operands[i - 1] for i in taken[1:]]
            operator = ExpertOperator(self.__name__, part, self.constants, given, self.rounds)
            self._some[key] = operator, taken
        return self._some[key]

    def some(self, outputs: Sequence[int], arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Some of the outputs, of the arguments for all."""
        if not outputs:
            return ()
        operator, taken = self.only(outputs)
        return operator(*(arguments[i] for i in taken))


class _Expertwise:
    """A graph cut in three: what depends on no rows, what is done for each expert, and the rest.

    What is done for each expert becomes a function of the expert's rows and of its parts of
    parameters, which writes its results where they belong.
    """

    def __init__(self, operator: ExpertOperator):
        self.rounds, self.constants = operator.rounds, operator.constants
        self.inputs = operator.graph.find_nodes(op="placeholder")
        self.outputs = results_of(operator.graph)
        self.example = operator.example
        self.rows = [
            node
            for node, x in zip(self.inputs[1:], operator.operands, strict=True)
            if x.kind == "rows" and node.users
        ]
        self.tokens = [
            node
            for node, x in zip(self.inputs[1:], operator.operands, strict=True)
            if x.kind == "tokens" and node.users
        ]
        self.before: list[fx.Node] = []
        self.inside: dict[fx.Node, None] = {}
        self.after: dict[fx.Node, None] = {}
        for node in operator.graph.nodes:
            if node.op != "output":
                self._sort(node)
        self.sums = [x for x in self.inside if is_sum(x)]
        wanted = [*self.outputs, *(x for node in self.after for x in node.all_input_nodes)]
        rows = (x for x in wanted if x in self.inside and x.op != "placeholder" and not is_sum(x))
        self.results = list(dict.fromkeys(rows))
        whole = (self.inputs[0], *self.tokens)
        self.parts = [x for x in self.before if any(user in self.inside for user in x.users)]
        self.parts = [x for x in self.parts if x not in whole]
        self.own = self._rows_in_outer_products()
        self._expert = self._written()

    def _sort(self, node: fx.Node) -> None:
        inputs = [x for x in node.all_input_nodes if not _is_constant(x)]
        rows = node in self.rows or any(x in self.inside and not is_sum(x) for x in inputs)
        sums = any(x in self.after or is_sum(x) for x in inputs)
        if node.target is SUM_ROWS:
            self.after[node] = None
            return
        if rows and sums:
            raise ValueError(f"{node.format_node()} takes rows and sums over rows")
        if rows or _is_constant(node):
            self.inside[node] = None
        elif sums:
            self.after[node] = None
        else:
            self.before.append(node)

    def _rows_in_outer_products(self) -> set[fx.Node]:
        """The rows which an outer product takes as they are, or views of them.

        It adds up zeros for padding, so where it takes rows with others after them, they must be a
        copy of their own.
        """
        left = [x for node in self.sums if node.target is OUTER for x in node.all_input_nodes]
        found: set[fx.Node] = set()
        while left:
            node = left.pop()
            if node in self.rows:
                found.add(node)
            elif node.target is not PRODUCT and torch.Tag.pointwise not in _tags(node):
                left += node.all_input_nodes
        return found

    def _written(self) -> Callable[..., None]:
        """One expert's function: of its number of rows, its rows, its parts, and where to write."""
        graph = fx.Graph()
        count = graph.placeholder("count")
        new = {x: graph.placeholder(x.name) for x in self.rows}
        tokens = {x: graph.placeholder(x.name) for x in self.tokens}
        part = {x: graph.placeholder(x.name) for x in self.parts}
        place = {x: graph.placeholder(f"to_{x.name}") for x in (*self.results, *self.sums)}
        written = set[fx.Node]()
        for node in self.inside:
            if node in new:
                continue
            xs: Any = node.args
            if node.target is PRODUCT and node in place:
                is_used = any(user in self.inside for user in node.users)
                write = _multiply_and_keep if is_used else _multiply_to
                args = (new[xs[0]], part[xs[1]], count, place[node])
                new[node] = graph.call_function(write, args)
                written.add(node)
            elif node.target is PRODUCT:
                new[node] = graph.call_function(_multiply, (new[xs[0]], part[xs[1]]))
                new[node].meta = dict(node.meta)
            elif is_sum(node):
                rows = (new[x] for x in xs[:-1])
                graph.call_function(SUM_TO[node.target], (*rows, count, place[node]))
            elif node.target is TOKEN_ROWS:
                new[node] = graph.call_function(picked, (tokens[xs[0]], new[xs[1]], *xs[2:]))
            elif node.target is EXPERT_ROWS:
                new[node] = graph.call_function(_repeat, (part[xs[0]], new[xs[2]]))
            elif any(x in part or x in tokens for x in node.all_input_nodes):
                raise ValueError(f"{node.format_node()} takes the parameters of all experts")
            else:
                new[node] = copy_node(graph, node, new.__getitem__)
        for node in self.results:
            if node not in written:
                graph.call_function(_copy_to, (new[node], count, place[node]))
        graph.output(None)
        reuse_memory(graph, fresh=(_multiply,))
        return fx.GraphModule(self.constants, graph)

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return self.run(arguments, {})

    def run(self, arguments: Sequence[Tensor], sinks: Mapping[fx.Node, Sink]) -> tuple[Any, ...]:
        """The results, without the sums that ``sinks`` take."""
        values: dict[fx.Node, Any] = dict(zip(self.inputs, arguments, strict=True))
        for node in self.before:
            if node.op != "placeholder":
                values[node] = _call(node, values)
        counts = arguments[0]
        like = arguments[self.example]
        total = like.shape[0]
        kept = [x for x in self.sums if x not in sinks]
        for nodes, length in ((self.results, total), (kept, counts.shape[0])):
            for node in nodes:
                values[node] = _new(node, length, like)
        rows = [(values[x], x in self.own) for x in self.rows]
        tokens = [values[x] for x in self.tokens]
        parts = [values[x].unbind() for x in self.parts]
        results = [values[x] for x in self.results]
        sums = [sinks[x] if x in sinks else _Stack(values[x]) for x in self.sums]
        multiple = ROW_MULTIPLE if self.rounds and onednn.is_faster() else 1
        for expert, span in enumerate(spans(counts, total)):
            count = span.stop - span.start
            places = [x.place(expert) for x in sums]
            if count:
                missing = -count % multiple
                taken = [_padded(x, span, missing, own) for x, own in rows]
                own, to = [x[expert] for x in parts], [x[span] for x in results]
                self._expert(count, *taken, *tokens, *own, *to, *places)
            else:
                for place in places:
                    place.zero_()
            for x in sums:
                x.take(expert)
        for node in self.after:
            values[node] = _call(node, values)
        return tuple(values[x] for x in self.outputs if x not in sinks)


class Sink(Protocol):
    """What takes the sums over the rows of each expert, one after another."""

    def place(self, expert: int) -> Tensor:
        """Where an expert's sum is written."""
        ...

    def take(self, expert: int) -> None:
        """Called when it is."""
        ...


class _Stack:
    """Sums that are kept, in one tensor."""

    def __init__(self, whole: Tensor):
        self.parts = whole.unbind()

    def place(self, expert: int) -> Tensor:
        return self.parts[expert]

    def take(self, expert: int) -> None:
        pass


def is_sum(node: fx.Node) -> bool:
    """Whether a node takes rows and gives a part for each expert."""
    return node.target in SUM_TO


def _is_constant(node: fx.Node) -> bool:
    """Whether a node depends on nothing, such as a number that autograd made a tensor of."""
    return node.op != "placeholder" and not node.all_input_nodes


def _is_wide(node: fx.Node) -> bool:
    value = node.meta["val"]
    return value.dtype is torch.float32 and value.shape[1] >= ONEDNN_WIDTH


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _new(node: fx.Node, length: int, like: Tensor) -> Tensor:
    value = node.meta["val"]
    return like.new_empty(length, *value.shape[1:], dtype=value.dtype)


def _tags(node: fx.Node) -> Sequence[torch.Tag]:
    return getattr(node.target, "tags", ())


def _padded(x: Tensor, span: slice, missing: int, own: bool) -> Tensor:
    """The rows of a span and so many after them: the next ones, or zeros in a copy of ``own``."""
    if not missing:
        return x[span]
    count, stop = span.stop - span.start, span.stop + missing
    if not own and stop <= x.shape[0]:
        return x[span.start : stop]
    wide = x.new_empty(count + missing, *x.shape[1:])
    wide[:count] = x[span]
    wide[count:] = 0
    return wide


# What one expert's function is made of. Its rows may have others after them, whose values nobody
# wants: only sums over rows must leave them out.


def _multiply(rows: Tensor, matrix: Tensor) -> Tensor:
    fast = choose("mm", rows, matrix) == "onednn"
    return onednn.multiply(rows, matrix) if fast else torch.mm(rows, matrix)


def _multiply_to(rows: Tensor, matrix: Tensor, count: int, to: Tensor) -> None:
    if choose("mm", rows, matrix) == "onednn":
        to.copy_(onednn.multiply(rows, matrix)[:count])
    else:
        torch.mm(rows[:count], matrix, out=to)


def _multiply_and_keep(rows: Tensor, matrix: Tensor, count: int, to: Tensor) -> Tensor:
    """The product, which is also written where it is kept."""
    if len(rows) == count and choose("mm", rows, matrix) == "torch":
        return torch.mm(rows, matrix, out=to)
    result = _multiply(rows, matrix)
    to.copy_(result[:count])
    return result


def _outer_to(a: Tensor, b: Tensor, count: int, to: Tensor) -> None:
    if choose("mm", a, b) == "onednn":
        a, b = (_without_tail(x, count) for x in (a, b))
        to.copy_(onednn.multiply(a.t(), b))
    else:
        torch.mm(a[:count].t(), b[:count], out=to)


def _without_tail(rows: Tensor, count: int) -> Tensor:
    """The first rows, and zeros after them."""
    if count == rows.shape[0]:
        return rows
    if 0 in rows.stride():  # a parameter, once for each row
        rows = rows.contiguous()
    rows[count:] = 0
    return rows


def _sum_to(rows: Tensor, count: int, to: Tensor) -> None:
    torch.sum(rows[:count], 0, out=to)


# Sums over rows: of operands that are rows, of how many of them, and where to.
SUM_TO: dict[Any, Callable[..., None]] = {OUTER: _outer_to, GROUP_SUM: _sum_to}


def _repeat(part: Tensor, rows: Tensor) -> Tensor:
    return part.expand(rows.shape[0], *part.shape)


def _copy_to(rows: Tensor, count: int, to: Tensor) -> None:
    to.copy_(rows[:count])
