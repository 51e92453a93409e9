"""What a mask of attention says, read from how it is made.

Most masks compare positions or document numbers, of the query with the key. Said as a window of
positions and documents, such a mask needs no memory, and what it hides need not be computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.passes.axes import (
    CASTS,
    RESHAPES,
    Axis,
    argument,
    packet,
    permutation,
    reshaped,
    shape,
)

__all__ = ["Seen", "read_mask"]

aten = torch.ops.aten
BATCH, QUERY, KEY = -4, -2, -1  # dimensions of a mask [B, h, S, T], as broadcasting counts them


@dataclass(frozen=True)
class Seen:
    """Which keys each query sees.

    Query i sees keys from i - ``left`` to i + ``right`` (None: all), of its own document in each of
    ``documents`` [B or 1, T], where every mask of ``rest`` allows it.
    """

    left: int | None = None
    right: int | None = None
    documents: tuple[fx.Node, ...] = ()
    rest: tuple[fx.Node, ...] = ()


def read_mask(mask: fx.Node) -> Seen:
    """Read a boolean mask, or one of zeros and -inf; what cannot be read stays in ``rest``."""
    value = roles.tensor(mask)
    reader = _Reader(value.shape[-1])
    terms = reader.boolean(mask) if value.dtype == torch.bool else reader.added(mask)
    equal = [t.of for t in terms if t.of and t.low == t.high == 0 and t.of.batch in (None, BATCH)]
    low, high, rest = -math.inf, math.inf, list[fx.Node]()
    for term in terms:
        if term.of in equal and term.low == term.high:
            continue
        if term.is_window or any(_numbers_runs(document, term.of) for document in equal):
            low, high = max(low, term.low), min(high, term.high)
        else:
            assert term.node is not None
            rest.append(term.node)
    left = None if high == math.inf else int(high)
    right = None if low == -math.inf else int(-low)
    documents = dict.fromkeys(tokens.source for tokens in equal if tokens.source)
    return Seen(left, right, tuple(documents), tuple(dict.fromkeys(rest)))


@dataclass(frozen=True)
class _Tokens:
    """A number for each token, [B or 1, T] or [T]; of ``source`` None its position."""

    source: fx.Node | None
    token: int
    batch: int | None = None

    def moved(self, to: Callable[[int], int]) -> _Tokens:
        return _Tokens(self.source, to(self.token), None if self.batch is None else to(self.batch))


@dataclass(frozen=True)
class _Linear:
    """A sum of numbers of tokens, each with a factor, and of a constant."""

    factors: tuple[tuple[_Tokens, int], ...] = ()
    constant: int = 0

    def plus(self, other: _Linear, times: int = 1) -> _Linear:
        found = dict(self.factors)
        for tokens, factor in other.factors:
            found[tokens] = found.get(tokens, 0) + times * factor
        kept = tuple((tokens, factor) for tokens, factor in found.items() if factor)
        return _Linear(kept, self.constant + times * other.constant)

    def moved(self, to: Callable[[int], int]) -> _Linear:
        return _Linear(tuple((t.moved(to), factor) for t, factor in self.factors), self.constant)


@dataclass(frozen=True)
class _Term:
    """A query sees a key if its number minus the key's lies from ``low`` to ``high``.

    Numbers are positions where there is no ``node``. Else the term is part of what that mask says;
    of which numbers it speaks is not known if ``of`` is None.
    """

    of: _Tokens | None
    low: float
    high: float
    node: fx.Node | None = None

    @property
    def is_window(self) -> bool:
        return self.node is None

    def seen_from(self, node: fx.Node) -> _Term:
        """The same term of a mask that has other dimensions of size 1."""
        to = _moves(node)
        if self.is_window or to is None or all(old == new for old, new in to.items()):
            return self
        of = self.of.moved(lambda d: to.get(d, d)) if self.of else None
        return _Term(of, self.low, self.high, node)


Terms = tuple[_Term, ...]  # all of them hold
_COMPARISONS: dict[Any, tuple[float, float]] = {  # the difference of both sides, of whole numbers
    aten.le: (-math.inf, 0),
    aten.lt: (-math.inf, -1),
    aten.ge: (0, math.inf),
    aten.gt: (1, math.inf),
    aten.eq: (0, 0),
}
_AND = {aten.__and__, aten.bitwise_and, aten.logical_and}
_NOT = {aten.bitwise_not, aten.logical_not}
_SAME = {*CASTS, aten.expand}
_FILLS = {
    **dict.fromkeys((aten.ones, aten.ones_like, aten.new_ones), 1.0),
    **dict.fromkeys((aten.zeros, aten.zeros_like, aten.new_zeros), 0.0),
}


class _Reader:
    """Reads nodes of a graph whose sequences have ``tokens`` tokens."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    # --- masks ---

    def boolean(self, node: fx.Node) -> Terms:
        found = self._boolean(node)
        return (_Term(None, 0, 0, node),) if found is None else found

    def _boolean(self, node: fx.Node) -> Terms | None:
        kind = packet(node)
        if kind in _AND:
            return tuple(t for side in node.args for t in self.boolean(side))  # type: ignore
        if kind in _NOT:
            return self._unless(node.args[0])  # type: ignore[arg-type]
        if kind in _COMPARISONS:
            return self._compared(node, *_COMPARISONS[kind])
        if kind in (aten.tril, aten.triu):
            return (*self.boolean(node.args[0]), _triangle(node))  # type: ignore[arg-type]
        if (kind in _SAME and _is_bool(node.args[0])) or _adds_dims(node):
            inner = self._boolean(node.args[0])  # type: ignore[arg-type]
            return None if inner is None else tuple(term.seen_from(node) for term in inner)
        return () if _filled(node) == 1 else None

    def _unless(self, node: fx.Node) -> Terms | None:
        """Where a mask is not."""
        if packet(node) in _NOT:
            return self._boolean(node.args[0])  # type: ignore[arg-type]
        return _opposite(self._boolean(node))

    def added(self, node: fx.Node) -> Terms:
        """A mask of zeros, and of -inf or the lowest number where a key is hidden."""
        hidden = (_Term(None, 0, 0, node),)
        found, lowest = self._added(node)
        if found is None or lowest is None or lowest > torch.finfo(roles.tensor(node).dtype).min:
            return hidden
        seen_self = all((t.is_window or t.of) and t.low <= 0 <= t.high for t in found)
        return found if lowest == -math.inf or seen_self else hidden

    def _added(self, node: fx.Node) -> tuple[Terms | None, float | None]:
        kind, args = packet(node), node.args
        if kind is aten.where and len(args) == 3 and _filled(args[1]) == 0:
            return self._boolean(args[0]), _filled(args[2])  # type: ignore[arg-type]
        if kind is aten.where and len(args) == 3 and _filled(args[2]) == 0:
            return self._unless(args[0]), _filled(args[1])  # type: ignore[arg-type]
        if kind is aten.masked_fill and _filled(args[0]) == 0:
            return self._unless(args[1]), _filled(args[2])  # type: ignore[arg-type]
        if kind in (aten.tril, aten.triu) and (value := _filled(args[0])) is not None:
            return _opposite((_triangle(node),)), value
        if kind in _SAME or _adds_dims(node):
            terms, lowest = self._added(args[0])  # type: ignore[arg-type]
            return None if terms is None else tuple(t.seen_from(node) for t in terms), lowest
        return None, None

    def _compared(self, node: fx.Node, low: float, high: float) -> Terms | None:
        sides = [self._linear(side) for side in node.args[:2]]
        within = isinstance(node.args[0], fx.Node) and packet(node.args[0]) is aten.abs
        if within:
            sides[0] = self._linear(node.args[0].args[0])  # type: ignore[union-attr]
        if sides[0] is None or sides[1] is None:
            return None
        if within:
            if sides[1].factors or low != -math.inf:
                return None
            low, high = -(sides[1].constant + high), sides[1].constant + high
            sides[1] = _Linear()
        apart = sides[0].plus(sides[1], -1)
        factors = {t.token: (t, factor) for t, factor in apart.factors}
        if len(apart.factors) != 2 or set(factors) != {QUERY, KEY}:
            return None
        (query, sign), (key, other) = factors[QUERY], factors[KEY]
        alike = query.source is key.source and query.batch == key.batch
        if not alike or sign + other or abs(sign) != 1:
            return None
        low, high = sorted((sign * (low - apart.constant), sign * (high - apart.constant)))
        if query.source is None:
            return (_Term(None, low, high),)
        return (_Term(_Tokens(query.source, KEY, key.batch), low, high, node),)

    # --- whole numbers ---

    def _linear(self, x: Any) -> _Linear | None:
        if isinstance(x, int):
            return _Linear((), int(x))
        if not isinstance(x, fx.Node) or roles.tensor(x).is_floating_point():
            return None
        return self._sum(x) or self._numbers(x)

    def _sum(self, node: fx.Node) -> _Linear | None:
        """Positions, and what is made of them and of other numbers."""
        kind, args = packet(node), node.args
        if kind is aten.arange and not set(args[2:]) - {1}:
            start = args[0] if len(args) > 1 else 0
            if not isinstance(start, int):
                return None
            return _Linear(((_Tokens(None, -1), 1),) if shape(node) != (1,) else (), start)
        if kind in (aten.add, aten.sub) and not node.kwargs and len(args) == 2:
            one, other = map(self._linear, args)
            sign = 1 if kind is aten.add else -1
            return None if one is None or other is None else one.plus(other, sign)
        if kind is aten.index:
            return self._indexed(*args)
        to = _moves(node)
        inner = self._linear(args[0]) if to is not None else None
        if inner is None or to is None:
            return None
        used = {d for t, _ in inner.factors for d in (t.token, t.batch) if d is not None}
        return inner.moved(to.__getitem__) if used <= set(to) else None

    def _numbers(self, node: fx.Node) -> _Linear | None:
        """Numbers of tokens that are what they are."""
        sizes = shape(node)
        if len(sizes) not in (1, 2) or sizes[-1] != self.tokens:
            return None
        batch = -2 if len(sizes) == 2 and sizes[0] != 1 else None
        return _Linear(((_Tokens(node, -1, batch), 1),))

    def _indexed(self, x: Any, at: Any) -> _Linear | None:
        """``x[batch, token]`` with all positions in order: ``x`` with its dimensions elsewhere."""
        inner, sizes = self._linear(x), shape(x)
        if inner is None or len(at) != len(sizes):
            return None
        to: dict[int, int] = {}
        for dim, (size, index) in enumerate(zip(sizes, at, strict=True)):
            found = self._linear(index)
            if found is None or found.constant or len(found.factors) != 1:
                return None
            ((tokens, factor),) = found.factors
            if tokens.source is not None or factor != 1 or shape(index)[tokens.token] != size:
                return None
            to[dim - len(sizes)] = tokens.token
        return inner.moved(to.__getitem__)


