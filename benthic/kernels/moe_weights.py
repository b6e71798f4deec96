"""The weights of one mixture of experts as its kernels read them, where an expert's matrices lie, and the reference.

Routed experts are stacked. The shared experts are one network of width S I, stored as the model stores it; the kernels
see its rows as those of S further experts, numbered from E, that every token chose. FP8 weights carry one float32
factor per block of 128 x 128 (V3 Sec 3.3.2); gate and up have grids of their own, so ragged edges stay where they were.

Letters: N tokens, d hidden, E routed experts, K chosen, I expert width, S shared experts.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from benthic.kernels.quant import BLOCK, dequantise_rows, quantise_rows


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """One layer's experts, all contiguous, all of one dtype: the activations' or float8_e4m3fn with factors.

    gate_up_proj [E, 2I, d] gate above up, down_proj [E, d, I]; factors [E, 2, I/128, d/128] and [E, d/128, I/128]
    shared_gate_proj, shared_up_proj [S I, d], shared_down_proj [d, S I]; factors [S I/128, d/128], [d/128, S I/128]
    Divisions round up. Without shared experts the three are None, as factors are without FP8.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    shared_gate_proj: Tensor | None = None
    shared_up_proj: Tensor | None = None
    shared_down_proj: Tensor | None = None
    shared_gate_scale: Tensor | None = None
    shared_up_scale: Tensor | None = None
    shared_down_scale: Tensor | None = None

    def __post_init__(self) -> None:
        e, d, i = self.down_proj.shape
        si = 0 if self.shared_down_proj is None else self.shared_down_proj.shape[1]
        if si % i:
            raise ValueError(f"shared experts of width {si} are no multiple of {i}, the width of a routed one")
        ni, nd, ns = -(-i // BLOCK), -(-d // BLOCK), -(-si // BLOCK)
        expected = {
            "gate_up_proj": (e, 2 * i, d), "down_proj": (e, d, i),
            "gate_up_scale": (e, 2, ni, nd), "down_scale": (e, nd, ni),
            "shared_gate_proj": (si, d), "shared_up_proj": (si, d), "shared_down_proj": (d, si),
            "shared_gate_scale": (ns, nd), "shared_up_scale": (ns, nd), "shared_down_scale": (nd, ns),
        }  # fmt: skip
        for name in [f.name for f in fields(self)]:
            tensor: Tensor | None = getattr(self, name)
            scale = name.endswith("scale")
            wanted = (self.fp8 or not scale) and (si > 0 or not name.startswith("shared"))
            dtype = torch.float32 if scale else self.down_proj.dtype
            if not wanted and tensor is not None:
                raise ValueError(f"{name} has no place here -> leave it out")
            if wanted and (tensor is None or tensor.shape != expected[name] or tensor.dtype != dtype):
                found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} is {found}, expected {expected[name]} {dtype}")
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous")

    @property
    def fp8(self) -> bool:
        """Whether the weights are E4M3 with factors."""
        return self.down_proj.dtype == torch.float8_e4m3fn

    @property
    def n_shared(self) -> int:
        """S."""
        return 0 if self.shared_down_proj is None else self.shared_down_proj.shape[1] // self.down_proj.shape[2]

    def up_arguments(self) -> list[Tensor]:
        """What the first kernel reads; a place that is empty holds a tensor that is never looked at."""
        scale = self.gate_up_proj if self.gate_up_scale is None else self.gate_up_scale
        matrices = [self.gate_up_proj, self.shared_gate_proj, self.shared_up_proj]
        scales = [scale, self.shared_gate_scale, self.shared_up_scale]
        return [self.gate_up_proj if t is None else t for t in matrices] + [scale if t is None else t for t in scales]

    def down_arguments(self) -> list[Tensor]:
        """What the second kernel reads, in the same manner."""
        scale = self.down_proj if self.down_scale is None else self.down_scale
        shared = self.down_proj if self.shared_down_proj is None else self.shared_down_proj
        return [self.down_proj, shared, scale, scale if self.shared_down_scale is None else self.shared_down_scale]


