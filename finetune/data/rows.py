"""Rows from files or hub data sets: cleaned, sampled, and split into train and eval.

A row is a Row, and `row_number` its place in the data, from 1. A table of rows has the columns row_number,
source (an index of `Rows.source_names`) and row (as JSON text); `iterate_rows` and `row_at` read it.
"""

import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray

from finetune.config import DataConfig
from finetune.data.conversations import SYSTEM_ROLES, Row
from finetune.data.duplicates import NUM_HASHES, Match, Signatures, find_matches, normalize, sign
from finetune.data.preparing.chunk_files import read_chunk, unpacked, write_chunk
from finetune.data.preparing.chunks import make_chunks
from finetune.data.preparing.row_tables import (
    ReadSources,
    cache_folder,
    column_of,
    digest_of,
    read_questions_of,
    read_sources,
    table_chunks,
)
from finetune.data.reading.cleaning import reason_to_ask_nothing
from finetune.data.reading.sources import Source, eval_sources, training_sources


@dataclass(frozen=True)
class Rows:
    """The rows of a run, and what happened to those that were read.

    `num_read` rows were read and `dropped` (row numbers, by reason) of them left out; of the rest, `train`
    and `eval` are the sample, split, and the rows of `data.eval_path` and `eval.sets`. `formats` are those of
    the sources; `unused` counts the rows that have a column or key that is not used. `files` are those that
    were read, with the number of their first row, in ascending order.
    """

    train: Dataset
    eval: Dataset
    num_read: int
    dropped: dict[str, list[int]]
    source_names: Sequence[str] = ()
    formats: Sequence[str] = ()
    unused: Counter[str] = field(default_factory=Counter)
    files: Sequence[tuple[int, str]] = ()

    @property
    def num_kept(self) -> int:
        return self.num_read - sum(len(numbers) for numbers in self.dropped.values())

    def place_of(self, number: int) -> str:
        """Where a row was read, where that is not clear: its file and its row there."""
        if len(self.files) < 2:
            return ""
        first, file = self.files[bisect_right(self.files, number, key=lambda entry: entry[0]) - 1]
        return f"{file}, row {number - first + 1}"


def load_rows(config: DataConfig, eval_sets: Mapping[str, str | list[str]] | None = None) -> Rows:
    """Read, clean, sample and split the rows that the configuration and `eval.sets` name.

    The sample is `pandas.DataFrame.sample(n=num_samples, random_state=sample_seed)` of the clean rows and
    the split is `datasets.Dataset.train_test_split(test_size=eval_fraction, seed=split_seed)` of it: the
    same rows in the same order as those calls give. Where sources have a number or a share of their own, the
    sample is drawn of each, from sample_seed and the place of the source alone. All rows of data.eval_path
    and eval.sets are eval rows, behind those of the split.

    Raises:
        ValueError: a file or data set that cannot be read, columns of no known format, a cell of the wrong
            type, fewer clean rows than asked for, or a source without any.
    """
    disable_progress_bars()
    training, evaluation = training_sources(config), eval_sources(config, eval_sets)
    sources = [*training, *evaluation]
    read = read_sources(sources, config.system_prompt)
    source_of = column_of(read.table, "source")
    limits = np.searchsorted(source_of, np.arange(len(sources) + 1))
    for place, source in enumerate(sources):
        if limits[place] == limits[place + 1]:
            raise ValueError(_nothing_left(read, place, source))
    clean = read.table.select(range(limits[len(training)]))
    if all(source.num_samples is None and source.share is None for source in training):
        sample = sample_rows(clean, config.num_samples, config.sample_seed)
    else:
        counts = _counts(training, np.diff(limits)[: len(training)].tolist(), config.num_samples)
        drawn = [_draw(limits, place, count, config.sample_seed) for place, count in enumerate(counts)]
        sample = clean.select(np.concatenate(drawn))
    split = split_rows if config.split_by == "row" else split_rows_by_instruction
    train, held_out = split(sample, config.eval_fraction, config.split_seed)
    if evaluation:
        counts = _counts(evaluation, np.diff(limits)[len(training) :].tolist(), None)
        drawn = [
            _draw(limits, place, count, config.sample_seed)
            for place, count in enumerate(counts, len(training))
        ]
        places = np.searchsorted(column_of(read.table, "row_number"), column_of(held_out, "row_number"))
        held_out = read.table.select(np.concatenate([places, *drawn]))
    return Rows(
        train=train,
        eval=held_out,
        num_read=sum(read.num_read),
        dropped=read.dropped,
        source_names=[source.name for source in sources],
        formats=read.formats,
        unused=read.unused,
        files=read.files,
    )


