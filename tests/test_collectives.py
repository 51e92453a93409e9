"""The table of collectives: kinds, transposes and meanings agree with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gloo import Ranks
from moptrace.collectives import (
    COLLECTIVES,
    Collective,
    Communicator,
    conversion,
    owned_matrices,
)
from moptrace.placement import INVARIANT, PARTIAL, REPLICATE, Layout, Rows, Shard, gradient_kind

Pools = Callable[[int], Ranks]
EXAMPLES = {
    Shard: Shard(0),
    type(REPLICATE): REPLICATE,
    type(INVARIANT): INVARIANT,
    type(PARTIAL): PARTIAL,
    Rows: Rows("token"),
}
CONVERTING = [row for row in COLLECTIVES.values() if row.source and row.target]
CONVERTING = [row for row in CONVERTING if (row.source, row.target) != (Rows, Rows)]
PLAIN = [row for row in CONVERTING if not row.moves_rows and not row.of_slots]
PLAIN += [row for row in COLLECTIVES.values() if row.of_slots]
UNTYPED = [row for row in CONVERTING if row.casts or row.of_slots]
UNTYPED += [row for row in CONVERTING if row.lends_experts or row.has_owners]
WORLD = 3
LENGTH = 7  # not a multiple of the ranks
SLOTS = 2  # for each of as many experts
PLACES = 5  # of which the ranks' own experts take 3, 3 and 1
MATRICES = 5  # which two, two and one of the ranks own
FIRST = 1
HOSTS = [0, 1, 2, 4, 6, 3, 4, 5, 2, -1, 6, 2, 3, 4, -1]


@pytest.mark.parametrize("row", CONVERTING, ids=lambda row: row.name)
def test_a_gradient_is_carried_back_between_the_kinds_of_gradients(row: Collective) -> None:
    back = COLLECTIVES[str(row.transpose)]
    assert row.source and row.target
    assert back.source is type(gradient_kind(EXAMPLES[row.target]))
    assert back.target is type(gradient_kind(EXAMPLES[row.source]))


def test_every_pair_of_kinds_has_at_most_one_collective() -> None:
    pairs = [(row.source, row.target) for row in CONVERTING if row not in UNTYPED]
    assert len(set(pairs)) == len(pairs)
    assert conversion(Rows("token"), Rows("expert")) is None


def _arguments(row: Collective) -> tuple[Any, ...]:
    if row.name == "all_to_all":
        return ("dp", 1, 5, 0, LENGTH)
    if row.of_slots:
        return ("dp", SLOTS, LENGTH)
    if row.lends_experts:
        return (torch.tensor(HOSTS), "dp", PLACES, LENGTH)
    if row.has_owners:
        split = (1, FIRST, LENGTH) if "int dim" in row.schema else (FIRST,)
        return (torch.empty(MATRICES), "dp", *split)
    if row.casts:
        return ("dp", 0, torch.float64, torch.float64, LENGTH)
    return ("dp", 0, LENGTH) if "int dim" in row.schema else ("dp",)


def _held(row: Collective, seed: int) -> list[Tensor]:
    """What the ranks hold before, as the collective's source kind says."""
    torch.manual_seed(seed)
    if row.of_slots:
        came = row.name in ("return_slots", "reduce_scatter_slots")
        ranks = WORLD if came else 1
        own = Layout.of(WORLD).sizes(LENGTH, "dp")
        experts = own if row.name == "return_slots" else (LENGTH,) * WORLD
        return [torch.randn(n * ranks * SLOTS, 5, dtype=torch.float64) for n in experts]
    if row.has_owners:
        owned = [len(own) for own in owned_matrices(MATRICES, WORLD, FIRST)]
        slices = Layout.of(WORLD).sizes(LENGTH, "dp")
        if row.name == "gather_matrices":
            return list(torch.randn(MATRICES, LENGTH, 4, dtype=torch.float64).split(slices, 1))
        if row.source is Shard:
            return list(torch.randn(MATRICES, LENGTH, 4, dtype=torch.float64).split(owned))
        return [torch.randn(MATRICES, LENGTH, 4, dtype=torch.float64)] * WORLD
    if row.name == "return_experts":
        return list(torch.randn(WORLD, PLACES, 5, dtype=torch.float64))
    if row.source is Shard:
        return list(
            torch.randn(LENGTH, 5, dtype=torch.float64).split(Layout.of(WORLD).sizes(LENGTH, "dp"))
        )
    parts = list(torch.randn(WORLD, LENGTH, 5, dtype=torch.float64))
    return parts if row.source is type(PARTIAL) else [parts[0]] * WORLD


