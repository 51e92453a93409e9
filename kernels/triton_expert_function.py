"""What an expert computes as a few Triton kernels, which are written from its graph.

The graph of an ``ExpertOperator`` is cut at its products. Where a product's rows are computed from
rows in memory, its kernel computes them as it loads them; and what follows from a product, by
operators that treat each number of a row alone, its kernel computes before anything is written. So
an activation is part of the product before it, its gradient of the product that gives the gradient
of what it made, and only what others read is written. Gate and up that one product gives, end to
end or in turns, are two sums of one kernel, as are products of the same rows. A sum over a row (the
gradient of a router's weight) is taken in parts, one for each block of columns, which are then
added in order. What is no part of such a kernel stays what it was: a product with nothing around it
is an operator of its own, which ``moptrace.kernels.selection`` gives to whoever is fastest.

Numbers between a load and a store are float32 and are rounded once, when they are stored.
``ExpertOperator.tiled.source`` is the text of all kernels.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# Triton has no types, and is not there on every machine.

from __future__ import annotations

import hashlib
import linecache
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import is_fake

from moptrace.core import ancestors, copy_node
from moptrace.kernels.as_one import Operator, as_one
from moptrace.kernels.row_expressions import (
    EXPERT_ROWS,
    FLOATS,
    REPEATED,
    TOKEN_ROWS,
    Columns,
    Cut,
    Expression,
    Leaf,
    Literal,
    Reader,
    Unreadable,
    leaves_of,
    width_of,
)
from moptrace.kernels.triton_grouped_mm import outer_sizes, power_of_two, row_tiles, tile_sizes
from moptrace.kernels.triton_jit import ceil

__all__ = ["RowKernel", "Tiled"]

aten, ops = torch.ops.aten, torch.ops.moptrace

PRODUCT, OUTER = ops.grouped_mm.default, ops.grouped_outer.default
ROW_SUM = aten.sum.dim_IntList

# Sums of one kernel: more would not fit into registers.
_SUMS = 4


# --- what kernels there are -----------------------------------------------------------------------


class Result(NamedTuple):
    """What a kernel writes: of which node, and the expression of each of its columns' pieces."""

    node: fx.Node
    pieces: tuple[tuple[Columns, Expression], ...]

    @property
    def is_sum(self) -> bool:
        """Whether it is the sum of an expression over the columns."""
        return self.node.target is ROW_SUM

    @property
    def leaves(self) -> dict[Leaf, None]:
        return dict.fromkeys(x for _, expression in self.pieces for x in leaves_of(expression))


@dataclass(frozen=True, eq=False)
class _Group:
    """Products of the same rows, and the nodes that are computed before anything is written."""

    products: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def with_(self, result: fx.Node, *others: _Group) -> _Group:
        groups = (self, *others)
        products = sorted(x for group in groups for x in group.products)
        return _Group(tuple(products), (*(x for g in groups for x in g.results), result))


