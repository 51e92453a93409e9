"""How each operator may be sharded: one small rule per operator.

A rule names, for every dimension of every tensor operand and result, the *factor* that the
dimension carries, as einsum does: ``linear`` is ``"...k, nk -> ...n"``. Splitting a factor over an
axis splits every dimension that carries it. A factor in upper case must stay whole. A factor that
no result carries is summed away, so splitting it leaves ``Partial`` results. A dimension of size 1
that broadcasts carries no factor. A dimension that merges several factors names them from the
slowest to the fastest, ``"b.t"``: splitting ``t`` there splits each of its ``b`` blocks.

``linear`` says through which operands a pending sum may pass: ``JOINT`` when the operator is linear
in all operands together (addition), else the set of operand positions in which it is linear while
the others are held fixed.

Rules never mention ranks or axes; ``passes/place.py`` applies them to one axis at a time.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.reshard import cast_whole

__all__ = ["JOINT", "RULES", "SIZE_ARGUMENT", "Rule", "argument", "operands", "results", "rule_for"]

aten = torch.ops.aten

Dims = tuple[str | None, ...]
JOINT = frozenset({-1})
NONLINEAR: frozenset[int] = frozenset()

# Operators that are told the size of their result, and which argument says it.
SIZE_ARGUMENT = {
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view, aten.expand), 1),
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty), 1),
    **dict.fromkeys((aten.zeros, aten.ones, aten.full, aten.empty, aten.rand, aten.randn), 0),
}


@dataclass(frozen=True)
class Rule:
    """The factors of one operator call.

    ``whole`` are factors that must not be split; ``quantum`` gives the sizes of factors that are
    merged with others, which a split must divide. ``summed`` says that factors no
    result carries are added up (else they must stay whole). ``average`` says that they are
    averaged: the local result must be divided by the number of ranks. ``random`` marks operators
    that draw numbers. ``counts`` is the operand that says how many rows each expert has, and
    ``order`` the one that says whose rows they are: it does not move, so it decides how these are
    split.
    ``added`` are operands that are added once to a sum over a factor they lack, such as a bias:
    where that factor is split, each rank must hold a term of them.
    ``together`` are factors of which splitting one splits the last too: the local operator takes
    what it has of the one to the other (``rings.py``). ``suffices`` says that an operand with all
    of the last factor will do as well.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    linear: frozenset[int] = NONLINEAR
    whole: frozenset[str] = frozenset()
    summed: bool = False
    average: bool = False
    random: bool = False
    counts: int | None = None
    order: int | None = None
    added: frozenset[int] = frozenset()
    together: tuple[str, ...] | None = None
    suffices: bool = False
    quantum: dict[str, int] = field(default_factory=dict)

    def splittable(self, factor: str, parts: int, blocks: int = 1) -> bool:
        """Whether each of the factor's ``blocks`` may be split into ``parts``."""
        if factor in self.whole or factor.isupper():
            return False
        kept = {name for dims in self.results for f in dims if f for name in re.split("[|.]", f)}
        if not self.summed and factor not in kept:
            return False
        return self.quantum.get(factor, 0) % (parts * blocks) == 0

    @property
    def has_tokens(self) -> bool:
        """Whether tokens stand beside rows that are routed: they are dispatched or combined."""
        return any("s" in dims for dims in (*self.operands, *self.results))

    def __str__(self) -> str:
        sides = (self.operands, self.results)
        return " -> ".join(", ".join(" ".join(f or "1" for f in d) for d in s) for s in sides)


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node in argument order, repeats included."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [x for x in leaves if isinstance(x, fx.Node) and _is_tensor(x)]


def results(node: fx.Node) -> list[Tensor | None]:
    """The example results of a node, one entry each; None for a result that is not a tensor."""
    value = roles.value(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v if isinstance(v, Tensor) else None for v in values]


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a node's operator, or None if moptrace knows none."""
    target: Any = node.target
    if torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise(node)
    maker = RULES.get(getattr(target, "overloadpacket", target))
    return maker(node) if maker is not None else None


# --- helpers --------------------------------------------------------------------------------------


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(roles.value(node), Tensor)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(roles.tensor(node).shape)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an operator call, given by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def _dims(prefix: str, rank: int) -> Dims:
    return tuple(f"{prefix}{i}" for i in range(rank))


def _same(node: fx.Node, whole: Sequence[int] = (), **changes: Any) -> Rule:
    """Every operand and result has the dimensions of the first operand; some stay whole."""
    shape = _shape(operands(node)[0])
    dims = _dims("d", len(shape))
    kept = frozenset(f"d{d % len(shape)}" for d in whole) if shape else frozenset[str]()
    count = sum(r is not None for r in results(node))
    return Rule((dims,) * len(operands(node)), (dims,) * count, whole=kept, **changes)


def _broadcast(shape: Sequence[int], result: Sequence[int], dims: Dims) -> Dims:
    """The factors of an operand that broadcasts to ``result``, aligned on the right."""
    offset = len(result) - len(shape)
    return tuple(
        None if n == 1 and result[i + offset] != 1 else dims[i + offset]
        for i, n in enumerate(shape)
    )


