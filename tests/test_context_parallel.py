"""Context parallel: the tokens of each sequence on several ranks, and the same step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import models
import subjects
from double import InFloat64
from gloo import Ranks
from moptrace import Plan, Program, errors, roles, trace
from moptrace.collectives import collective
from moptrace.kernels.attention import attention
from moptrace.passes.default import canonical, sharded
from moptrace.passes.place import ReplicationWarning
from moptrace.rings import ring
from moptrace.testing import (
    SimulatedRanks,
    Step,
    assert_same_step,
    eager_step,
    simulated_step,
    whole_state,
)
from sweeps import sweep

LENGTH, SIZE = 8, 4
EXAMPLES = settings.default.max_examples // 3 if settings.default else 50
PLANS = (
    (2, Plan(ep=1, cp=2, context="ulysses", logits_bytes=0)),
    (4, Plan(ep=4, cp=2, context="ring", logits_bytes=0)),
    (4, Plan(ep=2, cp=4, context="ring")),
    (4, Plan(ep=2, cp=4, context="ulysses")),
    (8, Plan(ep=4, cp=2, edp="replicate", context="gather")),
    (6, Plan(ep=3, cp=2, logits_bytes=0)),
)


batch = partial(subjects.batch, size=SIZE, length=LENGTH)
subject = partial(subjects.subject, length=LENGTH)


MODELS = (*models.FAMILIES, "LoopWhere", "SortSlices, balanced", "OneHotEinsum", "DenseWeightFirst")


@pytest.mark.parametrize(
    "name", sweep(MODELS, quick=("gpt_oss", "deepseek_v3", "LoopWhere", "SortSlices, balanced"))
)
def test_every_way_to_attend_computes_the_same_step(name: str) -> None:
    model, program = subject(name)
    fed = batch(1, size=12)
    with InFloat64():
        want = eager_step(model, fed)
        for ranks, plan in PLANS:
            local = sharded(plan, ranks)(program)
            assert_same_step(simulated_step(local, whole_state(model), fed), want)


def movements(program: Program) -> list[str]:
    """What moves activations: the collectives on anything but parameters and routed rows."""
    found: list[str] = []
    for node in program.nodes:
        row = collective(node.target) or ring(node.target)
        operand = node.args[0] if row else None
        if row is None or "rows" in row.name or row.name == "exchange_counts":
            continue
        if operand.op == "placeholder" or roles.role(node).component is None:  # type: ignore
            continue
        if roles.tensor(operand).is_floating_point() and roles.tensor(operand).dim():  # type: ignore
            found.append(row.name)
    return [name for name in found if name not in ("all_gather", "take_shard")]


def test_only_attention_moves_activations() -> None:
    _, program = subject("qwen3_moe")
    layers = 2
    ulysses = sharded(Plan(ep=2, cp=2, context="ulysses", logits_bytes=0), 4)(program)
    assert movements(ulysses) == ["all_to_all"] * 4 * layers + ["ring_vocab_projection"]
    ring_ = sharded(Plan(ep=2, cp=2, context="ring", logits_bytes=0), 4)(program)
    assert movements(ring_) == ["ring_attention"] * layers + ["ring_vocab_projection"]
    gathers = [n for n in ulysses.nodes if n.target == torch.ops.moptrace.all_gather.default]
    packed = [n for n in gathers if n.args[0].target == torch.ops.moptrace.pack.default]  # type: ignore
    assert all(n.args[0].op == "placeholder" for n in gathers if n not in packed)  # type: ignore


# --- attention of every shape ---------------------------------------------------------------------


class Attends(nn.Module):
    """One layer of attention of ``heads`` heads, with ``groups`` heads of keys."""

    def __init__(self, heads: int, groups: int, length: int = LENGTH, **how: Any):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.groups, self.how = heads, groups, how
        self.embedding = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.randn(length, 6))
        self.q = nn.Linear(6, heads * 4)
        self.kv = nn.Linear(6, 2 * groups * 4)
        self.out = nn.Linear(heads * 4, 6)
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.positions
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, 4).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.groups, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.mixed(q, k, v).transpose(1, 2).flatten(2))
        return F.cross_entropy((x @ self.embedding.weight.t()).flatten(0, 1), labels.flatten())

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.heads != self.groups
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **self.how)


class Windowed(Attends):
    """A sliding window, as an explicit mask."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        apart = place[:, None] - place[None, :]
        mask = (apart >= 0) & (apart < 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Products(Attends):
    """Softmax of products, with a sink."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / 2
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
        sink = torch.zeros(*scores.shape[:-1], 1, dtype=scores.dtype)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class Convolves(Attends):
    """A causal convolution over tokens beside the attention."""

    def __init__(self, heads: int, groups: int):
        super().__init__(heads, groups, is_causal=True)
        self.filter = nn.Parameter(torch.randn(6, 1, 3, dtype=torch.float64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.filtered(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        extra = F.cross_entropy((x @ self.embedding.weight.t()).flatten(0, 1), labels.flatten())
        return extra + super().forward(input_ids, labels)

    def filtered(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), self.filter, groups=6)


class ConvolvesAndCuts(Convolves):
    """The same, written with zeros on both sides."""

    def filtered(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.filter, padding=2, groups=6)[:, :, : x.shape[-1]]


class Recurs(Attends):
    """A recurrence over tokens beside the attention."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, states = torch.zeros_like(v[:, :, 0]), list[Tensor]()
        for t in range(v.shape[2]):
            state = state * 0.5 + v[:, :, t]
            states.append(state)
        return super().mixed(q, k, v) + torch.stack(states, 2)


class Repeats(Attends):
    """Keys and values of grouped heads are repeated before the attention."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = self.heads // self.groups
        k = k[:, :, None].expand(-1, -1, times, -1, -1).reshape(q.shape)
        v = v.repeat_interleave(times, dim=1)
        return F.scaled_dot_product_attention(q, k, v, **self.how)


class Biased(Attends):
    """A trained bias for each pair of positions."""

    def __init__(self, heads: int, groups: int):
        super().__init__(heads, groups)
        self.bias = nn.Parameter(torch.randn(1, heads, LENGTH, LENGTH, dtype=torch.float64))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


class Packed(Attends):
    """Documents one after the other in a sequence; positions start anew in each."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor
    ) -> Tensor:
        documents = (position_ids == 0).cumsum(1)
        place = torch.arange(input_ids.shape[1])
        seen = (documents[:, :, None] == documents[:, None, :]) & (place[:, None] >= place)
        self.how = {"attn_mask": seen[:, None]}
        rotated = self.positions[position_ids] - self.positions
        extra = (self.embedding(input_ids) * rotated).square().sum(-1)
        return super().forward(input_ids, labels) + (extra * documents).mean()