class Tiled:
    """A graph of products and of operators on rows, with kernels in place of many of its nodes.

    ``graph`` has the placeholders and outputs of the given one. Requires: Triton, where it is run.
    """

    def __init__(self, name: str, graph: fx.Graph, rows: fx.Node, constants: dict[str, Tensor]):
        self.name, self.old, self.constants = name, graph, constants
        self.reader = Reader(graph, rows, constants)
        self.before = {node: ancestors([node]) for node in graph.nodes}
        self.order = {node: at for at, node in enumerate(graph.nodes)}
        self.whole = self._read_as_a_whole()
        self.kernel_of: dict[fx.Node, RowKernel] = {}
        groups = self._groups()
        self.given = {x for group in groups for x in group.results}
        for group in groups:
            self._add(self._products_kernel(group))
        for node in graph.find_nodes(op="call_function", target=OUTER):
            self._add(self._outer_kernel(node))
        for i, kernel in enumerate(self.kernels):
            kernel.__name__ = f"{name}_{i}"
        self.graph = self._written()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return self._run(*arguments)

    @cached_property
    def _run(self) -> Callable[..., tuple[Tensor, ...]]:
        return fx.GraphModule(self.constants, self.graph)

    @property
    def source(self) -> str:
        """The text of all kernels."""
        return "\n\n".join(kernel.source for kernel in self.kernels)

    @property
    def kernels(self) -> list[RowKernel]:
        return list(dict.fromkeys(self.kernel_of.values()))

    def _add(self, kernel: RowKernel | None) -> None:
        if kernel is None:
            return
        before = dict(self.kernel_of)
        self.kernel_of |= dict.fromkeys(kernel.nodes, kernel)
        if not self._is_in_order():
            self.kernel_of = before

    # --- finding them ---

    def _read_as_a_whole(self) -> set[fx.Node]:
        """The rows that products and other operators read as they are, and what is returned."""
        return {
            node
            for node in self.old.nodes
            if node.op == "call_function" and self.reader.has_rows(node)
            if any(x not in self.reader.inline and not self._sums_a_row(x) for x in node.users)
        }

    def _groups(self) -> list[_Group]:
        """The products of each kernel, and what it gives beside them."""
        group_of: dict[fx.Node, _Group] = {}
        for node in self.old.find_nodes(op="call_function", target=PRODUCT):
            if _is_narrow(node):
                group_of[node] = _Group((node,), ())
        results = [x for x in self.old.nodes if self._may_be_result(x)]
        # First what follows from products: then it is known what their kernels read.
        results.sort(key=lambda x: not self._made(x))
        for node in results:
            for group in self._homes(node, group_of):
                if self._can_be_one(group):
                    group_of |= dict.fromkeys(group.products, group)
                    break
        return list(dict.fromkeys(group_of.values()))

    def _may_be_result(self, node: fx.Node) -> bool:
        is_wanted = (
            node in self.whole and node in self.reader.inline and node.target not in REPEATED
        )
        return (is_wanted or self._sums_a_row(node)) and node.meta["val"].dtype in FLOATS

    def _sums_a_row(self, node: fx.Node) -> bool:
        """Whether a node is the sum of an expression over a row."""
        if node.target is not ROW_SUM or node.args[0] not in self.reader.inline:
            return False
        x, dims = node.args[:2]
        value = x.meta["val"]  # type: ignore[union-attr]
        return value.dim() == 2 and dims in ([1], [-1]) and not node.kwargs

    def _made(self, result: fx.Node) -> list[fx.Node]:
        """What a node is computed from that is neither a parameter nor given."""
        leaves = self.reader.leaves(_expressed(result))
        return [x for x in leaves if x.op == "call_function" and x.target not in REPEATED]

    def _homes(self, node: fx.Node, group_of: dict[fx.Node, _Group]) -> Iterator[_Group]:
        """The kernels that might compute a node: that of the last product that it follows from.

        Together with those of other products of the same rows, or else alone. What follows from no
        product may be computed wherever the same is read anyway.
        """
        made = self._made(node)
        if not made:
            leaves = set(self.reader.leaves(_expressed(node)))
            for group in dict.fromkeys(group_of.values()):
                if leaves <= {x for y in group.results for x in self.reader.leaves(_expressed(y))}:
                    yield group.with_(node)
            return
        last = max(made, key=self.order.__getitem__)
        if last in group_of:
            own = group_of[last]
            alike = [x for x in made if x in group_of and _share_rows(x, last)]
            others = dict.fromkeys(group_of[x] for x in alike if group_of[x] is not own)
            yield own.with_(node, *others)
            if others:
                yield own.with_(node)

    def _can_be_one(self, group: _Group) -> bool:
        """Whether nothing that a kernel reads needs what it gives, and all is one tile wide."""
        given = {*group.products, *group.results}
        reads = {x for y in group.results for x in self.reader.leaves(_expressed(y))} - given
        reads |= {x for product in group.products for x in product.all_input_nodes}
        return not any(given & self.before[x] for x in reads) and bool(self._arranged(group))

    def _arranged(self, group: _Group) -> tuple[Result, ...]:
        """What a kernel writes, all in pieces of one width; nothing if there is no such width."""
        try:
            pieces = {x: self.reader.pieces(_expressed(x)) for x in group.results}
            widths = [own.width for found in pieces.values() for own, _ in found]
            width = min(widths, default=width_of(group.products[0]))
            results = [
                Result(x, tuple(y for own, _ in found for y in self._divided(x, own, width)))
                for x, found in pieces.items()
            ]
        except Unreadable:
            return ()
        sums = {x for y in results for x in y.leaves if x.node in group.products}
        for product in group.products:
            if self._is_read_elsewhere(product, group):
                own = [Columns(x.step, x.start, width) for x in sums if x.node is product]
                own = sorted(own) or [Columns(1, 0, width)]
                pieces_ = tuple((x, Leaf(product, x.step, x.start)) for x in own)
                results.append(Result(product, pieces_))
        fits = len(sums) <= _SUMS and all(
            len(x.pieces) == 1 if x.is_sum else _covers(x.pieces, width_of(x.node)) for x in results
        )
        return tuple(results) if fits else ()

    def _is_read_elsewhere(self, product: fx.Node, group: _Group) -> bool:
        """Whether something reads a product that is not computed in its kernel."""
        left, seen = [product], {product, *group.results}
        while left:
            users = [x for x in left.pop().users if x not in seen]
            if any(x in self.whole or x not in self.reader.inline for x in users):
                return True
            seen.update(users)
            left += users
        return False

    def _divided(
        self, result: fx.Node, columns: Columns, width: int
    ) -> list[tuple[Columns, Expression]]:
        """Some columns of a result in pieces of one width."""
        number, rest = divmod(columns.width, width)
        for parts in (columns.blocks(number), columns.every(number)) if not rest else ():
            try:
                return [(x, self.reader.read(_expressed(result), x)) for x in parts]
            except Cut:
                continue
        raise Unreadable

    def _products_kernel(self, group: _Group) -> RowKernel | None:
        read = self._while_loading(group.products[0].args[0])
        if not group.results and _is_there(read):
            return None  # a product with nothing around it
        results = self._arranged(group)
        return RowKernel(results, group.products, (read,)) if results else None

    def _outer_kernel(self, node: fx.Node) -> RowKernel | None:
        read = tuple(map(self._while_loading, node.args[:2]))
        if not _is_narrow(node) or all(map(_is_there, read)):
            return None
        return RowKernel((Result(node, ()),), (node,), read)

    def _while_loading(self, node: Any) -> Expression:
        """The rows that a product takes: computed as they are loaded where they are not there."""
        leaf = Leaf(node, 1, 0)
        others = [x for x in node.users if x not in self.reader.inline]
        is_there = node not in self.reader.inline or node in self.given
        if is_there or any(x.target not in (PRODUCT, OUTER) for x in others):
            return leaf
        try:
            read = self.reader.read(node, Columns(1, 0, width_of(node)))
        except (Cut, Unreadable):
            return leaf
        return read if any(x.node.target is not EXPERT_ROWS for x in leaves_of(read)) else leaf

    # --- writing the graph ---

    def _is_in_order(self) -> bool:
        """Whether no kernel waits for what it gives itself."""
        done, within = set[Any](), set[Any]()

        def visit(node: fx.Node) -> bool:
            unit = self.kernel_of.get(node, node)
            if unit in done:
                return True
            if unit in within:
                return False
            within.add(unit)
            found = all(map(visit, self._taken(node)))
            done.add(unit)
            return found

        return all(map(visit, self.old.nodes))

    def _written(self) -> fx.Graph:
        """The graph with its kernels, in the order in which it had what they give."""
        needed: set[fx.Node] = set()
        left = [self.old.output_node()]
        while left:
            node = left.pop()
            if node not in needed:
                needed.add(node)
                left += self._taken(node)
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.old.find_nodes(op="placeholder"):
            new[node] = copy_node(graph, node)
        for node in self.old.nodes:
            if node in needed and node.op != "output":
                self._write(graph, node, new)
        graph.output(tuple(new[x] for x in self.old.output_node().args[0]))  # type: ignore
        return graph

    def _taken(self, node: fx.Node) -> Sequence[fx.Node]:
        kernel = self.kernel_of.get(node)
        return node.all_input_nodes if kernel is None else kernel.operands

    def _write(self, graph: fx.Graph, node: fx.Node, new: dict[fx.Node, fx.Node]) -> None:
        if node in new:
            return
        for x in self._taken(node):
            self._write(graph, x, new)
        kernel = self.kernel_of.get(node)
        if kernel is None:
            new[node] = copy_node(graph, node, new.__getitem__)
            return
        call = graph.call_function(kernel, tuple(new[x] for x in kernel.operands))
        for at, result in enumerate(kernel.results):
            found = graph.call_function(operator.getitem, (call, at))
            if result.is_sum:
                found = graph.call_function(ROW_SUM, (found, *result.node.args[1:]))
                dtype = result.node.meta["val"].dtype
                if dtype is not torch.float32:
                    found = graph.call_function(aten._to_copy.default, (found,), {"dtype": dtype})
            new[result.node] = found


