"""Keeping experts busy: the auxiliary-loss-free bias, the balance losses, and the measure of imbalance.

Letters: B sequences, T tokens, E routed experts, K chosen, D devices (expert groups), M devices a token may reach.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benthic.model.gate import Choice


def expert_load(choice: Choice, n_experts: int, valid: Tensor | None) -> Tensor:
    """Tokens routed to each expert [E] int64. `valid` [N] bool leaves padding out."""
    ids = choice.topk_ids if valid is None else choice.topk_ids[valid]
    return torch.bincount(ids.reshape(-1), minlength=n_experts)


def update_bias(bias: Tensor, load: Tensor, speed: float, rule: Literal["sign", "proportional"] = "sign") -> None:
    """b_i += speed * sign(e_i) with e_i = mean load - load_i, in place (V3 Sec 2.1.2; Loss-Free Alg 1).

    load [E] of the whole step. The proportional rule takes e_i itself, in units of the mean load.
    """
    load = load.to(torch.float32)
    error = load.mean() - load
    bias.add_(speed * (error.sign() if rule == "sign" else error / load.mean().clamp(min=1)))


def device_load(load: Tensor, groups: int) -> Tensor:
    """Tokens' copies that each device computes, for experts spread over `groups` devices. [..., E] -> [..., D]."""
    return load.unflatten(-1, (groups, -1)).sum(-1)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio per layer: (max load - mean load) / mean load (Loss-Free Eq 4). load [..., E] -> [...].

    Of one step's load it is MaxVio_batch, of a whole validation set's MaxVio_global.
    """
    load = load.to(torch.float32)
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean


def chosen_experts(choice: Choice) -> Tensor:
    """Which experts each token visits [N, E], ones and zeros."""
    return torch.zeros_like(choice.scores).scatter_(-1, choice.topk_ids, 1.0)


def unbiased_top_k(choice: Choice) -> Tensor:
    """Which experts it would visit by unbiased scores alone [N, E]: what V3's printed f counts (V3 Eq 18)."""
    best = choice.scores.topk(choice.topk_ids.shape[-1], -1).indices
    return torch.zeros_like(choice.scores).scatter_(-1, best, 1.0)


@dataclass
class Balance:
    """What every balance loss is made of, for B sequences of one layer.

    hits [B, T, E] ones where a token counts for an expert (0 for padding), tokens [B, 1] valid ones,
    p [B, E] mean affinity P_i (V2 Eq 25, V3 Eq 19-20: scores normalised over the experts)
    """

    hits: Tensor
    tokens: Tensor
    p: Tensor

    @classmethod
    def of(cls, choice: Choice, hits: Tensor, shape: tuple[int, int], valid: Tensor | None) -> "Balance":
        """shape = (B, T), with (1, B*T) for batch-wise losses; hits [B*T, E]; valid [B*T] leaves padding out."""
        b, t = shape
        scores = choice.scores.view(b, t, -1)
        keep = scores.new_ones(b, t, 1) if valid is None else valid.view(b, t, 1).to(scores.dtype)
        tokens = keep.sum(1).clamp(min=1)  # [B, 1]
        share = scores / scores.sum(-1, keepdim=True)
        return cls(hits.view(b, t, -1) * keep, tokens, (share * keep).sum(1) / tokens)

    def frequency(self, k: int) -> Tensor:
        """f [B, E] = E / (K T) hits: 1 for an expert that gets its even share (V2 Eq 24, V3 Eq 18)."""
        return self.p.shape[-1] / (k * self.tokens) * self.hits.sum(1)

    def experts(self, k: int) -> Tensor:
        """Sum of f_i P_i [B]: L_Exp or L_Bal without its factor (V2 Eq 23, V3 Eq 17)."""
        return (self.frequency(k) * self.p).sum(-1)

    def devices(self, k: int, groups: int) -> Tensor:
        """L_Dev without its factor [B]: f averaged and P summed over each device's experts (V2 Eq 26-28)."""
        f = self.frequency(k).unflatten(-1, (groups, -1)).mean(-1)  # [B, D]
        return (f * self.p.unflatten(-1, (groups, -1)).sum(-1)).sum(-1)

    def communication(self, groups: int, limit: int) -> Tensor:
        """L_Comm without its factor [B]: f counts tokens sent to a device, 1 at limit * T (V2 Eq 29-31)."""
        sent = self.hits.unflatten(-1, (groups, -1)).amax(-1).sum(1)  # [B, D]
        f = groups / (limit * self.tokens) * sent
        return (f * self.p.unflatten(-1, (groups, -1)).sum(-1)).sum(-1)


def sequence_balance_loss(choice: Choice, shape: tuple[int, int], valid: Tensor | None) -> Tensor:
    """V3's complementary loss for each sequence [B], without alpha (V3 Eq 17-20): f counts the top-K of the unbiased
    scores, as printed."""
    with torch.no_grad():
        hits = unbiased_top_k(choice)
    return Balance.of(choice, hits, shape, valid).experts(choice.topk_ids.shape[-1])


def importance_loss(choice: Choice, valid: Tensor | None) -> Tensor:
    """Squared coefficient of variation of the experts' importance, the sum of their gate values over all tokens of the
    batch (Shazeer et al. 2017, Eq 6-7), a scalar: what balanced mixtures before these papers."""
    weights = choice.weights if valid is None else choice.weights * valid.unsqueeze(1)
    importance = torch.zeros_like(choice.scores).scatter(-1, choice.topk_ids, weights).sum(0)  # [E]
    return (importance / importance.mean().clamp(min=1e-20) - 1).square().mean()
