"""The router: which experts each token visits and with what weight (V2 Eq 20-22, V3 Eq 13-16), in two launches.

First the logits, in float32 and never through a shortened mantissa, because two experts that nearly tie must fall as
they fall in the model. Few tokens: a program per token and few experts, so that the gate's weight (256 KB for 64
experts, 3.7 MB for V3's 256) is read by many programs at once, each logit by one of them. Many: tiles of tokens by
experts on the tensor cores, whose products of 16-bit numbers are exact and are summed in float32; wider inputs are
multiplied in full float32. Both sum in an order that is fixed by the block sizes alone. Then the choice, a
program per token: affinity, bias, groups, the K best one after the other, weights. The lowest index wins a tie (torch
leaves ties open), and ids are always of experts that exist, even where scores are NaN; the weights then are NaN too.
Bytes: weight + N d elements read; a few microseconds, bound by launches and latency.

Letters: N tokens, d hidden, E routed experts, K chosen, G groups.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Scoring = Literal["sigmoid", "softmax"]
Method = Literal["greedy", "group_limited_greedy", "noaux_tc"]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes. Two experts per program spread V2-Lite's 64 over 32 programs and V3's 256 over 128."""

    rows_max: int = 16  # up to so many tokens a program per token, from there on tiles
    rows_experts: int = 2
    rows_block: int = 2048  # all of a row of V2-Lite in flight at once
    tile_tokens: int = 16  # small, so that a few hundred tokens occupy the chip
    tall_from: int = 1025  # tokens from which on a tile holds four times as many
    tile_experts: int = 32
    tile_block: int = 128
    num_warps: int = 4
    num_stages: int = 3


FIXED = Tiles(rows_max=0, tall_from=2**31)  # one way for any number of tokens: none sees how many there are