def _nothing_left(read: ReadSources, place: int, source: Source) -> str:
    first = sum(read.num_read[:place])
    last = first + read.num_read[place]
    own = {r: sum(first < n <= last for n in numbers) for r, numbers in read.dropped.items()}
    reasons = ", ".join(f"{count} {reason}" for reason, count in own.items() if count)
    where = ", ".join(source.files) or source.dataset
    return f"{where} has no usable row: {read.num_read[place]} read{f' ({reasons})' if reasons else ''}"


def _counts(sources: Sequence[Source], usable: Sequence[int], num_samples: int | None) -> list[int | None]:
    """How many rows are drawn of each source, of those `usable`; None takes all in their order.

    Shares are of `num_samples` rows, or of as many as the sources allow.
    """
    if all(source.share is None for source in sources):
        for source, count in zip(sources, usable, strict=True):
            if source.num_samples is not None and source.num_samples > count:
                raise ValueError(
                    f"num_samples of {source.name} is {source.num_samples}, but only {count} rows are usable"
                )
        return [source.num_samples for source in sources]
    shares = [source.share or 0.0 for source in sources]
    if num_samples is None:
        most = min(count / share for count, share in zip(usable, shares, strict=True))
        counts = [math.floor(share * most + 1e-6) for share in shares]
    else:
        ends = [round(math.fsum(shares[: place + 1]) * num_samples) for place in range(len(shares))]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for source, count, has in zip(sources, counts, usable, strict=True):
        if count == 0:
            raise ValueError(f"the share {source.share} of {source.name} is not one row of {sum(counts)}")
        if count > has:
            raise ValueError(
                f"data.num_samples is {num_samples}, of which the share of {source.name} is {count}, but "
                f"only {has} of its rows are usable"
            )
    return list(counts)


def _draw(limits: NDArray[np.int64], place: int, count: int | None, seed: int) -> NDArray[np.int64]:
    """`count` positions of a source's rows, at random; None gives all in their order."""
    start, end = limits[place], limits[place + 1]
    if count is None:
        return np.arange(start, end)
    return np.asarray(start + np.random.default_rng([seed, place]).permutation(end - start)[:count])


def iterate_rows(table: Dataset) -> Iterator[Row]:
    """The rows of a table, in order, each with its `row_number`."""
    for batch in table.select_columns(["row_number", "row"]).with_format("arrow").iter(1_000):
        for number, text in zip(batch["row_number"].to_pylist(), batch["row"].to_pylist(), strict=True):
            yield {**json.loads(text), "row_number": number}


def row_at(table: Dataset, index: int) -> Row:
    """One row of a table, with its `row_number`."""
    entry = table[index]
    return {**json.loads(entry["row"]), "row_number": entry["row_number"]}


def read_questions(
    file: str, columns: dict[str, str] | None
) -> tuple[Dataset, dict[str, list[int]], Counter[str]]:
    """The rows of a file that contain a question, as `load_rows` returns them; the numbers of the others, by
    reason; and how many rows have a column or key that is not used. Answers, and their column, may be
    missing. `columns` are those of `data.columns`.

    Raises:
        ValueError: as `load_rows`.
    """
    sources = training_sources(DataConfig(path=file, columns=columns))
    return read_questions_of(sources, reason_to_ask_nothing)


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
    """The row's instruction, without its input; of messages, the first user turn; a plain text as it is."""
    if "text" in row:
        return str(row["text"])
    if "messages" in row:
        return next((text_of(turn) for turn in row["messages"] if turn["role"] == "user"), "")
    return str(row["prompt"] if "completion" in row else row["instruction"])


