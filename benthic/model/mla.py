"""Multi-head latent attention (V3 Eq 1-11), in two forms with equal results, side by side.

`expanded` decompresses keys and values for every head: for training. `cached`, the absorbed form, folds the two
decompressions into query and output, so that attention reads only the latent cache: for decoding.

Letters: B rows, T tokens (Q new, S in context), H heads, R kv_lora_rank, P rotary, D qk_nope, V value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.base.errors import InputError
from benthic.model.cache import CacheView
from benthic.model.config import ModelConfig
from benthic.model.linear import Linear, RMSNorm
from benthic.model.rope import logit_factor, rotate


class MLA(nn.Module):
    """x [B, T, d] -> [B, T, d]. `layer` is the row of the latent cache this module owns."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.layer = config, layer
        if c.kv_lora_rank is None:
            raise InputError("kv_lora_rank=None -> MLA needs the width of its latent")
        self.heads, self.latent_sizes = c.num_attention_heads, [c.kv_lora_rank, c.qk_rope_head_dim]
        self.query_sizes, self.value_size = [c.qk_nope_head_dim, c.qk_rope_head_dim], c.v_head_dim
        self.scale = c.qk_head_dim**-0.5 * logit_factor(c)
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, self.heads * c.qk_head_dim)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
            self.q_b_proj = Linear(c.q_lora_rank, self.heads * c.qk_head_dim)
        self.compressed = c.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = Linear(c.kv_lora_rank, self.heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = Linear(self.heads * c.v_head_dim, c.hidden_size)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """-> q^C [B, T, H, D], q^R [B, T, H, P], the latter already turned."""
        if self.compressed:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))  # from c^Q, V3 Eq 6
        else:
            q = self.q_proj(x)
        q = q.unflatten(-1, (self.heads, -1))  # [B, T, H, D + P]
        q_nope, q_rope = q.split(self.query_sizes, -1)  # q^C and q^R, V3 Eq 7-8
        return q_nope, rotate(q_rope, cos, sin)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """-> c^KV [B, T, R] after its norm, k^R [B, T, P] turned: everything that is ever cached."""
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split(self.latent_sizes, -1)  # V3 Eq 1, 3
        return self.kv_a_layernorm(c_kv), rotate(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)

    def expanded(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Causal attention over x itself, or as `mask` [B, 1, T, T] allows."""
        q_nope, q_rope = self.queries(x, cos, sin)
        c_kv, k_rope = self.latents(x, cos, sin)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.heads, -1))  # [B, T, H, D + V]
        k_nope, v = kv.split([self.query_sizes[0], self.value_size], -1)  # k^C and v^C, V3 Eq 2, 5
        q = torch.cat((q_nope, q_rope), -1)  # [B, T, H, D + P], V3 Eq 9
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand_as(q_rope)), -1)  # V3 Eq 4
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, .]
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.scale)  # V3 Eq 10
        return self.o_proj(o.transpose(1, 2).flatten(-2))  # V3 Eq 11

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, view: CacheView) -> Tensor:
        """Absorbed attention of Q new tokens at `positions` [B, Q] over the cached context, which gets them first."""
        q_nope, q_rope = self.queries(x, cos, sin)
        c_kv, k_rope = view.exchange(self.layer, *self.latents(x, cos, sin))  # [B, S, R], [B, S, P]
        w_uk, w_uv = (
            self.kv_b_proj.weight.to(x.dtype)
            .unflatten(0, (self.heads, -1))
            .split([self.query_sizes[0], self.value_size], 1)
        )  # [H, D, R], [H, V, R]
        q = torch.cat((torch.einsum("bqhd,hdr->bqhr", q_nope, w_uk), q_rope), -1)  # W^UK absorbed into the query
        scores = torch.einsum("bqhc,bsc->bhqs", q, torch.cat((c_kv, k_rope), -1)).float() * self.scale  # [B, H, Q, S]
        visible = torch.arange(c_kv.shape[1], device=x.device) <= positions.unsqueeze(-1)  # [B, Q, S]
        weights = scores.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1).to(x.dtype)
        o_latent = torch.einsum("bhqs,bsr->bqhr", weights, c_kv)
        return self.o_proj(torch.einsum("bqhr,hvr->bqhv", o_latent, w_uv).flatten(-2))  # W^UV absorbed into the output
