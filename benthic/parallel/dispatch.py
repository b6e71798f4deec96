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
    offs  [E] int32 cumulative end of each expert's rows
    order [N*K]     row i of `x` came from flat choice `order[i]` = token * K + k
    back  [N*K]     inverse of `order`: flat choice j is row `back[j]` of `x`
    """

    x: Tensor
    offs: Tensor
    order: Tensor
    back: Tensor


class Dispatcher(Protocol):
    """Scatter tokens to experts, gather expert outputs back to tokens."""

    def dispatch(self, x: Tensor, topk_ids: Tensor, n_experts: int) -> Routed: ...

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

    def dispatch(self, x: Tensor, topk_ids: Tensor, n_experts: int) -> Routed:
        """x [N, d], topk_ids [N, K] -> Routed. Exact-size buffers: no row is ever uninitialised."""
        k = topk_ids.shape[1]
        flat = topk_ids.reshape(-1)  # [N*K]
        order = flat.argsort(stable=True)  # [N*K]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        offs = torch.bincount(flat, minlength=n_experts).cumsum(0).to(torch.int32)  # [E]
        return Routed(_Gather.apply(x, order // k, back, k), offs, order, back)  # type: ignore[arg-type]

    def combine(self, y: Tensor, routed: Routed, weights: Tensor) -> Tensor:
        """y [N*K, d] expert outputs, weights [N, K] -> weighted sum per token [N, d]."""
        n, k = weights.shape
        y = _Gather.apply(y, routed.back, routed.order, 1)  # type: ignore[assignment]
        return torch.einsum("nkd,nk->nd", y.unflatten(0, (n, k)), weights.to(y.dtype))
