"""The numbers of ``explain`` against shards that are counted and collectives that run."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from double import InFloat64
from meter import ROWS, Meter
from moptrace import roles, state
from moptrace.core import Level, Pass, Program, chain
from moptrace.errors import PassError
from moptrace.explain import Explanation, explain
from moptrace.passes.bucket_gathers import bucket_gathers
from moptrace.passes.default import canonical, sharded
from moptrace.passes.localize import localize
from moptrace.passes.place import place
from moptrace.passes.shard_parameters import shard_batch, shard_parameters
from moptrace.placement import Layout
from moptrace.plan import Plan
from moptrace.precision import MixedPrecisionPolicy, convert
from moptrace.roles import Component
from moptrace.testing import ModelSpec, SimulatedRanks, dtypes_of, whole_state
from moptrace.trace import trace
from sweeps import sweep
from test_tensor_parallel import batch as tokens
from test_tensor_parallel import subject
from tiny_mixtral import CHOSEN, EXPERTS, HIDDEN, VOCABULARY, WIDTH, TinyMixtral

BATCH, LENGTH = 8, 6
BYTES = 4  # of a float32


def batch(size: int = BATCH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, size, LENGTH), generator=generator)
    return {"ids": ids[0], "labels": ids[1]}


@cache
def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyMixtral()


def tag() -> Pass:
    """Components from the lines of this one model, so that the rows are known."""

    def component(node: fx.Node) -> Component | None:
        target = getattr(node.target, "__name__", "").split(".")[0]
        by_operator = {
            "embedding": Component.EMBEDDING,
            "rms_norm": Component.NORM,
            "scaled_dot_product_attention": Component.ATTENTION,
            "topk": Component.ROUTER,
            "dispatch": Component.DISPATCH,
            "grouped_mm": Component.EXPERTS,
            "combine": Component.COMBINE,
            "cross_entropy_loss": Component.LOSS,
        }
        if target == "linear":
            weight = str(node.args[1])
            at = {"attention": Component.ATTENTION, "router": Component.ROUTER}
            return next((c for word, c in at.items() if word in weight), Component.VOCAB)
        return by_operator.get(target)

    def rewrite(program: Program) -> Program:
        graph, mapping = program.copy_graph()
        seen = Counter[Component]()
        for node in mapping.values():
            found = component(node)
            block = None
            if found in (Component.DISPATCH, Component.COMBINE):
                block, seen[found] = seen[found], seen[found] + 1
            roles.set_role(node, component=found, block=block)
        return program.with_graph(graph)

    return Pass("tag", rewrite)


@cache
def canonical_program(size: int = BATCH) -> Program:
    return chain(canonical(), tag())(trace(model(), batch(size)))


@cache
def local(world: int, ep: int, edp: str = "shard", bucket: bool = False) -> Program:
    layout = Layout.of(world, ep)
    program = canonical_program()
    for step in (shard_parameters(layout, edp), shard_batch(layout), place(), localize()):
        program = step(program)
    return bucket_gathers()(program) if bucket else program


LAYOUTS = [(1, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2)]
every_layout = pytest.mark.parametrize(("world", "ep"), LAYOUTS)
both_storages = pytest.mark.parametrize("edp", ["shard", "replicate"])
bucketed_or_not = pytest.mark.parametrize("bucket", [False, True], ids=["single", "bucketed"])


# --- what is stored -------------------------------------------------------------------------------


@every_layout
@both_storages
def test_parameters_are_those_that_the_fullest_rank_holds(world: int, ep: int, edp: str) -> None:
    program = local(world, ep, edp)
    whole = whole_state(model())
    inputs = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    held = [0] * world
    for parameter in program.signature.parameters:
        placement = roles.placement(inputs[parameter.name])
        assert placement is not None and program.layout is not None
        said = placement.expressed_in(program.layout.experts)
        assert said is not None
        for rank in range(world):
            held[rank] += state.own_part(state.stack(parameter, whole), said, rank).numel()
    found = explain(program)
    assert found.parameters == max(held)
    assert found.parameter_bytes == BYTES * max(held)


class Uneven(nn.Module):
    """Ten and seven rows over four ranks, and a buffer that is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 10), nn.Linear(10, 7, bias=False).double()
        self.register_buffer("scale", torch.ones(1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * self.scale[0]).double()).square().mean()


def uneven(world: int, ep: int = 1) -> Program:
    program = canonical()(trace(Uneven(), {"x": torch.ones(8, 7)}))
    layout = Layout.of(world, ep)
    for step in (shard_parameters(layout), shard_batch(layout), place(), localize()):
        program = step(program)
    return program


