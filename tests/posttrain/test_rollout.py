"""Answers and what their tokens need arrive on the right places of a packed batch."""

import pytest
import torch
from posttrain_example import Digits, output, policy

from benthic.base.batch import IGNORE
from benthic.inference.config import EngineConfig, SamplingParams
from benthic.inference.engine import Engine
from benthic.posttrain.reward import rule_reward
from benthic.posttrain.rollout import ask, explore, largest_gap, score, to_batch
from benthic.posttrain.sft import prompt_ids

PAD = 2


def _group(sizes: list[tuple[int, int]], seed: int = 0):
    """Outputs with prompts and answers of the given sizes, of different tokens throughout."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for before, answer in sizes:
        ids = torch.randint(10, 266, (before + answer,), generator=g).tolist()
        logprobs = (-3 * torch.rand(answer, generator=g)).tolist()
        made.append(output(ids[:before], ids[before:], logprobs))
    return made


OUTPUTS = [_group([(3, 4), (3, 1), (3, 7)], 0), _group([(5, 2), (5, 5), (5, 3)], 1)]
ADVANTAGES = torch.tensor([[1.0, -0.5, 0.25], [-2.0, 3.0, 0.125]])


def _answers(batch):
    """Of every segment of a packed batch: (prompt, answer, {name: values of the answer's tokens})."""
    for r in range(len(batch.ids)):
        for segment in range(1, int(batch.segments[r].max()) + 1):
            at = (batch.segments[r] == segment).nonzero().squeeze(1)
            labels, ids = batch.labels[r, at], batch.ids[r, at].tolist()
            learned = (labels != IGNORE).nonzero().squeeze(1)
            first = int(learned[0]) + 1
            assert learned.tolist() == list(range(first - 1, len(ids) - 1))
            assert labels[learned].tolist() == ids[first:]
            values = {name: extra[r, at][learned] for name, extra in batch.extra.items()}
            assert batch.positions[r, at].tolist() == list(range(len(ids)))
            yield ids[:first], ids[first:], values


def test_every_answer_token_carries_its_advantage_weight_and_logprob_where_it_is_predicted():
    batch = to_batch(OUTPUTS, ADVANTAGES, length=16, pad_id=PAD)
    wanted = {
        tuple(o.token_ids): (o, a) for group, row in zip(OUTPUTS, ADVANTAGES.tolist()) for o, a in zip(group, row)
    }
    for prompt, answer, values in _answers(batch):
        expected, advantage = wanted.pop(tuple(answer))
        assert prompt == expected.prompt_token_ids
        assert values["advantages"].tolist() == [advantage] * len(answer)
        torch.testing.assert_close(values["weights"], torch.full((len(answer),), 1 / (len(answer) * 6)))
        torch.testing.assert_close(values["sampler_logprobs"], torch.tensor(expected.logprobs))
    assert not wanted


def test_weights_sum_to_one_and_stand_nowhere_but_on_answers():
    batch = to_batch(OUTPUTS, ADVANTAGES, length=16, pad_id=PAD)
    assert batch.extra["weights"].sum().item() == pytest.approx(1)
    for values in batch.extra.values():
        assert not values[batch.labels == IGNORE].any()
    assert batch.targets() == sum(len(o.token_ids) for group in OUTPUTS for o in group)


def test_score_of_a_packed_batch_equals_each_conversation_alone():
    model = policy()
    batch = to_batch(OUTPUTS, ADVANTAGES, length=16, pad_id=PAD)
    batch.extra["scored"] = score(model, batch)
    assert not batch.extra["scored"].requires_grad
    assert not batch.extra["scored"][batch.labels == IGNORE].any()
    for prompt, answer, values in _answers(batch):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        alone = logprobs[torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), torch.tensor(answer)]
        torch.testing.assert_close(values["scored"], alone, rtol=1e-5, atol=1e-5)


def test_the_gap_is_the_largest_difference_on_an_answer_token():
    batch = to_batch(OUTPUTS, ADVANTAGES, length=16, pad_id=PAD)
    logprobs = batch.extra["sampler_logprobs"].clone()
    logprobs[batch.labels == IGNORE] = 99.0  # never read
    assert largest_gap(batch, logprobs) == 0
    at = tuple((batch.labels != IGNORE).nonzero()[5])
    logprobs[at] += 0.5
    assert largest_gap(batch, logprobs) == pytest.approx(0.5)


def _engine(tokenizer, model=None) -> Engine:
    return Engine(model or policy(), tokenizer, EngineConfig(max_model_len=32, max_num_seqs=64))


def test_the_trainer_scores_what_the_engine_sampled_as_the_engine_did(tokenizer):
    model = policy()
    params = SamplingParams(max_tokens=6)
    outputs = ask(_engine(tokenizer, model), tokenizer, ["ab?", "c?"], 4, params, "key")
    batch = to_batch(outputs, torch.zeros(2, 4), length=32, pad_id=tokenizer.pad_id)
    assert largest_gap(batch, score(model, batch)) < 1e-4
    assert largest_gap(batch, score(policy(seed=1), batch)) > 1e-2


def test_samples_are_named_by_key_and_place_and_differ_between_prompts_and_samples(tokenizer):
    params = SamplingParams(max_tokens=6)

    def ids(prompts: list[str], key: str) -> list[list[list[int]]]:
        found = ask(_engine(tokenizer), tokenizer, prompts, 3, params, key)
        assert all(o.prompt_token_ids == prompt_ids(p, tokenizer) for p, g in zip(prompts, found) for o in g)
        return [[o.token_ids for o in group] for group in found]

    first = ids(["a?", "a?"], "k")
    assert first == ids(["a?", "a?"], "k")
    assert first != ids(["a?", "a?"], "l")
    assert ids(["a?"], "k")[0] == first[0]  # whatever company
    assert len({tuple(sample) for group in first for sample in group}) == 6


def test_every_sampling_setting_reaches_the_engine(tokenizer):
    greedy = ask(_engine(tokenizer), tokenizer, ["a?"], 4, SamplingParams(max_tokens=6, top_k=1), "k")
    assert len({tuple(o.token_ids) for o in greedy[0]}) == 1


def test_exploring_grades_each_answer_and_pays_for_it(tokenizer):
    task = Digits()
    problems = task.problems("rl")
    params = SamplingParams(max_tokens=6)
    found = explore(_engine(tokenizer), tokenizer, task, problems, 4, params, "key", rule_reward)
    assert found.rewards.shape == (5, 4)
    for problem, group, grades, rewards in zip(problems, found.outputs, found.grades, found.rewards.tolist()):
        assert grades == [task.grade(problem, o.text) for o in group]
        assert rewards == [2.0 * grade.correct for grade in grades]
    assert 0 < found.rewards.mean() < 2


@pytest.mark.parametrize("broken", ["grade", "reward"])
def test_a_grader_or_reward_that_crashes_stops_the_run(tokenizer, monkeypatch, broken):
    def crash(*_):
        raise ZeroDivisionError("broken rule")

    task = Digits()
    if broken == "grade":
        monkeypatch.setattr(task, "grade", crash)
    reward = crash if broken == "reward" else rule_reward
    with pytest.raises(ZeroDivisionError, match="broken rule"):
        explore(_engine(tokenizer), tokenizer, task, task.problems("rl"), 2, SamplingParams(max_tokens=2), "k", reward)
