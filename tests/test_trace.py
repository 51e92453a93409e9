"""Tracing: the captured program is the model, for every batch, and the model stays as it was."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import models
from moptrace import roles
from moptrace.core import Level, Program
from moptrace.errors import TraceError
from moptrace.trace import CustomFunction, call, evaluate, trace

aten = torch.ops.aten
HUGGING_FACE = [name for name in models.HUGGING_FACE if not name.endswith("batched_mm")]
HAND_WRITTEN = ["LoopSkipEmpty, tied", "LoopMask", "SortSlices", "SortSplit", "OneHotEinsum"]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in named}


def eager_gradients(model: nn.Module, batch: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    model.zero_grad()
    loss, _ = call(model, batch, **options)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def close(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Within 1e-10 of each other's norm; a gradient that is None counts as zero."""
    if ours is None or theirs is None:
        return not any(t is not None and t.any() for t in (ours, theirs))
    return bool((ours - theirs).norm() <= 1e-10 * theirs.norm())


def assert_same_function(program: Program, model: nn.Module, batch: Any, **options: Any) -> None:
    torch.manual_seed(0)  # random operators draw in the order in which the model does
    loss, gradients = eager_gradients(model, batch, **options)
    state = state_of(model)
    torch.manual_seed(0)
    ours = evaluate(program, state, batch)
    ours.loss.backward()
    assert close(ours.loss.detach(), loss)
    for name, gradient in gradients.items():
        assert close(state[name].grad, gradient), name


@cache
def captured(name: str) -> tuple[nn.Module, Program]:
    """A model in float64 and its program; Hugging Face's grouped product is eager there."""
    if name in HAND_WRITTEN:
        model = models.build(name)
        return model, trace(model, models.batch(0))
    family, implementation = name.split(", ")
    # A loop over experts is long; one layer of it will do, except where the first has no experts.
    layers = 1 if implementation == "eager" and family != "deepseek_v3" else 2
    torch.manual_seed(0)
    model = models.hugging_face(family, implementation, num_hidden_layers=layers).double()
    program = trace(model, models.batch(0))
    return eager_experts(model), program


def eager_experts(model: Any) -> Any:
    """The model with experts that torch can compute in float64: it has no grouped product there."""
    model.config._experts_implementation = "eager"
    return model


# The same function


@pytest.mark.parametrize("name", [*HUGGING_FACE, *HAND_WRITTEN])
def test_loss_and_gradients_are_the_models_on_the_traced_and_an_unseen_batch(name: str) -> None:
    model, program = captured(name)
    for seed in (0, 1):
        assert_same_function(program, model, models.batch(seed))


@pytest.mark.parametrize(
    "name", ["mixtral, eager", "LoopSkipEmpty, tied", "LoopMask", "SortSlices"]
)
def test_experts_without_tokens_get_zero_gradients(name: str) -> None:
    model, program = captured(name)
    batch = models.batch(0)
    batch["input_ids"] = torch.full_like(batch["input_ids"], 3)  # alike tokens choose alike
    assert_same_function(program, model, batch)


def test_float32_models_with_the_grouped_product_are_captured_bitwise() -> None:
    model = models.build("mixtral, grouped_mm", dtype=torch.float32)
    program = trace(model, models.batch(0))
    loss, _ = eager_gradients(model, models.batch(1))
    assert evaluate(program, state_of(model), models.batch(1)).loss == loss


def test_the_grouped_product_of_a_float64_model_is_ours() -> None:
    _, program = captured("mixtral, grouped_mm")
    targets = [n.target for n in program.nodes]
    assert targets.count(torch.ops.moptrace.grouped_mm.default) == 4  # two in each of two layers


def test_attention_stays_causal_without_a_mask() -> None:
    _, program = captured("qwen3_moe, grouped_mm")
    attention = [n for n in program.nodes if n.target is aten.scaled_dot_product_attention.default]
    assert len(attention) == 2
    for node in attention:
        _, _, _, mask, _, is_causal = node.args[:6]
        assert mask is None and is_causal


