"""Scores against exact enumeration, intervals against what they promise."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.eval.score import mean_pass_at_k, pass_at_k, wilson


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            subsets = [any(i < c for i in subset) for subset in combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@given(st.data())
def test_pass_at_k_agrees_with_exact_binomials_at_any_size(data):
    n = data.draw(st.integers(1, 2000))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-9)


def test_pass_at_1_is_the_share_of_right_samples_and_no_right_sample_is_zero():
    assert pass_at_k(16, 4, 1) == pytest.approx(0.25)
    assert pass_at_k(16, 0, 8) == 0.0
    assert pass_at_k(16, 9, 8) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=f"n={n} c={c} k={k}"):
        pass_at_k(n, c, k)


def test_the_mean_is_over_problems():
    assert mean_pass_at_k([4, 0], 4, 1).value == pytest.approx(0.5)
    assert mean_pass_at_k([1, 1], 4, 4).value == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_interval_and_the_order_of_problems_does_not_matter():
    counts = [0, 3, 8, 1, 5, 8, 0, 2]
    assert mean_pass_at_k(counts, 8, 4) == mean_pass_at_k(counts[::-1], 8, 4)
    assert mean_pass_at_k(counts, 8, 4, seed=1) != mean_pass_at_k(counts, 8, 4)


def test_drawing_histograms_equals_resampling_problems_one_by_one():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, size=60)
    each = np.array([pass_at_k(8, int(c), 4) for c in counts])
    plain = np.quantile(each[rng.integers(0, 60, size=(20_000, 60))].mean(1), [0.025, 0.975])
    assert mean_pass_at_k(counts.tolist(), 8, 4)[1:] == pytest.approx(plain, abs=0.006)


def test_the_interval_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    truth, hits = 0.4, 0
    for trial in range(100):
        skill = rng.beta(2, 3, size=80)  # mean 0.4
        estimate = mean_pass_at_k(rng.binomial(8, skill).tolist(), 8, 1, seed=trial)
        hits += estimate.low <= truth <= estimate.high
    assert hits / 100 >= 0.88


def test_wilson_agrees_with_published_values_and_is_honest_at_the_ends():
    assert wilson(8, 10) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 20).low == 0.0
    assert wilson(0, 20).high == pytest.approx(0.1611252, abs=1e-6)
    assert wilson(20, 20).high == 1.0


@given(st.integers(1, 10_000), st.data())
def test_wilson_brackets_the_share(n, data):
    value, low, high = wilson(data.draw(st.integers(0, n)), n)
    assert 0 <= low <= value <= high <= 1
