"""Layers and components that backward computes again: the same bits, and nothing decided twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh

from gloo import Ranks
from moptrace import Plan, Program, errors, parallelize, roles, trace, train_step
from moptrace.activations import Activations, communicates, decides
from moptrace.core import Pass, chain
from moptrace.liveness import peak_memory
from moptrace.passes import recompute
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.fit_activations import fit_activations
from moptrace.passes.offload import offload
from moptrace.passes.recompute import regather
from moptrace.roles import Component
from moptrace.simulate import simulate
from moptrace.testing import ModelSpec, SimulatedSteps, assert_same_weights, whole_state
from sweeps import sweep
from test_train_step import SMALL, Eager, all_of, assert_close

aten, torch_ops = torch.ops.aten, torch.ops.moptrace

SPEC = ModelSpec(
    layers=("moe", "dense", "dense"), width=8, hidden=16, vocabulary=16, experts=4,
    style="canonical", attention="fused", shared="plain", balance=0.1,
)  # fmt: skip
PLAN = Plan(ep=2, count_tokens=True)
PLANS = {
    "ep": (PLAN, 2),
    "ep, cp and tp": (Plan(ep=2, cp=2, tp=2), 4),
    "chunks": (replace(PLAN, expert_tokens=8, recompute_experts=True), 2),
}
AGAIN = checkpoint(collectives=True)
POLICIES = {
    "layers": checkpoint(),
    "layers, sent again": AGAIN,
    "components": checkpoint("attention", Component.EXPERTS),
    "sent to the host": chain(AGAIN, offload()),
    "only sent to the host": offload(),
    "gathered again": chain(AGAIN, regather()),
    "overlapped": chain(AGAIN, overlapped()),
}


def batch_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 16, (4, 16), generator=generator)
    return {"input_ids": ids, "labels": ids}


@cache
def model_of(spec: ModelSpec) -> nn.Module:
    """With dropout in every layer."""
    model = spec.build()
    for layer in model.layers:
        layer.norm = nn.Sequential(layer.norm, nn.Dropout(0.25))
    return model


@cache
def steps(plan: str = "ep", accumulate: int = 1, spec: ModelSpec = SPEC) -> SimulatedSteps:
    model, (asked, ranks) = model_of(spec), PLANS[plan]
    local = sharded(asked, ranks)(canonical()(trace(model, batch_of(9))))
    make: Any = all_of(lambda shards: torch.optim.SGD(shards, lr=0.1))
    return SimulatedSteps(local, whole_state(model), make, 1.0, accumulate)


def program_of(plan: str = "ep", accumulate: int = 1, spec: ModelSpec = SPEC) -> Program:
    return steps(plan, accumulate, spec).programs[0]


def results(
    change: Callable[[Program], Program], plan: str = "ep", accumulate: int = 1
) -> list[Tensor]:
    """All outputs of all ranks, when every rank's step is changed."""
    own = steps(plan, accumulate)
    changed = {id(p): change(p) for p in own.programs}
    programs = [changed[id(p)] for p in own.programs]
    return run(programs, plan, accumulate)


def run(programs: Sequence[Program], plan: str = "ep", accumulate: int = 1) -> list[Tensor]:
    fed = [batch_of(number) for number in range(accumulate)]
    arguments = [steps(plan, accumulate)._arguments(r, p, fed) for r, p in enumerate(programs)]
    with torch.no_grad():
        return [x for rank in simulate(programs, arguments, seed=3) for x in rank]


@cache
def unchanged(plan: str, accumulate: int) -> list[Tensor]:
    return results(lambda program: program, plan, accumulate)


def assert_same_bits(have: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


CASES = list(product(PLANS, (1, 2), POLICIES))
QUICK = [
    ("ep", 1, "layers"),
    ("ep", 2, "sent to the host"),
    ("ep", 1, "components"),
    ("ep, cp and tp", 1, "sent to the host"),
    ("ep, cp and tp", 1, "layers"),
    ("ep, cp and tp", 1, "overlapped"),
    ("chunks", 1, "layers, sent again"),
]


@pytest.mark.parametrize(("plan", "accumulate", "policy"), sweep(CASES, quick=QUICK))
def test_any_policy_gives_the_same_bits(plan: str, accumulate: int, policy: str) -> None:
    have = results(POLICIES[policy], plan, accumulate)
    assert_same_bits(have, unchanged(plan, accumulate))


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_layers_are_found_by_structure(accumulate: int) -> None:
    phases = Activations(program_of(accumulate=accumulate)).phases
    assert [phase.layers for phase in phases] == [3] * accumulate
    for phase in phases:
        modules = [roles.role(entry).module for entry in phase.entries]
        assert modules == ["embedding", "layers.0", "layers.1", "layers.2"]
        starts = [phase.starts[layer] for layer in (3, 2, 1, 0)]
        assert starts == sorted(starts, key=phase.backward.index)


def test_a_layer_keeps_what_enters_it_and_what_was_decided() -> None:
    known = Activations(AGAIN(program_of()))
    (phase,) = known.phases
    kept = [node for node in known.kept if phase.is_in_layer(node)]
    values = {node: roles.value(node) for node in kept if node not in phase.entries}
    numbers = [n for n, x in values.items() if isinstance(x, Tensor) and x.is_floating_point()]
    # The weights of the chosen experts came with the choice; masks of dropout are drawn again.
    assert [n.args[0].target for n in numbers] == [aten.topk.default]  # type: ignore[union-attr]
    assert set(phase.entries[:-1]) < set(kept)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.embedding(ids)), ids)


