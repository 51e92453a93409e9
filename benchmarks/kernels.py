"""Every kernel on this machine: checked, and timed next to what one would use instead.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --only linear_cross_entropy experts --rounds 9
    python benchmarks/kernels.py --device cuda

Each way to compute a thing first has to give the result, and the gradients where there are any, of
plain PyTorch in float64, to the error that its dtype allows. Then all ways take turns, and medians
are compared: on a CPU, with one thread, of the time that it worked, since others may use the
machine; with more threads (``--threads``), of the time that passed. A ratio over 1 says that
moptrace is faster. Memory is the most that is taken beside the operands. The last column is the
time that the operation would take at the speed of the slower of two ceilings, measured in the same
run, as a part of moptrace's time: a copy of large tensors, and a product of large matrices by
``torch.mm``, than which another library may be faster. What cannot be imported, or needs another
device, is named in the report. The exit status is 1 where a result is wrong or a limit
(``Contest.limits``, ``most_bytes``) is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

import peaks
from moptrace.kernels import reference
from moptrace.kernels.attention import attention
from moptrace.kernels.expert_function import Operand, expert_function
from moptrace.kernels.grouped_mm import grouped_mm
from moptrace.kernels.host_memory import finish_copies, offload_into, prefetch, wait_prefetch
from moptrace.kernels.linear_cross_entropy import linear_cross_entropy
from moptrace.kernels.merge_attention import merge_attention
from moptrace.kernels.routing import combine, dispatch, group_rows
from moptrace.kernels.selection import TABLE, choose
from report import publish, versions

Function: TypeAlias = Callable[..., Any]

# The norm of an error, of that of the result, that a dtype allows.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
FILTERED = 0.05  # of a gradient without its small parts


@dataclass(frozen=True)
class Contest:
    """One kernel on one shape: operands, our way, other ways or why there is none, the truth."""

    kernel: str
    shape: str
    operands: Sequence[Any]
    ours: Function
    others: Mapping[str, Function | str]
    truth: Function
    bytes: float  # that have to be read or written at least
    flops: float = 0.0
    is_trained: bool = True
    limits: Mapping[str, float] = field(default_factory=dict[str, float])  # of the ratio
    most_bytes: float = float("inf")  # that our way may take


# --- running one way ------------------------------------------------------------------------------


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def results_of(way: Function, contest: Contest, wide: bool = False) -> list[Tensor]:
    """What a way gives, and the gradients of the floating operands given the sum's."""
    leaves = [_leaf(x, contest.is_trained, wide) for x in contest.operands]
    results = tensors(way(*leaves))
    if not contest.is_trained:
        return results
    trained = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    ends = [x for x in results if x.requires_grad]
    upstream = [_upstream(x.shape, x.dtype, x.device) for x in ends]
    return [*(x.detach() for x in results), *torch.autograd.grad(ends, trained, upstream)]


def _leaf(x: Any, is_trained: bool, wide: bool) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return (x.double() if wide else x).detach().requires_grad_(is_trained)


