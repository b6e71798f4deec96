"""Linear layers and norms. Weights are cast to the input's dtype: masters may be wider than the arithmetic, and
matrices may be FP8 in blocks of 128 x 128 with a factor each (V3 Sec 3.3.2)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benthic.kernels.quant import dequantise_blocks

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"  # suffix of the factors of an FP8 weight; blocks are multiplied by them, whatever the name says


class Quantisable(nn.Module):
    """A module whose matrices may be FP8: parameter `p` in E4M3, its factors in the buffer `p_scale_inv` (None while p
    is wider). Casts of the model leave both as they are. `PARTS`: of how many matrices, one above the other, with
    blocks of their own, each parameter consists."""

    PARTS: ClassVar[Mapping[str, int]]

    def factors(self, name: str) -> Tensor | None:
        """The factors of a parameter; None if it is not FP8."""
        return getattr(self, name + SCALE)

    def matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter in `dtype`, FP8 times its factors."""
        weight, factors = getattr(self, name), self.factors(name)
        if factors is None:
            return weight.to(dtype)
        return dequantise_blocks(in_parts(weight, factors), factors, dtype).reshape(weight.shape)

    def _apply(self, fn, recurse: bool = True):
        exact = {
            p: (getattr(self, p).detach(), factors) for p in self.PARTS if (factors := self.factors(p)) is not None
        }
        super()._apply(fn, recurse)
        for name, (weight, factors) in exact.items():
            cast: nn.Parameter = getattr(self, name)
            if cast.dtype != FP8:
                cast.data = weight.to(cast.device)
                setattr(self, name + SCALE, factors.to(cast.device))
        return self


def in_parts(weight: Tensor, factors: Tensor) -> Tensor:
    """weight [..., N, K] as the matrices [..., N', K] that its factors [..., N'/128, K/128] belong to."""
    return weight.unflatten(-2, (factors.shape[-3], -1)) if factors.dim() > weight.dim() else weight


class Linear(Quantisable):
    """y = x W^T (+ b). weight [out, in]; x [..., in] -> [..., out] in x's dtype."""

    PARTS: ClassVar = {"weight": 1}
    weight_scale_inv: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("weight" + SCALE, None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix("weight", x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32, returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
