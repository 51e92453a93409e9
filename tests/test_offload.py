"""What enters a layer is on the host between forward and backward."""

from __future__ import annotations

from torch import fx

from moptrace import Program
from moptrace.activations import Activations
from moptrace.core import chain
from moptrace.liveness import lifetimes, peak_memory, sizes_of_values
from moptrace.passes.checkpoint import checkpoint
from moptrace.passes.offload import offload
from test_checkpoint import AGAIN, program_of, torch_ops

SENT = chain(AGAIN, offload())


def of_kind(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.nodes if node.target is target]


def on_device(program: Program) -> list[int]:
    """How many of the values that enter layers are on the device, at each place of backward."""
    (phase,) = Activations(program).phases
    copies = {*phase.entries[:-1], *of_kind(program, torch_ops.prefetch.default)}
    spans, alive, found = lifetimes(program), set[fx.Node](), list[int]()
    for node in program.nodes:
        alive |= {node} & copies
        if node in phase.backward:
            found.append(len(alive))
        alive -= {x for x in alive if spans[x] is node}
    return found


def test_two_boundaries_at_most_are_on_the_device() -> None:
    program = program_of()
    assert max(on_device(AGAIN(program))) == 3
    for policy in (SENT, offload()):
        assert max(on_device(policy(program))) == 2


def test_a_value_comes_back_when_the_next_layer_begins() -> None:
    program = SENT(program_of())
    (phase,) = Activations(program).phases
    place = {node: at for at, node in enumerate(program.nodes)}
    entering = [node.args[0] for node in of_kind(program, torch_ops.offload.default)]
    assert entering == list(phase.entries[:-2])  # what enters the last layer stays
    fetches = of_kind(program, torch_ops.prefetch.default)
    waits = of_kind(program, torch_ops.wait_prefetch.default)
    assert [wait.args[0] for wait in waits] == fetches
    for wait, fetch in zip(waits[:-1], fetches[1:], strict=True):
        first_use = min(wait.users, key=place.__getitem__)
        assert place[wait] - 1 <= place[fetch] < place[first_use]


def test_the_host_is_counted_apart() -> None:
    program = program_of()
    again, sent = AGAIN(program), SENT(program)
    sizes = sizes_of_values(sent)
    away = sum(sizes[node] for node in of_kind(sent, torch_ops.offload.default))
    assert peak_memory(sent).host_bytes == away > 0
    assert peak_memory(again).host_bytes == 0
    assert "on the host" in str(peak_memory(sent))


def test_the_order_of_the_passes_does_not_change_what_is_computed_again() -> None:
    program = chain(offload(), checkpoint(collectives=True))(program_of())
    assert len(of_kind(program, torch_ops.offload.default)) == 2
