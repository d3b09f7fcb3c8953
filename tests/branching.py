"""Random examples with branches, and what each of their tokens attends to, by plain loops."""

from typing import Any

import torch
from hypothesis import strategies as st
from tiny import NAMES, VOCABULARY, sums_one_by_one
from torch import Tensor

from finetune.data.templates.tokenize import IGNORE

Comb = dict[str, Any]

tokens = st.integers(0, VOCABULARY - 1)


@st.composite
def combs(draw: st.DrawFn, beginning: list[int], most: int = 12) -> Comb:
    """A trunk behind untrained tokens, and up to four branches; most tokens behind the trunk are targets.

    Branches mostly attach behind the beginning, where they do not keep it from being shared.
    """
    trunk = draw(st.lists(tokens, min_size=2, max_size=most))
    ids, length = beginning + trunk, len(beginning) + len(trunk)
    is_target = [False] * len(beginning) + [False, *(draw(st.booleans()) for _ in trunk[1:])]
    branches = []
    for _ in range(draw(st.integers(0, 4))):
        own = draw(st.lists(tokens, min_size=1, max_size=most))
        lowest = len(beginning) + 1 if draw(st.integers(0, 9)) else 0
        attach = draw(st.integers(lowest, length))
        branches.append([len(ids), attach])
        ids = ids + own
        is_target += [attach + place > 0 and draw(st.integers(0, 3)) > 0 for place in range(len(own))]
    labels = [token if target else IGNORE for token, target in zip(ids, is_target, strict=True)]
    return {"input_ids": ids, "labels": labels, "branches": branches}


def lists_of_combs(most: int = 12) -> Any:
    """One to four examples; they may begin with the same tokens."""
    beginnings = st.just([]) | st.lists(tokens, min_size=9, max_size=20)
    return beginnings.flatmap(lambda beginning: st.lists(combs(beginning, most), min_size=1, max_size=4))


def paths(example: Comb) -> list[list[int]]:
    """For the trunk and each branch, the places in the example of all the tokens up to its last one."""
    starts = [start for start, _ in example["branches"]]
    ends = [*starts, len(example["input_ids"])]
    trunk = list(range(ends[0]))
    return [trunk] + [
        trunk[:attach] + list(range(start, end))
        for (start, attach), end in zip(example["branches"], ends[1:], strict=True)
    ]


def by_hand(example: Comb) -> list[dict[str, list[int]]]:
    """The trunk and each branch as an example of its own; what a branch continues is not trained there."""
    ids, labels = example["input_ids"], example["labels"]
    contexts = [0, *(attach for _, attach in example["branches"])]
    return [
        {
            "input_ids": [ids[place] for place in path],
            "labels": [IGNORE] * context + [labels[place] for place in path[context:]],
        }
        for path, context in zip(paths(example), contexts, strict=True)
    ]


def sums_by_hand(model: Any, examples: list[Comb]) -> Tensor:
    """[E, 4] fp64: nll, entropy, correct and count of each example, its sequences computed one by one."""
    rows = []
    for example in examples:
        trained = [one for one in by_hand(example) if any(label != IGNORE for label in one["labels"])]
        sums = sums_one_by_one(model, trained)
        rows.append(torch.stack([sums[name] for name in NAMES]))
    return torch.stack(rows)
