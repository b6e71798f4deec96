"""Which requests compute what in the next step. Pure Python: no tensors, no clock, no random numbers.

A step holds, in this order, a decode row for every running request whose prompt is done (its last token and its
drafts) and chunks of prompts in what is left of the token budget. No more requests run than leave a quarter of the
budget to prompts while there is one to compute, so neither kind of work starves the other.

Requests rank by priority, then by arrival. Running ones rank before all waiting ones: where rows or pages are short,
the last of them steps back, with its pages left findable, and later computes again what is no longer there. So a
request waits only for those that rank before it, and the first of all is in every step: of n tokens, m of them known,
it ends within ceil(m / share) + n - m steps.

Ahead of the device, `plan` may be called while one step is in flight. Its rows then count as if they had gone on:
each decode row has gained one token, and perhaps its drafts. How many is for the device to add: counts and pages are
those of the upper bound, so that with drafts, too, the device never waits for the host. What is committed stays apart
from what is in flight, and the synchronous scheduler is the special case of nothing in flight. Nobody steps back while
a step is in flight: a plan that would need it is empty, and the caller commits first.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benthic.inference.config import EngineConfig
from benthic.inference.drafting import Drafting
from benthic.inference.pages import PagePool
from benthic.inference.request import FinishReason, Seq


@dataclass(frozen=True, slots=True)
class Plan:
    """Row i computes `counts[i]` tokens of `seqs[i]`, which stand after `starts[i]` computed ones.

    The first `decode` rows decode: a token and its drafts, `queries` at most. If `sources[i]` is not -1, the token and
    the drafts are those that row `sources[i]` of the step before this one chooses, and every draft that it accepts
    moves the row one position on. The other rows are chunks of prompts; only one that ends at `seq.fill` chooses a
    token. Rows that choose draft `drafts` tokens for the next step.

    `scores[i]` are the places (first, end) of a prompt at which row i says how likely the token after each is; `scores`
    is empty where no row of prompts is asked to.
    """

    seqs: list[Seq]
    counts: list[int]
    starts: list[int]
    sources: list[int]
    decode: int
    queries: int = 1
    drafts: int = 0
    scores: Sequence[tuple[int, int]] = ()


class Scheduler:
    """Queues of requests and their pages. `config` must be resolved; `drafting` says how many drafts a step makes."""

    def __init__(self, config: EngineConfig, drafting: Drafting):
        budget = config.max_num_batched_tokens
        self.config, self.drafting = config, drafting
        self.num_drafts = min(config.num_speculative_tokens, budget - 1)
        self.share = max(1 + self.num_drafts, budget // 4)  # least tokens for prompts while there is one to compute
        self.max_rows = min(config.max_num_seqs, 1 + (budget - self.share) // (1 + self.num_drafts))
        self.pool = PagePool(config.num_pages, config.page_size, min(1, config.num_speculative_tokens))
        self.waiting: list[Seq] = []  # by rank, and after all running
        self.running: list[Seq] = []  # by rank
        self.preemptions = 0
        self.stepped_back: list[tuple[Seq, list[int], int]] = []  # by the last plan: who, from which pages, how far
        self._flying: deque[Plan] = deque()  # steps planned and not committed, at most two
        self._stuck: tuple[Seq | None, int, int] = (None, 0, 0)  # who did not fit, and into what

    @property
    def in_flight(self) -> int:
        """Steps that were planned and not committed."""
        return len(self._flying)

    def add(self, seq: Seq) -> None:
        """Queue a request that arrived after all others."""
        seq.num_drafts = min(seq.num_drafts, self.num_drafts)
        insort(self.waiting, seq, key=_rank)

    def finish(self, seq: Seq, reason: FinishReason) -> None:
        """End an unfinished request from outside. Rows of it in flight are wasted; they keep its pages till then."""
        (self.running if seq.pages else self.waiting).remove(seq)
        seq.finish_reason = reason
        if not seq.flying:
            self.pool.give(seq.pages)

    # One step

    def plan(self) -> Plan:
        """The next step's work. Empty where nothing is unfinished, or where the step in flight must be committed first;
        an empty plan is not committed."""
        if len(self._flying) > 1:
            raise RuntimeError("two steps are in flight -> commit the older one before you plan")
        self.stepped_back = []
        seqs: list[Seq] = []
        counts: list[int] = []
        if not (self._make_way() and self._plan_decode(seqs, counts)):
            return Plan([], [], [], [], 0)
        decode = len(seqs)
        self._plan_prefill(seqs, counts)
        sources = [seq.row if seq.start >= len(seq.ids) else -1 for seq in seqs]
        queries = 1 + max((seq.made for seq in seqs[:decode]), default=0)
        drafts = self._drafts(seqs, counts, decode)
        starts = [seq.start for seq in seqs]
        plan = Plan(seqs, counts, starts, sources, decode, queries, drafts, _scores(seqs, counts, decode))
        for row, (seq, count) in enumerate(zip(seqs, counts)):
            seq.flying += 1
            seq.row = row
            seq.made = min(seq.num_drafts, drafts)
            if row < decode:
                seq.start += 1
                seq.slack += count - 1
            else:
                seq.start += count
        if seqs:
            self._flying.append(plan)
        return plan

    def _make_way(self) -> bool:
        """Let in who ranks before a running request; the last of them step back for it. False: not in flight."""
        while self.waiting and self.running and self.waiting[0].rank < self.running[-1].rank:
            if not self._admit():
                if self._flying:
                    return False
                self._preempt()
        return True

    def _plan_decode(self, seqs: list[Seq], counts: list[int]) -> bool:
        """Every running request whose prompt is done. False: pages are short and somebody is in flight."""
        page_size = self.pool.page_size
        row = 0
        while row < len(self.running):
            seq = self.running[row]
            row += 1
            end = seq.start + seq.slack + 1  # at most so many tokens with the next one
            if seq.start < seq.fill or seq.start + 1 >= seq.max_len:  # in its prompt, or at its end in flight
                continue
            count = 1 + max(0, min(seq.made, seq.max_len - 1 - end))
            room = end + count - 1
            if count > 1:  # its drafts of drafts, too, lie in slots that the next step computes
                room = min(room + self.num_drafts - 1, seq.max_len - 1)
            if room > len(seq.pages) * page_size and not self._grow(seq, room):
                count = 1  # nobody steps back for a draft
                while not self._grow(seq, end):
                    if self._flying:
                        return False
                    if self._preempt() is seq:
                        return True  # it was the last
            seqs.append(seq)
            counts.append(count)
        return True

    def _drafts(self, seqs: list[Seq], counts: list[int], decode: int) -> int:
        """How many the rows that choose a token shall draft."""
        ends = [seq for row, seq in enumerate(seqs) if row < decode or seq.start + counts[row] == seq.fill]
        wanted = max((seq.num_drafts for seq in ends), default=0)
        return min(wanted, self.drafting.depth(decode)) if wanted else 0

    def _plan_prefill(self, seqs: list[Seq], counts: list[int]) -> None:
        """Go on with unfinished prompts, then let in waiting requests, by rank, while budget, rows and pages allow."""
        budget = self.config.max_num_batched_tokens - sum(counts)
        unfinished = [seq for seq in self.running if seq.start < seq.fill]
        while budget and (unfinished or (self.waiting and self._admit())):
            seq = unfinished.pop(0) if unfinished else self.running[-1]
            seqs.append(seq)
            counts.append(min(seq.fill - seq.start, budget))
            budget -= counts[-1]

    def _admit(self) -> bool:
        """Run the first waiting request on the pages that are known already and new ones for the rest. False where they
        or the rows are short; a page for each of the others to grow into is left over."""
        seq = self.waiting[0]
        state = (seq, self.pool.given, len(self.running))
        if len(self.running) >= self.max_rows or state == self._stuck:
            return False
        known, node = self.pool.find(seq.ids, seq.salt, _reusable(seq))
        need = self.pool.needed(len(seq.ids)) - len(known)
        revived = sum(self.pool.refs[page] == 0 for page in known)
        if len(self.pool.free) - revived - need < len(self.running):
            self._stuck = state
            return False
        self.pool.hold(known)
        seq.published, seq.node = len(known), node
        seq.computed = seq.start = len(known) * self.pool.page_size
        seq.pages = known + self.pool.take(need)
        seq.fill = len(seq.ids)
        if seq.cached_tokens < 0:
            seq.cached_tokens = seq.computed
        insort(self.running, self.waiting.pop(0), key=_rank)
        return True

    def _grow(self, seq: Seq, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False where pages are short."""
        need = self.pool.needed(tokens) - len(seq.pages)
        if need > len(self.pool.free):
            return False
        seq.pages += self.pool.take(max(0, need))
        return True

    def _preempt(self) -> Seq:
        """Send the last running request back to wait, without its pages."""
        seq = self.running.pop()
        self.stepped_back.append((seq, list(seq.pages), seq.computed))
        self.pool.give(seq.pages)
        seq.computed = seq.start = 0
        insort(self.waiting, seq, key=_rank)
        self.preemptions += 1
        return seq

    def commit(self, plan: Plan, tokens: list[list[int]]) -> list[int]:
        """Book the results of the oldest step in flight: row i chose `tokens[i]`, a decode row one more than it
        accepted drafts. Returns how many tokens each request gained: 0 within its prompt, 0 for a wasted row."""
        if not self._flying or self._flying[0] is not plan:
            raise RuntimeError("steps are committed once each, in the order in which they were planned")
        self._flying.popleft()
        page_size, caching = self.pool.page_size, self.config.enable_prefix_caching
        gained: list[int] = []
        finished = False
        for row, seq in enumerate(plan.seqs):
            seq.flying -= 1
            new = 0
            if not seq.finish_reason:
                if row < plan.decode:
                    new = _append(seq, tokens[row])
                    seq.computed += new
                    seq.start += new - 1
                    seq.slack -= plan.counts[row] - 1
                else:
                    seq.computed += plan.counts[row]
                    if seq.computed == seq.fill:
                        new = _append(seq, tokens[row])
                if caching and seq.computed >= (seq.published + 1) * page_size:
                    self._publish(seq)
                finished = finished or seq.finish_reason != ""
            if seq.finish_reason and not seq.flying:
                self.pool.give(seq.pages)
            gained.append(new)
        if finished:
            self.running = [seq for seq in self.running if not seq.finish_reason]
        return gained

    def _publish(self, seq: Seq) -> None:
        """Let others find the pages that are full and computed."""
        full = seq.computed // self.pool.page_size
        for index in range(seq.published, full):
            seq.node = self.pool.publish(seq.node, seq.salt, seq.ids, index, seq.pages[index])
        seq.published = full

    def rollback(self) -> None:
        """Forget the steps in flight as if they had never been planned: for a step that failed."""
        for plan in self._flying:
            for seq in plan.seqs:
                seq.start, seq.slack, seq.flying = seq.computed, 0, 0
                if seq.finish_reason:
                    self.pool.give(seq.pages)
        self._flying.clear()

    def reset_cache(self) -> None:
        """The weights have changed: forget every computed prefix. Running requests go on with the latents they have."""
        self.pool.reset()


