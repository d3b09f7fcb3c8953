"""The processes of a run: what they agree on, and what one does for all."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import psutil
import torch

T = TypeVar("T")

# How long a process waits for another that is silent: longer than what one of them does for all, such as
# writing answers on a CPU. Where one is dead and its computer still runs, gloo notices at once.
PEER_TIMEOUT = timedelta(minutes=30)

# In NCCL's errors (DistBackendError) if a process is gone or silent, beside those of a wrong call.
NCCL_LOST_PEER = (
    "ncclRemoteError",
    "Connection reset by peer",
    "Connection closed by remote peer",
    "Broken pipe",
    "collective operation timeout",
    "timed out",
)
# In the plain RuntimeErrors of gloo: the source file that raised, all of whose errors are of a connection.
GLOO_LOST_PEER = "gloo/transport/"


def all_reduce_max(accelerator: Any, number: int) -> int:
    """The largest of the ranks' numbers: the same on all. Each must call it equally often."""
    if accelerator.num_processes == 1:
        return number
    tensor = torch.tensor(number)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, _cpu_group())
    return int(tensor)


def gather_objects(accelerator: Any, own: T) -> list[T]:
    """What each rank brought, in the order of ranks: the same on all. Each must call it equally often."""
    gathered: list[Any] = [own] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(gathered, own, _cpu_group())
    return gathered


@cache
def _cpu_group() -> Any:
    """All ranks, over the CPU: a number on the GPU would have the loop wait for the device."""
    return torch.distributed.new_group(backend="gloo", timeout=PEER_TIMEOUT)


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective operation failed as another process has ended, or was silent for PEER_TIMEOUT.

    The words alone do not say: a download times out too.
    """
    said = str(error)
    if isinstance(error, torch.distributed.DistStoreError):
        return True
    if isinstance(error, torch.distributed.DistNetworkError):  # of the rendezvous
        return "server socket" not in said  # which is this process's own: its port is taken
    if isinstance(error, torch.distributed.DistBackendError):
        return GLOO_LOST_PEER in said or any(message in said for message in NCCL_LOST_PEER)
    return GLOO_LOST_PEER in said


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


def num_nodes() -> int:
    """The nodes of this run, as torchrun and `accelerate launch` say."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


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
