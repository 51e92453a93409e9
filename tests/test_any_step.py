"""Any model, mesh, plan, optimizer and schedule: the training step is that of one device."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from _report import record_examples
from moptrace import trace
from moptrace.passes.default import canonical, sharded
from moptrace.passes.recompute import regather
from moptrace.testing import SimulatedSteps, batches, model_specs, plans, whole_state
from test_train_step import OPTIMIZERS, Eager, all_of, assert_same_steps

SIZE, LENGTH = 6, 6
EXAMPLES = 60
SCHEDULES = (None, regather())


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_any_step_is_that_of_one_device(data: st.DataObject) -> None:
    spec = replace(data.draw(model_specs(("canonical",)), label="model"), layers=("moe",))
    ranks = data.draw(st.sampled_from([2, 3, 1]), label="ranks")
    plan = data.draw(plans(ranks, LENGTH), label="plan")
    make = all_of(OPTIMIZERS[data.draw(st.sampled_from(sorted(OPTIMIZERS)), label="optimizer")])
    max_norm = data.draw(st.sampled_from([None, 0.3, math.inf]), label="max_norm")
    schedule = data.draw(st.sampled_from(SCHEDULES), label="schedule")
    traced, *fed = (data.draw(batches(spec.vocabulary, SIZE, LENGTH)) for _ in range(3))
    model = spec.build()
    local = sharded(plan, ranks)(canonical()(trace(model, traced)))
    simulated = SimulatedSteps(local, whole_state(model), make, max_norm, schedule=schedule)
    assert_same_steps(simulated, Eager(model, make, max_norm), fed)
    record_examples(of="training step")
