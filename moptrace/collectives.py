"""Differentiable collectives: what each one means, its transpose, and how it runs.

A collective changes how the ranks along one axis hold a value, from one kind of placement to
another; its gradient changes back, from the gradient's kind to the gradient's kind. The table
``COLLECTIVES`` says both for every collective, and nothing else in moptrace decides how a gradient
is reduced:

====================  ======================  ====================  =================
collective            from -> to              transpose             meaning
====================  ======================  ====================  =================
all_gather            shard -> replicate      reduce_scatter        concatenate
all_gather_invariant  shard -> invariant      take_shard            concatenate
reduce_scatter        partial -> shard        all_gather            sum, own slice
all_gather_cast       shard -> replicate      reduce_scatter_cast   cast, concatenate
reduce_scatter_cast   partial -> shard        all_gather_cast       cast, sum, own slice
all_reduce            partial -> replicate    all_reduce            sum
all_reduce_invariant  partial -> invariant    vary                  sum
vary                  invariant -> replicate  all_reduce_invariant  nothing
count_once            replicate -> partial    count_once            zeros but for the first
take_shard            invariant -> shard      all_gather_invariant  own slice
take_replicated       replicate -> shard      place_shard           own slice
place_shard           shard -> partial        take_replicated       zeros elsewhere
all_to_all            shard -> shard          all_to_all            swap dimensions
send_rows             token -> arrival        return_rows           rows travel
return_rows           arrival -> token        send_rows             rows travel back
group_rows            arrival -> expert       ungroup_rows          sort by expert
ungroup_rows          expert -> arrival       group_rows            and back
all_gather_rows       token -> replicate      reduce_scatter_rows   all ranks' rows, sorted
reduce_scatter_rows   partial -> token        all_gather_rows       sum, own rows
send_slots            token -> expert         return_slots          as many rows each
return_slots          expert -> token         send_slots            and back
all_gather_slots      token -> replicate      reduce_scatter_slots  as many rows each
reduce_scatter_slots  partial -> token        all_gather_slots      sum, own rows
send_experts          shard -> shard          return_experts        weights, to guests' places
return_experts        shard -> shard          send_experts          sum, at their owners
gather_matrices       shard -> shard          scatter_matrices      whole, at their owners
scatter_matrices      shard -> shard          gather_matrices       own slices of all
take_matrices         invariant -> shard      all_gather_matrices   those that a rank owns
all_gather_matrices   shard -> invariant      take_matrices         those of all owners
exchange_counts       (integers)              none                  counts travel
====================  ======================  ====================  =================

With ``_slots``, each rank has the same number of rows, ``slots``, for each of ``length`` experts
or of its own of them, sorted by expert before and after: nothing needs to be counted.

With ``_experts``, each rank has some of ``length`` experts and then ``places`` for as many: its own
and guests, as ``hosts`` says (``kernels/balancing.py``). Where nobody has guests nothing is sent.

With ``_matrices``, ranks hold as many matrices as ``like`` has along dimension 0, which have owners
in turn: matrix i belongs to rank ``first + i``, past the last to the first again. A rank without a
matrix has none, and computes nothing with it. Only the number is read of ``like``.

A ``_cast`` is the collective after a cast to ``dtype``; its transpose casts to ``back`` first, so
that a value is gathered in few bytes and its gradient added up in more.

A collective in which data travels is also two operators, ``start`` and ``wait``, between which
others run; scheduled programs have these.

Graphs name an axis, never a process group or a rank, so one graph serves every rank. The groups
come from the ``Communicator`` that is active when the operator runs, and its backward uses the
same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from types import TracebackType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from moptrace.kernels.routing import group_rows, ungroup_rows
from moptrace.placement import Invariant, Kind, Layout, Partial, Replicate, Rows, Shard

__all__ = [
    "COLLECTIVES",
    "Collective",
    "Communicator",
    "Pending",
    "collective",
    "conversion",
    "start",
    "wait",
]


class Communicator:
    """The process groups of one rank, by axis name; active inside ``with communicator:``.

    ``rank`` is the rank's number in the layout, ``stage`` that of its pipeline stage. ``seed`` and
    ``step`` decide the draws of random operators (``random.py``). Make one with
    ``Communicator.connect``; without ``groups`` it serves a simulated rank.
    """

    _active: ClassVar[list[Communicator]] = []

    def __init__(self, layout: Layout, rank: int, groups: Mapping[str, Any] | None = None):
        self.layout = layout
        self.rank = rank
        self.groups = groups or {}
        self.stage = 0
        self.seed = 0
        self.step = 0
        self._sent: list[tuple[Any, Tensor]] = []

    @classmethod
    def connect(cls, layout: Layout, ranks: Sequence[int]) -> Communicator:
        """Make the process groups; ``ranks[i]`` is the global rank that plays rank ``i``.

        Requires ``torch.distributed`` to be initialised. Collective over all global ranks.
        """
        groups = _new_groups(layout, ranks)
        return cls(layout, list(ranks).index(dist.get_rank()), groups)

    def size(self, axis: str) -> int:
        return self.layout.size(axis)

    def coordinate(self, axis: str) -> int:
        return self.layout.view_of(axis).coordinate(self.rank, axis)

    def sizes(self, length: int, axis: str) -> tuple[int, ...]:
        return self.layout.sizes(length, axis)

    @classmethod
    def current(cls) -> Communicator:
        """The active communicator; RuntimeError outside every ``with communicator:``."""
        if not cls._active:
            raise RuntimeError(
                "a collective ran outside a communicator: call the model that parallelize "
                "returned, or wrap the call in `with communicator:`"
            )
        return cls._active[-1]

    def keep(self, work: Any, sent: Tensor) -> None:
        """Hold what is on its way to one rank until it has left.

        Gloo does not tell before ``settle``, so there all that a step sends is held until its end.
        """
        self._sent = [(w, x) for w, x in self._sent if not w.is_completed()]
        self._sent.append((work, sent))

    def settle(self) -> None:
        """Wait until all that is held has left."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    @contextmanager
    def at(self, seed: int, step: int) -> Iterator[None]:
        """Draw as in another step, to compute a part of it again."""
        now = self.seed, self.step
        self.seed, self.step = seed, step
        try:
            yield
        finally:
            self.seed, self.step = now

    def __enter__(self) -> Communicator:
        self._active.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._active.pop()


