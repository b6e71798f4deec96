"""Attention of whole prompts or chunks with decompressed keys and values (V3 Eq 9-10), rows of any length packed.

Queries and keys have a part of their own per head and a rotary part; the rotary key is shared by all heads, so it is
read as it lies in the cache and the two products are added, instead of laying out concatenated keys. Flash attention:
a block of queries walks over blocks of keys with a running softmax. Compute-bound: 2 N S H (D + P + V) operations, half
of them where the chunk looks at itself. The log-sum-exp comes out too, so that a context can be taken in pieces.

Letters: N query tokens, S key tokens, B rows, H heads, D, P, V widths of the plain, rotary and value parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    q_nope, q_rope, kv, k_rope, out, lse, first_q, first_k, scale,
    stride_qn, stride_qh, stride_kn, stride_kh, n_tokens,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, V: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_start, k_start = tl.load(first_q + row), tl.load(first_k + row)
    q_len, k_len = tl.load(first_q + row + 1) - q_start, tl.load(first_k + row + 1) - k_start
    if block * BLOCK_M >= q_len:
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, p, v = tl.arange(0, D), tl.arange(0, P), tl.arange(0, V)
    live = (m < q_len)[:, None]
    tokens = (q_start + m).to(tl.int64)[:, None]
    qn = tl.load(q_nope + tokens * stride_qn + head * stride_qh + d[None, :], mask=live, other=0.0)
    qr = tl.load(q_rope + tokens * (H * P) + head * P + p[None, :], mask=live, other=0.0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V], tl.float32)
    last = m + (k_len - q_len) if CAUSAL else m * 0 + (k_len - 1)  # last key that each query sees
    end = tl.minimum((block + 1) * BLOCK_M + (k_len - q_len), k_len) if CAUSAL else k_len
    scale_log2 = scale * 1.4426950408889634
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < k_len
        keys = (k_start + n).to(tl.int64)
        base = kv + keys * stride_kn + head * stride_kh
        kn = tl.load(base[None, :] + d[:, None], mask=inside[None, :], other=0.0)  # [D, BLOCK_N]
        kr = tl.load(k_rope + keys[None, :] * P + p[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(qn, kn, input_precision="ieee")
        scores = tl.dot(qr, kr, scores, input_precision="ieee") * scale_log2
        scores = tl.where((n[None, :] <= last[:, None]) & inside[None, :], scores, -float("inf"))
        peak = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(peak == -float("inf"), 0.0, peak)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(base[:, None] + (D + v)[None, :], mask=inside[:, None], other=0.0)  # [BLOCK_N, V]
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        top = peak
    some = tl.where(total > 0, total, 1.0)
    result = acc / some[:, None]
    tl.store(out + tokens * (H * V) + head * V + v[None, :], result.to(out.dtype.element_ty), mask=live)
    norm = tl.where(total > 0, top * 0.6931471805599453 + tl.log(some), -float("inf"))
    tl.store(lse + head.to(tl.int64) * n_tokens + q_start + m, norm, mask=m < q_len)


def mla_prefill(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, first_q: Tensor, first_k: Tensor, longest_q: int,
    scale: float, *, causal: bool, block_m: int = 128, block_n: int = 64, num_warps: int = 8, num_stages: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q_nope [N, H, D], q_rope [N, H, P], kv [S, H, D + V], k_rope [S, P], first_q and first_k [B + 1] int32 starts of
    the rows -> (out [N, H, V], log-sum-exp [H, N] float32). Causal: a row's last query sees its last key."""
    (n, heads, d), rope, v = q_nope.shape, q_rope.shape[2], kv.shape[2] - q_nope.shape[2]
    if q_nope.stride(2) != 1 or kv.stride(2) != 1 or not q_rope.is_contiguous() or not k_rope.is_contiguous():
        raise ValueError("the last dimension of q_nope and kv, and all of q_rope and k_rope, must be contiguous")
    if k_rope.shape != (kv.shape[0], rope) or q_rope.shape[:2] != (n, heads) or kv.shape[1] != heads:
        raise ValueError(f"shapes {q_nope.shape}, {q_rope.shape}, {kv.shape}, {k_rope.shape} do not belong together")
    out = q_nope.new_empty(n, heads, v)
    lse = torch.empty(heads, n, device=q_nope.device, dtype=torch.float32)
    grid = (triton.cdiv(longest_q, block_m), heads, len(first_q) - 1)
    _kernel[grid](
        q_nope, q_rope, kv, k_rope, out, lse, first_q, first_k, scale,
        q_nope.stride(0), q_nope.stride(1), kv.stride(0), kv.stride(1), n,
        H=heads, D=d, P=rope, V=v, CAUSAL=causal, BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=num_warps, num_stages=num_stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out, lse


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
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