def _is_narrow(product: fx.Node) -> bool:
    """Whether Triton multiplies these operands."""
    dtypes = {x.meta["val"].dtype for x in product.all_input_nodes[:2]}
    return len(dtypes) == 1 and dtypes <= {*FLOATS}


def _is_there(read: Expression) -> bool:
    """Whether all rows lie in memory as a product takes them."""
    return isinstance(read, Leaf) and read.node.target not in REPEATED


def _share_rows(a: fx.Node, b: fx.Node) -> bool:
    return a.args[0] is b.args[0] and a.args[2] is b.args[2]


def _expressed(result: fx.Node) -> fx.Node:
    """The node whose expression a kernel computes for a result."""
    return result.args[0] if result.target is ROW_SUM else result  # type: ignore[return-value]


def _covers(pieces: Iterable[tuple[Columns, Expression]], width: int) -> bool:
    """Whether every column is in one piece."""
    found = [x.start + x.step * c for x, _ in pieces for c in range(x.width)]
    return sorted(found) == list(range(width))


# --- one of them ----------------------------------------------------------------------------------


class RowKernel(Operator):
    """Products of the same rows, or an outer product, and what is computed around them.

    ``f(counts, *tensors)`` gives ``results``, a sum over the columns as parts [S, blocks] in
    float32; ``operands`` are the nodes whose values it takes. ``read`` is what the products
    multiply: one expression, or the two of an outer product.
    """

    __name__ = "row_kernel"

    def __init__(
        self,
        results: Sequence[Result],
        products: Sequence[fx.Node],
        read: tuple[Expression, ...],
    ):
        self.results, self.read = tuple(results), read
        self.all_products = tuple(products)
        self.is_outer = products[0].target is OUTER
        leaves = list(dict.fromkeys(x for result in results for x in result.leaves))
        self.sums = [x for x in leaves if x.node in products]
        loads = [x for e in read for x in leaves_of(e)] + [x for x in leaves if x not in self.sums]
        # The first operand after the counts has all rows.
        self.gathers = list(dict.fromkeys(_gather(x.node) for x in loads if _is_gathered(x.node)))
        self.rows = list(dict.fromkeys(x.node for x in loads if not _is_part(x)))
        self.parts = list(dict.fromkeys(_parameter(x) for x in loads if _is_part(x)))
        self.weights: list[Any] = list(dict.fromkeys(x.node.args[1] for x in self.sums))
        counts: Any = products[0].args[2]
        orders: list[Any] = [order for order, _ in self.gathers]
        memory: list[Any] = [x.args[0] if _is_gathered(x) else x for x in self.rows]
        self.operands: list[fx.Node] = [counts, *orders, *memory, *self.parts, *self.weights]
        factor = products[0].all_input_nodes[0]
        self.dtype: torch.dtype = factor.meta["val"].dtype
        self.inside = width_of(factor)
        if self.is_outer:
            self.width = width_of(products[0].all_input_nodes[1])
            self.tile = outer_sizes(self.dtype)
        else:
            self.width = results[0].pieces[0][0].width
            self.tile = tile_sizes(self.dtype, len(self.sums))

    @property
    def nodes(self) -> list[fx.Node]:
        return [x.node for x in self.results]

    @property
    def example(self) -> int:
        return 1

    @property
    def products(self) -> list[tuple[int, int]]:
        """The products of matrices: of each, the two sizes that are not the number of rows."""
        return [(self.inside, self.width)] * (1 if self.is_outer else len(self.sums))

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        if is_fake(operands[0]):
            return as_one(self, *operands)
        results = self.shapes(*operands)
        counts, *tensors = operands
        total, experts = operands[1].shape[0], counts.shape[0]
        number = len(tensors) - len(self.weights)
        given = [y for x in tensors[:number] for y in _matrix(x)]
        given += [y for x in tensors[number:] for y in (x, *x.stride())]
        if self.is_outer and experts:
            blocks = ceil(self.inside, self.tile["HEIGHT"]) * ceil(self.width, self.tile["WIDTH"])
            sizes = {**self.tile, "EXPERTS": power_of_two(experts)}
            own = (counts.contiguous(), total, experts, *given, *results)
            _compiled(self.source)[blocks, experts](*own, **sizes)
        elif total and experts:
            tiles = row_tiles(counts, total, self.tile["ROWS"])
            programs = (tiles.shape[1] * self.blocks,)
            _compiled(self.source)[programs](tiles, tiles.shape[1], *given, *results, **self.tile)
        return results

    @property
    def blocks(self) -> int:
        """The blocks of columns."""
        return ceil(self.width, self.tile["COLUMNS"])

    def shapes(self, *operands: Tensor) -> tuple[Tensor, ...]:
        counts, rows = operands[:2]
        if self.is_outer:
            return (rows.new_empty(counts.shape[0], self.inside, self.width, dtype=self.dtype),)
        found: list[Tensor] = []
        for result in self.results:
            value = result.node.meta["val"]
            shape = (self.blocks,) if result.is_sum else value.shape[1:]
            dtype = torch.float32 if result.is_sum else value.dtype
            found.append(rows.new_empty(rows.shape[0], *shape, dtype=dtype))
        return tuple(found)

    def only(self, outputs: Sequence[int]) -> tuple[RowKernel, tuple[int, ...]]:
        results = [self.results[i] for i in outputs]
        part = RowKernel(results, self.all_products, self.read)
        part.__name__, part.tile = self.__name__, self.tile  # which says what a sum's parts are
        return part, tuple(map(self.operands.index, part.operands))

    # --- its text ---

    @cached_property
    def source(self) -> str:
        """The kernel as a module."""
        write = _of_outer if self.is_outer else _of_products
        return _HEADER + "\n".join(write(self)) + "\n"

    def arguments(self) -> list[str]:
        """What the kernel is given of its operands, and where it writes."""
        found: list[str] = []
        for i in range(len(self.gathers)):
            found += [f"o{i}", f"o{i}_step", f"o{i}_column"]
        for i in range(len(self.rows)):
            found += [f"x{i}", f"x{i}_step", f"x{i}_column"]
        for i in range(len(self.parts)):
            found += [f"p{i}", f"p{i}_step", f"p{i}_column"]
        for i in range(len(self.weights)):
            found += [f"w{i}", f"w{i}_step", f"w{i}_row", f"w{i}_column"]
        return [*found, *(f"y{i}" for i in range(len(self.results)))]

    def legend(self) -> Iterator[str]:
        """Which node of the graph every name stands for."""
        orders = [order for order, _ in self.gathers]
        named = (("o", orders), ("x", self.rows), ("p", self.parts), ("w", self.weights))
        for letter, nodes in named:
            for i, node in enumerate(nodes):
                yield f"{letter}{i}: {node.name}"
        for i, result in enumerate(self.results):
            yield f"y{i}: {result.node.name}"


