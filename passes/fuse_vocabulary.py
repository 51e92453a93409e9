"""Take the loss from the vocabulary projection without the logits."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.core import Level, Pass, Program, Signature, erase_dead
from moptrace.passes.axes import CASTS, argument, packet, shape
from moptrace.trace import OutputIndex

__all__ = ["Fusion", "LogitsWarning", "fuse_vocabulary", "fusions"]

aten, ops = torch.ops.aten, torch.ops.moptrace


class LogitsWarning(UserWarning):
    """The logits of all tokens over the vocabulary are held in memory."""


def fuse_vocabulary(at_least: int = 0, keep_logits: bool = False) -> Pass:
    """Replace a projection onto the vocabulary and its cross entropy by ``vocab_projection``.

    Between the two, casts, reshapes, slices of tokens, a scale and a soft cap may stand in any
    spelling: what moves tokens is done to the hidden states instead. The loss keeps its ignored
    labels, label smoothing and class weights, and a log-sum-exp of the same logits (the z-loss) is
    served too. Logits that only the model's output holds are dropped from it (``None`` in their
    place) unless ``keep_logits``, which warns of their bytes; a cast for the output counts as it.

    ``at_least`` leaves alone the losses whose logits have fewer bytes, over all ranks.
    Requires: ``normalize_losses``. Ensures: the same loss; logits that are not in the operands'
    dtype any more but in float32, which every loss that asks for it did already.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        end = graph.output_node()
        changed = False
        for found in fusions(graph):
            if found.bytes < at_least:
                continue
            casts = found.shown(end)
            found.rewrite()
            changed = True
            if any(end in n.users for n in (*found.chain, *casts)):
                if keep_logits:
                    text = _kept(found)
                    warnings.warn(text, LogitsWarning, stacklevel=2)
                    program = program.with_note(text)
                else:
                    gone = {*found.chain, *casts}
                    program = replace(program, signature=_without(program.signature, end, gone))
        if not changed:
            return program
        erase_dead(graph)
        return program.with_graph(graph)

    options = (("at_least", at_least), ("keep_logits", keep_logits))
    return Pass(
        "fuse_vocabulary",
        rewrite,
        options,
        takes=(Level.CANONICAL,),
        needs=("normalize_losses",),
    )


def fusions(graph: fx.Graph) -> Iterator[Fusion]:
    """The losses over a vocabulary whose logits nothing else needs."""
    end = graph.output_node()
    for node in list(graph.nodes):
        found = Fusion.of(node) if node.target in _ENTROPIES else None
        if found is not None:
            free = {end, *found.shown(end)}
            if all(user in free or found.serves(user) for user in found.others()):
                yield found


_ENTROPIES = (aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default)
_MEAN, _SUM = 1, 2
_VIEWS = {aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unsqueeze, aten.squeeze}
_MOVES = {*_VIEWS, aten.slice}


