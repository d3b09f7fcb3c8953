"""Numbers that look random, computed from others."""

import numpy as np
from numpy.typing import NDArray


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """The upper half of numbers whose every bit depends on all bits of those given (the finalizer of
    SplitMix64, Steele et al. 2014)."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (numbers >> np.uint64(32)).astype(np.uint32)
