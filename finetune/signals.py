"""Stopping when asked: SIGTERM and SIGINT let the update end and the run be saved; a second one does not."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Any, TypeVar

import psutil
import torch

SIGNALS = (signal.SIGTERM, signal.SIGINT)

T = TypeVar("T")


class StopRequest:
    """Notes the first signal and leaves it to the loop when to stop; a second one ends the process.

    The death of `accelerate launch` counts as a SIGTERM: a signal sent to it alone would otherwise leave its
    process training unseen.
    """

    def __init__(self, accelerator: Any) -> None:
        self._main = accelerator.is_main_process
        self._received: list[int] = []
        # A terminal signals torchrun and its processes, and torchrun then passes its own on: two for one.
        self._last = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 2
        self._agreed = 0
        self._launcher = os.getppid() if under_accelerate_launch() else None
        self._accelerator = accelerator

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if not self._received and self._launcher is not None and os.getppid() != self._launcher:
            self._received.append(signal.SIGTERM)
        return len(self._received) > 0

    def agreed(self) -> bool:
        """Whether any process was asked to stop: the same answer in all. Each must call it equally often."""
        self._agreed = largest(self._accelerator, self._received[0] if self.requested else 0)
        return self._agreed > 0

    @property
    def exit_code(self) -> int:
        """128 + the signal that was agreed on, as a shell counts; 0 without one."""
        return 128 + self._agreed if self._agreed else 0

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """The items, up to a request to stop."""
        for item in items:
            if self.requested:
                return
            yield item

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) >= self._last:
            raise SystemExit(128 + number)
        if self._main and len(self._received) == 1:
            name = signal.Signals(number).name
            # Another print may be what the signal interrupted, and `| tee` may have got it too and be gone.
            with suppress(RuntimeError, OSError):
                print(f"{name}: ending this update and saving; a second stops at once", file=sys.stderr)


def largest(accelerator: Any, number: int) -> int:
    """The largest of the processes' numbers: the same in all, each of which must call it equally often."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, _cpu_group())
    return int(tensor)


@cache
def _cpu_group() -> Any:
    """All processes, over the CPU: a number on the GPU would have the loop wait for the device."""
    return torch.distributed.new_group(backend="gloo")


def on_main(accelerator: Any, job: Callable[[], object]) -> None:
    """Do a job in the main process while the others wait. Where it fails they leave without a word, rather
    than wait for a process that is gone."""
    accelerator.wait_for_everyone()  # what the job writes, none of them is still to look for
    error: BaseException | None = None
    if accelerator.is_main_process:
        try:
            job()
        except (Exception, SystemExit) as raised:
            error = raised
    failed = largest(accelerator, 1 if error else 0)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)


def under_accelerate_launch() -> bool:
    """Whether `accelerate launch` is what started this process."""
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return False
    words = {os.path.basename(word) for word in command}
    return {"accelerate", "launch"} <= words or "accelerate.commands.launch" in words