@dataclass(frozen=True)
class Fusion:
    """A cross entropy and the chain of nodes from the projection, the first, to its logits."""

    loss: fx.Node
    chain: tuple[fx.Node, ...]
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, loss: fx.Node) -> Fusion | None:
        """Follow a loss's logits back to a product with the vocabulary's weight."""
        logits, target = loss.args[:2]
        assert isinstance(logits, fx.Node) and isinstance(target, fx.Node)
        if argument(loss, 3, "reduction", _MEAN) == _MEAN or _is_probability(target):
            return None
        if argument(loss, 2, "weight") is not None and _smoothing(loss):
            return None
        chain = [logits]
        last = len(shape(logits)) <= 2  # the loss has its classes second, most models last
        open_ = loss.target is not aten.cross_entropy_loss.default  # until a softmax is found
        scale, softcap = 1.0, None
        while (product := _product(chain[-1])) is None or not last:
            node = chain[-1]
            if open_ and _is_log_softmax(node, len(shape(node)) - 1 if last else 1):
                open_ = False
            elif not last:
                if not _moves_classes(node):
                    return None
                last = True
            elif _widens(node) or _moves_tokens(node):
                pass
            elif open_ or (factor := _factor(node)) is None:
                return None
            elif (cap := _soft_cap(node, factor)) is not None:
                if softcap is not None or scale != 1.0:  # the operator scales, then caps, once
                    return None
                softcap = factor
                chain += cap
            else:
                scale *= factor
            chain.append(chain[-1].args[0])  # type: ignore[arg-type]
        if open_:
            return None
        return cls(loss, tuple(reversed(chain)), *product, scale, softcap)

    @property
    def bytes(self) -> int:
        value = roles.tensor(self.chain[-1])
        return value.numel() * value.element_size()

    @property
    def tokens(self) -> int:
        """How many tokens are projected."""
        cut = _Tokens.of(self).cut
        return math.prod(shape(self.hidden if cut is not None else self.chain[-1])[:-1])

    def shown(self, end: fx.Node) -> list[fx.Node]:
        """The casts of the logits for the model's output alone."""
        return [user for user in self.others() if _only_shown(user, end)]

    def others(self) -> Iterator[fx.Node]:
        """What else uses the logits."""
        inside = {*self.chain, self.loss}
        for node in self.chain:
            yield from (u for u in node.users if u not in inside)

    def serves(self, user: fx.Node) -> bool:
        """Whether a use of the logits is their log-sum-exp, over as many tokens as the loss has."""
        if packet(user) is not aten.logsumexp or argument(user, 2, "keepdim", False):
            return False
        logits, dims = user.args[:2]
        assert isinstance(logits, fx.Node)
        last = [int(d) % len(shape(logits)) for d in dims]  # type: ignore[union-attr]
        if last != [len(shape(logits)) - 1] or logits not in self._values():
            return False
        after = self.chain[self.chain.index(logits) + 1 :]
        return all(packet(node) in _VIEWS | CASTS for node in after)

    def _values(self) -> list[fx.Node]:
        """The nodes of the chain that are the logits themselves, scaled and capped."""
        at = len(self.chain)
        while at and (_widens(self.chain[at - 1]) or _moves_tokens(self.chain[at - 1])):
            at -= 1
        return list(self.chain[max(at - 1, 0) :])

    def rewrite(self) -> None:
        """Write the projection and the loss of each token; the chain is left without users."""
        writer = _Writer(self.loss, self.chain[0])
        loss, target = self.loss, self.loss.args[1]
        assert isinstance(target, fx.Node)
        weight = self.weight
        if self.chain[0].target is not aten.linear.default:  # [D, V], as a product has it
            weight = _turned(weight) or writer.call(aten.t.default, weight)
        words, width = shape(weight)
        ignored = argument(loss, 4, "ignore_index", -100)
        rows, tokens = self.hidden, _Tokens.of(self)
        if tokens.cut is None:
            for node in self.chain[1:]:
                if _moves_tokens(node):
                    rows = writer.moved(node, rows, width)
        count = math.prod(shape(rows)[:-1])
        if len(shape(rows)) != 2:
            rows = writer.call(aten.reshape.default, rows, [count, width])
        labels = tokens.padded(writer, target, ignored)
        if len(shape(labels)) != 1:
            labels = writer.call(aten.reshape.default, labels, [count])
        args = (rows, weight, self.bias, labels, self.scale, self.softcap)
        three = writer.call(ops.vocab_projection.default, *args)
        lse, chosen, total = (writer.item(three, i) for i in range(3))
        writer.of = loss
        kept = writer.call(ops.kept_tokens.default, labels, words, ignored)
        smoothing = _smoothing(loss)
        if smoothing:
            chosen = writer.call(aten.mul.Tensor, chosen, 1 - smoothing)
        each = writer.call(aten.sub.Tensor, lse, chosen)
        if smoothing:
            spread = writer.call(aten.mul.Tensor, total, smoothing / words)
            each = writer.call(aten.sub.Tensor, each, spread)
        if (weights := argument(loss, 2, "weight")) is not None:
            safe = writer.call(aten.where.ScalarOther, kept, labels, 0)
            each = writer.call(
                aten.mul.Tensor, each, writer.call(aten.index.Tensor, weights, [safe])
            )
        each = writer.call(aten.where.ScalarOther, kept, each, 0)
        if argument(loss, 3, "reduction", _MEAN) == _SUM:
            new = writer.call(aten.sum.default, each)
        else:
            new = tokens.cut_again(writer, each, shape(target))
        loss.replace_all_uses_with(writer.cast(new, roles.tensor(loss).dtype))
        self._serve(writer, tokens, lse)
        loss.graph.erase_node(loss)

    def _serve(self, writer: _Writer, tokens: _Tokens, lse: fx.Node) -> None:
        for user in [u for u in self.others() if packet(u) is aten.logsumexp]:
            with_shape = tokens.cut_again(writer, lse, shape(user))
            after = writer.cast(with_shape, roles.tensor(user).dtype)
            _move_later(user, after)
            user.replace_all_uses_with(after)
            user.graph.erase_node(user)


