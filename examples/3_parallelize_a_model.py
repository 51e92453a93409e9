"""Train a hand-written Mixture-of-Experts on two ranks, from its single-device code.

Run it with ``python examples/3_parallelize_a_model.py``: it starts two processes that talk over
gloo. Each trains its share of every batch; beside them, rank 0 trains the model itself.
"""

import copy
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import moptrace

RANKS = 2


class Expert(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """A router, a loop over experts, and a loss: what one writes first."""

    def __init__(self, vocabulary=128, width=32, hidden=48, experts=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(experts))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids).flatten(0, 1)
        tokens = self.norm(x)
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if token.numel():
                out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return F.cross_entropy(self.head(x + out), labels.flatten())


def train(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    alone = Model().double()  # float64, so that "the same" can mean the same
    model = moptrace.parallelize(copy.deepcopy(alone), init_device_mesh("cpu", (RANKS,)))
    ours = torch.optim.SGD(model.parameters(), lr=0.3)
    theirs = torch.optim.SGD(alone.parameters(), lr=0.3)

    for step in range(1, 6):
        ids = torch.randint(128, (4, 12))  # the global batch, the same on every rank
        loss = model(**model.local_batch({"input_ids": ids, "labels": ids}))
        expected = alone(ids, ids)
        loss.backward()
        expected.backward()
        gradients = model.full_gradients()  # whole, under the model's own names
        apart = max(_apart(gradients[name], p.grad) for name, p in alone.named_parameters())
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
        if rank == 0:
            print(f"step {step}  loss {loss:.6f}  one device {expected:.6f}  gradients {apart:.0e}")

    state = model.full_state_dict()  # every rank helps to gather it
    if rank == 0:
        worst = max(float((state[name] - p).abs().max()) for name, p in alone.state_dict().items())
        print(f"after 5 steps the weights differ by {worst:.0e} at most\n")
        print(model.explain())
    dist.destroy_process_group()


def _apart(gradient, expected):
    """The largest difference; eager PyTorch has no gradient for an expert without a token."""
    return float((gradient - (0 if expected is None else expected)).abs().max())


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    mp.spawn(train, (free_port,), nprocs=RANKS)
