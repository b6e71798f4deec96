"""What the model thinks of a prompt: of each token the log-probability, the rank, and the likeliest in its place.

Logits of a whole prompt are larger than its hidden states by far, so they are made of a slice of places at a time: at
most SCRATCH bytes in float32, and a few times that for what follows from them. Which places a step scores, its plan
says (`Plan.scores`), so that processes which share a model make the same slices.

Letters: N places of a step, n most alternatives that one of its requests asks for, d hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benthic.base.errors import BenthicError
from benthic.inference.request import PromptPlace
from benthic.inference.sampler import Ways
from benthic.inference.scheduler import Plan

SCRATCH = 2**27
NOT_FINITE = "the model's logits are not finite -> check the weights (a diverged or damaged checkpoint)"


class Scores(NamedTuple):
    """Of N places, row by row: log softmax(logits) of the next token, how many tokens are likelier, and the likeliest
    [N, n] with theirs."""

    logprobs: Tensor
    likelier: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def places(plan: Plan, begins: Sequence[int]) -> np.ndarray:
    """[2, N] int64: where the places stand among hidden states in which row i's are at `begins[i]` and after, and the
    tokens that follow them."""
    where, after = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for seq, start, begin, (first, end) in zip(plan.seqs, plan.starts, begins, plan.scores, strict=True):
        where.append(np.arange(first, end) + (begin - start))
        after.append(np.array(seq.ids[first + 1 : end + 1], np.int64))
    return np.stack((np.concatenate(where), np.concatenate(after)))


def score(
    plan: Plan, hidden: Tensor, asked: Tensor, logits: Callable[[Tensor], Tensor], vocab_size: int, ways: Ways,
    at_once: int = 0,
) -> Scores:  # fmt: skip
    """hidden [T, d] and `places` [2, N] on its device -> scores. `logits` of hidden [., d] are [., V or more]; ranks
    and alternatives are among ids below `vocab_size`. `at_once` places make a slice; 0: as many as SCRATCH holds."""
    count = max(seq.params.prompt_logprobs for seq in plan.seqs)
    parts = []
    for where, after in zip(*(each.split(at_once or max(1, SCRATCH // (4 * vocab_size))) for each in asked)):
        found = logits(hidden.index_select(0, where))
        _, _, peak, log_sum = ways.read(found, vocab_size)
        allowed = found[:, :vocab_size]
        own = allowed.gather(1, after.unsqueeze(1))  # [., 1]
        top = allowed.topk(min(count, vocab_size), 1)
        both = torch.cat((own, top.values), 1).float()
        logprobs = (both - peak.unsqueeze(1)) - log_sum.unsqueeze(1)
        parts.append(Scores(logprobs[:, 0], (allowed > own).sum(1), top.indices, logprobs[:, 1:]))
    return Scores(*map(torch.cat, zip(*parts)))


def to_host(plan: Plan, scores: Scores | None) -> list[list[PromptPlace]]:
    """Per row of the plan the places that it scored; [] where no row is asked to. Waits for the device. Logits that are
    not numbers are an error."""
    if scores is None:
        return [[] for _ in plan.scores]
    logprobs = scores.logprobs.tolist()
    if not math.isfinite(sum(logprobs)):
        raise BenthicError(NOT_FINITE)
    tops = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist())
    found = zip(logprobs, scores.likelier.tolist(), tops)
    return [
        [
            PromptPlace(logprob, 1 + likelier, list(zip(*top))[: seq.params.prompt_logprobs])
            for _, (logprob, likelier, top) in zip(range(first, end), found)
        ]
        for seq, (first, end) in zip(plan.seqs, plan.scores)
    ]
