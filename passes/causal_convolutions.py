"""Convolutions over tokens that see no later ones, where the tokens lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program, erase_dead
from moptrace.passes.axes import argument, packet, shape
from moptrace.placement import Layout

__all__ = ["causal_convolutions"]

aten, ops = torch.ops.aten, torch.ops.moptrace


def causal_convolutions(layout: Layout) -> Pass:
    """Replace ``conv1d`` by ``causal_conv1d``, for which a rank needs few tokens of the one before.

    Two spellings: zeros are put before the tokens, or on both sides and what comes after the last
    token is cut off. The others stay and gather their tokens; so does a kernel that reaches back
    further than one rank's tokens, and everything where sequences are not split over ``cp``.
    Ensures: the same values on one device.
    """

    def rewrite(program: Program) -> Program:
        ranks = {axis.name: axis.size for axis in layout.tokens.axes}.get("cp", 1)
        if ranks == 1:
            return program
        graph, _ = program.copy_graph()
        found = [n for n in graph.nodes if packet(n) is aten.conv1d]
        for node in found:
            _replace(node, ranks)
        erase_dead(graph)
        return program.with_graph(graph) if found else program

    return Pass("causal_convolutions", rewrite, takes=(Level.CANONICAL,))


def _replace(node: fx.Node, ranks: int) -> None:
    x, weight, bias = (
        argument(node, at, name) for at, name in enumerate(("input", "weight", "bias"))
    )
    stride, padding, dilation = (
        _one_number(argument(node, at, name, default))
        for at, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    if len(shape(x)) != 3 or stride != 1 or dilation is None:
        return
    reach = (shape(weight)[-1] - 1) * dilation
    ends = [node]
    if padding == 0 and _zeros_before(x) == reach:
        x = x.args[0]
    elif padding == reach and all(_cuts(user, shape(x)[2]) for user in node.users):
        ends = list(node.users)
    else:
        return
    if shape(x)[2] < ranks * reach:
        return
    with node.graph.inserting_before(node):
        args = (x, weight, bias, dilation, argument(node, 6, "groups", 1))
        new = node.graph.call_function(ops.causal_conv1d.default, args)
    roles.set_value(new, roles.value(ends[0]))
    roles.copy_role(new, of=node)
    for end in ends:
        end.replace_all_uses_with(new)


def _one_number(given: Any) -> int | None:
    """An option of a convolution over one dimension."""
    given = given[0] if isinstance(given, (list, tuple)) else given
    return given if isinstance(given, int) else None


def _zeros_before(x: fx.Node) -> int | None:
    """How many zeros an operator puts before the last dimension, if it does no more."""
    if packet(x) not in (aten.pad, aten.constant_pad_nd):
        return None
    before, *rest = argument(x, 1, "pad")
    mode, value = argument(x, 2, "mode", "constant"), argument(x, 3, "value", None)
    if packet(x) is aten.constant_pad_nd:
        mode, value = "constant", argument(x, 2, "value", 0)
    return before if not any(rest) and mode == "constant" and not value else None


def _cuts(node: fx.Node, tokens: int) -> bool:
    """Whether a node keeps the first tokens of [B, C, T]."""
    if packet(node) is not aten.slice or argument(node, 1, "dim", 0) % 3 != 2:
        return False
    return argument(node, 2, "start") in (None, 0) and shape(node)[2] == tokens
