"""The training step as one graph: the same losses, norms, weights and state as on one device."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import models
from double import InFloat64
from gloo import Ranks
from moptrace import ParallelModule, Plan, Program, errors, parallelize, roles, trace, train_step
from moptrace.core import chain
from moptrace.joint import record
from moptrace.kernels.expert_function import ExpertOperator
from moptrace.passes import apply_optimizer
from moptrace.passes.clip_gradients import clip_gradients
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.overlap import overlap
from moptrace.passes.start_and_wait import start_and_wait
from moptrace.roles import Component
from moptrace.testing import (
    ModelSpec,
    SimulatedRanks,
    SimulatedSteps,
    assert_same_weights,
    whole_state,
)
from sweeps import sweep

Pools = Callable[[int], Ranks]
Named = Mapping[str, Tensor]
Make = Callable[[Named], torch.optim.Optimizer]

# With eps far above the rounding of float64: what divides by a gradient's size would turn the
# rounding of a gradient that is nearly zero into a step.
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1, eps=1e-4)
SMALL = ModelSpec(  # whose parameters four ranks divide evenly: they have one graph
    layers=("moe", "dense"),
    hidden=8,
    vocabulary=16,
    experts=4,
    biases=True,
    shared="plain",
    attention="fused",
)


class Averaged(torch.optim.Optimizer):
    """A user's own: momentum whose weight grows with a count of steps, and the sign of it."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr, "decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                held = self.state[p]
                if not held:
                    held["step"] = torch.zeros(())
                    held["mean"] = torch.zeros_like(p)
                held["step"] += 1
                held["mean"].lerp_(p.grad, 1 / (1 + held["step"].item()))
                p.mul_(1 - group["lr"] * group["decay"])
                p.sub_(group["lr"] * torch.tanh(10 * held["mean"]))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": ADAMW,
    "AdamW, fused": partial(ADAMW, fused=True),
    "AdamW, lr a tensor": partial(ADAMW, lr=torch.tensor(0.01, dtype=torch.float64)),
    "Adam, amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True, eps=1e-4),
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.2, nesterov=False),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05, eps=1e-4),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, eps=1e-4),
    "Averaged": partial(Averaged, lr=0.01),
}


def batch_of(seed: int, size: int = 8, length: int = 6) -> dict[str, Tensor]:
    """Other labels are ignored in every batch, and most by the first ranks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 16, (size, length), generator=generator)
    labels = ids.clone()
    labels[: size // 2, 2 + seed % 3 :] = -100
    return {"input_ids": ids, "labels": labels}


@cache
def local_program(spec: ModelSpec, ranks: int, size: int = 8, **options: Any) -> Program:
    plan = Plan(**options).resolve(ranks, [spec.experts])
    return sharded(plan, ranks)(canonical()(trace(spec.build(), batch_of(99, size))))


def all_of(make: Callable[..., torch.optim.Optimizer]) -> Make:
    return lambda named: make(list(named.values()))


class Eager:
    """The unsharded model in eager PyTorch, as a user would train it."""

    def __init__(self, model: nn.Module, make: Make, max_norm: float | None = None):
        self.model, self.max_norm = copy.deepcopy(model), max_norm
        self.optimizer = make(dict(self.model.named_parameters()))

    def step(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        self.optimizer.zero_grad()
        loss = self.model(**batch)[0]
        loss.backward()
        return loss.detach(), self.finish()

    def finish(self) -> Tensor | None:
        """Clip and update; an expert that no token chose has a gradient of zeros, as in a graph."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = None
        if self.max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return norm


def assert_close(have: Tensor | None, want: Tensor | None) -> None:
    assert have is not None and want is not None
    torch.testing.assert_close(have, want, rtol=1e-10, atol=0.0)


def assert_same_steps(simulated: SimulatedSteps, eager: Eager, steps: Sequence[Any]) -> None:
    for batch in steps:
        loss, norm = simulated.step(batch)
        want_loss, want_norm = eager.step(batch)
        assert_close(loss, want_loss)
        if want_norm is not None:
            assert_close(norm, want_norm)
    assert_same_weights(simulated.weights(), whole_state(eager.model))


