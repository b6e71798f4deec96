"""Shards to training batches: every window of an epoch once, in an order that is a pure function of seed and index."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import torch

from benthic.base.batch import Batch
from benthic.base.errors import InputError
from benthic.data.shards import Shards

ROUNDS = 4


def shuffled(index: int, size: int, key: bytes) -> int:
    """Where `index` goes in the permutation of 0..size-1 that `key` names; needs no table of the size of the corpus.

    A balanced Feistel network permutes the next power of four; an image outside the range is permuted again until it
    falls inside, which keeps it a permutation ("cycle walking").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for n in range(ROUNDS):
            digest = blake2b(right.to_bytes(8, "little"), key=key, salt=bytes([n]), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & mask
        index = left << half | right
        if index < size:
            return index


class Loader(Iterator[Batch]):
    """Endless batches of consecutive-token windows.

    Window w holds tokens w*T .. (w+1)*T: neighbours share one token, so that each token is a target once an epoch.
    `batch_size` counts the rows of all data-parallel ranks; this rank yields `batch_size / dp_size` of them. The state
    is one global sample index: a run may go on with another `dp_size` or `batch_size`.
    """

    def __init__(
        self, shards: Shards, sequence_length: int, batch_size: int, seed: int, dp_rank: int = 0, dp_size: int = 1
    ):
        if batch_size < 1 or batch_size % dp_size:
            raise InputError(f"batch_size={batch_size} must divide by {dp_size} data-parallel ranks -> use a multiple")
        if not 0 <= dp_rank < dp_size:
            raise InputError(f"dp_rank={dp_rank} is not one of {dp_size} ranks -> use 0 to {dp_size - 1}")
        if sequence_length < 1:
            raise InputError(f"sequence_length={sequence_length} holds no token -> use 1 or more")
        self.windows = (shards.num_tokens - 1) // sequence_length
        if self.windows < 1:
            raise InputError(
                f"{shards.num_tokens} tokens are too few for one window of sequence_length={sequence_length} + 1 "
                "-> give more data or a shorter sequence_length"
            )
        self._shards, self._length, self._seed = shards, sequence_length, seed
        self._batch_size, self._rank, self._rows = batch_size, dp_rank, batch_size // dp_size
        self._sample = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        first = self._sample + self._rank * self._rows
        rows = np.stack([self._window(self.window_of(first + row)) for row in range(self._rows)])  # [B, T + 1]
        self._sample += self._batch_size
        tokens = torch.from_numpy(rows)
        return Batch(ids=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())

    def window_of(self, sample: int) -> int:
        """The window that a global sample index reads."""
        epoch, index = divmod(sample, self.windows)
        return shuffled(index, self.windows, f"{self._seed}:{epoch}".encode())

    def state_dict(self) -> dict[str, Any]:
        """The next global sample, and what it is an index into."""
        return {"sample": self._sample, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. InputError if it belongs to other data, another window length or seed."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise InputError(
                    f"{key} is {value!r}, in the saved run {state.get(key)!r} -> resume with the same data"
                )
        if type(state.get("sample")) is not int or state["sample"] < 0:
            raise InputError(f"saved sample is {state.get('sample')!r} -> use another checkpoint")
        self._sample = state["sample"]

    def _identity(self) -> dict[str, Any]:
        return {"data": self._shards.identity, "sequence_length": self._length, "seed": self._seed}

    def _window(self, window: int) -> np.ndarray:
        start = window * self._length
        return self._shards.read(start, start + self._length + 1)
