"""Within a budget of bytes, at the least cost: predicted, kept, and the same bits."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest

from moptrace import Plan, Program, errors, trace
from moptrace.costs import Machine, operator_costs
from moptrace.liveness import peak_memory
from moptrace.passes.default import canonical, overlapped, sharded
from moptrace.passes.differentiate import differentiate
from moptrace.passes.fit_activations import _Problem, fit_activations
from test_checkpoint import (
    AGAIN,
    PLAN,
    SPEC,
    assert_same_bits,
    batch_of,
    decided_in_backward,
    program_of,
    results,
    unchanged,
)

MACHINE = Machine()


def seconds(program: Program) -> float:
    return sum(operator_costs(program, MACHINE).values())


def within(part: float, program: Program, **options: object) -> Program:
    return fit_activations(int(part * peak_memory(program).bytes), **options)(program)  # type: ignore[arg-type]


def test_the_peak_is_within_the_budget_and_less_costs_more() -> None:
    program = program_of()
    most = peak_memory(program).bytes
    last = seconds(program)
    for part in (0.95, 0.85, 0.75):
        changed = within(part, program, collectives=True)
        assert peak_memory(changed).bytes <= part * most
        assert last <= seconds(changed)
        last = seconds(changed)
        assert decided_in_backward(changed) == decided_in_backward(program)
        assert changed.notes[-1].startswith("fit_activations: a predicted peak of")


def test_the_budget_is_that_of_the_scheduled_step() -> None:
    program, schedule = program_of(), overlapped()
    budget = int(0.8 * peak_memory(schedule(program)).bytes)
    fitted = fit_activations(budget, collectives=True, then=schedule)(program)
    assert peak_memory(schedule(fitted)).bytes <= budget


def test_what_fits_is_left_alone() -> None:
    program = program_of()
    assert within(1.0, program) is program


def test_it_is_no_worse_than_layers() -> None:
    program = program_of()
    layers = AGAIN(program)
    fitted = fit_activations(peak_memory(layers).bytes, collectives=True)(program)
    assert peak_memory(fitted).bytes <= peak_memory(layers).bytes
    assert seconds(fitted) <= seconds(layers)


@pytest.mark.parametrize(
    ("machine", "is_sent"), [(Machine(host=1e15), True), (Machine(host=1.0), False)]
)
def test_the_cheaper_way_is_chosen(machine: Machine, is_sent: bool) -> None:
    changed = within(0.75, program_of(), machine=machine)
    assert (peak_memory(changed).host_bytes > 0) == is_sent


@pytest.mark.parametrize("host", [1e15, 1.0])
def test_the_step_is_bitwise_the_same(host: float) -> None:
    chosen = lambda program: within(0.75, program, machine=Machine(host=host))  # noqa: E731
    assert_same_bits(results(chosen), unchanged("ep", 1))


def test_a_budget_that_is_too_small_says_the_least() -> None:
    program = program_of(spec=replace(SPEC, layers=("moe",)))
    with pytest.raises(errors.StepError, match=r"The least that was found needs") as caught:
        within(0.1, program)
    message = str(caught.value)
    assert "%layers_0_block_gate" in message  # what is alive then
    least = re.search(r"needs ([\d,]+) bytes", message)
    assert least is not None
    budget = int(least[1].replace(",", ""))
    assert peak_memory(fit_activations(budget)(program)).bytes <= budget


def test_like_layers_share_their_choices() -> None:
    def problem(layers: int, groups: int) -> _Problem:
        spec = replace(SPEC, layers=("dense",) * layers, attention="", balance=0.0)
        program = canonical()(trace(spec.build(), batch_of(9)))
        return _Problem(differentiate()(sharded(Plan(ep=1), 1)(program)), MACHINE, groups=groups)

    few, many, apart = problem(3, 1), problem(6, 1), problem(6, 3)
    assert few.choices == many.choices < apart.choices
    assert len(few.values) < len(many.values) == len(apart.values)


def test_ranks_that_could_choose_differently_do_not_send_again() -> None:
    spec = replace(SPEC, layers=("moe",), vocabulary=17, balance=0.0)
    local = sharded(PLAN, 2)(canonical()(trace(spec.build(), batch_of(9))))
    program = differentiate()(local)
    with pytest.raises(errors.StepError, match="shards differ in size"):
        within(0.8, program, collectives=True)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(errors.StepError, match=r"pip install 'moptrace\[fit\]'"):
        within(0.8, program_of())
