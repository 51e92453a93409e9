"""Experts that are updated in their backward: the same bits, and no gradient of all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from moptrace import Plan, Program, roles, trace
from moptrace.core import Output
from moptrace.executable import executable
from moptrace.kernels import selection
from moptrace.kernels.expert_function import ExpertOperator
from moptrace.kernels.updating_experts import InPlace, UpdatingExperts
from moptrace.liveness import overwritable
from moptrace.passes.default import canonical, sharded
from moptrace.passes.fuse_updates import fuse_updates
from moptrace.testing import ModelSpec, SimulatedSteps, whole_state
from subjects import assert_same_bits
from sweeps import sweep
from test_train_step import OPTIMIZERS, SMALL, all_of, batch_of, local_program

ALONE = {"ep": 2}  # each expert is on one rank, whose gradient is final


def steps(name: str, updates: str, **options: Any) -> SimulatedSteps:
    plan = options.pop("plan", ALONE)
    local = local_program(SMALL, 2, **plan)
    make = all_of(OPTIMIZERS[name])
    return SimulatedSteps(local, whole_state(SMALL.build()), make, updates=updates, **options)


def updating(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes if isinstance(node.target, UpdatingExperts)]


def updated(program: Program) -> int:
    """The parameters that the backwards of experts update."""
    return sum(len(node.target.updates) for node in updating(program))  # type: ignore[union-attr]


def program_of(name: str = "AdamW, fused", **options: Any) -> Program:
    simulated = steps(name, "backward", **options)
    for seed in range(2):
        simulated.step(*(batch_of(seed) for _ in range(options.get("accumulate", 1))))
    return simulated.programs[0]


EVERY_TIME = ("AdamW, fused", "AdamW", "SGD")


@pytest.mark.parametrize("expertwise", [False, True], ids=["all rows", "expert by expert"])
@pytest.mark.parametrize("name", sweep(tuple(OPTIMIZERS), quick=EVERY_TIME))
def test_the_steps_are_bitwise_the_same(
    name: str, expertwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of experts with biases, some of which have no rows."""
    monkeypatch.setattr(selection, "EXPERTWISE_ROWS", 0 if expertwise else 10**6)
    early = steps(name, "backward")
    assert_same_bits(steps(name, "after"), early, [[batch_of(seed)] for seed in range(3)])
    weights_and_biases = 6
    assert updated(early.programs[0]) == weights_and_biases


FLOAT32 = ModelSpec(layers=("moe",), width=32, hidden=64, experts=4, vocabulary=16)


def on_one_rank(rows: int, updates: str) -> SimulatedSteps:
    """Training in float32: torch's own grouped products run, or experts one by one."""
    model, batch = FLOAT32.build(torch.float32), batch_of(99, 4, rows)
    local = sharded(Plan().resolve(1, []), 1)(canonical()(trace(model, batch)))
    make = all_of(OPTIMIZERS["AdamW, fused"])
    return SimulatedSteps(local, whole_state(model), make, updates=updates)


@pytest.mark.parametrize("rows", [6, 300], ids=["few rows", "many"])
def test_the_bits_are_the_same_in_float32(rows: int) -> None:
    early = on_one_rank(rows, "backward")
    fed = [[batch_of(seed, 4, rows)] for seed in range(3)]
    assert_same_bits(on_one_rank(rows, "after"), early, fed)
    assert updated(early.programs[0]) == 3


def test_a_rank_writes_over_the_old_values() -> None:
    simulated, real = (on_one_rank(6, "backward") for _ in range(2))
    for each in (simulated, real):
        each.step(batch_of(0, 4, 6))
    (program,) = real.programs
    run = executable(program, "cpu")
    targets = [node.target for node in run.graph.nodes]
    assert sum(isinstance(target, InPlace) for target in targets) == len(updating(program)) == 1
    held = real._arguments(0, program, [batch_of(1, 4, 6)])
    run(*(held[node.name].detach() for node in program.graph.find_nodes(op="placeholder")))
    simulated.step(batch_of(1, 4, 6))
    for name, value in simulated.weights().items():
        assert torch.equal(real.weights()[name], value), name