_ADDITIVE = {aten.add.Tensor, aten.sub.Tensor, aten.copy.default, aten.where.self}
_SCALING = {
    aten.mul.Tensor: {0, 1},
    aten.mul.Scalar: {0},
    aten.div.Tensor: {0},
    aten.div.Scalar: {0},
    aten.neg.default: {0},
    aten._to_copy.default: {0},
    aten.to.dtype: {0},
    cast_whole: {0},
    aten.clone.default: {0},
    aten.detach.default: {0},
    aten.masked_fill.Scalar: set[int](),
}


def pointwise(node: fx.Node) -> Rule:
    """Element by element, with broadcasting."""
    result = next(r for r in results(node) if r is not None)
    dims = _dims("d", result.dim())
    ins = tuple(_broadcast(_shape(x), result.shape, dims) for x in operands(node))
    count = sum(r is not None for r in results(node))
    target: Any = node.target
    linear = frozenset(_SCALING.get(target, ()))
    if target in _ADDITIVE and len(ins) == 2 and target is not aten.where.self:
        linear = JOINT
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    if _floors(node):
        linear = NONLINEAR
    return Rule(ins, (dims,) * count, linear, random=random)


def chosen(node: fx.Node) -> Rule | None:
    """where with a number on one side; alone with a mask, it finds positions."""
    return pointwise(node) if len(node.args) == 3 else None


def _floors(node: fx.Node) -> bool:
    """A cast to an integer type, or from one, is not linear on pending sums of rounded values."""
    first = operands(node)[0] if operands(node) else None
    result = next(r for r in results(node) if r is not None)
    return first is not None and (
        roles.tensor(first).is_floating_point() and not result.is_floating_point()
    )


# --- movement: views, permutations, slices --------------------------------------------------------


def view(node: fx.Node) -> Rule:
    """Dimensions merge and split: both shapes are cut into their common factors."""
    before, after = _shape(operands(node)[0]), tuple(roles.tensor(node).shape)
    sizes: dict[str, int] = {}
    ins, outs = _common_factors(before, after, sizes)
    return Rule((ins,), (outs,), frozenset({0}), quantum=sizes)


def _common_factors(
    before: Sequence[Any], after: Sequence[Any], sizes: dict[str, int]
) -> tuple[Dims, Dims]:
    """Name the factors of two shapes of one size, from the slowest to the fastest dimension.

    (6, 4) and (2, 12) have the factors 2, 3, 4: ``"f0.f1", "f2"`` and ``"f0", "f1.f2"``. Where the
    shapes have no common factors (the rest of 4, 3 and 6, 2 after the 2), the rest stays whole.
    """
    sides: tuple[list[list[str]], list[list[str]]] = ([[] for _ in before], [[] for _ in after])
    left, right = list(before), list(after)
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] == 1 or right[j] == 1:
            i, j = i + (left[i] == 1), j + (right[j] == 1)
            continue
        if not (isinstance(left[i], int) and isinstance(right[j], int)):
            shared = left[i] if str(left[i]) == str(right[j]) else 1
        else:
            shared = math.gcd(left[i], right[j])
        if shared == 1:
            break
        factor = f"f{len(sizes)}"
        sizes[factor] = shared if isinstance(shared, int) else 0
        sides[0][i].append(factor)
        sides[1][j].append(factor)
        if not isinstance(shared, int):
            i, j = i + 1, j + 1
            continue
        left[i], right[j] = left[i] // shared, right[j] // shared
        i, j = i + (left[i] == 1), j + (right[j] == 1)
    for side, start, rest in ((0, i, left), (1, j, right)):
        for d in range(start, len(rest)):
            if rest[d] != 1:
                sides[side][d].append(f"{'IO'[side]}{d}")
    ins, outs = (tuple(".".join(names) or None for names in side) for side in sides)
    return ins, outs


def permute(order: Callable[[fx.Node, int], Sequence[int]]) -> Callable[[fx.Node], Rule]:
    """Dimensions change places: result dimension ``i`` is operand dimension ``order[i]``."""

    def rule(node: fx.Node) -> Rule:
        dims = _dims("d", len(_shape(operands(node)[0])))
        return Rule((dims,), (tuple(dims[d] for d in order(node, len(dims))),), frozenset({0}))

    return rule


def _transposed(node: fx.Node, rank: int) -> list[int]:
    a, b = (int(d) % rank for d in (node.args[1], node.args[2]))  # type: ignore[arg-type]
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _permuted(node: fx.Node, rank: int) -> list[int]:
    return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]


def expand(node: fx.Node) -> Rule:
    before, after = _shape(operands(node)[0]), tuple(roles.tensor(node).shape)
    dims = tuple(f"d{i}" for i in range(len(after)))
    ins = _broadcast(before, after, dims)
    carried = set(ins)
    outs = tuple(d if d in carried else d.upper() for d in dims)
    return Rule((ins,), (outs,), frozenset({0}))


def unsqueeze(node: fx.Node) -> Rule:
    dims = list(_dims("d", len(_shape(operands(node)[0]))))
    at = int(node.args[1]) % (len(dims) + 1)  # type: ignore[arg-type]
    return Rule((tuple(dims),), ((*dims[:at], None, *dims[at:]),), frozenset({0}))


def squeeze(node: fx.Node) -> Rule:
    shape = _shape(operands(node)[0])
    chosen = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    chosen = [chosen] if isinstance(chosen, int) else chosen
    gone = {int(d) % len(shape) for d in chosen if shape and shape[int(d)] == 1}  # type: ignore
    dims = _dims("d", len(shape))
    ins = tuple(None if i in gone else d for i, d in enumerate(dims))
    return Rule((ins,), (tuple(d for d in ins if d),), frozenset({0}))


