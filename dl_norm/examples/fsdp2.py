"""FSDP2 over several processes: weights over the whole rollout, parameters and gradients sharded.

    torchrun --standalone --nproc-per-node 2 dl_norm/examples/fsdp2.py

runs on CPUs or GPUs. The gradient is that of one process with the whole batch.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dl_norm

VOCABULARY, HIDDEN, MAX_LENGTH, ROWS = 16, 8, 12, 4  # sequences of each process


def make_model():
    torch.manual_seed(0)
    layers = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY), nn.LogSoftmax(-1)
    return nn.Sequential(*layers)


def log_probs_of(model, tokens):
    return model(tokens[:, :-1]).gather(-1, tokens[:, 1:, None])[..., 0]


def main():
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    dist.init_process_group("nccl" if device != "cpu" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)  # one rollout, of which each process takes its rows
    tokens = torch.randint(VOCABULARY, (ROWS * ranks, MAX_LENGTH + 1))
    lengths = torch.randint(1, MAX_LENGTH + 1, (ROWS * ranks,))
    whole = tokens, torch.arange(MAX_LENGTH) < lengths[:, None], lengths % 2 - 0.5
    tokens, mask, advantages = (tensor[rank * ROWS : (rank + 1) * ROWS] for tensor in whole)

    model = make_model()
    fully_shard(model, mesh=dist.init_device_mesh(device.split(":")[0], (ranks,)))
    # Normalised over all sequences. FSDP2 averages gradients where the loss needs their sum.
    weights = dl_norm.sequence_weights(mask.sum(-1), max_length=MAX_LENGTH, group=dist.group.WORLD)
    weights = weights * dl_norm.gradient_scale(num_processes=ranks)
    dl_norm.policy_loss(log_probs_of(model, tokens), None, advantages, mask, weights).backward()

    alone, (tokens, mask, advantages) = make_model(), whole
    weights = dl_norm.sequence_weights(mask.sum(-1), max_length=MAX_LENGTH, group="local")
    dl_norm.policy_loss(log_probs_of(alone, tokens), None, advantages, mask, weights).backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    off = max((mine.grad.full_tensor() - one.grad).abs().max().item() for mine, one in pairs)
    if rank == 0:
        print(f"{ranks} processes; largest difference from the gradient of one: {off:.1e}")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
