"""Bad input gives an error that says what is wrong and what to do; each case is one line."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import models
from moptrace import Plan, errors, trace
from moptrace.passes.default import canonical, sharded
from moptrace.passes.place import ReplicationWarning
from moptrace.testing import ModelSpec, assert_same_function

X = {"x": torch.randn(4, 3)}


class Tiny(nn.Module):
    """A linear layer, and whatever a subclass makes of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().mean()


class BranchesOnData(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y.mean() if y.sum() > 0 else y.square().mean()


class ReturnsLogits(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class WithoutRule(Tiny):
    """An operator that moptrace knows no rule for, between ones that it does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.cdist.default(self.linear(x), x).square().mean()


def plan(world_size: int, **sizes: int) -> Plan:
    return Plan(**sizes).resolve(world_size, [8])


@pytest.mark.parametrize("sizes", [{"ep": 3}, {"vp": 3}, {"ep": 8}, {"etp": 3}])
def test_a_plan_that_does_not_divide_the_mesh_lists_those_that_would(sizes: dict[str, int]) -> None:
    with pytest.raises(errors.PlanError, match=r"does not divide the 4 ranks.*\(.*=1\).*\(.*=4\)"):
        plan(4, **sizes)


def test_experts_and_their_hidden_units_share_no_more_ranks_than_there_are() -> None:
    would = r"ep \* etp must divide 4.* Plan\(ep=1, etp=2\), Plan\(ep=2, etp=2\)$"
    with pytest.raises(errors.PlanError, match=f"etp=2 leaves 2 of the 4 ranks, .*{would}"):
        plan(4, ep=4, etp=2)


def test_stages_that_do_not_divide_the_ranks_list_those_that_would() -> None:
    with pytest.raises(errors.PlanError, match=r"pp=3 does not divide the 4 .*\(pp=1\).*\(pp=4\)"):
        plan(4, pp=3)
    with pytest.raises(errors.PlanError, match="ep=4 does not divide the 2 ranks"):
        plan(4, pp=2, ep=4)  # of a stage


def test_micro_batches_are_a_pipeline_s() -> None:
    with pytest.raises(errors.PlanError, match=r"micro_batches=3 with pp=1.*accumulate="):
        plan(4, micro_batches=3)
    with pytest.raises(errors.PlanError, match="micro_batches=0"):
        plan(4, pp=2, micro_batches=0)


def test_logits_are_not_kept_where_stages_return_the_loss_alone() -> None:
    with pytest.raises(errors.PlanError, match=r"keep_logits=True with pp=2.*loss alone"):
        plan(4, pp=2, keep_logits=True)


def test_a_mesh_with_unknown_dimension_names_lists_the_known_ones() -> None:
    with pytest.raises(errors.PlanError, match=r"'experts'.*Known names: tp, cp.*dp_shard"):
        Plan.from_mesh(("dp_shard", "experts"), (2, 2))


def test_a_plan_and_a_mesh_that_disagree_are_refused() -> None:
    with pytest.raises(errors.PlanError, match="ep=4 but the mesh's dimension 'ep' has size 2"):
        Plan(ep=4).merged(Plan.from_mesh(("dp", "ep"), (2, 2)))


def test_a_branch_on_data_names_the_line_and_what_to_write() -> None:
    with pytest.raises(errors.TraceError, match=r"test_bad_input\.py:\d+ .*torch\.where"):
        trace(BranchesOnData(), X)


def test_a_missing_loss_says_how_to_return_one() -> None:
    with pytest.raises(errors.TraceError, match=r"no loss.*loss_fn="):
        trace(ReturnsLogits(), X)


def test_experts_that_drop_tokens_are_refused_at_the_users_line() -> None:
    with pytest.raises(errors.RoleError, match=r"models\.py:\d+"):
        canonical()(trace(models.build("Capacity"), models.batch()))


def test_a_model_without_experts_works_as_dense_with_a_note() -> None:
    model = ModelSpec(layers=("dense",)).build()
    batch = models.batch(size=4, vocabulary=13)
    program = sharded(Plan(ep=1), 4)(canonical()(trace(model, batch)))
    assert any("dense" in note for note in program.notes), program.notes
    assert_same_function(program, model, batch)


def test_an_operator_without_a_rule_says_what_it_costs_and_stays_exact() -> None:
    torch.manual_seed(0)
    model, batch = WithoutRule().double(), {"x": torch.randn(4, 3, dtype=torch.float64)}
    program = canonical()(trace(model, batch))
    with pytest.warns(ReplicationWarning, match=r"cdist.* no sharding rule.*bytes.*test_bad_input"):
        local = sharded(Plan(ep=1), 2)(program)
    assert any("cdist" in note for note in local.notes)
    assert_same_function(local, model, batch)


def test_an_operator_with_a_rule_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharded(Plan(ep=1), 2)(canonical()(trace(Tiny(), X)))


# Ranks that are fed different shapes: see test_parallel.py, where there are real ranks.


class Selects(nn.Module):
    """Rows whose first value is positive are written elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = x[chosen] * self.weight
        return out.square().sum()


@pytest.mark.filterwarnings("ignore::moptrace.passes.place.ReplicationWarning")
def test_an_unrecognised_selection_of_rows_is_refused_with_its_place() -> None:
    program = canonical()(trace(Selects(), {"x": torch.randn(4, 3)}))
    with pytest.raises(errors.PlacementError, match=r"as many rows as routing gives.*node %"):
        sharded(Plan(ep=1), 2)(program)
