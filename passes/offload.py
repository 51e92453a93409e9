"""Keep values in the memory of the host from forward to backward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from moptrace import roles
from moptrace.activations import Activations
from moptrace.core import Level, Pass, Program
from moptrace.errors import StepError
from moptrace.passes.recompute import computed_again

__all__ = ["fetched_before", "offload", "sent_to_host"]

ops = torch.ops.moptrace


def offload() -> Pass:
    """Send what enters each layer to the memory of the host, and bring it back for backward.

    A value leaves after its last use in forward. It comes back one layer ahead: when the backward
    of the layer after its own begins. So two of these values at most are on the device at once.
    What enters the last layer stays, since its backward comes next.

    Alone it saves little: ``chain(checkpoint(), offload())`` keeps nothing else of a layer.

    Requires: a step. Ensures: the same operators on the same values. Raises StepError where no
    layer is found.
    Source: FEMP (arXiv 2609.14306), selective checkpoint offload.
    """

    def rewrite(program: Program) -> Program:
        known = Activations(program)
        entries = {known.root[entry] for phase in known.phases for entry in phase.entries}
        if not entries:
            raise StepError(
                "offload found no layers: no value stands between the embedded tokens and the "
                "loss, after a feed-forward network or experts, past which nothing flows"
            )
        kept = set(known.kept)
        sent = [x for x in entries if x in kept and fetched_before(known, x)]
        return sent_to_host(program, {node.name for node in sent}) if sent else program

    return Pass("offload", rewrite, takes=(Level.STEP,), needs=("differentiate",))


def fetched_before(known: Activations, value: fx.Node) -> fx.Node | None:
    """The backward node before which a value would come back from the host.

    None if it may not go there: what is of the last layer, or follows that, is needed too soon.
    """
    for phase in known.phases:
        entered = next((x for x in phase.entries if known.root[x] is value), value)
        if entered in phase.layer_of:
            later = range(phase.layer_of[entered] + 1, phase.layers + 1)
            starts = [phase.starts[layer] for layer in later if layer in phase.starts]
            return starts[0] if len(later) > 1 and starts else None
    return None


def sent_to_host(program: Program, names: Iterable[str]) -> Program:
    """Backward takes the values of these names, and their views, from the memory of the host."""
    wanted = set(names)
    known = Activations(program)
    views = {n.name for n, root in known.root.items() if root is not n and root.name in wanted}
    program = computed_again(program, lambda node: node.name in views)
    known = Activations(program)
    graph, new = program.copy_graph()
    place = {node: at for at, node in enumerate(program.nodes)}
    for phase in known.phases:
        for value in phase.forward:
            users = [user for user in value.users if roles.role(user).backward]
            if value.name not in wanted or not users:
                continue
            reads = [u for x, root in known.root.items() if root is value for u in x.users]
            reads = [u for u in reads if not roles.role(u).backward and u.op != "output"]
            last = max([value, *reads], key=place.__getitem__)
            first = min(users, key=place.__getitem__)
            early = min(fetched_before(known, value) or first, first, key=place.__getitem__)
            with graph.inserting_after(new[last]):
                away = _like(graph.call_function(ops.offload.default, (new[value],)), new[value])
            device = roles.tensor(value).device
            with graph.inserting_before(new[early]):
                back = graph.call_function(ops.prefetch.default, (away,), {"device": device})
                _like(back, new[value], backward=True)
            with graph.inserting_before(new[first]):
                here = graph.call_function(ops.wait_prefetch.default, (back,))
                _like(here, new[value], backward=True)
            for user in users:
                new[user].replace_input_with(new[value], here)
    return program.with_graph(graph)


def _like(node: fx.Node, value: fx.Node, backward: bool = False) -> fx.Node:
    """Give a copy of a value the role and the example of the value."""
    roles.copy_role(node, of=value, backward=backward)
    roles.set_value(node, roles.value(value))
    return node