def test_no_gradient_of_all_experts_is_made() -> None:
    """What has the shape of experts' parameters are these, and what is written over them."""

    def gradients(updates: str) -> list[fx.Node]:
        simulated = on_one_rank(6, updates)
        simulated.step(batch_of(0, 4, 6))
        (program,) = simulated.programs
        results = {new for pairs in overwritable(program).values() for _, new in pairs}
        tensors = (n for n in program.nodes if isinstance(roles.value(n), Tensor))
        shaped = [n for n in tensors if roles.value(n).shape in ((4, 64, 32), (4, 32, 64))]
        return [n for n in shaped if n.op != "placeholder" and n not in results]

    assert len(gradients("after")) == 3
    assert gradients("backward") == []


@pytest.mark.parametrize(
    "options",
    [{"accumulate": 2}, {"plan": {"ep": 1, "edp": "replicate"}}, {"plan": {"ep": 1}}],
    ids=["of micro-batches", "reduced over ranks", "reduced and sharded"],
)
def test_a_gradient_that_is_not_final_is_left(options: dict[str, Any]) -> None:
    assert not updating(program_of(**options))


def test_what_others_need_is_left() -> None:
    """A gradient that the step returns, or a parameter that something reads later on."""
    program = without_fusion()
    assert updated(fuse_updates()(program)) == 6
    update = next(n for n in program.nodes if n.target is torch.ops.moptrace.fused_adam.default)
    parameter, gradient = update.args[:2]
    assert isinstance(parameter, fx.Node) and isinstance(gradient, fx.Node)
    assert type(gradient.args[0].target) is ExpertOperator  # type: ignore[union-attr]
    assert updated(fuse_updates()(with_output(program, gradient))) == 5
    assert updated(fuse_updates()(with_reader(program, parameter))) == 5


def test_results_that_nothing_uses_are_not_computed() -> None:
    program = program_of()
    (node,) = updating(program)
    operator: Any = node.target
    part, taken = operator.only(range(1, len(roles.value(node))))
    assert part.left == [] and len(part.updates) == len(operator.updates)
    values = [roles.tensor(x) for x in node.all_input_nodes]
    of = dict(zip(node.all_input_nodes, map(numbers, values), strict=True))
    given = [torch.tensor([3, ROWS - 3]), *(of[x] for x in node.args[1:])]  # type: ignore[index]
    found, whole = part(*(given[i] for i in taken)), operator(*given)
    assert all(torch.equal(a, b) for a, b in zip(found, whole[1:], strict=True))


ROWS = 7


def numbers(like: Tensor) -> Tensor:
    shape = [n if isinstance(n, int) else ROWS for n in like.shape]
    return torch.rand(shape, dtype=torch.float64).to(like.dtype)


def without_fusion() -> Program:
    fused = program_of()
    return next(p for p in reversed(fused.history) if not updating(p))


def with_output(program: Program, node: fx.Node) -> Program:
    graph, copies = program.copy_graph()
    end = graph.output_node()
    end.args = ((*end.args[0], copies[node]),)  # type: ignore[misc]
    outputs = (*program.signature.outputs, Output("a gradient"))
    signature = replace(program.signature, outputs=outputs)
    return program.with_graph(graph, signature=signature)


def with_reader(program: Program, parameter: fx.Node) -> Program:
    """Something reads an input after all updates."""
    graph, copies = program.copy_graph()
    end = graph.output_node()
    with graph.inserting_before(end):
        read = graph.call_function(torch.ops.aten.sum.default, (copies[parameter],))
    read.meta = dict(copies[parameter].meta)
    read.meta["val"] = copies[parameter].meta["val"].sum()
    loss = end.args[0][0]  # type: ignore[index]
    with graph.inserting_before(end):
        both = graph.call_function(torch.ops.aten.add.Tensor, (loss, read))
    both.meta = dict(loss.meta)
    end.args = ((both, *end.args[0][1:]),)  # type: ignore[index]
    return program.with_graph(graph)
