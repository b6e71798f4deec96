"""The loop: what happens when, and what is logged."""

import pytest
import torch
from training_example import MODEL, Stream, logged, settings, trainer

from benthic.train.schedule import learning_rate


def _fitted(folder, *, cursor=None, validate=None, **changes):
    subject = trainer(folder, settings(**changes), cursor=cursor, validate=validate)
    subject.fit(subject.cursor)  # type: ignore[arg-type]
    return subject


def test_rows_are_logged_every_so_many_steps_and_at_the_last(tmp_path):
    subject = _fitted(tmp_path, max_steps=7, logging_steps=3)
    assert [row["step"] for row in logged(subject)] == [3, 6, 7]


def test_checkpoints_are_written_every_so_many_steps_and_at_the_last(tmp_path):
    _fitted(tmp_path, max_steps=7, save_steps=3, save_total_limit=9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000006", "step-00000007"]


def test_validation_runs_every_so_many_steps_and_at_the_last_and_only_if_asked(tmp_path):
    def validate(model):
        return {"heldout_loss": 1.0}

    subject = _fitted(tmp_path / "on", max_steps=7, eval_steps=3, logging_steps=7, validate=validate)
    assert [row["step"] for row in logged(subject) if "heldout_loss" in row] == [3, 6, 7]
    subject = _fitted(tmp_path / "off", max_steps=7, validate=validate)
    assert not [row for row in logged(subject) if "heldout_loss" in row]


def test_validation_does_not_change_the_run(tmp_path):
    def validate(model):
        with torch.no_grad():
            return {"heldout_loss": model(torch.zeros(1, 4, dtype=torch.int64)).mean().item()}

    plain = _fitted(tmp_path / "off", max_steps=4)
    watched = _fitted(tmp_path / "on", max_steps=4, eval_steps=1, validate=validate)
    losses = [[row["loss"] for row in logged(s) if "loss" in row] for s in (plain, watched)]
    assert losses[0] == losses[1]


def test_each_update_uses_and_logs_the_rate_of_the_tokens_seen_before_it(tmp_path):
    subject = _fitted(tmp_path, max_steps=20, warmup_steps=4)
    rates = [learning_rate(subject.config, i * 4 * 16) for i in range(20)]
    assert [row["lr"] for row in logged(subject)] == pytest.approx(rates, rel=1e-6)
    assert [row["tokens"] for row in logged(subject)] == [(i + 1) * 4 * 16 for i in range(20)]
    assert all(group["lr"] == rates[-1] for group in subject.optimizer.param_groups)


def test_the_load_of_the_main_models_experts_and_its_violation_are_logged(tmp_path):
    (row,) = logged(_fitted(tmp_path, max_steps=1))
    (load,) = row["expert_load"]
    assert sum(load) == 4 * 16 * MODEL.num_experts_per_tok
    mean = sum(load) / MODEL.n_routed_experts
    assert row["max_violation"] == pytest.approx((max(load) - mean) / mean)


def test_gate_biases_move_by_gamma_against_the_load_and_not_at_all_with_gamma_zero(tmp_path):
    subject = _fitted(tmp_path / "on", max_steps=1, bias_update_speed=0.02)
    load = torch.tensor(logged(subject)[0]["expert_load"][0], dtype=torch.float32)
    bias = subject.model.gates()[0].e_score_correction_bias
    torch.testing.assert_close(bias, 0.02 * torch.sign(load.mean() - load))
    still = _fitted(tmp_path / "off", max_steps=3, bias_update_speed=0.0)
    assert not any(gate.e_score_correction_bias.any() for gate in still.model.gates())


def test_gate_biases_rest_after_their_share_of_the_updates(tmp_path):
    constant = {"lr_scheduler_type": "constant", "bias_update_speed": 1.0}
    whole, quarter = (
        _fitted(tmp_path / str(until), max_steps=4, bias_update_until=until, **constant) for until in (1.0, 0.25)
    )
    once = _fitted(tmp_path / "once", max_steps=1, **constant)
    whole, quarter, once = (x.model.gates()[0].e_score_correction_bias for x in (whole, quarter, once))
    assert torch.equal(quarter, once)
    assert not torch.equal(whole, quarter)  # four steps of one never sum to one step of one


def test_the_load_of_devices_is_logged_beside_that_of_experts(tmp_path):
    (row,) = logged(_fitted(tmp_path, max_steps=1))
    size = MODEL.n_routed_experts // MODEL.n_group
    (experts,), (devices,) = row["expert_load"], row["device_load"]
    assert devices == [sum(experts[d * size : (d + 1) * size]) for d in range(MODEL.n_group)]
    assert row["device_max_violation"] == pytest.approx(max(devices) * MODEL.n_group / sum(devices) - 1)


def test_gradients_are_clipped_to_max_grad_norm(tmp_path):
    """With the rate of SGD-like first steps hidden by Adam, look at the gradient that the optimiser is given."""
    subject = trainer(tmp_path, settings(max_grad_norm=0.01))
    seen = []
    apply = subject.optimizer.step

    def spy():
        seen.append(torch.cat([p.grad.flatten() for p in subject.model.parameters() if p.grad is not None]).norm())
        return apply()

    subject.optimizer.step = spy  # type: ignore[method-assign]
    metrics = subject.step(next(subject.cursor))  # type: ignore[call-overload]
    assert metrics["grad_norm"] > 0.1
    assert seen[0].item() == pytest.approx(0.01, rel=1e-3)


def test_a_run_learns_a_text_by_heart(tmp_path):
    class OneBatch(Stream):
        def batch(self, i: int):
            return super().batch(0)

    subject = _fitted(tmp_path, cursor=OneBatch(), max_steps=60, learning_rate=1e-2)
    rows = logged(subject)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["mtp_loss"] < 0.7 * rows[0]["mtp_loss"]
