"""Absorbed attention where there are processors enough for every tile of every context: one program, one tile, no loop.

What `mla_decode` computes before it combines, made for the shortest way from the queries to the result. A program
fetches its tile before the queries are there (chain.py), all but the latents of this very step's tokens, which it adds
when they are. The scores' sum over the width is cut into parts that do not wait for each other. Bytes: as in
mla_decode; bound by latency.

Letters as in mla_decode.
"""

# What static_range and constexpr are inside a kernel, their types do not say.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain
from benthic.kernels.latent import Latents

BLOCK_N = 64  # tokens of a tile
PROGRAMS = 132  # one on each processor of an H200: more would have to wait for each other


@triton.jit
def _stretch(
    q_latent, q_rope, c_kv, k_rope, table, context, out, lse, log2_scale, stride_qh, stride_qn, width,
    Q: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    split, row, length = tl.program_id(0), tl.program_id(1), tl.load(context + tl.program_id(1))
    first = split * BLOCK
    page = tl.load(table + row.to(tl.int64) * width + first // PAGE, mask=first < length, other=0)
    token, column, rope = tl.arange(0, BLOCK), tl.arange(0, R // PARTS), tl.arange(0, P)
    pair = tl.arange(0, BLOCK_M)  # query H + head
    n, head, real = (row * Q + pair // H).to(tl.int64), pair % H, (pair < Q * H)[:, None]
    part = (split * tl.num_programs(1) * Q).to(tl.int64) * H + n * H + head  # [splits, N, H]
    if first >= length:
        chain.wait(CHAINED)
        tl.store(lse + part, float("-inf"), mask=pair < Q * H)
        return

    slot, position = (page.to(tl.int64) * PAGE + first % PAGE + token)[:, None], (first + token)[:, None]
    old, new = position < length - Q, (position >= length - Q) & (position < length)
    tile = ()
    for i in tl.static_range(PARTS):
        tile += (tl.load(c_kv + slot * R + i * (R // PARTS) + column[None, :], mask=old, other=0.0),)
    k_r = tl.load(k_rope + slot * P + rope[None, :], mask=old, other=0.0)
    chain.wait(CHAINED)
    if first + BLOCK > length - Q:
        whole = ()
        for i in tl.static_range(PARTS):
            whole += (tl.load(c_kv + slot * R + i * (R // PARTS) + column[None, :], mask=new, other=tile[i]),)
        tile = whole
        k_r = tl.load(k_rope + slot * P + rope[None, :], mask=new, other=k_r)

    qs = ()
    q_r = tl.load(q_rope + (n * H + head)[:, None] * P + rope[None, :], mask=real, other=0.0)
    for i in tl.static_range(PARTS):
        at = (q_latent + head * stride_qh + n * stride_qn + i * (R // PARTS))[:, None] + column[None, :]
        qs += (tl.load(at, mask=real, other=0.0),)
    s = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
    for i in tl.static_range(PARTS):
        s += tl.dot(qs[i], tl.trans(tile[i]), input_precision="ieee")
    visible = length - Q + 1 + pair // H  # positions that this pair sees
    s = tl.where((first + token)[None, :] < visible[:, None], s * log2_scale, float("-inf"))
    top = tl.max(s, 1)
    p = tl.exp2(s - tl.where(top > float("-inf"), top, 0.0)[:, None])  # nothing visible: all weights are 0, none NaN
    total = tl.sum(p, 1)
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    tl.store(lse + part, top + tl.log2(tl.maximum(total, 1e-37)), mask=pair < Q * H)
    for i in tl.static_range(PARTS):
        value = tl.dot(p.to(tile[i].dtype), tile[i], input_precision="ieee") * inverse[:, None]
        tl.store(out + (part * R + i * (R // PARTS))[:, None] + column[None, :], value, mask=real)


def fits(latents: Latents, rows: int, pairs: int, page_size: int, longest: int) -> bool:
    """Whether `rows` of `pairs` (query, head) pairs and contexts up to `longest` tokens are so few."""
    return latents.format == "auto" and pairs <= 32 and rows * triton.cdiv(longest, min(page_size, BLOCK_N)) <= PROGRAMS


def stretches(
    q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, *, page_size: int, scale: float,
    parts: int = 2, num_warps: int = 8,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in mla_decode: float32 outputs [S, N, H, R] and their LSE [S, N, H], base 2, of a tile each."""
    (h, n, r), p, (b, w), block = q_latent.shape, latents.k_rope.shape[1], table.shape, min(page_size, BLOCK_N)
    splits = triton.cdiv(w * page_size, block)
    out = torch.empty(splits, n, h, r, dtype=torch.float32, device=q_rope.device)
    lse = torch.empty(splits, n, h, dtype=torch.float32, device=q_rope.device)
    _stretch[splits, b](
        q_latent, q_rope, latents.c_kv, latents.k_rope, table, context, out, lse, scale * 1.4426950408889634,
        q_latent.stride(0), q_latent.stride(1), w, Q=n // b, H=h, R=r, P=p, PAGE=page_size,
        BLOCK_M=max(16, triton.next_power_of_2(n // b * h)), BLOCK=block, PARTS=parts,
        num_warps=num_warps, **chain.options(q_rope),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out, lse
