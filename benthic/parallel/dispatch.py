"""Moving tokens to their experts and back. The mixture of experts gets a Dispatcher and never asks where experts live.

Letters: N tokens, K experts per token, E routed experts, d hidden size.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass
class Routed:
    """Token copies sorted by expert.

    x     [N*K, d]  one row per (token, chosen expert), grouped by expert
    offs  [E] int32 cumulative end of each expert's rows; dropped copies lie after the last
    order [N*K]     row i of `x` came from flat choice `order[i]` = token * K + k
    back  [N*K]     inverse of `order`: flat choice j is row `back[j]` of `x`
    live  [N*K, 1]  rows that some expert computes, None where that is all of them
    """

    x: Tensor
    offs: Tensor
    order: Tensor
    back: Tensor
    live: Tensor | None = None


class Dispatcher(Protocol):
    """Scatter tokens to experts, gather expert outputs back to tokens."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, n_experts: int, kept: Tensor | None = None) -> Routed: ...

    def combine(self, y: Tensor, routed: Routed, weights: Tensor) -> Tensor: ...


class _Gather(torch.autograd.Function):
    """x[index], where every row of x is taken `copies` times and `inverse` says where.

    Backward is a gather and a sum over copies. Plain indexing would scatter with atomics: slower, and on a GPU not
    repeatable.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[index]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (inverse,) = upstream, ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class LocalDispatcher:
    """All experts on this device: a stable sort there, a gather-reduce back. Runs repeat bit for bit."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, n_experts: int, kept: Tensor | None = None) -> Routed:
        """x [N, d], topk_ids [N, K], kept [N, K] or None for all -> Routed. No host waits for a count."""
        k = topk_ids.shape[1]
        flat = (topk_ids if kept is None else topk_ids.masked_fill(~kept, n_experts)).reshape(-1)  # [N*K]
        order = flat.argsort(stable=True)  # [N*K]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        offs = torch.bincount(flat, minlength=n_experts)[:n_experts].cumsum(0).to(torch.int32)  # [E]
        rows: Tensor = _Gather.apply(x, order // k, back, k)  # type: ignore[assignment]
        if kept is None:
            return Routed(rows, offs, order, back)
        live = (torch.arange(len(order), device=x.device) < offs[-1]).unsqueeze(1)
        return Routed(rows.where(live, 0), offs, order, back, live)  # what no expert reads gets no gradient either

    def combine(self, y: Tensor, routed: Routed, weights: Tensor) -> Tensor:
        """y [N*K, d] expert outputs, weights [N, K] -> weighted sum per token [N, d]."""
        n, k = weights.shape
        if routed.live is not None:  # grouped products leave the other rows uninitialised
            y = y.where(routed.live, 0)
        y = _Gather.apply(y, routed.back, routed.order, 1)  # type: ignore[assignment]
        return torch.einsum("nkd,nk->nd", y.unflatten(0, (n, k)), weights.to(y.dtype))
