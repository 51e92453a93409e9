"""What changed between two programs, node by node."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

from torch import fx

from moptrace import roles
from moptrace.core import Program
from moptrace.fold import runs
from moptrace.render import (
    FOLD_ABOVE,
    Line,
    NameOf,
    Writer,
    call_text,
    node_count,
    op_name,
    percent,
    plain,
    type_name,
    without_numbers,
    write_lines,
)

__all__ = ["diff"]

CONTEXT = 2  # unchanged lines shown on either side of a change


def diff(before: Program, after: Program, block: int | None = None) -> str:
    """What changed from one program to another, node by node.

    Lines begin with ``-`` (only before), ``+`` (only after) or ``~`` (the same operation on the
    same operands, but its type or tag is new); unchanged stretches are counted. A node that was
    only renamed, or whose operands were, is unchanged. ``block`` restricts the lines to one
    Mixture-of-Experts block. In more than 400 lines, runs that differ in numbers alone are folded.
    """
    return "\n".join(_difference(before, after, block))


def _difference(before: Program, after: Program, block: int | None) -> Iterator[str]:
    old, new = _operations(before, block), _operations(after, block)
    match = _match(before, after)
    changes = [_change(node, match.get(node), match, before, after) for node in new]
    kept = set(match.values())
    gone = [node for node in old if node not in kept]
    yield _change_title(before, after, new, changes, gone)
    lines = _merged(old, new, changes, match, before, after)
    if all(line.sign == " " for line in lines):
        yield "  no node changed"
        return
    yield from write_lines(list(_like_it_once(list(_near_changes(lines)))), plain)


def _operations(program: Program, block: int | None) -> list[fx.Node]:
    nodes = list(program.graph.nodes)
    if block is None:
        return nodes
    inside = _blocks(nodes, {parameter.name for parameter in program.signature.parameters})
    return [node for node in nodes if inside[node] == block]


def _blocks(nodes: Sequence[fx.Node], parameters: set[str]) -> dict[fx.Node, int | None]:
    """Every node's block; a parameter, and what is made of it alone, has that of its users."""
    made_of_parameters: set[fx.Node] = set()
    for node in nodes:
        inputs = node.all_input_nodes
        if node.name in parameters or (inputs and made_of_parameters.issuperset(inputs)):
            made_of_parameters.add(node)
    found: dict[fx.Node, int | None] = {}
    for node in reversed(nodes):
        users = {found.get(user) for user in node.users}
        own = roles.role(node).block
        inherited = users.pop() if len(users) == 1 and node in made_of_parameters else None
        found[node] = inherited if own is None else own
    return found


def _change_title(
    before: Program,
    after: Program,
    new: Sequence[fx.Node],
    changes: Sequence[str],
    gone: Sequence[fx.Node],
) -> str:
    made = Counter(
        op_name(node.target) if node.op == "call_function" else "input"
        for node, change in zip(new, changes, strict=True)
        if change == "new"
    )
    counted = sorted(made.items(), key=lambda item: (-item[1], item[0]))
    counted += [(word, changes.count(word)) for word in ("rewired", "retyped", "retagged")]
    counted.append(("removed", len(gone)))
    words = "  ".join(f"{name} x{count}" for name, count in counted if count)
    sizes = f"{node_count(before)} -> {node_count(after)} nodes"
    return "   ".join(filter(None, (_steps(before, after), sizes, words)))


def _steps(before: Program, after: Program) -> str:
    """The passes that lead from one program to the other, or their levels if none do."""
    if before in after.history:
        passes = after.history[after.history.index(before) + 1 :]
        return ", ".join(str(p.made_by) for p in passes) or str(after.made_by or "trace")
    return f"{before.level} -> {after.level}"


def _match(before: Program, after: Program) -> dict[fx.Node, fx.Node]:
    """The nodes of ``after`` that were in ``before``: by structure first, then by name.

    A pass keeps the names of what it does not touch, but a node that it makes may take a name
    that another had; so names count only between nodes that the same pass made.
    """
    names = {node.name: node for node in before.graph.nodes}
    structures: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in reversed(list(before.graph.nodes)):
        structures[_structure(node, percent)].append(node)
    match: dict[fx.Node, fx.Node] = {}
    taken: set[fx.Node] = set()

    def known(node: fx.Node) -> str:
        return f"%{match[node].name}" if node in match else f"new %{node.name}"

    for node in after.graph.nodes:
        alike = structures[_structure(node, known)]
        while alike and alike[-1] in taken:
            alike.pop()
        named = names.get(node.name)
        found = alike[-1] if alike else None
        if named is not None and named not in taken and _same_origin(named, node):
            found = named if named in alike or found is None else found
        if found is not None:
            match[node] = found
            taken.add(found)
    return match


