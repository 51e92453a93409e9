"""Operators that keep their rows, and the sums over slots or experts that end a block.

See ``row_domains`` for the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moptrace.passes.axes import (
    CASTS,
    OF_ONE,
    Along,
    Axis,
    Contraction,
    Dims,
    Space,
    argument,
    carried,
    is_one,
    kinds,
    numel,
    packet,
    positions,
    reshaped,
    shape,
    tensors,
)
from moptrace.passes.row_domains import (
    Columns,
    Counts,
    Domains,
    Index,
    Meaning,
    Rows,
    Span,
    Sum,
    aligned,
    fill_of,
    is_literal,
    spelled,
    without_history,
)

__all__ = [
    "along_rule",
    "contraction_rule",
    "divide_rule",
    "expand_rule",
    "permute_rule",
    "pointwise_rule",
    "repeat_interleave_rule",
    "reshape_rule",
    "select_rule",
    "unbind_rule",
]

aten = torch.ops.aten


def reshape_rule(domains: Domains, node: fx.Node) -> Meaning:
    source: Any = node.args[0]
    meaning = domains.meaning.get(source)
    if isinstance(meaning, Counts | Span) and len(shape(node)) == len(shape(source)):
        return meaning
    if isinstance(meaning, Columns) and len(meaning.columns) == 1 and len(shape(node)) == 1:
        return meaning.columns[0]
    if not isinstance(meaning, Rows | Index):
        return None
    if isinstance(meaning, Rows) and meaning.done:
        return None
    dims = reshaped(shape(source), meaning.dims, shape(node))
    if dims is None:
        return domains.refuse(node, "it merges rows with features, or cuts rows apart")
    return replace(without_history(meaning), dims=dims)


def permute_rule(domains: Domains, node: fx.Node, order: list[int]) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(meaning, Rows | Index) or (isinstance(meaning, Rows) and meaning.done):
        return None
    return replace(without_history(meaning), dims=tuple(meaning.dims[d] for d in order))


def expand_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Broadcast dimensions of an index count something of their own; those of rows are features."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(meaning, Rows | Index) or (isinstance(meaning, Rows) and meaning.done):
        return None
    dims = aligned(meaning.dims, len(shape(node)))
    if isinstance(meaning, Index):
        dims = tuple(
            space
            if space or is_one(n) or not isinstance(n, int)
            else (Axis("range", n, (node, i)),)
            for i, (space, n) in enumerate(zip(dims, shape(node), strict=True))
        )
    return replace(without_history(meaning), dims=dims)


def repeat_interleave_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Each token's number k times over: a map from pairs to tokens."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    repeats = argument(node, 1, "repeats")
    if not isinstance(meaning, Index) or len(meaning.dims) != 1 or not isinstance(repeats, int):
        return None
    extra = () if repeats == 1 else (Axis("range", repeats, node),)
    return replace(meaning, dims=((*meaning.dims[0], *extra),))


def divide_rule(domains: Domains, node: fx.Node) -> Meaning:
    """The quotient and remainder of a flat coordinate are its leading and trailing parts."""
    meaning = domains.index(node.args[0])
    if meaning is None:
        return pointwise_rule(domains, node) if node.args[0] in domains.meaning else None  # type: ignore
    number = node.args[1]
    if packet(node) is aten.div and node.kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return None
    if not isinstance(number, int):
        return None
    if number == 1 and packet(node) is not aten.remainder:
        return meaning
    for cut in range(len(meaning.to) + 1):
        if math.prod(a.size or 0 for a in meaning.to[cut:]) == number:
            quotient = packet(node) is not aten.remainder
            return replace(meaning, to=meaning.to[:cut] if quotient else meaning.to[cut:])
    return None


def pointwise_rule(domains: Domains, node: fx.Node) -> Meaning:
    operands = tensors(node)
    found = [domains.meaning.get(x) for x in operands]
    if packet(node) in CASTS and not isinstance(found[0], Rows):
        return found[0]
    rows = [m for m in found if isinstance(m, Rows) and not m.done]
    if not rows:
        return None
    if packet(node) in (aten.add, aten.sub) and (sum_ := dense_sum_rule(domains, node, rows)):
        return sum_
    routing = rows[0].routing
    if any(m.routing is not routing for m in rows):
        return domains.refuse(node, "it mixes the choices of two routers")
    dims = _joint_dims(domains, node, operands)
    if dims is None:
        return domains.refuse(node, "it combines rows of different domains")
    experts = {m.expert for m in rows if not (kinds(m.dims) & {"branch"})} - {None}
    if len(experts) > 1:
        return None
    expert = experts.pop() if experts else None
    on, off = (_constant(node, domains, at) for at in ("on", "off"))
    lookup = packet(node) in CASTS and rows[0].lookup
    result = Rows(dims, routing, on=on, off=off, expert=expert, lookup=lookup)
    if expert is not None or "expert" in kinds(dims):
        if off is None:
            return None
    return result if not result.total or _goes_on(domains, node) else None


def _goes_on(domains: Domains, node: fx.Node) -> bool:
    """Whether an operator on complete values is the experts' own, and not what comes after them."""
    rows = [domains.rows(x) for x in tensors(node)]
    routing = next(m.routing for m in rows if m is not None)
    if packet(node) in CASTS or any(m is not None and m.lookup for m in rows):
        return True
    if None not in rows and routing.looked_up:
        return True
    wide = [numel(x) for x, m in zip(tensors(node), rows, strict=True) if m is None]
    tokens = math.prod(a.size or 1 for a in routing.tokens)
    return packet(node) is aten.mul and max(wide, default=0) <= tokens


