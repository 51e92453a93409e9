"""Views, placements and the slices that ranks hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moptrace import Layout, state
from moptrace.placement import (
    INVARIANT,
    PARTIAL,
    REPLICATE,
    Axis,
    Kind,
    Placement,
    Rows,
    Shard,
    View,
    chunk_sizes,
    gradient_kind,
    parse_kind,
)

KINDS: list[Kind] = [
    Shard(0), Shard(3), Shard(1, blocks=4), Rows("token"), Rows("expert"), Rows("arrival"),
    REPLICATE, INVARIANT, PARTIAL,
]  # fmt: skip
world_sizes = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    world_size = draw(world_sizes)
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    ep, vp, tp = (draw(st.sampled_from(divisors)) for _ in range(3))
    rest = [d for d in divisors if world_size % (tp * d) == 0]
    cp, copies = (draw(st.sampled_from(rest)) for _ in range(2))
    etp = draw(st.sampled_from([d for d in divisors if world_size % (ep * d) == 0]))
    return Layout.of(world_size, ep, cp, tp=tp, etp=etp, vp=vp, dp_replicate=copies)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_kind_reads_back_from_its_print(kind: Kind) -> None:
    assert parse_kind(str(kind)) == kind


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_gradient_of_a_gradient_is_held_as_the_value(kind: Kind) -> None:
    assert gradient_kind(gradient_kind(kind)) == kind


@given(st.integers(0, 40), st.integers(1, 8))
def test_one_axis_is_cut_as_torch_chunk_does(length: int, parts: int) -> None:
    pieces = [x.numel() for x in torch.arange(length).chunk(parts)] if length else []
    assert chunk_sizes(length, (parts,)) == (*pieces, *[0] * (parts - len(pieces)))


@given(st.integers(0, 40), st.lists(st.integers(1, 4), max_size=3))
def test_slices_of_nested_axes_make_the_whole(length: int, parts: list[int]) -> None:
    sizes = chunk_sizes(length, parts)
    assert sum(sizes) == length
    assert len(sizes) == torch.tensor(parts, dtype=torch.int64).prod()


@given(layouts())
def test_the_groups_of_an_axis_are_all_ranks_once(layout: Layout) -> None:
    for view in layout.views:
        for axis in view.axes:
            groups = view.groups(axis.name)
            assert sorted(r for group in groups for r in group) == list(range(layout.world_size))
            for group in groups:
                assert [view.coordinate(r, axis.name) for r in group] == list(range(axis.size))


@given(layouts(), st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_parts_of_all_ranks_make_the_whole(
    layout: Layout, rows: int, columns: int, data: st.DataObject
) -> None:
    whole = torch.arange(rows * columns).view(rows, columns)
    kinds = st.sampled_from([Shard(0), Shard(1), INVARIANT])
    placement = Placement(layout.experts, tuple(data.draw(kinds) for _ in layout.experts.axes))
    parts = [state.own_part(whole, placement, r) for r in range(layout.world_size)]
    assert torch.equal(state.assemble(parts, placement), whole)


@given(layouts(), st.sampled_from(KINDS))
def test_what_treats_all_ranks_alike_can_be_said_in_every_view(layout: Layout, kind: Kind) -> None:
    home = Placement.uniform(layout.home, kind)
    there = home.expressed_in(layout.experts)
    assert there == Placement.uniform(layout.experts, kind)
    assert there is not None and there.expressed_in(layout.home) == home


@given(layouts(), st.data())
def test_a_placement_said_in_another_view_is_the_same_ownership(
    layout: Layout, data: st.DataObject
) -> None:
    """The very same elements on every rank, wherever the sizes divide."""
    whole = torch.arange(240 * 240).view(240, 240)
    view = data.draw(st.sampled_from((*layout.views, layout.storage)))
    kinds = [data.draw(st.sampled_from([Shard(0), Shard(1), INVARIANT])) for _ in view.axes]
    placement = Placement(view, tuple(kinds))
    for other in (*layout.views, layout.storage):
        said = placement.expressed_in(other)
        if said is None:
            assert len(set(kinds)) > 1
            continue
        for rank in range(layout.world_size):
            parts = (state.own_part(whole, p, rank) for p in (placement, said))
            assert torch.equal(*parts)


@given(layouts())
def test_storage_is_cut_finely_enough_for_every_weight(layout: Layout) -> None:
    """Whatever can be said in a view whose axes nest with the experts' can be stored."""
    fine = {low for low, _ in layout.storage.spans()}
    for view in layout.views:
        kinds = tuple(Shard(i % 2) for i, _ in enumerate(view.axes))
        nested = {low for low, _ in view.spans()} <= fine
        assert (Placement(view, kinds).expressed_in(layout.storage) is not None) >= nested


def test_what_treats_ranks_apart_belongs_to_one_view() -> None:
    layout = Layout.of(4, ep=2)
    apart = Placement(layout.experts, (Shard(1), Shard(0)))
    assert apart.expressed_in(layout.home) is None
    assert layout.normalised(apart) is apart


def test_views_of_different_ranks_make_no_layout() -> None:
    with pytest.raises(ValueError, match="not views of the same ranks"):
        home = View("home", (Axis("dp", 4),))
        Layout(home, home, home, home, home, View("experts", (Axis("ep", 2),)), home)
    with pytest.raises(ValueError, match="does not divide"):
        Layout.of(4, ep=3)
