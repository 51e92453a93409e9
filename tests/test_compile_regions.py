"""What Inductor compiles of a step: the same function, in fewer operators, in the same order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import fx

from moptrace import Plan, Program, roles
from moptrace.collectives import start, wait
from moptrace.compiled import CompiledRegion
from moptrace.core import Output, Pass, chain
from moptrace.errors import CompileWarning
from moptrace.liveness import peak_memory, storages, write_backs
from moptrace.passes.compile_regions import compile_regions
from moptrace.passes.default import overlapped
from moptrace.roles import Component
from moptrace.testing import SimulatedSteps
from sweeps import sweep
from test_overlap import ONE, batch_of, steps

PLAN = Plan(ep=2)


def scheduled(schedule: Pass | None) -> SimulatedSteps:
    return steps(PLAN, schedule, spec=ONE, ranks=2)


@cache
def program(*components: Component) -> Program:
    """What is compiled of a step, and of the step as it is; nothing runs."""
    plain = scheduled(overlapped()).programs[0]
    return compile_regions(components)(plain) if components else plain


def regions(given: Program) -> list[fx.Node]:
    return [node for node in given.nodes if isinstance(node.target, CompiledRegion)]


# A compiler takes seconds for each kind of region.
STEPS = {Component.NORM: 2, Component.OPTIMIZER: 12}  # more than may be compiled again


@pytest.mark.parametrize("component", sweep(STEPS, quick=[Component.NORM]))
def test_compiled_steps_give_the_same_weights(component: Component) -> None:
    plain = scheduled(overlapped())
    compiled = scheduled(chain(overlapped(), compile_regions([component])))
    for seed in range(STEPS[component]):
        pairs = zip(compiled.step(batch_of(seed)), plain.step(batch_of(seed)), strict=True)
        for have, want in pairs:
            assert have is not None and want is not None
            torch.testing.assert_close(have, want, rtol=1e-12, atol=0)
    for name, weight in compiled.weights().items():
        torch.testing.assert_close(weight, plain.weights()[name], rtol=1e-11, atol=1e-14)
    run = [node.target._run for node in regions(compiled.programs[0])]  # type: ignore[union-attr]
    assert run and all(x is not None and not isinstance(x, fx.GraphModule) for x in run)


def test_the_optimizer_is_compiled_once_for_all_sizes() -> None:
    given = program(Component.OPTIMIZER)
    trained = [p for p in given.signature.parameters if p.requires_grad]
    updates = Counter(n.target for n in regions(given) if "lerp" in str(_graph(n)))
    assert sum(updates.values()) == len(trained)
    assert len(updates) < len(trained) / 2
    left = [n for n in given.nodes if roles.component(n) is Component.OPTIMIZER]
    assert not any(n.target is torch.ops.aten.lerp.Scalar for n in left)


def _graph(node: fx.Node) -> fx.Graph:
    assert isinstance(node.target, CompiledRegion)
    return node.target.graph


def test_a_number_that_changes_from_step_to_step_is_a_factor() -> None:
    for node in regions(program(Component.OPTIMIZER)):
        for inner in _graph(node).nodes:
            options = [x for x in inner.kwargs.values() if isinstance(x, fx.Node)]
            assert not options, inner.format_node()


def test_the_schedule_stays_as_it_was() -> None:
    def order(given: Program) -> list[str]:
        return [n.name for n in given.nodes if n.target in (start, wait)]

    assert order(program()) == order(program(*Component))


def test_no_result_looks_at_an_operand() -> None:
    """So that new values may be written over old ones."""
    given_program = program(*Component)
    for node in regions(given_program):
        given = set(_graph(node).find_nodes(op="placeholder"))
        (returned,) = _graph(node).output_node().args
        outputs = tuple(Output(str(x)) for x in returned)  # type: ignore[union-attr]
        signature = replace(given_program.signature, outputs=outputs)
        root = storages(replace(given_program, graph=_graph(node), signature=signature))
        assert not {root[x] for x in returned} & given  # type: ignore[union-attr]
    assert write_backs(given_program) and peak_memory(given_program).bytes > 0


def test_components_may_be_chosen() -> None:
    found = regions(program(Component.NORM))
    assert {roles.component(node) for node in found} == {Component.NORM}
    assert compile_regions(least=10_000)(program()) is program()


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
