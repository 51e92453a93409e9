"""What one number of a row is made of, as an expression over numbers in memory.

A kernel has a tile of columns, and computes everything that it computes in terms of these. A slice
of a row, its halves, every other column, a concatenation: none of them moves anything there. Each
only says which column of its operand is read, and so column c of the kernel is column
``step * c + start`` of every node of the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from moptrace.kernels.triton_pointwise import POINTWISE, number

__all__ = ["Apply", "Columns", "Expression", "Leaf", "Literal", "Reader", "leaves_of", "width_of"]

aten, ops = torch.ops.aten, torch.ops.moptrace

EXPERT_ROWS, TOKEN_ROWS = ops.expert_rows.default, ops.token_rows.default
REPEATED = (EXPERT_ROWS, TOKEN_ROWS)  # rows that are read where the one that they repeat lies
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Columns(NamedTuple):
    """Which columns of a node: ``step * c + start`` for c in [0, width)."""

    step: int
    start: int
    width: int

    def then(self, step: int, start: int) -> Columns:
        """The same columns of an operand, of which a node has every ``step``-th from ``start``."""
        return Columns(step * self.step, step * self.start + start, self.width)

    @property
    def stop(self) -> int:
        return self.step * (self.width - 1) + self.start + 1

    def halved(self, at: int) -> tuple[Columns, Columns]:
        """The first so many columns, and the others."""
        rest = self._replace(start=self.start + at * self.step, width=self.width - at)
        return self._replace(width=at), rest

    def blocks(self, number: int) -> tuple[Columns, ...]:
        """The columns in so many blocks, which must divide them."""
        width = self.width // number
        starts = (self.start + self.step * width * i for i in range(number))
        return tuple(Columns(self.step, start, width) for start in starts)

    def every(self, number: int) -> tuple[Columns, ...]:
        """The columns dealt out among so many, which must divide them."""
        step, width = self.step * number, self.width // number
        return tuple(Columns(step, self.start + self.step * i, width) for i in range(number))


@dataclass(frozen=True, slots=True)
class Leaf:
    """Columns of a node that a kernel reads, or of a product that it makes."""

    node: fx.Node
    step: int
    start: int


@dataclass(frozen=True, slots=True)
class Literal:
    text: str


@dataclass(frozen=True, eq=False, slots=True)
class Apply:
    """An operator of ``POINTWISE``; of equal ones, a reader makes one."""

    text: str  # with {0}, {1} for the operands
    operands: tuple[Expression, ...]


Expression = Leaf | Literal | Apply


class Unreadable(Exception):
    """A node has no expression."""


class Cut(Exception):
    """A node has one, but for each of these columns another."""

    def __init__(self, parts: Callable[[Columns], tuple[Columns, ...]]):
        self.parts = parts


def leaves_of(expression: Expression) -> dict[Leaf, None]:
    """What an expression reads, in order."""
    found: dict[Leaf, None] = {}
    seen = {expression}
    left: list[Expression] = [expression]
    while left:
        x = left.pop()
        if isinstance(x, Leaf):
            found[x] = None
        elif isinstance(x, Apply):
            left += [y for y in reversed(x.operands) if y not in seen]
            seen.update(x.operands)
    return found


def width_of(node: fx.Node) -> int:
    """The number of columns of a row, all of its dimensions as one."""
    width = 1
    for size in node.meta["val"].shape[1:]:
        if not isinstance(size, int):
            raise Unreadable
        width *= size
    return width


class Reader:
    """Reads the rows of a graph as expressions.

    ``constants`` are the tensors without dimensions that the graph makes of numbers.
    """

    def __init__(self, graph: fx.Graph, rows: fx.Node, constants: dict[str, Tensor]):
        self.length = str(rows.meta["val"].shape[0])
        self.constants = constants
        self._known: dict[tuple[fx.Node, Columns], Expression] = {}
        self._applied: dict[tuple[str, tuple[Expression, ...]], Apply] = {}
        self.inline: set[fx.Node] = set()
        for node in graph.nodes:
            if self._is_inline(node):
                self.inline.add(node)

    def has_rows(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.dim() > 0 and str(value.shape[0]) == self.length

    def leaves(self, node: fx.Node) -> dict[fx.Node, None]:
        """What a node is computed from: parameters, and rows without an expression."""
        found: dict[fx.Node, None] = {}
        seen, left = {node}, [node]
        while left:
            x = left.pop()
            if x in self.inline and x.target not in REPEATED:
                more = [y for y in x.all_input_nodes if self._has_columns(y) and y not in seen]
                left += reversed(more)
                seen.update(more)
            else:
                found[x] = None
        return found

    def pieces(self, node: fx.Node) -> list[tuple[Columns, Expression]]:
        """The columns of a node, in pieces that have one expression each."""
        return list(self._pieces(node, Columns(1, 0, width_of(node))))

    def read(self, node: fx.Node, columns: Columns) -> Expression:
        """The expression of some columns; raises ``Cut`` if there are several."""
        if (node, columns) not in self._known:
            self._known[node, columns] = self._read(node, columns)
        return self._known[node, columns]

    def _read(self, node: fx.Node, columns: Columns) -> Expression:
        if node not in self.inline:
            return Leaf(node, columns.step, columns.start)
        xs: Any = node.args
        if node.target in REPEATED:
            return Leaf(node, columns.step, columns.start)
        if node.target in _MOVES:
            move = _MOVES[node.target](node)
            assert move is not None, node
            x, step, start = move
            return self.read(x, columns.then(step, start))
        if node.target is aten.cat.default:
            return self._of_cat(xs[0], columns)
        if node.target in _SPREADS:
            return self._of_spread(node, columns)
        return self._of_pointwise(node, columns)

    # --- which nodes have an expression ---

    def _has_columns(self, node: fx.Node) -> bool:
        return self.has_rows(node) or isinstance(node.meta.get("val"), (tuple, list))

    def _is_inline(self, node: fx.Node) -> bool:
        try:
            return node.op == "call_function" and self._is_readable(node)
        except Unreadable:
            return False

    def _is_readable(self, node: fx.Node) -> bool:
        xs: Any = node.args
        if isinstance(node.meta.get("val"), (tuple, list)):
            return node.target in _SPLITS and self.has_rows(xs[0]) and _splits_columns(node)
        if not self.has_rows(node):
            return False
        tensors = [x for x in (node, *node.all_input_nodes) if _is_tensor(x)]
        dtypes = {x.meta["val"].dtype for x in tensors if x is node or x not in self.inline}
        width_of(node)
        if node.target in REPEATED:  # not where some rows are of no token
            return node.meta["val"].dtype in FLOATS and True not in node.args
        own = node.meta["val"].dtype
        if not dtypes - {own} <= {*FLOATS} or own not in (*FLOATS, torch.bool):
            return False
        if node.target in _MOVES:
            return _MOVES[node.target](node) is not None
        if node.target is aten.cat.default:
            dim = node.args[1] if len(node.args) > 1 else 0
            return node.meta["val"].dim() == 2 and dim in (1, -1)
        if node.target in _SPREADS:
            return _SPREADS[node.target](node) is not None
        if node.target not in POINTWISE:
            return False
        self._of_pointwise(node, Columns(1, 0, width_of(node)), probe=True)
        return True

    # --- expressions ---

    def _pieces(self, node: fx.Node, columns: Columns) -> Iterator[tuple[Columns, Expression]]:
        try:
            yield columns, self.read(node, columns)
        except Cut as cut:
            for part in cut.parts(columns):
                yield from self._pieces(node, part)

    def _of_cat(self, parts: Any, columns: Columns) -> Expression:
        first = 0
        for part in parts:
            stop = first + width_of(part)
            if columns.start < stop:
                if columns.stop <= stop:
                    return self.read(part, columns._replace(start=columns.start - first))
                _cut_at(stop, columns)
            first = stop
        raise Unreadable

    def _of_spread(self, node: fx.Node, columns: Columns) -> Expression:
        """The gradient of columns that were taken: these where they were, and zeros."""
        spread = _SPREADS[node.target](node)
        assert spread is not None, node
        grad, start, stop, step = spread
        if columns.width > 1 and columns.step % step:
            if step % columns.step or columns.width % (step // columns.step):
                raise Unreadable
            raise Cut(lambda own: own.every(step // columns.step))
        if (columns.start - start) % step:
            return Literal("0.0")
        for edge in (start, stop):
            if columns.start < edge < columns.stop:
                _cut_at(edge, columns)
        if not start <= columns.start < stop:
            return Literal("0.0")
        first = (columns.start - start) // step
        inner = columns._replace(step=columns.step // step, start=first)
        return self.read(grad, inner)

    def _of_pointwise(self, node: fx.Node, columns: Columns, probe: bool = False) -> Expression:
        operands: list[Expression] = []

        def given(x: Any) -> Any:
            if isinstance(x, fx.Node):
                operands.append(Literal("") if probe else self._operand(node, x, columns))
                if not probe or self._fits(node, x):
                    return f"{{{len(operands) - 1}}}"
                raise Unreadable
            return number(x) if isinstance(x, (int, float)) else x

        args = [given(x) for x in node.args]
        options: dict[str, Any] = {
            key: given(x) if isinstance(x, fx.Node) or key not in ("alpha", "approximate") else x
            for key, x in node.kwargs.items()
            if key
            not in ("dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format")
        }
        text = POINTWISE[node.target](*args, **options)
        if text is None:
            raise Unreadable
        source = node.args[0] if node.args else None
        if node.target is aten._to_copy.default and _dtype(source) is torch.bool:
            text = "tl.where({0}, 1.0, 0.0)"
        if operands and not probe and all(isinstance(x, Literal) for x in operands):
            raise Unreadable  # of numbers alone, which Triton does not take everywhere
        key = text, tuple(operands)
        return self._applied.setdefault(key, Apply(*key))

    def _operand(self, node: fx.Node, x: fx.Node, columns: Columns) -> Expression:
        if not self.has_rows(x):
            return Literal(self._constant(x))
        is_one = width_of(x) == 1 and width_of(node) > 1
        return self.read(x, Columns(0, 0, columns.width) if is_one else columns)

    def _fits(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether an operand is a number, or has a row for each of the node's."""
        if not self.has_rows(x):
            return bool(self._constant(x))
        own, wanted = x.meta["val"].shape[1:], node.meta["val"].shape[1:]
        return width_of(x) == 1 or list(own) == list(wanted)

    def _constant(self, node: fx.Node) -> str:
        """The number that a node is, whatever the rows are."""
        if node.op == "get_attr":
            value = self.constants[str(node.target)]
        elif node.target in _NUMBERS and not node.all_input_nodes:
            value = _NUMBERS[node.target](*node.args)
        else:
            raise Unreadable
        if isinstance(value, Tensor):
            if value.dim():
                raise Unreadable
            value = value.item()
        return number(value)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _dtype(x: Any) -> torch.dtype | None:
    return x.meta["val"].dtype if isinstance(x, fx.Node) and _is_tensor(x) else None