def _matrix(x: Tensor) -> tuple[Tensor, int, int]:
    """Rows as the kernels take them: all dimensions of a row are one."""
    flat = x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)
    return (flat, *flat.stride())  # type: ignore[return-value]


def _is_part(leaf: Leaf) -> bool:
    """Whether what is read are an expert's parameters, and not its rows."""
    return leaf.node.target is EXPERT_ROWS


def _is_gathered(node: fx.Node) -> bool:
    return node.target is TOKEN_ROWS


def _gather(node: fx.Node) -> tuple[fx.Node, int]:
    """The order by which rows are gathered, and how many rows a token has in it."""
    _, order, choices = node.args[:3]
    return order, max(choices, 1)  # type: ignore[return-value,type-var]


def _parameter(leaf: Leaf) -> Any:
    return leaf.node.args[0]


# --- text -----------------------------------------------------------------------------------------

_HEADER = """\
from moptrace.kernels.triton_grouped_mm import place, span_of
from moptrace.kernels.triton_jit import jit, tl
from moptrace.kernels.triton_pointwise import log1p, tanh


"""


@cache
def _compiled(source: str) -> Any:
    """The kernel of a text. Triton, and tracebacks, read the text again as that of a file."""
    file = f"<kernel {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, file, "exec"), module)
    return module["kernel"]


