"""A matrix times very few vectors: every row of the matrix is read once, by a program of its own and a few neighbours.

Libraries' products are made for tiles and leave half of the memory's speed unused at one token. A program fetches all
of its rows at once, in tiles of which every warp reads whole lines, while the kernel before it still runs (chain.py),
multiplies them by one vector after the other, and only then sums. Bytes: the matrix; memory-bound. Float32 inside,
summed in a fixed order; tokens do not see each other.

Letters: N tokens, D inputs, M outputs.
"""

# What static_range is inside a kernel, its type does not say.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain

FEW = 4  # tokens up to which a matrix is better read row by row
TILE = 1024  # numbers: 16 bytes per thread of four warps in bfloat16


def tiles_of(width: int, tile: int = TILE) -> dict[str, int]:
    """Rows of `width` as about eight tiles of BLOCK rows x CHUNK columns, so that eight loads of every thread are under
    way; chunks are multiples of 128, which have a factor of their own in FP8."""
    chunk = min(max(triton.next_power_of_2(width) // 8, 128), tile)
    return {"BLOCK": tile // chunk, "CHUNK": chunk}


@triton.jit
def fetch(rows, inside, width, WIDEST: tl.constexpr, CHUNK: tl.constexpr):
    """The first `width` numbers at pointers `rows` [R], where `inside`, as tiles [R, CHUNK]."""
    tiles = ()
    for first in tl.static_range(0, WIDEST, CHUNK):
        d = first + tl.arange(0, CHUNK)
        tiles += (tl.load(rows[:, None] + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0),)
    return tiles


@triton.jit
def fetch_vector(x, width, first, R: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK numbers of x from `first` on, below `width`, for R rows at once: as tiles lie in the threads, float32."""
    d = first + tl.arange(0, CHUNK)
    inside = tl.broadcast_to((d < width)[None, :], R, CHUNK)
    return tl.load(tl.broadcast_to((x + d)[None, :], R, CHUNK), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def times(tiles, x, width, WIDEST: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr):
    """Fetched rows times the vector at x -> [R] float32."""
    total = tl.zeros([R, CHUNK], tl.float32)
    for first in tl.static_range(0, WIDEST, CHUNK):
        total += tiles[first // CHUNK].to(tl.float32) * fetch_vector(x, width, first, R, CHUNK)
    return tl.sum(total, 1)


@triton.jit
def fetch_factors(factors, width, WIDEST: tl.constexpr):
    """The factors of the blocks of 128 columns below `width`, of rows that share them."""
    each = ()
    for first in tl.static_range(0, WIDEST, 128):
        each += (tl.load(factors + first // 128, mask=first < width, other=0.0),)
    return each


@triton.jit
def times_blocks(tiles, factors, x, width, WIDEST: tl.constexpr, R: tl.constexpr):
    """As `times`, of rows in E4M3 fetched as tiles of 128 columns. Eight neighbours, which one thread holds, are summed
    before their factor multiplies them: without a look at other threads, and once for eight."""
    total = tl.zeros([R, 16], tl.float32)
    for first in tl.static_range(0, WIDEST, 128):
        product = tiles[first // 128].to(tl.float32) * fetch_vector(x, width, first, R, 128)
        total += tl.sum(tl.reshape(product, [R, 16, 8]), 2) * factors[first // 128]
    return tl.sum(total, 1)


@triton.jit
def _rows(
    x, weight, out, stride_x, stride_w, N, M, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tiles = fetch(weight + m.to(tl.int64) * stride_w, m < M, D, D, CHUNK)
    chain.wait(CHAINED)
    for token in range(N):
        total = times(tiles, x + token * stride_x, D, D, BLOCK, CHUNK)
        tl.store(out + token * M + m, total.to(out.dtype.element_ty), mask=m < M)


def linear(x: Tensor, weight: Tensor, *, tiles: dict[str, int] | None = None, num_warps: int = 4) -> Tensor:
    """x [N, D], weight [M, D], rows contiguous -> x W^T [N, M] in x's dtype."""
    if len(x) > FEW:
        return F.linear(x, weight)
    (n, d), m = x.shape, len(weight)
    if weight.shape[1] != d or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must share d and have contiguous rows")
    out = torch.empty(n, m, dtype=x.dtype, device=x.device)
    if n:
        tiles = tiles or tiles_of(d)
        _rows[(triton.cdiv(m, tiles["BLOCK"]),)](
            x, weight, out, x.stride(0), weight.stride(0), n, m, D=d, **tiles, num_warps=num_warps,  # pyright: ignore
            **chain.options(x),
        )  # fmt: skip
    return out
