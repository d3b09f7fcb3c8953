"""Sums over a window of updates, kept on the device, and their means, computed once per log line."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from finetune.data.collate import MicroBatch
from finetune.model.loss import TokenSums
from finetune.model.size import training_flop
from finetune.runtime.accelerator import sum_dtype
from finetune.runtime.processes import all_reduce_max

Metrics = dict[str, float | int]
COUNT = 3  # index of the number of target tokens among the sums
BY_SOURCE = ("loss", "mean_token_accuracy", "num_target_tokens")  # the metrics that are given by source


class SumWindow:
    """Adds up TokenSums on the device; only `reduce` waits for the device.

    Those of the current update are apart until it is made, since it may be repeated. If `source_names` are
    given, the sums of each source are kept too.
    """

    def __init__(self, device: torch.device, source_names: Sequence[str] = ()) -> None:
        self.source_names = source_names
        # nll, entropy, correct, count: of all tokens, then of each source.
        self._sums = torch.zeros(1 + len(source_names), 4, dtype=sum_dtype(device), device=device)
        self._of_update = torch.zeros_like(self._sums)

    def begin_update(self) -> None:
        """Start the sums of an update at zero; those of one that was not kept are forgotten."""
        self._of_update.zero_()

    def add(self, sums: TokenSums) -> None:
        """Add a micro-batch to the current update."""
        of_all = torch.stack([sums.nll.detach(), sums.entropy, sums.correct, sums.count])
        self._of_update += of_all if sums.by_source is None else torch.cat([of_all[None], sums.by_source])

    def keep_update(self) -> None:
        """Take the current update into the window."""
        self._sums += self._of_update

    def total(self, accelerator: Any) -> Tensor:
        """The sums over all ranks, without those of the current update: [1 + S, 4], of all tokens and of each
        of the S sources."""
        total: Tensor = accelerator.reduce(self._sums, reduction="sum")
        return total

    def reduce(self, accelerator: Any) -> Metrics:
        """The means per target token over all ranks, and those of each source; the window is empty
        afterwards."""
        total = self.total(accelerator).cpu()
        self._sums.zero_()
        return means(total[0]) | means_by_source(self.source_names, total[1:])

    def is_finite(self) -> Tensor:
        """Whether all sums of the current update are finite: a bool scalar on the device."""
        return self._of_update.isfinite().all()

    def restore(self, sums: list[float], by_source: Mapping[str, list[float]]) -> None:
        """Continue from sums over all ranks, and those of each source. Only one rank may call this, or they
        would count twice.

        A source that `by_source` lacks, as those of older runs do, starts at zero: in the next log line its
        means are over fewer tokens, which their number says.
        """
        rows = [sums, *(by_source.get(name, [0.0] * 4) for name in self.source_names)]
        self._sums += torch.tensor(rows, dtype=self._sums.dtype, device=self._sums.device)


def means(sums: Tensor) -> Metrics:
    """The metrics of a log line, from sums [4] of nll, entropy, correct and count."""
    nll, entropy, correct, count = sums.tolist()
    return {
        "loss": nll / count,
        "entropy": entropy / count,
        "mean_token_accuracy": correct / count,
        "num_target_tokens": int(count),
    }


def means_by_source(names: Collection[str], sums: Tensor) -> Metrics:
    """`loss/NAME`, `mean_token_accuracy/NAME` and `num_target_tokens/NAME` of each source that has a target
    token, from sums [S, 4] of nll, entropy, correct and count."""
    metrics: Metrics = {}
    for name, of_source in zip(names, sums, strict=True):
        if of_source[COUNT] > 0:
            own = means(of_source)
            metrics |= {f"{metric}/{name}": own[metric] for metric in BY_SOURCE}
    return metrics


class Numbers(IntEnum):
    """Which numbers of an update are not finite, on any rank."""

    FINITE = 0
    GRADIENT_NOT_FINITE = 1
    LOSS_NOT_FINITE = 2


def check_numbers(accelerator: Any, window: SumWindow, grad_norm: Tensor) -> Numbers:
    """Whether the sums of the current update and its gradient are finite on all ranks, so that they may reach
    the weights. This waits for the device."""
    loss_is_finite, gradient_is_finite = torch.stack([window.is_finite(), grad_norm.isfinite()]).tolist()
    numbers = Numbers.FINITE if gradient_is_finite else Numbers.GRADIENT_NOT_FINITE
    if not loss_is_finite:
        numbers = Numbers.LOSS_NOT_FINITE
    return Numbers(all_reduce_max(accelerator, numbers))


class Stopwatch:
    """The speed of training since the last call of `speed`, without evaluations and checkpoints.

    `flop_per_second` is the matmul rate of this rank's device (`accelerator.matmul_rate`).
    """

    def __init__(self, model: Any, flop_per_second: float) -> None:
        self._flop, self._flop_per_second = training_flop(model), flop_per_second
        self._started = time.perf_counter()
        self._num_tokens = self._num_flop = 0

    def count(self, num_tokens: int, micro_batches: Sequence[MicroBatch]) -> None:
        """Add an update: the tokens of its examples on all ranks, and the micro-batches of this rank.

        Neither includes padding. The work on a shared prefix counts once.
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
        """Useful tokens per second of all ranks, and the fraction of this rank's matmul rate that it reaches
        (MFU), since the last call."""
        now = time.perf_counter()
        seconds = now - self._started
        metrics: Metrics = {
            "useful_tokens_per_second": self._num_tokens / seconds,
            "mfu": self._num_flop / seconds / self._flop_per_second,
        }
        self._started, self._num_tokens, self._num_flop = now, 0, 0
        return metrics