def along_dim(position: int, default: int = 0, linear: bool = True) -> Callable[[fx.Node], Rule]:
    """The operator mixes positions of one dimension, which stays whole, and no others."""

    def rule(node: fx.Node) -> Rule:
        dim = argument(node, position, "dim", default)
        return _same(node, [dim], linear=frozenset({0}) if linear else NONLINEAR)

    return rule


def slices(node: fx.Node) -> Rule:
    """A slice of one dimension; a slice of everything is the dimension itself.

    One of every so many positions, as of interleaved gates and values, is one of each group.
    """
    shape = _shape(operands(node)[0])
    dim = argument(node, 1, "dim", 0) % len(shape)
    size, taken = shape[dim], roles.tensor(node).shape[dim]
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    if step > 1 and 0 <= (start or 0) < step and size == taken * step:
        dims = _dims("d", len(shape))
        groups = (*dims[:dim], f"d{dim}.B", *dims[dim + 1 :])
        sizes = {f"d{dim}": taken, "B": step}
        return Rule((groups,), (dims,), frozenset({0}), quantum=sizes)
    return _same(node, [] if size == taken else [dim], linear=frozenset({0}))


def pieces(node: fx.Node) -> Rule:
    """split and chunk: equal pieces are the blocks of the dimension."""
    shape = _shape(operands(node)[0])
    at = argument(node, 2, "dim", 0) % len(shape)
    lengths = [r.shape[at] for r in results(node) if r is not None]
    dims = _dims("d", len(shape))
    whole, piece, sizes = _blocks(dims, at, lengths)
    return Rule((whole,), (piece,) * len(lengths), frozenset({0}), quantum=sizes)


def _blocks(dims: Dims, at: int, lengths: Sequence[int]) -> tuple[Dims, Dims, dict[str, int]]:
    """The factors of a dimension and of its pieces end to end; unequal pieces stay whole."""
    if len(set(lengths)) == 1:
        factor, count = str(dims[at]), len(lengths)
        whole = (*dims[:at], f"B.{factor}" if count > 1 else factor, *dims[at + 1 :])
        return whole, dims, {"B": count, factor: lengths[0]}
    whole = (*dims[:at], "W", *dims[at + 1 :])
    return whole, (*dims[:at], "P", *dims[at + 1 :]), {}


def select(node: fx.Node) -> Rule:
    dims = _dims("d", len(_shape(operands(node)[0])))
    at = int(node.args[1]) % len(dims)  # type: ignore[arg-type]
    rest = tuple(d for i, d in enumerate(dims) if i != at)
    ins = tuple("X" if i == at else d for i, d in enumerate(dims))
    return Rule((ins,), (rest,), frozenset({0}))


def unbind(node: fx.Node) -> Rule:
    dims = _dims("d", len(_shape(operands(node)[0])))
    at = argument(node, 1, "dim", 0) % len(dims)
    rest = tuple(d for i, d in enumerate(dims) if i != at)
    ins = tuple("X" if i == at else d for i, d in enumerate(dims))
    return Rule((ins,), (rest,) * len(results(node)), frozenset({0}))


def cat(node: fx.Node) -> Rule:
    """Equal pieces become the blocks of the dimension."""
    shapes = [_shape(x) for x in operands(node)]
    at = argument(node, 1, "dim", 0) % len(shapes[0])
    whole, piece, sizes = _blocks(_dims("d", len(shapes[0])), at, [s[at] for s in shapes])
    return Rule((piece,) * len(shapes), (whole,), JOINT, quantum=sizes)


def stack(node: fx.Node) -> Rule:
    dims = _dims("d", len(_shape(operands(node)[0])))
    at = argument(node, 1, "dim", 0) % (len(dims) + 1)
    return Rule((dims,) * len(operands(node)), ((*dims[:at], "X", *dims[at:]),), JOINT)


