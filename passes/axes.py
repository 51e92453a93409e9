"""How an operator treats the dimensions of its operands, whatever they count.

An *axis* is something that a dimension counts. A dimension carries a tuple of axes, outermost first
(a flattened ``[N, k]`` carries two), or none: then it is a feature. A size of 1 carries none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import roles

__all__ = [
    "CASTS",
    "OF_ONE",
    "RESHAPES",
    "Along",
    "Axis",
    "Contraction",
    "Dims",
    "Space",
    "argument",
    "carried",
    "contraction",
    "is_one",
    "is_pointwise",
    "kinds",
    "numel",
    "packet",
    "permutation",
    "positions",
    "reshaped",
    "shape",
    "tensors",
]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Axis:
    """Something a dimension counts; ``of`` tells axes of one kind apart."""

    kind: str  # token, slot, expert, sorted, branch, range
    size: int | None
    of: Any
    expert: int | None = None


Space: TypeAlias = tuple[Axis, ...]
Dims: TypeAlias = tuple[Space, ...]


# ---- Reading nodes -------------------------------------------------------------------------------


_ALIASES: dict[Any, Any] = {aten.concat: aten.cat, aten.concatenate: aten.cat}


def packet(node: fx.Node) -> Any:
    """The operator without its overload."""
    found = getattr(node.target, "overloadpacket", node.target)
    return _ALIASES.get(found, found)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor; the name of a size that depends on routing, which compares safely."""
    value = roles.value(node)
    if isinstance(value, tuple | list):
        value = value[0]
    if not isinstance(value, Tensor):
        return ()
    sizes: tuple[Any, ...] = tuple(value.shape)
    return tuple(n if isinstance(n, int) else str(n) for n in sizes)


def numel(node: fx.Node) -> int:
    """The number of elements, not counting sizes that depend on routing."""
    return math.prod(n for n in shape(node) if isinstance(n, int))


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor operands in argument order, repeats included."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [x for x in leaves if isinstance(x, fx.Node) and isinstance(roles.value(x), Tensor)]


_ALSO_POINTWISE = {
    aten._to_copy, aten.to, aten.contiguous, aten.alias, aten.detach, aten.dropout,
    aten.floor_divide, aten.lift_fresh_copy, aten.where, aten.masked_fill, aten.hardswish,
    aten.log_sigmoid, aten.type_as, aten.div, aten.pow, aten.feature_dropout,
    aten.zeros_like, aten.ones_like, aten.full_like,
}  # fmt: skip


CASTS = {
    aten._to_copy, aten.to, aten.clone, aten.contiguous, aten.alias, aten.detach,
    aten.lift_fresh_copy,
}  # fmt: skip


def is_pointwise(node: fx.Node) -> bool:
    """Element by element, with broadcasting."""
    if packet(node) is aten.where and len(node.args) == 1:
        return False
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or (
        packet(node) in _ALSO_POINTWISE
    )


def kinds(dims: Dims) -> set[str]:
    return {axis.kind for space in dims for axis in space}


def carried(dims: Dims) -> set[Axis]:
    return {axis for space in dims for axis in space}


# ---- How dimensions move -------------------------------------------------------------------------


