"""What lies between the projections and attention, in one launch per layer.

Program (n, 0) normalises the compressed vector of token n in float32, turns its rotary key, and writes both to the
token's slot in the cache's format; the next programs of a token turn the rotary queries of a block of heads each. Where
few tokens decode, further programs multiply one head's query by some columns of W^UK, which they have fetched before
the queries are there (chain.py); for more the library's product does that. Roundings are those of the plain model: to
the compute dtype after the norm, after the turn and after the product, then to the format. Bytes per token: R + P +
H (D + P) elements in, the cache row and H (R + P) out, and the H D R of W^UK; memory-bound, and bound by the launch
where N is small.

Letters: N tokens, H heads, R latent width, P rotary width, D qk_nope, G scales per row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain
from benthic.kernels.gemv import FEW
from benthic.kernels.latent import Latents, group_of


@triton.jit
def _turn(pairs, cos, sin):
    """Neighbouring pairs [.., P/2, 2] turned by cos, sin [.., P/2] (RoFormer Eq 34)."""
    even, odd = tl.split(pairs)
    return tl.join(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def _write_row(c, slot, codes, scales, FORMAT: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr):
    """One normed row c [R], rounded to the compute dtype, into its slot."""
    if FORMAT == "auto":
        tl.store(codes + slot * R + tl.arange(0, R), c)
    else:
        groups: tl.constexpr = R // GROUP
        grouped = c.to(tl.float32).reshape(groups, GROUP)
        amax = tl.max(tl.abs(grouped), 1)
        if FORMAT == "fp8":
            scale = tl.maximum(tl.div_rn(amax, 448.0), 1e-12)
            values = tl.div_rn(grouped, tl.broadcast_to(scale[:, None], groups, GROUP))
            values = tl.minimum(tl.maximum(values, -448.0), 448.0).reshape(R)
            tl.store(codes + slot * R + tl.arange(0, R), values.to(codes.dtype.element_ty))
        else:
            scale = tl.minimum(tl.maximum(tl.div_rn(amax, 31.0), 0.00006103515625), 65504.0).to(tl.float16)
            step = tl.broadcast_to(scale.to(tl.float32)[:, None], groups, GROUP)
            number = tl.minimum(tl.maximum(tl.floor(tl.div_rn(grouped, step) + 0.5), -31.0), 31.0).to(tl.int32) + 32
            number = number.reshape(R)
            # bits that do not overlap: their sum is their union
            low = tl.sum((number & 15).reshape(2, R // 2) << (4 * tl.arange(0, 2))[:, None], 0)
            upper = tl.sum((number >> 4).reshape(4, R // 4) << (2 * tl.arange(0, 4))[:, None], 0)
            row = codes + slot * (3 * R // 4)
            tl.store(row + tl.arange(0, R // 2), low.to(tl.uint8))
            tl.store(row + R // 2 + tl.arange(0, R // 4), upper.to(tl.uint8))
        tl.store(scales + slot * groups + tl.arange(0, groups), scale)


@triton.jit
def _absorb(
    q, w_uk, q_latent, part, stride_head, stride_w, stride_out,
    R: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One token's query [D] of one head times some columns of W^UK [D, R]."""
    head, column = part // (R // BLOCK_R), part % (R // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, D)
    w = tl.load(w_uk + head.to(tl.int64) * stride_w + d[:, None] * R + column[None, :])
    chain.wait(CHAINED)
    query = tl.load(q + head * stride_head + d).to(tl.float32)
    product = tl.sum(w.to(tl.float32) * query[:, None], 0)
    tl.store(q_latent + head.to(tl.int64) * stride_out + column, product.to(q_latent.dtype.element_ty))


