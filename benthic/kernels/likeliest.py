"""The likeliest token of every row of logits, its log-probability and the row's log-sum-exp in two parts, its peak and
the logarithm of the rest, from one reading.

Two launches: a program per row and stretch of the vocabulary leaves its best logit, where that stands, its peak and its
sum of exponentials; a program per row joins the stretches. The stretches do not depend on the number of rows, so that a
row has the same bits in any company. Bytes: the logits, in the dtype in which the product left them; memory-bound from
some dozens of rows on. Sums are float32.

Letters: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _stretches(logits, best, place, peak, total, stride, V, allowed, COUNT: tl.constexpr, STRETCH: tl.constexpr):
    row, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = stretch * STRETCH + tl.arange(0, STRETCH)
    value = tl.load(logits + row * stride + i, mask=i < V, other=-float("inf")).to(tl.float32)
    top = tl.max(value, 0)
    mine = tl.where(i < allowed, value, -float("inf"))
    found = tl.max(mine, 0)
    at = row * COUNT + stretch
    tl.store(best + at, found)
    tl.store(place + at, tl.min(tl.where(mine == found, i, V), 0))  # the lowest of equal ones
    tl.store(peak + at, top)
    tl.store(total + at, tl.sum(tl.exp(value - tl.where(top == -float("inf"), 0.0, top)), 0))


@triton.jit
def _join(
    best, place, peak, total, tokens, logprobs, top_out, log_sum_out, allowed, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside, at = i < COUNT, row * COUNT + i
    peaks = tl.load(peak + at, mask=inside, other=-float("inf"))
    top = tl.max(peaks, 0)
    log_sum = tl.log(tl.sum(tl.load(total + at, mask=inside, other=0.0) * tl.exp(peaks - top), 0))
    candidates = tl.load(best + at, mask=inside, other=-float("inf"))
    found = tl.max(candidates, 0)
    places = tl.load(place + at, mask=inside & (candidates == found), other=allowed - 1)
    tl.store(tokens + row, tl.minimum(tl.min(places, 0), allowed - 1).to(tl.int64))  # a token also where all is NaN
    tl.store(logprobs + row, (found - top) - log_sum)  # pyright: ignore[reportOperatorIssue]
    tl.store(top_out + row, top)
    tl.store(log_sum_out + row, log_sum)


def likeliest(
    logits: Tensor, allowed: int, *, stretch: int = 4096, num_warps: int = 4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logits [..., V] -> (the likeliest id below `allowed`, the lowest where several are, int64; its log
    softmax(logits); and what makes any logit one, logit - peak - log_sum: float32), all [...]. Rows with NaN have NaN
    for the sum."""
    shape, v = logits.shape[:-1], logits.shape[-1]
    if not 0 < allowed <= v:
        raise ValueError(f"allowed={allowed} of {v} logits -> give at least one id and no more than there are")
    flat = logits.reshape(-1, v)
    if flat.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()} -> rows must be contiguous")
    n, count = len(flat), triton.cdiv(v, stretch)
    device = logits.device
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    logprobs, top, log_sum = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3))
    if n == 0:
        return tokens, logprobs, top, log_sum
    best, peak, total = (torch.empty(n, count, dtype=torch.float32, device=device) for _ in range(3))
    place = torch.empty(n, count, dtype=torch.int32, device=device)
    _stretches[n, count](
        flat, best, place, peak, total, flat.stride(0), v, allowed, COUNT=count, STRETCH=stretch,
        num_warps=num_warps,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    _join[(n,)](
        best, place, peak, total, tokens, logprobs, top, log_sum, allowed, COUNT=count,
        BLOCK=triton.next_power_of_2(count), num_warps=1,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return tokens, logprobs, top, log_sum


def likeliest_ref(logits: Tensor, allowed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in plain torch."""
    wide = logits.float()
    tokens = wide[..., :allowed].argmax(-1)
    logprobs = wide.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    peak = wide.amax(-1)
    return tokens, logprobs, peak, wide.logsumexp(-1) - peak
