"""How much memory a program needs, from the lifetimes of its values."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.collectives import COLLECTIVES, collective, start, wait
from moptrace.core import Program, args_of, written
from moptrace.kernels.host_update import HostUpdate
from moptrace.kernels.updating_experts import UpdatingExperts
from moptrace.passes.drop_tokens import share_kept
from moptrace.rings import workspace

__all__ = [
    "Alive",
    "Peak",
    "blocks_in_place",
    "is_view",
    "lifetimes",
    "overwritable",
    "peak_memory",
    "shape_of",
    "sizes_of_values",
    "storages",
    "symbols_of",
    "write_backs",
]

aten, ops = torch.ops.aten, torch.ops.moptrace


@dataclass(frozen=True, slots=True)
class Alive:
    """A value that is held in memory: its node, and its bytes on one rank."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Peak:
    """The most memory that the values of a program take: where, and the values alive there.

    ``bytes`` is the sum over ``alive``, the largest first. ``host_bytes`` is the most that values
    take in the memory of the host, where an ``offload`` sent them; it is no part of ``bytes``.
    """

    bytes: int
    node: str
    alive: tuple[Alive, ...]
    host_bytes: int = 0

    def __str__(self) -> str:
        shown = [f"  {x.bytes:>15,}  %{x.name}" for x in self.alive[:20]]
        rest = [f"  ... and {len(self.alive) - 20} more"] if len(self.alive) > 20 else []
        host = f", and at most {self.host_bytes:,} on the host" if self.host_bytes else ""
        return "\n".join([f"{self.bytes:,} bytes at %{self.node}{host}:", *shown, *rest])


def peak_memory(program: Program) -> Peak:
    """The bytes of the values that are alive at once, where they are most.

    The program's inputs are alive throughout. Every other value is alive from its node to the last
    node that uses it or a view of it; what a collective sends is used until the ``wait``, and what
    it brings takes memory from the ``start`` on. A new value of an input is written over the old
    one, and then gone, as soon as nothing needs the old one (``write_backs``); a fused update
    writes it there at once (``overwritable``). Routed rows are counted as if every rank got as many
    as it sends. Of what operators need while they run, that of rings is counted: what is on its way
    around, and sums that travel with it.
    """
    spans = lifetimes(program)
    in_place = {new for pairs in overwritable(program).values() for _, new in pairs}
    sizes = {x: 0 if x in in_place else n for x, n in sizes_of_values(program).items()}
    ends: dict[fx.Node, list[fx.Node]] = {}
    for node, final in spans.items():
        ends.setdefault(final, []).append(node)
    alive: dict[fx.Node, int] = {}
    total, best, at, there = 0, -1, program.graph.output_node(), dict[fx.Node, int]()
    host, most, within = 0, 0, 0
    on_host = _on_host(program, sizes)
    layout = program.layout
    for node in program.nodes:
        inside = 0 if layout is None else workspace(node, layout)
        if node in on_host:
            host += on_host[node]
            most = max(most, host)
        elif node in spans:
            alive[node] = sizes[node]
            total += sizes[node]
        if total + inside > best:
            best, at, there, within = total + inside, node, dict(alive), inside
        for gone in ends.get(node, ()):
            if gone in alive:
                total -= alive.pop(gone)
            else:
                host -= on_host[gone]
    values = [Alive(n.name, b) for n, b in there.items() if b]
    values += [Alive(f"{at.name}, while it runs", within)] if within else []
    shown = sorted(values, key=lambda x: -x.bytes)
    return Peak(best, at.name, tuple(shown), most)


def lifetimes(program: Program) -> dict[fx.Node, fx.Node]:
    """For every value that has memory of its own, the node after which that is free."""
    end = program.graph.output_node()
    backs = write_backs(program)
    root = storages(program, backs)
    written = {new: node for node, pairs in backs.items() for _, new in pairs}
    last = _last_uses(program, root, backs)
    position = {node: at for at, node in enumerate(program.nodes)}
    until = {
        node: end if node.op in ("placeholder", "get_attr") else last[node]
        for node in program.nodes
        if root.get(node) is node and node.op != "output"
    }
    for output, node in zip(program.signature.outputs, program.outputs, strict=True):
        owner = root[node]
        if output.updates is None or node not in written:
            until[owner] = end
        elif owner.op not in ("placeholder", "get_attr"):
            until[owner] = max(until[owner], written[node], key=position.__getitem__)
    return until


