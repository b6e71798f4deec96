"""A linear layer with FP8 weights, in the way that fits the number of tokens.

Up to four: a program for a few rows of the weights, which it fetches while the kernel before still runs (chain.py);
activations stay as they are and take the factors of the weights' blocks. More: activations become E4M3 too, per token
and block of 128 columns, and products stay in FP8; per block of 128 summed columns the partial sum of the tensor cores,
times the factors of both sides, joins the float32 total (V3 Sec 3.3.2). The weights' rows are the tall side of the
products, so that 16 tokens fill the flat one. Thousands: the library's product of the same numbers. Bytes: the matrix,
half those of BF16; memory-bound until about 500 tokens.

Sums run in an order fixed by the block sizes; tokens do not see each other.

Letters: N tokens, d inputs, M outputs.
"""

# What static_range and tuples are inside a kernel, their types do not say.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportArgumentType=false

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType

from benthic.kernels import chain
from benthic.kernels.gemv import fetch, fetch_factors, times_blocks
from benthic.kernels.moe_fp8 import quantise
from benthic.kernels.quant import BLOCK, dequantise_blocks, dequantise_rows, quantise_rows

FEW = 4  # tokens up to which the weights are better read row by row
MANY = 1_400_000  # elements of the product from which the library's is faster


@triton.jit
def _rows(x, weight, factors, out, stride_x, N, M, D: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    """BLOCK rows, which share their factors, times every token; weights and factors are fetched before the tokens are
    there."""
    chain.begin(CHAINED)
    first = tl.program_id(0) * BLOCK
    m = first + tl.arange(0, BLOCK)
    tiles = fetch(weight + m.to(tl.int64) * D, m < M, D, D, 128)
    each = fetch_factors(factors + first // 128 * tl.cdiv(D, 128), D, D)
    chain.wait(CHAINED)
    for token in range(N):
        total = times_blocks(tiles, each, x + token * stride_x, D, D, BLOCK)
        tl.store(out + token * M + m, total.to(out.dtype.element_ty), mask=m < M)


@triton.jit
def _tiles(
    codes, token_factors, weight, factors, out, n_tokens, stride_f, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    """TALL: the tokens are the tall side."""
    first = tl.program_id(0) * BLOCK_M
    m, n = first + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, token = weight + m.to(tl.int64)[:, None] * D, codes + n.to(tl.int64)[:, None] * D
    of_tokens, of_rows = token_factors + n, factors + first // 128 * tl.cdiv(D, 128)
    total = tl.zeros([BLOCK_N, BLOCK_M] if TALL else [BLOCK_M, BLOCK_N], tl.float32)
    token_factor, row_factor = tl.load(of_tokens, mask=n < n_tokens, other=0.0), tl.load(of_rows)
    for start in range(0, D, 128):
        factor, block = token_factor * row_factor, tl.minimum(start // 128 + 1, (D - 1) // 128)
        token_factor = tl.load(of_tokens + block * stride_f, mask=n < n_tokens, other=0.0)  # on their way meanwhile:
        row_factor = tl.load(of_rows + block)  # the next factors
        d = start + tl.arange(0, 128)
        w = tl.load(row + d[None, :], mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
        tokens = tl.load(token + d[None, :], mask=(n < n_tokens)[:, None] & (d < D)[None, :], other=0.0)
        if TALL:
            total += tl.dot(tokens, tl.trans(w)) * factor[:, None]
        else:
            total += tl.dot(w, tl.trans(tokens)) * factor[None, :]
    value = total.to(out.dtype.element_ty)
    if not TALL:
        value = tl.trans(value)
    tl.store(out + n.to(tl.int64)[:, None] * M + m[None, :], value, mask=(n < n_tokens)[:, None] & (m < M)[None, :])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a program, a divisor of 128. All their loads are under way at once, 8 bytes per thread and load."""

    block: int = 4
    num_warps: int = 2

    def product(self, x: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
        """x [N, d], rows contiguous in themselves -> x W^T [N, M]."""
        (n, d), m = x.shape, len(weight)
        out = torch.empty(n, m, dtype=x.dtype, device=x.device)
        _rows[(triton.cdiv(m, self.block),)](
            x, weight, factors, out, x.stride(0), n, m, D=d, BLOCK=self.block,  # pyright: ignore
            num_warps=self.num_warps, **chain.options(x),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return out


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes: rows of the weights (a divisor of 128), tokens, and which of the two is the tall side, 64 or more.
    Factors of tokens on the flat side take many registers; fewer than 64 tokens would leave the tall side empty. Flat
    tiles wait for memory, so that several are on their way."""

    block_m: int = 64
    block_n: int = 16
    tall: bool = False
    num_warps: int = 4
    num_stages: int = 5

    def product(self, x: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
        """As `Rows.product`."""
        (n, d), m = x.shape, len(weight)
        codes, token_factors = quantise(x, columns_first=True)
        out = torch.empty(n, m, dtype=x.dtype, device=x.device)
        _tiles[triton.cdiv(m, self.block_m), triton.cdiv(n, self.block_n)](
            codes, token_factors, weight, factors, out, n, token_factors.stride(1), m,  # pyright: ignore
            D=d, BLOCK_M=self.block_m, BLOCK_N=self.block_n, TALL=self.tall,
            num_warps=self.num_warps, num_stages=self.num_stages,  # pyright: ignore
        )  # fmt: skip
        return out


@dataclass(frozen=True, kw_only=True)
class Library:
    """The library's product on Hopper. Needs d and M in multiples of 16, d in a multiple of four blocks, BF16."""

    def product(self, x: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
        """As `Rows.product`."""
        codes, token_factors = quantise(x, columns_first=True)
        return F.scaled_mm(
            codes, weight.t(), token_factors, ScalingType.BlockWise1x128, factors.t(), ScalingType.BlockWise128x128,
            output_dtype=x.dtype,
        )[: len(x)]  # fmt: skip


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `Library` can."""
    m, d = weight.shape
    whole = d % (4 * BLOCK) == 0 and m % 16 == 0 and x.dtype == torch.bfloat16
    return whole and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def choose(x: Tensor, weight: Tensor) -> Rows | Tiles | Library:
    """The way for N tokens, as measured on an H200 with V2-Lite's shapes. Small matrices want small tiles, to occupy
    the chip; the rows of large ones are the tall side until the tokens can be."""
    n, m = len(x), len(weight)
    if n <= FEW:
        return Rows()
    if n * m >= MANY and n > 64 and takes(x, weight):
        return Library()
    if n <= 64 and m <= 4096:
        return Tiles(block_m=16, block_n=64, tall=True, num_stages=6)
    if n <= 32:
        return Tiles(block_n=16 if n <= 16 else 32)
    if n <= 256:
        return Tiles(block_n=64, tall=True, num_stages=4)
    return Tiles(block_n=128, tall=True, num_stages=4)


def linear(x: Tensor, weight: Tensor, factors: Tensor, *, way: Rows | Tiles | Library | None = None) -> Tensor:
    """x [N, d], weight [M, d] E4M3, factors [ceil(M/128), ceil(d/128)] float32, both contiguous -> x W^T [N, M]."""
    (m, d), grid = weight.shape, tuple(-(-n // BLOCK) for n in weight.shape)
    if x.shape[1] != d or x.stride(1) != 1 or not weight.is_contiguous() or weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} {weight.dtype} do not fit")
    if factors.shape != grid or not factors.is_contiguous() or factors.dtype != torch.float32:
        raise ValueError(f"factors {tuple(factors.shape)} {factors.dtype} -> a weight of {m} x {d} needs {grid}")
    if len(x) == 0:
        return x.new_empty(0, m)
    return (way or choose(x, weight)).product(x, weight, factors)


def linear_ref(x: Tensor, weight: Tensor, factors: Tensor, *, quantised: bool) -> Tensor:
    """x W^T in float32. `quantised`: x is rounded to E4M3 first, as for more than `FEW` tokens."""
    wide = dequantise_rows(*quantise_rows(x)) if quantised else x.float()
    return F.linear(wide, dequantise_blocks(weight, factors))
