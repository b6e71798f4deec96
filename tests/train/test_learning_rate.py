"""The learning rate is a pure function of the tokens seen, with exact values at its edges."""

import pytest
from training_example import settings

from benthic.train.schedule import learning_rate


def _rates(**changes) -> list[float]:
    """The rate of every update of a run."""
    config = settings(**{"learning_rate": 1.0, "warmup_steps": 0} | changes)
    return [learning_rate(config, step * config.tokens_per_step) for step in range(config.max_steps)]


@pytest.mark.parametrize(("max_steps", "rows", "length"), [(10, 4, 16), (40, 3, 7), (700, 8, 256), (1_000_000, 1, 1)])
def test_multi_step_is_the_peak_then_0_316_from_80_and_0_1_from_90_percent_of_the_tokens(max_steps, rows, length):
    config = settings(
        max_steps=max_steps, per_device_train_batch_size=rows, max_length=length, learning_rate=1.0, warmup_steps=0
    )
    total = max_steps * rows * length
    edges = {0: 1.0, total * 8 // 10 - 1: 1.0, total * 8 // 10: 0.316, total * 9 // 10 - 1: 0.316, total * 9 // 10: 0.1}
    for tokens, factor in (edges | {total - 1: 0.1}).items():
        assert learning_rate(config, tokens) == factor


def test_a_run_of_ten_updates_has_eight_at_the_peak_and_one_at_each_lower_rate():
    assert _rates(max_steps=10) == [1.0] * 8 + [0.316, 0.1]


@pytest.mark.parametrize("kind", ["multi_step", "cosine", "linear", "constant"])
def test_warmup_rises_by_equal_steps_from_one_part_to_the_peak(kind):
    rates = _rates(max_steps=1000, warmup_steps=5, lr_scheduler_type=kind)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-12)
    assert rates[5] == pytest.approx(1.0, abs=0.006)


def test_cosine_falls_from_the_peak_through_the_mean_to_a_tenth():
    config = settings(learning_rate=2.0, warmup_steps=0, lr_scheduler_type="cosine", max_steps=40)
    total = 40 * config.tokens_per_step
    points = {0: 2.0, total // 4: 2 * (0.1 + 0.45 * (1 + 0.5**0.5)), total // 2: 1.1, total: 0.2, 3 * total: 0.2}
    for tokens, rate in points.items():
        assert learning_rate(config, tokens) == pytest.approx(rate, rel=1e-12)


def test_linear_falls_to_zero_and_stays_there():
    config = settings(learning_rate=2.0, warmup_steps=0, lr_scheduler_type="linear", max_steps=40)
    total = 40 * config.tokens_per_step
    for tokens, rate in {0: 2.0, total // 4: 1.5, total // 2: 1.0, total: 0.0, 2 * total: 0.0}.items():
        assert learning_rate(config, tokens) == rate


def test_constant_never_changes():
    assert set(_rates(lr_scheduler_type="constant")) == {1.0}


@pytest.mark.parametrize("kind", ["multi_step", "cosine", "linear"])
def test_after_warmup_the_rate_never_rises(kind):
    rates = _rates(max_steps=97, lr_scheduler_type=kind)
    assert rates == sorted(rates, reverse=True)
