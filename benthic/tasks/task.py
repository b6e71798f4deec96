"""What a task is. Demonstrations, rewards and evaluation read the same object, so they cannot disagree."""

from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["sft", "rl", "eval"]
Style = Literal["reasoned", "direct"]


@dataclass(frozen=True)
class Problem:
    """One question. `prompt` is what the user says; `answer` is the reference that a grade compares with."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Grade:
    """Verdict on one completion: R1's two rule rewards, accuracy and format.

    A correct answer in the wrong form does not exist: it would pay a policy for leaving the format.
    """

    correct: bool
    well_formed: bool

    def __post_init__(self) -> None:
        if self.correct and not self.well_formed:
            raise ValueError("Grade is correct but not well formed -> grade malformed text as wrong")


class Task(Protocol):
    def problems(self, split: Split) -> list[Problem]:
        """Disjoint splits, each in a fixed shuffled order, so that the first n are a fair sample."""
        ...

    def grade(self, problem: Problem, text: str) -> Grade:
        """Judge a whole completion. Bad text is graded, never raised: an error here is a bug of the task."""
        ...

    def demonstration(self, problem: Problem, style: Style) -> str:
        """A completion that earns full marks: with its reasoning, or with an empty thought."""
        ...
