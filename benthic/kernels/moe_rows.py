"""Experts for very few tokens: every product is a matrix times one vector, nothing is sorted.

A program takes one (token, expert) pair and a few rows of that expert's matrices, has all their loads in flight at
once, multiplies in float32 and sums each row. Tokens are neighbours in the grid, so that the shared experts, which all
of them read, come from L2 after the first. The shared experts begin, because they need not wait for the router
(chain.py). Bytes: three matrices per pair; memory-bound, V2-Lite at one token 138 MB per layer in bfloat16, 32 us at
4.28 TB/s.

A token's result does not depend on the others. Pairs whose expert is -1 are left out. Letters as in moe_weights.
"""

# What static_range is inside a kernel, its type does not say.
# pyright: reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain, gemv
from benthic.kernels.gemv import fetch, fetch_vector, times
from benthic.kernels.moe_weights import ExpertWeights, down_matrix, swiglu, up_matrices


@triton.jit
def _times(
    tiles, x, width, scale, row, grid, WIDEST: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Fetched rows times the vector at x -> [R]; in FP8 each block of 128 columns times its factor in the rows' grid,
    of which `grid` lie beside each other."""
    if FP8:
        total = tl.zeros([R], tl.float32)
        for first in tl.static_range(0, WIDEST, CHUNK):
            product = tiles[first // CHUNK].to(tl.float32) * fetch_vector(x, width, first, R, CHUNK)
            parts = tl.sum(tl.reshape(product, [R, CHUNK // 128, 128]), 2)
            column = first // 128 + tl.arange(0, CHUNK // 128)
            at = (row // 128)[:, None] * grid + column[None, :]
            inside = (column * 128 < width)[None, :]
            total += tl.sum(parts * tl.load(scale + at, mask=inside, other=0.0), 1)
        return total
    else:
        return times(tiles, x, width, WIDEST, R, CHUNK)


@triton.jit
def _up(
    x, topk_ids, h, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, stride_x,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    token, slot = tl.program_id(0).to(tl.int64), K + S - 1 - tl.program_id(2)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if slot < K:
        chain.wait(CHAINED)
        expert = tl.load(topk_ids + token * K + slot)
    else:
        expert = E + slot - K
    if expert < 0:  # another device's
        return
    gate, up, gate_scale, up_scale, first_row = up_matrices(
        expert, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, D, I, E
    )
    row = tl.where(i < I, first_row + i, first_row)
    gates = fetch(gate + i * D, i < I, D, D, CHUNK)
    ups = fetch(up + i * D, i < I, D, D, CHUNK)
    chain.wait(CHAINED)
    x += token * stride_x
    gate_sum = _times(gates, x, D, gate_scale, row, tl.cdiv(D, 128), D, BLOCK, CHUNK, FP8)
    up_sum = _times(ups, x, D, up_scale, row, tl.cdiv(D, 128), D, BLOCK, CHUNK, FP8)
    value = swiglu(gate_sum, up_sum, h.dtype.element_ty)
    tl.store(h + (token * (K + S) + slot) * I + i, value, mask=i < I)


@triton.jit
def _down(
    h, topk_ids, y, down, shared_down, scale, shared_scale,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    token, slot = tl.program_id(0).to(tl.int64), SLOTS - 1 - tl.program_id(2)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if slot < K:
        chain.wait(CHAINED)
        expert = tl.load(topk_ids + token * K + slot)
    else:
        expert = slot - K + E
    if expert < 0:
        chain.wait(CHAINED)
        return
    matrix, factors, width, grid = down_matrix(expert, down, shared_down, scale, shared_scale, D, I, E, S)
    row = tl.where(d < D, d, 0)
    rows, x = matrix + d * width, h + (token * (K + S) + slot) * I
    PART: tl.constexpr = (I + CHUNK - 1) // CHUNK * CHUNK
    tiles = fetch(rows, d < D, width, PART, CHUNK)
    chain.wait(CHAINED)
    total = _times(tiles, x, width, factors, row, grid, PART, BLOCK, CHUNK, FP8)
    for first in range(PART, width, PART):  # the shared ones go on
        tiles = fetch(rows + first, d < D, width - first, PART, CHUNK)
        factors += PART // 128
        total += _times(tiles, x + first, width - first, factors, row, grid, PART, BLOCK, CHUNK, FP8)
    tl.store(y + (token * SLOTS + slot) * D + d, total.to(y.dtype.element_ty), mask=d < D)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Numbers in a tile: 16 bytes per thread. Small programs, several waves of them, keep over 100 KB of loads in
    flight on every multiprocessor."""

    tile: int = 1024
    num_warps: int = 4

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> Tensor:
        """Unweighted outputs [N, K + 1, d] of each token's experts, the shared ones together in the last place; without
        shared ones [N, K, d]."""
        (n, k), (e, d, i), s = topk_ids.shape, weights.down_proj.shape, weights.n_shared
        slots = k + (s > 0)
        h = torch.empty(n, k + s, i, dtype=x.dtype, device=x.device)
        y = torch.empty(n, slots, d, dtype=x.dtype, device=x.device)
        up, down = gemv.tiles_of(d, self.tile), gemv.tiles_of(i, self.tile)
        _up[n, triton.cdiv(i, up["BLOCK"]), k + s](
            x, topk_ids, h, *weights.up_arguments(), x.stride(0),  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, FP8=weights.fp8, **up,
            num_warps=self.num_warps, **chain.options(x),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        _down[n, triton.cdiv(d, down["BLOCK"]), slots](
            h, topk_ids, y, *weights.down_arguments(), D=d, I=i, E=e, K=k, S=s, FP8=weights.fp8, SLOTS=slots, **down,
            num_warps=self.num_warps, **chain.options(x),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return y
