"""Named points of a run at which a process can be made to halt, to be killed there."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import train
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.loss import TokenLoss
from finetune.run import checkpoint, folder, tracker
from finetune.runtime import system


class Point(NamedTuple):
    """Just before a function is called."""

    owner: Any
    function: str
    calls: int
    """How often a run calls it at least"""
    by_all: bool = False
    """Whether every process does, else the first alone"""


class Fault(NamedTuple):
    """Where one process halts."""

    point: str
    rank: int
    call: int
    """At which of its calls of the point's function, from 1"""
    file: Path
    """Holds the number of the process that halted"""


def points(num_updates: int) -> dict[str, Point]:
    """Those of a run of `num_updates` updates that keeps three checkpoints and saves each update."""
    return {
        "the rows are prepared": Point(train, "load_data", 1, True),
        "a base may be shared": Point(train, "shard_base", 1, True),
        "a file of the start is written": Point(folder, "write_atomically", 2),
        "an update's gradients are summed": Point(FlatAdapter, "reduce_gradients", num_updates, True),
        "a batch is evaluated": Point(TokenLoss, "token_stats", 3),
        "a line of metrics is written": Point(tracker, "_append", num_updates // 2),
        "a checkpoint has its adapter alone": Point(checkpoint, "save_file", num_updates),
        "a checkpoint has no manifest": Point(checkpoint, "_write_json", 2 * num_updates),
        "an old checkpoint is removed": Point(system, "remove_folder", num_updates - 3),
        "the result is written": Point(checkpoint, "save_result", 1),
        "the report is written": Point(train, "leave_report", 1),
    }


def arm(fault: Fault) -> None:
    """Have this process halt at `fault`, unless it is another rank's or has happened."""
    if os.environ.get("RANK", "0") != str(fault.rank) or fault.file.exists():
        return
    point = points(0)[fault.point]
    setattr(point.owner, point.function, _halting(getattr(point.owner, point.function), fault))


def _halting(function: Callable[..., Any], fault: Fault) -> Callable[..., Any]:
    calls = 0

    def call_or_halt(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call:
            fault.file.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments, **named)

    return call_or_halt
