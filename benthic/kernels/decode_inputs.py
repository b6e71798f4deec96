"""What a step of decode rows begins with, in two launches where plain torch takes thirty: the rows' tokens, and angles.

A program per row follows what the device alone knows (the token chosen last, how many drafts were accepted) and finds
the slots. A program per token turns its position into cosines and sines. A few hundred bytes per row; bound by the
launch.

Letters: B rows, Q queries of each, W pages per row, N tokens, P rotary width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(
    data, feed_ids, feed_gain, tokens, first, context, table, W, stride_feed, Q: tl.constexpr, PAGE: tl.constexpr,
    PAD_Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, n, q = tl.program_id(0).to(tl.int64), tl.num_programs(0) * Q, tl.arange(0, PAD_Q)
    data += row * (Q + 3 + W)
    source, start, count = tl.load(data + Q), tl.load(data + Q + 1), tl.load(data + Q + 2)
    before, real = tl.maximum(source, 0), q < Q
    given, fed = tl.load(data + q, mask=real), tl.load(feed_ids + before * stride_feed + q, mask=real)
    begin = start + tl.where(source < 0, 0, tl.load(feed_gain + before))
    position = begin + q
    page = tl.load(data + Q + 3 + tl.minimum(position // PAGE, W - 1), mask=real)
    tokens += row * Q + q
    tl.store(tokens, tl.where(source < 0, given, fed), mask=real)
    tl.store(tokens + n, position, mask=real)
    tl.store(tokens + 2 * n, tl.where(q < count, page * PAGE + position % PAGE, 0), mask=real)
    tl.store(first + row, begin)
    tl.store(context + row, tl.where(count > 0, begin + Q, 0).to(tl.int32))
    for w in range(0, W, BLOCK):
        at = w + tl.arange(0, BLOCK)
        tl.store(table + row * W + at, tl.load(data + Q + 3 + at, mask=at < W).to(tl.int32), mask=at < W)


def rows(
    data: Tensor, queries: int, feed_ids: Tensor, feed_gain: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data [B, Q + 3 + W] int64 contiguous: ids, source, start, count, pages of each row; feed_ids [rows, Q], rows any
    distance apart, and feed_gain [rows], int64: what row `source`, unless negative, goes on with and by how much its
    place moved on.

    -> (ids, positions and slots [3, B Q] int64, first position [B] int64, context [B] int32, table [B, W] int32).
    Queries from `count` on go to slot 0; a row without any has no context.
    """
    b, w = len(data), data.shape[1] - queries - 3
    if w < 1 or not data.is_contiguous() or feed_ids.shape[1:] != (queries,) or feed_ids.stride(1) != 1:
        raise ValueError(f"data {tuple(data.shape)}, feed {tuple(feed_ids.shape)} for {queries} queries do not fit")
    if {data.dtype, feed_ids.dtype, feed_gain.dtype} != {torch.int64}:
        raise ValueError(f"data {data.dtype}, feed {feed_ids.dtype}, {feed_gain.dtype} -> use int64")
    tokens, first = data.new_empty(3, b * queries), data.new_empty(b)
    context = torch.empty(b, dtype=torch.int32, device=data.device)
    table = torch.empty(b, w, dtype=torch.int32, device=data.device)
    if b:
        _rows[(b,)](
            data, feed_ids, feed_gain, tokens, first, context, table, w, feed_ids.stride(0), Q=queries, PAGE=page_size,
            PAD_Q=triton.next_power_of_2(queries), BLOCK=32, num_warps=1,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return tokens, first, context, table


@triton.jit
def _angles(positions, frequencies, cos, sin, turn, HALF: tl.constexpr, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    angle = tl.load(positions + n).to(tl.float32) * tl.load(frequencies + i, mask=i < HALF, other=0.0)
    tl.store(cos + n * HALF + i, tl.cos(angle) * turn, mask=i < HALF)
    tl.store(sin + n * HALF + i, tl.sin(angle) * turn, mask=i < HALF)


def angles(positions: Tensor, frequencies: Tensor, turn: float) -> tuple[Tensor, Tensor]:
    """positions [N] int64, float32 radians per position [P/2] -> cos, sin [N, P/2] float32, both times `turn`."""
    n, half = len(positions), len(frequencies)
    cos, sin = (torch.empty(n, half, dtype=torch.float32, device=positions.device) for _ in range(2))
    if n:
        _angles[(n,)](
            positions, frequencies, cos, sin, turn, HALF=half, BLOCK=triton.next_power_of_2(half),
            num_warps=1,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return cos, sin


def rows_ref(
    data: Tensor, queries: int, feed_ids: Tensor, feed_gain: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rows` in plain torch."""
    ids, source, start, counts, pages = data.split([queries, 1, 1, 1, data.shape[1] - queries - 3], 1)
    known, at = source < 0, source.clamp(min=0).squeeze(1)
    ids = torch.where(known, ids, feed_ids[at])  # [B, Q]
    first = start + torch.where(known, 0, feed_gain[at].unsqueeze(1))  # [B, 1]
    steps = torch.arange(queries, device=data.device)
    positions = first + steps  # [B, Q]
    page = pages.gather(1, (positions // page_size).clamp(max=pages.shape[1] - 1))
    slots = torch.where(steps < counts, page * page_size + positions % page_size, 0)
    context = torch.where(counts > 0, first + queries, 0).squeeze(1)
    return torch.stack((ids, positions, slots)).flatten(1), first.squeeze(1), context.int(), pages.int()


def angles_ref(positions: Tensor, frequencies: Tensor, turn: float) -> tuple[Tensor, Tensor]:
    """`angles` in plain torch."""
    angle = positions.float().unsqueeze(-1) * frequencies
    return angle.cos() * turn, angle.sin() * turn
