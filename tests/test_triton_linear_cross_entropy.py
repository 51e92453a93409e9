"""The sweeps in Triton do what those in blocks of ATen do.

Without a GPU, Triton's interpreter runs the same sources on the CPU, on small shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moptrace.kernels import linear_cross_entropy as operators
from moptrace.kernels import logit_blocks, reference, selection
from moptrace.kernels import triton_linear_cross_entropy as in_triton
from moptrace.kernels.logit_blocks import LogitGradient, Shard
from triton_kernels import DEVICE, Kernel, compiled_for_a_gpu

pytestmark = pytest.mark.usefixtures("triton_interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shard(
    tokens: int, width: int, words: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Shard:
    torch.manual_seed(0)
    bias = torch.randn(words, device=DEVICE).to(dtype) if options.pop("has_bias", True) else None
    return Shard(
        torch.randn(tokens, width, device=DEVICE).to(dtype),
        torch.randn(words, width, device=DEVICE).to(dtype) / max(width, 1) ** 0.5,
        bias,
        torch.randint(-2, words + 2, (tokens,), device=DEVICE),  # some lie in other shards
        **{"scale": 1.0, "softcap": None, "block_bytes": None} | options,
    )


def sweeps(kernels: Any, own: Shard, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The statistics, and the gradients of random coefficients."""
    found = kernels.statistics(own)
    shift = logit_blocks.shiftable(logit_blocks.statistics(own)[0])
    torch.manual_seed(1)
    coefficients = torch.randn(3, len(own.hidden), device=DEVICE).to(shift.dtype)
    operands = [x for x in (own.hidden, own.weight, own.bias) if x is not None]
    gradients = [torch.full_like(x, torch.nan, dtype=dtype) for x in operands]  # all is written
    asked = gradients if own.bias is not None else [*gradients, None]
    kernels.gradients(own, LogitGradient(shift, *coefficients), *asked)
    return [*found, *gradients]


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 5, 64, 70, 130]),
    width=st.sampled_from([1, 7, 32, 40]),
    words=st.sampled_from([0, 1, 9, 64, 200]),
    has_bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 1.5]),
)
def test_triton_and_blocks_agree(tokens: int, width: int, words: int, **options: Any) -> None:
    own = shard(tokens, width, words, **options)
    for ours, theirs in zip(sweeps(in_triton, own), sweeps(logit_blocks, own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_follow_each_other_are_read_rightly() -> None:
    plain = shard(9, 6, 11)
    spread = Shard(
        plain.hidden.t().contiguous().t(),
        plain.weight.repeat_interleave(2, 1)[:, ::2],
        plain.bias,
        plain.labels.repeat_interleave(2)[::2],
        *(1.0, None, None),
    )
    for ours, theirs in zip(sweeps(in_triton, spread), sweeps(in_triton, plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_weights_gradient_may_be_added_up_for_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = shard(20, 8, 300, torch.float16)
    whole = sweeps(in_triton, own)
    monkeypatch.setattr(in_triton, "_ROW_BYTES", 4 * 8 * 140)  # a tile and a bit
    for ours, theirs in zip(sweeps(in_triton, own), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_tile_is_no_less_exact_than_eager(dtype: torch.dtype, softcap: float | None) -> None:
    own = shard(150, 40, 260, dtype, softcap=softcap, scale=0.8)
    targets = own.labels.clamp(0, 259)
    assert own.bias is not None

    def run(loss: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (own.hidden, own.weight, own.bias)]
        options = {"softcap": softcap, "scale": 0.8, "label_smoothing": 0.1, "z_loss": 0.01}
        result = loss(leaves[0], leaves[1], targets, leaves[2], reduction="none", **options)
        return [result, *torch.autograd.grad(result.sum(), leaves)]

    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(selection.TABLE, "linear_cross_entropy", (selection.Choice("triton"),))
        ours = run(operators.linear_cross_entropy, dtype)
    eager = run(reference.linear_cross_entropy, dtype)
    truth = run(reference.linear_cross_entropy, torch.float64)
    # The order of float32 sums differs; with narrower dtypes, eager rounds the logits, too.
    allowance = 2.0 if dtype is torch.float32 else 1.05
    for found, usual, exact in zip(ours, eager, truth, strict=True):
        assert (found - exact).norm() <= allowance * (usual - exact).norm()


def test_the_gradients_are_the_same_bits_each_time() -> None:
    own = shard(130, 16, 200, torch.bfloat16)
    for once, again in zip(sweeps(in_triton, own), sweeps(in_triton, own), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("factor", [1e3, -1e3])
@pytest.mark.parametrize("words", [64, 70])
def test_large_logits_do_not_overflow(factor: float, words: int) -> None:
    both_signs, one_sign = shard(5, 8, words), shard(5, 8, words)
    both_signs.hidden.mul_(factor)
    assert one_sign.bias is not None
    one_sign.bias.add_(factor)
    for own in (both_signs, one_sign):
        found = sweeps(in_triton, own)
        assert all(x.isfinite().all() for x in found)
        for ours, theirs in zip(found, sweeps(logit_blocks, own), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernels", [in_triton, logit_blocks], ids=["triton", "blocks"])
@pytest.mark.parametrize("tokens", [40, 128])
def test_blocks_with_nothing_but_small_gradients_are_left_out_on_demand(
    kernels: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 240 words only the first 120 are ever likely, and half of the tokens do not count."""
    own = shard(tokens, 8, 240, block_bytes=8 * 64 * min(tokens, 64))
    assert own.bias is not None
    own.bias[120:] = -12.0
    own.labels.clamp_(0, 100)
    lse = logit_blocks.statistics(own)
    shift = lse[0] + lse[1].log()
    of_loss = (torch.arange(tokens, device=DEVICE) % 2).float() * 1e-3  # of a mean
    of_logits = LogitGradient(shift, of_loss, -of_loss, torch.zeros_like(of_loss))

    def run(**options: Any) -> list[Tensor]:
        operands = own.hidden, own.weight, own.bias
        found = [torch.full_like(x, torch.nan) for x in operands if x is not None]
        kernels.gradients(own, of_logits, *found, **options)
        return found

    exact, filtered = run(), run(skip_below=1e-3)
    for whole, part in zip(exact[1:], filtered[1:], strict=True):
        assert whole[128:].all() and not part[128:].any()
        torch.testing.assert_close(part[:120], whole[:120], rtol=1e-6, atol=1e-9)
    assert not torch.equal(filtered[0], exact[0])
    assert (filtered[0] - exact[0]).abs().max() <= 1e-3 * 1e-3 * 120 * own.weight.abs().max()
    for whole, part in zip(exact, run(skip_below=1e-12), strict=True):
        assert torch.equal(whole, part)


def test_filtering_is_an_option_of_the_loss() -> None:
    own = shard(20, 8, 64)
    targets = own.labels.clamp(0, 63)

    def gradient(**options: float) -> Tensor:
        hidden = own.hidden.clone().requires_grad_()
        operators.linear_cross_entropy(hidden, own.weight, targets, **options).backward()
        assert hidden.grad is not None
        return hidden.grad

    assert torch.equal(gradient(skip_below=0.0), gradient())
    assert not gradient(skip_below=2.0).any()  # no gradient of a logit is more than the loss's


@pytest.mark.parametrize("is_exact", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path, is_exact: bool) -> None:
    """Types and shapes that the interpreter lets pass, the compiler does not."""
    types = {"hidden": "*bf16", "weight": "*bf16", "bias": "*bf16", "labels": "*i64"}
    types |= dict.fromkeys(("width", "tokens", "words", "span", "first"), "i32")
    types |= {"scale": "fp32", "softcap": "fp32", "skip_below": "fp32"}
    constants = {"TOKENS": 128, "WORDS": 128, "WIDTH": 64}
    constants |= {"HAS_BIAS": True, "HAS_CAP": True, "HAS_SUMS": True, "IS_EXACT": is_exact}
    kernels = ["_statistics_kernel"] if is_exact else []
    kernels += ["_hidden_kernel", "_weight_kernel"]
    told = [Kernel(in_triton.__name__, name, types, constants) for name in kernels]
    assert compiled_for_a_gpu(tmp_path, told) == kernels