class Masked(Attends):
    """A mask of all pairs of tokens comes with the batch."""

    def forward(self, input_ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        self.how = {"attn_mask": mask}
        return super().forward(input_ids, labels)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "causal": lambda: Attends(4, 4, is_causal=True),
    "not causal": lambda: Attends(4, 4),
    "scaled": lambda: Attends(2, 2, is_causal=True, scale=0.3),
    "grouped heads": lambda: Attends(4, 2, is_causal=True),
    "fewer heads of keys than ranks": lambda: Attends(6, 2, is_causal=True),
    "one head of keys": lambda: Attends(4, 1, is_causal=True),
    "heads that do not divide": lambda: Attends(3, 3, is_causal=True),
    "fewer heads than ranks": lambda: Attends(1, 1, is_causal=True),
    "a window": lambda: Windowed(4, 4),
    "products and a sink": lambda: Products(4, 4),
    "a convolution": lambda: Convolves(4, 2),
    "a convolution that is cut": lambda: ConvolvesAndCuts(4, 2),
    "repeated heads": lambda: Repeats(4, 2, is_causal=True),
    "repeated heads that do not divide": lambda: Repeats(6, 2),
    "a trained bias": lambda: Biased(4, 4),
    "packed documents": lambda: Packed(4, 4),
    "packed documents, one head of keys": lambda: Packed(4, 1),
    "a boolean mask of the batch": lambda: Masked(4, 4),
    "an added mask of the batch": lambda: Masked(2, 1),
}


