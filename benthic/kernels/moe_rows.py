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
from benthic.kernels.gemv import fetch, fetch_factors, times, times_blocks
from benthic.kernels.moe_weights import ExpertWeights, down_matrix, swiglu, up_matrices


@triton.jit
def _fetch(rows, inside, factors, width, WIDEST: tl.constexpr, CHUNK: tl.constexpr, FP8: tl.constexpr):
    """Rows as tiles and, in FP8, the factors that they share; in 16 bits the tiles once more, which nobody reads."""
    tiles = fetch(rows, inside, width, WIDEST, CHUNK)
    return tiles, fetch_factors(factors, width, WIDEST) if FP8 else tiles


@triton.jit
def _times(fetched, x, width, WIDEST: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, FP8: tl.constexpr):
    """Fetched rows times the vector at x -> [R] float32."""
    if FP8:
        return times_blocks(fetched[0], fetched[1], x, width, WIDEST, R)
    else:
        return times(fetched[0], x, width, WIDEST, R, CHUNK)


@triton.jit
def _up(
    x, topk_ids, h, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, stride_x,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    token, slot = tl.program_id(0).to(tl.int64), K + S - 1 - tl.program_id(2)
    first, expert, width = tl.program_id(1) * BLOCK, E, S * I
    if slot < K:
        chain.wait(CHAINED)
        chain.begin(CHAINED)
        expert, width = tl.load(topk_ids + token * K + slot), I
    else:
        first += (slot - K) * tl.num_programs(1) * BLOCK
    if expert < 0:  # another device's
        return
    gate, up, gate_scale, up_scale, _ = up_matrices(
        expert, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, D, I, E
    )
    i, grid = first + tl.arange(0, BLOCK), first // 128 * tl.cdiv(D, 128)
    gates = _fetch(gate + i * D, i < width, gate_scale + grid, D, D, CHUNK, FP8)
    ups = _fetch(up + i * D, i < width, up_scale + grid, D, D, CHUNK, FP8)
    if slot >= K:
        chain.wait(CHAINED)
        chain.begin(CHAINED)
    x += token * stride_x
    value = swiglu(
        _times(gates, x, D, D, BLOCK, CHUNK, FP8), _times(ups, x, D, D, BLOCK, CHUNK, FP8), h.dtype.element_ty
    )
    tl.store(h + (token * (K + S) + tl.minimum(slot, K)) * I + i, value, mask=i < width)


@triton.jit
def _down(
    h, topk_ids, y, down, shared_down, scale, shared_scale,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, FP8: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    token, slot = tl.program_id(0).to(tl.int64), SLOTS - 1 - tl.program_id(2)
    first, expert = tl.program_id(1) * BLOCK, E
    if slot < K:
        expert = tl.load(topk_ids + token * K + slot)  # there: `_up` begins late
    if expert < 0:
        chain.wait(CHAINED)
        return
    matrix, factors, width, grid = down_matrix(expert, down, shared_down, scale, shared_scale, D, I, E, S)
    d, x = first + tl.arange(0, BLOCK), h + (token * (K + S) + slot) * I
    rows, inside = matrix + tl.where(d < D, d, 0) * width, d < D
    factors += first // 128 * grid
    PART: tl.constexpr = (I + CHUNK - 1) // CHUNK * CHUNK
    fetched = _fetch(rows, inside, factors, width, PART, CHUNK, FP8)
    chain.wait(CHAINED)
    total = _times(fetched, x, width, PART, BLOCK, CHUNK, FP8)
    for begin in range(PART, width, PART):  # the shared ones go on
        rest = width - begin
        fetched = _fetch(rows + begin, inside, factors + begin // 128, rest, PART, CHUNK, FP8)
        total += _times(fetched, x + begin, rest, PART, BLOCK, CHUNK, FP8)
    tl.store(y + (token * SLOTS + slot) * D + d, total.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Numbers in a tile: 16 bytes per thread in 16 bits, 8 in FP8, whose tiles are 128 wide. Small programs, several
    waves of them, keep over 100 KB of loads in flight on every multiprocessor."""

    tile: int = 1024
    num_warps: int = 4

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> Tensor:
        """Unweighted outputs [N, K + 1, d] of each token's experts, the shared ones together in the last place; without
        shared ones [N, K, d]."""
        (n, k), (e, d, i), s = topk_ids.shape, weights.down_proj.shape, weights.n_shared
        slots = k + (s > 0)
        h = torch.empty(n, k + s, i, dtype=x.dtype, device=x.device)
        y = torch.empty(n, slots, d, dtype=x.dtype, device=x.device)
        up, down = self.tiles(d, weights.fp8), self.tiles(i, weights.fp8)
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

    def tiles(self, width: int, fp8: bool) -> dict[str, int]:
        """Rows of `width` as tiles of BLOCK x CHUNK. In FP8 a block of 128 rows and columns shares its factor, and none
        of its rows may lie in another's program."""
        return {"BLOCK": min(self.tile // 128, 128), "CHUNK": 128} if fp8 else gemv.tiles_of(width, self.tile)
