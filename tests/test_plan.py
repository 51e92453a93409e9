"""Sizes of sub-groups: defaults, what the mesh says, and what fits. Errors: test_bad_input.py."""

from __future__ import annotations

import pytest

from moptrace import Plan
from moptrace.errors import PlanError


@pytest.mark.parametrize(
    ("world_size", "experts", "ep"),
    [(4, [8], 4), (8, [4], 4), (6, [8], 2), (4, [3], 1), (4, [2, 8], 2), (4, [], 1), (1, [8], 1)],
)
def test_the_default_spreads_experts_evenly_and_leaves_no_rank_without(
    world_size: int, experts: list[int], ep: int
) -> None:
    assert Plan().resolve(world_size, experts).ep == ep


def test_where_nothing_divides_evenly_experts_are_spread_unevenly() -> None:
    assert Plan().resolve(3, [7]).ep in (1, 3)


def test_experts_are_spread_over_what_their_hidden_units_leave() -> None:
    assert Plan(etp=2).resolve(8, [8]).ep == 4


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_divisor_of_the_ranks_is_a_plan(ep: int) -> None:
    layout = Plan(ep=ep).resolve(4, [1]).layout(4)
    assert [axis.size for axis in layout.experts.axes] == [4 // ep, ep]


def test_the_vocabulary_is_shared_by_all_ranks_or_by_some() -> None:
    assert Plan().resolve(4, [8]).vp == 4
    assert Plan(vp=2).resolve(4, [8]).vp == 2
    assert Plan(vp=2, tp=2).resolve(8, [8]).layout(8).vocabulary.size == 8
    with pytest.raises(PlanError, match=r"These would: Plan\(vp=2\), Plan\(vp=8\)"):
        Plan(vp=4, tp=2).resolve(8, [8])


def test_copies_of_dense_weights_nest_with_a_vocabulary_that_some_ranks_share() -> None:
    plan = Plan(tp=3, cp=2, vp=3, dp_replicate=2, ep=2)
    with pytest.raises(PlanError, match=r"do not nest with vp=3, ep \* etp=2.* vp=12"):
        plan.resolve(12, [8])
    assert Plan(tp=3, cp=2, dp_replicate=2, ep=2).resolve(12, [8]).vp == 12
    assert Plan(tp=3, cp=2, vp=3, dp_replicate=2, ep=6).resolve(12, [8]).vp == 3


def test_sizes_that_leave_no_rank_over_say_so() -> None:
    with pytest.raises(PlanError, match="tp=4 leaves 2 of the 8 ranks, and cp=4 does not divide"):
        Plan(tp=4, cp=4).resolve(8, [8])
    with pytest.raises(PlanError, match="dp_replicate=8 does not divide them"):
        Plan(tp=2, dp_replicate=8).resolve(8, [8])


def test_a_mesh_sets_sizes_by_its_names() -> None:
    sizes = ("dp_replicate", "dp_shard", "tp"), (2, 2, 4)
    assert Plan.from_mesh(*sizes) == Plan(dp_replicate=2, tp=4)
    assert Plan.from_mesh(("dp", "ep"), (2, 4)) == Plan(ep=4)
    assert Plan.from_mesh(("edp", "ep", "etp"), (2, 2, 2)) == Plan(ep=2, etp=2)
    assert Plan.from_mesh(None, (8,)) == Plan()
    assert Plan(edp="replicate").merged(Plan(ep=2)) == Plan(ep=2, edp="replicate")


def test_what_the_replicas_of_experts_do_is_one_of_two() -> None:
    with pytest.raises(PlanError, match="'shard' or 'replicate'"):
        Plan(edp="both").resolve(4, [8])