EVERY_TIME = ("AdamW", "SGD, momentum", "Adagrad", "Averaged")
RARELY = [pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS if n not in EVERY_TIME]


@pytest.mark.parametrize("name", [*EVERY_TIME, *RARELY])
def test_ten_steps_of_any_elementwise_optimizer(name: str) -> None:
    make = all_of(OPTIMIZERS[name])
    model = SMALL.build()
    local = local_program(SMALL, 4, ep=2)
    simulated = SimulatedSteps(local, whole_state(model), make, max_norm=0.5)
    assert_same_steps(simulated, Eager(model, make, 0.5), [batch_of(i) for i in range(10)])


@pytest.mark.parametrize("name", sweep(models.FAMILIES, quick=("gpt_oss",)))
def test_hugging_face_models_take_the_same_steps(name: str) -> None:
    make = all_of(OPTIMIZERS["SGD, momentum"])
    model = models.build(f"{name}, eager")
    fed = [models.batch(seed, size=8, length=4) for seed in (7, 1, 2)]
    with InFloat64():
        local = sharded(Plan(ep=2), 2)(canonical()(trace(model, fed[0])))
        simulated = SimulatedSteps(local, whole_state(model), make, 0.5)
        assert_same_steps(simulated, Eager(model, make, 0.5), fed[1:])


# --- options of the optimizer ---------------------------------------------------------------------


def grouped(named: Named) -> torch.optim.Optimizer:
    """Experts learn faster, norms and biases do not decay."""
    plain = [x for n, x in named.items() if "experts" not in n and x.dim() > 1]
    experts = [x for n, x in named.items() if "experts" in n]
    rest = [x for n, x in named.items() if "experts" not in n and x.dim() <= 1]
    return ADAMW(
        [
            {"params": plain},
            {"params": experts, "lr": 0.03, "betas": (0.8, 0.95)},
            {"params": rest, "weight_decay": 0.0},
        ]
    )


def test_groups_keep_their_own_options() -> None:
    model = SMALL.build()
    simulated = SimulatedSteps(local_program(SMALL, 4, ep=2), whole_state(model), grouped, 0.5)
    assert_same_steps(simulated, Eager(model, grouped, 0.5), [batch_of(i) for i in range(4)])


@pytest.mark.parametrize("is_tensor", [False, True])
def test_a_scheduler_changes_the_learning_rate_without_a_trace(is_tensor: bool) -> None:
    """Of a tensor, a scheduler keeps a copy in the group."""

    def make(named: dict[str, Tensor]) -> torch.optim.Optimizer:
        lr = torch.tensor(0.01, dtype=torch.float64) if is_tensor else 0.01
        return torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.1)

    model = SMALL.build()
    simulated = SimulatedSteps(local_program(SMALL, 4, ep=2), whole_state(model), make)
    eager = Eager(model, make)
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda n: (n + 1) / 10)
    optimizers = [eager.optimizer, *(x.optimizers[0] for x in simulated.steppers)]
    schedulers = [warm_up(optimizer) for optimizer in optimizers]
    seen: set[Program] = set()
    for number in range(5):
        assert_close(simulated.step(batch_of(number))[0], eager.step(batch_of(number))[0])
        seen.add(simulated.programs[0])
        for scheduler in schedulers:
            scheduler.step()
    assert_same_weights(simulated.weights(), whole_state(eager.model))
    assert len(seen) == 1, "the step was traced again"


def test_another_option_takes_effect() -> None:
    model, make = SMALL.build(), all_of(ADAMW)
    simulated = SimulatedSteps(local_program(SMALL, 4, ep=2), whole_state(model), make)
    eager = Eager(model, make)
    for number in range(4):
        for one in (eager.optimizer, *(x.optimizers[0] for x in simulated.steppers)):
            one.param_groups[0]["weight_decay"] = 0.1 * number
        assert_close(simulated.step(batch_of(number))[0], eager.step(batch_of(number))[0])
    assert_same_weights(simulated.weights(), whole_state(eager.model))


