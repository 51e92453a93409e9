"""How much memory a program needs, from the lifetimes of its values."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.collectives import COLLECTIVES, collective, start, wait
from moptrace.core import Program

__all__ = ["Alive", "Peak", "peak_memory", "storages", "write_backs"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Alive:
    """A value that is held in memory: its node, and its bytes on one rank."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The most memory that the values of a program take: where, and the values alive there.

    ``bytes`` is the sum over ``alive``, the largest first.
    """

    bytes: int
    node: str
    alive: tuple[Alive, ...]

    def __str__(self) -> str:
        shown = [f"  {x.bytes:>15,}  %{x.name}" for x in self.alive[:20]]
        rest = [f"  ... and {len(self.alive) - 20} more"] if len(self.alive) > 20 else []
        return "\n".join([f"{self.bytes:,} bytes at %{self.node}:", *shown, *rest])


def peak_memory(program: Program) -> Peak:
    """The bytes of the values that are alive at once, where they are most.

    The program's inputs are alive throughout. Every other value is alive from its node to the last
    node that uses it or a view of it; what a collective sends is used until the ``wait``, and what
    it brings takes memory from the ``start`` on. A new value of an input is written over the old
    one, and then gone, as soon as nothing needs the old one (``write_backs``). Routed rows are
    counted as if every rank got as many as it sends. What operators need while they run is not
    counted.
    """
    nodes = list(program.nodes)
    root = storages(program)
    last = _last_uses(program, root)
    end = nodes[-1]
    written = {new: node for node, pairs in write_backs(program).items() for _, new in pairs}
    sizes = _symbols(program)
    bytes_ = {
        node: _bytes(roles.value(node), sizes)
        for node in nodes
        if root.get(node) is node and node.op != "output"
    }
    position = {node: at for at, node in enumerate(nodes)}
    until = {node: end if node.op in ("placeholder", "get_attr") else last[node] for node in bytes_}
    for output, node in zip(program.signature.outputs, program.outputs, strict=True):
        owner = root[node]
        if output.updates is None or node not in written:
            until[owner] = end
        elif owner.op not in ("placeholder", "get_attr"):
            until[owner] = max(until[owner], written[node], key=position.__getitem__)
    ends: dict[fx.Node, list[fx.Node]] = {}
    for node, final in until.items():
        ends.setdefault(final, []).append(node)
    alive: dict[fx.Node, int] = {}
    total, best, at, there = 0, -1, end, dict[fx.Node, int]()
    for node in nodes:
        if node in bytes_:
            alive[node] = bytes_[node]
            total += bytes_[node]
        if total > best:
            best, at, there = total, node, dict(alive)
        for gone in ends.get(node, ()):
            total -= alive.pop(gone)
    shown = sorted((Alive(n.name, b) for n, b in there.items() if b), key=lambda x: -x.bytes)
    return Peak(best, at.name, tuple(shown))


def storages(program: Program) -> dict[fx.Node, fx.Node]:
    """For every node the node whose memory it looks at: its own, or that of which it is a view."""
    root: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        source: Any = node.args[0] if node.args else None
        is_view = getattr(node.target, "is_view", False) or node.target in _UNMARKED_VIEWS
        if node.target is operator.getitem:  # of a list of views, such as the pieces of a split
            is_view = root[source] is not source
        if node.target is wait:  # the memory into which the start lets it come
            is_view = True
        root[node] = root[source] if is_view and isinstance(source, fx.Node) else node
    return root


def write_backs(program: Program) -> dict[fx.Node, list[tuple[fx.Node, fx.Node]]]:
    """After which node each new value may be written over the input that it replaces.

    Returns lists of (input, new value). Until that node, something reads the old value or a view
    of it, or the new value does not exist.
    """
    root = storages(program)
    last = _last_uses(program, root)
    position = {node: at for at, node in enumerate(program.nodes)}
    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    found: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
    for output, new in zip(program.signature.outputs, program.outputs, strict=True):
        if output.updates is not None:
            old = inputs[output.updates]
            ready = max(new, last[root[old]], key=position.__getitem__)
            found.setdefault(ready, []).append((old, new))
    return found


def _last_uses(program: Program, root: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """The last node that reads each storage; outputs are not read."""
    last: dict[fx.Node, fx.Node] = {}
    for node in program.nodes:
        if node.op == "output":
            continue
        last[root[node]] = node
        for operand in node.all_input_nodes:
            last[root[operand]] = node
        if node.target is wait:
            for sent in node.all_input_nodes[0].all_input_nodes:
                last[root[sent]] = node
    return last


_UNMARKED_VIEWS = (aten.reshape.default, aten._unsafe_view.default)


def _bytes(value: Any, sizes: Mapping[Any, int]) -> int:
    """The bytes of a tensor; those of a list are its elements' own."""
    if not isinstance(value, Tensor):
        return 0
    return math.prod(_size(n, sizes) for n in value.shape) * value.element_size()


def _size(size: int | torch.SymInt, symbols: Mapping[Any, int]) -> int:
    return int(size.node.expr.subs(symbols)) if isinstance(size, torch.SymInt) else size


def _symbols(program: Program) -> dict[Any, int]:
    """How many rows every symbol stands for under balanced routing."""
    found: dict[Any, int] = {}
    for node in program.nodes:
        row, args = collective(node.target), node.args
        if node.target is start:
            row, args = COLLECTIVES[str(args[0])], args[1:]
        if row is not None and row.moves_rows:
            received: Any = roles.tensor(node).shape[0]
            sent = roles.tensor(args[0]).shape[0]  # type: ignore[arg-type]
            if isinstance(received, torch.SymInt):
                rows = _size(sent, found)
                if row.name == "all_gather_rows":
                    assert program.layout is not None
                    rows *= program.layout.size(str(args[2]))
                found.setdefault(received.node.expr, rows)
    return found
