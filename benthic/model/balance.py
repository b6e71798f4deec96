"""Keeping experts busy: auxiliary-loss-free bias, the complementary sequence-wise loss, and the measure of imbalance.

Letters: B sequences, T tokens, E routed experts, K chosen.
"""

import torch
from torch import Tensor

from benthic.model.gate import Choice


def expert_load(choice: Choice, n_experts: int, valid: Tensor | None) -> Tensor:
    """Tokens routed to each expert [E] int64. `valid` [N] bool leaves padding out."""
    ids = choice.topk_ids if valid is None else choice.topk_ids[valid]
    return torch.bincount(ids.reshape(-1), minlength=n_experts)


def update_bias(bias: Tensor, load: Tensor, speed: float) -> None:
    """b_i += speed * sign(mean load - load_i), in place (V3 Sec 2.1.2; Loss-Free Alg 1). load [E] of the whole step."""
    load = load.to(torch.float32)
    bias.add_(speed * torch.sign(load.mean() - load))


def max_violation(load: Tensor) -> Tensor:
    """MaxVio per layer: (max load - mean load) / mean load (Loss-Free Eq 4). load [..., E] -> [...]."""
    load = load.to(torch.float32)
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean


def sequence_balance_loss(choice: Choice, shape: tuple[int, int], valid: Tensor | None) -> Tensor:
    """Sum over experts of f_i P_i for each sequence [B] (V3 Eq 17-20, without alpha).

    f counts the top-K of the unbiased scores, as printed (V3 Eq 18). shape = (B, T); valid [B*T] leaves padding out.
    """
    (b, t), (e, k) = shape, (choice.scores.shape[-1], choice.topk_ids.shape[-1])
    scores = choice.scores.view(b, t, e)
    keep = scores.new_ones(b, t, 1) if valid is None else valid.view(b, t, 1).to(scores.dtype)
    tokens = keep.sum(1).clamp(min=1)  # [B, 1]
    with torch.no_grad():
        hits = torch.zeros_like(scores).scatter_(-1, scores.topk(k, -1).indices, 1.0)
        f = e / (k * tokens) * (hits * keep).sum(1)  # [B, E], V3 Eq 18
    share = scores / scores.sum(-1, keepdim=True)  # s', V3 Eq 19
    p = (share * keep).sum(1) / tokens  # [B, E], V3 Eq 20
    return (f * p).sum(-1)
