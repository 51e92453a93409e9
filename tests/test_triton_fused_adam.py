"""The update of Adam in Triton is that of torch's fused kernel, and rounds by chance if asked to.

Without a GPU, Triton's interpreter runs the same sources on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moptrace.kernels.fused_adam  # noqa: F401  registers the operator
from moptrace.kernels import selection, triton_fused_adam
from moptrace.kernels.stochastic_rounding import random_bits, round_stochastically
from triton_kernels import DEVICE, Kernel, compiled_for_a_gpu

pytestmark = pytest.mark.usefixtures("triton_interpreter")
ops = torch.ops.moptrace
OPERATORS = ("fused_adam", "fused_adam, by chance")
OPTIONS = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
FLAGS = {"amsgrad": False, "maximize": False, "decoupled": True}


def values(
    shape: tuple[int, ...], *, amsgrad: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A parameter, its gradient, and its moments in the middle of training."""
    torch.manual_seed(0)
    x, grad, mean = (torch.randn(shape, device=DEVICE) for _ in range(3))
    squares = [torch.rand(shape, device=DEVICE) for _ in range(1 + amsgrad)]
    return x.to(dtype), (grad * 1e-2).to(dtype), [m.to(dtype) for m in (mean * 1e-2, *squares)]


def run(
    by: str, x: Tensor, grad: Tensor, moments: list[Tensor], step: float = 7, **options: Any
) -> list[Tensor]:
    """The new values, by one implementation."""
    lr, count = (torch.tensor(float(v), device=DEVICE) for v in (3e-4, step))
    with pytest.MonkeyPatch.context() as patches:
        for operator in OPERATORS:
            patches.setitem(selection.TABLE, operator, (selection.Choice(by),))
        given = OPTIONS | FLAGS | options
        return ops.fused_adam.default(x, grad, moments, count, lr, **given)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(), (0,), (1,), (7,), (40, 30), (1025,), (2, 3, 5)]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
    decoupled=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
    step=st.sampled_from([1, 2, 1000, 10**6]),
)
def test_each_operation_of_triton_is_rounded_once(
    shape: tuple[int, ...], layout: str, amsgrad: bool, **options: Any
) -> None:
    def lie(x: Tensor) -> Tensor:
        if layout == "transposed":
            return x.mT if x.dim() > 1 else x
        return torch.stack([x, x], -1)[..., 0] if layout == "every second" else x

    x, grad, moments = values(shape, amsgrad=amsgrad)
    x, grad, moments = lie(x), lie(grad), [lie(m) for m in moments]
    ours = run("triton", x, grad, moments, amsgrad=amsgrad, **options)
    exact = wide(x, grad, *moments)
    truth = run("torch", exact[0], exact[1], exact[2:], amsgrad=amsgrad, **options)
    # What is subtracted from each other is as large as the operands, and rounded as they are.
    for found, true, old in zip(ours, truth, exact[:1] + exact[2:], strict=True):
        size = torch.maximum(old.abs(), grad.abs())
        assert found.dtype == torch.float32 and found.shape == old.shape
        assert ((found - true).abs() <= 4 * 2**-24 * size + 1e-6 * (true - old).abs()).all()


def as_torch_on_a_gpu(
    x: Any, grad: Any, moments: list[Any], step: int, *, decoupled: bool, maximize: bool
) -> list[Any]:
    """The arithmetic of fused_adam_utils.cuh, in NumPy's float32."""
    f = np.float32
    lr, beta1, beta2 = f(3e-4), f(OPTIONS["beta1"]), f(OPTIONS["beta2"])
    decay, eps = f(OPTIONS["weight_decay"]), f(OPTIONS["eps"])

    def fma(a: Any, b: Any, c: Any) -> Any:  # which the interpreter rounds twice
        return f(f(a * b) + c)

    if maximize:
        grad = -grad
    if decoupled:
        x = fma(-(lr * decay), x, x)
    else:
        grad = fma(x, decay, grad)
    mean = fma(beta1, moments[0], fma(-beta1, grad, grad))
    square = fma(beta2, moments[1], fma(-beta2, grad * grad, grad * grad))
    correction1, correction2 = f(1) - beta1 ** f(step), f(1) - beta2 ** f(step)
    bound = square
    if moments[2:]:
        bound = np.maximum(moments[2], square)
    denominator = np.sqrt(bound) / np.sqrt(correction2) + eps
    return [x - lr / correction1 * mean / denominator, mean, square, *([bound] * len(moments[2:]))]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_float32_is_bit_by_bit_what_torch_does_on_a_gpu(
    amsgrad: bool, decoupled: bool, maximize: bool
) -> None:
    """Without a GPU, that is what its source says, but for what one multiplies and adds in one."""
    options = {"decoupled": decoupled, "maximize": maximize}
    x, grad, moments = values((3_000,), amsgrad=amsgrad)
    ours = run("triton", x, grad, moments, amsgrad=amsgrad, **options)
    if DEVICE == "cuda":
        if torch.__version__ < "2.13":
            pytest.skip("earlier versions of torch's kernel have other arithmetic")
        theirs = run("torch", x, grad, moments, amsgrad=amsgrad, **options)
    else:
        arrays = [v.numpy() for v in (x, grad, *moments)]
        meant = as_torch_on_a_gpu(arrays[0], arrays[1], arrays[2:], 7, **options)
        theirs = [torch.from_numpy(v) for v in meant]
    for found, want in zip(ours, theirs, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_moments_may_have_more_bits_than_the_parameter(by: str) -> None:
    x, grad, moments = values((70,), dtype=torch.float32)
    narrow, slope = x.bfloat16(), grad.bfloat16()
    found = run(by, narrow, slope, moments)
    want = run("torch", narrow.float(), slope.float(), moments)
    assert [v.dtype for v in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(found[0], want[0].bfloat16())
    for ours, theirs in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


# rounding by chance


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, -5])
@pytest.mark.parametrize("offset", [0, 8 * 2**32 - 13])
def test_triton_and_torch_draw_the_same_bits(seed: int, offset: int) -> None:
    x, grad, moments = values((1_500,), dtype=torch.bfloat16)
    grad, moments[0] = grad * 100, moments[0] * 100  # a tenth of what a last bit is worth
    given: dict[str, Any] = {"seed": seed, "offset": offset}
    ours, theirs = (run(by, x, grad, moments, **given)[0] for by in ("triton", "torch"))
    # Before it is rounded, a number differs by a last bit of float32 where products are added.
    assert (ours != theirs).float().mean() < 0.002
    nearest = run("torch", x, grad, moments)[0]
    assert (theirs != nearest).float().mean() > 0.02


