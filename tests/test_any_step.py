"""Any model, mesh, plan, optimizer and schedule: the training step is that of one device."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from _report import record_examples
from moptrace import trace
from moptrace.core import chain
from moptrace.costs import Machine
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.offload import offload
from moptrace.passes.recompute import regather
from moptrace.passes.stream_state import stream_state
from moptrace.passes.update_on_host import update_on_host
from moptrace.testing import SimulatedSteps, batches, model_specs, plans, whole_state
from sweeps import WITHOUT_SHRINKING
from test_train_step import OPTIMIZERS, Eager, all_of, assert_same_steps
from test_whole_matrices import ADAFACTOR, Orthogonal

SIZE, LENGTH = 6, 6
EXAMPLES = 60
SCHEDULES = (  # what is kept of activations, and how the step is scheduled then
    (None, None),
    (None, regather()),
    (None, overlapped()),
    (None, chain(regather(), overlapped())),
    (checkpoint(), None),
    (chain(checkpoint(collectives=True), offload()), overlapped()),
)

EVERY_OPTIMIZER = OPTIMIZERS | {"Adafactor": ADAFACTOR, "Orthogonal": Orthogonal}

STREAMED = stream_state(bucket=500, gradients=True)
PLACES = (  # where the optimizer's state is, and its updates run
    "device",
    STREAMED,
    chain(update_on_host(bucket=500), STREAMED),
    chain(update_on_host(True, 500, machine=Machine(host=1e6, host_memory=2e6)), STREAMED),
)
STEPS_PER_MODEL = 6  # a model is traced once and trained in several ways


@settings(max_examples=EXAMPLES // STEPS_PER_MODEL, phases=WITHOUT_SHRINKING)
@given(st.data())
def test_any_step_is_that_of_one_device(data: st.DataObject) -> None:
    stages = data.draw(st.sampled_from([1, 1, 1, 2]), label="stages")
    spec = data.draw(model_specs(("canonical",)), label="model")
    spec = replace(spec, layers=("moe", "dense")[:stages])
    ranks = data.draw(st.sampled_from([2, 1, 2, 3]), label="ranks of a stage")
    traced, *fed = (data.draw(batches(spec.vocabulary, SIZE, LENGTH)) for _ in range(4))
    model = spec.build()
    program = canonical()(trace(model, traced))
    for number in range(STEPS_PER_MODEL):
        plan = data.draw(plans(ranks, LENGTH), label=f"plan {number}")
        plan = replace(plan, dropping=None, pp=stages)  # dropping is not what one device does
        name = data.draw(st.sampled_from(sorted(EVERY_OPTIMIZER)), label=f"optimizer {number}")
        max_norm = data.draw(st.sampled_from([None, 0.3, math.inf]), label=f"max_norm {number}")
        kept, schedule = data.draw(st.sampled_from(SCHEDULES), label=f"schedule {number}")
        when = ["after", "forward"] + (["backward"] if max_norm in (None, math.inf) else [])
        updates = data.draw(st.sampled_from(when), label=f"updates {number}")
        place = data.draw(st.sampled_from(PLACES), label=f"state {number}")
        make, local = all_of(EVERY_OPTIMIZER[name]), sharded(plan, ranks * stages)(program)
        simulated = SimulatedSteps(
            local,
            whole_state(model),
            make,
            max_norm,
            schedule=schedule,
            updates=updates,
            state=place,
            activations=kept,
        )
        assert_same_steps(simulated, Eager(model, make, max_norm), fed)
        record_examples(of="training step")