class _Tile:
    """Writes expressions over a tile of rows and columns as lines of a kernel."""

    def __init__(self, kernel: RowKernel, lines: list[str], indent: str, column: str, prefix: str):
        self.kernel, self.lines, self.indent = kernel, lines, indent
        self.column, self.prefix = column, prefix
        self.names: dict[Expression, str] = {}
        self.sums = {x: f"sum{i}" for i, x in enumerate(kernel.sums)}

    def say(self, line: str) -> None:
        self.lines.append(self.indent + line)

    def value(self, expression: Expression) -> str:
        """The name of a float32 tile, or the text of a number."""
        if isinstance(expression, Literal):
            return expression.text
        if isinstance(expression, Leaf) and expression in self.sums:
            return self.sums[expression]
        if expression not in self.names:
            if isinstance(expression, Leaf):
                text = self.load(expression) + ".to(tl.float32)"
            else:
                text = expression.text.format(*map(self.value, expression.operands))
            name = f"{self.prefix}{len(self.names)}"
            self.say(f"{name} = {text}")
            self.names[expression] = name
        return self.names[expression]

    def load(self, leaf: Leaf) -> str:
        """What lies in memory, in its own dtype."""
        if _is_part(leaf):
            name = f"p{self.kernel.parts.index(_parameter(leaf))}"
            place, mask = f"{name} + expert * {name}_step", ""
        else:
            name, row = f"x{self.kernel.rows.index(leaf.node)}", "row"
            if _is_gathered(leaf.node):
                row = f"token{self.kernel.gathers.index(_gather(leaf.node))}"
            place, mask = f"{name} + {row}[:, None] * {name}_step", "is_row[:, None]"
        if _is_part(leaf) or leaf.step:
            mask = " & ".join(filter(None, (mask, f"is_{self.column}[None, :]")))
        if leaf.step:
            place += f" + {self.at(leaf.step, leaf.start)} * {name}_column"
        elif leaf.start:
            place += f" + {leaf.start} * {name}_column"
        return f"tl.load({place}, mask={mask}, other=0.0)"

    def gather(self) -> None:
        """Which token each row is of."""
        for i, (_, choices) in enumerate(self.kernel.gathers):
            divided = f" // {choices}" if choices > 1 else ""
            self.say(f"token{i} = tl.load(o{i} + row * o{i}_step, mask=is_row, other=0){divided}")

    def at(self, step: int, start: int) -> str:
        """Which columns of a node those of the tile are."""
        text = self.column if step == 1 else f"{self.column} * {step}"
        text = f"{text} + {start}" if start else text
        return f"{text}[None, :]" if text == self.column else f"({text})[None, :]"

    def factor(self, expression: Expression, shape: str) -> str:
        """What a product takes; zeros where there is nothing."""
        if isinstance(expression, Leaf) and not _is_part(expression) and expression.step:
            return self.load(expression)
        is_there = f"is_row[:, None] & is_{self.column}[None, :]"
        dtype = str(self.kernel.dtype).removeprefix("torch.")
        # In the dtype in which others would have read it.
        text = f"tl.where({is_there}, {self.value(expression)}, 0.0)"
        return f"tl.broadcast_to({text}, ({shape})).to(tl.{dtype})"