def test_uneven_shards_count_as_they_are_stored_and_as_they_are_padded() -> None:
    found = explain(uneven(4))
    # Rank 0 has 3 of 10 rows of 7, 3 of 10 biases, and 2 of 7 rows of 10 in double precision.
    assert found.parameters == 3 * 7 + 3 + 2 * 10
    assert found.parameter_bytes == 4 * (3 * 7 + 3) + 8 * 2 * 10
    gathered = 3 * (4 * (3 * 7 + 3) + 8 * 2 * 10)
    moved = {t.kind: t.bytes for t in found.traffic}
    assert moved["all_gather"] == moved["reduce_scatter"] == gathered
    assert found.collectives["all_gather"] == found.collectives["reduce_scatter"] == 3


# --- what moves -----------------------------------------------------------------------------------


@every_layout
@both_storages
@bucketed_or_not
def test_collectives_and_bytes_are_those_of_a_step(
    world: int, ep: int, edp: str, bucket: bool, meter: Meter
) -> None:
    program = local(world, ep, edp, bucket)
    SimulatedRanks(program, whole_state(model())).step(batch())
    found = explain(program)
    assert found.collectives == pytest.approx(dict(meter.count))
    moved = {t.kind: t.bytes for t in found.traffic}
    # Rows are those of all ranks together, so routing does not change their mean.
    assert moved == pytest.approx(dict(meter.bytes))
    assert {t.kind for t in found.traffic if t.expected} <= ROWS


PLANS = (
    (4, Plan(cp=2, ep=2)),
    (4, Plan(cp=4, ep=4, context="ring")),
    (4, Plan(tp=2, ep=4)),
    (8, Plan(tp=2, cp=2, ep=2, context="ring", logits_bytes=0)),
    (8, Plan(tp=2, dp_replicate=2, ep=4)),
    (4, Plan(dp_replicate=2, ep=2, edp="replicate")),
    (4, Plan(vp=2, ep=2, logits_bytes=0)),
    (4, Plan(ep=1, logits_bytes=0)),
    (4, Plan(ep=2, etp=2)),
    (4, Plan(ep=2, expert_tokens=5)),
    (4, Plan(ep=4, recompute_experts=True)),
)


@pytest.mark.parametrize(("world", "plan"), PLANS, ids=str)
@pytest.mark.parametrize(
    "name", sweep(["qwen3_moe", "deepseek_v3", "LoopWhere"], quick=["qwen3_moe"])
)
def test_bytes_are_those_of_a_step_under_every_kind_of_plan(
    name: str, world: int, plan: Plan, meter: Meter
) -> None:
    traced, program = subject(name)
    meter.world = world
    with InFloat64():
        local = sharded(plan.resolve(world, []), world)(program)
        SimulatedRanks(local, whole_state(traced)).step(tokens(seed=1))
    found = {t.kind: t.bytes for t in explain(local).traffic}
    assert found == pytest.approx({kind: n for kind, n in meter.bytes.items() if n})


@pytest.mark.parametrize("reduced", [None, torch.float32])
def test_parameters_move_in_what_they_are_cast_to(
    reduced: torch.dtype | None, meter: Meter
) -> None:
    spec, fed = ModelSpec(experts=4, attention="fused"), tokens(seed=1)
    fed = {name: x % spec.vocabulary for name, x in fed.items()}
    policy, held = MixedPrecisionPolicy(torch.bfloat16, reduced), spec.build(torch.float32)
    moved: dict[MixedPrecisionPolicy, dict[str, int]] = {}
    for one in (policy, MixedPrecisionPolicy()):
        program = canonical()(trace(convert(copy.deepcopy(held), one), fed))
        plan = Plan(ep=2, dp_replicate=2, mixed_precision=one).resolve(4, [])
        local = sharded(plan, 4, masters=dtypes_of(held))(program)
        meter.world, meter.bytes = 4, Counter[str]()
        SimulatedRanks(local, whole_state(held)).step(fed)
        moved[one] = {t.kind: t.bytes for t in explain(local).traffic}
        assert moved[one] == pytest.approx({kind: n for kind, n in meter.bytes.items() if n})
    half, full = moved.values()
    assert 2 * half["all_gather"] == full["all_gather"]
    assert half["reduce_scatter"] * (2 if reduced is None else 1) == full["reduce_scatter"]


@every_layout
@bucketed_or_not
def test_rows_add_up_to_the_totals(world: int, ep: int, bucket: bool) -> None:
    found = explain(local(world, ep, bucket=bucket))
    assert sum(row.bytes_moved for row in found.rows) == found.bytes_moved
    assert sum(row.parameters for row in found.rows) == found.parameters
    if not bucket:
        counts = Counter[str]()
        for row in found.rows:
            counts.update({t.kind: t.count for t in row.traffic})
        assert counts == found.collectives


