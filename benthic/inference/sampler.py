"""Logits to tokens, row by row independent: what a row chooses depends on its logits, its parameters and its own random
number, never on its neighbours.

Letters: B rows, K positions per row (2 when a draft is verified), V vocabulary.
"""

import torch
from torch import Tensor

from benthic.inference.batch import Sampling


def uniforms(seed: int, count: int) -> list[float]:
    """A request's random numbers in [0, 1), one per answer position. A longer list starts with the shorter one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def choose(logits: Tensor, sampling: Sampling | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """float32 logits [B, K, V] -> tokens [B, K] below `vocab_size` and their log softmax(logits) [B, K].

    Rows that sample use the first of the K positions; the rest hold the likeliest token.
    """
    allowed = logits[..., :vocab_size]
    tokens = allowed.argmax(-1)  # [B, K]
    if sampling is not None:
        sampled = sample(allowed[:, 0], sampling)  # [B]
        tokens[:, 0] = torch.where(sampling.greedy, tokens[:, 0], sampled)
    scores = logits.gather(2, tokens.unsqueeze(2)).squeeze(2) - logits.logsumexp(-1)  # [B, K]
    return tokens, scores


def sample(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [B, V] -> tokens [B] by the inverse distribution function, in float64 and in vocabulary order.

    The largest logit is subtracted before the division, so that no temperature above 0 can overflow. The largest
    weight is then 1, and a random number below 1 never rounds up to the whole sum.
    """
    shifted = logits.double() - logits.amax(-1, keepdim=True)
    weights = (shifted / sampling.temperature.unsqueeze(1)).exp()  # [B, V], the largest is 1
    if sampling.truncated:
        weights = weights * _kept(weights, sampling.top_k, sampling.top_p)
    cumulative = weights.cumsum(-1)  # [B, V]
    target = sampling.uniform.unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)  # first with cumulative > target: its weight is not 0
    return tokens.clamp(max=logits.shape[1] - 1).squeeze(1)  # past the end only if logits are NaN: an id to report


def _kept(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """[B, V] bool: the top_k likeliest tokens, and of these the likeliest whose predecessors hold less than top_p of
    their mass. Equal weights rank by token id."""
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    everything = torch.full_like(top_k, weights.shape[1])
    in_k = rank < torch.where(top_k > 0, top_k, everything).unsqueeze(1)  # [B, V]
    cumulative = (ranked * in_k).cumsum(-1)
    before = cumulative - ranked * in_k
    in_p = (before < top_p.unsqueeze(1) * cumulative[:, -1:]) | (top_p.unsqueeze(1) >= 1)
    return torch.zeros_like(in_k).scatter_(1, order, in_k & in_p)
