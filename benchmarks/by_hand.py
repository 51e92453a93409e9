"""The expert-parallel step that an expert would write by hand for the model of ``models.py``.

Experts are split over the ranks; tokens travel to them and back by two all-to-alls with split
sizes, each an autograd function whose backward is the reverse exchange. Dense parameters are
replicated and their gradients summed by one flat all-reduce. What makes it fast on CPU:

- sorting, un-sorting and exchanging rows are permutations, so every backward is a gather, never
  a scatter-add;
- received rows are put in expert order by one concatenation of slices, which also pads each
  expert's rows to a few round sizes: oneDNN compiles a kernel for every shape it meets;
- an expert's two matmuls and its activation run back to back while its rows are in cache;
- weight gradients are written in place, one expert at a time, with no zero fill;
- the matmul is the faster of ATen's (MKL) and oneDNN's, measured at start: oneDNN's is twice as
  fast on some processors.

Where the vocabulary is large, its words are split over the ranks too, and the loss is that of
Megatron-LM: every rank has the logits of all tokens for its own words. Where ranks share a long
sequence, attention is torch's ring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from context import TorchRing
from models import Attention, Experts, MoEConfig, MoEDecoder

__all__ = ["ByHand", "FastExperts", "Ring", "choose_matmul"]

Matmul = Callable[[Tensor, Tensor, Tensor], None]
Sizes = list[list[int]]

# ------------------------------------------------------------------------------------- matmul


def aten(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


def onednn(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))


matmul: Matmul = aten
row_multiple = 1  # an expert's rows are padded to it


def choose_matmul(rows: int = 64, inner: int = 256, columns: int = 1024) -> str:
    """Use the fastest matmul of one expert's ``[rows, inner]`` from now on; return its name."""
    global matmul, row_multiple
    a, b = torch.randn(rows, inner), torch.randn(columns, inner).t()
    out = torch.empty(rows, columns)

    def seconds(candidate: Matmul) -> float:
        times: list[float] = []
        for _ in range(30):
            start = time.perf_counter()
            candidate(a, b, out)
            times.append(time.perf_counter() - start)
        return min(times)

    candidates = [aten, onednn] if torch.backends.mkldnn.is_available() else [aten]
    matmul = min(candidates, key=seconds)
    row_multiple = 1 if matmul is aten else 16
    return matmul.__name__


# --------------------------------------------------------------------------- autograd functions


