"""The same answer in any company. `pytest tests/inference/test_company.py -k seed-0017` plays one schedule again."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from company import Alone, Answer, Company, Key, Weights

from benthic.base.errors import BenthicError
from benthic.inference import batch, controls, sampler, speculative
from benthic.inference.engine import Engine
from benthic.inference.pages import PagePool
from benthic.inference.request import Seq
from benthic.inference.scheduler import Plan, Scheduler
from benthic.model.transformer import Transformer
from benthic.tokenizer import bpe


@pytest.fixture(scope="module")
def memory() -> dict[Key, Answer | None]:
    return {}


@pytest.fixture
def alone(model, foreseeing, memory) -> Alone:
    """Two sets of weights for one model: answers that hang on the whole context, and drafts that are often right."""
    weights = {name: clone(m) for name, m in (("deep", model), ("foreseeing", foreseeing))}
    return Alone(model, weights, bpe.train(["abc abc " * 20], 269), memory)


def clone(model: Transformer) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def seeds(numbers: range) -> Any:
    return pytest.mark.parametrize("seed", numbers, ids=lambda seed: f"seed-{seed:04}")


def run_all(companies: list[Company]) -> Counter[str]:
    return sum((company.run() for company in companies), Counter())


@seeds(range(25))
def test_an_answer_in_any_company_is_the_answer_alone(alone, seed):
    Company(seed, alone).run()


@pytest.mark.long
@seeds(range(25, 525))
def test_an_answer_in_more_company_is_the_answer_alone(alone, seed):
    Company(seed, alone).run()


def test_the_schedules_go_where_it_is_hard(alone):
    seen = run_all([Company(seed, alone) for seed in range(7)])
    least = {
        "rows beside others": 200, "chunks": 50, "hits": 20, "accepted": 20, "rejected": 100, "preemptions": 3,
        "hits up to the last page": 5, "length": 30, "stop": 10, "abort": 4, "cut short": 2, "failures": 10,
    }  # fmt: skip
    assert {what: seen[what] for what in least if seen[what] < least[what]} == {}
    assert alone.undecided < 0.05


def test_a_salt_hides_what_others_asked_and_changes_no_answer(alone, monkeypatch):
    companies = [Company(seed, alone) for seed in range(3)]
    key = PagePool._key
    monkeypatch.setattr(PagePool, "_key", lambda pool, node, salt, ids, index: key(pool, node, "", ids, index))
    run_all(companies)


# Negative controls: each is found by one of the 25 schedules


def numbers_counted_per_step(patched: pytest.MonkeyPatch) -> None:
    steps = count()
    patched.setattr(sampler, "_ahead", lambda places, rows, k: torch.full((len(rows.seed), k), next(steps)))


def drafts_accepted_without_a_look(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(speculative, "accept", lambda rows, tokens: (rows.counts - 1).clamp(max=tokens.shape[1] - 1))


def pages_found_by_their_own_tokens_alone(patched: pytest.MonkeyPatch) -> None:
    key = PagePool._key
    patched.setattr(PagePool, "_key", lambda pool, node, salt, ids, index: key(pool, index, salt, ids, index))


def whole_prompts_found(patched: pytest.MonkeyPatch) -> None:
    find = PagePool.find
    patched.setattr(PagePool, "find", lambda pool, ids, salt, most: find(pool, [*ids, 0], salt, most + 1))


def pages_found_after_the_weights_have_changed(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Engine, "update_weights", lambda engine: None)


def pages_published_one_token_early(patched: pytest.MonkeyPatch) -> None:
    publish = Scheduler._publish

    def early(self: Scheduler, seq: Seq) -> None:
        held = seq.computed
        seq.computed = min(held + 1, len(seq.ids))
        publish(self, seq)
        seq.computed = held

    patched.setattr(Scheduler, "_publish", early)


def first_page_kept_after_a_preemption(patched: pytest.MonkeyPatch) -> None:
    first: dict[Seq, int] = {}
    build = batch.build

    def mutant(plan: Plan, page_size: int, device: Any) -> batch.Rows:
        pages = [seq.pages for seq in plan.seqs]
        for seq in plan.seqs:
            seq.pages = [first.setdefault(seq, seq.pages[0]), *seq.pages[1:]]
        rows = build(plan, page_size, device)
        for seq, own in zip(plan.seqs, pages):
            seq.pages = own
        return rows

    patched.setattr(batch, "build", mutant)


def chunks_one_token_short(patched: pytest.MonkeyPatch) -> None:
    build = batch.build

    def mutant(plan: Plan, page_size: int, device: Any) -> batch.Rows:
        cut = [start + n < seq.fill and n > 1 for seq, start, n in zip(plan.seqs, plan.starts, plan.counts)]
        return build(replace(plan, counts=[n - c for n, c in zip(plan.counts, cut)]), page_size, device)

    patched.setattr(batch, "build", mutant)


def limits_of_the_next_row(patched: pytest.MonkeyPatch) -> None:
    some = controls._some
    patched.setattr(controls, "_some", lambda rows, n, device: some(sorted((row + 1) % n for row in rows), n, device))


def failed_steps_not_rolled_back(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Scheduler, "rollback", lambda self: self._flying.clear())


MUTANTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    numbers_counted_per_step,
    drafts_accepted_without_a_look,
    pages_found_by_their_own_tokens_alone,
    whole_prompts_found,
    pages_found_after_the_weights_have_changed,
    pages_published_one_token_early,
    first_page_kept_after_a_preemption,
    chunks_one_token_short,
    limits_of_the_next_row,
    failed_steps_not_rolled_back,
]


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_the_comparison_notices(alone, monkeypatch, mutate):
    companies = [Company(seed, alone) for seed in range(25)]
    mutate(monkeypatch)
    with pytest.raises((AssertionError, BenthicError, RuntimeError, IndexError)):
        run_all(companies)
