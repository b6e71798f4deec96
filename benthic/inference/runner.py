"""The model, its latent cache, and one step of both. Nothing here is derived from the weights."""

import math
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benthic.base.errors import BenthicError, DoesNotFit
from benthic.inference import batch, sampler, scores, speculative
from benthic.inference.config import EngineConfig
from benthic.inference.request import PromptPlace, Seq, Top
from benthic.inference.routed import RoutedExperts
from benthic.inference.scheduler import Plan
from benthic.inference.scores import NOT_FINITE, Scores
from benthic.inference.share import ranks_of
from benthic.model.cache import CacheView, LatentCache
from benthic.model.transformer import Transformer


class Result(NamedTuple):
    """Per row of the plan: the chosen tokens, at least one, their log-probabilities, the drafts of the next, and, as
    many as the row asked for, the likeliest tokens in place of each chosen one. `scores` of prompts are empty, or per
    row what the plan asked for."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    drafts: list[list[int]]
    tops: list[list[Top]]
    scores: list[list[PromptPlace]]

    @classmethod
    def joined(cls, parts: list["Result"]) -> "Result":
        """Of neighbouring rows."""
        return cls(*(list(chain.from_iterable(lists)) for lists in zip(*parts)))


class Part(NamedTuple):
    """Like rows of a step and what they chose."""

    plan: Plan
    choice: sampler.Choice
    accepted: Tensor
    drafts: Tensor
    scores: Scores | None


class Runner(Protocol):
    """What the engine runs plans with. Up to `ahead` steps may be launched before an older one is collected."""

    cache: LatentCache
    ahead: int
    routed: RoutedExperts | None  # where choices of experts are kept

    def launch(self, plan: Plan, bitmask: Tensor | None = None) -> Any: ...

    def collect(self, pending: Any) -> Result: ...


def make_cache(model: Transformer, config: EngineConfig) -> tuple[LatentCache, Tensor]:
    """num_pages pages and the trash page before them, and the ids [slots] of the tokens whose latents stand there."""
    slots, device = (1 + config.num_pages) * config.page_size, model.embed_tokens.weight.device
    try:
        cache = LatentCache(model.config, slots, device, model.dtype, config.kv_cache_dtype)
        return cache, torch.zeros(slots, dtype=torch.int64, device=device)
    except RuntimeError as error:  # what torch raises when the device cannot give the memory
        raise DoesNotFit(
            f"no memory on {device} for num_pages={config.num_pages} cache pages of {config.page_size} tokens "
            "-> lower max_num_seqs, max_model_len or num_pages"
        ) from error


class PlainRunner:
    """The model as it stands, on any device: the reference. Chooses ids below `vocab_size`."""

    ahead = 0

    def __init__(self, model: Transformer, config: EngineConfig, vocab_size: int):
        self.model, self.config, self.vocab_size = model, config, vocab_size
        self.device = model.embed_tokens.weight.device
        self.cache, self.ids = make_cache(model, config)
        self.routed = RoutedExperts(model, len(self.ids)) if config.return_routed_experts else None
        self.ranks = ranks_of(model)

    def collect(self, pending: list[Part]) -> Result:
        """What `launch` has found."""
        chosen = Result.joined([cut_to_host(p.plan.seqs, p.choice, p.accepted, p.drafts) for p in pending])
        return chosen._replace(scores=[row for part in pending for row in scores.to_host(part.plan, part.scores)])

    @torch.inference_mode()
    def launch(self, plan: Plan, bitmask: Tensor | None = None) -> list[Part]:
        """Compute the plan's tokens and choose the next ones. `bitmask` of the guided rows as in `sampler.choose`."""
        parts, guided = [], 0
        cut = batch.rows(plan) if self.config.deterministic else batch.cut(plan, self.config.max_num_batched_tokens)
        for part in cut:
            first, guided = guided, guided + sum(seq.params.guided for seq in part.seqs)
            parts.append(self._part(part, None if bitmask is None or guided == first else bitmask[first:guided]))
        return parts

    def _part(self, plan: Plan, bitmask: Tensor | None) -> Part:
        rows = batch.build(plan, self.config.page_size, self.device)
        view = CacheView(self.cache, rows.write, rows.table)
        self.ids[rows.write] = rows.ids
        hidden = self._hidden(plan, rows, view)  # [B, Q, d]
        ends = hidden
        if rows.prefill:
            ends = hidden[torch.arange(len(hidden), device=self.device), rows.counts - 1].unsqueeze(1)  # [B, 1, d]
        logits = self._logits(ends)  # [B, K, V]
        history = self.ids[rows.table] if rows.controls is not None and rows.controls.penalties is not None else None
        mask = None if bitmask is None else bitmask.to(self.device)
        choice = sampler.choose(logits, rows.controls, rows.places, self.vocab_size, history, mask)  # [B, K]
        choice = choice._replace(tokens=self.ranks.agree(choice.tokens))
        accepted = speculative.accept(rows, choice.tokens)
        drafts = choice.tokens[:, :0]  # [B, drafts]
        if self.config.num_speculative_tokens:
            ahead = speculative.ahead(self.model, view, rows, hidden, choice.tokens, accepted)  # [B, d]
            drafts = speculative.drafts(self.model, self.cache, rows, ahead, accepted, plan.drafts, self.vocab_size)
            drafts = self.ranks.agree(drafts)
        return Part(
            plan, choice, accepted, drafts, self._scores(plan, hidden) if any(end for _, end in plan.scores) else None
        )

    def _scores(self, plan: Plan, hidden: Tensor) -> Scores:
        """Of the prompts of a part, hidden [B, Q, d]."""
        begins = range(0, hidden.shape[0] * hidden.shape[1], hidden.shape[1])
        asked = torch.from_numpy(scores.places(plan, begins)).to(self.device)
        flat, one = hidden.flatten(0, 1), 1 if self.config.deterministic else 0
        return scores.score(plan, flat, asked, self.model.logits, self.vocab_size, sampler.PLAIN, one)

    def _hidden(self, plan: Plan, rows: batch.Rows, view: CacheView) -> Tensor:
        """Hidden states [B, Q, d]. Deterministic: of one row, token by token, each over exactly its own context. All
        shapes then follow from a token's position, and libraries, which choose by shapes, sum alike in any company."""
        cuts = [(slice(None), slice(None))]
        if self.config.deterministic:
            cuts = [(slice(t, t + 1), slice(plan.starts[0] + t + 1)) for t in range(plan.counts[0])]
        parts = []
        for new, context in cuts:
            write = view.write[:, new]
            own = CacheView(view.cache, write, view.table[:, context])
            hidden, choices = self.model.hidden(rows.ids[:, new], positions=rows.positions[:, new], cache=own)
            if self.routed is not None:
                self.routed.write(write.flatten(), [choice.topk_ids for choice in choices])
            parts.append(hidden)
        return torch.cat(parts, 1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden [B, K, d] -> float32 logits [B, K, V]; deterministic: place by place."""
        if not self.config.deterministic:
            return self.model.logits(hidden)
        return torch.cat([self.model.logits(one.clone()) for one in hidden.split(1, 1)], 1)  # as aligned as alone


def cut_to_host(seqs: list[Seq], choice: sampler.Choice, accepted: Tensor, drafts: Tensor) -> Result:
    """Wait for the device and cut each row to the tokens it emits; rows past `seqs` are padding. Logits that are not
    numbers are an error."""
    k, rows = choice.tokens.shape[1], len(seqs)
    integers = torch.cat((choice.tokens, accepted.unsqueeze(1), drafts), 1)[:rows].tolist()  # [B, K + 1 + drafts]
    logprobs = [row[: 1 + ints[k]] for row, ints in zip(choice.logprobs.tolist(), integers)]
    if not math.isfinite(sum(map(sum, logprobs))):
        raise BenthicError(NOT_FINITE)
    tokens, drafted = [ints[: 1 + ints[k]] for ints in integers], [ints[k + 1 :] for ints in integers]
    return Result(tokens, logprobs, drafted, _tops(seqs, choice), [])


def _tops(seqs: list[Seq], choice: sampler.Choice) -> list[list[Top]]:
    """The reports of the rows that want one, [] for the others."""
    if choice.top_ids is None or choice.top_logprobs is None:
        return [[] for _ in seqs]
    reports = zip(choice.top_ids.tolist(), choice.top_logprobs.tolist())  # per reported row [K, n] each
    return [
        [list(zip(ids, scores))[: seq.params.logprobs] for ids, scores in zip(*next(reports))]
        if seq.params.logprobs
        else []
        for seq in seqs
    ]