class Scaled(torch.optim.Optimizer):
    """What it multiplies with is an attribute, of which no group knows."""

    def __init__(self, params: Any, factor: float | Callable[[Tensor], Tensor], bias: float = 0):
        super().__init__([{"params": [*params], "bias": 0.0}], {"lr": 0.1, "bias": bias})
        self.factor = factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            update = self.factor(p.grad) if callable(self.factor) else self.factor * p.grad
            p.sub_(0.1 * update + self.defaults["bias"])


def test_updates_are_recorded_once_for_optimizers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []

    def counted(*arguments: Any) -> Any:
        recorded.append(arguments)
        return record(*arguments)

    monkeypatch.setattr(apply_optimizer, "record", counted)
    options: list[Any] = [(2.0, 0), (2.0, 0), (3.0, 0), (torch.sin, 0), (torch.cos, 0), (2.0, 0.1)]
    numbers: list[int] = []
    for factor, bias in options:
        model, make = SMALL.build(), all_of(partial(Scaled, factor=factor, bias=bias))
        simulated = SimulatedSteps(local_program(SMALL, 2, ep=2), whole_state(model), make)
        assert_same_steps(simulated, Eager(model, make), [batch_of(0)])
        numbers.append(len(recorded))
        recorded.clear()
    assert numbers[1] == 0
    assert all(number > 0 for at, number in enumerate(numbers) if at != 1)


def test_parameters_outside_the_optimizer_stay_as_they_are() -> None:
    model = SMALL.build()
    make: Make = lambda named: ADAMW([x for n, x in named.items() if "experts" in n])  # noqa: E731
    simulated = SimulatedSteps(local_program(SMALL, 4, ep=2), whole_state(model), make)
    assert_same_steps(simulated, Eager(model, make), [batch_of(i) for i in range(2)])


# --- micro-batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("ep", [1, 4])
def test_micro_batches_give_the_mean_over_all_their_tokens(ep: int) -> None:
    model, make = SMALL.build(), all_of(ADAMW)
    local = local_program(SMALL, 4, ep=ep)
    simulated = SimulatedSteps(local, whole_state(model), make, 0.5, accumulate=3)
    eager = Eager(model, make, 0.5)
    for number in range(2):
        parts = [batch_of(3 * number + i) for i in range(3)]
        whole = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
        loss, norm = simulated.step(*parts)
        want_loss, want_norm = eager.step(whole)
        assert_close(loss, want_loss)
        assert_close(norm, want_norm)
    assert_same_weights(simulated.weights(), whole_state(eager.model))


def test_other_terms_of_the_loss_are_averaged_over_micro_batches() -> None:
    spec = replace(SMALL, balance=0.1)
    model, make = spec.build(), all_of(ADAMW)
    parts = [batch_of(i) for i in range(3)]
    local = local_program(spec, 4, ep=2)
    simulated = SimulatedSteps(local, whole_state(model), make, 0.5, accumulate=3)
    loss, norm = simulated.step(*parts)
    eager = Eager(model, make, 0.5)
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    want: Any = 0
    for part, count in zip(parts, counts, strict=True):
        whole, plain = eager.model(**part)[0], _cross_entropy(eager.model, part)
        term = plain * count / sum(counts) + (whole - plain) / 3
        term.backward()
        want += term.detach()
    assert_close(loss, want)
    assert_close(norm, eager.finish())
    assert_same_weights(simulated.weights(), whole_state(eager.model))


