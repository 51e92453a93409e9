"""Attention to two sets of keys, from attention to each: by ATen and in Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moptrace.kernels import reference, selection, triton_merge_attention
from moptrace.kernels.attention import attention
from moptrace.kernels.merge_attention import merge_attention, merge_attention_
from triton_kernels import DEVICE, Kernel, compiled_for_a_gpu

pytestmark = pytest.mark.usefixtures("triton_interpreter")


@pytest.fixture(autouse=True, params=["aten", "triton"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(selection.TABLE, "merge_attention", (selection.Choice(request.param),))
    return request.param


def parts(
    shape: tuple[int, int, int, int], empty: str = "", dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Two outputs and log-sum-exps; ``empty`` names the parts in which every third sees no key."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for part in "ab":
        out, lse = (torch.randn(s, generator=generator) * 5 for s in (shape, shape[:3]))
        if part in empty:
            sees_none = torch.arange(lse.numel()).view(lse.shape) % 3 == 0
            out[sees_none], lse[sees_none] = 0.0, -torch.inf
        found += [out.to(DEVICE, dtype), lse.to(DEVICE, dtype)]
    return found


@given(
    shape=st.tuples(*[st.integers(0, 3)] * 2, st.sampled_from([0, 1, 7]), st.integers(0, 9)),
    empty=st.sampled_from(["", "a", "b", "ab"]),
)
def test_it_is_what_the_reference_says(shape: tuple[int, int, int, int], empty: str) -> None:
    given = parts(shape, empty)
    for found, meant in zip(
        merge_attention(*given), reference.merge_attention(*given), strict=True
    ):
        torch.testing.assert_close(found, meant, rtol=1e-12, atol=1e-12)


def test_more_tokens_and_columns_than_a_program_has() -> None:
    given = parts((2, 3, 50, 300), "a")
    for found, meant in zip(
        merge_attention(*given), reference.merge_attention(*given), strict=True
    ):
        torch.testing.assert_close(found, meant, rtol=1e-12, atol=1e-12)


def test_parts_of_larger_tensors_are_changed_in_place() -> None:
    given = parts((2, 3, 5, 4))
    meant = reference.merge_attention(*given)
    out, lse = (given[0].new_zeros(shape) for shape in ((5, 3, 8, 2), (2, 3, 11)))
    own, own_lse = out.permute(3, 1, 0, 2)[..., ::2], lse[:, :, ::2][:, :, 1:]
    own.copy_(given[0])
    own_lse.copy_(given[1])
    other = given[2].movedim(2, 0).contiguous().movedim(0, 2)
    merge_attention_(own, own_lse, other, given[3].mT.contiguous().mT)
    torch.testing.assert_close(own, meant[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_lse, meant[1], rtol=1e-12, atol=1e-12)
    assert not out[:, :, 1::2].any() and not lse[:, :, 1::2].any()


@pytest.mark.parametrize("empty", ["", "a"])
def test_float32_is_no_less_exact_than_the_reference_in_it(empty: str) -> None:
    given = parts((1, 2, 40, 16), empty, torch.float32)
    truth = reference.merge_attention(*(x.double() for x in given))
    usual = reference.merge_attention(*given)
    for found, eager, exact in zip(merge_attention(*given), usual, truth, strict=True):
        is_seen = exact.isfinite()
        error, allowed = ((x - exact)[is_seen].norm() for x in (found, eager))
        assert error <= 2 * allowed and torch.equal(found.isfinite(), is_seen)


def test_a_gradient_equals_finite_differences() -> None:
    given = [x.cpu().requires_grad_() for x in parts((1, 2, 3, 4))]
    assert torch.autograd.gradcheck(merge_attention, given)
    assert torch.autograd.gradgradcheck(merge_attention, given)


def test_no_key_gives_no_gradient() -> None:
    given = [x.requires_grad_() for x in parts((1, 1, 6, 2), "ab")]
    out, lse = merge_attention(*given)
    found = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), given)
    is_seen = given[1].isfinite()
    assert all(x.isfinite().all() and not x[~is_seen].any() for x in found)


def test_it_is_registered_correctly() -> None:
    given = [x.requires_grad_() for x in parts((1, 2, 3, 4))]
    torch.library.opcheck(torch.ops.moptrace.merge_attention.default, tuple(given))


def test_parts_of_the_keys_add_up_to_attention_to_all() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 4, dtype=torch.float64) for _ in range(3))
    whole, lse = attention(query, key, value)
    found = attention(query, key[:, :, :4], value[:, :, :4])
    found = merge_attention(*found, *attention(query, key[:, :, 4:], value[:, :, 4:]))
    torch.testing.assert_close(found[0], whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["triton"], indirect=True)
def test_the_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Types and shapes that the interpreter lets pass, the compiler does not."""
    names = triton_merge_attention._merge_kernel.arg_names
    types = {name: "i32" for name in names if name.endswith("_stride")}
    types |= dict.fromkeys(("rows", "heads", "length", "width"), "i32")
    constants: dict[str, Any] = {"ROWS": 32, "WIDTH": 128}
    kernel = Kernel(triton_merge_attention.__name__, "_merge_kernel", types, constants)
    assert compiled_for_a_gpu(tmp_path, [kernel]) == ["_merge_kernel"]
