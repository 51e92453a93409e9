"""The module that ``parallelize`` returns, on real gloo ranks.

Functions named ``on_rank_...`` run on every rank (see ``gloo.py``) and compare with the unsharded
model there; the tests start them.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
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
from gloo import RankFailure, Ranks
from moptrace import ParallelModule, Plan, errors, parallel, parallelize
from moptrace.testing import (
    ModelSpec,
    Step,
    assert_same_step,
    assert_same_weights,
    eager_step,
    whole_state,
)
from subjects import traced_once
from sweeps import sweep

Pools = Callable[[int], Ranks]

HAND_WRITTEN = ("LoopWhere", "OneHotEinsum", "SortSlices")
NAMES = (*models.FAMILIES, *HAND_WRITTEN)
QUICK = ("gpt_oss", "deepseek_v3", "SortSlices")
SMALL = ModelSpec(biases=True, shared="gated", attention="fused", balance=0.1, style="loop_where")


def build(model: str | ModelSpec) -> nn.Module:
    if isinstance(model, ModelSpec):
        return model.build()
    if model not in models.FAMILIES:
        return models.build(model)
    torch.manual_seed(0)
    layers = 2 if model == "deepseek_v3" else 1  # whose first layer is dense
    return models.hugging_face(model, "eager", num_hidden_layers=layers).double()


def batch_for(model: str | ModelSpec, seed: int = 0, length: int = 4) -> dict[str, Tensor]:
    """Two sequences a rank; the first rank's labels are mostly ignored."""
    vocabulary = model.vocabulary if isinstance(model, ModelSpec) else models.VOCABULARY
    size = 2 * dist.get_world_size()
    batch = models.batch(seed, size=size, length=length, vocabulary=vocabulary)
    batch["labels"][:2, 2:] = -100
    return batch


