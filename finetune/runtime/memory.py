"""Memory of this process: its peak, on a GPU or in RAM."""

import ctypes
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch

GIB = 2**30
UPDATES_BETWEEN_RELEASES = 20


def release_freed_memory(step: int) -> None:
    """Return to the system, every few updates, what the C allocator keeps of freed memory.

    Updates differ in their number of tokens, and so do their tensors: glibc's heap fragments, and resident
    memory would grow with the number of updates. Other C libraries are left alone.
    """
    if step % UPDATES_BETWEEN_RELEASES == 0 and (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function of this name (malloc_trim(3))."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no library is loaded under that name
        return None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak to the memory held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")  # proc(5): the high-water mark of the resident memory
