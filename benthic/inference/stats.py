"""What an engine has done since it was made. Imports no torch."""

from dataclasses import dataclass

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
                self.drafted += count - 1
                self.accepted += len(tokens) - 1

    @property
    def acceptance(self) -> float:
        """Share of drafts that were right; 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_row(self) -> float:
        """Tokens that one request gains per decode step, 1 without drafts."""
        return self.decode_tokens / self.decode_rows if self.decode_rows else 0.0
