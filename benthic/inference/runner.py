"""The model, its latent cache, and one step of both. Nothing here is derived from the weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.base.errors import BenthicError, DoesNotFit
from benthic.inference import batch, sampler, speculative
from benthic.inference.config import EngineConfig
from benthic.inference.request import NO_DRAFT, Top
from benthic.inference.scheduler import Plan
from benthic.model.cache import CacheView, LatentCache
from benthic.model.transformer import Transformer


class Result(NamedTuple):
    """Per row of the plan: 1 or 2 chosen tokens, their log-probabilities, the next draft, and, as many as the row asked
    for, the likeliest tokens in place of each chosen one."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    drafts: list[int]
    tops: list[list[Top]]


class Runner:
    """Owns the cache: num_pages pages and the trash page before them. Chooses ids below `vocab_size`."""

    def __init__(self, model: Transformer, config: EngineConfig, vocab_size: int):
        self.model, self.config, self.vocab_size = model, config, vocab_size
        self.device = model.embed_tokens.weight.device
        slots = (1 + config.num_pages) * config.page_size
        try:
            self.cache = LatentCache(model.config, slots, self.device, model.dtype)
            self.ids = torch.zeros(slots, dtype=torch.int64, device=self.device)  # whose latents stand there
        except RuntimeError as error:  # what torch raises when the device cannot give the memory
            raise DoesNotFit(
                f"no memory on {self.device} for num_pages={config.num_pages} cache pages of {config.page_size} tokens "
                "-> lower max_num_seqs, max_model_len or num_pages"
            ) from error

    @torch.inference_mode()
    def run(self, plan: Plan, bitmask: Tensor | None = None) -> Result:
        """Compute the plan's tokens and choose the next ones. `bitmask` of the guided rows as in `sampler.choose`."""
        rows = batch.build(plan, self.config.page_size, self.device)
        view = CacheView(self.cache, rows.write, rows.table)
        self.ids[rows.write] = rows.ids
        hidden, _ = self.model.hidden(rows.ids, positions=rows.positions, cache=view)  # [B, Q, d]
        ends = hidden
        if rows.prefill:
            ends = hidden[torch.arange(len(hidden), device=self.device), rows.counts - 1].unsqueeze(1)  # [B, 1, d]
        logits = self.model.logits(ends)  # [B, K, V]
        history = self.ids[rows.table] if rows.controls is not None and rows.controls.penalties is not None else None
        mask = None if bitmask is None else bitmask.to(self.device)
        choice = sampler.choose(logits, rows.controls, rows.places, self.vocab_size, history, mask)  # [B, K]
        accepted = speculative.accept(rows, choice.tokens)
        drafts = torch.full_like(rows.counts, NO_DRAFT)
        if self.config.num_speculative_tokens:
            ahead = speculative.ahead(self.model, view, rows, hidden, choice.tokens, accepted)  # [B, d]
            guess = self.model.logits(ahead)
            drafts = sampler.propose(guess, rows.controls, rows.places + accepted + 1, self.vocab_size)
        return _to_host(plan, choice, accepted, drafts)


def _to_host(plan: Plan, choice: sampler.Choice, accepted: Tensor, drafts: Tensor) -> Result:
    """Wait for the device and cut each row to the tokens it emits. Logits that are not numbers are an error."""
    k = choice.tokens.shape[1]
    integers = torch.cat((choice.tokens, accepted.unsqueeze(1), drafts.unsqueeze(1)), 1).tolist()  # [B, K + 2]
    scores = [row[: 1 + ints[k]] for row, ints in zip(choice.logprobs.tolist(), integers)]
    if not math.isfinite(sum(map(sum, scores))):
        raise BenthicError("the model's logits are not finite -> check the weights (a diverged or damaged checkpoint)")
    drafted = [NO_DRAFT if seq.params.guided else ints[-1] for seq, ints in zip(plan.seqs, integers)]
    return Result([ints[: 1 + ints[k]] for ints in integers], scores, drafted, _tops(plan, choice))


def _tops(plan: Plan, choice: sampler.Choice) -> list[list[Top]]:
    """The reports of the rows that want one, [] for the others."""
    if choice.top_ids is None or choice.top_logprobs is None:
        return [[] for _ in plan.seqs]
    reports = zip(choice.top_ids.tolist(), choice.top_logprobs.tolist())  # per reported row [K, n] each
    return [
        [list(zip(ids, scores))[: seq.params.logprobs] for ids, scores in zip(*next(reports))]
        if seq.params.logprobs
        else []
        for seq in plan.seqs
    ]
