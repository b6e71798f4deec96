"""The sampler's two looks at every logit, by kernels: no float32 copy of the logits, no weights laid out.

Letters as in sampler.py.
"""

import torch
from torch import Tensor

from benthic.inference.chance import race
from benthic.inference.controls import Controls, Limit
from benthic.inference.sampler import UNIT, Ways
from benthic.inference.select import block_of
from benthic.kernels.drawing import Weights
from benthic.kernels.likeliest import likeliest


def pick(logits: Tensor, controls: Controls, where: Tensor, cut: bool) -> Tensor:
    """As `sampler.pick`."""
    p, k, v = logits.shape
    tokens, _, peaks, _ = likeliest(logits, v)
    if not controls.draws:
        return tokens

    def each(values: Tensor) -> Tensor:
        return values.unsqueeze(1).expand(p, k).flatten()  # [P] -> [P K]

    heats = None if controls.temperature is None else each(controls.temperature)
    weights = Weights(logits.reshape(p * k, v), peaks.flatten(), heats)
    if cut:
        if (limit := controls.top_k) is not None:
            weights.cut_to(each(_of_every_row(limit, p, 0)))
        if (limit := controls.top_p) is not None:
            weights.cut_to(each(_of_every_row(limit, p, 1)))
        if (limit := controls.min_p) is not None:
            weights.leasts = each((_of_every_row(limit, p, 0) * UNIT).ceil().long())
    size = block_of(v)
    drawn = race(
        weights.sums(size), lambda block: weights.of_block(block, size), size, each(controls.seed), where.flatten()
    )
    drawn = drawn.clamp(max=v - 1).view(p, k)
    return drawn if controls.greedy is None else torch.where(controls.greedy.unsqueeze(1), tokens, drawn)


def _of_every_row(limit: Limit, p: int, unused: int) -> Tensor:
    """The limit's values [P], with `unused` for rows that have none."""
    if limit.rows is None:
        return limit.values
    return limit.values.new_full((p,), unused).index_copy(0, limit.rows, limit.values)


QUICK = Ways(likeliest, pick)
