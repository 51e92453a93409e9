"""What the tests of kernels in Triton share: an interpreter, and a compiler for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moptrace.kernels import triton_jit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def triton_interpreter() -> Iterator[None]:
    """Triton's kernels can be run; without a GPU, by the interpreter.

    Three things are mended that the interpreter of Triton 3.6 and 3.7 cannot do.
    """
    if not triton_jit.is_available:
        pytest.skip("Triton cannot be imported, so its sources were not run")
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    product, cast = builder.create_dot, builder.cast_impl

    def patch(tensor: Any, scope: Any) -> None:  # NumPy 2.4 makes no int of an array of one number
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(x: Any) -> Any:  # bfloat16 lies there as integers, and would be multiplied as such
        if x.dtype.scalar.name != "bf16":
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def rounded(self: Any, x: Any, dtype: Any) -> Any:  # to bfloat16, as a GPU does: not cut off
        kinds = (x.dtype.scalar.name, dtype.scalar.name)
        if kinds == ("bf16", "fp32"):
            return widen(x)
        if kinds != ("fp32", "bf16"):
            return cast(self, x, dtype)
        data = torch.from_numpy(np.array(x.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(data.view(np.uint16), dtype.scalar)

    # A GPU does not warn of what overflows, either.
    with pytest.MonkeyPatch.context() as patches, np.errstate(all="ignore"):
        patches.setattr(interpreter, "_patch_lang_tensor", patch)
        patches.setattr(
            builder,
            "create_dot",
            lambda self, a, b, *others: product(self, widen(a), widen(b), *others),
        )
        patches.setattr(builder, "cast_impl", rounded)
        yield


_COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for module, name, types, constants in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module(module), name)
    values = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types_of = {key: types.get(key, "*fp32") for key in kernel.arg_names}
    types_of |= dict.fromkeys(values, "constexpr")
    source = ASTSource(kernel, types_of, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert "ptx" in compiled.asm
    print(name)
"""


class Kernel(NamedTuple):
    """A kernel of a module; what is in neither ``types`` nor ``constants`` points to float32."""

    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, Any]


def compiled_for_a_gpu(folder: Path, kernels: list[Kernel]) -> list[str]:
    """The names of the kernels that Triton compiles for a GPU that need not be there.

    Modules may also be files of ``folder``.
    """
    environment = {"PATH": "", "TRITON_CACHE_DIR": str(folder), "HOME": str(folder)}
    command = [sys.executable, "-c", _COMPILE, json.dumps(kernels)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()
