"""The dense feed-forward network: SwiGLU."""

import torch.nn.functional as F
from torch import Tensor, nn

from benthic.model.capacity import Capacity
from benthic.model.gate import Choice
from benthic.model.linear import Linear


class FFN(nn.Module):
    """down(silu(gate(x)) * up(x)); x [..., d] -> [..., d].

    It has the same three phases as the mixture of experts, so that a block need not know which it holds.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def dispatch(self, x: Tensor, capacity: Capacity | None = None) -> Tensor:
        """Nothing to send: every token stays, and there is room for all."""
        return x

    def experts(self, sent: Tensor) -> Tensor:
        return self(sent)

    def combine(self, sent: Tensor, y: Tensor) -> tuple[Tensor, Choice | None]:
        return y, None
