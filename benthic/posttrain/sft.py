"""Supervised fine-tuning on a task's demonstrations: packed rows, neighbours invisible, loss on the answers only."""

import hashlib
import random
from collections.abc import Iterator
from typing import Any, Self

from benthic.base.batch import Batch
from benthic.base.errors import InputError
from benthic.data.packing import Sample, pack
from benthic.tasks.task import Problem, Task
from benthic.tokenizer.chat import render
from benthic.tokenizer.tokenizer import Tokenizer


class Demonstrations:
    """Endless batches of `rows` rows of `length` tokens. Demonstration number i is a pure function of (seed, i).

    `direct_share` of the demonstrations answer at once instead of reasoning first.
    """

    def __init__(
        self, task: Task, tokenizer: Tokenizer, *, rows: int, length: int, seed: int, direct_share: float = 0.0
    ):
        self.task, self.tokenizer, self.rows, self.length = task, tokenizer, rows, length
        self.seed, self.direct_share = seed, direct_share
        self.problems = task.problems("sft")
        self.order: tuple[int, list[int]] = (-1, [])  # (epoch, its permutation)
        self.taken = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Take demonstrations in order, each into the first row with room, until the next one fits in none."""
        rows: list[list[Sample]] = [[] for _ in range(self.rows)]
        free = [self.length] * self.rows
        for sample in self._from(self.taken):
            room = next((r for r, left in enumerate(free) if left >= len(sample.ids)), None)
            if room is None:
                break
            free[room] -= len(sample.ids)
            rows[room].append(sample)
            self.taken += 1
        return Batch.cat([pack(row, self.length, self.tokenizer.pad_id) for row in rows])

    def _from(self, start: int) -> Iterator[Sample]:
        while True:
            problem, direct = self.problem(start), self.fraction(start) < self.direct_share
            sample = demonstration(self.task, problem, self.tokenizer, direct)
            if len(sample.ids) > self.length:
                raise InputError(
                    f"the demonstration of {problem.id} has {len(sample.ids)} tokens, more than "
                    f"max_length={self.length} -> use a greater max_length"
                )
            yield sample
            start += 1

    def problem(self, i: int) -> Problem:
        """Problem of demonstration i: every epoch visits each problem once, in an order of its own."""
        epoch, place = divmod(i, len(self.problems))
        if self.order[0] != epoch:
            order = list(range(len(self.problems)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self.order = (epoch, order)
        return self.problems[self.order[1][place]]

    def fraction(self, i: int) -> float:
        """A number in [0, 1) that belongs to demonstration i."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{i}".encode()).digest()[:4], "big") / 2**32

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def demonstration(task: Task, problem: Problem, tokenizer: Tokenizer, direct: bool) -> Sample:
    """One conversation: the prompt, masked, and the answer."""
    answer = task.demonstration(problem, "direct" if direct else "reasoned")
    turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": answer}]
    rendered = render(turns, tokenizer)
    return Sample(ids=rendered.ids, mask=rendered.mask)


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The same conversation up to where the answer begins."""
    return render([{"role": "user", "content": prompt}], tokenizer, add_generation_prompt=True).ids