def _of_products(kernel: RowKernel) -> Iterator[str]:
    sizes = ("ROWS", "COLUMNS", "DEPTH")
    yield from _heading(kernel, ["tiles", "number"], sizes)
    lines: list[str] = []
    outer = _Tile(kernel, lines, "    ", "column", "t")
    outer.say(f"tile, block = place(number, {kernel.blocks})")
    outer.say("expert = tl.load(tiles + tile)")
    outer.say("row = tl.load(tiles + number + tile) + tl.arange(0, ROWS)")
    outer.say("stop = tl.load(tiles + 2 * number + tile)")
    outer.say("if stop == 0:")
    outer.say("    return")
    outer.say("is_row = row < stop")
    outer.gather()
    outer.say("column = block * COLUMNS + tl.arange(0, COLUMNS)")
    outer.say(f"is_column = column < {kernel.width}")
    outer.say("is_there = is_row[:, None] & is_column[None, :]")
    if kernel.sums:
        for name in outer.sums.values():
            outer.say(f"{name} = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)")
        outer.say(f"for start in range(0, {kernel.inside}, DEPTH):")
        inner = _Tile(kernel, lines, "        ", "depth", "a")
        inner.say("depth = start + tl.arange(0, DEPTH).to(tl.int64)")
        inner.say(f"is_depth = depth < {kernel.inside}")
        inner.say(f"a = {inner.factor(kernel.read[0], 'ROWS, DEPTH')}")
        for leaf, name in outer.sums.items():
            w = f"w{kernel.weights.index(leaf.node.args[1])}"
            columns = f"{outer.at(leaf.step, leaf.start)} * {w}_column"
            place = f"{w} + expert * {w}_step + depth[:, None] * {w}_row + {columns}"
            inner.say(
                f"b = tl.load({place}, mask=is_depth[:, None] & is_column[None, :], other=0.0)"
            )
            inner.say(f'{name} = tl.dot(a, b, {name}, input_precision="ieee")')
    for i, result in enumerate(kernel.results):
        for columns, expression in result.pieces:
            value = outer.value(expression)
            if result.is_sum:
                value = f"tl.sum(tl.where(is_there, {value}, 0.0), 1)"
                outer.say(f"tl.store(y{i} + row * {kernel.blocks} + block, {value}, mask=is_row)")
                continue
            place = f"y{i} + row[:, None] * {width_of(result.node)} + "
            place += outer.at(columns.step, columns.start)
            outer.say(f"tl.store({place}, {value}, mask=is_there)")
    yield from lines


