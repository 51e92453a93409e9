"""The predicted peak of memory is what a run of the step holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moptrace import Plan, Program, roles, trace
from moptrace.collectives import Communicator
from moptrace.executable import executable
from moptrace.liveness import peak_memory, write_backs
from moptrace.passes.default import canonical, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.rings import workspace
from moptrace.testing import ModelSpec, SimulatedSteps, whole_state

SPEC = ModelSpec(layers=("moe", "dense"), width=8, hidden=24, experts=4, attention="fused")
ADAMW = lambda named: torch.optim.AdamW(named.values(), lr=0.01)  # noqa: E731
SGD = lambda named: torch.optim.SGD(named.values(), lr=0.01)  # noqa: E731


def batch_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 13, (4, 16), generator=generator)
    return {"input_ids": ids, "labels": ids}


class Measuring(fx.Interpreter):
    """Adds up the memory of all values that exist after each node."""

    def __init__(self, module: fx.GraphModule, inputs: list[Tensor]):
        super().__init__(module)
        self.inputs, self.peak = inputs, 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        held = pytree.tree_leaves([list(self.env.values()), result, self.inputs])
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in held
            if isinstance(x, Tensor)
        }
        self.peak = max(self.peak, sum(storages.values()))
        return result


def measured(program: Program, steps: SimulatedSteps, batch: dict[str, Tensor]) -> int:
    arguments = steps._arguments(0, program, [batch])
    inputs = [arguments[name].detach() for name in program.signature.names]
    assert program.layout is not None
    with torch.no_grad(), Communicator(program.layout, 0):
        run = Measuring(executable(program, "cpu"), inputs)
        run.run(*inputs)
    return run.peak


@pytest.mark.parametrize("make", [SGD, ADAMW])
def test_the_predicted_peak_is_the_measured_one(make: Callable[..., Any]) -> None:
    model = SPEC.build()
    local = sharded(Plan(ep=1), 1)(canonical()(trace(model, batch_of(9))))
    steps = SimulatedSteps(local, whole_state(model), make, 1.0)
    steps.step(batch_of(0))  # the first one makes the state
    program = steps.programs[0]
    assert peak_memory(program).bytes == pytest.approx(
        measured(program, steps, batch_of(1)), rel=0.02
    )


def test_the_peak_says_what_is_alive() -> None:
    model = SPEC.build()
    local = sharded(Plan(ep=1), 1)(canonical()(trace(model, batch_of(9))))
    peak = peak_memory(SimulatedSteps(local, whole_state(model), SGD).programs[0])
    assert peak.bytes == sum(x.bytes for x in peak.alive)
    sizes = [x.bytes for x in peak.alive]
    assert sizes == sorted(sizes, reverse=True)
    assert str(peak).startswith(f"{peak.bytes:,} bytes at %{peak.node}:")
    names = {x.name for x in peak.alive}
    assert {"embedding_weight", "head_weight", "input_ids"} <= names


def test_new_values_are_written_when_nothing_needs_the_old_ones() -> None:
    model = SPEC.build()
    local = sharded(Plan(ep=2), 2)(canonical()(trace(model, batch_of(9))))
    steps = SimulatedSteps(local, whole_state(model), ADAMW, 1.0)
    steps.step(batch_of(0))
    program = steps.programs[0]
    position = {node: at for at, node in enumerate(program.nodes)}
    written = {old: after for after, pairs in write_backs(program).items() for old, _ in pairs}
    updated = {output.updates for output in program.signature.outputs if output.updates}
    assert {node.name for node in written} == updated
    for old, after in written.items():
        assert all(position[user] <= position[after] for user in old.users if user.op != "output")


@pytest.mark.parametrize(("ranks", "loads"), [(2, 1), (4, 2)])
def test_what_travels_around_a_ring_takes_memory(ranks: int, loads: int) -> None:
    """The tokens of another rank are worked on while those of the next one come."""
    fed = {k: v.repeat(2, 1) for k, v in batch_of(0).items()}  # 8 sequences of 16
    spec = replace(
        SPEC, width=64, vocabulary=512
    )  # more words than a rank has tokens, so these travel
    traced = canonical()(trace(spec.build(), fed))
    plan = Plan(ep=1, logits_bytes=0, vp=ranks).resolve(ranks, [SPEC.experts])
    program = differentiate()(sharded(plan, ranks)(traced))
    assert program.layout is not None
    (ring,) = (n for n in program.nodes if n.name.startswith("ring_vocab") and not backward(n))
    tokens = 8 * 16 // ranks
    load, statistics = tokens * (spec.width * 8 + 8), tokens * 4 * 8  # with labels
    found = workspace(ring, program.layout)
    assert loads * load <= found <= loads * load + 8 * statistics
    (back,) = (n for n in program.nodes if n.name.startswith("ring_vocab") and backward(n))
    assert workspace(back, program.layout) > found  # sums travel too


def backward(node: fx.Node) -> bool:
    return roles.role(node).backward
