"""Absorbed attention of decode rows over the paged latent cache, split over the context and then combined.

A program owns a block of one row's (query, head) pairs and a stretch of its context. It walks the stretch in tiles of
tokens that lie in one page each; a tile is read once, in quarters of its width, and serves as keys and as values (V3
Eq 1-11 with W^UK folded into the query and W^UV into the output). Softmax is online and in float32. Every row cuts its
own context into `splits` equal stretches, so no grid depends on lengths; a program without a stretch leaves an LSE of
-inf, which the combining kernel weighs with 0 without reading what it belongs to. With one split nothing is combined.

Quantised tiles are restored in registers, in float16: its 11 bits hold every code, and round a code times its scale 16
times finer than either format does. Six bits become a float16 by their place: 2^6 and a mantissa of code * 2^4.

Bytes: context x the cache row (1152 for V2 and V3 in bfloat16, 656 fp8, 528 int6) per row; further blocks of pairs
read it from L2. Up to 16 pairs it is memory-bound at 32 FLOP per byte, at 128 heads compute-bound.

Letters: B rows, Q queries per row, N = B Q, H heads, R latent width, P rotary width, W pages per row.
"""

# What static_range and constexpr are inside a kernel, their types do not say.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain, mla_stretch
from benthic.kernels.latent import Latents, group_of

LOG2E = 1.4426950408889634
PROCESSORS = 132  # of an H200, where there is no GPU to ask


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work is cut: tiles of block_m pairs x block_n tokens of one page, `splits` stretches of each context.

    swap: tokens, not pairs, are the rows of both products. Hopper's matrix units take 64 rows at least, which few pairs
    cannot fill and tiles of 64 tokens do. parts: the pieces of its width that a tile is read in; 4 where quantised.
    shortest: tokens that a stretch has at least, a multiple of block_n.
    """

    block_m: int
    block_n: int
    splits: int
    swap: bool
    parts: int
    num_warps: int
    num_stages: int
    shortest: int = 0


@triton.jit
def _load_tile(c_kv, scales, slot, inside, FORMAT: tl.constexpr, R: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr):
    """A tile's slots [BLOCK_N] as they lie in memory: pieces of its width, and the scales [BLOCK_N, G].

    Quantised codes come as words of four: fp8 in quarters, int6 as two halves of the low nibbles and the upper bits.
    """
    pieces = ()
    count: tl.constexpr = 3 if FORMAT == "int6" else PARTS
    width: tl.constexpr = R // PARTS if FORMAT == "auto" else R // 16
    column = tl.arange(0, width)[None, :]
    for i in tl.static_range(count):
        at = c_kv + slot[:, None] * (count * width) + i * width + column
        pieces += (tl.load(at, mask=inside[:, None], other=0),)
    if FORMAT == "auto":
        return pieces, ()
    else:
        at = scales + slot[:, None] * G + tl.arange(0, G)[None, :]
        return pieces, (tl.load(at, mask=inside[:, None], other=0.0),)


@triton.jit
def _joined(even, odd):
    """Words [BLOCK_N, W] of two float16 each, from bytes 0 and 2, and from 1 and 3 -> [BLOCK_N, 4 W] as 0, 2, 1, 3."""
    first = tl.join(even.to(tl.int16), odd.to(tl.int16))
    second = tl.join((even >> 16).to(tl.int16), (odd >> 16).to(tl.int16))
    return tl.join(first, second).reshape(even.shape[0], even.shape[1] * 4).to(tl.float16, bitcast=True)


@triton.jit
def _reordered(x, FORMAT: tl.constexpr):
    """Columns 0, 1, 2, 3 of every four as 0, 2, 1, 3, and back: queries and outputs follow the order of `_joined`."""
    if FORMAT == "auto":
        return x
    else:
        m: tl.constexpr = x.shape[0]
        return x.reshape(m, x.shape[1] // 4, 2, 2).permute(0, 1, 3, 2).reshape(m, x.shape[1])


@triton.jit
def _six_bits(low, upper, i: tl.constexpr):
    """Quarter i of the numbers in [-31, 31]: nibbles and bit pairs, put over the mantissa of 64.0, add to it."""
    low, upper = low >> (4 * (i // 2)), upper >> (2 * i)
    even = (low << 4) & 0x00F000F0 | (upper << 8) & 0x03000300 | 0x54005400
    odd = (low >> 4) & 0x00F000F0 | upper & 0x03000300 | 0x54005400
    return _joined(even, odd) - 96.0


@triton.jit
def _e4m3(words):
    """E4M3 numbers over 2^8: sign, exponent and mantissa in their places, with the exponent's bias of float16."""
    even = (words << 8) & -0x7FFF8000 | (words << 7) & 0x3F803F80
    odd = words & -0x7FFF8000 | (words >> 1) & 0x3F803F80
    return _joined(even, odd)


