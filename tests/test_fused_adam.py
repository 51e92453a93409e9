"""Torch's fused kernel of Adam as one node of a step, in place where that is safe."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moptrace.kernels.fused_adam  # noqa: F401  registers the operator
from moptrace import train_step
from moptrace.executable import executable
from moptrace.passes.stream_state import stream_state
from moptrace.testing import assert_same_weights, whole_state
from test_defer_updates import program_of
from test_train_step import ADAMW, SMALL, Eager, Pools, all_of, assert_close, batch_of, parallel_of

ops = torch.ops.moptrace
FUSED = partial(ADAMW, fused=True)


def arguments(amsgrad: bool) -> tuple[Any, ...]:
    x, grad, *moments = (torch.rand(3, 5, dtype=torch.float64) for _ in range(4 + amsgrad))
    return x, grad, moments, torch.tensor(3.0), torch.tensor(0.01, dtype=torch.float64)


OPTIONS = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-4, "maximize": False}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_it_is_a_step_of_torchs_optimizer(amsgrad: bool, decoupled: bool) -> None:
    x, grad, moments, step, lr = arguments(amsgrad)
    options = {**OPTIONS, "amsgrad": amsgrad, "decoupled": decoupled}
    new = ops.fused_adam.default(x, grad, moments, step, lr, **options)
    parameter = nn.Parameter(x.clone())
    parameter.grad = grad
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(
        [parameter], 0.01, (0.9, 0.99), 1e-4, 0.1, amsgrad, foreach=False, maximize=False
    )
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    held = dict(zip(keys, (m.clone() for m in moments), strict=False))
    optimizer.state[parameter] = {"step": step - 1, **held}
    optimizer.step()
    meant = [parameter.detach(), *(optimizer.state[parameter][key] for key in held)]
    for value, want in zip(new, meant, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    in_place = [x.clone(), *(m.clone() for m in moments)]
    ops.fused_adam_.default(in_place[0], grad, in_place[1:], step, lr, **options)
    assert all(torch.equal(a, b) for a, b in zip(in_place, new, strict=True))


def test_the_operator_is_registered_correctly() -> None:
    options = {**OPTIONS, "amsgrad": False, "decoupled": True}
    torch.library.opcheck(ops.fused_adam.default, arguments(False), options)


@pytest.mark.parametrize("state", ["device", stream_state(bucket=2_100)], ids=["device", "host"])
@pytest.mark.parametrize("updates", ["after", "forward"])
def test_every_update_of_a_step_works_in_place(updates: str, state: Any) -> None:
    program = program_of(updates, name="AdamW, fused", state=state)
    targets = [node.target for node in executable(program, "cpu").graph.nodes]
    count = sum(node.target is ops.fused_adam.default for node in program.nodes)
    assert targets.count(ops.fused_adam_.default) == count > 0
    assert ops.fused_adam.default not in targets


def test_a_value_that_is_read_again_is_not_overwritten() -> None:
    """Such as the old parameter, if something after the update still needs it."""
    program = program_of("after", name="AdamW, fused")
    graph, copies = program.copy_graph()
    node = next(n for n in program.nodes if n.target is ops.fused_adam.default)
    old, (new, *_) = copies[node.args[0]], [copies[user] for user in node.users]  # type: ignore[index]
    with graph.inserting_before(graph.output_node()):
        sum_of_both = graph.call_function(torch.ops.aten.add.Tensor, (old, new))
    sum_of_both.meta.update(new.meta)
    graph.output_node().replace_input_with(new, sum_of_both)
    targets = [n.target for n in executable(program.with_graph(graph), "cpu").graph.nodes]
    assert targets.count(ops.fused_adam.default) == 1


def on_rank(updates: str, state: str) -> None:
    model = parallel_of(SMALL, 2)
    optimizer = FUSED(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = train_step(model, optimizer, max_norm=0.5, updates=updates, state=state)
    eager = Eager(SMALL.build(), all_of(FUSED), 0.5)
    decay = torch.optim.lr_scheduler.ExponentialLR(eager.optimizer, 0.5)
    for number in range(4):
        assert_close(step(**model.local_batch(batch_of(number))), eager.step(batch_of(number))[0])
        schedule.step()
        decay.step()
    seen: list[Tensor] = [x.to_local() for x in model.parameters()]  # type: ignore[attr-defined]
    assert all(x.isfinite().all() for x in seen)
    assert_same_weights(model.full_state_dict(), whole_state(eager.model))


@pytest.mark.parametrize(("updates", "state"), [("after", "device"), ("forward", "host")])
def test_real_ranks_take_the_same_steps(updates: str, state: str, ranks: Pools) -> None:
    ranks(2)(on_rank, updates, state)
