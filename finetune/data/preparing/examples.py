"""Rows as tokenized examples: memory-mapped, with what is known of each."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from finetune.config import DataConfig
from finetune.data.preparing.chunk_files import read_in_parts, write_record
from finetune.data.preparing.chunks import CHUNK_ROWS, join_chunks, make_chunks, spans
from finetune.data.preparing.encoding import SCHEMA, EncodeRows, first_targets, flat, lengths, target_counts
from finetune.data.preparing.row_tables import cache_folder, column_of, digest_of, table_chunks
from finetune.data.segments import MIN_SHARED, SequenceSizes, sequence_sizes
from finetune.data.templates.written import is_left_out

TOKENS_AT_ONCE = 1 << 20  # gone through together: as text, they take twenty times the memory
COLUMNS = ["input_ids", "labels", "row_number", "source", "branches"]


class Figures(NamedTuple):
    """What preparing N examples found out about them: see the properties of Examples."""

    lengths: NDArray[np.int64]
    target_counts: NDArray[np.int64]
    shared_prefix: int
    fingerprint: str


@dataclass(frozen=True)
class Examples:
    """Tokenized rows that fit, and what happened to the others.

    `dataset` has the columns input_ids, labels, row_number, source (an index of `source_names`) and branches
    (see `Tokens`). Of its examples, those of the rows `truncated` were cut at max_length; `dropped` are the
    numbers of the rows left out, by reason. `unused` counts the rows of which the chat template left
    something out or changed it, by what that was.
    """

    dataset: Dataset
    truncated: list[int]
    dropped: dict[str, list[int]]
    source_names: Sequence[str] = ()
    unused: Counter[str] = field(default_factory=Counter)
    prepared: Figures | None = None
    """None: they are measured when they are asked for"""

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N]: tokens of each example."""
        if self.prepared is not None:
            return self.prepared.lengths
        return _concatenated([lengths(table) for table in self._tables()])

    @cached_property
    def target_counts(self) -> NDArray[np.int64]:
        """[N]: target tokens of each example."""
        if self.prepared is not None:
            return self.prepared.target_counts
        return _concatenated([target_counts(table) for table in self._tables()])

    @cached_property
    def sources(self) -> NDArray[np.int64]:
        """[N]: the source of each example."""
        if "source" not in self.dataset.column_names:
            return np.zeros(len(self.dataset), np.int64)
        return column_of(self.dataset, "source").astype(np.int64)

    @cached_property
    def shared_prefix(self) -> int:
        """Tokens that all examples begin with and that predict no target; 0 if below MIN_SHARED."""
        return self.prepared.shared_prefix if self.prepared is not None else shared_prefix(self._tables())

    @cached_property
    def sequence_sizes(self) -> SequenceSizes | None:
        """What the examples are in the padded layout; None if none has a branch."""
        if "branches" not in self.dataset.column_names:
            return None
        # Most data has none, which all rows of the files together tell at once.
        if not pc.any(pc.greater(pc.list_value_length(self.dataset.data.column("branches")), 0)).as_py():
            return None
        return sequence_sizes(self.lengths, self.dataset["branches"])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids, labels and branches, in order."""
        return self.prepared.fingerprint if self.prepared is not None else fingerprint(self._tables())

    def _tables(self) -> Iterator[pa.Table]:
        yield from self.dataset.with_format("arrow").iter(CHUNK_ROWS)


def _branches(table: pa.Table) -> list[list[list[int]]]:
    """The branches of those examples that have any."""
    if "branches" not in table.column_names:
        return []
    column = table["branches"]
    some: list[list[list[int]]] = column.filter(pc.greater(pc.list_value_length(column), 0)).to_pylist()
    return some


def _concatenated(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def shared_prefix(tables: Iterator[pa.Table]) -> int:
    """See Examples."""
    prefix: NDArray[np.int64] | None = None
    for table in tables:
        if len(table) == 0:
            continue
        ids, sizes = flat(table, "input_ids"), lengths(table)
        starts = np.cumsum(sizes) - sizes
        if prefix is None:
            prefix = ids[: sizes[0]]
        # As `shareable` has it: what follows them or branches off is predicted by none of the shared tokens.
        attach = [attach for branches in _branches(table) for _, attach in branches]
        ends = np.r_[np.minimum(sizes, first_targets(table) - 1), np.array(attach, np.int64) - 1]
        prefix = prefix[: max(0, int(ends.min()))]
        for place in range(len(prefix)):
            if (ids[starts + place] != prefix[place]).any():
                prefix = prefix[:place]
                break
        if len(prefix) < MIN_SHARED:
            return 0
    return 0 if prefix is None else len(prefix)


def fingerprint(tables: Iterator[pa.Table]) -> str:
    """SHA-256 of the examples as JSON objects, each `{"input_ids": [...], "labels": [...]}`, with "branches"
    before them where it has any."""
    digest = hashlib.sha256()
    for table in tables:
        if len(table) == 0:
            continue
        lists = [table["branches"].to_pylist()] if "branches" in table.column_names else [[[]] * len(table)]
        branches = [f'"branches": {json.dumps(pairs)}, ' if pairs else "" for pairs in lists[0]]
        columns = [_as_json(table, column) for column in ("input_ids", "labels")]
        parts = ("{", branches, '"input_ids": [', columns[0], '], "labels": [', columns[1], "]}")
        arrays = [pa.scalar(part) if isinstance(part, str) else pa.array(part) for part in parts]
        text = pc.binary_join_element_wise(*arrays, "")
        digest.update("".join(text.to_pylist()).encode())
    return digest.hexdigest()


def _as_json(table: pa.Table, column: str) -> pa.Array:
    """The numbers of each list, separated as `json.dumps` does."""
    lists = table[column].combine_chunks()
    offsets = np.r_[0, np.cumsum(lengths(table))].astype(np.int32)
    texts = pc.cast(lists.flatten(), pa.string())
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), texts), ", ")


def tokenize_rows(
    rows: Dataset, tokenizer: Any, config: DataConfig, source_names: Sequence[str] = ()
) -> Examples:
    """Encode every row of a table, truncate or drop the overlong ones, and drop those without a target token.

    The tokens are memory-mapped from the cache of `datasets`, which the first call writes.

    Raises:
        RowError: a row that `encode` refuses, or there is no chat template.
    """
    if len(rows) == 0:
        empty = Dataset(SCHEMA.empty_table()).select_columns(COLUMNS)
        return Examples(empty, [], {}, source_names)
    job = EncodeRows(tokenizer, config.system_prompt, config.train_on, config.max_length)
    folder = cache_folder({"rows": digest_of(rows), **job.depends_on()})
    make = partial(make_chunks, folder, table_chunks(rows), job, "Tokenizing", len(rows))
    file = folder / "examples.arrow"
    remarks = join_chunks(file, SCHEMA, make, _all_remarks)
    return _keep(file, remarks, config, source_names)


def _all_remarks(counts_of_chunks: Iterator[Any]) -> Counter[str]:
    remarks: Counter[str] = Counter()
    for counts in counts_of_chunks:
        remarks.update(counts["remarks"])
    return remarks


def _keep(
    file: Path, remarks: Mapping[str, int], config: DataConfig, source_names: Sequence[str]
) -> Examples:
    """The examples that the configuration takes of those in the file."""
    whole = Dataset.from_file(str(file))
    table = whole.data.table
    is_cut, counts = table["is_cut"].to_numpy(), table["target_count"].to_numpy()
    overlong = is_cut if config.overlong == "drop" else np.zeros(len(is_cut), bool)
    untrained = ~overlong & (counts == 0)
    kept = ~overlong & ~untrained
    # In most data every row is kept whole, and their numbers need not be looked at.
    numbers = table["row_number"].to_numpy() if is_cut.any() or not kept.all() else np.zeros(0, np.int64)
    dropped: dict[str, list[int]] = {}
    for reason, left_out in (
        (f"over {config.max_length} tokens", overlong),
        ("without a target token", untrained),
    ):
        if left_out.any() and (without_any := _without_any(numbers, left_out, kept)):
            dropped[reason] = without_any
    derived = _derived(file, kept, file.with_name(f"{config.overlong}.json"))
    dataset = whole.select_columns(COLUMNS)
    return Examples(
        dataset=dataset if kept.all() else dataset.select(np.flatnonzero(kept)),
        truncated=_distinct(numbers[kept & is_cut]) if is_cut.any() else [],
        dropped=dropped,
        source_names=source_names,
        unused=Counter({remark: n for remark, n in remarks.items() if is_left_out(remark)}),
        prepared=Figures(
            lengths=lengths(table) if kept.all() else lengths(table)[kept],
            target_counts=counts[kept].astype(np.int64),
            shared_prefix=derived["shared_prefix"],
            fingerprint=derived["fingerprint"],
        ),
    )


def _without_any(
    numbers: NDArray[np.int64], left_out: NDArray[np.bool_], kept: NDArray[np.bool_]
) -> list[int]:
    """The rows of which examples are left out and none is kept."""
    some = numbers[left_out]
    return _distinct(some[~np.isin(some, numbers[kept])])


def _distinct(numbers: NDArray[np.int64]) -> list[int]:
    return list(dict.fromkeys(numbers.tolist()))


def _derived(file: Path, kept: NDArray[np.bool_], record: Path) -> dict[str, Any]:
    """What all kept examples of the file have to be gone through for, once: it is left in `record`."""
    if not record.exists():
        derived = {
            "shared_prefix": shared_prefix(_kept_tables(file, kept)),
            "fingerprint": fingerprint(_kept_tables(file, kept)),
        }
        write_record(record, derived)
    result: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return result


def _kept_tables(file: Path, kept: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """The kept examples of the file, few in memory at a time."""
    first = 0
    for table in read_in_parts(file):
        for start, end in spans(lengths(table), CHUNK_ROWS, TOKENS_AT_ONCE):
            part = table.slice(start, end - start)
            yield part.filter(pa.array(kept[first + start : first + end]))
        first += len(table)
