"""Train a Hugging Face Mixtral under torchrun, save a distributed checkpoint, and go on from it.

    torchrun --nproc-per-node 2 examples/4_torchrun_hugging_face.py

With one GPU for each rank it runs on NCCL, else on gloo. Only the lines marked (*) are moptrace.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig, MixtralForCausalLM

import moptrace

CONFIG = MixtralConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    output_router_logits=True,  # the load-balancing loss, over the global batch
    use_cache=False,
)


def make():
    """The model on all ranks, and its optimizer."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    model = moptrace.parallelize(MixtralForCausalLM(CONFIG), mesh)  # (*)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(16, (8, 16), generator=generator)
        local = model.local_batch({"input_ids": ids, "labels": ids})  # (*)
        loss = model(**local).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(f"step {step}  loss {loss:.6f}")


def say(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


GPUS = torch.cuda.is_available() and torch.cuda.device_count() >= 2
DEVICE = "cuda" if GPUS else "cpu"
dist.init_process_group("nccl" if GPUS else "gloo")
if GPUS:
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
torch.manual_seed(0)

model, optimizer = make()
say(model.explain())  # (*)
train(model, optimizer, range(3))

# Parameters are DTensors, so torch's distributed checkpoint saves and loads them as they are: each
# rank writes its own part, and a job with another number of ranks can read them.
folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
dist.broadcast_object_list(folders)
dcp.save(
    {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folders[0]
)
say("saved")
train(model, optimizer, range(3, 5))

torch.manual_seed(1)  # other initial values: what follows comes from the checkpoint
model, optimizer = make()
train(model, optimizer, [0])  # a step, so that the optimizer has a state to load into
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
dcp.load(state, checkpoint_id=folders[0])
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
say("loaded")
train(model, optimizer, range(3, 5))
dist.destroy_process_group()
