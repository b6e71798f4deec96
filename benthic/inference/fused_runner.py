"""The runner for a GPU: packed tokens, kernels, CUDA graphs for decode, and results that are fetched a step later.

A step of decode rows alone is two graphs, captured when a size first comes up: one from the step's one copied array to
logits, one from logits to the next step's tokens where every row takes the likeliest. Everything else runs eagerly.
The tokens that a step chose stay on the device for the next step (`packed.Feed`), so that the next can be launched
before they are known here; `launch` returns at once, `collect` waits.

Letters: B decode rows of Q queries, C chunks of prompts, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benthic.base.errors import InputError
from benthic.inference import controls as controls_of
from benthic.inference import sampler
from benthic.inference.config import EngineConfig
from benthic.inference.controls import Controls
from benthic.inference.fused import Fused, Tokens
from benthic.inference.packed import Chunks, DecodeRows, Feed, apart, chunk_rows, decode_array, decode_rows, joined
from benthic.inference.quick import QUICK
from benthic.inference.request import Seq
from benthic.inference.routed import RoutedExperts
from benthic.inference.runner import Result, cut_to_host, make_cache
from benthic.inference.sampler import Choice
from benthic.inference.scheduler import Plan
from benthic.inference.share import ranks_of
from benthic.inference.speculative import accept
from benthic.model.transformer import Transformer

T = TypeVar("T")
STAGES = 3  # buffers for the step's array: a copy may still wait while the host fills the next


@dataclass
class Chosen:
    """What the rows of one kind chose [rows, K], how many drafts they accepted [rows], and their next drafts."""

    choice: Choice
    accepted: Tensor
    drafts: Tensor


@dataclass
class Captured:
    """A graph from `data` [B, Q + 3 + W] to `hidden` [B Q, d] and `logits` [B, Q, V]; `tail` leaves `chosen`."""

    data: Tensor
    rows: DecodeRows
    tokens: Tokens
    hidden: Tensor
    logits: Tensor
    graph: Any
    tail: Any = None
    chosen: Chosen | None = None


@dataclass
class Pending:
    """A step on its way; its results are on the host once `done` has happened."""

    plan: Plan
    parts: list[Chosen]
    done: Any


class Cuda:
    """What a runner asks of the GPU beside computing."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise InputError("backend='fused' needs a CUDA GPU, there is none -> use plain or auto")
        self.pool = torch.cuda.graph_pool_handle()

    def pinned(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies need not wait for."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def event(self) -> torch.cuda.Event:
        """Something that happens when all work up to here is done."""
        event = torch.cuda.Event()
        event.record()
        return event

    def graph(self, step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """`step` run once to compile what it needs, then captured: (graph, what replays refill)."""
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others may wait for the GPU
            out = step()
        return graph, out


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
        self.queries = 1 + config.num_speculative_tokens
        rows = config.max_num_seqs
        self.feed = Feed(
            torch.zeros(rows, self.queries, dtype=torch.int64, device=self.device),
            torch.zeros(rows, dtype=torch.int64, device=self.device),
        )
        self.graphs: dict[tuple[int, int], Captured] = {}
        self.gpu = gpu or Cuda()
        self.staging: list[Tensor] = []
        self.known: tuple[list[Seq], Controls | None] = ([], None)  # of the last decode rows

    @torch.inference_mode()
    def launch(self, plan: Plan, bitmask: Tensor | None = None) -> Pending:
        """Start a step. `bitmask` of the guided rows as in `sampler.choose`."""
        decode, prompts = plan.seqs[: plan.decode], plan.seqs[plan.decode :]
        guided = sum(seq.params.guided for seq in decode)
        cut = () if bitmask is None else (bitmask[:guided], bitmask[guided:])
        masks: list[Tensor | None] = [mask.to(self.device) for mask in cut] or [None, None]
        if not prompts:
            parts = [self._replay(plan, masks[0])]
        else:
            parts = self._eager(plan, masks)
        host = [self._to_host(part) for part in parts]
        return Pending(plan, host, self.gpu.event())

    def collect(self, pending: Pending) -> Result:
        """Wait for a step's results."""
        pending.done.synchronize()
        plan, begin = pending.plan, 0
        results = []
        for part in pending.parts:
            seqs = plan.seqs[begin : plan.decode] if begin < plan.decode else plan.seqs[begin:]
            results.append(cut_to_host(seqs, part.choice, part.accepted, part.drafts))
            begin += len(seqs)
        return Result.joined(results)

    # Decode rows alone

    def _replay(self, plan: Plan, mask: Tensor | None) -> Chosen:
        rows, width = _bucket(plan.decode), _power(max(len(seq.pages) for seq in plan.seqs), 16)
        rows = min(rows, self.config.max_num_seqs)
        captured = self.graphs.get((rows, width)) or self._capture(rows, width)
        self._send(plan, captured.data)
        captured.graph.replay()
        controls = self._controls(plan.seqs)
        if controls is None:
            if captured.tail is None:
                self._capture_tail(captured)
            captured.tail.replay()  # type: ignore[union-attr]
            return captured.chosen  # type: ignore[return-value]
        return self._decode_tail(captured.rows, captured.tokens, captured.hidden, captured.logits, controls, mask)

    def _send(self, plan: Plan, data: Tensor) -> None:
        rows, columns = data.shape
        array = torch.from_numpy(decode_array(plan, rows, self.queries, columns - self.queries - 3))
        if len(self.staging) < STAGES or self.staging[0].numel() < array.numel():
            buffer = self.gpu.pinned((max(array.numel(), 1 << 14),), torch.int64)
            self.staging = [*self.staging[-STAGES + 1 :], buffer]
        else:
            self.staging = [*self.staging[1:], self.staging[0]]
        staged = self.staging[-1][: array.numel()].view(rows, columns)
        staged.copy_(array)
        data.copy_(staged, non_blocking=True)

    def _capture(self, rows: int, width: int) -> Captured:
        data = torch.zeros(rows, self.queries + 3 + width, dtype=torch.int64, device=self.device)
        data[:, self.queries] = -1

        def step() -> tuple[DecodeRows, Tokens, Tensor, Tensor]:
            found = decode_rows(data, self.queries, self.feed, self.config.page_size)
            tokens = self.joined(found, None)
            hidden = self._hidden(tokens)
            return found, tokens, hidden, self.forward.logits(hidden).view(rows, self.queries, -1)

        graph, (found, tokens, hidden, logits) = self.gpu.graph(step)
        captured = Captured(data, found, tokens, hidden, logits, graph)
        self.graphs[rows, width] = captured
        return captured

    def _capture_tail(self, c: Captured) -> None:
        feed = self.feed.ids.clone(), self.feed.gain.clone()  # which warming up overwrites
        c.tail, c.chosen = self.gpu.graph(lambda: self._decode_tail(c.rows, c.tokens, c.hidden, c.logits, None, None))
        self.feed.ids.copy_(feed[0])
        self.feed.gain.copy_(feed[1])

    # Steps with prompts

    def _eager(self, plan: Plan, masks: list[Tensor | None]) -> list[Chosen]:
        chunks, d = chunk_rows(plan, self.config.page_size, self.device), plan.decode
        found = None
        if d:
            width = max(len(seq.pages) for seq in plan.seqs[:d])
            data = torch.from_numpy(decode_array(plan, d, self.queries, width)).to(self.device)
            found = decode_rows(data, self.queries, self.feed, self.config.page_size)
        tokens = self.joined(found, chunks)
        hidden = self._hidden(tokens)
        n, parts = d * self.queries, []
        next_ids = chunks.next_ids
        if found is not None:
            logits = self.forward.logits(hidden[:n]).view(d, self.queries, -1)
            controls = self._controls(plan.seqs[:d])
            choice = self._choose(logits, controls, found.first + 1, partial(self._paged, found), masks[0])
            parts.append((choice, accept(found, choice.tokens), controls))
            next_ids = torch.cat((choice.tokens.flatten(), next_ids))
        seqs = plan.seqs[d:]
        controls = controls_of.build(seqs, self.device)
        places = chunks.tokens[1][chunks.last] + 1
        logits = self.forward.logits(hidden[n + chunks.last]).unsqueeze(1)
        choice = self._choose(logits, controls, places, partial(self._listed, seqs), masks[1])
        whole = torch.tensor([s + c == seq.fill for seq, s, c in zip(seqs, plan.starts[d:], plan.counts[d:])])
        at = n + chunks.last
        next_ids[at] = torch.where(whole.to(self.device), choice.tokens[:, 0], next_ids[at])
        parts.append((choice, torch.zeros_like(places), controls))
        return self._drafts(parts, hidden, next_ids, tokens, found, chunks)

    def _drafts(
        self, parts: list[tuple[Choice, Tensor, Controls | None]], hidden: Tensor, next_ids: Tensor, tokens: Tokens,
        found: DecodeRows | None, chunks: Chunks,
    ) -> list[Chosen]:  # fmt: skip
        ahead, n = None, 0
        if self.queries > 1:
            ahead = self.forward.mtp_hidden(hidden, next_ids, tokens, 0)
        chosen = []
        for choice, accepted, controls in parts:
            if found is not None and not chosen:
                rows = torch.arange(len(accepted), device=self.device)
                at, places, n = rows * self.queries + accepted, found.first + 1 + accepted, len(rows) * self.queries
            else:
                at, places = n + chunks.last, chunks.tokens[1][chunks.last] + 1
            drafts = choice.tokens[:, :0]
            if ahead is not None:
                drafts = self._propose(self.forward.logits(ahead[at]), controls, places + 1)
            begin = len(parts[0][1]) if chosen else 0
            self._keep(begin, choice, accepted, drafts)
            chosen.append(Chosen(choice, accepted, drafts))
        return chosen

    # What both share

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
        if self.known[0] != seqs:
            self.known = (list(seqs), controls_of.build(seqs, self.device))
        return self.known[1]

    def _choose(
        self, logits: Tensor, controls: Controls | None, places: Tensor, history: Callable[[], Tensor],
        mask: Tensor | None,
    ) -> Choice:  # fmt: skip
        """`history` gives the ids of each row [B, S], asked for only where a row has penalties."""
        ids = history() if controls is not None and controls.penalties is not None else None
        choice = sampler.choose(logits, controls, places, self.vocab_size, ids, mask, QUICK)
        return choice._replace(tokens=self.ranks.agree(choice.tokens))

    def _propose(self, logits: Tensor, controls: Controls | None, places: Tensor) -> Tensor:
        """-> drafts [rows, 1]."""
        return self.ranks.agree(sampler.propose(logits, controls, places, self.vocab_size, QUICK)).unsqueeze(1)

    def _paged(self, found: DecodeRows) -> Tensor:
        """The ids of decode rows, drafts included, from the slots of their pages."""
        pages = found.decode.table.long().unsqueeze(2) * self.config.page_size
        slots = pages + torch.arange(self.config.page_size, device=self.device)
        return self.ids[slots.flatten(1)]

    def _listed(self, seqs: list[Seq]) -> Tensor:
        """The ids of prompts."""
        longest = max(len(seq.ids) for seq in seqs)
        return torch.tensor([seq.ids + [0] * (longest - len(seq.ids)) for seq in seqs], device=self.device)

    def _decode_tail(
        self, found: DecodeRows, tokens: Tokens, hidden: Tensor, logits: Tensor, controls: Controls | None,
        mask: Tensor | None,
    ) -> Chosen:  # fmt: skip
        """From logits to the next step's tokens, for decode rows alone; rows of padding are cut off where rows have
        controls, which know only the real ones."""
        b = len(logits) if controls is None else len(self.known[0])
        choice = self._choose(logits[:b], controls, found.first[:b] + 1, partial(self._paged, found), mask)
        accepted = accept(found, choice.tokens)
        drafts = choice.tokens[:, :0]
        if self.queries > 1:
            next_ids = torch.zeros_like(tokens.ids)
            next_ids[: b * self.queries] = choice.tokens.flatten()
            ahead = self.forward.mtp_hidden(hidden, next_ids, tokens, 0)
            at = torch.arange(b, device=self.device) * self.queries + accepted
            drafts = self._propose(self.forward.logits(ahead[at]), controls, found.first[:b] + 2 + accepted)
        self._keep(0, choice, accepted, drafts)
        return Chosen(choice, accepted, drafts)

    def _to_host(self, chosen: Chosen) -> Chosen:
        def copy(tensor: Tensor) -> Tensor:
            return self.gpu.pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

        choice = Choice(*(None if t is None else copy(t) for t in chosen.choice))  # type: ignore[arg-type]
        return Chosen(choice, copy(chosen.accepted), copy(chosen.drafts))

    def _keep(self, begin: int, choice: Choice, accepted: Tensor, drafts: Tensor) -> None:
        """What the next step may go on with."""
        rows = slice(begin, begin + len(accepted))
        last = choice.tokens.gather(1, accepted.unsqueeze(1))  # [rows, 1]
        self.feed.ids[rows] = torch.cat((last, drafts), 1)
        self.feed.gain[rows] = accepted


def _bucket(rows: int) -> int:
    """The next size that graphs are captured for."""
    return _power(rows, 1) if rows <= 16 else -(-rows // 16) * 16


def _power(count: int, least: int) -> int:
    """The next power of two, from `least` on."""
    return max(least, 1 << (count - 1).bit_length())
