"""Rows from files or a hub data set: cleaned, sampled, and split into train and eval.

A row is a Row, and `row_number` its place in the data, from 1.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, Features, Value, disable_progress_bars

from finetune.config import DataConfig, described
from finetune.data.cleaning import reason_to_ask_nothing, reason_to_drop
from finetune.data.conversations import Row
from finetune.data.duplicates import Match, most_similar, normalize
from finetune.data.reading import read_formatted
from finetune.data.sources import Source, training_sources


@dataclass(frozen=True)
class Rows:
    """The rows of a run, and what happened to those that were read.

    `num_read` rows were read and `dropped` (row numbers, by reason) of them left out; of the rest, `train`
    and `eval` are the sample, split.
    """

    train: Dataset
    eval: Dataset
    num_read: int
    dropped: dict[str, list[int]]

    @property
    def num_kept(self) -> int:
        return self.num_read - sum(len(numbers) for numbers in self.dropped.values())


def load_rows(config: DataConfig) -> Rows:
    """Read, clean, sample and split the rows that the configuration names.

    The sample is `pandas.DataFrame.sample(n=num_samples, random_state=sample_seed)` of the clean rows and
    the split is `datasets.Dataset.train_test_split(test_size=eval_fraction, seed=split_seed)` of it: the
    same rows in the same order as those calls give.

    Raises:
        ValueError: a file or data set that cannot be read, columns of no known format, a cell of the wrong
            type, fewer clean rows than asked for, or none.
    """
    disable_progress_bars()
    clean, dropped = _read(training_sources(config), reason_to_drop)
    num_read = len(clean) + sum(map(len, dropped.values()))
    if len(clean) == 0:
        reasons = ", ".join(f"{len(numbers)} {reason}" for reason, numbers in dropped.items())
        raise ValueError(f"{described(config.path)} has no usable row: {num_read} read ({reasons})")
    sample = sample_rows(clean, config.num_samples, config.sample_seed)
    split = split_rows if config.split_by == "row" else split_rows_by_instruction
    train, evaluation = split(sample, config.eval_fraction, config.split_seed)
    return Rows(train=train, eval=evaluation, num_read=num_read, dropped=dropped)


def _read(
    sources: list[Source], reason_to_drop: Callable[[Row], str | None], questions_only: bool = False
) -> tuple[Dataset, dict[str, list[int]]]:
    kept: list[dict[str, Any]] = []
    dropped: dict[str, list[int]] = defaultdict(list)
    number = 0
    for index, source in enumerate(sources):
        for batch, format_ in read_formatted(source, 1000, questions_only):
            for place, raw in batch.rows():
                number += 1
                row, _ = format_.convert(raw, place)
                if reason := reason_to_drop(row):
                    dropped[reason].append(number)
                else:
                    kept.append({"row_number": number, "source": index, "row": json.dumps(row)})
    columns = Features(row_number=Value("int64"), source=Value("int32"), row=Value("string"))
    cells = {column: [entry[column] for entry in kept] for column in columns}
    return Dataset.from_dict(cells, features=columns), dict(dropped)


def iterate_rows(table: Dataset) -> Iterator[Row]:
    """The rows of a table of load_rows, in its order."""
    for entry in table:
        yield {**json.loads(entry["row"]), "row_number": entry["row_number"]}


def read_questions(file: str) -> tuple[Dataset, dict[str, list[int]]]:
    """The rows of a file that contain a question, as `load_rows` returns them, and the numbers of the others,
    by reason. Answers, and their column, may be missing.

    Raises:
        ValueError: as `load_rows`.
    """
    return _read(training_sources(DataConfig(path=file)), reason_to_ask_nothing, questions_only=True)


def sample_rows(table: Dataset, num_samples: int | None, seed: int) -> Dataset:
    """`num_samples` rows, the same in the same order as `pandas.DataFrame.sample` draws; None takes all."""
    if num_samples is None:
        return table
    if num_samples > len(table):
        raise ValueError(f"data.num_samples is {num_samples}, but only {len(table)} rows are usable")
    return table.select(pd.Series(range(len(table))).sample(n=num_samples, random_state=seed).tolist())


def split_rows(table: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and eval rows as `datasets.Dataset.train_test_split` makes them; a fraction of 0 keeps all for
    training."""
    if eval_fraction == 0:
        return table, table.select([])
    if len(table) < 2:
        raise ValueError(f"{len(table)} row cannot be split; set data.eval_fraction to 0 or bring more rows")
    try:
        split = table.train_test_split(test_size=eval_fraction, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"data.eval_fraction {eval_fraction} leaves no row to train on, of {len(table)}"
        ) from error
    return split["train"], split["test"]


def split_rows_by_instruction(table: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and eval rows such that no instruction, normalized, is on both sides.

    Instructions are drawn in an order that depends on the seed, and go to the eval side while the rows that
    have them still fit into its share.
    """
    if eval_fraction == 0:
        return table, table.select([])
    rows_of: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(iterate_rows(table)):
        rows_of[normalize(instruction_of(row))].append(index)
    groups = list(rows_of.values())
    share = math.ceil(eval_fraction * len(table))  # as train_test_split rounds
    chosen: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)):
        if len(chosen) + len(groups[group]) <= share:
            chosen += groups[group]
    if not 0 < len(chosen) < len(table):
        raise ValueError(
            f"data.split_by instruction cannot put {eval_fraction:.0%} of {len(table)} rows aside: they have "
            f"{len(groups)} different instruction(s); set data.split_by to row or data.eval_fraction to 0"
        )
    held_out = set(chosen)
    return table.select([i for i in range(len(table)) if i not in held_out]), table.select(sorted(chosen))


def instruction_of(row: Mapping[str, Any]) -> str:
    """The row's instruction, without its input; of messages, the first user turn."""
    if "messages" in row:
        return next((m["content"] or "" for m in row["messages"] if m["role"] == "user"), "")
    return str(row["prompt"] if "completion" in row else row["instruction"])


def prompt_of(row: Mapping[str, Any]) -> str:
    """All that precedes the row's last answer: instruction and input, or the turns before it."""
    if "messages" in row:
        turns = [m["content"] or "" for m in row["messages"] if m["role"] != "system"]
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        last -= sum(m["role"] == "system" for m in row["messages"][:last])
        return "\n".join(turns[:last])
    if "completion" in row:
        return str(row["prompt"])
    return "\n".join(filter(None, (row["instruction"], row["input"])))


def answer_of(row: Mapping[str, Any]) -> str:
    """The row's last answer."""
    if "messages" in row:
        return str(next(m["content"] for m in reversed(row["messages"]) if m["role"] == "assistant"))
    return str(row["completion"] if "completion" in row else row["output"])


def find_leaks(rows: Rows) -> dict[int, Match]:
    """Eval rows whose prompt, exactly or nearly, is trained on: row number -> its match in rows.train."""
    matches = most_similar(
        [prompt_of(row) for row in iterate_rows(rows.eval)],
        [prompt_of(row) for row in iterate_rows(rows.train)],
    )
    return {number: match for number, match in zip(rows.eval["row_number"], matches, strict=True) if match}
