"""What masks of attention say: a window of positions, documents, and what cannot be read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moptrace import trace
from moptrace.passes.attention_masks import Seen, read_mask
from moptrace.passes.axes import argument
from moptrace.testing import eager_step

LENGTH, LOW = 6, torch.finfo(torch.float64).min
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, documents [B, T]


class Attends(nn.Module):
    """Attention with a mask that is made of positions and of a number for each token."""

    def __init__(self, mask: Mask):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mask = nn.Embedding(7, 4), mask
        self.double()

    def forward(self, input_ids: Tensor, documents: Tensor) -> Tensor:
        x = self.embedding(input_ids).unsqueeze(1)
        positions = torch.arange(input_ids.shape[1])
        mask = self.mask(positions[:, None], positions[None, :], documents)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).square().sum()


def fed() -> dict[str, Tensor]:
    documents = torch.tensor([[1, 1, 2, 2, 2, 0], [3, 1, 1, 1, 1, 1]])
    return {"input_ids": torch.arange(12).view(2, 6) % 7, "documents": documents}


def attention_of(mask: Mask) -> fx.Node:
    program = trace(Attends(mask), fed())
    target = torch.ops.aten.scaled_dot_product_attention.default
    (node,) = program.graph.find_nodes(op="call_function", target=target)
    return node


def same(documents: Tensor) -> Tensor:
    return (documents[:, :, None] == documents[:, None, :])[:, None]


def indexed(documents: Tensor) -> tuple[Tensor, Tensor]:
    """As Hugging Face's models do it: the number of each pair's query and key."""
    batch = torch.arange(2)[:, None, None, None]
    place = torch.arange(LENGTH)
    return documents[batch, place[None, None, :, None]], documents[batch, place[None, None, None]]


def runs(positions: Tensor) -> Tensor:
    return (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def hidden(mask: Tensor, low: float = -torch.inf) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, low)


WINDOWS: dict[str, tuple[Mask, Seen]] = {
    "causal": (lambda q, k, d: q >= k, Seen(right=0)),
    "causal, the other way round": (lambda q, k, d: k <= q, Seen(right=0)),
    "a window": (lambda q, k, d: (q - k >= 0) & (q - k < 3), Seen(2, 0)),
    "a window, shifted": (lambda q, k, d: (k > q - 3) & (k <= q), Seen(2, 0)),
    "both sides": (lambda q, k, d: (q - k).abs() <= 2, Seen(2, 2)),
    "one token on": (lambda q, k, d: k < q + 2, Seen(right=1)),
    "tril": (lambda q, k, d: torch.ones(6, 6, dtype=torch.bool).tril(), Seen(right=0)),
    "not triu": (lambda q, k, d: ~torch.ones(6, 6, dtype=torch.bool).triu(1), Seen(right=0)),
    "a band": (lambda q, k, d: torch.ones(6, 6).bool().tril(1).triu(-2), Seen(2, 1)),
    "everything": (lambda q, k, d: torch.ones(1, 1, 6, 6, dtype=torch.bool), Seen()),
    "views": (
        lambda q, k, d: (q.view(1, 1, -1, 1) >= k.view(1, -1)).expand(2, 1, 6, 6),
        Seen(right=0),
    ),
    "-inf": (lambda q, k, d: hidden(k > q), Seen(right=0)),
    "the lowest number": (lambda q, k, d: hidden(k > q, LOW), Seen(right=0)),
    "a triangle of -inf": (
        lambda q, k, d: torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1),
        Seen(right=0),
    ),
    "where": (
        lambda q, k, d: torch.where(q >= k, torch.zeros(6, 6, dtype=torch.float64), -torch.inf),
        Seen(right=0),
    ),
}  # fmt: skip
OF_DOCUMENTS: dict[str, tuple[Mask, Seen]] = {
    "documents": (lambda q, k, d: same(d), Seen()),
    "causal in documents": (lambda q, k, d: same(d) & (k <= q), Seen(right=0)),
    "indexed": (lambda q, k, d: torch.eq(*indexed(d)) & (k <= q), Seen(right=0)),
    "casts of them": (lambda q, k, d: same(d.to(torch.int64) + 1) & (k <= q), Seen(right=0)),
    "as booleans": (lambda q, k, d: same(d.bool()), Seen()),
    "-inf": (lambda q, k, d: hidden(~same(d)), Seen()),
    "runs of positions": (
        lambda q, k, d: torch.eq(*indexed(runs(d))) & torch.ge(*indexed(d)),
        Seen(right=0),
    ),
    "a window in runs": (
        lambda q, k, d: torch.eq(*indexed(runs(d))) & (indexed(d)[1] > indexed(d)[0] - 2),
        Seen(left=1),
    ),
}
NOT_READ: dict[str, tuple[Mask, Seen]] = {
    "padding": (lambda q, k, d: (k <= q) & (d != 0)[:, None, None, :], Seen(right=0)),
    "order of numbers": (lambda q, k, d: torch.ge(*indexed(d)), Seen()),
    "order in documents of others": (
        lambda q, k, d: torch.eq(*indexed(d)) & torch.ge(*indexed(d * d)),
        Seen(),
    ),
    "a prefix": (lambda q, k, d: (k <= q) | (k < 2), Seen()),
    "added numbers": (lambda q, k, d: (k - q).double(), Seen()),
    "a low number": (lambda q, k, d: hidden(k > q, -1e4), Seen()),
    "the lowest number everywhere": (lambda q, k, d: hidden(k > q - 1, LOW), Seen()),
    "every second": (lambda q, k, d: ((q - k) % 2 == 0) & (k <= q), Seen(right=0)),
    "not twice": (lambda q, k, d: ~((q - k >= 0) & (q - k < 3)), Seen()),
}


def read(mask: Mask) -> tuple[Seen, Seen]:
    """What is read, and the window alone."""
    seen = read_mask(argument(attention_of(mask), 3, "attn_mask"))
    return seen, Seen(seen.left, seen.right)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_read(name: str) -> None:
    mask, want = WINDOWS[name]
    assert read(mask)[0] == want


@pytest.mark.parametrize("name", OF_DOCUMENTS)
def test_documents_are_read(name: str) -> None:
    mask, want = OF_DOCUMENTS[name]
    seen, window = read(mask)
    assert len(seen.documents) == 1 and not seen.rest and window == want


@pytest.mark.parametrize("name", NOT_READ)
def test_what_cannot_be_read_stays_a_mask(name: str) -> None:
    mask, want = NOT_READ[name]
    seen, window = read(mask)
    assert seen.rest and window == want


@pytest.mark.parametrize("name", [*WINDOWS, *OF_DOCUMENTS, *NOT_READ])
def test_a_mask_says_what_was_read(name: str) -> None:
    """The traced mask, evaluated, is the window with the documents and the rest."""
    mask = {**WINDOWS, **OF_DOCUMENTS, **NOT_READ}[name][0]
    node = attention_of(mask)
    seen = read_mask(argument(node, 3, "attn_mask"))
    place = torch.arange(LENGTH)
    whole = argument(node, 3, "attn_mask")
    values = dict(
        zip(
            nodes := (whole, *seen.documents, *seen.rest), evaluated(node.graph, nodes), strict=True
        )
    )
    if seen.rest == (whole,):
        return
    ahead = place[None, :] - place[:, None]
    have = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    have = have & (ahead <= seen.right) if seen.right is not None else have
    have = have & (ahead >= -seen.left) if seen.left is not None else have
    for document in seen.documents:
        have = have & same(values[document])
    for rest in seen.rest:
        have = have & values[rest]
    want = values[whole]
    want = want if want.dtype == torch.bool else want == 0
    assert torch.equal(have, want.expand_as(have))


def evaluated(graph: fx.Graph, nodes: tuple[fx.Node, ...]) -> list[Tensor]:
    """The values of some nodes that are made of the batch alone."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or all(x in copies for x in node.all_input_nodes):
            if node.op in ("placeholder", "call_function"):
                copies[node] = new.node_copy(node, copies.__getitem__)
    new.output([copies[node] for node in nodes])
    new.eliminate_dead_code()
    inputs = [n for n in new.nodes if n.op == "placeholder"]
    given = [fed().get(n.name, torch.zeros(7, 4, dtype=torch.float64)) for n in inputs]
    return fx.GraphModule(nn.Module(), new)(*given)


def test_the_masks_of_this_file_are_valid() -> None:
    for mask, _ in (*WINDOWS.values(), *OF_DOCUMENTS.values()):
        assert eager_step(Attends(mask), fed()).loss.isfinite()
