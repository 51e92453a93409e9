"""What pointwise operators are in Triton: text, of the texts of their operands.

Operands are float32, or the truth of a comparison, whatever the dtype of the tensors: results are
rounded where they are written to memory and nowhere between. Where ATen passes NaN on, so does the
text.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false
# Triton has no types, and is not there on every machine.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from moptrace.kernels.triton_jit import jit, tl

__all__ = ["POINTWISE", "log1p", "number", "tanh"]

aten = torch.ops.aten


@jit
def tanh(x):
    """By the logistic function, which never overflows; near zero it would lose all digits."""
    square = x * x
    near = x * (
        1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    )
    return tl.where(tl.abs(x) < 0.3, near, 2 * tl.sigmoid(2 * x) - 1)


@jit
def log1p(x):
    near = x * (1 - x * (0.5 - x * (1 / 3 - x * 0.25)))
    return tl.where(tl.abs(x) < 0.01, near, tl.log(1 + x))


def number(value: float | bool) -> str:
    """A number as Triton reads it.

    >>> number(1), number(0.5), number(float("-inf")), number(True)
    ('1.0', '0.5', 'float("-inf")', 'True')
    """
    if isinstance(value, bool):
        return str(value)
    return repr(float(value)) if math.isfinite(value) else f'float("{value}")'


def _add(a: str, b: str, alpha: float = 1) -> str:
    return f"{a} + {b}" if alpha == 1 else f"{a} + {b} * {number(alpha)}"


def _sub(a: str, b: str, alpha: float = 1) -> str:
    return f"{a} - {b}" if alpha == 1 else f"{a} - {b} * {number(alpha)}"


def _rsub(a: str, b: str, alpha: float = 1) -> str:
    return _sub(b, a, alpha)


def _pow(x: str, exponent: str) -> str | None:
    value = float(exponent)
    if value in (0.5, -0.5):
        return f"tl.{'sqrt' if value > 0 else 'rsqrt'}({x})"
    if not value.is_integer() or abs(value) > 8:
        return None
    power = " * ".join([x] * int(abs(value))) or f"{x} * 0.0 + 1.0"
    return power if value >= 0 else f"1.0 / ({power})"


def _clamp(x: str, low: str | None = None, high: str | None = None) -> str:
    if low is not None:
        x = f"tl.where({x} < {low}, {low}, {x})"
    return x if high is None else f"tl.where({x} > {high}, {high}, {x})"


def _extreme(name: str) -> Callable[[str, str], str]:
    return lambda a, b: f"tl.{name}({a}, {b}, propagate_nan=tl.PropagateNan.ALL)"


_HALF_ROOT, _ROOT = math.sqrt(0.5), math.sqrt(2 / math.pi)


def _gelu(x: str, approximate: str = "none") -> str:
    if approximate == "tanh":  # 0.5 * (1 + tanh(y)) is the logistic function of 2 * y
        return f"{x} * tl.sigmoid({2 * _ROOT} * ({x} + 0.044715 * {x} * {x} * {x}))"
    return f"0.5 * {x} * (1 + tl.erf({x} * {_HALF_ROOT}))"


def _gelu_backward(grad: str, x: str, approximate: str = "none") -> str:
    if approximate == "tanh":
        share = f"tl.sigmoid({2 * _ROOT} * ({x} + 0.044715 * {x} * {x} * {x}))"
        slope = f"{2 * _ROOT} * (1 + 3 * 0.044715 * {x} * {x})"
        return f"{grad} * {share} * (1 + {x} * (1 - {share}) * {slope})"
    share = f"0.5 * (1 + tl.erf({x} * {_HALF_ROOT}))"
    return f"{grad} * ({share} + {x} * tl.exp(-0.5 * {x} * {x}) * {_ROOT / 2})"


def _softplus(x: str, beta: str = "1.0", threshold: str = "20.0") -> str:
    return f"tl.where({x} * {beta} > {threshold}, {x}, log1p(tl.exp({x} * {beta})) / {beta})"


def _silu_backward(grad: str, x: str) -> str:
    return f"{grad} * tl.sigmoid({x}) * (1 + {x} * (1 - tl.sigmoid({x})))"


def _leaky_relu(x: str, slope: str = "0.01") -> str:
    return f"tl.where({x} > 0, {x}, {x} * {slope})"


def _leaky_relu_backward(grad: str, x: str, slope: str, of_result: str) -> str:
    return f"tl.where({x} > 0, {grad}, {grad} * {slope})"


def _infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"{a} {sign} {b}"


def _call(name: str) -> Callable[[str], str]:
    return lambda x: f"{name}({x})"


def _same(x: str) -> str:
    return x


# Numbers among the operands come as texts, options (alpha, approximate) as they are. A result of
# None says that these operands have no text.
POINTWISE: dict[Any, Callable[..., str | None]] = {
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.mul.Tensor: _infix("*"),
    aten.mul.Scalar: _infix("*"),
    aten.div.Tensor: _infix("/"),
    aten.div.Scalar: _infix("/"),
    aten.neg.default: lambda x: f"-{x}",
    aten.abs.default: _call("tl.abs"),
    aten.sgn.default: lambda x: f"tl.where({x} > 0, 1.0, tl.where({x} < 0, -1.0, {x}))",
    aten.sign.default: lambda x: f"tl.where({x} > 0, 1.0, tl.where({x} < 0, -1.0, {x}))",
    aten.square.default: lambda x: f"{x} * {x}",
    aten.sqrt.default: _call("tl.sqrt"),
    aten.rsqrt.default: _call("tl.rsqrt"),
    aten.reciprocal.default: lambda x: f"1.0 / {x}",
    aten.exp.default: _call("tl.exp"),
    aten.log.default: _call("tl.log"),
    aten.log1p.default: _call("log1p"),
    aten.erf.default: _call("tl.erf"),
    aten.sin.default: _call("tl.sin"),
    aten.cos.default: _call("tl.cos"),
    aten.pow.Tensor_Scalar: _pow,
    aten.sigmoid.default: _call("tl.sigmoid"),
    aten.sigmoid_backward.default: lambda grad, y: f"{grad} * {y} * (1 - {y})",
    aten.tanh.default: _call("tanh"),
    aten.tanh_backward.default: lambda grad, y: f"{grad} * (1 - {y} * {y})",
    aten.silu.default: lambda x: f"{x} * tl.sigmoid({x})",
    aten.silu_backward.default: _silu_backward,
    aten.gelu.default: _gelu,
    aten.gelu_backward.default: _gelu_backward,
    aten.softplus.default: _softplus,
    aten.relu.default: lambda x: f"tl.where({x} < 0, 0.0, {x})",
    aten.threshold_backward.default: lambda grad, x, at: f"tl.where({x} <= {at}, 0.0, {grad})",
    aten.leaky_relu.default: _leaky_relu,
    aten.leaky_relu_backward.default: _leaky_relu_backward,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda x, high: _clamp(x, None, high),
    aten.maximum.default: _extreme("maximum"),
    aten.minimum.default: _extreme("minimum"),
    aten.where.self: lambda which, a, b: f"tl.where({which}, {a}, {b})",
    aten.logical_and.default: _infix("&"),
    aten.logical_and_.default: _infix("&"),
    aten.logical_or.default: _infix("|"),
    aten.logical_not.default: lambda x: f"{x} == 0",
    aten.bitwise_and.Tensor: _infix("&"),
    aten.bitwise_or.Tensor: _infix("|"),
    aten.bitwise_not.default: lambda x: f"{x} == 0",
    aten._to_copy.default: lambda x, **_: x,
    aten.clone.default: lambda x, **_: x,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.zeros_like.default: lambda x, **_: "0.0",
    aten.ones_like.default: lambda x, **_: "1.0",
    aten.full_like.default: lambda x, value, **_: value,
}
for _name, _sign in {"ge": ">=", "le": "<=", "gt": ">", "lt": "<", "eq": "==", "ne": "!="}.items():
    POINTWISE[getattr(aten, _name).Scalar] = _infix(_sign)
    POINTWISE[getattr(aten, _name).Tensor] = _infix(_sign)