@cache
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The gradient that a result of this shape is given, made once for all ways."""
    if not shape:
        return torch.ones(shape, dtype=dtype, device=device)
    row = torch.linspace(-1, 1, shape[-1], device=device, dtype=torch.float64)
    return row.sin().to(dtype).expand(shape).contiguous()


def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of a result, of its size."""
    assert len(found) == len(truth), f"{len(found)} results, not {len(truth)}"
    worst = 0.0
    for x, true in zip(found, truth, strict=True):
        if x.is_floating_point():
            size = max(float(true.double().norm()), 1e-30)
            worst = max(worst, float((x.double() - true.double()).norm()) / size)
        elif not torch.equal(x, true):
            worst = float("inf")
    return worst


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begin = clock()
        run()
        return clock() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that are taken above what there was."""
    gc.collect()
    if device.type != "cuda":
        ctypes.CDLL(None).malloc_trim(0)  # or what is freed already would hide some of it
        before = peaks.forget_peak()
        run()
        return peaks.peak() - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# --- the ceilings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in large copies and products: bytes and operations a second."""

    copy: float
    product: Mapping[torch.dtype, float]

    @staticmethod
    def of(device: torch.device) -> Ceilings:
        size, side = (2**28, 8192) if device.type == "cuda" else (2**25, 1024)
        x, y = (torch.ones(size, device=device) for _ in range(2))
        copied = median(lambda: y.copy_(x), device)
        speeds: dict[torch.dtype, float] = {}
        for dtype in ALLOWED:
            a = torch.ones(side, side, device=device, dtype=dtype)
            speeds[dtype] = 2 * side**3 / median(lambda a=a: a @ a, device)
        return Ceilings(2 * x.nbytes / copied, speeds)

    def least(self, contest: Contest) -> float:
        """The seconds that a contest would take at the ceilings."""
        dtype = next(
            x.dtype for x in contest.operands if torch.is_tensor(x) and x.is_floating_point()
        )
        return max(contest.bytes / self.copy, contest.flops / self.product[dtype])

    def __str__(self) -> str:
        products = [f"{v / 1e12:.3g} TFLOP/s in {str(k)[6:]}" for k, v in self.product.items()]
        return f"copies {self.copy / 1e9:.3g} GB/s, products {', '.join(products)}"


def keep_freed_memory() -> None:
    """Let the C library reuse what is freed: to fetch it anew costs more than some kernels."""
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    for option, value in ((trim_threshold, 2**30), (mmap_max, 0), (arena_max, 1)):
        ctypes.CDLL(None).mallopt(option, value)


def median(run: Callable[[], Any], device: torch.device, rounds: int = 7) -> float:
    run()
    return statistics.median(seconds(run, device) for _ in range(rounds))


# --- the contests ---------------------------------------------------------------------------------


def compiled(way: Function) -> Function:
    """``torch.compile`` of it, for this contest's shapes alone."""
    torch._dynamo.reset()
    return torch.compile(way, dynamic=False)


def is_missing(package: str, device: torch.device) -> str:
    """Why a package's kernels cannot be run; empty if they can."""
    if device.type != "cuda":
        return "runs on a GPU alone"
    return "" if importlib.util.find_spec(package) else "not installed"


def draw(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets,
                           reduction="sum")  # fmt: skip


def in_parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    """The same, with the logits of some tokens at a time."""
    parts = zip(hidden.split(512), targets.split(512), strict=True)
    losses = [checkpoint(full_logits, h, weight, t, use_reentrant=False) for h, t in parts]
    return torch.stack(losses).sum()  # type: ignore[arg-type]


def losses(device: torch.device, can_compile: bool) -> list[Contest]:
    """The vocabulary and its loss. Hidden states that know the next word, as trained ones do."""
    if device.type != "cuda":
        return [_loss(512, 256, 32_768, torch.float32, device, can_compile, {"eager": 1.0})]
    faster = dict.fromkeys(("eager", "torch.compile", "Liger-Kernel", "cut-cross-entropy"), 1.0)
    whole = _loss(8192, 2304, 256_000, torch.bfloat16, device, can_compile, faster, 1.2e9)
    shard = _loss(16_384, 7168, 25_000, torch.float32, device, can_compile, {}, 7.3 * 2**30)
    return [whole, replace(shard, shape=f"{shard.shape}, one of 8 shards")]