def fed_to(model: nn.Module, size: int = SIZE, length: int = LENGTH) -> dict[str, Tensor]:
    """A batch; with positions or a mask if the model takes them, a boolean one for many heads."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (size, length), generator=generator)
    fed = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    if isinstance(model, Packed):
        fed["position_ids"] = packed_positions(size, length, generator)
    if isinstance(model, Masked):
        mask = torch.rand(size, 1, length, length, generator=generator) > 0.4
        mask[:, :, 1] = False  # a query that sees nothing
        added = torch.randn(size, 1, length, length, generator=generator, dtype=torch.float64)
        fed["mask"] = mask if model.groups > 1 else added.masked_fill(~mask, -torch.inf)
    return fed


def packed_positions(size: int, length: int, generator: torch.Generator) -> Tensor:
    """Positions in documents of random lengths, the first of which fills the first sequence."""
    starts = torch.rand(size, length, generator=generator) > 0.6
    starts[:, 0], starts[0, 1:] = True, False
    place = torch.arange(length).expand(size, -1)
    return place - torch.where(starts, place, 0).cummax(1)[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["ulysses", "ring", "gather"])
def test_attention_of_every_shape(name: str, how: str) -> None:
    model = MODELS[name]()
    fed = fed_to(model)
    want = eager_step(model, fed)
    program = canonical()(trace(model, fed))
    for ranks, cp in ((2, 2), (4, 4), (4, 2)):
        local = sharded(Plan(ep=1, cp=cp, context=how), ranks)(program)
        assert_same_step(simulated_step(local, whole_state(model), fed), want)


def operators(program: Program, word: str) -> list[fx.Node]:
    return [n for n in program.nodes if word in str(n.target) and n.op == "call_function"]


@pytest.mark.parametrize(
    ("name", "left", "right", "documents"),
    [
        ("causal", None, 0, False),
        ("not causal", None, None, False),
        ("a window", 2, 0, False),
        ("packed documents", None, 0, True),
    ],
)
def test_a_ring_reads_masks_and_does_not_make_them(
    name: str, left: int | None, right: int | None, documents: bool
) -> None:
    model = MODELS[name]()
    program = canonical()(trace(model, fed_to(model)))
    local = sharded(Plan(ep=1, cp=2, context="ring"), 4)(program)
    (node,) = operators(local, "ring_attention")
    mask, of_documents, *window = node.args[3:7]
    assert (mask, of_documents is not None, *window) == (None, documents, left, right)
    pairs = [n for n in local.nodes if isinstance(roles.value(n), Tensor)]
    assert not any(roles.tensor(n).shape[-2:].count(LENGTH) == 2 for n in pairs)


@pytest.mark.parametrize("how", ["ring", "ulysses"])
def test_keys_travel_before_they_are_repeated(how: str) -> None:
    model = MODELS["repeated heads"]()
    program = canonical()(trace(model, fed_to(model)))
    local = sharded(Plan(ep=1, cp=2, context=how), 2)(program)
    if how == "ring":
        (node,) = operators(local, "ring_attention")
        heads = [roles.tensor(x).shape[1] for x in node.args[:3]]  # type: ignore[arg-type]
    else:
        moved = operators(local, "all_to_all")[:3]
        heads = [roles.tensor(n.args[0]).shape[1] for n in moved]  # type: ignore[arg-type]
    assert sorted(heads) == [2, 2, 4]


def test_a_trained_bias_takes_ulysses() -> None:
    model = MODELS["a trained bias"]()
    program = canonical()(trace(model, fed_to(model)))
    local = sharded(Plan(ep=1, cp=2, context="ring"), 2)(program)
    assert not operators(local, "ring_attention") and operators(local, "all_to_all")


@pytest.mark.parametrize("name", ["a convolution", "a convolution that is cut"])
def test_a_convolution_gets_only_the_tokens_before(name: str) -> None:
    model = MODELS[name]()
    program = canonical()(trace(model, fed_to(model)))
    local = sharded(Plan(ep=1, cp=4, context="ring"), 4)(program)
    assert len(operators(local, "ring_causal_conv1d")) == 1
    assert not any("along cp" in note for note in local.notes)


def test_a_recurrence_gathers_its_tokens_and_a_note_says_the_bytes() -> None:
    model = Recurs(4, 4, is_causal=True)
    fed = fed_to(model)
    want, program = eager_step(model, fed), canonical()(trace(model, fed))
    of_values = fed["input_ids"].numel() * 4 * 4 * 8  # heads, width, float64
    with pytest.warns(ReplicationWarning, match=rf"every rank along cp.* {of_values:,} bytes"):
        local = sharded(Plan(ep=1, cp=2, context="ring"), 4)(program)
    assert f"{of_values:,} bytes" in local.notes[-1] and "test_context_paral" in local.notes[-1]
    assert_same_step(simulated_step(local, whole_state(model), fed), want)


@settings(max_examples=EXAMPLES)
@given(
    heads=st.sampled_from(((4, 4), (4, 2), (3, 1), (6, 3))),
    kind=st.sampled_from((Attends, Windowed, Packed, Masked, Repeats)),
    causal=st.booleans(),
    each=st.integers(1, 4),
    cp_dp=st.sampled_from(((2, 1), (3, 1), (4, 1), (2, 2))),
    how=st.sampled_from(("ring", "ring", "ulysses", "gather")),
)
def test_any_attention_on_any_ranks(
    heads: tuple[int, int],
    kind: type[Attends],
    causal: bool,
    each: int,
    cp_dp: tuple[int, int],
    how: str,
) -> None:
    """An odd number of tokens on each rank, uneven heads, every mask."""
    cp, dp = cp_dp
    if kind in (Windowed, Packed, Masked) and heads[0] != heads[1]:
        heads = (heads[1], heads[1])  # written without grouped heads
    model, fed, want, program = attending(kind, heads, causal, each * cp)
    local = sharded(Plan(ep=1, cp=cp, context=how), cp * dp)(program)
    assert_same_step(simulated_step(local, whole_state(model), fed), want)


@cache
def attending(
    kind: type[Attends], heads: tuple[int, int], causal: bool, length: int
) -> tuple[nn.Module, dict[str, Tensor], Step, Program]:
    model = kind(*heads, is_causal=causal, length=length)
    fed = fed_to(model, size=2, length=length)
    return model, fed, eager_step(model, fed), canonical()(trace(model, fed))


def test_attention_by_parts_is_torchs_own() -> None:
    q = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    have, _ = attention(q, k, v, right=0, scale=0.4)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(have, want)
    weight = torch.randn_like(want)
    found = torch.autograd.grad((have * weight).sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad((want * weight).sum(), (q, k, v)))
    with torch.device("meta"):
        assert attention(q.to("meta"), k.to("meta"), v.to("meta"))[0].shape == want.shape


# --- Hugging Face's models ------------------------------------------------------------------------


def padded(size: int) -> Tensor:
    """Padding before some sequences and after others."""
    mask = torch.ones(size, LENGTH, dtype=torch.int64)
    mask[1, 6:], mask[2, :3] = 0, 0
    return mask


def of_pairs(size: int, hidden: float | None = None) -> Tensor:
    """A mask of all pairs of tokens, boolean or added."""
    seen = torch.ones(size, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[1, :, 5:, :3] = False
    added = torch.zeros(seen.shape, dtype=torch.float64)
    return seen if hidden is None else added.masked_fill(~seen, hidden)


def positions(size: int) -> Tensor:
    return packed_positions(size, LENGTH, torch.Generator().manual_seed(2))


INPUTS: dict[str, tuple[str, dict[str, Any], Callable[[int], dict[str, Tensor]]]] = {
    "packed": ("mixtral", {}, lambda n: {"position_ids": positions(n)}),
    "packed, other heads": ("qwen3_moe", {}, lambda n: {"position_ids": positions(n)}),
    "packed, products": ("gpt_oss", {}, lambda n: {"position_ids": positions(n)}),
    "padded": ("mixtral", {}, lambda n: {"attention_mask": padded(n)}),
    "a window": ("mixtral", {"sliding_window": 3}, lambda n: {}),
    "packed in a window": (
        "mixtral",
        {"sliding_window": 3},
        lambda n: {"position_ids": positions(n)},
    ),
    "pairs": ("mixtral", {}, lambda n: {"attention_mask": of_pairs(n)}),
    "pairs, added": (
        "mixtral",
        {},
        lambda n: {"attention_mask": of_pairs(n, torch.finfo(torch.float64).min)},
    ),
}


OFTEN = ("padded", "packed", "packed, products", "packed in a window", "pairs, added")


@pytest.mark.parametrize("name", sweep(INPUTS, quick=OFTEN))
def test_masks_and_positions_of_hugging_face(name: str) -> None:
    family, changes, extra = INPUTS[name]
    torch.manual_seed(0)
    model = models.hugging_face(family, "eager", **changes).double()
    other = models.hugging_face(family, "grouped_mm", **changes).double()
    other.load_state_dict(model.state_dict())
    fed = {**batch(1), **extra(SIZE)}
    with InFloat64():
        want, program = eager_step(model, fed), canonical()(trace(other, fed))
        for how in ("ring", "ulysses", "gather"):
            for ranks, cp in ((2, 2), (4, 4), (4, 2)):
                local = sharded(Plan(ep=1, cp=cp, context=how), ranks)(program)
                assert_same_step(simulated_step(local, whole_state(model), fed), want)
                if how == "ring" and family != "gpt_oss":
                    documents = [n.args[4] is not None for n in operators(local, "ring_attention")]
                    assert documents == ["packed" in name] * 2


def test_linear_attention_gathers_its_tokens() -> None:
    """Qwen3-Next: a convolution that gets the tokens before, a recurrence, and attention."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Qwen3NextConfig(
        vocab_size=models.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=4, linear_value_head_dim=4, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, use_cache=False,
        layer_types=["linear_attention", "full_attention"], experts_implementation="eager",
    )  # fmt: skip
    model = hf.Qwen3NextForCausalLM(config).double()
    config.experts_implementation = "grouped_mm"
    other = hf.Qwen3NextForCausalLM(config).double()
    other.load_state_dict(model.state_dict())
    fed = batch(1)
    with InFloat64():
        want, program = eager_step(model, fed), canonical()(trace(other, fed))
        for ranks, cp in ((2, 2), (4, 2)):
            with pytest.warns(ReplicationWarning, match=r"layers\.0\.linear_attn.*along cp.*bytes"):
                local = sharded(Plan(ep=1, cp=cp, context="ring"), ranks)(program)
            assert operators(local, "ring_causal_conv1d") and operators(local, "ring_attention")
            assert_same_step(simulated_step(local, whole_state(model), fed), want)


