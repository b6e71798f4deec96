"""What a runner asks of a GPU beside computing: memory that copies need not wait for, events, graphs."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from benthic.base.errors import InputError

T = TypeVar("T")


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