def _loss(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    device: torch.device,
    can_compile: bool,
    limits: Mapping[str, float],
    most_bytes: float = float("inf"),
) -> Contest:
    weight = draw(device, dtype, v, d, scale=d**-0.5)
    targets = torch.randint(v, (n,), device=device)
    hidden = (weight[targets] * 8 + draw(device, dtype, n, d, scale=0.5)).to(dtype)
    others: dict[str, Function | str] = {"eager": full_logits}
    if can_compile:
        others["torch.compile"] = compiled(full_logits)
    others["Liger-Kernel"] = is_missing("liger_kernel", device) or by_liger
    exact = partial(by_cce, filter_eps=None)
    others["cut-cross-entropy"] = is_missing("cut_cross_entropy", device) or exact
    return Contest(
        "linear_cross_entropy",
        f"N={n:,} D={d:,} V={v:,} {str(dtype)[6:]}",
        (hidden, weight, targets),
        linear_cross_entropy,
        others,
        in_parts,
        3.0 * (hidden.nbytes + weight.nbytes),
        6.0 * n * d * v,
        limits=limits,
        most_bytes=most_bytes,
    )


def filtered_losses(device: torch.device, can_compile: bool) -> list[Contest]:
    """The same without the small parts of gradients."""
    others: dict[str, Function | str] = {"the same, exact": linear_cross_entropy}
    others["cut-cross-entropy, filtering"] = is_missing("cut_cross_entropy", device) or by_cce
    ours = partial(linear_cross_entropy, skip_below=2**-12)
    name, exact = "linear_cross_entropy, filtering", losses(device, can_compile=False)[0]
    changed = {"ours": ours, "others": others, "limits": {}, "most_bytes": float("inf")}
    return [replace(exact, kernel=name, **changed)]


