"""The processes of a run: what they agree on, and what one does for all."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import psutil
import torch


def all_reduce_max(accelerator: Any, number: int) -> int:
    """The largest of the ranks' numbers: the same on all. Each must call it equally often."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, _cpu_group())
    return int(tensor)


@cache
def _cpu_group() -> Any:
    """All ranks, over the CPU: a number on the GPU would have the loop wait for the device."""
    return torch.distributed.new_group(backend="gloo")


def on_main(accelerator: Any, job: Callable[..., object], *arguments: Any) -> None:
    """Run `job(*arguments)` on the main process while the other ranks wait. If it fails, they exit silently
    instead of waiting for a process that is gone."""
    accelerator.wait_for_everyone()  # no rank may still be looking for what the job writes
    error: BaseException | None = None
    if accelerator.is_main_process:
        try:
            job(*arguments)
        except (Exception, SystemExit) as raised:
            error = raised
    failed = all_reduce_max(accelerator, 1 if error else 0)
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


SWEEP = "FINETUNE_SWEEP"  # in the environment of a sweep's runs: the sweep's process


def launcher() -> int | None:
    """The process without which this one should not go on training: `accelerate launch`, or a sweep."""
    if sweep := os.environ.get(SWEEP):
        return int(sweep)
    return os.getppid() if under_accelerate_launch() else None
