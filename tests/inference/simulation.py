"""A pure-Python world around the scheduler: requests arrive, abort and finish; a fake model reads and writes slots.

The fake model's next token is a hash of the context that it reads through the pages, so whoever reads a wrong, stale or
foreign slot gets a wrong answer. Everything follows from one seed.
"""

import inspect
import random
import types
import zlib
from dataclasses import dataclass, field

from benthic.inference import pages, scheduler
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.request import NO_DRAFT, Seq

VOCAB, STOP = 50, 7


class Broken(Exception):
    """An invariant does not hold."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


def next_token(context: list[int]) -> int:
    """The fake model, greedy."""
    return zlib.crc32(bytes(context)) % VOCAB


def alone(prompt: list[int], max_len: int) -> list[int]:
    """What the fake model answers when nobody else is there."""
    ids = list(prompt)
    while len(ids) < max_len:
        ids.append(next_token(ids))
        if ids[-1] == STOP:
            break
    return ids[len(prompt) :]


def mutant(old: str, new: str) -> type[scheduler.Scheduler]:
    """The Scheduler with one place of scheduler.py or pages.py rewritten. The place must exist exactly once."""
    sources = {module: inspect.getsource(module) for module in (pages, scheduler)}
    if sum(source.count(old) for source in sources.values()) != 1:
        raise ValueError(f"{old!r} does not stand exactly once in pages.py and scheduler.py")
    built = {}
    for module, source in sources.items():
        built[module] = types.ModuleType(module.__name__)
        exec(source.replace(old, new), vars(built[module]))
    built[scheduler].PagePool = built[pages].PagePool
    return built[scheduler].Scheduler


@dataclass
class World:
    """One engine's life. `events` counts arrivals, aborts and steps."""

    seed: int
    scheduler_class: type[scheduler.Scheduler] = scheduler.Scheduler
    events: int = 0
    finished: int = 0
    preemptions: int = 0
    cells: dict[int, tuple[int, int]] = field(default_factory=dict)  # slot -> (request, token)
    live: dict[int, Seq] = field(default_factory=dict)
    prefilled: bool = False  # the last step was a prefill
    idle: dict[int, int] = field(default_factory=dict)  # running request -> steps since it computed something

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        length, page = rng.choice([8, 24, 40]), rng.choice([1, 2, 3, 4, 8])
        longest = -(-length // page)
        self.config = EngineConfig(
            max_num_seqs=rng.choice([1, 2, 5, 12]),
            max_num_batched_tokens=rng.choice([1, 3, 8, 30, 100]),
            max_model_len=length,
            page_size=page,
            num_pages=longest + rng.choice([0, 1, longest, 6 * longest]),
            num_speculative_tokens=rng.choice([0, 1]),
        ).resolve(length, 1)
        self.scheduler = self.scheduler_class(self.config)
        self.next_id = 0

    def run(self, events: int) -> None:
        """Live until `events` have happened, then let everybody finish."""
        while self.events < events:
            self.events += 1
            luck = self.rng.random()
            if luck < 0.25 and len(self.live) < 20:
                self.arrive()
            elif luck < 0.27 and self.live:
                self.abort(self.rng.choice(sorted(self.live)))
            elif self.live:
                self.step()
            self.check()
        left = sum(seq.max_len for seq in self.live.values()) * 10 + 10
        while self.live:
            require(left > 0, "requests never end")
            left -= 1
            self.step()
            self.check()
        require(sorted(self.scheduler.pool.free) == list(range(1, self.config.num_pages + 1)), "pages were lost")

    def arrive(self) -> None:
        limit = self.config.max_model_len
        prompt = [self.rng.randrange(VOCAB) for _ in range(self.rng.randrange(1, limit))]
        seq = Seq(
            request_id=self.next_id,
            ids=list(prompt),
            prompt_len=len(prompt),
            max_len=min(limit, len(prompt) + self.rng.randrange(1, limit)),
            params=SamplingParams(temperature=0),
            stop=frozenset([STOP]),
        )
        self.next_id += 1
        self.live[seq.request_id] = seq
        self.scheduler.add(seq)

    def abort(self, request_id: int) -> None:
        seq = self.live.pop(request_id)
        self.idle.pop(request_id, None)
        self.scheduler.abort(seq)
        require(not seq.pages, "an aborted request keeps pages")

    def step(self) -> None:
        before = {i: (seq.computed, len(seq.ids)) for i, seq in self.live.items()}
        fits = not self.prefilled and self.head_fits()
        plan = self.scheduler.plan()
        self.prefilled = plan.prefill
        require(plan.seqs, "a step without work")
        require(plan.prefill or not fits, "a request waits although there is room")
        require(len({seq.request_id for seq in plan.seqs}) == len(plan.seqs), "a request is planned twice")
        self.check()
        if plan.prefill:
            padded = len(plan.counts) * max(plan.counts)
            require(padded <= self.config.max_num_batched_tokens, "the prefill batch exceeds its budget")
        for seq, count in zip(plan.seqs, plan.counts):
            self.write(seq, count)
        results = [self.choose(seq, count) for seq, count in zip(plan.seqs, plan.counts)]
        drafts = [self.guess(seq, chosen) for seq, chosen in zip(plan.seqs, results)]
        grown = self.scheduler.commit(plan, results, [[0.0] * len(r) for r in results], drafts)
        for seq, new in grown:
            require(len(seq.ids) - before[seq.request_id][1] == new > 0, "commit counts other tokens than it adds")
            if seq.finish_reason:
                self.finish(seq)
        self.book_progress(before)

    def head_fits(self) -> bool:
        """Whether the first in the queue could be admitted, one page left over for each of the others."""
        s = self.scheduler
        if not s.waiting or len(s.running) == self.config.max_num_seqs:
            return False
        return len(s.pool.free) - -(-len(s.waiting[0].ids) // self.config.page_size) >= len(s.running)

    def book_progress(self, before: dict[int, tuple[int, int]]) -> None:
        """Every request that held pages before and after moves at least every second step."""
        running = {seq.request_id for seq in self.scheduler.running}
        self.idle = {
            i: 0 if self.live[i].computed != before[i][0] or i not in self.idle else self.idle[i] + 1 for i in running
        }
        require(max(self.idle.values(), default=0) < 2, "a running request stands still for two steps")
        if self.live:
            first = self.live[min(self.live)]
            require(first.request_id in running or not self.scheduler.running, "a later request overtakes the earliest")

    def slot(self, seq: Seq, position: int) -> int:
        require(position < len(seq.pages) * self.config.page_size, "a token has no page")
        return seq.pages[position // self.config.page_size] * self.config.page_size + position % self.config.page_size

    def write(self, seq: Seq, count: int) -> None:
        for i, token in enumerate(seq.feed(count)):
            require(0 <= token < VOCAB, "a token that does not exist is computed")
            self.cells[self.slot(seq, seq.computed + i)] = (seq.request_id, token)

    def choose(self, seq: Seq, count: int) -> list[int]:
        """What the fake model emits after the row's tokens, a draft among them verified."""
        end = min(seq.computed + count, len(seq.ids))
        context = []
        for position in range(seq.computed + count):
            owner, token = self.cells.get(self.slot(seq, position), (-1, -1))
            require(owner == seq.request_id, "a slot holds another request's token")
            context.append(token)
        chosen = [next_token(context[:end])]
        if end < len(context) and context[end] == chosen[0]:
            chosen.append(next_token(context))
        return chosen

    def guess(self, seq: Seq, chosen: list[int]) -> int:
        """A draft that is right about half of the time."""
        if not self.config.num_speculative_tokens:
            return NO_DRAFT
        right = next_token([*seq.ids, *chosen])
        return right if self.rng.random() < 0.5 else self.rng.randrange(VOCAB)

    def finish(self, seq: Seq) -> None:
        answer = seq.ids[seq.prompt_len :]
        require(answer == alone(seq.ids[: seq.prompt_len], seq.max_len), "the answer is not the one given alone")
        require(seq.finish_reason == ("stop" if answer[-1] == STOP else "length"), "wrong finish reason")
        require(len(seq.logprobs) == len(answer), "not one logprob per token")
        require(not seq.pages, "a finished request keeps pages")
        del self.live[seq.request_id]
        self.idle.pop(seq.request_id, None)
        self.finished += 1

    def check(self) -> None:
        """Invariants between any two events."""
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        owned = [page for seq in running for page in seq.pages]
        every = sorted(owned + self.scheduler.pool.free)
        require(every == list(range(1, self.config.num_pages + 1)), "free and owned pages are not all pages, once each")
        order = [seq.request_id for seq in running] + [seq.request_id for seq in waiting]
        require(order == sorted(self.live), "a request is lost, doubled or out of order")
        require(len(running) <= self.config.max_num_seqs, "more requests run than max_num_seqs")
        require(not any(seq.pages or seq.computed for seq in waiting), "a waiting request owns something")
        require(all(seq.computed <= len(seq.ids) <= seq.max_len for seq in running), "lengths do not add up")
        require(not any(seq.finish_reason for seq in running), "a finished request still runs")
        self.preemptions = self.scheduler.preemptions