def test_packed_sequences_do_not_see_each_other() -> None:
    model = models.build("mixtral, grouped_mm")

    def packed(seed: int, cut: int) -> dict[str, Tensor]:
        batch = models.batch(seed, length=8)
        positions = torch.cat([torch.arange(cut), torch.arange(8 - cut)])
        return {**batch, "position_ids": positions.expand(2, -1).clone()}

    program = trace(model, packed(0, 3))
    eager_experts(model)
    for cut in (3, 5, 8):
        assert_same_function(program, model, packed(1, cut))


def test_padding_masks_are_followed() -> None:
    model = models.build("mixtral, grouped_mm")
    batch = models.batch(0)
    program = trace(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    eager_experts(model)
    mask = torch.ones_like(batch["input_ids"])
    for _ in range(2):
        assert_same_function(program, model, {**batch, "attention_mask": mask})
        mask = mask.clone()
        mask[1, -2:] = 0


# What a program holds


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_nearly_every_node_knows_its_module_and_source(name: str) -> None:
    model, program = captured(name)
    nodes = [n for n in program.nodes if n.op == "call_function"]
    modules = dict(model.named_modules())
    assert all(roles.role(n).module in modules for n in nodes)
    assert sum(roles.role(n).module != "" for n in nodes) >= 0.95 * len(nodes)
    assert sum("transformers" in str(roles.role(n).source) for n in nodes) >= 0.95 * len(nodes)


@pytest.mark.parametrize("name", [*HUGGING_FACE, *HAND_WRITTEN])
def test_the_graph_is_functional_and_clean(name: str) -> None:
    _, program = captured(name)
    program.graph.lint()
    assert program.level is Level.CAPTURED
    for node in program.nodes:
        if node.op == "output":
            continue
        assert roles.value(node) is not None
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.format_node()
            assert node.target not in (aten.alias.default, aten._assert_tensor_metadata.default)
        assert node.op == "placeholder" or node.users
        assert node.target is not torch._C._set_grad_enabled


def test_the_output_is_rebuilt_as_the_model_returns_it() -> None:
    model, program = captured("olmoe, grouped_mm")
    batch = models.batch(1)
    ours = evaluate(program, state_of(model), batch).output
    theirs = model(**batch, use_cache=False)
    assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
    assert close(ours.logits.detach(), theirs.logits.detach())


def test_graph_inputs_are_named_after_the_model() -> None:
    _, program = captured("mixtral, grouped_mm")
    signature = program.signature
    placeholders = [n.name for n in program.nodes if n.op == "placeholder"]
    assert tuple(placeholders) == signature.names
    first = signature.parameters[0]
    assert (first.name, first.fqn) == ("model_embed_tokens_weight", "model.embed_tokens.weight")
    assert [x.path for x in signature.inputs] == ["input_ids", "labels"]


def test_a_tied_parameter_appears_once_with_its_other_name() -> None:
    model, program = captured("LoopSkipEmpty, tied")
    tied = [p for p in program.signature.parameters if p.aliases]
    assert len(tied) == 1
    assert len(program.signature.parameters) == len(list(model.parameters()))
    assert program.signature.parameter(tied[0].aliases[0]) is tied[0]


# Small models


class Linear(nn.Module):
    """A model of one linear layer; tests subclass it and say how the loss is computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.loss(self.linear(x))

    def loss(self, h: Tensor) -> Any:
        return h.square().mean()


def example(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_loss(function: Callable[[Any, Tensor], Any]) -> Linear:
    return type("Model", (Linear,), {"loss": function})()


@pytest.mark.parametrize(
    "returned",
    [
        lambda self, h: h.mean(),
        lambda self, h: (h.mean(), h),
        lambda self, h: [h.mean(), {"h": h, "none": None, "name": "x", "three": 3}],
        lambda self, h: {"logits": h, "loss": h.mean()},
    ],
)
def test_the_loss_is_a_scalar_or_first_or_named(returned: Callable[..., Any]) -> None:
    model = with_loss(returned)
    program = trace(model, example())
    assert_same_function(program, model, example(1))
    output = evaluate(program, state_of(model), example(1)).output
    ours, spec = pytree.tree_flatten(output)
    theirs, expected = pytree.tree_flatten(model(example(1)))
    assert spec == expected
    for a, b in zip(ours, theirs, strict=True):
        assert close(a, b) if isinstance(b, Tensor) else a == b


def test_objects_that_are_no_tensors_become_none() -> None:
    program = trace(with_loss(lambda self, h: (h.mean(), object())), example())
    assert evaluate(program, state_of(Linear()), example()).output[1] is None


def test_loss_fn_takes_what_forward_does_not() -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    batch = {"input": example(), "target": torch.tensor([0, 2, 1])}
    options = {"loss_fn": lambda output, target: F.cross_entropy(output, target)}
    program = trace(model, batch, **options)
    assert_same_function(program, model, {**batch, "input": example(1)}, **options)
    loss, output = evaluate(program, state_of(model), batch).output
    assert output.shape == (3, 3) and loss.shape == ()


def test_loss_fn_takes_positional_entries_that_are_left() -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    options = {"loss_fn": nn.CrossEntropyLoss()}
    batch = (example(), torch.tensor([0, 2, 1]))
    assert_same_function(trace(model, batch, **options), model, batch, **options)


class Counter(nn.Module):
    """One buffer is written in place, one is assigned, one is only read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("total", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0), persistent=False)
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x) * self.scale
        with torch.no_grad():
            self.total.add_(h.sum(0))
            self.total[0] = 5.0
        self.steps = self.steps + 1
        return h.square().mean() + self.total.mean()


