"""Operators that move tokens: to their experts, between ranks' orders, and back.

Every operator is registered in the ``moptrace`` namespace with a fake implementation, and with a
backward made of operators that have a backward themselves, so derivatives exist to any order and
their graph reads like the forward's. ``moptrace.kernels.reference`` says what each means. N tokens
choose k experts each, so there are S = N*k rows; D and F are any number of trailing dimensions.

With ``some=True`` not every pair of a token and its choice has a row, and not every row is one of a
pair: S is any number, and ``order`` says N*k for a row without a pair. A pair without a row adds
nothing, here or to a gradient; what is computed on a row without a pair is not used. Such a row has
the values of the first pair rather than zeros: what a model computes of a token is finite, where it
may divide by a norm of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moptrace.kernels import aten_routing, triton_routing
from moptrace.kernels.selection import choose

__all__ = [
    "combine",
    "dispatch",
    "group_rows",
    "keep_pairs",
    "pair_dots",
    "pair_rows",
    "sum_rows",
    "token_rows",
    "ungroup_rows",
    "weigh_rows",
]

# Library.define costs two thirds of what custom_op does at every call, and is the same node.
_LIBRARY = torch.library.Library("moptrace", "FRAGMENT")
_LIBRARY.define(
    "dispatch(Tensor x, Tensor experts, SymInt num_experts, bool some=False, "
    "Tensor? numbers=None, SymInt? capacity=None) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "keep_pairs(Tensor experts, Tensor? scores, SymInt num_experts, SymInt capacity, "
    "int[] groups=[]) -> (Tensor, Tensor)"
)
_LIBRARY.define("pair_rows(Tensor values, Tensor order, bool some=False) -> Tensor")
_LIBRARY.define("token_rows(Tensor x, Tensor order, int choices, bool some=False) -> Tensor")
_LIBRARY.define(
    "sum_rows(Tensor rows, Tensor order, SymInt tokens, int choices, bool some=False) -> Tensor"
)
_LIBRARY.define("combine(Tensor rows, Tensor order, Tensor weights, bool some=False) -> Tensor")
_LIBRARY.define("weigh_rows(Tensor x, Tensor order, Tensor weights, bool some=False) -> Tensor")
_LIBRARY.define(
    "pair_dots(Tensor x, Tensor rows, Tensor order, SymInt choices, bool some=False) -> Tensor"
)
_LIBRARY.define("group_rows(Tensor rows, Tensor table) -> Tensor")
_LIBRARY.define("ungroup_rows(Tensor rows, Tensor table) -> Tensor")


_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton_routing, "aten": aten_routing}


def _implementation(operator: str, x: Tensor) -> Any:
    return _IMPLEMENTATIONS[choose(operator, x)]


def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    some: bool = False,
    numbers: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once for each expert it chose, and order the copies by expert.

    x [N, *D], experts int64 [N, k] -> rows [S, *D], counts int64 [E], order int64 [S].

    With ``some``, the number E says that a pair has no row; ``numbers``, consecutive numbers of
    experts, leaves out the pairs of all others, and those of ``counts``; and ``capacity`` makes as
    many rows for each expert, so that S does not depend on the choices.

    Requires: every entry of ``experts`` lies in [0, num_experts), or is E with ``some``; no expert
    has more pairs than ``capacity``.
    Ensures: row i is the pair ``order[i]`` = n*k + j of token n and its choice j; pairs of the same
    expert keep their order; ``counts[e]`` rows belong to expert e.
    """
    return torch.ops.moptrace.dispatch.default(x, experts, num_experts, some, numbers, capacity)


