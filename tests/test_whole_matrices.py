"""Optimizers that need whole matrices: one owner computes each, and the result is one device's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from gloo import Ranks
from moptrace import Program, errors, roles, train_step
from moptrace.collectives import COLLECTIVES, Communicator
from moptrace.joint import Recording, record
from moptrace.kernels.matrix_function import MatrixFunction
from moptrace.passes.default import overlapped
from moptrace.placement import Axis
from moptrace.roles import Component
from moptrace.testing import SimulatedSteps, assert_same_weights, whole_state
from moptrace.whole_matrices import Cut, Matrix, Owners, matrix_function
from sweeps import sweep
from test_train_step import (
    ADAMW,
    SMALL,
    Eager,
    Named,
    all_of,
    assert_close,
    assert_same_steps,
    batch_of,
    local_program,
    parallel_of,
)

Pools = Callable[[int], Ranks]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
MODEL = replace(SMALL, layers=("moe",))
UNEVEN = replace(MODEL, hidden=6, vocabulary=19, experts=5)
STACKED = replace(MODEL, style="canonical")  # the user's own parameters are [E, d, f]


class Orthogonal(torch.optim.Optimizer):
    """A user's own Muon, in the dtype of the gradients; matrices and stacks of them."""

    def __init__(self, params: Any, lr: float = 0.02):
        super().__init__(params, {"lr": lr, "decay": 0.1, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p]
                if not held:
                    held["momentum"] = torch.zeros_like(p)
                held["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(held["momentum"], group["momentum"])
                if p.dim() >= 2:
                    update = self.orthogonal(update) * max(1, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"])

    def orthogonal(self, x: Tensor) -> Tensor:
        is_high = x.shape[-2] > x.shape[-1]
        x = x.mT if is_high else x
        # A router whose one choice is renormalised has no gradient: rounding must not become one.
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-5)
        for _ in range(3):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if is_high else x


class ByRow(torch.optim.Optimizer):
    """Divides each row by a mean of its squares that it keeps, and all by a norm of the weights."""

    def __init__(self, params: Any, lr: float = 0.02, trust: bool = False):
        super().__init__(params, {"lr": lr, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                held = self.state[p]
                squares = p.grad.square().mean(-1, keepdim=True)
                if not held:
                    held["rows"] = torch.zeros_like(squares)
                held["rows"].lerp_(squares, 0.1)
                update = p.grad / (held["rows"].sqrt() + 1e-3)
                scale = (p.norm() + 1e-3).item() if group["trust"] else 1.0
                p.add_(update, alpha=-group["lr"] * scale)


def muon_and_adamw(named: Named) -> Sequence[torch.optim.Optimizer]:
    """As users of Muon do. Its constructor refuses stacked experts, which it takes as a group."""
    matrices = {n: x for n, x in named.items() if "weight" in n and x.dim() > 1}
    muon = torch.optim.Muon([x for x in matrices.values() if x.dim() == 2], lr=0.02)
    if stacked := [x for x in matrices.values() if x.dim() == 3]:
        muon.add_param_group({"params": stacked})
    return muon, ADAMW([x for n, x in named.items() if n not in matrices])


class Several(torch.optim.Optimizer):
    """Several optimizers that one device calls as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([p for part in parts for p in part.param_groups[0]["params"]], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


ADAFACTOR = partial(torch.optim.Adafactor, lr=0.05, eps=(1e-3, 1e-3), weight_decay=0.1)
OPTIMIZERS: dict[str, Callable[[Named], Optimizers]] = {
    "Orthogonal": all_of(Orthogonal),
    "Muon and AdamW": muon_and_adamw,
    "Adafactor": all_of(ADAFACTOR),
    "ByRow": all_of(ByRow),
    "ByRow, trust": all_of(partial(ByRow, trust=True)),
}
PLANS: tuple[dict[str, Any], ...] = (
    {"ep": 2, "etp": 2},
    {"ep": 2, "tp": 2},
    {"ep": 2, "edp": "replicate", "vp": 2, "logits_bytes": 0},
    {"ep": 4, "dp_replicate": 2},
    {"ep": 1, "etp": 2, "edp": "shard"},
    {"ep": 2, "cp": 2, "dp_replicate": 4, "edp": "replicate"},
)


def eager(spec: Any, make: Callable[[Named], Optimizers], max_norm: float | None = None) -> Eager:
    def one(named: Named) -> torch.optim.Optimizer:
        made = make(named)
        return made if isinstance(made, torch.optim.Optimizer) else Several(made)

    return Eager(spec.build(), one, max_norm)


def simulated(
    spec: Any, plan: Mapping[str, Any], make: Any, *options: Any, ranks: int = 4, **more: Any
) -> Any:
    local = local_program(spec, ranks, **plan)
    return SimulatedSteps(local, whole_state(spec.build()), make, *options, **more)


QUICK = list(zip(PLANS, OPTIMIZERS, strict=False))  # each optimizer once


@pytest.mark.parametrize(
    ("plan", "name"),
    sweep([(plan, name) for plan in PLANS for name in OPTIMIZERS], quick=QUICK),
    ids=str,
)
def test_ten_steps_are_those_of_one_device(plan: dict[str, Any], name: str) -> None:
    make = OPTIMIZERS[name]
    assert_same_steps(
        simulated(MODEL, plan, make, 0.5), eager(MODEL, make, 0.5), [batch_of(i) for i in range(10)]
    )


OF_ANY_RANK = [name for name in OPTIMIZERS if "Muon" not in name]  # which takes matrices alone


@pytest.mark.parametrize("name", sweep(OF_ANY_RANK, quick=("Orthogonal",)))
def test_the_users_own_stacks(name: str) -> None:
    """Of a stack that is the user's own, the optimizer sees all."""
    make = OPTIMIZERS[name]
    steps = [batch_of(i) for i in range(3)]
    assert_same_steps(simulated(STACKED, {"ep": 2}, make), eager(STACKED, make), steps)


# --- who computes what, and who holds what --------------------------------------------------------


def test_each_matrix_is_computed_once_and_owners_are_balanced(monkeypatch: Any) -> None:
    """Of dense matrices, held as copies of shards, and of experts by those who have them."""
    work: Counter[int] = Counter()
    called = MatrixFunction.__call__

    def counted(self: MatrixFunction, *operands: Tensor) -> tuple[Tensor, ...]:
        results = called(self, *operands)
        work[Communicator.current().rank] += results[0].shape[0]
        return results

    monkeypatch.setattr(MatrixFunction, "__call__", counted)
    one = simulated(MODEL, {"ep": 2, "dp_replicate": 2}, OPTIMIZERS["Orthogonal"])
    one.step(batch_of(0))
    matrices = [x for x in MODEL.build().parameters() if x.dim() == 2]
    assert sum(work.values()) == len(matrices)
    assert max(work.values()) - min(work.values()) <= 2  # some are larger than others


def held_by(one: SimulatedSteps, key: str) -> dict[str, Tensor]:
    """An entry of the state of all parameters, put together from what the ranks have."""
    entries: dict[Tensor, Any] = {}
    for optimizer in (x for stepper in one.steppers for x in stepper.optimizers):
        entries |= optimizer.state
    return one.ranks._assembled(lambda shard: entries[shard][key], trained=True)


@pytest.mark.parametrize(("spec", "ranks"), sweep([(UNEVEN, 2), (UNEVEN, 4)], quick=[(UNEVEN, 2)]))
def test_momentum_is_sharded_and_that_of_one_device(spec: Any, ranks: int) -> None:
    make = OPTIMIZERS["Orthogonal"]
    one, other = simulated(spec, {"ep": 2}, make, ranks=ranks), eager(spec, make)
    assert_same_steps(one, other, [batch_of(i) for i in range(2)])
    wanted = {n: other.optimizer.state[p]["momentum"] for n, p in other.model.named_parameters()}
    assert_same_weights(held_by(one, "momentum"), wanted)
    for stepper in one.steppers:
        for parameter, held in stepper.optimizers[0].state.items():
            assert held["momentum"].shape == parameter.shape


def test_state_of_another_shape_is_that_of_one_device() -> None:
    """Rows' means: all ranks have a matrix's own, and those of an expert are its ranks'."""
    make = all_of(ByRow)
    one, other = simulated(MODEL, {"ep": 2, "etp": 2}, make), eager(MODEL, make)
    assert_same_steps(one, other, [batch_of(i) for i in range(2)])
    wanted = {n: other.optimizer.state[p]["rows"] for n, p in other.model.named_parameters()}
    for rank, stepper in enumerate(one.steppers):
        for parameter, fqn in stepper.names.items():
            rows = stepper.optimizers[0].state[parameter]["rows"]
            entry = one.local.signature.parameter(fqn)
            if entry.stacked:
                own = torch.stack([wanted[name] for name in entry.stacked]).chunk(2)[rank // 2]
            else:
                own = wanted[entry.fqn]
            torch.testing.assert_close(rows, own, rtol=1e-10, atol=0, msg=f"{fqn} of rank {rank}")


def optimizer_nodes(program: Program, *names: str) -> list[fx.Node]:
    ops = [COLLECTIVES[name].op for name in names]
    nodes = [n for n in program.nodes if roles.component(n) is Component.OPTIMIZER]
    return [n for n in nodes if n.target in ops]


def test_what_is_elementwise_sends_nothing() -> None:
    for make in (all_of(ADAMW), all_of(partial(torch.optim.SGD, momentum=0.9))):
        (program,) = set(simulated(MODEL, {"ep": 2, "etp": 2}, make).programs)
        assert not optimizer_nodes(program, *COLLECTIVES)
        assert not any(isinstance(n.target, MatrixFunction) for n in program.nodes)


class RowNorms(ByRow):
    """Divides each row by its norm, and keeps nothing."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad / (p.grad.norm(dim=-1, keepdim=True) + 1e-3))


def test_only_a_dimension_that_is_split_matters() -> None:
    """Dense matrices are split by rows, so each rank has all of its own rows; vectors are not."""
    one = simulated(MODEL, {"ep": 2, "edp": "replicate"}, all_of(RowNorms))
    (program,) = set(one.programs)
    gathered = optimizer_nodes(program, "gather_matrices")
    vectors = [x for x in one.local.signature.parameters if len(x.shape) == 1]
    assert len(gathered) == len(vectors)
    other = eager(MODEL, all_of(RowNorms))
    assert_same_steps(one, other, [batch_of(0)])


def test_what_travels_is_what_the_optimizer_multiplies() -> None:
    """Muon casts to bfloat16 before its products, so that is what is gathered, once a matrix."""
    program = simulated(MODEL, {"ep": 4}, muon_and_adamw).programs[0]
    sent = optimizer_nodes(program, "gather_matrices")
    matrices = [n for n, x in MODEL.build().named_parameters() if x.dim() == 2]
    assert len(sent) == len([n for n in matrices if "experts" not in n])
    assert {roles.tensor(n).dtype for n in sent} == {torch.bfloat16}
    assert len(optimizer_nodes(program, "scatter_matrices")) == len(sent)
    assert not optimizer_nodes(program, "all_gather_matrices")


def recorded(shape: Sequence[int], update: Callable[[Tensor, Tensor], Tensor]) -> Recording:
    examples = {name: torch.empty(shape) for name in ("parameter", "gradient")}
    return record(lambda tape, parameter, gradient: [update(parameter, gradient)], examples)


def split_by(shape: tuple[int, ...], *dims: int, stack: int | None = None) -> Matrix:
    own = tuple(n // 2 if d in dims else n for d, n in enumerate(shape))
    return Matrix(shape, own, stack, stack or 1, tuple((Axis(f"a{d}", 2), d) for d in dims), ())


@pytest.mark.parametrize(
    ("update", "dims", "whole"),
    [
        (lambda p, g: p - g.sign() * 0.1, (0, 1), 0),
        (lambda p, g: p - g / g.norm(dim=1, keepdim=True), (0,), 0),
        (lambda p, g: p - g / g.norm(dim=1, keepdim=True), (1,), 1),
        (lambda p, g: p - (2 * g) @ g.T @ g, (1,), 3),
        (lambda p, g: p - (p @ g.T).relu() @ g, (0,), 4),
        (lambda p, g: p - g.flatten(0, 1).sort()[0].view(4, 6), (0,), 4),
    ],
)
def test_the_cut_is_what_needs_all_of_what_is_split(update: Any, dims: Any, whole: int) -> None:
    cut = Cut(recorded((4, 6), update), split_by((4, 6), *dims), ["parameter", "gradient"], [])
    assert len(cut.whole) == whole, cut.whole
    assert len(cut.stages) == (len(dims) if whole else 0)


def test_a_number_of_a_shard_is_refused() -> None:
    recording = recorded((1,), lambda p, g: p - g * g.item())
    with pytest.raises(errors.StepError, match=r"reads a number from a parameter or its gradient"):
        Cut(recording, split_by((1,), 0), ["parameter", "gradient"], [])


def test_owners_take_turns() -> None:
    def cut_of(size: int, stack: int | None) -> Cut:
        matrix = split_by((size, size), 0, 1, stack=stack)
        names = ["parameter", "gradient"]
        return Cut(recorded((size, size), lambda p, g: p - g @ g), matrix, names, names)

    owners = Owners()
    assert [owners.choose(cut_of(8, None)) for _ in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert owners.choose(cut_of(8, 3)) == (0, 0)  # and the next two
    assert owners.choose(cut_of(4, None)) == (1, 1)


def test_a_rank_without_a_matrix_computes_nothing() -> None:
    cut = Cut(
        recorded((4, 6), lambda p, g: p - g @ g.T @ g),
        split_by((4, 6), 1),
        ["parameter", "gradient"],
        [],
    )
    function = matrix_function("products", cut)
    x = torch.randn(3, 4, 6)
    (found,) = function(x)
    torch.testing.assert_close(found, x @ x.mT @ x)
    (none,) = function(x[:0])
    assert none.shape == (0, 4, 6) and none.dtype == x.dtype
    same, taken = function.only([0])
    assert taken == (0,) and torch.equal(same(x)[0], found)


# --- what would be noticed ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Orthogonal", "Adafactor"])
def test_an_update_of_shards_alone_is_noticed(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(Cut, "_needed", lambda self: set())
    make = OPTIMIZERS[name]
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        assert_same_steps(simulated(MODEL, {"ep": 2}, make), eager(MODEL, make), [batch_of(1)])


@pytest.mark.parametrize(
    "name", ["gather_matrices", "scatter_matrices", "take_matrices", "all_gather_matrices"]
)
def test_a_wrong_owner_is_noticed(name: str) -> None:
    make = OPTIMIZERS["Orthogonal"]
    one = simulated(MODEL, {"ep": 4, "dp_replicate": 2}, make)
    (program,) = set(one.programs)
    broken, mapping = program.copy_graph()
    node = mapping[optimizer_nodes(program, name)[0]]
    at = 4 if "int dim" in COLLECTIVES[name].schema else 3
    node.update_arg(at, 1 - int(node.args[at]))  # type: ignore[arg-type]
    for stepper in one.steppers:
        stepper._programs = {key: program.with_graph(broken) for key in stepper._programs}
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        assert_same_steps(one, eager(MODEL, make), [batch_of(1)])


# --- with the other options of a step -------------------------------------------------------------


@pytest.mark.parametrize(
    ("updates", "state", "max_norm"),
    sweep(
        [("backward", "host", None), ("forward", "device", 0.5), ("forward", "host", 0.5)],
        quick=[("backward", "host", None), ("forward", "host", 0.5)],
    ),
)
def test_updates_at_another_time_are_the_same(
    updates: str, state: str, max_norm: float | None
) -> None:
    """With learning rates that a scheduler sets, and micro-batches."""
    options = {"updates": updates, "state": state, "schedule": overlapped()}
    one = simulated(MODEL, {"ep": 2, "tp": 2}, muon_and_adamw, max_norm, 2, **options)
    other = eager(MODEL, muon_and_adamw, max_norm)
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: (n + 1) / 4)
    each = [x for stepper in one.steppers for x in stepper.optimizers]
    schedulers = [warm_up(x) for x in (*each, *other.optimizer.parts)]  # type: ignore[attr-defined]
    for number in range(3):
        parts = [batch_of(2 * number + i) for i in range(2)]
        whole = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        loss, norm = one.step(*parts)
        want_loss, want_norm = other.step(whole)
        assert_close(loss, want_loss)
        if max_norm is not None:
            assert_close(norm, want_norm)
        for scheduler in schedulers:
            scheduler.step()
    assert_same_weights(one.weights(), whole_state(other.model))


# --- errors ---------------------------------------------------------------------------------------


class Drawing(ByRow):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad + 0.1 * torch.randn_like(p))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (all_of(Drawing), "draws random numbers"),
        (lambda named: [], "needs an optimizer"),
        (
            lambda named: torch.optim.Muon([x for x in named.values() if x.dim() == 2]),
            r"for each expert's part of .*bias.* 2D matrix.*another optimizer",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(errors.StepError, match=message):
        simulated(MODEL, {"ep": 2}, make).step(batch_of(0))


# --- real ranks -----------------------------------------------------------------------------------


def on_rank() -> None:
    """Two optimizers in one graph, then ordinary steps of DTensors, then a graph again."""
    model = parallel_of(MODEL, 2)

    def both(named: Named) -> Sequence[torch.optim.Optimizer]:
        matrices = {n: x for n, x in named.items() if "weight" in n and x.dim() > 1}
        rest = [x for n, x in named.items() if n not in matrices]
        return Orthogonal(matrices.values()), ADAMW(rest)

    optimizers = both(dict(model.named_parameters()))
    step = train_step(model, optimizers, max_norm=0.5)
    other = eager(MODEL, both, 0.5)
    for number in range(4):
        own = model.local_batch(batch_of(number))
        want_loss, want_norm = other.step(batch_of(number))
        if number == 2:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = model(**own)[0]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for optimizer in optimizers:
                optimizer.step()
        else:
            loss = step(**own)
            assert_close(step.grad_norm, want_norm)
        assert_close(loss.detach(), want_loss)
    assert_same_weights(model.full_state_dict(), whole_state(other.model))
    for parameter, held in optimizers[0].state.items():
        momentum = held["momentum"]
        assert isinstance(momentum, DTensor) and isinstance(parameter, DTensor)
        assert momentum.placements == parameter.placements and momentum.shape == parameter.shape
    assert "for each matrix" in str(step.program) and step.timeline().travelling > 0
    with pytest.raises(errors.StepError, match="a parameter of two optimizers"):
        train_step(model, [optimizers[0], optimizers[0]])


def test_real_ranks_take_the_same_steps(ranks: Pools) -> None:
    ranks(2)(on_rank)


def on_rank_with_factors() -> None:
    """State that is not of its parameter's shape, from one graph to the next."""
    model = parallel_of(UNEVEN, 2)
    optimizer = ADAFACTOR(model.parameters())
    other = eager(UNEVEN, all_of(ADAFACTOR))
    for number in range(2):
        step = train_step(model, optimizer)  # made anew, so that it reads the state as it is
        assert_close(step(**model.local_batch(batch_of(number))), other.step(batch_of(number))[0])
    assert_same_weights(model.full_state_dict(), whole_state(other.model))
    for parameter, held in optimizer.state.items():
        stacked = parameter.dim() == 3
        if "row_var" in held:
            assert isinstance(held["row_var"], DTensor) == stacked
            assert held["row_var"].shape == (*parameter.shape[:-1], 1)


@pytest.mark.slow
def test_real_ranks_keep_state_of_another_shape(ranks: Pools) -> None:
    ranks(2)(on_rank_with_factors)
