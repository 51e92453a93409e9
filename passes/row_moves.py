"""Operators that gather rows by routing, and those that collect them: see ``row_domains``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.passes.axes import (
    RESHAPES,
    Axis,
    Space,
    argument,
    carried,
    kinds,
    packet,
    positions,
    shape,
    tensors,
)
from moptrace.passes.row_domains import (
    Columns,
    Counts,
    Domains,
    Index,
    Meaning,
    Position,
    Ranking,
    Rows,
    Span,
    Sum,
    fill_of,
    span_of,
    without_history,
)
from moptrace.passes.row_keep import along_rule, pointwise_rule

__all__ = [
    "cat_rule",
    "gather_rule",
    "index_add_rule",
    "index_copy_rule",
    "index_put_rule",
    "index_rule",
    "maps_of",
    "nonzero_rule",
    "scatter_reduce_rule",
    "slice_rule",
    "slice_scatter_rule",
    "split_rule",
    "stack_rule",
    "substituted",
    "unified",
    "write_rows",
]

aten = torch.ops.aten


def places(domains: Domains, node: Any) -> list[Index] | None:
    """The coordinates at which an expert's mask holds, one map for each dimension."""
    mask = domains.rows(node)
    if mask is None or mask.expert is None or not mask.on or mask.off or mask.on is None:
        return None
    found = {a.kind for a in carried(mask.dims)}
    if found - {"token", "slot"}:
        return None
    flat = [axis for space in mask.dims for axis in space]
    while flat and flat[-1].kind == "slot":
        flat.pop()
    branch = Axis("branch", None, (mask.routing, tuple(flat)), mask.expert)
    return [Index(((branch,),), space, mask.routing) for space in mask.dims]


def nonzero_rule(domains: Domains, node: fx.Node) -> Meaning:
    if packet(node) is aten.where and len(node.args) > 1:
        return pointwise_rule(domains, node)
    found = places(domains, tensors(node)[0])
    if found is None:
        return None
    return Columns(tuple(found)) if packet(node) is aten.nonzero else tuple(found)


def gather_rule(domains: Domains, node: fx.Node) -> Meaning:
    """A gather along dimension 0 with an index that is expanded over features."""
    index = domains.index(node.args[2])
    if node.args[1] != 0 or index is None or index.routing is None or index.dims[:1] == ((),):
        return None
    if kinds(index.dims[1:]) - {"range"} or kinds((index.to,)) & {"expert", "slot", "range"}:
        return None
    return gather_rows(domains, node, node.args[0], 0, [replace(index, dims=index.dims[:1])])  # type: ignore[arg-type]


def _indices(domains: Domains, node: fx.Node) -> tuple[int, list[Index]] | None:
    """The first indexed dimension and the maps of an ``index`` or ``index_put``, masks resolved."""
    given: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    first = next((i for i, x in enumerate(given) if x is not None), 0)
    given = given[first:]
    if any(x is None for x in given):
        return None
    maps: list[Index] = []
    for x in given:
        value = roles.value(x)
        if isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8):
            found = places(domains, x)
            if found is None:
                return None
            maps.extend(found)
            continue
        found = domains.index(x) or domains.choice(x)
        if found is None:
            return None
        maps.append(found)
    return first, maps


