"""What Inductor compiles of a step: the same function, in fewer operators, in the same order."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import fx

from moptrace import Plan, Program, roles
from moptrace.collectives import start, wait
from moptrace.compiled import CompiledRegion
from moptrace.core import chain
from moptrace.errors import CompileWarning
from moptrace.liveness import peak_memory, storages, write_backs
from moptrace.passes.compile_regions import compile_regions
from moptrace.passes.default import overlapped
from moptrace.roles import Component
from moptrace.testing import SimulatedSteps
from test_overlap import ONE, batch_of, steps

PLAN = Plan(ep=2)
SOME = (Component.OPTIMIZER, Component.SHARED_EXPERT, Component.NORM)


@pytest.fixture(scope="module")
def pair() -> tuple[SimulatedSteps, SimulatedSteps]:
    """The same step as it is and compiled, after three batches each."""
    schedules = overlapped(), chain(overlapped(), compile_regions(SOME))
    plain, compiled = (steps(PLAN, schedule, spec=ONE, ranks=2) for schedule in schedules)
    for seed in range(3):
        for have, want in zip(
            compiled.step(batch_of(seed)), plain.step(batch_of(seed)), strict=True
        ):
            assert have is not None and want is not None
            torch.testing.assert_close(have, want, rtol=1e-12, atol=0)
    return plain, compiled


def regions(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes if isinstance(node.target, CompiledRegion)]


def test_three_steps_give_the_same_weights(pair: tuple[SimulatedSteps, SimulatedSteps]) -> None:
    want, have = (x.weights() for x in pair)
    for name, weight in have.items():
        torch.testing.assert_close(weight, want[name], rtol=1e-11, atol=1e-14)


def test_the_optimizer_is_compiled_once_for_all_sizes(
    pair: tuple[SimulatedSteps, SimulatedSteps],
) -> None:
    program = pair[1].programs[0]
    trained = [p for p in program.signature.parameters if p.requires_grad]
    updates = Counter(n.target for n in regions(program) if "addcdiv" in str(_graph(n)))
    assert sum(updates.values()) == len(trained)
    assert len(updates) == len({len(p.shape) for p in trained})
    left = [n for n in program.nodes if roles.component(n) is Component.OPTIMIZER]
    assert not any(n.target is torch.ops.aten.lerp.Scalar for n in left)


def _graph(node: fx.Node) -> fx.Graph:
    assert isinstance(node.target, CompiledRegion)
    return node.target.graph


def test_the_schedule_stays_as_it_was(pair: tuple[SimulatedSteps, SimulatedSteps]) -> None:
    def order(program: Program) -> list[str]:
        return [n.name for n in program.nodes if n.target in (start, wait)]

    plain, compiled = (x.programs[0] for x in pair)
    assert order(plain) == order(compiled)


def test_no_result_looks_at_an_operand(pair: tuple[SimulatedSteps, SimulatedSteps]) -> None:
    """So that new values may be written over old ones."""
    program = pair[1].programs[0]
    for node in regions(program):
        given = set(_graph(node).find_nodes(op="placeholder"))
        (returned,) = _graph(node).output_node().args
        root = storages(Shown(_graph(node)))  # type: ignore[arg-type]
        assert not {root[x] for x in returned} & given  # type: ignore[union-attr]
    assert write_backs(program) and peak_memory(program).bytes > 0


class Shown:
    """As much of a program as ``storages`` looks at."""

    def __init__(self, graph: fx.Graph):
        self.nodes = graph.nodes


def test_components_may_be_chosen() -> None:
    whole = steps(PLAN, overlapped(), spec=ONE, ranks=2).programs[0]
    program = compile_regions([Component.NORM])(whole)
    assert {roles.component(node) for node in regions(program)} == {Component.NORM}
    assert compile_regions(least=10_000)(whole) is whole


def test_what_cannot_be_compiled_runs_as_it_is_with_a_warning() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(_refused, (x,)),))
    region = CompiledRegion("compiled_0", graph, place="node %y, from model.py:3")
    with pytest.warns(CompileWarning, match=r"compiled_0 \(node %y, from model.py:3\) runs one"):
        (found,) = region(torch.ones(2))
    assert torch.equal(found, torch.full((2,), 2.0))
    (again,) = region(torch.zeros(2))
    assert torch.equal(again, torch.ones(2))


@torch._dynamo.disable
def _refused(x: torch.Tensor) -> torch.Tensor:
    return x + 1