def keep_pairs(
    experts: Tensor,
    scores: Tensor | None,
    num_experts: int,
    capacity: int,
    groups: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Keep at most ``capacity`` pairs of each expert; the others get the number ``num_experts``.

    experts int64 [N, k], scores [N, k] or None -> int64 [N, k], counts int64 [E].

    Pairs with the highest scores are kept, and of equal scores those that come first; without
    scores, those that come first. Scores count in float32, so that equal tokens have equal ones
    where float64 sums were taken in another order. With ``groups`` this holds for each group of
    tokens alone. They are pairs of numbers, (parts, blocks), each of which splits every one of
    ``blocks`` equal pieces of the tokens into parts, and later ones split the parts further.

    Requires: the numbers of ``groups`` divide N.
    Ensures: ``counts[e]`` pairs chose expert e, kept or not.
    """
    return torch.ops.moptrace.keep_pairs.default(experts, scores, num_experts, capacity, groups)


def pair_rows(values: Tensor, order: Tensor, some: bool = False) -> Tensor:
    """Bring one value for each pair into the order of the rows.

    values [N, k, *F], order [S] -> [S, *F].
    """
    return torch.ops.moptrace.pair_rows.default(values, order, some)


def token_rows(x: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    """Copy each token once for each of its pairs: the rows of a ``dispatch`` that gave ``order``.

    x [N, *D], order [S], choices = k -> [S, *D].
    """
    return torch.ops.moptrace.token_rows.default(x, order, choices, some)


def sum_rows(rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool = False) -> Tensor:
    """Add up each token's rows, in float32 at least: the transpose of ``token_rows``.

    rows [S, *D], order [S], tokens = N, choices = k -> [N, *D].
    """
    return torch.ops.moptrace.sum_rows.default(rows, order, tokens, choices, some)


def combine(rows: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    """Sum each token's rows with its weights.

    rows [S, *D], order [S], weights [N, k] -> [N, *D].

    Ensures: the product is formed in, and the result has, the dtype that the two promote to.
    """
    return torch.ops.moptrace.combine.default(rows, order, weights, some)


def weigh_rows(x: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    """Copy each token once for each of its pairs, times the pair's weight: ``combine``'s transpose.

    x [N, *D], order [S], weights [N, k] -> [S, *D]. A row without a pair is zero.
    """
    return torch.ops.moptrace.weigh_rows.default(x, order, weights, some)


def pair_dots(x: Tensor, rows: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    """Multiply each token with each of its rows, as dot products: ``combine``'s other transpose.

    x [N, *D], rows [S, *D], order [S], choices = k -> [N, k].
    """
    return torch.ops.moptrace.pair_dots.default(x, rows, order, choices, some)


def group_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (source, expert) to (expert, source).

    rows [S, *D], table int64 [P, C] -> [S, *D].

    Requires: ``table[p, c]`` rows came from source p for expert c; they add up to S.
    """
    return torch.ops.moptrace.group_rows.default(rows, table)


def ungroup_rows(rows: Tensor, table: Tensor) -> Tensor:
    """Reorder rows from (expert, source) back to (source, expert): undo ``group_rows``.

    rows [S, *D], table int64 [P, C] -> [S, *D].
    """
    return torch.ops.moptrace.ungroup_rows.default(rows, table)


# dispatch


@torch.library.impl(_LIBRARY, "dispatch", "CompositeExplicitAutograd")
def _(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    some: bool = False,
    numbers: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tokens(x, experts)
    run = _implementation("dispatch", x).dispatch
    return run(x, experts, num_experts, some, numbers, capacity)


@torch.library.register_fake("moptrace::dispatch", lib=_LIBRARY)
def _(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    some: bool = False,
    numbers: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_tokens(x, experts)
    size = num_experts if numbers is None else numbers.shape[0]
    rows: Any = experts.shape[0] * experts.shape[1]
    if capacity is not None:
        rows = size * capacity
    elif some:
        rows = torch.library.get_ctx().new_dynamic_size()
    order = experts.new_empty(rows)
    return x.new_empty(rows, *x.shape[1:]), experts.new_empty(size), order


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.pairs, ctx.some = inputs[1].shape, inputs[3]
    ctx.set_materialize_grads(False)  # no zeros for the integers


def _differentiate_dispatch(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 5
    if grad is None:
        return None, *nothing
    (order,) = ctx.saved_tensors
    return combine(grad, order, grad.new_ones(ctx.pairs), ctx.some), *nothing


torch.library.register_autograd(
    "moptrace::dispatch", _differentiate_dispatch, setup_context=_save_dispatch, lib=_LIBRARY
)


# keep_pairs


@torch.library.impl(_LIBRARY, "keep_pairs", "CompositeExplicitAutograd")
def _(
    experts: Tensor,
    scores: Tensor | None,
    num_experts: int,
    capacity: int,
    groups: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    pairs = experts.flatten()
    total = pairs.shape[0]
    order = torch.arange(total, device=pairs.device)
    if scores is not None:
        order = scores.flatten().float().argsort(stable=True, descending=True)
    queue = pairs  # one for each expert, in each group
    if groups:
        group = _groups(experts.shape[0], groups, pairs.device)
        queue = pairs + num_experts * group.repeat_interleave(experts.shape[1])
    order = order.index_select(0, queue.index_select(0, order).argsort(stable=True))
    sorted_ = queue.index_select(0, order)
    first = torch.searchsorted(sorted_, sorted_)
    late = torch.arange(total, device=pairs.device) - first >= capacity
    dropped = torch.empty_like(late).scatter_(0, order, late)
    counts = pairs.new_zeros(num_experts).scatter_add_(0, pairs, torch.ones_like(pairs))
    return pairs.masked_fill(dropped, num_experts).view(experts.shape), counts


def _groups(tokens: int, groups: Sequence[int], device: torch.device) -> Tensor:
    """The group of each token."""
    at = torch.arange(tokens, device=device)
    number, lengths = torch.zeros_like(at), dict[int, int]()
    for parts, blocks in zip(groups[::2], groups[1::2], strict=True):
        length = lengths.get(blocks, tokens // blocks)
        lengths[blocks] = part = length // parts
        _check(part * parts == length, lambda: f"{groups} do not divide {tokens} tokens")
        number = number * parts + at % max(length, 1) // max(part, 1)
    return number


@torch.library.register_fake("moptrace::keep_pairs", lib=_LIBRARY)
def _(
    experts: Tensor,
    scores: Tensor | None,
    num_experts: int,
    capacity: int,
    groups: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    if scores is not None:
        _check_tokens(scores, experts)
    return experts.new_empty(experts.shape), experts.new_empty(num_experts)


# pair_rows


@torch.library.impl(_LIBRARY, "pair_rows", "CompositeExplicitAutograd")
def _(values: Tensor, order: Tensor, some: bool = False) -> Tensor:
    if not some:
        _check_order(order, values.shape[0] * values.shape[1])
    return _implementation("pair_rows", values).pair_rows(values, order, some)


@torch.library.register_fake("moptrace::pair_rows", lib=_LIBRARY)
def _(values: Tensor, order: Tensor, some: bool = False) -> Tensor:
    if not some:
        _check_order(order, values.shape[0] * values.shape[1])
    return values.new_empty(order.shape[0], *values.shape[2:])


def _save_pair_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.shape, ctx.some = inputs[0].shape, inputs[2]


def _differentiate_pair_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (order,) = ctx.saved_tensors
    if not ctx.some:
        return grad.new_empty(grad.shape).index_copy(0, order, grad).view(ctx.shape), None, None
    pairs = ctx.shape[0] * ctx.shape[1]
    gathered = grad.new_zeros(pairs + 1, *grad.shape[1:]).index_copy(0, order, grad)
    return gathered[:pairs].view(ctx.shape), None, None


torch.library.register_autograd(
    "moptrace::pair_rows", _differentiate_pair_rows, setup_context=_save_pair_rows, lib=_LIBRARY
)


# token_rows and sum_rows


@torch.library.impl(_LIBRARY, "token_rows", "CompositeExplicitAutograd")
def _(x: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    return _implementation("token_rows", x).token_rows(x, order, choices, some)


@torch.library.register_fake("moptrace::token_rows", lib=_LIBRARY)
def _(x: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    return x.new_empty(order.shape[0], *x.shape[1:])


def _save_token_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, order, ctx.choices, ctx.some = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(order)


def _differentiate_token_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (order,) = ctx.saved_tensors
    return sum_rows(grad, order, ctx.tokens, ctx.choices, ctx.some), None, None, None


torch.library.register_autograd(
    "moptrace::token_rows", _differentiate_token_rows, setup_context=_save_token_rows, lib=_LIBRARY
)


@torch.library.impl(_LIBRARY, "sum_rows", "CompositeExplicitAutograd")
def _(rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool = False) -> Tensor:
    return _implementation("sum_rows", rows).sum_rows(rows, order, tokens, choices, some)


@torch.library.register_fake("moptrace::sum_rows", lib=_LIBRARY)
def _(rows: Tensor, order: Tensor, tokens: int, choices: int, some: bool = False) -> Tensor:
    return rows.new_empty(tokens, *rows.shape[1:])


def _save_sum_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, ctx.tokens, ctx.choices, ctx.some = inputs
    ctx.save_for_backward(order)


def _differentiate_sum_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (order,) = ctx.saved_tensors
    ones = grad.new_ones(ctx.tokens, ctx.choices)
    return weigh_rows(grad, order, ones, ctx.some), None, None, None, None


torch.library.register_autograd(
    "moptrace::sum_rows", _differentiate_sum_rows, setup_context=_save_sum_rows, lib=_LIBRARY
)


# combine, weigh_rows and pair_dots: the three derivatives of one trilinear form,
# the sum over n and j of weights[n, j] * <x[n], rows[position of pair (n, j)]>


@torch.library.impl(_LIBRARY, "combine", "CompositeExplicitAutograd")
def _(rows: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    _check_order(order, rows.shape[0])
    return _implementation("combine", rows).combine(rows, order, weights, some)


@torch.library.register_fake("moptrace::combine", lib=_LIBRARY)
def _(rows: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    _check_order(order, rows.shape[0])
    if not some:
        _check_order(order, weights.shape[0] * weights.shape[1])
    dtype = torch.result_type(rows, weights)
    return rows.new_empty(weights.shape[0], *rows.shape[1:], dtype=dtype)


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, order, weights, ctx.some = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, order, weights)
    ctx.dtype = rows.dtype


def _differentiate_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, order, weights = ctx.saved_tensors
    of_rows = of_weights = None
    if ctx.needs_input_grad[0]:
        of_rows = weigh_rows(grad, order, weights, ctx.some).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        of_weights = pair_dots(grad, rows, order, weights.shape[1], ctx.some).to(weights.dtype)
    return of_rows, None, of_weights, None


torch.library.register_autograd(
    "moptrace::combine", _differentiate_combine, setup_context=_save_combine, lib=_LIBRARY
)


@torch.library.impl(_LIBRARY, "weigh_rows", "CompositeExplicitAutograd")
def _(x: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    _check_tokens(x, weights)
    return _implementation("weigh_rows", x).weigh_rows(x, order, weights, some)


@torch.library.register_fake("moptrace::weigh_rows", lib=_LIBRARY)
def _(x: Tensor, order: Tensor, weights: Tensor, some: bool = False) -> Tensor:
    _check_tokens(x, weights)
    if not some:
        _check_order(order, weights.shape[0] * weights.shape[1])
    return x.new_empty(order.shape[0], *x.shape[1:], dtype=torch.result_type(x, weights))


def _save_weigh_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, order, weights, ctx.some = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, order, weights)
    ctx.dtype = x.dtype


def _differentiate_weigh_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, order, weights = ctx.saved_tensors
    of_x = of_weights = None
    if ctx.needs_input_grad[0]:
        of_x = combine(grad, order, weights, ctx.some).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        of_weights = pair_dots(x, grad, order, weights.shape[1], ctx.some).to(weights.dtype)
    return of_x, None, of_weights, None


torch.library.register_autograd(
    "moptrace::weigh_rows", _differentiate_weigh_rows, setup_context=_save_weigh_rows, lib=_LIBRARY
)


@torch.library.impl(_LIBRARY, "pair_dots", "CompositeExplicitAutograd")
def _(x: Tensor, rows: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    _check_order(order, rows.shape[0])
    return _implementation("pair_dots", x).pair_dots(x, rows, order, choices, some)


@torch.library.register_fake("moptrace::pair_dots", lib=_LIBRARY)
def _(x: Tensor, rows: Tensor, order: Tensor, choices: int, some: bool = False) -> Tensor:
    _check_order(order, rows.shape[0])
    if not some:
        _check_order(order, x.shape[0] * choices)
    return x.new_empty(x.shape[0], choices, dtype=torch.result_type(x, rows))


def _save_pair_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows, order, _, ctx.some = inputs
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None, rows if ctx.needs_input_grad[0] else None, order
    )
    ctx.dtypes = x.dtype, rows.dtype


def _differentiate_pair_dots(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, rows, order = ctx.saved_tensors
    of_x = of_rows = None
    if ctx.needs_input_grad[0]:
        of_x = combine(rows, order, grad, ctx.some).to(ctx.dtypes[0])
    if ctx.needs_input_grad[1]:
        of_rows = weigh_rows(x, order, grad, ctx.some).to(ctx.dtypes[1])
    return of_x, of_rows, None, None, None


torch.library.register_autograd(
    "moptrace::pair_dots", _differentiate_pair_dots, setup_context=_save_pair_dots, lib=_LIBRARY
)


# group_rows and ungroup_rows


@torch.library.impl(_LIBRARY, "group_rows", "CompositeExplicitAutograd")
def _(rows: Tensor, table: Tensor) -> Tensor:
    return _implementation("group_rows", rows).group_rows(rows, table)


@torch.library.impl(_LIBRARY, "ungroup_rows", "CompositeExplicitAutograd")
def _(rows: Tensor, table: Tensor) -> Tensor:
    return _implementation("ungroup_rows", rows).ungroup_rows(rows, table)


@torch.library.register_fake("moptrace::group_rows", lib=_LIBRARY)
@torch.library.register_fake("moptrace::ungroup_rows", lib=_LIBRARY)
def _(rows: Tensor, table: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _save_table(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_group_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return ungroup_rows(grad, table), None


def _differentiate_ungroup_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (table,) = ctx.saved_tensors
    return group_rows(grad, table), None


torch.library.register_autograd(
    "moptrace::group_rows", _differentiate_group_rows, setup_context=_save_table, lib=_LIBRARY
)
torch.library.register_autograd(
    "moptrace::ungroup_rows", _differentiate_ungroup_rows, setup_context=_save_table, lib=_LIBRARY
)


# checks


def _check_tokens(x: Tensor, pairs: Tensor) -> None:
    _check(
        x.shape[0] == pairs.shape[0],
        lambda: f"there are {x.shape[0]} tokens, but experts were chosen for {pairs.shape[0]}",
    )


def _check_order(order: Tensor, rows: int) -> None:
    _check(
        order.shape[0] == rows,
        lambda: f"the order is one of {order.shape[0]} (token, choice) pairs, not of {rows} rows",
    )


def _check(fits: bool | torch.SymBool, message: Callable[[], str]) -> None:
    if fits is not True:  # torch._check takes symbols too, but 20 us a call
        torch._check(fits, message)
