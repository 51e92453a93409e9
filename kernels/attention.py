"""Attention to some of the keys, and how such parts add up to attention to all of them.

A query's attention to a part of the keys is its output there and the log-sum-exp of its scores
there, by which the parts of a sequence merge (``merge_attention``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moptrace.kernels.merge_attention import merge_attention_

__all__ = ["Sight", "Span", "add_attention", "add_gradients", "attention", "nothing_seen"]

TILE = 512  # the queries for which a mask is made at a time

_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? documents, "
    "int? left, int? right, float scale) -> (Tensor, Tensor)"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    left: int | None = None,
    right: int | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, with the log-sum-exp of each query's scores.

    query [B, h, S, d], key and value [B, g, T, d] -> [B, h, S, d] and [B, h, S], h a multiple of g.

    Query i sees the keys from i - ``left`` to i + ``right``, None for all on that side: causal
    attention is ``right=0``, and a sliding window of w tokens ``left=w - 1`` with it. Of these it
    sees the keys of its own document, ``documents`` [B or 1, T] in integers, and those that
    ``mask`` [B or 1, h or 1, S or 1, T] allows, a boolean, or adds a number to that is not trained.
    A query that sees no key gets zeros, and a log-sum-exp of -inf.

    The log-sum-exp is in float32 at least and carries no gradient.

    >>> q = torch.randn(1, 2, 4, 8)
    >>> out, _ = attention(q, q, q, documents=torch.tensor([[0, 0, 1, 1]]), right=0)
    >>> torch.equal(out[:, :, 2], q[:, :, 2])  # the first token of the second document
    True
    """
    return torch.ops.moptrace.attention.default(
        query, key, value, mask, documents, left, right, scale
    )


# --- which keys a query sees ----------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a sequence: ``start``, and those before ``stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return max(self.stop - self.start, 0)

    def of(self, x: Tensor, first: int, dim: int = 2) -> Tensor:
        """These tokens of a tensor that begins with token ``first``."""
        return x.narrow(dim, self.start - first, self.length)


@dataclass(frozen=True)
class Sight:
    """Which keys each query sees, as ``attention`` says; ``first`` is the token of mask row 0."""

    left: int | None = None
    right: int | None = None
    mask: Tensor | None = None
    documents: Tensor | None = None
    first: int = 0

    def keys_of(self, queries: Span, keys: Span) -> Span:
        """Those of the keys that the window of some query reaches."""
        start = keys.start if self.left is None else queries.start - self.left
        stop = keys.stop if self.right is None else queries.stop + self.right
        return Span(max(keys.start, start), min(keys.stop, stop))

    def queries_of(self, queries: Span, keys: Span) -> Span:
        """Those of the queries whose window reaches some key."""
        return Sight(self.right, self.left).keys_of(keys, queries)

    def tiles(self, queries: Span, keys: Span, like: Tensor) -> Iterator[Tile]:
        """Pairs of queries and keys that have all that can be seen, and few others.

        ``like`` is a tensor on their device.
        """
        keys, queries = self.keys_of(queries, keys), self.queries_of(queries, keys)
        if not keys.length or not queries.length:
            return
        if self.mask is None and self.documents is None:
            if self._sees_all(queries, keys):
                yield Tile(queries, keys)
                return
            if self.right == 0 and queries == keys and self._reaches(queries, keys):
                yield Tile(queries, keys, is_causal=True)
                return
        for start in range(queries.start, queries.stop, TILE):
            rows = Span(start, min(start + TILE, queries.stop))
            columns = self.keys_of(rows, keys)
            if columns.length:
                yield Tile(rows, columns, self._allowed(rows, columns, like))

    def _sees_all(self, queries: Span, keys: Span) -> bool:
        ahead = self.right is None or keys.stop - 1 <= queries.start + self.right
        return ahead and self._reaches(queries, keys)

    def _reaches(self, queries: Span, keys: Span) -> bool:
        return self.left is None or keys.start >= queries.stop - 1 - self.left

    def _allowed(self, rows: Span, columns: Span, like: Tensor) -> Tensor | None:
        """The mask of a tile [B or 1, h or 1, S or 1, T]; None where every query sees every key."""
        found = self.mask
        if found is not None:
            found = columns.of(found, 0, 3)
            found = rows.of(found, self.first) if found.shape[2] > 1 else found
        terms: list[Tensor] = []
        if not self._sees_all(rows, columns):
            terms.append(self._window(rows, columns, like))
        if self.documents is not None:
            own, others = (span.of(self.documents, 0, 1) for span in (rows, columns))
            terms.append((own[:, :, None] == others[:, None, :]).unsqueeze(1))
        for term in terms:
            if found is None:
                found = term
            elif found.dtype == torch.bool:
                found = found & term
            else:
                found = torch.where(term, found, -math.inf)
        return found

    def _window(self, rows: Span, columns: Span, like: Tensor) -> Tensor:
        seen = like.new_ones(rows.length, columns.length, dtype=torch.bool)
        apart = rows.start - columns.start
        if self.right is not None:
            seen = seen.tril(self.right + apart)
        if self.left is not None:
            seen = seen.triu(apart - self.left)
        return seen[None, None]


@dataclass(frozen=True)
class Tile:
    """Some queries and some keys, and what each query sees of them: all, earlier ones, a mask."""

    queries: Span
    keys: Span
    mask: Tensor | None = None
    is_causal: bool = False


# --- parts of attention, and of its gradients -----------------------------------------------------


