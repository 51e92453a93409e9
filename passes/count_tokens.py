"""Count how many tokens each expert gets."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Buffer, Level, Output, Pass, Program
from moptrace.errors import PassError
from moptrace.passes.drop_tokens import keeper

__all__ = ["count_tokens"]

aten, ops = torch.ops.aten, torch.ops.moptrace

NAME = "tokens_per_expert"


def count_tokens() -> Pass:
    """Add a buffer ``tokens_per_expert`` in which every forward counts each expert's tokens.

    It is int64 [blocks, experts], over the global batch; set it to zero to count anew. Tokens that
    an expert's capacity leaves out are counted too: they chose it. (Where
    blocks have different numbers of experts there is one for each number, such as
    ``tokens_per_expert_8``.) The buffer is no part of a model's state.

    Requires: a canonical program. Ensures: the same function; the buffer is not among what the
    model returns. Raises PassError if the model has a buffer of the name.
    """

    def rewrite(program: Program) -> Program:
        graph, _ = program.copy_graph()
        blocks: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=ops.dispatch.default):
            blocks[roles.value(node)[1].shape[0]].append(node)
        for experts, dispatches in blocks.items():
            name = NAME if len(blocks) == 1 else f"{NAME}_{experts}"
            program = _counted(program, graph, name, dispatches)
        return program.with_graph(graph) if blocks else program

    return Pass("count_tokens", rewrite, takes=(Level.CANONICAL,))


def _counted(program: Program, graph: fx.Graph, name: str, dispatches: list[fx.Node]) -> Program:
    """Add one buffer to the signature and to the graph, whose last placeholders are the inputs."""
    signature = program.signature
    if name in signature.names or any(x.fqn == name for x in signature.buffers):
        raise PassError(
            f"the model has a tensor named {name!r} already; count with Plan(count_tokens=False) "
            "and that one, or rename it"
        )
    end = graph.output_node()
    held = graph.find_nodes(op="placeholder")
    after_buffers = len(signature.parameters) + len(signature.buffers)

    def call(target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        roles.copy_role(new, of=dispatches[0], rule=None)
        return new

    with graph.inserting_before(held[after_buffers]):
        before = graph.placeholder(name)
    with graph.inserting_before(end):
        counts: list[fx.Node] = []
        for dispatch in dispatches:
            counts.append(call(getitem, keeper(dispatch) or dispatch, 1))
            roles.set_value(counts[-1], roles.value(dispatch)[1])
        here = call(aten.stack.default, counts)
        after = call(aten.add.Tensor, before, here)
    one = roles.tensor(counts[0])
    shape = (len(counts), *one.shape)
    for node in (before, here, after):
        roles.set_value(node, one.new_empty(shape))
    end.args = ((*end.args[0], after),)  # type: ignore[misc]
    buffer = Buffer(name, name, shape, torch.int64, persistent=False, added=True)
    return replace(
        program,
        signature=replace(
            signature,
            buffers=(*signature.buffers, buffer),
            outputs=(*signature.outputs, Output(name, buffer=name)),
        ),
    )
