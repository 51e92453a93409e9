"""The loss over a vocabulary equals the one that is computed from all logits."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from moptrace.kernels import logit_blocks, reference
from moptrace.kernels.linear_cross_entropy import (
    VocabStatistics,
    linear_cross_entropy,
    log_sum_exp,
    loss_from_statistics,
    merge_statistics,
    vocab_shard_gradients,
    vocab_shard_statistics,
)

EXAMPLES = settings.default.max_examples if settings.default else 150
OPERATORS = torch.ops.moptrace
LAYOUTS = ("contiguous", "transposed", "every second", "expanded")


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows, dtype=dtype).t()
    if layout == "every second":
        return torch.randn(rows, 2 * columns, dtype=dtype)[:, ::2]
    if layout == "expanded":
        return torch.randn(1, columns, dtype=dtype).expand(rows, columns)
    return torch.randn(rows, columns, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """A vocabulary, its tokens, and what is asked of their loss."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    softcap: float | None = None
    scale: float = 1.0
    block_bytes: int | None = None
    loss: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def leaves(self) -> list[Tensor]:
        """The operands, with their strides, as new leaves."""
        operands = (self.hidden, self.weight, self.bias)
        return [x.detach().requires_grad_() for x in operands if x is not None]

    @property
    def logits(self) -> dict[str, Any]:
        """How the logits are formed."""
        return {"softcap": self.softcap, "scale": self.scale}

    @property
    def blocks(self) -> dict[str, Any]:
        """The same, and how they are cut."""
        return self.logits | {"block_bytes": self.block_bytes}

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 99)))
    tokens, width, words = draw(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 23)))
    dtype, layouts = torch.float64, st.sampled_from(LAYOUTS)
    ignore_index = draw(st.sampled_from([-100, -1, 0, words + 3]))
    label = st.integers(0, words - 1) | st.just(ignore_index)
    targets = draw(st.lists(label, min_size=tokens, max_size=tokens))
    return Case(
        matrix(tokens, width, draw(layouts), dtype),
        matrix(words, width, draw(layouts), dtype),
        torch.randn(words, dtype=dtype) if draw(st.booleans()) else None,
        torch.tensor(targets, dtype=torch.int64),
        draw(st.sampled_from([None, None, 1.5, 30.0])),
        draw(st.sampled_from([1.0, 0.25, -3.0])),
        draw(st.sampled_from([None, 1, 16, 64, 128, 512, 4096])),
        {
            "ignore_index": ignore_index,
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "z_loss": draw(st.sampled_from([0.0, 0.03])),
        },
    )


def plain_case(tokens: int = 5, words: int = 7, **changes: Any) -> Case:
    torch.manual_seed(0)
    float64 = {"dtype": torch.float64}
    targets = torch.randint(words, (tokens,))
    targets[1:2] = -100
    fields: dict[str, Any] = {
        "hidden": torch.randn(tokens, 3, **float64),
        "weight": torch.randn(words, 3, **float64),
        "bias": torch.randn(words, **float64),
        "targets": targets,
        "block_bytes": 96,
    }
    return Case(**fields | changes)


EVERYTHING: dict[str, Any] = {
    "softcap": 2.0,
    "scale": 0.7,
    "loss": {"label_smoothing": 0.2, "z_loss": 0.05},
}


def whole_loss(case: Case, *leaves: Tensor) -> Tensor:
    hidden, weight, *bias = leaves
    options = case.blocks | case.loss
    return linear_cross_entropy(hidden, weight, case.targets, *bias, reduction="none", **options)


def full_logits_loss(case: Case, *leaves: Tensor) -> Tensor:
    hidden, weight, *bias = leaves
    return reference.linear_cross_entropy(
        hidden, weight, case.targets, *bias, reduction="none", **case.logits, **case.loss
    )


def with_gradients(loss: Callable[..., Tensor], case: Case) -> list[Tensor]:
    """Each token's loss, and the gradients when each counts differently."""
    leaves = case.leaves
    losses = loss(case, *leaves)
    torch.manual_seed(1)
    return [losses, *grad(losses, leaves, torch.randn(len(losses)).to(losses.dtype))]


def assert_equal(found: Any, meant: Any) -> None:
    torch.testing.assert_close(found, meant, rtol=1e-10, atol=1e-12)