def by_liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def by_cce(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    import cut_cross_entropy  # pyright: ignore[reportMissingImports]

    return cut_cross_entropy.linear_cross_entropy(
        hidden, weight, targets, reduction="sum", **options
    )


# routing


def sorted_by_hand(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int) -> Any:
    """To the experts, who need the rows, and back as models do it: sort, gather, index_add."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    token = order // experts.shape[1]
    rows = x[token]
    scaled = rows * weights.flatten()[order].unsqueeze(1)
    counts = torch.bincount(flat, minlength=num_experts)
    return torch.zeros_like(x).index_add(0, token, scaled), rows, counts


def routed(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int) -> Any:
    rows, counts, order = dispatch(x, experts, num_experts)
    return combine(rows, order, weights), rows, counts


def cut_and_joined(rows: Tensor, table: Tensor, sizes: Sequence[int]) -> Tensor:
    """From (source, expert) to (expert, source) by hand, the sizes being known."""
    parts = rows.split(list(sizes))
    sources, experts = table.shape
    return torch.cat([parts[p * experts + c] for c in range(experts) for p in range(sources)])


def routings(device: torch.device, can_compile: bool) -> list[Contest]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    n, k, e, d = (16_384, 8, 128, 2048) if on_gpu else (8192, 8, 64, 64)
    x, weights = draw(device, dtype, n, d), draw(device, dtype, n, k).softmax(1)
    experts = torch.rand(n, e, device=device).topk(k).indices
    others: dict[str, Function | str] = {"eager": sorted_by_hand}
    if can_compile:
        others["torch.compile"] = compiled(sorted_by_hand)
    row = d * dtype.itemsize
    shape = f"N={n:,} k={k} E={e} D={d:,} {str(dtype)[6:]}"
    # Forward: tokens, rows twice, tokens; backward as much again, with the rows once more.
    there = Contest("dispatch, combine", shape, (x, experts, weights, e), routed, others,
                    sorted_by_hand, row * (4 * n + 5 * n * k))  # fmt: skip
    sources, own = 8, e // 8
    table = torch.full((sources, own), n * k // e, device=device)
    sizes = table.flatten().tolist()
    rows = draw(device, dtype, n * k, d)
    given = (rows, table, sizes)
    ours = lambda rows, table, _: group_rows(rows, table)  # noqa: E731
    shape = f"S={n * k:,} D={d:,} P={sources} C={own} {str(dtype)[6:]}"
    back = Contest("group_rows", shape, given, ours, {"split and cat": cut_and_joined},
                   cut_and_joined, 4 * rows.nbytes)  # fmt: skip
    return [there, back]


# experts


def swiglu(d: int, f: int, dtype: torch.dtype) -> Function:
    """The function of an expert: gate and up in one weight [E, d, 2f], down [E, f, d]."""
    aten, ops = torch.ops.aten, torch.ops.moptrace
    graph = fx.Graph()
    counts, rows, up, down = (graph.placeholder(n) for n in ("counts", "rows", "up", "down"))
    call = graph.call_function
    both = call(ops.grouped_mm.default, (rows, up, counts))
    halves = [call(aten.slice.Tensor, (both, 1, at, at + f)) for at in (0, f)]
    gated = call(aten.mul.Tensor, (call(aten.silu.default, (halves[0],)), halves[1]))
    graph.output((call(ops.grouped_mm.default, (gated, down, counts)),))
    shapes: list[Any] = [("rows", (d,)), ("experts", (d, 2 * f)), ("experts", (f, d))]
    return expert_function(graph, [Operand(kind, shape, dtype) for kind, shape in shapes])


def one_by_one(counts: Tensor, rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    done: list[Tensor] = []
    for e, own in enumerate(rows.split(counts.tolist())):
        gate, linear = (own @ up[e]).chunk(2, 1)
        done.append((F.silu(gate) * linear) @ down[e])
    return torch.cat(done)


def by_torchs_grouped_mm(counts: Tensor, rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, linear = torch._grouped_mm(rows, up, offs=ends).chunk(2, 1)
    return torch._grouped_mm(F.silu(gate) * linear, down, offs=ends)


def products(device: torch.device, can_compile: bool) -> list[Contest]:
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sizes = [(8192, 8, 128, 2048, 768), (8192, 2, 8, 4096, 14_336)] if on_gpu else [
        (1024, 4, 16, 256, 256)
    ]  # fmt: skip
    found: list[Contest] = []
    for n, k, e, d, f in sizes:
        chosen = torch.rand(n, e, device=device).topk(k).indices
        counts, rows = torch.bincount(chosen.flatten(), minlength=e), draw(device, dtype, n * k, d)
        up = draw(device, dtype, e, d, 2 * f, scale=d**-0.5)
        down = draw(device, dtype, e, f, d, scale=f**-0.5)
        shape = f"N={n:,} k={k} E={e} d={d:,} I={f:,} {str(dtype)[6:]}"
        others: dict[str, Function | str] = {
            "a loop over experts": one_by_one,
            "torch._grouped_mm": by_torchs_grouped_mm,
        }
        moved = 3 * (up.nbytes + down.nbytes) + 4 * rows.nbytes
        limits = {} if on_gpu else dict.fromkeys(others, 1.0)
        mlp = Contest("experts", shape, (counts, rows, up, down), swiglu(d, f, dtype), others,
                      one_by_one, moved, 18.0 * n * k * d * f, limits=limits)  # fmt: skip
        given = rows, up, counts
        ends = counts.cumsum(0, dtype=torch.int32)
        others = {
            "a loop over experts": lambda r, w, c: torch.cat(
                [own @ w[i] for i, own in enumerate(r.split(c.tolist()))]
            ),
            "torch._grouped_mm": lambda r, w, c, ends=ends: torch._grouped_mm(r, w, offs=ends),
        }
        moved = 3 * up.nbytes + 3 * rows.nbytes + 3 * n * k * 2 * f * dtype.itemsize
        loop: Any = others["a loop over experts"]
        one = Contest("grouped_mm", shape, given, grouped_mm, others, loop, moved,
                      12.0 * n * k * d * f)  # fmt: skip
        found += [mlp, one]
    return found


# the optimizer

ADAMW = {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}


def by_hand(
    x: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, lr: Tensor
) -> list[Tensor]:
    """AdamW by plain operators, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value, grad = x.to(wide), grad.to(wide)
    value = value * (1 - lr * ADAMW["weight_decay"])
    mean = torch.lerp(mean.to(wide), grad, 1 - ADAMW["beta1"])
    square = torch.lerp(square.to(wide), grad * grad, 1 - ADAMW["beta2"])
    corrections = [1 - ADAMW[beta] ** step for beta in ("beta1", "beta2")]
    scale = (square / corrections[1]).sqrt() + ADAMW["eps"]
    return [(value - lr * mean / corrections[0] / scale).to(x.dtype), mean, square]


def by_moptrace(
    x: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, lr: Tensor, **options: Any
) -> list[Tensor]:
    flags = {"amsgrad": False, "maximize": False, "decoupled": True}
    given = x, grad, [mean, square], step, lr
    return torch.ops.moptrace.fused_adam.default(*given, **ADAMW, **flags, **options)


def optimizers(device: torch.device, can_compile: bool) -> list[Contest]:
    size = 2**27 if device.type == "cuda" else 2**21
    step, lr = torch.tensor(7.0, device=device), torch.tensor(3e-4, device=device)
    found: list[Contest] = []
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"seed": 0}),
    ):
        x, grad = (draw(device, dtype, size) for _ in range(2))
        moments = [draw(device, torch.float32, size), draw(device, torch.float32, size).abs()]
        others: dict[str, Function | str] = {"eager": by_hand}
        if can_compile:
            others["torch.compile"] = compiled(by_hand)
        name = "fused_adam" + ", rounded by chance" * bool(options)
        of_torch = dtype is torch.float32
        others["torch's fused kernel"] = torchs_kernel if of_torch else "takes one dtype alone"
        moved = 3 * x.nbytes + 4 * moments[0].nbytes  # new values replace the old
        shape = f"{size:,} in {str(dtype)[6:]}, moments float32"
        given = (x, grad, *moments, step, lr)
        ours = partial(by_moptrace, **options)
        found.append(Contest(name, shape, given, ours, others, by_hand, moved, is_trained=False))
    return found