# --- nodes ----------------------------------------------------------------------------------------


def _opposite(terms: Terms | None) -> Terms | None:
    """Where one window is not; None if that is no window."""
    if terms is None or len(terms) != 1 or terms[0].of or terms[0].node:
        return None
    low, high = terms[0].low, terms[0].high
    if low == -math.inf:
        return (_Term(None, high + 1, math.inf),)
    return (_Term(None, -math.inf, low - 1),) if high == math.inf else None


def _triangle(node: fx.Node) -> _Term:
    diagonal = argument(node, 1, "diagonal", 0)  # keys minus queries
    lower = packet(node) is aten.tril
    low, high = (-diagonal, math.inf) if lower else (-math.inf, -diagonal)
    return _Term(None, low, high)


def _filled(x: Any) -> float | None:
    """The number that a tensor is filled with."""
    if isinstance(x, int | float):
        return float(x)
    if not isinstance(x, fx.Node):
        return None
    kind = packet(x)
    if kind in _FILLS:
        return _FILLS[kind]
    if kind in (aten.full, aten.full_like, aten.scalar_tensor):
        return _filled(x.args[0 if kind is aten.scalar_tensor else 1])
    return _filled(x.args[0]) if kind in _SAME or kind in RESHAPES else None


def _is_bool(x: Any) -> bool:
    return isinstance(x, fx.Node) and roles.tensor(x).dtype == torch.bool