class Dispatch(torch.autograd.Function):
    """``x [N, d]`` to one row for each (token, choice) pair, in expert order ``[N k, d]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (inverse,) = ctx.saved_tensors
        pairs = grad.index_select(0, inverse).unflatten(0, (-1, ctx.top_k))
        return pairs.sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Each token's weighted sum: ``rows [N k, d]`` and ``weights [N, k]`` to ``[N, d]``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        pairs = rows.index_select(0, inverse).unflatten(0, weights.shape)
        ctx.save_for_backward(pairs, weights, order)
        return torch.bmm(weights.unsqueeze(1), pairs).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        pairs, weights, order = ctx.saved_tensors
        grad_rows = grad.index_select(0, order // weights.size(1))
        grad_rows *= weights.flatten().index_select(0, order).unsqueeze(1)
        return grad_rows, torch.bmm(pairs, grad.unsqueeze(2)).squeeze(2), None, None


class Exchange(torch.autograd.Function):
    """Send ``sizes_in[r]`` rows to rank ``r`` and receive ``sizes_out[r]`` from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes_in: list[int], sizes_out: list[int]) -> Tensor:
        ctx.sizes = sizes_in, sizes_out
        return exchange(rows, sizes_in, sizes_out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        sizes_in, sizes_out = ctx.sizes
        return exchange(grad, sizes_out, sizes_in), None, None


class ToExperts(torch.autograd.Function):
    """Rows of ``(source, expert)`` blocks, ``sizes[source][expert]`` rows each, by expert."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sizes) -> Tensor:
        ctx.sizes = sizes
        return to_experts(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return from_experts(grad, ctx.sizes), None


class FromExperts(torch.autograd.Function):
    """The reverse of ``ToExperts``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sizes) -> Tensor:
        ctx.sizes = sizes
        return from_experts(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return to_experts(grad, ctx.sizes), None


class SwigluExperts(torch.autograd.Function):
    """Each expert's ``down @ (silu(gate @ x) * (up @ x))`` on its ``counts[e]`` rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Sequence[int]
    ) -> Tensor:
        both = rows.new_empty(rows.size(0), gate_up.size(1))
        result = torch.empty_like(rows)
        for expert, span in spans(counts):
            matmul(rows[span], gate_up[expert].t(), both[span])
            gate, up = both[span].chunk(2, dim=1)
            matmul(F.silu(gate).mul_(up), down[expert].t(), result[span])
        ctx.save_for_backward(rows, gate_up, down, both)
        ctx.counts = counts
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, gate_up, down, both = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = torch.empty_like(rows)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert, count in enumerate(ctx.counts):
            if count == 0:
                grad_gate_up[expert].zero_()
                grad_down[expert].zero_()
        for expert, span in spans(ctx.counts):
            gate, up = both[span].chunk(2, dim=1)
            activated = F.silu(gate)
            grad_both, grad_hidden = torch.empty_like(both[span]), torch.empty_like(activated)
            grad_gate, grad_up = grad_both.chunk(2, dim=1)
            matmul(grad[span], down[expert], grad_hidden)
            torch.mul(grad_hidden, activated, out=grad_up)
            matmul(grad[span].t(), activated.mul_(up), grad_down[expert])
            torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate, grad_input=grad_gate)
            matmul(grad_both, gate_up[expert], grad_rows[span])
            matmul(grad_both.t(), rows[span], grad_gate_up[expert])
        return grad_rows, grad_gate_up, grad_down, None


def exchange(rows: Tensor, sizes_in: list[int], sizes_out: list[int]) -> Tensor:
    received = rows.new_empty(sum(sizes_out), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), sizes_out, sizes_in)
    return received


def to_experts(rows: Tensor, sizes: Sizes) -> Tensor:
    blocks = rows.split([size for line in sizes for size in line])
    zeros = rows.new_zeros(row_multiple, rows.size(1))
    ordered: list[Tensor] = []
    for expert, padding in enumerate(paddings(sizes)):
        ordered += [*blocks[expert :: len(sizes[0])], zeros[:padding]]
    return torch.cat(ordered)


def from_experts(rows: Tensor, sizes: Sizes) -> Tensor:
    columns = zip(*sizes, paddings(sizes), strict=True)
    blocks = rows.split([size for column in columns for size in column])
    width = len(sizes) + 1
    return torch.cat([block for source in range(len(sizes)) for block in blocks[source::width]])


def paddings(sizes: Sizes) -> list[int]:
    """The zero rows after each expert's own."""
    return [-sum(column) % row_multiple for column in zip(*sizes, strict=True)]


def padded_counts(sizes: Sizes) -> list[int]:
    """The rows of each expert, padding included."""
    return [sum(column) for column in zip(*sizes, paddings(sizes), strict=True)]


def spans(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and where those are."""
    edges = pairwise(accumulate(counts, initial=0))
    return [(expert, slice(*edge)) for expert, edge in enumerate(edges) if edge[0] < edge[1]]


# ------------------------------------------------------------------------------------- modules


def sort_pairs(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``index [N, k]`` to the pairs' order by expert, its inverse, and the counts per expert."""
    pairs = index.flatten()
    order = pairs.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return order, inverse, torch.bincount(pairs, minlength=num_experts)


@torch.compiler.disable  # its sizes are data: the compiler would only break the graph to pieces
def on_one_device(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    order, inverse, counts = sort_pairs(index, gate_up.size(0))
    rows = Dispatch.apply(x, order, inverse, index.size(1))
    sizes: Sizes = [counts.tolist()]
    rows = SwigluExperts.apply(ToExperts.apply(rows, sizes), gate_up, down, padded_counts(sizes))
    return Combine.apply(FromExperts.apply(rows, sizes), weights, order, inverse)


class FastExperts(Experts):
    """``Experts`` on one device with the same fast row functions as ``ByHand``."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        parameters = self.gate_up_proj, self.down_proj
        return on_one_device(x, index, weights, *parameters)  # type: ignore[call-arg]


class SplitExperts(Experts):
    """This rank's share of the experts, run on the rows that all ranks send them."""

    def __init__(self, config: MoEConfig) -> None:
        self.ranks = dist.get_world_size()
        super().__init__(replace(config, experts=config.experts // self.ranks))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        order, inverse, counts = sort_pairs(index, self.num_experts * self.ranks)
        rows = Dispatch.apply(x, order, inverse, index.size(1))
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts)
        sent = counts.view(self.ranks, -1).sum(1).tolist()
        sizes: Sizes = arriving.view(self.ranks, -1).tolist()
        received = [sum(line) for line in sizes]
        rows = ToExperts.apply(Exchange.apply(rows, sent, received), sizes)
        rows = SwigluExperts.apply(rows, self.gate_up_proj, self.down_proj, padded_counts(sizes))
        rows = Exchange.apply(FromExperts.apply(rows, sizes), received, sent)
        return Combine.apply(rows, weights, order, inverse)


class SplitLoss(torch.autograd.Function):
    """The mean loss of all ranks' tokens, of which this rank has its own, over its share of words.

    The gradient is that of the mean over this rank's tokens, as that of a loss of its own would be.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ranks, words = dist.get_world_size(), weight.size(0)
        every = x.new_empty(ranks * x.size(0), x.size(1))
        dist.all_gather_into_tensor(every, x.contiguous())
        chosen = labels.new_empty(ranks * labels.size(0))
        dist.all_gather_into_tensor(chosen, labels.contiguous())
        chosen = chosen - dist.get_rank() * words
        token = ((chosen >= 0) & (chosen < words)).nonzero().flatten()
        place = token, chosen[token]
        logits = every @ weight.t()
        top = logits.amax(1)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        logits -= top.unsqueeze(1)
        sums = logits.new_zeros(2, logits.size(0))
        sums[0, token] = logits[place]
        probability = logits.exp_()
        torch.sum(probability, 1, out=sums[1])
        dist.all_reduce(sums)
        probability /= sums[1].unsqueeze(1)
        probability[place] -= 1
        ctx.save_for_backward(every, weight, probability)
        return (sums[1].log() - sums[0]).mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        every, weight, of_logits = ctx.saved_tensors
        ranks = dist.get_world_size()
        of_logits = of_logits.mul_(gradient * ranks / every.size(0))
        of_every = of_logits @ weight
        of_x = of_every.new_empty(every.size(0) // ranks, every.size(1))
        dist.reduce_scatter_tensor(of_x, of_every)
        return of_x, of_logits.t() @ every, None


class SplitWords(MoEDecoder):
    """The decoder with this rank's share of the words."""

    def __init__(self, config: MoEConfig, experts: Callable[[MoEConfig], nn.Module]) -> None:
        super().__init__(config, experts)
        words = config.vocabulary // dist.get_world_size()
        self.head = nn.Linear(config.hidden, words, bias=False)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return SplitLoss.apply(x.flatten(0, 1), self.head.weight, labels.flatten())


class Ring(nn.Module):
    """The model's attention with torch's ring; the ranks' tokens are in its zig-zag order."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(TorchRing.apply(q, k, v).transpose(1, 2).flatten(2))


class ByHand(nn.Module):
    """The decoder with its experts split over the ranks; ``backward`` also reduces gradients.

    Takes the weights of ``whole``, the single-device model, which it leaves as it is.
    ``splits_words``: the ranks share the vocabulary; ``shares``: they share each sequence.
    """

    def __init__(
        self,
        config: MoEConfig,
        whole: MoEDecoder,
        splits_words: bool = False,
        shares: bool = False,
    ) -> None:
        super().__init__()
        self.model = (SplitWords if splits_words else MoEDecoder)(config, SplitExperts)
        for layer in self.model.layers if shares else ():
            layer.attention = Ring(layer.attention)
        self.ranks, rank = dist.get_world_size(), dist.get_rank()
        split = {
            f"{path}.{name}"
            for path, module in self.model.named_modules()
            if isinstance(module, SplitExperts)
            for name, _ in module.named_parameters()
        }
        if splits_words:
            split.add("head.weight")
        self.dense = [p for name, p in self.model.named_parameters() if name not in split]
        self.model.load_state_dict(
            {
                name: weight.chunk(self.ranks)[rank] if name in split else weight
                for name, weight in whole.state_dict().items()
            }
        )
        self.split = split

    def backward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Leave the global mean loss's gradients in the parameters; return that loss."""
        loss = self.model(input_ids, labels) / self.ranks
        loss.backward()
        flat = torch.cat([*(gradient(p).flatten() for p in self.dense), loss.detach().view(1)])
        dist.all_reduce(flat)
        *summed, total = flat.split([*(p.numel() for p in self.dense), 1])
        for parameter, part in zip(self.dense, summed, strict=True):
            parameter.grad = part.view_as(parameter)
        return total.squeeze()

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient of the single-device model, on every rank."""
        gradients: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            own = gradients[name] = gradient(parameter)
            if name in self.split:
                parts = [torch.empty_like(own) for _ in range(self.ranks)]
                dist.all_gather(parts, own)
                gradients[name] = torch.cat(parts)
        return gradients


def gradient(parameter: nn.Parameter) -> Tensor:
    """Every parameter of the model takes part in every step, so every one has a gradient."""
    assert parameter.grad is not None
    return parameter.grad
