"""Experts with FP8 weights for more than a few tokens: activations become E4M3 too, and products stay in FP8.

Every activation that enters a product is quantised per token and block of 128 columns, as the released inference code
does it: x by a small kernel, h by the kernel that computes it. Per block of 128 summed columns the tensor cores add up
a partial sum; times the factor of the weights' block and the token's, it joins the float32 total (V3 Sec 3.3.2). The
weights' rows are the tall side of the products and the pairs the flat one, of which 16 are enough, and both sides go
from memory to the tensor cores as they lie. Shared experts are one expert, S times as wide, so that blocks of factors
and programs never cross. Order, tiles and L2 as in moe_tiles. Bytes: half those of BF16; V2-Lite, all experts touched,
571 MB per layer, 133 us at 4.28 TB/s.

Sums run in an order fixed by the block sizes, and a token's numbers depend on no other token. Letters as in
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
def _e4m3(value):
    """value [R, 128] float32 -> its codes and each row's factor, rounded as `quantise_rows` rounds."""
    largest = tl.maximum(tl.max(tl.abs(value), 1), 1e-4)
    factor = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    return tl.div_rn(value, tl.broadcast_to(factor[:, None], value.shape)).to(tl.float8e4nv), factor


@triton.jit
def _quantise(x, codes, factors, stride_x, stride_f, stride_b, D: tl.constexpr, BLOCKS: tl.constexpr):
    token, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    d = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    code, factor = _e4m3(tl.load(x + token * stride_x + d, mask=d < D, other=0.0).to(tl.float32))
    tl.store(codes + token * D + d, code, mask=d < D)
    tl.store(factors + token * stride_f + block * stride_b, factor, mask=block < tl.cdiv(D, 128))


@triton.jit
def _pairs(order, tiles, tile, BLOCK_M: tl.constexpr):
    """Of one tile: its expert, its pairs, and which of them there are."""
    place = tl.load(tiles + tile * 3 + 1) + tl.arange(0, BLOCK_M)
    live = place < tl.load(tiles + tile * 3 + 2)
    return tl.load(tiles + tile * 3), tl.load(order + place, mask=live, other=0).to(tl.int64), live