def _new_groups(layout: Layout, ranks: Sequence[int]) -> dict[str, Any]:
    """One process group for each axis and sub-group; every rank creates them all, in one order."""
    mine, made = {}, {}
    for view in layout.views:
        for axis in view.axes:
            for members in view.groups(axis.name):
                key = tuple(ranks[i] for i in members)
                if key not in made:
                    made[key] = dist.new_group(list(key))
                if dist.get_rank() in key:
                    mine[axis.name] = made[key]
    return mine


@dataclass(frozen=True)
class Collective:
    """One row of the table.

    ``meaning`` maps what the ranks of a group hold to what they hold afterwards, on ordinary
    tensors: the definition, used by the simulator. ``run`` does the same on one rank with the
    active communicator. ``transpose`` names the collective of the gradient, None for integers.
    ``source`` and ``target`` are the kinds it converts between, None where its arguments say.
    """

    name: str
    source: type[Kind] | None
    target: type[Kind] | None
    transpose: str | None
    schema: str
    meaning: Callable[..., list[Tensor]]
    run: Callable[..., Tensor] | _Exchange
    shape: Callable[..., Tensor]

    @property
    def op(self) -> Any:
        """The operator as graphs call it."""
        return getattr(torch.ops.moptrace, self.name).default

    def transpose_arguments(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments after the tensor of the transpose, given this collective's own."""
        if self.name == "all_to_all":
            axis, split, split_length, join, join_length = arguments
            return (axis, join, join_length, split, split_length)
        if self.casts:
            axis, dim, dtype, back, length = arguments
            return (axis, dim, back, dtype, length)
        return arguments

    @property
    def travels(self) -> bool:
        """Whether data travels, so that it can be started and waited for."""
        return isinstance(self.run, _Exchange)

    @property
    def moves_rows(self) -> bool:
        """Whether routing decides the size of the result; the last argument says it if known."""
        return "SymInt? size" in self.schema

    @property
    def of_slots(self) -> bool:
        """Whether it moves rows of which all ranks have as many for every expert."""
        return "int slots" in self.schema

    @property
    def lends_experts(self) -> bool:
        """Whether it moves experts to the places of guests, or what they have there back."""
        return "Tensor hosts" in self.schema

    @property
    def has_owners(self) -> bool:
        """Whether it moves matrices to their owners, or from them."""
        return "Tensor like" in self.schema

    def without_size(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments, without the size of a result that routing decides."""
        known = self.op._schema.arguments
        return tuple(arguments)[: len(known) - self.moves_rows]

    @property
    def casts(self) -> bool:
        """Whether it casts its operand first; ``dtype`` and ``back`` are then arguments."""
        return "ScalarType dtype" in self.schema


# --- meanings: what the ranks of a group hold, before and after -----------------------------------


def _concatenate(parts: list[Tensor], sizes: Sequence[int], dim: int, length: int) -> list[Tensor]:
    return [torch.cat(parts, dim) for _ in parts]


def _sum(parts: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    total = torch.stack(parts).sum(0)
    return [total.clone() for _ in parts]


def _sum_and_split(
    parts: list[Tensor], sizes: Sequence[int], dim: int, length: int
) -> list[Tensor]:
    return list(torch.stack(parts).sum(0).split(list(sizes), dim))


def _own_slices(parts: list[Tensor], sizes: Sequence[int], dim: int, length: int) -> list[Tensor]:
    return [part.split(list(sizes), dim)[i] for i, part in enumerate(parts)]


def _zeros_elsewhere(
    parts: list[Tensor], sizes: Sequence[int], dim: int, length: int
) -> list[Tensor]:
    return [_placed(part, sizes, i, dim) for i, part in enumerate(parts)]


def _swap(
    parts: list[Tensor],
    sizes: Sequence[int],
    split: int,
    split_length: int,
    join: int,
    join_length: int,
) -> list[Tensor]:
    pieces = [part.split(list(sizes), split) for part in parts]
    return [torch.cat([p[i] for p in pieces], join) for i in range(len(parts))]


def _nothing(parts: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return [part.view_as(part) for part in parts]


def _first(parts: list[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    return [part.clone() if i == 0 else torch.zeros_like(part) for i, part in enumerate(parts)]


def _exchange(parts: list[Tensor], sizes: Sequence[int], length: int) -> list[Tensor]:
    pieces = [part.split(list(sizes)) for part in parts]
    return [torch.stack([p[i] for p in pieces]) for i in range(len(parts))]


def _send(
    parts: list[Tensor],
    sizes: Sequence[int],
    counts: list[Tensor],
    tables: list[Tensor],
    length: int,
) -> list[Tensor]:
    pieces = [p.split(_sums(c, sizes)) for p, c in zip(parts, counts, strict=True)]
    return [torch.cat([p[i] for p in pieces]) for i in range(len(parts))]


def _return(
    parts: list[Tensor],
    sizes: Sequence[int],
    counts: list[Tensor],
    tables: list[Tensor],
    length: int,
) -> list[Tensor]:
    pieces = [p.split(t.sum(1).tolist()) for p, t in zip(parts, tables, strict=True)]
    return [torch.cat([p[i] for p in pieces]) for i in range(len(parts))]


def _gather_rows(parts: list[Tensor], sizes: Sequence[int], tables: list[Tensor]) -> list[Tensor]:
    whole = torch.cat(parts)
    return [group_rows(whole, table) for table in tables]


def _sum_and_split_rows(
    parts: list[Tensor], sizes: Sequence[int], tables: list[Tensor]
) -> list[Tensor]:
    total = ungroup_rows(torch.stack(parts).sum(0), tables[0])
    return list(total.split(tables[0].sum(1).tolist()))


def _send_slots(parts: list[Tensor], sizes: Sequence[int], slots: int, length: int) -> list[Tensor]:
    pieces = [part.unflatten(0, (length, slots)).split(list(sizes)) for part in parts]
    return [torch.stack([p[i] for p in pieces], 1).flatten(0, 2) for i in range(len(parts))]


def _return_slots(
    parts: list[Tensor], sizes: Sequence[int], slots: int, length: int
) -> list[Tensor]:
    ranks = len(parts)
    own = [p.unflatten(0, (n, ranks, slots)) for p, n in zip(parts, sizes, strict=True)]
    return [torch.cat([part[:, i] for part in own]).flatten(0, 1) for i in range(ranks)]


def _gather_slots(
    parts: list[Tensor], sizes: Sequence[int], slots: int, length: int
) -> list[Tensor]:
    whole = torch.cat([part.unflatten(0, (-1, slots)) for part in parts], 1).flatten(0, 1)
    return [whole.clone() for _ in parts]


def _sum_and_split_slots(
    parts: list[Tensor], sizes: Sequence[int], slots: int, length: int
) -> list[Tensor]:
    total = torch.stack(parts).sum(0).unflatten(0, (-1, len(parts), slots))
    return [own.flatten(0, 1) for own in total.unbind(1)]


def _send_experts(
    parts: list[Tensor], sizes: Sequence[int], hosts: list[Tensor], places: int, length: int
) -> list[Tensor]:
    whole = torch.cat(parts)
    results: list[Tensor] = []
    for rank, plan in enumerate(hosts):
        here = plan[rank * places : (rank + 1) * places]
        empty = (here < 0).view(-1, *[1] * (whole.dim() - 1))
        results.append(whole.index_select(0, here.clamp(min=0)).masked_fill(empty, 0))
    return results


def _return_experts(
    parts: list[Tensor], sizes: Sequence[int], hosts: list[Tensor], places: int, length: int
) -> list[Tensor]:
    wide = _wide(parts[0])
    sums = [part[:own].to(wide) for part, own in zip(parts, sizes, strict=True)]
    total = torch.cat(sums)
    for own, part, experts in zip(sizes, parts, _guests(hosts[0], sizes, places), strict=True):
        guests = part[own : own + len(experts)].to(wide)
        total.index_add_(0, torch.tensor(experts, dtype=torch.int64, device=part.device), guests)
    return list(total.to(parts[0].dtype).split(list(sizes)))


def _gather_matrices(
    parts: list[Tensor],
    sizes: Sequence[int],
    likes: list[Tensor],
    dim: int,
    first: int,
    length: int,
) -> list[Tensor]:
    return _take_matrices([torch.cat(parts, dim)] * len(parts), sizes, likes, first)


def _scatter_matrices(
    parts: list[Tensor],
    sizes: Sequence[int],
    likes: list[Tensor],
    dim: int,
    first: int,
    length: int,
) -> list[Tensor]:
    return list(_all_gather_matrices(parts, sizes, likes, first)[0].split(list(sizes), dim))


def _take_matrices(
    parts: list[Tensor], sizes: Sequence[int], likes: list[Tensor], first: int
) -> list[Tensor]:
    owned = owned_matrices(len(likes[0]), len(parts), first)
    return [part[own] for part, own in zip(parts, owned, strict=True)]


def _all_gather_matrices(
    parts: list[Tensor], sizes: Sequence[int], likes: list[Tensor], first: int
) -> list[Tensor]:
    whole = _in_turn(parts, owned_matrices(len(likes[0]), len(parts), first))
    return [whole.clone() for _ in parts]


def owned_matrices(count: int, ranks: int, first: int) -> list[list[int]]:
    """Which of so many matrices each rank owns.

    >>> owned_matrices(5, 3, first=1)
    [[2], [0, 3], [1, 4]]
    """
    return [list(range((rank - first) % ranks, count, ranks)) for rank in range(ranks)]


def _in_turn(parts: Sequence[Tensor], owned: Sequence[Sequence[int]]) -> Tensor:
    """The matrices of all owners, in order; ValueError where somebody else has them."""
    if [len(part) for part in parts] != [len(own) for own in owned]:
        raise ValueError(f"owners of {owned} have {[len(part) for part in parts]} matrices")
    order = torch.tensor([*chain.from_iterable(owned)], dtype=torch.int64).argsort()
    together = torch.cat(list(parts))
    return together.index_select(0, order.to(together.device))


# --- runs: the same on one rank, over the process group -------------------------------------------


@dataclass(frozen=True)
class Pending:
    """A collective on its way: ``wait`` for its result, once.

    ``work`` is the process group's, which holds what is sent until then; None where nothing is on
    its way any more.
    """

    work: Any
    finish: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """The result, which needs what all ranks of the group have started."""
        if self.work is not None:
            self.work.wait()
        return self.finish()


@dataclass(frozen=True)
class _Exchange:
    """How a collective runs in which data travels: started, then waited for."""

    start: Callable[..., Pending]

    def __call__(self, *arguments: Any) -> Tensor:
        return self.start(*arguments).wait()


def start(name: str, *arguments: Any) -> Pending:
    """Begin a collective of the table, as an operator of a scheduled program."""
    run = COLLECTIVES[name].run
    assert isinstance(run, _Exchange), f"nothing travels in {name}"
    return run.start(*arguments)


def wait(pending: Pending) -> Tensor:
    """The result of a collective that was started, as an operator of a scheduled program."""
    return pending.wait()


# The names after torch 2.11, where each replaces the other one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _axis(axis: str) -> tuple[Communicator, Any]:
    here = Communicator.current()
    return here, here.groups[axis]


@_Exchange
def _run_gather(x: Tensor, axis: str, dim: int, length: int) -> Pending:
    here, group = _axis(axis)
    sizes = here.sizes(length, axis)
    widest = max(sizes)
    own = x.movedim(dim, 0)
    if own.shape[0] < widest:
        own = torch.cat([own, own.new_zeros(widest - own.shape[0], *own.shape[1:])])
    out = x.new_empty(widest * len(sizes), *own.shape[1:])

    def finish() -> Tensor:
        whole = out
        if min(sizes) < widest:
            blocks = zip(out.split(widest), sizes, strict=True)
            whole = torch.cat([block[:n] for block, n in blocks])
        return whole if dim == 0 else whole.movedim(0, dim).contiguous()

    return Pending(_all_gather(out, own.contiguous(), group=group, async_op=True), finish)


@_Exchange
def _run_reduce_scatter(x: Tensor, axis: str, dim: int, length: int) -> Pending:
    here, group = _axis(axis)
    sizes = here.sizes(length, axis)
    widest, own = max(sizes), sizes[here.coordinate(axis)]
    whole = x.movedim(dim, 0)
    if min(sizes) < widest:
        padded = whole.new_zeros(len(sizes), widest, *whole.shape[1:])
        for block, piece in zip(padded, whole.split(list(sizes)), strict=True):
            block[: piece.shape[0]] = piece
        whole = padded.flatten(0, 1)
    exchanged = x.device.type == "cpu"  # where gloo would reduce all of it on every rank
    if exchanged:
        parts = torch.empty_like(whole, memory_format=torch.contiguous_format)
        work = dist.all_to_all_single(parts, whole.contiguous(), group=group, async_op=True)
    else:
        parts = x.new_empty(widest, *whole.shape[1:])
        work = _reduce_scatter(parts, whole.contiguous(), group=group, async_op=True)

    def finish() -> Tensor:
        out = parts.unflatten(0, (len(sizes), widest)).sum(0) if exchanged else parts
        return out[:own].movedim(0, dim).contiguous()

    return Pending(work, finish)


@_Exchange
def _run_reduce(x: Tensor, axis: str) -> Pending:
    _, group = _axis(axis)
    out = x.clone(memory_format=torch.contiguous_format)
    return Pending(dist.all_reduce(out, group=group, async_op=True), lambda: out)


def _run_take(x: Tensor, axis: str, dim: int, length: int) -> Tensor:
    here, _ = _axis(axis)
    return x.split(list(here.sizes(length, axis)), dim)[here.coordinate(axis)].clone()


def _run_place(x: Tensor, axis: str, dim: int, length: int) -> Tensor:
    here, _ = _axis(axis)
    return _placed(x, here.sizes(length, axis), here.coordinate(axis), dim)


def _run_nothing(x: Tensor, axis: str) -> Tensor:
    return x.clone()  # an operator may not return its input


def _run_first(x: Tensor, axis: str) -> Tensor:
    return x.clone() if Communicator.current().coordinate(axis) == 0 else torch.zeros_like(x)


@_Exchange
def _run_swap(
    x: Tensor, axis: str, split: int, split_length: int, join: int, join_length: int
) -> Pending:
    here, group = _axis(axis)
    cut, glue = here.sizes(split_length, axis), here.sizes(join_length, axis)
    own = cut[here.coordinate(axis)]
    pieces = [piece.contiguous().flatten() for piece in x.split(list(cut), split)]
    shape = list(x.shape)
    shape[split] = own
    rest = math.prod(n for d, n in enumerate(shape) if d != join)
    received = [n * rest for n in glue]

    def joined(out: Tensor) -> Tensor:
        blocks = []
        for block, n in zip(out.split(received), glue, strict=True):
            shape[join] = n
            blocks.append(block.view(shape))
        return torch.cat(blocks, join)

    sent = [p.numel() for p in pieces]
    return _all_to_all(torch.cat(pieces), sent, received, group, joined)


@_Exchange
def _run_exchange_counts(counts: Tensor, axis: str, length: int) -> Pending:
    here, group = _axis(axis)
    sizes = here.sizes(length, axis)
    widest, own = max(sizes), sizes[here.coordinate(axis)]
    if min(sizes) < widest:
        counts = torch.cat([_padded(c, widest) for c in counts.split(list(sizes))])
    out = torch.empty_like(counts)
    work = dist.all_to_all_single(out, counts, group=group, async_op=True)
    return Pending(work, lambda: out.view(len(sizes), widest)[:, :own].contiguous())


@_Exchange
def _run_send(
    rows: Tensor, counts: Tensor, table: Tensor, axis: str, length: int, size: int | None = None
) -> Pending:
    here, group = _axis(axis)
    out = _sums(counts, here.sizes(length, axis))
    return _all_to_all(rows, out, table.sum(1).tolist(), group)


@_Exchange
def _run_return(
    rows: Tensor, counts: Tensor, table: Tensor, axis: str, length: int, size: int | None = None
) -> Pending:
    here, group = _axis(axis)
    back = _sums(counts, here.sizes(length, axis))
    return _all_to_all(rows, table.sum(1).tolist(), back, group)


@_Exchange
def _run_gather_rows(rows: Tensor, table: Tensor, axis: str, size: int | None = None) -> Pending:
    # One exchange of exactly the rows there are: an all-gather would pad them to the fullest rank.
    _, group = _axis(axis)
    sizes = table.sum(1).tolist()
    own = [rows.shape[0]] * len(sizes)
    sent = torch.cat([rows] * len(sizes))
    return _all_to_all(sent, own, sizes, group, lambda whole: group_rows(whole, table))


@_Exchange
def _run_reduce_scatter_rows(
    rows: Tensor, table: Tensor, axis: str, size: int | None = None
) -> Pending:
    here, group = _axis(axis)
    sizes = table.sum(1).tolist()
    own = sizes[here.coordinate(axis)]

    def added(parts: Tensor) -> Tensor:
        return parts.view(len(sizes), own, *rows.shape[1:]).sum(0)

    return _all_to_all(ungroup_rows(rows, table), sizes, [own] * len(sizes), group, added)


@_Exchange
def _run_send_slots(rows: Tensor, axis: str, slots: int, length: int) -> Pending:
    here, group = _axis(axis)
    sizes = here.sizes(length, axis)
    own = sizes[here.coordinate(axis)]

    def by_expert(came: Tensor) -> Tensor:
        return came.unflatten(0, (len(sizes), own, slots)).transpose(0, 1).flatten(0, 2)

    to, came = [n * slots for n in sizes], [own * slots] * len(sizes)
    return _all_to_all(rows, to, came, group, by_expert)


@_Exchange
def _run_return_slots(rows: Tensor, axis: str, slots: int, length: int) -> Pending:
    here, group = _axis(axis)
    sizes = here.sizes(length, axis)
    own = sizes[here.coordinate(axis)]
    sent = rows.unflatten(0, (own, len(sizes), slots)).transpose(0, 1).flatten(0, 2)
    return _all_to_all(sent, [own * slots] * len(sizes), [n * slots for n in sizes], group)


@_Exchange
def _run_gather_slots(rows: Tensor, axis: str, slots: int, length: int) -> Pending:
    here, group = _axis(axis)
    ranks = here.size(axis)
    out = rows.new_empty(ranks * rows.shape[0], *rows.shape[1:])

    def by_expert() -> Tensor:
        return out.unflatten(0, (ranks, -1, slots)).transpose(0, 1).flatten(0, 2)

    return Pending(_all_gather(out, rows.contiguous(), group=group, async_op=True), by_expert)


@_Exchange
def _run_reduce_scatter_slots(rows: Tensor, axis: str, slots: int, length: int) -> Pending:
    ranks = Communicator.current().size(axis)
    apart = rows.unflatten(0, (-1, ranks, slots)).transpose(0, 1).flatten(0, 2)
    return _run_reduce_scatter.start(apart, axis, 0, apart.shape[0])


@_Exchange
def _run_send_experts(x: Tensor, hosts: Tensor, axis: str, places: int, length: int) -> Pending:
    moves, group = _Lending.of(hosts, axis, places, length), _axis(axis)[1]
    own, came = x.shape[0], sum(moves.borrowed)
    out = x.new_empty(places, *x.shape[1:])
    out[:own] = x
    out[own + came :] = 0
    if not moves.any:
        return Pending(None, lambda: out)
    sent = x.index_select(0, moves.lent(x.device))
    work = dist.all_to_all_single(
        out[own : own + came], sent, moves.borrowed, moves.numbers, group=group, async_op=True
    )
    return Pending(work, lambda: out)


@_Exchange
def _run_return_experts(x: Tensor, hosts: Tensor, axis: str, places: int, length: int) -> Pending:
    moves, group = _Lending.of(hosts, axis, places, length), _axis(axis)[1]
    own, came = moves.own, sum(moves.borrowed)
    if not moves.any:
        return Pending(None, lambda: x[:own].clone())

    def added(back: Tensor) -> Tensor:
        total = x[:own].to(_wide(x), copy=True)
        for part, experts in zip(back.split(moves.numbers), moves.lent_to, strict=True):
            at = torch.tensor(experts, dtype=torch.int64, device=x.device)
            total.index_add_(0, at, part.to(total.dtype))
        return total.to(x.dtype)

    return _all_to_all(x[own : own + came], moves.borrowed, moves.numbers, group, added)


@_Exchange
def _run_gather_matrices(
    x: Tensor, like: Tensor, axis: str, dim: int, first: int, length: int
) -> Pending:
    here, group = _axis(axis)
    sizes = here.sizes(length, axis)
    owned = owned_matrices(len(like), len(sizes), first)
    own = len(owned[here.coordinate(axis)])

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim)

    sent = [x[matrices] for matrices in owned]
    shapes = [(own, *x.shape[1:dim], n, *x.shape[dim + 1 :]) for n in sizes]
    return _exchanged(sent, shapes, group, like, joined)


@_Exchange
def _run_scatter_matrices(
    x: Tensor, like: Tensor, axis: str, dim: int, first: int, length: int
) -> Pending:
    here, group = _axis(axis)
    sizes = here.sizes(length, axis)
    owned = owned_matrices(len(like), len(sizes), first)
    own = sizes[here.coordinate(axis)]
    shapes = [(len(theirs), *x.shape[1:dim], own, *x.shape[dim + 1 :]) for theirs in owned]
    sent = x.split(list(sizes), dim)
    return _exchanged(sent, shapes, group, like, lambda parts: _in_turn(parts, owned))


def _run_take_matrices(x: Tensor, like: Tensor, axis: str, first: int) -> Tensor:
    here, _ = _axis(axis)
    return x[owned_matrices(len(like), here.size(axis), first)[here.coordinate(axis)]]


@_Exchange
def _run_all_gather_matrices(x: Tensor, like: Tensor, axis: str, first: int) -> Pending:
    here, group = _axis(axis)
    owned = owned_matrices(len(like), here.size(axis), first)
    shapes = [(len(theirs), *x.shape[1:]) for theirs in owned]
    sent = [x] * len(owned)
    return _exchanged(sent, shapes, group, like, lambda parts: _in_turn(parts, owned))


def _exchanged(
    sent: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    group: Any,
    like: Tensor,
    finish: Callable[[list[Tensor]], Tensor],
) -> Pending:
    """Send a tensor to each rank, and receive one of these shapes from each.

    Nothing is sent where the ranks of the group have no matrix: owners are others.
    """
    if not len(like):
        return Pending(None, lambda: finish([sent[0].new_empty(shape) for shape in shapes]))
    numbers = [math.prod(shape) for shape in shapes]

    def shaped(came: Tensor) -> Tensor:
        parts = zip(came.split(numbers), shapes, strict=True)
        return finish([part.view(shape) for part, shape in parts])

    flat = torch.cat([part.flatten() for part in sent])
    return _all_to_all(flat, [part.numel() for part in sent], numbers, group, shaped)


@dataclass(frozen=True)
class _Lending:
    """Whose guests this rank's experts are, and how many guests of each rank it has itself.

    ``lent_to[r]`` are the guests at rank r, as this rank counts its ``own`` experts.
    """

    own: int
    lent_to: list[list[int]]
    borrowed: list[int]
    any: bool

    @classmethod
    def of(cls, hosts: Tensor, axis: str, places: int, length: int) -> _Lending:
        here = Communicator.current()
        sizes, at = here.sizes(length, axis), here.coordinate(axis)
        guests = _guests(hosts, sizes, places)
        ends = list(accumulate(sizes))
        first, past = ends[at] - sizes[at], ends[at]
        lent_to = [[e - first for e in away if first <= e < past] for away in guests]
        borrowed = [
            sum(end - size <= e < end for e in guests[at])
            for end, size in zip(ends, sizes, strict=True)
        ]
        return cls(sizes[at], lent_to, borrowed, any(guests))

    @property
    def numbers(self) -> list[int]:
        """How many experts are lent to each rank."""
        return [len(experts) for experts in self.lent_to]

    def lent(self, device: torch.device) -> Tensor:
        """The experts to send, rank by rank."""
        experts = list(chain.from_iterable(self.lent_to))
        return torch.tensor(experts, dtype=torch.int64, device=device)


def _guests(hosts: Tensor, sizes: Sequence[int], places: int) -> list[list[int]]:
    """The guests of each rank, which are in the order of their owners."""
    of_ranks = hosts.view(len(sizes), places).tolist()
    return [[e for e in here[own:] if e >= 0] for here, own in zip(of_ranks, sizes, strict=True)]


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which gradients are added up."""
    return torch.promote_types(x.dtype, torch.float32)


def _all_to_all(
    x: Tensor,
    out_splits: list[int],
    in_splits: list[int],
    group: Any,
    finish: Callable[[Tensor], Tensor] = lambda received: received,
) -> Pending:
    """Send ``out_splits`` leading slices to the ranks and receive ``in_splits`` from them."""
    out = x.new_empty(sum(in_splits), *x.shape[1:])
    x = x.contiguous()
    work = dist.all_to_all_single(out, x, in_splits, out_splits, group=group, async_op=True)
    return Pending(work, lambda: finish(out))


def _sums(counts: Tensor, sizes: Sequence[int]) -> list[int]:
    """The counts of consecutive experts, added up for each rank that owns them."""
    values, sums, start = counts.tolist(), [], 0
    for size in sizes:
        sums.append(sum(values[start : start + size]))
        start += size
    return sums


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[0]))