@dataclass(frozen=True)
class _Tokens:
    """The tokens that a loss leaves out by one slice of its logits, such as the last of a sequence.

    They are projected all the same, with a label that is ignored: so a sequence that is split over
    ranks stays as it is. ``cut`` is the slice, None where there is none or not just one.
    """

    cut: fx.Node | None

    @classmethod
    def of(cls, fusion: Fusion) -> _Tokens:
        moves = [node for node in fusion.chain[1:] if _moves_tokens(node)]
        cuts = [node for node in moves if packet(node) is aten.slice]
        if len(cuts) != 1 or argument(cuts[0], 4, "step", 1) != 1 or moves[0] is not cuts[0]:
            return cls(None)
        return cls(cuts[0])

    def padded(self, writer: _Writer, target: fx.Node, ignored: int) -> fx.Node:
        """The labels of all tokens."""
        if self.cut is None:
            return target
        dim, start, size, whole = self._where(self.cut)
        kept = shape(self.cut)[:-1]
        if shape(target) != kept:
            target = writer.call(aten.reshape.default, target, list(kept))
        sides = [0, 0] * (len(kept) - dim - 1) + [start, whole - start - size]
        return writer.call(aten.constant_pad_nd.default, target, sides, ignored)

    def cut_again(self, writer: _Writer, each: fx.Node, wanted: tuple[Any, ...]) -> fx.Node:
        """A value of each token, of those that the loss keeps."""
        if self.cut is not None:
            dim, start, size, _ = self._where(self.cut)
            all_ = shape(self.cut.args[0])[:-1]  # type: ignore[arg-type]
            each = writer.call(aten.reshape.default, each, list(all_))
            each = writer.call(aten.slice.Tensor, each, dim, start, start + size)
        return writer.call(aten.reshape.default, each, list(wanted))

    @staticmethod
    def _where(cut: fx.Node) -> tuple[int, int, int, int]:
        """The dimension that is cut, where its slice starts, how long it and the whole are."""
        before, after = shape(cut.args[0]), shape(cut)  # type: ignore[arg-type]
        dim = int(argument(cut, 1, "dim", 0)) % len(after)
        start = argument(cut, 2, "start") or 0
        return dim, start + before[dim] if start < 0 else start, after[dim], before[dim]


