"""Write mean losses as a sum over tokens divided by their number, both over the global batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.rules import argument

__all__ = ["normalize_losses"]

aten = torch.ops.aten


def normalize_losses() -> Pass:
    """Split every mean cross entropy into a sum and a count of the tokens that matter.

    The sum and the count can be split over tokens and added up exactly, while a mean of means is
    wrong as soon as ranks have different numbers of ignored labels. Works for
    ``cross_entropy_loss`` and ``nll_loss`` with ignored labels, class weights and label smoothing.
    Class-probability targets divide by the number of tokens.

    Requires: nothing. Ensures: no loss operator has ``reduction="mean"``; the value is the same.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        for node in list(graph.nodes):
            if node.target in _LOSSES and argument(node, 3, "reduction", 1) == 1:
                _split(graph, node)
        return program.with_graph(graph)

    return Pass("normalize_losses", rewrite, takes=(Level.CAPTURED, Level.CANONICAL))


_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default)
_SUM = 2


def _split(graph: fx.Graph, node: fx.Node) -> None:
    logits, target = node.args[0], node.args[1]
    assert isinstance(logits, fx.Node) and isinstance(target, fx.Node)

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(op, args, kwargs)
        values = pytree.tree_map_only(fx.Node, roles.value, (args, kwargs))
        roles.set_value(new, op(*values[0], **values[1]))
        roles.copy_role(new, of=node)
        return new

    weight = argument(node, 2, "weight", None)
    ignored = argument(node, 4, "ignore_index", -100)
    with graph.inserting_before(node):
        more = {"label_smoothing": s} if (s := argument(node, 5, "label_smoothing", 0.0)) else {}
        total = call(node.target, logits, target, weight, _SUM, ignored, **more)
        scores = roles.tensor(logits)
        if roles.tensor(target).is_floating_point():
            classes = 1 if scores.dim() > 1 else 0
            tokens = call(aten.select.int, target, classes, 0)
            count = call(aten.sum.default, call(aten.ones_like.default, tokens))
        else:
            kept = call(aten.ne.Scalar, target, ignored)
            if weight is not None:
                safe = call(aten.where.ScalarOther, kept, target, 0)
                per_token = call(aten.mul.Tensor, call(aten.index.Tensor, weight, [safe]), kept)
                count = call(aten.sum.default, per_token)
            else:
                count = call(aten.sum.default, kept)
        mean = call(aten.div.Tensor, total, count)
    node.replace_all_uses_with(mean)
    graph.erase_node(node)
