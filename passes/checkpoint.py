"""Keep what enters a layer, or a component, and compute the rest again in backward."""

from __future__ import annotations

from torch import fx

from moptrace.activations import Activations, communicates
from moptrace.core import Level, Pass, Program
from moptrace.errors import StepError
from moptrace.liveness import sizes_of_values
from moptrace.passes.recompute import computed_again
from moptrace.roles import Component, component

__all__ = ["checkpoint"]


def checkpoint(*components: Component | str, collectives: bool = False) -> Pass:
    """Let backward compute the values of layers again, or those of some components alone.

    Without ``components``, each layer keeps what enters it. Layers are found by structure
    (``activations.py``). With them, such as ``Component.ATTENTION`` and ``Component.EXPERTS``,
    everything that these components compute is computed again from what goes into them.

    What routing decides is decided once: the choice of experts, their counts, the order of rows
    and the sizes that follow are kept. Random operators draw the same numbers again. What ranks
    send each other is kept too, with a note, unless ``collectives``; then it is sent again, in the
    same order on all ranks. What is made of parameters alone is left to ``regather``.

    Requires: a step. Ensures: the same operators on the same values. Raises StepError where no
    layer is found.
    Source: Chen et al. 2016 (arXiv 1604.06174); per component, as in Megatron-Core.

    >>> from moptrace.passes.checkpoint import checkpoint
    >>> print(checkpoint("attention", "experts"))
    checkpoint(components=('attention', 'experts'), collectives=False)
    """
    wanted = tuple(Component(x) for x in components)

    def rewrite(program: Program) -> Program:
        known = Activations(program)
        inside: set[fx.Node] = set()
        kept: set[fx.Node] = set()
        for phase in known.phases:
            if not wanted and not phase.layers:
                raise StepError(
                    "checkpoint found no layers: no value stands between the embedded tokens and "
                    "the loss, after a feed-forward network or experts, past which nothing flows. "
                    "Name components instead: checkpoint('attention', 'experts')"
                )
            if wanted:
                inside.update(node for node in phase.forward if component(node) in wanted)
            else:
                inside.update(node for node in phase.forward if phase.is_in_layer(node))
                kept.update(x for entry in phase.entries for x in (entry, known.root[entry]))
        again = {x for x in inside - kept if known.may_be_again(x, collectives)}
        if not again:
            return program
        names = {node.name for node in again}
        result = computed_again(program, lambda node: node.name in names)
        return result if collectives else _with_note(program, result, inside)

    options = (("components", tuple(map(str, wanted))), ("collectives", collectives))
    return Pass("checkpoint", rewrite, options, takes=(Level.STEP,), needs=("differentiate",))


def _with_note(before: Program, after: Program, inside: set[fx.Node]) -> Program:
    """Say what is kept because ranks sent it to each other."""
    names = {node.name for node in inside if communicates(node)}
    sizes = sizes_of_values(after)
    kept = [n for n in Activations(after).kept if n.name in names]
    bytes_ = sum(sizes[node] for node in kept)
    if not bytes_:
        return after
    return after.with_note(
        f"checkpoint keeps {bytes_:,} bytes that ranks sent each other in {len(kept)} collectives; "
        "collectives=True sends them again in backward"
    )