def index_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Gathering by a map from one domain to another brings a value into the first."""
    source: Any = node.args[0]
    match packet(node):
        case aten.index:
            found = _indices(domains, node)
            if found is None:
                return _refused_gather(domains, node)
            first, maps = found
        case aten.index_select:
            first, maps = int(node.args[1]) % len(shape(source)), [domains.index(node.args[2])]  # type: ignore
        case _:  # embedding
            first, maps = 0, [domains.index(node.args[1])]
    if not maps or any(m is None for m in maps):
        return None
    return gather_rows(domains, node, source, first, maps)  # type: ignore[arg-type]


def _refused_gather(domains: Domains, node: fx.Node) -> None:
    domains.refuse(node, "the rows are selected by a mask or index whose meaning is not known")


def gather_rows(
    domains: Domains, node: fx.Node, source: fx.Node, first: int, maps: Sequence[Index]
) -> Meaning:
    routing = next((m.routing for m in maps if m.routing), None)
    if len({m.dims for m in maps}) != 1:
        return None
    dims, targets = maps[0].dims, [m.to for m in maps]
    inner = domains.meaning.get(source)
    before = getattr(inner, "dims", ((),) * len(shape(source)))
    if isinstance(inner, Rows) and inner.done:
        inner, before = None, ((),) * len(before)
    after = before[first + len(maps) :]
    result = (*before[:first], *dims, *after)
    if isinstance(inner, Index):
        change = unified(before[first : first + len(maps)], targets)
        if change is None:
            return None
        to = substituted(inner.to, change)
        return Index(tuple(substituted(s, change) for s in result), to, inner.routing or routing)
    if routing is None:
        return None
    if isinstance(inner, Rows):
        covered = before[first : first + len(maps)]
        if inner.routing is not routing:
            return domains.refuse(node, "it mixes the choices of two routers")
        if any(c and c != t for c, t in zip(covered, targets, strict=True)):
            return domains.refuse(node, "its index counts something else than the rows it selects")
        branches = [a for space in dims for a in space if a.kind == "branch"]
        expert = branches[0].expert if branches and inner.expert is not None else inner.expert
        if branches and inner.expert not in (None, branches[0].expert):
            return None
        if branches and inner.expert is not None:
            expert = None  # at its own pairs a masked value is an ordinary row
        return Rows(result, routing, on=inner.on, off=None, expert=expert)
    for target, size in zip(targets, shape(source)[first:], strict=False):
        known = [a.size for a in target]
        if None not in known and math.prod(known) != size:  # type: ignore[arg-type]
            return None
    selects = kinds(dims) & {"branch"}
    if selects and not routing.certain and routing.experts is None:
        return None  # integers compared with a constant need not choose experts: ignored labels
    if kinds(dims) <= {"token", "slot"} and kinds((targets[0],)) != {"expert"}:
        return None
    lookup = targets == [(routing.expert,)]
    if lookup:
        matrices = len(shape(source)) > first + 2
        if not (matrices or routing.slot or routing.looked_up):
            return None  # vectors alone are an embedding or a codebook; beside matrices, biases
        routing.looked_up = True
        if matrices or routing.certain:
            routing.experts = routing.experts or shape(source)[first]
    return Rows(result, routing, lookup=lookup)


def unified(axes: Sequence[Space], targets: Sequence[Space]) -> dict[Axis, Space] | None:
    """What ranges must stand for so that ``targets`` index ``axes``; None if they differ."""
    change: dict[Axis, Space] = {}
    for have, want in zip(axes, targets, strict=True):
        if have == want:
            continue
        if len(have) == 1 and have[0].kind == "range":
            change[have[0]] = want
        elif len(have) == len(want) and all(
            a == b or a.kind == "range" for a, b in zip(have, want, strict=True)
        ):
            change.update({a: (b,) for a, b in zip(have, want, strict=True) if a != b})
        else:
            return None
    return change


def substituted(space: Space, change: dict[Axis, Space]) -> Space:
    return tuple(b for a in space for b in change.get(a, (a,)))


def maps_of(domains: Domains, node: fx.Node) -> tuple[int, list[Index]] | None:
    """The first indexed dimension and the index maps of a gather, None if it has no meaning."""
    if packet(node) is aten.index:
        return _indices(domains, node)
    if packet(node) is aten.gather:
        index = domains.index(node.args[2])
        return index and (0, [replace(index, dims=index.dims[:1])])
    at = 2 if packet(node) is aten.index_select else 1
    first = int(node.args[1]) if at == 2 else 0  # type: ignore[arg-type]
    index = domains.index(node.args[at])
    return index and (first % len(shape(node.args[0])), [index])  # type: ignore[arg-type]


# ---- Collecting rows -----------------------------------------------------------------------------


def index_put_rule(domains: Domains, node: fx.Node) -> Meaning:
    found = _indices(domains, node)
    if found is None or found[0] != 0:
        return _refused_gather(domains, node)
    adds = bool(argument(node, 3, "accumulate", False))
    return write_rows(domains, node, node.args[0], found[1], node.args[2], adds=adds)


def index_add_rule(domains: Domains, node: fx.Node) -> Meaning:
    """index_add, and scatter_add with an index that is expanded over features."""
    base, dim, index, rows = node.args[:4]
    found = domains.index(index)
    if found is None or dim != 0 or node.kwargs.get("alpha", 1) != 1:
        if isinstance(found, Index) and found.to and found.routing and found.to[0].kind == "expert":
            return _count_by_adding(domains, found, node)
        return domains.refuse(node, "it adds rows at places whose meaning is not known")
    if found.to[:1] and found.to[0].kind == "expert":
        return _count_by_adding(domains, found, node)
    maps = [replace(found, dims=found.dims[:1])]
    return write_rows(domains, node, base, maps, rows, adds=True)


def index_copy_rule(domains: Domains, node: fx.Node) -> Meaning:
    base, dim, index, rows = node.args[:4]
    found = domains.index(index)
    if dim != 0 or found is None:
        return domains.refuse(node, "it writes rows at places whose meaning is not known")
    return write_rows(domains, node, base, [found], rows, adds=False)


def scatter_reduce_rule(domains: Domains, node: fx.Node) -> Meaning:
    if argument(node, 4, "reduce") == "sum" and argument(node, 5, "include_self", True):
        return index_add_rule(domains, node)
    return domains.refuse(node, "it reduces rows by something other than a sum")


def _count_by_adding(domains: Domains, ids: Index, node: fx.Node) -> Meaning:
    """``zeros(E).scatter_add(0, ids, ones)`` counts pairs."""
    complete = ids.routing and (
        carried(ids.dims) == set(ids.routing.pairs) or "sorted" in kinds(ids.dims)
    )
    if (
        complete
        and len(shape(node)) == 1
        and fill_of(node.args[0]) == 0
        and fill_of(node.args[3]) == 1
    ):
        return Counts(ids.routing)  # type: ignore[arg-type]
    return None


def write_rows(
    domains: Domains, node: fx.Node, base: Any, maps: Sequence[Index], values: Any, *, adds: bool
) -> Meaning:
    """Rows that are written or added at the places that ``maps`` give."""
    if len({m.dims for m in maps}) != 1 or len(maps[0].dims) != 1:
        return None
    domain, targets = maps[0].dims[0], tuple(m.to for m in maps)
    integers = domains.index(values)
    if integers is not None:  # a permutation that is written, such as an inverse one
        if adds or len(targets) != 1:
            return None
        change = unified((integers.dims[0],), (domain,))
        if change is None or {a.kind for a in domain} != {"sorted"}:
            return None
        return Index(targets, substituted(integers.to, change), integers.routing or maps[0].routing)
    rows = domains.rows(values)
    if rows is None or not isinstance(values, fx.Node):
        return domains.refuse(node, "it writes something else than rows of experts")
    if rows.dims[:1] != (domain,):
        return domains.refuse(node, "the rows are not those that its index counts")
    features = rows.dims[1:]
    if carried(features):
        return domains.refuse(node, "the rows have a second dimension of routing")
    dims = (*targets, *features)
    axis = domain[0] if len(domain) == 1 else None
    whole = axis is not None and axis.kind == "sorted"
    if axis is None or axis.kind not in ("sorted", "branch"):
        return None
    routing = rows.routing
    previous = domains.meaning.get(base)
    if not isinstance(previous, Rows) or previous.routing is not routing or fill_of(base) == 0:
        previous = None
    onto_tokens = kinds(dims) == {"token"}
    if not adds and (added := _added_to(domains, node, base, maps, values)) is not None:
        values, adds = added, True
    if onto_tokens and not adds and routing.k > 1:
        return domains.refuse(node, "a later expert overwrites what an earlier one wrote")
    covers = not (onto_tokens and adds)
    start = None if covers or fill_of(base) == 0 else base
    if not isinstance(previous, Sum) or previous.dims != dims:
        if previous is not None:
            return domains.refuse(node, "it adds to something else than a sum of experts' rows")
        previous = None
    return Sum(
        dims, routing, base=previous.base if previous else start, previous=previous, rows=values,
        rows_dims=rows.dims, added=None if whole else axis.expert, done=onto_tokens,
    )  # fmt: skip


def _added_to(
    domains: Domains, node: fx.Node, base: Any, maps: Sequence[Index], values: fx.Node
) -> fx.Node | None:
    """``out[i] = out[i] + rows``: the node of ``rows``."""
    if packet(values) is not aten.add or len(values.args) != 2 or values.kwargs:
        return None
    for mine, other in (values.args, values.args[::-1]):
        while isinstance(mine, fx.Node) and packet(mine) in RESHAPES:
            mine = mine.args[0]
        if not (isinstance(mine, fx.Node) and isinstance(other, fx.Node)):
            continue
        if packet(mine) not in (aten.index, aten.index_select) or mine.args[0] is not base:
            continue
        if packet(mine) is aten.index_select:
            same = [domains.index(mine.args[2])] == list(maps)
        else:
            same = (_indices(domains, mine) or (0, None))[1] == list(maps)
        if same:
            return other
    return None


def cat_rule(domains: Domains, node: fx.Node) -> Meaning:
    """The rows of expert 0, 1, ... E-1 one after another are rows sorted by expert."""
    parts: Any = node.args[0]
    meanings = [domains.meaning.get(p) for p in parts]
    if not any(m is not None for m in meanings):
        return None
    dim = argument(node, 1, "dim", 0)
    if all(isinstance(m, Rows | Index) and m.dims and _branch(m.dims[0]) for m in meanings):
        if dim % len(shape(node)) == 0:
            return _joined(domains, node, parts, meanings)
    if isinstance(meanings[-1], Counts) and meanings[-1].running and fill_of(parts[0]) == 0:
        return None
    if (
        all(isinstance(m, Index) for m in meanings)
        and dim % len(shape(node)) == len(shape(node)) - 1
    ):
        return _several_choices(domains, node, meanings)
    if any(isinstance(m, Counts | Span | Index | Position) for m in meanings):
        return None
    along = positions(node)
    return along_rule(domains, node, along) if along else None


def _several_choices(domains: Domains, node: fx.Node, choices: Sequence[Any]) -> Meaning:
    """Ids chosen one after another, such as an argmax and the next argmax, side by side."""
    if any(m.routing is None or m.to != (m.routing.expert,) or m.dims[-1] for m in choices):
        return None
    experts = {m.routing.experts for m in choices if m.routing}
    if len(experts) != 1:
        return None
    return domains.chosen(node, len(shape(node)) - 1, experts=experts.pop())


def _branch(space: Space) -> Axis | None:
    return space[0] if len(space) == 1 and space[0].kind == "branch" else None


def _joined(domains: Domains, node: fx.Node, parts: Any, meanings: list[Any]) -> Meaning:
    branches = [_branch(m.dims[0]) for m in meanings]
    if [b.expert for b in branches if b] != list(range(len(parts))):
        return domains.refuse(node, "it joins the rows of experts in another order than 0, 1, 2...")
    routing = meanings[0].routing
    order = branches[0].of if branches[0] else None
    size = math.prod(a.size or 1 for a in routing.pairs)
    axis = order if isinstance(order, Axis) else Axis("sorted", size, order)
    dims = ((axis,), *meanings[0].dims[1:])
    if isinstance(meanings[0], Index):
        return Index(dims, meanings[0].to, routing)
    result: Sum | None = None
    for branch, part, meaning in zip(branches, parts, meanings, strict=True):
        assert branch is not None
        result = Sum(
            dims, routing, previous=result, rows=part, rows_dims=meaning.dims, added=branch.expert
        )
    return result


def slice_rule(domains: Domains, node: fx.Node) -> Meaning:
    """A slice of sorted rows between two running totals is one expert's."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    dim = argument(node, 1, "dim", 0)
    if isinstance(meaning, Ranking):
        if dim % (meaning.lead + 1) != meaning.lead or argument(node, 2, "start") not in (None, 0):
            return None
        return domains.chosen(node, meaning.lead, experts=meaning.experts, certain=True)
    if isinstance(meaning, Columns):
        start, end = argument(node, 2, "start"), argument(node, 3, "end")
        if dim % 2 == 1 and isinstance(start, int) and isinstance(end, int) and end - start == 1:
            column = meaning.columns[start]
            return replace(column, dims=(*column.dims, ()))
        return meaning if dim % 2 == 0 else None
    if not isinstance(meaning, Rows | Index):
        return None
    space = meaning.dims[dim]
    if space and space[0].kind == "sorted" and dim == 0:
        branch = _slice_branch(domains, node, space[0])
        if branch is None:
            return domains.refuse(node, "a slice of sorted rows that is not one expert's")
        return replace(without_history(meaning), dims=((branch,), *meaning.dims[1:]))
    if isinstance(meaning, Index) or meaning.done:
        return meaning if shape(node) == shape(node.args[0]) else None  # type: ignore[arg-type]
    return along_rule(domains, node, positions(node))  # type: ignore[arg-type]


