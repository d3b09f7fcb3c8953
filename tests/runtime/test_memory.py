"""Freed memory goes back to the system, and does not add up over updates."""

import platform

import psutil
import pytest
import torch

from finetune.runtime import memory

MIB = 2**20


def resident() -> int:
    return psutil.Process().memory_info().rss


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_what_is_freed_between_what_is_kept_goes_back_to_the_system_in_time():
    # Blocks below the threshold from which glibc maps each on its own; every second one stays.
    blocks = [torch.ones(64 * 1024 // 4) for _ in range(6000)]
    kept = blocks[::2]
    full = resident()
    del blocks
    for step in range(1, memory.UPDATES_BETWEEN_RELEASES):
        memory.release_freed_memory(step)
    assert full - resident() < 50 * MIB  # not before it is due
    memory.release_freed_memory(memory.UPDATES_BETWEEN_RELEASES)
    assert full - resident() > 100 * MIB
    assert all(bool((block == 1).all()) for block in kept)


def test_a_c_library_without_malloc_trim_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.release_freed_memory(memory.UPDATES_BETWEEN_RELEASES)
