"""A pure-Python world around the scheduler: requests arrive, share prefixes, end; steps fail; weights change.

The device executes a plan when it is launched; the scheduler learns the tokens when it is committed, up to one step
later. After every event, and between plan and launch, the invariants hold. Everything follows from one seed.
"""

import random
from collections import deque
from dataclasses import dataclass

from shadow import GREEDY, SCORED, STOP, VOCAB, Device, Life, cold, draft_latent, likeliest, require

from benthic.inference import pages, scheduler
from benthic.inference.request import PromptPlace, Seq


@dataclass
class Flight:
    """A launched step: what each row chose, and the pages that it uses."""

    plan: scheduler.Plan
    chosen: list[list[int]]
    pages: list[list[int]]


class Moods:
    """As many drafts as there may be, or now some and then none."""

    def __init__(self, seed: int, drafts: int):
        self.rng, self.drafts = random.Random(f"moods {seed}"), drafts
        self.odds, self.now = self.rng.choice([0, 0.1, 0.5]), drafts

    def depth(self, rows: int) -> int:
        if self.rng.random() < self.odds:
            self.now = self.rng.choice([0, self.drafts, self.rng.randint(0, self.drafts)])
        return self.now

    def observe(self, rows: int, verified: int, made: int, tokens: int) -> None: ...


