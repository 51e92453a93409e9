"""The operators of moptrace.kernels mean what moptrace.kernels.reference says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

from moptrace.kernels import grouped_mm, reference, routing

NAMES = sorted({*routing.__all__, *grouped_mm.__all__} - {"keep_pairs"})
# The same operators where some pairs have no row, and where some rows are of no pair.
SOME = (
    "dispatch", "pair_rows", "token_rows", "sum_rows", "combine", "weigh_rows", "pair_dots",
)  # fmt: skip
WAYS = NAMES + [f"{name}, {which}" for name in SOME for which in ("some", "slots")]
EXAMPLES = settings.default.max_examples // 5 if settings.default else 30
LAYOUTS = ("contiguous", "transposed", "every second", "expanded")


def operator(name: str) -> Callable[..., Any]:
    name = name.split(",")[0]
    return getattr(routing if name in routing.__all__ else grouped_mm, name)


@dataclass(frozen=True)
class Case:
    """The sizes of one routing, and how its tensors lie in memory."""

    experts: Tensor  # [N, k]
    num_experts: int
    table: Tensor  # [P, C]
    features: tuple[int, ...] = (3,)
    matrix: tuple[int, int] = (3, 5)
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float64

    def float(self, *shape: int) -> Tensor:
        """A differentiable tensor of random numbers in the layout of this case."""
        if self.layout == "transposed":
            x = torch.randn(*reversed(shape), dtype=self.dtype).permute(
                *reversed(range(len(shape)))
            )
        elif self.layout == "every second":
            x = torch.randn(*shape, 2, dtype=self.dtype)[..., 0]
        elif self.layout == "expanded":
            x = torch.randn(*[1] * len(shape), dtype=self.dtype).expand(*shape)
        else:
            x = torch.randn(*shape, dtype=self.dtype)
        return x.requires_grad_()

    def arguments(self, name: str) -> tuple[Any, ...]:
        """What the operator is called with."""
        name, _, which = name.partition(", ")
        if which:
            return self.arguments_of_some(name, which)
        tokens, choices = self.experts.shape
        order = self.experts.flatten().argsort(stable=True)
        counts = torch.bincount(self.experts.flatten(), minlength=self.num_experts)
        pairs, experts = tokens * choices, self.num_experts
        k, n = self.matrix
        make: dict[str, Callable[[], tuple[Any, ...]]] = {
            "dispatch": lambda: (self.float(tokens, *self.features), self.experts, experts),
            "pair_rows": lambda: (self.float(tokens, choices, *self.features), order),
            "token_rows": lambda: (self.float(tokens, *self.features), order, choices),
            "sum_rows": lambda: (self.float(pairs, *self.features), order, tokens, choices),
            "combine": lambda: (
                self.float(pairs, *self.features),
                order,
                self.float(tokens, choices),
            ),
            "weigh_rows": lambda: (
                self.float(tokens, *self.features),
                order,
                self.float(tokens, choices),
            ),
            "pair_dots": lambda: (
                self.float(tokens, *self.features),
                self.float(pairs, *self.features),
                order,
                choices,
            ),
            "group_rows": lambda: (self.float(int(self.table.sum()), *self.features), self.table),
            "ungroup_rows": lambda: (self.float(int(self.table.sum()), *self.features), self.table),
            "grouped_mm": lambda: (self.float(pairs, k), self.float(experts, k, n), counts),
            "grouped_outer": lambda: (self.float(pairs, k), self.float(pairs, n), counts),
            "expert_rows": lambda: (
                self.float(experts, *self.features),
                counts,
                torch.empty(pairs, 1),
            ),
            "group_sum": lambda: (self.float(pairs, *self.features), counts),
        }
        return make[name]()

    def arguments_of_some(self, name: str, which: str) -> tuple[Any, ...]:
        """Every third pair has no row; with slots, each expert has the same number of rows."""
        tokens, choices = self.experts.shape
        pairs = torch.arange(tokens * choices).view(tokens, choices)
        kept = self.experts.masked_fill(pairs % 3 == 0, self.num_experts)
        capacity = int(torch.bincount(kept.flatten()).max()) + 1 if pairs.numel() else 1
        slots = (None, capacity) if which == "slots" else (torch.arange(self.num_experts)[1:], None)
        x = self.float(tokens, *self.features)
        given = (kept, self.num_experts, True, *slots)
        if name == "dispatch":
            return (x, *given)
        _, _, order = reference.dispatch(x.detach(), *given)
        weights = self.float(tokens, choices)
        values, rows = (self.float(n, *self.features) for n in (pairs.numel(), len(order)))
        values = values.detach().view(tokens, choices, *self.features).requires_grad_()
        make: dict[str, tuple[Any, ...]] = {
            "pair_rows": (values, order, True),
            "token_rows": (x, order, choices, True),
            "sum_rows": (rows, order, tokens, choices, True),
            "combine": (rows, order, weights, True),
            "weigh_rows": (x, order, weights, True),
            "pair_dots": (x, rows, order, choices, True),
        }
        return make[name]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(0, 5))
    tokens, choices = draw(st.integers(0, 6)), draw(st.integers(0, 3))
    if not num_experts and choices:
        tokens = 0
    pairs = tokens * choices
    one_expert = st.integers(0, max(num_experts - 1, 0)).map(lambda e: [e] * pairs)
    any_expert = st.lists(st.integers(0, max(num_experts - 1, 0)), min_size=pairs, max_size=pairs)
    sources, local = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    table = draw(st.lists(st.integers(0, 3), min_size=sources * local, max_size=sources * local))
    torch.manual_seed(draw(st.integers(0, 9)))
    return Case(
        torch.tensor(draw(one_expert | any_expert), dtype=torch.int64).view(tokens, choices),
        num_experts,
        torch.tensor(table, dtype=torch.int64).view(sources, local),
        draw(st.sampled_from([(), (3,), (8,), (2, 3), (0,)])),
        draw(st.sampled_from([(3, 5), (8, 4), (1, 1), (4, 0), (0, 4)])),
        draw(st.sampled_from(LAYOUTS)),
    )


def plain_case(**changes: Any) -> Case:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "experts": torch.tensor([[3, 0], [0, 2], [2, 3], [0, 3], [2, 0]]),
        "num_experts": 4,  # expert 1 is chosen by nobody
        "table": torch.tensor([[1, 0, 2], [3, 1, 0]]),
    }
    return Case(**fields | changes)


# A token that chooses nobody: with a capacity there are rows all the same.
NO_CHOICE = plain_case(experts=torch.zeros(1, 0, dtype=torch.int64))


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leaves of their own with the same values and strides."""
    return tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), arguments)