@triton.jit
def _scaled(numbers, scales, i: tl.constexpr):
    """numbers [BLOCK_N, R/4] of quarter i times those of the scales [BLOCK_N, G] that belong to it."""
    n: tl.constexpr = numbers.shape[0]
    shared: tl.constexpr = scales.shape[1] // 4
    if shared == 0:
        own = tl.arange(0, scales.shape[1]) == i * scales.shape[1] // 4  # it shares this one with its neighbours
        return numbers * tl.sum(tl.where(own[None, :], scales, 0.0), 1)[:, None]
    else:
        halves = scales.reshape(n, 2, 2, shared).permute(0, 3, 2, 1).split()
        quarters = halves[i // 2].split()
        grouped = numbers.reshape(n, shared, numbers.shape[1] // shared)
        return (grouped * quarters[i % 2][:, :, None]).reshape(n, numbers.shape[1])


@triton.jit
def _restore(pieces, scales, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """The pieces of a tile [BLOCK_N, R/PARTS] in `dtype`; four where it is quantised."""
    quarters = pieces if FORMAT == "auto" else ()
    for i in tl.static_range(0 if FORMAT == "auto" else 4):
        if FORMAT == "fp8":
            quarters += (_scaled(_e4m3(pieces[i]).to(dtype), (scales[0] * 256.0).to(dtype), i),)
        else:
            quarters += (_scaled(_six_bits(pieces[i % 2], pieces[2], i).to(dtype), scales[0].to(dtype), i),)
    return quarters


@triton.jit
def _scores(qs, q_r, tile, k_r, PARTS: tl.constexpr, SWAP: tl.constexpr):
    """q . k, pairs x tokens or swapped: one sum over the rotary and the latent parts, before the softmax."""
    if SWAP:
        s = tl.dot(k_r, tl.trans(q_r), input_precision="ieee")
    else:
        s = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
    for i in tl.static_range(PARTS):
        if SWAP:
            s = tl.dot(tile[i], tl.trans(qs[i]), s, input_precision="ieee")
        else:
            s = tl.dot(qs[i], tl.trans(tile[i]), s, input_precision="ieee")
    return s


@triton.jit
def _gathered(accs, shrink, p, tile, PARTS: tl.constexpr, SWAP: tl.constexpr):
    """What was gathered so far, shrunk to the new maximum, plus p . v: pairs x width or swapped."""
    new = ()
    for i in tl.static_range(PARTS):
        if SWAP:
            new += (tl.dot(tl.trans(tile[i]), p, accs[i] * shrink[None, :], input_precision="ieee"),)
        else:
            new += (tl.dot(p, tile[i], accs[i] * shrink[:, None], input_precision="ieee"),)
    return new


@triton.jit
def _attend(
    q_latent, q_rope, c_kv, scales, k_rope, table, context, out, lse,
    log2_scale, stride_qh, stride_qn, stride_oh, stride_on, width,
    FORMAT: tl.constexpr, Q: tl.constexpr, H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, SWAP: tl.constexpr, SHORTEST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    TOKENS: tl.constexpr = 0 if SWAP else 1  # axis of the scores
    compute: tl.constexpr = k_rope.dtype.element_ty
    dtype: tl.constexpr = compute if FORMAT == "auto" or compute == tl.float32 else tl.float16
    split, row, length = tl.program_id(1), tl.program_id(2), tl.load(context + tl.program_id(2))
    stretch = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N, SHORTEST)
    first, last = split * stretch, tl.minimum((split + 1) * stretch, length)

    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # query H + head
    real = pair < Q * H
    n, head = (row * Q + pair // H).to(tl.int64), pair % H
    part = (split * tl.num_programs(2) * Q).to(tl.int64) * H + n * H + head  # [splits, N, H]
    pages = table + row.to(tl.int64) * width
    page = tl.load(pages + first // PAGE, mask=first < last, other=0)
    chain.wait(CHAINED)
    if (SPLITS > 1) & (first >= last):
        tl.store(lse + part, float("-inf"), mask=real)
        return

    visible = length - Q + 1 + pair // H  # positions that this pair sees
    column, rope, token = tl.arange(0, R // PARTS), tl.arange(0, P), tl.arange(0, BLOCK_N)
    qs, accs = (), ()
    for i in tl.static_range(PARTS):
        at = (q_latent + head * stride_qh + n * stride_qn + i * (R // PARTS))[:, None] + column[None, :]
        qs += (_reordered(tl.load(at, mask=real[:, None], other=0.0).to(dtype), FORMAT),)
        accs += (tl.zeros([R // PARTS, BLOCK_M] if SWAP else [BLOCK_M, R // PARTS], tl.float32),)
    q_r = tl.load(q_rope + (n * H + head)[:, None] * P + rope[None, :], mask=real[:, None], other=0.0)
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

    for start in range(first, last, BLOCK_N):
        slot, position = page.to(tl.int64) * PAGE + start % PAGE + token, start + token
        # the next tile's page is read a tile ahead, so that no load waits for its own address
        page = tl.load(pages + (start + BLOCK_N) // PAGE, mask=start + BLOCK_N < last, other=0)
        inside = position < last
        pieces, steps = _load_tile(c_kv, scales, slot, inside, FORMAT, R, R // GROUP, PARTS)
        k_r = tl.load(k_rope + slot[:, None] * P + rope[None, :], mask=inside[:, None], other=0.0)
        tile = _restore(pieces, steps, FORMAT, dtype)
        s = _scores(qs, q_r, tile, k_r, PARTS, SWAP) * log2_scale
        s = tl.where(tl.expand_dims(position, 1 - TOKENS) < tl.expand_dims(visible, TOKENS), s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, TOKENS))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing visible yet: all weights are 0, none NaN
        shrink, p = tl.exp2(top - finite), tl.exp2(s - tl.expand_dims(finite, TOKENS))
        total, top = total * shrink + tl.sum(p, TOKENS), higher
        accs = _gathered(accs, shrink, p.to(dtype), tile, PARTS, SWAP)

    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    into = out + (head * stride_oh + n * stride_on if SPLITS == 1 else part * R)
    if SPLITS > 1:
        tl.store(lse + part, top + tl.log2(tl.maximum(total, 1e-37)), mask=real)
    for i in tl.static_range(PARTS):
        values = (tl.trans(accs[i]) if SWAP else accs[i]) * inverse[:, None]
        values = _reordered(values.to(out.dtype.element_ty), FORMAT)
        tl.store(into[:, None] + i * (R // PARTS) + column[None, :], values, mask=real[:, None])


@triton.jit
def _combine(
    stretches, lse, out, pairs, stride_oh, stride_on,
    H: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """One pair's stretches [SPLITS, R], weighed by 2^(LSE - max). Stretches without a token are not read."""
    chain.begin(CHAINED)
    chain.wait(CHAINED)
    pair, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.arange(0, BLOCK_S)
    rows = split.to(tl.int64) * pairs + pair
    each = tl.load(lse + rows, mask=split < SPLITS, other=float("-inf"))
    used = each > float("-inf")
    highest = tl.max(each, 0)
    weight = tl.where(used, tl.exp2(each - tl.where(highest > float("-inf"), highest, 0.0)), 0.0)
    weight /= tl.maximum(tl.sum(weight, 0), 1.0)  # the highest weighs 1, so a sum is below 1 where nothing was used
    values = tl.load(stretches + rows[:, None] * R + column[None, :], mask=used[:, None], other=0.0)
    summed = tl.sum(values * weight[:, None], 0)
    into = out + pair % H * stride_oh + pair // H * stride_on
    tl.store(into + column, summed.to(out.dtype.element_ty))


def choose_tiles(latents: Latents, rows: int, pairs: int, page_size: int, longest: int) -> Tiles:
    """Tiles for `rows` of `pairs` (query, head) pairs and contexts up to `longest` tokens; from shapes alone."""
    quantised, wide = latents.format != "auto", pairs > 32
    block_m = 64 if wide else max(16, triton.next_power_of_2(pairs))
    blocks = rows * triton.cdiv(pairs, block_m)
    processors = _processors(latents.c_kv.device)
    block_n = min(page_size, 64)  # 72 KiB of bfloat16 per tile: with one in work and one under way, enough in flight
    if 8 * blocks <= processors and not quantised and not wide:  # a tile per stretch, as many stretches as there can be
        splits = min(triton.cdiv(processors, blocks), triton.cdiv(longest, block_n))
        return Tiles(block_m=block_m, block_n=block_n, splits=splits, swap=False, parts=4, num_warps=4, num_stages=2)
    enough = 10 * blocks >= 9 * processors  # a second stretch per row would not pay for its combining
    splits = 1 if enough else min(triton.cdiv(processors, blocks), triton.cdiv(longest, 2 * block_n))
    swap = not wide and block_n == 64
    # codes leave shared memory before they are worked on: with two stages, no load would be under way meanwhile
    deep = quantised and swap and block_m == 16 and longest > 2 * splits * block_n
    return Tiles(
        block_m=block_m, block_n=block_n, splits=splits, swap=swap, parts=1,
        num_warps=8 if wide or quantised else 4, num_stages=3 if deep else 2,
    )  # fmt: skip


def fixed_tiles(latents: Latents, heads: int, page_size: int) -> Tiles:
    """Tiles for rows of one query whose results must not depend on other rows or on the table's width: a context alone
    says into how many stretches it is cut, of 256 tokens at least, 16 at most."""
    wide, quantised, block_n = heads > 32, latents.format != "auto", min(page_size, 64)
    return Tiles(
        block_m=64 if wide else max(16, triton.next_power_of_2(heads)), block_n=block_n, splits=16, shortest=256,
        swap=not wide and block_n == 64, parts=1, num_warps=8 if wide or quantised else 4, num_stages=2,
    )  # fmt: skip


def stretches(
    q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor,
    *, page_size: int, scale: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`mla_decode` before it is combined: of every stretch of a context its output and the LSE that weighs it.

    (float32 [S, N, H, R], [S, N, H]); with one stretch (the result [H, N, R] itself, None).
    """
    (h, n, r), p = q_latent.shape, latents.k_rope.shape[1]
    _check(q_latent, q_rope, latents, table, context, page_size)
    if n == 0:
        return q_latent.new_empty(h, n, r), None
    b, w = table.shape
    q = n // b
    if tiles is None and mla_stretch.fits(latents, b, q * h, page_size, w * page_size):
        return mla_stretch.stretches(q_latent, q_rope, latents, table, context, page_size=page_size, scale=scale)
    tiles = tiles or choose_tiles(latents, b, q * h, page_size, w * page_size)
    block_n, group = min(tiles.block_n, page_size), group_of(latents.format, r)
    split, device = tiles.splits > 1, q_latent.device
    lse = torch.empty(tiles.splits, n, h, dtype=torch.float32, device=device) if split else None
    out = (
        torch.empty(tiles.splits, n, h, r, dtype=torch.float32, device=device) if split else q_latent.new_empty(h, n, r)
    )
    scales = out if latents.scales is None else latents.scales
    parts = tiles.parts if latents.format == "auto" else 4
    codes = latents.c_kv if latents.format == "auto" else latents.c_kv.view(torch.int32)
    _attend[(triton.cdiv(q * h, tiles.block_m), tiles.splits, b)](
        q_latent, q_rope, codes, scales, latents.k_rope, table, context, out, out if lse is None else lse,
        scale * LOG2E, q_latent.stride(0), q_latent.stride(1), out.stride(0), out.stride(1), w,
        FORMAT=latents.format, Q=q, H=h, R=r, P=p, GROUP=group, PAGE=page_size, SPLITS=tiles.splits,
        BLOCK_M=tiles.block_m, BLOCK_N=block_n, PARTS=parts, SWAP=tiles.swap,
        SHORTEST=tiles.shortest, num_warps=tiles.num_warps, num_stages=tiles.num_stages,  # pyright: ignore
        **chain.options(q_rope),
    )  # fmt: skip
    return out, lse


def combine(parts: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    """The stretches [S, N, H, R], each with its LSE [S, N, H], as one: [H, N, R] in `dtype`."""
    splits, n, h, r = parts.shape
    out = torch.empty(h, n, r, dtype=dtype, device=parts.device)
    width = min(r, 128)
    _combine[(n * h, r // width)](
        parts, lse, out, n * h, out.stride(0), out.stride(1), H=h, R=r, SPLITS=splits,
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_R=width,
        num_warps=1, **chain.options(parts[0]),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out


def mla_decode(
    q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor,
    *, page_size: int, scale: float, tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """q_latent [H, N, R], any strides but the last, and q_rope [N, H, P] over cached latents -> o_latent [H, N, R].

    table [B, W] int32 page numbers; slot = page * page_size + offset. context [B] int32 counts the cached tokens of a
    row with its own N / B new ones, which see each other causally; 0 is a row of padding, whose output is 0. No slot
    past a context is read. `tiles` None: chosen from the shapes.
    """
    parts, lse = stretches(q_latent, q_rope, latents, table, context, page_size=page_size, scale=scale, tiles=tiles)
    return parts if lse is None else combine(parts, lse, q_latent.dtype)


def mla_decode_ref(
    q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor,
    *, page_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """`mla_decode` in plain torch, one row at a time, float32 inside."""
    h, n, r = q_latent.shape
    q = n // len(table)
    out = torch.zeros(h, n, r, dtype=q_latent.dtype, device=q_latent.device)
    for row, length in enumerate(context.tolist()):
        own = slice(row * q, row * q + q)
        position = torch.arange(length, device=table.device)
        slots = table[row, position // page_size].long() * page_size + position % page_size
        c_kv, k_rope = latents.read(slots, torch.float32)  # [S, R], [S, P]
        scores = torch.einsum("hqr,sr->hqs", q_latent[:, own].float(), c_kv)
        scores += torch.einsum("qhp,sp->hqs", q_rope[own].float(), k_rope)
        seen = position < length - q + 1 + torch.arange(q, device=table.device)[:, None]  # [Q, S]
        weights = (scores * scale).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        out[:, own] = torch.einsum("hqs,sr->hqr", weights, c_kv).to(out.dtype)
    return out


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _check(q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, page_size: int) -> None:
    (h, n, r), p, slots = q_latent.shape, latents.k_rope.shape[1], len(latents.c_kv)
    if r != latents.width or tuple(q_rope.shape) != (n, h, p):
        raise ValueError(
            f"q_latent {tuple(q_latent.shape)}, q_rope {tuple(q_rope.shape)} with latents of {latents.width} + {p} -> "
            "they must be [H, N, R] and [N, H, P]"
        )
    if table.ndim != 2 or tuple(context.shape) != (len(table),) or n % max(len(table), 1):
        raise ValueError(
            f"table {tuple(table.shape)}, context {tuple(context.shape)} for {n} queries -> "
            "they must be [B, W] and [B], with as many queries in every row"
        )
    if (table.dtype, context.dtype) != (torch.int32, torch.int32):
        raise ValueError(f"table is {table.dtype}, context {context.dtype} -> use int32")
    if {q_latent.dtype, q_rope.dtype} != {latents.k_rope.dtype}:
        raise ValueError(
            f"q_latent {q_latent.dtype}, q_rope {q_rope.dtype}, k_rope {latents.k_rope.dtype} -> one dtype"
        )
    if q_latent.stride(2) != 1 or not all(t.is_contiguous() for t in (q_rope, table, context)):
        raise ValueError("q_rope, table, context and the last dimension of q_latent must be contiguous")
    if page_size < 16 or page_size & (page_size - 1) or slots % page_size:
        raise ValueError(f"page_size={page_size} with {slots} slots -> a power of two from 16 that divides the slots")
