"""The router's weights go through the last product: the same step, and k rows a token less kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import models
from double import InFloat64
from moptrace import Plan, Program, trace
from moptrace.balance import Balance
from moptrace.dropping import Dropping
from moptrace.passes.default import canonical, sharded
from moptrace.passes.fold_router_weights import fold_router_weights
from moptrace.testing import (
    SimulatedRanks,
    assert_same_step,
    eager_step,
    simulated_step,
    whole_state,
)
from subjects import batch, subject
from sweeps import sweep
from test_chunk_experts import Kept

PLANS = (
    (1, Plan(ep=1)),
    (4, Plan(ep=2, etp=2)),
    (4, Plan(ep=4, tp=2, expert_tokens=7)),
    (4, Plan(ep=2, dispatcher="all-gather")),
    (2, Plan(cp=2, etp=2, dispatcher="all-gather")),
    (6, Plan(ep=3, edp="replicate", recompute_experts=True)),
    (4, Plan(ep=4, balance=Balance(threshold=1.0))),
)
DROPPING = (
    (4, Plan(ep=2, dropping=Dropping(0.75))),
    (4, Plan(ep=2, dropping=Dropping(0.75, over="sub-sequence", pad=True))),
)


def local(name: str, world: int, plan: Plan, folds: bool = True) -> Program:
    with InFloat64():
        resolved = replace(plan, fold_router_weights=folds).resolve(world, [])
        return sharded(resolved, world)(subject(name)[1])


EVERY_TIME = [("gpt_oss", world, plan) for world, plan in PLANS]
EVERY_TIME += [("LoopMask, top-k then softmax", world, plan) for world, plan in PLANS[:2]]
OTHERS = ("LoopMask, top-k then softmax", "LoopWhere", "OneHotEinsum", "deepseek_v3")
RARELY = [(name, world, plan) for name in OTHERS for world, plan in PLANS]


@pytest.mark.parametrize(
    ("name", "world", "plan"),
    sweep([*EVERY_TIME, *(x for x in RARELY if x not in EVERY_TIME)], quick=EVERY_TIME),
    ids=str,
)
def test_the_step_is_the_same(name: str, world: int, plan: Plan) -> None:
    model, _ = subject(name)
    with InFloat64():
        want = eager_step(model, batch(1))
        found = simulated_step(local(name, world, plan), whole_state(model), batch(1))
    assert_same_step(found, want)


@pytest.mark.parametrize(("world", "plan"), DROPPING, ids=str)
def test_dropped_pairs_add_nothing(world: int, plan: Plan) -> None:
    model, _ = subject("mixtral")
    with InFloat64():
        found, want = (
            simulated_step(local("mixtral", world, plan, folds), whole_state(model), batch(1))
            for folds in (True, False)
        )
    assert_same_step(found, want)


def test_no_result_of_an_expert_is_kept_for_backward() -> None:
    """Of 144 tokens, 288 rows of 16 in each of two layers; a weight for each row comes instead."""

    def kept(folds: bool) -> int:
        state = whole_state(subject("mixtral")[0])
        simulated = SimulatedRanks(local("mixtral", 1, Plan(ep=1), folds), state)
        found = Kept()
        with InFloat64(), torch.autograd.graph.saved_tensors_hooks(found, lambda x: x):
            simulated.step(batch(1))
        return found.bytes

    assert kept(False) - kept(True) == 2 * 288 * (16 - 1) * 8


class Squashed(models.BiasedExpert):
    """What an expert gives goes through a function that is not linear."""

    def __init__(self, s: models.Sizes):
        super().__init__(s)
        self.append(nn.Tanh())


def test_experts_that_end_in_something_else_stay_as_they_are() -> None:
    block = partial(models.LoopWhere, expert=Squashed)
    model = models.LanguageModel(block).double()
    program = canonical()(trace(model, batch(0)))
    folded = fold_router_weights()(program)
    assert [n.target for n in folded.graph.nodes] == [n.target for n in program.graph.nodes]
    assert "no product comes before them" in folded.notes[-1]