def _placed(x: Tensor, sizes: Sequence[int], at: int, dim: int) -> Tensor:
    def zeros(length: int) -> Tensor:
        return x.new_zeros(*x.shape[:dim], length, *x.shape[dim + 1 :])

    return torch.cat([zeros(sum(sizes[:at])), x, zeros(sum(sizes[at + 1 :]))], dim)


def _cast_first(row: Callable[..., Any], many: bool = False) -> Callable[..., Any]:
    """The meaning, run or shape of a collective after a cast."""

    def casting(x: Any, *given: Any) -> Any:
        *others, dtype, _, length = given
        cast = [part.to(dtype) for part in x] if many else x.to(dtype)
        return row(cast, *others, length)

    return casting


# --- shapes of the results under fake tensors -----------------------------------------------------


def _resized(x: Tensor, dim: int, length: int) -> Tensor:
    return x.new_empty(*x.shape[:dim], length, *x.shape[dim + 1 :])


def _shape_whole(x: Tensor, axis: str, dim: int, length: int) -> Tensor:
    return _resized(x, dim, length)


def _shape_slice(x: Tensor, axis: str, dim: int, length: int) -> Tensor:
    here = Communicator.current()
    return _resized(x, dim, here.sizes(length, axis)[here.coordinate(axis)])


