"""Token dropping: a bound on what each device computes while training (V2 Sec 2.2.4).

Letters: N tokens, E routed experts, K chosen, D devices (expert groups).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benthic.model.gate import Choice


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What one pass may compute.

    factor: copies of tokens per device, in even shares; protected [N] tokens whose copies are never dropped; valid [N]
    leaves padding out of the budget and out of the computation, None where there is none.
    """

    factor: float
    protected: Tensor
    valid: Tensor | None = None

    def kept(self, choice: Choice, n_devices: int) -> Tensor:
        """Which copies are computed [N, K]: on each device those of highest affinity, until its budget is spent.

        Protected copies come first and stay even past the budget. A copy is one token at one expert; the paper, which
        says "tokens", leaves open whether a token loses one expert or all experts of the device.
        """
        n_experts, ids = choice.scores.shape[-1], choice.topk_ids
        valid = torch.ones_like(self.protected) if self.valid is None else self.valid
        budget = (valid.sum() * ids.shape[1] * self.factor / n_devices).ceil()  # no device loses by rounding
        worth = choice.scores.detach().gather(1, ids)
        worth = worth.masked_fill(self.protected[:, None], torch.inf).masked_fill(~valid[:, None], -torch.inf)
        device = (ids // (n_experts // n_devices)).reshape(-1)  # [N*K]
        order = worth.reshape(-1).argsort(descending=True, stable=True)
        order = order[device[order].argsort(stable=True)]  # device by device, best first
        counts = torch.bincount(device, minlength=n_devices)  # [D]
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[device[order]]
        return ((rank.view_as(ids) < budget) | self.protected[:, None]) & valid[:, None]