def prompt_of(row: Mapping[str, Any]) -> str:
    """All that precedes the row's last answer: its history, instruction and input, or the turns before it,
    without the system's; a plain text as it is."""
    if "text" in row:
        return str(row["text"])
    if "messages" in row:
        last = max(turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return "\n".join(text_of(turn) for turn in row["messages"][:last] if turn["role"] not in SYSTEM_ROLES)
    if "completion" in row:
        return str(row["prompt"])
    history = [text for pair in row.get("history") or [] for text in pair]
    return "\n".join(filter(None, (*history, row["instruction"], row["input"])))


def answer_of(row: Mapping[str, Any]) -> str:
    """The row's last answer; "" of a plain text."""
    if "text" in row:
        return ""
    if "messages" in row:
        return text_of(next(turn for turn in reversed(row["messages"]) if turn["role"] == "assistant"))
    return str(row["completion"] if "completion" in row else row["output"])


def text_of(message: Mapping[str, Any]) -> str:
    """What a turn says: its reasoning, its content and its tool calls, each on lines of its own."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    called = [f"{call['name']}({_as_json(call.get('arguments'))})" for call in calls]
    return "\n".join(filter(None, (message.get("reasoning_content"), message["content"], *called)))


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True)
class SignPrompts:
    """The job that makes the signatures of rows' prompts."""

    def __call__(self, rows: bytes) -> pa.Table:
        prompts = [prompt_of(json.loads(text)) for text in unpacked(rows)["row"].to_pylist()]
        signatures = sign(prompts)
        hashes = pa.FixedSizeListArray.from_arrays(signatures.hashes.reshape(-1), signatures.hashes.shape[1])
        return pa.table({"digest": signatures.digests, "hashes": hashes})


def find_leaks(rows: Rows) -> dict[int, Match]:
    """Eval rows whose prompt, exactly or nearly, is trained on: row number -> its match in rows.train.

    What was found is kept in the cache of `datasets`.
    """
    if len(rows.train) == 0 or len(rows.eval) == 0:
        return {}
    digests = [digest_of(part) for part in (rows.train, rows.eval)]
    folder = cache_folder({"leaks": digests})
    file = folder / "leaks.arrow"
    if not file.exists():
        parts = zip((rows.train, rows.eval), digests, strict=True)
        corpus, wanted = (_signatures(part, digest) for part, digest in parts)
        asked, trained = (partial(_prompts_at, part) for part in (rows.eval, rows.train))
        found = list(find_matches(wanted, corpus, asked, trained))
        columns = {
            "eval": pa.array([place for place, _ in found], pa.int64()),
            "train": pa.array([match.position for _, match in found], pa.int64()),
            "similarity": pa.array([match.similarity for _, match in found], pa.float64()),
            "exact": pa.array([match.exact for _, match in found], pa.bool_()),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_chunk(file, pa.table(columns))
    leaks = read_chunk(file)
    numbers = column_of(rows.eval, "row_number")
    matches = (leaks[column].to_pylist() for column in ("train", "similarity", "exact"))
    return {
        int(numbers[place]): Match(*match)
        for place, *match in zip(leaks["eval"].to_pylist(), *matches, strict=True)
    }


def _prompts_at(rows: Dataset, places: Sequence[int]) -> list[str]:
    texts = rows.with_format("arrow")[places]["row"].to_pylist() if places else []
    return [prompt_of(json.loads(text)) for text in texts]


def _signatures(rows: Dataset, digest: str) -> Signatures:
    """Those of the rows' prompts."""
    folder = cache_folder({"signatures": digest})
    chunks_of_rows = table_chunks(rows)
    paths = make_chunks(folder, chunks_of_rows, SignPrompts(), "Comparing prompts", len(rows), quickness=10)
    digests = np.empty(len(rows), np.uint64)
    hashes = np.empty((len(rows), NUM_HASHES), np.uint8)
    start = 0
    for path in paths:  # one in memory at a time
        chunk = read_chunk(path)
        part = slice(start, start + len(chunk))
        digests[part] = chunk["digest"].to_numpy()
        hashes[part] = pc.list_flatten(chunk["hashes"]).to_numpy().reshape(len(chunk), -1)
        start += len(chunk)
    return Signatures(digests, hashes)
