"""Look at a model through moptrace: capture it, recognise it, place it, and print each step.

Run it with ``python examples/1_print_a_graph.py``. One process; nothing is trained.
"""

import torch
from torch import nn
from torch.nn import functional as F

import moptrace
from moptrace.explain import explain
from moptrace.passes.default import canonical, sharded


class OneHot(nn.Module):
    """A Mixture-of-Experts in einsums: a one-hot matrix sends tokens to experts and back."""

    def __init__(self, vocabulary=256, width=32, hidden=64, experts=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        hot = F.one_hot(chosen, len(self.up)).to(x)
        sent = torch.einsum("nke,nd->end", hot, x)
        each = torch.einsum("end,edf->enf", sent, self.up)
        each = torch.einsum("enf,efd->end", F.gelu(each), self.down)
        x = x + torch.einsum("end,nke,nk->nd", each, hot, weights)
        return F.cross_entropy(self.head(x), labels.flatten())


# A program is one graph. `trace` runs the model once on fake tensors: no value is computed. The
# batch may be fake too; its shapes are those of the global batch.
ids = torch.zeros(8, 16, dtype=torch.int64)
program = moptrace.trace(OneHot(), {"input_ids": ids, "labels": ids})
print("As it was captured:\n")
print(program)

# The canonical program says the same in one spelling. The einsums over all experts are gone: rows
# are dispatched to the experts that were chosen, and combined.
program = canonical()(program)
print("\nIn canonical form:\n")
print(program)

# Every pass leaves the program that it was given in the history, so a difference is always at hand.
raised = next(p for p in program.history if p.made_by and p.made_by.name == "raise_experts")
print("\nWhat raise_experts changed:\n")
print(raised.diff())

# A layout numbers the ranks and groups them: four ranks, pairs of which share the experts. No rank
# is started. `@dp` in a type says over which ranks a dimension is split.
local = sharded(moptrace.Plan(ep=2), world_size=4)(program)
print("\nWhat each of four ranks runs:\n")
print(local)
print("\nAnd in short:\n")
print(explain(local))
