"""What was done to a model and what it costs: one row for each component.

``explain`` reads a local program; nothing is run. Its numbers are those of one training step,
forward and backward, on one rank:

*Parameters and bytes* are what the fullest rank stores of parameters between steps, from the
placements in which they are stored (no buffers, gradients or optimizer state).

*Collectives* are counted as they start: those in the graph, and for each of them on the way from a
trained parameter to the loss the transpose (``collectives.py``) that its gradient starts. A
collective whose operand carries no gradient, or whose result the loss does not depend on, has no
backward. A gather that serves several components (a bucket) counts in each of them and once in the
totals; its bytes are divided between them.

*Bytes moved* are the bytes that the rank sends if each collective runs as a ring over its P ranks,
and an all-to-all directly, padding included:

=====================================  ============================================================
all_gather, reduce_scatter             (P-1)/P of the whole value
all_reduce                             2(P-1)/P of the value, rounded up
all_to_all, exchange_counts            (P-1)/P of the rank's operand
send_slots, return_slots               (P-1)/P of the rank's rows for all experts
all_gather_slots, reduce_scatter_slots (P-1) times the rows of what is split
send_experts, return_experts           nothing, expected if every rank has as many rows
send_rows, return_rows                 (P-1)/P of the rank's rows, expected if every rank has as
                                       many rows and every expert is chosen as often, and keeps
                                       no more than its capacity (marked ``~``)
ring                                   what the rank passes on, hop by hop (``rings.py``)
hop                                    the value, to another pipeline stage
all_to_all of an embedding             (P-1)/P of the rows of the rank's distinct ids, expected if
                                       every id is as likely (marked ``~``)
=====================================  ============================================================

Taking a slice, placing one among zeros, and using an invariant value move nothing.
"""

from __future__ import annotations

import html
import io
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx
from torch.fx.node import map_arg

import moptrace.kernels.packing  # noqa: F401  registers the operators
from moptrace import roles
from moptrace.collectives import COLLECTIVES, Collective, collective
from moptrace.core import Level, Parameter, Program
from moptrace.errors import PassError
from moptrace.passes.drop_tokens import share_kept
from moptrace.placement import Layout, Placement, Rows, Shard, chunk_sizes
from moptrace.rings import Ring, Seat, bytes_sent, ring
from moptrace.roles import Component
from moptrace.stages import hop, stages_of

__all__ = ["Explanation", "Row", "Traffic", "explain"]

aten, ops = torch.ops.aten, torch.ops.moptrace

