"""The latent cache: per token and layer, one compressed key-value vector and one shared rotary key (V3 Eq 1, 3).

Here live the bytes. Which slot belongs to whom is bookkeeping in integers, and lives in inference.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benthic.base.errors import InputError
from benthic.kernels import latent
from benthic.kernels.latent import Latents, empty_latents
from benthic.model.config import ModelConfig

CacheFormat = Literal["auto", "fp8", "int6"]


class LatentCache:
    """layers[l] holds `num_slots` rows: c_kv of R elements, in `format`, and k_rope of P elements in `dtype`.

    Plain attention keeps keys and values where MLA keeps c_kv, and no rotary key apart from them. Layer L + k belongs
    to multi-token prediction module k. Slot 0 takes padding.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        device: torch.device | str,
        dtype: torch.dtype,
        format: CacheFormat = "auto",
    ):
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        rope = 0 if config.kv_lora_rank is None else config.qk_rope_head_dim
        width = config.cache_width - rope
        if format != "auto" and (not rope or width < 64 or width & (width - 1)):
            raise InputError(
                f"kv_cache_dtype={format!r} with kv_lora_rank={config.kv_lora_rank} -> use auto, or an MLA "
                "model whose kv_lora_rank is a power of two from 64"
            )
        self.layers = [empty_latents(format, num_slots, width, rope, dtype, device) for _ in range(layers)]


def bytes_per_token(config: ModelConfig, itemsize: int, format: CacheFormat = "auto") -> int:
    """Cache bytes of one token over all layers and prediction modules; `itemsize` is that of the compute dtype."""
    rope = 0 if config.kv_lora_rank is None else config.qk_rope_head_dim
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return layers * latent.bytes_per_token(format, config.cache_width - rope, rope, itemsize)


@dataclass
class CacheView:
    """What one forward pass writes and reads.

    write [B, Q] slots that receive the latents of the new tokens (padding: 0)
    table [B, S] slot of context position 0..S-1 of each row; past its context, a slot of its own, not another row's:
                 masked weights are 0, but 0 times a NaN would still spread
    """

    cache: LatentCache
    write: Tensor
    table: Tensor

    def exchange(self, layer: int, c_kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Write c_kv [B, Q, R] and k_rope [B, Q, P] of `layer`, then read the context back [B, S, R], [B, S, P]."""
        latents: Latents = self.cache.layers[layer]
        latents.write(self.write.reshape(-1), c_kv.flatten(0, 1), k_rope.flatten(0, 1))
        return latents.read(self.table, c_kv.dtype)