def _cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits, labels = model(**batch)[1], batch["labels"]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Balanced(nn.Module):
    """A model that moves a buffer in forward, as DeepSeek-V3 moves its routers' bias."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = SMALL.build()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(8, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inner.embedding(input_ids)
        with torch.no_grad():
            self.bias.add_(0.1 * x.mean((0, 1)).sign())
        loss, logits = self.inner(input_ids, labels)
        return loss + ((x + self.bias) * self.scale).square().mean(), logits


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_move_once_for_each_forward(accumulate: int) -> None:
    torch.manual_seed(0)
    model, make = Balanced(), all_of(ADAMW)
    local = sharded(Plan(ep=2), 4)(canonical()(trace(model, batch_of(99))))
    simulated = SimulatedSteps(local, whole_state(model), make, accumulate=accumulate)
    eager = Eager(model, make)
    for number in range(2):
        parts = [batch_of(7) for _ in range(accumulate)]  # alike, so that a mean is a mean
        loss, _ = simulated.step(*parts)
        eager.optimizer.zero_grad()
        losses = [eager.model(**part)[0] / accumulate for part in parts]
        sum(losses).backward()  # type: ignore[union-attr]
        eager.finish()
        assert_close(loss, sum(x.detach() for x in losses))  # type: ignore[arg-type]
        held = [own["bias"] for own in simulated.ranks.ranks]
        assert all(torch.equal(x, eager.model.bias) for x in held), number  # type: ignore[arg-type]
    assert_same_weights(simulated.weights(), whole_state(eager.model))


# --- the graph ------------------------------------------------------------------------------------


def stepped(local: Program, max_norm: float | None = 1.0, **options: Any) -> Program:
    model = SMALL.build()
    return SimulatedSteps(local, whole_state(model), all_of(ADAMW), max_norm, **options).programs[0]


def test_the_step_is_one_flat_functional_graph_with_every_part_tagged() -> None:
    program = stepped(local_program(SMALL, 4, ep=2))
    text = program.__str__()
    assert text.startswith("step program")
    components = [roles.component(node) for node in program.nodes if node.op == "call_function"]
    backward = {roles.component(n) for n in program.nodes if roles.role(n).backward}
    forward = {roles.component(n) for n in program.nodes if not roles.role(n).backward}
    for component in (Component.ATTENTION, Component.ROUTER, Component.EXPERTS, Component.LOSS):
        assert component in backward and component in forward, component
    of_optimizer = components.index(Component.OPTIMIZER)
    assert Component.CLIPPING in components[:of_optimizer]
    assert set(components[of_optimizer:]) == {Component.OPTIMIZER}
    experts = [n for n in program.nodes if isinstance(n.target, ExpertOperator)]
    assert all(roles.component(n) is Component.EXPERTS and roles.role(n).source for n in experts)
    assert [roles.role(n).backward for n in experts] == [False, True]


def test_ranks_with_even_shards_have_one_graph() -> None:
    local = local_program(SMALL, 4, ep=2)
    first, last = (str(differentiate(rank=rank)(local)) for rank in (0, 3))
    assert first == last


def test_routed_rows_stay_symbolic() -> None:
    """The sizes of one batch's routing would be wrong for the next."""
    program = stepped(local_program(SMALL, 4, ep=2))
    sent = [n for n in program.nodes if n.target is torch.ops.moptrace.send_rows.default]
    forward = [n for n in sent if not roles.role(n).backward]
    assert forward and all(isinstance(roles.tensor(n).shape[0], torch.SymInt) for n in forward)


@pytest.mark.parametrize("name", ["all_reduce_invariant", "reduce_scatter", "exchange_counts"])
def test_a_missing_collective_is_noticed(name: str) -> None:
    """Of clipping, of the backward, of routing: without it the step is another one, or none."""
    model, make = SMALL.build(), all_of(ADAMW)
    simulated = SimulatedSteps(local_program(SMALL, 4, ep=2), whole_state(model), make, 0.1)
    (program,) = set(simulated.programs)
    op = getattr(torch.ops.moptrace, name).default
    clipping = [n for n in program.nodes if roles.component(n) is Component.CLIPPING]
    found = [n for n in (clipping if "invariant" in name else program.nodes) if n.target is op]
    broken, mapping = program.copy_graph()
    node = mapping[found[0]]
    node.target, node.args = torch.ops.aten.mul.Tensor, (node.args[0], 1)
    for stepper in simulated.steppers:
        stepper._programs = {key: program.with_graph(broken) for key in stepper._programs}
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        assert_same_steps(simulated, Eager(model, make, 0.1), [batch_of(1)])


