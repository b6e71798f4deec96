"""The gate: which experts a token visits, and with what weight (V3 Eq 13-16), always in float32.

Letters: N tokens, d hidden, E routed experts, K chosen, G groups.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.model.config import ModelConfig


@dataclass
class Choice:
    """scores [N, E] affinities s, topk_ids [N, K] chosen experts, weights [N, K] gate values g."""

    scores: Tensor
    topk_ids: Tensor
    weights: Tensor


class Gate(nn.Module):
    """Sigmoid gate with node-limited top-k. The bias decides who is chosen and never touches the weights."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def _apply(self, fn, recurse: bool = True):
        """A cast of the model leaves the bias in float32, bit for bit: in bfloat16 its step of 0.001 would vanish."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Tensor) -> Choice:
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()  # [N, E] s, V3 Eq 15
        with torch.no_grad():
            topk_ids = node_limited_top_k(scores + self.e_score_correction_bias, c)  # V3 Eq 16
        weights = scores.gather(1, topk_ids)  # [N, K] g', from unbiased scores
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # g, V3 Eq 13
        return Choice(scores, topk_ids, weights * c.routed_scaling_factor)


def node_limited_top_k(scores: Tensor, config: ModelConfig) -> Tensor:
    """scores [N, E] -> ids [N, K]: keep the M groups with the highest sum of their two best scores, then top-K inside.

    Losing groups are masked with -inf, not 0: biased scores may be negative (V3 Sec 2.1.2, node-limited routing).
    """
    if config.topk_group < config.n_group:
        groups = scores.unflatten(-1, (config.n_group, -1))  # [N, G, E/G]
        best = groups.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices  # [N, M]
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)  # [N, G]
        scores = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
    return scores.topk(config.num_experts_per_tok, -1).indices
