"""Measure what would be trained on: tokens by role, truncation, end-of-turn tokens, and duplicate rows.

Rows, tokens and labels come from the same calls as in train.py.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset

from finetune.config import Config, DataConfig
from finetune.data.conversations import Row, to_conversation
from finetune.data.duplicates import most_similar, same_after_normalizing
from finetune.data.preparing.chunks import CHUNK_ROWS
from finetune.data.preparing.examples import Examples
from finetune.data.reading.batches import read_formatted
from finetune.data.reading.sources import eval_sources, training_sources
from finetune.data.rows import Rows, answer_of, instruction_of, iterate_rows, load_rows, prompt_of
from finetune.data.splits import tokenize_splits
from finetune.data.templates.anatomy import ROLES, Anatomy, Kept, dissect, keep
from finetune.data.templates.tokenize import IGNORE, Tokens

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
    """The measurements of an audit. `figures` has one line for each row that makes examples, indexed by row
    number:

    - split, source;
    - num_examples, num_branches: the examples that it makes, and the earlier answers that are trained as they
      were when they were the last;
    - full_length, num_tokens, num_targets: tokens before cutting, after it, and target tokens;
    - num_ends, num_trained_ends: answers with an end-of-turn token, and with a trained one;
    - last_end: "trained", "untrained", or "none" if the template writes no end-of-turn token; "" of a row
      without turns;
    - for each role, its tokens (`user`) and its trained tokens (`user trained`).

    `sets` are the examples of both splits. `dropped` has row numbers by reason: rows without text and rows
    left without a target. `remarks` has row numbers by what the chat template did with the row.
    """

    config: Config
    rows: Rows
    sets: dict[str, Examples]
    figures: pd.DataFrame
    dropped: dict[str, list[int]]
    remarks: dict[str, list[int]]
    likeness: dict[str, Likeness]

    @cached_property
    def split_of(self) -> dict[int, str]:
        """The split, train or eval, of each row that was taken"""
        splits = {"train": self.rows.train, "eval": self.rows.eval}
        return {number: split for split, rows in splits.items() for number in rows["row_number"]}

    def cut_rows(self) -> list[tuple[int, int, int, str]]:
        """Return (row number, tokens lost, full length, last_end) of each cut row, by row number."""
        figures = self.figures.assign(lost=self.figures["full_length"] - self.figures["num_tokens"])
        cut = figures[figures["lost"] > 0].sort_index()
        return list(zip(cut.index, cut["lost"], cut["full_length"], cut["last_end"], strict=True))


def measure(config: Config, tokenizer: Any) -> Audit:
    """Read, tokenize and compare the rows that train.py would use.

    Raises:
        ValueError: as `load_rows` and `tokenize_splits`.
    """
    rows = load_rows(config.data, config.eval.sets)
    sets = dict(zip(("train", "eval"), tokenize_splits(rows, tokenizer, config.data), strict=True))
    remarks: dict[str, list[int]] = defaultdict(list)
    figures = pd.DataFrame(
        [
            line
            for split, table in (("train", rows.train), ("eval", rows.eval))
            for line in measure_rows(split, table, sets[split], tokenizer, config.data, remarks)
        ]
    ).set_index("row_number")
    dropped: dict[str, list[int]] = defaultdict(list)
    for reasons in (rows.dropped, *(examples.dropped for examples in sets.values())):
        for reason, numbers in reasons.items():
            dropped[reason] = sorted(dropped[reason] + numbers)
    likeness = {name: compare_rows(rows, text_of) for name, text_of in COMPARED.items()}
    return Audit(config, rows, sets, figures, dict(dropped), dict(remarks), likeness)


def measure_rows(
    split: str,
    table: Dataset,
    examples: Examples,
    tokenizer: Any,
    config: DataConfig,
    remarks: dict[str, list[int]],
) -> Iterator[dict[str, Any]]:
    """Yield the line of `Audit.figures` for each row of a split that has examples, and add to `remarks`."""
    numbers = examples.dataset["row_number"]
    rows = zip(iterate_rows(table), table["source"], strict=True)
    for number, own in groupby(range(len(numbers)), key=lambda place: numbers[place]):
        # The examples are in the order of the rows, some of which have none.
        row, source = next(pair for pair in rows if pair[0]["row_number"] == number)
        anatomy = dissect(tokenizer, to_conversation(row, config.system_prompt), config.train_on)
        kept = keep(anatomy.tokens, config.max_length)
        for place, measured in zip(own, kept.examples, strict=True):
            _require_same(examples.dataset[place], measured, anatomy.tokens.input_ids)
        for remark in anatomy.tokens.remarks:
            remarks[remark].append(number)
        yield {"row_number": number, "split": split, "source": source, **_measured(anatomy, kept)}


def _require_same(example: Mapping[str, Any], measured: Tokens, input_ids: list[int]) -> None:
    """What is measured is what is trained on. `measured` has positions among `input_ids`."""
    assert example["input_ids"] == [input_ids[position] for position in measured.input_ids]
    assert [label != IGNORE for label in example["labels"]] == [label != IGNORE for label in measured.labels]


def _measured(anatomy: Anatomy, kept: Kept) -> dict[str, Any]:
    """The figures of one row."""
    roles = Counter(itertools.compress(anatomy.roles, kept.in_example))
    of_trained = Counter(itertools.compress(anatomy.roles, kept.trained))
    ends = [end is not None and kept.trained[end] for end in anatomy.ends_of_turn]
    written = [end is not None for end in anatomy.ends_of_turn]
    return {
        "num_examples": len(kept.examples),
        "num_branches": len(anatomy.tokens.branches),
        "full_length": len(anatomy.tokens.input_ids),
        "num_tokens": sum(kept.in_example),
        "num_targets": sum(kept.trained),
        "num_ends": sum(written),
        "num_trained_ends": sum(ends),
        "last_end": ""
        if not written
        else "none"
        if not written[-1]
        else "trained"
        if ends[-1]
        else "untrained",
        **{role: roles[role] for role in ROLES},
        **{f"{role} trained": of_trained[role] for role in ROLES},
    }


def find_rows(audit: Audit, numbers: Collection[int]) -> dict[int, Row]:
    """The rows of these numbers. Those that were dropped or not drawn are read again."""
    found: dict[int, Row] = {}
    for table in (audit.rows.train, audit.rows.eval):
        places = np.flatnonzero(np.isin(table["row_number"][:], list(numbers)))
        found |= {row["row_number"]: row for row in iterate_rows(table.select(places))}
    missing = set(numbers) - found.keys()
    sources = [*training_sources(audit.config.data), *eval_sources(audit.config.data, audit.config.eval.sets)]
    before = 0
    for source in sources if missing else ():
        for batch, format_ in read_formatted(source, CHUNK_ROWS):
            own = missing.intersection(range(before + 1, before + batch.num_rows + 1))
            for number, (place, raw) in enumerate(batch.rows() if own else (), before + 1):
                if number in own:
                    found[number] = {**format_.convert(raw, place)[0], "row_number": number}
            before += batch.num_rows
    return found


def compare_rows(rows: Rows, text_of: Callable[[Mapping[str, Any]], str]) -> Likeness:
    """Find the rows of both splits that are alike in `text_of`."""
    splits = {"train": rows.train, "eval": rows.eval}
    texts = {name: [text_of(row) for row in iterate_rows(split)] for name, split in splits.items()}
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
