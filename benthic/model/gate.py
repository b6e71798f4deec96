"""The gate: which experts a token visits, and with what weight (V3 Eq 13-16), always in float32.

Letters: N tokens, d hidden, E routed experts, K chosen, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.model.config import ModelConfig


@dataclass
class Choice:
    """scores [N, E] affinities s, topk_ids [N, K] chosen experts, weights [N, K] gate values g.

    kept [N, K] is false for copies that were dropped for want of room, None where nothing can be dropped.
    """

    scores: Tensor
    topk_ids: Tensor
    weights: Tensor
    kept: Tensor | None = None


TEMPERATURE = 0.07  # divides cosines, which would else lie too close together for a softmax or sigmoid to tell apart


def dot(x: Tensor, centroids: Tensor) -> Tensor:
    """x [N, d], centroids [E, d] -> u e_i [N, E], as in the papers."""
    return F.linear(x, centroids)


def cosine(x: Tensor, centroids: Tensor) -> Tensor:
    """x [N, d], centroids [E, d] -> their angles' cosines over the temperature [N, E]: norms play no part."""
    return F.linear(F.normalize(x, dim=-1), F.normalize(centroids, dim=-1)) / TEMPERATURE


LIKENESS = {"dot": dot, "cosine": cosine}
AFFINITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),  # over the routed experts
}


class Gate(nn.Module):
    """Affinity, then the choice of experts, then their weights. With `noaux_tc` a bias takes part in the choice, and
    never in the weights; other methods have none."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.likeness, self.affinity = LIKENESS[config.gate_affinity], AFFINITIES[config.scoring_func]
        biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if biased else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse: bool = True):
        """A cast of the model leaves the bias in float32, bit for bit: in bfloat16 its step of 0.001 would vanish."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        cast = self.e_score_correction_bias
        if exact is not None and cast is not None and cast.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(cast.device)
        return self

    def forward(self, x: Tensor) -> Choice:
        c = self.config
        scores = self.affinity(self.likeness(x.float(), self.weight.float()))  # [N, E] s, V3 Eq 15; V2 Eq 22
        with torch.no_grad():
            bias = self.e_score_correction_bias
            topk_ids = node_limited_top_k(scores if bias is None else scores + bias, c)  # V3 Eq 16
        weights = scores.gather(1, topk_ids)  # [N, K] g', from unbiased scores
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # g, V3 Eq 13
        return Choice(scores, topk_ids, weights * c.routed_scaling_factor)


def node_limited_top_k(scores: Tensor, config: ModelConfig) -> Tensor:
    """scores [N, E] -> ids [N, K]: keep the M best groups, then top-K inside.

    A group is worth its best score (V2 Sec 2.2.2), or the sum of its two best (V3 Sec 2.1.2). Losing groups are masked
    with -inf, not 0: biased scores may be negative.
    """
    if config.topk_method != "greedy" and config.topk_group < config.n_group:
        groups = scores.unflatten(-1, (config.n_group, -1))  # [N, G, E/G]
        counted = 2 if config.topk_method == "noaux_tc" else 1
        best = groups.topk(counted, -1).values.sum(-1).topk(config.topk_group, -1).indices  # [N, M]
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)  # [N, G]
        scores = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    return scores.topk(config.num_experts_per_tok, -1).indices
