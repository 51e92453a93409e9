"""Whole tensors and their shards: between the user's names and what each rank stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moptrace import roles
from moptrace.collectives import collective
from moptrace.core import Parameter, Program
from moptrace.placement import Layout, Placement, chunk_sizes

__all__ = [
    "assemble",
    "attach",
    "has_equal_shards",
    "own_part",
    "own_shape",
    "sizes_of_rank",
    "stack",
    "unstack",
    "user_names",
]


def user_names(parameter: Parameter) -> tuple[str, ...]:
    """The user's parameters that this one is made of, in order: itself, or the stacked ones."""
    return parameter.stacked or (parameter.fqn,)


def stack(parameter: Parameter, state: Mapping[str, Tensor]) -> Tensor:
    """The whole value of a parameter from tensors under the user's names."""
    parts = [state[name] for name in user_names(parameter)]
    whole = torch.stack(list(parts)) if parameter.stacked else parts[0]
    if tuple(whole.shape) != parameter.shape:
        raise ValueError(f"{parameter.fqn} has shape {parameter.shape}, got {tuple(whole.shape)}")
    return whole


def unstack(parameter: Parameter, whole: Tensor | None) -> dict[str, Tensor | None]:
    """The user's tensors, under all their names, from the whole value of a parameter."""
    if parameter.stacked:
        pieces = [None] * len(parameter.stacked) if whole is None else whole.unbind(0)
        return dict(zip(parameter.stacked, pieces, strict=True))
    return dict.fromkeys((parameter.fqn, *parameter.aliases), whole)


def own_part(whole: Tensor, placement: Placement, rank: int) -> Tensor:
    """The part of a tensor that ``rank`` stores, as a view.

    >>> from moptrace.placement import Layout, Shard
    >>> placement = Placement.uniform(Layout.of(4, ep=2).experts, Shard(0))
    >>> own_part(torch.arange(10), placement, rank=2)
    tensor([5, 6, 7])
    """
    part = whole
    for dim in range(whole.dim()):
        for axis in placement.axes_of_dim(dim):
            sizes = chunk_sizes(part.shape[dim], (axis.size,))
            at = placement.view.coordinate(rank, axis.name)
            part = part.narrow(dim, sum(sizes[:at]), sizes[at])
    return part


def own_shape(
    shape: Sequence[int], placement: Placement, layout: Layout, rank: int
) -> tuple[int, ...]:
    """The shape of the part of a tensor of this shape that ``rank`` stores.

    >>> from moptrace.placement import Shard
    >>> layout = Layout.of(4, ep=2)
    >>> own_shape((10, 3), Placement.uniform(layout.home, Shard(0)), layout, rank=3)
    (2, 3)
    """
    stored = placement.expressed_in(layout.storage) or placement
    return tuple(own_part(torch.empty(shape, device="meta"), stored, rank).shape)


def sizes_of_rank(program: Program, rank: int) -> tuple[tuple[int, ...], ...]:
    """Ranks of which this is equal run one step program: all their parts have the same sizes."""
    layout, signature = program.layout, program.signature
    assert layout is not None
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    found: list[tuple[int, ...]] = []
    for entry in (*signature.parameters, *signature.buffers, *signature.inputs):
        placement = roles.placement(nodes[entry.name])
        assert placement is not None
        found.append(own_shape(entry.shape, placement, layout, rank))
    for node in program.nodes:
        row = collective(node.target)
        if row is not None and "int length" in row.schema:
            axis = next(x for x in node.args if isinstance(x, str))
            at = layout.view_of(axis).coordinate(rank, axis)
            length = row.without_size(node.args)[-1]
            found.append((layout.sizes(length, axis)[at],))
    return tuple(found)


def has_equal_shards(program: Program) -> bool:
    """Whether all ranks run one step program. Along every axis the first rank has the most."""
    assert program.layout is not None
    return sizes_of_rank(program, 0) == sizes_of_rank(program, program.layout.world_size - 1)


def assemble(parts: Sequence[Tensor], placement: Placement) -> Tensor:
    """The whole tensor from what every rank stores; the inverse of ``own_part``."""
    whole = list(parts)
    for axis, kind in reversed(list(zip(placement.view.axes, placement.kinds, strict=True))):
        dim = getattr(kind, "dim", None)
        groups = [whole[i : i + axis.size] for i in range(0, len(whole), axis.size)]
        whole = [group[0] if dim is None else torch.cat(group, dim) for group in groups]
    return whole[0]


def attach(root: nn.Module, fqn: str, value: nn.Parameter | Tensor, persistent: bool) -> None:
    """Register a parameter or buffer under a dotted name, making plain modules on the way."""
    *path, name = fqn.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(name, value)
    else:
        owner.register_buffer(name, value, persistent)
