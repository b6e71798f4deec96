"""Who runs next. Pure Python: no clock, thread or event loop of its own.

Clients take turns by the tokens they have been given: prompts when they start, answers as they come. The next request
is one of the client that has been given least since somebody last found the queue empty: before, nobody was in
another's way. A client that comes later starts at the virtual time, which is what it would have been given had all
shared evenly; so nobody saves up turns by staying away, and an endless row of new clients passes nobody for long. (Fair
queueing, Demers et al. 1989; by tokens of language models, Sheng et al. 2024.)

Of two clients that wait, one gets more than the other by a bounded number of tokens, however long they wait: three
times what all places can be given at once, because of the requests that run none is stopped.

Among one client's own requests the smallest priority goes first, then the earliest. A full queue has the client that
holds most of it give up its last request for one that holds less, so a flood cannot close the queue to others.
"""

import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

MAX_CLIENTS = 1000  # remembered ones
MEASURED = 32  # ends of requests that the rate is measured from
LONGEST_WAIT = 60  # seconds that a refused client is asked to wait: beyond, OpenAI's clients heed it no more


class Full(Exception):
    """There is no room for more requests of this client."""


@dataclass(slots=True, eq=False, kw_only=True)
class Entry:
    """A request as the queue sees it."""

    client: str
    tokens: int  # of its prompt
    priority: int = 0
    number: int = -1  # order of arrival
    state: Literal["new", "waiting", "running", "ended"] = "new"


E = TypeVar("E", bound=Entry)


@dataclass(slots=True, eq=False)
class Client(Generic[E]):
    """A client that has requests here, or has had more than its share."""

    given: float  # tokens, and those that it missed by coming late
    waiting: list[E] = field(default_factory=list)  # in its own order
    tokens: int = 0  # of the waiting prompts
    running: int = 0


class Queue(Generic[E]):
    """At most `places` requests run; beyond them `max_waiting` wait, with at most `max_tokens` prompt tokens."""

    def __init__(self, places: int, max_waiting: int, max_tokens: int):
        self.places, self.max_waiting, self.max_tokens = places, max_waiting, max_tokens
        self.waiting = self.tokens = self.running = 0
        self._clients: dict[str, Client[E]] = {}
        self._busy: set[str] = set()  # clients with requests that wait or run
        self._time = 0.0  # virtual: tokens that each busy client would have been given
        self._next_number = 0
        self._ends: deque[float] = deque(maxlen=MEASURED)

    def check(self, client: str, count: int, tokens: int = 0) -> list[E]:
        """Who must leave so that `count` requests can come, with `tokens` prompt tokens together. Raises Full."""
        free = self.places - self.running
        out: list[E] = []
        if count <= free:
            return out
        own = self._clients.get(client, Client(0.0))
        gone = Counter[int]()  # by id of the client: requests that leave
        freed = Counter[int]()  # the same: prompt tokens
        while True:
            too_many = self.waiting - len(out) + count - free > self.max_waiting
            if not too_many and self.tokens - sum(freed.values()) + tokens <= self.max_tokens:
                return out
            clients = self._clients.values()
            held = [(len(c.waiting) - gone[id(c)] if too_many else c.tokens - freed[id(c)], c) for c in clients]
            most, other = max(held, key=lambda pair: pair[0], default=(0, own))
            last = other.waiting[-1 - gone[id(other)]] if most else None
            mine = len(own.waiting) + count if too_many else own.tokens + tokens
            if last is None or most - (1 if too_many else last.tokens) < mine:
                raise Full
            out.append(last)
            gone[id(other)] += 1
            freed[id(other)] += last.tokens

    def add(self, entries: Sequence[E]) -> list[E]:
        """Have all of one client's `entries` wait. Returns who had to leave for them; raises Full, and adds none."""
        name = entries[0].client
        out = self.check(name, len(entries), sum(entry.tokens for entry in entries))
        for entry in out:
            self.leave(entry)
        if not self.waiting:
            self._even()
        client = self._clients.setdefault(name, Client(0.0))
        if not client.waiting:
            highest = max((other.given for other in self._clients.values() if other.waiting), default=0.0)
            client.given = max(client.given, min(self._time, highest))
            self._busy.add(name)
        for entry in entries:
            entry.number, entry.state = self._next_number, "waiting"
            self._next_number += 1
            insort(client.waiting, entry, key=_order)
            client.tokens += entry.tokens
            self.tokens += entry.tokens
        self.waiting += len(entries)
        self._forget()
        return out

    def next(self) -> E | None:
        """Start the request whose turn it is. None where nobody waits or no place is free."""
        waiting = [client for name in self._busy if (client := self._clients[name]).waiting]
        if self.running >= self.places or not waiting:
            return None
        client = min(waiting, key=lambda client: (client.given, client.running, client.waiting[0].number))
        entry = client.waiting.pop(0)
        client.tokens -= entry.tokens
        self.tokens -= entry.tokens
        self.waiting -= 1
        self.running += 1
        client.running += 1
        entry.state = "running"
        self.give(entry, entry.tokens)
        return entry

    def give(self, entry: E, tokens: int) -> None:
        """Book tokens that a running request was given; fewer than 0 for those of its prompt that cost nothing."""
        self._clients[entry.client].given += tokens
        self._time += tokens / len(self._busy)

    def leave(self, entry: E) -> None:
        """A waiting request waits no more."""
        client = self._clients[entry.client]
        client.waiting.remove(entry)
        client.tokens -= entry.tokens
        self.tokens -= entry.tokens
        self.waiting -= 1
        self._close(entry, client)

    def end(self, entry: E, now: float) -> None:
        """A running request has ended: its place is free. `now` is the caller's clock, in seconds."""
        client = self._clients[entry.client]
        client.running -= 1
        self.running -= 1
        self._ends.append(now)
        self._close(entry, client)

    def _close(self, entry: E, client: Client[E]) -> None:
        entry.state = "ended"
        if not client.waiting and not client.running:
            self._busy.discard(entry.client)

    def retry_after(self, now: float) -> int:
        """Seconds until those who wait now have been let in, at the rate at which requests have ended lately."""
        if len(self._ends) < 2 or now <= self._ends[0]:
            return 1
        rate = (len(self._ends) - 1) / (now - self._ends[0])
        return max(1, min(LONGEST_WAIT, math.ceil((self.waiting + 1) / rate)))

    def _even(self) -> None:
        """Nobody waits: what was given till now is nobody's loss."""
        self._clients = {name: client for name, client in self._clients.items() if name in self._busy}
        for client in self._clients.values():
            client.given = 0.0
        self._time = 0.0

    def _forget(self) -> None:
        """Of too many clients that have nothing here, those who were given least: they would start anew anyway."""
        if len(self._clients) > MAX_CLIENTS + len(self._busy):
            idle = [(client.given, name) for name, client in self._clients.items() if name not in self._busy]
            for _, name in sorted(idle)[: len(idle) // 2]:
                del self._clients[name]


def _order(entry: Entry) -> tuple[int, int]:
    return entry.priority, entry.number
