"""Sums become means once, over all that was added; the stopwatch counts training and nothing else."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from finetune.model.loss import TokenSums, sums_by_source
from finetune.training.metrics import Numbers, Stopwatch, SumWindow, check_numbers, means

CPU = torch.device("cpu")


def add_update(window: SumWindow, *micro_batches: TokenSums) -> None:
    window.begin_update()
    for micro_batch in micro_batches:
        window.add(micro_batch)
    window.keep_update()


def sums(nll: float, entropy: float, correct: float, count: float, **options: Any) -> TokenSums:
    return TokenSums(*(torch.tensor(float(value), **options) for value in (nll, entropy, correct, count)))


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_means_are_per_target_token():
    assert means(torch.tensor([6.0, 3.0, 2.0, 4.0], dtype=torch.float64)) == {
        "loss": 1.5,
        "entropy": 0.75,
        "mean_token_accuracy": 0.5,
        "num_target_tokens": 4,
    }
    assert type(means(torch.ones(4))["num_target_tokens"]) is int


def test_a_window_weighs_every_token_the_same_and_not_every_micro_batch(accelerator):
    window = SumWindow(CPU)
    add_update(
        window, sums(nll=10, entropy=2, correct=0, count=1), sums(nll=9, entropy=9, correct=9, count=9)
    )
    add_update(window, sums(nll=0, entropy=0, correct=0, count=0))
    assert window.reduce(accelerator) == {
        "loss": 1.9,
        "entropy": 1.1,
        "mean_token_accuracy": 0.9,
        "num_target_tokens": 10,
    }


def test_a_window_is_empty_after_it_was_reduced(accelerator):
    window = SumWindow(CPU)
    add_update(window, sums(100, 100, 100, 100))
    window.reduce(accelerator)
    add_update(window, sums(4, 2, 1, 2))
    assert window.reduce(accelerator)["loss"] == 2
    assert window.total(accelerator)[0].tolist() == [0, 0, 0, 0]


def test_the_total_leaves_the_window_as_it_is_and_can_be_restored(accelerator):
    window = SumWindow(CPU)
    add_update(window, sums(1, 2, 3, 4))
    saved = window.total(accelerator)[0].tolist()
    add_update(window, sums(5, 6, 7, 8))
    again = SumWindow(CPU)
    again.restore(saved, {})
    add_update(again, sums(5, 6, 7, 8))
    assert saved == [1, 2, 3, 4]
    assert again.total(accelerator)[0].tolist() == window.total(accelerator)[0].tolist() == [6, 8, 10, 12]


def test_the_window_sums_over_all_processes():
    class Four:
        """Four processes with the same sums."""

        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return tensor * 4

    window = SumWindow(CPU)
    add_update(window, sums(6, 3, 2, 4))
    assert window.reduce(Four()) == {
        "loss": 1.5,
        "entropy": 0.75,
        "mean_token_accuracy": 0.5,
        "num_target_tokens": 16,
    }


def test_one_more_token_still_counts_after_very_many(accelerator):
    window = SumWindow(CPU)
    window.restore([2.0**24] * 4, {})  # in fp32 adding one to this gives the same number
    for _ in range(3):
        add_update(window, sums(1, 1, 1, 1))
    assert window.total(accelerator)[0].tolist() == [2**24 + 3] * 4


def test_an_update_that_is_not_kept_leaves_no_trace(accelerator):
    window = SumWindow(CPU)
    add_update(window, sums(1, 2, 3, 4))
    window.begin_update()
    window.add(sums(float("nan"), 1, 1, 1))
    assert not window.is_finite()
    assert window.total(accelerator)[0].tolist() == [1, 2, 3, 4]
    add_update(window, sums(5, 6, 7, 8))
    assert window.is_finite()
    assert window.total(accelerator)[0].tolist() == [6, 8, 10, 12]


# By source


def sums_of_sources(*by_source: list[float]) -> TokenSums:
    """Of a micro-batch of several sources."""
    rows = torch.tensor(by_source)
    return TokenSums(*rows.sum(0), by_source=rows)


def test_each_source_has_means_over_its_own_tokens_and_none_without_a_token(accelerator):
    window = SumWindow(CPU, ["a", "b", "c"])
    add_update(window, sums_of_sources([2, 1, 1, 2], [0, 0, 0, 0], [9, 9, 0, 1]))
    add_update(window, sums_of_sources([4, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]))
    assert window.reduce(accelerator) == {
        "loss": 3,
        "entropy": 2.2,
        "mean_token_accuracy": 0.4,
        "num_target_tokens": 5,
        "loss/a": 2,
        "mean_token_accuracy/a": pytest.approx(1 / 3),
        "num_target_tokens/a": 3,
        "loss/c": 4.5,
        "mean_token_accuracy/c": 0.5,
        "num_target_tokens/c": 2,
    }
    assert not window.total(accelerator).any()


def test_a_resumed_window_finds_its_sources_by_their_names(accelerator):
    window = SumWindow(CPU, ["new", "same"])
    window.restore([6, 0, 0, 3], {"same": [4, 0, 0, 2], "gone": [2, 0, 0, 1]})
    add_update(window, sums_of_sources([1, 0, 0, 1], [2, 0, 0, 1]))
    metrics = window.reduce(accelerator)
    assert (metrics["loss"], metrics["num_target_tokens"]) == (9 / 5, 5)
    assert (metrics["loss/same"], metrics["num_target_tokens/same"]) == (2, 3)
    assert (metrics["loss/new"], metrics["num_target_tokens/new"]) == (1, 1)


def test_telling_sources_apart_does_not_wait_for_the_device():
    # On `meta`, whoever asks for a value gets an error.
    stats = torch.ones(5, 3, device="meta")
    by_source = sums_by_source(stats, torch.ones(5, 2, dtype=torch.bool, device="meta"))
    window = SumWindow(torch.device("meta"), ["a", "b"])
    window.begin_update()
    window.add(TokenSums(*torch.ones(4, device="meta"), by_source=by_source))
    window.keep_update()
    assert window._sums.shape == (3, 4)


@pytest.mark.parametrize("nll", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("grad_norm", [1.0, float("nan"), float("inf")])
def test_the_check_says_which_numbers_are_not_finite(accelerator, nll, grad_norm):
    window = SumWindow(CPU)
    window.begin_update()
    window.add(sums(nll, 1, 1, 1))
    numbers = check_numbers(accelerator, window, torch.tensor(grad_norm))
    if not math.isfinite(nll):
        assert numbers is Numbers.LOSS_NOT_FINITE
    elif not math.isfinite(grad_norm):
        assert numbers is Numbers.GRADIENT_NOT_FINITE
    else:
        assert numbers is Numbers.FINITE


def test_the_check_waits_for_the_device_once(accelerator):
    window = SumWindow(CPU)
    with torch.profiler.profile() as profile:
        check_numbers(accelerator, window, torch.tensor(1.0))
    copied = [event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense"]
    assert sum(copied) == 0  # one transfer of both answers, none for each


def test_a_window_keeps_no_graph():
    weight = torch.tensor(2.0, requires_grad=True)
    window = SumWindow(CPU)
    add_update(window, TokenSums(weight * 3, torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0)))
    assert not window._sums.requires_grad


def test_adding_does_not_wait_for_the_device():
    # A tensor on the device `meta` has no values: whoever asks for one gets an error.
    window = SumWindow(torch.device("meta"))
    window.add(sums(1, 2, 3, 4, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        window._sums.tolist()


# Stopwatch


@pytest.fixture(autouse=True)
def _flop_of_a_model(monkeypatch):
    """What a token and a target token take stands here for the model."""
    monkeypatch.setattr("finetune.training.metrics.training_flop", lambda flop: flop)


class Clock:
    """Tells the time it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("finetune.training.metrics.time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def batch_of(num_tokens: int, num_targets: int) -> Any:
    return SimpleNamespace(num_tokens=num_tokens, target_ids=[0] * num_targets)


def test_the_rate_is_tokens_by_seconds(clock):
    stopwatch = Stopwatch((1, 2), 100.0)
    stopwatch.count(30, [])
    clock.now += 2
    stopwatch.count(50, [])
    clock.now += 2
    assert stopwatch.speed()["useful_tokens_per_second"] == 20


def test_the_share_of_the_matmul_rate_counts_tokens_and_targets_by_what_they_take(clock):
    stopwatch = Stopwatch((3, 50), 1000.0)
    stopwatch.count(150, [batch_of(60, 4), batch_of(40, 6)])
    clock.now += 2
    assert stopwatch.speed()["mfu"] == (100 * 3 + 10 * 50) / 2 / 1000
    clock.now += 1
    assert stopwatch.speed()["mfu"] == 0


def test_each_reading_starts_anew(clock):
    stopwatch = Stopwatch((1, 2), 100.0)
    stopwatch.count(1000, [])
    clock.now += 1
    stopwatch.speed()["useful_tokens_per_second"]
    stopwatch.count(10, [])
    clock.now += 5
    assert stopwatch.speed()["useful_tokens_per_second"] == 2


def test_pauses_do_not_count(clock):
    stopwatch = Stopwatch((1, 2), 100.0)
    clock.now += 1
    for seconds in (100, 200):
        with stopwatch.paused():
            clock.now += seconds
        clock.now += 1
    stopwatch.count(12, [])
    clock.now += 1
    assert stopwatch.speed()["useful_tokens_per_second"] == 3


def test_a_pause_belongs_to_its_own_reading(clock):
    stopwatch = Stopwatch((1, 2), 100.0)
    stopwatch.count(8, [])
    clock.now += 2
    assert stopwatch.speed()["useful_tokens_per_second"] == 4
    with stopwatch.paused():
        clock.now += 50
    stopwatch.count(8, [])
    clock.now += 4
    assert stopwatch.speed()["useful_tokens_per_second"] == 2
