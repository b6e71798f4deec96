"""Demonstrations are a pure function of their cursor, and only answers carry loss."""

import json

import pytest
import torch
from posttrain_example import policy
from training_example import digest, logged, settings, trainer

from benthic.base.batch import IGNORE, Batch
from benthic.base.errors import InputError
from benthic.posttrain.sft import Demonstrations, demonstration, prompt_ids
from benthic.tasks.arithmetic import Sums
from benthic.tokenizer import tokens
from benthic.train.loss import LanguageModelling

TASK = Sums(digits=2)


def _source(tokenizer, **changes) -> Demonstrations:
    return Demonstrations(TASK, tokenizer, **{"rows": 3, "length": 40, "seed": 5, "direct_share": 0.3} | changes)


def _same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(getattr(one, n), getattr(other, n))  # type: ignore[arg-type]
        for n in ("ids", "labels", "positions", "segments")
    )


def _conversations(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, indices inside them that are learned) of every conversation of a batch."""
    found = []
    assert batch.segments is not None
    for ids, labels, segments in zip(batch.ids, batch.labels, batch.segments):
        for segment in range(1, int(segments.max()) + 1):
            at = (segments == segment).nonzero().squeeze(1)
            learned = [i + 1 for i, place in enumerate(at.tolist()) if labels[place] != IGNORE]
            assert all(labels[at[i - 1]] == ids[at[i]] for i in learned)
            found.append((ids[at].tolist(), learned))
    return found


@pytest.mark.parametrize("stop", [0, 1, 7, 14, 15, 23])
def test_continuing_from_a_saved_cursor_gives_the_same_batches(tokenizer, stop):
    straight, first, second = (_source(tokenizer) for _ in range(3))
    expected = [next(straight) for _ in range(30)]
    for _ in range(stop):
        next(first)
    second.load_state_dict(first.state_dict())
    for batch in expected[stop:]:
        assert _same(next(second), batch)
    assert second.state_dict() == straight.state_dict()


def test_the_cursor_test_fails_for_a_source_that_forgets_where_it_was(tokenizer):
    straight, forgetful = _source(tokenizer), _source(tokenizer)
    next(straight)
    assert not _same(next(straight), next(forgetful))


def test_another_seed_gives_another_order(tokenizer):
    assert not _same(next(_source(tokenizer)), next(_source(tokenizer, seed=6)))


def test_every_epoch_shows_each_problem_once_and_in_an_order_of_its_own(tokenizer):
    source, count = _source(tokenizer), len(TASK.problems("sft"))
    epochs = [[source.problem(e * count + i).id for i in range(count)] for e in range(3)]
    everyone = sorted(p.id for p in TASK.problems("sft"))
    assert all(sorted(epoch) == everyone for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [source.problem(i).id for i in (count, 0, 1)] == [epochs[1][0], *epochs[0][:2]]


def test_no_demonstration_is_lost_or_repeated_between_batches(tokenizer):
    source = _source(tokenizer)
    seen = [ids for _ in range(20) for ids, _ in _conversations(next(source))]
    wanted = []
    for i in range(source.taken):
        direct = source.fraction(i) < source.direct_share
        wanted.append(demonstration(TASK, source.problem(i), tokenizer, direct).ids)
    assert sorted(seen) == sorted(wanted)


def test_every_batch_has_the_promised_shape_and_is_filled_well(tokenizer):
    source = _source(tokenizer)
    for _ in range(10):
        batch = next(source)
        assert batch.ids.shape == (3, 40)
        assert (batch.segments > 0).float().mean() > 0.6
        assert (batch.ids[batch.segments == 0] == tokenizer.pad_id).all()


def test_only_the_answer_and_its_end_carry_loss(tokenizer):
    for ids, learned in _conversations(next(_source(tokenizer))):
        start = ids.index(tokenizer.id_of(tokens.ASSISTANT)) + 1
        assert learned == list(range(start, len(ids)))
        assert ids[-1] == tokenizer.eos_id
        assert ids[0] == tokenizer.bos_id
        prompt = tokenizer.decode(ids[2 : start - 1])
        (problem,) = (p for p in TASK.problems("sft") if p.prompt == prompt)
        assert TASK.grade(problem, tokenizer.decode(ids[start:], skip_special=True)).correct


def test_a_prompt_is_the_demonstration_up_to_the_answer(tokenizer):
    problem = TASK.problems("sft")[0]
    sample, prompt = demonstration(TASK, problem, tokenizer, direct=False), prompt_ids(problem.prompt, tokenizer)
    assert sample.ids[: len(prompt)] == prompt
    assert sample.mask == [False] * len(prompt) + [True] * (len(sample.ids) - len(prompt))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_direct_answers_is_kept_and_the_same_every_time(tokenizer, share):
    def direct(seed: int) -> list[bool]:
        source = _source(tokenizer, direct_share=share, seed=seed)
        return [source.fraction(i) < source.direct_share for i in range(2000)]

    assert direct(1) == direct(1)
    assert sum(direct(1)) / 2000 == pytest.approx(share, abs=0.04)
    if 0 < share < 1:
        assert direct(1) != direct(2)


def test_direct_answers_skip_the_reasoning(tokenizer):
    think = f"{tokens.THINK}{tokens.END_THINK}"
    for share, expected in ((0.0, False), (1.0, True)):
        for ids, _ in _conversations(next(_source(tokenizer, direct_share=share))):
            assert (think in tokenizer.decode(ids)) is expected


def test_a_demonstration_that_fits_in_no_row_is_named(tokenizer):
    with pytest.raises(InputError, match=r"the demonstration of sums-\S+ has \d+ tokens, more than max_length=8"):
        next(_source(tokenizer, length=8))


def test_packed_demonstrations_cost_what_they_cost_alone(tokenizer):
    """Neighbours are invisible: the loss of a packed batch is the sum over its conversations in rows of their own."""
    model, source = policy(), _source(tokenizer)
    batch = next(source)
    objective = LanguageModelling(settings(balance_loss_weight=0.0))
    targets = objective.targets(model, batch)
    packed = objective(model, batch, targets)
    alone = {"loss": 0.0, "mtp_loss": 0.0}
    for ids, learned in _conversations(batch):
        labels = [ids[i + 1] if i + 1 in learned else IGNORE for i in range(len(ids))]
        one = Batch(torch.tensor([ids]), torch.tensor([labels]))
        for name in alone:
            alone[name] += objective(model, one, targets).metrics[name].item()
    for name, value in alone.items():
        assert packed.metrics[name].item() == pytest.approx(value, rel=1e-5)


# ---- exact resume of fine-tuning --------------------------------------------------------------------------------

STEPS, BATCH = 16, {"per_device_train_batch_size": 4, "max_length": 24, "gradient_accumulation_steps": 2}


def _fine_tuning(folder, tokenizer):
    config = settings(**BATCH, max_steps=STEPS, warmup_steps=2, save_steps=1, save_total_limit=100)
    source = Demonstrations(TASK, tokenizer, rows=4, length=24, seed=5, direct_share=0.3)
    return trainer(folder, config, objective=LanguageModelling(config), cursor=source, model=policy())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tokenizer):
    subject = _fine_tuning(tmp_path_factory.mktemp("sft"), tokenizer)
    subject.fit(subject.cursor)
    taken = json.loads((subject.folder / "step-00000011" / "trainer.json").read_text())["cursor"]["taken"]
    assert 0 < len(TASK.problems("sft")) - taken < 5, "the epoch must end inside step 12"
    return subject


@pytest.mark.parametrize(
    "k", [1, 2, 9, 12, 15]
)  # first step, end of warmup, end of the epoch, rate drop, one before last
def test_fine_tuning_continued_from_step_k_ends_with_the_same_bits(straight, tmp_path, tokenizer, k):
    name = f"step-{k:08d}"
    (tmp_path / name).symlink_to(straight.folder / name)
    subject = _fine_tuning(tmp_path, tokenizer)
    subject.save = lambda: None
    assert subject.resume()
    assert subject.steps == k
    subject.fit(subject.cursor)
    assert digest(subject) == digest(straight)
    assert logged(subject) == logged(straight, after=k)