WIDTH = 118  # of the printed table, on every terminal


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of collective in a step: how often it starts, and the bytes that a rank sends.

    ``expected`` is True where the bytes depend on routing or on ids, and are those of balanced
    routing and of ids that are all as likely.
    """

    kind: str
    count: int
    bytes: int
    expected: bool = False

    def __str__(self) -> str:
        return f"{self.kind} x{self.count}"


@dataclass(frozen=True, slots=True)
class Row:
    """One component; its blocks are added up."""

    component: Component | None
    blocks: int
    parallelism: str
    parameters: int
    parameter_bytes: int
    traffic: tuple[Traffic, ...]

    @property
    def bytes_moved(self) -> int:
        return sum(t.bytes for t in self.traffic)


@dataclass(frozen=True)
class Explanation:
    """The table that ``explain`` makes; the module's docstring says what is counted.

    ``traffic`` are the totals, in which a collective that serves several components counts once.
    """

    layout: Layout
    rows: tuple[Row, ...]
    traffic: tuple[Traffic, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        """Elements of parameters that the fullest rank stores."""
        return sum(row.parameters for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        return sum(row.parameter_bytes for row in self.rows)

    @property
    def bytes_moved(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(t.bytes for t in self.traffic)

    @property
    def collectives(self) -> Mapping[str, int]:
        """How often each kind of collective starts in a step."""
        return {t.kind: t.count for t in self.traffic}

    def row(self, component: Component | None) -> Row:
        """The row of a component; KeyError if the program has none."""
        for found in self.rows:
            if found.component == component:
                return found
        raise KeyError(component)

    def __str__(self) -> str:
        return "\n".join([printed(self._table()), *self._remarks()])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self), quote=False)}</pre>"

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
        table.add_column("component", "total per rank", no_wrap=True)
        table.add_column("parallelism", str(self.layout))
        table.add_column("parameters", f"{self.parameters:,}", justify="right", no_wrap=True)
        table.add_column("stored", _size(self.parameter_bytes), justify="right", no_wrap=True)
        table.add_column("collectives in a step", _words(self.traffic), no_wrap=True)
        table.add_column("moved", _moved(self.traffic), justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                (row.component or "other") + (f" x{row.blocks}" if row.blocks > 1 else ""),
                row.parallelism,
                f"{row.parameters:,}" if row.parameters else "",
                _size(row.parameter_bytes) if row.parameters else "",
                _words(row.traffic),
                _moved(row.traffic),
            )
        return table

    def _remarks(self) -> Iterator[str]:
        whys = (_EXPECTS.get(t.kind, "routing is balanced") for t in self.traffic if t.expected)
        if assumed := " and ".join(dict.fromkeys(whys)):
            yield f"~ expected if {assumed}"
        yield from (f"note: {note}" for note in self.notes)


def printed(table: Table) -> str:
    """A table as plain text, without empty lines."""
    stream = io.StringIO()
    Console(
        file=stream, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False
    ).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def explain(program: Program, stage: int = 0) -> Explanation:
    """What each component's parallelism is, and what it stores and moves on one rank.

    Of several pipeline stages it is a rank of ``stage``, and what one micro-batch moves.

    Requires: a local program, or one made from a local program (which is explained then).
    """
    local = next((p for p in reversed(program.history) if p.level == Level.LOCAL), None)
    if local is None:
        raise PassError(
            f"explain reads a program at level local, got {program.level}: apply the passes up to "
            "localize first, or call explain() on the model that parallelize returned"
        )
    return _Reader(local, stage).explanation()


# --- reading a local program ----------------------------------------------------------------------


class _Reader:
    """What the nodes of one local program belong to and cost."""

    def __init__(self, program: Program, stage: int):
        assert program.layout is not None
        self.program, self.layout, self.stage = program, program.layout, stage
        self.parameters = [p for p in program.signature.parameters if p.stage == stage]
        self.nodes = list(program.graph.nodes)
        self.hops = [node for node in self.nodes if node.target is hop]
        if self.hops:
            self.nodes = _of_stage(program, stage)
        self.component = _components(self.nodes)
        self.trained = _on_the_way_to_the_loss(program)
        self.again = {roles.role(n).recompute for n in self.trained} - {""}
        self.stored = _inputs_of(program)
        self.kept = _shares_kept(self.nodes)
        self.traffic = [t for node in self.nodes for t in self._traffic_of(node)]
        self.traffic += [t for node in self.hops for t in self._hops(node)]

    def explanation(self) -> Explanation:
        kept = self._parameters()
        everyone: set[Component | None] = {t.component for t in self.traffic}
        everyone |= {self._user_of(p) for p in kept}
        everyone |= {self.component.get(n) for n in self.nodes if n.op == "call_function"}
        rows = (self._row(c, kept) for c in sorted(everyone, key=_position))
        totals = _added([t for t in self.traffic if t.first])
        moved = Counter[str]()
        for t in self.traffic:
            moved[t.kind] += t.bytes
        totals = tuple(Traffic(t.kind, t.count, moved[t.kind], t.expected) for t in totals)
        notes = self.program.notes
        if self.layout.stages > 1:
            notes = (f"stage {self.stage} of {self.layout.stages}; one micro-batch", *notes)
        return Explanation(self.layout, tuple(rows), totals, notes)

    def _row(self, component: Component | None, kept: Mapping[Parameter, int]) -> Row:
        own = {p: n for p, n in kept.items() if self._user_of(p) == component}
        nodes = [n for n in self.nodes if self.component.get(n) == component]
        blocks = {b for n in nodes if (b := roles.role(n).block) is not None}
        return Row(
            component,
            len(blocks),
            self._parallelism(nodes, list(own)),
            sum(own.values()),
            sum(n * p.dtype.itemsize for p, n in own.items()),
            _added([t for t in self.traffic if t.component == component]),
        )

    # --- what is stored ---

    def _user_of(self, parameter: Parameter) -> Component | None:
        return self.component.get(self.stored[parameter.name])

    def _parameters(self) -> dict[Parameter, int]:
        """The elements of each parameter on the rank that stores most bytes."""
        held: dict[Parameter, tuple[int, ...]] = {}
        known: dict[tuple[Any, ...], tuple[int, ...]] = {}
        for parameter in self.parameters:
            placement = roles.placement(self.stored[parameter.name])
            assert placement is not None
            key = (parameter.shape, placement)
            if key not in known:
                known[key] = _elements(*key, self.layout)
            held[parameter] = known[key]
        bytes_ = [
            sum(n[rank] * p.dtype.itemsize for p, n in held.items())
            for rank in range(self.layout.world_size)
        ]
        fullest = bytes_.index(max(bytes_))
        return {p: n[fullest] for p, n in held.items()}

    # --- what moves ---

    def _traffic_of(self, node: fx.Node) -> Iterator[_Share]:
        if (travelling := ring(node.target)) is not None:
            kind = "ring" if travelling.costs is None else "all_to_all"
            for sent in self._around(travelling, node):
                yield _Share(self.component.get(node), kind, sent, kind != "ring", True)
        row = collective(node.target)
        if row is None:
            return
        started = [row]
        operand = node.args[0]
        if roles.role(node).recompute in self.again:
            started.append(row)
        if row.transpose and operand in self.trained and node in self.trained:
            started.append(COLLECTIVES[row.transpose])
        for one in started:
            kind = _WIRE.get(one.name)
            if kind is not None:
                sent, expected = self._sent(kind, row, one, node)
                yield from self._shared(node, kind, sent, expected)

    def _hops(self, node: fx.Node) -> Iterator[_Share]:
        """What leaves the stage, forward or, as a gradient, backward."""
        x = roles.tensor(node)
        component = self.component.get(node) or roles.component(node)
        goes, comes = node.args[1] == self.stage, node.args[2] == self.stage
        if goes or (comes and node in self.trained):
            yield _Share(component, "hop", x.numel() * x.element_size(), False, True)

    def _sent(self, kind: str, row: Collective, one: Collective, node: fx.Node) -> tuple[int, bool]:
        """The bytes that a rank sends for ``node`` or its transpose; True if they are expected.

        ``row`` is the node's collective and ``one`` that or its transpose.
        """
        operand, axis = node.args[0], _axis(node)
        assert isinstance(operand, fx.Node)
        parts = self.layout.size(axis)
        x, result = roles.tensor(operand), roles.tensor(node)
        if kind in ("all_gather", "reduce_scatter"):
            dim, length = node.args[2], node.args[-1]
            assert isinstance(dim, int) and isinstance(length, int)
            whole = result if row.name in _WIDENING else x
            beside = math.prod(n for d, n in enumerate(whole.shape) if d != dim % whole.dim())
            widest = max(self.layout.sizes(length, axis))
            moved = result if one is row else x  # where it casts, these differ
            return (parts - 1) * widest * beside * moved.element_size(), False
        if kind == "all_reduce":
            return math.ceil(2 * (parts - 1) * _bytes(x) / parts), False
        if kind == "exchange_counts":
            experts = node.args[2]
            assert isinstance(experts, int)
            return (parts - 1) * max(self.layout.sizes(experts, axis)) * x.element_size(), False
        if kind == "all_to_all":
            return (parts - 1) * _bytes(x) // parts, False
        if row.lends_experts:
            return 0, True
        if row.of_slots:
            slots, experts = node.args[2:]
            assert isinstance(slots, int) and isinstance(experts, int)
            row_bytes = _bytes(x[:1])
            if kind in ("send_slots", "return_slots"):
                return (parts - 1) * experts * slots * row_bytes // parts, False
            own = max(self.layout.sizes(experts, "ep"))
            return (parts - 1) * own * slots * row_bytes, False
        kept = self.kept.get(node, 1)
        if row.name == "reduce_scatter_rows":  # what a rank has of the result goes to each other
            rows = kept * _bytes(result) / _spread(roles.placement(node))
            return round((parts - 1) * rows), True
        rows = kept * _bytes(x) / _spread(roles.placement(operand))
        return round((parts - 1) * rows / (1 if row.name == "all_gather_rows" else parts)), True

    def _around(self, row: Ring, node: fx.Node) -> Iterator[int]:
        """The bytes that a rank sends forward, and backward if the operator is trained."""
        *arguments, axis = map_arg(node.args, roles.value)
        assert isinstance(axis, str)
        seat = Seat(0, self.layout.size(axis), lambda n: self.layout.sizes(n, axis))
        if row.costs is not None:
            forward, backward = row.costs(seat, *arguments)
            yield from forward
            yield from backward if node in self.trained else ()
            return
        results = roles.value(node)
        yield bytes_sent(row.forward(seat, *arguments))
        if node in self.trained:
            yield bytes_sent(row.backward(seat, tuple(arguments), results, results))

    def _shared(self, node: fx.Node, kind: str, sent: int, expected: bool) -> Iterator[_Share]:
        """A bucket's bytes, divided by the elements of its parameters."""
        packed = node.args[0]
        assert isinstance(packed, fx.Node)
        while packed.target in _BEFORE_GATHER:
            packed = packed.all_input_nodes[0]
        if packed.target is not ops.pack.default:
            yield _Share(self.component.get(node), kind, sent, expected, True)
            return
        shards, numels = packed.args
        sizes: dict[Component | None, int] = defaultdict(int)
        for shard, numel in zip(shards, numels, strict=True):  # type: ignore[arg-type]
            sizes[self.component.get(shard)] += numel  # type: ignore[index,operator]
        total, done, given = sum(sizes.values()), 0, 0
        for number, component in enumerate(sorted(sizes, key=_position)):
            done += sizes[component]
            share = sent * done // total - given
            given += share
            yield _Share(component, kind, share, expected, number == 0)

    # --- what it is called ---

    def _parallelism(self, nodes: Sequence[fx.Node], own: Sequence[Parameter]) -> str:
        if self.layout.world_size == 1:
            return "one rank"
        work, storage = list(self._work_in_words(nodes)), list(self._storage_in_words(own))
        if storage and "split over" in storage[0]:
            work = []  # the rows of experts, and hidden units, are spread as their weights are
        return ", ".join([*work, *storage]) or "alike on every rank"

    def _storage_in_words(self, own: Sequence[Parameter]) -> Iterator[str]:
        """How the parameters are stored, and what happens to that before they are used."""
        split, gathered, copied, ringed = set[str](), set[str](), set[str](), set[str]()
        for parameter in own:
            node = self.stored[parameter.name]
            placement = roles.placement(node)
            assert placement is not None
            shards = {a for a, kind in _along(placement) if isinstance(kind, Shard)}
            whole = {axis for axis in shards if self._is_gathered(node, axis)}
            around = {axis for axis in shards - whole if self._travels(node, axis)}
            ringed |= around
            split |= shards - whole - around
            gathered |= whole
            copied |= {a for a, _ in _along(placement)} - shards
        home = {axis.name for axis in self.layout.home.axes}
        units = {"tp", "etp"}
        if split & units:
            yield f"hidden units split over {self._axes(split & units)}"
        if split := split - units:
            words = {axis.name for axis in self.layout.experts.axes if axis.size > 1} - units
            yield f"experts split over {self._axes(words if split & home else split)}"
        if ringed:
            yield f"words split over {self._axes(ringed)}"
        if gathered:
            where = "" if gathered <= home else f" over {self._axes(gathered)}"
            yield f"weights gathered{where}"
        if copies := copied - split - gathered - ringed:
            yield f"copies over {self._axes(copies)}"

    def _is_gathered(self, node: fx.Node, axis: str) -> bool:
        """Whether a gather follows, before anything but movements of this parameter alone.

        An exchange of one split for another leaves each rank with a share.
        """
        for user in node.users:
            if user.target is ops.pack.default:
                return any(_axis(gather) == axis for gather in _gathers_of(user))
            if collective(user.target) is not None:
                stays = _axis(user) != axis or user.target in _EXCHANGES
                if not stays or self._is_gathered(user, axis):
                    return True
            elif len(user.all_input_nodes) == 1 and self._is_gathered(user, axis):
                return True
        return False

    def _travels(self, node: fx.Node, axis: str) -> bool:
        """Whether the parameter goes to an operator that travels around the axis."""
        return any(
            user.args[-1] == axis
            if ring(user.target)
            else user.op == "call_function"
            and len(user.all_input_nodes) == 1
            and self._travels(user, axis)
            for user in node.users
        )

    def _work_in_words(self, nodes: Iterable[fx.Node]) -> Iterator[str]:
        """What the ranks divide between them where parameters are whole."""
        axes: set[str] = set()
        for node in nodes:
            if node.op == "call_function":
                for placement in roles.placements(node):
                    if placement is not None:
                        kinds = _along(placement)
                        axes |= {a for a, kind in kinds if isinstance(kind, (Shard, Rows))}
        of_tokens = {axis.name for axis in self.layout.tokens.axes}
        if axes & of_tokens - {"dp"}:
            yield f"tokens split over {self._axes(axes & of_tokens)}"
        elif axes & {*of_tokens, self.layout.home.axes[0].name}:
            of_data = {a.name for view in (self.layout.tokens, self.layout.home) for a in view.axes}
            yield f"data parallel {self._axes(axes & of_data)}"

    def _axes(self, names: Iterable[str]) -> str:
        order = dict.fromkeys(axis for view in self.layout.views for axis in view.axes)
        chosen = set(names)
        return ", ".join(str(axis) for axis in order if axis.name in chosen)