@pytest.mark.parametrize(
    "plan",
    [
        *({"ep": ep, "edp": edp} for ep in (1, 2, 4) for edp in ("shard", "replicate")),
        {"ep": 2, "tp": 2},
        {"ep": 4, "dp_replicate": 2},
        {"ep": 2, "vp": 2, "logits_bytes": 0},
    ],
    ids=str,
)
def test_the_norm_counts_each_element_once(plan: dict[str, Any]) -> None:
    """However its ranks hold it: a copy of an expert, or of a scalar, is no second expert."""
    model, make = SMALL.build(), all_of(partial(torch.optim.SGD, lr=0.1))
    local = local_program(SMALL, 4, **plan)
    simulated = SimulatedSteps(local, whole_state(model), make, math.inf)
    assert_same_steps(simulated, Eager(model, make, math.inf), [batch_of(3)])


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = SMALL.build()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        kept = nn.functional.dropout(self.scale, 0.5)
        x = nn.functional.dropout(self.inner.embedding(input_ids), 0.3)
        loss, logits = self.inner(input_ids, labels)
        return loss + (x * kept).square().mean(), logits


def test_random_operators_draw_as_in_the_local_program() -> None:
    model, make = Dropping(), all_of(partial(torch.optim.SGD, lr=0.1))
    local = sharded(Plan(ep=2), 4)(canonical()(trace(model, batch_of(99))))
    simulated = SimulatedSteps(local, whole_state(model), make, seed=5)
    reference = SimulatedRanks(local, whole_state(model), seed=5)
    updates = [torch.optim.SGD(reference.parameters(rank), lr=0.1) for rank in range(4)]
    losses: list[Tensor] = []
    for _ in range(2):
        losses.append(simulated.step(batch_of(1))[0])
        assert_close(losses[-1], reference.step(batch_of(1)).loss)
        for update in updates:
            update.step()
    assert_same_weights(simulated.weights(), reference.weights())
    assert not torch.equal(*losses)


# --- errors ---------------------------------------------------------------------------------------


