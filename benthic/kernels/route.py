"""The router: which experts each token visits and with what weight (V2 Eq 20-22, V3 Eq 13-16), in two launches.

First the residual addition, the norm, and of it the logits, in float32 and never through a shortened mantissa, because
two experts that nearly tie must fall as they fall in the model. Few tokens: a program per token and few experts, so
that the gate's weight (256 KB for 64 experts, 3.7 MB for V3's 256) is read by many programs at once, each of which
norms the row for itself rather than wait for another kernel. Many: the norm's own kernel, then tiles of tokens by
experts on the tensor cores, whose products of 16-bit numbers are exact and are summed in float32; wider inputs are
multiplied in full float32. Both sum in an order that is fixed by the block sizes alone. Then the choice, a program per
token: affinity, bias, groups, the K best one after the other, weights. The lowest index wins a tie (torch leaves ties
open), and ids are always of experts that exist, even where scores are NaN; the weights then are NaN too.
Bytes: weight + 4 N d elements; a few microseconds, bound by launches and latency.

Letters: N tokens, d hidden, E routed experts, K chosen, G groups.
"""

# What static_range and constexpr are inside a kernel, their types do not say.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain, norm
from benthic.kernels.gemv import fetch, fetch_vector

Scoring = Literal["sigmoid", "softmax"]
Method = Literal["greedy", "group_limited_greedy", "noaux_tc"]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes. Two experts per program spread V2-Lite's 64 over 32 programs and V3's 256 over 128."""

    rows_max: int = 16  # up to so many tokens a program per token, from there on tiles
    rows_experts: int = 2
    rows_block: int = 512
    tile_tokens: int = 16  # small, so that a few hundred tokens occupy the chip
    tall_from: int = 1025  # tokens from which on a tile holds four times as many
    tile_experts: int = 32
    tile_block: int = 128
    num_warps: int = 4
    num_stages: int = 3


FIXED = Tiles(rows_max=0, tall_from=2**31)  # one way for any number of tokens: none sees how many there are


@triton.jit
def _logits_of_rows(
    x, residual, norm_weight, weight, normed, total, logits, eps, stride_x, stride_r,
    D: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Every program adds and norms its token's row for itself; the first of a token writes it."""
    chain.begin(CHAINED)
    dtype: tl.constexpr = total.dtype.element_ty
    token, expert = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    tiles, factors = fetch(weight + expert * D, expert < E, D, D, BLOCK_D), ()
    for first in tl.static_range(0, D, BLOCK_D):
        factors += (fetch_vector(norm_weight, D, first, BLOCK_E, BLOCK_D),)
    chain.wait(CHAINED)
    sums, square, product = (), tl.zeros([BLOCK_E, BLOCK_D], tl.float32), tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        value = fetch_vector(x + token * stride_x, D, first, BLOCK_E, BLOCK_D)
        value += fetch_vector(residual + token * stride_r, D, first, BLOCK_E, BLOCK_D)
        sums += (value.to(dtype),)
        square += sums[first // BLOCK_D].to(tl.float32) * sums[first // BLOCK_D].to(tl.float32)
    scale = tl.rsqrt(tl.sum(square, 1) / D + eps)
    for first in tl.static_range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        row = (sums[first // BLOCK_D].to(tl.float32) * scale[:, None] * factors[first // BLOCK_D]).to(dtype)
        product += tiles[first // BLOCK_D].to(tl.float32) * row.to(tl.float32)
        at, mine = token * D + tl.broadcast_to(d[None, :], row.shape), ((expert == 0)[:, None]) & (d < D)[None, :]
        tl.store(total + at, sums[first // BLOCK_D], mask=mine)
        tl.store(normed + at, row, mask=mine)
    tl.store(logits + token * E + expert, tl.sum(product, 1), mask=expert < E)


@triton.jit
def _logits_of_tiles(
    x, weight, logits, stride_x, n_tokens, D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    chain.wait(CHAINED)
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
    PAD_K: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    chain.wait(CHAINED)
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


def add_norm_logits(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, *, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual [N, d] -> (norm of their sum [N, d], the sum [N, d], float32 logits of the norm [N, E])."""
    (n, d), e, t = x.shape, weight.shape[0], tiles or Tiles()
    if weight.shape[1] != d or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must share d and have contiguous rows")
    logits = torch.empty(n, e, dtype=torch.float32, device=x.device)
    if n > t.rows_max:
        normed, total = norm.add_rms_norm(x, residual, norm_weight, eps)
        tokens = t.tile_tokens if n < t.tall_from else 4 * t.tile_tokens
        _logits_of_tiles[triton.cdiv(n, tokens), triton.cdiv(e, t.tile_experts)](
            normed, weight, logits, normed.stride(0), n, D=d, E=e, BLOCK_N=tokens, BLOCK_E=t.tile_experts,
            BLOCK_D=t.tile_block, num_warps=t.num_warps, num_stages=t.num_stages,  # pyright: ignore
            **chain.options(x),
        )  # fmt: skip
        return normed, total, logits
    norm.check(x, residual, norm_weight)
    normed, total = (torch.empty(n, d, dtype=x.dtype, device=x.device) for _ in range(2))
    wider = min(triton.next_power_of_2(triton.cdiv(d, 2048)), 4)  # 4 for V2 and V3: a row stays in registers
    if n:
        _logits_of_rows[n, triton.cdiv(e, t.rows_experts)](
            x, residual, norm_weight, weight, normed, total, logits, eps, x.stride(0), residual.stride(0),
            D=d, E=e, BLOCK_E=t.rows_experts, BLOCK_D=min(t.rows_block * wider, triton.next_power_of_2(d)),
            num_warps=t.num_warps * wider, **chain.options(x),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return normed, total, logits


def choose(
    logits: Tensor, bias: Tensor | None, *, num_experts_per_tok: int, scoring_func: Scoring, topk_method: Method,
    n_group: int, topk_group: int, norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """float32 logits [N, E], bias [E] float32 for `noaux_tc`, else None -> (ids int32, weights float32), [N, K] each.

    The other arguments are the model's config of the same names.
    """
    n, e = logits.shape
    _check(e, bias, num_experts_per_tok, topk_method, n_group, topk_group)
    topk_ids = torch.empty(n, num_experts_per_tok, dtype=torch.int32, device=logits.device)
    topk_weights = torch.empty(n, num_experts_per_tok, dtype=torch.float32, device=logits.device)
    if n == 0:
        return topk_ids, topk_weights
    groups = 1 if topk_method == "greedy" else n_group
    _choose[(n,)](
        logits, logits if bias is None else bias, topk_ids, topk_weights, routed_scaling_factor,
        E=e, K=num_experts_per_tok, G=groups, M=min(topk_group, groups), SOFTMAX=scoring_func == "softmax",
        BIASED=bias is not None, NORMALISED=norm_topk_prob, PAD_G=triton.next_power_of_2(groups),
        PAD_S=triton.next_power_of_2(e // groups), PAD_K=triton.next_power_of_2(num_experts_per_tok),
        num_warps=1,  # pyright: ignore[reportCallIssue]  a few values per lane: reductions stay inside one warp
        **chain.options(logits),
    )  # fmt: skip
    return topk_ids, topk_weights


def _check(e: int, bias: Tensor | None, k: int, method: Method, n_group: int, m: int) -> None:
    biased = method == "noaux_tc"
    if biased != (bias is not None) or (
        bias is not None and (bias.shape != (e,) or bias.dtype != torch.float32 or not bias.is_contiguous())
    ):
        raise ValueError(f"{method} needs {f'a float32 bias [{e}]' if biased else 'no bias'}")
    groups, kept = (1, 1) if method == "greedy" else (n_group, m)
    if e % groups or not 0 < kept <= groups or not 0 < k <= e // groups * kept or (biased and kept < groups == e):
        raise ValueError(f"{k} of {e} experts from {kept} of {groups} groups cannot be chosen")


def add_norm_logits_ref(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch."""
    normed, total = norm.add_rms_norm_ref(x, residual, norm_weight, eps)
    return normed, total, normed.float() @ weight.float().T


def choose_ref(
    logits: Tensor, bias: Tensor | None, *, num_experts_per_tok: int, scoring_func: Scoring, topk_method: Method,
    n_group: int, topk_group: int, norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in plain torch."""
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