@dataclass(frozen=True, slots=True)
class _Share:
    """A component's part in one collective; ``first`` in one share of each collective."""

    component: Component | None
    kind: str
    bytes: int
    expected: bool
    first: bool


# What each collective puts on the wire; the others move nothing.
_WIRE = {
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_gather_cast": "all_gather",
    "reduce_scatter_cast": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_invariant": "all_reduce",
    "all_to_all": "all_to_all",
    "send_rows": "send_rows",
    "return_rows": "return_rows",
    "all_gather_rows": "all_gather_rows",
    "reduce_scatter_rows": "reduce_scatter_rows",
    "send_slots": "send_slots",
    "return_slots": "return_slots",
    "all_gather_slots": "all_gather_slots",
    "reduce_scatter_slots": "reduce_scatter_slots",
    "send_experts": "send_experts",
    "return_experts": "return_experts",
    "exchange_counts": "exchange_counts",
}
_EXCHANGES = (ops.all_to_all.default, ops.send_experts.default)  # of one part for another
_KINDS = tuple(dict.fromkeys((*_WIRE.values(), "ring", "hop")))
_EXPECTS = {"all_to_all": "every id of an embedding is as likely"}
_WIDENING = ("all_gather", "all_gather_cast", "all_gather_invariant", "place_shard")


