"""Learning rate as a pure function of the tokens seen."""

import math

from benthic.train.config import TrainConfig


def learning_rate(config: TrainConfig, tokens: int) -> float:
    """Rate for the update that starts after `tokens` tokens of this stage."""
    warmup = config.warmup_steps * config.tokens_per_step
    if tokens < warmup:
        return config.learning_rate * (tokens + config.tokens_per_step) / warmup
    progress = tokens / (config.max_steps * config.tokens_per_step)
    match config.lr_scheduler_type:
        case "multi_step":  # V1 Sec 2.3
            factor = 1.0 if progress < 0.8 else 0.316 if progress < 0.9 else 0.1
        case "cosine":
            factor = 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0)))
        case "linear":
            factor = max(1.0 - progress, 0.0)
        case "constant":
            factor = 1.0
    return config.learning_rate * factor