def _slice_branch(domains: Domains, node: fx.Node, axis: Axis) -> Axis | None:
    start = span_of(domains, argument(node, 2, "start", 0) or 0)
    end = span_of(domains, argument(node, 3, "end"))
    if start is None or end is None or end.start != 0 or start.start != 0:
        return None
    if end.stop - start.stop != 1:
        return None
    return Axis("branch", None, axis, start.stop)


def slice_scatter_rule(domains: Domains, node: fx.Node) -> Meaning:
    """One expert's rows are written into a buffer of sorted rows."""
    base, values = node.args[:2]
    rows = domains.rows(values)
    dim = argument(node, 2, "dim", 0)
    if rows is None or dim != 0 or not (branch := _branch(rows.dims[0])):
        return None
    axis = branch.of
    if not isinstance(axis, Axis):
        return domains.refuse(node, "it writes rows that were not a slice of sorted rows")
    start = span_of(domains, argument(node, 3, "start", 0) or 0)
    end = span_of(domains, argument(node, 4, "end"))
    if start is None or end is None or (start.stop, end.stop) != (branch.expert, branch.expert + 1):  # type: ignore[operator]
        return domains.refuse(node, "it writes the rows of one expert over those of another")
    dims = ((axis,), *rows.dims[1:])
    previous = domains.rows(base)
    return Sum(
        dims, rows.routing, previous=previous if isinstance(previous, Sum) else None,
        rows=values, rows_dims=rows.dims, added=branch.expert,  # type: ignore[arg-type]
    )  # fmt: skip


