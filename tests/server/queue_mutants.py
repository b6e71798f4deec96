"""Queues with one bug each, and the invariant of the world that notices it."""

import inspect
import sys
import types

from benthic.server import queue

# name: (what stands in queue.py, what replaces it, what the world says)
MUTANTS = {
    "one place too many": ("if self.running >= self.places or", "if self.running > self.places or", "more run than"),
    "one place too few": (
        "if self.running >= self.places or",
        "if self.running + 1 >= self.places or",
        "place is free",
    ),
    "a place is lost": (
        "        client.running -= 1\n        self.running -= 1\n",
        "        client.running -= 1\n",
        "is lost or",
    ),
    "a start takes no place": ("        self.running += 1\n", "", "a place is lost or made up"),
    "who leaves is still counted": (
        "        self.tokens -= entry.tokens\n        self.waiting -= 1\n        self._close",
        "        self.tokens -= entry.tokens\n        self._close",
        "a waiting request is lost or made up",
    ),
    "who starts is still counted": (
        "        self.waiting -= 1\n        self.running += 1\n",
        "        self.running += 1\n",
        "a waiting request is lost or made up",
    ),
    "tokens of those who leave are kept": (
        "        self.tokens -= entry.tokens\n        self.waiting -= 1\n        self._close",
        "        self.waiting -= 1\n        self._close",
        "the waiting tokens are miscounted",
    ),
    "tokens of those who start are kept": (
        "        self.tokens -= entry.tokens\n        self.waiting -= 1\n        self.running",
        "        self.waiting -= 1\n        self.running",
        "the waiting tokens are miscounted",
    ),
    "the bound is one too high": (
        "+ count - free > self.max_waiting",
        "+ count - free > self.max_waiting + 1",
        "too many wait",
    ),
    "the bound is one too low": (
        "+ count - free > self.max_waiting",
        "+ count - free >= self.max_waiting",
        "the queue has room",
    ),
    "free places are not counted": (
        "+ count - free > self.max_waiting",
        "+ count > self.max_waiting",
        "the queue has room",
    ),
    "tokens have no bound": (
        "+ tokens <= self.max_tokens",
        "+ 0 <= self.max_tokens + tokens",
        "too many prompt tokens",
    ),
    "nobody gives way": ("if last is None or", "if last is None or most or", "refused although another holds more"),
    "anybody gives way": ("most - (1 if too_many else last.tokens) < mine", "most < 1", "to somebody who holds more"),
    "the first gives way": (
        "other.waiting[-1 - gone[id(other)]]",
        "other.waiting[gone[id(other)]]",
        "not the last one",
    ),
    "free places are refused": ("if count <= free:", "if count < free:", "refused although places are free"),
    "late ones go first": ("return entry.priority, entry.number", "return entry.priority, -entry.number", "own order"),
    "priority means nothing": ("return entry.priority, entry.number", "return 0, entry.number", "own order"),
    "large priorities first": (
        "return entry.priority, entry.number",
        "return -entry.priority, entry.number",
        "own order",
    ),
    "some of a refused group stay": (
        "        out = self.check(name",
        "        self.waiting += 1\n        out = self.check(name",
        "is kept",
    ),
    "answers cost nothing": (
        "client].given += tokens",
        "client].given += tokens if tokens > 1 else 0",
        "is given far more",
    ),
    "prompts cost nothing": ("        self.give(entry, entry.tokens)\n", "", "is given far more"),
    "requests are counted, not tokens": ("client].given += tokens", "client].given += tokens > 1", "is given far more"),
    "in order of arrival": (
        "(client.given, client.running, client.waiting[0].number)",
        "client.waiting[0].number",
        "is given far more",
    ),
    "who was given most is next": ("client = min(waiting, key=", "client = max(waiting, key=", "is given far more"),
    "who comes late starts at nothing": (
        "client.given = max(client.given, min(self._time, highest))",
        "pass",
        "never has its turn",
    ),
    "who comes back owes nothing": (
        "client.given = max(client.given, min(self._time, highest))",
        "client.given = 0.0",
        "never has its turn",
    ),
    "who comes back owes all": (
        "        if not self.waiting:\n            self._even()\n",
        "",
        "is given far more",
    ),
    "time stands still": ("        self._time += tokens / len(self._busy)\n", "", "never has its turn"),
    "a wait without end": ("max(1, min(LONGEST_WAIT,", "max(1, max(LONGEST_WAIT,", "an endless wait"),
    "no wait at all": ("return max(1, min(", "return max(0, min(0, ", "an endless wait"),
    "a request is started twice": ("entry = client.waiting.pop(0)", "entry = client.waiting[0]", "that does not wait"),
}


def mutant(old: str, new: str) -> type[queue.Queue]:
    """The Queue with one place of queue.py rewritten. The place must exist exactly once."""
    source = inspect.getsource(queue)
    if source.count(old) != 1:
        raise ValueError(f"{old!r} does not stand exactly once in queue.py")
    built = types.ModuleType(queue.__name__ + "_mutant")
    sys.modules[built.__name__] = built  # dataclasses look their module up
    exec(source.replace(old, new), vars(built))
    built.Full = queue.Full
    return built.Queue
