"""Pipeline stages: which ranks compute a node, and how a value gets to other ranks.

With ``Plan(pp=P)`` the W ranks are P stages of W/P ranks. Every stage's ranks see the same views
(``Layout``), and a model's layers are divided among the stages. One graph still says all of it: a
value belongs to the ranks of one stage, or to *everyone*, if it follows from the batch and from
constants alone, so that whoever needs it computes it. Two operators lead from stage to stage:

``hop(x, source, target)``
    The ranks of one stage send ``x``, each its own part, to those of another. Its gradient hops
    back. A tied weight hops to where it is needed again, so its gradients meet at its owner.
``share(x, source)``
    Everyone gets ``x``, such as the loss, or the sum of squares of a stage's gradients.

Which stage a node belongs to is read off its operands (``stages_of``): all are of one stage, or
everyone's. On one stage's ranks alone both operators are the identity, so a program with stages
runs and can be compared with one that has none. ``passes/take_stage.py`` writes what one stage's
ranks run, in which ``hop`` is ``send``, or ``receive`` and ``received``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from moptrace.collectives import Communicator, Pending

if TYPE_CHECKING:
    from moptrace.core import Program

__all__ = [
    "DOWN",
    "STAGES",
    "UP",
    "Task",
    "hop",
    "in_order",
    "receive",
    "received",
    "send",
    "share",
    "shared",
    "stages_of",
]

# The process groups of the ranks with one place in their stages: for what is shared, and one for
# each direction, so that what waits in one does not hold up the other.
STAGES, UP, DOWN = "stages", "stages up", "stages down"

_library = torch.library.Library("moptrace", "FRAGMENT")
_library.define("hop(Tensor x, int source, int target) -> Tensor")
_library.define("share(Tensor x, int source) -> Tensor")
_library.impl("hop", lambda x, source, target: x.clone(), "CompositeExplicitAutograd")
_library.impl("share", lambda x, source: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake(
    "moptrace::hop", lambda x, source, target: torch.empty_like(x), lib=_library
)
torch.library.register_fake("moptrace::share", lambda x, source: torch.empty_like(x), lib=_library)


def _remember(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    _, ctx.source, ctx.target = inputs


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return hop(gradient, ctx.target, ctx.source), None, None


torch.library.register_autograd("moptrace::hop", _back, setup_context=_remember, lib=_library)

hop: Any = torch.ops.moptrace.hop.default
share: Any = torch.ops.moptrace.share.default


def stages_of(program: Program) -> dict[fx.Node, int | None]:
    """The stage to whose ranks each node belongs; None for what everyone has.

    Raises ValueError, with the node as its argument, where operands are on different stages, or a
    value hops from a stage that does not have it.
    """
    signature = program.signature
    owner = {x.name: x.stage for x in (*signature.parameters, *signature.buffers)}
    found: dict[fx.Node, int | None] = {}
    for node in program.nodes:
        if node.op in ("placeholder", "output"):
            found[node] = owner.get(node.name)
            continue
        of_operands = {found[x] for x in node.all_input_nodes} - {None}
        leads = node.target in (hop, share)
        if len(of_operands) > 1 or (leads and of_operands - {node.args[1]}):
            raise ValueError(node)
        found[node] = next(iter(of_operands), None)
        if leads:
            found[node] = int(node.args[2]) if node.target is hop else None  # type: ignore[arg-type]
    return found


# --- when a stage does what -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """The forward or the backward of one micro-batch on one stage."""

    stage: int
    micro_batch: int
    backward: bool


def in_order(stages: int, micro_batches: int) -> list[Task]:
    """All tasks as they begin, one forward and one backward in turn (1F1B).

    A stage does a backward as soon as it can, else a forward. On stage s of P at most P - s
    micro-batches are between the two, for which something is kept. A backward is taken to last as
    long as two forwards (Narayanan et al., Efficient large-scale language model training,
    2021, section 2.2.1).

    >>> order = in_order(2, 3)
    >>> "".join("FB"[t.backward] + str(t.micro_batch) for t in order if t.stage == 0)
    'F0F1B0F2B1B2'
    """
    finished: dict[Task, int] = {}
    begun: list[Task] = []
    free = [0] * stages
    done = [[0, 0] for _ in range(stages)]  # forwards and backwards that began on each stage

    def can_begin(task: Task, clock: int) -> bool:
        stage, number, backward = task.stage, task.micro_batch, task.backward
        if number == micro_batches:
            return False
        before = [Task(stage - 1, number, False)] if stage and not backward else []
        if backward:
            before = [Task(stage, number, False)]
            before += [Task(stage + 1, number, True)] if stage + 1 < stages else []
        elif number - done[stage][1] >= stages - stage:
            return False
        return all(finished.get(x, clock + 1) <= clock for x in before)

    clock = 0
    while len(begun) < 2 * stages * micro_batches:
        for stage in range(stages):
            for backward in (True, False):
                task = Task(stage, done[stage][backward], backward)
                if free[stage] <= clock and can_begin(task, clock):
                    begun.append(task)
                    done[stage][backward] += 1
                    finished[task] = free[stage] = clock + 1 + backward
        clock += 1
    return begun


# --- on the ranks of one stage --------------------------------------------------------------------


@has_side_effect
def send(x: Tensor, target: int, number: int) -> None:
    """Let a value go to another stage; ``number`` tells a program's hops apart."""
    here = Communicator.current()
    if x.numel():
        group = here.groups[UP if target > here.stage else DOWN]
        sent = x.detach().contiguous()
        here.keep(dist.isend(sent, group=group, group_dst=target, tag=number), sent)


@has_side_effect
def receive(
    shape: Sequence[int], dtype: torch.dtype, source: int, number: int, *, device: Any = "cpu"
) -> Pending:
    """Let a value of this shape come from another stage."""
    here = Communicator.current()
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    if not out.numel():
        return Pending(None, lambda: out)
    group = here.groups[UP if source < here.stage else DOWN]
    return Pending(dist.irecv(out, group=group, group_src=source, tag=number), lambda: out)


@has_side_effect
def received(pending: Pending) -> Tensor:
    """The value that came from another stage."""
    return pending.wait()


@has_side_effect
def shared(
    x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int, *, device: Any = "cpu"
) -> Tensor:
    """The value that one stage has (``x`` there, None elsewhere), on all of them."""
    here = Communicator.current()
    out = torch.empty(tuple(shape), dtype=dtype, device=device) if x is None else x.clone()
    dist.broadcast(out, group=here.groups[STAGES], group_src=source)
    return out
