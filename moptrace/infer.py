"""What an operator demands of its operands, and what it gives, on one axis of the ranks.

The rule of an operator (``rules.py``) names factors. Here a rule meets the kinds of placement that
the operands have along one axis, and answers with the kinds they must have and the kinds of the
results. ``passes/place.py`` inserts the conversions between; ``check.py`` asks again and accepts a
program only if none is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moptrace.placement import (
    INVARIANT,
    PARTIAL,
    REPLICATE,
    Invariant,
    Kind,
    Placement,
    Replicate,
    Rows,
    Shard,
    View,
)
from moptrace.rules import JOINT, Dims, Rule

__all__ = [
    "Demand",
    "Held",
    "Split",
    "carried",
    "factor_at",
    "infer",
    "satisfies",
    "token_blocks",
    "travels",
]


@dataclass(frozen=True, slots=True)
class Held:
    """How one operand is held along the axis.

    ``weight`` is how much moving it would cost (0 for values made of parameters alone, which are
    gathered before use rather than decide how activations are split). ``differentiable`` is False
    for values that carry no gradient: for these, replicated and invariant are the same. ``blocks``
    are those in which the tokens of routed rows were split when they were dispatched.
    """

    kind: Kind
    weight: int = 0
    differentiable: bool = True
    blocks: int = 1


@dataclass(frozen=True, slots=True)
class Demand:
    """The kinds that the operands must have, and that the results then have."""

    operands: tuple[Kind, ...]
    results: tuple[Kind, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """A factor to split, in how many blocks, and whose rows they are if it counts routed rows."""

    factor: str
    by: str | None = None
    blocks: int = 1


def satisfies(held: Held, need: Kind) -> bool:
    """Whether an operand can be used as it is."""
    if held.kind == need:
        return True
    alike = (Replicate, Invariant)
    return not held.differentiable and isinstance(held.kind, alike) and isinstance(need, alike)


def token_blocks(tokens: Placement | None, view: View, axis: str) -> int:
    """The blocks in which an axis splits the tokens of routed rows, given their placement."""
    said = tokens.expressed_in(view) if tokens else None
    kind = said.kind(axis) if said else None
    return kind.blocks if isinstance(kind, Shard) else 1


def travels(rule: Rule, result: Kind, operands: Sequence[Kind]) -> bool:
    """Whether factors are split together along an axis: the operator takes one to the other."""
    if rule.together is None or not isinstance(result, Shard):
        return False
    *first, last = rule.together
    pairs = zip(rule.operands, operands, strict=True)
    apart = any(isinstance(kind, Shard) and dims[kind.dim] == last for dims, kind in pairs)
    return (apart or not rule.suffices) and rule.results[0][result.dim] in first


def infer(rule: Rule, held: Sequence[Held], parts: int) -> Demand:
    """Apply ``rule`` along an axis of ``parts`` ranks to operands that are held as given.

    >>> product = Rule((("m", "k"), ("k", "n")), (("m", "n"),), frozenset({0, 1}), summed=True)
    >>> demand = infer(product, [Held(Shard(0), 8), Held(Shard(1))], 2)  # tokens times a weight
    >>> [str(kind) for kind in (*demand.operands, *demand.results)]
    ['shard(0)', 'replicate', 'shard(0)']
    """
    split = _choose(rule, held, parts)
    if split is not None:
        return Demand(
            tuple(_operand(rule, position, split, have.kind) for position, have in enumerate(held)),
            tuple(carried(rule, dims, split) or PARTIAL for dims in rule.results),
        )
    return _unsplit(rule, held)


def _choose(rule: Rule, held: Sequence[Held], parts: int) -> Split | None:
    """The factor to split: what costs least to keep; an expert's weight draws its rows."""
    best: tuple[int, Split] | None = None
    for position, (dims, operand) in enumerate(zip(rule.operands, held, strict=True)):
        split = _split_of(rule, dims, operand)
        if split is None or not rule.splittable(split.factor, parts, split.blocks):
            continue
        if rule.order is not None and split.factor in ("s", "e"):
            if position == rule.order:
                return split
            continue
        if rule.counts is not None and split.factor == "e" and position != rule.counts:
            return split
        if best is None or operand.weight > best[0]:
            best = (operand.weight, split)
    return best[1] if best else None


def _split_of(rule: Rule, dims: Dims, operand: Held) -> Split | None:
    """The factor that an operand has split already."""
    match operand.kind:
        case Shard(dim, blocks) if dim < len(dims):  # else the checker objects to the placement
            return factor_at(rule, dims[dim], blocks)
        case Rows() if rule.together:  # what travels is split evenly
            return None
        case Rows(by):
            if dims and dims[0] == "s|e":
                return Split("s", blocks=operand.blocks) if by == "token" else Split("e")
            return Split(dims[0], by) if dims and dims[0] and "." not in dims[0] else None
        case _:
            return None


def factor_at(rule: Rule, dim: str | None, blocks: int) -> Split | None:
    """The factor of a merged dimension that is split when each of its blocks is."""
    before = 1  # the blocks that the slower factors make
    for factor in (dim or "").split("."):
        size = rule.quantum.get(factor, 0)
        if factor and blocks % before == 0 and (not size or blocks // before < size):
            return Split(factor, blocks=blocks // before)
        before *= size
    return None


def _operand(rule: Rule, position: int, split: Split, held: Kind) -> Kind:
    dims = rule.operands[position]
    if position == rule.counts and split.factor == "s":
        return PARTIAL  # each rank counts its own tokens' pairs; all ranks together have them all
    if position in rule.added and _summed(rule, split.factor):
        return PARTIAL
    if rule.together and split.factor in rule.together[:-1] and split.factor not in dims:
        if not (rule.suffices and isinstance(held, (Replicate, Invariant))):
            split = Split(rule.together[-1])
    return carried(rule, dims, split) or REPLICATE


def _summed(rule: Rule, factor: str) -> bool:
    """Whether the operator adds up over a factor, which no result then carries."""
    return all(factor not in (d or "").split(".") for dims in rule.results for d in dims)


def carried(rule: Rule, dims: Dims, split: Split) -> Kind | None:
    """The kind of an operand or result that carries the split factor; None if it does not."""
    if dims and dims[0] == "s|e" and split.factor in ("s", "e"):
        return Rows("token" if split.factor == "s" else "expert")
    for at, dim in enumerate(dims):
        factors = (dim or "").split(".")
        if split.factor in factors:
            if split.by and at == 0:
                return Rows(split.by)
            slower = factors[: factors.index(split.factor)]
            return Shard(at, split.blocks * math.prod(rule.quantum[f] for f in slower))
    return None


def _unsplit(rule: Rule, held: Sequence[Held]) -> Demand:
    """No factor is split: every rank does the same, on whole values or on terms of a sum."""
    pending = [i for i, operand in enumerate(held) if operand.kind == PARTIAL]
    if pending and rule.linear == JOINT and len(pending) == len(held):
        return Demand((PARTIAL,) * len(held), (PARTIAL,) * len(rule.results))
    if len(pending) == 1 and pending[0] in rule.linear:
        kinds = tuple(PARTIAL if i == pending[0] else REPLICATE for i in range(len(held)))
        return Demand(kinds, (PARTIAL,) * len(rule.results))
    replicated = any(operand.kind == REPLICATE and operand.differentiable for operand in held)
    kind = REPLICATE if replicated else INVARIANT
    return Demand((kind,) * len(held), (kind,) * len(rule.results))
