"""The grader cannot be talked into a reward."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.tasks.answer import grade_integer
from benthic.tasks.task import Grade

RIGHT = Grade(correct=True, well_formed=True)
WRONG = Grade(correct=False, well_formed=True)
MALFORMED = Grade(correct=False, well_formed=False)


@pytest.mark.parametrize("text", ["<think></think>22", " <think>3\n7</think>\n22\n", "<think>23</think> 22"])
def test_one_thought_and_the_integer_is_right(text):
    assert grade_integer(text, 22) == RIGHT


@pytest.mark.parametrize(
    "text", ["<think>22</think>21", "<think></think>-22", "<think></think>220", "<think></think>2"]
)
def test_another_integer_is_wrong_whatever_the_thought_says(text):
    assert grade_integer(text, 22) == WRONG


HOSTILE = [
    "",
    "22",
    "<think>",
    "</think>22",
    "<think>22",
    "<think>22</think>",
    "<think></think>21 22",
    "<think></think>22 22",
    "<think></think>22.",
    "<think></think>22.0",
    "<think></think>2 2",
    "<think></think>+22",
    "<think></think>--22",
    "<think></think>0x16",
    "<think></think>2_2",
    "<think></think>22e0",
    "<think></think>the answer is 22",
    "<think></think>22</think>22",
    "<think></think><think></think>22",
    "<think><think></think>22",
    "</think><think>22",
    "so <think></think>22",
    "<THINK></THINK>22",
    "<think ></think>22",
    "<think></think>２２",
    "<think></think>٢٢",
    "<think></think>²²",
    "<think></think>22\x00",
    "<think></think>\u200b22",
    "<think></think>22\n\n21",
    "<think></think>{answer}",
    "<think></think>" + "0" * 40 + "22",
    "<think></think>inf",
    "<think></think>nan",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_malformed_text_is_never_rewarded(text):
    assert grade_integer(text, 22) == MALFORMED


@given(st.text())
def test_any_text_gets_a_grade(text):
    grade_integer(text, 22)
    grade_integer(f"<think>{text}</think>22", 22)


@given(st.text(alphabet="0123456789- +.\n<think>/２٢²", max_size=40), st.integers(-99, 99))
def test_only_the_exact_integer_is_correct(tail, answer):
    grade = grade_integer(f"<think></think>{tail}", answer)
    if grade.correct:
        assert tail.strip().removeprefix("-").isascii()
        assert int(tail) == answer


@given(st.integers(-(10**17), 10**17), st.integers(-(10**17), 10**17))
def test_correct_exactly_when_equal(given_, answer):
    assert grade_integer(f"<think></think>{given_}", answer) == (RIGHT if given_ == answer else WRONG)


@pytest.mark.parametrize("unit", ["<think>", "</think>", "9", " ", "<think></think>", "<", "-"])
def test_a_huge_text_is_refused_in_linear_time(unit):
    started = time.perf_counter()
    assert grade_integer(f"<think></think>{unit * 1_000_000}", 22) == MALFORMED
    assert grade_integer(unit * 1_000_000, 22) == MALFORMED
    assert time.perf_counter() - started < 2


def test_a_correct_answer_in_the_wrong_form_cannot_be_expressed():
    with pytest.raises(ValueError, match="not well formed"):
        Grade(correct=True, well_formed=False)
