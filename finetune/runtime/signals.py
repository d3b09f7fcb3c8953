"""Stopping on request: after SIGTERM or SIGINT the update finishes and the run is saved; a second one ends
the process."""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, TypeVar

from finetune.runtime.processes import all_reduce_max, is_lost_peer, launcher
from finetune.runtime.system import is_orphan_of, signals_named

SIGNALS = signals_named("SIGTERM", "SIGINT", "SIGBREAK")

T = TypeVar("T")


class StopRequest:
    """Records the first signal and leaves it to the loop when to stop; a second one ends the process.

    The death of `accelerate launch` or of a sweep counts as a SIGTERM: otherwise a signal sent to the
    launcher alone would leave its process training unnoticed.
    """

    def __init__(self, accelerator: Any) -> None:
        self._main = accelerator.is_main_process
        self._received: list[int] = []
        # A terminal signals torchrun and its processes, and torchrun forwards its own: two signals for one.
        self._last = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 2
        self._agreed = 0
        self._launcher = launcher()
        self._accelerator = accelerator

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # torchrun, which has lost the same process, sends a SIGTERM before this one can say why it ends. From
        # here on it is ignored: between two handlers, that of before would end this process.
        lost = isinstance(error, RuntimeError) and is_lost_peer(error)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if lost and number == signal.SIGTERM else handler)

    @property
    def requested(self) -> bool:
        """Whether this process was requested to stop."""
        if not self._received and self._launcher is not None and is_orphan_of(self._launcher):
            self._received.append(signal.SIGTERM)
        return len(self._received) > 0

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all. Each must call it equally often."""
        self._agreed = all_reduce_max(self._accelerator, self._received[0] if self.requested else 0)
        return self._agreed > 0

    @property
    def exit_code(self) -> int:
        """128 + the signal that was agreed on, as a shell counts; 0 without one."""
        return 128 + self._agreed if self._agreed else 0

    def until(self, items: Iterable[T], together: bool = False) -> Iterator[T]:
        """The items, up to a request to stop this process. With `together`, up to a request to stop any rank:
        all ranks get the same number of items, of which each has equally many."""
        for item in items:
            if self.should_stop() if together else self.requested:
                return
            yield item

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) >= self._last:
            raise SystemExit(128 + number)
        if self._main and len(self._received) == 1:
            name = signal.Signals(number).name
            # The signal may have interrupted another print, and `| tee` may have received it too and be gone.
            with suppress(RuntimeError, OSError):
                print(
                    f"{name}: finishing this update, then saving; a second signal stops immediately",
                    file=sys.stderr,
                )
