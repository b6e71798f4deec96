"""From rewards to advantages.

Letters: Q questions, G answers per question.
"""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the standard deviation; the papers leave the case of equal rewards open


def group_relative(rewards: Tensor) -> Tensor:
    """(r - mean r) / std r within each group (DeepSeekMath Sec 4.1.2). rewards [Q, G] -> [Q, G].

    The population standard deviation. A group whose rewards are all equal teaches nothing: its advantages are exactly
    0, also where rounding puts the mean beside them.
    """
    centred = (rewards - rewards.mean(1, keepdim=True)) * _spread(rewards)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + EPSILON)


def without_spread(rewards: Tensor) -> Tensor:
    """Share of groups whose rewards are all equal; 0-d."""
    return 1 - _spread(rewards).to(torch.float32).mean()


def _spread(rewards: Tensor) -> Tensor:
    """Which groups have different rewards [Q, 1] bool."""
    return (rewards != rewards[:, :1]).any(1, keepdim=True)