def test_buffer_updates_are_outputs_once() -> None:
    model = Counter()
    program = trace(model, example())
    assert [o.buffer for o in program.signature.outputs if o.buffer] == ["total", "steps"]
    assert [b.persistent for b in program.signature.buffers] == [True, False, True]
    state = state_of(model)
    loss, gradients = eager_gradients(model, example(1))  # this changes the model's buffers
    ours = evaluate(program, state, example(1))
    ours.loss.backward()
    assert close(ours.buffers["total"], model.total) and ours.buffers["steps"] == model.steps == 1
    assert close(ours.loss.detach(), loss)
    assert all(close(state[name].grad, gradient) for name, gradient in gradients.items())


def test_what_is_computed_without_gradients_passes_none_on() -> None:
    def loss(self: Linear, h: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = h * 2
        other = (h * 3).detach_() * h.detach().clone().add_(1)
        return (h * frozen + h.detach() * h + h.data * h + other * h).mean()

    model = with_loss(loss)
    assert_same_function(trace(model, example()), model, example(1))


def test_views_and_slices_written_in_place_are_values() -> None:
    def loss(self: Linear, h: Tensor) -> Tensor:
        out = torch.empty_like(h)
        out[:, :2] = h[:, 2:] * 3
        out[:, 2:].copy_(h[:1, :2].float())
        out.view(-1)[::2].mul_(0.5)
        return out.square().mean()

    model = with_loss(loss)
    assert_same_function(trace(model, example()), model, example(1))


def test_frozen_parameters_stay_frozen() -> None:
    model = Linear()
    model.linear.bias.requires_grad_(False)
    program = trace(model, example())
    assert [p.requires_grad for p in program.signature.parameters] == [True, False]


def test_unchanged_shape_literals_are_kept() -> None:
    program = trace(with_loss(lambda self, h: h.view(-1).mean()), example())
    assert [n.args[1] for n in program.nodes if n.target is aten.view.default] == [[-1]]


# The user's own derivatives


class Sevenfold(torch.autograd.Function):
    """A backward that is deliberately not the derivative of the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int, options: Any) -> tuple[Tensor, Tensor]:
        ctx.factor = factor
        return x * factor, x > 0

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * 7 * ctx.factor, None, None


sevenfold = Sevenfold.apply  # kept before tracing, as users do


@pytest.mark.parametrize("apply", [sevenfold, lambda *args: Sevenfold.apply(*args)])
def test_custom_functions_keep_their_own_backward(apply: Callable[..., Any]) -> None:
    def loss(self: Linear, h: Tensor) -> Tensor:
        y, positive = apply(h, 2, object())
        return torch.where(positive, y, y * 0.5).mean()

    model = with_loss(loss)
    program = trace(model, example())
    assert CustomFunction(Sevenfold) in [n.target for n in program.nodes]
    assert_same_function(program, model, example(1))
    y, _ = Sevenfold.apply(example().requires_grad_(), 2, None)
    assert y.grad_fn is not None  # Function.apply is itself again


def test_phimoe_keeps_the_gradient_of_its_router() -> None:
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        vocab_size=models.VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=32, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = eager_experts(PhimoeForCausalLM(config).double())
    program = trace(model, models.batch(0))
    for seed in (0, 1):
        assert_same_function(program, model, models.batch(seed))
    routers = [n for n in program.nodes if isinstance(n.target, CustomFunction)]
    assert len(routers) == 2  # one for each of the two experts that it chooses


def test_checkpointed_parts_are_captured_once() -> None:
    from torch.utils.checkpoint import checkpoint

    def loss(self: Linear, h: Tensor) -> Tensor:
        for reentrant in (True, False):
            h = checkpoint(lambda x: self.linear(x).sin(), h, use_reentrant=reentrant)
        return h.mean()

    model = with_loss(loss)
    program = trace(model, example())
    assert [n.target for n in program.nodes].count(aten.sin.default) == 2
    assert_same_function(program, model, example(1))


# The model stays as it was


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{key}": (id(value), list(value) if isinstance(value, (dict, list)) else None)
        for path, module in model.named_modules()
        for key, value in vars(module).items()
    } | {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}


class Untidy(Linear):
    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.fail, self.losses = fail, []
        self.register_buffer("count", torch.zeros(()))
        self.register_forward_hook(lambda module, args, output: output * 2)

    def loss(self, h: Tensor) -> Tensor:
        self.count += 1
        self.last = h
        self.losses.append(h.mean())
        self.eval()
        if self.fail:
            raise ValueError("on purpose")
        return self.losses[-1]


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail: bool) -> None:
    model = Untidy(fail)
    before = snapshot(model)
    if fail:
        with pytest.raises(TraceError, match="on purpose"):
            trace(model, example())
    else:
        program = trace(model, example())
        assert_same_function(program, Untidy(fail), example(1))
    assert snapshot(model) == before and model.training and not model.losses


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_parameters_and_batches_need_no_data(kind: str) -> None:
    build = models.HUGGING_FACE["mixtral, grouped_mm"]
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        model = build()
        batch = {"input_ids": torch.empty(2, 5, dtype=torch.int64)}
        batch["labels"] = torch.empty_like(batch["input_ids"])
    assert_same_function(trace(model, batch), build(), models.batch(1))


# Errors: the user's line, the reason, what to change


def line_of(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the line of a function that holds a text."""
    lines, start = inspect.getsourcelines(function)
    number = next(start + i for i, line in enumerate(lines) if text in line)
    return f"{__file__}:{number}"


def sign_branch(self: Linear, h: Tensor) -> Tensor:
    if h.sum() > 0:
        return h.mean()
    return h.square().mean()


def item_branch(self: Linear, h: Tensor) -> Tensor:
    scale = h.max().item()
    return h.mean() * (2 if scale > 1 else 3)


def label_branch(self: Linear, h: Tensor) -> Tensor:
    labels = torch.arange(3) + (h[:, 0] > 0)
    if (labels == 1).any():
        return h.mean()
    return h.sum()


def many_tokens(self: Linear, h: Tensor) -> Tensor:
    chosen = torch.where(h.argmax(-1) == 0)[0]
    if chosen.numel() > 2:
        return h[chosen].mean()
    return h.sum()


def length(self: Linear, h: Tensor) -> Tensor:
    chosen = (h.argmax(-1) == 0).nonzero()
    return h.mean() if len(chosen) else h.sum()


def whole_number(self: Linear, h: Tensor) -> Tensor:
    count = int(torch.bincount(h.argmax(-1), minlength=4)[0])
    return h[:count].mean()


def frozen_write(self: Linear, h: Tensor) -> Tensor:
    with torch.no_grad():
        h.mul_(2)
    return h.mean()


def data_write(self: Linear, h: Tensor) -> Tensor:
    h.data[0].mul_(2)
    return h.mean()


def input_branch(self: Linear, h: Tensor) -> Tensor:
    lengths = self.lengths
    if (lengths == 2).any():  # an integer comparison, but no choice of experts
        return h.mean()
    return h.sum()


@pytest.mark.parametrize(
    ("loss", "line", "reason"),
    [
        (sign_branch, "if h.sum() > 0", "torch.where"),
        (item_branch, "if scale > 1", "torch.where"),
        (label_branch, "if (labels == 1)", "torch.where"),
        (many_tokens, "if chosen.numel() > 2", "torch.where"),
        (length, "if len(chosen)", r"x.shape\[0\]"),
        (whole_number, "int(torch.bincount", "Leave int"),
        (frozen_write, "h.mul_(2)", "autograd does not see"),
        (data_write, "h.data[0].mul_(2)", "autograd does not see"),
        (input_branch, "if (lengths == 2)", "torch.where"),
    ],
)
def test_what_depends_on_data_is_refused_at_its_line(
    loss: Callable[..., Tensor], line: str, reason: str
) -> None:
    with pytest.raises(TraceError, match=reason) as raised:
        model = with_loss(loss)
        model.register_buffer("lengths", torch.arange(3))
        trace(model, example())
    assert line_of(loss, line) in str(raised.value)
    assert raised.value.__cause__ is not None


def write_weight(self: Linear, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.linear.weight.copy_(self.linear.weight.detach() * 2)
    return h.mean()


def autocast(self: Linear, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(h).mean()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda self, h: h, r"the model returned a torch.float64 tensor of shape \[3, 4\]"),
        (lambda self, h: {"logits": h}, "has the entries logits.*loss_fn"),
        (lambda self, h: (h, h.mean()), "the first element that the model returned"),
        (lambda self, h: "loss", "type str"),
        (autocast, r"autocast.*test_trace.py.*bfloat16"),
        (write_weight, "gradients|writes to the parameter linear.weight"),
    ],
)
def test_a_model_that_is_no_training_step_is_refused(
    loss: Callable[..., Any], message: str
) -> None:
    with pytest.raises(TraceError, match=re.compile(message, re.DOTALL)):
        trace(with_loss(loss), example())


