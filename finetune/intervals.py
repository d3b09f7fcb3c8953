"""95 % confidence intervals of token-weighted means: a bootstrap over examples."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

RESAMPLES = 2000


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def mean_interval(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> Interval:
    """The mean per token of E examples, sum of `sums` [E] by sum of `counts` [E], and where 95 % of the means
    of examples drawn anew lie: the tokens of an example belong together, so examples are what is drawn."""
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(value, np.nan, np.nan)

    def mean(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        ratio: NDArray[np.float64] = sums.sum(axis) / counts.sum(axis)
        return ratio

    drawn = bootstrap(
        (sums, counts),
        mean,
        n_resamples=RESAMPLES,
        batch=100,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value, float(drawn.low), float(drawn.high))


def difference_interval(
    before: NDArray[np.float64], after: NDArray[np.float64], counts: NDArray[np.float64]
) -> Interval:
    """The same of how much the mean changed, on the same examples (paired)."""
    return mean_interval(after - before, counts)
