"""Logits to tokens, row by row independent: what a row chooses depends on its logits, its controls, its place in the
sequence and what stands before it, never on its neighbours.

Order: additions (logit_bias, min_tokens) and the grammar's bitmask, repetition, frequency and presence penalty,
temperature, top_k, top_p of what is left, min_p. Log-probabilities are those of the model itself, before all of that.

Weights are integers, 2^44 for the likeliest token, and sums of integers are exact: no order of summation, and so no
neighbour, changes a choice. Tokens less likely than the likeliest by a factor of 2^-44 have weight 0.

The random numbers of a token are a function of the request's seed and of the token's place in the sequence (chance.py).
So a draft can be made with the very numbers that its token will be drawn with, and to verify it is to draw and compare
(speculative.py).

Nothing here waits for the device, and shapes follow from those of the arguments.

Letters: B rows of the step, P shaped rows, M rows of one kind among them, K positions per row (more than 1 when drafts
are verified), V vocabulary, S longest context.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.inference.chance import draw
from benthic.inference.controls import Controls, Limit, Penalties
from benthic.inference.select import leading, padded

UNIT = 2.0**44  # weight of the likeliest token


class Choice(NamedTuple):
    """tokens [B, K], their log softmax(logits) [B, K], and for the rows that want a report the likeliest tokens, best
    first, with theirs: [M, K, n] each, None where no row wants one."""

    tokens: Tensor
    logprobs: Tensor
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


class Ways(NamedTuple):
    """How the two things are found that look at every logit; both ways agree but for the last bits of a sum."""

    read: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]  # as `read`
    pick: Callable[[Tensor, Controls, Tensor, bool], Tensor]  # as `pick`


def read(logits: Tensor, allowed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [..., V] -> the likeliest id below `allowed`, its log softmax(logits), and the two numbers that make any
    logit one, logit - peak - log_sum: all [...]. `kernels.likeliest` reads the logits once for the same."""
    every, tokens = logits.float().log_softmax(-1), logits[..., :allowed].argmax(-1)
    peak, at = logits.float().max(-1)
    return tokens, _at(every, tokens), peak, -_at(every, at)


def pick(logits: Tensor, controls: Controls, where: Tensor, cut: bool) -> Tensor:
    """logits [P, K, V] and places [P, K] -> tokens [P, K]: drawn, or the likeliest of greedy rows. `cut`: by
    top_k, top_p and min_p."""
    if not controls.draws:
        return logits.argmax(-1)
    logits = logits.float()
    below = padded(logits, logits.amax(-1, keepdim=True))  # [P, K, V'] 0 for the likeliest, else negative
    scaled = below if controls.temperature is None else below / controls.temperature[:, None, None]
    weights = (scaled.exp() * UNIT).long()  # [P, K, V']
    if cut:
        weights = _cut(weights, below, controls)
    drawn = draw(weights, controls.seed.unsqueeze(1), where).clamp(max=logits.shape[2] - 1)
    if controls.greedy is None:
        return drawn
    return torch.where(controls.greedy.unsqueeze(1), logits.argmax(-1), drawn)


PLAIN = Ways(read, pick)


def choose(
    logits: Tensor,
    controls: Controls | None,
    places: Tensor,
    vocab_size: int,
    history: Tensor | None = None,
    bitmask: Tensor | None = None,
    ways: Ways = PLAIN,
) -> Choice:
    """logits [B, K, V], float32 or as the output head leaves them -> tokens below `vocab_size`.

    places [B]: where in the sequence the token chosen at the first of the K positions will stand.
    history [B, S]: ids of the sequence, drafts at their places included; only read where a row has penalties.
    bitmask [M, ceil(V / 32)] int32: a row per guided row; bit i of word w allows token 32 w + i at the first position.
    """
    tokens, logprobs, peak, log_sum = ways.read(logits, vocab_size)
    if controls is None:
        return Choice(tokens, logprobs)
    if len(controls.seed):
        own = _of_shaped(logits[..., :vocab_size], controls)  # [P, K, V]
        where = _ahead(places, controls, logits.shape[1])  # [P, K]
        own = _change(own, controls, where, history, bitmask)
        tokens = _among(tokens, controls, ways.pick(own, controls, where, True))
        logprobs = (_at(logits, tokens).float() - peak) - log_sum
    if (rows := controls.reported) is None:
        return Choice(tokens, logprobs)
    top = logits[rows, :, :vocab_size].float().topk(min(controls.reports, vocab_size), dim=-1)
    scores = (top.values - peak[rows].unsqueeze(2)) - log_sum[rows].unsqueeze(2)
    return Choice(tokens, logprobs, top.indices, scores)


def propose(
    logits: Tensor, controls: Controls | None, places: Tensor, vocab_size: int, ways: Ways = PLAIN
) -> Tensor:  # fmt: skip
    """A draft per row: logits [B, V] of a guessing module -> tokens [B] for the places [B].

    Drawn with the numbers that the place's token will be drawn with: distributions alike choose alike. Cutting the
    guess with top_k, top_p and min_p would cost more time than it wins.
    """
    if controls is None or not controls.draws:
        return ways.read(logits, vocab_size)[0]
    own = _of_shaped(logits[..., :vocab_size], controls).unsqueeze(1)  # [P, 1, V]
    picked = ways.pick(own, controls, _ahead(places, controls, 1), False).squeeze(1)
    return picked if controls.rows is None else _among(ways.read(logits, vocab_size)[0], controls, picked)


