"""The model that the step-time benchmark trains: a plain single-device MoE decoder.

Nothing here knows of ranks. Pre-norm attention without position embedding, then a fine-grained
mixture of SwiGLU experts with stacked weights, sorted tokens and grouped matmuls, in the structure
that Hugging Face models run (``transformers.integrations.moe.grouped_mm_experts_forward``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Experts", "MoEConfig", "MoEDecoder"]


@dataclass(frozen=True)
class MoEConfig:
    """Sizes of the decoder; the defaults are the fine-grained model of the benchmark."""

    layers: int = 2
    hidden: int = 256
    heads: int = 4
    experts: int = 64
    top_k: int = 2
    expert_hidden: int = 512
    vocabulary: int = 1024

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, {self.experts} experts top-{self.top_k}, d {self.hidden}, "
            f"f {self.expert_hidden}, {self.heads} heads, vocabulary {self.vocabulary:,}"
        )


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape))


class Router(nn.Module):
    """Softmax over the experts, the ``top_k`` best, weights that sum to one."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x [N, d]`` to ``(index [N, k], weights [N, k])``."""
        probabilities = F.linear(x, self.weight).softmax(-1)
        weights, index = probabilities.topk(self.top_k, dim=-1)
        return index, weights / weights.sum(-1, keepdim=True)


class Experts(nn.Module):
    """All experts as two stacked parameters, run on rows sorted by expert."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_experts = config.experts
        d, f = config.hidden, config.expert_hidden
        self.gate_up_proj = nn.Parameter(torch.empty(config.experts, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(config.experts, d, f))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """``x [N, d]``, ``index [N, k]``, ``weights [N, k]`` to ``[N, d]``."""
        top_k = index.size(-1)
        experts, order = torch.sort(index.reshape(-1), stable=True)
        rows = x[order // top_k]
        last = self.num_experts - 1
        counts = torch.histc(experts.float(), bins=self.num_experts, min=0, max=last)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = F.grouped_mm(rows, self.gate_up_proj.transpose(-2, -1), offs=offsets)
        gate, up = rows.chunk(2, dim=-1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=offsets)
        rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.size(0), device=order.device)
        return rows[inverse].view(-1, top_k, x.size(-1)).sum(dim=1)


class Layer(nn.Module):
    """Attention and experts, each behind a norm and a residual."""

    def __init__(self, config: MoEConfig, experts: Callable[[MoEConfig], nn.Module]) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.attention = Attention(config)
        self.experts_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.router = Router(config)
        self.experts = experts(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        rows = self.experts_norm(x).flatten(0, 1)
        return x + self.experts(rows, *self.router(rows)).view_as(x)


class MoEDecoder(nn.Module):
    """A mixture-of-experts language model that returns its loss.

    ``experts`` makes the module that runs the experts of a layer: a baseline puts its own there.
    """

    def __init__(
        self, config: MoEConfig, experts: Callable[[MoEConfig], nn.Module] = Experts
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, experts) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def reset_parameters(self, seed: int = 0) -> MoEDecoder:
        """Draw every weight, except those of the norms, from N(0, 0.05^2)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.05, generator=generator)
        return self

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """``input_ids [B, T]`` and ``labels [B, T]``, the next tokens, to the mean loss."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.loss(self.norm(x), labels)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """``x [B, T, d]`` and the next tokens to the mean loss."""
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
