"""Products with the weights of linear layers, in the way of their format; weights that read the same input as one.

FP8 weights are laid together with each part filled up to whole blocks of 128 rows, with zeros: so every block keeps its
own factor, and a product has columns of zeros there. Letters: N tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.base.errors import InputError
from benthic.kernels import gemv, linear_fp8
from benthic.kernels.quant import BLOCK
from benthic.model.linear import Linear


def product(x: Tensor, layer: Linear) -> Tensor:
    """x [N, in] -> x W^T [N, out]."""
    if layer.weight_scale_inv is None:
        return gemv.linear(x, layer.weight)
    return linear_fp8.linear(x, layer.weight, layer.weight_scale_inv)


def products(x: Tensor, first: Linear, second: Linear) -> Tensor:
    """x [N, in] -> both products side by side, each filled up to `width` of its layer."""
    weight, factors = together(first, second)
    return gemv.linear(x, weight) if factors is None else linear_fp8.linear(x, weight, factors)


def width(layer: Linear) -> int:
    """Columns that a layer's product has in `products`."""
    rows = len(layer.weight)
    return rows if layer.weight_scale_inv is None else -(-rows // BLOCK) * BLOCK


def lay_together(*layers: Linear) -> None:
    """Put the weights of layers that read the same input into one storage, of which they become views, and so their
    factors. Layers that lie so already stay: a graph may have been captured that reads them there."""
    if len({layer.weight.dtype for layer in layers}) > 1:
        found = ", ".join(str(layer.weight.dtype) for layer in layers)
        raise InputError(f"weights of the same input in {found} -> bring them into one format")
    if _neighbours([layer.weight for layer in layers], [width(layer) for layer in layers]):
        return
    whole = torch.cat([F.pad(_bytes(layer.weight), (0, 0, 0, width(layer) - len(layer.weight))) for layer in layers])
    for layer, part in zip(layers, whole.split([width(layer) for layer in layers])):
        layer.weight.data = part[: len(layer.weight)].view(layer.weight.dtype)
    factors = [layer.weight_scale_inv for layer in layers if layer.weight_scale_inv is not None]
    for old, part in zip(factors, torch.cat(factors).split([len(f) for f in factors]) if factors else ()):
        old.data = part


def together(first: Linear, second: Linear) -> tuple[Tensor, Tensor | None]:
    """The two weights that `lay_together` made neighbours as one matrix [rows, in], and the factors of its blocks."""
    rows, columns = width(first) + width(second), first.weight.shape[1]
    weight = first.weight.as_strided((rows, columns), (columns, 1))
    if first.weight_scale_inv is None:
        return weight, None
    grid = -(-columns // BLOCK)
    return weight, first.weight_scale_inv.as_strided((rows // BLOCK, grid), (grid, 1))


def _neighbours(weights: list[Tensor], widths: list[int]) -> bool:
    """Whether one weight begins, in the same storage, where the one before it ends."""
    one = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    ends = [w.data_ptr() + rows * w.shape[1] * w.element_size() for w, rows in zip(weights, widths)]
    return one and ends[:-1] == [weight.data_ptr() for weight in weights[1:]]


def _bytes(weight: Tensor) -> Tensor:
    """FP8 as bytes, which torch can fill up and join everywhere."""
    return weight.view(torch.uint8) if weight.element_size() == 1 else weight
