"""How `Fused` computes its products: each by the kernel that is fastest for its shape, or all by kernels whose results
do not depend on the shape, so that a token's result is the same in any company.

Letters: N tokens, H heads, D inputs, M outputs, B rows.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.kernels import gemv, matmul_fixed, mla_decode, moe, route
from benthic.kernels.latent import Latents
from benthic.model.transformer import Transformer

SCRATCH = 2**28  # bytes of partial sums that attention of many rows may take


class Ways(Protocol):
    """One signature, two classes. `router` and `experts` are tiles, None where the kernels choose."""

    router: route.Tiles | None

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [N, D], weight [M, D] -> [N, M]."""
        ...

    def heads(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """x [H, N, D], weight [H, M, D] -> [H, N, M], in `out` where given."""
        ...

    def attend(
        self, q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, *, page_size: int,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """As `mla_decode`."""
        ...

    def experts(self, dtype: torch.dtype) -> Any:
        """Tiles for weights of `dtype`."""
        ...

    def logits(self, model: Transformer, hidden: Tensor) -> Tensor:
        """hidden [N, d] -> float32 logits [N, V or more]; what lies beyond V is -inf."""
        ...


class Fastest:
    """The library's products, and kernels that choose by the number of tokens."""

    router: route.Tiles | None = None

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return gemv.linear(x, weight)

    def heads(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.bmm(x, weight.transpose(1, 2), out=out)

    def attend(
        self, q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, *, page_size: int,
        scale: float,
    ) -> Tensor:  # fmt: skip
        return mla_decode.mla_decode(q_latent, q_rope, latents, table, context, page_size=page_size, scale=scale)

    def experts(self, dtype: torch.dtype) -> None:
        return None

    def logits(self, model: Transformer, hidden: Tensor) -> Tensor:
        return model.logits(hidden)


class Fixed:
    """Every row of every product summed in one order. Rows of attention must have one query each."""

    router: route.Tiles | None = route.FIXED

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return matmul_fixed.linear(x, weight)

    def heads(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return matmul_fixed.products(x, weight, out=out)

    def attend(
        self, q_latent: Tensor, q_rope: Tensor, latents: Latents, table: Tensor, context: Tensor, *, page_size: int,
        scale: float,
    ) -> Tensor:  # fmt: skip
        (h, n, r), tiles = q_latent.shape, mla_decode.fixed_tiles(latents, q_latent.shape[0], page_size)
        if len(table) != n:
            raise ValueError(f"{len(table)} rows for {n} queries -> give each query a row of its own")
        some = max(1, SCRATCH // (4 * tiles.splits * h * r))  # rows at once
        parts = [
            mla_decode.mla_decode(
                q_latent[:, a : a + some], q_rope[a : a + some], latents, table[a : a + some], context[a : a + some],
                page_size=page_size, scale=scale, tiles=tiles,
            )
            for a in range(0, n, some)
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def experts(self, dtype: torch.dtype) -> moe.Way:
        return moe.fixed_tiles(dtype)

    def logits(self, model: Transformer, hidden: Tensor) -> Tensor:
        # rows of whole 16 bytes: the library's softmax sums a row in an order that follows its address
        logits = self.linear(hidden, model.head).float()
        return F.pad(logits, (0, -logits.shape[1] % 4), value=-torch.inf)
