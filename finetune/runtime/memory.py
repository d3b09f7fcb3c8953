"""Memory of this process: its peak, on a GPU or in RAM."""

import resource
from contextlib import suppress

import torch

GIB = 2**30


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