# --- real ranks, and bad input --------------------------------------------------------------------


@pytest.mark.parametrize("how", sweep(["ulysses", "ring"], quick=["ulysses"]))
def test_real_ranks_compute_the_same_step(ranks: Callable[[int], Ranks], how: str) -> None:
    model, _ = subject("OneHotEinsum")
    fed = batch(1, size=12)
    want = eager_step(model, fed)
    plan = Plan(ep=2, cp=2, context=how, logits_bytes=0)
    given = "OneHotEinsum", model.state_dict(), plan, fed
    for loss, gradients in ranks(4)(subjects.step_on_a_rank, *given):
        assert_same_step(Step(loss, gradients, {}), want)


def attends_on_a_rank(name: str, plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from moptrace import parallelize

    model, ranks = MODELS[name](), dist.get_world_size()
    fed = fed_to(model)
    example = {k: v[: SIZE * plan.cp // ranks] for k, v in fed.items()}
    example = {k: v[:, : LENGTH // plan.cp] if v.dim() == 2 else v for k, v in example.items()}
    parallel = parallelize(model, init_device_mesh("cpu", (ranks,)), plan, batch=example)
    loss = parallel(**parallel.local_batch(fed))
    loss.backward()
    found = parallel.full_gradients()
    return loss.detach(), {n: g for n, g in found.items() if g is not None}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("causal", "ring"),
        ("a window", "ring"),
        ("packed documents", "ring"),
        ("packed documents", "ulysses"),
        ("an added mask of the batch", "ring"),
        ("a convolution", "ring"),
    ],
)
@pytest.mark.parametrize(("world", "cp"), [(2, 2), (4, 4)])
def test_real_ranks_attend_alike(
    ranks: Callable[[int], Ranks], name: str, how: str, world: int, cp: int
) -> None:
    model = MODELS[name]()
    want = eager_step(model, fed_to(model))
    for loss, gradients in ranks(world)(attends_on_a_rank, name, Plan(ep=1, cp=cp, context=how)):
        assert_same_step(Step(loss, gradients, {}), want)


def test_a_length_that_the_ranks_do_not_divide_says_what_to_pad_to() -> None:
    _, program = subject("LoopWhere")
    with pytest.raises(errors.PlanError, match="8 tokens cannot be split over cp=3; pad them to 9"):
        sharded(Plan(ep=1, cp=3), 3)(program)


def test_an_unknown_way_to_attend_is_refused() -> None:
    _, program = subject("LoopWhere")
    with pytest.raises(errors.PlanError, match="say one of 'ulysses', 'ring', 'gather'"):
        sharded(Plan(ep=1, cp=2, context="rings"), 2)(program)


def test_the_rows_of_a_step_are_simulated_in_order() -> None:
    """Ranks along ``cp`` hold consecutive tokens of the same sequences."""
    _, program = subject("LoopWhere")
    local = sharded(Plan(ep=1, cp=2), 4)(program)
    held = SimulatedRanks(local, whole_state(subject("LoopWhere")[0]))._held["input_ids"]
    assert str(held) == "dp: shard(0), cp: shard(1)"
