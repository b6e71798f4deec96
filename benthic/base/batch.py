"""The one thing that travels between data, training and post-training."""

from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor

IGNORE = -100  # label of a position that carries no loss


@dataclass
class Batch:
    """Token rows with their targets. B rows, T tokens.

    ids       [B, T] int64  input tokens
    labels    [B, T] int64  target of each position (the next token), IGNORE where there is no loss
    positions [B, T] int64  rotary position of each token, counted from the start of its document
    segments  [B, T] int64  document number inside the row, from 1; 0 is padding; attention never crosses segments
    extra     {name: [B, T] float32}  per-token quantities of an objective (advantages, old_logprobs, ...)

    `positions` and `segments` are None for rows that are one causal stream (pretraining: V3 packs without masks).
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self._tensors():
            if tensor.shape != self.ids.shape:
                raise ValueError(f"Batch.{name} has shape {tuple(tensor.shape)}, ids {tuple(self.ids.shape)}")

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "extra"]
        return [(n, t) for n, t in named if t is not None] + list(self.extra.items())

    def _map(self, change) -> Self:
        named = {name: change(tensor) for name, tensor in self._tensors() if name not in self.extra}
        return type(self)(**named, extra={name: change(tensor) for name, tensor in self.extra.items()})

    def to(self, device: torch.device | str) -> Self:
        """The batch on `device`; the one host-to-device copy of a step."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def chunks(self, n: int) -> list[Self]:
        """Split the rows into `n` micro-batches of equal size. B must divide by n."""
        if len(self.ids) % n:
            raise ValueError(f"{len(self.ids)} rows do not divide into {n} micro-batches")
        rows = len(self.ids) // n
        return [self._map(lambda t, a=i * rows: t[a : a + rows]) for i in range(n)]

    @classmethod
    def cat(cls, batches: list[Self]) -> Self:
        """The rows of several batches with the same fields, in order."""
        named = {name: torch.cat([dict(b._tensors())[name] for b in batches]) for name, _ in batches[0]._tensors()}
        extra = {name: named.pop(name) for name in batches[0].extra}
        return cls(**named, extra=extra)

    def targets(self) -> Tensor:
        """Number of positions that carry loss, as a 0-d int64 tensor on the batch's device."""
        return (self.labels != IGNORE).sum()
