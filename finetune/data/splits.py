"""The data of a run: rows, split into train and eval, and the examples they become."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finetune.config import Config, DataConfig
from finetune.data.duplicates import Match
from finetune.data.preparing.chunks import workers_kept
from finetune.data.preparing.encoding import RowError
from finetune.data.preparing.examples import Examples, tokenize_rows
from finetune.data.preparing.row_tables import cache_folder, column_of
from finetune.data.rows import Rows, find_leaks, load_rows
from finetune.runtime.locks import preparing


@dataclass(frozen=True)
class Data:
    """Rows and examples of both splits. `leaks` are the eval rows that are trained on too, by row number."""

    rows: Rows
    train: Examples
    eval: Examples
    leaks: dict[int, Match]

    def dropped(self) -> Counter[str]:
        """How many rows were left out, by reason."""
        dropped: Counter[str] = Counter()
        for source in (self.rows, self.train, self.eval):
            dropped.update({reason: len(numbers) for reason, numbers in source.dropped.items()})
        return dropped

    def unused(self) -> Counter[str]:
        """What is in rows and is not used, or is written otherwise by the chat template: in how many rows."""
        return self.rows.unused + self.train.unused + self.eval.unused

    def taken(self) -> list[int]:
        """How many rows of each source were taken, in the order of `rows.source_names`, where one of
        data.eval_path may have the name of one that is trained on."""
        sources = np.r_[column_of(self.rows.train, "source"), column_of(self.rows.eval, "source")]
        counts: list[int] = np.bincount(sources, minlength=len(self.rows.source_names)).tolist()
        return counts

    def counts(self) -> dict[str, Any]:
        """What became of the rows that were read, for the record."""
        return {
            "read": self.rows.num_read,
            "usable": self.rows.num_kept,
            "sources": [
                {"name": name, "format": form, "taken": count}
                for name, form, count in zip(
                    self.rows.source_names, self.rows.formats, self.taken(), strict=True
                )
            ],
            "dropped": dict(self.dropped()),
            "unused": dict(self.unused()),
            "cut": len(self.train.truncated) + len(self.eval.truncated),
            "leaks": len(self.leaks),
        }


def load_data(config: Config, tokenizer: Any) -> Data:
    """Read, clean, sample, split and tokenize the rows of a configuration.

    Of the processes that share a cache of `datasets`, one does so at a time; the others find its rows there.

    Raises:
        ValueError: as `load_rows` and `tokenize_splits`; or under `strict`, something in them is not used.
    """
    sections = (config.data, config.eval, config.model)
    lock = cache_folder({"prepared": [asdict(section) for section in sections]}).with_suffix(".lock")
    with preparing(lock), workers_kept():
        rows = load_rows(config.data, config.eval.sets)
        train_set, eval_set = tokenize_splits(rows, tokenizer, config.data)
        data = Data(rows, train_set, eval_set, find_leaks(rows))
    if config.strict and (unused := data.unused()):
        raise ValueError(f"--strict: not used of the rows: {in_words(unused)}")
    return data


def in_words(counts: Mapping[str, int]) -> str:
    """Counts of rows with what they are of, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{what} ({count:,} rows)" for what, count in ordered)


def tokenize_splits(rows: Rows, tokenizer: Any, config: DataConfig) -> tuple[Examples, Examples]:
    """The examples to train on and to evaluate on.

    Raises:
        ValueError: as `tokenize_rows`, or a split that has rows and no example.
    """
    splits = {"train": rows.train, "eval": rows.eval}
    try:
        with workers_kept():
            sets = {
                name: tokenize_rows(split, tokenizer, config, rows.source_names)
                for name, split in splits.items()
            }
    except RowError as error:
        if place := rows.place_of(error.number):
            raise ValueError(f"row {error.number} ({place}): {error.reason}") from error
        raise
    for name, examples in sets.items():
        if len(splits[name]) > 0 and len(examples.dataset) == 0:
            reasons = ", ".join(f"{len(numbers)} {reason}" for reason, numbers in examples.dropped.items())
            raise ValueError(f"no example is left in the {name} split ({reasons}); raise data.max_length")
    return sets["train"], sets["eval"]


def fingerprint_of(train_set: Examples, eval_set: Examples) -> dict[str, Any]:
    """What tells the examples of one run from those of another."""
    return {
        "train_examples": len(train_set.dataset),
        "eval_examples": len(eval_set.dataset),
        "fingerprint": f"{train_set.fingerprint}-{eval_set.fingerprint}",
    }