def nothing_seen(query: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of attention to no key, in float32 at least."""
    exact = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:-1], width, dtype=exact)
    return out, query.new_full(query.shape[:-1], -math.inf, dtype=exact)


def add_attention(
    total: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Span,
    keys: Span,
    sight: Sight,
    scale: float,
) -> None:
    """Add attention to these keys to the output and log-sum-exp of attention to others.

    The tensors have the tokens of ``queries`` and of ``keys``, and those of ``total``, which this
    changes, the tokens of ``queries``.
    """
    for tile in sight.tiles(queries, keys, query):
        rows, columns = tile.queries, tile.keys
        of_keys = [columns.of(x, keys.start) for x in (key, value)]
        out, lse = _attention(rows.of(query, queries.start), *of_keys, tile=tile, scale=scale)
        whole, whole_lse = (rows.of(x, queries.start) for x in total)
        merge_attention_(whole, whole_lse, out, lse)


def add_gradients(
    totals: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Span,
    keys: Span,
    sight: Sight,
    scale: float,
) -> None:
    """Add what these keys and queries contribute to their gradients, given attention to all keys.

    ``totals``, which this changes, are the gradients of query, key and value, in float32 at least;
    ``out`` and ``lse`` are the output and log-sum-exp of attention to all keys.
    """
    lse = lse.masked_fill(lse == -math.inf, 0.0)  # no key is seen: every weight is exp(-inf)
    for tile in sight.tiles(queries, keys, query):
        rows, columns = tile.queries, tile.keys
        of_queries = [rows.of(x, queries.start) for x in (gradient, query, out, lse)]
        of_keys = [columns.of(x, keys.start) for x in (key, value)]
        found = _gradients(*of_queries, *of_keys, tile=tile, scale=scale)
        rows.of(totals[0], queries.start).add_(found[0])
        for total, own in zip(totals[1:], found[1:], strict=True):
            columns.of(total, keys.start).add_(own)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, tile: Tile, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp of a tile, both in float32 at least."""
    key, value = (_for_every_head(x, query) for x in (key, value))
    exact = torch.promote_types(query.dtype, torch.float32)
    if _is_fast(query, value):
        mask = _added(tile.mask, query.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            query, key, value, 0.0, tile.is_causal, attn_mask=mask, scale=scale
        )
        if mask is not None:  # torch calls the log-sum-exp of nothing 0
            lse = lse.masked_fill(mask.amax(-1) == -math.inf, -math.inf)
        return out.to(exact), lse.to(exact)
    scores = _scores(query, key, tile, scale)
    lse = scores.logsumexp(-1)
    lowest = lse.clamp_min(torch.finfo(lse.dtype).min)
    return (scores - lowest.unsqueeze(-1)).exp() @ value.to(exact), lse


def _gradients(
    gradient: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    tile: Tile,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a tile contributes to the gradients of query, key and value."""
    groups = key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    key, value = (_for_every_head(x, query) for x in (key, value))
    if _is_fast(query, value):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        mask = _added(tile.mask, query.dtype)
        operands = (gradient.contiguous(), query, key, value, out, lse)
        found = flash(*operands, 0.0, tile.is_causal, attn_mask=mask, scale=scale)
        of_query, of_key, of_value = (x.to(exact) for x in found)
    else:
        weights = (_scores(query, key, tile, scale) - lse.unsqueeze(-1)).exp()
        gradient, out = gradient.to(exact), out.to(exact)
        of_value = weights.transpose(-1, -2) @ gradient
        of_weights = gradient @ value.to(exact).transpose(-1, -2)
        of_scores = weights * (of_weights - (gradient * out).sum(-1, keepdim=True)) * scale
        of_query = of_scores @ key.to(exact)
        of_key = of_scores.transpose(-1, -2) @ query.to(exact)
    of_key, of_value = (
        x.unflatten(1, (groups, -1)).sum(2) if groups != x.shape[1] else x
        for x in (of_key, of_value)
    )
    return of_query, of_key, of_value


def _is_fast(query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for one device takes these: a CPU's, one width for keys and values."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _for_every_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values of grouped heads, once for each of the query's heads."""
    if x.shape[1] == query.shape[1]:
        return x
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What a mask adds to scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)


def _scores(query: Tensor, key: Tensor, tile: Tile, scale: float) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(exact) @ key.to(exact).transpose(-1, -2)) * scale
    if tile.is_causal:
        later = scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    added = _added(tile.mask, exact)
    return scores if added is None else scores + added


# --- on one device --------------------------------------------------------------------------------


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = nothing_seen(query, value.shape[-1])
    spans = Span(0, query.shape[2]), Span(0, key.shape[2])
    sight = Sight(left, right, mask, documents)
    add_attention((out, lse), query, key, value, *spans, sight, scale)
    return out.to(query.dtype), lse


@torch.library.register_fake("moptrace::attention", lib=_LIBRARY)
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:-1], value.shape[-1]),
        query.new_empty(query.shape[:-1], dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, documents, left, right, ctx.scale = inputs
    ctx.sight = Sight(left, right, mask, documents)
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse = ctx.saved_tensors
    of_query, of_key, of_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value))
    spans = Span(0, query.shape[2]), Span(0, key.shape[2])
    totals, given = (of_query, of_key, of_value), (gradient, query, key, value, out, lse)
    add_gradients(totals, *given, *spans, ctx.sight, ctx.scale)
    return *(x.to(query.dtype) for x in totals), *[None] * 5


torch.library.register_autograd(
    "moptrace::attention", _differentiate, setup_context=_save, lib=_LIBRARY
)
