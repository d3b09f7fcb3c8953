"""The dropout noise of LoRA's inputs: which numbers of an input are dropped, the same on every device.

Each update draws a pool of 16-bit numbers, and keeps for each a mask that says whether a number is dropped.
Drawing fresh noise for each layer would cost as much as the layer's matrix multiplication. An input takes
slices of the pool, one after the other, at offsets that follow from one random `start`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

POOL_SIZE = 2**22
SLICE = POOL_SIZE // 2  # numbers of an input that take consecutive masks
ALIGNMENT = 64  # offsets are multiples of it, so that a GPU loads whole 128-byte lines
NUM_OFFSETS = SLICE // ALIGNMENT
STRIDE = (
    20_251  # from offset to offset: odd, and the golden share of NUM_OFFSETS, so that slices lie far apart
)
LEVELS = 2**16
INTEGERS = {2: torch.int16, 4: torch.int32}  # the type of a mask, by the size in bytes of what it masks

# SplitMix64 (Steele, Lea and Flood, 2014): word i of the noise is `mixed(key + (i + 1) * GAMMA)`.
GAMMA = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)


def dropped_share(dropout: float) -> float:
    """The fraction of numbers that is dropped: `dropout` rounded to a multiple of 1 / LEVELS, below 1."""
    return min(round(dropout * LEVELS), LEVELS - 1) / LEVELS


def threshold_of(dropout: float) -> int:
    """The smallest signed 16-bit number whose place in the pool is kept."""
    return int(dropped_share(dropout) * LEVELS) - LEVELS // 2


def key_of(seed: int) -> int:
    """The 64-bit key, as a signed number, of the noise of a seed. Mixing keeps near seeds' noise apart."""
    z = seed & (2**64 - 1)
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        z = (z ^ (z >> shift)) * factor & (2**64 - 1)
    return signed(z)


def signed(word: int) -> int:
    """The signed 64-bit number with the bits of an unsigned one."""
    return word - 2**64 if word >= 2**63 else word


def draw_start() -> int:
    """Draw where an input's slices of the pool start, in units of ALIGNMENT.

    It comes from torch's global generator. Gradient checkpointing restores its state, so recomputed layers
    draw the same start.
    """
    return int(torch.randint(NUM_OFFSETS, ()))


def slices(count: int, start: int) -> Iterator[tuple[slice, slice]]:
    """For an input of `count` numbers: which of them take which part of the pool."""
    for index, first in enumerate(range(0, count, SLICE)):
        size = min(SLICE, count - first)
        offset = (start + index * STRIDE) % NUM_OFFSETS * ALIGNMENT
        yield slice(first, first + size), slice(offset, offset + size)


def zero_dropped(x: Tensor, pool: Tensor, start: int) -> Tensor:
    """x with zeros where it is dropped. A bitwise AND needs no conversion of the mask to floating point."""
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    numbers, results = x.reshape(-1).view(pool.dtype), kept.view(-1).view(pool.dtype)
    for part, masks in slices(x.numel(), start):
        torch.bitwise_and(numbers[part], pool[masks], out=results[part])
    return kept