def torchs_kernel(
    x: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, lr: Tensor
) -> list[Tensor]:
    new = [x.clone(), mean.clone(), square.clone()]
    flags: dict[str, Any] = {"amsgrad": False, "maximize": False, **ADAMW}
    torch._fused_adamw_([new[0]], [grad], [new[1]], [new[2]], [], [step], lr=lr, **flags)
    return new


class Streamed:
    """Moments on the host, some buckets of them; one is updated while the next one comes."""

    def __init__(self, device: torch.device, buckets: int):
        size = 2**26 if device.type == "cuda" else 2**20
        self.device, on_gpu = device, device.type == "cuda"
        self.held = [[torch.zeros(size, device=device) for _ in "xg"] for _ in range(buckets)]
        self.host = [
            [torch.zeros(size, pin_memory=on_gpu) for _ in range(2)] for _ in range(buckets)
        ]
        self.step, self.lr = (torch.tensor(v, device=device) for v in (7.0, 3e-4))
        self.shape = f"{buckets} buckets of {size:,} in float32"
        for number, (_, grad) in enumerate(self.held):
            grad.fill_(number + 1)

    def values(self) -> list[Tensor]:
        return [x for x, _ in self.held] + [value for moments in self.host for value in moments]

    def update(self) -> None:
        flags: dict[str, Any] = {"amsgrad": False, "maximize": False, "decoupled": True, **ADAMW}
        coming = [prefetch(x, self.device) for x in self.host[0]]
        for number, ((x, grad), host) in enumerate(zip(self.held, self.host, strict=True)):
            moments = [wait_prefetch(value) for value in coming]
            if number + 1 < len(self.host):
                coming = [prefetch(value, self.device) for value in self.host[number + 1]]
            torch.ops.moptrace.fused_adam_.default(x, grad, moments, self.step, self.lr, **flags)
            for kept, value in zip(host, moments, strict=True):
                offload_into(kept, value)
        finish_copies()

    def copies(self) -> None:
        """The same without the update: the floor."""
        for host in self.host:
            moments = [wait_prefetch(prefetch(value, self.device)) for value in host]
            for kept, value in zip(host, moments, strict=True):
                offload_into(kept, value)
        finish_copies()

    def on_the_cpu(self) -> None:
        """Torch's fused kernel where the moments are; gradients and parameters travel."""
        flags: dict[str, Any] = {"amsgrad": False, "maximize": False, **ADAMW}
        for (x, grad), (mean, square) in zip(self.held, self.host, strict=True):
            here = [x.cpu(), grad.cpu()]
            torch._fused_adamw_([here[0]], [here[1]], [mean], [square], [], [self.step.cpu()],
                                lr=3e-4, **flags)  # fmt: skip
            x.copy_(here[0])


