"""95 % confidence intervals of token-weighted means: a bootstrap over examples.

The interval is Hesterberg's expanded percentile interval ("What Teachers Should Know About the Bootstrap",
The American Statistician 69, 2015). A plain percentile interval of few examples is too narrow, as one of a
normal distribution is where Student's is due: with 20 simulated examples it covers the true mean in 88 % of
cases, this one in 91 %; with 100 examples both cover it in 94 %.
"""

import math
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
    """The mean per token of E examples, sum(`sums` [E]) / sum(`counts` [E]), with its 95 % interval.

    Examples are resampled, not tokens: the tokens of one example depend on each other. With fewer than two
    examples the bounds are NaN.
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
    """The change of the mean on the same examples, with its paired interval; all arrays are [E]."""
    return mean_interval(after - before, counts)


def signed(value: float, digits: int) -> str:
    r"""Format with a sign that is as wide as a digit, such as \u22120.120."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def between(interval: Interval, digits: int, sign: bool = False) -> str:
    """Format the bounds as "low to high"; an empty string where they are unknown."""
    if math.isnan(interval.low):
        return ""
    low, high = (signed(x, digits) if sign else f"{x:.{digits}f}" for x in (interval.low, interval.high))
    return f"{low} to {high}"
