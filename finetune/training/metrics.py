"""Sums over a window of updates, kept on the device, and the means they become once per log line."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finetune.data.collate import MicroBatch
from finetune.model.load import training_flop
from finetune.model.loss import TokenSums
from finetune.runtime.processes import all_reduce_max

Metrics = dict[str, float | int]
COUNT = 3  # the place of the number of target tokens among the sums


class SumWindow:
    """Adds up TokenSums on the device; `reduce` is the only place that waits for it."""

    def __init__(self, device: torch.device) -> None:
        # nll, entropy, correct, count; in fp64 a million nats and one token's share fit in one number.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, sums: TokenSums) -> None:
        values = (sums.nll.detach(), sums.entropy, sums.correct, sums.count)
        self._sums += torch.stack([value.double() for value in values])

    def total(self, accelerator: Any) -> Tensor:
        """The sums over all processes: [4] float64."""
        total: Tensor = accelerator.reduce(self._sums, reduction="sum")
        return total

    def reduce(self, accelerator: Any) -> Metrics:
        """The means per target token over all processes; the window is empty afterwards."""
        metrics = means(self.total(accelerator))
        self._sums.zero_()
        return metrics

    def is_finite(self) -> Tensor:
        """[]: bool, on the device."""
        return self._sums.isfinite().all()

    def restore(self, sums: list[float]) -> None:
        """Go on from sums over all processes: for one process to call, lest they count twice."""
        self._sums += torch.tensor(sums, dtype=torch.float64, device=self._sums.device)


def means(sums: Tensor) -> Metrics:
    """nll, entropy, correct, count as the metrics of a log line: nats per target token, a fraction."""
    nll, entropy, correct, count = sums.tolist()
    return {
        "loss": nll / count,
        "entropy": entropy / count,
        "mean_token_accuracy": correct / count,
        "num_target_tokens": int(count),
    }


def all_finite(accelerator: Any, window: SumWindow, grad_norm: Tensor) -> bool:
    """Whether the sums and the gradient are finite numbers in all processes: what may reach the weights.

    Waits for the device. With fp16 a gradient may overflow: the loss scaler then leaves the update out and
    lowers its scale. Only one that is not finite unscaled counts.
    """
    finite = bool(window.is_finite() & grad_norm.isfinite())
    scaler = accelerator.scaler
    if not finite and scaler is not None and scaler.get_scale() > 1:
        finite = bool(window.is_finite())
    return all_reduce_max(accelerator, 0 if finite else 1) == 0


class Stopwatch:
    """Speed of training since the last reading, without the time of evaluations and checkpoints.

    `flop_per_second` is the matmul rate of this rank's device (`accelerator.matmul_rate`).
    """

    def __init__(self, model: Any, flop_per_second: float) -> None:
        self._flop, self._flop_per_second = training_flop(model), flop_per_second
        self._started = time.perf_counter()
        self._num_tokens = self._num_flop = 0

    def count(self, num_tokens: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Add an update: the tokens of its examples over all ranks, and the micro-batches of this rank.

        Padding counts in neither. The work on a shared prefix counts once.
        """
        per_token, per_target = self._flop
        self._num_tokens += num_tokens
        for batch in micro_batches:
            self._num_flop += batch.num_tokens * per_token + len(batch.target_ids) * per_target

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused_at = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused_at

    def speed(self) -> Metrics:
        """Useful tokens per second of all processes, and the share of its device's matmul rate that this one
        uses (MFU), since the last call."""
        now = time.perf_counter()
        seconds = now - self._started
        metrics: Metrics = {
            "useful_tokens_per_second": self._num_tokens / seconds,
            "mfu": self._num_flop / seconds / self._flop_per_second,
        }
        self._started, self._num_tokens, self._num_flop = now, 0, 0
        return metrics
