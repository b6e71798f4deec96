"""Experts for more tokens: two products over tiles of pairs, in the order of moe_order.

Each touched expert's weights are read once per tile of its pairs, and tiles of one expert are neighbours in the grid,
so that all but the first read them from L2. Bytes: the touched experts' weights, plus activations; memory-bound until
about 1,300 tokens of V2-Lite, from there bound by 6 d I (K + S) operations per token.

Every sum runs in an order fixed by the block sizes, so that results repeat bit for bit; a token's result depends on
other tokens only through the choice of block sizes. FP8 weights have a way of their own, moe_fp8. Letters as in
moe_weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.moe_order import ByExpert
from benthic.kernels.moe_weights import ExpertWeights, down_matrix, swiglu, up_matrices


@triton.jit
def _up(
    x, order, tiles, n_tiles, h, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, stride_x,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    if tile >= tl.load(n_tiles):
        return
    expert, first, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    place = first + tl.arange(0, BLOCK_M)
    live = place < end
    pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
    gate, up, _, _, _ = up_matrices(
        expert, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, D, I, E
    )
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = x + (pair // (K + S))[:, None] * stride_x
    gate_sum, up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        rows = tl.load(token + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        at, mask = i[:, None] * D + d[None, :], (i < I)[:, None] & (d < D)[None, :]
        gates, ups = tl.load(gate + at, mask=mask, other=0.0), tl.load(up + at, mask=mask, other=0.0)
        gate_sum = tl.dot(rows, tl.trans(gates), gate_sum, input_precision="ieee")
        up_sum = tl.dot(rows, tl.trans(ups), up_sum, input_precision="ieee")
    value = swiglu(gate_sum, up_sum, h.dtype.element_ty)
    tl.store(h + pair[:, None] * I + i[None, :], value, mask=live[:, None] & (i < I)[None, :])


@triton.jit
def _down(
    h, order, tiles, n_tiles, y, down, shared_down, scale, shared_scale, n_tokens,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    blocks = tl.cdiv(n_tokens, BLOCK_M)
    tile = tl.where(tile < blocks * (SLOTS - K), tile, tile + blocks * (S + K - SLOTS))  # shared ones go as one
    if tile >= tl.load(n_tiles):
        return
    expert, first, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    place = first + tl.arange(0, BLOCK_M)
    live = place < end
    pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
    matrix, _, width, _ = down_matrix(expert, down, shared_down, scale, shared_scale, D, I, E, S)
    d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        rows = tl.load(h + pair[:, None] * I + i[None, :], mask=live[:, None] & (i < width)[None, :], other=0.0)
        at, mask = d[:, None] * width + i[None, :], (d < D)[:, None] & (i < width)[None, :]
        w = tl.load(matrix + at, mask=mask, other=0.0)
        total = tl.dot(rows, tl.trans(w), total, input_precision="ieee")
    row = pair // (K + S) * SLOTS + pair % (K + S)
    value = total.to(y.dtype.element_ty)
    tl.store(y + row[:, None] * D + d[None, :], value, mask=live[:, None] & (d < D)[None, :])


@dataclass(frozen=True, kw_only=True)
class Tiles(ByExpert):
    """Block sizes: pairs, output columns, summed columns. The defaults are for few pairs per expert: large tiles of
    weights, three on their way (60 KB), for each of three programs per multiprocessor. Not for FP8."""

    up_n: int = 32  # columns of gate and of up
    up_k: int = 128
    down_n: int = 64
    down_k: int = 128
    num_warps: int = 4
    num_stages: int = 4

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> Tensor:
        """As `Rows.outputs`."""
        (n, k), (e, d, i), s = topk_ids.shape, weights.down_proj.shape, weights.n_shared
        if weights.fp8:
            raise ValueError("FP8 weights have tiles of their own -> use Fp8Tiles")
        slots = k + (s > 0)
        h = torch.empty(n, k + s, i, dtype=x.dtype, device=x.device)
        y = torch.empty(n, slots, d, dtype=x.dtype, device=x.device)
        order, tiles, n_tiles = self.align(topk_ids, e, s)
        _up[triton.cdiv(i, self.up_n), len(tiles)](
            x, order, tiles, n_tiles, h, *weights.up_arguments(), x.stride(0),  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, BLOCK_M=self.block_m, BLOCK_N=self.up_n, BLOCK_K=self.up_k,
            num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        rest = triton.cdiv(n, self.block_m) * (s + k - slots)  # tiles of shared experts beyond the first
        _down[triton.cdiv(d, self.down_n), len(tiles) - rest](
            h, order, tiles, n_tiles, y, *weights.down_arguments(), n,  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, SLOTS=slots, BLOCK_M=self.block_m, BLOCK_N=self.down_n, BLOCK_K=self.down_k,
            num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return y
