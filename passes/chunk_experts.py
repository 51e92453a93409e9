"""Send tokens to their experts chunk by chunk, so that no rank gets more than a bound at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, ancestors, copy_node
from moptrace.kernels import chunks
from moptrace.placement import Placement
from moptrace.random import draw
from moptrace.rules import JOINT, SIZE_ARGUMENT, Rule

__all__ = ["chunk_experts"]

aten, ops = torch.ops.aten, torch.ops.moptrace

# How tokens are divided among chunks, and put together again.
ORDERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "strided": (chunks.split_strided, chunks.join_strided),
    "contiguous": (chunks.split_contiguous, chunks.join_contiguous),
}

# The operands that have a part for each token; others have one for each row.
_OF_TOKENS: dict[Any, tuple[int, ...]] = {
    ops.dispatch.default: (0, 1),
    ops.pair_rows.default: (0,),
    ops.combine.default: (2,),
}


def chunk_experts(tokens: int | None, order: str = "strided", recompute: bool = True) -> Pass:
    """Dispatch, compute and combine a rank's tokens in chunks of at most ``tokens``.

    Of a chunk of c tokens with k choices each, none of ep * etp ranks can get more than
    ep * etp * c * k rows, whatever the router does. With ``recompute`` each chunk is a region that
    keeps nothing from forward to backward but what goes into it: tokens, their choices and the
    choices' weights, so that computing it again cannot send a token elsewhere. The rows of one
    chunk are then all that is alive at a time, in backward too. ``order`` is ``"strided"``, where a
    chunk has every K-th token, or ``"contiguous"``. ``tokens=None`` makes one chunk of all.

    Requires: a local program. Ensures: the same function. Sums over the chunks' rows, of which the
    gradients of experts consist, are taken chunk by chunk. A layer stays whole, with a note, where
    something other than its experts uses its rows.
    Source: FEMP (arXiv 2609.14306), PipelinedLLEP; MemFine (arXiv 2511.21431).
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        notes: list[str] = []
        changed = False
        for node in graph.find_nodes(op="call_function", target=ops.dispatch.default):
            layer = _Layer(node)
            number = 1 if tokens is None else math.ceil(layer.tokens / tokens)
            if number <= 1 and not recompute:
                continue
            if (user := layer.escape) is not None:
                notes.append(
                    f"all tokens of block {layer.block} go to their experts at once: "
                    f"{roles.where(user)} uses their rows as well"
                )
                continue
            if number > 1:
                notes.append(_bound(program, layer, number))
            _Writer(layer, number, order, recompute).write()
            changed = True
        result = program.with_graph(graph) if changed else program
        for note in dict.fromkeys(notes):
            result = result.with_note(note)
        return result

    options = (("tokens", tokens), ("order", order), ("recompute", recompute))
    return Pass("chunk_experts", rewrite, options, takes=(Level.LOCAL,))


def _bound(program: Program, layer: _Layer, number: int) -> str:
    """What a rank can get at once, in words."""
    assert program.layout is not None
    arriving = (ops.send_rows.default, ops.all_gather_rows.default)
    moves = [n for n in layer.nodes if n.target in arriving]
    axes = {next(x for x in n.args if isinstance(x, str)) for n in moves}
    size = math.ceil(layer.tokens / number)
    rows = math.prod(map(program.layout.size, axes)) * size * layer.choices
    row = roles.tensor(layer.dispatch.args[0])[:1]  # type: ignore[arg-type]
    bytes_ = rows * row.numel() * row.element_size()
    return (
        f"experts take their tokens in {number} chunks of at most {size}: under any router, no "
        f"more than {rows:,} rows ({bytes_:,} bytes) come to a rank at once"
    )


# --- what lies between dispatch and combine -------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """The nodes from one dispatch to its combines."""

    dispatch: fx.Node

    @cached_property
    def nodes(self) -> dict[fx.Node, None]:
        """The counts, and what leads from the dispatch to one of its combines, in order."""
        follows = {self.dispatch: None}
        combines: list[fx.Node] = []
        node = self.dispatch
        while (node := node.next).op != "output":
            if any(x in follows and x not in combines for x in node.all_input_nodes):
                follows[node] = None
                if _ends(node) and node.args[1] in self.results_of_dispatch(2):
                    combines.append(node)
        needed = ancestors([*combines, *self.results_of_dispatch(1)])
        return {node: None for node in follows if node in needed}

    def results_of_dispatch(self, number: int) -> list[fx.Node]:
        """The rows (0), counts (1) or order (2)."""
        return [x for x in self.dispatch.users if x.args == (self.dispatch, number)]

    @property
    def block(self) -> int | None:
        return roles.role(self.dispatch).block

    @property
    def tokens(self) -> int:
        """The tokens of the rank that has most."""
        return roles.tensor(self.dispatch.args[0]).shape[0]  # type: ignore[arg-type]

    @property
    def choices(self) -> int:
        return roles.tensor(self.dispatch.args[1]).shape[1]  # type: ignore[arg-type]

    @cached_property
    def rows(self) -> set[fx.Node]:
        """The nodes that have a part for each row."""
        found = {*self.results_of_dispatch(0), *self.results_of_dispatch(2)}
        for node in self.nodes:
            if not _ends(node) and any(x in found for x in node.all_input_nodes):
                found.add(node)
        return found

    @cached_property
    def results(self) -> list[fx.Node]:
        """The nodes that others use."""
        return [node for node in self.nodes if any(user not in self.nodes for user in node.users)]

    @property
    def last_operand(self) -> fx.Node:
        return max(x for node in self.nodes for x in node.all_input_nodes if x not in self.nodes)

    @property
    def escape(self) -> fx.Node | None:
        """What uses rows, or comes too early to use what all chunks together make; or None."""
        whole = self.results_of_dispatch(1)  # counts are added up
        for node in self.results:
            for user in node.users:
                early = user < self.last_operand
                if user not in self.nodes and (early or not (_ends(node) or node in whole)):
                    return user
        return None


