"""(token, expert) pairs in order of their experts, cut into tiles of BLOCK_M pairs, for kernels that go by expert.

One program per expert: each counts all experts' pairs, finds its own place, and writes its pairs there, tokens
ascending, and its tiles. The number of tiles is known on the device only: grids have room for the most there can be and
programs beyond the last tile leave at once. Pairs whose expert is -1 are in no tile. Letters as in moe_weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_tiles(tiles, expert, first_tile, first_pair, pairs, BLOCK_M: tl.constexpr):
    """tiles [T, 3]: of each tile its expert and its first and end place in the order."""
    for start in range(0, tl.cdiv(pairs, BLOCK_M), 128):
        t = start + tl.arange(0, 128)
        mask, at = t * BLOCK_M < pairs, tiles + (first_tile + t) * 3
        tl.store(at, expert + t * 0, mask=mask)
        tl.store(at + 1, first_pair + t * BLOCK_M, mask=mask)
        tl.store(at + 2, first_pair + t * 0 + pairs, mask=mask)


@triton.jit
def _align(
    topk_ids, order, tiles, n_tiles, n_tokens, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """order: rows token * (K + S) + slot of h, the shared experts' pairs after the routed ones; their tiles first."""
    expert, routed, blocks = tl.program_id(0), n_tokens * K, tl.cdiv(n_tokens, BLOCK_M)
    if expert >= E:
        first = routed + (expert - E) * n_tokens
        for start in range(0, n_tokens, BLOCK):
            token = start + tl.arange(0, BLOCK)
            tl.store(order + first + token, token * (K + S) + K + expert - E, mask=token < n_tokens)
        _write_tiles(tiles, expert, (expert - E) * blocks, first, n_tokens, BLOCK_M)
    else:
        bins, counts = tl.arange(0, BINS), tl.zeros([BINS], tl.int32)
        for start in range(0, routed, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            ids = tl.load(topk_ids + pair, mask=pair < routed, other=-1)
            counts += tl.histogram(tl.maximum(ids, 0), BINS, mask=ids >= 0)
        mine = tl.sum(tl.where(bins == expert, counts, 0))
        first = tl.sum(tl.where(bins < expert, counts, 0))
        first_tile = S * blocks + tl.sum(tl.where(bins < expert, tl.cdiv(counts, BLOCK_M), 0))
        _write_tiles(tiles, expert, first_tile, first, mine, BLOCK_M)
        if expert == E - 1:
            tl.store(n_tiles, first_tile + tl.cdiv(mine, BLOCK_M))
        for start in range(0, routed, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            hit = (pair < routed) & (tl.load(topk_ids + pair, mask=pair < routed, other=0) == expert)
            rank = tl.cumsum(hit.to(tl.int32), 0)
            tl.store(order + first + rank - 1, pair // K * (K + S) + pair % K, mask=hit)
            first += tl.sum(hit.to(tl.int32))


@dataclass(frozen=True, kw_only=True)
class ByExpert:
    """How many pairs a tile holds, and the order."""

    block_m: int = 16

    def most_tiles(self, n: int, k: int, e: int, s: int) -> int:
        """The most tiles that N tokens can need: all touched experts' last tiles hold one pair only."""
        touched = min(e, n * k)
        return s * triton.cdiv(n, self.block_m) + (n * k + touched * (self.block_m - 1)) // self.block_m

    def align(self, topk_ids: Tensor, e: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """topk_ids [N, K] -> (order [N (K + S)], tiles [T, 3], number of tiles [1]), all int32."""
        (n, k), device = topk_ids.shape, topk_ids.device
        order = torch.empty(n * (k + s), dtype=torch.int32, device=device)
        tiles = torch.empty(self.most_tiles(n, k, e, s), 3, dtype=torch.int32, device=device)
        n_tiles = torch.empty(1, dtype=torch.int32, device=device)
        _align[(e + s,)](
            topk_ids, order, tiles, n_tiles, n, E=e, K=k, S=s, BLOCK_M=self.block_m,
            BINS=triton.next_power_of_2(max(e, 32)), BLOCK=min(max(triton.next_power_of_2(n * k), 128), 1024),
            num_warps=4,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
        return order, tiles, n_tiles
