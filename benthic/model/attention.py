"""Plain attention with key-value heads: MHA, GQA and MQA, what V1 uses and what the papers compare MLA with.

Letters: B rows, T tokens (Q new, S in context), H heads, G key-value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.model.cache import CacheView
from benthic.model.config import ModelConfig
from benthic.model.linear import Linear
from benthic.model.rope import rotate_halves


class GQA(nn.Module):
    """x [B, T, d] -> [B, T, d]. `layer` is the row of the cache this module owns; it caches keys and values."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.layer = config, layer
        self.heads, self.groups, self.width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        bias = c.model_type == "qwen2"
        self.q_proj = Linear(c.hidden_size, self.heads * self.width, bias)
        self.k_proj = Linear(c.hidden_size, self.groups * self.width, bias)
        self.v_proj = Linear(c.hidden_size, self.groups * self.width, bias)
        self.o_proj = Linear(self.heads * self.width, c.hidden_size)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> q [B, T, H, D] and k [B, T, G, D], both turned, v [B, T, G, D]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v

    def expanded(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention over x itself, or as `mask` [B, 1, T, T] allows."""
        q, k, v = (t.transpose(1, 2) for t in self.project(x, cos, sin))  # [B, H or G, T, D]
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(-2))

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, view: CacheView) -> Tensor:
        """Attention of Q new tokens at `positions` [B, Q] over the cached context, which gets them first."""
        q, k, v = self.project(x, cos, sin)
        both = torch.cat((k, v), -1).flatten(-2)  # [B, Q, G * 2D]
        context, _ = view.exchange(self.layer, both, both[..., :0])  # [B, S, G * 2D]
        k, v = context.unflatten(-1, (self.groups, -1)).chunk(2, -1)  # [B, S, G, D] each
        q = q.unflatten(2, (self.groups, -1))  # [B, Q, G, H/G, D]
        scores = torch.einsum("bqgnd,bsgd->bgnqs", q, k).float() * self.width**-0.5
        visible = torch.arange(context.shape[1], device=x.device) <= positions.unsqueeze(-1)  # [B, Q, S]
        weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).to(x.dtype)
        return self.o_proj(torch.einsum("bgnqs,bsgd->bqgnd", weights, v).flatten(2))
