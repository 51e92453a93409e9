"""Parameters that are separate for each expert, and the one parameter that each set becomes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._guards import detect_fake_mode

from moptrace import roles
from moptrace.core import Parameter, Signature

__all__ = ["Nodes", "Stacks"]

aten = torch.ops.aten
ops = torch.ops.moptrace

Nodes: TypeAlias = tuple[fx.Node, ...]


class Stacks:
    """Parameters that are separate for each expert, and the one parameter that each set becomes."""

    def __init__(self, graph: fx.Graph, signature: Signature):
        self.graph = graph
        self.placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        self.known = {p.name: p for p in signature.parameters}
        self.names = {p.fqn for p in signature.parameters}
        self.stacked: dict[Nodes, tuple[fx.Node, Parameter]] = {}
        self.members: dict[fx.Node, tuple[fx.Node, int]] = {}
        values = [roles.value(n) for n in self.placeholders.values()]
        self.mode: Any = detect_fake_mode(values)

    def parameter(self, nodes: Nodes) -> fx.Node | None:
        """The stacked parameter of these placeholders, None if they cannot be one parameter."""
        if nodes in self.stacked:
            return self.stacked[nodes][0]
        parts = [self.known.get(n.name) for n in nodes if n.op == "placeholder"]
        if len(parts) != len(nodes) or len(set(nodes)) != len(nodes) or None in parts:
            return None
        found = [p for p in parts if p is not None]
        first = found[0]
        alike = {(p.shape, p.dtype, p.requires_grad) for p in found}
        if len(alike) != 1 or any(n in self.members for n in nodes):
            return None
        fqn = self._name([p.fqn for p in found])
        parameter = Parameter(
            fqn.replace(".", "_"), fqn, (len(found), *first.shape), first.dtype,
            first.requires_grad, stacked=tuple(p.fqn for p in found),
        )  # fmt: skip
        with self.graph.inserting_before(nodes[0]):
            node = self.graph.placeholder(parameter.name)
        parameter = replace(parameter, name=node.name)
        with self.mode, torch.no_grad():
            roles.set_value(node, torch.stack([roles.tensor(n) for n in nodes]))
        roles.copy_role(node, of=nodes[0])
        self.stacked[nodes] = (node, parameter)
        self.members.update({n: (node, e) for e, n in enumerate(nodes)})
        return node

    def _name(self, fqns: Sequence[str]) -> str:
        """``layers.0.experts.7.w1`` for every expert: ``layers.0.experts.stacked.w1``."""
        columns = list(zip(*(fqn.split(".") for fqn in fqns), strict=False))
        parts = [column[0] if len(set(column)) == 1 else _common(column) for column in columns]
        name = candidate = ".".join(parts)
        number = 1
        while candidate in self.names:
            number += 1
            candidate = f"{name}_{number}"
        self.names.add(candidate)
        return candidate

    def finish(self, signature: Signature) -> Signature:
        """Remove the separate parameters; whatever still reads one reads its part of the stack."""
        at = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        firsts = {nodes[0]: entry for nodes, entry in self.stacked.items()}
        parameters: list[Parameter] = []
        for parameter in signature.parameters:
            node = self.placeholders[parameter.name]
            if node in firsts:
                parameters.append(firsts[node][1])
            if node not in self.members:
                parameters.append(parameter)
                continue
            stack, number = self.members[node]
            if node.users and at is not None:
                with self.graph.inserting_before(at):
                    part = self.graph.call_function(aten.select.int, (stack, 0, number))
                roles.set_value(part, roles.value(node))
                roles.copy_role(part, of=node)
                node.replace_all_uses_with(part)
            self.graph.erase_node(node)
        return replace(signature, parameters=tuple(parameters))


def _common(column: Sequence[str]) -> str:
    """One name for the parts of names in which experts differ."""
    patterns = {re.sub(r"\d+", "stacked", part) for part in column}
    return patterns.pop() if len(patterns) == 1 else "stacked"
