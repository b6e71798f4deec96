"""The mixture of experts for inference: experts, then the weighted sum per token.

The experts' products come in one of three ways, `Rows` for very few tokens, `Tiles` for more, `Sorted` for thousands;
for FP8 weights the last two are `Fp8Tiles` and `Fp8Sorted`. What they leave is one output per token and chosen expert,
rounded as the model rounds it. One small kernel, a program per token, then sums in the order of the slots, rounds where
the model does (gate weights, routed sum, plus shared, plus residual), and norms the result for the next layer where
that is asked for. Bytes: see the five files; the sum moves N (K + 2) d elements. Nothing is added atomically and
nothing is synchronised with the host: results repeat bit for bit, and the calls may stand in a CUDA graph.

Where experts live on several devices, each gets only the pairs of its own: the other ids are -1, their pairs are
computed by nobody here, and their outputs, which hold anything, are not read.

Letters as in moe_weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain
from benthic.kernels.moe_fp8 import Fp8Tiles
from benthic.kernels.moe_fp8_sorted import Fp8Sorted
from benthic.kernels.moe_rows import Rows
from benthic.kernels.moe_sorted import Sorted
from benthic.kernels.moe_tiles import Tiles
from benthic.kernels.moe_weights import ExpertWeights, moe_ref

__all__ = [
    "ExpertWeights", "Fp8Sorted", "Fp8Tiles", "Rows", "Sorted", "Tiles", "Way", "choose_tiles", "fixed_tiles", "moe",
    "moe_norm", "moe_ref",
]  # fmt: skip

Way = Rows | Tiles | Fp8Tiles | Fp8Sorted | Sorted


@triton.jit
def _combine(
    y, place, shared, topk_ids, topk_weights, residual, norm_weight, out, normed, eps, stride_r, D: tl.constexpr,
    K: tl.constexpr, SHARED: tl.constexpr, PLACED: tl.constexpr, SOME: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    token, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < D
    by = tl.load(norm_weight + d, mask=inside & NORM, other=0.0).to(tl.float32)
    chain.wait(CHAINED)
    dtype: tl.constexpr = y.dtype.element_ty
    slots: tl.constexpr = K + SHARED
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):  # pyright: ignore[reportGeneralTypeIssues]  unrolled: all loads at once
        weight = tl.load(topk_weights + token * K + k).to(dtype).to(tl.float32)
        row = tl.load(place + token * K + k) if PLACED else token * slots + k
        mask = d < tl.where(tl.load(topk_ids + token * K + k) < 0, 0, D) if SOME else inside
        total += weight * tl.load(y + row * D + d, mask=mask, other=0.0).to(tl.float32)
    if SHARED:
        last = shared + token * D if PLACED else y + (token * slots + K) * D
        total = tl.load(last + d, mask=inside, other=0.0).to(tl.float32) + total.to(dtype).to(tl.float32)
    if ADD:
        rest = tl.load(residual + token * stride_r + d, mask=inside, other=0.0).to(tl.float32)
        total = rest + total.to(dtype).to(tl.float32)
    rounded = total.to(dtype)
    tl.store(out + token * D + d, rounded, mask=inside)
    if NORM:
        value = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
        tl.store(normed + token * D + d, (value * scale * by).to(dtype), mask=inside)  # pyright: ignore


def choose_tiles(n: int, k: int, e: int, dtype: torch.dtype) -> Way:
    """The way and its block sizes for N tokens, by the pairs that an expert gets on average: tiles are no taller than
    will be filled, because empty rows cost operations, and no flatter, because each tile reads its expert's weights
    again. Tiles of 64 where 16 would do lose little while every expert is touched, and win much where rows are alike
    and few experts have many pairs, which only the device knows. Measured on an H200 with V2-Lite's shape."""
    pairs, fp8 = n * k / e, dtype == torch.float8_e4m3fn
    if dtype == torch.float32:  # twice the bytes per tile; only models too small to care compute in it
        return Rows() if n <= 4 else Tiles(up_k=64, down_k=64, num_stages=3)
    if n <= 4:
        return Rows()
    if fp8:
        return _choose_fp8(pairs)
    if pairs <= 4:
        return Tiles()
    if pairs <= 64:
        return Tiles(
            block_m=64, up_n=64, up_k=64, down_n=128, down_k=64, shared_m=128, shared_up_n=32, shared_down_n=64,
            num_stages=3,
        )  # fmt: skip
    if pairs <= 96:
        return Tiles(
            block_m=128, up_n=64, up_k=64, down_n=128, down_k=64, shared_m=128, shared_up_n=64, shared_down_n=128,
            num_warps=8, num_stages=3,
        )  # fmt: skip
    return Sorted()