# the whole vocabulary


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases())
def test_the_loss_and_its_gradients_equal_the_full_logits_loss(case: Case) -> None:
    assert_equal(with_gradients(whole_loss, case), with_gradients(full_logits_loss, case))


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(case=cases())
def test_a_sum_is_the_sum_of_the_tokens_losses(case: Case) -> None:
    leaves, options = case.leaves, case.blocks | case.loss
    hidden, weight, *bias = leaves
    total = linear_cross_entropy(hidden, weight, case.targets, *bias, **options)
    losses = whole_loss(case, *leaves)
    assert_equal(total, losses.sum())
    assert_equal(grad(total, leaves), grad(losses.sum(), leaves))


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(case=cases())
def test_an_ignored_token_costs_exactly_nothing(case: Case) -> None:
    ignored = torch.full_like(case.targets, case.loss["ignore_index"])
    found = with_gradients(whole_loss, replace(case, targets=ignored))
    assert not any(x.any() for x in found)


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(case=cases())
def test_an_ignored_token_among_others_costs_exactly_nothing(case: Case) -> None:
    leaves = case.leaves
    losses = whole_loss(case, *leaves)
    ignored = case.targets == case.loss["ignore_index"]
    assert not losses[ignored].any()
    assert not grad(losses.sum(), leaves)[0][ignored].any()


def test_the_log_sum_exp_can_be_differentiated_beside_the_loss() -> None:
    case = plain_case(**EVERYTHING)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return OPERATORS.linear_cross_entropy.default(
            hidden, weight, bias, case.targets, -100, 0.2, 2.0, 0.7, 0.05, 96
        )

    assert torch.autograd.gradcheck(both, case.leaves)
    lse = both(*case.leaves)[1]
    statistics = reference.vocab_shard_statistics(
        case.hidden, case.weight, case.targets, case.bias, **case.logits
    )
    assert_equal(lse, log_sum_exp(VocabStatistics(*statistics)))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "every option"])