def test_the_generator_is_philox() -> None:
    """The authors' answer for a counter and a key of zeros; other bits elsewhere."""
    zero = torch.tensor(0)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert random_bits(0, 8, 0, zero).tolist() == halves
    assert random_bits(3, 4, 0, zero).tolist() == halves[3:7]
    bits = random_bits(0, 40_000, 0, zero)
    for bit in range(16):
        assert abs(float((bits >> bit & 1).double().mean()) - 0.5) < 0.015


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_rounding_is_unbiased_and_a_shard_draws_its_own_part(by: str) -> None:
    count = 4_000
    # A step so small that rounding to the nearest would lose it every time.
    x = torch.ones(count, dtype=torch.bfloat16, device=DEVICE)
    grad, moments = torch.ones_like(x), [torch.ones_like(x), torch.ones_like(x)]
    options: dict[str, Any] = {"weight_decay": 0.0, "step": 10**6}
    assert torch.equal(run(by, x, grad, moments, **options)[0], x)
    new = run(by, x, grad, moments, seed=3, **options)[0]
    mean = float((x - new).float().mean())
    assert abs(mean - 3e-4) < 5 * (3e-4 / 2**8 / count) ** 0.5
    half = count // 2
    parts = [v[half:] for v in (x, grad, *moments)]
    part = run(by, parts[0], parts[1], parts[2:], seed=3, offset=half, **options)[0]
    assert torch.equal(part, new[half:])
    again = run(by, x, grad, moments, seed=3, **options | {"step": 10**6 + 1})[0]
    assert not torch.equal(again, new)


@pytest.mark.parametrize("by", ["triton", "torch"])
def test_what_needs_no_rounding_stays(by: str) -> None:
    special = [0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(special * 50, device=DEVICE)
    x[x.isnan()] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # as on a GPU
    rounded = round_stochastically(x, 1, torch.tensor(1.0))
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    nothing = torch.zeros_like(x)
    new = run(by, x.bfloat16(), nothing, [nothing, nothing], seed=1, weight_decay=0.0)[0]
    torch.testing.assert_close(new, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_wider_moments_do_not_change_what_is_drawn() -> None:
    x, grad, moments = values((1_500,), dtype=torch.bfloat16)
    found = run("torch", x, grad, moments, seed=0)[0]
    assert (run("torch", x, grad, wide(*moments), seed=0)[0] != found).float().mean() < 0.002


def test_only_bfloat16_is_rounded_by_chance() -> None:
    with pytest.raises(ValueError, match="float32"):
        run("torch", *values((3,)), seed=1)


def test_the_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Types and shapes that the interpreter lets pass, the compiler does not."""
    types = {"x": "*bf16", "grad": "*bf16", "total": "i32", "seed": "i32", "offset": "i64"}
    types |= dict.fromkeys(("beta1", "beta2", "weight_decay", "eps"), "fp32")
    constants: dict[str, Any] = {"BLOCK": 1024, "MAXIMIZE": False}
    constants |= dict.fromkeys(("DECAYS", "DECOUPLED", "AMSGRAD", "STOCHASTIC"), True)
    kernel = Kernel(triton_fused_adam.__name__, "_update_kernel", types, constants)
    assert compiled_for_a_gpu(tmp_path, [kernel]) == ["_update_kernel"]