def _of_stage(program: Program, stage: int) -> list[fx.Node]:
    """The nodes of a pipeline stage, and those of everyone that it needs."""
    found = stages_of(program)
    needed: set[fx.Node] = set()
    for node in reversed(list(program.nodes)):
        is_used = found[node] is None and not needed.isdisjoint(node.users)
        if found[node] == stage or is_used:
            needed.add(node)
    return [node for node in program.nodes if node in needed]


def _components(nodes: Sequence[fx.Node]) -> dict[fx.Node, Component | None]:
    """Every node's component; one without a tag belongs to the first that uses it."""
    found: dict[fx.Node, Component | None] = {}
    for node in reversed(nodes):
        users = sorted(node.users, key=lambda user: user._sort_key)
        inherited = (c for user in users if (c := found.get(user)))
        found[node] = roles.component(node) or next(inherited, None)
    for node in nodes:
        if node.target is ops.pack.default:
            found.update(_components_of_shards(node, found))
    return found


_BEFORE_GATHER = (aten._to_copy.default, ops.vary.default)  # what a bucket may go through


def _gathers_of(pack: fx.Node) -> Iterator[fx.Node]:
    for user in pack.users:
        yield from _gathers_of(user) if user.target in _BEFORE_GATHER else (user,)


def _components_of_shards(
    pack: fx.Node, found: Mapping[fx.Node, Component | None]
) -> Iterator[tuple[fx.Node, Component | None]]:
    """A shard in a bucket belongs to the component that uses it when it is unpacked."""
    shards = pack.args[0]
    assert isinstance(shards, (list, tuple))
    for gather in _gathers_of(pack):
        for unpack in gather.users:
            for item in unpack.users:
                shard, position = None, item.args[1] if len(item.args) > 1 else None
                if item.target is operator.getitem and isinstance(position, int):
                    shard = shards[position]
                if isinstance(shard, fx.Node):
                    yield shard, roles.component(shard) or found[item]


