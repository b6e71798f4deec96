"""How `Fused` computes its products: each by the kernel that is fastest for its shape, or all by kernels whose results
do not depend on the shape, so that a token's result is the same in any company.

Letters: N tokens, H heads, D, P, V, R widths as in mla.py, d hidden, B rows.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from benthic.base.errors import InputError
from benthic.inference.matrices import product, products, together
from benthic.kernels import latent_store, matmul_fixed, mla_decode, mla_output, moe, route
from benthic.kernels.gemv import linear
from benthic.kernels.latent import Latents
from benthic.kernels.latent_store import Stored
from benthic.model.linear import FP8, Linear
from benthic.model.transformer import Transformer

SCRATCH = 2**28  # bytes of partial sums that attention of many rows may take


class Ways(Protocol):
    """One signature, two classes. `router` are tiles, None where the kernel chooses."""

    router: route.Tiles | None

    def product(self, x: Tensor, layer: Linear) -> Tensor:
        """As `matrices.product`."""
        ...

    def products(self, x: Tensor, first: Linear, second: Linear) -> Tensor:
        """As `matrices.products`."""
        ...

    def store(
        self, kv_a: Tensor, weight: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
        latents: Latents, w_uk: Tensor, decoding: int,
    ) -> Stored:  # fmt: skip
        """As `latent_store.store`."""
        ...

    def attend(
        self, q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, w_uv: Tensor,
        out: Tensor, *, page_size: int, scale: float,
    ) -> None:  # fmt: skip
        """As `mla_decode`, times w_uv [H, V, R], into out [N, H, V]."""
        ...

    def experts(self, weights: moe.ExpertWeights) -> moe.Way | None:
        """Tiles for these weights, None where the kernels choose."""
        ...

    def logits(self, model: Transformer, hidden: Tensor) -> Tensor:
        """hidden [N, d] -> logits [N, V or more] in the compute dtype; what lies beyond V is -inf."""
        ...


class Fastest:
    """The library's products, and kernels that choose by the number of tokens."""

    router: route.Tiles | None = None
    product = staticmethod(product)
    products = staticmethod(products)
    store = staticmethod(latent_store.store)

    def attend(
        self, q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, w_uv: Tensor,
        out: Tensor, *, page_size: int, scale: float,
    ) -> None:  # fmt: skip
        parts, lse = mla_decode.stretches(
            q_latent, q_rope, latents, table, context, page_size=page_size, scale=scale
        )  # fmt: skip
        mla_output.output(parts, lse, w_uv, out)

    def experts(self, weights: moe.ExpertWeights) -> None:
        return None

    def logits(self, model: Transformer, hidden: Tensor) -> Tensor:
        return linear(hidden, model.head)


class Fixed:
    """Every row of every product summed in one order. Rows of attention must have one query each, weights 16 bits."""

    router: route.Tiles | None = route.FIXED

    def __init__(self, model: Transformer):
        if any(parameter.dtype == FP8 for parameter in model.parameters()):
            raise InputError("deterministic=True: FP8 kernels choose by shape -> use quantization='none'")

    def product(self, x: Tensor, layer: Linear) -> Tensor:
        return matmul_fixed.linear(x, layer.weight)

    def products(self, x: Tensor, first: Linear, second: Linear) -> Tensor:
        return matmul_fixed.linear(x, together(first, second)[0])

    def store(
        self, kv_a: Tensor, weight: Tensor, eps: float, q: Tensor, cos: Tensor, sin: Tensor, slots: Tensor,
        latents: Latents, w_uk: Tensor, decoding: int,
    ) -> Stored:  # fmt: skip
        stored = latent_store.store(
            kv_a, weight, eps, q, cos, sin, slots, latents, w_uk, decoding, absorb=False
        )  # fmt: skip
        nope = q[:decoding, :, : w_uk.shape[1]].transpose(0, 1)
        matmul_fixed.products(nope, w_uk.transpose(1, 2), out=stored.q_latent)
        return stored

    def attend(
        self, q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, w_uv: Tensor,
        out: Tensor, *, page_size: int, scale: float,
    ) -> None:  # fmt: skip
        (h, n, r), tiles = q_latent.shape, mla_decode.fixed_tiles(latents, q_latent.shape[0], page_size)
        if len(table) != n:
            raise ValueError(f"{len(table)} rows for {n} queries -> give each query a row of its own")
        some = max(1, SCRATCH // (4 * tiles.splits * h * r))  # rows at once
        for a in range(0, n, some):
            rows = slice(a, a + some)
            o_latent = mla_decode.mla_decode(
                q_latent[:, rows], q_rope[rows], latents, table[rows], context[rows],
                page_size=page_size, scale=scale, tiles=tiles,
            )  # fmt: skip
            matmul_fixed.products(o_latent, w_uv, out=out[rows].transpose(0, 1))

    def experts(self, weights: moe.ExpertWeights) -> moe.Way:
        return moe.fixed_tiles(weights.down_proj.dtype)

    def logits(self, model: Transformer, hidden: Tensor) -> Tensor:
        # rows of whole 16 bytes: the library's softmax sums a row in an order that follows its address
        logits = matmul_fixed.linear(hidden, model.head)
        return F.pad(logits, (0, -logits.shape[1] % 8), value=-float("inf"))
