"""Which experts that a token chose are here: ids of experts become slots of the copies that this device holds.

An expert has one copy or several. Which one a token visits follows from its id and position, so that neither its
company nor its place in the batch decides, and copies share the load about evenly. Copies elsewhere become -1, and so
do all choices of padding, whose slot in the cache is 0; real ones are counted. One launch of a few microseconds.

Letters: N tokens, K experts per token, E experts, X most copies of one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _place(
    topk_ids, token_ids, positions, cache_slots, copies, count, load, here, n_pairs, K: tl.constexpr, X: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, inside = pair // K, pair < n_pairs
    real = inside & (tl.load(cache_slots + token, mask=inside, other=0) != 0)
    expert = tl.load(topk_ids + pair, mask=real, other=0)
    key = tl.load(token_ids + token, mask=real, other=0) + tl.load(positions + token, mask=real, other=0)
    which = key % tl.load(count + expert, mask=real, other=1)
    tl.store(here + pair, tl.load(copies + expert * X + which, mask=real, other=-1), mask=inside)
    tl.atomic_add(load + expert, (pair * 0 + 1).to(tl.int64), mask=real)  # of integers: no order matters


def place(
    topk_ids: Tensor, token_ids: Tensor, positions: Tensor, cache_slots: Tensor, copies: Tensor, count: Tensor,
    load: Tensor,
) -> Tensor:  # fmt: skip
    """topk_ids [N, K] int32, token_ids, positions, cache_slots [N] int64, copies [E, X] and count [E] int32 -> slots
    [N, K] int32. load [E] int64 grows by the tokens of each expert."""
    n, k = topk_ids.shape
    if topk_ids.dtype != torch.int32 or copies.dtype != torch.int32 or load.dtype != torch.int64:
        raise ValueError(f"ids {topk_ids.dtype}, copies {copies.dtype}, load {load.dtype} -> int32, int32, int64")
    if any(len(t) != n or not t.is_contiguous() for t in (topk_ids, token_ids, positions, cache_slots)):
        raise ValueError(f"ids, positions and slots must be contiguous, one for each of {n} tokens")
    here = torch.empty_like(topk_ids)
    if n:
        _place[(triton.cdiv(n * k, BLOCK),)](
            topk_ids, token_ids, positions, cache_slots, copies, count, load, here, n * k,
            K=k, X=copies.shape[1], BLOCK=BLOCK,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
    return here


def place_ref(
    topk_ids: Tensor, token_ids: Tensor, positions: Tensor, cache_slots: Tensor, copies: Tensor, count: Tensor,
    load: Tensor,
) -> Tensor:  # fmt: skip
    """The same in plain torch."""
    real = (cache_slots != 0).unsqueeze(1)
    ids = topk_ids.long()
    which = (token_ids + positions).unsqueeze(1) % count[ids]
    load += ids[real.expand_as(ids)].bincount(minlength=len(load))
    return copies[ids, which].where(real, -1)
