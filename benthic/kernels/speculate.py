"""What verifying and drafting do between the large kernels, in one launch each: a step of few rows is as long as the
list of its launches.

`verify`: a program per row compares its drafts with what was chosen in their places and says where the row goes on,
and in which slots the prediction module drafts from there. `module_input`: a program per token looks its embedding up
and norms it, and norms its hidden state, side by side (V3 Eq 21).
Bytes: a few integers per row; 4 N d elements. Bound by the launch.

Letters: B rows, Q queries, K drafts, W pages per row, N tokens, M hidden states, d hidden.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Verified(NamedTuple):
    """accepted [B] drafts that were right; last [B] the token after them; at [B] which of the B Q tokens was the last
    right one; and of the K places where the row drafts: positions, slots [K, B] int64 and context [K, B] int32, both 0
    where the row has no page."""

    accepted: Tensor
    last: Tensor
    at: Tensor
    positions: Tensor
    slots: Tensor
    context: Tensor


@triton.jit
def _verify(
    ids, counts, tokens, first, table, accepted, last, at, positions, slots, context, stride_ids, stride_counts,
    width, rows,
    Q: tl.constexpr, DRAFTS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    real = tl.load(counts + row * stride_counts)
    right, number = real > 0, tl.zeros([], tl.int64)
    for q in tl.static_range(Q - 1):  # pyright: ignore[reportGeneralTypeIssues]
        same = tl.load(tokens + row * Q + q) == tl.load(ids + row * stride_ids + q + 1)
        right = right & same & (q + 1 < real)
        number += right.to(tl.int64)
    tl.store(accepted + row, number)
    tl.store(last + row, tl.load(tokens + row * Q + number))
    tl.store(at + row, row * Q + number)
    position = tl.load(first + row) + number
    for i in tl.static_range(DRAFTS):  # pyright: ignore[reportGeneralTypeIssues]
        p = position + i
        page = tl.load(table + row * width + tl.minimum(p // PAGE, width - 1)).to(tl.int64)
        tl.store(positions + i * rows + row, p)
        tl.store(slots + i * rows + row, tl.where(page > 0, page * PAGE + p % PAGE, 0))
        tl.store(context + i * rows + row, tl.where(page > 0, p + 1, 0).to(tl.int32))


def verify(
    ids: Tensor, counts: Tensor, tokens: Tensor, first: Tensor, table: Tensor, drafts: int, page_size: int
) -> Verified:
    """ids [B, Q] that were computed, `counts` [B] of them real, tokens [B, Q] chosen after each, first [B] positions
    of the first, table [B, W] int32 pages; page 0 is none. `drafts` is K."""
    b, q = tokens.shape
    if tuple(ids.shape) != (b, q) or ids.stride(1) != 1 or not all(t.is_contiguous() for t in (tokens, first, table)):
        raise ValueError(f"ids {tuple(ids.shape)}, tokens {tuple(tokens.shape)}, table {tuple(table.shape)}")
    if (ids.dtype, counts.dtype, tokens.dtype, first.dtype, table.dtype) != (*[torch.int64] * 4, torch.int32):
        raise ValueError("ids, counts, tokens and first must be int64, table int32")
    accepted, last, at = torch.empty(3, b, dtype=torch.int64, device=ids.device)
    positions, slots = torch.empty(2, drafts, b, dtype=torch.int64, device=ids.device)
    context = torch.empty(drafts, b, dtype=torch.int32, device=ids.device)
    found = Verified(accepted, last, at, positions, slots, context)
    if b:
        _verify[b,](
            ids, counts, tokens, first, table, *found, ids.stride(0), counts.stride(0), table.shape[1], b,
            Q=q, DRAFTS=drafts, PAGE=page_size, num_warps=1,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return found


def verify_ref(
    ids: Tensor, counts: Tensor, tokens: Tensor, first: Tensor, table: Tensor, drafts: int, page_size: int
) -> Verified:
    """The same in plain torch."""
    b, q = tokens.shape
    there = torch.arange(q - 1, device=ids.device) < counts.unsqueeze(1) - 1
    accepted = ((tokens[:, : q - 1] == ids[:, 1:]) & there).long().cumprod(1).sum(1)
    last = tokens.gather(1, accepted.unsqueeze(1)).squeeze(1)
    at = torch.arange(b, device=ids.device) * q + accepted
    positions = first + accepted + torch.arange(drafts, device=ids.device).unsqueeze(1)  # [K, B]
    page = table.t().gather(0, (positions // page_size).clamp(max=table.shape[1] - 1)).long()
    slots = torch.where(page > 0, page * page_size + positions % page_size, 0)
    context = torch.where(page > 0, positions + 1, 0).int()
    return Verified(accepted, last, at, positions, slots, context)


@triton.jit
def _module_input(
    embedding, ids, hidden, at, enorm, hnorm, out, enorm_eps, hnorm_eps, stride_ids, stride_h, D: tl.constexpr,
    PICK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < D
    row = n
    if PICK:
        row = tl.load(at + n)
    e = tl.load(embedding + tl.load(ids + n * stride_ids) * D + d, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(hidden + row * stride_h + d, mask=inside, other=0.0).to(tl.float32)
    e = e * tl.rsqrt(tl.sum(e * e, 0) / D + enorm_eps) * tl.load(enorm + d, mask=inside, other=0.0).to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / D + hnorm_eps) * tl.load(hnorm + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n * 2 * D + d, e.to(out.dtype.element_ty), mask=inside)
    tl.store(out + n * 2 * D + D + d, h.to(out.dtype.element_ty), mask=inside)


def module_input(
    embedding: Tensor, ids: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eps: tuple[float, float],
    at: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """embedding [V, d], ids [N], hidden [M, d], weights [d] of both norms and their eps -> [N, 2d]: the norm of each
    token's embedding, then that of its hidden state, which is number n or, with `at` [N], number at[n]."""
    (n,), d = ids.shape, hidden.shape[1]
    rows = len(hidden) if at is None else len(at)
    if rows != n or embedding.shape[1] != d or hidden.stride(1) != 1 or not embedding.is_contiguous():
        raise ValueError(f"embedding {tuple(embedding.shape)}, {n} ids, {rows} hidden states of {d}")
    out = torch.empty(n, 2 * d, dtype=hidden.dtype, device=hidden.device)
    if n:
        block = triton.next_power_of_2(d)
        _module_input[n,](
            embedding, ids, hidden, ids if at is None else at, enorm, hnorm, out, *eps,
            ids.stride(0), hidden.stride(0), D=d, PICK=at is not None, BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out
