"""A step whose numbers are not sane changes nothing but the counters, and nothing insane reaches the disk."""

import logging
import math

import pytest
import torch
from training_example import MODEL, Stream, copy, digest, same, settings, tensors, trainer

from benthic.base.errors import CheckpointError, Diverged

BAD = 6  # batch number, from 0, whose numbers are spoiled


def _fit_until(subject, steps: int) -> None:
    while subject.steps < steps:
        subject.step(next(subject.cursor))


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf, 1e4], ids=["nan", "inf", "-inf", "spike"])
def test_a_bad_loss_leaves_every_bit_of_the_state_and_is_counted_and_logged(tmp_path, caplog, factor):
    subject = trainer(tmp_path, cursor=Stream(factors={BAD: factor}))
    _fit_until(subject, BAD)
    before = copy(tensors(subject)), subject.norm_mean
    with caplog.at_level(logging.WARNING, "benthic"):
        metrics = subject.step(next(subject.cursor))
    assert same(before[0], tensors(subject))
    assert subject.norm_mean == before[1]
    assert (subject.skipped, subject.skipped_in_a_row, subject.steps, subject.cursor.taken) == (1, 1, BAD + 1, BAD + 1)
    assert subject.tokens == (BAD + 1) * 4 * 16
    assert subject.read(metrics)["skipped"] == 1
    assert f"tiny step {BAD + 1} skipped: gradient norm" in caplog.text
    assert all(p.grad is None for p in subject.model.parameters())
    subject.step(next(subject.cursor))
    assert (subject.skipped, subject.skipped_in_a_row) == (1, 0)
    assert not same(before[0], tensors(subject))