def parallel_of(
    model: str | ModelSpec,
    ep: int | None = None,
    edp: str = "shard",
) -> tuple[ParallelModule, nn.Module]:
    """A parallel model and the model that it was made from."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    original = build(model)
    local = {k: v[:2] for k, v in batch_for(model).items()}
    with traced_once(model):
        wrapped = parallelize(original, mesh, Plan(ep=ep, edp=edp), batch=local)
    return wrapped, original


def step_of(wrapped: ParallelModule, name: str | ModelSpec, batch: dict[str, Tensor]) -> Step:
    wrapped.zero_grad()
    with traced_once(name):
        output = wrapped(**wrapped.local_batch(batch))
    loss = output[0]
    loss.backward()
    shapes = wrapped.full_state_dict()
    gradients = {
        k: torch.zeros_like(shapes[k]) if g is None else g
        for k, g in wrapped.full_gradients().items()
    }
    return Step(loss.detach(), gradients, {})


# --- loss and gradients ---------------------------------------------------------------------------


def on_rank_every_split(name: str) -> None:
    world_size = dist.get_world_size()
    with InFloat64():
        reference = build(name)
    for number, ep in enumerate(d for d in (1, 2, 4) if world_size % d == 0):
        with InFloat64():
            wrapped, _ = parallel_of(name, ep, ("shard", "replicate")[number % 2])
            batch = batch_for(name, number + 1)
            want = eager_step(reference, batch)
            assert want.loss.dtype == torch.float64
            assert_same_step(step_of(wrapped, name, batch), want)


@pytest.mark.parametrize(
    ("name", "world_size"),
    sweep(product(NAMES, (2, 4)), list(zip(QUICK, (2, 4, 2), strict=True))),
)
def test_real_ranks_compute_the_same_loss_and_gradients(
    name: str, world_size: int, ranks: Pools
) -> None:
    ranks(world_size)(on_rank_every_split, name)


def on_rank_one_step(name: str | ModelSpec, ep: int, edp: str) -> None:
    wrapped, original = parallel_of(name, ep, edp)
    batch = batch_for(name, 1)
    assert_same_step(step_of(wrapped, name, batch), eager_step(original, batch))


def test_a_rank_without_experts_still_gets_gradients(ranks: Pools) -> None:
    few = ModelSpec(experts=2, k=1, style="canonical", tied=True)
    ranks(4)(on_rank_one_step, few, 4, "shard")


def test_all_tokens_may_go_to_one_rank(ranks: Pools) -> None:
    skewed = ModelSpec(experts=8, k=1, router="one_for_all", style="canonical")
    ranks(4)(on_rank_one_step, skewed, 4, "shard")


def on_rank_two_shapes() -> None:
    wrapped, original = parallel_of(SMALL, 2)
    for length in (4, 7):
        batch = batch_for(SMALL, seed=3, length=length)
        assert_same_step(step_of(wrapped, SMALL, batch), eager_step(original, batch))
    assert len(wrapped._runs) == 2


def test_a_second_input_shape_is_traced_when_it_comes(ranks: Pools) -> None:
    ranks(2)(on_rank_two_shapes)


# --- optimizers -----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "AdamW, foreach": partial(torch.optim.AdamW, lr=0.01, eps=1e-4, foreach=True),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.01, eps=1e-4, fused=True),
}


def on_rank_three_steps(name: str | ModelSpec, ep: int, optimizer: str) -> None:
    wrapped, original = parallel_of(name, ep)
    updates = [OPTIMIZERS[optimizer](m.parameters()) for m in (wrapped, original)]
    for seed in (1, 2, 3):
        batch = batch_for(name, seed)
        assert_same_step(step_of(wrapped, name, batch), eager_step(original, batch))
        for parameter in original.parameters():  # an expert that no token chose
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        have, want = (
            nn.utils.clip_grad_norm_(m.parameters(), max_norm=0.5) for m in (wrapped, original)
        )
        have = have.full_tensor() if isinstance(have, DTensor) else have
        assert torch.allclose(have, want, rtol=1e-10, atol=0), "total norm"
        for update in updates:
            update.step()
    assert_same_weights(wrapped.full_state_dict(), whole_state(original))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("world_size", "ep"), [(2, 2), (4, 2)])
def test_three_clipped_steps_give_the_same_weights(
    optimizer: str, world_size: int, ep: int, ranks: Pools
) -> None:
    ranks(world_size)(on_rank_three_steps, SMALL, ep, optimizer)


def on_rank_three_exact_steps(*how: Any) -> None:
    with InFloat64():
        on_rank_three_steps(*how)


def test_three_steps_of_a_hugging_face_model_give_the_same_weights(ranks: Pools) -> None:
    ranks(4)(on_rank_three_exact_steps, "qwen3_moe", 2, "AdamW, foreach")


# --- state ----------------------------------------------------------------------------------------


def on_rank_state() -> None:
    wrapped, original = parallel_of(SMALL, 2)
    state = wrapped.state_dict()
    for name, parameter in original.named_parameters():
        if "experts" in name:
            continue
        held = state[name]
        assert isinstance(held, DTensor) and held.shape == parameter.shape, name
        assert torch.equal(held.full_tensor(), parameter), name
    assert any("stacked" in name for name in state)
    assert set(state) >= {name for name, _ in original.named_buffers()}
    whole = wrapped.full_state_dict()
    assert set(whole) == set(original.state_dict())
    assert all(torch.equal(whole[k], v) for k, v in original.state_dict().items())
    other = {k: v + 1 for k, v in original.state_dict().items()}
    wrapped.load_full_state_dict(other)
    assert all(torch.equal(v, other[k]) for k, v in wrapped.full_state_dict().items())
    original.load_state_dict(other)
    batch = batch_for(SMALL, 5)
    assert_same_step(step_of(wrapped, SMALL, batch), eager_step(original, batch))


def test_state_keeps_names_and_goes_both_ways_as_whole_tensors(ranks: Pools) -> None:
    ranks(4)(on_rank_state)


def on_rank_incomplete_state() -> None:
    wrapped, original = parallel_of(SMALL, 2)
    before = wrapped.full_state_dict()
    state = original.state_dict()
    with pytest.raises(KeyError, match=r"norm\.weight"):
        wrapped.load_full_state_dict({k: v for k, v in state.items() if k != "norm.weight"})
    with pytest.raises(ValueError, match="surplus"):
        wrapped.load_full_state_dict({**state, "surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        wrapped.load_full_state_dict({**state, "norm.weight": torch.zeros(1)})
    assert all(torch.equal(v, before[k]) for k, v in wrapped.full_state_dict().items())


def test_a_state_that_does_not_fit_changes_nothing(ranks: Pools) -> None:
    ranks(2)(on_rank_incomplete_state)


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-4)


def on_rank_checkpoint(folder: str) -> None:
    """Two steps, save, load under another ``ep``, and a third step as if nothing had happened."""
    first, original = parallel_of(SMALL, ep=4)
    update, reference = _adamw(first), _adamw(original)
    for seed in (1, 2):
        batch = batch_for(SMALL, seed)
        step_of(first, SMALL, batch)
        update.step()
        _reference_step(original, reference, batch)
    model_state, optimizer_state = get_state_dict(first, update)
    saved = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.save(saved, checkpoint_id=folder)
    for ep in (4, 2):
        second, _ = parallel_of(SMALL, ep=ep)
        resumed = _adamw(second)
        model_state, optimizer_state = get_state_dict(second, resumed)
        loaded = {"model": model_state, "optimizer": optimizer_state}
        checkpoint.load(loaded, checkpoint_id=folder)
        set_state_dict(
            second,
            resumed,
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )
        again = copy.deepcopy(original)
        again_update = _adamw(again)
        again_update.load_state_dict(copy.deepcopy(reference.state_dict()))
        batch = batch_for(SMALL, 3)
        step_of(second, SMALL, batch)
        resumed.step()
        _reference_step(again, again_update, batch)
        assert_same_weights(second.full_state_dict(), whole_state(again))


def _reference_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> None:
    eager_step(model, batch)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_resumes_under_another_plan(ranks: Pools) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks(4)(on_rank_checkpoint, folder)


def on_rank_meta() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    original = build(SMALL)
    with torch.device("meta"):
        empty = SMALL.build()
    local = {k: v[:2] for k, v in batch_for(SMALL).items()}
    wrapped = parallelize(empty, mesh, batch=local)
    wrapped.load_full_state_dict(original.state_dict())
    batch = batch_for(SMALL, 4)
    assert_same_step(step_of(wrapped, SMALL, batch), eager_step(original, batch))


def test_a_model_without_values_takes_them_from_a_state(ranks: Pools) -> None:
    ranks(2)(on_rank_meta)


def on_rank_initialised_apart() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(dist.get_rank())
    original = build(SMALL)
    first = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(dist.get_rank())
    local = {k: v[:2] for k, v in batch_for(SMALL).items()}
    with traced_once(SMALL):
        wrapped = parallelize(original, mesh, batch=local)
    assert_same_weights(wrapped.full_state_dict(), whole_state(first), tolerance=0.0)


def test_ranks_that_were_initialised_apart_take_the_first_ranks_values(ranks: Pools) -> None:
    ranks(4)(on_rank_initialised_apart)


# --- meshes, modes, batches -----------------------------------------------------------------------


def on_rank_named_mesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "ep"))
    original = build(SMALL)
    local = {k: v[:2] for k, v in batch_for(SMALL).items()}
    with traced_once(SMALL):
        wrapped = parallelize(original, mesh, batch=local)
    assert wrapped.plan.ep == 2
    batch = batch_for(SMALL, 6)
    assert_same_step(step_of(wrapped, SMALL, batch), eager_step(original, batch))


def test_the_names_of_a_mesh_set_the_plan(ranks: Pools) -> None:
    ranks(4)(on_rank_named_mesh)


class Dropping(nn.Module):
    """Dropout of activations, and of a value that all ranks hold alike."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 64)
        self.weight = nn.Parameter(torch.ones(64, 64))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = nn.functional.dropout(self.weight.sum(0), 0.5, self.training)
        dropped = nn.functional.dropout(torch.ones_like(self.embedding(ids)), 0.5, self.training)
        return (self.embedding(ids) * dropped * kept).square().mean(), dropped, kept