@triton.jit
def up_matrices(
    expert, gate_up, shared_gate, shared_up, scale, shared_gate_scale, shared_up_scale,
    D: tl.constexpr, I: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Of one expert: its gate and up matrices [I, d], their grids of factors, and in which row of the grids' matrix
    its first row lies."""
    shared, number = expert >= E, tl.where(expert >= E, expert - E, expert).to(tl.int64)
    grid = tl.cdiv(I, 128) * tl.cdiv(D, 128)
    gate = tl.where(shared, shared_gate + number * (I * D), gate_up + number * (2 * I * D))
    up = tl.where(shared, shared_up + number * (I * D), gate_up + number * (2 * I * D) + I * D)
    gate_scale = tl.where(shared, shared_gate_scale, scale + number * (2 * grid))
    up_scale = tl.where(shared, shared_up_scale, scale + number * (2 * grid) + grid)
    return gate, up, gate_scale, up_scale, tl.where(shared, number * I, 0)


@triton.jit
def down_matrix(
    expert, down, shared_down, scale, shared_scale, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Of one routed expert, or of the shared ones together: the down matrix [d, width], its factors, its width, and
    how many factors a row of the grid has."""
    shared = expert >= E
    number = tl.where(shared, 0, expert).to(tl.int64)
    matrix = tl.where(shared, shared_down, down + number * (D * I))
    factors = tl.where(shared, shared_scale, scale + number * (tl.cdiv(D, 128) * tl.cdiv(I, 128)))
    return matrix, factors, tl.where(shared, S * I, I), tl.where(shared, tl.cdiv(S * I, 128), tl.cdiv(I, 128))


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded to `dtype` at every step, as the model rounds."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (silu * up.to(dtype).to(tl.float32)).to(dtype)


def moe_ref(
    x: Tensor, weights: ExpertWeights, topk_ids: Tensor, topk_weights: Tensor, *, quantised: bool = False
) -> Tensor:
    """Routed and shared experts in float32, expert by expert: x [N, d] -> [N, d] float32. `quantised`: what enters a
    product is rounded to E4M3 first, as Fp8Tiles does."""

    def entering(activations: Tensor) -> Tensor:
        return dequantise_rows(*quantise_rows(activations)) if quantised else activations

    w, wide = weights, entering(x.float())
    e, i = len(w.down_proj), w.down_proj.shape[2]
    share = torch.zeros(len(x), e, device=x.device).scatter_add_(1, topk_ids.long(), topk_weights.float())  # [N, E]
    out = torch.zeros_like(wide)
    for expert in range(e):
        scale = None if w.gate_up_scale is None else w.gate_up_scale[expert]
        pairs = w.gate_up_proj[expert].unflatten(0, (2, i))
        gate, up = (_wide(pairs[j], None if scale is None else scale[j]) for j in range(2))
        down = _wide(w.down_proj[expert], None if w.down_scale is None else w.down_scale[expert])
        out += share[:, expert, None] * (entering(F.silu(wide @ gate.T) * (wide @ up.T)) @ down.T)
    if w.shared_gate_proj is None or w.shared_up_proj is None or w.shared_down_proj is None:
        return out
    gate, up = _wide(w.shared_gate_proj, w.shared_gate_scale), _wide(w.shared_up_proj, w.shared_up_scale)
    h = entering(F.silu(wide @ gate.T) * (wide @ up.T))
    return out + h @ _wide(w.shared_down_proj, w.shared_down_scale).T


def _wide(matrix: Tensor, scale: Tensor | None) -> Tensor:
    """A matrix [rows, columns] in float32, times the factors of its blocks."""
    if scale is None:
        return matrix.float()
    rows, columns = (torch.arange(n, device=matrix.device) // BLOCK for n in matrix.shape)
    return matrix.float() * scale[rows][:, columns]
