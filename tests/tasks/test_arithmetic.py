"""Sums of digits: honest splits, demonstrations that earn full marks, the same everywhere."""

from itertools import pairwise

import pytest

from benthic.base.errors import InputError
from benthic.tasks.arithmetic import Sums
from benthic.tasks.task import Grade, Task

SPLITS = ("sft", "rl", "eval")


@pytest.fixture(scope="module")
def sums() -> Sums:
    return Sums()


def digits(problem) -> list[int]:
    return [int(digit) for digit in problem.prompt.removesuffix("=").split("+")]


def multisets(problems) -> set[tuple[int, ...]]:
    return {tuple(sorted(digits(problem))) for problem in problems}


def test_no_multiset_of_digits_is_in_two_splits(sums):
    sets = [multisets(sums.problems(split)) for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 2002  # all multisets of five digits, each once


def test_splitting_by_order_alone_would_leak(sums):
    """Control: two halves of one split share no problem, yet share multisets, and the check above would see it."""
    problems = sums.problems("sft")
    left, right = problems[::2], problems[1::2]
    assert not {p.id for p in left} & {p.id for p in right}
    assert multisets(left) & multisets(right)


def test_every_split_is_large_enough_and_ids_are_unique(sums):
    sizes = {split: len(sums.problems(split)) for split in SPLITS}
    assert sizes["eval"] == 400
    assert sizes["sft"] > 40_000
    assert sizes["rl"] > 20_000
    assert len({p.id for split in SPLITS for p in sums.problems(split)}) == sum(sizes.values())


def test_answers_are_the_sums(sums):
    for split in SPLITS:
        assert all(int(p.answer) == sum(digits(p)) for p in sums.problems(split))


def test_both_demonstrations_earn_full_marks(sums):
    for problem in sums.problems("eval"):
        for style in ("reasoned", "direct"):
            assert sums.grade(problem, sums.demonstration(problem, style)) == Grade(correct=True, well_formed=True)


def test_reasoned_demonstrations_are_running_totals_and_direct_ones_are_empty(sums):
    for problem in sums.problems("eval"):
        reasoned = sums.demonstration(problem, "reasoned")
        totals = [int(line) for line in reasoned.removeprefix("<think>").split("</think>")[0].split("\n")]
        first, *rest = digits(problem)
        assert totals[0] == first
        assert [b - a for a, b in pairwise(totals)] == rest
        assert sums.demonstration(problem, "direct") == f"<think></think>{problem.answer}"


def test_a_reasoned_answer_fits_thirty_tokens_even_at_a_token_per_byte(sums):
    for problem in sums.problems("sft"):
        text = sums.demonstration(problem, "reasoned")
        assert len(text.replace("<think>", "#").replace("</think>", "#").encode()) <= 30
        assert " " not in text + problem.prompt


def test_the_first_problems_are_a_fair_sample(sums):
    some = [int(p.answer) for p in sums.problems("rl")[:300]]
    every = [int(p.answer) for p in sums.problems("rl")]
    assert abs(sum(some) / len(some) - sum(every) / len(every)) < 1.5
    assert len({digits(p)[0] for p in sums.problems("rl")[:300]}) == 10


def test_a_seed_gives_the_same_problems_and_another_seed_others(sums):
    assert [p.id for p in Sums().problems("eval")] == [p.id for p in sums.problems("eval")]
    assert sums.problems("eval")[0].id == "sums-4-8-2-5-2"  # pinned: the same on every machine and Python version
    assert {p.id for p in Sums(seed=1).problems("eval")} != {p.id for p in sums.problems("eval")}


def test_the_caller_cannot_change_the_task(sums):
    sums.problems("eval").clear()
    assert sums.problems("eval")


def test_values_that_cannot_work_are_refused_at_the_door(sums):
    with pytest.raises(InputError, match=r"digits=7 .* use 2 to 6"):
        Sums(digits=7)
    with pytest.raises(InputError, match="split 'test'"):
        sums.problems("test")
    with pytest.raises(InputError, match="style 'long'"):
        sums.demonstration(sums.problems("eval")[0], "long")


def test_sums_is_a_task(sums):
    task: Task = sums
    assert task.problems("eval")