def _structure(node: fx.Node, name_of: NameOf) -> Hashable:
    own = node.name if node.op in ("placeholder", "output") else ""
    return (node.op, own, str(node.target) if not own else "", call_text(node, name_of))


def _same_origin(a: fx.Node, b: fx.Node) -> bool:
    return a.op == b.op and roles.role(a).made_by == roles.role(b).made_by


def _change(
    node: fx.Node,
    old: fx.Node | None,
    match: dict[fx.Node, fx.Node],
    before: Program,
    after: Program,
) -> str:
    """One word for what happened to a node of ``after``; empty if nothing did."""
    if old is None:
        return "new"

    def known(x: fx.Node) -> str:
        return f"%{match[x].name}" if x in match else "new"

    if _structure(node, known) != _structure(old, percent):
        return "rewired"
    if type_name(node, after.level) != type_name(old, before.level):
        return "retyped"
    mine, theirs = roles.role(node), roles.role(old)
    return "" if (mine.component, mine.block) == (theirs.component, theirs.block) else "retagged"


def _merged(
    old: Sequence[fx.Node],
    new: Sequence[fx.Node],
    changes: Sequence[str],
    match: dict[fx.Node, fx.Node],
    before: Program,
    after: Program,
) -> list[Line]:
    """Both programs as one list of lines, in an order that keeps each program's own."""
    was, now = Writer(before), Writer(after)
    place = {node: position for position, node in enumerate(old)}
    pairs = [(i, place[match[n]]) for i, n in enumerate(new) if match.get(n) in place]
    anchors = [*_longest_increasing(pairs), (len(new), len(old))]
    lines: list[Line] = []
    start_new = start_old = 0
    for at_new, at_old in anchors:
        lines += [was(x, "-") for x in old[start_old:at_old]]
        lines += [now(x, "+") for x in new[start_new:at_new]]
        if at_new < len(new):
            lines += _kept(changes[at_new], new[at_new], old[at_old], was, now)
        start_new, start_old = at_new + 1, at_old + 1
    return lines


def _kept(change: str, node: fx.Node, old: fx.Node, was: Writer, now: Writer) -> Iterator[Line]:
    if change == "rewired":
        yield was(old, "-")
        yield now(node, "+")
    else:
        remark = f"was {type_name(old, was.level)}" if change == "retyped" else ""
        yield now(node, "~" if change else " ", remark)


def _longest_increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence of pairs whose second entries increase."""
    ends: list[int] = []  # the smallest second entry that ends a subsequence of each length
    at: list[int] = []  # the pair that does
    previous: list[int] = []
    for number, (_, value) in enumerate(pairs):
        length = bisect_left(ends, value)
        previous.append(at[length - 1] if length else -1)
        if length == len(ends):
            ends.append(value)
            at.append(number)
        else:
            ends[length], at[length] = value, number
    found: list[tuple[int, int]] = []
    number = at[-1] if at else -1
    while number >= 0:
        found.append(pairs[number])
        number = previous[number]
    return found[::-1]


def _near_changes(lines: Sequence[Line]) -> Iterator[Line]:
    """The changes and the lines around them; other stretches are counted.

    Where nodes came or went, new types alone are context; where none did, they are the change.
    """
    loud = "+-" if any(line.sign in "+-" for line in lines) else "~"
    near: set[int] = set()
    for position, line in enumerate(lines):
        if line.sign in loud:
            near.update(range(position - CONTEXT, position + CONTEXT + 1))
    hidden: list[Line] = []
    for position, line in enumerate(lines):
        if position in near:
            yield from _elided(hidden)
            hidden = []
            yield line
        else:
            hidden.append(line)
    yield from _elided(hidden)


def _like_it_once(lines: Sequence[Line]) -> Iterator[Line]:
    """Fold the changes of like layers in a long difference."""
    if len(lines) <= FOLD_ABOVE:
        yield from lines
        return
    keys = [
        (x.sign, x.type, x.heading, *map(without_numbers, (x.name, x.call, x.comment)))
        for x in lines
    ]
    at = 0
    for run in runs(keys):
        yield from lines[at : run.start + run.period]
        yield Line(heading=f"...  ({run.count - 1} more like it, {run.hidden:,} lines)")
        at = run.stop
    yield from lines[at:]


_QUIETLY = {" ": "unchanged", "~": "retyped"}


def _elided(hidden: Sequence[Line]) -> Iterator[Line]:
    counts = Counter(_QUIETLY[line.sign] for line in hidden)
    words = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    if words:
        yield Line(heading=f"...  ({words})")
