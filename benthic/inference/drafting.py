"""How many tokens a step drafts for the next, and whether that pays. Pure Python; tokens never depend on it.

Verifying k drafts makes a step longer, most of all where many rows already keep the device busy. Drafting pays where
tokens per step / seconds per step are more with drafts than without; both sides are measured, for rows of about the
same number. Each is tried now and then while the other is in use: at first once in `LEAST` steps, less often as long as
that changes nothing, and never for more than `TRIAL` steps. So at most one step in sixteen is a trial.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

MARGIN = 1.05  # times as fast the other must be
TRIAL = 16  # steps that try the other
SETTLE = 4  # of them not counted: they compile, capture graphs, and end what was in flight
LEAST, MOST = 256, 4096  # steps between two trials
MEMORY = 1 / 64  # weight of the newest step


class Drafting(Protocol):
    """What scheduler and engine ask."""

    def depth(self, rows: int) -> int:
        """Drafts per row to make in the next step, which has so many decode rows."""
        ...

    def observe(self, rows: int, verified: int, made: int, tokens: int) -> None:
        """A step has ended: it had `rows` decode rows and nothing else (0: other steps), verified and made so many
        drafts per row, and brought `tokens`."""
        ...


@dataclass(frozen=True)
class Always:
    """The same number of drafts in every step."""

    drafts: int

    def depth(self, rows: int) -> int:
        return self.drafts

    def observe(self, rows: int, verified: int, made: int, tokens: int) -> None:
        pass


@dataclass
class Speed:
    """Moving averages of tokens per row and seconds of one kind of steps."""

    tokens: float = 0.0
    seconds: float = 0.0
    seen: int = 0  # steps that count in tokens
    timed: int = -SETTLE  # in seconds

    def forget_time(self) -> None:
        self.seconds, self.timed = 0.0, -SETTLE

    def count(self, tokens: float, seconds: float) -> None:
        self.seen += 1
        self.tokens += max(MEMORY, 1 / self.seen) * (tokens - self.tokens)
        self.timed += 1
        if self.timed == 1 or (self.timed > 1 and seconds < self.seconds / 2):
            self.seconds = seconds  # whatever was measured before was no ordinary step
        elif self.timed > 1:
            self.seconds += max(MEMORY, 1 / self.timed) * (min(seconds, 2 * self.seconds) - self.seconds)

    @property
    def rate(self) -> float:
        """Tokens per row and second; 0 where nothing is known."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Bucket:
    """Steps of about as many rows. Two speeds: without drafts, and with them."""

    on: bool = True
    trial: bool = False
    period: int = LEAST
    left: int = LEAST  # steps until the trial begins or ends
    speeds: tuple[Speed, Speed] = field(default_factory=lambda: (Speed(), Speed()))

    def drafts(self) -> bool:
        """Whether one more step drafts."""
        if not self.left:
            if self.trial:
                self._judge()
            else:
                self.speeds[not self.on].forget_time()
                self.left = TRIAL
            self.trial = not self.trial
        self.left -= 1
        return self.on != self.trial

    def _judge(self) -> None:
        used, tried = self.speeds[self.on].rate, self.speeds[not self.on].rate
        if used and tried > MARGIN * used:
            self.on, self.period = not self.on, LEAST
        else:
            self.period = min(2 * self.period, MOST)
        self.left = self.period


class Adaptive:
    """`drafts` per row where they pay, else none."""

    def __init__(self, drafts: int, clock: Callable[[], float] = time.perf_counter):
        self.most, self.clock = drafts, clock
        self.buckets: dict[int, Bucket] = {}  # by the bits of the number of rows
        self._before = clock()

    def depth(self, rows: int) -> int:
        return self.most if self._bucket(rows).drafts() else 0

    def observe(self, rows: int, verified: int, made: int, tokens: int) -> None:
        """Steps that begin or end a stretch of drafting are of neither kind."""
        now = self.clock()
        if rows and bool(verified) == bool(made):
            self._bucket(rows).speeds[made > 0].count(tokens / rows, now - self._before)
        self._before = now

    def _bucket(self, rows: int) -> Bucket:
        return self.buckets.setdefault(rows.bit_length(), Bucket())


def make(drafts: int, adaptive: bool) -> Drafting:
    """What an engine with these options asks."""
    return Adaptive(drafts) if drafts and adaptive else Always(drafts)
