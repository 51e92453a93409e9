"""Hugging Face families whose blocks are written unlike the five that other tests use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from double import InFloat64
from moptrace import Plan, Program, trace
from moptrace.errors import RoleError
from moptrace.passes.default import canonical, sharded
from moptrace.passes.raise_experts import WITHOUT_EXPERTS
from moptrace.testing import Step, assert_same_step, eager_step, simulated_step, whole_state

LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 2))  # ranks, and over how many experts are split

ONE: dict[str, Any] = dict(
    vocab_size=models.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    num_experts_per_tok=2, pad_token_id=0, experts_implementation="eager",
)  # fmt: skip


def dbrx() -> nn.Module:
    """A loop over experts with a mask that has a row more than there are experts."""
    import transformers as hf

    config = hf.DbrxConfig(
        vocab_size=models.VOCABULARY, d_model=16, n_heads=4, n_layers=1, max_seq_len=64,
        use_cache=False, pad_token_id=0, experts_implementation="eager",
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=8, hidden_size=16, moe_num_experts=11, moe_top_k=2),
    )  # fmt: skip
    return hf.DbrxForCausalLM(config)


def doge() -> nn.Module:
    """Experts that are rows of two embeddings, which each token looks up."""
    import transformers as hf

    return hf.DogeForCausalLM(hf.DogeConfig(**ONE, is_moe=True, num_experts=16, head_dim=4))


def jetmoe() -> nn.Module:
    """Attention stands between the two halves of its experts."""
    import transformers as hf

    return hf.JetMoeForCausalLM(hf.JetMoeConfig(**ONE, num_local_experts=6, kv_channels=8))


def llama4() -> nn.Module:
    """All experts on all tokens, whose weights are zero for those that were not chosen."""
    import transformers as hf

    config = hf.Llama4TextConfig(
        **ONE, num_local_experts=6, intermediate_size_mlp=24, head_dim=4, moe_layers=[0]
    )
    return hf.Llama4ForCausalLM(config)


def longcat() -> nn.Module:
    """Some of its experts are the identity."""
    import transformers as hf

    changed = {**ONE, "num_key_value_heads": 4, "num_hidden_layers": 2}
    config = hf.LongcatFlashConfig(
        **changed, num_layers=1, ffn_hidden_size=24, expert_ffn_hidden_size=8, moe_topk=2,
        n_routed_experts=8, zero_expert_num=2, q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, head_dim=4,
    )  # fmt: skip
    return hf.LongcatFlashForCausalLM(config)


def nemotron_h() -> nn.Module:
    """As DBRX, with the number of each expert taken out of its tensor."""
    import transformers as hf

    config = hf.NemotronHConfig(
        **{**ONE, "num_hidden_layers": 2}, layers_block_type=["attention", "moe"], head_dim=4,
        n_routed_experts=11, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
        n_shared_experts=1, n_group=1, topk_group=1, mamba_num_heads=4, mamba_head_dim=8,
    )  # fmt: skip
    return hf.NemotronHForCausalLM(config)


def built(family: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return family().to(torch.float64).eval()


def batch(seed: int) -> dict[str, Tensor]:
    return models.batch(seed, size=8, length=4)


@cache
def subject(family: Callable[[], nn.Module]) -> tuple[nn.Module, Program, Step]:
    """A model, its canonical program, and its step on a batch that it was not traced with."""
    model = built(family)
    with InFloat64():
        return model, canonical()(trace(model, batch(0))), eager_step(model, batch(1))


def combines(program: Program) -> int:
    return sum(n.target is torch.ops.moptrace.combine.default for n in program.nodes)


@pytest.mark.parametrize("family", [dbrx, doge, llama4, nemotron_h])
def test_every_rank_computes_the_same_step(family: Callable[[], nn.Module]) -> None:
    model, program, want = subject(family)
    assert want.loss.dtype == torch.float64
    for number, (ranks, ep) in enumerate(LAYOUTS):
        plan = Plan(ep=ep, edp=("shard", "replicate")[number % 2])
        local = sharded(plan, ranks)(program)
        assert_same_step(simulated_step(local, whole_state(model), batch(1)), want)


@pytest.mark.parametrize("family", [dbrx, llama4, nemotron_h])
def test_the_block_is_raised(family: Callable[[], nn.Module]) -> None:
    _, program, _ = subject(family)
    assert combines(program) == 1 and not program.notes


def test_experts_that_are_rows_of_an_embedding_are_dense_with_a_note() -> None:
    _, program, _ = subject(doge)
    assert combines(program) == 0 and WITHOUT_EXPERTS in program.notes


def test_llama4_itself_computes_in_float32_in_places() -> None:
    """Why its steps are compared inside InFloat64: the model's own roundings are of float32."""
    model, _, want = subject(llama4)
    alone = eager_step(model, batch(1))
    assert alone.loss.dtype == torch.float32
    difference = (alone.loss.double() - want.loss).abs() / want.loss.abs()
    assert 1e-10 < difference < 1e-6


@pytest.mark.parametrize(
    ("family", "found", "instead"),
    [
        (jetmoe, "a value for each pair of a token and its expert", "add up the results for each"),
        (longcat, "where expert 0 computes aten.linear", "give every expert the same function"),
    ],
)
def test_what_is_refused_says_what_to_write(
    family: Callable[[], nn.Module], found: str, instead: str
) -> None:
    with pytest.raises(RoleError) as error:
        canonical()(trace(built(family), batch(0)))
    assert found in str(error.value) and instead in str(error.value)
