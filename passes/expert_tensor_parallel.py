"""Expert tensor parallel: the hidden units of each expert over the ranks of an axis."""

from __future__ import annotations

import torch
from torch import fx

from moptrace import roles
from moptrace.core import Level, Pass, Program
from moptrace.passes.regions import Finder, Region, ask
from moptrace.placement import REPLICATE, Layout, Rows
from moptrace.rules import operands, rule_for

__all__ = ["expert_tensor_parallel"]

PRODUCT = torch.ops.moptrace.grouped_mm.default


def expert_tensor_parallel(layout: Layout) -> Pass:
    """Split what lies between an expert's grouped products over the ranks of the axis ``etp``.

    It is tensor parallel on routed rows: the rows of an expert are sent to its ranks along ``ep``,
    gathered along ``etp``, and there each rank computes its share of the hidden units; the terms of
    the sum are scattered along ``etp`` and go back along ``ep`` (Liu et al., MoE Parallel Folding,
    2025, section 3.2). What follows the last product, such as its bias, is computed once for each
    row, after the sum.

    Experts of which no dimension can be shared keep their weights whole: each rank gathers them and
    computes the rows that came to it, as along ``edp``, with a note.

    Requires: ``classify``. Ensures: the same values on one device.
    """

    def rewrite(program: Program) -> Program:
        ranks = {axis.name: axis.size for axis in layout.experts.axes}.get("etp", 1)
        if ranks == 1:
            return program
        graph, _ = program.copy_graph()
        parameters = {p.name for p in program.signature.parameters}
        finder = Finder(graph, parameters, ranks, routed=True)
        shared: set[fx.Node] = set()
        for region in list(finder.regions()):
            _write(region, finder.rows)
            shared |= region.nodes
        program = program.with_graph(graph)
        whole = [n for n in graph.nodes if n.target is PRODUCT and n not in shared]
        for node in {roles.role(node).block: node for node in reversed(whole)}.values():
            program = program.with_note(
                f"the experts have no hidden units that etp={ranks} ranks can share "
                f"({roles.where(node)}), so each of them gathers their whole weights; choose an "
                "etp that divides the hidden units, or etp=1 where the experts mix them"
            )
        return program

    options = (("layout", str(layout)),)
    return Pass("expert_tensor_parallel", rewrite, options, takes=(Level.CANONICAL,))


def _write(region: Region, routed: set[fx.Node]) -> None:
    """Ask for all rows of an expert inside the region, a share of what they share, and own rows."""
    shares = {**region.inside, **region.entries}
    for node in sorted(region.nodes):
        inputs = [x for x in operands(node) if x in routed and x not in region.inside]
        rule = rule_for(node) if inputs else None
        for x in inputs:
            if rule is None or rule.counts is None or x is not operands(node)[rule.counts]:
                sent = ask(x, "ep", Rows("expert"), {node})
                whole = ask(sent, "etp", REPLICATE, {node}) if sent else None
                if whole and (split := shares.get(x)):
                    ask(whole, "etp", split, {node})
    for value, kind in {**region.weights, **region.entries}.items():
        if value not in routed:
            ask(value, "etp", kind, region.nodes)
    end = region.last.node
    ask(end, "etp", Rows("token"), set(end.users))
