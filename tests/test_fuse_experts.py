"""The region between an expert's products becomes one operator, whatever the expert computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from moptrace import Plan, Program, trace
from moptrace.core import Level
from moptrace.kernels.expert_function import ExpertFunction
from moptrace.passes.default import canonical, sharded
from moptrace.passes.fuse_experts import fuse_experts
from moptrace.testing import assert_same_function

PRODUCT = torch.ops.moptrace.grouped_mm.default
STYLES = ("LoopOneHot", "SortSlices", "GatherBmm", "DenseWeightFirst")
EXPERTS = ("LoopWhere, group-limited sigmoid", "LoopMask, top-k then softmax", "gpt_oss, eager")


def local(name: str, world_size: int, plan: Plan) -> Program:
    model = models.build(name)
    return sharded(plan, world_size)(canonical()(trace(model, models.batch(size=12))))


def functions(program: Program) -> list[ExpertFunction]:
    targets = [node.target for node in program.nodes]
    return [target for target in targets if isinstance(target, ExpertFunction)]


@pytest.mark.parametrize("name", (*STYLES, *EXPERTS))
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


class HalfUsed(nn.Module):
    """Experts that use one half of what their first product makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.gate = nn.Linear(8, 4, bias=False)
        self.up = nn.ModuleList(nn.Linear(8, 6) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(3, 8) for _ in range(4))
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, at = torch.where(chosen == number)
            _, used = up(x[token]).chunk(2, -1)
            y.index_add_(0, token, down(used.relu()) * weights[token, at, None])
        return nn.functional.cross_entropy(self.head(x + y), labels.flatten())


def test_a_piece_of_a_split_may_go_unused() -> None:
    torch.manual_seed(0)
    model, batch = HalfUsed().double(), models.batch(1, size=12, vocabulary=11)
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
