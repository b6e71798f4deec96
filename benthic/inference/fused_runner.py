"""The runner for a GPU: packed tokens, kernels, CUDA graphs for decode, and results that are fetched a step later.

A step of decode rows alone is two graphs, captured when a size first comes up: one from the step's one copied array to
logits, one from logits to the next step's tokens, all drafts included: at once where every row takes the likeliest, and
for rows that are sampled once the same rows have run for a while. Everything else runs eagerly. The tokens that a step
chose stay on the device for the next step (`packed.Feed`), so that the next can be launched before they are known here;
`launch` returns at once, `collect` waits.

Letters: B decode rows of Q queries, C chunks of prompts, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic.inference import ahead, sampler, scores
from benthic.inference import controls as controls_of
from benthic.inference.ahead import Ends
from benthic.inference.config import EngineConfig
from benthic.inference.controls import Controls
from benthic.inference.fused import Fused, Tokens
from benthic.inference.gpu import Cuda, Staging
from benthic.inference.packed import (
    Chunks,
    DecodeRows,
    Feed,
    apart,
    chunk_rows,
    decode_array,
    decode_rows,
    joined,
    width_of,
)  # fmt: skip
from benthic.inference.quick import QUICK
from benthic.inference.request import Seq
from benthic.inference.routed import RoutedExperts
from benthic.inference.runner import Result, cut_to_host, make_cache
from benthic.inference.sampler import Choice
from benthic.inference.scheduler import Plan
from benthic.inference.scores import Scores
from benthic.inference.share import ranks_of
from benthic.kernels.speculate import verify
from benthic.model.transformer import Transformer

STEADY = 16  # steps after which a graph for the same sampled rows pays
STAGES = 9  # arrays under way: three of each step, of the one that runs, the next, and the one that is planned


@dataclass
class Chosen:
    """What the rows of one kind chose [rows, K], how many drafts they accepted [rows], and their next drafts."""

    choice: Choice
    accepted: Tensor
    drafts: Tensor


@dataclass
class Tail:
    """A graph from `logits` to `chosen`, for rows with these controls."""

    controls: Controls | None
    graph: Any
    chosen: Chosen


@dataclass
class Captured:
    """A graph from `data` [B, Q + 3 + W] to `hidden` [B Q, d] and `logits` [B Q, V], and its tails: for rows that all
    take the likeliest (True), and for the last rows that did not."""

    data: Tensor
    rows: DecodeRows
    tokens: Tokens
    hidden: Tensor
    logits: Tensor
    graph: Any
    tails: dict[bool, Tail] = field(default_factory=dict)


@dataclass
class Pending:
    """A step on its way; its results are on the host once `done` has happened."""

    plan: Plan
    parts: list[Chosen]
    scores: Scores | None
    done: Any


class FusedRunner:
    """Owns the cache and the graphs. Chooses ids below `vocab_size`. One step may be launched ahead of the other."""

    ahead = 1

    def __init__(self, model: Transformer, config: EngineConfig, vocab_size: int, gpu: Any = None):
        self.model, self.config, self.vocab_size = model, config, vocab_size
        self.device = model.embed_tokens.weight.device
        self.cache, self.ids = make_cache(model, config)
        self.ranks = ranks_of(model)
        self.forward = Fused(model, self.cache, config.page_size, config.deterministic)
        self.routed = RoutedExperts(model, len(self.ids)) if config.return_routed_experts else None
        self.joined = apart if config.deterministic else joined
        rows = config.max_num_seqs
        self.feed = Feed(
            torch.zeros(rows, 1 + config.num_speculative_tokens, dtype=torch.int64, device=self.device),
            torch.zeros(rows, dtype=torch.int64, device=self.device),
        )
        self.graphs: dict[tuple[int, int, int], Captured] = {}  # by B, W, Q
        self.gpu = gpu or Cuda()
        self.staging = Staging(self.gpu, self.device, STAGES)
        self.known: tuple[list[Seq], Controls | None] = ([], None)  # of the last decode rows
        self.steady = 0  # steps that they have run

    @torch.inference_mode()
    def launch(self, plan: Plan, bitmask: Tensor | None = None) -> Pending:
        """Start a step. `bitmask` of the guided rows as in `sampler.choose`."""
        decode, prompts = plan.seqs[: plan.decode], plan.seqs[plan.decode :]
        guided = sum(seq.params.guided for seq in decode)
        cut = () if bitmask is None else (bitmask[:guided], bitmask[guided:])
        masks: list[Tensor | None] = [mask.to(self.device) for mask in cut] or [None, None]
        found, scored = self._eager(plan, masks) if prompts else ([self._replay(plan, masks[0])], None)
        parts = [self._to_host(part) for part in found]
        host = None if scored is None else Scores(*map(self._copied, scored))
        return Pending(plan, parts, host, self.gpu.event())

    def collect(self, pending: Pending) -> Result:
        """Wait for a step's results."""
        pending.done.synchronize()
        plan, begin = pending.plan, 0
        results = []
        for part in pending.parts:
            seqs = plan.seqs[begin : plan.decode] if begin < plan.decode else plan.seqs[begin:]
            results.append(cut_to_host(seqs, part.choice, part.accepted, part.drafts))
            begin += len(seqs)
        return Result.joined(results)._replace(scores=scores.to_host(plan, pending.scores))

    # Decode rows alone

    def _replay(self, plan: Plan, mask: Tensor | None) -> Chosen:
        rows = min(_bucket(plan.decode), self.config.max_num_seqs)
        key = rows, _power(width_of(plan), 16), plan.queries
        captured = self.graphs.get(key) or self._capture(*key)
        columns = captured.data.shape[1] - plan.queries - 3
        self.staging.send(decode_array(plan, rows, plan.queries, columns), captured.data)
        captured.graph.replay()
        controls = self._controls(plan.seqs)
        steady = controls is None or (mask is None and self.steady > STEADY)
        if not steady or plan.drafts != plan.queries - 1:  # a change of drafts is too rare for a graph
            ends, next_ids = self._decoded(captured.rows, captured.logits, controls, mask, plan.decode, plan.drafts)
            return self._finish([ends], captured.hidden, next_ids, captured.tokens, plan.drafts)[0]
        tail = captured.tails.get(controls is None)
        if tail is None or tail.controls is not controls:
            tail = self._capture_tail(captured, controls, plan)
        tail.graph.replay()
        return tail.chosen

    def _capture(self, rows: int, width: int, queries: int) -> Captured:
        data = torch.zeros(rows, queries + 3 + width, dtype=torch.int64, device=self.device)
        data[:, queries] = -1

        def step() -> tuple[DecodeRows, Tokens, Tensor, Tensor]:
            found = decode_rows(data, queries, self.feed, self.config.page_size)
            tokens = self.joined(found, None)
            hidden = self._hidden(tokens)
            return found, tokens, hidden, self.forward.logits(hidden)

        graph, (found, tokens, hidden, logits) = self.gpu.graph(step)
        captured = Captured(data, found, tokens, hidden, logits, graph)
        self.graphs[rows, width, queries] = captured
        return captured

    def _capture_tail(self, c: Captured, controls: Controls | None, plan: Plan) -> Tail:
        def tail() -> Chosen:
            ends, next_ids = self._decoded(c.rows, c.logits, controls, None, plan.decode, plan.drafts)
            return self._finish([ends], c.hidden, next_ids, c.tokens, plan.drafts)[0]

        feed = self.feed.ids.clone(), self.feed.gain.clone()  # which warming up overwrites
        graph, chosen = self.gpu.graph(tail)
        c.tails[controls is None] = found = Tail(controls, graph, chosen)
        self.feed.ids.copy_(feed[0])
        self.feed.gain.copy_(feed[1])
        return found

    # Steps with prompts

    def _eager(self, plan: Plan, masks: list[Tensor | None]) -> tuple[list[Chosen], Scores | None]:
        chunks, d, parts = chunk_rows(plan, self.config.page_size, self.staging.send), plan.decode, []
        found = None
        if d:
            data = self.staging.send(decode_array(plan, d, plan.queries, width_of(plan)))
            found = decode_rows(data, plan.queries, self.feed, self.config.page_size)
        tokens = self.joined(found, chunks)
        hidden = self._hidden(tokens)
        n = d * plan.queries
        if found is not None:
            logits = self.forward.logits(hidden[:n])
            parts.append(self._decoded(found, logits, self._controls(plan.seqs[:d]), masks[0], d, plan.drafts))
        parts.append(self._prompted(plan, chunks, hidden[n:], n, masks[1]))
        next_ids = torch.cat([ids for _, ids in parts])
        scored = self._scores(plan, chunks, hidden[n:]) if plan.scores else None
        return self._finish([ends for ends, _ in parts], hidden, next_ids, tokens, plan.drafts), scored

    def _scores(self, plan: Plan, chunks: Chunks, hidden: Tensor) -> Scores:
        """Of chunks, whose hidden states are given."""
        begins = [0] * plan.decode + [0, *accumulate(chunks.counts)][:-1]
        asked = self.staging.send(scores.places(plan, begins))
        return scores.score(plan, hidden, asked, self.forward.logits, self.vocab_size, QUICK)

    # What both share: rows choose, then all draft

    def _hidden(self, tokens: Tokens) -> Tensor:
        self.ids[tokens.slots] = tokens.ids
        if self.routed is None:
            return self.forward.hidden(tokens)
        choices: list[Tensor] = []
        hidden = self.forward.hidden(tokens, choices)
        self.routed.write(tokens.slots, choices)
        return hidden

    def _controls(self, seqs: list[Seq]) -> Controls | None:
        """Of decode rows; the same rows running on need no new copy."""
        self.steady += 1
        if self.known[0] != seqs:
            self.known, self.steady = (list(seqs), controls_of.build(seqs, self.device)), 0
        return self.known[1]

    def _decoded(
        self, found: DecodeRows, logits: Tensor, controls: Controls | None, mask: Tensor | None, real: int, drafts: int
    ) -> tuple[Ends, Tensor]:
        """The choices of decode rows from logits [B Q, V], and the token after each of their tokens [B Q]. Rows of
        padding are cut off where rows have controls, which know only the `real` ones."""
        every, queries = found.ids.shape
        b = every if controls is None else real
        first, table = found.first[:b], found.decode.table[:b]
        own = logits.view(every, queries, -1)[:b]
        choice = self._choose(own, controls, first + 1, partial(self._paged, found), mask)
        size = self.config.page_size
        verified = verify(found.ids[:b], found.counts[:b], choice.tokens, first, table, drafts, size)
        ends = Ends(choice, verified, table, controls)
        next_ids = choice.tokens.flatten()
        return ends, F.pad(next_ids, (0, (every - b) * queries)) if b < every else next_ids

    def _prompted(
        self, plan: Plan, chunks: Chunks, hidden: Tensor, begin: int, mask: Tensor | None
    ) -> tuple[Ends, Tensor]:
        """The same of chunks, whose hidden states are given; `begin` tokens stand before them."""
        d, seqs = plan.decode, plan.seqs[plan.decode :]
        controls, position = controls_of.build(seqs, self.device), chunks.tokens[1][chunks.last]
        logits = self.forward.logits(hidden[chunks.last]).unsqueeze(1)
        choice = self._choose(logits, controls, position + 1, partial(self._listed, seqs), mask)
        whole = torch.tensor([s + c == seq.fill for seq, s, c in zip(seqs, plan.starts[d:], plan.counts[d:])])
        known = chunks.next_ids[chunks.last]
        last = torch.where(whole.to(self.device), choice.tokens[:, 0], known)
        next_ids = chunks.next_ids.index_copy(0, chunks.last, last)
        one, last = torch.ones_like(position), last.unsqueeze(1)
        verified = verify(last, one, last, position, chunks.table, plan.drafts, self.config.page_size)
        return Ends(choice, verified._replace(at=begin + chunks.last), chunks.table, controls), next_ids

    def _finish(self, parts: list[Ends], hidden: Tensor, next_ids: Tensor, tokens: Tokens, drafts: int) -> list[Chosen]:
        """Fill the prediction module's latents, draft, and leave to the next step what it may go on with."""
        if self.config.num_speculative_tokens:
            self.forward.mtp_fill(hidden, next_ids, tokens, 0)
        begin, chosen = 0, []
        for part in parts:
            rows = slice(begin, begin + len(part.table))
            guesses, begin = self.feed.ids[rows, 1 : 1 + drafts], rows.stop
            self.feed.ids[rows, 0] = part.verified.last
            self.feed.gain[rows] = part.verified.accepted
            ahead.draft(self.forward, part, hidden, guesses, self.vocab_size)
            chosen.append(Chosen(part.choice, part.verified.accepted, guesses))
        return chosen

    def _choose(
        self, logits: Tensor, controls: Controls | None, places: Tensor, history: Callable[[], Tensor],
        mask: Tensor | None,
    ) -> Choice:  # fmt: skip
        """logits [B, K, V]; `history` gives the ids of each row [B, S], asked for only where a row has penalties."""
        ids = history() if controls is not None and controls.penalties is not None else None
        choice = sampler.choose(logits, controls, places, self.vocab_size, ids, mask, QUICK)
        return choice._replace(tokens=self.ranks.agree(choice.tokens))

    def _paged(self, found: DecodeRows) -> Tensor:
        """The ids of decode rows, drafts included, from the slots of their pages."""
        pages = found.decode.table.long().unsqueeze(2) * self.config.page_size
        slots = pages + torch.arange(self.config.page_size, device=self.device)
        return self.ids[slots.flatten(1)]

    def _listed(self, seqs: list[Seq]) -> Tensor:
        """The ids of prompts."""
        longest = max(len(seq.ids) for seq in seqs)
        return torch.tensor([seq.ids + [0] * (longest - len(seq.ids)) for seq in seqs], device=self.device)

    def _to_host(self, chosen: Chosen) -> Chosen:
        choice = Choice(*(None if t is None else self._copied(t) for t in chosen.choice))  # type: ignore[arg-type]
        return Chosen(choice, self._copied(chosen.accepted), self._copied(chosen.drafts))

    def _copied(self, tensor: Tensor) -> Tensor:
        return self.gpu.pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)


def _bucket(rows: int) -> int:
    """The next size that graphs are captured for."""
    return _power(rows, 1) if rows <= 16 else -(-rows // 16) * 16


def _power(count: int, least: int) -> int:
    """The next power of two, from `least` on."""
    return max(least, 1 << (count - 1).bit_length())