def test_the_users_own_error_is_shown_and_chained() -> None:
    with pytest.raises(TraceError, match=r"cannot trace Linear.*same reduction dim") as raised:
        trace(Linear(), example()[:, :3])
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_parameter_that_is_not_registered_is_refused() -> None:
    hidden = nn.Parameter(torch.ones(4, dtype=torch.float64))
    with pytest.raises(TraceError, match=r"nn\.Parameter"):
        trace(with_loss(lambda self, h: (h * hidden).mean()), example())


@pytest.mark.parametrize("batch", [example().tolist(), {"x": example(), "y": 1}, (), "text"])
def test_a_batch_that_does_not_fit_is_refused(batch: Any) -> None:
    with pytest.raises(TraceError):
        trace(Linear(), batch)


def test_another_constant_or_structure_needs_another_trace() -> None:
    class Scaled(Linear):
        def forward(self, x: Mapping[str, Tensor], power: int | None = None) -> Tensor:
            return self.linear(x["a"]).pow(power or 1).mean()

    model = Scaled()
    program = trace(model, {"x": {"a": example()}, "power": 3})
    assert [x.path for x in program.signature.inputs] == ["x.a"]
    with pytest.raises(TraceError, match="power=3"):
        evaluate(program, state_of(model), {"x": {"a": example()}, "power": 2})
    with pytest.raises(TraceError, match="built differently"):
        evaluate(program, state_of(model), {"x": {"a": example()}})
