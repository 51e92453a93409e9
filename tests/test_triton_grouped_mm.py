"""The grouped products in Triton are those of the reference.

Without a GPU, Triton's interpreter runs the same sources on the CPU, on small shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moptrace.kernels import grouped_mm as operators
from moptrace.kernels import reference, selection
from moptrace.kernels import triton_grouped_mm as in_triton
from triton_kernels import DEVICE

pytestmark = pytest.mark.usefixtures("triton_interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [3, 0, 70, 1, 0]

# How a tensor may lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "spread": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "shifted": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "one row": lambda x: x[..., :1, :].expand(x.shape),
}


@pytest.fixture(autouse=True)
def triton_is_chosen() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        for name in ("grouped_mm", "grouped_outer"):
            patches.setitem(selection.TABLE, name, (selection.Choice("triton"),))
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "dense") -> Tensor:
    """Numbers with four bits, whose products are exact in every order of addition."""
    x = torch.randint(-8, 8, shape, device=DEVICE).to(dtype) / 4
    return LAYOUTS[layout](x)


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 63, 64, 65]), min_size=1, max_size=4),
    inside=st.sampled_from([1, 8, 31, 33]),
    outside=st.sampled_from([1, 8, 65]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
)
def test_the_products_are_those_of_the_reference(
    counts: list[int], inside: int, outside: int, dtype: torch.dtype, layouts: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    number = torch.tensor(counts, device=DEVICE)
    rows = random(sum(counts), inside, dtype=dtype, layout=layouts[0])
    weight = random(len(counts), inside, outside, dtype=dtype, layout=layouts[1])
    other = random(sum(counts), outside, dtype=dtype, layout=layouts[2])
    found = operators.grouped_mm(rows, weight, number)
    assert torch.equal(found, reference.grouped_mm(rows.float(), weight.float(), number).to(dtype))
    found = operators.grouped_outer(rows, other, number)
    wanted = reference.grouped_outer(rows.float(), other.float(), number).to(dtype)
    assert torch.equal(found, wanted) and found.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_no_larger_than_eagers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor(COUNTS, device=DEVICE)
    rows = torch.randn(74, 80, device=DEVICE).to(dtype)
    weight = torch.randn(5, 80, 72, device=DEVICE).to(dtype)
    for name, operands in (("grouped_mm", (rows, weight)), ("grouped_outer", (rows, rows))):
        ours = getattr(operators, name)(*operands, counts)
        eager = getattr(reference, name)(*operands, counts)
        exact = getattr(reference, name)(*(x.double() for x in operands), counts)
        # The order of float32 sums differs.
        allowance = 2.0 if dtype is torch.float32 else 1.02
        assert (ours - exact).norm() <= allowance * (eager - exact).norm()


def test_the_operators_are_registered_correctly_and_differentiable() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([2, 0, 3], device=DEVICE)
    rows = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(3, 4, 6, device=DEVICE, requires_grad=True)
    other = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.moptrace.grouped_mm.default, (rows, weight, counts))
    torch.library.opcheck(torch.ops.moptrace.grouped_outer.default, (rows, other, counts))
    found = torch.autograd.grad(
        operators.grouped_mm(rows, weight, counts), (rows, weight), other.detach()
    )
    wanted = torch.autograd.grad(
        reference.grouped_mm(rows, weight, counts), (rows, weight), other.detach()
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0], [5], [0, 64, 0, 65, 1], [1] * 40], ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_every_row_is_in_one_tile_of_its_expert(counts: list[int], size: int) -> None:
    number = torch.tensor(counts, dtype=torch.int64, device=DEVICE)
    tiles = in_triton.row_tiles(number, sum(counts), size)
    found = [(e, row) for e, first, stop in tiles.t().tolist() for row in range(first, stop)[:size]]
    starts = number.cumsum(0) - number
    wanted = [(e, int(starts[e]) + i) for e, n in enumerate(counts) for i in range(n)]
    assert found == wanted


def test_counts_of_more_rows_than_there_are_reach_none_of_them() -> None:
    """A device learns no counts in time to refuse them, but must not write elsewhere."""
    counts = torch.tensor([3, 9], device=DEVICE)
    assert in_triton.row_tiles(counts, 5, 16)[:, :2].tolist() == [[0, 1], [0, 3], [3, 5]]
    whole = random(20, 4)
    outer = in_triton.grouped_outer(whole[:5], whole[:5], counts)
    assert torch.equal(outer[1], whole[3:5].t() @ whole[3:5])


def test_offsets_are_of_64_bits() -> None:
    """Three rows of a tensor with more than 2**31 elements, of which the rest is never touched."""
    width, step = 16, 2**30 + 16
    file = torch.empty(2 * step + width, dtype=torch.float16, device=DEVICE)
    rows = file.as_strided((3, width), (step, 1))
    rows.copy_(random(3, width))
    weight, counts = random(1, width, 8), torch.tensor([3], device=DEVICE)
    assert torch.equal(in_triton.grouped_mm(rows, weight.half(), counts), (rows @ weight[0].half()))
    outer = in_triton.grouped_outer(rows, rows, counts)
    assert torch.equal(outer[0], rows.t().contiguous() @ rows.contiguous())
