"""The order of more examples than a permutation in memory is for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import order
from finetune.data.order import MAX_PERMUTED, epoch_order, examples_at, scattered

any_order = settings(deadline=None, max_examples=100)
seeds = st.integers(0, 2**32 - 1)
epochs = st.integers(0, 100)
MANY = MAX_PERMUTED + 1


@any_order
@given(seeds, epochs, st.integers(1, 5000))
def test_it_is_a_bijection(seed, epoch, count):
    taken = scattered(np.arange(count), count, seed, epoch)
    assert sorted(taken.tolist()) == list(range(count))


@any_order
@given(seeds, epochs, st.integers(MANY, 2**40), st.data())
def test_a_position_has_the_same_example_however_many_are_asked_for(seed, epoch, count, data):
    start = data.draw(st.integers(0, count - 1))
    size = data.draw(st.integers(1, 50))
    together = examples_at(seed, epoch, count, start, start + size)
    assert len(together) == min(size, count - start)
    one_by_one = [examples_at(seed, epoch, count, at, at + 1) for at in range(start, start + len(together))]
    assert together.tolist() == np.concatenate(one_by_one).tolist()
    assert ((together >= 0) & (together < count)).all()
    assert len(set(together.tolist())) == len(together)


def test_other_seeds_and_epochs_give_other_orders():
    orders = {tuple(scattered(np.arange(50), 50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_neighbours_do_not_stay_together():
    """As among random numbers: they are on average a third of the count apart, and not correlated."""
    count = 10_000_000
    taken = examples_at(42, 0, count, 0, 100_000) / count
    distances = np.abs(np.diff(taken))
    assert taken.mean() == pytest.approx(0.5, abs=0.005)
    assert distances.mean() == pytest.approx(1 / 3, abs=0.005)
    assert np.corrcoef(taken[:-1], taken[1:])[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("count", "in_memory"), [(MAX_PERMUTED, True), (MANY, False)])
def test_up_to_the_limit_the_order_is_a_permutation_in_memory(monkeypatch, count, in_memory):
    whole = []
    monkeypatch.setattr(order, "epoch_order", lambda *key: whole.append(key) or epoch_order(*key))
    examples = examples_at(7, 3, count, 10, 20)
    assert whole == ([(7, 3, count)] if in_memory else [])
    if in_memory:
        permutation = np.random.default_rng([7, 3]).permutation(count)
        assert examples.tolist() == permutation[10:20].tolist()
    epoch_order.cache_clear()


def test_the_order_is_the_one_that_runs_on_disk_were_trained_in():
    # A change here would have every interrupted run resume with other examples than it left out.
    assert examples_at(42, 0, 10_000_000, 0, 4).tolist() == [8655388, 5365552, 8942922, 6545350]
    assert examples_at(42, 1, 10_000_000, 9_999_998, 10_000_005).tolist() == [7770604, 3167561]
