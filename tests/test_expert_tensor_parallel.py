"""Expert tensor parallel and folding: groups of ranks, what moves in which order, the same step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from double import InFloat64
from gloo import Ranks
from moptrace import Layout, Plan, Program, roles, trace
from moptrace.collectives import collective
from moptrace.kernels.expert_function import ExpertFunction
from moptrace.kernels.grouped_mm import expert_rows, grouped_mm
from moptrace.kernels.routing import combine, dispatch, pair_rows
from moptrace.passes.default import canonical, sharded
from moptrace.passes.expert_tensor_parallel import expert_tensor_parallel
from moptrace.placement import View
from moptrace.reshard import constrain
from moptrace.testing import (
    ModelSpec,
    Step,
    assert_same_step,
    eager_step,
    simulated_step,
    unsharded_step,
    whole_state,
)
from subjects import batch, step_on_a_rank, subject
from sweeps import sweep

ops = torch.ops.moptrace

# --- folding: who shares what ---------------------------------------------------------------------

# The mappings of MoE Parallel Folding (Liu et al., 2025) with the groups of ranks that they mean,
# in the first pipeline stage: each has W / pp consecutive ranks, and all are alike. First
# generate_mappings(64, 2, 2, 2, 2, 2) of its listing 1, then its table of models.
Groups = dict[str, list[list[int]]]
MAPPINGS: dict[str, tuple[int, dict[str, int], Groups]] = {
    "listing 1: 64 ranks, pp=2": (
        32,
        {"cp": 2, "tp": 2, "ep": 2, "etp": 2},
        {
            "tp": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15],
                   [16, 17], [18, 19], [20, 21], [22, 23], [24, 25], [26, 27], [28, 29], [30, 31]],
            "cp": [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15],
                   [16, 18], [17, 19], [20, 22], [21, 23], [24, 26], [25, 27], [28, 30], [29, 31]],
            "dp": [[0, 4, 8, 12, 16, 20, 24, 28], [1, 5, 9, 13, 17, 21, 25, 29],
                   [2, 6, 10, 14, 18, 22, 26, 30], [3, 7, 11, 15, 19, 23, 27, 31]],
            "etp": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15],
                    [16, 17], [18, 19], [20, 21], [22, 23], [24, 25], [26, 27], [28, 29], [30, 31]],
            "ep": [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15],
                   [16, 18], [17, 19], [20, 22], [21, 23], [24, 26], [25, 27], [28, 30], [29, 31]],
            "edp": [[0, 4, 8, 12, 16, 20, 24, 28], [1, 5, 9, 13, 17, 21, 25, 29],
                    [2, 6, 10, 14, 18, 22, 26, 30], [3, 7, 11, 15, 19, 23, 27, 31]],
        },
    ),
    "Mixtral 8x22B: 128 ranks, pp=8": (
        16,
        {"cp": 1, "tp": 2, "ep": 8, "etp": 1},
        {
            "tp": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]],
            "dp": [[0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]],
            "ep": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
            "edp": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]],
        },
    ),
    "Qwen2-57B-A14B: 64 ranks, pp=4": (
        16,
        {"cp": 1, "tp": 2, "ep": 4, "etp": 1},
        {
            "tp": [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]],
            "ep": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
            "edp": [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
        },
    ),
    "Mixtral 8x22B-G8T8: 128 ranks, pp=8": (
        16,
        {"cp": 1, "tp": 4, "ep": 8, "etp": 1},
        {
            "tp": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
            "dp": [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
            "ep": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
            "edp": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]],
        },
    ),
    "Llama3-8x70B: 256 ranks, pp=16": (
        16,
        {"cp": 1, "tp": 8, "ep": 8, "etp": 1},
        {
            "tp": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
            "dp": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]],
            "ep": [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]],
            "edp": [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPINGS)
def test_tokens_and_experts_see_independent_reshapes_of_the_ranks(name: str) -> None:
    ranks, sizes, groups = MAPPINGS[name]
    layout = Plan(**sizes).resolve(ranks, []).layout(ranks)

    def of_axis(axis: str) -> list[list[int]]:
        view: View = layout.experts if axis in ("edp", "ep", "etp") else layout.tokens
        return view.groups(axis)

    assert {axis: of_axis(axis) for axis in groups} == groups


# --- what moves -----------------------------------------------------------------------------------


def local_program(name: str, ranks: int, plan: Plan) -> Program:
    _, program = subject(name)
    return sharded(plan.resolve(ranks, []), ranks)(program)


def on_rows(program: Program) -> list[tuple[str, str]]:
    """The collectives on routed rows in the order of the graph, with their axes."""
    found = [(row, n) for n in program.nodes if (row := collective(n.target)) and row.moves_rows]
    return [(row.name, next(a for a in n.args if isinstance(a, str))) for row, n in found]


def test_rows_go_to_their_experts_before_they_are_gathered_and_sums_return_scattered() -> None:
    layer = [
        ("send_rows", "ep"), ("all_gather_rows", "etp"),
        ("reduce_scatter_rows", "etp"), ("return_rows", "ep"),
    ]  # fmt: skip
    assert on_rows(local_program("mixtral", 12, Plan(ep=3, etp=2))) == layer * 2
    only = [entry for entry in layer if entry[1] == "etp"]
    assert on_rows(local_program("mixtral", 4, Plan(ep=1, etp=2))) == only * 2


def test_biases_move_no_rows_of_their_own() -> None:
    layer = ["send_rows", "all_gather_rows", "reduce_scatter_rows", "return_rows"]
    moved = on_rows(local_program("gpt_oss", 4, Plan(ep=2, etp=2)))
    assert [name for name, _ in moved] == layer * 2


def test_counts_are_exchanged_and_gathered_once_for_each_layer() -> None:
    program = local_program("gpt_oss", 12, Plan(ep=3, etp=2))
    assert sum(n.target is ops.exchange_counts.default for n in program.nodes) == 2
    of_counts = [
        n
        for n in program.nodes
        if (row := collective(n.target)) is not None
        and row.name != "exchange_counts"
        and roles.tensor(n).dtype == torch.int64
        and roles.component(n) is roles.Component.DISPATCH
    ]
    assert [(collective(n.target).name, n.args[1]) for n in of_counts] == [  # type: ignore[union-attr]
        ("all_gather_invariant", "etp")
    ] * 2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "LoopWhere"])
def test_experts_are_still_one_operator(name: str) -> None:
    program = local_program(name, 4, Plan(ep=2, etp=2))
    assert sum(isinstance(n.target, ExpertFunction) for n in program.nodes) == 2
    assert not program.notes


def test_operands_may_have_other_names_for_the_ranks_that_share_hidden_units() -> None:
    # Chunks use a bias again, in the view of experts; a weight is used in the view of tokens.
    model = ModelSpec(style="loop_where", gating="swiglu", biases=True).build()
    fed = models.batch(size=8, length=12, vocabulary=13)
    plan = Plan(tp=2, cp=2, ep=1, etp=2, edp="replicate", expert_tokens=17).resolve(4, [])
    program = sharded(plan, 4)(canonical()(trace(model, fed)))
    assert any(isinstance(node.target, ExpertFunction) for node in program.nodes)
    assert_same_step(simulated_step(program, whole_state(model), fed), eager_step(model, fed))


def test_rows_come_back_to_tokens_that_are_said_in_a_third_view() -> None:
    # Rows see (edp, ep, etp), and tokens, with blocks, (dp_replicate, dp_shard).
    model = ModelSpec(
        layers=("moe",),
        experts=1,
        k=1,
        width=6,
        heads=3,
        attention="fused",
        biases=True,
        style="canonical",
        router="one_for_all",
        gating="square",
    ).build()
    fed = models.batch(size=8, length=12, vocabulary=13)
    plan = Plan(tp=2, cp=2, vp=4, dp_replicate=2, ep=4, etp=2).resolve(8, [])
    program = sharded(plan, 8)(canonical()(trace(model, fed)))
    assert_same_step(simulated_step(program, whole_state(model), fed), eager_step(model, fed))


def stored(program: Program, *words: str) -> str:
    nodes = program.graph.find_nodes(op="placeholder")
    node = next(n for n in nodes if all(word in n.name for word in words))
    return str(roles.placement(node))


def test_weights_are_stored_as_they_are_used_or_exchanged() -> None:
    """Interleaved gates split as they lie; of concatenated ones each rank needs two parts."""
    interleaved = local_program("gpt_oss", 12, Plan(ep=3, etp=2))
    assert stored(interleaved, "0", "gate_up_proj") == "edp: shard(1), ep: shard(0), etp: shard(2)"
    assert stored(interleaved, "0", "down_proj") == "edp: shard(2), ep: shard(0), etp: shard(1)"
    joined = local_program("mixtral", 4, Plan(ep=2, etp=2))
    assert stored(joined, "0", "gate_up_proj").endswith("ep: shard(0), etp: shard(2)")
    along = [n for n in joined.nodes if "etp" in n.args and roles.tensor(n).is_floating_point()]
    names = [str(n.target).split(".")[1] for n in along]
    assert names == ["all_to_all", "all_gather_rows", "reduce_scatter_rows"] * 2


# --- the same step --------------------------------------------------------------------------------

HAND_WRITTEN = ("LoopWhere", "SortSlices", "OneHotEinsum")
PLANS = (
    (4, Plan(ep=2, etp=2, expert_tokens=7)),
    (6, Plan(ep=2, etp=3, edp="replicate")),
    (12, Plan(ep=3, etp=2, tp=2, cp=2, logits_bytes=0)),
    (4, Plan(ep=1, etp=2, tp=2, context="ring", embedding_bytes=0)),
)


@pytest.mark.parametrize(
    "name", sweep((*models.FAMILIES, *HAND_WRITTEN), quick=("mixtral", "gpt_oss", "LoopWhere"))
)
def test_every_family_computes_the_same_step(name: str) -> None:
    model, program = subject(name)
    fed = batch(1)
    with InFloat64():
        want = eager_step(model, fed)
        for ranks, plan in PLANS:
            local = sharded(plan.resolve(ranks, []), ranks)(program)
            assert_same_step(simulated_step(local, whole_state(model), fed), want)


class Experts(nn.Module):
    """Token ids through an embedding and one layer of experts of a given kind."""

    def __init__(self, hidden: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.gate = nn.Embedding(11, 6), nn.Linear(6, 5, bias=False)
        self.up = nn.Parameter(torch.randn(5, 6, 2 * hidden))
        self.down = nn.Parameter(torch.randn(5, hidden, 6))
        self.up_bias = nn.Parameter(torch.randn(5, 2 * hidden))
        self.down_bias = nn.Parameter(torch.randn(5, 6))
        self.scale = nn.Parameter(torch.randn(hidden))
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        rows, counts, order = dispatch(x, chosen, 5)
        rows = self.expert(rows, pair_rows(weights, order).unsqueeze(-1), counts)
        logits = (x + combine(rows, order, weights)) @ self.embedding.weight.t()
        return F.cross_entropy(logits, labels.flatten())

    def first(self, rows: Tensor, counts: Tensor) -> Tensor:
        return grouped_mm(rows, self.up, counts) + expert_rows(self.up_bias, counts, rows)

    def last(self, hidden: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        return grouped_mm(hidden, self.down, counts) + expert_rows(self.down_bias, counts, rows)

    def expert(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        gate, value = self.first(rows, counts).chunk(2, -1)
        return self.last(F.silu(gate) * value, rows, counts)


class Interleaved(Experts):
    def expert(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        both = self.first(rows, counts)
        return self.last(F.silu(both[:, ::2]) * both[:, 1::2], rows, counts)


class WeighedFirst(Experts):
    """The router's weights multiply what goes into the experts, as in Llama 4."""

    def expert(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        return super().expert(rows * weights, weights, counts)


class WeighedBetween(Experts):
    """They multiply the hidden units, so that they are gathered with the rows."""

    def expert(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        gate, value = self.first(rows, counts).chunk(2, -1)
        return self.last(F.silu(gate) * value * weights, rows, counts)


class Normed(Experts):
    """A norm over the hidden units of each expert: statistics are added up over the ranks."""

    def expert(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        gate, value = self.first(rows, counts).chunk(2, -1)
        hidden = gate * value
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.last(hidden, rows, counts)


class HalfMixed(Experts):
    """A softmax over some hidden units needs all of these; the others are shared."""

    def expert(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        gate, value = self.first(rows, counts).chunk(2, -1)
        return self.last(gate.softmax(-1) * value, rows, counts)


class Mixed(Experts):
    """A softmax over the hidden units needs all of them."""

    def expert(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        gate, value = self.first(rows, counts).chunk(2, -1)
        return self.last((gate * value).softmax(-1), rows, counts)


KINDS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "joined": (Experts, True),
    "interleaved": (Interleaved, True),
    "weighed first": (WeighedFirst, True),
    "weighed between": (WeighedBetween, True),
    "a norm between": (Normed, True),
    "half mixed": (HalfMixed, True),
    "mixed": (Mixed, False),
    "hidden units that do not divide": (lambda: Experts(7), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_every_shape(kind: str) -> None:
    """What cannot be shared is said with its place, and is exact all the same."""
    make, is_shared = KINDS[kind]
    model = make()
    generator = torch.Generator().manual_seed(1)
    fed = {"input_ids": torch.randint(11, (8, 6), generator=generator)}
    fed["labels"] = fed["input_ids"].roll(-1, 1)
    want, program = eager_step(model, fed), canonical()(trace(model, fed))
    written = expert_tensor_parallel(Layout.of(4, 2, etp=2))(program)
    assert_same_step(unsharded_step(written, whole_state(model), fed), want)
    assert any(n.target is constrain for n in written.nodes) == is_shared
    for ranks, plan in ((4, Plan(ep=2, etp=2)), (2, Plan(ep=1, etp=2)), (8, Plan(ep=2, etp=2))):
        local = sharded(plan.resolve(ranks, []), ranks)(program)
        assert_same_step(simulated_step(local, whole_state(model), fed), want)
        notes = [note for note in local.notes if "etp=2" in note]
        assert len(notes) == (not is_shared)
        assert all("grouped_mm.py" in note and "divides the hidden units" in note for note in notes)


def test_a_single_expert_is_a_dense_block() -> None:
    """Its products have no grouped matrices, and no counts say how its rows travel."""
    model = ModelSpec(layers=("moe",), hidden=3, experts=1, k=1, style="loop_mask").build()
    fed = models.batch(1, size=6, length=4, vocabulary=ModelSpec().vocabulary)
    local = sharded(Plan(ep=1, etp=3), 3)(canonical()(trace(model, fed)))
    assert_same_step(simulated_step(local, whole_state(model), fed), eager_step(model, fed))


# --- real ranks -----------------------------------------------------------------------------------


ON_REAL_RANKS = (Plan(ep=2, etp=2), Plan(ep=1, etp=2, tp=2, edp="replicate"))


@pytest.mark.parametrize("plan", sweep(ON_REAL_RANKS, quick=ON_REAL_RANKS[:1]), ids=str)
def test_real_ranks_compute_the_same_step(ranks: Callable[[int], Ranks], plan: Plan) -> None:
    name = "OneHotEinsum"
    model, _ = subject(name)
    fed = batch(1)
    want = eager_step(model, fed)
    for loss, gradients in ranks(4)(step_on_a_rank, name, model.state_dict(), plan, fed):
        assert_same_step(Step(loss, gradients, {}), want)
