"""Products whose rows do not know how many they are: a token's result is the same, bit for bit, in any company.

A library chooses its kernel, and with it the order of a sum, by the number of tokens. Here every output is summed in
one order: within a stretch of the inputs by one tile shape, in the matrix units' order; then stretch after stretch, in
float32. Where few tokens leave the chip idle, programs take a stretch each and a second kernel adds them in that same
order; else one program walks them all. So the number of tokens decides who adds, never what is added to what.

Bytes at few tokens: the matrix, read once; at many, bound by 2 N D M operations.

Letters: G groups (heads), N tokens, D inputs, M outputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 132  # of an H200: with fewer tiles than that, stretches go to programs of their own


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """tokens x outputs per program, `depth` inputs at a time, `stretch` (a multiple of it) inputs per partial sum.

    Results depend on outputs and stretch, so these are the same for every call. The tokens are 64 per group of four
    warps, so that every group issues the same instructions (64 x 128 x 16), whether it is alone or one of two. 128 x
    128 is what Hopper multiplies without spilling two sums.
    """

    tokens: int = 64
    outputs: int = 128
    depth: int = 64
    stretch: int = 1024
    num_stages: int = 4


FEW, MANY = Tiles(), Tiles(tokens=128)


@triton.jit(do_not_specialize=["n_tokens"])
def _product(
    x, weight, out, n_tokens, M, stride_xg, stride_xn, stride_wg, stride_wm, stride_wd, stride_os, stride_og, stride_on,
    D: tl.constexpr, STRETCH: tl.constexpr, APART: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """APART: the program of a stretch leaves its sum in out[stretch]; else there is one program, and all are added."""
    group, apart = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, columns = tl.cdiv(n_tokens, BLOCK_N), tl.cdiv(M, BLOCK_M)
    block, tile = tl.program_id(0) // (BESIDE * columns), tl.program_id(0) % (BESIDE * columns)
    beside = tl.minimum(rows - block * BESIDE, BESIDE)  # tiles of tokens that take turns at a tile of weights
    n = (block * BESIDE + tile % beside) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile // beside * BLOCK_M + tl.arange(0, BLOCK_M)
    real = (n < n_tokens)[:, None]
    output = tl.minimum(m, M - 1).to(tl.int64)  # past the end: a row again, which is not stored
    x_rows = x + group * stride_xg + n.to(tl.int64)[:, None] * stride_xn
    w_rows = weight + group * stride_wg + output[None, :] * stride_wm
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = apart * STRETCH
    for begin in range(first, tl.minimum(first + STRETCH, D) if APART else D, STRETCH):
        summed = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(begin, tl.minimum(begin + STRETCH, D), BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            if D % BLOCK_D:
                a = tl.load(x_rows + d[None, :], mask=real & (d < D)[None, :], other=0.0)
                b = tl.load(w_rows + d[:, None] * stride_wd, mask=(d < D)[:, None], other=0.0)
            else:
                a = tl.load(x_rows + d[None, :], mask=real, other=0.0)
                b = tl.load(w_rows + d[:, None] * stride_wd)
            summed = tl.dot(a, b, summed, input_precision="ieee")
        total += summed
    into = out + apart.to(tl.int64) * stride_os + group * stride_og + n.to(tl.int64)[:, None] * stride_on + m[None, :]
    tl.store(into, total.to(out.dtype.element_ty), mask=real & (m < M)[None, :])


@triton.jit(do_not_specialize=["n_tokens", "rows"])
def _add(parts, out, n_tokens, rows, M, stride_og, stride_on, S: tl.constexpr, BLOCK: tl.constexpr):
    """parts [S, G, N, M] -> their sum in order [G, N, M]."""
    row, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(S):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(parts + (s * rows.to(tl.int64) + row) * M + m, mask=m < M, other=0.0)
    into = out + row // n_tokens * stride_og + row % n_tokens * stride_on
    tl.store(into + m, total.to(out.dtype.element_ty), mask=m < M)


def products(
    x: Tensor, weight: Tensor, *, out: Tensor | None = None, tiles: Tiles | None = None, apart: bool | None = None
) -> Tensor:
    """x [G, N, D], weight [G, M, D] -> x W^T [G, N, M] in x's dtype, or into `out`.

    Any strides but the last of x and of out. `apart`: whether stretches go to programs of their own, which changes the
    speed alone; None where that is faster.
    """
    (g, n, d), m = x.shape, weight.shape[1]
    out = x.new_empty(g, n, m) if out is None else out
    if weight.shape != (g, m, d) or out.shape != (g, n, m) or x.dtype != weight.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}, out {tuple(out.shape)} -> "
            "they must be [G, N, D], [G, M, D] and [G, N, M] of one dtype"
        )
    if x.stride(2) != 1 or out.stride(2) != 1:
        raise ValueError(f"x has strides {x.stride()}, out {out.stride()} -> the last must be 1")
    if n == 0:
        return out
    t = tiles or (FEW if n <= 512 else MANY)
    stretches = triton.cdiv(d, t.stretch)
    count = triton.cdiv(n, t.tokens) * triton.cdiv(m, t.outputs)
    apart = stretches > 1 and (count * g < PROGRAMS if apart is None else apart)
    into = torch.empty(stretches, g, n, m, dtype=torch.float32, device=x.device) if apart else out.unsqueeze(0)
    _product[count, stretches if apart else 1, g](
        x, weight, into, n, m, x.stride(0), x.stride(1), *weight.stride(), *into.stride()[:3],
        D=d, STRETCH=t.stretch, APART=apart, BLOCK_N=t.tokens, BLOCK_M=t.outputs, BLOCK_D=t.depth, BESIDE=8,
        num_warps=t.tokens // 16, num_stages=t.num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    if apart:
        _add[g * n, triton.cdiv(m, 1024)](
            into, out, n, g * n, m, out.stride(0), out.stride(1),
            S=stretches, BLOCK=1024,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, D], weight [M, D], any strides but x's last -> x W^T [N, M] in x's dtype."""
    return products(x.unsqueeze(0), weight.unsqueeze(0)).squeeze(0)


def products_ref(x: Tensor, weight: Tensor) -> Tensor:
    """`products` in plain torch, float32 inside."""
    return torch.einsum("gnd,gmd->gnm", x.float(), weight.float()).to(x.dtype)
