"""Experts for thousands of tokens: copies of the tokens sorted by expert, grouped products of the library, and one
kernel in between for silu(gate) * up.

Bound by operations: 6 d I per token and expert. The sort, the gather of the copies and the activation move a few
hundred megabytes beside them. The offsets stay on the device. Letters as in moe_weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain
from benthic.kernels.moe_weights import ExpertWeights, swiglu


@triton.jit
def _swiglu(gate_up, out, stride, I: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    chain.begin(CHAINED)
    chain.wait(CHAINED)
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = i < I, gate_up + row * stride + i
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + I, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * I + i, swiglu(gate, up, out.dtype.element_ty), mask=inside)


def silu_times_up(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2I], gate before up -> silu(gate) * up [N, I]."""
    n, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, width, dtype=gate_up.dtype, device=gate_up.device)
    if n:
        block = min(triton.next_power_of_2(width), 1024)
        grid = (n, triton.cdiv(width, block))
        _swiglu[grid](gate_up, out, gate_up.stride(0), I=width, BLOCK=block, **chain.options(gate_up))  # pyright: ignore
    return out


def _both(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """x [N, d], gate and up [I, d] -> [N, 2I]; one product where up lies behind gate in the same storage."""
    same = up.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr()
    if same and up.data_ptr() == gate.data_ptr() + gate.nbytes:
        return F.linear(x, gate.as_strided((2 * len(gate), gate.shape[1]), (gate.shape[1], 1)))
    return torch.cat((F.linear(x, gate), F.linear(x, up)), 1)


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Nothing to choose: the library chooses its own tiles. BF16 or wider, not FP8."""

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(outputs [N K, d] by expert, in which of its rows each token's slots lie [N, K], shared outputs [N, d])."""
        w, (n, k), e = weights, topk_ids.shape, len(weights.down_proj)
        if w.fp8:
            raise ValueError("FP8 weights have no grouped product in the library -> use tiles")
        flat = topk_ids.reshape(-1)
        by_expert, order = torch.where(flat < 0, e, flat).sort(stable=True)  # -1 goes last, behind every offset
        offs = torch.searchsorted(by_expert, torch.arange(e, device=x.device, dtype=torch.int32), right=True).int()
        gate_up = F.grouped_mm(x[order // k], w.gate_up_proj.transpose(1, 2), offs=offs)
        y = F.grouped_mm(silu_times_up(gate_up), w.down_proj.transpose(1, 2), offs=offs)
        back = torch.empty_like(order)
        back[order] = torch.arange(n * k, device=x.device)
        shared = None
        if w.shared_gate_proj is not None and w.shared_up_proj is not None and w.shared_down_proj is not None:
            shared = F.linear(silu_times_up(_both(x, w.shared_gate_proj, w.shared_up_proj)), w.shared_down_proj)
        return y, back.view(n, k), shared
