"""The vocabulary's weights over sub-groups of the ranks."""

from __future__ import annotations

import torch
from torch import fx

from moptrace.core import Level, Pass, Program
from moptrace.passes.context_parallel import call
from moptrace.placement import REPLICATE, Layout, Shard, View
from moptrace.reshard import constrain

__all__ = ["vocabulary_parallel"]

ops = torch.ops.moptrace

# Which operands of an operator have a row, or an element, for each word.
_WORDS = {ops.vocab_projection.default: (1, 2), ops.embedding_rows.default: (0,)}


def vocabulary_parallel(layout: Layout) -> Pass:
    """Ask that words be split over the ranks of ``vp`` and not over ``vdp``.

    Each group of ``vp`` ranks then holds the whole vocabulary between its uses, and only those
    ranks pass tokens or weights around; groups gather their part of a weight before it is used
    (MoP, the parallelism P). Requires: ``fuse_vocabulary`` and ``fuse_embedding``. Ensures: the
    same values on one device.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        found = [node for node in graph.nodes if node.target in _WORDS]
        if not found or layout.vocabulary == layout.dense:
            return program
        for node in found:
            for position in _WORDS[node.target]:
                weight = node.args[position]
                if isinstance(weight, fx.Node):
                    _split_words(node, weight, layout.vocabulary)
        return program.with_graph(graph)

    options = (("layout", str(layout)),)
    return Pass("vocabulary_parallel", rewrite, options, takes=(Level.CANONICAL,))


def _split_words(node: fx.Node, weight: fx.Node, view: View) -> None:
    """Ask for a split over the last axis, and whole over the one before."""
    *others, last = (axis.name for axis in view.axes)
    asked = call(node, constrain, weight, last, str(Shard(0)))
    for axis in others:
        asked = call(node, constrain, asked, axis, str(REPLICATE))
    node.replace_input_with(weight, asked)