def test_a_gradient_equals_finite_differences(options: dict[str, Any]) -> None:
    case = plain_case(**options)
    assert torch.autograd.gradcheck(lambda *leaves: whole_loss(case, *leaves), case.leaves)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_only_the_gradients_that_are_needed_are_computed(frozen: tuple[int, ...]) -> None:
    case = plain_case(**EVERYTHING)
    leaves = [x.requires_grad_(i not in frozen) for i, x in enumerate(case.leaves)]
    whole_loss(case, *leaves).sum().backward()
    expected = grad(full_logits_loss(case, *(every := case.leaves)).sum(), every)
    for i, leaf in enumerate(leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_equal(leaf.grad, expected[i])


@pytest.mark.parametrize("block_bytes", [None, 32, 1])
def test_a_word_that_its_bias_rules_out_costs_nothing(block_bytes: int | None) -> None:
    case = plain_case(block_bytes=block_bytes)
    assert case.bias is not None
    case.bias[[0, 1, 2, 6]] = -math.inf  # the first block, and the first shard, have no other words
    case.targets.copy_(torch.tensor([3, 4, 5, 3, -100]))
    meant = with_gradients(full_logits_loss, case)
    assert_equal(with_gradients(whole_loss, case), meant)
    shards = [slice(0, 2), slice(2, 7)]
    assert_equal(with_gradients(functools.partial(sharded_loss, shards), case), meant)


def test_large_logits_do_not_overflow() -> None:
    large = plain_case(hidden=torch.full((5, 3), 1e3), weight=torch.randn(7, 3), bias=None)
    for case in (large, replace(large, weight=-large.weight)):
        found, meant = with_gradients(whole_loss, case), with_gradients(full_logits_loss, case)
        torch.testing.assert_close(found, meant)
        assert all(x.isfinite().all() for x in found)


# shards of the vocabulary


def cut(words: int, cuts: list[float]) -> list[slice]:
    bounds = [0, *sorted(round(c * words) for c in cuts), words]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def shard_statistics(case: Case, rows: slice, *leaves: Tensor) -> VocabStatistics:
    hidden, weight, *bias = leaves
    shard = (weight[rows], case.targets, *(b[rows] for b in bias))
    return vocab_shard_statistics(hidden, *shard, start=rows.start, **case.blocks)


def sharded_loss(shards: list[slice], case: Case, *leaves: Tensor) -> Tensor:
    statistics = [shard_statistics(case, rows, *leaves) for rows in shards]
    merged = functools.reduce(merge_statistics, statistics)
    return loss_from_statistics(merged, case.targets, len(case.weight), **case.loss)


shardings = st.lists(st.floats(0, 1), max_size=4)


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases(), cuts=shardings)
@example(case=plain_case(**EVERYTHING), cuts=[0.0, 0.5, 0.5, 1.0])
def test_shards_merge_to_the_whole_loss_and_its_gradients(case: Case, cuts: list[float]) -> None:
    shards = cut(len(case.weight), cuts)
    found = with_gradients(functools.partial(sharded_loss, shards), case)
    assert_equal(found, with_gradients(full_logits_loss, case))


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases(), cuts=shardings)
@example(case=plain_case(**EVERYTHING), cuts=[0.0, 0.5, 0.5, 1.0])
def test_shards_and_their_gradients_equal_the_reference(case: Case, cuts: list[float]) -> None:
    """As a ring uses them: statistics of each, merged; then each one's gradients, added."""
    tokens, vocab = len(case.targets), len(case.weight)
    operands = [x for x in (case.hidden, case.weight, case.bias) if x is not None]
    shards = cut(vocab, cuts)
    merged = VocabStatistics(*(torch.zeros(tokens, dtype=torch.float64) for _ in range(4)))
    merged = merged._replace(max=torch.full_like(merged.max, -math.inf))  # that of no words
    for rows in shards:
        found = shard_statistics(case, rows, *operands)
        bias = None if case.bias is None else case.bias[rows]
        shard = (case.hidden, case.weight[rows], case.targets, bias)
        meant = reference.vocab_shard_statistics(*shard, start=rows.start, **case.logits)
        assert_equal(found, VocabStatistics(*meant))
        merged = merge_statistics(merged, found)
    torch.manual_seed(1)
    given: dict[str, Any] = {
        name: torch.randn(tokens, dtype=torch.float64) for name in ("of_exp", "of_target", "of_sum")
    }
    given["shift"] = log_sum_exp(merged)
    of_hidden = torch.zeros_like(case.hidden)
    for rows in shards:
        bias = None if case.bias is None else case.bias[rows]
        shard = (case.hidden, case.weight[rows], case.targets, bias)
        found = vocab_shard_gradients(*shard, start=rows.start, **given, **case.blocks)
        meant = reference.vocab_shard_gradients(*shard, start=rows.start, **given, **case.logits)
        assert_equal(list(found)[: len(meant)], list(meant))
        of_hidden += found[0]
    shard = (case.hidden, case.weight, case.targets, case.bias)
    meant = reference.vocab_shard_gradients(*shard, **given, **case.logits)
    assert_equal(of_hidden, meant[0])


