"""Which requests compute what in the next step. Pure Python: no tensors, no clock, no random numbers.

First come, first served. A step is one prefill batch (prompts, within a token budget) or one decode batch (every
running request, one token and perhaps a draft). While somebody decodes, no two prefill batches follow each other, so
every running request moves at least every second step. When pages run out, the latest arrival gives up its pages and
later computes its tokens again; the earliest is never disturbed, so everything ends.
"""

from collections import deque
from dataclasses import dataclass

from benthic.inference.config import EngineConfig
from benthic.inference.pages import PagePool
from benthic.inference.request import NO_DRAFT, Seq


@dataclass(frozen=True, slots=True)
class Plan:
    """Row i computes `counts[i]` tokens of `seqs[i]`. In decode a count of 2 is the last token and its draft."""

    prefill: bool
    seqs: list[Seq]
    counts: list[int]


class Scheduler:
    """Queues of requests and their pages. `config` must be resolved."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size)
        self.waiting: deque[Seq] = deque()  # in order of arrival, and later than all running
        self.running: list[Seq] = []  # in order of arrival; only the last may be in the middle of its prompt
        self.preemptions = 0
        self._prefilled = False  # the last plan was a prefill batch

    def add(self, seq: Seq) -> None:
        """Queue a request that arrived after all others."""
        self.waiting.append(seq)

    def abort(self, seq: Seq) -> None:
        """Forget an unfinished request and free its pages."""
        (self.running if seq.pages else self.waiting).remove(seq)
        self.pool.give(seq.pages)
        seq.finish_reason = "abort"

    def plan(self) -> Plan:
        """The next step's work. There must be an unfinished request."""
        decodable = len(self.running) > 1 or (len(self.running) == 1 and _pending(self.running[0]) == 1)
        if not (self._prefilled and decodable):
            plan = self._plan_prefill()
            if plan.seqs:
                self._prefilled = True
                return plan
        self._prefilled = False
        return self._plan_decode()

    def _plan_prefill(self) -> Plan:
        """Continue the unfinished prompt, then admit waiting requests, in order, while budget and pages allow."""
        seqs: list[Seq] = []
        counts: list[int] = []
        if self.running and _pending(self.running[-1]) > 1:
            seqs.append(self.running[-1])
            counts.append(min(_pending(seqs[0]), self.config.max_num_batched_tokens))
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            seq = self.waiting[0]
            count = min(len(seq.ids), self.config.max_num_batched_tokens)
            if seqs and (len(seqs) + 1) * max(*counts, count) > self.config.max_num_batched_tokens:
                break
            need = self.pool.needed(len(seq.ids))
            if len(self.pool.free) - need < len(self.running):  # a page for each of the others to grow into
                break
            seq.pages = self.pool.take(need)
            self.running.append(self.waiting.popleft())
            seqs.append(seq)
            counts.append(count)
        return Plan(True, seqs, counts)

    def _plan_decode(self) -> Plan:
        """Every running request whose prompt is done; the latest arrivals yield pages to the earlier ones."""
        seqs: list[Seq] = []
        counts: list[int] = []
        while len(seqs) < len(self.running) and _pending(seq := self.running[len(seqs)]) == 1:
            while not self._grow(seq, 1) and self._preempt() is not seq:
                pass
            if seq.pages:
                seqs.append(seq)
                counts.append(2 if self._may_verify(seq) else 1)
        return Plan(False, seqs, counts)

    def _may_verify(self, seq: Seq) -> bool:
        """Whether the draft and the token after it still fit; nobody is preempted for a draft."""
        return seq.draft != NO_DRAFT and len(seq.ids) + 2 <= seq.max_len and self._grow(seq, 2)

    def _grow(self, seq: Seq, count: int) -> bool:
        """Make room for `count` more tokens; False where no page is free. At most one page is ever missing."""
        if seq.computed + count <= len(seq.pages) * self.pool.page_size:
            return True
        if not self.pool.free:
            return False
        seq.pages += self.pool.take(1)
        return True

    def _preempt(self) -> Seq:
        """Send the latest running request back to the head of the queue, without its pages."""
        seq = self.running.pop()
        self.pool.give(seq.pages)
        seq.computed = 0
        self.waiting.appendleft(seq)
        self.preemptions += 1
        return seq

    def commit(
        self, plan: Plan, tokens: list[list[int]], logprobs: list[list[float]], drafts: list[int]
    ) -> list[tuple[Seq, int]]:
        """Book a step's results: row i chose `tokens[i]` (1 or 2; ignored in the middle of a prompt) and then guesses
        `drafts[i]`. Returns the requests that got tokens, with how many; the finished ones have freed their pages."""
        grown: list[tuple[Seq, int]] = []
        finished = False
        for seq, count, chosen, scores, draft in zip(plan.seqs, plan.counts, tokens, logprobs, drafts):
            seq.computed += count if plan.prefill else len(chosen)
            if plan.prefill and seq.computed < len(seq.ids):
                continue
            seq.draft = draft
            before = len(seq.ids)
            for token, score in zip(chosen, scores):
                seq.ids.append(token)
                seq.logprobs.append(score)
                if token in seq.stop:
                    seq.finish_reason = "stop"
                elif len(seq.ids) >= seq.max_len:
                    seq.finish_reason = "length"
                if seq.finish_reason:
                    self.pool.give(seq.pages)
                    finished = True
                    break
            grown.append((seq, len(seq.ids) - before))
        if finished:
            self.running = [seq for seq in self.running if not seq.finish_reason]
        return grown


def _pending(seq: Seq) -> int:
    """Tokens whose latents are not in the cache."""
    return len(seq.ids) - seq.computed
