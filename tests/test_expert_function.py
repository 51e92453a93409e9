"""An expert's function run expert by expert is its graph run over all rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from expert_graphs import FUNCTIONS, Writer, clamped_with_biases, leaves, swiglu
from moptrace.kernels import expert_function as module
from moptrace.kernels import onednn, selection
from moptrace.kernels.expert_function import ExpertFunction, Operand, expert_function

aten, ops = torch.ops.aten, torch.ops.moptrace
COUNTS = ([3, 0, 20, 1, 7], [0, 0, 0, 0, 0], [16, 0, 0, 32, 1])


@pytest.fixture(autouse=True, params=[0, 1 << 40], ids=["expert by expert", "all rows at once"])
def least_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Both ways to run, whatever the number of rows."""
    monkeypatch.setattr(selection, "EXPERTWISE_ROWS", request.param)
    return request.param


every_function = pytest.mark.parametrize("write", FUNCTIONS, ids=lambda f: f.__name__)


def assert_same(
    function: ExpertFunction,
    counts: list[int],
    tolerance: float,
    change: Callable[[list[Tensor]], None] = lambda xs: None,
) -> None:
    """The results and every gradient are those of the graph over all rows."""
    found: list[list[Tensor]] = []
    for run in (function, function.meaning):
        xs = leaves(function, counts)
        change(xs)
        results = run(torch.tensor(counts), *xs)
        results = results if isinstance(results, tuple) else (results,)
        trained = [x for x in xs if x.requires_grad]
        torch.manual_seed(1)
        gradients = [torch.randn_like(y) for y in results]
        found.append([*results, *torch.autograd.grad(results, trained, gradients)])
    for have, want in zip(*found, strict=True):
        assert torch.isfinite(have).all()
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance)


@every_function
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_value_and_the_gradients_are_those_of_the_graph(
    write: Callable[[Writer], ExpertFunction], counts: list[int]
) -> None:
    assert_same(write(Writer(4, 6, torch.float64)), counts, 1e-12)


@every_function
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_that_are_padded_are_in_no_result(
    write: Callable[[Writer], ExpertFunction], counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    assert_same(write(Writer(64, 80, torch.float32)), counts, 3e-3)


def test_bfloat16() -> None:
    assert_same(swiglu(Writer(8, 16, torch.bfloat16)), COUNTS[0], 5e-2)


def test_weights_may_be_frozen_and_rows_need_no_gradient() -> None:
    function = clamped_with_biases(Writer(4, 6, torch.float64))
    for number in range(len(function.operands)):
        for only in (True, False):

            def change(xs: list[Tensor], number: int = number, only: bool = only) -> None:
                for i, x in enumerate(xs):
                    x.requires_grad_((i == number) == only)

            assert_same(function, COUNTS[0], 1e-12, change)


def test_operands_may_lie_in_memory_as_they_like() -> None:
    def strided(xs: list[Tensor]) -> None:
        for i, x in enumerate(xs):
            wide = torch.stack([x.detach(), x.detach()], -1)
            xs[i] = wide[..., 0].requires_grad_()

    assert_same(swiglu(Writer(4, 6, torch.float64)), COUNTS[0], 1e-12, strided)


def test_a_gradient_may_be_expanded() -> None:
    function = swiglu(Writer(4, 6, torch.float64))
    one, other = leaves(function, COUNTS[0]), leaves(function, COUNTS[0])
    counts = torch.tensor(COUNTS[0])
    function(counts, *one).sum().backward()
    function.meaning(counts, *other)[0].sum().backward()
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_derivatives_have_derivatives() -> None:
    function = swiglu(Writer(2, 3, torch.float64))
    counts = torch.tensor([2, 0, 1])
    xs = leaves(function, [2, 0, 1])
    assert torch.autograd.gradgradcheck(lambda *x: function(counts, *x), xs)


def test_nothing_is_kept_where_nothing_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    function = swiglu(Writer(4, 6, torch.float64))
    xs = leaves(function, COUNTS[0])
    monkeypatch.setattr(module._Differentiable, "forward", None)
    with torch.no_grad():
        assert function(torch.tensor(COUNTS[0]), *xs).shape == (31, 4)


def test_what_is_kept_are_the_products_that_gradients_need() -> None:
    function = swiglu(Writer(4, 6, torch.float64))
    arguments = [torch.tensor(COUNTS[0]), *leaves(function, COUNTS[0])]
    with torch.no_grad():
        _, *kept = function.forward(*arguments)
    assert [list(x.shape) for x in kept] == [[31, 12]]


def test_counts_must_add_up_to_the_rows() -> None:
    function = swiglu(Writer(4, 6, torch.float64))
    xs = leaves(function, [2, 1])
    with pytest.raises(ValueError, match="the counts add up to 2, but there are 3 rows"):
        function(torch.tensor([1, 1]), *xs)


def test_sums_over_the_rows_of_all_experts_are_refused() -> None:
    w = Writer(4, 6, torch.float64)
    first = w.linear(w.rows, w.d, w.f)
    share = w(ops.group_sum.default, first, w.counts)
    with pytest.raises(ValueError, match="takes rows and sums over rows"):
        w.made(w.product(first, w(aten.unsqueeze.default, share, -1)))


def test_functions_that_differ_in_an_argument_alone_are_differentiated_apart() -> None:
    """Derivatives are kept by what a graph says, and a number is no operand."""
    counts, rows = torch.tensor([2, 1]), torch.ones(3, 2, dtype=torch.float64)
    weight = torch.ones(2, 2, 1, dtype=torch.float64)
    for power in (1, 2, 3):
        graph = fx.Graph()
        given = [graph.placeholder(name) for name in ("counts", "rows", "weight")]
        product = graph.call_function(module.PRODUCT, (given[1], given[2], given[0]))
        graph.output((graph.call_function(aten.pow.Tensor_Scalar, (product, power)),))
        operands = [Operand("rows", (2,), torch.float64), Operand("experts", (2, 1), torch.float64)]
        leaf = rows.clone().requires_grad_()
        expert_function(graph, operands)(counts, leaf, weight).sum().backward()
        assert leaf.grad is not None and leaf.grad.unique().tolist() == [power * 2 ** (power - 1)]
