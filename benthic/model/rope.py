"""Rotary position embedding in the checkpoints' layout: neighbouring pairs (2i, 2i+1) turn together (RoFormer Eq 34).

Letters: B rows, T tokens, H heads, P rotary width.
"""

import torch
from torch import Tensor


def angles(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """positions [B, T] or [T] -> cos, sin [..., T, P/2] in float32. Frequency i is theta^(-2i/P)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)  # [P/2]
    turn = positions.float().unsqueeze(-1) * frequencies  # [..., T, P/2]
    return turn.cos(), turn.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, T, H, P] by cos, sin [B or 1, T, P/2]; computed in float32, returned in x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, T, H, P/2] each
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B, T, 1, P/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
