"""How often a model is right, and how sure that is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A value with its 95% interval. In JSON: [value, low, high]."""

    value: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of `k` samples is right, from `c` right ones among `n`.

    Unbiased: 1 - C(n-c, k) / C(n, k) as a product, which neither overflows nor cancels (Chen et al. 2021).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n} c={c} k={k}")
    if n - c < k:  # every draw of k holds a right one; the product would pass through 0 after factors below -1
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mean_pass_at_k(counts: Sequence[int], n: int, k: int, *, seed: int = 0) -> Estimate:
    """Mean pass@k over problems, each with `counts[i]` right among `n`, and its percentile bootstrap interval.

    Problems are what is resampled: they are the larger source of spread, and samples of one problem are not independent
    evidence about another. Draws histograms, so the cost does not grow with the number of problems.
    """
    if not counts:
        raise ValueError("mean_pass_at_k needs at least one problem")
    values = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
    share = np.bincount(counts, minlength=n + 1) / len(counts)  # [n+1] of problems solved c times
    draws = np.random.default_rng(seed).multinomial(len(counts), share, size=RESAMPLES)  # [RESAMPLES, n+1]
    low, high = np.quantile(draws @ values / len(counts), [0.025, 0.975])
    return Estimate(float(share @ values), float(low), float(high))


def wilson(successes: int, n: int) -> Estimate:
    """Share of `successes` among `n` independent trials with Wilson's interval, which is honest at 0 and 1 too."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))