def _scores(seqs: list[Seq], counts: list[int], decode: int) -> list[tuple[int, int]]:
    """What each row scores: of a prompt that wants it, the places of its chunk that are not scored yet and that another
    token of the prompt follows."""
    if not any(seq.unscored for seq in seqs[decode:]):
        return []
    scores = [(0, 0)] * decode
    for seq, count in zip(seqs[decode:], counts[decode:]):
        first, end = max(seq.start, len(seq.scores)), min(seq.start + count, seq.prompt_len - 1)
        scores.append((first, end) if seq.unscored and first < end else (0, 0))
    return scores if any(end for _, end in scores) else []


def _reusable(seq: Seq) -> int:
    """How many of its tokens may be found computed: all, but where its prompt is to be scored, not past the first place
    whose logits are missing."""
    return len(seq.scores) if seq.unscored else len(seq.ids)


def _rank(seq: Seq) -> tuple[int, int]:
    return seq.rank


def _append(seq: Seq, chosen: list[int]) -> int:
    """Add the chosen tokens up to the one that ends the request, and return how many that were."""
    for count, token in enumerate(chosen, 1):
        seq.ids.append(token)
        if token in seq.stop and len(seq.ids) > seq.min_len:
            seq.finish_reason = "stop"
            return count
        if len(seq.ids) >= seq.max_len:
            seq.finish_reason = "length"
            return count
    return len(chosen)
