"""Examples with branches, and the segments of a packed sequence.

An example is a trunk, and behind it any number of branches. A branch continues the first `attach` tokens of
the trunk: it sees these and itself, and neither the rest of the trunk nor another branch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_SHARED = 8  # tokens; a shorter prefix is not worth sharing


class Branch(NamedTuple):
    """The tokens of an example from `start` to the start of its next branch, or to its end."""

    start: int
    attach: int
    """Tokens of the trunk that it continues, up to all; with 0, its first token is no target"""


class Segment(NamedTuple):
    """Consecutive tokens of a packed sequence: a shared prefix, the trunk of an example, or a branch.

    Each of them attends to the segment's tokens up to itself, and to the `context` tokens before them, which
    are the first ones that the last token of the segment `parent` attends to. So the position of a token is
    the number of tokens that it attends to besides itself.
    """

    start: int
    """The place of its first token in the packed sequence"""
    length: int
    parent: int = -1
    """The number of an earlier segment; -1 without a context"""
    context: int = 0

    @property
    def num_keys(self) -> int:
        """Tokens that its last one attends to, itself included."""
        return self.context + self.length


def branches_of(example: Mapping[str, Any]) -> tuple[Branch, ...]:
    """The branches of an example, in order; examples without any may lack the column."""
    return tuple(Branch(*branch) for branch in example.get("branches") or ())


def segments_of(
    lengths: Sequence[int], prefix: int, branches: Sequence[Sequence[Branch]]
) -> tuple[Segment, ...]:
    """The segments of a packed sequence, in order: the shared prefix, then each trunk and its branches.

    `lengths` are the tokens of each example behind the `prefix` shared ones. `branches` are those of each
    example, or empty if none has any.
    """
    segments = [Segment(0, prefix)] if prefix > 0 else []
    beginning = len(segments) - 1  # the parent of the trunks
    first = prefix
    for number, length in enumerate(lengths):
        of_example = branches[number] if branches else ()
        ends = [*(branch.start for branch in of_example), prefix + length]
        trunk = len(segments)
        segments.append(Segment(first, ends[0] - prefix, beginning, prefix))
        for (start, attach), end in zip(of_example, ends[1:], strict=True):
            segments.append(Segment(first + start - prefix, end - start, trunk, attach))
        first += length
    return tuple(segments)


def keys_of(segments: Sequence[Segment]) -> list[NDArray[np.int64]]:
    """For each segment, the places of the tokens that its last one attends to, in the order of positions."""
    keys: list[NDArray[np.int64]] = []
    for segment in segments:
        own = np.arange(segment.start, segment.start + segment.length)
        keys.append(
            np.concatenate([keys[segment.parent][: segment.context], own]) if segment.context else own
        )
    return keys


def shareable(input_ids: list[int], first_target: int, branches: Iterable[Sequence[int]]) -> list[int]:
    """The tokens that an example begins with and that may be shared with others.

    The last shared token predicts the first one that is not, so that must not be a target either; the same
    holds for the first token of a branch.
    """
    end = min([first_target, *(attach for _, attach in branches)])
    return input_ids[: max(0, end - 1)]


class SequenceSizes(NamedTuple):
    """What N examples are as sequences without branches, as the padded layout needs them."""

    counts: NDArray[np.int64]
    """[N]: sequences of each example: its trunk, and each branch behind the tokens that it continues"""
    widths: NDArray[np.int64]
    """[N]: tokens of the longest of them"""


def sequence_sizes(
    lengths: NDArray[np.int64], branches: Iterable[Sequence[Sequence[int]]]
) -> SequenceSizes | None:
    """The sizes of N examples of these lengths [N]; None if none of them has a branch."""
    counts, widths = np.ones_like(lengths), lengths.copy()
    for number, of_example in enumerate(branches):
        if of_example:
            starts = [start for start, _ in of_example]
            ends = [*starts[1:], int(lengths[number])]
            continued = (attach + end - start for (start, attach), end in zip(of_example, ends, strict=True))
            counts[number], widths[number] = 1 + len(starts), max(starts[0], *continued)
    return SequenceSizes(counts, widths) if (counts > 1).any() else None