@dataclass
class Limits:
    """What the scheduler reads of an EngineConfig."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    num_pages: int
    num_speculative_tokens: int
    enable_prefix_caching: bool

    @staticmethod
    def draw(rng: random.Random) -> "Limits":
        length, page_size = rng.choice([8, 16, 24, 40]), rng.choice([1, 2, 3, 4, 8])
        longest, rows, drafts = -(-length // page_size), rng.choice([1, 2, 5, 12, 12]), rng.choice([0, 0, 1, 1, 3])
        return Limits(
            max_num_seqs=rows,
            max_num_batched_tokens=rng.choice([1, 3, 8, 30, 100, rows * (1 + drafts), rows * (1 + drafts)]),
            max_model_len=length,
            page_size=page_size,
            num_pages=longest + rng.choice([0, 1, longest, 4 * longest, 12 * longest]),
            num_speculative_tokens=drafts,
            enable_prefix_caching=rng.random() < 0.9,
        )


class World:
    """One engine's life. `events` counts arrivals, ends from outside, resets, failures, plans and commits."""

    def __init__(self, seed: int, scheduler_class: type[scheduler.Scheduler] = scheduler.Scheduler):
        self.rng = random.Random(seed)
        self.limits = Limits.draw(self.rng)
        self.ahead = self.rng.random() < 0.5  # run one step ahead of the device, mostly
        self.load = self.rng.choice([0.15, 0.3, 0.6])
        self.longest = self.rng.choice([3, self.limits.max_model_len])  # prompt
        self.resets = self.rng.choice([0, 0.005])
        self.scheduler = scheduler_class(self.limits, Moods(seed, self.limits.num_speculative_tokens))
        self.pool = self.scheduler.pool
        self.device = Device(self.rng, self.pool)
        self.given_at = [0] * (1 + self.limits.num_pages)  # when the page lost its last holder
        self.clock = 0
        self.version = 0
        self.lives: dict[int, Life] = {}  # unfinished
        self.leaving: list[Seq] = []  # finished, with rows in flight
        self.flights: deque[Flight] = deque()
        self.talk = [[self.rng.randrange(VOCAB) for _ in range(self.limits.max_model_len)] for _ in range(3)]
        self.next_id = 0
        self.ready: set[int] = set()  # who decoded before the plan, and was not preempted by it
        self.events = self.finished = self.hits = self.wasted = 0
        self._watch()

    def _watch(self) -> None:
        """See what the scheduler does within one plan: admissions, preemptions, pages taken and given."""
        s, pool = self.scheduler, self.pool
        admit, preempt, take, give = s._admit, s._preempt, pool.take, pool.give

        def watched_admit() -> bool:
            seq = s.waiting[0]
            admitted = admit()
            if admitted:
                self._admitted(seq)
            return admitted

        def watched_preempt() -> Seq:
            seq = preempt()
            require(all(other.rank < seq.rank for other in s.running), "not the last by rank is preempted")
            require(not seq.flying, "a request is preempted in flight")
            life = self.lives[seq.request_id]
            life.values.clear()
            life.settled = 0
            self.ready.discard(seq.request_id)
            return seq

        def watched_take(count: int) -> list[int]:
            cached = {page: key for page, key in enumerate(pool._keys) if key is not None}
            taken = take(count)
            self._taken(taken, cached)
            return taken

        def watched_give(gone: list[int]) -> None:
            before = list(gone)
            give(gone)
            for page in reversed(before):
                self.clock += 1
                self.given_at[page] = self.clock

        s._admit, s._preempt, pool.take, pool.give = watched_admit, watched_preempt, watched_take, watched_give

    @property
    def preemptions(self) -> int:
        return self.scheduler.preemptions

    # Events

    def run(self, events: int) -> None:
        """Live until `events` have happened, then let everybody finish."""
        rng = self.rng
        while self.events < events:
            self.events += 1
            luck = rng.random()
            if luck < 0.015 and self.lives:
                self.end(rng.choice(list(self.lives)), "abort")
            elif luck < 0.015 + self.resets:
                self.version += 1
                self.scheduler.reset_cache()
                require(not self.pool.findable, "a page of other weights can be found")
            elif luck < 0.025:
                self.fail()
            elif luck < self.load and len(self.lives) < 20:
                self.arrive()
            else:
                self.advance()
            self.check()
        left = 10 * self.limits.max_model_len * len(self.lives) + 10
        while self.lives or self.flights:
            if not left:
                raise RuntimeError("requests never end")
            left -= 1
            self.advance()
            self.check()

    def arrive(self) -> None:
        rng, limit = self.rng, self.limits.max_model_len
        prompt = list(rng.choice(self.talk)[: rng.randrange(0, self.longest)])
        prompt += [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 1, 3, self.longest]))]
        prompt = prompt[: limit - 1] or [0]
        max_len = min(limit, len(prompt) + rng.randrange(1, limit))
        seq = Seq(
            request_id=self.next_id,
            ids=list(prompt),
            prompt_len=len(prompt),
            max_len=max_len,
            params=rng.choice([GREEDY, GREEDY, SCORED]),
            priority=rng.choice([0, 0, 0, -1, 1]),
            salt=rng.choice(["", "", "", "pepper"]),
            num_drafts=rng.choice([0, 3, 3, 3]),
            min_len=rng.choice([0, max_len]),
            stop=frozenset([STOP]),
        )
        self.next_id += 1
        self.lives[seq.request_id] = Life(seq, self.version, list(prompt))
        self.scheduler.add(seq)

    def end(self, request_id: int, reason: str) -> None:
        """An abort, or a stop string."""
        seq = self.lives.pop(request_id).seq
        self.scheduler.finish(seq, reason)
        self.leaving.append(seq)

    def fail(self) -> None:
        """The steps in flight are lost; what they wrote is garbage."""
        self.scheduler.rollback()
        for flight in self.flights:
            for seq in flight.plan.seqs:
                if life := self.lives.get(seq.request_id):
                    del life.tokens[len(seq.ids) :], life.values[life.settled :]
                    life.failed = True
                    life.drafts = [self.rng.randrange(VOCAB) for _ in range(3)]
        self.flights.clear()

    def advance(self) -> None:
        """Plan and launch, or commit."""
        self.ready = {seq.request_id for seq in self.scheduler.running if seq.start >= seq.fill}
        plan = self.scheduler.plan()
        if plan.seqs:
            self.check()
            self.judge(plan)
            self.flights.append(self.launch(plan))
        else:
            require(self.flights or not self.lives, "a step without work")
        keep = 1 if self.ahead and plan.seqs and self.rng.random() < 0.9 else 0
        while len(self.flights) > keep:
            self.commit()

    # What is planned

    def _admitted(self, seq: Seq) -> None:
        """A new resident: what it found must be what a cold run writes."""
        device, life, known = self.device, self.lives[seq.request_id], seq.published
        require(seq.start < len(seq.ids), "a whole prompt is cached, and nothing is left to compute")
        life.values = cold(seq.ids[: seq.start], self.version)
        life.settled = seq.start
        del life.tokens[len(seq.ids) :]
        for page in seq.pages[:known]:
            require(self.device.settled[page], "a page is found before it is computed")
            require(self.device.salts[page] == seq.salt, "a page is found with another salt")
        device.compare(device.memory, seq.pages, life.values, "a cached prefix is not what a cold run writes")
        if self.limits.num_speculative_tokens:
            drafted = list(map(draft_latent, life.values, seq.ids[1:]))
            device.compare(device.draft_memory, seq.pages, drafted, "the module's latents are those of other tokens")
        self.hits += known

    def _taken(self, taken: list[int], cached: dict[int, pages.Key]) -> None:
        """Unfindable pages go first, then the findable by their age."""
        evicted = [page for page in taken if page in cached]
        if evicted:
            free = self.pool.free
            require(all(page in cached for page in free), "a cached page goes although another is empty")
            newest = max(self.given_at[page] for page in evicted)
            require(all(self.given_at[page] > newest for page in free), "a cached page goes before an older one")

    def judge(self, plan: scheduler.Plan) -> None:
        """Budget, order and fairness of a plan."""
        s, limits = self.scheduler, self.limits
        prompts = sum(plan.counts[plan.decode :])
        total = sum(plan.counts)
        require(not s.waiting or s.running[-1].rank < s.waiting[0].rank, "a later request overtakes")
        require(total <= limits.max_num_batched_tokens, "the budget is exceeded")
        require(len(s.running) <= limits.max_num_seqs, "more requests run than max_num_seqs")
        require(min(plan.counts) > 0, "a row does not advance")
        require(
            max(plan.counts[: plan.decode], default=1) <= plan.queries, "a row has more queries than there is room for"
        )
        for seq, count in zip(plan.seqs[: plan.decode], plan.counts):
            reach = min(seq.start + seq.slack + s.num_drafts - 1, seq.max_len - 1)
            require(count == 1 or reach <= len(seq.pages) * limits.page_size, "a draft of a draft has no page")
        planned = [seq.request_id for seq in plan.seqs]
        require(len(set(planned)) == len(planned), "a request is planned twice")
        ended = {i for i in self.ready if len(self.lives[i].tokens) >= self.lives[i].seq.max_len}
        require(self.ready - ended <= set(planned[: plan.decode]), "a decode row is starved")
        waits = any(seq.start < seq.fill for seq in s.running)
        require(not waits or total == limits.max_num_batched_tokens, "budget is left over, and a prompt waits")
        require(not waits or prompts >= limits.max_num_batched_tokens // 4, "prompts are starved")
        require(
            total == limits.max_num_batched_tokens or not self.head_fits(), "a request waits although there is room"
        )
        first = min(self.lives.values(), key=lambda life: life.seq.rank).seq
        require(first in plan.seqs or first.request_id in ended, "the first by rank is not in the step")

    def head_fits(self) -> bool:
        """Whether the first in the queue could be admitted, one page left over for each of the others."""
        s = self.scheduler
        if not s.waiting or len(s.running) == s.max_rows:
            return False
        return len(self.pool.free) - -(-len(s.waiting[0].ids) // self.limits.page_size) >= len(s.running)

    # The device

    def launch(self, plan: scheduler.Plan) -> Flight:
        """Execute: read the context, write the new latents, choose, draft."""
        chosen = []
        used = []
        for row, (seq, count) in enumerate(zip(plan.seqs, plan.counts)):
            life = self.lives[seq.request_id]
            start = plan.starts[row]
            require(start + 1 < seq.max_len or row >= plan.decode, "a row goes on although it has surely ended")
            if (source := plan.sources[row]) >= 0:
                require(
                    row < plan.decode and self.flights and self.flights[-1].plan.seqs[source] is seq,
                    "a row continues another request",
                )
                start += len(self.flights[-1].chosen[source]) - 1
            require(start == len(life.values), "a row starts elsewhere than its latents end")
            require(row >= plan.decode or start == len(life.tokens) - 1, "a prompt decodes")
            require(start + count <= min(seq.max_len, len(seq.pages) * self.limits.page_size), "a token has no page")
            chosen.append(self.device.execute(life, start, count, row < plan.decode, self.version, plan.drafts))
            used.append(seq.pages[: -(-(start + count) // self.limits.page_size)])
        return Flight(plan, chosen, used)

    def commit(self) -> None:
        flight = self.flights.popleft()
        plan = flight.plan
        expected = [self.expect(seq, chosen) for seq, chosen in zip(plan.seqs, flight.chosen)]
        garbage = [self.rng.randrange(VOCAB)]  # what rows within their prompt choose
        gained = self.scheduler.commit(plan, [tokens or garbage for tokens in flight.chosen])
        require(gained == [len(tokens) for _, tokens in expected], "commit counts other tokens than it should")
        for seq, places in zip(plan.seqs, plan.scores):
            require(places == (0, 0) or places[0] == len(seq.scores), "a place of a prompt is scored twice or not")
            seq.scores += [PromptPlace(0.0, 1, [])] * (places[1] - places[0])
        for row, (seq, (reason, tokens)) in enumerate(zip(plan.seqs, expected)):
            life = self.lives.get(seq.request_id)
            if life is None:
                self.wasted += 1
                continue
            require(seq.finish_reason == reason, "a request ends otherwise than it should")
            life.settled += len(tokens) if row < plan.decode else plan.counts[row]
            require(seq.computed == life.settled, "what is computed is counted wrong")
            require(not (tokens and seq.unscored), "a request answers, and its prompt is not scored")
            for page in flight.pages[row][: life.settled // self.limits.page_size]:
                self.device.settled[page] = True
            if reason:
                self.finish(life)
            elif tokens and self.rng.random() < 0.01:
                self.end(seq.request_id, "stop")

    def expect(self, seq: Seq, chosen: list[int]) -> tuple[str, list[int]]:
        """The finish reason and the tokens that this row brings."""
        if seq.finish_reason:
            return seq.finish_reason, []
        length = len(seq.ids)
        for count, token in enumerate(chosen, 1):
            if token == STOP and length + count > seq.min_len:
                return "stop", chosen[:count]
            if length + count == seq.max_len:
                return "length", chosen[:count]
        return "", chosen

    def finish(self, life: Life) -> None:
        """The answer must be the one given alone, unless the weights changed in between."""
        seq = life.seq
        if life.version == self.version:
            alone = [likeliest(value) for value in cold(seq.ids[:-1], self.version)]
            require(seq.ids[seq.prompt_len :] == alone[seq.prompt_len - 1 :], "the answer is not the one given alone")
        require(0 <= seq.cached_tokens < seq.prompt_len, "cached tokens are counted wrong")
        del self.lives[seq.request_id]
        self.leaving.append(seq)
        self.finished += 1
        if self.rng.random() < 0.3:  # somebody will go on from here
            tail = [self.rng.randrange(VOCAB) for _ in range(self.limits.max_model_len)]
            self.talk[self.rng.randrange(3)] = (seq.ids + tail)[: self.limits.max_model_len]

    # Between any two events

    def check(self) -> None:
        s, pool = self.scheduler, self.pool
        flying = {id(seq) for flight in self.flights for seq in flight.plan.seqs}
        for seq in self.leaving:
            require(not seq.pages or id(seq) in flying, "a finished request keeps pages")
        self.leaving = [seq for seq in self.leaving if id(seq) in flying]
        holders = [0] * (1 + self.limits.num_pages)
        for seq in s.running + self.leaving:
            for page in seq.pages:
                holders[page] += 1
        require(holders == pool.refs, "references are not holders")
        require(not holders[pages.TRASH], "the trash page is held")
        require(
            len(pool.free) == holders.count(0) - 1 and not any(holders[page] for page in pool.free),
            "free and held pages are not all pages, once each",
        )
        require(len(pool._nodes) == len(holders) - pool._keys.count(None), "a findable page is lost")
        for flight in self.flights:
            for seq, used in zip(flight.plan.seqs, flight.pages):
                require(seq.pages[: len(used)] == used, "a page in flight is given away")
        order = [seq.rank for seq in s.running]
        require(order == sorted(order), "running requests are out of order")
        queue = [seq.rank for seq in s.waiting]
        require(queue == sorted(queue), "waiting requests are out of order")
        require(sorted(rank[1] for rank in order + queue) == sorted(self.lives), "a request is lost or doubled")
        require(not any(seq.pages or seq.computed for seq in s.waiting), "a waiting request owns something")
        require(
            all(seq.flying or (seq.start, seq.slack) == (seq.computed, 0) for seq in s.running),
            "something is in flight that is not",
        )
        for seq in s.running:
            most = pool.needed(max(seq.fill, seq.start + seq.slack + 1 + 3 * seq.num_drafts))
            require(len(seq.pages) <= most or self.lives[seq.request_id].failed, "more pages are held than used")