def _cut_at(column: int, columns: Columns) -> None:
    """Cut where the columns reach this one."""
    at = -(-(column - columns.start) // columns.step)
    raise Cut(lambda own: own.halved(at))


# --- nodes that move columns: their operand, and the columns of it that they have ----------------

Move = tuple[fx.Node, int, int]


def _of_slice(node: fx.Node) -> Move | None:
    x, dim, start, stop, step = (*node.args, None, None, None, None)[:5]
    x_: Any = x
    step = 1 if step is None else step
    shape = x_.meta["val"].shape
    start_, stop_ = (None if v is None else v for v in (start, stop))
    if dim not in (1, -1) or len(shape) != 2 or not isinstance(step, int):
        return None
    if not all(isinstance(v, int) for v in (start_, stop_) if v is not None):
        return None
    first, _, _ = slice(start_, stop_).indices(shape[1])
    return x_, step, first


def _of_getitem(node: fx.Node) -> Move | None:
    split, i = node.args
    assert isinstance(split, fx.Node) and isinstance(i, int)
    if split.target not in _SPLITS or not _splits_columns(split):
        return None
    pieces = split.meta["val"]
    start = sum(piece.shape[1] for piece in pieces[:i])
    return split.args[0], 1, start  # type: ignore[return-value]


def _of_view(node: fx.Node) -> Move | None:
    x: Any = node.args[0]
    same = str(x.meta["val"].shape[0]) == str(node.meta["val"].shape[0])
    return (x, 1, 0) if same and width_of(x) == width_of(node) else None


def _of_expand(node: fx.Node) -> Move | None:
    x: Any = node.args[0]
    if not _is_tensor(x) or str(x.meta["val"].shape[0]) != str(node.meta["val"].shape[0]):
        return None
    if width_of(x) == width_of(node):
        return x, 1, 0
    return (x, 0, 0) if width_of(x) == 1 else None


def _of_select(node: fx.Node) -> Move | None:
    """One of the last dimension's, or of the one after the rows."""
    x, dim, i = node.args
    assert isinstance(x, fx.Node) and isinstance(dim, int) and isinstance(i, int)
    sizes = x.meta["val"].shape
    dim, i = dim % len(sizes), i % sizes[dim]
    if dim == len(sizes) - 1 and dim > 0:
        return x, sizes[dim], i
    return (x, 1, i * (width_of(x) // sizes[1])) if dim == 1 else None


_MOVES: dict[Any, Callable[[fx.Node], Move | None]] = {
    aten.slice.Tensor: _of_slice,
    operator.getitem: _of_getitem,
    aten.view.default: _of_view,
    aten.reshape.default: _of_view,
    aten._unsafe_view.default: _of_view,
    aten.unsqueeze.default: _of_view,
    aten.squeeze.dim: _of_view,
    aten.squeeze.dims: _of_view,
    aten.expand.default: _of_expand,
    aten.select.int: _of_select,
}  # type: ignore[assignment]

# Gradients of some columns: they are those from ``start`` to ``stop`` of all, by ``step``.
Spread = tuple[fx.Node, int, int, int]


def _of_slice_backward(node: fx.Node) -> Spread | None:
    grad, _, dim, start, stop, step = node.args
    if node.meta["val"].dim() != 2 or dim not in (1, -1):
        return None
    if not all(isinstance(x, int) for x in (start, stop, step)):
        return None
    return grad, *slice(start, stop, step).indices(width_of(node))  # type: ignore[return-value]


def _of_select_backward(node: fx.Node) -> Spread | None:
    grad, _, dim, i = node.args
    assert isinstance(grad, fx.Node) and isinstance(dim, int) and isinstance(i, int)
    sizes = node.meta["val"].shape
    dim, i = dim % len(sizes), i % sizes[dim]
    if dim == len(sizes) - 1 and dim > 0:
        return grad, i, width_of(node), sizes[dim]
    width = width_of(grad)
    return (grad, i * width, (i + 1) * width, 1) if dim == 1 else None


_SPREADS: dict[Any, Callable[[fx.Node], Spread | None]] = {
    aten.slice_backward.default: _of_slice_backward,
    aten.select_backward.default: _of_select_backward,
}

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


def _splits_columns(node: fx.Node) -> bool:
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return node.args[0].meta["val"].dim() == 2 and dim in (1, -1)  # type: ignore[union-attr]


_NUMBERS: dict[Any, Callable[..., Any]] = {
    aten.scalar_tensor.default: lambda value: value,
    aten.full.default: lambda size, value: value if not size else torch.zeros(1),
    aten.zeros.default: lambda size: 0.0 if not size else torch.zeros(1),
    aten.ones.default: lambda size: 1.0 if not size else torch.zeros(1),
    aten.lift_fresh_copy.default: lambda *_: torch.zeros(1),
}