def pad(node: fx.Node) -> Rule:
    """Padding touches the last dimensions; with zeros it is linear."""
    amounts = list(node.args[1])  # type: ignore[arg-type]
    rank = len(_shape(operands(node)[0]))
    touched = [rank - 1 - i for i in range(len(amounts) // 2) if any(amounts[2 * i : 2 * i + 2])]
    value = node.args[-1] if len(node.args) > 2 else node.kwargs.get("value")
    zero = not isinstance(value, (int, float)) or value == 0
    return _same(node, touched, linear=frozenset({0}) if zero else NONLINEAR)


def roll(node: fx.Node) -> Rule:
    dims = argument(node, 2, "dims", ())
    dims = [dims] if isinstance(dims, int) else list(dims)
    rank = len(_shape(operands(node)[0]))
    return _same(node, dims or range(rank), linear=frozenset({0}))


def flip(node: fx.Node) -> Rule:
    return _same(node, list(node.args[1]), linear=frozenset({0}))  # type: ignore[arg-type]


def repeat(node: fx.Node) -> Rule:
    times = [int(t) for t in node.args[1]]  # type: ignore[union-attr,arg-type]
    shape = _shape(operands(node)[0])
    new = len(times) - len(shape)
    dims = _dims("d", len(shape))
    ins = tuple(d if times[i + new] == 1 else f"X{i}" for i, d in enumerate(dims))
    outs = (*(f"N{i}" for i in range(new)), *ins)
    return Rule((ins,), (tuple(outs),), frozenset({0}))


def repeat_interleave(node: fx.Node) -> Rule:
    dim = argument(node, 2, "dim")
    if dim is None or len(operands(node)) > 1:
        shape = _shape(operands(node)[0])
        return Rule(
            (tuple(f"X{i}" for i in range(len(shape))), *(("Y",) for _ in operands(node)[1:])),
            (tuple(f"Z{i}" for i in range(roles.tensor(node).dim())),),
        )
    return _same(node, [dim], linear=frozenset({0}))


def overwrite(node: fx.Node) -> Rule:
    """slice_scatter: part of one dimension is replaced."""
    return _same(node, [argument(node, 2, "dim", 0)], linear=JOINT)


def select_overwrite(node: fx.Node) -> Rule:
    dims = _dims("d", len(_shape(operands(node)[0])))
    at = argument(node, 2, "dim", 0) % len(dims)
    outs = tuple("X" if i == at else d for i, d in enumerate(dims))
    return Rule((outs, tuple(d for d in outs if d != "X")), (outs,), JOINT)


def triangle(node: fx.Node) -> Rule:
    rank = len(_shape(operands(node)[0]))
    return _same(node, [rank - 2, rank - 1], linear=frozenset({0}))


# --- reductions -----------------------------------------------------------------------------------


def _by_schema(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument whose position differs between the overloads of an operator."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return argument(node, names.index(name), name, default) if name in names else default


def _reduced(node: fx.Node) -> set[int]:
    rank = len(_shape(operands(node)[0]))
    dims = _by_schema(node, "dim")
    if dims is None or dims == []:
        return set(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return {int(d) % rank for d in dims} if rank else set()


def reduction(summed: bool, average: bool = False) -> Callable[[fx.Node], Rule]:
    """Some dimensions vanish, or stay with size 1; ``summed`` ones may be split.

    An average may only be split evenly, so that the mean of the parts' means is the mean.
    """

    def rule(node: fx.Node) -> Rule:
        shape = _shape(operands(node)[0])
        gone = _reduced(node)
        keep = bool(_by_schema(node, "keepdim", False))
        ins = tuple(
            f"{'r' if summed else 'R'}{i}" if i in gone else f"d{i}" for i in range(len(shape))
        )
        outs = tuple(
            None if i in gone else f"d{i}" for i in range(len(ins)) if keep or i not in gone
        )
        count = sum(r is not None for r in results(node))
        linear = frozenset({0}) if summed else NONLINEAR
        even = {f"r{i}": shape[i] for i in gone} if average else {}
        return Rule((ins,), (outs,) * count, linear, summed=summed, average=average, quantum=even)

    return rule


def histogram(node: fx.Node) -> Rule | None:
    """histc and bincount: elements are counted, whatever their order, if the bins are given."""
    shape = _shape(operands(node)[0])
    histc = node.target is aten.histc.default
    if histc and argument(node, 2, "min", 0) == argument(node, 3, "max", 0):
        return None
    bins: Any = roles.tensor(node).shape[0]
    if not isinstance(bins, int):
        return None
    return Rule((_dims("r", len(shape)),) * len(operands(node)), (("B",),), summed=True)


# --- matrix products ------------------------------------------------------------------------------


def spelled(pattern: str, linear: set[int], summed: bool = True) -> Callable[[fx.Node], Rule]:
    """A rule written as einsum is; ``...`` stands for leading dimensions that broadcast."""
    left, right = pattern.replace(" ", "").split("->")
    inputs, output = left.split(","), right

    def rule(node: fx.Node) -> Rule:
        xs = operands(node)
        extra = max(
            len(_shape(x)) - len(p.replace("...", "")) for x, p in zip(xs, inputs, strict=True)
        )
        lead = _dims("b", max(extra, 0))

        def dims(term: str, shape: Sequence[int] | None) -> Dims:
            if "..." not in term:
                return tuple(term)
            named = tuple(term.replace("...", ""))
            if shape is None:
                return (*lead, *named)
            own = len(shape) - len(named)
            result = roles.tensor(node).shape
            return (*_broadcast(shape[:own], result[: len(lead)], lead), *named)

        ins = tuple(dims(p, _shape(x)) for x, p in zip(xs, inputs, strict=True))
        return Rule(ins, (dims(output, None),), frozenset(linear), summed=summed)

    return rule


def linear(node: fx.Node) -> Rule:
    if len(operands(node)) == 3:
        return replace(spelled("...k, nk, n -> ...n", set())(node), added=frozenset({2}))
    return spelled("...k, nk -> ...n", {0, 1})(node)


def matmul(node: fx.Node) -> Rule:
    a, b = (len(_shape(x)) for x in operands(node))
    if a == 1 or b == 1:
        left = "k" if a == 1 else "...mk"
        right = "k" if b == 1 else "...kn"
        out = "..." * (a > 2 or b > 2) + "m" * (a > 1) + "n" * (b > 1)
        left = left if "..." in out else left.replace("...", "")
        right = right if "..." in out else right.replace("...", "")
        return spelled(f"{left}, {right} -> {out}", {0, 1})(node)
    return spelled("...mk, ...kn -> ...mn", {0, 1})(node)


def solve_triangular(node: fx.Node) -> Rule | None:
    """Each column of the right side is solved for by itself."""
    return spelled("...NK, ...Km -> ...Nm", {1})(node) if argument(node, 3, "left", True) else None


def addmm(node: fx.Node) -> Rule:
    bias, result = _shape(operands(node)[0]), roles.tensor(node).shape
    ins = (_broadcast(bias, result, ("m", "n")), ("m", "k"), ("k", "n"))
    return Rule(ins, (("m", "n"),), summed=True, added=frozenset({0}))


def einsum(node: fx.Node) -> Rule | None:
    equation = str(node.args[0]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    left, right = equation.split("->")
    rename = {c: f"e{ord(c)}" for c in equation}
    ins = tuple(tuple(rename[c] for c in term) for term in left.split(","))
    out = tuple(rename[c] for c in right)
    diagonal = {f for term in ins for f in term if term.count(f) > 1}
    return Rule(ins, (out,), frozenset(range(len(ins))), whole=frozenset(diagonal), summed=True)


def attention(node: fx.Node) -> Rule:
    """Batch and heads can be split; positions must be whole (ring and Ulysses rewrite that)."""
    return _attention(node, "S", operands(node)[3:])


def ring_attention(node: fx.Node) -> Rule:
    """As attention; and where lengths agree, queries and keys are split together."""
    mask, documents = (argument(node, at, "") for at in (3, 4))
    query, key, *_ = operands(node)
    meet = _shape(query)[-2] == _shape(key)[-2]
    tokens = "s" if meet else "S"
    rule = _attention(node, tokens, [mask] if mask is not None else [])
    ins = list(rule.operands)
    if documents is not None:
        ins.append((ins[0][0] if _shape(documents)[0] > 1 else None, "D"))
    results = (rule.results[0], rule.results[0][:-1])
    if not meet:
        return Rule(tuple(ins), results, quantum=rule.quantum)
    named = [tuple("t" if d == "T" else d for d in dims) for dims in ins[1:3]]
    ins = (ins[0], *named, *ins[3:])
    return Rule(ins, results, whole=frozenset({"t"}), together=("s", "t"), quantum=rule.quantum)


def _attention(node: fx.Node, tokens: str, masks: Sequence[fx.Node]) -> Rule:
    """Attention of ``tokens`` to whole keys ``T``."""
    query, key = operands(node)[:2]
    lead = _dims("b", len(_shape(query)) - 2)
    kv_lead, sizes = lead, dict[str, int]()
    if lead and _shape(query)[-3] != _shape(key)[-3]:  # each head of keys serves several queries'
        groups = _shape(key)[-3]
        sizes = {"g": groups, "r": _shape(query)[-3] // groups}
        kv_lead = (*lead[:-1], "g")
        lead = (*lead[:-1], "g.r")
    ins: list[Dims] = [(*lead, tokens, "E"), (*kv_lead, "T", "E"), (*kv_lead, "T", "F")]
    result = next(r for r in results(node) if r is not None).shape
    scores = (*result[:-1], _shape(key)[-2])
    ins += [_broadcast(_shape(mask), scores, (*lead, tokens, "T")) for mask in masks]
    return Rule(tuple(ins), ((*lead, tokens, "F"),), quantum=sizes)


def convolution(node: fx.Node) -> Rule | None:
    xs = operands(node)
    if len(_shape(xs[0])) != len(_shape(xs[1])):  # one example without a batch dimension
        return None
    space = len(_shape(xs[0])) - 2
    positions = tuple(f"S{i}" for i in range(space))
    ins: list[Dims] = [("n", "C", *positions), ("O", "I", *(f"K{i}" for i in range(space)))]
    ins += [("O",)] * (len(xs) - 2)
    return Rule(tuple(ins), (("n", "O", *(f"P{i}" for i in range(space))),))


def causal_conv1d(node: fx.Node) -> Rule:
    """As convolution; and tokens may be split, for a rank gets those that it lacks (``s``)."""
    bias = [("O",)] if node.args[2] is not None else []
    ins: list[Dims] = [("n", "C", "s"), ("O", "I", "K"), *bias]
    return Rule(tuple(ins), (("n", "O", "s"),), whole=frozenset({"t"}), together=("s", "t"))


# --- normalisation, softmax, selection ------------------------------------------------------------


def trailing_norm(node: fx.Node) -> Rule:
    """layer_norm and rms_norm: statistics over the trailing dimensions."""
    xs = operands(node)
    shape = _shape(xs[0])
    lead = len(shape) - len(list(node.args[1]))  # type: ignore[arg-type]
    dims = tuple(f"d{i}" if i < lead else f"N{i}" for i in range(len(shape)))
    return Rule((dims, *(dims[lead:] for _ in xs[1:])), (dims,) * len(results(node)))


def topk(node: fx.Node) -> Rule:
    dim = argument(node, 2, "dim", -1)
    return _same(node, [dim])


def sort(node: fx.Node) -> Rule:
    return _same(node, [argument(node, 1, "dim", -1)])


def gather(node: fx.Node) -> Rule:
    """gather(x, dim, index): other dimensions correspond one to one where sizes agree."""
    xs = operands(node)
    dim = int(node.args[1]) % max(len(_shape(xs[0])), 1)  # type: ignore[arg-type]
    source, index = _shape(xs[0]), _shape(xs[1])
    dims = tuple(
        f"d{i}" if i != dim and source[i] == index[i] else f"X{i}" for i in range(len(index))
    )
    outs = tuple(f"Y{i}" if d.startswith("X") else d for i, d in enumerate(dims))
    return Rule((dims, outs), (outs,), frozenset({0}))


def scatter(node: fx.Node) -> Rule:
    """scatter and scatter_add: dimensions other than ``dim`` correspond where sizes agree."""
    xs = operands(node)
    dim = int(node.args[1]) % max(len(_shape(xs[0])), 1)  # type: ignore[arg-type]
    shapes = [_shape(x) for x in xs]
    outs = tuple(
        f"d{i}" if i != dim and len({shape[i] for shape in shapes}) == 1 else f"X{i}"
        for i in range(len(shapes[0]))
    )
    ins = tuple(f"Y{i}" if d.startswith("X") else d for i, d in enumerate(outs))
    return Rule((outs, *([ins] * (len(xs) - 1))), (outs,))


def index(node: fx.Node) -> Rule | None:
    """x[i, :, j]: indexed dimensions stay whole; the indices' own come first or in place."""
    xs = operands(node)
    chosen = list(node.args[1])  # type: ignore[arg-type]
    if any(isinstance(i, fx.Node) and roles.tensor(i).dtype == torch.bool for i in chosen):
        return None
    shape = _shape(xs[0])
    chosen += [None] * (len(shape) - len(chosen))
    at = [i for i, c in enumerate(chosen) if c is not None]
    dims = tuple(f"X{i}" if i in at else f"d{i}" for i in range(len(shape)))
    common = torch.broadcast_shapes(*(_shape(x) for x in xs[1:]))
    inner = _dims("i", len(common))
    ins = tuple(_broadcast(_shape(x), common, inner) for x in xs[1:])
    rest = [d for d in dims if d.startswith("d")]
    together = at == list(range(at[0], at[-1] + 1))
    before = [d for i, d in enumerate(dims) if i < at[0] and d in rest] if together else []
    outs = (*before, *inner, *rest[len(before) :])
    return Rule((dims, *ins), (outs,), frozenset({0}))


def index_select(node: fx.Node) -> Rule:
    shape = _shape(operands(node)[0])
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    ins = tuple("X" if i == dim else f"d{i}" for i in range(len(shape)))
    outs = tuple("i" if i == dim else f"d{i}" for i in range(len(shape)))
    return Rule((ins, ("i",)), (outs,), frozenset({0}))


def index_put(node: fx.Node) -> Rule | None:
    """x[i, j] = v: dimensions of x that are not indexed can be split."""
    xs = operands(node)
    chosen = list(node.args[1])  # type: ignore[arg-type]
    shape = _shape(xs[0])
    if any(c is None for c in chosen) or len(chosen) > len(shape):
        return None
    if any(roles.tensor(c).dtype == torch.bool for c in chosen if isinstance(c, fx.Node)):
        return None
    dims = tuple(f"X{i}" if i < len(chosen) else f"d{i}" for i in range(len(shape)))
    indices = tuple(tuple(f"I{i}" for i in range(len(_shape(x)))) for x in xs[1:-1])
    trailing = dims[len(chosen) :]
    values = _shape(xs[-1])
    lead = max(len(values) - len(trailing), 0)
    full = (*(f"I{i}" for i in range(lead)), *trailing)
    own = full[len(full) - len(values) :]
    value = tuple(None if n == 1 else f for n, f in zip(values, own, strict=True))
    return Rule((dims, *indices, value), (dims,))


def index_add(node: fx.Node) -> Rule:
    shape = _shape(operands(node)[0])
    dim = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    outs = tuple("X" if i == dim else f"d{i}" for i in range(len(shape)))
    source = tuple("I" if i == dim else f"d{i}" for i in range(len(shape)))
    return Rule((outs, ("I",), source), (outs,))


def embedding(node: fx.Node) -> Rule | None:
    if argument(node, 3, "scale_grad_by_freq", False):
        return None
    ids = _dims("i", len(_shape(operands(node)[1])))
    return Rule((("V", "d"), ids), ((*ids, "d"),), frozenset({0}))


def one_hot(node: fx.Node) -> Rule:
    dims = _dims("d", len(_shape(operands(node)[0])))
    return Rule((dims,), ((*dims, "C"),))


def loss_per_token(node: fx.Node) -> Rule | None:
    """cross_entropy_loss and nll_loss without a mean over tokens (normalize_losses sees to it)."""
    xs = operands(node)
    reduce = argument(node, 3, "reduction", 1)
    logits = _shape(xs[0])
    if len(logits) < 2 or reduce == 1:
        return None
    spatial = tuple(f"s{i}" for i in range(len(logits) - 2))
    target: Dims = ("n", *spatial)
    if len(_shape(xs[1])) == len(logits):  # class probabilities
        target = ("n", "C", *spatial)
    ins: tuple[Dims, ...] = (("n", "C", *spatial), target, *((("C",),) * (len(xs) - 2)))
    tokens = ("n", *spatial)
    count = len([r for r in results(node) if r is not None])
    if reduce == 0:
        return Rule(ins, (tokens,) * count)
    return Rule(ins, ((),) * count, summed=True)


# --- the canonical Mixture-of-Experts operators ---------------------------------------------------
# The first dimension of routed rows carries two factors, written "s|e": the token-expert pairs in
# token order, and the experts. Rows by token split "s", rows by expert split "e". Tokens are
# dispatched by token, unless a rank has the numbers of some experts only: then each rank takes the
# rows of its experts from all tokens.


def dispatch(node: fx.Node) -> Rule:
    rest = _dims("d", len(_shape(operands(node)[0])) - 1)
    rows: Dims = ("s|e", *rest)
    numbers: list[Dims] = [("e",)] * (len(operands(node)) - 2)
    counts: Dims = ("e" if numbers else "E",)
    ins: tuple[Dims, ...] = (("s", *rest), ("s", "K"), *numbers)
    return Rule(ins, (rows, counts, ("s|e",)), summed=True)


def keep_pairs(node: fx.Node) -> Rule:
    """Tokens that are split are groups of their own."""
    pairs: Dims = ("s", "K")
    return Rule((pairs,) * len(operands(node)), (pairs, ("E",)), summed=True)


def pair_rows(node: fx.Node) -> Rule:
    rest = _dims("d", len(_shape(operands(node)[0])) - 2)
    return Rule((("s", "K", *rest), ("s|e",)), (("s|e", *rest),), order=1)


def grouped_mm(node: fx.Node) -> Rule:
    ins: tuple[Dims, ...] = (("s|e", "k"), ("e", "k", "n"), ("e",))
    return Rule(ins, (("s|e", "n"),), summed=True, counts=2)


def expert_rows(node: fx.Node) -> Rule:
    param, _, rows = operands(node)
    rest = _dims("d", len(_shape(param)) - 1)
    others = tuple(f"R{i}" for i in range(len(_shape(rows)) - 1))
    return Rule((("e", *rest), ("e",), ("s|e", *others)), (("s|e", *rest),), counts=1)


def combine(node: fx.Node) -> Rule:
    rest = _dims("d", len(_shape(operands(node)[0])) - 1)
    ins: tuple[Dims, ...] = (("s|e", *rest), ("s|e",), ("s", "K"))
    return Rule(ins, (("s", *rest),), frozenset({0, 2}), summed=True, order=1)


def vocab_projection(node: fx.Node) -> Rule:
    bias = [("v",)] if node.args[2] is not None else []
    return Rule(
        (("n", "D"), ("v", "D"), *bias, ("n",)),
        (("n",),) * 3,
        whole=frozenset({"v"}),
        together=("n", "v"),
        suffices=True,
    )


def embedding_rows(node: fx.Node) -> Rule:
    ids = tuple(f"i{d}" for d in range(len(_shape(operands(node)[1]))))
    words = frozenset({"v"})
    together = (*ids, "v")
    return Rule((("v", "D"), ids), ((*ids, "D"),), whole=words, together=together, suffices=True)


def fused_update(node: fx.Node) -> Rule:
    """A parameter, its gradient and moments, element by element; and numbers."""
    shape = _shape(operands(node)[0])
    dims = _dims("d", len(shape))
    ins = tuple(dims if _shape(x) == shape else () for x in operands(node))
    return Rule(ins, (dims,) * len(results(node)))


def hop(node: fx.Node) -> Rule:
    """A value goes to other ranks as it is, terms of a sum each for themselves."""
    dims = _dims("d", roles.tensor(node).dim())
    return Rule((dims,), (dims,), frozenset({0}))


def constant(node: fx.Node) -> Rule:
    """No tensor operand: the same value everywhere."""
    result = roles.tensor(node)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return Rule((), (_dims("d", result.dim()),), random=random)


def like(node: fx.Node) -> Rule:
    """zeros_like and friends: the shape of the operand, not its values."""
    return _same(node, random=torch.Tag.nondeterministic_seeded in node.target.tags)  # type: ignore


def type_as(node: fx.Node) -> Rule:
    """Only the type of the second operand matters; one of the same shape may be split alike."""
    first, second = (_shape(x) for x in operands(node))
    dims = _dims("d", len(first))
    other = dims if first == second else tuple(f"X{i}" for i in range(len(second)))
    return Rule((dims, other), (dims,))


def complex_pairs(node: fx.Node) -> Rule:
    """A dimension of two, the real and the imaginary part, becomes a complex number, or back."""
    before, after = len(_shape(operands(node)[0])), roles.tensor(node).dim()
    dims, pair = _dims("d", min(before, after)), ("P",)
    ins, outs = (dims + pair * (rank > len(dims)) for rank in (before, after))
    return Rule((ins,), (outs,), frozenset({0}))


def new_like(node: fx.Node) -> Rule:
    """new_zeros and friends: only the type of the operand matters."""
    operand = operands(node)[0]
    return Rule(
        (tuple(f"X{i}" for i in range(len(_shape(operand)))),),
        (tuple(f"Y{i}" for i in range(roles.tensor(node).dim())),),
    )


def getitem(node: fx.Node) -> Rule | None:
    raise AssertionError("getitem takes its placement from its tuple; see passes/place.py")


RULES: dict[Any, Callable[[fx.Node], Rule | None]] = {
    **dict.fromkeys((aten.view, aten.reshape, aten._unsafe_view, aten.flatten), view),
    **dict.fromkeys((aten.transpose, aten.swapaxes), permute(_transposed)),
    aten.permute: permute(_permuted),
    aten.t: permute(lambda node, rank: list(reversed(range(rank)))),
    aten.numpy_T: permute(lambda node, rank: list(reversed(range(rank)))),
    aten.expand: expand,
    aten.unsqueeze: unsqueeze,
    aten.squeeze: squeeze,
    aten.type_as: type_as,
    **dict.fromkeys((aten.view_as_complex, aten.view_as_real), complex_pairs),
    aten.slice: slices,
    aten.select: select,
    aten.unbind: unbind,
    **dict.fromkeys((aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split), pieces),
    aten.cat: cat,
    aten.stack: stack,
    **dict.fromkeys((aten.pad, aten.constant_pad_nd), pad),
    aten.roll: roll,
    aten.flip: flip,
    aten.repeat: repeat,
    aten.repeat_interleave: repeat_interleave,
    aten.slice_scatter: overwrite,
    aten.select_scatter: select_overwrite,
    **dict.fromkeys((aten.tril, aten.triu), triangle),
    **dict.fromkeys(
        (aten.clone, aten._to_copy, aten.detach, aten.contiguous, aten.copy, aten.lift_fresh_copy),
        pointwise,
    ),
    cast_whole: pointwise,
    **dict.fromkeys((aten.__and__, aten.__or__, aten.__xor__), pointwise),
    aten.where: chosen,
    aten.sum: reduction(summed=True),
    aten.mean: reduction(summed=True, average=True),
    **dict.fromkeys(
        (
            aten.amax,
            aten.amin,
            aten.any,
            aten.all,
            aten.logsumexp,
            aten.prod,
            aten.argmax,
            aten.max,
        ),
        reduction(summed=False),
    ),
    **dict.fromkeys((aten.min, aten.argmin, aten.median), reduction(summed=False)),
    **dict.fromkeys((aten.var, aten.std), reduction(summed=False)),
    **dict.fromkeys((aten.linalg_vector_norm, aten.norm), reduction(summed=False)),
    aten.cumsum: along_dim(1),
    aten.diff: along_dim(2, -1, linear=False),
    **dict.fromkeys((aten.cumprod, aten.logcumsumexp), along_dim(1, linear=False)),
    **dict.fromkeys((aten.histc, aten.bincount), histogram),
    aten.linear: linear,
    aten.matmul: matmul,
    aten.mm: spelled("mk, kn -> mn", {0, 1}),
    aten.bmm: spelled("bmk, bkn -> bmn", {0, 1}),
    aten.mv: spelled("mk, k -> m", {0, 1}),
    aten.dot: spelled("k, k -> ", {0, 1}),
    aten.outer: spelled("m, n -> mn", {0, 1}),
    aten.addmm: addmm,
    aten.linalg_solve_triangular: solve_triangular,
    aten.einsum: einsum,
    aten.scaled_dot_product_attention: attention,
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.convolution), convolution),
    **dict.fromkeys((aten.layer_norm, aten.rms_norm, aten.native_layer_norm), trailing_norm),
    **dict.fromkeys(
        (aten.softmax, aten.log_softmax, aten._softmax, aten._log_softmax, aten.glu),
        along_dim(1, -1, linear=False),
    ),
    aten.topk: topk,
    **dict.fromkeys((aten.sort, aten.argsort), sort),
    aten.gather: gather,
    **dict.fromkeys((aten.scatter, aten.scatter_add, aten.scatter_reduce), scatter),
    aten.index: index,
    aten.index_select: index_select,
    aten.index_put: index_put,
    aten.index_add: index_add,
    aten.embedding: embedding,
    aten.one_hot: one_hot,
    **dict.fromkeys((aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd), loss_per_token),
    **dict.fromkeys(
        (aten.dropout, aten.native_dropout, aten.bernoulli), lambda n: _same(n, random=True)
    ),
    aten.feature_dropout: lambda n: _same(n, range(2, len(_shape(operands(n)[0]))), random=True),
    aten.multinomial: lambda n: _same(n, [-1], random=True),
    **dict.fromkeys(
        (
            aten.zeros_like,
            aten.ones_like,
            aten.full_like,
            aten.empty_like,
            aten.rand_like,
            aten.randn_like,
        ),
        like,
    ),
    **dict.fromkeys((aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty), new_like),
    **dict.fromkeys(
        (
            aten.zeros,
            aten.ones,
            aten.full,
            aten.empty,
            aten.arange,
            aten.scalar_tensor,
            aten.eye,
            aten.rand,
            aten.randn,
            aten.linspace,
        ),
        constant,
    ),
    operator.getitem: getitem,
}


def _canonical_operators() -> dict[Any, Callable[[fx.Node], Rule | None]]:
    import moptrace.kernels.attention
    import moptrace.kernels.causal_conv1d
    import moptrace.kernels.embedding_rows
    import moptrace.kernels.fused_adam
    import moptrace.kernels.grouped_mm
    import moptrace.kernels.routing
    import moptrace.kernels.vocab_projection
    import moptrace.stages  # noqa: F401  importing registers the operators

    ops = torch.ops.moptrace
    return {
        ops.dispatch: dispatch,
        ops.keep_pairs: keep_pairs,
        ops.pair_rows: pair_rows,
        ops.grouped_mm: grouped_mm,
        ops.expert_rows: expert_rows,
        ops.combine: combine,
        ops.attention: ring_attention,
        ops.causal_conv1d: causal_conv1d,
        ops.vocab_projection: vocab_projection,
        ops.embedding_rows: embedding_rows,
        ops.kept_tokens: _same,
        ops.fused_adam: fused_update,
        ops.hop: hop,
    }


RULES.update(_canonical_operators())
