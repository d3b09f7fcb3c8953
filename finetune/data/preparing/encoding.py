"""What the processes of a preparation do: rows to tokens and labels, a chunk at a time.

Each of them imports this, so it imports no torch and no datasets.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from finetune.data.conversations import to_conversation
from finetune.data.preparing.chunk_files import unpacked, with_counts
from finetune.data.templates.chat_template import stop_ids
from finetune.data.templates.tokenize import IGNORE, Tokens, cut, encode_batch

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "row_number": pa.int64(),
        "source": pa.int32(),
        "branches": pa.list_(pa.list_(pa.int32())),
        "is_cut": pa.bool_(),  # the row has lost tokens
        "target_count": pa.int32(),
        "first_target": pa.int32(),  # its position; the length where there is none
    }
)

WORDS_KEPT = 200_000


class RowError(ValueError):
    """What is wrong with row `number`."""

    def __init__(self, number: int, reason: str):
        super().__init__(number, reason)
        self.number, self.reason = number, reason

    def __str__(self) -> str:
        return f"row {self.number}: {self.reason}"


@dataclass(frozen=True)
class EncodeRows:
    """The job that encodes rows and cuts them at `max_length`."""

    tokenizer: Any
    system_prompt: str | None
    train_on: str
    max_length: int

    def depends_on(self) -> dict[str, Any]:
        """All that the tokens of a row depend on."""
        return {
            "tokenizer": hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "stop_ids": sorted(stop_ids(self.tokenizer)),
            "special_tokens": self.tokenizer.special_tokens_map,
            "chat_template": self.tokenizer.chat_template,
            "system_prompt": self.system_prompt,
            "train_on": self.train_on,
            "max_length": self.max_length,
        }

    def __call__(self, rows: bytes) -> pa.Table:
        """Examples, with the columns of SCHEMA, of a table of rows, `packed`.

        Raises:
            RowError: a row that `encode` refuses.
        """
        _remember_words(self.tokenizer)
        table = unpacked(rows)
        numbers, sources, texts = (table[name].to_pylist() for name in ("row_number", "source", "row"))
        conversations = [to_conversation(json.loads(text), self.system_prompt) for text in texts]
        encoded = encode_batch(self.tokenizer, conversations, self.train_on)
        columns: dict[str, Any] = {name: [] for name in SCHEMA.names[:-2]}
        remarks: Counter[str] = Counter()
        for number, source, whole in zip(numbers, sources, encoded, strict=True):
            if isinstance(whole, ValueError):
                raise RowError(number, str(whole)) from whole
            remarks.update(whole.remarks)
            pieces = cut(whole, self.max_length)
            columns["input_ids"] += [piece.input_ids for piece in pieces]
            columns["labels"] += [piece.labels for piece in pieces]
            columns["branches"] += [piece.branches for piece in pieces]
            columns["row_number"] += [number] * len(pieces)
            columns["source"] += [source] * len(pieces)
            columns["is_cut"] += [_loses(whole, pieces)] * len(pieces)
        columns |= {name: _as_lists(columns[name]) for name in ("input_ids", "labels")}
        examples = pa.table(columns, pa.schema(list(SCHEMA)[:-2]))
        counts, firsts = target_counts(examples).astype(np.int32), first_targets(examples).astype(np.int32)
        examples = examples.append_column(SCHEMA.field("target_count"), pa.array(counts))
        examples = examples.append_column(SCHEMA.field("first_target"), pa.array(firsts))
        return with_counts(examples, {"remarks": remarks})


def _remember_words(tokenizer: Any) -> None:
    """Let the tokenizer keep the tokens of more words than the 10,000 that it keeps by default: large data
    has several times as many, and a third of the time goes into those."""
    model = tokenizer.backend_tokenizer.model
    if hasattr(model, "_resize_cache"):
        model._resize_cache(WORDS_KEPT)


def _as_lists(lists: list[list[int]]) -> pa.Array:
    """As pyarrow makes of them itself, which takes three times as long."""
    ends = np.cumsum([0, *map(len, lists)])
    values = np.fromiter(chain.from_iterable(lists), np.int32, int(ends[-1]))
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values))


def _loses(whole: Tokens, pieces: Sequence[Tokens]) -> bool:
    """Whether the pieces lack something of a conversation; those of a plain text have all of it."""
    if whole.is_text or (len(pieces) == 1 and pieces[0] is whole):
        return False
    return not whole.branches or sum(map(_num_targets, pieces)) < _num_targets(whole)


def _num_targets(tokens: Tokens) -> int:
    return sum(label != IGNORE for label in tokens.labels)


def lengths(table: pa.Table) -> NDArray[np.int64]:
    """[N]: tokens of each example."""
    return np.asarray(pc.list_value_length(table["input_ids"]).to_numpy(), dtype=np.int64)


def flat(table: pa.Table, column: str) -> NDArray[np.int64]:
    """The lists of a column one after the other."""
    return np.asarray(pc.list_flatten(table[column]).to_numpy(), dtype=np.int64)


def target_counts(table: pa.Table) -> NDArray[np.int64]:
    """[N]: target tokens of each example."""
    before = np.r_[0, np.cumsum(flat(table, "labels") != IGNORE)]
    ends = np.cumsum(lengths(table))
    return np.asarray(before[ends] - before[ends - lengths(table)], dtype=np.int64)


def first_targets(table: pa.Table) -> NDArray[np.int64]:
    """[N]: the position of each example's first target; its length if there is none."""
    if "first_target" in table.column_names:
        return np.asarray(table["first_target"].to_numpy(), dtype=np.int64)
    targets = np.flatnonzero(flat(table, "labels") != IGNORE)
    ends = np.cumsum(lengths(table))
    starts = ends - lengths(table)
    following = np.r_[targets, np.iinfo(np.int64).max][np.searchsorted(targets, starts)]
    return np.asarray(np.minimum(following, ends) - starts, dtype=np.int64)
