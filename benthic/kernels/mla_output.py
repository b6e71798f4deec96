"""From the stretches of absorbed attention to the heads' outputs, in one launch where tokens are few.

A program takes one token, one head and some rows of W^UV, which it fetches before attention has ended (chain.py). Then
it combines the stretches, each weighed by 2^(LSE - max), rounds as the model rounds there, and multiplies. That every
program of a head combines anew costs reads from L2, fewer than a launch in between; with many stretches more, and then
they are combined first. Bytes: H V R of W^UV, 4 S R per token, head and program.

Letters: N tokens, H heads, R latent width, V value width, S stretches.
"""

# What static_range and constexpr are inside a kernel, their types do not say.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain
from benthic.kernels.gemv import FEW, fetch, times
from benthic.kernels.mla_decode import combine

MOST = 32  # stretches that every program combines for itself


@triton.jit
def _output(
    parts, lse, w_uv, out, pairs, stride_s, stride_h, stride_n, stride_w,
    H: tl.constexpr, V: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    v, split = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_S)
    tiles = fetch(w_uv + head * stride_w + v * R, v < V, R, R, CHUNK)
    chain.wait(CHAINED)
    parts += head * stride_h + token * stride_n
    if SPLITS == 1:
        result = times(tiles, parts, R, R, BLOCK, CHUNK)
    else:
        each, some = tl.load(lse + split * pairs + token * H + head, mask=split < SPLITS, other=float("-inf")), ()
        for first in tl.static_range(0, R, CHUNK):
            at = parts + split.to(tl.int64)[:, None] * stride_s + first + tl.arange(0, CHUNK)[None, :]
            some += (tl.load(at, mask=(split < SPLITS)[:, None], other=0.0),)  # those without a token are not looked at
        used, highest = each > float("-inf"), tl.max(each, 0)
        weight = tl.where(used, tl.exp2(each - tl.where(highest > float("-inf"), highest, 0.0)), 0.0)
        weight /= tl.maximum(tl.sum(weight, 0), 1.0)  # the highest weighs 1; less where nothing was used
        total = tl.zeros([BLOCK, CHUNK], tl.float32)
        for first in tl.static_range(0, R, CHUNK):
            latent = tl.sum(tl.where(used[:, None], some[first // CHUNK] * weight[:, None], 0.0), 0)
            latent = latent.to(out.dtype.element_ty).to(tl.float32)
            total += tiles[first // CHUNK].to(tl.float32) * latent[None, :]
        result = tl.sum(total, 1)
    tl.store(out + (token * H + head) * V + v, result.to(out.dtype.element_ty), mask=v < V)


def output(parts: Tensor, lse: Tensor | None, w_uv: Tensor, out: Tensor, *, block: int = 16, chunk: int = 256) -> None:
    """What `stretches` left times w_uv [H, V, R], heads any distance apart -> out [N, H, V], contiguous."""
    (h, v, r), n = w_uv.shape, len(out)
    if out.shape != (n, h, v) or not out.is_contiguous() or w_uv.stride()[1:] != (r, 1) or parts.shape[-1] != r:
        raise ValueError(f"{tuple(parts.shape)} times {tuple(w_uv.shape)} into {tuple(out.shape)} do not fit")
    if lse is not None and (n > FEW or len(lse) > MOST):
        parts, lse = combine(parts, lse, out.dtype), None
    if n > FEW:
        torch.bmm(parts, w_uv.transpose(1, 2), out=out.transpose(0, 1))
    elif n:
        splits = 1 if lse is None else len(lse)
        strides = (0, parts.stride(0), parts.stride(1)) if lse is None else (parts.stride(0), r, h * r)
        _output[n, triton.cdiv(v, block), h](
            parts, parts if lse is None else lse, w_uv, out, n * h, *strides, w_uv.stride(0),
            H=h, V=v, R=r, SPLITS=splits, BLOCK_S=triton.next_power_of_2(splits), BLOCK=block, CHUNK=min(chunk, r),
            num_warps=8, **chain.options(out),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
