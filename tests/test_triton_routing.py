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
from triton_kernels import DEVICE, compiled_for_a_gpu

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
