"""What the rows of a step ask of the sampler, on the device.

Nothing here changes from step to step: where a row stands is an argument of the sampler. So the same rows, running on,
need no new copy, and a host that plans ahead of the device need not know how far the device has come.

Letters: B rows of the step, P shaped rows (all but those that just take the likeliest token), M entries of a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benthic.inference.config import SamplingParams
from benthic.inference.gpu import sent
from benthic.inference.request import Seq

COLDEST, HOTTEST = 1e-37, 1e37  # temperatures that float32 can divide by
ALWAYS = 2**62


@dataclass(frozen=True)
class Additions:
    """Numbers added to single logits while the token chosen stands before place `until` of the sequence."""

    rows: Tensor  # [M] among the P
    ids: Tensor  # [M]
    values: Tensor  # [M] float32; -inf forbids
    until: Tensor  # [M]


@dataclass(frozen=True)
class Penalties:
    """Of the rows that have any."""

    rows: Tensor  # [M] among the P
    steps_rows: Tensor  # [M] the same among the B
    prompt_len: Tensor  # [M]
    repetition: Tensor | None  # [M] float32; None: 1 for all
    frequency: Tensor  # [M] float32
    presence: Tensor  # [M] float32


@dataclass(frozen=True)
class Limit:
    """One of top_k, top_p, min_p, of the rows that use it."""

    rows: Tensor | None  # [M] among the P; None: all of them
    values: Tensor  # [M] int64 for top_k, else float64


@dataclass(frozen=True)
class Controls:
    """None stands for "no row asks for it", and costs nothing."""

    rows: Tensor | None  # [P] among the B; None: all of them
    seed: Tensor  # [P] int64
    temperature: Tensor | None  # [P] float32; None: 1 for all
    greedy: Tensor | None  # [P] bool; None: every row draws
    draws: bool  # some row draws
    additions: Additions | None
    penalties: Penalties | None
    top_k: Limit | None
    top_p: Limit | None
    min_p: Limit | None
    guided: Tensor | None  # [M] among the P: rows for which the step brings a bitmask
    reported: Tensor | None  # [M] among the B: rows that want the likeliest tokens reported
    reports: int  # how many


def build(seqs: Sequence[Seq], device: torch.device | str) -> Controls | None:
    """None where every row just takes the likeliest token."""
    every = [seq.params for seq in seqs]
    shaped = [row for row, seq in enumerate(seqs) if _shaped(seq)]
    reported = [row for row, params in enumerate(every) if params.logprobs]
    if not shaped and not reported:
        return None
    chosen, params = [seqs[row] for row in shaped], [every[row] for row in shaped]
    greedy = [p.greedy for p in params]

    def column(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return sent(values, dtype, device)

    def limit(values: list[float], unused: float, dtype: torch.dtype) -> Limit | None:
        rows = [row for row, value in enumerate(values) if value != unused and not greedy[row]]
        if not rows:
            return None
        return Limit(_some(rows, len(values), device), column([values[row] for row in rows], dtype))

    hot = [1.0 if p.greedy else min(max(p.temperature, COLDEST), HOTTEST) for p in params]
    guided = [row for row, p in enumerate(params) if p.guided]
    return Controls(
        rows=_some(shaped, len(seqs), device),
        seed=column([p.seed for p in params]),
        temperature=None if all(t == 1 for t in hot) else column(hot, torch.float32),
        greedy=column(greedy, torch.bool) if any(greedy) else None,
        draws=not all(greedy),
        additions=_additions(chosen, device),
        penalties=_penalties(chosen, shaped, device),
        top_k=limit([p.top_k for p in params], 0, torch.int64),
        top_p=limit([p.top_p for p in params], 1.0, torch.float64),
        min_p=limit([p.min_p for p in params], 0.0, torch.float64),
        guided=column(guided) if guided else None,
        reported=column(reported) if reported else None,
        reports=max((p.logprobs for p in every), default=0),
    )


def penalised(params: SamplingParams) -> bool:
    """Whether the sampler must know what stands in prompt and answer."""
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _shaped(seq: Seq) -> bool:
    p = seq.params
    return not p.greedy or penalised(p) or p.guided or bool(p.logit_bias) or p.min_tokens > 0


def _some(rows: list[int], count: int, device: torch.device | str) -> Tensor | None:
    return None if len(rows) == count else sent(rows, torch.int64, device)


def _additions(seqs: list[Seq], device: torch.device | str) -> Additions | None:
    """Biases, and the tokens that end an answer while it is shorter than min_tokens."""
    entries = [
        (row, token, value, ALWAYS) for row, seq in enumerate(seqs) for token, value in seq.params.logit_bias.items()
    ]
    entries += [
        (row, token, -torch.inf, seq.prompt_len + seq.params.min_tokens)
        for row, seq in enumerate(seqs)
        if seq.params.min_tokens
        for token in sorted(seq.stop)
    ]
    if not entries:
        return None
    rows, ids, values, until = zip(*entries)
    indices = sent((rows, ids, until), torch.int64, device)
    return Additions(indices[0], indices[1], sent(values, torch.float32, device), indices[2])


def _penalties(seqs: list[Seq], places: list[int], device: torch.device | str) -> Penalties | None:
    """`places` are the rows of `seqs` in the step."""
    rows = [row for row, seq in enumerate(seqs) if penalised(seq.params)]
    if not rows:
        return None
    params = [seqs[row].params for row in rows]
    columns = rows, [places[row] for row in rows], [seqs[row].prompt_len for row in rows]
    integers = sent(columns, torch.int64, device)
    factors = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
    reals = sent(factors, torch.float32, device)
    repetition = reals[:, 0] if any(p.repetition_penalty != 1 for p in params) else None
    return Penalties(integers[0], integers[1], integers[2], repetition, reals[:, 1], reals[:, 2])
