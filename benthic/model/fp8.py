"""A model's matrices as FP8 blocks, in place: which they are, room for them, and quantising into it.

FP8 are the matrices that the released V3 files hold as FP8, but `kv_b_proj`: embedding, head, norms, gates and
`eh_proj` stay as they are. `kv_b_proj` is absorbed per head into queries and outputs, a product that has no form with
activations in blocks, and is one 130th of V2-Lite's weights: it is kept in the compute dtype, with the values that its
blocks stand for where the file has blocks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benthic.base.errors import InputError
from benthic.kernels.quant import BLOCK, quantise_blocks
from benthic.model.export import is_quantised
from benthic.model.linear import FP8, SCALE, Linear, Quantisable, in_parts
from benthic.model.moe import Experts


def eligible(model: nn.Module) -> Iterator[tuple[Quantisable, str]]:
    """(module, parameter) of every matrix that may be FP8, whether it is or not."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield from ((module, matrix) for matrix in module.PARTS)
        elif isinstance(module, Linear) and _is_eligible(name, module):
            yield module, "weight"


def _is_eligible(name: str, module: Linear) -> bool:
    return not name.endswith("kv_b_proj") and is_quantised(f"{name}.weight", tuple(module.weight.shape))


def is_fp8(model: nn.Module) -> bool:
    """Whether any matrix is FP8."""
    return any(module.factors(name) is not None for module, name in eligible(model))


def make_room(module: Quantisable, name: str) -> None:
    """Replace a parameter by unwritten FP8 blocks of the same shape on the same device."""
    old: Tensor = getattr(module, name)
    *stack, rows, columns = old.shape
    if parts := module.PARTS[name] - 1:
        stack, rows = [*stack, parts + 1], rows // (parts + 1)
    grid = (*stack, -(-rows // BLOCK), -(-columns // BLOCK))
    codes = torch.empty(old.shape, dtype=FP8, device=old.device)
    setattr(module, name, nn.Parameter(codes, requires_grad=False))
    setattr(module, name + SCALE, torch.empty(grid, dtype=torch.float32, device=old.device))


@torch.no_grad()
def quantise_into(codes: Tensor, factors: Tensor, weight: Tensor) -> None:
    """Write `weight` as blocks. A stack is done matrix by matrix: the arithmetic makes several copies in float32."""
    if weight.dim() == 3:
        for part in zip(codes, factors, weight):
            quantise_into(*part)
        return
    quantised, scale = quantise_blocks(in_parts(weight, factors))
    codes.copy_(quantised.reshape(codes.shape))
    factors.copy_(scale)


def to_fp8(model: nn.Module) -> None:
    """Turn every eligible matrix that is wider into FP8, in place, one after the other."""
    for module, name in eligible(model):
        if module.factors(name) is None:
            weight = getattr(module, name).detach()
            make_room(module, name)
            quantise_into(getattr(module, name), getattr(module, name + SCALE), weight)


def has_fp8(device: torch.device | str) -> bool:
    """Whether the device computes in FP8."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def check_device(device: torch.device | str) -> None:
    """InputError for a GPU that is too old for FP8. A CPU only computes slowly with it."""
    if torch.device(device).type == "cuda" and not has_fp8(device):
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise InputError(f"quantization='fp8' needs compute capability 8.9, {device} has {found} -> use none or auto")
