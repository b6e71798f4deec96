"""What lies between the projections and attention, in one launch per layer.

Program (n, 0) normalises the compressed vector of token n in float32, turns its rotary key, and writes both to the
token's slot in the cache's format; program (n, 1 + i) turns the rotary queries of a block of heads. Roundings are those
of the plain model: to the compute dtype after the norm and after the turn, then to the format. Bytes per token: R + P +
H P elements in, the cache row and H P out; memory-bound, and bound by the launch where N is small.

Letters: N tokens, H heads, R latent width, P rotary width, D qk_nope, G scales per row.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

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
def _store(
    kv_a, weight, eps, q, cos, sin, slots, codes, scales, k_rope, q_rope, dense_c, dense_rope,
    stride_kv, stride_q, stride_head,
    FORMAT: tl.constexpr, DENSE: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype: tl.constexpr = kv_a.dtype.element_ty
    half, whole = tl.arange(0, P // 2), tl.arange(0, P)
    cos_n, sin_n = tl.load(cos + n * (P // 2) + half), tl.load(sin + n * (P // 2) + half)
    if block == 0:
        slot = tl.load(slots + n)
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


def store(
    kv_a: Tensor, weight: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, latents: Latents,
    *, dense: bool, block_h: int = 8, num_warps: int = 2,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Write the latents of N tokens to their `slots` [N] int64 (padding: 0) -> turned rotary queries [N, H, P].

    kv_a [N, R+P] and q [N, H, D+P] in the compute dtype, rows any distance apart; weight [R] of the norm; cos, sin
    [N, P/2] float32. With `dense`, also the normed c_kv [N, R] and turned k_rope [N, P], unquantised, for prefill.
    """
    n, h, width = q.shape
    r, p = latents.width, latents.k_rope.shape[1]
    _check(kv_a, weight, q, cos, sin, slots, latents)
    q_rope = q.new_empty(n, h, p)
    rows = (kv_a.new_empty(n, r), kv_a.new_empty(n, p)) if dense else None
    if n == 0:
        return q_rope, rows
    heads = min(block_h, triton.next_power_of_2(h))
    unused = q_rope
    _store[(n, 1 + triton.cdiv(h, heads))](
        kv_a, weight, eps, q, cos, sin, slots, latents.c_kv,
        unused if latents.scales is None else latents.scales, latents.k_rope, q_rope, *(rows or (unused, unused)),
        kv_a.stride(0), q.stride(0), q.stride(1), FORMAT=latents.format, DENSE=dense, H=h, R=r, P=p, D=width - p,
        GROUP=group_of(latents.format, r), BLOCK_H=heads,
        num_warps=num_warps,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return q_rope, rows


def store_ref(
    kv_a: Tensor, weight: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, latents: Latents,
    *, dense: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """`store` in plain torch."""
    r, p = latents.width, latents.k_rope.shape[1]
    c_kv = F.rms_norm(kv_a[:, :r].float(), (r,), weight.float(), eps).to(kv_a.dtype)
    k_rope = _rotate(kv_a[:, r:], cos, sin)
    latents.write(slots, c_kv, k_rope)
    return _rotate(q[..., -p:], cos.unsqueeze(1), sin.unsqueeze(1)), (c_kv, k_rope) if dense else None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def _check(kv_a: Tensor, weight: Tensor, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, latents: Latents) -> None:
    (n, _, width), r, p = q.shape, latents.width, latents.k_rope.shape[1]
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
    if (cos.dtype, sin.dtype, slots.dtype) != (torch.float32, torch.float32, torch.int64):
        raise ValueError(f"cos {cos.dtype}, sin {sin.dtype}, slots {slots.dtype} -> use float32, float32, int64")
