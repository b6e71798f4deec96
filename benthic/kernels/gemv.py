"""A matrix times very few vectors: every row of the matrix is read once, by a program of its own and a few neighbours.

Libraries' products are made for tiles and leave half of the memory's speed unused at one token. Bytes: the matrix;
memory-bound. Float32 inside, summed in a fixed order; tokens do not see each other.

Letters: N tokens, d inputs, M outputs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FEW = 4  # tokens up to which a matrix is better read row by row


@triton.jit
def _rows(x, weight, out, stride_x, stride_w, M, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    token, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        at = weight + m.to(tl.int64)[:, None] * stride_w + d[None, :]
        w = tl.load(at, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        row = tl.load(x + token * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.sum(w * row[None, :], 1)
    tl.store(out + token * M + m, total.to(out.dtype.element_ty), mask=m < M)


def linear(x: Tensor, weight: Tensor, *, block: int = 4, chunk: int = 1024, num_warps: int = 4) -> Tensor:
    """x [N, d], weight [M, d], rows contiguous -> x W^T [N, M] in x's dtype."""
    if len(x) > FEW:
        return F.linear(x, weight)
    (n, d), m = x.shape, len(weight)
    if weight.shape[1] != d or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must share d and have contiguous rows")
    out = torch.empty(n, m, dtype=x.dtype, device=x.device)
    if n:
        _rows[n, triton.cdiv(m, block)](
            x, weight, out, x.stride(0), weight.stride(0), m, D=d, BLOCK=block,
            CHUNK=min(chunk, triton.next_power_of_2(d)), num_warps=num_warps,  # pyright: ignore
        )  # fmt: skip
    return out