def reshaped(before: Sequence[Any], dims: Dims, after: Sequence[Any]) -> Dims | None:
    """The axes of the dimensions after a reshape; None if an axis would be torn or mixed.

    >>> token, slot = Axis("token", 5, 0), Axis("slot", 2, 0)
    >>> reshaped((5, 2, 8), ((token,), (slot,), ()), (10, 8)) == ((token, slot), ())
    True
    """
    atoms: list[tuple[Axis | None, Any]] = []
    for size, space in zip(before, dims, strict=True):
        if len(space) == 1:
            atoms.append((space[0], size))
        elif space:
            atoms.extend((axis, axis.size) for axis in space)
        elif not is_one(size):
            atoms.append((None, size))
    atoms.reverse()
    result: list[Space] = []
    for size in after:
        merged: list[Axis] = []
        features, have = False, 1
        while not is_one(size) and not (isinstance(size, int) and have == size):
            if not atoms:
                return None
            axis, length = atoms.pop()
            if axis is None:
                features = True
                if isinstance(length, int) and isinstance(size, int):
                    if have * length > size:
                        if size % have or length % (size // have):
                            return None
                        atoms.append((None, length // (size // have)))
                        length = size // have
                    have *= length
                    continue
                break
            merged.append(axis)
            if not (isinstance(length, int) and isinstance(size, int)):
                break
            have *= length
            if have > size:
                return None
        if merged and features:
            return None
        result.append(tuple(merged))
    return None if atoms else tuple(result)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


RESHAPES = {
    aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten,
    aten.unflatten, aten._reshape_alias, aten.view_as, aten.reshape_as,
}  # fmt: skip


def permutation(node: fx.Node) -> list[int] | None:
    """For an operator that reorders dimensions, the operand's dimension of each result's."""
    rank = len(shape(node))
    order = list(range(rank))
    match packet(node):
        case aten.permute:
            return [int(d) % rank for d in argument(node, 1, "dims")]
        case aten.transpose | aten.swapaxes | aten.swapdims:
            a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
            return order
        case aten.t | aten.numpy_T | aten.mT | aten.adjoint | aten.matrix_H:
            return [*order[:-2], *reversed(order[-2:])]
        case _:
            return None


# Operators that treat each position of all but some dimensions alike: the place of ``dim`` among
# their arguments, and what happens to it.
_ALONG: dict[Any, tuple[int, str]] = {
    aten.softmax: (1, "keep"), aten._softmax: (1, "keep"), aten.log_softmax: (1, "keep"),
    aten.cumsum: (1, "keep"), aten.cumprod: (1, "keep"), aten.flip: (1, "keep"),
    aten.roll: (2, "keep"), aten.sum: (1, "reduce"), aten.mean: (1, "reduce"),
    aten.amax: (1, "reduce"), aten.amin: (1, "reduce"), aten.var: (1, "reduce"),
    aten.std: (1, "reduce"), aten.prod: (1, "reduce"), aten.logsumexp: (1, "reduce"),
    aten.any: (1, "reduce"), aten.all: (1, "reduce"), aten.linalg_vector_norm: (2, "reduce"),
    aten.norm: (2, "reduce"), aten.split: (2, "keep"), aten.chunk: (2, "keep"),
    aten.split_with_sizes: (2, "keep"), aten.slice: (1, "keep"), aten.select: (1, "drop"),
    aten.unbind: (1, "drop"), aten.cat: (1, "keep"), aten.stack: (1, "add"), aten.glu: (1, "keep"),
    aten.narrow: (1, "keep"),
}  # fmt: skip
# What these give along dimensions of size 1 is the element itself.
OF_ONE = {aten.sum, aten.mean, aten.amax, aten.amin, aten.prod, aten.any, aten.all}
_DEFAULT_DIM = {
    aten.slice: 0, aten.select: 0, aten.unbind: 0, aten.cat: 0, aten.stack: 0, aten.split: 0,
    aten.chunk: 0, aten.split_with_sizes: 0, aten.glu: -1,
}  # fmt: skip
_TRAILING = {
    aten.layer_norm: 1,
    aten.rms_norm: 1,
    aten._fused_rms_norm: 1,
    aten.native_layer_norm: 1,
}


@dataclass(frozen=True)
class Along:
    """Which dimensions an operator mixes: numbers of operand dimensions (of the result's if added).

    ``kept`` gives for each result dimension its operand dimension, None if it is added.
    """

    mixed: tuple[int, ...]
    kept: tuple[int | None, ...]
    place: int | None


def positions(node: fx.Node) -> Along | None:
    """How a softmax, reduction, split, slice, cat, norm... treats dimensions; None for others."""
    operator_ = packet(node)
    operands = tensors(node)
    if not operands:
        return None
    rank = len(shape(operands[0]))
    if operator_ in _TRAILING:
        count = len(argument(node, 1, "normalized_shape"))
        return Along(tuple(range(rank - count, rank)), tuple(range(rank)), None)
    if operator_ not in _ALONG:
        return None
    place, effect = _ALONG[operator_]
    dim = argument(node, place, "dim", _DEFAULT_DIM.get(operator_))
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    if effect == "add":
        added = dims[0] % (rank + 1)
        kept = [*range(added), None, *range(added, rank)]
        return Along((added,), tuple(kept), place)
    mixed = tuple(d % rank for d in dims)
    removed = set(mixed) if effect == "drop" else set()
    if effect == "reduce" and len(shape(node)) < rank:
        removed = set(mixed)
    return Along(mixed, tuple(d for d in range(rank) if d not in removed), place)


@dataclass(frozen=True)
class Contraction:
    """A product of tensors that is summed over letters that the result lacks, as in einsum."""

    operands: tuple[fx.Node, ...]
    letters: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    bias: fx.Node | None = None
    grouped: str | None = None  # the letter that only the weight of a grouped product carries


def _letters(text: str) -> tuple[str, ...]:
    return tuple(text)


def _batch(rank: int) -> tuple[str, ...]:
    return tuple(f"b{i}" for i in range(rank))


def contraction(node: fx.Node) -> Contraction | None:
    """Read linear, matmul, einsum and their like as one notation; None for other operators."""
    args: Any = node.args
    match packet(node):
        case aten.linear:
            lead = _batch(len(shape(args[0])) - 1)
            bias = argument(node, 2, "bias")
            return Contraction((args[0], args[1]), ((*lead, "k"), ("n", "k")), (*lead, "n"), bias)
        case aten.mm:
            return Contraction((args[0], args[1]), (("m", "k"), ("k", "n")), ("m", "n"))
        case aten.bmm:
            return Contraction(
                (args[0], args[1]), (("b", "m", "k"), ("b", "k", "n")), ("b", "m", "n")
            )
        case aten.addmm | aten.baddbmm if not node.kwargs:
            lead = ("b",) if packet(node) is aten.baddbmm else ()
            letters = ((*lead, "m", "k"), (*lead, "k", "n"))
            return Contraction((args[1], args[2]), letters, (*lead, "m", "n"), args[0])
        case aten.matmul:
            a, b = len(shape(args[0])), len(shape(args[1]))
            batch = _batch(max(a, b, 2) - 2)
            left = ("k",) if a == 1 else (*batch[len(batch) - (a - 2) :], "m", "k")
            right = ("k",) if b == 1 else (*batch[len(batch) - (b - 2) :], "k", "n")
            result = (*batch, *(("m",) if a > 1 else ()), *(("n",) if b > 1 else ()))
            return Contraction((args[0], args[1]), (left, right), result)
        case aten.einsum:
            equation = str(args[0]).replace(" ", "")
            if "..." in equation:
                return None
            sides = equation.split("->")
            letters = tuple(_letters(side) for side in sides[0].split(","))
            if len(sides) == 1:
                once = sorted(
                    c for c in set("".join(sides[0].split(","))) if equation.count(c) == 1
                )
                sides.append("".join(once))
            if any(len(set(side)) < len(side) for side in letters):
                return None
            return Contraction(tuple(args[1]), letters, _letters(sides[1]))
        case _:
            pass
    if node.target is torch.ops.moptrace.grouped_mm.default:
        letters = (("s", "k"), ("e", "k", "n"))
        return Contraction((args[0], args[1]), letters, ("s", "n"), grouped="e")
    return None
