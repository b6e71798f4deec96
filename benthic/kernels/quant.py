"""Block-scaled FP8: weights in 128 x 128 blocks of E4M3 with one float32 factor each, activations in blocks of 128
of a row (V3 Sec 3.3.2).

The released name of the factor, `weight_scale_inv`, misleads: it is what the block is multiplied by.
Letters: N rows, K columns, b block size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
SMALLEST = 1e-4  # floor of a block's largest magnitude, as in the released code: an empty block has a finite factor


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> (E4M3 [..., N, K], factors [..., ceil(N/b), ceil(K/b)] float32). Ragged edges are blocks of
    their own."""
    n, k = weight.shape[-2:]
    blocks = _blocks(weight.float())  # [..., n, b, k, b]
    scale = blocks.abs().amax((-3, -1)).clamp(min=SMALLEST) / E4M3_MAX  # [..., n, k]
    quantised = (blocks / scale.unsqueeze(-1).unsqueeze(-3)).clamp(-E4M3_MAX, E4M3_MAX)
    return _whole(quantised)[..., :n, :k].to(torch.float8_e4m3fn), scale


def dequantise_blocks(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [..., N, K] that E4M3 blocks and their factors stand for."""
    *stack, n, k = weight.shape
    expected = (*stack, -(-n // BLOCK), -(-k // BLOCK))
    if tuple(scale_inv.shape) != expected:
        shape = " x ".join(map(str, weight.shape))
        raise ValueError(f"factors have shape {tuple(scale_inv.shape)}, a weight of {shape} needs {expected}")
    blocks = _blocks(weight.float()) * scale_inv.float().unsqueeze(-1).unsqueeze(-3)
    return _whole(blocks)[..., :n, :k].to(dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] -> (E4M3 [N, K], factors [N, ceil(K/b)] float32)."""
    k = x.shape[1]
    blocks = F.pad(x.float(), (0, -k % BLOCK)).unflatten(1, (-1, BLOCK))  # [N, k, b]
    scale = blocks.abs().amax(2).clamp(min=SMALLEST) / E4M3_MAX
    quantised = (blocks / scale[:, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return quantised.flatten(1)[:, :k].to(torch.float8_e4m3fn), scale


def dequantise_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 activations [N, K] that E4M3 blocks and their factors stand for."""
    return codes.float() * scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]


def _blocks(matrix: Tensor) -> Tensor:
    """[..., N, K], zero-padded, as [..., N/b, b, K/b, b]."""
    n, k = matrix.shape[-2:]
    padded = F.pad(matrix, (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def _whole(blocks: Tensor) -> Tensor:
    return blocks.flatten(-2, -1).flatten(-3, -2)
