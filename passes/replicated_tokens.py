"""Say where every rank works on all tokens of a sequence, although each has only some of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.passes.gather_tokens import is_gathered
from moptrace.passes.place import ReplicationWarning
from moptrace.placement import Layout, Partial, Rows, Shard, parse_kind
from moptrace.reshard import reshard
from moptrace.roles import Component

__all__ = ["report_replicated_tokens"]

aten, ops = torch.ops.aten, torch.ops.moptrace
_OF_LOGITS = (Component.VOCAB, Component.LOSS)
# What a plan's way to drop or to gather tokens needs of all of them, next to their dispatch.
_OF_PAIRS = (ops.keep_pairs.default, ops.pair_rows.default, ops.combine.default)


def report_replicated_tokens(asked: bool = False) -> Pass:
    """Note each module for which tokens are gathered along ``cp`` and that is then computed alike.

    A recurrence over tokens is such a module, and so is a convolution that sees later tokens. Keys
    that are gathered for a rank's own queries are not: there, the work is divided. Nor are logits,
    of which the plan says how many a rank may hold, nor what all ranks need to drop the same
    tokens, or gather for their experts. ``asked`` leaves out attention, for a plan that asks for
    this.

    Requires: a placed program. Ensures: the same program, with a note and a ``ReplicationWarning``
    of the bytes for each module.
    """

    def rewrite(program: Program) -> Program:
        assert program.layout is not None
        if "cp" not in [axis.name for axis in program.layout.tokens.axes]:
            return program
        first: dict[str, fx.Node] = {}
        bytes_: dict[str, int] = {}
        for gathered, user in _alike(program.graph, program.layout, asked):
            module = roles.role(user).module
            value = roles.tensor(gathered)
            first.setdefault(module, user)
            bytes_[module] = bytes_.get(module, 0) + value.numel() * value.element_size()
        for module, node in first.items():
            note = (
                f"{module or 'the model'} mixes the tokens of a sequence in a way without a rule, "
                f"so every rank along cp computes all of it: {bytes_[module]:,} bytes gathered per "
                f"step ({roles.where(node)})"
            )
            warnings.warn(note, ReplicationWarning, stacklevel=2)
            program = program.with_note(note)
        return program

    return Pass("report_replicated_tokens", rewrite, (("asked", asked),), takes=(Level.PLACED,))


def _alike(graph: fx.Graph, layout: Layout, asked: bool) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What is gathered of activations, and a node that then computes the same on every rank."""
    axes = ["cp"]
    if layout.size("cp") == layout.world_size:
        axes.append(layout.home.axes[0].name)
    for node in graph.find_nodes(op="call_function", target=reshard):
        x, axis, *kinds = node.args
        splits = [isinstance(parse_kind(str(kind)), Shard) for kind in kinds]
        if axis not in axes or splits != [True, False]:
            continue
        if not roles.tensor(node).is_floating_point() or _is_parameter(x):
            continue
        for user in map(_settled, node.users):
            chosen = asked and user.target is aten.scaled_dot_product_attention.default
            chosen |= (
                user.op == "output" or roles.component(user) in _OF_LOGITS or _is_planned(user)
            )
            if not chosen and not _is_divided(user, layout):
                yield node, user
                break


def _is_planned(node: fx.Node) -> bool:
    """Whether a plan's way to drop or to gather tokens brings values there."""
    gathered = node.target is ops.dispatch.default and is_gathered(node)
    return gathered or node.target in _OF_PAIRS


def _settled(node: fx.Node) -> fx.Node:
    """The node that uses a value once it has moved as far as it does."""
    while node.target is reshard and len(node.users) == 1:
        (node,) = node.users
    return node


def _is_parameter(x: object) -> bool:
    """Whether a value is a parameter, or that moved."""
    while isinstance(x, fx.Node) and len(x.all_input_nodes) == 1:
        (x,) = x.all_input_nodes
    return isinstance(x, fx.Node) and x.op == "placeholder"


def _is_divided(node: fx.Node, layout: Layout) -> bool:
    """Whether each rank along ``cp`` computes its part of a node's results, or its terms."""
    for placement in roles.placements(node):
        said = placement.expressed_in(layout.tokens) if placement else None
        if said is not None and isinstance(said.kind("cp"), (Partial, Rows, Shard)):
            return True
    return False