def test_a_model_without_layers_is_refused() -> None:
    traced = canonical()(trace(Flat(), {"ids": torch.arange(8)}))
    program = differentiate()(sharded(Plan(ep=1), 1)(traced))
    for policy in (checkpoint(), offload()):
        with pytest.raises(errors.StepError, match=r"found no layers: .* feed-forward"):
            policy(program)


# --- decisions ------------------------------------------------------------------------------------


def decided_in_backward(program: Program) -> Counter[Any]:
    return Counter(n.target for n in program.nodes if roles.role(n).backward and decides(n))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_decided_twice(policy: str) -> None:
    program = program_of()
    assert {aten.topk.default, torch_ops.dispatch.default} <= {n.target for n in program.nodes}
    changed = POLICIES[policy](program)
    assert decided_in_backward(changed) == decided_in_backward(program)
    assert not any(roles.role(n).backward for n in exchanges_of_counts(changed))


def exchanges_of_counts(program: Program) -> list[fx.Node]:
    names = (torch_ops.exchange_counts.default, "exchange_counts")  # as a whole, and as it starts
    return [n for n in program.nodes if n.target in names or "exchange_counts" in n.args]


def decided_otherwise(program: Program) -> Program:
    """Every choice of experts that backward makes is another one."""
    graph, _ = program.copy_graph()
    for node in graph.find_nodes(op="call_function", target=aten.topk.default):
        if roles.role(node).backward:
            node.args = (*node.args[:2], -1, False)
    return program.with_graph(graph)


def test_choices_that_are_made_again_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    want = unchanged("ep", 1)
    assert_same_bits(results(chain_of(AGAIN, decided_otherwise)), want)
    monkeypatch.setattr("moptrace.activations.decides", lambda node: False)
    monkeypatch.setattr(recompute, "rows_of_dispatch", lambda node: False)
    assert decided_in_backward(AGAIN(program_of()))[aten.topk.default] == 1
    with pytest.raises((AssertionError, RuntimeError)):  # or rows do not fit their counts
        assert_same_bits(results(chain_of(AGAIN, decided_otherwise)), want)


def chain_of(policy: Pass, change: Callable[[Program], Program]) -> Callable[[Program], Program]:
    return lambda program: change(policy(program))


# --- collectives ----------------------------------------------------------------------------------


def sent(program: Program) -> int:
    return sum(map(communicates, program.nodes))


def test_what_ranks_send_each_other_is_sent_again_only_if_asked() -> None:
    program = program_of()
    once, again = checkpoint()(program), AGAIN(program)
    assert sent(once) == sent(program) < sent(again)
    assert "bytes that ranks sent each other" in once.notes[-1]
    assert again.notes == program.notes


def test_ranks_that_send_different_things_again_are_noticed() -> None:
    program = program_of()
    with pytest.raises(AssertionError, match="the ranks' programs differ"):
        run([AGAIN(program), checkpoint()(program)])


# --- memory ---------------------------------------------------------------------------------------


def test_the_peak_is_lower() -> None:
    program = program_of()
    layers, experts = peak_memory(AGAIN(program)), peak_memory(checkpoint("experts")(program))
    assert layers.bytes < experts.bytes < peak_memory(program).bytes


# --- real ranks -----------------------------------------------------------------------------------


def on_rank_steps(activations: str | float) -> None:
    """A number is a part of the peak of the step that keeps everything."""
    mesh = init_device_mesh("cpu", (2,))
    example = {k: v[:2] for k, v in batch_of(9).items()}
    model = parallelize(SMALL.build(), mesh, PLAN, batch=example)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eager = Eager(SMALL.build(), all_of(lambda named: torch.optim.SGD(named, lr=0.1)), 0.5)  # type: ignore[arg-type]
    given: Any = activations
    if isinstance(activations, float):
        plain = train_step(model, optimizer, max_norm=0.5)
        assert_close(plain(**model.local_batch(batch_of(0))), eager.step(batch_of(0))[0])
        given = int(activations * plain.peak_memory().bytes)
    step = train_step(model, optimizer, max_norm=0.5, activations=given)
    for number in (1, 2):
        want, norm = eager.step(batch_of(number))
        assert_close(step(**model.local_batch(batch_of(number))), want)
        assert_close(step.grad_norm, norm)
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))
    peak = step.peak_memory()
    assert peak.bytes <= given if isinstance(given, int) else peak.host_bytes > 0


@pytest.mark.parametrize("activations", sweep(["offload", 0.9], quick=["offload"]))
def test_real_ranks_take_the_same_steps(
    activations: str | float, ranks: Callable[[int], Ranks]
) -> None:
    ranks(2)(on_rank_steps, activations)


def test_a_policy_that_does_not_exist_is_refused() -> None:
    for given in ("all", 0, True):
        with pytest.raises(errors.StepError, match=r"none of 'keep', 'checkpoint', 'offload'"):
            train_step(None, None, activations=given)  # type: ignore[arg-type]


def test_the_passes_print() -> None:
    assert str(AGAIN) == "checkpoint(components=(), collectives=True)"
    assert str(fit_activations(7)).startswith("fit_activations(budget=7, machine=Machine(flops=")