def fixed_tiles(dtype: torch.dtype) -> Tiles:
    """One way for any number of tokens: a token's sums then do not depend on how many there are."""
    if dtype == torch.float32:
        return Tiles(up_k=64, down_k=64, num_stages=3)
    return Tiles(block_m=64, up_n=128, up_k=64, down_n=128, down_k=64, num_warps=8)


def _choose_fp8(pairs: float) -> Fp8Tiles | Fp8Sorted:
    if pairs <= 8:
        return Fp8Tiles()
    if pairs <= 28:
        return Fp8Tiles(block_m=32)
    if pairs <= 64:
        return Fp8Tiles(block_m=64, up_warps=8)  # taller ones run out of registers
    return Fp8Sorted()


def _experts_and_sum(
    x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None,
    norm_weight: Tensor | None, eps: float, tiles: Way | None, of: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (n, d), (_, k) = x.shape, topk_ids.shape
    _check(x, weights, topk_ids, topk_weights, residual, norm_weight)
    out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    normed = out if norm_weight is None else torch.empty_like(out)
    if n == 0:
        return normed, out
    part = 128 if tiles is None and n <= 16 else 512  # numbers per warp; given tiles let nothing follow from n
    tiles = tiles or choose_tiles(n, k, of or len(weights.down_proj), weights.down_proj.dtype)
    place, shared = None, None
    if isinstance(tiles, Sorted | Fp8Sorted):
        y, place, shared = tiles.outputs(x, weights, topk_ids)
    else:
        y = tiles.outputs(x, weights, topk_ids)
    block = triton.next_power_of_2(d)
    _combine[(n,)](
        y, y if place is None else place, y if shared is None else shared, topk_ids, topk_weights,
        x if residual is None else residual, y if norm_weight is None else norm_weight, out, normed, eps,
        0 if residual is None else residual.stride(0), D=d, K=k, SHARED=weights.n_shared > 0,
        PLACED=place is not None, SOME=of > 0, ADD=residual is not None, NORM=norm_weight is not None, BLOCK=block,
        num_warps=min(max(block // part, 1), 16),  # pyright: ignore[reportCallIssue]
        **chain.options(x),
    )  # fmt: skip
    return normed, out


def moe(
    x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None = None,
    *, tiles: Way | None = None, of: int = 0,
) -> Tensor:  # fmt: skip
    """x [N, d], topk_ids [N, K] int32, topk_weights [N, K] float32 -> shared + routed experts (+ residual [N, d]).

    of > 0: `weights` are some of so many experts; the ids of the others are -1, and they add nothing."""
    return _experts_and_sum(x, weights, topk_ids, topk_weights, residual, None, 0.0, tiles, of)[1]


def moe_norm(
    x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor, norm_weight: Tensor,
    eps: float, *, tiles: Way | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(RMSNorm of what `moe` returns, what `moe` returns), as `add_rms_norm` would return them."""
    return _experts_and_sum(x, weights, topk_ids, topk_weights, residual, norm_weight, eps, tiles)


def _check(
    x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor, residual: Tensor | None,
    norm_weight: Tensor | None,
) -> None:  # fmt: skip
    (n, d), wide = x.shape, weights.down_proj.shape[1]
    if d != wide or x.stride(1) != 1 or (not weights.fp8 and x.dtype != weights.down_proj.dtype):
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit weights of {wide} in {weights.down_proj.dtype}")
    if topk_ids.shape != topk_weights.shape or len(topk_ids) != n:
        raise ValueError(f"ids {tuple(topk_ids.shape)} and weights {tuple(topk_weights.shape)} for {n} tokens")
    if topk_ids.dtype != torch.int32 or not topk_ids.is_contiguous() or not topk_weights.is_contiguous():
        raise ValueError(f"ids must be int32 and contiguous, like the weights, not {topk_ids.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if norm_weight is not None and (norm_weight.shape != (d,) or not norm_weight.is_contiguous()):
        raise ValueError(f"norm weight {tuple(norm_weight.shape)} does not fit rows of {d}")
