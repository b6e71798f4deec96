"""Experts for very few tokens: every product is a matrix times one vector, nothing is sorted.

A program takes one (token, expert) pair and a few rows of that expert's matrices, has all their loads in flight at
once, multiplies in float32 and sums each row. Tokens are neighbours in the grid, so that the shared experts, which all
of them read, come from L2 after the first. Bytes: three matrices per pair; memory-bound, V2-Lite at one token 138 MB
per layer in bfloat16, 32 us at 4.28 TB/s.

A token's result does not depend on the others. Pairs whose expert is -1 are left out. Letters as in moe_weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.moe_weights import ExpertWeights, down_matrix, swiglu, up_matrices


@triton.jit
def _sums(product, scale, row, first, grid, R: tl.constexpr, C: tl.constexpr, FP8: tl.constexpr):
    """product [R, C] of columns from `first` on -> its rows' sums [R], each block of 128 columns times its factor."""
    if FP8:
        parts = tl.sum(tl.reshape(product, [R, C // 128, 128]), 2)
        column = first // 128 + tl.arange(0, C // 128)
        at = (row // 128)[:, None] * grid + column[None, :]
        result = tl.sum(parts * tl.load(scale + at, mask=(column < grid)[None, :], other=0.0), 1)
    else:
        result = tl.sum(product, 1)
    return result


@triton.jit
def _up(
    x, topk_ids, h, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, stride_x,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(topk_ids + token * K + tl.minimum(slot, K - 1))
    if (slot < K) & (chosen < 0):
        return
    gate, up, gate_scale, up_scale, first_row = up_matrices(
        tl.where(slot < K, chosen, E + slot - K), gate_up, shared_gate, shared_up, scale, shared_gate_scale,
        shared_up_scale, D, I, E,
    )  # fmt: skip
    row = tl.where(i < I, first_row + i, first_row)
    gate_sum, up_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        d = start + tl.arange(0, CHUNK)
        at, mask = i[:, None] * D + d[None, :], (i < I)[:, None] & (d < D)[None, :]
        gates = tl.load(gate + at, mask=mask, other=0.0)
        ups = tl.load(up + at, mask=mask, other=0.0)
        token_row = tl.load(x + token * stride_x + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        product = gates.to(tl.float32) * token_row
        gate_sum += _sums(product, gate_scale, row, start, tl.cdiv(D, 128), BLOCK, CHUNK, FP8)
        product = ups.to(tl.float32) * token_row
        up_sum += _sums(product, up_scale, row, start, tl.cdiv(D, 128), BLOCK, CHUNK, FP8)
    value = swiglu(gate_sum, up_sum, h.dtype.element_ty)
    tl.store(h + (token * (K + S) + slot) * I + i, value, mask=i < I)


@triton.jit
def _down(
    h, topk_ids, y, down, shared_down, scale, shared_scale,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = SLOTS - 1 - tl.program_id(1)  # the shared experts, S times as wide, first
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(topk_ids + token * K + tl.minimum(slot, K - 1))
    if (slot < K) & (chosen < 0):
        return
    matrix, factors, width, grid = down_matrix(
        tl.where(slot < K, chosen, E), down, shared_down, scale, shared_scale, D, I, E, S
    )
    row = tl.where(d < D, d, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, width, CHUNK, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        i = start + tl.arange(0, CHUNK)
        mask = (d < D)[:, None] & (i < width)[None, :]
        w = tl.load(matrix + d[:, None] * width + i[None, :], mask=mask, other=0.0)
        pair = tl.load(h + (token * (K + S) + slot) * I + i, mask=i < width, other=0.0).to(tl.float32)
        total += _sums(w.to(tl.float32) * pair[None, :], factors, row, start, grid, BLOCK, CHUNK, FP8)
    tl.store(y + (token * SLOTS + slot) * D + d, total.to(y.dtype.element_ty), mask=d < D)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Block sizes. A whole row per step leaves no loop to wait in, and small programs, several waves of them, keep
    over 100 KB of loads in flight on every multiprocessor. Chunks of FP8 weights must be multiples of 128."""

    up_block: int = 4  # rows of gate and of up
    up_chunk: int = 1024
    up_stages: int = 1
    down_block: int = 2
    down_chunk: int = 2048
    down_stages: int = 1
    num_warps: int = 4

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> Tensor:
        """Unweighted outputs [N, K + 1, d] of each token's experts, the shared ones together in the last place; without
        shared ones [N, K, d]."""
        (n, k), (e, d, i), s = topk_ids.shape, weights.down_proj.shape, weights.n_shared
        slots = k + (s > 0)
        h = torch.empty(n, k + s, i, dtype=x.dtype, device=x.device)
        y = torch.empty(n, slots, d, dtype=x.dtype, device=x.device)
        _up[n, k + s, triton.cdiv(i, self.up_block)](
            x, topk_ids, h, *weights.up_arguments(), x.stride(0),  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, FP8=weights.fp8, BLOCK=self.up_block, CHUNK=self.up_chunk, STAGES=self.up_stages,
            num_warps=self.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        _down[n, slots, triton.cdiv(d, self.down_block)](
            h, topk_ids, y, *weights.down_arguments(), D=d, I=i, E=e, K=k, S=s, FP8=weights.fp8, SLOTS=slots,
            BLOCK=self.down_block, CHUNK=self.down_chunk, STAGES=self.down_stages,
            num_warps=self.num_warps,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return y
