"""One process or many. Under torchrun every process runs the whole program on its share of the images.

    torchrun --nproc-per-node 4 -- train.py --data chaoyang/ --rank 4 --tokens 4

RANK and WORLD are torchrun's; alone they are 0 and 1, and every function here does nothing. All processes must see the same
folders: the first one writes what a run has once, and each of them the images and cache shards that it makes.
"""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RANK0 = RANK == 0
PATIENCE = timedelta(hours=2)       # with the slowest: the first process prepares alone


def join(device):
    """Join the others; of all but the first process nothing is printed but failures."""
    if WORLD > 1:
        if not RANK0:
            sys.stdout = null_stream()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, device_id=device if cuda else None)


def null_stream():
    """A stream for what nobody reads, whatever is written to it."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


def barrier():
    """Until every process is here."""
    if WORLD > 1:
        dist.barrier()


@contextmanager
def rank0_first():
    """The first process runs the block; then the others do, and find done what is done once."""
    if not RANK0:
        barrier()
    yield
    if RANK0:
        barrier()


def broadcast(value):
    """What the first process has found, in every process."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


def shard(items):
    """The share of this process: every WORLD-th item."""
    return items[RANK::WORLD]


def all_gather(rows):
    """The rows that each process has of its share of a list -> the rows of all of it, in order, in every process."""
    if WORLD == 1:
        return rows
    parts = [None] * WORLD
    dist.all_gather_object(parts, rows)
    return [parts[i % WORLD][i // WORLD] for i in range(sum(map(len, parts)))]


@torch.no_grad()
def all_reduce(tensors):
    """Sum each tensor over the processes, in place: one message for all of them."""
    if WORLD > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def all_max(number, device):
    """The largest of the whole numbers that the processes have."""
    if WORLD > 1:
        number = torch.tensor(number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)
