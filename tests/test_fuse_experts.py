"""The region between an expert's products becomes one operator, whatever the expert computes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import models
from moptrace import Plan, Program, roles, trace
from moptrace.core import Level, chain
from moptrace.costs import products
from moptrace.kernels.expert_function import ExpertFunction, ExpertOperator
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.default import canonical, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.fuse_experts import fuse_experts
from moptrace.roles import Component
from moptrace.testing import assert_same_function
from sweeps import sweep

PRODUCT = torch.ops.moptrace.grouped_mm.default
STYLES = ("LoopOneHot", "SortSlices", "GatherBmm", "DenseWeightFirst")
EXPERTS = ("LoopWhere, group-limited sigmoid", "LoopMask, top-k then softmax", "gpt_oss, eager")


@cache
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


@pytest.mark.parametrize(
    ("world_size", "plan", "gathers"),
    (
        (1, Plan(ep=1), True),
        (2, Plan(ep=2), False),  # rows come from other ranks
        (2, Plan(ep=2, dispatcher="all-gather"), False),  # of more tokens than rows
    ),
)
def test_rows_that_come_straight_from_a_dispatch_are_gathered_where_they_are_used(
    world_size: int, plan: Plan, gathers: bool
) -> None:
    program = local("SortSlices", world_size, plan)
    assert all(
        gathers == ("tokens" in [x.kind for x in function.operands])
        for function in functions(program)
    )
    dispatched = [x for x in program.nodes if x.target is torch.ops.moptrace.dispatch.default]
    assert dispatched and all(gathers != roles.value(x)[0].is_floating_point() for x in dispatched)


def test_rows_that_others_use_as_well_are_copies() -> None:
    *before, last = sharded(Plan(ep=1).resolve(1, []), 1).parts
    assert last.name == "fuse_experts"
    program = chain(*before)(canonical()(trace(models.build("SortSlices"), models.batch())))
    graph, _ = program.copy_graph()
    dispatch = next(x for x in graph.nodes if x.target is torch.ops.moptrace.dispatch.default)
    rows = next(x for x in dispatch.users if x.args[1] == 0)
    loss, *others = graph.output_node().args[0]
    with graph.inserting_before(graph.output_node()):
        total = graph.call_function(torch.ops.aten.sum.default, (rows,))
        both = graph.call_function(torch.ops.aten.add.Tensor, (loss, total))
    for node in (total, both):
        roles.copy_role(node, of=loss)
        roles.set_value(node, roles.value(loss))
    graph.output_node().args = ((both, *others),)
    kinds = [
        ["tokens" in [x.kind for x in function.operands] for function in functions(fused)]
        for fused in map(last.rewrite, (program, program.with_graph(graph)))  # unchecked
    ]
    assert kinds == [[True, True], [False, True]]


def test_of_rows_only_the_hidden_units_are_kept() -> None:
    """SonicMoE's 2NH + 4NkI bytes: tokens, and what the first products give."""
    step = differentiate()(local("SortSlices", 1, Plan(ep=1, fold_router_weights=True)))
    forward = [x for x in step.nodes if x.op == "call_function" and not roles.role(x).backward]
    kept = [x for x in forward if any(roles.role(user).backward for user in x.users)]
    values = [x for x in map(roles.value, kept) if isinstance(x, Tensor)]
    rows = 12 * 5 * 2  # sequences, tokens, choices
    found = [list(x.shape) for x in values if x.shape[:1] == (rows,) and x.numel() > rows]
    assert found == [[rows, models.Sizes().hidden]] * 2 * 2  # gate and up, in two layers


def test_the_pass_changes_what_it_fused_only_once() -> None:
    program = local("SortSlices", 2, Plan(ep=2))
    assert fuse_experts()(program) is program


def test_a_model_without_experts_stays_as_it_is() -> None:
    program = sharded(Plan(ep=1), 2)(
        canonical()(trace(models.dense().double(), models.batch(size=2)))
    )
    assert program.level is Level.LOCAL
    assert program.made_by is not None and program.made_by.name != "fuse_experts"


# --- in a step ------------------------------------------------------------------------------------


def experts(program: Program, backward: bool) -> list[tuple[ExpertOperator, int]]:
    """The expert operators of a step's forward or backward, and the number of their results."""
    return [
        (node.target, len(roles.value(node)))
        for node in program.nodes
        if isinstance(node.target, ExpertOperator) and roles.role(node).backward == backward
    ]


@cache
def step() -> Program:
    return differentiate()(local("SortSlices", 2, Plan(ep=2)))


def test_forward_and_backward_are_one_node_each_and_shared_by_like_layers() -> None:
    for backward in (False, True):
        found = experts(step(), backward)
        assert len(found) == 2 and len(set(found)) == 1
    assert not step().graph.find_nodes(op="call_function", target=PRODUCT)
    text = str(step())
    assert text.count("expert_function_0_forward, for each expert") == 1
    assert text.count("expert_function_0_backward, for each expert") == 1


def test_elsewhere_than_on_a_cpu_the_operators_are_nodes_of_their_own() -> None:
    """So that gradients of weights are computed while rows travel."""
    apart = differentiate(device="meta")(local("SortSlices", 2, Plan(ep=2)))
    assert not experts(apart, False) and not experts(apart, True)
    one, many = (
        sum(products(n) for n in program.nodes if roles.component(n) is Component.EXPERTS)
        for program in (step(), apart)
    )
    assert one == many > 0


def test_a_step_computes_no_gradients_of_frozen_weights() -> None:
    program = local("SortSlices", 2, Plan(ep=2))
    trained = [p.fqn for p in program.signature.parameters if "feed_forward.w" not in p.fqn]
    (whole, every), (part, some) = (
        experts(x, True)[0] for x in (step(), differentiate(trained)(program))
    )
    assert some == every - 3
    assert len(part.products) == len(whole.products) - 3


def test_a_forward_that_runs_again_gives_what_backward_needs_alone() -> None:
    (forward, given), again = experts(step(), False)[0], checkpoint()(step())
    assert experts(again, False)[0][1] == 1, "nothing is kept"
    second, kept = experts(again, True)[0]
    assert kept == given - 1, "what was kept, and no result"
    assert len(second.products) == len(forward.products) - 1