def _keeps_numbers(before: fx.Node, after: fx.Node) -> bool:
    """Whether a cast keeps whole numbers as they are."""
    one, other = roles.tensor(before).dtype, roles.tensor(after).dtype
    return one == other or (torch.bool not in (one, other) and one.itemsize <= other.itemsize)


def _adds_dims(node: fx.Node) -> bool:
    """Whether dimensions of size 1 are added or removed before the last two, and nothing else."""
    if packet(node) not in RESHAPES:
        return False
    before, after = shape(node.args[0]), shape(node)  # type: ignore[arg-type]
    same = before[-2:] == after[-2:]
    return same and [n for n in before if n != 1] == [n for n in after if n != 1]


def _moves(node: fx.Node) -> dict[int, int] | None:
    """Where an operator that moves whole dimensions takes them, as broadcasting counts them."""
    kind = packet(node)
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    before, after = shape(node.args[0]), shape(node)
    if kind in CASTS and not _keeps_numbers(node.args[0], node):
        return None
    if kind in _SAME or (kind is aten.slice and before == after):
        return {d: d for d in range(-len(before), 0)}
    if kind in RESHAPES:
        spaces = [() if n == 1 else (Axis("dimension", n, i),) for i, n in enumerate(before)]
        found = reshaped(before, tuple(spaces), after)
        places = enumerate(found or ())
        return {s[0].of - len(before): i - len(after) for i, s in places if len(s) == 1}
    order = permutation(node)
    if order is None:
        return None
    return {old - len(before): new - len(after) for new, old in enumerate(order)}


def _numbers_runs(document: _Tokens, of: _Tokens | None) -> bool:
    """Whether documents are the runs of consecutive values of some numbers.

    Values of one run differ as positions do. Hugging Face's models find the documents that are
    packed into a sequence so: cumsum(diff(position_ids) != 1).
    """
    changes = _operand(_operand(document.source, aten.cumsum, -1), aten.ne, 1)
    x: Any = _operand(changes, aten.diff, 1)
    while isinstance(x, fx.Node) and packet(x) in _SAME:
        x = x.args[0]
    return of is not None and x is of.source


def _operand(node: Any, kind: Any, second: int) -> fx.Node | None:
    """The first operand of a node of this kind, if its second is this number."""
    found = isinstance(node, fx.Node) and packet(node) is kind and node.args[1] == second
    return node.args[0] if found else None  # type: ignore[return-value]
