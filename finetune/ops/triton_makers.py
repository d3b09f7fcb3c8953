"""Each operator of `operators` by a Triton kernel on a CUDA device; the signatures are described there."""

from typing import Any

import torch


def enable(device: torch.device) -> None:
    """Use the kernels for tensors on the device.

    Raises:
        OSError: Triton or what it needs is missing; the message says what.
    """
    raise OSError("Triton's kernels are not written yet")


def disable() -> None:
    """Use torch's own operations."""


def is_enabled() -> bool:
    return False


def reason_against(name: str, device: torch.device) -> str:
    """Why torch serves an operator on the device though Triton is there; empty if Triton serves it."""
    return ""


def limit_of(name: str) -> str:
    """Which inputs of an operator are left to torch."""
    return ""


def can_compute(name: str, *arguments: Any) -> bool:
    """Whether the kernels are enabled and take these arguments."""
    return False