def split_rule(domains: Domains, node: fx.Node) -> Meaning:
    """A split of sorted rows by counts gives each expert's rows."""
    meaning = domains.meaning.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(meaning, Rows | Index):
        return None
    dim = argument(node, 2, "dim", 0) % len(meaning.dims)
    space = meaning.dims[dim]
    if space and space[0].kind == "sorted" and dim == 0:
        sizes = [span_of(domains, s) for s in node.args[1]]  # type: ignore[union-attr]
        wanted = [(e, e + 1) for e in range(len(sizes))]
        if [(s.start, s.stop) for s in sizes if s] != wanted:
            return domains.refuse(node, "a split of sorted rows that is not one piece an expert")
        return tuple(
            replace(
                without_history(meaning),
                dims=((Axis("branch", None, space[0], e),), *meaning.dims[1:]),
            )
            for e in range(len(sizes))
        )
    if isinstance(meaning, Index):
        return None
    return along_rule(domains, node, positions(node))  # type: ignore[arg-type]


def stack_rule(domains: Domains, node: fx.Node) -> Meaning:
    """Weighted results of expert 0, 1, ... E-1, stacked, have a dimension of experts."""
    parts: Any = node.args[0]
    meanings = [domains.rows(p) for p in parts]
    if not all(m is not None and m.expert is not None for m in meanings):
        if any(meanings):
            domains.refuse(node, "it stacks rows of experts")
        return None
    if [m.expert for m in meanings if m] != list(range(len(parts))):
        return None
    first = meanings[0]
    assert first is not None
    at = argument(node, 1, "dim", 0) % (len(first.dims) + 1)
    dims = (*first.dims[:at], (first.routing.expert,), *first.dims[at:])
    return replace(first, dims=dims, expert=None)
