"""Processes under torchrun: who am I, and sums over all. One process needs no set-up and pays nothing."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def init(device: str) -> None:
    """Join the process group that torchrun describes in the environment; without one, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def rank() -> int:
    """Global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_(tensors: list[Tensor]) -> None:
    """Sum each tensor over all processes, in place, in one flat message per dtype."""
    if world_size() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        for t, piece in zip(same, flat.split([t.numel() for t in same])):
            t.copy_(piece.view_as(t))


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()