def _on_the_way_to_the_loss(program: Program) -> set[fx.Node]:
    """The nodes whose gradient a backward from the loss computes."""
    trained = {p.name for p in program.signature.parameters if p.requires_grad}
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        follows = any(x in reached for x in node.all_input_nodes) and _carries_gradient(node)
        if node.name in trained or follows:
            reached.add(node)
    needed = {program.loss} & reached
    for node in reversed(list(program.graph.nodes)):
        if node in needed:
            needed.update(x for x in node.all_input_nodes if x in reached)
    return needed


def _shares_kept(nodes: Sequence[fx.Node]) -> dict[fx.Node, float]:
    """For what has routed rows, the share of them that a capacity leaves if routing is balanced."""
    found: dict[fx.Node, float] = {}
    for node in nodes:
        if node.target is ops.dispatch.default:
            found[node] = share_kept(node)
        elif node.target is not ops.combine.default:
            found.update((node, found[x]) for x in node.all_input_nodes if x in found)
    return found


def _carries_gradient(node: fx.Node) -> bool:
    value = roles.value(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    floating = any(isinstance(v, Tensor) and v.is_floating_point() for v in values)
    return floating and node.target is not torch.ops.aten.detach.default


def _inputs_of(program: Program) -> dict[str, fx.Node]:
    return {node.name: node for node in program.graph.nodes if node.op == "placeholder"}


def _axis(node: fx.Node) -> str:
    return next(x for x in node.args if isinstance(x, str))


def _along(placement: Placement) -> list[tuple[str, Any]]:
    pairs = zip(placement.view.axes, placement.kinds, strict=True)
    return [(axis.name, kind) for axis, kind in pairs if axis.size > 1]


def _spread(placement: Placement | None) -> int:
    """Over how many ranks routed rows are spread; a local value has their global number."""
    if placement is None:
        return 1
    pairs = zip(placement.view.axes, placement.kinds, strict=True)
    return math.prod(axis.size for axis, kind in pairs if isinstance(kind, Rows))


def _elements(shape: Sequence[int], placement: Placement, layout: Layout) -> tuple[int, ...]:
    """How many elements of a parameter each rank stores."""
    placement = placement.expressed_in(layout.storage) or placement
    view = placement.view
    counts = [1] * layout.world_size
    for dim, size in enumerate(shape):
        axes = placement.axes_of_dim(dim)
        sizes = chunk_sizes(size, [axis.size for axis in axes])
        for rank in range(layout.world_size):
            at = 0
            for axis in axes:
                at = at * axis.size + view.coordinate(rank, axis.name)
            counts[rank] *= sizes[at]
    return tuple(counts)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _position(component: Component | None) -> int:
    return len(Component) if component is None else list(Component).index(component)


def _added(shares: Iterable[_Share]) -> tuple[Traffic, ...]:
    """One entry for each kind, in the order of the table of collectives."""
    by_kind: dict[str, list[_Share]] = defaultdict(list)
    for share in shares:
        by_kind[share.kind].append(share)
    return tuple(
        Traffic(
            k,
            len(by_kind[k]),
            sum(s.bytes for s in by_kind[k]),
            any(s.expected for s in by_kind[k]),
        )
        for k in _KINDS
        if k in by_kind
    )


# --- printing -------------------------------------------------------------------------------------


def _words(traffic: Sequence[Traffic]) -> str:
    return "\n".join([*map(str, traffic), *(["together"] if len(traffic) > 1 else [])])


def _moved(traffic: Sequence[Traffic]) -> str:
    total = Traffic("", 0, sum(t.bytes for t in traffic), any(t.expected for t in traffic))
    lines = [*traffic, total] if len(traffic) > 1 else traffic
    return "\n".join(("~" if t.expected else "") + _size(t.bytes) for t in lines)


def _size(bytes_: int) -> str:
    """Bytes with three digits, in the largest unit that leaves one before the point.

    >>> _size(0), _size(1536), _size(64 << 20), _size(1000 << 10)
    ('0 B', '1.50 KiB', '64.0 MiB', '1,000 KiB')
    """
    if bytes_ < 1024:
        return f"{bytes_} B"
    power = (bytes_.bit_length() - 1) // 10
    size, unit = bytes_ / 1024**power, ("KiB", "MiB", "GiB", "TiB", "PiB")[power - 1]
    return f"{size:,.{max(0, 3 - len(str(int(size))))}f} {unit}"
