"""The region between an expert's products becomes one operator, whatever the expert computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from moptrace import Plan, Program, trace
from moptrace.core import Level
from moptrace.kernels.expert_function import ExpertFunction
from moptrace.passes.default import canonical, sharded
from moptrace.passes.fuse_experts import fuse_experts
from moptrace.testing import assert_same_function
from sweeps import sweep

PRODUCT = torch.ops.moptrace.grouped_mm.default
STYLES = ("LoopOneHot", "SortSlices", "GatherBmm", "DenseWeightFirst")
EXPERTS = ("LoopWhere, group-limited sigmoid", "LoopMask, top-k then softmax", "gpt_oss, eager")


def local(name: str, world_size: int, plan: Plan) -> Program:
    model = models.build(name)
    return sharded(plan, world_size)(canonical()(trace(model, models.batch(size=12))))


def functions(program: Program) -> list[ExpertFunction]:
    targets = [node.target for node in program.nodes]
    return [target for target in targets if isinstance(target, ExpertFunction)]


@pytest.mark.parametrize(
    "name", sweep((*STYLES, *EXPERTS), quick=("LoopOneHot", "GatherBmm", *EXPERTS[:1]))
)
def test_every_style_is_fused_and_gives_the_same_gradients(name: str) -> None:
    program = local(name, 4, Plan(ep=2))
    found = functions(program)
    assert len(found) == 2 and len(set(found)) == 1, "like layers share one function"
    assert not program.graph.find_nodes(op="call_function", target=PRODUCT)
    assert_same_function(program, models.build(name), models.batch(1, size=12))


@pytest.mark.parametrize(
    ("world_size", "plan"), ((3, Plan(ep=3)), (2, Plan(ep=1)), (1, Plan(ep=1)))
)
def test_every_mesh(world_size: int, plan: Plan) -> None:
    program = local("SortSlices", world_size, plan)
    assert functions(program)
    assert_same_function(program, models.build("SortSlices"), models.batch(1, size=12))


def test_ranks_may_have_different_numbers_of_experts() -> None:
    model = models.LanguageModel(models.LoopWhere, models.Sizes(experts=11)).double()
    batch = models.batch(size=12)
    program = sharded(Plan(ep=4), 4)(canonical()(trace(model, batch)))
    assert functions(program)
    assert_same_function(program, model, batch)


def test_frozen_experts_stay_frozen() -> None:
    model = models.build("SortSlices")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("w1" not in name)
    program = sharded(Plan(ep=2), 2)(canonical()(trace(model, models.batch(size=12))))
    assert functions(program)
    assert_same_function(program, model, models.batch(1, size=12))


def second_half(hidden: Tensor) -> Tensor:
    _, used = hidden.chunk(2, -1)
    return used.relu()


def test_a_piece_of_a_split_may_go_unused() -> None:
    torch.manual_seed(0)
    model, batch = (
        models.LoopedExperts(second_half, used=3).double(),
        models.batch(1, size=12, vocabulary=11),
    )
    program = sharded(Plan(ep=2), 2)(canonical()(trace(model, batch)))
    assert len(functions(program)) == 1
    assert_same_function(program, model, batch)


def test_the_pass_changes_what_it_fused_only_once() -> None:
    program = local("SortSlices", 2, Plan(ep=2))
    assert fuse_experts()(program) is program


def test_a_model_without_experts_stays_as_it_is() -> None:
    program = sharded(Plan(ep=1), 2)(
        canonical()(trace(models.dense().double(), models.batch(size=2)))
    )
    assert program.level is Level.LOCAL
    assert program.made_by is not None and program.made_by.name != "fuse_experts"
