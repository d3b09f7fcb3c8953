"""Measure what would be trained on: tokens by role, truncation, end-of-turn tokens, and duplicate rows.

Rows, tokens and labels come from the same calls as in train.py.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
from datasets import Dataset

from finetune.config import Config, DataConfig
from finetune.data.duplicates import most_similar, same_after_normalizing
from finetune.data.examples import Examples
from finetune.data.rows import Rows, answer_of, instruction_of, load_rows, prompt_of
from finetune.data.splits import tokenize_splits
from finetune.data.tokenize import IGNORE, ROLES, dissect, encode, to_messages

# The texts by which rows are compared, the strictest comparison first.
COMPARED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "prompt and answer": lambda row: f"{prompt_of(row)}\n\N{RIGHTWARDS ARROW}\n{answer_of(row)}",
    "prompt": prompt_of,
    "instruction": instruction_of,
}
# Rows are compared within each split. Eval rows are also compared with train rows: a match is a leak.
SCOPES = ("train", "eval", "leak")


class Likeness(NamedTuple):
    """The row numbers of rows that are alike in one of COMPARED.

    `same` has groups of rows, of any split, that are equal after `normalize`. `near` maps, for each of
    SCOPES, a row to the most similar row and the similarity (at least NEAR), if no row equals it.
    """

    same: list[list[int]]
    near: dict[str, dict[int, tuple[int, float]]]


@dataclass(frozen=True)
class Audit:
    """The measurements of an audit. `examples` has one line for each example, indexed by row number:

    - split;
    - full_length, num_tokens, num_targets: tokens before cutting, after it, and target tokens;
    - num_ends, num_trained_ends: assistant turns with an end-of-turn token, and with a trained one;
    - last_end: "trained", "untrained", or "none" if the template writes no end-of-turn token;
    - for each role, its tokens (`user`) and its trained tokens (`user trained`).

    `dropped` has row numbers by reason: rows without text and rows left without a target.
    """

    config: Config
    rows: Rows
    examples: pd.DataFrame
    dropped: dict[str, list[int]]
    likeness: dict[str, Likeness]

    @cached_property
    def split_of(self) -> dict[int, str]:
        """The split, train or eval, of each row that was taken"""
        splits = {"train": self.rows.train, "eval": self.rows.eval}
        return {number: split for split, rows in splits.items() for number in rows["row_number"]}

    def cut_rows(self) -> list[tuple[int, int, int, str]]:
        """Return (row number, tokens lost, full length, last_end) of each cut example, by row number."""
        figures = self.examples.assign(lost=self.examples["full_length"] - self.examples["num_tokens"])
        cut = figures[figures["lost"] > 0].sort_index()
        return list(zip(cut.index, cut["lost"], cut["full_length"], cut["last_end"], strict=True))


def measure(config: Config, tokenizer: Any) -> Audit:
    """Read, tokenize and compare the rows that train.py would use.

    Raises:
        ValueError: as `load_rows` and `tokenize_splits`.
    """
    rows = load_rows(config.data, config.eval.sets)
    splits = {"train": rows.train, "eval": rows.eval}
    sets = dict(zip(splits, tokenize_splits(rows, tokenizer, config.data), strict=True))
    examples = pd.DataFrame(
        [
            figures
            for split in splits
            for figures in measure_examples(split, splits[split], sets[split], tokenizer, config.data)
        ]
    ).set_index("row_number")
    dropped: dict[str, list[int]] = defaultdict(list)
    for reasons in (rows.dropped, *(split.dropped for split in sets.values())):
        for reason, numbers in reasons.items():
            dropped[reason] = sorted(dropped[reason] + numbers)
    likeness = {name: compare_rows(rows, text_of) for name, text_of in COMPARED.items()}
    return Audit(config, rows, examples, dict(dropped), likeness)


def measure_examples(
    split: str, rows: Dataset, examples: Examples, tokenizer: Any, config: DataConfig
) -> Iterator[dict[str, Any]]:
    """Yield the line of `Audit.examples` for each example of a split."""
    row_of = {row["row_number"]: row for row in rows}
    for example in examples.dataset:
        messages = to_messages(row_of[example["row_number"]], config.system_prompt)
        tokens = encode(tokenizer, messages, config.train_on)
        anatomy = dissect(tokenizer, messages, config.train_on)
        cut = slice(config.max_length)
        # The counts use the example's own labels, so that the audit measures what training does.
        assert len(anatomy.roles) == len(tokens.input_ids)
        assert example["input_ids"] == tokens.input_ids[cut]
        assert example["labels"] == tokens.labels[cut]
        trained = [label != IGNORE for label in example["labels"]]
        roles = anatomy.roles[cut]
        of_trained = [role for role, is_trained in zip(roles, trained, strict=True) if is_trained]
        ends = [end is not None and end < len(trained) and trained[end] for end in anatomy.ends_of_turn]
        written = [end is not None for end in anatomy.ends_of_turn]
        yield {
            "row_number": example["row_number"],
            "split": split,
            "full_length": len(tokens.input_ids),
            "num_tokens": len(trained),
            "num_targets": len(of_trained),
            "num_ends": sum(written),
            "num_trained_ends": sum(ends),
            "last_end": "none" if not any(written[-1:]) else "trained" if ends[-1] else "untrained",
            **{role: roles.count(role) for role in ROLES},
            **{f"{role} trained": of_trained.count(role) for role in ROLES},
        }


def compare_rows(rows: Rows, text_of: Callable[[Mapping[str, Any]], str]) -> Likeness:
    """Find the rows of both splits that are alike in `text_of`."""
    splits = {"train": rows.train, "eval": rows.eval}
    texts = {name: [text_of(row) for row in split] for name, split in splits.items()}
    numbers = {name: list(split["row_number"]) for name, split in splits.items()}
    every = [*numbers["train"], *numbers["eval"]]
    groups = same_after_normalizing([*texts["train"], *texts["eval"]])
    near: dict[str, dict[int, tuple[int, float]]] = {}
    for scope, of, among in (("train", "train", None), ("eval", "eval", None), ("leak", "eval", "train")):
        matches = most_similar(texts[of], texts[among] if among else None)
        near[scope] = {
            number: (numbers[among or of][match.position], match.similarity)
            for number, match in zip(numbers[of], matches, strict=True)
            if match is not None and not match.exact
        }
    return Likeness([sorted(every[position] for position in group) for group in groups], near)


def same_in_scope(
    group: Sequence[int], scope: str, split_of: Mapping[int, str]
) -> tuple[list[int], list[int]]:
    """Return the rows of a group of equal rows that a scope is about, and the rows it compares them with.

    Both are empty if no row has another one to be compared with.
    """
    of, among = ("eval", "train") if scope == "leak" else (scope, scope)
    rows = [number for number in group if split_of[number] == of]
    others = [number for number in group if split_of[number] == among]
    return (rows, others) if rows and others and (of != among or len(rows) > 1) else ([], [])
