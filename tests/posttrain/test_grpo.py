"""GRPO raises the reward of a rule, lowers it with its sign turned, and continues exactly."""

from dataclasses import replace

import pytest
import torch
from posttrain_example import Digits, policy
from training_example import digest, logged, same, settings, tensors, trainer

from benthic.base.errors import InputError, Interrupted
from benthic.inference.config import EngineConfig
from benthic.inference.engine import Engine
from benthic.posttrain import grpo as room
from benthic.posttrain.advantage import group_relative
from benthic.posttrain.config import GRPOConfig
from benthic.posttrain.grpo import PolicyGradient, Questions, grpo

CONFIG = GRPOConfig(
    prompts_per_generation=4, num_generations=8, max_completion_length=4, steps_per_generation=2, beta=0.01
)


def make(folder, *, config: GRPOConfig = CONFIG, **changes):
    plain = {
        "per_device_train_batch_size": 8, "max_length": 32, "max_steps": 12, "learning_rate": 1e-2, "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "save_steps": 100, "save_total_limit": 100,
    }  # fmt: skip
    settled = settings(**plain | changes)
    objective = PolicyGradient(config, settled)
    return trainer(folder, settled, objective=objective, cursor=Questions(Digits().problems("rl")), model=policy())


def learn(subject, tokenizer, config: GRPOConfig = CONFIG):
    """Run to the end; the reference is the untrained policy."""
    engine = Engine(subject.model, tokenizer, EngineConfig(max_model_len=subject.config.max_length, max_num_seqs=64))
    grpo(subject, engine, policy(), Digits(), subject.cursor, tokenizer, config)
    return subject


def _rewards(subject) -> list[float]:
    return [row["reward"] for row in logged(subject)]


def test_the_reward_of_a_rule_rises(tmp_path, tokenizer):
    rewards = _rewards(learn(make(tmp_path, max_steps=24), tokenizer))
    assert rewards[0] < 0.7
    assert sum(rewards[-3:]) / 3 > 1.5


def test_with_flipped_advantages_the_reward_falls(tmp_path, tokenizer, monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(room, "group_relative", lambda rewards: -group_relative(rewards))
    rewards = _rewards(learn(make(tmp_path, max_steps=24), tokenizer))
    assert sum(rewards[-3:]) / 3 < min(0.2, rewards[0])


def test_equal_rewards_move_nothing(tmp_path, tokenizer, monkeypatch):
    """The gradient is exactly zero. Rounding would not do: Adam turns the smallest gradient into a whole step."""
    monkeypatch.setattr(room, "rule_reward", lambda grade: 0.1)
    config = replace(CONFIG, beta=0.0)
    subject = make(tmp_path, config=config, balance_loss_weight=0.0, max_steps=2)
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    learn(subject, tokenizer, config)
    assert same(before, dict(subject.model.named_parameters()))
    assert logged(subject)[-1]["zero_std_groups"] == 1.0


def test_what_is_logged_is_what_happened(tmp_path, tokenizer):
    subject = learn(make(tmp_path, max_steps=4), tokenizer)
    first, second = logged(subject)
    assert [first["step"], second["step"]] == [2, 4]
    assert first["reward"] == first["accuracy"] + first["format"]
    assert 1 <= first["length"] <= 4
    assert 0 <= first["truncated"] <= 1
    assert first["sampler_gap"] < 1e-4
    assert first["entropy"] == pytest.approx(torch.tensor(266.0).log().item(), abs=0.5)
    assert first["kl"] >= 0
    assert first["expert_load"][0]
    assert subject.cursor.asked == 8


def test_the_update_of_a_step_is_the_gradient_of_the_objective_on_its_own_share_of_the_questions(
    tmp_path, tokenizer, monkeypatch
):
    """Both updates of an exploration score their batch before either is applied."""
    seen = []
    subject = make(tmp_path, max_steps=2)
    step = subject.step

    def spy(batch):
        seen.append({name: value.clone() for name, value in batch.extra.items()})
        return step(batch)

    monkeypatch.setattr(subject, "step", spy)
    learn(subject, tokenizer)
    assert len(seen) == 2
    for extra in seen:
        assert torch.equal(extra["old_logprobs"], extra["ref_logprobs"])  # nothing had been learned yet
        assert extra["weights"].sum().item() == pytest.approx(1)
    assert torch.count_nonzero(seen[0]["weights"]) >= 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 3}, "max_steps=3 and save_steps=100 must divide by steps_per_generation=2"),
        ({"save_steps": 5}, "save_steps=5 must divide"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 with GRPO"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_exploring(tmp_path, tokenizer, changes, message):
    with pytest.raises(InputError, match=message):
        learn(make(tmp_path, **changes), tokenizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_generations", 1), ("steps_per_generation", 3), ("steps_per_generation", 0), ("temperature", 0.0),
     ("prompts_per_generation", 0), ("max_completion_length", 0)],
)  # fmt: skip
def test_an_impossible_exploration_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}={value}"):
        GRPOConfig(**{"prompts_per_generation": 4, name: value})


def test_questions_come_round_again_and_continue_where_they_were():
    problems = Digits().problems("rl")
    one, two = Questions(problems), Questions(problems)
    taken = [p.id for _ in range(4) for p in one.take(3)]
    assert taken == [problems[i % 5].id for i in range(12)]
    two.load_state_dict({"asked": 6})
    assert [p.id for p in two.take(3)] == taken[6:9]
    assert two.state_dict() == {"asked": 9}


# ---- exact resume -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tokenizer):
    """A run with a checkpoint after every exploration: 2, 4, .. 12. The questions come round in the second."""
    return learn(make(tmp_path_factory.mktemp("grpo"), save_steps=2), tokenizer)


@pytest.mark.parametrize("k", [2, 4, 6, 8, 10])
def test_a_run_continued_from_step_k_ends_with_the_same_bits_and_logs_the_same_numbers(
    straight, tmp_path, tokenizer, k
):
    name = f"step-{k:08d}"
    (tmp_path / name).symlink_to(straight.folder / name)
    torch.manual_seed(k)
    subject = make(tmp_path, save_steps=2)
    assert subject.resume()
    subject.save = lambda: None
    learn(subject, tokenizer)
    assert same(tensors(subject), tensors(straight))
    assert digest(subject) == digest(straight)
    assert logged(subject) == logged(straight, after=k)


def test_the_resume_test_fails_when_the_questions_start_again(straight, tmp_path, tokenizer):
    (tmp_path / "step-00000006").symlink_to(straight.folder / "step-00000006")
    subject = make(tmp_path, save_steps=2)
    assert subject.resume()
    subject.cursor.asked = 0
    subject.save = lambda: None
    learn(subject, tokenizer)
    assert not same(tensors(subject), tensors(straight))


def test_a_signal_in_the_middle_of_an_exploration_stops_at_its_end(straight, tmp_path, tokenizer):
    subject = make(tmp_path, save_steps=2)
    step = subject.step

    def signalled(batch):
        if subject.steps == 2:
            subject.stop.requested = 15
        return step(batch)

    subject.step = signalled
    with pytest.raises(Interrupted, match="saved at step 4 of 12"):
        learn(subject, tokenizer)
    again = make(tmp_path, save_steps=2)
    assert again.resume()
    learn(again, tokenizer)
    assert same(tensors(again), tensors(straight))
