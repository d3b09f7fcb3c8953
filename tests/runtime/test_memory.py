"""Freed memory goes back to the system and does not add up over updates; how much a process may hold."""

import platform

import psutil
import pytest
import torch

from finetune.runtime import memory
from finetune.runtime.memory import GIB, Room, peak_reserved_gib, room_on

MIB = 2**20
CARD = torch.device("cuda")


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


# How much a process may hold


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a card of 8 GiB; call it with what other programs, and torch here, have taken."""

    def pretend(others: int, reserved: int, fraction: float = 1.0) -> None:
        total = 8 * GIB
        functions = {
            "mem_get_info": (total - others - reserved, total),
            "memory_reserved": reserved,
            "get_per_process_memory_fraction": fraction,
            "max_memory_reserved": 3 * GIB,
        }
        for name, value in functions.items():
            monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)

    return pretend


def test_on_a_card_there_is_what_is_free_and_what_this_process_has_but_not_what_others_have(card):
    card(others=GIB, reserved=2 * GIB)
    assert room_on(CARD).total_gib == 7
    card(others=GIB, reserved=0)
    assert room_on(CARD).total_gib == 7
    card(others=6 * GIB, reserved=GIB)
    assert room_on(CARD).total_gib == 2


def test_a_process_that_is_held_to_a_fraction_of_a_card_has_no_more(card):
    card(others=0, reserved=GIB, fraction=0.5)
    assert room_on(CARD).total_gib == 4
    card(others=6 * GIB, reserved=GIB, fraction=0.5)
    assert room_on(CARD).total_gib == 2


def test_a_margin_is_left_of_it():
    assert Room(20.0).margin_gib == 1
    assert Room(20.0).usable_gib == 19
    assert Room(2.0).margin_gib == 0.25
    assert Room(0.1).usable_gib == 0


def test_on_a_cpu_the_processes_of_a_run_share_what_is_available(monkeypatch):
    class Memory:
        available = 6 * GIB

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu = torch.device("cpu")
    assert room_on(cpu).total_gib == pytest.approx(6 + resident() / GIB, abs=0.05)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert room_on(cpu).total_gib == pytest.approx(2 + resident() / GIB, abs=0.05)


def test_only_a_card_has_reserved_memory(card):
    card(others=0, reserved=GIB)
    assert peak_reserved_gib(CARD) == 3
    assert peak_reserved_gib(torch.device("cpu")) is None
