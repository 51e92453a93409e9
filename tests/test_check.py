"""The checker rejects what is not well formed, and shows where. Collectives: test_mutations.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from moptrace import Level, Pass, Plan, Program, roles, trace
from moptrace.check import check
from moptrace.errors import CheckError
from moptrace.passes.default import canonical, sharded
from moptrace.passes.place import place
from moptrace.passes.shard_parameters import shard_batch, shard_parameters
from moptrace.placement import PARTIAL, Placement, Shard
from moptrace.testing import ModelSpec

aten = torch.ops.aten
PLAN = Plan(ep=1)
LAYOUT = PLAN.layout(2)


@pytest.fixture(scope="module")
def captured() -> Program:
    ids = torch.zeros(4, 3, dtype=torch.int64)
    return trace(ModelSpec(layers=("dense",)).build(), {"input_ids": ids, "labels": ids})


@pytest.fixture(scope="module")
def placed(captured: Program) -> Program:
    program = canonical()(captured)
    for step in (shard_parameters(LAYOUT), shard_batch(LAYOUT), place()):
        program = step(program)
    return program


def changed(program: Program, change: Callable[[fx.Graph], None]) -> Program:
    graph, _ = program.copy_graph()
    change(graph)
    return program.with_graph(graph)


def first(graph: fx.Graph, target: object) -> fx.Node:
    return next(n for n in graph.nodes if n.target is target)


def test_what_the_passes_make_is_well_formed(captured: Program, placed: Program) -> None:
    check(captured)
    check(placed)
    check(sharded(PLAN, 2)(canonical()(captured)))


def test_a_value_is_defined_before_it_is_used(captured: Program) -> None:
    def move(graph: fx.Graph) -> None:
        node = first(graph, aten.silu.default)
        graph.output_node().prepend(node)

    fault = r"is used before it is defined, at node %\w+, in module layers\.0"
    with pytest.raises(CheckError, match=fault):
        check(changed(captured, move))


def test_inputs_are_those_of_the_signature(captured: Program) -> None:
    signature = replace(captured.signature, inputs=captured.signature.inputs[:1])
    with pytest.raises(CheckError, match="inputs are not those of its signature"):
        check(replace(captured, signature=signature))


def test_outputs_are_those_of_the_signature(captured: Program) -> None:
    def drop(graph: fx.Graph) -> None:
        graph.output_node().args = (graph.output_node().args[0][:1],)  # type: ignore[index]

    with pytest.raises(CheckError, match="outputs are not those of its signature"):
        check(changed(captured, drop))


def test_constants_are_there(captured: Program) -> None:
    def read(graph: fx.Graph) -> None:
        with graph.inserting_before(graph.output_node()):
            graph.get_attr("nowhere")

    with pytest.raises(CheckError, match="constant nowhere is missing"):
        check(changed(captured, read))


def test_nothing_writes_in_place(captured: Program) -> None:
    def write(graph: fx.Graph) -> None:
        first(graph, aten.silu.default).target = aten.silu_.default

    with pytest.raises(CheckError, match="writes in place"):
        check(changed(captured, write))


def test_collectives_and_reshards_keep_to_their_levels(captured: Program, placed: Program) -> None:
    local = sharded(PLAN, 2)(canonical()(captured))
    with pytest.raises(CheckError, match="does not belong at level canonical"):
        check(replace(local, level=Level.CANONICAL))
    with pytest.raises(CheckError, match="does not belong at level local"):
        check(replace(placed, level=Level.LOCAL))


def test_every_tensor_is_placed(placed: Program) -> None:
    def forget(graph: fx.Graph) -> None:
        roles.set_role(next(iter(graph.nodes)), placements=())

    with pytest.raises(CheckError, match="has no placement"):
        check(changed(placed, forget))


def test_a_placement_follows_from_those_of_the_operands(placed: Program) -> None:
    def claim(graph: fx.Graph) -> None:
        node = first(graph, aten.silu.default)
        roles.set_role(node, placements=(Placement.uniform(LAYOUT.home, Shard(1)),))

    with pytest.raises(CheckError, match=r"the result is dp: shard\(1\), but shard\(0\)"):
        check(changed(placed, claim))


def test_no_sum_is_pending_at_the_end(placed: Program) -> None:
    def claim(graph: fx.Graph) -> None:
        loss = graph.output_node().args[0][0]  # type: ignore[index]
        source = loss.args[0]
        graph.output_node().replace_input_with(loss, source)
        roles.set_role(source, placements=(Placement.uniform(LAYOUT.home, PARTIAL),))

    with pytest.raises(CheckError, match="partial"):
        check(changed(placed, claim))


def test_a_fault_is_shown_among_its_neighbours(placed: Program) -> None:
    def write(graph: fx.Graph) -> None:
        first(graph, aten.silu.default).target = aten.silu_.default

    with pytest.raises(CheckError) as caught:
        Pass("hasty", lambda p: changed(p, write))(placed)
    text = str(caught.value)
    assert "that hasty made" in text
    assert sum(line.startswith(" > ") for line in text.splitlines()) == 1
    assert len(text.splitlines()) > 8
