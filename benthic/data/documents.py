"""The unit of raw data, and the ledger of what was left out and why."""

from collections import Counter
from dataclasses import dataclass, field

LISTED = 1000  # skips that are kept by name; all are counted


@dataclass(frozen=True)
class Document:
    """One text. `id` is stable between runs and machines (input name, relative path, line); `source` is the input."""

    id: str
    text: str
    source: str


@dataclass
class Skips:
    """What a reader left out: `counts` by reason, and (where, reason) of the first thousand."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.listed) < LISTED:
            self.listed.append((where, reason))

    def summary(self) -> str:
        """One line: `3 skipped: 2 not UTF-8, 1 empty`."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return f"{self.counts.total()} skipped" + (f": {reasons}" if reasons else "")