def test_a_bucket_divides_its_bytes_between_its_components() -> None:
    single, bucketed = explain(local(4, 2)), explain(local(4, 2, bucket=True))
    assert bucketed.collectives["all_gather"] < single.collectives["all_gather"]
    assert bucketed.bytes_moved == single.bytes_moved
    for row in single.rows:
        assert bucketed.row(row.component).bytes_moved == row.bytes_moved


def test_expert_traffic_is_what_a_person_would_count() -> None:
    row = explain(local(4, 2)).row(Component.EXPERTS)
    weights = 2 * EXPERTS * 3 * WIDTH * HIDDEN  # of two layers
    assert row.parameters == weights // 4
    moved = {t.kind: t.bytes for t in row.traffic}
    # A rank owns two experts of each layer, and has half of each: it sends that to one other rank.
    assert moved["all_gather"] == moved["reduce_scatter"] == BYTES * weights // 4


def test_rows_travel_there_and_back_in_both_directions() -> None:
    found = explain(local(4, 2))
    pairs = BATCH * LENGTH * CHOSEN // 4
    there = pairs // 2 * WIDTH * BYTES  # half of the experts are elsewhere
    moved = {t.kind: (t.count, t.bytes) for t in found.traffic}
    assert moved["send_rows"] == moved["return_rows"] == (4, 4 * there)


def test_one_rank_moves_nothing() -> None:
    found = explain(local(1, 1))
    assert found.traffic == () and found.bytes_moved == 0
    assert {row.parallelism for row in found.rows} == {"one rank"}


class Frozen(nn.Module):
    """One weight is trained, one is not, and one output does not reach the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.beside = nn.Linear(4, 4, bias=False)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.frozen(x)
        return self.trained(x).square().sum(), self.beside(x)


def test_what_carries_no_gradient_or_misses_the_loss_has_no_backward() -> None:
    program = canonical()(trace(Frozen(), {"x": torch.ones(8, 4)}))
    layout = Layout.of(4)
    for step in (shard_parameters(layout), shard_batch(layout), place(), localize()):
        program = step(program)
    counts = explain(program).collectives
    assert counts == {"all_gather": 3, "reduce_scatter": 1, "all_reduce": 1}


# --- in words -------------------------------------------------------------------------------------


def words(found: Explanation, component: Component) -> str:
    return found.row(component).parallelism


def test_parallelism_is_said_in_words() -> None:
    sharded, copied = explain(local(4, 2)), explain(local(4, 2, "replicate"))
    assert words(sharded, Component.ATTENTION) == "data parallel dp=4, weights gathered"
    experts = "experts split over ep=2, weights gathered over edp=2"
    assert words(sharded, Component.EXPERTS) == experts
    assert words(copied, Component.EXPERTS) == "experts split over ep=2, copies over edp=2"
    assert words(explain(local(4, 4)), Component.EXPERTS) == "experts split over ep=4"
    alone = words(explain(local(4, 1)), Component.EXPERTS)
    assert alone == "data parallel dp=4, weights gathered"
    assert words(sharded, Component.LOSS) == "data parallel dp=4"


def test_the_table_shows_every_row_and_the_totals() -> None:
    found = explain(local(4, 2, bucket=True))
    text = str(found)
    lines = text.split("\n")
    assert max(map(len, lines)) <= 118
    assert "experts split over ep=2" in text
    assert any(line.split()[:2] == ["dispatch", "x2"] for line in lines)
    assert any("total per rank" in line and "home(dp=4)" in line for line in lines)
    assert "~ expected if routing is balanced" in text
    assert all(f"{row.parameters:,}" in text for row in found.rows)


def test_the_table_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(explain(local(4, 2)))
    for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    assert str(explain(local(4, 2))) == text
    assert "\033" not in text


def test_html_is_the_escaped_table() -> None:
    program = local(4, 2).with_note("a < b")
    found = explain(program)
    assert "a &lt; b" in found._repr_html_()
    assert "a < b" in str(found)


def test_the_cost_of_an_operator_without_a_rule_is_a_note() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(x @ self.weight).sum()

    program = canonical()(trace(Odd(), {"x": torch.eye(4).expand(4, 4, 4).clone()}))
    layout = Layout.of(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (shard_parameters(layout), shard_batch(layout), place(), localize()):
            program = step(program)
    assert any("no sharding rule" in note for note in explain(program).notes)
    assert "note: aten.linalg_inv" in str(explain(program))


def test_a_program_that_is_not_local_yet_is_refused() -> None:
    with pytest.raises(PassError, match="explain reads a program at level local, got canonical"):
        explain(canonical_program())


def test_what_was_made_from_a_local_program_is_explained_as_that() -> None:
    program = local(4, 2)
    later = program.with_graph(program.graph, level=Level.STEP, previous=program)
    assert explain(later) == explain(program)
