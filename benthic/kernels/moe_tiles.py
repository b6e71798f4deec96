"""Experts for more tokens: two products over tiles of pairs, in the order of moe_order.

The weights of a touched expert are read once per tile of its pairs; tiles of one expert are neighbours in the grid, so
that all but the first read them from L2. The shared experts are one network that every token goes through: their tiles
are taller, in the same launch and first, because every tile reads their weights again. What bounds beside the bytes is
how much L2 can give: tall tiles ask it for less. And several programs per multiprocessor, so that one's beginning and
end lie under the others' loads: three of 72 KB where an expert has many pairs.

Bytes: the touched experts' weights, plus activations; memory-bound until about 1,300 tokens of V2-Lite, from there
bound by 6 d I (K + S) operations per token. Every sum runs in an order fixed by the block sizes, so that results repeat
bit for bit; a token's result depends on other tokens only through the choice of block sizes. FP8 weights have a way of
their own, moe_fp8. Letters as in moe_weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.moe_order import ByExpert
from benthic.kernels.moe_weights import ExpertWeights, swiglu


@triton.jit
def _gate_and_up(
    rows, live, gate, up, i, width, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rows [M, 1] pointers to tokens, i [N] rows of both matrices -> silu(gate x) * up x [M, N]."""
    gate_sum, up_sum = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        x = tl.load(rows + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        at, mask = i[:, None] * D + d[None, :], (i < width)[:, None] & (d < D)[None, :]
        gates, ups = tl.load(gate + at, mask=mask, other=0.0), tl.load(up + at, mask=mask, other=0.0)
        gate_sum = tl.dot(x, tl.trans(gates), gate_sum, input_precision="ieee")
        up_sum = tl.dot(x, tl.trans(ups), up_sum, input_precision="ieee")
    return swiglu(gate_sum, up_sum, gate.dtype.element_ty)


@triton.jit
def _up(
    x, order, tiles, n_tiles, h, gate_up, shared_gate, shared_up, n_tokens, stride_x,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SHARED_M: tl.constexpr, SHARED_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program, heights = tl.program_id(0), tl.cdiv(n_tokens, SHARED_M)
    shared = heights * tl.cdiv(S * I, SHARED_N)
    if program < shared:
        token = (program % heights * SHARED_M + tl.arange(0, SHARED_M)).to(tl.int64)
        live, i = token < n_tokens, program // heights * SHARED_N + tl.arange(0, SHARED_N)
        rows = x + token[:, None] * stride_x
        value = _gate_and_up(rows, live, shared_gate, shared_up, i, S * I, D, SHARED_M, SHARED_N, BLOCK_K)
        at = h + (token[:, None] * (K + S) + K) * I + i[None, :]
        tl.store(at, value, mask=live[:, None] & (i < S * I)[None, :])
    else:
        columns: tl.constexpr = (I + N - 1) // N
        tile = (program - shared) // columns
        if tile < tl.load(n_tiles):
            expert, first, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
            place = first + tl.arange(0, M)
            live, i = place < end, (program - shared) % columns * N + tl.arange(0, N)
            pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
            gate, rows = gate_up + expert.to(tl.int64) * (2 * I * D), x + (pair // K)[:, None] * stride_x
            value = _gate_and_up(rows, live, gate, gate + I * D, i, I, D, M, N, BLOCK_K)
            at = h + (pair // K * (K + S) + pair % K)[:, None] * I + i[None, :]
            tl.store(at, value, mask=live[:, None] & (i < I)[None, :])


@triton.jit
def _product(
    rows, live, matrix, d, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rows [M, 1] pointers, d [N] rows of the matrix [D, WIDTH] -> their products [M, N]."""
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        h = tl.load(rows + i[None, :], mask=live[:, None] & (i < WIDTH)[None, :], other=0.0)
        mask = (d < D)[:, None] & (i < WIDTH)[None, :]
        w = tl.load(matrix + d[:, None] * WIDTH + i[None, :], mask=mask, other=0.0)
        total = tl.dot(h, tl.trans(w), total, input_precision="ieee")
    return total.to(matrix.dtype.element_ty)


@triton.jit
def _down(
    h, order, tiles, n_tiles, y, down, shared_down, n_tokens,
    D: tl.constexpr, I: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SHARED_M: tl.constexpr, SHARED_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program, heights = tl.program_id(0), tl.cdiv(n_tokens, SHARED_M)
    shared = heights * tl.cdiv(D, SHARED_N) * (SLOTS - K)
    if program < shared:
        token = (program % heights * SHARED_M + tl.arange(0, SHARED_M)).to(tl.int64)
        live, d = token < n_tokens, program // heights * SHARED_N + tl.arange(0, SHARED_N)
        rows = h + (token[:, None] * (K + S) + K) * I
        value = _product(rows, live, shared_down, d, D, S * I, SHARED_M, SHARED_N, BLOCK_K)
        at = y + (token[:, None] * SLOTS + K) * D + d[None, :]
        tl.store(at, value, mask=live[:, None] & (d < D)[None, :])
    else:
        columns: tl.constexpr = (D + N - 1) // N
        tile = (program - shared) // columns
        if tile < tl.load(n_tiles):
            expert, first, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
            place = first + tl.arange(0, M)
            live, d = place < end, (program - shared) % columns * N + tl.arange(0, N)
            pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
            rows = h + (pair // K * (K + S) + pair % K)[:, None] * I
            value = _product(rows, live, down + expert.to(tl.int64) * (D * I), d, D, I, M, N, BLOCK_K)
            at = y + (pair // K * SLOTS + pair % K)[:, None] * D + d[None, :]
            tl.store(at, value, mask=live[:, None] & (d < D)[None, :])


@dataclass(frozen=True, kw_only=True)
class Tiles(ByExpert):
    """Block sizes: pairs, output columns, summed columns; tokens and columns of the shared experts. The defaults are
    for few pairs per expert: large tiles of weights, three on their way (60 KB), for each of three programs per
    multiprocessor. Not for FP8."""

    up_n: int = 32  # columns of gate and of up
    up_k: int = 128
    down_n: int = 64
    down_k: int = 128
    shared_m: int = 16
    shared_up_n: int = 32
    shared_down_n: int = 64
    num_warps: int = 4
    num_stages: int = 4

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> Tensor:
        """As `Rows.outputs`."""
        (n, k), (e, d, i), s = topk_ids.shape, weights.down_proj.shape, weights.n_shared
        if weights.fp8:
            raise ValueError("FP8 weights have tiles of their own -> use Fp8Tiles")
        slots, heights = k + (s > 0), triton.cdiv(n, self.shared_m)
        h = torch.empty(n, k + s, i, dtype=x.dtype, device=x.device)
        y = torch.empty(n, slots, d, dtype=x.dtype, device=x.device)
        order, tiles, n_tiles = self.align(topk_ids, e, 0)
        gate_up, shared_gate, shared_up = weights.up_arguments()[:3]
        down, shared_down = weights.down_arguments()[:2]
        programs = heights * triton.cdiv(s * i, self.shared_up_n) + len(tiles) * triton.cdiv(i, self.up_n)
        _up[(programs,)](
            x, order, tiles, n_tiles, h, gate_up, shared_gate, shared_up, n, x.stride(0),
            D=d, I=i, K=k, S=s, M=self.block_m, N=self.up_n, SHARED_M=self.shared_m, SHARED_N=self.shared_up_n,
            BLOCK_K=self.up_k, num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore
        )  # fmt: skip
        programs = heights * triton.cdiv(d, self.shared_down_n) * (s > 0) + len(tiles) * triton.cdiv(d, self.down_n)
        _down[(programs,)](
            h, order, tiles, n_tiles, y, down, shared_down, n,
            D=d, I=i, K=k, S=s, SLOTS=slots, M=self.block_m, N=self.down_n, SHARED_M=self.shared_m,
            SHARED_N=self.shared_down_n, BLOCK_K=self.down_k,
            num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return y
