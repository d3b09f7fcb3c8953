"""95 % confidence intervals of token-weighted means: a bootstrap over examples.

The interval is Hesterberg's expanded percentile interval ("What Teachers Should Know About the Bootstrap",
The American Statistician 69, 2015). A plain percentile interval of few examples is too narrow, as one of a
normal distribution is where Student's is due: of 20 simulated examples it holds the truth in 88 % of cases,
this one in 91 %; of 100 examples it is 94 % with both.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, norm
from scipy.stats import t as student

RESAMPLES = 2000


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def mean_interval(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> Interval:
    """The mean per token of E examples, sum of `sums` [E] by sum of `counts` [E], and where 95 % of the means
    of examples drawn anew lie: the tokens of an example belong together, so examples are what is drawn.

    Of fewer than two examples nothing is known: the limits are NaN.
    """
    value, num = float(sums.sum() / counts.sum()), len(sums)
    if num < 2:
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
    ).bootstrap_distribution
    tail = norm.cdf(np.sqrt(num / (num - 1)) * student.ppf(0.025, num - 1))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def difference_interval(
    before: NDArray[np.float64], after: NDArray[np.float64], counts: NDArray[np.float64]
) -> Interval:
    """The same of how much the mean changed, on the same examples (paired)."""
    return mean_interval(after - before, counts)
