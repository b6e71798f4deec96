"""What a runner asks of a GPU beside computing: memory that copies need not wait for, events, graphs."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from benthic.base.errors import InputError

T = TypeVar("T")


def sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Numbers, or rows of them, as a tensor on the device, which need not have done its earlier work for that: a copy
    from ordinary memory would wait."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


class Cuda:
    """One CUDA GPU and the pool of its graphs."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError("backend='fused' needs a CUDA GPU, there is none -> use plain or auto")
        self.pool = torch.cuda.graph_pool_handle()

    def pinned(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies need not wait for."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def event(self) -> torch.cuda.Event:
        """Something that happens when all work up to here is done."""
        event = torch.cuda.Event()
        event.record()
        return event

    def graph(self, step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """`step` run once to compile what it needs, then captured: (graph, what replays refill)."""
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others may wait for the GPU
            out = step()
        return graph, out


class Pinning(Protocol):
    """What `Staging` needs of a GPU."""

    def pinned(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


class Staging:
    """Sends arrays to the device without waiting for it. A copy from ordinary memory would wait for all steps before;
    these wait in pinned memory, each in one of `count` buffers: so many may be under way."""

    def __init__(self, gpu: Pinning, device: torch.device, count: int):
        self.gpu, self.device = gpu, device
        self.buffers = [torch.empty(0, dtype=torch.int64)] * count

    def send(self, array: np.ndarray, into: Tensor | None = None) -> Tensor:
        """An int64 array, in `into` or a tensor of its own."""
        oldest, *others = self.buffers
        if oldest.numel() < array.size:
            oldest = self.gpu.pinned((1 << max(14, (array.size - 1).bit_length()),), torch.int64)
        self.buffers = [*others, oldest]
        staged = oldest[: array.size].view(array.shape)
        staged.copy_(torch.from_numpy(array))
        if into is None:
            into = torch.empty(array.shape, dtype=torch.int64, device=self.device)
        return into.copy_(staged, non_blocking=True)