def _meant(row: Collective, parts: list[Tensor], arguments: tuple[Any, ...]) -> list[Tensor]:
    length = arguments[2] if row.name == "all_to_all" else arguments[-1]
    sizes = Layout.of(WORLD).sizes(length, "dp") if isinstance(length, int) else ()
    beside = [[x] * WORLD for x in arguments if isinstance(x, Tensor)]
    return row.meaning(parts, sizes, *beside, *arguments[1 + len(beside) :])


@pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.name)
def test_a_transpose_is_the_adjoint(row: Collective) -> None:
    """<A x, y> = <x, A' y>, where shared values count once and pending sums are added up."""
    x = _held(row, 0)
    arguments = _arguments(row)
    back = COLLECTIVES[str(row.transpose)]
    forward = _meant(row, x, arguments)
    torch.manual_seed(1)
    y = [torch.randn_like(part) for part in forward]
    if row.target is type(PARTIAL) or row.target is type(INVARIANT):  # gradients are shared
        y = [y[0]] * WORLD
    backward = _meant(back, y, row.transpose_arguments(arguments))
    assert [b.shape for b in backward] == [part.shape for part in x]
    left = sum((a * b).sum() for a, b in zip(forward, y, strict=True))
    right = sum((a * b).sum() for a, b in zip(x, backward, strict=True))
    if row.target is type(INVARIANT):
        left = left / WORLD
    if row.source is type(INVARIANT):
        right = right / WORLD
    assert torch.allclose(left, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["all_gather_cast", "reduce_scatter_cast"])
def test_a_collective_that_casts_adds_up_in_the_dtype_that_it_moves(name: str) -> None:
    row = COLLECTIVES[name]
    parts = [part.to(torch.bfloat16) for part in _held(row, 0)]
    arguments = ("dp", 0, torch.float64, torch.bfloat16, LENGTH)
    found = _meant(row, parts, arguments)
    plain = COLLECTIVES[name.removesuffix("_cast")]
    wanted = _meant(plain, [part.double() for part in parts], ("dp", 0, LENGTH))
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == torch.float64 and torch.equal(have, want)


def on_rank_every_collective() -> None:
    """What runs over the process group is what the table means, with its gradient."""
    rank = dist.get_rank()
    here = Communicator.connect(Layout.of(WORLD), list(range(WORLD)))
    for row in PLAIN:
        arguments, parts = _arguments(row), _held(row, 0)
        own = parts[rank].clone().requires_grad_()
        with here:
            out = row.op(own, *arguments)
        meant = _meant(row, parts, arguments)
        assert torch.allclose(out, meant[rank], rtol=1e-12, atol=0), row.name
        torch.manual_seed(2)
        y = [torch.randn_like(part) for part in meant]
        if row.target is type(PARTIAL) or row.target is type(INVARIANT):
            y = [y[0]] * WORLD
        (gradient,) = torch.autograd.grad(out, own, y[rank])
        back = COLLECTIVES[str(row.transpose)]
        wanted = _meant(back, y, row.transpose_arguments(arguments))[rank]
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-12), f"gradient of {row.name}"


def test_real_ranks_do_what_the_table_means(ranks: Pools) -> None:
    ranks(WORLD)(on_rank_every_collective)
