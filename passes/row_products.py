"""Products with experts' parameters become grouped products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from moptrace.passes.axes import Dims, contraction, is_one, kinds, shape
from moptrace.passes.row_emitter import Emitter, Form, features_of, refusal
from moptrace.passes.stacked_parameters import Nodes

__all__ = ["Products", "broadcast_dims"]

aten = torch.ops.aten
ops = torch.ops.moptrace


@dataclass(frozen=True)
class Factor:
    kind: str
    node: fx.Node
    letters: Sequence[str]


@dataclass
class Products(Emitter):
    """Lowers products; what their operands are, ``lower`` says."""

    def lower(self, nodes: Nodes, dims: Dims, *, finished: bool = False) -> Form:
        raise NotImplementedError

    def product(self, nodes: Nodes, dims: Dims) -> Form:
        """Products with experts' parameters become grouped products."""
        node = nodes[0]
        product = contraction(node)
        assert product is not None
        spaces = dict(zip(product.result, dims, strict=True))
        for x, letters in zip(product.operands, product.letters, strict=True):
            own = self.domains.rows(x)
            if own is not None:
                known = zip(letters, own.dims, strict=True)
                spaces.update({x: s for x, s in known if s and "range" not in kinds((s,))})
        if product.grouped:
            spaces[product.grouped] = (self.routing.expert,)
        factors: list[Factor] = []
        for i, (x, letters) in enumerate(zip(product.operands, product.letters, strict=True)):
            below = tuple(
                () if is_one(n) else spaces.get(letter, ())
                for letter, n in zip(letters, shape(x), strict=True)
            )
            form = self.lower(_product_operand(nodes, i), below)
            free = [letter for letter in letters if not spaces.get(letter)]
            if form.kind == "one":
                continue
            value = self._only(form, letters, free, shape(x))
            factors.append(Factor(form.kind, value, free))
        result = [letter for letter in product.result if not spaces.get(letter)]
        sizes = features_of(node, dims)
        author, self.author = self.author, node
        value = self._product(node, factors, result, sizes)
        if product.bias is not None:
            x = product.bias
            below = broadcast_dims(shape(x), dims)
            members = tuple(contraction(n).bias for n in nodes)  # type: ignore[union-attr]
            form = self.lower(members, below)  # type: ignore[arg-type]
            bias = self.fitted(form, x, dims)
            assert bias is not None
            if form.kind == "experts" and value.kind == "rows":
                bias = self.as_rows(Form("experts", bias), ())
            value = Form(value.kind, self.emit(aten.add.Tensor, value.value, bias))
        self.author = author
        return value

    def _only(
        self,
        form: Form,
        letters: Sequence[str],
        free: Sequence[str],
        sizes: Sequence[int],
    ) -> fx.Node:
        """Drop dimensions of size 1 that stand for a routing axis of the other operands."""
        kept = [n for letter, n in zip(letters, sizes, strict=True) if letter in free]
        lead = [] if form.kind == "plain" else [shape(form.value)[0]]
        return self.reshape(form.value, [*lead, *kept])

    def _product(
        self, node: fx.Node, factors: list[Factor], result: list[str], sizes: Sequence[int]
    ) -> Form:
        weights = [f for f in factors if f.kind == "experts" and len(f.letters) > 1]
        scalars = [f for f in factors if f.kind == "rows" and not f.letters]
        inputs = [f for f in factors if f.kind == "rows" and f.letters]
        others = [f for f in factors if f not in weights and f not in scalars and f not in inputs]
        if not weights and not inputs and not scalars:
            if others and all(f.kind == "plain" for f in others):
                return Form("plain", self._einsum(others, result, ""))
            return Form("rows", self._einsum([self._row_factor(f) for f in others], result, "s"))
        if not inputs and scalars:
            inputs, scalars = scalars, []
        if not weights:
            value = self._einsum([self._row_factor(f) for f in (*inputs, *others)], result, "s")
        elif len(weights) == 1 and len(inputs) == 1 and not others:
            value = self._grouped(node, inputs[0], weights[0], result)
        else:
            raise refusal(
                node, "a product of experts' weights with more than one other factor",
                "multiply each expert's rows by one of its matrices at a time",
            )  # fmt: skip
        value = self.reshape(value, [shape(value)[0], *sizes])
        for scalar in scalars:
            factor = self.reshape(scalar.node, [shape(value)[0], *[1] * len(sizes)])
            value = self.emit(aten.mul.Tensor, value, factor)
        return Form("rows", value)

    def _row_factor(self, factor: Factor) -> Factor:
        if factor.kind == "experts":
            return replace(factor, kind="rows", node=self.as_rows(Form("experts", factor.node), ()))
        return factor

    def _einsum(self, factors: Sequence[Factor], result: Sequence[str], lead: str) -> fx.Node:
        if len(factors) == 1 and list(factors[0].letters) == list(result):
            return factors[0].node
        names = {n: chr(ord("A") + i) for i, n in enumerate(dict.fromkeys(
            letter for f in factors for letter in (*f.letters, *result)
        ))}  # fmt: skip
        sides = [
            (lead if f.kind == "rows" else "") + "".join(names[x] for x in f.letters)
            for f in factors
        ]
        equation = f"{','.join(sides)}->{lead}{''.join(names[x] for x in result)}"
        return self.emit(aten.einsum.default, equation, [f.node for f in factors])

    def _grouped(
        self, node: fx.Node, rows: Factor, weight: Factor, result: Sequence[str]
    ) -> fx.Node:
        """``grouped_mm`` with the contracted features of both flattened in one order."""
        size = dict(zip(weight.letters, shape(weight.node)[1:], strict=True))
        size.update(zip(rows.letters, shape(rows.node)[1:], strict=True))
        inner = [x for x in weight.letters if x in rows.letters and x not in result]
        outer = [x for x in weight.letters if x not in inner]
        rest = [x for x in rows.letters if x not in inner and size[x] != 1]
        if rest or any(x not in result for x in outer if size[x] != 1):
            raise refusal(
                node, "a product that is not one matrix of each expert times its rows",
                "multiply rows [S, K] by one matrix [K, N] of each expert at a time",
            )  # fmt: skip
        outer = [x for x in result if x in outer]
        x = self._ordered(rows, [*(y for y in rows.letters if y not in inner), *inner])
        x = self.reshape(x, [shape(x)[0], math.prod(size[y] for y in inner)])
        w = self._ordered(
            weight, [*inner, *(y for y in weight.letters if y not in (*inner, *outer)), *outer]
        )
        w = self.reshape(
            w, [shape(w)[0], math.prod(size[y] for y in inner), math.prod(size[y] for y in outer)]
        )
        return self.emit(ops.grouped_mm.default, x, w, self.record().counts)

    def _ordered(self, factor: Factor, letters: Sequence[str]) -> fx.Node:
        order = [0, *(1 + list(factor.letters).index(x) for x in letters)]
        if order == sorted(order):
            return factor.node
        moved = [i for i, d in enumerate(order) if i != d]
        if len(moved) == 2:
            return self.emit(aten.transpose.int, factor.node, *moved)
        return self.emit(aten.permute.default, factor.node, order)


def _product_operand(nodes: Nodes, place: int) -> Nodes:
    return tuple(contraction(n).operands[place] for n in nodes)  # type: ignore[union-attr]


def broadcast_dims(sizes: Sequence[Any], result: Dims) -> Dims:
    """The axes of an operand that broadcasts to ``result``."""
    offset = len(result) - len(sizes)
    return tuple(
        () if isinstance(n, int) and n == 1 else result[d + offset] for d, n in enumerate(sizes)
    )
