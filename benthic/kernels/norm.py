"""RMSNorm, and the residual addition before it, a row per program.

A row is read once and stays in registers, all arithmetic is in float32, and what is stored is rounded where the plain
model rounds: the sum first, then the norm of the rounded sum. Bytes: 2 N d elements for `rms_norm`, 4 N d for
`add_rms_norm`; memory-bound, and bound by the launch where N is small. Rows do not see each other.

Letters: N rows, d width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels import chain


@triton.jit
def _rms_norm(
    x, residual, weight, out, total, eps, stride_x, stride_r, stride_t, D: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    chain.begin(CHAINED)
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < D
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    chain.wait(CHAINED)
    value = tl.load(x + row * stride_x + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * stride_r + d, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * stride_t + d, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps) * w
    tl.store(out + row * D + d, normed.to(out.dtype.element_ty), mask=inside)


def check(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    """Refuse what does not belong together: x and residual [N, d], rows contiguous, weight [d]."""
    d = x.shape[1]
    if weight.shape != (d,) or not weight.is_contiguous() or x.stride(1) != 1:
        raise ValueError(f"weight {tuple(weight.shape)} for rows of {d}: shapes must agree, rows be contiguous")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} does not fit x {tuple(x.shape)} {x.dtype}")


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, total: Tensor | None, num_warps: int
) -> Tensor:
    """num_warps 0: chosen by the width, about 16 elements per thread, two loads of 16 bytes in bfloat16."""
    n, d = x.shape
    out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    if n == 0:
        return out
    block = triton.next_power_of_2(d)
    _rms_norm[(n,)](
        x, x if residual is None else residual, weight, out, out if total is None else total, eps,
        x.stride(0), 0 if residual is None else residual.stride(0), 0 if total is None else total.stride(0),
        D=d, ADD=residual is not None, BLOCK=block,
        num_warps=num_warps or min(max(block // 512, 1), 16),  # pyright: ignore[reportCallIssue]
        **chain.options(x),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, num_warps: int = 0) -> Tensor:
    """x [N, d], rows contiguous but any distance apart, weight [d] -> x / rms(x) * weight [N, d] in x's dtype."""
    check(x, None, weight)
    return _launch(x, None, weight, eps, None, num_warps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, in_place: bool = False, num_warps: int = 0
) -> tuple[Tensor, Tensor]:
    """x and residual [N, d] -> (norm of their sum [N, d], the sum [N, d], which is `residual` itself if `in_place`)."""
    check(x, residual, weight)
    total = residual if in_place else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch(x, residual, weight, eps, total, num_warps), total


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in plain torch."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total
