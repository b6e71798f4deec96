"""Rotary position embedding: frequencies, their stretching for long contexts, and the rotation in both pair layouts.

Letters: B rows, T tokens, H heads, P rotary width.
"""

import math

import torch
from torch import Tensor

from benthic.model.config import ModelConfig, RopeScaling


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair [P/2] in float32: theta^(-2i/P) (RoFormer Eq 15), stretched as configured."""
    dim = config.rope_dim
    plain = config.rope_theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    stretch = _yarn if scaling.type == "yarn" else _llama3
    keep = stretch(scaling, plain, dim, config.rope_theta)  # [P/2] share of each frequency that stays as it is
    return plain / scaling.factor * (1 - keep) + plain * keep  # YaRN Eq 13


def _yarn(scaling: RopeScaling, plain: Tensor, dim: int, theta: float) -> Tensor:
    """A ramp over the dimension index, as in the released code (YaRN Sec 3.2 has it over the number of turns)."""

    def index(turns: float) -> float:
        """Dimension that turns so often within the original length."""
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), dim - 1)
    steps = torch.arange(dim // 2, device=plain.device, dtype=torch.float32)
    return 1 - ((steps - low) / max(high - low, 0.001)).clamp(0, 1)


def _llama3(scaling: RopeScaling, plain: Tensor, dim: int, theta: float) -> Tensor:
    """A ramp over the number of turns within the original length."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _mscale(factor: float, weight: float) -> float:
    """0.1 m ln s + 1: YaRN's sqrt(1/t) (YaRN Eq 15)."""
    return 0.1 * weight * math.log(factor) + 1


def turn_factor(config: ModelConfig) -> float:
    """Multiplies cos and sin. 1 for V2 and V3, whose two mscale settings are equal."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)


def logit_factor(config: ModelConfig) -> float:
    """Multiplies the softmax scale: both query and key carry mscale_all_dim, so it is squared (V2 Sec 3.1.4)."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """positions [B, T] or [T] -> cos, sin [..., T, P/2] in float32."""
    turn = positions.float().unsqueeze(-1) * frequencies(config, positions.device)  # [..., T, P/2]
    factor = turn_factor(config)
    return turn.cos() * factor, turn.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs (2i, 2i+1) of x [B, T, H, P] by cos, sin [B or 1, T, P/2] (RoFormer Eq 34): the layout of
    MLA checkpoints. Computed in float32, returned in x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, P/2] each
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B, T, 1, P/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with pairs (i, i + P/2): the layout of all other checkpoints."""
    first, second = x.float().chunk(2, -1)  # [B, T, H, P/2] each
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)
