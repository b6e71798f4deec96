"""One transformer layer: x + attention(norm x), then x + feed-forward(norm x).

Attention, dispatch, experts and combine are four methods, so that a pipeline schedule may interleave two chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benthic.model import rope
from benthic.model.attention import GQA
from benthic.model.cache import CacheView
from benthic.model.capacity import Capacity
from benthic.model.config import ModelConfig
from benthic.model.ffn import FFN
from benthic.model.gate import Choice
from benthic.model.linear import RMSNorm
from benthic.model.mla import MLA
from benthic.model.moe import MoE, Sent
from benthic.parallel.dispatch import Dispatcher


@dataclass
class Context:
    """What every layer of one forward pass shares.

    positions [B, T], cos and sin [B, T, P/2], mask [B, 1, T, T] or None for plain causal, view of the cache or None,
    capacity of the devices or None for no bound.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    view: CacheView | None
    capacity: Capacity | None = None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        ids: Tensor,
        positions: Tensor | None,
        segments: Tensor | None,
        view: CacheView | None,
        capacity: Capacity | None = None,
    ) -> "Context":
        """Build it once per pass. ids [B, T]; positions default to 0..T-1; segments keep documents apart."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)  # [1, T]
        cos, sin = rope.angles(positions, config)
        mask = None
        if segments is not None:
            same = segments.unsqueeze(2) == segments.unsqueeze(1)  # [B, T, T]; padding sees padding, so no row is empty
            mask = same.tril().unsqueeze(1)
        return cls(positions, cos, sin, mask, view, capacity)


class Block(nn.Module):
    """Layer number `layer`: dense below `first_k_dense_replace`, mixture of experts from there on."""

    def __init__(self, config: ModelConfig, layer: int, dispatcher: Dispatcher):
        super().__init__()
        dense = layer < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GQA(config, layer) if config.kv_lora_rank is None else MLA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FFN(config.hidden_size, config.intermediate_size) if dense else MoE(config, dispatcher)

    def attention(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, d] -> x + attention(norm x)."""
        normed = self.input_layernorm(x)
        if context.view is None:
            return x + self.self_attn.expanded(normed, context.cos, context.sin, context.mask)
        return x + self.self_attn.cached(normed, context.cos, context.sin, context.positions, context.view)

    def dispatch(self, x: Tensor, context: Context) -> Tensor | Sent:
        """Send the normed tokens to their experts."""
        return self.mlp.dispatch(self.post_attention_layernorm(x), context.capacity)

    def experts(self, sent: Tensor | Sent) -> Tensor:
        """Run the experts on what arrived."""
        return self.mlp.experts(sent)  # type: ignore[arg-type]

    def combine(self, x: Tensor, sent: Tensor | Sent, y: Tensor) -> tuple[Tensor, Choice | None]:
        """Bring expert outputs home and add them to the residual stream."""
        out, choice = self.mlp.combine(sent, y)  # type: ignore[arg-type]
        return x + out, choice

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Choice | None]:
        x = self.attention(x, context)
        sent = self.dispatch(x, context)
        return self.combine(x, sent, self.experts(sent))
