"""What the processes of a preparation do: rows to tokens and labels, a chunk at a time.

Each of them imports this, so it imports no torch and no datasets.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from finetune.data.prepare import unpacked, with_counts
from finetune.data.tokenize import IGNORE, Tokens, encode, to_messages

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
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        remarks: Counter[str] = Counter()
        numbers, sources, texts = (
            unpacked(rows)[name].to_pylist() for name in ("row_number", "source", "row")
        )
        for number, source, text in zip(numbers, sources, texts, strict=True):
            try:
                messages = to_messages(json.loads(text), self.system_prompt)
                whole = encode(self.tokenizer, messages, self.train_on)
            except ValueError as error:
                raise RowError(number, str(error)) from error
            pieces = [Tokens(whole.input_ids[: self.max_length], whole.labels[: self.max_length])]
            is_cut = len(whole.input_ids) > self.max_length
            for piece in pieces:
                targets = [place for place, label in enumerate(piece.labels) if label != IGNORE]
                columns["input_ids"].append(piece.input_ids)
                columns["labels"].append(piece.labels)
                columns["row_number"].append(number)
                columns["source"].append(source)
                columns["branches"].append([])
                columns["is_cut"].append(is_cut)
                columns["target_count"].append(len(targets))
                columns["first_target"].append(targets[0] if targets else len(piece.labels))
        return with_counts(pa.table(columns, SCHEMA), {"remarks": remarks})
