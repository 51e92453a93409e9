"""Every collective and reduction that the passes insert is needed.

In built programs each such node is deleted (its users take its input) or doubled (applied twice),
as a wrong pass might leave it: with the placements of the right program. Transposes of collectives
and sharding rules are exchanged for wrong ones. The checker or the comparison with the unsharded
step must object to every mutant; the end of the session shows how many each of them caught, and a
survivor fails the test with its name.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from _report import remark
from moptrace import Balance, Dropping, Plan, Program, collectives, roles, rules, trace
from moptrace.check import check
from moptrace.collectives import COLLECTIVES
from moptrace.errors import CheckError
from moptrace.passes.default import canonical, sharded
from moptrace.rings import ring
from moptrace.rules import Rule
from moptrace.testing import (
    ModelSpec,
    Step,
    assert_same_step,
    eager_step,
    simulated_step,
    whole_state,
)

aten, ops = torch.ops.aten, torch.ops.moptrace


class Everything(nn.Module):
    """Reductions of every sort over the batch, and parameters that stay split when used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.mix = nn.Linear(6, 6)
        self.classes = nn.Linear(6, 13, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(input_ids) * self.scale
        x = x + self.mix(x).cumsum(0) + x.softmax(0) + x.std(0) + x.mean(0)
        logits = self.classes(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        penalty = x.mean().square() + x.square().sum() * 1e-3 + self.mix.weight.square().sum()
        return loss + penalty, logits


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its local program, a batch, and the step that is right."""

    label: str
    model: nn.Module
    local: Program
    batch: dict[str, Tensor]
    want: Step

    def faults(self, program: Program) -> list[str]:
        """Who objects to a program that should compute the model's step."""
        found: list[str] = []
        try:
            check(program)
        except (CheckError, AssertionError, ValueError):
            found.append("checker")
        try:
            assert_same_step(
                simulated_step(program, whole_state(self.model), self.batch), self.want
            )
        except AssertionError:
            found.append("comparison")
        except (RuntimeError, IndexError, ValueError, TypeError):
            found.append("comparison")  # the program does not run
        return found


def some_batch(seed: int, size: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(13, (size, 6), generator=generator)
    labels = torch.randint(13, (size, 6), generator=generator)
    labels[: size // 4, :2] = -100
    return {"input_ids": ids, "labels": labels}


MOE = ModelSpec(
    style="canonical", experts=5, biases=True, shared="gated", attention="fused", balance=0.1
)
EAGERLY = Balance(threshold=1.0, rows=1)
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], int, Plan]] = {
    "experts over all ranks": (MOE.build, 3, Plan(ep=3)),
    "experts in groups": (MOE.build, 4, Plan(ep=2)),
    "experts in groups, alike": (MOE.build, 4, Plan(ep=2, edp="replicate")),
    "hidden units of experts": (MOE.build, 4, Plan(ep=2, etp=2)),
    # Of five experts, each of which may keep all tokens: nothing is dropped.
    "rows in slots": (MOE.build, 4, Plan(ep=2, etp=2, dropping=Dropping(2.5, pad=True))),
    "experts lent": (MOE.build, 4, Plan(ep=2, etp=2, balance=EAGERLY)),
    "experts lent in groups": (MOE.build, 4, Plan(ep=2, balance=EAGERLY)),
    "tokens gathered": (MOE.build, 4, Plan(ep=2, etp=2, dispatcher="all-gather")),
    "no expert parallelism": (MOE.build, 2, Plan(ep=1)),
    "reductions": (lambda: _seeded(Everything), 3, Plan(ep=1)),
    "heads for tokens": (MOE.build, 8, Plan(ep=2, cp=2, logits_bytes=0, embedding_bytes=0)),
    "rings": (MOE.build, 3, Plan(ep=3, cp=3, context="ring", logits_bytes=0)),
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def local_program(label: str) -> Program:
    make, world_size, plan = SUBJECTS[label]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an operator without a rule is part of the plot
        program = canonical()(trace(make(), some_batch(0)))
        return sharded(plan, world_size)(program)


@cache
def subject(label: str) -> Subject:
    model, batch = SUBJECTS[label][0](), some_batch(1)
    return Subject(label, model, local_program(label), batch, eager_step(model, batch))


# --- nodes that the passes insert -----------------------------------------------------------------

ROWS = {ops.group_rows.default, ops.ungroup_rows.default, ops.spread_pairs.default}
PACKING = {ops.pack.default, ops.unpack.default}


def kind_of(node: fx.Node) -> str | None:
    """What an inserted node is, or None for a node of the user's."""
    row = collectives.collective(node.target) or ring(node.target)
    if row is not None:
        return row.name
    if node.target in ROWS | PACKING:
        return str(node.target).split(".")[1]
    made_by = roles.role(node).made_by
    if made_by == "localize" and node.target is aten.div.Tensor:
        return "division of an average"
    if made_by == "localize" and node.target is aten.sum.dim_IntList:
        return "sum of exchanged counts"
    if made_by == "normalize_losses" and node.target is aten.sum.default:
        return "count of labels"
    return None


def deleted(program: Program, name: str) -> Program:
    """The node's users take its input; an operator that travels stays where it is."""
    graph, node = _copy(program, name)
    if (row := ring(node.target)) is not None:
        node.target, node.args = row.whole, node.args[: len(row.whole._schema.arguments)]
        return program.with_graph(graph)
    source = node.args[0]
    if isinstance(source, (list, tuple)):  # pack
        source = source[0]
    assert isinstance(source, fx.Node)
    if node.target is ops.unpack.default:
        for item in list(node.users):
            item.replace_all_uses_with(source)
            graph.erase_node(item)
    else:
        node.replace_all_uses_with(source)
    graph.erase_node(node)
    return program.with_graph(graph)


def doubled(program: Program, name: str) -> Program | None:
    """The node is applied to its own result; a sum, which would not change, counts twice.

    None where neither has a meaning.
    """
    graph, node = _copy(program, name)
    if node.target in PACKING or ring(node.target):
        return None
    with graph.inserting_after(node):
        again = graph.node_copy(node, lambda x: x)
    node.replace_all_uses_with(again)
    again.args = (node, *node.args[1:])
    if kind_of(node) == "count of labels":
        again.target, again.args = aten.mul.Scalar, (node, 2)
    return program.with_graph(graph)


def _copy(program: Program, name: str) -> tuple[fx.Graph, fx.Node]:
    graph, _ = program.copy_graph()
    return graph, next(n for n in graph.nodes if n.name == name)


def mutants(it: Subject) -> Iterator[tuple[str, str, Program]]:
    """Every inserted node, deleted and doubled: its kind, a name, the program."""
    for node in it.local.graph.nodes:
        kind = kind_of(node)
        if kind is None:
            continue
        for verb, mutate in (("deleted", deleted), ("doubled", doubled)):
            mutant = mutate(it.local, node.name)
            if mutant is not None:
                yield kind, f"{it.label}: {verb} %{node.name}", mutant


def test_the_programs_are_right_before_anything_is_changed() -> None:
    for label in SUBJECTS:
        it = subject(label)
        assert it.faults(it.local) == [], label


def test_no_inserted_node_can_be_deleted_or_doubled_unnoticed() -> None:
    seen: Counter[str] = Counter()
    caught: Counter[str] = Counter()
    survivors: list[str] = []
    for label in SUBJECTS:
        for kind, name, mutant in mutants(subject(label)):
            seen[kind] += 1
            by = subject(label).faults(mutant)
            print(f"{name} ({kind}): caught by {' and '.join(by) or 'nobody'}")
            caught.update(by)
            if not by:
                survivors.append(f"{name} ({kind})")
    for kind, number in sorted(seen.items()):
        remark(f"mutants of {kind}: {number}")
    remark(
        f"mutants: {seen.total()}, caught by the checker {caught['checker']}, by the comparison "
        f"with the unsharded step {caught['comparison']}, survived {len(survivors)}"
    )
    assert not survivors, "\n".join(survivors)
    assert set(seen) >= REACHED, f"no instance of {REACHED - set(seen)}"


# Collectives that the passes insert for these plans, and the nodes around them.
REACHED = {
    "all_gather", "all_gather_invariant", "all_reduce", "all_reduce_invariant", "vary",
    "take_shard", "all_to_all", "ring_attention", "ring_embedding_rows", "ring_vocab_projection",
    "all_gather_rows", "reduce_scatter_rows", "send_experts", "sum of exchanged counts",
    "exchange_counts", "send_rows", "return_rows", "group_rows", "ungroup_rows", "spread_pairs",
    "pack", "unpack",
    "division of an average", "count of labels",
}  # fmt: skip


# --- transposes -----------------------------------------------------------------------------------


def _compatible(name: str) -> list[str | None]:
    """Collectives that take the arguments of the transpose and do something else, and none."""
    right = COLLECTIVES[str(COLLECTIVES[name].transpose)]
    others = [
        row.name
        for row in COLLECTIVES.values()
        if row.schema == right.schema and row.meaning is not right.meaning
    ]
    return [*others, None]


def _differentiated(program: Program) -> set[str]:
    """Collectives of floating values in the program."""
    found: set[str] = set()
    for node in program.graph.nodes:
        row = collectives.collective(node.target)
        if row is not None and row.transpose and roles.tensor(node).is_floating_point():
            found.add(row.name)
    return found


def test_no_transpose_can_be_exchanged_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    survivors: list[str] = []
    total = 0
    names = sorted(set().union(*(_differentiated(subject(label).local) for label in SUBJECTS)))
    for name in names:
        row = COLLECTIVES[name]
        labels = [label for label in SUBJECTS if name in _differentiated(subject(label).local)]
        for wrong in _compatible(name):
            total += 1
            with monkeypatch.context() as patch:
                patch.setitem(collectives._BY_OP, row.op, replace(row, transpose=wrong))
                by = [label for label in labels if subject(label).faults(subject(label).local)]
            print(f"the gradient of {name} by {wrong}: caught in {by or 'no program'}")
            if not by:
                survivors.append(f"the gradient of {name} by {wrong} instead of {row.transpose}")
    remark(f"mutants of transposes: {total}, survived {len(survivors)}")
    assert not survivors, "\n".join(survivors)


# --- rules ----------------------------------------------------------------------------------------


def _elementwise(node: fx.Node) -> Rule:
    """As if every dimension could be split."""
    shape = roles.tensor(rules.operands(node)[0]).shape
    dims = tuple(f"d{i}" for i in range(len(shape)))
    return Rule((dims,), (dims,))


WRONG_RULES: dict[str, tuple[Any, Callable[[fx.Node], Rule | None]]] = {
    "a mean that is only summed": (aten.mean, rules.reduction(summed=True)),
    "a sum that is averaged": (aten.sum, rules.reduction(summed=True, average=True)),
    "a running sum by parts": (aten.cumsum, _elementwise),
    "a softmax by parts": (aten.softmax, _elementwise),
}


@pytest.mark.parametrize("what", WRONG_RULES)
def test_no_rule_can_be_wrong_unnoticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packet, wrong = WRONG_RULES[what]
    it = subject("reductions")
    with monkeypatch.context() as patch:
        patch.setitem(rules.RULES, packet, wrong)
        program = local_program("reductions")
    assert it.faults(program), what