def on_rank_dropout(seed: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    original = Dropping()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids = torch.zeros(2, 3, dtype=torch.int64)
    wrapped = parallelize(original, mesh, batch={"ids": ids}, seed=seed)
    first, second = wrapped(ids), wrapped(ids)
    wrapped.eval()
    calm = wrapped(ids)
    return tuple(x.detach() for x in (*first, second[1], calm[1]))


def test_replicas_draw_alike_shards_differ_and_a_seed_reproduces(ranks: Pools) -> None:
    one, again, other = (ranks(2)(on_rank_dropout, seed) for seed in (1, 1, 2))
    (loss, dropped, kept, later, calm), (loss1, dropped1, kept1, _, _) = one
    assert torch.equal(loss, loss1) and torch.equal(kept, kept1)
    assert not torch.equal(dropped, dropped1)
    assert not torch.equal(dropped, later)
    assert (calm == 1).all()
    assert all(torch.equal(a, b) for a, b in zip(one[0], again[0], strict=True))
    assert not torch.equal(one[0][1], other[0][1])


def on_rank_unequal_batches() -> str:
    wrapped, _ = parallel_of(SMALL, 2)
    own = {k: v[: 1 + dist.get_rank()] for k, v in batch_for(SMALL).items()}
    with pytest.raises(errors.MoptraceError, match="different shapes") as caught:
        wrapped(**own)
    return str(caught.value)


def test_ranks_that_are_fed_different_shapes_say_so_instead_of_waiting(ranks: Pools) -> None:
    for text in ranks(2)(on_rank_unequal_batches):
        assert "rank 0" in text and "rank 1" in text and "-100" in text


def on_rank_many_shapes() -> list[str]:
    wrapped, _ = parallel_of(ModelSpec(style="canonical", layers=("dense",)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", parallel.ManyShapesWarning)
        for length in range(3, 4 + parallel.MANY_SHAPES):
            wrapped(**{k: v[:2] for k, v in batch_for(SMALL, length=length).items()})
    return [str(w.message) for w in caught if w.category is parallel.ManyShapesWarning]


def test_many_input_shapes_give_one_warning_that_says_what_to_do(ranks: Pools) -> None:
    for warned in ranks(2)(on_rank_many_shapes):
        (text,) = warned
        assert "Pad" in text and "bucket" in text


# --- the ranks of the tests themselves ------------------------------------------------------------


def on_rank_failing() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("on purpose")


def on_rank_waiting() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_a_failing_rank_fails_with_its_traceback(ranks: Pools) -> None:
    with pytest.raises(RankFailure, match="on purpose"):
        ranks(2)(on_rank_failing)


def test_a_rank_that_waits_for_ever_fails() -> None:
    own = Ranks(2)
    own(dist.get_rank)  # the ranks are there
    with pytest.raises(RankFailure, match="rank 0 did not end"):
        own(on_rank_waiting, limit=1)
    own.stop()
