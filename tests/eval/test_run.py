"""Counting is exact, and what cannot be counted stops the evaluation."""

import json
from dataclasses import dataclass, field

import pytest

from benthic.base.errors import BenthicError, InputError
from benthic.eval.run import evaluate
from benthic.tasks.arithmetic import Sums


@dataclass
class Answer:
    text: str
    token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    finish_reason: str = "stop"


TASK = Sums(digits=2)
PROBLEMS = TASK.problems("eval")[:3]


def scripted(rows):
    """An engine that answers the i-th prompt with the i-th row."""
    return lambda prompts, samples: rows


def right(problem) -> Answer:
    return Answer(TASK.demonstration(problem, "direct"))


WRONG = Answer("<think></think>99", [1])
CUT = Answer("<think>3", [1] * 8, "length")


def test_counts_shares_and_estimates_are_exact():
    one, two, three = PROBLEMS
    rows = [[right(one), right(one)], [WRONG, right(two)], [CUT, WRONG]]
    result = evaluate(scripted(rows), TASK, [one, two, three], samples=2, k=(1, 2), transcripts=2)
    assert result.correct == (2, 1, 0)
    assert result.pass_at[1].value == pytest.approx(0.5)
    assert result.pass_at[2].value == pytest.approx(2 / 3)
    assert result.length == pytest.approx((3 + 3 + 1 + 3 + 8 + 1) / 6)
    assert result.well_formed == pytest.approx(5 / 6)
    assert result.truncated == pytest.approx(1 / 6)
    assert [t.correct for t in result.transcripts] == [True, False]
    assert result.transcripts[1].text == WRONG.text


def test_the_engine_gets_every_prompt_once_and_in_order():
    seen = []

    def generate(prompts, samples):
        seen.append((prompts, samples))
        return [[WRONG] * samples for _ in prompts]

    evaluate(generate, TASK, PROBLEMS, samples=8)
    assert seen == [([p.prompt for p in PROBLEMS], 8)]


def test_the_dictionary_survives_json_and_has_the_report_s_keys():
    rows = [[right(p)] * 8 for p in PROBLEMS]
    data = evaluate(scripted(rows), TASK, PROBLEMS, samples=8).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["pass@1"] == data["pass@8"] == [1.0, 1.0, 1.0]
    assert {"length", "well_formed", "truncated", "problems", "samples", "correct", "transcripts"} <= set(data)
    assert data["transcripts"][0] == {
        "prompt": PROBLEMS[0].prompt,
        "text": right(PROBLEMS[0]).text,
        "answer": PROBLEMS[0].answer,
        "correct": True,
    }


class Broken(Sums):
    def grade(self, problem, text):
        if problem.id == PROBLEMS[1].id:
            raise ZeroDivisionError("boom")
        return super().grade(problem, text)


def test_a_grade_that_raises_stops_the_evaluation_and_names_the_problem():
    rows = [[WRONG]] * 3
    with pytest.raises(BenthicError, match=rf"grading problem '{PROBLEMS[1].id}' failed.*boom.* -> "):
        evaluate(scripted(rows), Broken(digits=2), PROBLEMS, samples=1, k=(1,))


@pytest.mark.parametrize("rows", [[[WRONG]], [[WRONG], [WRONG], []], [[WRONG, WRONG]] * 3])
def test_an_engine_that_loses_or_adds_answers_is_an_error(rows):
    with pytest.raises(BenthicError, match="did not return 1 completions for each of 3 prompts"):
        evaluate(scripted(rows), TASK, PROBLEMS, samples=1, k=(1,))


@pytest.mark.parametrize("k", [(), (0,), (1, 9)])
def test_a_k_that_the_samples_cannot_score_is_refused_before_sampling(k):
    def never(prompts, samples):
        raise AssertionError("sampled")

    with pytest.raises(InputError, match="samples=8"):
        evaluate(never, TASK, PROBLEMS, samples=8, k=k)
    with pytest.raises(InputError, match="no problems"):
        evaluate(never, TASK, [], samples=8)