def _of_outer(kernel: RowKernel) -> Iterator[str]:
    yield from _heading(
        kernel, ["counts", "rows", "experts"], ("EXPERTS", "HEIGHT", "WIDTH", "ROWS")
    )
    lines: list[str] = []
    outer = _Tile(kernel, lines, "    ", "column", "t")
    outer.say("expert = tl.program_id(1).to(tl.int64)")
    outer.say(f"blocks = tl.cdiv({kernel.width}, WIDTH)")
    outer.say("line = (tl.program_id(0) // blocks).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)")
    outer.say("column = (tl.program_id(0) % blocks).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)")
    outer.say(f"is_line = line < {kernel.inside}")
    outer.say(f"is_column = column < {kernel.width}")
    outer.say("first, stop = span_of(counts, expert, rows, experts, EXPERTS)")
    outer.say("total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)")
    outer.say("for start in range(first, stop, ROWS):")
    left = _Tile(kernel, lines, "        ", "line", "a")
    right = _Tile(kernel, lines, "        ", "column", "b")
    left.say("row = start + tl.arange(0, ROWS).to(tl.int64)")
    left.say("is_row = row < stop")
    left.gather()
    left.say(f"a = {left.factor(kernel.read[0], 'ROWS, HEIGHT')}")
    right.say(f"b = {right.factor(kernel.read[1], 'ROWS, WIDTH')}")
    left.say('total = tl.dot(tl.trans(a), b, total, input_precision="ieee")')
    place = f"(expert * {kernel.inside} + line[:, None]) * {kernel.width} + column[None, :]"
    outer.say(f"tl.store(y0 + {place}, total, mask=is_line[:, None] & is_column[None, :])")
    yield from lines


def _heading(kernel: RowKernel, first: list[str], sizes: Sequence[str]) -> Iterator[str]:
    yield "@jit"
    yield "def kernel("
    yield from (f"    {name}," for name in (*first, *kernel.arguments()))
    yield from (f"    {name}: tl.constexpr," for name in sizes)
    yield "):"
    yield f'    """{", ".join(kernel.legend())}."""'
