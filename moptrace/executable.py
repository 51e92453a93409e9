"""A program as a module that writes over what it replaces: what a rank runs."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Program, args_of, erase_dead
from moptrace.kernels.host_update import HostUpdate, Started
from moptrace.kernels.updating_experts import UpdatingExperts
from moptrace.liveness import blocks_in_place, overwritable, write_backs

__all__ = ["executable"]

aten, ops = torch.ops.aten, torch.ops.moptrace


def executable(program: Program, device: torch.device | str) -> fx.GraphModule:
    """The program as a module that writes new values over old ones as early as it may.

    It takes the program's inputs in order and returns the outputs that replace none of them. What
    reads a new value later on reads it where it was written, so that its own memory is free. A
    fused update that nothing hinders works in place. Its ``started`` are the updates on the host of
    its last run, for ``bring_back``.
    """
    module = program.module(device)
    nodes = dict(zip(program.nodes, module.graph.nodes, strict=True))
    place = {node: at for at, node in enumerate(program.nodes)}
    started: Started = []
    in_place = _start_on_host(program, nodes, started)
    _write_blocks(program, nodes, in_place)
    for after, pairs in write_backs(program).items():
        for old, new in reversed(pairs):
            if new in in_place:
                continue
            for user in new.users:
                if place[user] > place[after] and user.op != "output":
                    nodes[user].replace_input_with(nodes[new], nodes[old])
            with module.graph.inserting_after(nodes[after]):
                _write(nodes[old], new, nodes)
    kept = [
        nodes[node]
        for output, node in zip(program.signature.outputs, program.outputs, strict=True)
        if output.updates is None
    ]
    module.graph.output_node().args = (tuple(kept),)
    for node, pairs in overwritable(program).items():
        nodes[node].target = _in_place(node.target)
        for old, new in pairs:
            nodes[new].replace_all_uses_with(nodes[old])
            module.graph.erase_node(nodes[new])
            for user in list(nodes[old].users):
                if user.target is aten.copy_.default and user.args == (
                    nodes[old],
                    nodes[old],
                ):
                    module.graph.erase_node(user)
    erase_dead(module.graph)
    module.recompile()
    vars(module)["started"] = started
    return module


def _in_place(target: Any) -> Any:
    """The operator that writes new values over the old ones, for one that returns them."""
    return target.in_place if isinstance(target, UpdatingExperts) else ops.fused_adam_.default


def _write(to: fx.Node, new: fx.Node, nodes: Mapping[fx.Node, fx.Node]) -> None:
    """A node that writes a value of the program where the graph inserts."""
    write, value = aten.copy_.default, nodes[new]
    if new.target is ops.offload.default:  # into the memory that is there already
        write, value = ops.offload_into.default, nodes[new.all_input_nodes[0]]
    to.graph.call_function(write, (to, value))


def _write_blocks(
    program: Program, nodes: Mapping[fx.Node, fx.Node], there: Collection[fx.Node]
) -> None:
    """Write blocks into the inputs that they replace, but for those that are ``there`` already."""
    graph = nodes[program.graph.output_node()].graph
    for node, old in blocks_in_place(program).items():
        part: Any = node.args[1]
        starts: Any = node.args[2]
        reads = [x for x in old.users if x.target is ops.block.default and x.args[1] == starts]
        with graph.inserting_before(nodes[node]):
            if part not in there:
                sizes = roles.tensor(part).shape[: len(starts)]
                args = (nodes[old], starts, list(sizes))
                to = nodes[reads[0]] if reads else graph.call_function(ops.block.default, args)
                _write(to, part, nodes)
        nodes[node].replace_all_uses_with(nodes[old])
        graph.erase_node(nodes[node])


def _home(sent: fx.Node, nodes: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The parameter, or the part, of which an update on the host takes a copy."""
    if sent.target is not ops.block.default:
        return nodes[args_of(sent)[0]]
    copy, starts, sizes = args_of(sent)
    with nodes[sent].graph.inserting_after(nodes[sent]):
        args = (nodes[args_of(copy)[0]], starts, sizes)
        return nodes[sent].graph.call_function(ops.block.default, args)


def _start_on_host(
    program: Program, nodes: Mapping[fx.Node, fx.Node], started: Started
) -> set[fx.Node]:
    """Let the updates on the host run beside the rest; returns what they write where it belongs."""
    modules: dict[HostUpdate, fx.GraphModule] = {}
    found: set[fx.Node] = set()
    for node in program.nodes:
        update: Any = node.target
        if isinstance(update, HostUpdate):
            if update not in modules:
                modules[update] = executable(update.body, "cpu")
            nodes[node].target = update.beside(modules[update], started)
            nodes[node].args = (_home(args_of(node)[0], nodes), *nodes[node].args)
            found |= {user for user in node.users if user.target is operator.getitem}
    return found
