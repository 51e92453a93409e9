"""Train a Mixture-of-Experts on text files, from warm-up to checkpoint, under torchrun.

    torchrun --nproc-per-node 4 examples/train.py --steps 200
    torchrun --nproc-per-node 8 examples/train.py --data "books/*.txt" --ep 4 --cp 2 --save out

A Hugging Face Qwen3-MoE reads bytes of text: of the given files, or of the Python standard library.
Only the lines marked (*) are moptrace. Each step prints loss, gradient norm, learning rate, tokens
a second, MFU, memory of the fullest rank and the load of the busiest expert (1 is even);
TensorBoard gets the same numbers if it is installed. With --save, a second run goes on where the
first one ended, on as many ranks as it likes. NCCL with a GPU for each rank, else gloo.
"""

import argparse
import glob
import math
import os
import resource
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.progress import track
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moptrace


def arguments():
    parser = argparse.ArgumentParser(description="Train a Mixture-of-Experts on text.")
    parser.add_argument("--data", default=f"{sysconfig.get_paths()['stdlib']}/*.py", help="files")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=20, help="steps to the full learning rate")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sequences", type=int, default=16, help="in the global batch of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--ep", type=int, help="ranks that share the experts")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share heads and hidden units")
    parser.add_argument("--cp", type=int, default=1, help="ranks that share each sequence")
    parser.add_argument("--etp", type=int, default=1, help="ranks that share each expert")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, keep float32")
    parser.add_argument("--expert-tokens", type=int, help="tokens that go to experts at once")
    parser.add_argument("--save", help="a folder for checkpoints")
    parser.add_argument("--save-every", type=int, default=1000, help="steps; and after the last")
    return parser.parse_args()


def text(pattern):
    """All files' bytes, as one tensor of ids below 256."""
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise SystemExit(f"no file matches {pattern!r}; give --data a path or a pattern")
    data = b"\n\n".join(Path(name).read_bytes() for name in files)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def batch(data, step, given):
    """The global batch of a step: the same on every rank, and after a restart."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(data) - given.length, (given.sequences,), generator=generator)
    ids = torch.stack([data[s : s + given.length] for s in starts.tolist()]).long()
    return {"input_ids": ids, "labels": ids}


def rate(step, given):
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < given.warmup:
        return (step + 1) / given.warmup
    done = (step - given.warmup) / max(given.steps - given.warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * min(done, 1.0))


def flops_of_a_token(config, model):
    """Forward and backward: 6 for each parameter that a token meets, and attention."""
    whole = {name: p.numel() for name, p in model.named_parameters() if "embed" not in name}
    experts = sum(n for name, n in whole.items() if ".experts." in name)
    part = config.num_experts_per_tok / config.num_experts
    met = sum(whole.values()) - experts * (1 - part)
    attention = config.num_hidden_layers * given.length * given.hidden  # causal: half of 12
    return 6 * met + 6 * attention


def ceiling(device, size=1024, tries=5):
    """The floating-point operations that a matrix product does in a second, here and now."""
    x = torch.randn(size, size, device=device)
    best = math.inf
    for _ in range(tries):
        begin = time.perf_counter()
        float((x @ x)[0, 0])  # waits for the result
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def memory(device):
    """The most bytes that a rank has taken so far, on the rank that took most."""
    own = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    most = torch.tensor(own, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def state():
    """What a checkpoint has: every rank's part of the model and of the optimizer's state."""
    return get_state_dict(model, optimizer)


def resume(folder):
    """Take the values of the newest checkpoint, if there is one; returns the step to go on with."""
    saved = [int(path.parent.name) for path in Path(folder or ".").glob("[0-9]*/.metadata")]
    if not folder or not saved:
        return 0
    weights, moments = state()
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/{max(saved)}")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return max(saved)


def writer(folder):
    """TensorBoard's, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder)


given = arguments()
gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
dist.init_process_group("nccl" if gpus else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if gpus else torch.device("cpu")
if gpus:
    torch.cuda.set_device(device)

config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=given.hidden,
    num_hidden_layers=given.layers,
    num_attention_heads=given.hidden // 32,
    num_key_value_heads=given.hidden // 64,
    intermediate_size=2 * given.hidden,
    moe_intermediate_size=given.hidden // 2,
    num_experts=given.experts,
    num_experts_per_tok=given.top_k,
    max_position_embeddings=given.length,
    use_cache=False,
)
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(config)
flops = flops_of_a_token(config, model)
precision = moptrace.MixedPrecisionPolicy()  # (*)
if given.bf16:
    precision = moptrace.MixedPrecisionPolicy(  # (*)
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, router_dtype=torch.float32
    )
plan = moptrace.Plan(  # (*)
    ep=given.ep,
    etp=given.etp,
    tp=given.tp,
    cp=given.cp,
    expert_tokens=given.expert_tokens,
    count_tokens=True,
    mixed_precision=precision,
)
model = moptrace.parallelize(model, init_device_mesh(device.type, (ranks,)), plan)  # (*)
optimizer = torch.optim.AdamW(
    model.parameters(), lr=torch.tensor(given.lr, device=device), betas=(0.9, 0.95)
)
step_of = moptrace.train_step(model, optimizer, max_norm=1.0, accumulate=given.accumulate)  # (*)

data, best, log = text(given.data), ceiling(device), writer(given.save) if rank == 0 else None
if rank == 0:
    print(model.explain(), flush=True)  # (*)
first = resume(given.save)
numbers = range(first, given.steps)
for number in track(numbers, "training", disable=rank != 0, transient=True):
    for group in optimizer.param_groups:  # a tensor, so that another value is not another program
        group["lr"].fill_(given.lr * rate(number, given))
    begin = time.perf_counter()
    loss = step_of(**model.local_batch(batch(data, number, given)))  # (*)
    loss, norm = float(loss), float(step_of.grad_norm or 0)
    seconds = time.perf_counter() - begin
    speed = given.sequences * given.length / seconds
    counts = model.get_buffer("tokens_per_expert")  # (*)
    row = {
        "loss": loss,
        "gradient norm": norm,
        "learning rate": float(optimizer.param_groups[0]["lr"]),
        "tokens/s": speed,
        "MFU": speed * flops / ranks / best,
        "memory": memory(device) / 2**30,
        "expert load": float((counts.amax(1) / counts.double().mean(1)).max()),
    }
    counts.zero_()
    if rank == 0:
        print(
            f"step {number:>4}  loss {loss:.4f}  norm {norm:.3f}  lr {row['learning rate']:.2e}  "
            f"{speed:,.0f} tokens/s  MFU {row['MFU']:.1%}  {row['memory']:.2f} GiB  "
            f"load {row['expert load']:.2f}",
            flush=True,
        )
    if log is not None:
        for name, value in row.items():
            log.add_scalar(name, value, number)
    done = number + 1
    if given.save and (done % given.save_every == 0 or done == given.steps):
        weights, moments = state()
        folder = f"{given.save}/{done}"
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
dist.destroy_process_group()