class _Writer:
    """Writes nodes before the loss, in the name of the projection and then of the loss."""

    def __init__(self, loss: fx.Node, projection: fx.Node):
        self.graph, self.before, self.of = loss.graph, loss, projection

    def call(self, op: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            new = self.graph.call_function(op, args)
        roles.set_value(new, op(*pytree.tree_map_only(fx.Node, roles.value, args)))
        roles.copy_role(new, of=self.of)
        return new

    def item(self, node: fx.Node, at: int) -> fx.Node:
        with self.graph.inserting_before(self.before):
            new = self.graph.call_function(operator.getitem, (node, at))
        roles.set_value(new, roles.value(node)[at])
        roles.copy_role(new, of=self.of)
        return new

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if roles.tensor(node).dtype is dtype:
            return node
        with self.graph.inserting_before(self.before):
            new = self.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        roles.set_value(new, roles.tensor(node).to(dtype))
        roles.copy_role(new, of=self.of)
        return new

    def moved(self, node: fx.Node, rows: fx.Node, width: int) -> fx.Node:
        """Do to the rows of hidden states what a node does to those of logits."""
        if packet(node) in _VIEWS:
            return self.call(aten.reshape.default, rows, [*shape(node)[:-1], width])
        return self.call(node.target, rows, *node.args[1:])


# ---- Reading the chain ---------------------------------------------------------------------------


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Hidden states, weight and bias of a projection; None for another operator.

    The weight is [V, D] where the operator is ``linear``, else [D, V].
    """
    if packet(node) not in (aten.linear, aten.matmul, aten.mm):
        return None
    hidden, weight = node.args[:2]
    assert isinstance(hidden, fx.Node) and isinstance(weight, fx.Node)
    if len(shape(weight)) != 2 or len(shape(hidden)) < 2 or not _is_fixed(weight):
        return None
    bias = argument(node, 2, "bias") if packet(node) is aten.linear else None
    return hidden, weight, bias


def _is_fixed(node: fx.Node) -> bool:
    """Whether a weight is a parameter, cast or transposed."""
    while node.op == "call_function" and (packet(node) in CASTS or _turned(node)):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "placeholder"


def _turned(node: fx.Node) -> fx.Node | None:
    """The matrix of which a node is the transpose."""
    if packet(node) in (aten.t, aten.numpy_T, aten.transpose, aten.permute):
        return node.args[0]  # type: ignore[return-value]
    return None


def _is_log_softmax(node: fx.Node, classes: int) -> bool:
    return packet(node) in (aten.log_softmax, aten._log_softmax) and (
        int(node.args[1]) % len(shape(node)) == classes  # type: ignore[arg-type]
    )


def _widens(node: fx.Node) -> bool:
    """Whether the node is a copy, or a cast that loses nothing."""
    if packet(node) not in CASTS or packet(node) is aten.detach:
        return False
    before, after = roles.tensor(node.args[0]).dtype, roles.tensor(node).dtype  # type: ignore
    return torch.promote_types(before, after) == after


def _moves_tokens(node: fx.Node) -> bool:
    """Whether the node rearranges or selects tokens and leaves the last dimension alone."""
    if packet(node) not in _MOVES:
        return False
    before, after = shape(node.args[0]), shape(node)  # type: ignore[arg-type]
    if not after or before[-1] != after[-1]:
        return False
    if packet(node) is aten.slice:
        return int(argument(node, 1, "dim", 0)) % len(after) != len(after) - 1
    return True


def _moves_classes(node: fx.Node) -> bool:
    """Whether the node puts the last dimension second, where a loss wants the classes."""
    rank = len(shape(node))
    if rank < 3:
        return False
    order = list(range(rank))
    if packet(node) is aten.transpose:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    elif packet(node) is aten.permute:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    return order == [0, rank - 1, *range(1, rank - 1)]


def _factor(node: fx.Node) -> float | None:
    """The number by which a node multiplies its first operand."""
    if len(node.args) < 2 or not isinstance(node.args[1], (int, float)):
        return None
    if packet(node) is aten.mul:
        return float(node.args[1])
    return 1 / float(node.args[1]) if packet(node) is aten.div and len(node.args) == 2 else None


def _soft_cap(node: fx.Node, factor: float) -> list[fx.Node] | None:
    """The tanh and the division before a multiplication that caps softly."""
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or packet(inner) is not aten.tanh:
        return None
    divided = inner.args[0]
    if not isinstance(divided, fx.Node):
        return None
    by = _factor(divided)
    matches = by is not None and math.isclose(by * factor, 1.0, rel_tol=1e-12)
    return [inner, divided] if matches else None


def _is_probability(target: fx.Node) -> bool:
    return roles.tensor(target).is_floating_point()


def _smoothing(loss: fx.Node) -> float:
    if loss.target is not aten.cross_entropy_loss.default:
        return 0.0
    return float(argument(loss, 5, "label_smoothing", 0.0))


def _move_later(user: fx.Node, new: fx.Node) -> None:
    """Put what follows a node's uses after its replacement, where they stand before it."""
    order = {node: place for place, node in enumerate(user.graph.nodes)}
    late = [u for u in user.users if order[u] < order[new]]
    after = new
    while late:
        node = min(late, key=order.__getitem__)
        late.remove(node)
        after.append(node)
        after = node
        late += [u for u in node.users if order[u] < order[new] and u not in late]


# ---- The model's output --------------------------------------------------------------------------


def _only_shown(node: fx.Node, end: fx.Node) -> bool:
    """Whether a node casts a value for the model's output, and for nothing else."""
    return packet(node) is aten._to_copy and set(node.users) == {end}


def _without(signature: Signature, end: fx.Node, gone: set[fx.Node]) -> Signature:
    """Drop graph outputs; ``None`` takes their place in what the model returns."""
    kept = [i for i, node in enumerate(end.args[0]) if node not in gone]  # type: ignore
    place = {old: new for new, old in enumerate(kept)}
    end.args = (tuple(end.args[0][i] for i in kept),)  # type: ignore[index]
    results = tuple(
        (OutputIndex(place[int(x)]) if int(x) in place else None)
        if isinstance(x, OutputIndex)
        else x
        for x in signature.results
    )
    return replace(
        signature,
        outputs=tuple(signature.outputs[i] for i in kept),
        loss=place[signature.loss],
        results=results,
    )


def _kept(found: Fusion) -> str:
    return (
        f"the model returns its logits, so they are held whole: {found.bytes:,} bytes over all "
        f"ranks ({roles.where(found.chain[0])}). Leave them out to save these."
    )