def derivatives(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The results, the gradients of a random and of a constant cotangent, the second order."""
    arguments = copied(arguments)
    inputs = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    results = function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    value, *integers = results
    torch.manual_seed(1)
    cotangent = torch.randn(value.shape, dtype=value.dtype)
    expanded = torch.autograd.grad(value.sum(), inputs, retain_graph=True)
    first = torch.autograd.grad((value.pow(2) * cotangent).sum(), inputs, create_graph=True)
    second = torch.autograd.grad([g.pow(2).sum() for g in first], inputs)
    return [value, *integers, *expanded, *first, *second]


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases())
@example(case=NO_CHOICE)
def test_an_operator_and_its_derivatives_equal_the_reference(name: str, case: Case) -> None:
    arguments = case.arguments(name)
    found = derivatives(operator(name), arguments)
    meant = derivatives(getattr(reference, operator(name).__name__), arguments)
    for ours, theirs in zip(found, meant, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", WAYS)
def test_an_operator_is_registered_correctly(name: str) -> None:
    op = getattr(torch.ops.moptrace, operator(name).__name__).default
    torch.library.opcheck(op, plain_case().arguments(name))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("empty", [True, False])
def test_the_fake_result_is_like_the_real_one(name: str, layout: str, empty: bool) -> None:
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    rowless = {"experts": nothing, "num_experts": 0, "table": nothing} if empty else {}
    arguments = plain_case(layout=layout, **rowless).arguments(name)
    op = getattr(torch.ops.moptrace, operator(name).__name__).default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


# A row of no pair has the values of the first, which is not differentiated: nothing uses it.
FIRSTS = ("dispatch", "pair_rows", "token_rows")


@pytest.mark.parametrize("name", sorted({*WAYS} - {f"{x}, slots" for x in FIRSTS}))
def test_a_gradient_equals_finite_differences(name: str) -> None:
    arguments = plain_case().arguments(name)

    def value(*arguments: Any) -> Tensor:
        results = operator(name)(*arguments)
        return results[0] if isinstance(results, tuple) else results

    assert torch.autograd.gradcheck(value, arguments)
    assert torch.autograd.gradgradcheck(value, arguments)


# numbers


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    k=st.integers(1, 4).map(lambda i: 4 * i) | st.integers(1, 9),
    n=st.integers(1, 4).map(lambda i: 4 * i) | st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
)
def test_torchs_grouped_product_and_the_loop_agree(
    sizes: list[int], k: int, n: int, dtype: torch.dtype, transposed: bool
) -> None:
    counts = torch.tensor(sizes)
    rows = torch.randn(sum(sizes), k, dtype=dtype)
    grad = torch.randn(sum(sizes), n, dtype=dtype)
    weight = torch.randn(len(sizes), k, n, dtype=dtype)
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    eps = torch.finfo(dtype).eps
    product = grouped_mm.grouped_mm(rows, weight, counts)
    exact = reference.grouped_mm(rows.double(), weight.double(), counts).to(dtype)
    torch.testing.assert_close(product, exact, rtol=2 * eps, atol=8 * eps)
    outer = grouped_mm.grouped_outer(rows, grad, counts)
    exact = reference.grouped_outer(rows.double(), grad.double(), counts).to(dtype)
    torch.testing.assert_close(outer, exact, rtol=2 * eps, atol=8 * eps)
    assert product.is_contiguous() and outer.is_contiguous()  # torch pads odd rows to 16 bytes


def block(x: Tensor, experts: Tensor, scores: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """A Mixture-of-Experts layer written with the operators."""
    rows, counts, order = routing.dispatch(x, experts, w.shape[0])
    scaled = rows * routing.pair_rows(scores, order).unsqueeze(1)
    hidden = grouped_mm.grouped_mm(scaled, w, counts) + grouped_mm.expert_rows(b, counts, rows)
    return routing.combine(torch.nn.functional.silu(hidden), order, scores)


def eager_block(x: Tensor, experts: Tensor, scores: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The same layer as people write it."""
    result = x.new_zeros(x.shape[0], w.shape[2])
    for e in range(w.shape[0]):
        token, choice = torch.where(experts == e)
        score = scores[token, choice].unsqueeze(1)
        hidden = torch.nn.functional.silu((x[token] * score) @ w[e] + b[e])
        result = result.index_add(0, token, hidden * score)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 17])
