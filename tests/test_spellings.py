"""Ways to write experts that were once refused or taken for dense: the same step on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models import LanguageModel, Sizes, StackedExperts
from moptrace import Plan, Program, strategies, trace
from moptrace.passes.default import canonical, sharded
from moptrace.passes.raise_experts import WITHOUT_EXPERTS
from moptrace.testing import ModelSpec, assert_same_step, eager_step, simulated_step, whole_state
from sweeps import sweep

LAYOUTS = ((1, 1), (2, 1), (2, 2), (3, 3), (4, 2))  # ranks, and over how many experts are split
SEQUENCES = 12


def batch(seed: int) -> dict[str, Tensor]:
    return models.batch(seed, size=SEQUENCES, length=3)


def canonical_of(model: nn.Module) -> Program:
    return canonical()(trace(model, batch(0)))


def assert_same_on_ranks(program: Program, model: nn.Module) -> None:
    """Loss and every gradient are those of the model, on a batch that it was not traced with."""
    whole, fed = whole_state(model), batch(1)
    want = eager_step(model, fed)
    for number, (ranks, ep) in enumerate(LAYOUTS):
        plan = Plan(ep=ep, edp=("shard", "replicate")[number % 2])
        local = sharded(plan, ranks)(program)
        assert_same_step(simulated_step(local, whole, fed), want)


def combines(program: Program) -> int:
    return sum(n.target is torch.ops.moptrace.combine.default for n in program.nodes)


# ---- Masks and one-hot gates ---------------------------------------------------------------------

Mix = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Written(StackedExperts):
    """A block whose ``mix`` is given as a function."""

    def __init__(self, s: Sizes, mix: Mix, **how: Any):
        super().__init__(s, **how)
        self.function = mix

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self.function(self, x, weights, chosen)


def written(mix: Mix, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    s = Sizes(layers=1, **sizes)
    return LanguageModel(partial(Written, mix=mix), s).to(torch.float64)


def every_expert(self: Any, x: Tensor) -> Tensor:
    """The results [N, E, d] of all experts for all tokens."""
    gate, up = (torch.einsum("nd,edf->nef", x, w) for w in (self.w1, self.w3))
    return torch.einsum("nef,efd->ned", F.silu(gate + self.b1) * up, self.w2) + self.b2


def gate(self: Any, weights: Tensor, chosen: Tensor) -> Tensor:
    """The weights [N, E], zero for experts that were not chosen."""
    return torch.einsum("nk,nke->ne", weights, F.one_hot(chosen, self.E).to(weights.dtype))


def gate_by_einsum(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.einsum("ne,ned->nd", gate(self, weights, chosen), every_expert(self, x))


def gate_of_comparisons(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    hot = (chosen.unsqueeze(-1) == torch.arange(self.E)).to(x.dtype)
    matrix = torch.einsum("nke,nk->ne", hot, weights)
    return (matrix.unsqueeze(-1) * every_expert(self, x)).sum(1)


def gate_renormalised(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    kept = self.router.gate(x).softmax(-1) * F.one_hot(chosen, self.E).sum(1)
    matrix = kept / kept.sum(-1, keepdim=True)
    return torch.einsum("ne,ned->nd", matrix, every_expert(self, x))


def gate_column_by_column(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    matrix, results = gate(self, weights, chosen), every_expert(self, x)
    return sum(matrix[:, e, None] * results[:, e] for e in range(self.E))


def gate_on_hidden_values(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    hidden = F.silu(torch.einsum("nd,edf->nef", x, self.w1))
    return torch.einsum("ne,nef,efd->nd", gate(self, weights, chosen), hidden, self.w2)


def gate_on_inputs_too(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    matrix = gate(self, weights, chosen)
    sent = torch.einsum("ne,nd->end", (matrix > 0).to(x.dtype), x)
    hidden = F.silu(torch.einsum("end,edf->enf", sent, self.w1))
    return torch.einsum("enf,efd,ne->nd", hidden, self.w2, matrix)


GATES = (
    gate_by_einsum, gate_of_comparisons, gate_renormalised, gate_column_by_column,
    gate_on_hidden_values, gate_on_inputs_too,
)  # fmt: skip


@pytest.mark.parametrize(
    ("mix", "k"), sweep(product(GATES, [1, 2]), quick=[*product(GATES, [2]), (GATES[0], 1)])
)
def test_all_experts_on_all_tokens_with_a_gate_that_zeroes_most(mix: Mix, k: int) -> None:
    model = written(mix, k=k)
    program = canonical_of(model)
    assert combines(program) == 1 and not program.notes
    assert_same_on_ranks(program, model)


def soft_gate(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.einsum("ne,ned->nd", self.router.gate(x).softmax(-1), every_expert(self, x))


def soft_gate_that_prefers_some(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    matrix = self.router.gate(x).softmax(-1) + gate(self, weights, chosen)
    return torch.einsum("ne,ned->nd", matrix, every_expert(self, x))


def soft_gate_with_a_floor(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    matrix = self.router.gate(x).softmax(-1) * (F.one_hot(chosen, self.E).sum(1) + 0.1)
    return torch.einsum("ne,ned->nd", matrix, every_expert(self, x))


@pytest.mark.parametrize("mix", [soft_gate, soft_gate_that_prefers_some, soft_gate_with_a_floor])
def test_weights_that_no_expert_lacks_leave_the_model_dense(mix: Mix) -> None:
    model = written(mix)
    program = canonical_of(model)
    assert combines(program) == 0 and WITHOUT_EXPERTS in program.notes
    assert_same_on_ranks(program, model)


@pytest.mark.parametrize("style", [models.LoopMask, models.LoopMaskThreeDimensional])
def test_boolean_masks_of_one_choice(style: type[nn.Module]) -> None:
    torch.manual_seed(0)
    router = models.PlainSoftmaxRouter
    s = Sizes(layers=1, k=1)
    model = LanguageModel(partial(style, router=router), s).to(torch.float64)
    program = canonical_of(model)
    assert combines(program) == 1 and not program.notes
    assert_same_on_ranks(program, model)


# ---- One choice, and one expert ------------------------------------------------------------------


def in_style(style: Callable[..., nn.Module], **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return LanguageModel(style, Sizes(layers=1, **sizes)).to(torch.float64)


def gathered_together(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    w1, w3 = torch.cat([self.w1, self.w3], dim=-1)[chosen[:, 0]].chunk(2, dim=-1)
    hidden = F.silu(x.unsqueeze(1) @ w1) * (x.unsqueeze(1) @ w3)
    return (hidden @ self.w2[chosen[:, 0]]).squeeze(1) * weights


GATHERS = {
    "GatherBmm": models.GatherBmm,
    "GatherEinsum": models.GatherEinsum,
    "pieces of a gathered parameter": partial(Written, mix=gathered_together),
}


@pytest.mark.parametrize("style", GATHERS)
def test_parameters_gathered_for_one_choice(style: str) -> None:
    model = in_style(GATHERS[style], k=1)
    program = canonical_of(model)
    assert combines(program) == 1
    assert_same_on_ranks(program, model)


@pytest.mark.parametrize("style", [*models.MODULE_STYLES, *models.STACKED_STYLES])
def test_a_single_expert(style: type[nn.Module]) -> None:
    model = in_style(style, experts=1, k=1)
    program = canonical_of(model)
    assert bool(combines(program)) != (WITHOUT_EXPERTS in program.notes)
    assert_same_on_ranks(program, model)


def test_a_block_of_canonical_operators_is_no_dense_model() -> None:
    assert not canonical_of(
        ModelSpec(style="canonical", vocabulary=models.VOCABULARY).build()
    ).notes


# ---- Gradients that are zero by structure --------------------------------------------------------

HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a literal zero": lambda gate, up: F.silu(gate) + 0 * up,
    "nothing but zero": lambda gate, up: 0 * up,
    "zeros like the rows": lambda gate, up: F.silu(gate) + up * torch.zeros_like(up),
    "a constant": lambda gate, up: torch.full_like(gate, 2.0),
    "detached": lambda gate, up: F.silu(gate) + up.detach(),
    "unused": lambda gate, up: F.silu(gate),
}


WRITTEN = ("loop_where", "dense_loop", "sort_slices", "one_hot")
EACH = tuple(zip(HIDDEN, WRITTEN + WRITTEN[2:], strict=True))  # all of one, some of the other


@pytest.mark.parametrize(("hidden", "style"), sweep(product(HIDDEN, WRITTEN), quick=EACH))
def test_gradients_that_are_zero_by_structure(
    hidden: str, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(strategies.GATINGS, "written", HIDDEN[hidden])
    model = ModelSpec(style=style, gating="written", vocabulary=models.VOCABULARY).build()
    program = canonical_of(model)
    assert combines(program) == 1
    assert_same_on_ranks(program, model)
