"""Moving tokens to their experts and back. The mixture of experts gets a Dispatcher and never asks where experts live.

Letters: N tokens, K experts per token, E routed experts, d hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Routed:
    """Token copies sorted by expert.

    x     [N*K, d]  one row per (token, chosen expert), grouped by expert
    offs  [E] int32 cumulative end of each expert's rows
    order [N*K]     row i of `x` came from flat choice `order[i]` = token * K + k
    """

    x: Tensor
    offs: Tensor
    order: Tensor


class Dispatcher(Protocol):
    """Scatter tokens to experts, gather expert outputs back to tokens."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, n_experts: int) -> Routed: ...

    def combine(self, y: Tensor, routed: Routed, weights: Tensor) -> Tensor: ...


class LocalDispatcher:
    """All experts on this device: a stable sort there, a gather-reduce back. No atomics, so runs repeat bit for bit."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, n_experts: int) -> Routed:
        """x [N, d], topk_ids [N, K] -> Routed. Exact-size buffers: no row is ever uninitialised."""
        n, k = topk_ids.shape
        flat = topk_ids.reshape(-1)  # [N*K]
        order = flat.argsort(stable=True)  # [N*K]
        offs = torch.bincount(flat, minlength=n_experts).cumsum(0).to(torch.int32)  # [E]
        copies = x.unsqueeze(1).expand(n, k, -1).reshape(n * k, -1)  # [N*K, d]
        return Routed(copies[order], offs, order)

    def combine(self, y: Tensor, routed: Routed, weights: Tensor) -> Tensor:
        """y [N*K, d] expert outputs, weights [N, K] -> weighted sum per token [N, d]."""
        n, k = weights.shape
        back = torch.empty_like(routed.order)
        back[routed.order] = torch.arange(n * k, device=y.device)
        return torch.einsum("nkd,nk->nd", y[back].view(n, k, -1), weights.to(y.dtype))