@triton.jit
def _logits_of_rows(
    x, weight, logits, stride_x, D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        row = tl.load(x + token * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
        mask = (expert < E)[:, None] & (d < D)[None, :]
        w = tl.load(weight + expert[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(w * row[None, :], 1)
    tl.store(logits + token * E + expert, total, mask=expert < E)


@triton.jit
def _logits_of_tiles(
    x, weight, logits, stride_x, n_tokens, D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = (token < n_tokens)[:, None] & (d < D)[None, :]
        rows = tl.load(x + token[:, None] * stride_x + d[None, :], mask=mask, other=0.0)
        mask = (expert < E)[:, None] & (d < D)[None, :]
        w = tl.load(weight + expert[:, None] * D + d[None, :], mask=mask, other=0.0)
        if rows.dtype != w.dtype:
            rows, w = rows.to(tl.float32), w.to(tl.float32)
        total = tl.dot(rows, tl.trans(w), total, input_precision="ieee")
    mask = (token < n_tokens)[:, None] & (expert < E)[None, :]
    tl.store(logits + token[:, None] * E + expert[None, :], total, mask=mask)


@triton.jit
def _first_best(value, index):
    """(largest value, its lowest index) of a tensor without NaN, whatever its shape."""
    best = tl.max(value)
    return best, tl.min(tl.where(value == best, index, 1 << 30))


@triton.jit
def _without_losing_groups(
    score, index, inside, G: tl.constexpr, M: tl.constexpr, BOTH: tl.constexpr, PAD_G: tl.constexpr,
):  # fmt: skip
    """score [G, E/G] with the groups that are not among the M best at -inf. BOTH: a group is worth its two best."""
    worth = tl.max(score, 1)  # [G]
    if BOTH:
        best = tl.min(tl.where(score == tl.expand_dims(worth, 1), index, 1 << 30), 1)
        rest = tl.where(index == tl.expand_dims(best, 1), -float("inf"), score)
        worth = tl.add(worth, tl.max(rest, 1))
    group = tl.arange(0, PAD_G)
    worth = tl.where(group < G, worth, -float("inf"))
    kept = group < 0
    for _ in range(M):
        _, chosen = _first_best(worth, group)
        kept = kept | (group == chosen)
        worth = tl.where(group == chosen, -float("inf"), worth)
    return tl.where(kept[:, None] & inside, score, -float("inf"))


@triton.jit
def _choose(
    logits, bias, topk_ids, topk_weights, scaling, E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, NORMALISED: tl.constexpr, PAD_G: tl.constexpr, PAD_S: tl.constexpr,
    PAD_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, PAD_G)[:, None], tl.arange(0, PAD_S)[None, :]
    index = group * (E // G) + member  # [G, E/G], both padded to powers of two
    inside = (group < G) & (member < E // G)
    logit = tl.load(logits + token * E + index, mask=inside, other=-float("inf"))
    if SOFTMAX:
        raised = tl.exp(logit - tl.max(logit))
        affinity = raised / tl.sum(raised)
    else:
        affinity = 1 / (1 + tl.exp(-logit))
    score = affinity
    if BIASED:
        score += tl.load(bias + index, mask=inside, other=0.0)
    score = tl.where(inside & (score == score), score, -float("inf"))  # NaN is never the best
    if M < G:
        score = _without_losing_groups(score, index, inside, G, M, BIASED, PAD_G)
    slot = tl.arange(0, PAD_K)
    ids, weights = tl.zeros([PAD_K], tl.int32), tl.zeros([PAD_K], tl.float32)
    for k in range(K):
        _, chosen = _first_best(score, index)
        ids = tl.where(slot == k, chosen, ids)
        weights = tl.where(slot == k, tl.sum(tl.where(index == chosen, affinity, 0.0)), weights)
        score = tl.where(index == chosen, -float("inf"), score)
    if NORMALISED:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(topk_ids + token * K + slot, ids, mask=slot < K)
    tl.store(topk_weights + token * K + slot, weights * scaling, mask=slot < K)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, num_experts_per_tok: int, scoring_func: Scoring,
    topk_method: Method, n_group: int, topk_group: int, norm_topk_prob: bool, routed_scaling_factor: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [N, d], weight [E, d], bias [E] float32 for `noaux_tc`, else None -> (ids int32, weights float32), [N, K] each.

    The other arguments are the model's config of the same names.
    """
    (n, d), e, t = x.shape, weight.shape[0], tiles or Tiles()
    _check(x, weight, bias, num_experts_per_tok, topk_method, n_group, topk_group)
    logits = torch.empty(n, e, dtype=torch.float32, device=x.device)
    topk_ids = torch.empty(n, num_experts_per_tok, dtype=torch.int32, device=x.device)
    topk_weights = torch.empty(n, num_experts_per_tok, dtype=torch.float32, device=x.device)
    if n == 0:
        return topk_ids, topk_weights
    if n <= t.rows_max:
        _logits_of_rows[n, triton.cdiv(e, t.rows_experts)](
            x, weight, logits, x.stride(0), D=d, E=e, BLOCK_E=t.rows_experts,
            BLOCK_D=min(t.rows_block, triton.next_power_of_2(d)), num_warps=t.num_warps,  # pyright: ignore
        )  # fmt: skip
    else:
        tokens = t.tile_tokens if n < t.tall_from else 4 * t.tile_tokens
        _logits_of_tiles[triton.cdiv(n, tokens), triton.cdiv(e, t.tile_experts)](
            x, weight, logits, x.stride(0), n, D=d, E=e, BLOCK_N=tokens, BLOCK_E=t.tile_experts,
            BLOCK_D=t.tile_block, num_warps=t.num_warps, num_stages=t.num_stages,  # pyright: ignore
        )  # fmt: skip
    groups = 1 if topk_method == "greedy" else n_group
    _choose[(n,)](
        logits, logits if bias is None else bias, topk_ids, topk_weights, routed_scaling_factor,
        E=e, K=num_experts_per_tok, G=groups, M=min(topk_group, groups), SOFTMAX=scoring_func == "softmax",
        BIASED=bias is not None, NORMALISED=norm_topk_prob, PAD_G=triton.next_power_of_2(groups),
        PAD_S=triton.next_power_of_2(e // groups), PAD_K=triton.next_power_of_2(num_experts_per_tok),
        num_warps=1,  # pyright: ignore[reportCallIssue]  a few values per lane: reductions stay inside one warp
    )  # fmt: skip
    return topk_ids, topk_weights


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, method: Method, n_group: int, m: int) -> None:
    (e, d), biased = weight.shape, method == "noaux_tc"
    if x.shape[1] != d or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must share d and have contiguous rows")
    if biased != (bias is not None) or (
        bias is not None and (bias.shape != (e,) or bias.dtype != torch.float32 or not bias.is_contiguous())
    ):
        raise ValueError(f"{method} needs {f'a float32 bias [{e}]' if biased else 'no bias'}")
    groups, kept = (1, 1) if method == "greedy" else (n_group, m)
    if e % groups or not 0 < kept <= groups or not 0 < k <= e // groups * kept or (biased and kept < groups == e):
        raise ValueError(f"{k} of {e} experts from {kept} of {groups} groups cannot be chosen")


def route_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, num_experts_per_tok: int, scoring_func: Scoring,
    topk_method: Method, n_group: int, topk_group: int, norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain torch."""
    logits = x.float() @ weight.float().T
    affinity = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)  # [N, E]
    score = affinity if bias is None else affinity + bias
    if topk_method != "greedy":
        members = score.unflatten(-1, (n_group, -1))  # [N, G, E/G]
        worth = members.topk(1 if bias is None else 2, -1).values.sum(-1)
        kept = torch.zeros_like(worth).scatter_(1, worth.topk(topk_group, -1).indices, 1.0) > 0
        score = members.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    topk_ids = score.sort(dim=-1, descending=True, stable=True).indices[:, :num_experts_per_tok]
    weights = affinity.gather(1, topk_ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids.to(torch.int32), weights * routed_scaling_factor
