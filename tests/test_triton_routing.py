"""Tokens are moved in Triton as they are by ATen, whatever the choices, and bit by bit alike.

Without a GPU, Triton's interpreter runs the same sources on the CPU, on small shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from moptrace.kernels import aten_routing, reference, routing, selection
from moptrace.kernels import triton_routing as in_triton
from test_kernels import NO_CHOICE, WAYS, Case, cases, derivatives, operator, plain_case
from triton_kernels import DEVICE, Kernel, compiled_for_a_gpu

pytestmark = pytest.mark.usefixtures("triton_interpreter")
MOVES = [way for way in WAYS if way.split(",")[0] in routing.__all__]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in routing.__all__:
        monkeypatch.setitem(selection.TABLE, name, (selection.Choice("triton"),))


def on_device(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("way", MOVES)
@settings(max_examples=6, deadline=None)
@given(case=cases())
@example(case=NO_CHOICE)
def test_triton_and_the_reference_agree_to_any_order(way: str, case: Case) -> None:
    arguments = case.arguments(way)
    found = derivatives(operator(way), on_device(arguments))
    meant = derivatives(getattr(reference, operator(way).__name__), arguments)
    for ours, theirs in zip(found, meant, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-10, atol=1e-10)


def routed(tokens: int, choices: int, num_experts: int, width: int) -> Case:
    torch.manual_seed(0)
    experts = torch.rand(tokens, num_experts).topk(choices, dim=1).indices
    table = torch.randint(0, 400, (3, 5))
    return plain_case(experts=experts, num_experts=num_experts, table=table, features=(width,))


@pytest.mark.parametrize("way", MOVES)
def test_what_takes_several_blocks_is_put_together(way: str) -> None:
    """Pairs for many programs, whose experts' runs go on from one to the next; wide rows."""
    case = routed(130, 3, 7, 5 if "group" in way else 700)
    arguments = on_device(case.arguments(way))
    found, meant = operator(way)(*arguments), getattr(reference, operator(way).__name__)
    want = meant(*(a.cpu() if isinstance(a, Tensor) else a for a in arguments))
    pairs = zip(found, want, strict=True) if isinstance(want, tuple) else [(found, want)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["combine", "weigh_rows", "pair_dots"])
def test_a_sum_is_no_less_exact_than_atens(name: str, dtype: torch.dtype) -> None:
    arguments = routed(40, 4, 6, 50).arguments(name)
    low = [
        a.detach().to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a
        for a in arguments
    ]
    high = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in low]
    truth = getattr(aten_routing, name)(*high, False)
    usual = getattr(aten_routing, name)(*low, False)
    found = operator(name)(*on_device(tuple(low))).cpu()
    assert found.dtype == usual.dtype
    allowance = 2.0 if dtype is torch.float32 else 1.05  # the order of sums differs
    assert (found - truth).norm() <= allowance * (usual - truth).norm()


def test_an_expert_that_does_not_exist_is_refused() -> None:
    x = torch.randn(3, 4)
    for wrong in (2, -1):
        with pytest.raises(RuntimeError):
            routing.dispatch(x, torch.tensor([[0, 1], [1, 0], [wrong, 1]]), 2)
    with pytest.raises(RuntimeError):
        routing.dispatch(x, torch.tensor([[0, 1], [1, 0], [3, 1]]), 2, some=True)


def test_pairs_beyond_a_capacity_have_no_row() -> None:
    """The last expert's, too, whose places would lie behind the last row."""
    x, experts = torch.arange(3.0), torch.tensor([[0, 1], [1, 0], [1, 0]])
    rows, counts, order = routing.dispatch(x, experts, 2, some=True, capacity=2)
    assert order.tolist() == [0, 3, 1, 2] and counts.tolist() == [2, 2]
    assert rows.tolist() == [0, 1, 0, 1]


def test_rows_that_are_far_apart_in_memory_are_found() -> None:
    """From 2**31 numbers on, an offset in 32 bits is a negative one."""
    apart = 2**30 + 7
    memory = torch.empty(2 * apart + 4, dtype=torch.bfloat16)  # of which few pages are ever touched
    x = memory.as_strided((3, 4), (apart, 1)).copy_(torch.arange(12.0).view(3, 4))
    order, weights = torch.tensor([2, 0, 1]), torch.ones(3, 1, dtype=torch.bfloat16)
    assert torch.equal(routing.pair_rows(x.unsqueeze(1), order), x[order])
    assert torch.equal(routing.combine(x, order, weights), x[[1, 2, 0]])
    assert torch.equal(routing.pair_dots(x, x, order, 1).view(-1), (x * x[[1, 2, 0]]).sum(1))


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Types and shapes that the interpreter lets pass, the compiler does not."""
    integers = ("total", "rows", "experts", "capacity", "pairs", "choices", "width", "tokens")
    integers += ("row_stride", "column_stride", "token_stride", "row_column_stride", "sources")
    integers += ("source_stride", "expert_stride")
    types = dict.fromkeys(("chosen", "first", "order", "found", "positions", "table"), "*i64")
    types |= dict.fromkeys(("ends", "index"), "*i64") | {"ranks": "*i32", "x": "*bf16"}
    types |= dict.fromkeys(integers, "i32") | {"values": "*bf16", "result": "*bf16"}
    constants: dict[str, Any] = {"OTHERS": 64, "PAIRS": 256, "ROWS": 8, "TOKENS": 8, "WIDTH": 512}
    constants |= {"CELLS": 256, "SHARES": 8, "IS_DOUBLE": False}
    constants |= dict.fromkeys(("HAS_FIRST", "SOME", "HAS_CAPACITY", "HAS_WEIGHTS"), True)
    kernels = [name for name in vars(in_triton) if name.endswith("_kernel")]
    assert len(kernels) == 7
    told = [Kernel(in_triton.__name__, name, types, constants) for name in kernels]
    assert compiled_for_a_gpu(tmp_path, told) == kernels
