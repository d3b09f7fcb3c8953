"""Intervals hold the truth as often as they say, also where the tokens of an example are alike."""

import numpy as np
import pytest

from finetune.report import intervals
from finetune.report.intervals import difference_interval, mean_interval


def simulate(rng, num):
    """Examples of uneven length whose tokens share a level: counts, and the nll sums of two models."""
    counts = np.maximum(1, rng.lognormal(4.2, 0.6, num).astype(int))
    level = rng.gamma(6, 0.4, num) + 5 / np.sqrt(counts)  # short answers are harder
    gain = rng.normal(-0.2, 0.25, num) * level / 2.4
    before = rng.gamma(counts, 1.0) * level  # the sum of `counts` exponential losses
    after = before + gain * counts + rng.normal(0, 0.5, num) * np.sqrt(counts)
    return counts.astype(float), before, after


@pytest.mark.parametrize("seed", [1, 2])
def test_95_percent_intervals_hold_the_known_truth(seed, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 600)
    counts, before, after = simulate(np.random.default_rng(99), 1_000_000)
    loss, change = before.sum() / counts.sum(), (after - before).sum() / counts.sum()
    rng, repetitions = np.random.default_rng(seed), 300
    of_loss = of_change = 0
    for _ in range(repetitions):
        counts, before, after = simulate(rng, 100)
        interval, paired = mean_interval(before, counts), difference_interval(before, after, counts)
        of_loss += interval.low <= loss <= interval.high
        of_change += paired.low <= change <= paired.high
    assert 0.92 <= of_loss / repetitions <= 0.975
    assert 0.92 <= of_change / repetitions <= 0.975


def test_drawing_tokens_instead_of_examples_would_not():
    """The simulation can tell: intervals as of independent tokens miss the truth far more often."""
    counts, before, _ = simulate(np.random.default_rng(99), 1_000_000)
    truth = before.sum() / counts.sum()
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        counts, before, _ = simulate(rng, 100)
        mean = before.sum() / counts.sum()
        held += abs(mean - truth) <= 1.96 * mean / np.sqrt(counts.sum())  # exponential: spread = mean
    assert held / 300 < 0.7


def test_the_value_is_the_ratio_of_the_sums_and_the_same_seed_gives_the_same_limits():
    sums, counts = np.array([3.0, 8.0, 1.0]), np.array([1.0, 4.0, 5.0])
    interval = mean_interval(sums, counts)
    assert interval.value == 1.2
    assert interval.low < 1.2 < interval.high
    assert interval == mean_interval(sums, counts)


def test_few_examples_give_a_wider_interval_than_plain_percentiles():
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(2, 1, 5), np.ones(5)
    draws = rng.choice(sums, (5000, 5)).mean(1)
    interval = mean_interval(sums, counts)
    assert interval.high - interval.low > 1.2 * np.ptp(np.quantile(draws, [0.025, 0.975]))


def test_a_paired_difference_is_narrower_than_the_means_it_is_of():
    counts, before, _ = simulate(np.random.default_rng(0), 100)
    paired = difference_interval(before, before * 0.9, counts)
    alone = mean_interval(before, counts)
    assert paired.value == pytest.approx(-0.1 * alone.value)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)


def test_what_cannot_be_known_is_not_a_number_and_no_change_is_none():
    one = mean_interval(np.array([2.0]), np.array([4.0]))
    assert one.value == 0.5
    assert np.isnan([one.low, one.high]).all()
    sums, counts = np.array([1.0, 5.0]), np.array([2.0, 3.0])
    assert difference_interval(sums, sums, counts) == (0, 0, 0)