def test_a_block_is_no_less_exact_than_eager(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    experts = torch.rand(1024, 8).topk(3, dim=1).indices
    shapes = [(1024, width), (1024, 3), (8, width, 24), (8, 24)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    cotangent = torch.randn(1024, 24).to(dtype)

    def run(layer: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, scores, w, b = leaves = [v.to(dtype).requires_grad_() for v in inputs]
        result = layer(x, experts, scores, w, b)
        return [result, *torch.autograd.grad(result, leaves, cotangent.to(dtype))]

    exact = run(eager_block, torch.float64)
    for truth, ours, eager in zip(exact, run(block, dtype), run(eager_block, dtype), strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() <= 1.05 * (eager - truth).norm()


@pytest.mark.parametrize("name", ["combine", "weigh_rows"])
def test_mixed_precision_is_formed_in_the_wider_dtype(name: str) -> None:
    a, order, weights = plain_case().arguments(name)
    narrow = a.detach().bfloat16().requires_grad_()
    wide = weights.detach().float().requires_grad_()
    result = operator(name)(narrow, order, wide)
    exact = getattr(reference, name)(narrow.double(), order, wide.double())
    torch.testing.assert_close(result, exact.float(), rtol=1e-6, atol=1e-6)
    of_narrow, of_wide = torch.autograd.grad(result.sum(), (narrow, wide))
    assert (of_narrow.dtype, of_wide.dtype) == (torch.bfloat16, torch.float32)
    truth = torch.autograd.grad(exact.sum(), (narrow, wide))
    torch.testing.assert_close(of_narrow, truth[0])
    torch.testing.assert_close(of_wide, truth[1], rtol=1e-6, atol=1e-6)


def test_a_sum_over_an_experts_rows_is_accumulated_in_float32() -> None:
    rows = torch.ones(4096, 1, dtype=torch.bfloat16)  # stops at 256 if added up in bfloat16
    assert grouped_mm.group_sum(rows, torch.tensor([4096])).item() == 4096
    order = torch.arange(4096)
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert routing.combine(rows, order, ones).item() == 4096


# edges


def test_pairs_of_one_expert_keep_their_order() -> None:
    x = torch.arange(4.0)
    rows, counts, order = routing.dispatch(x, torch.tensor([[1, 0], [0, 1], [1, 3], [3, 0]]), 4)
    assert order.tolist() == [1, 2, 7, 0, 3, 4, 5, 6]
    assert rows.tolist() == [0, 1, 3, 0, 1, 2, 2, 3]
    assert counts.tolist() == [3, 3, 0, 2]


@pytest.mark.parametrize("num_experts", [5, 255, 256, 2**15])
def test_many_pairs_are_sorted_as_few_are(num_experts: int) -> None:
    """From some number of pairs on, a CPU sorts narrower integers; those of no expert, too."""
    experts = torch.randint(num_experts + 1, (40_000, 1))
    _, counts, order = routing.dispatch(torch.zeros(40_000), experts, num_experts, some=True)
    kept = experts.flatten().argsort(stable=True)[: len(order)]
    assert torch.equal(order, kept) and int(counts.sum()) == len(order) < 40_000


def test_rows_from_all_sources_are_grouped_by_expert_and_back() -> None:
    table = torch.tensor([[2, 1], [0, 2]])  # source 0 sends aa b, source 1 sends BB
    rows = torch.tensor([10, 11, 12, 20, 21])
    grouped = routing.group_rows(rows, table)
    assert grouped.tolist() == [10, 11, 12, 20, 21]
    table = torch.tensor([[1, 2], [1, 1]])
    grouped = routing.group_rows(rows, table)
    assert grouped.tolist() == [10, 20, 11, 12, 21]
    assert routing.ungroup_rows(grouped, table).tolist() == rows.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_without_experts_has_empty_results_and_gradients(dtype: torch.dtype) -> None:
    rows = torch.randn(0, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(0, 4, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(0, 8, dtype=dtype, requires_grad=True)
    counts = torch.zeros(0, dtype=torch.int64)
    result = grouped_mm.grouped_mm(rows, weight, counts)
    result = result + grouped_mm.expert_rows(bias, counts, rows)
    assert result.shape == (0, 8)
    gradients = torch.autograd.grad(result.sum(), (rows, weight, bias))
    assert [g.shape for g in gradients] == [(0, 4), (0, 4, 8), (0, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_transposed_weight_lies_as_the_parameter_does(dtype: torch.dtype) -> None:
    parameter = torch.randn(3, 8, 4, dtype=dtype, requires_grad=True)
    rows, counts = torch.randn(5, 4, dtype=dtype), torch.tensor([2, 0, 3])
    product = grouped_mm.grouped_mm(rows, parameter.transpose(1, 2), counts)
    (gradient,) = torch.autograd.grad(product.sum(), parameter)
    assert gradient.is_contiguous()
    assert not gradient[1].any()  # no rows: zero, not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_that_do_not_add_up_are_refused(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(5, 4, dtype=dtype), torch.randn(2, 4, 4, dtype=dtype)
    for counts in (torch.tensor([2, 2]), torch.tensor([2, 4])):
        with pytest.raises(ValueError, match="add up to"):
            grouped_mm.grouped_mm(rows, weight, counts)
        with pytest.raises(ValueError, match="add up to"):
            grouped_mm.grouped_outer(rows, rows, counts)
        with pytest.raises(RuntimeError):
            grouped_mm.expert_rows(weight, counts, rows)
        with pytest.raises(ValueError, match="add up to"):
            grouped_mm.group_sum(rows, counts)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, experts = torch.randn(3, 4), torch.tensor([[0, 1]] * 3)
    with pytest.raises(RuntimeError):
        routing.dispatch(x, experts, 1)  # there is no expert 1
    with pytest.raises(RuntimeError, match="4 tokens"):
        routing.dispatch(torch.randn(4, 4), experts, 2)
    with pytest.raises(RuntimeError, match="7 rows"):
        routing.combine(torch.randn(7, 4), torch.arange(6), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="8 rows"):
        routing.pair_rows(torch.randn(4, 2), torch.arange(6))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="cannot be multiplied"):
        counts = torch.empty(2, dtype=torch.int64)
        grouped_mm.grouped_mm(torch.empty(6, 4), torch.empty(2, 5, 3), counts)


# tracing


@pytest.mark.parametrize("name", NAMES)
def test_a_pre_dispatch_trace_keeps_the_operator_whole(name: str) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    arguments = tree_map_only(Tensor, mode.from_tensor, plain_case().arguments(name))

    def capture(*tensors: Tensor) -> Any:
        with FunctionalTensorMode(pre_dispatch=True, export=True):
            values = iter([FunctionalTensor.to_functional(t) for t in tensors])
            given = [next(values) if isinstance(a, Tensor) else a for a in arguments]
            result = operator(name)(*given)
            return tree_map_only(
                FunctionalTensor, lambda t: torch._from_functional_tensor(t.elem), result
            )

    tensors = [a for a in arguments if isinstance(a, Tensor)]
    with mode:
        graph = make_fx(capture, pre_dispatch=True, _allow_non_fake_inputs=True)(*tensors).graph
    calls = [n.target for n in graph.nodes if "getitem" not in n.name and n.op == "call_function"]
    assert calls == [getattr(torch.ops.moptrace, name).default]


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_rows_may_be_unknown_while_tracing(name: str) -> None:
    """Every operator, forward and backward, on a number of tokens that is an unbacked symbol."""
    with FakeTensorMode(shape_env=(environment := ShapeEnv())) as mode:
        tokens = environment.create_unbacked_symint()
        torch._check(tokens >= 0)
        pairs = tokens * 2
        x = torch.empty(tokens, 4, requires_grad=True)
        rows = torch.empty(pairs, 4, requires_grad=True)
        weights = torch.empty(tokens, 2, requires_grad=True)
        experts = torch.empty(tokens, 2, dtype=torch.int64)
        order, counts = (torch.empty(n, dtype=torch.int64) for n in (pairs, 3))
        table = torch.empty(2, 3, dtype=torch.int64)
        weight = torch.empty(3, 4, 8, requires_grad=True)
        bias = torch.empty(3, 8, requires_grad=True)
    arguments, shape = {
        "dispatch": ((x, experts, 3), (pairs, 4)),
        "pair_rows": ((weights, order), (pairs,)),
        "token_rows": ((x, order, 2), (pairs, 4)),
        "sum_rows": ((rows, order, tokens, 2), (tokens, 4)),
        "combine": ((rows, order, weights), (tokens, 4)),
        "weigh_rows": ((x, order, weights), (pairs, 4)),
        "pair_dots": ((x, rows, order, 2), (tokens, 2)),
        "group_rows": ((rows, table), (pairs, 4)),
        "ungroup_rows": ((rows, table), (pairs, 4)),
        "grouped_mm": ((rows, weight, counts), (pairs, 8)),
        "grouped_outer": ((rows, rows, counts), (3, 4, 4)),
        "expert_rows": ((bias, counts, rows), (pairs, 8)),
        "group_sum": ((rows, counts), (3, 4)),
    }[name]
    inputs = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    inputs = inputs[:1] if name == "expert_rows" else inputs  # its rows only give a size

    def differentiate(*_: Tensor) -> Any:
        result = operator(name)(*arguments)
        result = result[0] if isinstance(result, tuple) else result
        assert all(str(a) == str(b) for a, b in zip(result.shape, shape, strict=True))
        return torch.autograd.grad(result.sum(), inputs)

    with mode:
        gradients = differentiate()
    for gradient, leaf in zip(gradients, inputs, strict=True):
        assert str(gradient.shape) == str(leaf.shape)


def test_the_backward_of_a_block_is_traced_as_whole_operators() -> None:
    with FakeTensorMode() as mode:
        x, scores = torch.empty(6, 4), torch.empty(6, 2)
        experts = torch.empty(6, 2, dtype=torch.int64)
        w, b = torch.empty(3, 5, 4), torch.empty(3, 5)

    def differentiate(*inputs: Tensor) -> tuple[Tensor, ...]:
        x, scores, w, b = leaves = [v.detach().requires_grad_() for v in inputs]
        return torch.autograd.grad(block(x, experts, scores, w.transpose(1, 2), b).sum(), leaves)

    with mode:
        traced = make_fx(differentiate, _allow_non_fake_inputs=True)(x, scores, w, b)
    ours = [n.target._opname for n in traced.graph.nodes if "moptrace" in str(n.target)]
    forward = ["dispatch", "pair_rows", "grouped_mm", "expert_rows", "combine"]
    backward = ["weigh_rows", "pair_dots", "group_sum", "grouped_mm", "grouped_outer", "combine"]
    assert ours[:5] == forward and sorted(ours[5:]) == sorted(backward)