def sizes_of_values(program: Program) -> dict[fx.Node, int]:
    """The bytes of every value; of a list or a tuple none, since its elements are values."""
    symbols = symbols_of(program)
    return {node: _bytes(roles.value(node), symbols) for node in program.nodes}


def _on_host(program: Program, sizes: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """The bytes of values in the memory of the host; new state is written over the old one."""
    held = {state.name for state in program.signature.states if state.host}
    outputs = zip(program.outputs, program.signature.outputs, strict=True)
    again = {node for node, output in outputs if output.updates in held}
    again |= {args_of(node)[1] for node in blocks_in_place(program)}
    return {
        node: 0 if node in again else sizes[node]
        for node in program.nodes
        if node.name in held or node.target is ops.offload.default
    }


WriteBacks = Mapping[fx.Node, Sequence[tuple[fx.Node, fx.Node]]]


def storages(program: Program, backs: WriteBacks | None = None) -> dict[fx.Node, fx.Node]:
    """For every node the node whose memory it looks at: its own, or that of which it is a view.

    A new value that was written back is looked at in the memory of the input that it replaced.
    """
    root: dict[fx.Node, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    in_place = blocks_in_place(program)
    for node in program.nodes:
        source: Any = node.args[0] if node.args else None
        source = replaced.get(source, source) if isinstance(source, fx.Node) else source
        looks = is_view(node)
        if node.target is operator.getitem:  # of a list of views, such as the pieces of a split
            looks = root[source] is not source
            if isinstance(source.target, HostUpdate):  # which writes over its operands
                source, looks = source.args[source.target.replaced[node.args[1]]], True
        if node.target is wait or node in in_place:  # at the memory into which it is brought
            looks = True
        root[node] = root[source] if looks and isinstance(source, fx.Node) else node
        replaced.update((new, old) for old, new in (backs or {}).get(node, ()))
    return root


def is_view(node: fx.Node) -> bool:
    """Whether an operator's result may look at the memory of its first operand."""
    return getattr(node.target, "is_view", False) or node.target in _UNMARKED_VIEWS


def write_backs(program: Program) -> dict[fx.Node, list[tuple[fx.Node, fx.Node]]]:
    """After which node each new value may be written over the input that it replaces.

    Returns lists of (input, new value). Until that node, something reads the old value or a view
    of it, or the new value does not exist.
    """
    root = storages(program)
    last = _last_uses(program, root)
    position = {node: at for at, node in enumerate(program.nodes)}
    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    in_place = blocks_in_place(program)
    found: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
    for output, new in zip(program.signature.outputs, program.outputs, strict=True):
        if output.updates is not None and new not in in_place:
            old = inputs[output.updates]
            ready = max(new, last[root[old]], key=position.__getitem__)
            found.setdefault(ready, []).append((old, new))
    return found


def blocks_in_place(program: Program) -> dict[fx.Node, fx.Node]:
    """The ``write_block`` nodes that may write into the input that they replace, and that input.

    Nothing reads a block of the old value after the new one is written, nor the rest of it after
    the first is.
    """
    place = {node: at for at, node in enumerate(program.nodes)}
    inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    found: dict[fx.Node, fx.Node] = {}

    def last_read(node: fx.Node) -> int:
        users = node.users if is_view(node) or node.target is start else ()
        return max(map(last_read, users), default=place[node])

    for output, new in zip(program.signature.outputs, program.outputs, strict=True):
        chain = written(new)
        base = args_of(chain[0])[0] if chain else None
        if base is None or base is not inputs.get(output.updates or ""):
            continue
        writes = {tuple(args_of(node)[2]): node for node in chain}
        if all(
            last_read(user) < place[writes.get(_starts(user), chain[0])]
            for user in base.users
            if user is not chain[0]
        ):
            found.update((node, base) for node in chain)
    return found


def _starts(node: fx.Node) -> tuple[int, ...]:
    """Where a block begins; nowhere for what is none."""
    return tuple(args_of(node)[1]) if node.target is ops.block.default else ()


def overwritable(program: Program) -> dict[fx.Node, list[tuple[fx.Node, fx.Node]]]:
    """The updates that may write new values over their operands: (operand, new value).

    Nothing reads an operand afterwards, and it is either memory of its own or the very input, or
    block of one, that the new value replaces.
    """
    root = storages(program)
    last = _last_uses(program, root)
    replaced = {new: old for pairs in write_backs(program).values() for old, new in pairs}
    blocks = {
        (old, tuple(args_of(write)[2])): args_of(write)[1]
        for write, old in blocks_in_place(program).items()
    }
    found: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}

    def is_free(old: fx.Node, new: fx.Node, node: fx.Node) -> bool:
        if old.target is ops.block.default:
            return list(old.users) == [node] and blocks.get((args_of(old)[0], _starts(old))) is new
        is_input = root[old].op == "placeholder"
        return last[root[old]] is node and (not is_input or replaced.get(new) is old)

    for node in program.nodes:
        wanted = _overwritten(node)
        results = {user.args[1]: user for user in node.users} if wanted else {}
        pairs = [(operand, results[i]) for operand, i in wanted if i in results]
        if wanted and len(pairs) == len(wanted) and all(is_free(*pair, node) for pair in pairs):
            found[node] = pairs
    return found


def _overwritten(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The operands over which an operator has a way to write new values, and these' numbers."""
    args: Any = node.args
    if node.target is ops.fused_adam.default:
        return list(zip((args[0], *args[2]), count(), strict=False))
    if isinstance(node.target, UpdatingExperts):
        return [(args[operand], number) for operand, number in node.target.overwrites]
    return []


def _last_uses(
    program: Program,
    root: Mapping[fx.Node, fx.Node],
    backs: WriteBacks | None = None,
) -> dict[fx.Node, fx.Node]:
    """The last node that reads each storage; outputs are not read."""
    last: dict[fx.Node, fx.Node] = {}
    replaced: set[fx.Node] = set()
    for node in program.nodes:
        if node.op == "output":
            continue
        last[root[node]] = node
        for operand in node.all_input_nodes:
            if operand not in replaced:
                last[root[operand]] = node
        if node.target is wait:
            for sent in node.all_input_nodes[0].all_input_nodes:
                last[root[sent]] = node
        replaced.update(new for _, new in (backs or {}).get(node, ()))
    return last


_UNMARKED_VIEWS = (aten.reshape.default, aten._unsafe_view.default)


def shape_of(value: Tensor, symbols: Mapping[Any, int]) -> tuple[int, ...]:
    """A tensor's shape, with the numbers that its symbols stand for."""
    return tuple(
        int(n.node.expr.subs(symbols)) if isinstance(n, torch.SymInt) else n for n in value.shape
    )


def _bytes(value: Any, symbols: Mapping[Any, int]) -> int:
    """The bytes of a tensor; those of a list are its elements' own."""
    if not isinstance(value, Tensor):
        return 0
    return math.prod(shape_of(value, symbols)) * value.element_size()


def symbols_of(program: Program) -> dict[Any, int]:
    """How many rows every symbol stands for under balanced routing."""
    found: dict[Any, int] = {}
    for node in program.nodes:
        row, args = collective(node.target), node.args
        if node.target is start:
            row, args = COLLECTIVES[str(args[0])], args[1:]
        if row is not None and row.moves_rows:
            received: Any = roles.tensor(node).shape[0]
            if isinstance(received, torch.SymInt):
                rows = shape_of(roles.tensor(args[0]), found)[0]  # type: ignore[arg-type]
                if row.name == "all_gather_rows":
                    assert program.layout is not None
                    rows *= program.layout.size(str(args[2]))
                found.setdefault(received.node.expr, rows)
        elif node.target is ops.dispatch.default:
            rows, counts, _ = roles.value(node)
            if isinstance(received := rows.shape[0], torch.SymInt):  # of some experts, or dropped
                pairs = math.prod(shape_of(roles.tensor(node.args[1]), found))  # type: ignore[arg-type]
                own = len(counts) / max(int(node.args[2]), 1)  # type: ignore[arg-type]
                found[received.node.expr] = math.ceil(pairs * own * share_kept(node))
    return found
