"""Updates in backward: the same bits, and gradients that do not pile up."""

from __future__ import annotations

import pytest

from moptrace import roles
from moptrace.core import chain
from moptrace.errors import PassError
from moptrace.liveness import lifetimes
from moptrace.passes.default import overlapped
from moptrace.passes.recompute import regather
from moptrace.passes.stream_state import stream_state
from moptrace.roles import Component
from subjects import assert_same_bits
from test_defer_updates import program_of, steps
from test_train_step import batch_of


def test_the_steps_are_bitwise_the_same() -> None:
    early = steps(
        max_norm=None,
        updates="backward",
        state=stream_state(bucket=500),
        schedule=chain(regather(), overlapped()),
    )
    assert_same_bits(steps(max_norm=None), early, [[batch_of(seed)] for seed in range(3)])


def test_a_gradient_is_gone_before_the_next_but_one() -> None:
    """Of all gradients, only few are there at once."""

    def most(updates: str) -> int:
        program = program_of(updates, count=1, max_norm=None)
        spans, alive, found = lifetimes(program), set(), 0
        for node in program.nodes:
            if any(roles.component(user) is Component.OPTIMIZER for user in node.users):
                alive |= {node} if roles.role(node).backward else set()
            found = max(found, len(alive))
            alive -= {x for x in alive if spans.get(x) is node}
        return found

    assert most("after") > 20
    assert most("backward") <= 4


def test_clipping_needs_all_gradients_first() -> None:
    with pytest.raises(PassError, match=r"needs the norm of all.*updates=\"forward\""):
        program_of("backward", count=1)
    program_of("backward", count=1, max_norm=float("inf"))  # nothing is scaled
