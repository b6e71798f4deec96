"""The answer inside a completion: exact, strict, and linear in the length of the text."""

import re

from benthic.tasks.task import Grade

OPEN, CLOSE = "<think>", "</think>"
MAX_DIGITS = 18  # bounds the cost of int(); no task here has larger answers
INTEGER = re.compile(rf"-?[0-9]{{1,{MAX_DIGITS}}}")


def final_answer(text: str) -> str | None:
    """What follows the thought, stripped; None unless the text is exactly one `<think>...</think>`, then an answer."""
    text = text.strip()
    if not text.startswith(OPEN) or text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        return None
    return text[text.rindex(CLOSE) + len(CLOSE) :].strip() or None


def grade_integer(text: str, answer: int) -> Grade:
    """Well formed: one thought, then one integer in ASCII digits, nothing else. Correct: that integer is `answer`."""
    given = final_answer(text)
    if given is None or not INTEGER.fullmatch(given):
        return Grade(correct=False, well_formed=False)
    return Grade(correct=int(given) == answer, well_formed=True)
