"""Slices of the eval examples, for separate figures: by length, by input, by any column of the data."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset
from numpy.typing import NDArray

from finetune.data.by_source import several_sources
from finetune.data.preparing.examples import Examples
from finetune.data.rows import iterate_rows

MAX_VALUES = 12  # the most frequent values of a column; the others form one slice


class Slice(NamedTuple):
    name: str
    members: NDArray[np.bool_]
    """[E]: which examples belong to it"""


def by_length(lengths: NDArray[np.int64]) -> list[Slice]:
    """Quartiles of the examples' lengths [E]; equal lengths stay together."""
    quartile = pd.qcut(lengths, 4, labels=False, duplicates="drop")
    groups = [quartile == number for number in np.unique(quartile[~np.isnan(quartile)])]
    return [Slice(f"{lengths[group].min()} to {lengths[group].max()} tokens", group) for group in groups]


def by_input(rows: Dataset, examples: Examples) -> list[Slice]:
    """Examples with and without an input; no slices if no row can have one."""
    inputs = {row["row_number"]: row["input"] for row in iterate_rows(rows) if "input" in row}
    if not inputs:
        return []
    numbers = examples.dataset["row_number"]
    has = np.array([bool((inputs.get(number) or "").strip()) for number in numbers], dtype=bool)
    return [Slice("with input", has), Slice("without input", ~has)]


def by_source(examples: Examples) -> list[Slice]:
    """The examples of each source and eval set."""
    return [Slice(name, examples.sources == source) for source, name in several_sources(examples).items()]


def by_leak(leaks: Mapping[int, object], examples: Examples) -> list[Slice]:
    """Examples that are also in the train rows, and the others."""
    leaked = np.array([number in leaks for number in examples.dataset["row_number"]], dtype=bool)
    return [Slice("trained on too", leaked), Slice("not trained on", ~leaked)]


def by_value(column: str, values: Sequence[str], examples: Examples) -> list[Slice]:
    """One slice for each frequent value of a column, most frequent first; values[n - 1] is that of row n."""
    own = np.array([values[number - 1] for number in examples.dataset["row_number"]], dtype=object)
    frequent = [value for value, _ in Counter(own.tolist()).most_common(MAX_VALUES)]
    names = [textwrap.shorten(value, 40, placeholder=" ...") or "(empty)" for value in frequent]
    slices = [Slice(f"{column} = {name}", own == value) for name, value in zip(names, frequent, strict=True)]
    others = ~np.isin(own, frequent)
    num_values = len(set(own[others].tolist()))
    return [*slices, Slice(f"{num_values} other values", others)]


def without_trivial(slices: Sequence[Slice]) -> list[Slice]:
    """The slices that hold some of the examples, but not all."""
    return [one for one in slices if one.members.any() and not one.members.all()]