def _at(values: Tensor, ids: Tensor) -> Tensor:
    """values [..., V] at ids [...]."""
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _of_shaped(x: Tensor, controls: Controls) -> Tensor:
    return x if controls.rows is None else x[controls.rows]


def _among(tokens: Tensor, controls: Controls, picked: Tensor) -> Tensor:
    """tokens of all rows with those of the shaped rows in place."""
    return picked if controls.rows is None else tokens.index_copy(0, controls.rows, picked)


def _ahead(places: Tensor, controls: Controls, count: int) -> Tensor:
    """[P, K] places of the tokens chosen at the K positions of the shaped rows."""
    return _of_shaped(places, controls).unsqueeze(1) + torch.arange(count, device=places.device)


def _change(
    logits: Tensor, controls: Controls, where: Tensor, history: Tensor | None, bitmask: Tensor | None
) -> Tensor:
    """Logits [P, K, V] after everything that comes before the temperature. Where something changes them they become
    float32 and the argument is left as it is."""
    if controls.additions is None and controls.penalties is None and controls.guided is None:
        return logits
    if logits.dtype != torch.float32 or controls.rows is None:  # else it is a copy already
        logits = logits.to(torch.float32, copy=True)
    if (a := controls.additions) is not None:
        values = torch.where(where[a.rows] < a.until.unsqueeze(1), a.values.unsqueeze(1), 0.0)  # [M, K]
        positions = torch.arange(logits.shape[1], device=logits.device)
        logits.index_put_((a.rows.unsqueeze(1), positions, a.ids.unsqueeze(1)), values, accumulate=True)
    if controls.guided is not None:
        if bitmask is None:
            raise ValueError("guided rows without a bitmask")
        logits[controls.guided] = logits[controls.guided].masked_fill(~unpack(bitmask, logits.shape[2]), -torch.inf)
    if (p := controls.penalties) is not None:
        if history is None:
            raise ValueError("rows with penalties without their history")
        logits[p.rows] = _penalise(logits[p.rows], p, where[p.rows, 0], history[p.steps_rows])
    return logits


def unpack(bitmask: Tensor, vocab_size: int) -> Tensor:
    """[M, ceil(V / 32)] int32 -> [M, 1, V] bool."""
    bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return ((bitmask.unsqueeze(2) >> bits) & 1).bool().flatten(1)[:, :vocab_size].unsqueeze(1)


def _penalise(logits: Tensor, penalties: Penalties, first: Tensor, ids: Tensor) -> Tensor:
    """logits [M, K, V]; first [M] places of the first tokens to choose; ids [M, S]. Position j counts what stands
    before place first + j, drafts included."""
    places = torch.arange(ids.shape[1], device=ids.device)
    before = places < first.unsqueeze(1)  # [M, S]
    seen = logits.new_zeros(logits.shape[0], logits.shape[2]).scatter_add_(1, ids, before.float())
    before &= places >= penalties.prompt_len.unsqueeze(1)
    counts = torch.zeros_like(seen).scatter_add_(1, ids, before.float())  # [M, V] whole numbers
    rows = []
    for j in range(logits.shape[1]):
        if j:
            draft = ids.gather(1, (first + j - 1).clamp(max=ids.shape[1] - 1).unsqueeze(1))  # [M, 1]
            one = torch.ones_like(draft, dtype=logits.dtype)
            counts.scatter_add_(1, draft, one)
            seen.scatter_add_(1, draft, one)
        row = logits[:, j]
        if penalties.repetition is not None:
            factor = penalties.repetition.unsqueeze(1)
            row = torch.where(seen > 0, torch.where(row > 0, row / factor, row * factor), row)
        row = row - penalties.frequency.unsqueeze(1) * counts
        rows.append(row - penalties.presence.unsqueeze(1) * (counts > 0))
    return torch.stack(rows, 1)


def _cut(weights: Tensor, below: Tensor, controls: Controls) -> Tensor:
    """weights [P, K, V'] with 0 for what top_k, then top_p of what is left, then min_p leave out."""
    if (limit := controls.top_k) is not None:
        kept = leading(_of(below, limit), torch.ones_like(_of(weights, limit)), _column(limit))
        weights = _masked(weights, limit, kept)
    if (limit := controls.top_p) is not None:
        left = _of(weights, limit)
        share = (_column(limit) * left.sum(-1)).ceil().long()  # [M, K]
        weights = _masked(weights, limit, leading(_of(below, limit), left, share.clamp(min=1)))
    if (limit := controls.min_p) is not None:
        least = (_column(limit) * UNIT).ceil().unsqueeze(2)  # [M, 1, 1]
        weights = _masked(weights, limit, _of(weights, limit) >= least)
    return weights


def _of(x: Tensor, limit: Limit) -> Tensor:
    return x if limit.rows is None else x[limit.rows]


def _column(limit: Limit) -> Tensor:
    return limit.values.unsqueeze(1)


def _masked(weights: Tensor, limit: Limit, kept: Tensor) -> Tensor:
    if limit.rows is None:
        return weights * kept
    return weights.index_copy(0, limit.rows, weights[limit.rows] * kept)