@triton.jit
def _store(
    kv_a, weight, eps, q, cos, sin, slots, w_uk, codes, scales, k_rope, q_rope, q_latent, dense_c, dense_rope,
    stride_kv, stride_q, stride_head, stride_w, stride_out,
    FORMAT: tl.constexpr, DENSE: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, ABSORB: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype: tl.constexpr = kv_a.dtype.element_ty
    if ABSORB:  # noqa: SIM102  (decided when it is compiled, the other when it runs)
        if block > tl.cdiv(H, BLOCK_H):
            part, query, into = block - tl.cdiv(H, BLOCK_H) - 1, q + n * stride_q, q_latent + n * R
            _absorb(query, w_uk, into, part, stride_head, stride_w, stride_out, R, D, BLOCK_R, CHAINED)
            return
    half, whole = tl.arange(0, P // 2), tl.arange(0, P)
    cos_n, sin_n, slot = tl.load(cos + n * (P // 2) + half), tl.load(sin + n * (P // 2) + half), tl.load(slots + n)
    chain.wait(CHAINED)
    if block == 0:
        latent = tl.arange(0, R)
        x = tl.load(kv_a + n * stride_kv + latent).to(tl.float32)
        c = (x * tl.rsqrt(tl.sum(x * x, 0) / R + eps) * tl.load(weight + latent).to(tl.float32)).to(dtype)
        key = tl.load(kv_a + n * stride_kv + R + whole).to(tl.float32)
        key = _turn(key.reshape(P // 2, 2), cos_n, sin_n).reshape(P).to(dtype)
        _write_row(c, slot, codes, scales, FORMAT, R, GROUP)
        tl.store(k_rope + slot * P + whole, key)
        if DENSE:
            tl.store(dense_c + n * R + latent, c)
            tl.store(dense_rope + n * P + whole, key)
    else:
        heads = (block - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = (heads < H)[:, None]
        queries = tl.load(q + n * stride_q + heads[:, None] * stride_head + D + whole[None, :], mask=inside, other=0.0)
        pairs = queries.to(tl.float32).reshape(BLOCK_H, P // 2, 2)
        turned = _turn(pairs, cos_n[None, :], sin_n[None, :]).reshape(BLOCK_H, P)
        tl.store(q_rope + (n * H + heads[:, None]) * P + whole[None, :], turned.to(dtype), mask=inside)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Turned rotary queries [N, H, P]; queries with W^UK absorbed [H, decoding, R]; and where there is a prompt, normed
    c_kv [N, R] and turned k_rope [N, P], unquantised."""

    q_rope: Tensor
    q_latent: Tensor
    dense: tuple[Tensor, Tensor] | None


def store(
    kv_a: Tensor, weight: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, latents: Latents,
    w_uk: Tensor, decoding: int, *, absorb: bool = True, block_h: int = 8, block_r: int = 64, num_warps: int = 4,
) -> Stored:  # fmt: skip
    """Write the latents of N tokens to their `slots` [N] int64 (padding: 0) and make the queries of attention.

    The first `decoding` tokens decode, the others belong to prompts.

    kv_a [N, R+P] and q [N, H, D+P] in the compute dtype, rows any distance apart; weight [R] of the norm; cos, sin
    [N, P/2] float32; w_uk [H, D, R], heads any distance apart. absorb False: q_latent is left to the caller.
    """
    n, h, width = q.shape
    r, p = latents.width, latents.k_rope.shape[1]
    _check(kv_a, weight, q, cos, sin, slots, w_uk, latents)
    q_rope, q_latent = q.new_empty(n, h, p), q.new_empty(h, decoding, r)
    dense = (kv_a.new_empty(n, r), kv_a.new_empty(n, p)) if decoding < n else None
    if n == 0:
        return Stored(q_rope=q_rope, q_latent=q_latent, dense=dense)
    heads, columns = min(block_h, triton.next_power_of_2(h)), min(block_r, r)
    few, unused = absorb and decoding == n <= FEW, q_rope
    _store[(n, 1 + triton.cdiv(h, heads) + (h * r // columns if few else 0))](
        kv_a, weight, eps, q, cos, sin, slots, w_uk, latents.c_kv,
        unused if latents.scales is None else latents.scales, latents.k_rope, q_rope, q_latent,
        *(dense or (unused, unused)), kv_a.stride(0), q.stride(0), q.stride(1), w_uk.stride(0), q_latent.stride(0),
        FORMAT=latents.format, DENSE=dense is not None, H=h, R=r, P=p, D=width - p,
        GROUP=group_of(latents.format, r), BLOCK_H=heads, BLOCK_R=columns, ABSORB=few,
        num_warps=num_warps, **chain.options(q),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    if absorb and decoding and not few:
        torch.bmm(q[:decoding, :, :-p].transpose(0, 1), w_uk, out=q_latent)
    return Stored(q_rope=q_rope, q_latent=q_latent, dense=dense)


def fill(
    kv_a: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, slots: Tensor, latents: Latents
) -> None:  # fmt: skip
    """`store` of the latents alone."""
    r, n = latents.width, len(kv_a)
    unused, nothing = kv_a[:, r:].unsqueeze(1), kv_a.new_empty(1, 0, r)  # in place of queries, and of W^UK
    store(kv_a, weight, eps, unused, cos, sin, slots, latents, nothing, n, absorb=False)


def store_ref(
    kv_a: Tensor, weight: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, latents: Latents,
    w_uk: Tensor, decoding: int,
) -> Stored:  # fmt: skip
    """`store` in plain torch."""
    r, p = latents.width, latents.k_rope.shape[1]
    c_kv = F.rms_norm(kv_a[:, :r].float(), (r,), weight.float(), eps).to(kv_a.dtype)
    k_rope = _rotate(kv_a[:, r:], cos, sin)
    latents.write(slots, c_kv, k_rope)
    q_rope = _rotate(q[..., -p:], cos.unsqueeze(1), sin.unsqueeze(1))
    q_latent = torch.einsum("nhd,hdr->hnr", q[:decoding, :, :-p].float(), w_uk.float()).to(q.dtype)
    return Stored(q_rope=q_rope, q_latent=q_latent, dense=(c_kv, k_rope) if decoding < len(q) else None)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _check(
    kv_a: Tensor, weight: Tensor, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, w_uk: Tensor,
    latents: Latents,
) -> None:  # fmt: skip
    (n, h, width), r, p = q.shape, latents.width, latents.k_rope.shape[1]
    shapes = {"kv_a": (n, r + p), "weight": (r,), "cos": (n, p // 2), "sin": (n, p // 2), "slots": (n,)}
    for name, tensor in [("kv_a", kv_a), ("weight", weight), ("cos", cos), ("sin", sin), ("slots", slots)]:
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {n} tokens need {shapes[name]}")
        if tensor.stride(-1) != 1 or (name != "kv_a" and not tensor.is_contiguous()):
            raise ValueError(f"{name} has strides {tensor.stride()} -> make it contiguous")
    if width < p or q.stride(-1) != 1:
        raise ValueError(f"q has shape {tuple(q.shape)} and strides {q.stride()} -> heads of {p} or more, contiguous")
    if {kv_a.dtype, q.dtype} != {latents.k_rope.dtype}:
        raise ValueError(f"kv_a is {kv_a.dtype}, q {q.dtype}, k_rope {latents.k_rope.dtype} -> use one dtype")
    if w_uk.shape != (h, width - p, r) or w_uk.stride()[1:] != (r, 1) or w_uk.dtype != q.dtype:
        raise ValueError(f"w_uk {tuple(w_uk.shape)} {w_uk.dtype} -> {(h, width - p, r)} like q, each head contiguous")
    if (cos.dtype, sin.dtype, slots.dtype) != (torch.float32, torch.float32, torch.int64):
        raise ValueError(f"cos {cos.dtype}, sin {sin.dtype}, slots {slots.dtype} -> use float32, float32, int64")
