"""Memory of this process, on a GPU or in RAM: what it holds, its peak, and what it may take."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import psutil
import torch

from finetune.runtime import system

GIB, MIB = 2**30, 2**20
UPDATES_BETWEEN_RELEASES = 20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def release_freed_memory(step: int) -> None:
    """Return to the system, every few updates, what the C allocator keeps of freed memory.

    Updates differ in their number of tokens, and so do their tensors: glibc's heap fragments, and resident
    memory would grow with the number of updates. Other C libraries are left alone.
    """
    if step % UPDATES_BETWEEN_RELEASES == 0 and (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


def return_large_blocks() -> None:
    """Have glibc return each freed block of a MiB or more at once, instead of keeping up to 32 MiB of them.

    A layer that is gathered is freed soon after. Kept, such blocks would grow beyond the whole base.
    """
    if _malloc_trim() is not None:  # else it is another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function of this name (malloc_trim(3))."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no library is loaded under that name
        return None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident (RSS) on a CPU.

    On Apple's GPUs, what the driver holds for this process: torch returns none of it, so that it is the peak.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    return system.peak_resident_bytes() / GIB


def peak_reserved_gib(device: torch.device) -> float | None:
    """Peak of what torch's allocator took from a GPU: the allocated memory and the gaps between; None on a
    CPU."""
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None


def held_bytes(device: torch.device) -> int:
    """Memory held now: allocated on a GPU, resident (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


class Room(NamedTuple):
    """Memory in GiB that a process may hold: what is free, and what it holds already."""

    total_gib: float

    @property
    def margin_gib(self) -> float:
        """What stays unused of it, for the gaps between tensors and for libraries."""
        return max(self.total_gib / 20, 256 * MIB / GIB)

    @property
    def usable_gib(self) -> float:
        return max(0.0, self.total_gib - self.margin_gib)


def room_on(device: torch.device) -> Room:
    """The room that this process has on the device.

    On a GPU, a fraction set by `torch.cuda.set_per_process_memory_fraction` is the limit. On a CPU, the
    processes of a run on this machine share what is free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limit = total * torch.cuda.get_per_process_memory_fraction(device)
        return Room(min(free + torch.cuda.memory_reserved(device), limit) / GIB)
    if device.type == "mps":
        return Room(torch.mps.recommended_max_memory() / GIB)
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    return Room((held_bytes(device) + psutil.virtual_memory().available / num_processes) / GIB)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak to the memory held now; that of Apple's GPUs stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        system.reset_peak_resident()
