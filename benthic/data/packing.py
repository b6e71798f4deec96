"""Fine-tuning samples of uneven length into full rows, without one sample seeing another."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benthic.base.batch import IGNORE, Batch
from benthic.base.errors import InputError


@dataclass(frozen=True)
class Sample:
    """Tokens with `mask` True on those to learn. `extra[name][i]` is of token i as a target: its advantage, say."""

    ids: list[int]
    mask: list[bool]
    extra: dict[str, list[float]] = field(default_factory=dict)


def pack(samples: Sequence[Sample], length: int, pad_id: int) -> Batch:
    """Rows of `length` tokens, by best fit: the longest sample first, into the fullest row with room for it.

    Labels and `extra` stand one place before their token, as the model predicts it; the rest is IGNORE and 0. Positions
    restart with each sample, segments count from 1, padding is segment 0. InputError names a sample that is too long,
    has nothing to learn, or whose lists do not match.
    """
    if not samples:
        raise InputError("no sample to pack -> give at least one")
    for i, sample in enumerate(samples):
        _check(i, sample, samples[0], length)
    rows = _best_fit([len(sample.ids) for sample in samples], length)
    shape = (len(rows), length)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    positions, segments = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    extra = {name: torch.zeros(shape) for name in samples[0].extra}
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, 1):
            sample, n = samples[i], len(samples[i].ids)
            tokens, learned = torch.tensor(sample.ids), torch.tensor(sample.mask[1:])
            place, before = slice(start, start + n), slice(start, start + n - 1)  # of the tokens; of their predictions
            ids[r, place] = tokens
            labels[r, before] = torch.where(learned, tokens[1:], IGNORE)
            positions[r, place] = torch.arange(n)
            segments[r, place] = segment
            for name, values in sample.extra.items():
                extra[name][r, before] = torch.where(learned, torch.tensor(values[1:]), 0.0)
            start += n
    return Batch(ids=ids, labels=labels, positions=positions, segments=segments, extra=extra)


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of the samples in each row."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[i], 0))
        if at == len(free):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = free.pop(at)
        rows[row].append(i)
        insort(free, (room - lengths[i], row))
    return rows


def _check(i: int, sample: Sample, first: Sample, length: int) -> None:
    n = len(sample.ids)
    if n > length:
        raise InputError(f"sample {i} has {n} tokens, more than length={length} -> cut it or use a greater length")
    for name, values in {"mask": sample.mask, **sample.extra}.items():
        if len(values) != n:
            raise InputError(f"{name} of sample {i} has {len(values)} values for {n} tokens -> give one per token")
    if not any(sample.mask[1:]):
        raise InputError(f"sample {i} has nothing to learn (mask of {n} tokens is empty) -> drop it or fix its mask")
    if sample.extra.keys() != first.extra.keys():
        raise InputError(
            f"sample {i} has extra {sorted(sample.extra)}, sample 0 {sorted(first.extra)} -> make them equal"
        )
