"""AdamW with decay on matrices only."""

import torch

from benthic.model.transformer import Transformer
from benthic.train.config import TrainConfig


def adamw(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """Two groups: everything with two or more dimensions decays, norms do not. Gate biases are no parameters at all."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
