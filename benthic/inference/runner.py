"""The model, its latent cache, and one step of both. Nothing here is derived from the weights."""

import math
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from benthic.base.errors import BenthicError, DoesNotFit
from benthic.inference import batch, sampler, speculative
from benthic.inference.config import EngineConfig
from benthic.inference.scheduler import Plan
from benthic.model.cache import CacheView, LatentCache
from benthic.model.transformer import Transformer


class Result(NamedTuple):
    """Per row of the plan: 1 or 2 chosen tokens, their log-probabilities, and the drafts of the next."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    drafts: list[list[int]]


class Runner:
    """Owns the cache: num_pages pages and the trash page before them. Chooses ids below `vocab_size`."""

    def __init__(self, model: Transformer, config: EngineConfig, vocab_size: int):
        self.model, self.config, self.vocab_size = model, config, vocab_size
        self.device = model.embed_tokens.weight.device
        slots = (1 + config.num_pages) * config.page_size
        try:
            self.cache = LatentCache(model.config, slots, self.device, model.dtype)
        except RuntimeError as error:  # what torch raises when the device cannot give the memory
            raise DoesNotFit(
                f"no memory on {self.device} for num_pages={config.num_pages} cache pages of {config.page_size} tokens "
                "-> lower max_num_seqs, max_model_len or num_pages"
            ) from error

    @torch.inference_mode()
    def run(self, plan: Plan) -> Result:
        """Compute the plan's tokens and choose the next ones."""
        parts = [self._part(part) for part in batch.cut(plan, self.config.max_num_batched_tokens)]
        return Result(*(list(chain.from_iterable(lists)) for lists in zip(*parts)))

    def _part(self, plan: Plan) -> Result:
        rows = batch.build(plan, self.config.page_size, self.device)
        view = CacheView(self.cache, rows.write, rows.table)
        hidden, _ = self.model.hidden(rows.ids, positions=rows.positions, cache=view)  # [B, Q, d]
        ends = hidden
        if rows.prefill:
            ends = hidden[torch.arange(len(hidden), device=self.device), rows.counts - 1].unsqueeze(1)  # [B, 1, d]
        logits = self.model.logits(ends)  # [B, K, V]
        tokens, logprobs = sampler.choose(logits, rows.sampling, self.vocab_size)  # [B, K] each
        accepted = speculative.accept(rows, tokens)
        drafts = tokens[:, :0]  # [B, drafts]
        if self.config.num_speculative_tokens:  # rows that sample need no draft, but others may find their pages
            ahead = speculative.ahead(self.model, view, rows, hidden, tokens, accepted)  # [B, d]
            drafts = self.model.logits(ahead).argmax(-1, keepdim=True)
        return _to_host(tokens, logprobs, accepted, drafts)


def _to_host(tokens: Tensor, logprobs: Tensor, accepted: Tensor, drafts: Tensor) -> Result:
    """Wait for the device and cut each row to the tokens it emits. Logits that are not numbers are an error."""
    k = tokens.shape[1]
    integers = torch.cat((tokens, accepted.unsqueeze(1), drafts), 1).tolist()  # [B, K + 1 + drafts]
    scores = [row[: 1 + ints[k]] for row, ints in zip(logprobs.tolist(), integers)]
    if not math.isfinite(sum(map(sum, scores))):
        raise BenthicError("the model's logits are not finite -> check the weights (a diverged or damaged checkpoint)")
    return Result([ints[: 1 + ints[k]] for ints in integers], scores, [ints[k + 1 :] for ints in integers])