@settings(max_examples=EXAMPLES // 5, deadline=None)
@given(case=cases(), cuts=st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_the_order_of_merging_does_not_matter(case: Case, cuts: list[float]) -> None:
    a, b, c = (shard_statistics(case, rows, *case.leaves) for rows in cut(len(case.weight), cuts))
    assert not a.max.requires_grad
    one_way = merge_statistics(merge_statistics(a, b), c)
    assert_equal(merge_statistics(a, merge_statistics(b, c)), one_way)
    assert_equal(merge_statistics(c, merge_statistics(b, a)), one_way)


def test_label_smoothing_and_labels_are_those_of_the_whole_vocabulary() -> None:
    case = plain_case(loss={"label_smoothing": 0.5})
    for target in range(7):
        case = replace(case, targets=torch.full((5,), target))
        shards = [slice(0, 3), slice(3, 3), slice(3, 7)]
        assert_equal(sharded_loss(shards, case, *case.leaves), full_logits_loss(case, *case.leaves))


# registration


def arguments(name: str, case: Case) -> tuple[Any, ...]:
    hidden, weight, *bias = case.leaves
    operands = (hidden, weight, bias[0] if bias else None, case.targets)
    options = (case.scale, case.softcap, case.block_bytes)
    coefficients = [torch.randn(len(hidden), dtype=logit_blocks.exact(hidden.dtype))] * 4
    return {
        "vocab_shard_statistics": (*operands, 2, *options),
        "vocab_shard_gradients": (*operands, *coefficients, 2, *options, None, [True] * 3),
        "linear_cross_entropy": (*operands, -100, 0.2, *options[1::-1], 0.1, options[2]),
        "kept_tokens": (case.targets, len(weight), -100),
    }[name]


NAMES = ("vocab_shard_statistics", "vocab_shard_gradients", "linear_cross_entropy", "kept_tokens")
CASES = {
    "plain": plain_case(),
    "capped": plain_case(**EVERYTHING),
    "without bias": plain_case(bias=None),
    "without tokens": plain_case(0),
    "one token": plain_case(1),
    "transposed": plain_case(hidden=matrix(5, 3, "transposed", torch.float64)),
    "bfloat16": plain_case().to(torch.bfloat16),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_an_operator_is_registered_correctly(name: str, kind: str) -> None:
    tests = ["test_schema", "test_faketensor"]
    if name != "vocab_shard_gradients":  # which is itself a backward, and has none
        tests.append("test_autograd_registration")
        if kind != "bfloat16":  # traced and eager gradients are compared to the last bit
            tests.append("test_aot_dispatch_dynamic")
    operands = arguments(name, CASES[kind])
    if name == "vocab_shard_gradients":
        operands = tuple(x.detach() if isinstance(x, Tensor) else x for x in operands)
    torch.library.opcheck(getattr(OPERATORS, name).default, operands, test_utils=tests)


def test_the_number_of_tokens_may_be_unknown_while_tracing() -> None:
    with FakeTensorMode(shape_env=(environment := ShapeEnv())):
        tokens = environment.create_unbacked_symint()
        torch._check(tokens >= 0)
        hidden = torch.empty(tokens, 4, requires_grad=True)
        weight = torch.empty(9, 4, requires_grad=True)
        targets = torch.empty(tokens, dtype=torch.int64)
        losses = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, reduction="none")
        gradients = grad(losses.sum(), (hidden, weight))
        assert [str(x.shape) for x in gradients] == [str(hidden.shape), str(weight.shape)]
        shard = vocab_shard_statistics(hidden, weight, targets, start=3)
        loss = loss_from_statistics(merge_statistics(shard, shard), targets, 18)
        gradients = grad(loss.sum(), (hidden, weight))
        assert [str(x.shape) for x in gradients] == [str(hidden.shape), str(weight.shape)]


def test_a_traced_backward_holds_two_operators_and_nothing_of_tokens_by_words() -> None:
    case = plain_case(**EVERYTHING)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        leaves = hidden, weight, bias
        return grad(whole_loss(case, *leaves).sum(), leaves)

    graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*case.leaves).graph
    ours = [str(node.target) for node in graph.nodes if "moptrace" in str(node.target)]
    assert ours == [
        "moptrace.linear_cross_entropy.default",
        "moptrace.vocab_shard_gradients.default",
    ]
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert max(math.prod(v.shape) for v in values) < 5 * 7


def test_a_second_derivative_is_refused() -> None:
    case = plain_case()
    leaves = case.leaves
    first = grad(whole_loss(case, *leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        grad(first[0].sum(), leaves)


# precision


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 24, 999), (700, 16, 130), (3, 130, 2500)])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "every option"])
def test_a_block_is_no_less_exact_than_eager(
    dtype: torch.dtype, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    tokens, width, words = shape
    case = Case(
        torch.randn(tokens, width),
        torch.randn(words, width) / width**0.5,
        torch.randn(words),
        torch.randint(words, (tokens,)),
        block_bytes=1 << 16,
        **options,
    ).to(dtype)
    ours, eager = with_gradients(whole_loss, case), with_gradients(full_logits_loss, case)
    truth = with_gradients(full_logits_loss, case.to(torch.float64))
    cotangent_is_rounded = dtype is not torch.float32
    for found, usual, exact in zip(ours, eager, truth, strict=True):
        error, usual_error = (found - exact).norm(), (usual - exact).norm()
        # In float32 the two differ by the order of their sums only. Eager's rounds each token's
        # coefficient to a narrower dtype, too, so there it is less exact, and by far.
        assert error <= (1.0 if cotangent_is_rounded else 1.5) * usual_error
    assert ours[0].dtype == torch.float32
    assert all(g.dtype == dtype for g in ours[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_accumulated_in_float32_over_blocks_and_returned_as_asked(
    dtype: torch.dtype,
) -> None:
    tokens = torch.ones(4096, 1, dtype=dtype)  # bfloat16 adds ones only up to 256
    weight, targets = torch.zeros(2, 1, dtype=dtype), torch.zeros(4096, dtype=torch.int64)
    one, zero = torch.ones(4096), torch.zeros(4096)
    shard = functools.partial(vocab_shard_gradients, tokens, weight, targets, weight[:, 0])
    coefficients = {"shift": zero, "of_exp": one, "of_target": zero, "of_sum": zero}
    for asked in (None, torch.float32, torch.float64):
        found = shard(**coefficients, block_bytes=64, dtype=asked)
        assert all(g.dtype == (asked or dtype) for g in found)
        assert found[1].tolist() == [[4096.0], [4096.0]]
        assert found[2].tolist() == [4096.0, 4096.0]


# memory


def largest_allocations(function: Callable[[], Any]) -> tuple[int, int]:
    """The largest single allocation while a function runs, and the peak of all, in bytes."""
    options = {"profile_memory": True, "acc_events": True}
    with profile(activities=[ProfilerActivity.CPU], **options) as recorded:
        result = function()
    del result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return max(sizes), peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_no_more_logits_exist_at_a_time_than_the_budget_allows(
    dtype: torch.dtype, softcap: float | None
) -> None:
    tokens, width, words, budget = 512, 16, 8192, 1 << 20
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(words, (tokens,))

    def step(loss: Callable[..., Tensor], **options: Any) -> tuple[Tensor, ...]:
        return grad(loss(hidden, weight, targets, softcap=softcap, **options), (hidden, weight))

    blocks = functools.partial(step, linear_cross_entropy, block_bytes=budget)
    blocks()  # the first product on a CPU is timed
    largest, peak = largest_allocations(blocks)
    blocks_held = budget if softcap else budget // 2
    gradients = (tokens + words) * width * dtype.itemsize
    working = 4 * (8 * tokens * width + 20 * tokens)  # tokens in float32, what products return
    assert largest <= max(budget // 2, words * width * dtype.itemsize)
    assert peak <= blocks_held + gradients + working
    everything, _ = largest_allocations(functools.partial(step, reference.linear_cross_entropy))
    assert everything >= tokens * words * dtype.itemsize > 4 * largest


def test_the_smallest_budget_is_one_logit() -> None:
    case = plain_case(block_bytes=1, **EVERYTHING)
    assert_equal(with_gradients(whole_loss, case), with_gradients(full_logits_loss, case))


# what is refused


@pytest.mark.parametrize("label", [7, -1, -101, 2**40])
def test_a_label_that_does_not_exist_is_an_error(label: int) -> None:
    case = plain_case()
    case.targets[3] = label
    message = rf"label {label} of token 3 does not exist: labels lie in \[0, 7\), or are -100"
    with pytest.raises(IndexError, match=message):
        whole_loss(case, *case.leaves)
    with pytest.raises(IndexError, match=message):
        sharded_loss([slice(0, 4), slice(4, 7)], case, *case.leaves)
    with pytest.raises(IndexError):  # as it is for the loss that people know
        functional.cross_entropy(torch.randn(5, 7), case.targets)


def test_operands_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets = (
        torch.randn(3, 4),
        torch.randn(5, 4),
        torch.zeros(3, dtype=torch.int64),
    )
    with pytest.raises(RuntimeError, match="tokens are 4 wide, but rows of the weight 6"):
        linear_cross_entropy(hidden, torch.randn(5, 6), targets)
    with pytest.raises(RuntimeError, match=r"cannot be projected by .* in torch.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), targets)
    with pytest.raises(RuntimeError, match="both are matrices"):
        linear_cross_entropy(hidden.unsqueeze(0), weight, targets)
    with pytest.raises(RuntimeError, match="3 tokens, but 2 labels"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(RuntimeError, match=r"labels are int64 \[N\], not torch.int32"):
        vocab_shard_statistics(hidden, weight, targets.int())
    with pytest.raises(RuntimeError, match="bias has 4 words, but the weight 5"):
        linear_cross_entropy(hidden, weight, targets, torch.randn(4))
    with pytest.raises(RuntimeError, match=r"the bias is \[V\] in torch.float32"):
        linear_cross_entropy(hidden, weight, targets, torch.randn(5).double())
    with pytest.raises(ValueError, match='"sum" or "none", not "mean"'):
        linear_cross_entropy(hidden, weight, targets, reduction="mean")  # type: ignore[arg-type]
