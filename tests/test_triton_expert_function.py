"""The kernels that are written for an expert's graph compute that graph.

Without a GPU, Triton's interpreter runs the same sources on the CPU, on small shapes.
"""

from __future__ import annotations

import operator as operator_module
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import models
from expert_graphs import (
    FUNCTIONS,
    Writer,
    gate_and_up_apart,
    gathered,
    in_pairs,
    interleaved,
    leaves,
    normalised,
    swiglu,
)
from moptrace import Plan, roles, trace
from moptrace.costs import operations, products
from moptrace.kernels import selection, triton_expert_function, triton_grouped_mm
from moptrace.kernels.expert_function import ExpertFunction
from moptrace.kernels.triton_expert_function import RowKernel
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.default import canonical, sharded
from moptrace.passes.differentiate import differentiate
from triton_kernels import DEVICE, Kernel, compiled_for_a_gpu

pytestmark = pytest.mark.usefixtures("triton_interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

aten, ops = torch.ops.aten, torch.ops.moptrace
PRODUCT, OUTER = ops.grouped_mm.default, ops.grouped_outer.default
COUNTS = [3, 0, 20, 1, 0]

Write = Callable[[Writer], ExpertFunction]
every_function = pytest.mark.parametrize("write", FUNCTIONS, ids=lambda f: f.__name__)


@pytest.fixture(autouse=True)
def triton_is_chosen() -> Iterator[None]:
    tiles = {"ROWS": 16, "COLUMNS": 16, "DEPTH": 16}
    with pytest.MonkeyPatch.context() as patches:
        for name in ("grouped_mm", "grouped_outer"):
            patches.setitem(selection.TABLE, name, (selection.Choice("triton"),))
        patches.setitem(selection.TABLE, "expert_function", (selection.Choice("tiled"),))
        patches.setattr(triton_expert_function, "tile_sizes", lambda *_: tiles)
        yield


def gradients(run: Callable[..., Any], counts: list[int], xs: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of all operands."""
    results = run(torch.tensor(counts, device=DEVICE), *xs)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    of_results = [torch.randn(y.shape, device=DEVICE).to(y.dtype) for y in results]
    trained = [x for x in xs if x.requires_grad]
    return [*results, *torch.autograd.grad(results, trained, of_results)]


def eager(function: ExpertFunction, counts: list[int], xs: list[Tensor]) -> list[Tensor]:
    """The same by the graph, one operator after another."""
    with pytest.MonkeyPatch.context() as patches:
        for name in ("grouped_mm", "grouped_outer"):
            patches.setitem(selection.TABLE, name, (selection.Choice("loop"),))
        return gradients(function.meaning, counts, xs)


def operands(function: ExpertFunction, counts: list[int]) -> list[Tensor]:
    found = leaves(function, counts)
    return [x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in found]


@every_function
def test_the_value_and_the_gradients_are_those_of_the_graph(write: Write) -> None:
    function = write(Writer(20, 24, torch.float32))
    xs = operands(function, COUNTS)
    found = gradients(function, COUNTS, xs)
    for have, want in zip(found, eager(function, COUNTS, xs), strict=True):
        assert have.dtype == want.dtype
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", [swiglu, interleaved], ids=lambda f: f.__name__)
def test_the_error_is_no_larger_than_eagers(write: Write, dtype: torch.dtype) -> None:
    function, counts = write(Writer(48, 40, dtype)), [30, 0, 33, 1]
    xs = operands(function, counts)
    wide = [x.detach().double().requires_grad_() for x in xs]
    ours, theirs = gradients(function, counts, xs), eager(function, counts, xs)
    # The order of float32 sums differs; with narrower dtypes, eager rounds whatever it computes.
    allowance = 2.0 if dtype is torch.float32 else 1.05
    for have, usual, exact in zip(ours, theirs, eager(function, counts, wide), strict=True):
        assert have.dtype == usual.dtype
        assert (have - exact).norm() <= allowance * (usual - exact).norm()


@pytest.mark.parametrize("counts", [[0, 0], [1, 1, 1], [0, 16, 17, 0]], ids=str)
def test_experts_may_have_no_rows_or_few(counts: list[int]) -> None:
    function = interleaved(Writer(3, 5, torch.float32))
    xs = operands(function, counts)
    found = gradients(function, counts, xs)
    for have, want in zip(found, eager(function, counts, xs), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    for gradient, operand in zip(found[1:], function.operands, strict=True):
        if operand.kind == "experts":  # zeros, not what was there before
            assert not gradient[[i for i, n in enumerate(counts) if not n]].any()


@pytest.mark.parametrize(
    "lay",
    [
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.expand(*x.shape) if x.dim() < 2 else x.mT.contiguous().mT,
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["spread", "transposed", "expanded"],
)
def test_operands_may_lie_in_memory_as_they_like(lay: Callable[[Tensor], Tensor]) -> None:
    function, counts = gate_and_up_apart(Writer(6, 7, torch.float32)), [4, 0, 2]
    xs = [lay(x.detach()).requires_grad_() for x in operands(function, counts)]
    same = [x.detach().contiguous().requires_grad_() for x in xs]
    for have, want in zip(
        gradients(function, counts, xs), gradients(function, counts, same), strict=True
    ):
        assert torch.equal(have, want)


def test_the_same_bits_each_time() -> None:
    function = interleaved(Writer(20, 24, torch.bfloat16))
    xs = operands(function, COUNTS)
    for have, want in zip(
        gradients(function, COUNTS, xs), gradients(function, COUNTS, xs), strict=True
    ):
        assert torch.equal(have, want)


def test_rows_are_gathered_where_they_are_multiplied() -> None:
    function = gathered(Writer(20, 24, torch.float32), choices=2)
    assert calls(function.forward) == ["kernel", "product"]
    torch.manual_seed(0)
    xs = operands(function, COUNTS)
    xs[0] = torch.randn(sum(COUNTS) // 2, 20, device=DEVICE, requires_grad=True)
    found = gradients(function, COUNTS, xs)
    for have, want in zip(found, eager(function, COUNTS, xs), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)
    both = calls(function.backward)
    assert "moptrace.token_rows.default" not in both and both.count("kernel") == 2
    with torch.no_grad():
        kept = function.forward(torch.tensor(COUNTS, device=DEVICE), *xs)[1:]
    assert [x.shape[1] for x in kept] == [48], "the products, and no rows"


ROW_SUM = ["aten.sum.dim_IntList", "aten._to_copy.default"]  # of its parts, in float32


# --- what is fused --------------------------------------------------------------------------------


def calls(operator: Any) -> list[str]:
    """The kernels and the operators on rows that a tiled graph has, in order."""
    names = {PRODUCT: "product", OUTER: "outer", ops.group_sum.default: "group_sum"}
    views = (aten.transpose.int, aten.squeeze.dim, operator_module.getitem)
    found = [n.target for n in operator.tiled.graph.nodes if n.op == "call_function"]
    return [
        "kernel" if isinstance(x, RowKernel) else names.get(x, str(x))
        for x in found
        if x not in views
    ]


def test_an_activation_and_its_gradient_are_part_of_the_product_before() -> None:
    function = swiglu(Writer(20, 24, torch.bfloat16))
    assert calls(function.forward) == ["kernel", "product"]
    assert calls(function.backward) == ["kernel", "outer", "product", "outer"]
    (up,) = function.forward.tiled.kernels
    assert [x.name for x in up.nodes] == ["mul", "grouped_mm"] and len(up.sums) == 2
    (down,) = function.backward.tiled.kernels
    assert [x.name for x in down.nodes] == ["cat", "mul"]


@pytest.mark.parametrize("write", [swiglu, interleaved, in_pairs], ids=lambda f: f.__name__)
def test_gate_and_up_may_lie_as_they_like(write: Write) -> None:
    backward = calls(write(Writer(20, 24, torch.float32)).backward)
    assert (backward.count("kernel"), backward.count("product"), backward.count("outer")) == (
        1,
        1,
        2,
    )


def test_what_is_not_kept_is_not_written() -> None:
    function = swiglu(Writer(20, 24, torch.bfloat16))
    alone, _ = function.forward.only([0])
    (up,) = alone.tiled.kernels
    assert [x.name for x in up.nodes] == ["mul"]


def test_a_weight_of_rows_and_its_gradient_are_part_of_products_too() -> None:
    function = interleaved(Writer(20, 24, torch.bfloat16))
    assert calls(function.forward) == ["kernel", "product"]
    found = calls(function.backward)
    assert (found.count("kernel"), found.count("product"), found.count("outer")) == (1, 1, 2)
    assert {*found} == {"kernel", "product", "outer", "group_sum", *ROW_SUM}


def test_two_products_of_the_same_rows_are_one_kernel() -> None:
    function = gate_and_up_apart(Writer(20, 24, torch.bfloat16))
    (up,) = function.forward.tiled.kernels
    assert len(up.weights) == 2 and calls(function.forward) == ["kernel", "product"]


def test_a_sum_over_a_row_divides_kernels() -> None:
    function = normalised(Writer(20, 24, torch.bfloat16))
    assert calls(function.forward) == [
        "kernel",
        "aten.sum.dim_IntList",
        "aten._to_copy.default",
        "kernel",
    ]


def test_columns_that_are_not_there_are_in_no_sum() -> None:
    """A tile is wider than the last columns, and exp(0) is not zero."""
    w = Writer(20, 24, torch.float32)
    powers = w(aten.exp.default, w.linear(w.rows, w.d, w.f))
    share = w(aten.div.Tensor, powers, w(aten.sum.dim_IntList, powers, [1], True))
    function = w.made(w.linear(share, w.f, w.d))
    assert calls(function.forward) == ["kernel", ROW_SUM[0], "kernel"]
    xs = operands(function, COUNTS)
    found = gradients(function, COUNTS, xs)
    for have, want in zip(found, eager(function, COUNTS, xs), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)


def test_an_operator_without_a_text_stays_what_it_was() -> None:
    w = Writer(20, 24, torch.float32)
    hidden = w(aten.cumsum.default, w.linear(w.rows, w.d, w.f), 1)
    function = w.made(w.linear(w(aten.tanh.default, hidden), w.f, w.d))
    assert calls(function.forward) == ["product", "aten.cumsum.default", "kernel"]
    xs = operands(function, COUNTS)
    found = gradients(function, COUNTS, xs)
    for have, want in zip(found, eager(function, COUNTS, xs), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3)


def test_float64_is_left_alone() -> None:
    function = swiglu(Writer(20, 24, torch.float64))
    assert calls(function.forward).count("product") == 2


# --- in a step ------------------------------------------------------------------------------------


def test_every_kernel_is_a_node_of_a_traced_graph() -> None:
    """So that gradients of weights are computed while rows travel."""
    function = swiglu(Writer(20, 24, torch.float32))
    xs = [torch.empty_like(x, device="meta") for x in operands(function, COUNTS)]
    counts = torch.empty(5, dtype=torch.int64, device="meta")
    graph = make_fx(lambda *x: function.forward(*x), tracing_mode="fake")(counts, *xs).graph
    nodes = [x for x in graph.nodes if x.target is PRODUCT or isinstance(x.target, RowKernel)]
    assert [isinstance(x.target, RowKernel) for x in nodes] == [True, False]
    for node in nodes:
        value = node.meta["val"]
        roles.set_value(node, tuple(value) if isinstance(value, list) else value)
    counted = [operations(node, {}) for node in nodes]
    assert counted == [2.0 * sum(COUNTS) * 20 * 48, 2.0 * sum(COUNTS) * 24 * 20]
    assert list(map(products, nodes)) == [2, 1]


def test_a_whole_step_may_be_made_of_kernels() -> None:
    """Printed, and computed again: a forward that runs twice gives what backward needs."""
    model = models.LanguageModel(models.SortSlices, models.Sizes(layers=1))
    captured = trace(model, models.batch(size=12))
    program = sharded(Plan(ep=2, fold_router_weights=True), 2)(canonical()(captured))
    step = differentiate(device="meta")(program)
    kernels = [x.target for x in step.nodes if isinstance(x.target, RowKernel)]
    assert len(kernels) == 4 and kernels[0].__name__ in str(step)
    again = [x.target for x in checkpoint()(step).nodes if roles.role(x).backward]
    first = next(x for x in again if isinstance(x, RowKernel))
    assert [x.name for x in first.nodes] == ["grouped_mm", "grouped_mm_1"], "and no activation"


def test_a_chain_of_many_uses_is_read_once() -> None:
    w = Writer(3, 4, torch.float32)
    hidden = w.linear(w.rows, w.d, w.f)
    for _ in range(40):
        hidden = w(aten.add.Tensor, w(aten.mul.Tensor, hidden, hidden), hidden)
    function = w.made(w.linear(hidden, w.f, w.d))
    assert calls(function.forward) == ["kernel", "product"]
    (kernel,) = function.forward.tiled.kernels
    assert kernel.source.count("\n") < 200


def test_a_kernel_that_gives_less_takes_less() -> None:
    function = interleaved(Writer(20, 24, torch.float32))
    (kernel, *_) = function.backward.tiled.kernels
    assert len(kernel.results) == 3
    torch.manual_seed(0)
    counts = torch.tensor(COUNTS, device=DEVICE)
    shapes = [x.meta["val"].shape[1:] for x in kernel.operands[1:]]
    number = len(kernel.rows)
    firsts = [sum(COUNTS)] * number + [len(COUNTS)] * (len(shapes) - number)
    given = [torch.randn(n, *s, device=DEVICE) for n, s in zip(firsts, shapes, strict=True)]
    whole = kernel(counts, *given)
    for i, wanted in enumerate(whole):
        part, taken = kernel.only([i])
        (found,) = part(*([counts, *given][j] for j in taken))
        assert torch.equal(found, wanted)


# --- for a GPU ------------------------------------------------------------------------------------


def test_the_kernels_compile_for_a_gpu_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Types and shapes that the interpreter lets pass, the compiler does not."""
    monkeypatch.setattr(triton_expert_function, "tile_sizes", triton_grouped_mm.tile_sizes)
    one, two, three = (
        write(Writer(64, 96, torch.bfloat16))
        for write in (interleaved, gate_and_up_apart, normalised)
    )
    kernels = [*one.backward.tiled.kernels, *two.forward.tiled.kernels]
    kernels.append(next(x for x in three.backward.tiled.kernels if x.is_outer))
    told: list[Kernel] = []
    for kernel in kernels:
        name = f"kernel_{len(told)}"
        (tmp_path / f"{name}.py").write_text(kernel.source)
        types = {x: "i32" if "_" in x else "*bf16" for x in kernel.arguments()}
        types |= {f"y{i}": "*fp32" for i, x in enumerate(kernel.results) if x.is_sum}
        types |= {"tiles": "*i64", "counts": "*i64"}
        types |= dict.fromkeys(("number", "rows", "experts"), "i32")
        told.append(Kernel(name, "kernel", types, {**kernel.tile, "EXPERTS": 8}))
    assert compiled_for_a_gpu(tmp_path, [*told, *grouped_kernels()]) == [
        *(["kernel"] * 3), "_product_kernel", "_outer_kernel", "_tiles_kernel"
    ]  # fmt: skip


def grouped_kernels() -> list[Kernel]:
    """Those of the products that stand alone."""
    types = dict.fromkeys(("rows", "weight", "result", "a", "b"), "*bf16")
    types |= {"counts": "*i64", "tiles": "*i64"}
    sizes = ("number", "inside", "outside", "experts", "height", "width")
    steps = ("rows_step", "rows_column", "weight_step", "weight_row", "weight_column")
    types |= dict.fromkeys((*sizes, *steps, "a_step", "a_column", "b_step", "b_column"), "i32")
    constants = {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "EXPERTS": 8}
    constants |= {"HEIGHT": 128, "WIDTH": 128}
    of_outer = types | {"rows": "i32"}
    module = triton_grouped_mm.__name__
    return [
        Kernel(module, "_product_kernel", types, constants),
        Kernel(module, "_outer_kernel", of_outer, constants | {"ROWS": 64}),
        Kernel(module, "_tiles_kernel", of_outer, {"SIZE": 128, "TILES": 16, "EXPERTS": 8}),
    ]
