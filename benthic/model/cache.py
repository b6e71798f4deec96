"""The latent cache: per token and layer, one compressed key-value vector and one shared rotary key (V3 Eq 1, 3).

Here live the bytes. Which slot belongs to whom is bookkeeping in integers, and lives in inference.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benthic.model.config import ModelConfig


class LatentCache:
    """latents [layers, slots, cache_width]: R + P elements for MLA, keys and values for plain attention.

    Layer L + k belongs to multi-token prediction module k. Slot 0 takes padding.
    """

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device | str, dtype: torch.dtype):
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.latents = torch.zeros(layers, num_slots, config.cache_width, device=device, dtype=dtype)


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

    def exchange(self, layer: int, latent: Tensor) -> Tensor:
        """Write latent [B, Q, R+P] of `layer`, then read the whole context back [B, S, R+P]."""
        slots = self.cache.latents[layer]
        slots[self.write.reshape(-1)] = latent.reshape(-1, latent.shape[-1]).to(slots.dtype)
        return slots[self.table]