def _ends(node: fx.Node) -> bool:
    """Whether rows become tokens."""
    return node.target is ops.combine.default


# --- writing the chunks ---------------------------------------------------------------------------


class _Writer:
    """Writes a layer once for each chunk, where all of its operands are there."""

    def __init__(self, layer: _Layer, number: int, order: str, recompute: bool):
        self.layer, self.number, self.recompute = layer, number, recompute
        self.split, self.join = ORDERS[order]
        self.graph = layer.dispatch.graph
        self.pieces: dict[fx.Node, list[fx.Node]] = {}
        self.sites = 1 + max((n.args[1] for n in self.graph.nodes if n.target is draw), default=0)  # type: ignore[type-var]

    def write(self) -> None:
        layer = self.layer
        with self.graph.inserting_before(layer.last_operand.next):
            copies = [self._chunk(chunk) for chunk in range(self.number)]
            for old in layer.results:
                new = self._together(old, [of[old] for of in copies])
                old.replace_all_uses_with(new, lambda user: user not in layer.nodes)
        for node in reversed(layer.nodes):
            self.graph.erase_node(node)

    def _chunk(self, chunk: int) -> dict[fx.Node, fx.Node]:
        """The layer's nodes for the tokens of one chunk."""
        new: dict[fx.Node, fx.Node] = {}
        of_tokens = {
            node: {at: self._piece(node.args[at], chunk) for at in _OF_TOKENS.get(node.target, ())}
            for node in self.layer.nodes
        }
        for node in self.layer.nodes:
            new[node] = made = copy_node(self.graph, node, lambda x: new.get(x, x))
            for at, piece in of_tokens[node].items():
                made.update_arg(at, piece)
            if made.target is draw:  # of its own, not as the other chunks do
                made.update_arg(1, made.args[1] + chunk * self.sites)  # type: ignore[operator]
            if self.recompute:
                roles.set_role(made, recompute=f"{self.layer.dispatch.name}, chunk {chunk}")
            self._resize(node, made, chunk)
        return new

    def _piece(self, x: Any, chunk: int) -> fx.Node:
        """One chunk's part of a value that has one for each token."""
        if self.number == 1:
            return x
        if x not in self.pieces:
            value, rule = roles.tensor(x), _alike(roles.tensor(x).dim(), results=self.number)
            parts = [value.new_empty(self._tokens(i), *value.shape[1:]) for i in range(self.number)]
            call = self.graph.call_function(self.split, (x, self.number))
            self._describe(call, x, tuple(parts), rule)
            self.pieces[x] = [
                self.graph.call_function(getitem, (call, i)) for i in range(self.number)
            ]
            for part, piece in zip(parts, self.pieces[x], strict=True):
                self._describe(piece, x, part, None)
        return self.pieces[x][chunk]

    def _together(self, old: fx.Node, parts: Sequence[fx.Node]) -> fx.Node:
        """What the chunks make: combined tokens, or a sum of counts."""
        if self.number == 1:
            return parts[0]
        dims = roles.tensor(old).dim()
        if _ends(old):
            joined = self.graph.call_function(self.join, (list(parts),))
            return self._describe(joined, old, roles.value(old), _alike(dims, operands=self.number))

        def plus(one: fx.Node, other: fx.Node) -> fx.Node:
            sum_ = self.graph.call_function(aten.add.Tensor, (one, other))
            return self._describe(sum_, old, roles.value(old), _alike(dims, operands=2))

        return reduce(plus, parts)

    def _describe(self, new: fx.Node, of: fx.Node, value: Any, rule: Rule | None) -> fx.Node:
        """Say that a new node is held as an old one."""
        several = len(value) if isinstance(value, tuple) else 1
        placements: tuple[Placement | None, ...] = (roles.placement(of),) * several
        roles.copy_role(new, of=self.layer.dispatch, rule=rule, placements=placements)
        roles.set_value(new, value)
        return new

    # --- sizes ---

    def _tokens(self, chunk: int) -> int:
        return math.ceil((self.layer.tokens - chunk) / self.number)

    def _share(self, size: int, chunk: int) -> int:
        """Of so many rows, those of one chunk."""
        return size * self._tokens(chunk) // self.layer.tokens

    def _resize(self, old: fx.Node, new: fx.Node, chunk: int) -> None:
        """A chunk has fewer rows and tokens; on one rank their number is written in the graph."""
        value = roles.value(old)
        if old is self.layer.dispatch:
            rows, counts, order = value
            roles.set_value(new, (self._part(rows, chunk), counts, self._part(order, chunk)))
        elif _ends(old) or old in self.layer.rows:
            several = isinstance(value, (tuple, list))
            parts = tuple(self._part(x, chunk) for x in (value if several else [value]))
            roles.set_value(new, parts if several else parts[0])
        packet: Any = getattr(old.target, "overloadpacket", None)
        at = SIZE_ARGUMENT.get(packet)
        if at is not None and old in self.layer.rows:
            first, *others = old.args[at]  # type: ignore[misc]
            if isinstance(first, int) and first > 0:
                new.update_arg(at, [self._share(first, chunk), *others])

    def _part(self, value: Tensor, chunk: int) -> Tensor:
        return value.new_empty(self._share(value.shape[0], chunk), *value.shape[1:])


def _alike(dims: int, operands: int = 1, results: int = 1) -> Rule:
    """The rule of what divides tokens or joins them, each of which stays where it is."""
    factors = tuple(f"d{dim}" for dim in range(dims))
    return Rule((factors,) * operands, (factors,) * results, JOINT)