def streams(device: torch.device, can_compile: bool) -> list[Contest]:
    """Each run goes on from the last one's moments, so the first alone is checked, here."""
    streamed, plain = Streamed(device, 3), Streamed(device, 3)
    streamed.update()
    plain.on_the_cpu()
    pairs = zip(streamed.values(), plain.values(), strict=True)
    if not all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in pairs):
        raise SystemExit("streamed AdamW gives other weights or moments than torch on the CPU")
    stream = Streamed(device, 4)
    moved = 2.0 * sum(x.nbytes for host in stream.host for x in host)

    def run(way: Callable[[], None]) -> Function:
        return lambda _: way() or []

    on_gpu = device.type == "cuda"
    others: dict[str, Function | str] = {
        "the copies alone": run(stream.copies),
        "torch's fused kernel on the CPU": run(stream.on_the_cpu),
    }
    limits = {"the copies alone": 1 / 1.15} if on_gpu else {}
    ours, nothing = run(stream.update), run(lambda: None)
    given = (torch.zeros(1, device=device),)
    return [Contest("streamed AdamW", stream.shape, given, ours, others, nothing, moved,
                    is_trained=False, limits=limits)]  # fmt: skip


# attention


def documents_by_mask(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scale: float
) -> Tensor:
    seen = documents[:, None, :, None] == documents[:, None, None, :]
    seen = seen & torch.ones_like(seen[0, 0]).tril()
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scale)


def in_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scale: float
) -> Tensor:
    return attention(query, key, value, None, documents, right=0, scale=scale)[0]


