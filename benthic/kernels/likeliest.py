"""The likeliest token of each row of logits and its log-probability, without a table of log-probabilities.

Program (n, s) reads a stretch of row n once: its largest allowed logit, and the sum of exponentials of all of them,
relative to the largest. A second launch joins the stretches of each row. The lowest id wins a tie, as `argmax` of torch
has it. Bytes: the logits, in whatever dtype they were made; memory-bound, and bound by the two launches where rows are
few.

Letters: N rows, V logits, S stretches of a row.
"""

# What tl.max returns without indices, its type does not say.
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

NOBODY = tl.constexpr(1 << 30)


@triton.jit
def _stretches(logits, best, index, top, total, stride, V, vocab_size, BLOCK: tl.constexpr):
    n, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = s * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + n * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    highest = tl.max(x, 0)
    allowed = tl.where(v < vocab_size, x, float("-inf"))
    winner = tl.max(allowed, 0)
    at = n * tl.num_programs(1) + s
    tl.store(best + at, winner)
    tl.store(index + at, tl.min(tl.where((allowed == winner) & (v < vocab_size), v, NOBODY), 0))
    tl.store(top + at, highest)
    tl.store(total + at, tl.sum(tl.where(v < V, tl.exp(x - highest), 0.0), 0))


@triton.jit
def _join(best, index, top, total, ids, logprobs, stride_ids, vocab_size, S: tl.constexpr, BLOCK: tl.constexpr):
    n, s = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = s < S
    each = tl.load(best + n * S + s, mask=inside, other=float("-inf"))
    winner = tl.max(each, 0)
    found = tl.load(index + n * S + s, mask=inside, other=NOBODY)
    token = tl.minimum(tl.min(tl.where(each == winner, found, NOBODY), 0), vocab_size - 1)  # NaN: some id that exists
    tops = tl.load(top + n * S + s, mask=inside, other=float("-inf"))
    highest = tl.max(tops, 0)
    sums = tl.load(total + n * S + s, mask=inside, other=0.0)
    whole = tl.sum(tl.where(inside, sums * tl.exp(tops - highest), 0.0), 0)
    tl.store(ids + n * stride_ids, token.to(tl.int64))
    tl.store(logprobs + n, winner - highest - tl.log(whole))


def likeliest(
    logits: Tensor, vocab_size: int, out: Tensor | None = None, *, block: int = 2048, num_warps: int = 4
) -> tuple[Tensor, Tensor]:
    """logits [N, V] -> the likeliest id below `vocab_size` [N] int64, and its log softmax over all V [N] float32. Rows
    that hold NaN or infinity give an id that exists and a number that is none. `out` [N]: where to put the ids."""
    n, v = logits.shape
    if logits.stride(1) != 1 or not 0 < vocab_size <= v:
        raise ValueError(f"logits {tuple(logits.shape)} of strides {logits.stride()}, vocab_size={vocab_size}")
    ids = torch.empty(n, dtype=torch.int64, device=logits.device) if out is None else out
    if tuple(ids.shape) != (n,) or ids.dtype != torch.int64:
        raise ValueError(f"out is {tuple(ids.shape)} {ids.dtype} -> use [{n}] int64")
    logprobs = torch.empty(n, dtype=torch.float32, device=logits.device)
    if not n:
        return ids, logprobs
    count = triton.cdiv(v, block)
    best, top, total = torch.empty(3, n, count, dtype=torch.float32, device=logits.device)
    index = torch.empty(n, count, dtype=torch.int32, device=logits.device)
    _stretches[n, count](
        logits, best, index, top, total, logits.stride(0), v, vocab_size, BLOCK=block,
        num_warps=num_warps,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    _join[n,](
        best, index, top, total, ids, logprobs, ids.stride(0), vocab_size, S=count,
        BLOCK=triton.next_power_of_2(count), num_warps=1,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return ids, logprobs


def likeliest_ref(logits: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    ids = logits[:, :vocab_size].float().argmax(-1)
    return ids, logits.float().log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
