"""Ask a model every problem several times and count. The engine comes in as a callable, so any engine will do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benthic.base.errors import BenthicError, InputError
from benthic.eval.score import Estimate, mean_pass_at_k
from benthic.tasks.task import Grade, Problem, Task


class Completion(Protocol):
    """What a sampled answer must offer. `finish_reason` is "length" where the limit cut it."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str | None: ...


Generate = Callable[[list[str], int], Sequence[Sequence[Completion]]]  # (prompts, samples) -> samples of each prompt


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The first sample of one problem, for people to read."""

    prompt: str
    text: str
    answer: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome over P problems x `samples` samples. Shares are of all P x samples completions."""

    samples: int
    correct: tuple[int, ...]  # [P] right samples of each problem
    pass_at: dict[int, Estimate]  # k -> mean pass@k over problems
    length: float  # mean tokens of a completion
    well_formed: float
    truncated: float
    transcripts: tuple[Transcript, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `pass@k` keys with [value, low, high], then the shares; transcripts last."""
        return {
            "problems": len(self.correct),
            "samples": self.samples,
            **{f"pass@{k}": list(estimate) for k, estimate in self.pass_at.items()},
            "length": self.length,
            "well_formed": self.well_formed,
            "truncated": self.truncated,
            "correct": list(self.correct),
            "transcripts": [vars(transcript) for transcript in self.transcripts],
        }


def evaluate(
    generate: Generate,
    task: Task,
    problems: Sequence[Problem],
    *,
    samples: int,
    k: tuple[int, ...] = (1, 8),
    transcripts: int = 8,
    seed: int = 0,
) -> Evaluation:
    """Sample and grade. `seed` is the bootstrap's; sampling seeds are the engine's business.

    Raises InputError for arguments that cannot be scored and BenthicError, naming the problem, when grading fails: an
    answer that the task cannot judge is a bug, not a wrong answer.
    """
    if not problems:
        raise InputError("no problems to evaluate -> choose a split that has some")
    if not k or min(k) < 1 or max(k) > samples:
        raise InputError(f"k={k} with samples={samples} -> use 1 <= k <= samples")
    answers = generate([problem.prompt for problem in problems], samples)
    if len(answers) != len(problems) or any(len(some) != samples for some in answers):
        raise BenthicError(f"generate did not return {samples} completions for each of {len(problems)} prompts")
    grades = [[_grade(task, problem, c) for c in some] for problem, some in zip(problems, answers)]
    correct = tuple(sum(grade.correct for grade in some) for some in grades)
    total = len(problems) * samples
    return Evaluation(
        samples=samples,
        correct=correct,
        pass_at={at: mean_pass_at_k(correct, samples, at, seed=seed) for at in k},
        length=sum(len(c.token_ids) for some in answers for c in some) / total,
        well_formed=sum(grade.well_formed for some in grades for grade in some) / total,
        truncated=sum(c.finish_reason == "length" for some in answers for c in some) / total,
        transcripts=tuple(
            Transcript(prompt=problem.prompt, text=some[0].text, answer=problem.answer, correct=marks[0].correct)
            for problem, some, marks in list(zip(problems, answers, grades))[:transcripts]
        ),
    )


def _grade(task: Task, problem: Problem, completion: Completion) -> Grade:
    try:
        return task.grade(problem, completion.text)
    except Exception as error:
        raise BenthicError(f"grading problem {problem.id!r} failed: {error!r} -> fix the task's grade") from error
