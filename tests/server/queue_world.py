"""Random lives of a queue in front of an engine that gives every running request a token a step, and what must hold."""

import random
from dataclasses import dataclass

from benthic.server.queue import Entry, Full, Queue

PROMPT, ANSWER = 12, 30  # most tokens


class Broken(Exception):
    """An invariant does not hold."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Broken(what)


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Entry):
    left: int = 0  # tokens of its answer to come


class World:
    """One life, made of its seed alone. It books by itself who waits and runs, and compares. In every second world
    somebody always waits, and clients differ much in the length of what they ask for."""

    def __init__(self, seed: int, kind: type[Queue] = Queue):
        self.random = random.Random(seed)
        self.crowded = seed % 2 == 1
        self.places, self.max_waiting = self.random.randint(1, 4), self.random.randint(0, 12)
        self.max_tokens = self.random.choice([30, 100, 1000])
        if self.crowded:
            self.places, self.max_waiting, self.max_tokens = self.random.randint(1, 2), 12, 1000
        self.queue: Queue[Job] = kind(self.places, self.max_waiting, self.max_tokens)
        self.names = list("abcdef"[: self.random.randint(2, 6)])
        self.prompt, self.answer = self.random.choice([(PROMPT, ANSWER), (PROMPT, 1), (1, ANSWER)])  # most tokens
        self.prompts = {name: self.random.choice([1, self.prompt]) for name in self.names}
        self.answers = {name: self.random.choice([1, self.answer]) for name in self.names}
        self.greedy = {name: self.crowded or self.random.random() < 0.6 for name in self.names}
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.given = dict.fromkeys(self.names, 0)  # tokens, ever
        self.pairs: dict[tuple[str, str], int] = {}  # two that wait -> least that one was ahead of the other so far
        self.number = self.time = self.total = 0
        self.started = self.refused = self.pushed = 0
        at_once = self.places * (self.prompt + self.answer)
        self.most = 3 * at_once  # tokens that one of two is given more than the other while both wait
        # ... and that others get while a client waits and none of its requests starts.
        self.patience = 2 * at_once * (self.places + self.max_waiting + 1)
        self.since: dict[str, int] = {}  # client that waits -> tokens given to all when it last had its turn
        self.strangers = self.random.choice([0.1, 0.1, 0.7])

    def run(self, events: int) -> None:
        if self.crowded:
            self.alone()
        for _ in range(events * (1 + 3 * self.crowded)):
            self.random.choice([self.arrive, self.arrive, self.step, self.step, self.step, self.leave])()
            self.serve()
            self.check()

    def alone(self) -> None:
        """Before anybody waits, the first client is given much. It is nobody's loss and not held against it."""
        for _ in range(1000 // (self.prompt + self.answer)):
            self.queue.add([Job(client="a", tokens=self.prompt, left=self.answer)])
            job = self.queue.next()
            self.queue.give(job, self.answer)
            self.queue.end(job, 0)

    def arrive(self) -> None:
        """A group of one client; greedy ones keep asking, and now and then comes somebody new."""
        name = self.random.choice(self.names)
        if self.random.random() < self.strangers:
            name = f"new {self.number}"
            self.number += 1
            self.given[name] = 0
        elif not self.greedy[name] and self.random.random() < 0.7:
            return
        group = [
            Job(
                client=name, tokens=self.prompts.get(name, self.prompt), priority=self.random.choice([0, 0, 0, 1]),
                left=self.random.randint(1, self.answers.get(name, self.answer)),
            )
            for _ in range(self.random.choice([1, 1, 1, 2, 3]))
        ]  # fmt: skip
        free = self.places - len(self.running)
        before = list(self.waiting)
        try:
            out = self.queue.add(group)
        except Full:
            self.refused += 1
            require(len(group) > free, "refused although places are free")
            room = self.max_waiting - len(before) + free >= len(group)
            tokens = sum(job.tokens for job in before + group)
            require(not room or tokens > self.max_tokens, "refused although the queue has room")
            if len(group) == 1 and tokens <= self.max_tokens:
                most = max(self.held(job.client) for job in before) if before else 0
                require(most <= self.held(name) + 1, "refused although another holds more")
            require(self.queue.waiting == len(before), "a refused group is kept")
            return
        for job in out:
            self.pushed += 1
            rest = [other for other in self.waiting if other.client == job.client]
            require(job is max(rest, key=lambda j: (j.priority, j.number)), "not the last one gives way")
            self.waiting.remove(job)
        self.waiting += group
        if self.max_tokens == 1000:  # which is never reached
            least = min((self.held(job.client) for job in out), default=len(self.waiting))
            require(self.held(name) <= least, "one gives way to somebody who holds more")

    def held(self, name: str) -> int:
        return sum(job.client == name for job in self.waiting)

    def serve(self) -> None:
        """Start whom the queue names."""
        while (job := self.queue.next()) is not None:
            self.started += 1
            require(job in self.waiting, "a request runs that does not wait")
            own = [other for other in self.waiting if other.client == job.client]
            require(job is min(own, key=lambda j: (j.priority, j.number)), "a client's own order is not kept")
            self.waiting.remove(job)
            self.running.append(job)
            require(len(self.running) <= self.places, "more run than there are places")
            self.given[job.client] += job.tokens
            self.total += job.tokens
            self.since.pop(job.client, None)

    def step(self) -> None:
        """Every running request gets a token; those that are done end."""
        self.time += 1
        for job in list(self.running):
            job.left -= 1
            self.queue.give(job, 1)
            self.given[job.client] += 1
            self.total += 1
            if not job.left:
                self.running.remove(job)
                self.queue.end(job, self.time)

    def leave(self) -> None:
        """Somebody hangs up."""
        if self.crowded or self.random.random() < 0.8 or not self.waiting + self.running:
            return
        job = self.random.choice(self.waiting + self.running)
        if job in self.waiting:
            self.waiting.remove(job)
            self.queue.leave(job)
        else:
            self.running.remove(job)
            self.queue.end(job, self.time)

    def check(self) -> None:
        queue = self.queue
        require(queue.running == len(self.running), "a place is lost or made up")
        require(queue.waiting == len(self.waiting), "a waiting request is lost or made up")
        require(queue.tokens == sum(job.tokens for job in self.waiting), "the waiting tokens are miscounted")
        require(len(self.running) == self.places or not self.waiting, "somebody waits although a place is free")
        require(len(self.waiting) <= self.max_waiting, "too many wait")
        require(queue.tokens <= max(self.max_tokens, PROMPT * self.places), "too many prompt tokens wait")
        require(1 <= queue.retry_after(self.time) <= 60, "an endless wait is asked for")
        names = {job.client for job in self.waiting}
        total = self.total
        self.since = {name: self.since.get(name, total) for name in names}
        for since in self.since.values():
            require(total - since <= self.patience, "a client that waits never has its turn")
        pairs, self.pairs = self.pairs, {}
        for one in names:
            for other in names.intersection(self.names) - {one}:  # strangers are served once
                ahead = self.given[one] - self.given[other]
                self.pairs[one, other] = least = min(ahead, pairs.get((one, other), ahead))
                require(ahead - least <= self.most, "of two that wait, one is given far more")
