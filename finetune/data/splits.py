"""The data of a run: rows, split into train and eval, and the examples they become."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from finetune.config import DataConfig
from finetune.data.duplicates import Match
from finetune.data.examples import Examples, tokenize_rows
from finetune.data.rows import Rows, find_leaks, load_rows


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

    def counts(self) -> dict[str, Any]:
        """What became of the rows that were read, for the record."""
        return {
            "read": self.rows.num_read,
            "usable": self.rows.num_kept,
            "dropped": dict(self.dropped()),
            "cut": len(self.train.truncated) + len(self.eval.truncated),
            "leaks": len(self.leaks),
        }


def load_data(config: DataConfig, tokenizer: Any) -> Data:
    """Read, clean, sample, split and tokenize the rows of a configuration.

    Raises:
        ValueError: as `load_rows` and `tokenize_splits`.
    """
    rows = load_rows(config)
    train_set, eval_set = tokenize_splits(rows, tokenizer, config)
    return Data(rows, train_set, eval_set, find_leaks(rows))


def tokenize_splits(rows: Rows, tokenizer: Any, config: DataConfig) -> tuple[Examples, Examples]:
    """The examples to train on and to evaluate on.

    Raises:
        ValueError: as `tokenize_rows`, or a split that has rows and no example.
    """
    splits = {"train": rows.train, "eval": rows.eval}
    sets = {name: tokenize_rows(split, tokenizer, config) for name, split in splits.items()}
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