class Counting(torch.optim.Optimizer):
    """Counts its steps in Python."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p.sub_(group["lr"] * p.grad / self.state[p]["step"])


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = SMALL.build()
        self.idle = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return self.inner(input_ids, labels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS calls a closure .* AdamW"),
        (partial(torch.optim.RAdam, lr=0.01), "goes one way or another"),
        (Counting, r"changes Python values \(state\['step'\]"),
    ],
)
def test_an_optimizer_that_is_no_graph_is_refused(make: Any, message: str) -> None:
    local = local_program(SMALL, 4, ep=2)
    simulated = SimulatedSteps(local, whole_state(SMALL.build()), all_of(make))
    with pytest.raises(errors.StepError, match=message):
        simulated.step(batch_of(0))
        simulated.step(batch_of(1))


def test_a_parameter_that_the_loss_does_not_use_is_named() -> None:
    model = Unused()
    local = sharded(Plan(ep=1), 1)(canonical()(trace(model, batch_of(99))))
    simulated = SimulatedSteps(local, whole_state(model), all_of(ADAMW))
    with pytest.raises(errors.StepError, match=r"does not depend on idle.*requires_grad_\(False\)"):
        simulated.step(batch_of(0))


def test_clipping_needs_gradients() -> None:
    with pytest.raises(errors.PassError, match="takes a program at level step"):
        clip_gradients(1.0)(local_program(SMALL, 4, ep=2))


# --- real ranks -----------------------------------------------------------------------------------


def parallel_of(spec: ModelSpec, ep: int) -> ParallelModule:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = {k: v[:2] for k, v in batch_of(99).items()}
    return parallelize(spec.build(), mesh, Plan(ep=ep), batch=local)


def on_rank_steps(spec: ModelSpec, ep: int, accumulate: int) -> None:
    """Steps as one graph, then ordinary ones, then a graph again, with one optimizer."""
    model = parallel_of(spec, ep)
    optimizer = ADAMW(model.parameters())
    step = train_step(model, optimizer, max_norm=0.5, accumulate=accumulate)
    eager = Eager(spec.build(), all_of(ADAMW), 0.5)
    for number in range(6):
        batch = batch_of(number, 8 * accumulate)
        parts = [{k: v.chunk(accumulate)[i] for k, v in batch.items()} for i in range(accumulate)]
        own = [model.local_batch(part) for part in parts]
        want_loss, want_norm = eager.step(batch)
        if number == 3 and accumulate == 1:
            optimizer.zero_grad()
            loss = model(**own[0])[0]
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            optimizer.step()
        elif number % 2:
            (loss,) = [x for part in own if (x := step.add(**part)) is not None]
            norm = step.grad_norm
        else:
            loss = step(**{k: torch.cat([part[k] for part in own]) for k in own[0]})
            norm = step.grad_norm
        assert_close(loss.detach(), want_loss)
        assert_close(norm, want_norm)
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))
    for parameter, held in optimizer.state.items():
        assert isinstance(held["exp_avg"], DTensor)
        assert held["exp_avg"].placements == parameter.placements  # type: ignore[attr-defined]
        assert held["exp_avg"].shape == parameter.shape
        assert float(held["step"]) == 6
    assert step.peak_memory().bytes > 0
    assert "exp_avg" in str(step.program)


@pytest.mark.parametrize(("ep", "accumulate"), sweep([(2, 1), (4, 2)], quick=[(4, 2)]))
def test_real_ranks_take_the_same_steps(ep: int, accumulate: int, ranks: Pools) -> None:
    ranks(4)(on_rank_steps, SMALL, ep, accumulate)


def test_real_ranks_with_uneven_shards(ranks: Pools) -> None:
    uneven = replace(SMALL, hidden=6, vocabulary=19, experts=5)
    ranks(4)(on_rank_steps, uneven, 4, 1)


def on_rank_checkpoint(folder: str) -> None:
    """Save after two steps, go on under another plan, and arrive where one device does."""
    first = parallel_of(SMALL, 2)
    update = ADAMW(first.parameters())
    eager = Eager(SMALL.build(), all_of(ADAMW))
    step = train_step(first, update)
    for number in range(2):
        step(**first.local_batch(batch_of(number)))
        eager.step(batch_of(number))
    state, optimizer_state = get_state_dict(first, update)
    checkpoint.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    second = parallel_of(SMALL, 1)
    resumed = ADAMW(second.parameters())
    state, optimizer_state = get_state_dict(second, resumed)
    loaded = {"model": state, "optimizer": optimizer_state}
    checkpoint.load(loaded, checkpoint_id=folder)
    set_state_dict(
        second, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    train_step(second, resumed)(**second.local_batch(batch_of(5)))
    eager.step(batch_of(5))
    assert_same_weights(second.full_state_dict(), whole_state(eager.model))


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_goes_on_under_another_plan(ranks: Pools) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks(2)(on_rank_checkpoint, folder)


def on_rank_refused() -> None:
    model = parallel_of(SMALL, 1)
    with pytest.raises(errors.StepError, match=r"not the parallel model's.*after parallelize"):
        train_step(model, ADAMW(SMALL.build().parameters()))
    step = train_step(model, ADAMW(model.parameters()), accumulate=2)
    with pytest.raises(errors.StepError, match="no step has run"):
        print(step.program)
    own = model.local_batch(batch_of(0))
    with pytest.raises(errors.StepError, match="cannot be divided into 2"):
        step(**{k: v[:1] for k, v in own.items()})
    step.add(**own)
    with pytest.raises(errors.StepError, match="different shapes"):
        step.add(**{k: v[:, :4] for k, v in own.items()})
    with pytest.raises(errors.StepError, match="accumulate=0"):
        train_step(model, ADAMW(model.parameters()), accumulate=0)


def on_rank_of_another_schedule() -> None:
    model = parallel_of(SMALL, 2)
    late = chain(start_and_wait(), overlap(prefetch=0, cover=0))
    own = late if dist.get_rank() else overlapped()
    step = train_step(model, ADAMW(model.parameters()), schedule=own)
    with pytest.raises(errors.StepError, match=r"differ from collective .* one schedule"):
        step(**model.local_batch(batch_of(0)))


def test_ranks_with_different_schedules_are_told_so(ranks: Pools) -> None:
    ranks(2)(on_rank_of_another_schedule)


def test_what_is_no_step_is_refused(ranks: Pools) -> None:
    ranks(2)(on_rank_refused)