def attentions(device: torch.device, can_compile: bool) -> list[Contest]:
    on_gpu = device.type == "cuda"
    b, h, t, d = (4, 32, 8192, 128) if on_gpu else (2, 8, 4096, 64)
    parts: list[Tensor] = []
    for _ in range(2):
        parts += [draw(device, torch.float32, b, h, t, d), draw(device, torch.float32, b, h, t)]
    others: dict[str, Function | str] = {"eager": reference.merge_attention}
    if can_compile:
        others["torch.compile"] = compiled(reference.merge_attention)
    shape = f"B={b} h={h} T={t:,} d={d} float32"
    merge = Contest("merge_attention", shape, parts, merge_attention, others,
                    reference.merge_attention, 3 * parts[0].nbytes, is_trained=False)  # fmt: skip
    b, h, t = (1, 16, 4096) if on_gpu else (1, 4, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads = [draw(device, dtype, b, h, t, d) for _ in range(3)]
    documents = torch.arange(t, device=device).div(t // 8, rounding_mode="floor")[None]
    given = (*heads, documents, d**-0.5)
    shape = f"B={b} h={h} T={t:,} d={d}, 8 documents, {str(dtype)[6:]}"
    pairs = b * h * t * t / 8 / 2
    core = Contest("attention", shape, given, in_documents,
                   {"torch, with a mask": documents_by_mask}, documents_by_mask,
                   11 * heads[0].nbytes, 14 * d * pairs)  # fmt: skip
    return [merge, core]


CONTESTS: dict[str, Callable[[torch.device, bool], list[Contest]]] = {
    "linear_cross_entropy": losses,
    "filtering": filtered_losses,
    "routing": routings,
    "experts": products,
    "adam": optimizers,
    "stream": streams,
    "attention": attentions,
}


# --- the report -----------------------------------------------------------------------------------

COLUMNS = ("kernel", "shape", "by", "instead")
NUMBERS = ("ms", "ms instead", "ratio", "MiB", "MiB instead", "of the ceiling")


def held(
    contest: Contest, ceilings: Ceilings, device: torch.device, rounds: int, table: Table
) -> list[str]:
    """Check and time all ways of a contest; add them to the table; return what is wrong."""
    ways = {"moptrace": contest.ours}
    ways |= {name: way for name, way in contest.others.items() if not isinstance(way, str)}
    truth, failures = results_of(contest.truth, contest, wide=True), list[str]()
    for name, way in ways.items():
        found = results_of(way, contest)
        dtypes = {x.dtype for x in found if x.is_floating_point()} or {torch.float32}
        allowed = max(ALLOWED[dtype] for dtype in dtypes)
        filters = "filtering" in contest.kernel and name != "the same, exact"
        wrong = error(found, truth)
        if not wrong <= (FILTERED if filters else allowed):
            failures.append(f"{contest.kernel}, {contest.shape}: {name} is wrong by {wrong:.1e}")
        del found
    del truth
    if device.type == "cuda":
        torch.cuda.empty_cache()
    most = {name: peak(partial(results_of, way, contest), device) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(partial(results_of, way, contest), device))
    median = {name: statistics.median(of) for name, of in times.items()}
    own = median["moptrace"]
    for name in [name for name in ways if name != "moptrace"]:
        ratio = median[name] / own
        table.add_row(
            contest.kernel, contest.shape, implementation(contest), name,
            f"{own * 1e3:,.2f}", f"{median[name] * 1e3:,.2f}", f"{ratio:.2f}",
            f"{most['moptrace'] / 2**20:,.0f}", f"{most[name] / 2**20:,.0f}",
            f"{ceilings.least(contest) / own:.0%}",
        )  # fmt: skip
        if ratio < contest.limits.get(name, 0):
            failures.append(f"{contest.kernel}, {contest.shape}: {ratio:.2f} of {name}")
    if most["moptrace"] > contest.most_bytes:
        failures.append(f"{contest.kernel}, {contest.shape}: more than its bytes")
    return failures


def implementation(contest: Contest) -> str:
    """What the table of implementations says of these operands."""
    names = [contest.kernel, contest.kernel.partition(",")[0]]
    operator = next((name for name in names if name in TABLE), None)
    if operator is None:
        return ""
    given = [x for x in contest.operands if isinstance(x, Tensor) and x.is_floating_point()]
    return choose(operator, *given[: {"grouped_mm": 2}.get(operator, 4)])


def _time(device: torch.device) -> str:
    if device.type == "cuda":
        return "the GPU's time"
    return "CPU time" if torch.get_num_threads() == 1 else "elapsed time"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=here)
    parser.add_argument("--only", nargs="*", choices=list(CONTESTS), default=list(CONTESTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    device, console = torch.device(given.device), Console(width=180)
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    with console.status("the ceilings"):
        ceilings = Ceilings.of(device)
    table, failures, missing = Table(title="Kernels"), list[str](), dict[str, str]()
    for name in COLUMNS:
        table.add_column(name)
    for name in NUMBERS:
        table.add_column(name, justify="right")
    for name in given.only:
        with console.status(name):
            for contest in CONTESTS[name](device, not given.no_compile):
                failures += held(contest, ceilings, device, given.rounds, table)
                missing |= {k: why for k, why in contest.others.items() if isinstance(why, str)}
                _upstream.cache_clear()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    facts = [
        f"on {gpu or f'the CPU, {torch.get_num_threads()} threads'}; {versions('torch', 'triton')}",
        f"ceilings: {ceilings}",
        f"median of {given.rounds}, of {_time(device)}; forward and backward, where there is one",
        *(f"not run: {name}, {why}" for name, why in missing.items()),
    ]
    publish(console, "kernels", "Kernels", facts, [table], failures)


if __name__ == "__main__":
    main()
