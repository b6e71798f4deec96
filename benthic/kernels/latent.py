"""The latent cache's three formats: how one layer's compressed vectors c_kv lie in memory, in plain torch.

    auto   c_kv [slots, R] as computed
    fp8    E4M3 [slots, R], one float32 scale per 128 elements
    int6   uint8 [slots, 3R/4], one float16 scale per 64 elements; an element is a number in [-31, 31], stored plus 32

Bytes 0..R/2-1 of an int6 row are low nibbles: byte j has element j in its lower half and j + R/2 in its upper. Bytes
R/2..3R/4-1 are upper bit pairs: byte j has those of elements j, j + R/4, j + R/2, j + 3R/4, from the lowest bits up.
So a quarter of a row unpacks with shifts alone. The rotary key is never quantised: rounding would turn it.

Letters: R latent width (a power of two from 64), P rotary width, G scales per row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = {"fp8": 128, "int6": 64}  # elements that share a scale
E4M3_MAX = 448.0
INT6_MAX = 31
INT6_OFFSET = 32
SMALLEST = {"fp8": 1e-12, "int6": 2.0**-14}  # floor of a scale: zeros stay finite, float16 scales stay normal
LARGEST_INT6_SCALE = 65504.0  # of float16


def group_of(format: str, width: int) -> int:
    """Elements of a row of `width` that share a scale; the whole row where it has none."""
    _check(format, width)
    return min(GROUPS.get(format, width), width)


def quantise(format: str, c_kv: Tensor) -> tuple[Tensor, Tensor | None]:
    """c_kv [..., R] -> (codes [..., R or 3R/4], scales [..., G] or None). Scales are rounded before the division."""
    width = c_kv.shape[-1]
    group = group_of(format, width)
    if format == "auto":
        return c_kv, None
    grouped = c_kv.float().unflatten(-1, (-1, group))  # [..., G, group]
    amax = grouped.abs().amax(-1)  # [..., G]
    if format == "fp8":
        scales = (amax / E4M3_MAX).clamp(min=SMALLEST["fp8"])
        codes = (grouped / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
        return codes.flatten(-2).to(torch.float8_e4m3fn), scales
    scales = (amax / INT6_MAX).clamp(SMALLEST["int6"], LARGEST_INT6_SCALE).half()
    codes = (grouped / scales.float().unsqueeze(-1) + 0.5).floor().clamp(-INT6_MAX, INT6_MAX) + INT6_OFFSET
    return pack(codes.flatten(-2).to(torch.uint8)), scales


def dequantise(format: str, codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What codes and scales stand for, [..., R] in `dtype`."""
    if format == "auto":
        return codes.to(dtype)
    if scales is None:
        raise ValueError(f"scales=None with format {format!r} -> pass the scales of the codes")
    values = codes.float() if format == "fp8" else unpack(codes).float() - INT6_OFFSET
    group = group_of(format, values.shape[-1])
    return (values.unflatten(-1, (-1, group)) * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def pack(codes: Tensor) -> Tensor:
    """Numbers below 64 [..., R] uint8 -> bytes [..., 3R/4]."""
    first, second = (codes & 15).chunk(2, -1)  # [..., R/2] each
    a, b, c, d = (codes >> 4).chunk(4, -1)  # [..., R/4] each
    return torch.cat((first | second << 4, a | b << 2 | c << 4 | d << 6), -1)


def unpack(packed: Tensor) -> Tensor:
    """Bytes [..., 3R/4] -> numbers below 64 [..., R] uint8."""
    quarter = packed.shape[-1] // 3
    low, high = packed.split([2 * quarter, quarter], -1)  # [..., R/2], [..., R/4]
    upper = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    return torch.cat((low & 15, low >> 4), -1) | upper << 4


@dataclass(frozen=True, kw_only=True)
class Latents:
    """One layer's cache: c_kv [slots, R or 3R/4], scales [slots, G] or None, k_rope [slots, P] in the compute dtype."""

    format: str
    c_kv: Tensor
    scales: Tensor | None
    k_rope: Tensor

    def __post_init__(self) -> None:
        group = group_of(self.format, self.width)
        slots, dtype = len(self.c_kv), self.k_rope.dtype
        expected = {"auto": dtype, "fp8": torch.float8_e4m3fn, "int6": torch.uint8}[self.format]
        if self.c_kv.dtype != expected or self.k_rope.ndim != 2 or len(self.k_rope) != slots:
            raise ValueError(
                f"c_kv {tuple(self.c_kv.shape)} {self.c_kv.dtype} beside k_rope {tuple(self.k_rope.shape)} {dtype}, "
                f"format {self.format!r} -> give both the same slots, and c_kv as {expected}"
            )
        scales = None if self.scales is None else (tuple(self.scales.shape), self.scales.dtype)
        wanted = {
            "auto": None,
            "fp8": ((slots, self.width // group), torch.float32),
            "int6": ((slots, self.width // group), torch.float16),
        }[self.format]
        if scales != wanted:
            raise ValueError(f"scales are {scales} with format {self.format!r} -> they must be {wanted}")
        if not all(t.is_contiguous() for t in (self.c_kv, self.k_rope, self.scales) if t is not None):
            raise ValueError("cache tensors of a layer have gaps -> they must be contiguous")

    @property
    def width(self) -> int:
        """R."""
        return self.c_kv.shape[-1] * 4 // 3 if self.format == "int6" else self.c_kv.shape[-1]

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values at `slots` [...] -> c_kv [..., R], k_rope [..., P] in `dtype`."""
        scales = None if self.scales is None else self.scales[slots]
        return dequantise(self.format, self.c_kv[slots], scales, dtype), self.k_rope[slots].to(dtype)

    def write(self, slots: Tensor, c_kv: Tensor, k_rope: Tensor) -> None:
        """Put c_kv [N, R] and k_rope [N, P] into `slots` [N]."""
        codes, scales = quantise(self.format, c_kv)
        self.c_kv[slots] = codes.to(self.c_kv.dtype)
        self.k_rope[slots] = k_rope.to(self.k_rope.dtype)
        if self.scales is not None and scales is not None:
            self.scales[slots] = scales


def empty_latents(
    format: str, slots: int, width: int, rope_width: int, dtype: torch.dtype, device: torch.device | str
) -> Latents:
    """A layer's cache of zeros: `width` R, `rope_width` P, `dtype` the compute dtype."""
    codes, scales = quantise(format, torch.zeros(slots, width, device=device, dtype=dtype))
    k_rope = torch.zeros(slots, rope_width, device=device, dtype=dtype)
    return Latents(format=format, c_kv=codes, scales=scales, k_rope=k_rope)


def bytes_per_token(format: str, width: int, rope_width: int, itemsize: int = 2) -> int:
    """Cache bytes of one token in one layer; `itemsize` is that of the compute dtype."""
    groups = width // group_of(format, width)
    latent = {"auto": itemsize * width, "fp8": width + 4 * groups, "int6": 3 * width // 4 + 2 * groups}[format]
    return latent + itemsize * rope_width


def _check(format: str, width: int) -> None:
    if format not in ("auto", *GROUPS):
        raise ValueError(f"format {format!r} -> use one of auto, {', '.join(GROUPS)}")
    if format != "auto" and (width < 64 or math.log2(width) % 1):
        raise ValueError(f"latent width {width} -> use a power of two from 64, or format auto")