@triton.jit
def _up(
    x, x_factors, order, tiles, n_tiles, h, h_factors,
    gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, n_tokens,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """h [N, (K + S) I] in E4M3 with factors [N, K ceil(I/128) + ceil(S I/128)]."""
    narrow: tl.constexpr = (I + 127) // 128
    wide: tl.constexpr = (S * I + 127) // 128
    program, shared_tiles = tl.program_id(0), tl.cdiv(n_tokens, BLOCK_M) * (SLOTS - K)
    shared = program < shared_tiles * wide
    rest, blocks = tl.where(shared, program, program - shared_tiles * wide), tl.where(shared, wide, narrow)
    tile, block = tl.where(shared, 0, shared_tiles) + rest // blocks, rest % blocks
    if tile >= tl.load(n_tiles):
        return
    expert, pair, live = _pairs(order, tiles, tile, BLOCK_M)
    token, slot = pair // SLOTS, pair % SLOTS
    gate, up, gate_scale, up_scale, _ = up_matrices(
        expert, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale, D, I, E
    )
    i, width = block * 128 + tl.arange(0, 128), tl.where(shared, S * I, I)
    gate_sum, up_sum = tl.zeros([128, BLOCK_M], tl.float32), tl.zeros([128, BLOCK_M], tl.float32)
    x_factors, gate_scale = x_factors + token * tl.cdiv(D, 128), gate_scale + block * tl.cdiv(D, 128)
    up_scale += block * tl.cdiv(D, 128)
    factor, gate_next, up_next = tl.load(x_factors, mask=live, other=0.0), tl.load(gate_scale), tl.load(up_scale)
    for start in range(0, D, 128):
        gate_factor, up_factor = factor * gate_next, factor * up_next
        at = tl.minimum(start // 128 + 1, (D - 1) // 128)  # the next factors are on their way meanwhile
        factor = tl.load(x_factors + at, mask=live, other=0.0)
        gate_next, up_next = tl.load(gate_scale + at), tl.load(up_scale + at)
        d = start + tl.arange(0, 128)
        tokens = tl.load(x + token[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        at, mask = i[:, None] * D + d[None, :], (i < width)[:, None] & (d < D)[None, :]
        gates, ups = tl.load(gate + at, mask=mask, other=0.0), tl.load(up + at, mask=mask, other=0.0)
        gate_sum += tl.dot(gates, tl.trans(tokens)) * gate_factor[None, :]
        up_sum += tl.dot(ups, tl.trans(tokens)) * up_factor[None, :]
    code, factor = _e4m3(tl.trans(swiglu(gate_sum, up_sum, tl.float32)))  # pyright: ignore[reportArgumentType]
    at = token * ((K + S) * I) + slot * I
    tl.store(h + at[:, None] + i[None, :], code, mask=live[:, None] & (i < width)[None, :])
    tl.store(h_factors + token * (K * narrow + wide) + slot * narrow + block, factor, mask=live)


@triton.jit
def _down(
    h, h_factors, order, tiles, n_tiles, y, down, shared_down, scale, shared_scale,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    narrow: tl.constexpr = (I + 127) // 128
    wide: tl.constexpr = (S * I + 127) // 128
    tile, first = tl.program_id(1), tl.program_id(0) * BLOCK_N
    if tile >= tl.load(n_tiles):
        return
    expert, pair, live = _pairs(order, tiles, tile, BLOCK_M)
    token, slot = pair // SLOTS, pair % SLOTS
    matrix, factors, width, grid = down_matrix(expert, down, shared_down, scale, shared_scale, D, I, E, S)
    d, row = first + tl.arange(0, BLOCK_N), h + token * ((K + S) * I) + slot * I
    row_factors = h_factors + token * (K * narrow + wide) + slot * narrow
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    factors += first // 128 * grid
    row_factor, factor = tl.load(row_factors, mask=live, other=0.0), tl.load(factors)
    for start in range(0, width, 128):
        both, at = row_factor * factor, tl.minimum(start // 128 + 1, (width - 1) // 128)
        row_factor, factor = tl.load(row_factors + at, mask=live, other=0.0), tl.load(factors + at)
        i = start + tl.arange(0, 128)
        pairs = tl.load(row[:, None] + i[None, :], mask=live[:, None] & (i < width)[None, :], other=0.0)
        at, mask = d[:, None] * width + i[None, :], (d < D)[:, None] & (i < width)[None, :]
        w = tl.load(matrix + at, mask=mask, other=0.0)
        total += tl.dot(w, tl.trans(pairs)) * both[None, :]
    value = tl.trans(total.to(y.dtype.element_ty))
    tl.store(y + pair[:, None] * D + d[None, :], value, mask=live[:, None] & (d < D)[None, :])


@dataclass(frozen=True, kw_only=True)
class Fp8Tiles(ByExpert):
    """Block sizes: pairs, rows of the down matrices (at most a block of factors, 128). Rows of gate and up and summed
    columns are 128. Up to 32 pairs, stages leave room for two programs per multiprocessor: one's loads run on while
    the other starts or ends."""

    up_warps: int = 4
    up_stages: int = 3
    down_n: int = 128
    down_warps: int = 4
    down_stages: int = 3

    def outputs(self, x: Tensor, weights: ExpertWeights, topk_ids: Tensor) -> Tensor:
        """As `Rows.outputs`."""
        (n, k), (e, d, i), s = topk_ids.shape, weights.down_proj.shape, weights.n_shared
        if not weights.fp8:
            raise ValueError(f"weights are {weights.down_proj.dtype}, not E4M3 -> use Tiles")
        if 128 % self.down_n:
            raise ValueError(f"down_n={self.down_n} crosses blocks of 128 rows -> use 64 or 128")
        slots, narrow, wide = k + (s > 0), triton.cdiv(i, 128), triton.cdiv(s * i, 128)
        h = torch.empty(n, (k + s) * i, dtype=torch.float8_e4m3fn, device=x.device)
        h_factors = torch.empty(n, k * narrow + wide, dtype=torch.float32, device=x.device)
        y = torch.empty(n, slots, d, dtype=x.dtype, device=x.device)
        codes, factors = quantise(x)
        order, tiles, n_tiles = self.align(topk_ids, e, slots - k)
        shared_tiles = triton.cdiv(n, self.block_m) * (slots - k)
        _up[shared_tiles * wide + (len(tiles) - shared_tiles) * narrow,](
            codes, factors, order, tiles, n_tiles, h, h_factors,
            *weights.up_arguments(), n,  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, SLOTS=slots, BLOCK_M=self.block_m,
            num_warps=self.up_warps, num_stages=self.up_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        _down[triton.cdiv(d, self.down_n), len(tiles)](
            h, h_factors, order, tiles, n_tiles, y, *weights.down_arguments(),  # pyright: ignore[reportCallIssue]
            D=d, I=i, E=e, K=k, S=s, SLOTS=slots, BLOCK_M=self.block_m, BLOCK_N=self.down_n,
            num_warps=self.down_warps, num_stages=self.down_stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return y


def quantise(x: Tensor, *, columns_first: bool = False) -> tuple[Tensor, Tensor]:
    """x [N, d], rows contiguous in themselves -> as `quantise_rows`, of the same bits, in one kernel. `columns_first`:
    the factors of a block of columns are neighbours, and N is filled up to a multiple of 4 with unwritten rows."""
    (n, d), blocks = x.shape, triton.cdiv(x.shape[1], 128)
    rows = -(-n // 4) * 4 if columns_first else n
    shape = (blocks, rows) if columns_first else (rows, blocks)
    codes = torch.empty(rows, d, dtype=torch.float8_e4m3fn, device=x.device)
    factors = torch.empty(*shape, dtype=torch.float32, device=x.device)
    factors = factors.t() if columns_first else factors
    _quantise[(n,)](
        x, codes, factors, x.stride(0), *factors.stride(), D=d,  # pyright: ignore[reportArgumentType]
        BLOCKS=triton.next_power_of_2(blocks),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return codes, factors
