"""DeepSeekMoE: shared experts that see every token, routed experts that the gate chooses (V3 Eq 12).

Letters: N tokens, d hidden, E routed experts, I expert width, K chosen.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.model.capacity import Capacity
from benthic.model.config import ModelConfig
from benthic.model.ffn import FFN
from benthic.model.gate import Choice, Gate
from benthic.model.linear import SCALE, Quantisable
from benthic.parallel.dispatch import Dispatcher, Routed


class Experts(Quantisable):
    """All routed experts as two stacked tensors, gate above up. x [N*K, d] sorted by expert, offs [E] -> [N*K, d]."""

    PARTS: ClassVar = {"gate_up_proj": 2, "down_proj": 1}
    gate_up_proj_scale_inv: Tensor | None
    down_proj_scale_inv: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        e, d, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, i))
        for name in self.PARTS:
            self.register_buffer(name + SCALE, None)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        gate_up = self.matrix("gate_up_proj", x.dtype).transpose(-2, -1)  # [E, d, 2I]
        gate, up = F.grouped_mm(x, gate_up, offs=offs).chunk(2, -1)  # [N*K, I] each
        down = self.matrix("down_proj", x.dtype).transpose(-2, -1)  # [E, I, d]
        return F.grouped_mm(F.silu(gate) * up, down, offs=offs)


@dataclass
class Sent:
    """Tokens on their way: the input [..., d], the gate's choice, and the routed copies."""

    x: Tensor
    choice: Choice
    routed: Routed


class MoE(nn.Module):
    """x [..., d] -> [..., d], in three phases that a pipeline schedule may interleave with another chunk's."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher):
        super().__init__()
        self.dispatcher, self.n_experts, self.n_devices = dispatcher, config.n_routed_experts, config.n_group
        self.gate = Gate(config)
        self.routed_experts = Experts(config)
        self.shared_experts = FFN(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def dispatch(self, x: Tensor, capacity: Capacity | None = None) -> Sent:
        flat = x.reshape(-1, x.shape[-1])  # [N, d]
        choice = self.gate(flat)
        if capacity is not None:
            choice.kept = capacity.kept(choice, self.n_devices)
        return Sent(x, choice, self.dispatcher.dispatch(flat, choice.topk_ids, self.n_experts, choice.kept))

    def experts(self, sent: Sent) -> Tensor:
        return self.routed_experts(sent.routed.x, sent.routed.offs)

    def combine(self, sent: Sent, y: Tensor) -> tuple[Tensor, Choice]:
        routed = self.dispatcher.combine(y, sent.routed, sent.choice.weights).view_as(sent.x)
        return self.shared_experts(sent.x) + routed, sent.choice
