"""Attention of whole prompts or chunks with decompressed keys and values (V3 Eq 9-10), rows of any length packed.

Queries and keys have a part of their own per head and a rotary part; the rotary key is shared by all heads, so it is
read as it lies in the cache and the two products are added, instead of laying out concatenated keys. Flash attention:
a block of queries walks over blocks of keys with a running softmax, fetched by the copy engine: first those that all
its queries see, without a mask; then those on the diagonal; then the one that the sequence's end cuts. Blocks with the
most keys start first. Compute-bound: 2 N S H (D + P + V) operations, half of them where the chunk looks at itself. The
log-sum-exp comes out too, so that a context can be taken in pieces.

Letters: N query tokens, S key tokens, B rows, H heads, D, P, V widths of the plain, rotary and value parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _step(
    qn, qr, k_nope, k_rope, v, key, column, top, total, acc, scale, n, last, k_len,
    D: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One block of keys, from row `key` on. RAGGED: some lie behind the sequence, and may be anything."""
    kn, kr, values = k_nope.load([key, column]), k_rope.load([key, 0]), v.load([key, column + D])
    scores = tl.dot(qr, tl.trans(kr), tl.dot(qn, tl.trans(kn), input_precision="ieee"), input_precision="ieee")
    if CAUSAL:
        scores = tl.where(n[None, :] <= last[:, None], scores, -float("inf"))
    if RAGGED:
        scores = tl.where((n < k_len)[None, :], scores, -float("inf"))
        values = tl.where((n < k_len)[:, None], values, 0.0)
    peak = tl.maximum(top, tl.max(scores, 1) * scale)
    safe = peak
    if CAUSAL or RAGGED:
        safe = tl.where(peak == -float("inf"), 0.0, peak)
    weights, shrink = tl.exp2(scores * scale - safe[:, None]), tl.exp2(top - safe)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return peak, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def _kernel(
    q_nope, q_rope, k_nope, k_rope, v, out, lse, first_q, first_k, scale, stride_qn, stride_qh, stride_on, n_tokens,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    head, row = tl.program_id(1), tl.program_id(2)
    q_start, k_start = tl.load(first_q + row), tl.load(first_k + row)
    q_len, k_len = tl.load(first_q + row + 1) - q_start, tl.load(first_k + row + 1) - k_start
    if block * BLOCK_M < q_len:
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = (m < q_len)[:, None]
        tokens = (q_start + m).to(tl.int64)[:, None]
        at = q_nope + tokens * stride_qn + head * stride_qh
        qn = tl.load(at + tl.arange(0, D)[None, :], mask=live, other=0.0)
        qr = tl.load(q_rope + tokens * (H * P) + head * P + tl.arange(0, P)[None, :], mask=live, other=0.0)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, V], tl.float32)
        ahead = k_len - q_len
        last = m + ahead  # last key that each query sees, if causal
        seen = tl.minimum(block * BLOCK_M + ahead + 1, k_len) if CAUSAL else k_len  # keys that all queries see
        end = tl.minimum((block + 1) * BLOCK_M + ahead, k_len) if CAUSAL else k_len
        free, whole = seen // BLOCK_N * BLOCK_N, tl.minimum(end, k_len // BLOCK_N * BLOCK_N)
        scale_log2, column = scale * 1.4426950408889634, head * (D + V)
        for start in range(0, free, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            top, total, acc = _step(
                qn, qr, k_nope, k_rope, v, k_start + start, column, top, total, acc, scale_log2, n, last, k_len,
                D=D, CAUSAL=False, RAGGED=False,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
        if CAUSAL:
            for start in range(free, whole, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                top, total, acc = _step(
                    qn, qr, k_nope, k_rope, v, k_start + start, column, top, total, acc, scale_log2, n, last, k_len,
                    D=D, CAUSAL=True, RAGGED=False,  # pyright: ignore[reportArgumentType]
                )  # fmt: skip
        for start in range(k_len // BLOCK_N * BLOCK_N, end, BLOCK_N):  # at most one
            n = start + tl.arange(0, BLOCK_N)
            top, total, acc = _step(
                qn, qr, k_nope, k_rope, v, k_start + start, column, top, total, acc, scale_log2, n, last, k_len,
                D=D, CAUSAL=CAUSAL, RAGGED=True,  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
        some = tl.where(total > 0, total, 1.0)
        result = (acc / some[:, None]).to(out.dtype.element_ty)
        tl.store(out + tokens * stride_on + head * V + tl.arange(0, V)[None, :], result, mask=live)
        norm = tl.where(total > 0, top * 0.6931471805599453 + tl.log(some), -float("inf"))
        tl.store(lse + head.to(tl.int64) * n_tokens + q_start + m, norm, mask=m < q_len)


def mla_prefill(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, first_q: Tensor, first_k: Tensor, longest_q: int,
    scale: float, *, causal: bool, out: Tensor | None = None, block_m: int = 128, block_n: int = 64,
    num_warps: int = 8, num_stages: int = 3,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q_nope [N, H, D], q_rope [N, H, P], kv [S, H, D + V], k_rope [S, P], first_q and first_k [B + 1] int32 starts of
    the rows -> (out [N, H, V], the one given if one is; log-sum-exp [H, N] float32). Causal: a row's last query sees
    its last key."""
    (n, heads, d), rope, v = q_nope.shape, q_rope.shape[2], kv.shape[2] - q_nope.shape[2]
    if q_nope.stride(2) != 1 or not all(t.is_contiguous() for t in (q_rope, kv, k_rope)):
        raise ValueError("the last dimension of q_nope, and all of q_rope, kv and k_rope, must be contiguous")
    if k_rope.shape != (kv.shape[0], rope) or q_rope.shape[:2] != (n, heads) or kv.shape[1] != heads:
        raise ValueError(f"shapes {q_nope.shape}, {q_rope.shape}, {kv.shape}, {k_rope.shape} do not belong together")
    if out is None:
        out = q_nope.new_empty(n, heads, v)
    if out.shape != (n, heads, v) or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}, expected ({n}, {heads}, {v}), contiguous")
    if kv.dtype == torch.float32:  # twice the bytes
        block_m, block_n, num_stages = min(block_m, 64), min(block_n, 32), 2
    lse = torch.empty(heads, n, device=q_nope.device, dtype=torch.float32)
    if n == 0 or len(kv) == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    grid, rows = (triton.cdiv(longest_q, block_m), heads, len(first_q) - 1), kv.flatten(1)
    _kernel[grid](
        q_nope, q_rope, TensorDescriptor.from_tensor(rows, [block_n, d]),
        TensorDescriptor.from_tensor(k_rope, [block_n, rope]), TensorDescriptor.from_tensor(rows, [block_n, v]),
        out, lse, first_q, first_k, scale, q_nope.stride(0), q_nope.stride(1), out.stride(0), n,
        H=heads, D=d, P=rope, V=v, CAUSAL=causal, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=num_warps, num_stages=num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out, lse


@triton.jit
def _merge(
    out, lse, part, part_lse, n_tokens, stride_lse, stride_part, H: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    n, head, v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.arange(0, V)
    inside, at = n < n_tokens, (n.to(tl.int64) * H + head)[:, None] * V + v[None, :]
    one = tl.load(lse + head * stride_lse + n, mask=inside, other=0.0)
    other = tl.load(part_lse + head * stride_part + n, mask=inside, other=0.0)
    high, low = tl.maximum(one, other), tl.minimum(one, other)
    ratio = tl.where(low == -float("inf"), 0.0, tl.exp(low - high))  # of the sums of weights, the lower to the higher
    joint, smaller = tl.where(high == -float("inf"), high, high + tl.log(1 + ratio)), ratio / (1 + ratio)
    share = tl.where(one >= other, smaller, 1 - smaller)[:, None]  # of the part
    mine = tl.load(out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    theirs = tl.load(part + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out + at, (mine + (theirs - mine) * share).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + head * stride_lse + n, joint, mask=inside)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Join to an attention, out [N, H, V] contiguous and lse [H, N], in place, that of the same queries over other
    keys. Bytes: three times those of out."""
    (n, h, v), block = out.shape, 16
    if part.shape != out.shape or not out.is_contiguous() or not part.is_contiguous():
        raise ValueError(f"{tuple(part.shape)} cannot be joined to {tuple(out.shape)}, or one is not contiguous")
    if n:
        _merge[triton.cdiv(n, block), h](
            out, lse, part, part_lse, n, lse.stride(0), part_lse.stride(0),
            H=h, V=v, BLOCK=block,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip


def merge_ref(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys, each (out [N, H, V], lse [H, N]), joined."""
    joint = torch.logaddexp(one[1], other[1])
    shares = [(lse - joint).exp().nan_to_num(0.0).T.unsqueeze(2) for _, lse in (one, other)]  # [N, H, 1]; -inf: no key
    return (one[0] * shares[0] + other[0] * shares[1]).to(one[0].dtype), joint


def mla_prefill_ref(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, first_q: Tensor, first_k: Tensor, scale: float,
    *, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, row by row in float32."""
    (n, heads, d), v = q_nope.shape, kv.shape[2] - q_nope.shape[2]
    out = torch.zeros(n, heads, v, device=kv.device)
    norm = torch.full((heads, n), -torch.inf, device=kv.device)
    starts_q, starts_k = first_q.tolist(), first_k.tolist()
    for a, b, start, end in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
        keys, values = kv[start:end].float().split([d, v], -1)
        scores = torch.einsum("qhd,khd->hqk", q_nope[a:b].float(), keys)
        scores = (scores + torch.einsum("qhp,kp->hqk", q_rope[a:b].float(), k_rope[start:end].float())) * scale
        if causal:
            hidden = torch.ones(b - a, end - start, dtype=torch.bool, device=kv.device).triu(
                1 + (end - start) - (b - a)
            )
            scores = scores.masked_fill(hidden, -torch.inf)
        norm[:, a:b] = scores.logsumexp(-1)
        out[a:b] = torch.einsum("hqk,khv->qhv", (scores - norm[:, a:b, None]).exp().nan_to_num(0.0), values)
    return out.to(q_nope.dtype), norm
