"""What an engine has done since it was made. Imports no torch."""

from dataclasses import dataclass, field

from benthic.inference.scheduler import Plan


@dataclass
class Stats:
    """Counters. A row is one request in one step."""

    steps: int = 0
    prefill_tokens: int = 0  # prompt tokens computed, those computed again after a preemption included
    generated_tokens: int = 0
    decode_rows: int = 0
    decode_tokens: int = 0  # emitted by decode rows
    drafted: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)  # of the first, second, ... draft of a row
    accepted_at: list[int] = field(default_factory=list)
    preemptions: int = 0

    def count(self, plan: Plan, chosen: list[list[int]], gained: list[int]) -> None:
        """Book one step: `chosen` as verified, `gained` after stops cut some off. Wasted rows count for nothing."""
        self.steps += 1
        self.generated_tokens += sum(gained)
        self.prefill_tokens += sum(plan.counts[plan.decode :])
        for count, tokens, new in zip(plan.counts[: plan.decode], chosen, gained):
            if new:
                self.decode_rows += 1
                self.decode_tokens += new
                self._drafts(count - 1, len(tokens) - 1)

    def _drafts(self, made: int, right: int) -> None:
        self.drafted += made
        self.accepted += right
        missing = made - len(self.drafted_at)
        self.drafted_at += [0] * missing
        self.accepted_at += [0] * missing
        for place in range(made):
            self.drafted_at[place] += 1
            self.accepted_at[place] += place < right

    @property
    def acceptance(self) -> float:
        """Share of drafts that were right; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_at(self) -> list[float]:
        """The same of the first, second, ... draft of a row. One that was right after a wrong one was of no use."""
        return [right / made for right, made in zip(self.accepted_at, self.drafted_at)]

    @property
    def tokens_per_row(self) -> float:
        """Tokens that one request gains per decode step, 1 without drafts."""
        return self.decode_tokens / self.decode_rows if self.decode_rows else 0.0
