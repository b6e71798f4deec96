"""Experts for more tokens: (token, expert) pairs in order of their experts, cut into tiles of BLOCK_M pairs.

First the order, one program per expert: each counts all experts' pairs, finds its own place, and writes its pairs
there, tokens ascending, and its tiles. Then two products. Each touched expert's weights are read once per tile of its
pairs, and tiles of one expert are neighbours in the grid, so that all but the first read them from L2. The number of
tiles is known on the device only: grids have room for the most there can be and programs beyond the last tile leave at
once. Bytes: the touched experts' weights, plus activations; memory-bound until about 1,300 tokens of V2-Lite, from
there bound by 6 d I (K + S) operations per token.

Every sum runs in an order fixed by the block sizes, so that results repeat bit for bit; a token's result depends on
other tokens only through the choice of block sizes. FP8 weights become bfloat16 in registers, exactly; their factors
multiply partial sums, one block of 128 columns at a time. Letters as in moe_weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.moe_weights import ExpertWeights, down_matrix, swiglu, up_matrices


@triton.jit
def _write_tiles(tiles, expert, first_tile, first_pair, pairs, BLOCK_M: tl.constexpr):
    """tiles [T, 3]: of each tile its expert and its first and end place in the order."""
    for start in range(0, tl.cdiv(pairs, BLOCK_M), 128):
        t = start + tl.arange(0, 128)
        mask, at = t * BLOCK_M < pairs, tiles + (first_tile + t) * 3
        tl.store(at, expert + t * 0, mask=mask)
        tl.store(at + 1, first_pair + t * BLOCK_M, mask=mask)
        tl.store(at + 2, first_pair + t * 0 + pairs, mask=mask)


@triton.jit
def _align(
    topk_ids, order, tiles, n_tiles, n_tokens, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """order: rows token * (K + S) + slot of h, the shared experts' pairs after the routed ones; their tiles first."""
    expert, routed, blocks = tl.program_id(0), n_tokens * K, tl.cdiv(n_tokens, BLOCK_M)
    if expert >= E:
        first = routed + (expert - E) * n_tokens
        for start in range(0, n_tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tl.store(order + first + token, token * (K + S) + K + expert - E, mask=token < n_tokens)
        _write_tiles(tiles, expert, (expert - E) * blocks, first, n_tokens, BLOCK_M)
    else:
        bins, counts = tl.arange(0, BINS), tl.zeros([BINS], tl.int32)
        for start in range(0, routed, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            ids = tl.load(topk_ids + pair, mask=pair < routed, other=0)
            counts += tl.histogram(ids, BINS, mask=pair < routed)
        mine = tl.sum(tl.where(bins == expert, counts, 0))
        first = tl.sum(tl.where(bins < expert, counts, 0))
        first_tile = S * blocks + tl.sum(tl.where(bins < expert, tl.cdiv(counts, BLOCK_M), 0))
        _write_tiles(tiles, expert, first_tile, first, mine, BLOCK_M)
        if expert == E - 1:
            tl.store(n_tiles, first_tile + tl.cdiv(mine, BLOCK_M))
        for start in range(0, routed, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            hit = (pair < routed) & (tl.load(topk_ids + pair, mask=pair < routed, other=0) == expert)
            rank = tl.cumsum(hit.to(tl.int32), 0)
            tl.store(order + first + rank - 1, pair // K * (K + S) + pair % K, mask=hit)
            first += tl.sum(hit.to(tl.int32))


@triton.jit
def _factors(scale, at, FP8: tl.constexpr):
    """Of one block of columns, each output column's factor. Asked for early: it is on its way while the tensor cores
    still work on the tiles before."""
    return tl.load(scale + at) if FP8 else 1.0


@triton.jit
def _add_product(total, rows, w, factor, FP8: tl.constexpr):
    """total [M, N] + rows [M, K] times w [N, K] transposed, each column of the product times its factor."""
    w = tl.trans(w.to(rows.dtype))
    if FP8:
        total += tl.dot(rows, w, input_precision="ieee") * factor[None, :]
    else:
        total = tl.dot(rows, w, total, input_precision="ieee")
    return total


@triton.jit
def _up(
    x, order, tiles, n_tiles, h, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, stride_x,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    if tile >= tl.load(n_tiles):
        return
    expert, first, end = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    place = first + tl.arange(0, BLOCK_M)
    live = place < end
    pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
    gate, up, gate_scale, up_scale, first_row = up_matrices(
        expert, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, D, I, E
    )
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    grid_row = tl.where(i < I, first_row + i, first_row) // 128 * tl.cdiv(D, 128)
    token = x + (pair // (K + S))[:, None] * stride_x
    gate_sum, up_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        gate_factor = _factors(gate_scale, grid_row + start // 128, FP8)
        up_factor = _factors(up_scale, grid_row + start // 128, FP8)
        d = start + tl.arange(0, BLOCK_K)
        rows = tl.load(token + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        at, mask = i[:, None] * D + d[None, :], (i < I)[:, None] & (d < D)[None, :]
        gates, ups = tl.load(gate + at, mask=mask, other=0.0), tl.load(up + at, mask=mask, other=0.0)
        gate_sum = _add_product(gate_sum, rows, gates, gate_factor, FP8)
        up_sum = _add_product(up_sum, rows, ups, up_factor, FP8)
    value = swiglu(gate_sum, up_sum, h.dtype.element_ty)
    tl.store(h + pair[:, None] * I + i[None, :], value, mask=live[:, None] & (i < I)[None, :])


@triton.jit
def _down(
    h, order, tiles, n_tiles, y, down, shared_down, scale, shared_scale, n_tokens,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
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
    matrix, factors, width, grid = down_matrix(expert, down, shared_down, scale, shared_scale, D, I, E, S)
    d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    grid_row = tl.where(d < D, d, 0) // 128 * grid
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        factor = _factors(factors, grid_row + start // 128, FP8)
        i = start + tl.arange(0, BLOCK_K)
        rows = tl.load(h + pair[:, None] * I + i[None, :], mask=live[:, None] & (i < width)[None, :], other=0.0)
        at, mask = d[:, None] * width + i[None, :], (d < D)[:, None] & (i < width)[None, :]
        w = tl.load(matrix + at, mask=mask, other=0.0)
        total = _add_product(total, rows, w, factor, FP8)
    row = pair // (K + S) * SLOTS + pair % (K + S)
    value = total.to(y.dtype.element_ty)
    tl.store(y + row[:, None] * D + d[None, :], value, mask=live[:, None] & (d < D)[None, :])


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes: pairs, output columns, summed columns (at most 128 for FP8). The defaults are for few pairs per
    expert: large tiles of weights, three on their way (60 KB), for each of three programs per multiprocessor."""

    block_m: int = 16
    up_n: int = 32  # columns of gate and of up
    up_k: int = 128
    down_n: int = 64
    down_k: int = 128
    num_warps: int = 4
    num_stages: int = 4

    def most_tiles(self, n: int, k: int, e: int, s: int) -> int:
        """The most tiles that N tokens can need: all touched experts' last tiles hold one pair only."""
        touched = min(e, n * k)
        return s * triton.cdiv(n, self.block_m) + (n * k + touched * (self.block_m - 1)) // self.block_m

    def align(self, topk_ids: Tensor, e: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """topk_ids [N, K] -> (order [N (K + S)], tiles [T, 3], number of tiles [1]), all int32."""
        (n, k), device = topk_ids.shape, topk_ids.device
        order = torch.empty(n * (k + s), dtype=torch.int32, device=device)
        tiles = torch.empty(self.most_tiles(n, k, e, s), 3, dtype=torch.int32, device=device)
        n_tiles = torch.empty(1, dtype=torch.int32, device=device)
        _align[(e + s,)](
            topk_ids, order, tiles, n_tiles, n, E=e, K=k, S=s, BLOCK_M=self.block_m,
            BINS=triton.next_power_of_2(max(e, 32)), BLOCK=min(max(triton.next_power_of_2(n * k), 128), 1024),
            num_warps=4,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return order, tiles, n_tiles

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> Tensor:
        """As `Rows.outputs`."""
        (n, k), (e, d, i), s = topk_ids.shape, weights.down_proj.shape, weights.n_shared
        slots = k + (s > 0)
        h = torch.empty(n, k + s, i, dtype=x.dtype, device=x.device)
        y = torch.empty(n, slots, d, dtype=x.dtype, device=x.device)
        order, tiles, n_tiles = self.align(topk_ids, e, s)
        _up[triton.cdiv(i, self.up_n), len(tiles)](
            x, order, tiles, n_tiles, h, *weights.up_arguments(), x.stride(0),  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, FP8=weights.fp8, BLOCK_M=self.block_m, BLOCK_N=self.up_n, BLOCK_K=self.up_k,
            num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        rest = triton.cdiv(n, self.block_m) * (s + k - slots)  # tiles of shared experts beyond the first
        _down[triton.cdiv(d, self.down_n), len(tiles) - rest](
            h, order, tiles, n_tiles, y, *weights.down_arguments(), n,  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, FP8=weights.fp8, SLOTS=slots,
            BLOCK_M=self.block_m, BLOCK_N=self.down_n, BLOCK_K=self.down_k,
            num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return y
