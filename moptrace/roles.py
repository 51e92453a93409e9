"""What is known of a node beyond its operator: the only module that touches ``node.meta``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from moptrace.placement import Placement

__all__ = [
    "Component",
    "Role",
    "Source",
    "component",
    "copy_role",
    "placement",
    "placements",
    "role",
    "set_role",
    "set_value",
    "sign",
    "sources",
    "tensor",
    "tensor_operands",
    "value",
    "where",
]

_ROLE = "moptrace"


class Component(StrEnum):
    """The parts of a training program that have a parallelism of their own."""

    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"
    ROUTER = "router"
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    SHARED_EXPERT = "shared_expert"
    COMBINE = "combine"
    DENSE_MLP = "dense_mlp"
    VOCAB = "vocab"
    LOSS = "loss"
    AUX_LOSS = "aux_loss"
    CLIPPING = "clipping"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Source:
    """A line of the user's code."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Role:
    """Everything that moptrace records about one node.

    ``block`` numbers the Mixture-of-Experts blocks in order. ``placements`` has one entry for each
    result of the node (one for a tensor). ``made_by`` names the pass that made the node, empty for
    a node of the user's model. ``rule`` is how the operator may be sharded, found from the global
    shapes. ``backward`` is whether the node is part of the backward of that component and line.
    ``recompute`` names the region that the node belongs to, if its values are computed again in
    backward instead of kept: nodes of one region follow from one another (``recompute.py``).
    ``micro_batch`` is the number of that to which a step's node belongs, None for those of all.
    """

    component: Component | None = None
    block: int | None = None
    placements: tuple[Placement | None, ...] = ()
    made_by: str = ""
    module: str = ""
    source: Source | None = None
    rule: Any = None
    backward: bool = False
    recompute: str = ""
    micro_batch: int | None = None


_NOTHING = Role()
_SIGNED = "moptrace_signed"


def role(node: fx.Node) -> Role:
    return node.meta.get(_ROLE, _NOTHING)


def set_role(node: fx.Node, **changes: Any) -> None:
    """Change some fields of the node's role."""
    node.meta[_ROLE] = replace(role(node), **changes)


def copy_role(to: fx.Node, of: fx.Node, **changes: Any) -> None:
    """Give a new node the component and provenance of the node that it stands for."""
    to.meta[_ROLE] = replace(role(of), made_by=role(to).made_by, **changes)


def sign(graph: fx.Graph, author: str) -> None:
    """Record which pass, or the trace, made the nodes that nobody has signed yet."""
    for node in graph.nodes:
        if _SIGNED not in node.meta:
            node.meta[_SIGNED] = True
            set_role(node, made_by=author)


def component(node: fx.Node) -> Component | None:
    return role(node).component


def placements(node: fx.Node) -> tuple[Placement | None, ...]:
    return role(node).placements


def placement(node: fx.Node) -> Placement | None:
    """The placement of a node with one result."""
    found = role(node).placements
    return found[0] if len(found) == 1 else None


def value(node: fx.Node) -> Any:
    """The node's example value: fake tensors, ints, or tuples of them; None where unknown."""
    return node.meta.get("val")


def set_value(node: fx.Node, example: Any) -> None:
    node.meta["val"] = example


def tensor(node: fx.Node) -> torch.Tensor:
    """The example value of a node whose result is one tensor."""
    example = value(node)
    assert isinstance(example, torch.Tensor), f"{node.format_node()} has no tensor value"
    return example


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The distinct input nodes that are tensors, in the order of the arguments."""
    return [n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)]


def where(node: fx.Node) -> str:
    """One phrase that leads a user from a node to their own code."""
    node_role = role(node)
    parts = [f"node %{node.name}"]
    if node_role.module:
        parts.append(f"in module {node_role.module}")
    if node_role.source:
        parts.append(f"from {node_role.source}")
    return ", ".join(parts)


def sources(nodes: Iterable[fx.Node]) -> list[Source]:
    """The distinct source lines of some nodes, in order."""
    return list(dict.fromkeys(s for n in nodes if (s := role(n).source)))