def _joint_dims(domains: Domains, node: fx.Node, operands: Iterable[fx.Node]) -> Dims | None:
    """The axes of a broadcast result; None if its operands disagree."""
    rank = len(shape(node))
    result: list[Space] = [()] * rank
    for x in operands:
        rows = domains.rows(x)
        if rows is None:
            continue
        for d, space in enumerate(aligned(rows.dims, rank)):
            if space and result[d] and result[d] != space:
                return None
            result[d] = result[d] or space
    return tuple(result)


def _constant(node: fx.Node, domains: Domains, at: str) -> Any:
    """What the operator gives at selected ("on") or other ("off") pairs, where that is constant.

    At other pairs a factor of zero decides; at selected ones the other factor still is computed.
    """

    def known(x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return x
        rows = domains.rows(x)
        return _UNKNOWN if rows is None or getattr(rows, at) is None else getattr(rows, at)

    args = [known(x) for x in node.args]
    match packet(node):
        case aten.mul if at == "off" and any(is_literal(a) and a == 0 for a in args):
            return 0
        case aten.div if at == "off" and is_literal(args[0]) and args[0] == 0:
            return 0
        case aten.masked_fill if args[1] is not _UNKNOWN:
            return args[2] if args[1] and is_literal(args[2]) else _or_none(args[0])
        case aten.where if args[0] is not _UNKNOWN and len(args) == 3:
            return _or_none(args[1] if args[0] else args[2])
        case _ if packet(node) in CASTS:
            return _or_none(args[0])
        case aten.dropout:
            return 0 if args[0] == 0 and is_literal(args[0]) else None
        case _:
            pass
    if any(x is _UNKNOWN for x in args) or any(
        isinstance(v, fx.Node) for v in node.kwargs.values()
    ):
        return None
    try:
        values = [torch.tensor(a) if is_literal(a) and i == 0 else a for i, a in enumerate(args)]
        if len(values) > 1 and str(node.target).endswith(".Tensor") and is_literal(values[1]):
            values[1] = torch.tensor(values[1])
        return node.target(*values, **node.kwargs).item()  # type: ignore[operator]
    except (RuntimeError, TypeError, AttributeError):
        return None


_UNKNOWN = object()


def _or_none(value: Any) -> Any:
    return None if value is _UNKNOWN else value


def dense_sum_rule(domains: Domains, node: fx.Node, rows: list[Rows]) -> Meaning:
    """``out + w[:, e, None] * expert_e(x)``: a sum, expert by expert, over all tokens."""
    if packet(node) is not aten.add or len(node.args) != 2 or node.kwargs:
        return None
    left, right = (x if isinstance(x, fx.Node) else None for x in node.args)
    if left is None or right is None:
        return None
    a, b = domains.rows(left), domains.rows(right)
    if isinstance(domains.meaning.get(right), Sum) or (b is None and a is not None):
        left, right, a, b = right, left, b, a
    total = domains.meaning.get(left)
    total = total if isinstance(total, Sum) and total.expert is None else None
    if b is None or b.expert is None or b.off != 0 or kinds(b.dims) != {"token"}:
        return None
    if not any(not space for space in b.dims) or carried(b.dims) != set(b.routing.tokens):
        return None
    if not (total or a is None or (a.expert is not None and a.off == 0)):
        return None
    if shape(node) != shape(right):
        return None
    if total is None and a is not None:
        if a.expert == b.expert:
            return None
        first = _without_zero(left)
        total = Sum(a.dims, a.routing, rows=first, rows_dims=a.dims, added=a.expert, done=True)
    elif total is not None and (total.routing is not b.routing or total.dims != b.dims):
        total = None  # another block's sum, such as a residual: an opaque start
    start = None if total is not None or fill_of(left) == 0 else left
    return Sum(
        b.dims, b.routing, base=total.base if total else start, previous=total, rows=right,
        rows_dims=b.dims, added=b.expert, done=True,
    )  # fmt: skip


def _without_zero(node: fx.Node) -> fx.Node:
    """The other operand of an addition of 0, with which Python's ``sum`` starts."""
    if packet(node) is aten.add and len(node.args) == 2 and not node.kwargs:
        for one, other in (node.args, node.args[::-1]):
            if is_literal(one) and one == 0 and isinstance(other, fx.Node):
                return other
    return node


def along_rule(domains: Domains, node: fx.Node, along: Along) -> Meaning:
    """Operators that mix positions along some dimensions, and treat all others alike."""
    operands = tensors(node)
    meanings = [domains.rows(x) for x in operands]
    first = next((m for m in meanings if m is not None), None)
    if first is None:
        return None
    joint: list[Space] = [()] * len(first.dims)
    for m in meanings:
        for d, space in enumerate(m.dims if m else ()):
            if space and joint[d] and joint[d] != space:
                return domains.refuse(node, "it joins rows of different domains")
            joint[d] = joint[d] or space
    axes = {a for d in along.mixed if None not in along.kept for a in joint[d]}
    kept = tuple(
        () if d is None or (shape(node) and is_one(shape(node)[i])) else joint[d]
        for i, d in enumerate(along.kept)
    )
    if axes:
        return mixing_rule(domains, node, first, along, kept, axes)
    on, off = (
        _constant_along(node, along, at) if len(operands) == 1 else None
        for at in (first.on, first.off)
    )
    if off is None and (first.expert is not None or "expert" in kinds(first.dims)):
        if not kinds(first.dims) & {"branch"}:
            return None
    lookup = len(operands) == 1 and first.lookup
    result = Rows(kept, first.routing, on=on, off=off, expert=first.expert, lookup=lookup)
    if result.total and any(shape(operands[0])[d] != 1 for d in along.mixed):
        return None
    return result


_PIECES = {aten.split, aten.chunk, aten.split_with_sizes, aten.slice, aten.select, aten.unbind}


def _constant_along(node: fx.Node, along: Along, value: Any) -> Any:
    """What an operator along features gives where they all are ``value``, if that is known."""
    alone = all(shape(tensors(node)[0])[d] == 1 for d in along.mixed)
    if packet(node) in _PIECES or (alone and packet(node) in OF_ONE):
        return value
    return value if value == 0 and packet(node) in (aten.sum, aten.mean, aten.any) else None


def mixing_rule(
    domains: Domains, node: fx.Node, rows: Rows, along: Along, kept: Dims, axes: set[Axis]
) -> Meaning:
    """An operator along a dimension of routing."""
    found = {a.kind for a in axes}
    match packet(node):
        case aten.sum | aten.any:
            return reduced(domains, node, replace(without_history(rows)), kept, axes)  # type: ignore[arg-type]
        case aten.softmax | aten._softmax if found == {"expert"} and rows.off == -math.inf:
            return Rows(kept, rows.routing, off=0)
        case aten.select if found == {"expert"} and isinstance(number := node.args[2], int):
            return replace(without_history(rows), dims=kept, expert=number)
        case aten.slice if found == {"expert"} and shape(node)[along.mixed[0]] == 1:
            start = argument(node, 2, "start") or 0
            return replace(without_history(rows), dims=kept, expert=start) if start >= 0 else None
        case aten.unbind if found == {"expert"}:
            count = shape(node.args[0])[along.mixed[0]]  # type: ignore[arg-type]
            return tuple(replace(without_history(rows), dims=kept, expert=e) for e in range(count))
        case _:
            pass
    return domains.refuse(
        node, f"{spelled(node)} mixes rows, which an expert must treat one by one"
    )


def reduced(domains: Domains, node: fx.Node, rows: Rows, kept: Dims, axes: set[Axis]) -> Meaning:
    """What is left when ``axes`` are summed away."""
    routing, found = rows.routing, {a.kind for a in axes}
    if found & {"sorted", "branch", "range"}:
        return domains.refuse(node, "it adds up rows, which an expert must treat one by one")
    left = kinds(kept)
    narrow = rows.expert is not None or "expert" in kinds(rows.dims)
    if "token" in found:
        if (
            rows.on == 1
            and rows.off == 0
            and left <= {"expert"}
            and carried(rows.dims) >= set(routing.tokens)
            and (routing.distinct or carried(rows.dims) >= set(routing.slot))
        ):
            return (
                Counts(routing) if left else Span(routing, rows.expert or 0, (rows.expert or 0) + 1)
            )
        return None
    if narrow and (rows.off != 0 or ("slot" in found and not routing.distinct)):
        return None
    whole = "slot" not in left and "expert" not in left and rows.expert is None
    if not whole:
        return replace(rows, dims=kept, on=rows.on)
    if all(rows.dims) or all(kept) or carried(kept) != set(routing.tokens):
        return None  # a number for each token: no result of experts
    return Rows(kept, routing, done=True)


def contraction_rule(domains: Domains, node: fx.Node, product: Contraction) -> Meaning:
    """A product of rows with weights; summed over slots or experts, it is the end of a block."""
    meaning: dict[str, Space] = {}
    rows: list[Rows] = []
    for x, letters in zip(product.operands, product.letters, strict=True):
        found = domains.rows(x)
        if found is None:
            continue
        rows.append(found)
        for letter, space in zip(letters, found.dims, strict=True):
            if space and meaning.get(letter, space) != space:
                return domains.refuse(node, "it multiplies rows of different domains")
            if space:
                meaning[letter] = space
    if not rows:
        return None
    routing = rows[0].routing
    if any(m.routing is not routing for m in rows):
        return domains.refuse(node, "it mixes the choices of two routers")
    kept = tuple(meaning.get(letter, ()) for letter in product.result)
    gone = {a for letter, space in meaning.items() if letter not in product.result for a in space}
    experts = {m.expert for m in rows if "branch" not in kinds(m.dims)} - {None}
    if len(experts) > 1:
        return None
    letters = dict.fromkeys(letter for operand in product.letters for letter in operand)
    joint = tuple(meaning.get(letter, ()) for letter in letters)
    off = 0 if any(m.off == 0 for m in rows) and product.bias is None else None
    result = Rows(joint, routing, off=off, expert=experts.pop() if experts else None)
    if (result.expert is not None or "expert" in kinds(joint)) and off is None:
        return None
    if product.grouped and not isinstance(domains.meaning.get(node.args[2]), Counts):  # type: ignore
        return domains.refuse(
            node, "the sizes of its groups are not the numbers of pairs of experts"
        )
    if not gone:
        result = replace(result, dims=kept)
        return result if not result.total or any(m.lookup for m in rows) else None
    left = reduced(domains, node, result, kept, gone)
    ends = isinstance(left, Rows) and left.done
    return None if ends and not _spread(product, meaning) else left


def _spread(product: Contraction, meaning: dict[str, Space]) -> bool:
    """Whether an operand besides the routing weights depends on tokens and on what is summed away.

    A matrix of tokens and keys times values, as in sparse attention, is no mixture of experts.
    """
    for letters in product.letters:
        spaces = [meaning.get(letter, ()) for letter in letters]
        axes = {a.kind for space in spaces for a in space}
        if not all(spaces) and "token" in axes and axes & {"slot", "expert", "sorted"}:
            return True
    return False


def select_rule(domains: Domains, node: fx.Node) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    dim, number = node.args[1], node.args[2]
    if isinstance(meaning, Columns) and isinstance(number, int):
        return meaning.columns[number] if dim in (1, -1) else None
    if isinstance(meaning, Counts) and isinstance(number, int) and number >= 0:
        return Span(meaning.routing, 0 if meaning.running else number, number + 1)
    if isinstance(meaning, Rows) and not meaning.done:
        return along_rule(domains, node, positions(node))  # type: ignore[arg-type]
    if isinstance(meaning, Index) and isinstance(dim, int):
        at = dim % len(meaning.dims)
        if shape(node.args[0])[at] == 1:  # type: ignore[arg-type]
            return replace(meaning, dims=(*meaning.dims[:at], *meaning.dims[at + 1 :]))
    return None


def unbind_rule(domains: Domains, node: fx.Node) -> Meaning:
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    dim = argument(node, 1, "dim", 0)
    if isinstance(meaning, Columns) and dim in (1, -1):
        return meaning.columns
    if isinstance(meaning, Counts):
        count = meaning.routing.experts or 0
        return tuple(
            Span(meaning.routing, 0 if meaning.running else e, e + 1) for e in range(count)
        )
    if isinstance(meaning, Rows) and not meaning.done:
        return along_rule(domains, node, positions(node))  # type: ignore[arg-type]
    return None
