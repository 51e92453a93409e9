"""Raising experts: one spelling for every style of block, and the same function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models import LanguageModel, LoopWhere, SigmoidGroupRouter, Sizes
from moptrace import roles
from moptrace.core import Program
from moptrace.errors import RoleError
from moptrace.passes.raise_experts import WITHOUT_EXPERTS, raise_experts
from moptrace.trace import evaluate, trace

aten = torch.ops.aten
STYLES = [*models.MODELS, *models.HUGGING_FACE]

# What only the user's own way of moving tokens uses; an auxiliary loss has a one_hot of its own.
MOVEMENT = {
    aten.nonzero, aten.nonzero_numpy, aten.index_add, aten.index_put, aten.scatter_add,
    aten.bincount, aten.histc, aten.sort, aten.argsort, aten.index, aten.index_select, aten.bmm,
}  # fmt: skip


@cache
def built(style: str) -> tuple[nn.Module, Program]:
    model = models.build(style)
    return model, raise_experts()(trace(model, models.batch(0)))


def operators(program: Program) -> Counter[Any]:
    return Counter(getattr(n.target, "overloadpacket", n.target) for n in program.nodes)


def blocks(program: Program) -> tuple[int, int, int]:
    """How often a program dispatches, multiplies by group, and combines."""
    count = operators(program)
    ops = torch.ops.moptrace
    return count[ops.dispatch], count[ops.grouped_mm], count[ops.combine]


def gradients(
    model: nn.Module, run: Callable[[dict[str, Tensor]], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that ``run`` computes from copies of the model's state, and its raw gradients."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    copies = {t: t.detach().clone().requires_grad_(t.requires_grad) for _, t in named}
    loss = run({name: copies[t] for name, t in named})
    loss.backward()
    found = {name: copies[p].grad for name, p in model.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    return loss.detach(), {n: zeros[n] if g is None else g for n, g in found.items()}


def assert_same_function(program: Program, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """The loss and every gradient of the model itself; a gradient that is None counts as zero."""
    eager = partial(torch.func.functional_call, model, args=(), kwargs=batch, strict=True)
    captured = program.history[0]

    def reference(state: dict[str, Tensor]) -> Tensor:
        # Eager PyTorch has no grouped product in float64: there the captured program stands in,
        # which test_trace.py compares with the model.
        if isinstance(model, LanguageModel):
            return eager(parameter_and_buffer_dicts=state)[0]
        return evaluate(captured, state, batch).loss

    loss, expected = gradients(model, reference)
    ours, found = gradients(model, lambda state: evaluate(program, state, batch).loss)
    torch.testing.assert_close(ours, loss, rtol=1e-10, atol=0)
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


@pytest.mark.parametrize("style", STYLES)
def test_loss_and_gradients_are_those_of_the_model_on_unseen_batches(style: str):
    model, program = built(style)
    assert_same_function(program, model, models.batch(7))


def one_choice_for_all_tokens(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether every router sends all tokens of the batch to the same experts."""
    choices: list[Tensor] = []
    routers = [
        m for m in model.modules() if isinstance(m, models.SoftmaxRouter | SigmoidGroupRouter)
    ]
    hooks = [r.register_forward_hook(lambda _, __, out: choices.append(out[1])) for r in routers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    tokens = batch["input_ids"].numel()
    return bool(choices) and all(
        len(chosen.reshape(tokens, -1).unique(dim=0)) == 1 for chosen in choices
    )


@pytest.mark.parametrize("style", list(models.MODELS))
def test_an_expert_may_get_all_tokens_and_others_none(style: str):
    model, program = built(style)
    kept = {name: t.detach().clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, models.SoftmaxRouter):
                module.gate.weight.zero_()  # every token ties alike
            elif isinstance(module, SigmoidGroupRouter):
                module.weight.zero_()
    try:
        assert one_choice_for_all_tokens(model, models.batch(3))
        assert_same_function(program, model, models.batch(3))
    finally:
        model.load_state_dict(kept)


@pytest.mark.parametrize("style", STYLES)
def test_every_block_has_one_spelling(style: str):
    _, program = built(style)
    dispatches, products, combines = blocks(program)
    dense_first = "deepseek" in style or style in (
        "LoopOneHot, shared expert",
        "SortSlices, balanced",
    )
    assert dispatches == combines == (1 if dense_first else 2)
    assert products in (2 * combines, 3 * combines)
    assert not MOVEMENT & set(operators(program))
    if "balanced" not in style:
        assert aten.one_hot not in operators(program)
    assert program.notes == ()


@pytest.mark.parametrize("style", list(models.MODELS))
def test_weights_after_the_experts_go_to_combine(style: str):
    _, program = built(style)
    before = "WeightFirst" in style
    for node in program.nodes:
        if node.target is torch.ops.moptrace.combine.default:
            made = getattr(node.args[2].target, "overloadpacket", None)
            assert (made is aten.ones) == before


def test_parameters_of_a_loop_are_stacked_in_the_order_of_experts():
    model, program = built("LoopWhere")
    stacked = program.signature.parameter("layers.1.feed_forward.experts.stacked.w2.weight")
    prefix = "layers.1.feed_forward.experts"
    assert stacked.stacked == tuple(f"{prefix}.{e}.w2.weight" for e in range(12))
    assert stacked.shape == (12, 8, 6)
    assert not any(".experts.3." in p.fqn for p in program.signature.parameters)
    assert program.signature.names == tuple(n.name for n in program.nodes if n.op == "placeholder")
    del model


def test_stacking_loses_and_repeats_no_parameter():
    model, program = built("LoopMask, top-k then softmax")
    members = [f for p in program.signature.parameters for f in (p.stacked or (p.fqn,))]
    assert sorted(members) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("style", ["SortSlices", "DenseEinsum", "qwen3_moe, eager"])
def test_parameters_that_are_stacked_already_are_used_as_they_are(style: str):
    model, program = built(style)
    names = [p.fqn for p in program.signature.parameters]
    assert names == [name for name, _ in model.named_parameters()]
    assert not any(p.stacked for p in program.signature.parameters)


def test_the_pass_leaves_its_input_alone():
    program = trace(models.build("LoopMask"), models.batch(0))
    before = str(program.graph)
    raise_experts()(program)
    assert str(program.graph) == before


def test_new_nodes_know_the_users_line():
    _, program = built("LoopWhere")
    product = next(n for n in program.nodes if n.target is torch.ops.moptrace.grouped_mm.default)
    source = roles.role(product).source
    assert source is not None and source.file.endswith("models.py")
    assert roles.role(product).made_by == "raise_experts"


def test_a_model_without_experts_is_dense_with_a_note():
    program = raise_experts()(trace(models.build("dense"), models.batch(0)))
    assert program.notes == (WITHOUT_EXPERTS,)
    assert blocks(program) == (0, 0, 0)


# ---- Further spellings, one each -----------------------------------------------------------------


class Written(LoopWhere):
    """A block whose ``mix`` is given as a function."""

    def __init__(self, s: Sizes, mix: Any, **how: Any):
        super().__init__(s, **how)
        self.function = mix

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self.function(self, x, weights, chosen)


def written(mix: Any, s: Sizes = models.SIZES, **how: Any) -> nn.Module:
    torch.manual_seed(0)
    return LanguageModel(partial(Written, mix=mix, **how), s).to(torch.float64)


def assert_raised(model: nn.Module) -> None:
    program = raise_experts()(trace(model, models.batch(0)))
    dispatches, _, combines = blocks(program)
    assert dispatches == combines == 2
    assert_same_function(program, model, models.batch(5))


def test_experts_in_another_order_than_the_loop():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in reversed(range(self.E)):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out

    assert_raised(written(mix))


def test_the_shared_expert_is_where_the_sum_starts():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.tanh(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out

    assert_raised(written(mix))


def test_a_sort_of_all_scores_instead_of_a_top_k():
    class Router(models.SoftmaxRouter):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights, experts = self.gate(x).softmax(-1).sort(dim=-1, descending=True)
            return weights[:, : self.k], experts[:, : self.k]

    assert_raised(written(models.LoopMask.mix, router=Router))


def test_two_argmaxes_side_by_side():
    class Router(models.SoftmaxRouter):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.gate(x).softmax(-1)
            first = scores.argmax(-1, keepdim=True)
            second = scores.scatter(-1, first, -1.0).argmax(-1, keepdim=True)
            experts = torch.cat([first, second], dim=-1)
            return scores.gather(-1, experts), experts

    assert_raised(written(models.LoopWhere.mix, router=Router))


def test_rows_gathered_and_scattered_with_expanded_indices():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            index = token[:, None].expand(-1, x.shape[1])
            rows = expert(torch.gather(x, 0, index)) * weights[token, slot][:, None]
            out = out.scatter_add(0, index, rows)
        return out

    assert_raised(written(mix))


def test_a_list_of_weighted_results_that_python_sums():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        matrix = (F.one_hot(chosen, self.E) * weights[..., None]).sum(1)
        return sum(expert(x) * matrix[:, e : e + 1] for e, expert in enumerate(self.experts))

    assert_raised(written(mix))


def test_a_mask_of_each_expert_in_floating_point():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = 0
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * ((chosen == e).to(x.dtype) * weights).sum(-1, keepdim=True)
        return out

    assert_raised(written(mix))


# ---- What is refused -----------------------------------------------------------------------------


def refusal(model: nn.Module) -> str:
    with pytest.raises(RoleError) as error:
        raise_experts()(trace(model, models.batch(0)))
    return str(error.value)


def test_a_capacity_is_refused_by_name():
    text = refusal(models.build("Capacity"))
    assert "capacity" in text and "models.py:" in text and "Write instead" in text


def test_an_expert_that_mixes_its_tokens_is_refused():
    text = refusal(models.build("NotRowWise"))
    assert "aten.mean" in text and "models.py:" in text and "row by row" in text


def test_experts_with_different_functions_are_refused():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            rows = expert(x[token])
            rows = rows.tanh() if e == 3 else rows.relu()
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out

    text = refusal(written(mix))
    assert "expert 3 computes aten.tanh" in text and "aten.relu" in text


def test_a_missing_expert_is_refused():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts[:-1]):
            token, slot = torch.where(chosen == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out

    assert "every expert exactly once" in refusal(written(mix))


def test_rows_that_never_come_back_to_tokens_are_refused():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort()
        rows = x[order // chosen.shape[1]]
        return x * self.experts[0](rows).sum()

    text = refusal(written(mix))
    assert "adds up rows" in text and "test_raise_experts.py:" in text


def test_an_overwriting_loop_is_refused():
    def mix(self: Any, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            out[token] = expert(x[token]) * weights[token, slot, None]
        return out

    assert "overwrites" in refusal(written(mix))
