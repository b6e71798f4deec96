"""From rewards to advantages.

Letters: Q questions, G answers per question.
"""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to the standard deviation; the papers leave the case of equal rewards open


def group_relative(rewards: Tensor) -> Tensor:
    """(r - mean r) / std r within each group (DeepSeekMath Sec 4.1.2). rewards [Q, G] -> [Q, G].

    The population standard deviation. A group whose rewards are all equal teaches nothing: its advantages are 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + EPSILON)


def without_spread(rewards: Tensor) -> Tensor:
    """Share of groups whose rewards are all equal; 0-d."""
    return (rewards == rewards[:, :1]).all(1).to(torch.float32).mean()