def test_the_guard_test_fails_without_the_guard(tmp_path, monkeypatch):
    """Negative control: a trainer that accepts every norm spoils its parameters."""
    subject = trainer(tmp_path, cursor=Stream(factors={BAD: math.nan}))
    monkeypatch.setattr(subject, "sane", lambda norm: True)
    _fit_until(subject, BAD + 1)
    assert not all(p.isfinite().all() for p in subject.model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("expert", [0, MODEL.n_routed_experts - 1])
def test_a_bad_gradient_of_a_single_expert_skips_the_whole_update(tmp_path, value, expert):
    subject = trainer(tmp_path)
    _fit_until(subject, 3)
    before = copy(tensors(subject))

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[expert, 0, 0] = value
        return grad

    weights = dict(subject.model.named_parameters())["layers.1.mlp.routed_experts.down_proj"]
    hook = weights.register_hook(spoil)
    subject.step(next(subject.cursor))
    hook.remove()
    assert same(before, tensors(subject))
    assert subject.skipped == 1


def test_a_bad_micro_batch_spoils_its_whole_step_and_only_that(tmp_path):
    stream = Stream()
    subject = trainer(tmp_path, settings(gradient_accumulation_steps=4), cursor=stream)
    _fit_until(subject, 2)
    before = copy(tensors(subject))
    batch = next(stream)
    batch.extra["factor"][2] = math.nan
    subject.step(batch)
    assert same(before, tensors(subject))
    subject.step(next(stream))
    assert subject.skipped == 1


def test_a_run_with_a_skipped_batch_equals_one_that_never_saw_it_but_for_schedule_and_counters(tmp_path):
    config = settings(lr_scheduler_type="constant", warmup_steps=0)
    with_it = trainer(tmp_path, config, cursor=Stream(factors={BAD: math.inf}))
    _fit_until(with_it, 10)
    without = trainer(tmp_path, config)
    _fit_until(without, BAD)
    next(without.cursor)  # type: ignore[call-overload]
    _fit_until(without, 9)
    assert same(tensors(with_it), tensors(without))


def test_many_bad_updates_in_a_row_stop_the_run_naming_step_and_learning_rate(tmp_path):
    factors = dict.fromkeys(range(BAD, 40), math.nan)
    subject = trainer(tmp_path, settings(max_skipped_steps=3, learning_rate=0.003), cursor=Stream(factors=factors))
    _fit_until(subject, BAD)
    before = copy(tensors(subject))
    with pytest.raises(Diverged, match=rf"tiny stopped at step {BAD + 3}: 3 updates .* learning_rate=0\.003") as caught:
        subject.fit(subject.cursor)  # type: ignore[arg-type]
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert same(before, tensors(subject))


def test_bad_updates_with_good_ones_between_do_not_stop_the_run(tmp_path):
    factors = {i: math.nan for i in range(40) if i % 3}
    subject = trainer(tmp_path, settings(max_skipped_steps=3), cursor=Stream(factors=factors))
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    assert subject.skipped == 26


def test_the_count_of_bad_updates_in_a_row_survives_a_stop(tmp_path):
    factors = dict.fromkeys(range(BAD, 40), math.nan)
    config = settings(max_skipped_steps=4)
    first = trainer(tmp_path, config, cursor=Stream(factors=factors))
    _fit_until(first, BAD + 2)
    first.save()
    second = trainer(tmp_path, config, cursor=Stream(factors=factors))
    assert second.resume()
    with pytest.raises(Diverged, match=f"stopped at step {BAD + 4}: 4 updates"):
        second.fit(second.cursor)  # type: ignore[arg-type]


def test_the_first_norm_of_a_run_is_never_a_spike(tmp_path):
    subject = trainer(tmp_path, cursor=Stream(factors={0: 1e6}))
    _fit_until(subject, 1)
    assert subject.skipped == 0


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_first_step_is_skipped_although_no_norm_is_known_yet(tmp_path, factor):
    subject = trainer(tmp_path, cursor=Stream(factors={0: factor}))
    before = copy(tensors(subject))
    _fit_until(subject, 1)
    assert same(before, tensors(subject))
    assert (subject.skipped, subject.norm_mean) == (1, 0.0)
    _fit_until(subject, 2)
    assert subject.skipped == 1


def test_a_norm_that_overflows_while_every_gradient_is_finite_is_skipped(tmp_path):
    subject = trainer(tmp_path)
    before = copy(tensors(subject))
    weights = dict(subject.model.named_parameters())["layers.1.mlp.routed_experts.down_proj"]
    weights.register_hook(lambda grad: torch.full_like(grad, 1e38))
    subject.step(next(subject.cursor))  # type: ignore[call-overload]
    assert same(before, tensors(subject))


def test_the_ceiling_is_spike_factor_times_the_running_mean(tmp_path):
    subject = trainer(tmp_path, settings(spike_factor=2.0))
    assert subject.sane(1.0)
    assert subject.sane(2.0)  # mean 1, ceiling 2
    assert subject.norm_mean == pytest.approx(0.95 * 1 + 0.05 * 2)
    assert not subject.sane(2.1 + 1e-9)
    assert subject.sane(2.1 - 1e-9)


def test_a_norm_within_the_clip_is_no_spike_however_small_the_others_were(tmp_path):
    subject = trainer(tmp_path, settings(spike_factor=2.0, max_grad_norm=1.0))
    assert all(subject.sane(1e-6) for _ in range(3))
    assert subject.sane(2.0)
    assert not subject.sane(2.0 + 1e-6)


@pytest.mark.parametrize("where", ["parameter", "moment", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_is_never_written_and_the_older_checkpoint_stays(tmp_path, where, value):
    subject = trainer(tmp_path)
    _fit_until(subject, 2)
    subject.save()
    saved = digest(subject)
    _fit_until(subject, 3)
    parameter = subject.model.layers[1].mlp.routed_experts.down_proj  # type: ignore[union-attr]
    spoiled = {
        "parameter": parameter.data,
        "moment": subject.optimizer.state[parameter]["exp_avg_sq"],
        "bias": subject.model.gates()[0].e_score_correction_bias,
    }[where]
    spoiled.view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=r"tensor \S*(down_proj|bias)\S* is not finite"):
        subject.save()
    assert not (tmp_path / "step-00000003").exists()
    again = trainer(tmp_path)
    assert again.resume()
    assert digest(again) == saved
