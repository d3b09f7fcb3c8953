"""The order of the examples in an epoch: random, and the same each time, whoever computes it."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finetune.data.mixing import mix

# The order of up to so many examples is a permutation in memory (32 MiB). Of more, what an update takes is
# computed when it is needed.
MAX_PERMUTED = 2**22
FEISTEL_ROUNDS = 6  # four make a pseudorandom permutation of a pseudorandom function (Luby and Rackoff 1988)


def examples_at(seed: int, epoch: int, num_examples: int, start: int, stop: int) -> NDArray[np.int64]:
    """The examples at the positions from `start` to before `stop` of an epoch's order.

    The order depends on the first three numbers alone. Positions behind its end are left out.
    """
    if num_examples <= MAX_PERMUTED:
        return epoch_order(seed, epoch, num_examples)[start:stop]
    return scattered(np.arange(start, min(stop, num_examples)), num_examples, seed, epoch)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_examples: int) -> NDArray[np.int64]:
    """The order of the examples in an epoch as a permutation."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def scattered(positions: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """[len(positions)]: where a bijection of 0 to count - 1, keyed by seed and epoch, takes each position.

    It is a Feistel network on the numbers below the next power of 4. One that it takes to `count` or above
    goes through it again ("cycle-walking", Black and Rogaway 2002): on average, fewer than four times in all.
    """
    half_bits = np.uint64(-(-(count - 1).bit_length() // 2))
    keys = np.random.default_rng([seed, epoch]).integers(0, 2**64, FEISTEL_ROUNDS, np.uint64)
    numbers = _feistel(positions.astype(np.uint64), half_bits, keys)
    while (outside := numbers >= count).any():
        numbers[outside] = _feistel(numbers[outside], half_bits, keys)
    return numbers.astype(np.int64)


def _feistel(
    numbers: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A bijection of the numbers of twice `half_bits` bits."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return left << half_bits | right