def _shape_same(x: Tensor, axis: str) -> Tensor:
    return torch.empty_like(x)


def _shape_swap(
    x: Tensor, axis: str, split: int, split_length: int, join: int, join_length: int
) -> Tensor:
    return _resized(_shape_slice(x, axis, split, split_length), join, join_length)


def _shape_counts(counts: Tensor, axis: str, length: int) -> Tensor:
    here = Communicator.current()
    own = here.sizes(length, axis)[here.coordinate(axis)]
    return counts.new_empty(here.size(axis), own)


def _shape_routed(
    rows: Tensor,
    counts: Tensor,
    table: Tensor,
    axis: str,
    length: int,
    size: int | torch.SymInt | None = None,
) -> Tensor:
    return _shape_rows(rows, table, axis, size)


def _shape_rows(
    rows: Tensor, table: Tensor, axis: str, size: int | torch.SymInt | None = None
) -> Tensor:
    received = torch.library.get_ctx().new_dynamic_size() if size is None else size
    return rows.new_empty(received, *rows.shape[1:])


def _shape_send_slots(rows: Tensor, axis: str, slots: int, length: int) -> Tensor:
    here = Communicator.current()
    own = here.sizes(length, axis)[here.coordinate(axis)]
    return rows.new_empty(own * here.size(axis) * slots, *rows.shape[1:])


