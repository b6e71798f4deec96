"""Sums of single digits: the smallest task on which reasoning pays, because the running totals do the work.

A model that must say the total at once has to add in its activations; one that may write its running totals needs only
single steps. So reinforcement learning has something to discover that a few minutes of training can reach.
"""

import hashlib
from dataclasses import dataclass, field
from itertools import accumulate, combinations_with_replacement, permutations

from benthic.base.errors import InputError
from benthic.tasks.answer import CLOSE, OPEN, grade_integer
from benthic.tasks.task import Grade, Problem, Split, Style

EVAL_SHARE, RL_SHARE = 0.2, 0.3  # of the multisets of digits; supervised fine-tuning gets the rest


@dataclass(frozen=True, kw_only=True)
class Sums:
    """`3+4+5+9+1=` -> 22: `digits` addends (2 to 6) of one digit each; `seed` decides the splits and their order.

    Splits are disjoint by multiset: no order of an evaluated set of digits is ever trained on. `sft` and `rl` hold
    every order of theirs, `eval` one order of each (400 problems for five digits).
    No spaces: in byte-level BPE the space before a digit is a token of its own. Bare totals rather than equations: at
    equal tokens they are learned as fast, and half as long to sample.
    """

    digits: int = 5
    seed: int = 0
    _splits: dict[Split, list[Problem]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 2 <= self.digits <= 6:
            raise InputError(f"digits={self.digits} in Sums -> use 2 to 6")
        sets = self._shuffled(combinations_with_replacement(range(10), self.digits))
        n_eval, n_rl = round(EVAL_SHARE * len(sets)), round(RL_SHARE * len(sets))
        orders = {
            "eval": [self._shuffled(set(permutations(s)))[0] for s in sets[:n_eval]],
            "rl": [order for s in sets[n_eval : n_eval + n_rl] for order in set(permutations(s))],
            "sft": [order for s in sets[n_eval + n_rl :] for order in set(permutations(s))],
        }
        splits = {split: [_problem(order) for order in self._shuffled(some)] for split, some in orders.items()}
        object.__setattr__(self, "_splits", splits)

    def problems(self, split: Split) -> list[Problem]:
        if split not in self._splits:
            raise InputError(f"split {split!r} of Sums -> use one of {', '.join(sorted(self._splits))}")
        return list(self._splits[split])

    def grade(self, problem: Problem, text: str) -> Grade:
        return grade_integer(text, int(problem.answer))

    def demonstration(self, problem: Problem, style: Style) -> str:
        if style == "direct":
            return f"{OPEN}{CLOSE}{problem.answer}"
        if style != "reasoned":
            raise InputError(f"style {style!r} of Sums -> use 'reasoned' or 'direct'")
        totals = accumulate(int(digit) for digit in problem.prompt.removesuffix("=").split("+"))
        return OPEN + "\n".join(map(str, totals)) + CLOSE + problem.answer

    def _shuffled(self, orders) -> list[tuple[int, ...]]:
        """Sorted by a keyed hash: the same order on every machine and Python version, whatever order they came in."""
        return sorted(orders, key=lambda order: hashlib.sha256(f"{self.seed}:{order}".encode()).digest())


def _problem(order: tuple[int, ...]) -> Problem:
    digits = [str(digit) for digit in order]
    return Problem(id=f"sums-{'-'.join(digits)}", prompt=f"{'+'.join(digits)}=", answer=str(sum(order)))
