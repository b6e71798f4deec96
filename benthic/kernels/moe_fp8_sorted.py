"""Experts with FP8 weights for thousands of tokens: two grouped products over tall tiles of pairs, and in between one
kernel for silu(gate) * up that leaves E4M3.

Arithmetic as in moe_fp8: both sides E4M3, partial sums of 128 columns times both factors into the float32 total. Bound
by operations: pairs are the tall side, so that a thread has few factors to keep, and tiles leave room for several
programs per multiprocessor, whose additions run beside the others' products. Gate and up have tiles of their own and
are rounded to the compute dtype in between. The shared experts are linear layers that every token takes. Letters as in
moe_weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import linear_fp8
from benthic.kernels.moe_fp8 import _e4m3, _pairs, quantise
from benthic.kernels.moe_order import ByExpert
from benthic.kernels.moe_sorted import silu_times_up
from benthic.kernels.moe_weights import ExpertWeights, swiglu


@triton.jit
def _grouped(
    x, x_factors, order, tiles, n_tiles, weight, factors, out,
    D: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [pairs, PARTS M] of weights [E, PARTS M, D]; a row of x belongs to PER_ROW pairs."""
    tile, blocks = tl.program_id(1), tl.cdiv(M, BLOCK_N)
    if tile >= tl.load(n_tiles):
        return
    expert, pair, live = _pairs(order, tiles, tile, BLOCK_M)
    part, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N
    matrix, grid = expert.to(tl.int64) * PARTS + part, tl.cdiv(M, 128) * tl.cdiv(D, 128)
    m, row = first + tl.arange(0, BLOCK_N), pair // PER_ROW
    weights, scales = weight + matrix * (M * D), factors + matrix * grid + first // 128 * tl.cdiv(D, 128)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_factors += row * tl.cdiv(D, 128)
    row_factor, scale = tl.load(x_factors, mask=live, other=0.0), tl.load(scales)
    for start in range(0, D, 128):
        factor, at = row_factor * scale, tl.minimum(start // 128 + 1, (D - 1) // 128)
        row_factor, scale = tl.load(x_factors + at, mask=live, other=0.0), tl.load(scales + at)  # of the next step
        d = start + tl.arange(0, 128)
        rows = tl.load(x + row[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(weights + m[:, None] * D + d[None, :], mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.dot(rows, tl.trans(w)) * factor[:, None]
    at = pair * (PARTS * M) + part * M
    tl.store(out + at[:, None] + m[None, :], total.to(out.dtype.element_ty), mask=live[:, None] & (m < M)[None, :])


@triton.jit
def _swiglu(gate_up, codes, factors, I: tl.constexpr, BLOCKS: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    i = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = gate_up + row * (2 * I) + i
    gate = tl.load(at, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(at + I, mask=i < I, other=0.0).to(tl.float32)
    code, factor = _e4m3(swiglu(gate, up, tl.float32))  # pyright: ignore[reportArgumentType]
    tl.store(codes + row * I + i, code, mask=i < I)
    tl.store(factors + row * tl.cdiv(I, 128) + block, factor, mask=block < tl.cdiv(I, 128))


@dataclass(frozen=True, kw_only=True)
class Fp8Sorted(ByExpert):
    """Block sizes: pairs, rows of the weights (64 or 128: a divisor of a block)."""

    block_m: int = 64
    block_n: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Sorted.outputs`; rows stand in the order of the tokens."""
        w, (n, k), (e, d, i) = weights, topk_ids.shape, weights.down_proj.shape
        order, tiles, n_tiles = self.align(topk_ids, e, 0)
        codes, factors = quantise(x)
        gate_up = torch.empty(n * k, 2 * i, dtype=x.dtype, device=x.device)
        self._product(codes, factors, order, tiles, n_tiles, w.gate_up_proj, w.gate_up_scale, gate_up, k)
        codes = torch.empty(n * k, i, dtype=torch.float8_e4m3fn, device=x.device)
        factors = torch.empty(n * k, triton.cdiv(i, 128), dtype=torch.float32, device=x.device)
        blocks = triton.next_power_of_2(triton.cdiv(i, 128))
        _swiglu[(n * k,)](gate_up, codes, factors, I=i, BLOCKS=blocks)  # pyright: ignore[reportArgumentType]
        y = torch.empty(n * k, d, dtype=x.dtype, device=x.device)
        self._product(codes, factors, order, tiles, n_tiles, w.down_proj, w.down_scale, y, 1)
        return y, torch.arange(n * k, device=x.device).view(n, k), self._shared(x, w)

    def _product(
        self, x: Tensor, x_factors: Tensor, order: Tensor, tiles: Tensor, n_tiles: Tensor, weight: Tensor,
        factors: Tensor | None, out: Tensor, per_row: int,
    ) -> None:  # fmt: skip
        if factors is None:
            raise ValueError(f"weights are {weight.dtype}, not E4M3 -> use Sorted")
        parts = 2 if factors.dim() == 4 else 1
        m = weight.shape[1] // parts
        _grouped[parts * triton.cdiv(m, self.block_n), len(tiles)](
            x, x_factors, order, tiles, n_tiles, weight, factors, out,  # pyright: ignore[reportArgumentType]
            D=weight.shape[2], M=m, PARTS=parts, PER_ROW=per_row, BLOCK_M=self.block_m, BLOCK_N=self.block_n,
            num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip

    def _shared(self, x: Tensor, w: ExpertWeights) -> Tensor | None:
        if w.n_shared == 0:
            return None
        gate, up, down = (
            (w.shared_gate_proj, w.shared_gate_scale), (w.shared_up_proj, w.shared_up_scale),
            (w.shared_down_proj, w.shared_down_scale),
        )  # fmt: skip
        middle = torch.cat([linear_fp8.linear(x, *matrix) for matrix in (gate, up)], 1)  # type: ignore[arg-type]
        return linear_fp8.linear(silu_times_up(middle), *down)  # type: ignore[arg-type]