def _shape_return_slots(rows: Tensor, axis: str, slots: int, length: int) -> Tensor:
    return rows.new_empty(length * slots, *rows.shape[1:])


def _shape_gather_slots(rows: Tensor, axis: str, slots: int, length: int) -> Tensor:
    return rows.new_empty(rows.shape[0] * Communicator.current().size(axis), *rows.shape[1:])


def _shape_own_slots(rows: Tensor, axis: str, slots: int, length: int) -> Tensor:
    return rows.new_empty(rows.shape[0] // Communicator.current().size(axis), *rows.shape[1:])


def _shape_places(x: Tensor, hosts: Tensor, axis: str, places: int, length: int) -> Tensor:
    return _resized(x, 0, places)


def _shape_owned(x: Tensor, hosts: Tensor, axis: str, places: int, length: int) -> Tensor:
    return _shape_slice(x, axis, 0, length)


def _shape_of_owner(x: Tensor, axis: str) -> Tensor:
    """As of an owner with the most matrices; a rank with fewer has fewer."""
    return _resized(x, 0, -(-x.shape[0] // Communicator.current().size(axis)))


def _shape_gather_matrices(
    x: Tensor, like: Tensor, axis: str, dim: int, first: int, length: int
) -> Tensor:
    return _resized(_shape_of_owner(x, axis), dim, length)


def _shape_scatter_matrices(
    x: Tensor, like: Tensor, axis: str, dim: int, first: int, length: int
) -> Tensor:
    return _resized(_shape_slice(x, axis, dim, length), 0, like.shape[0])


def _shape_take_matrices(x: Tensor, like: Tensor, axis: str, first: int) -> Tensor:
    return _shape_of_owner(x, axis)


def _shape_all_gather_matrices(x: Tensor, like: Tensor, axis: str, first: int) -> Tensor:
    return _resized(x, 0, like.shape[0])


# --- the table ------------------------------------------------------------------------------------

_PLAIN = "(Tensor x, str axis) -> Tensor"
_SLICED = "(Tensor x, str axis, int dim, int length) -> Tensor"
# ``size`` is the number of rows that come, where that is known already: shapes are then known too.
_ROWS = (
    "(Tensor rows, Tensor counts, Tensor table, str axis, int length, SymInt? size=None) -> Tensor"
)
_WHOLE_ROWS = "(Tensor rows, Tensor table, str axis, SymInt? size=None) -> Tensor"
_SLOTS = "(Tensor rows, str axis, int slots, int length) -> Tensor"
_CAST = "(Tensor x, str axis, int dim, ScalarType dtype, ScalarType back, int length) -> Tensor"
_SWAP = "(Tensor x, str axis, int split, int split_length, int join, int join_length) -> Tensor"
_COUNTS = "(Tensor counts, str axis, int length) -> Tensor"
_EXPERTS = "(Tensor x, Tensor hosts, str axis, int places, int length) -> Tensor"
_MATRICES = "(Tensor x, Tensor like, str axis, int first) -> Tensor"
_SPLIT_MATRICES = "(Tensor x, Tensor like, str axis, int dim, int first, int length) -> Tensor"

# What the collectives of one meaning share: schema, meaning, run and shape.
_GATHER = (_SLICED, _concatenate, _run_gather, _shape_whole)
_SCATTER = (_SLICED, _sum_and_split, _run_reduce_scatter, _shape_slice)
_GATHER_CAST = (
    _CAST,
    _cast_first(_concatenate, many=True),
    _Exchange(_cast_first(_run_gather.start)),
    _cast_first(_shape_whole),
)
_SCATTER_CAST = (
    _CAST,
    _cast_first(_sum_and_split, many=True),
    _Exchange(_cast_first(_run_reduce_scatter.start)),
    _cast_first(_shape_slice),
)
_REDUCE = (_PLAIN, _sum, _run_reduce, _shape_same)
_KEEP = (_PLAIN, _nothing, _run_nothing, _shape_same)
_ONCE = (_PLAIN, _first, _run_first, _shape_same)
_TAKE = (_SLICED, _own_slices, _run_take, _shape_slice)
_PUT = (_SLICED, _zeros_elsewhere, _run_place, _shape_whole)

_GATHER_ROWS = (_WHOLE_ROWS, _gather_rows, _run_gather_rows, _shape_rows)
_SCATTER_ROWS = (_WHOLE_ROWS, _sum_and_split_rows, _run_reduce_scatter_rows, _shape_rows)
_SEND_SLOTS = (_SLOTS, _send_slots, _run_send_slots, _shape_send_slots)
_RETURN_SLOTS = (_SLOTS, _return_slots, _run_return_slots, _shape_return_slots)
_GATHER_SLOTS = (_SLOTS, _gather_slots, _run_gather_slots, _shape_gather_slots)
_SCATTER_SLOTS = (_SLOTS, _sum_and_split_slots, _run_reduce_scatter_slots, _shape_own_slots)

_LEND = (_EXPERTS, _send_experts, _run_send_experts, _shape_places)
_GIVE_BACK = (_EXPERTS, _return_experts, _run_return_experts, _shape_owned)

_TO_OWNERS = (_SPLIT_MATRICES, _gather_matrices, _run_gather_matrices, _shape_gather_matrices)
_FROM_OWNERS = (_SPLIT_MATRICES, _scatter_matrices, _run_scatter_matrices, _shape_scatter_matrices)
_TAKE_OWN = (_MATRICES, _take_matrices, _run_take_matrices, _shape_take_matrices)
_SHARE_OWN = (
    _MATRICES,
    _all_gather_matrices,
    _run_all_gather_matrices,
    _shape_all_gather_matrices,
)

_TABLE = (
    Collective("all_gather", Shard, Replicate, "reduce_scatter", *_GATHER),
    Collective("all_gather_invariant", Shard, Invariant, "take_shard", *_GATHER),
    Collective("reduce_scatter", Partial, Shard, "all_gather", *_SCATTER),
    Collective("all_gather_cast", Shard, Replicate, "reduce_scatter_cast", *_GATHER_CAST),
    Collective("reduce_scatter_cast", Partial, Shard, "all_gather_cast", *_SCATTER_CAST),
    Collective("all_reduce", Partial, Replicate, "all_reduce", *_REDUCE),
    Collective("all_reduce_invariant", Partial, Invariant, "vary", *_REDUCE),
    Collective("vary", Invariant, Replicate, "all_reduce_invariant", *_KEEP),
    Collective("count_once", Replicate, Partial, "count_once", *_ONCE),
    Collective("take_shard", Invariant, Shard, "all_gather_invariant", *_TAKE),
    Collective("take_replicated", Replicate, Shard, "place_shard", *_TAKE),
    Collective("place_shard", Shard, Partial, "take_replicated", *_PUT),
    Collective("all_to_all", Shard, Shard, "all_to_all", _SWAP, _swap, _run_swap, _shape_swap),
    Collective("send_rows", Rows, Rows, "return_rows", _ROWS, _send, _run_send, _shape_routed),
    Collective("return_rows", Rows, Rows, "send_rows", _ROWS, _return, _run_return, _shape_routed),
    Collective("all_gather_rows", Rows, Replicate, "reduce_scatter_rows", *_GATHER_ROWS),
    Collective("reduce_scatter_rows", Partial, Rows, "all_gather_rows", *_SCATTER_ROWS),
    Collective("send_slots", Rows, Rows, "return_slots", *_SEND_SLOTS),
    Collective("return_slots", Rows, Rows, "send_slots", *_RETURN_SLOTS),
    Collective("all_gather_slots", Rows, Replicate, "reduce_scatter_slots", *_GATHER_SLOTS),
    Collective("reduce_scatter_slots", Partial, Rows, "all_gather_slots", *_SCATTER_SLOTS),
    Collective("send_experts", Shard, Shard, "return_experts", *_LEND),
    Collective("return_experts", Shard, Shard, "send_experts", *_GIVE_BACK),
    Collective("gather_matrices", Shard, Shard, "scatter_matrices", *_TO_OWNERS),
    Collective("scatter_matrices", Shard, Shard, "gather_matrices", *_FROM_OWNERS),
    Collective("take_matrices", Invariant, Shard, "all_gather_matrices", *_TAKE_OWN),
    Collective("all_gather_matrices", Shard, Invariant, "take_matrices", *_SHARE_OWN),
    Collective(
        "exchange_counts", None, None, None, _COUNTS, _exchange, _run_exchange_counts, _shape_counts
    ),
)
COLLECTIVES: dict[str, Collective] = {row.name: row for row in _TABLE}

_CONVERSIONS = {
    (row.source, row.target): row.name
    for row in COLLECTIVES.values()
    if row.source and (row.source, row.target) != (Rows, Rows)
    if not (row.casts or row.of_slots or row.lends_experts or row.has_owners)
}


def conversion(source: Kind, target: Kind) -> str | None:
    """The collective that turns one kind into another, or None if there is none.

    >>> conversion(Shard(0), Replicate()), conversion(Partial(), Invariant())
    ('all_gather', 'all_reduce_invariant')
    """
    return _CONVERSIONS.get((type(source), type(target)))


def collective(target: object) -> Collective | None:
    """The row of the table for a graph node's target, or None for another operator."""
    return _BY_OP.get(target)


# --- registration ---------------------------------------------------------------------------------

_library = torch.library.Library("moptrace", "FRAGMENT")


def _register(row: Collective) -> None:
    _library.define(row.name + row.schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(row.name, row.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moptrace::{row.name}", row.shape, lib=_library)
    torch.library.register_autograd(
        f"moptrace::{row.name}", _backward(row), setup_context=_remember, lib=_library
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.communicator = Communicator.current()
    extra = [x for x in inputs[1:] if isinstance(x, Tensor)]
    ctx.save_for_backward(*extra)
    ctx.arguments = inputs[1 + len(extra) :]
    ctx.size = inputs[0].shape[0] if inputs[0].dim() else None


def _backward(row: Collective) -> Callable[..., Any]:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        nothing = (None,) * (len(ctx.saved_tensors) + len(ctx.arguments))
        if row.transpose is None:
            return (None, *nothing)
        arguments = row.transpose_arguments((*ctx.saved_tensors, *ctx.arguments))
        if row.moves_rows:  # as many gradients come back as rows were sent
            arguments = (*row.without_size((gradient, *arguments))[1:], ctx.size)
        with ctx.communicator:
            return (COLLECTIVES[row.transpose].op(gradient, *arguments), *nothing)

    return backward


for _row in COLLECTIVES.values():
    _register(_row)

_BY_OP: dict[object, Collective] = {row.op: row for row in COLLECTIVES.values()}
