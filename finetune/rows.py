"""From files or a hub data set to clean rows, a sample of them, and the split into train and eval.

A row has the columns of one of FORMATS, and `row_number`: its place in the data, from 1.
"""

import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset

from finetune.config import DataConfig
from finetune.duplicates import Match, most_similar, normalise

# Required columns of each format, and the optional ones. Where several fit, the first is taken.
FORMATS = {
    "messages": (("messages",), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "completion": (("prompt", "completion"), ()),
}
FILE_SUFFIXES = (".csv", ".parquet", ".json", ".jsonl")


@dataclass(frozen=True)
class Rows:
    """The rows of a run, and what became of all that were read.

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
    table = read_rows(config.path)
    clean, dropped = clean_rows(table)
    if len(clean) == 0:
        reasons = ", ".join(f"{len(numbers)} {reason}" for reason, numbers in dropped.items())
        reasons = reasons or "the file is empty"
        raise ValueError(f"{_described(config.path)} has no usable row: {len(table)} read ({reasons})")
    sample = sample_rows(clean, config.num_samples, config.sample_seed)
    split = split_rows if config.split_by == "row" else split_rows_by_instruction
    train, evaluation = split(sample, config.eval_fraction, config.split_seed)
    return Rows(train=train, eval=evaluation, num_read=len(table), dropped=dropped)


def read_rows(path: str | list[str]) -> Dataset:
    """All rows of the files or the hub data set, with the columns of one of FORMATS and `row_number`."""
    if isinstance(path, str) and not is_local(path):
        table = _keep_format(_read_hub(path), path)
    else:
        files = [path] if isinstance(path, str) else path
        tables = [_to_table(_read_file(file), file) for file in files]
        for file, other in zip(files, tables, strict=True):
            if other.column_names != tables[0].column_names:
                raise ValueError(
                    f"{file} has the columns {other.column_names}, {files[0]} has {tables[0].column_names}"
                )
        table = concatenate_datasets(tables)
    return table.add_column("row_number", list(range(1, len(table) + 1)))


def read_questions(file: str) -> tuple[Dataset, dict[str, list[int]]]:
    """The rows of a file that ask something, as `read_rows` gives them, and the numbers of the others, by
    reason. They may have an answer or lack it, and its column too.

    Raises:
        ValueError: as `load_rows`.
    """
    frame = _read_file(file)
    if not any(set(required) <= set(frame.columns) for required, _ in FORMATS.values()):
        for question, answer in (("instruction", "output"), ("prompt", "completion")):
            if question in frame.columns:
                frame[answer] = ""
                break
    table = _to_table(frame, file)
    return _sort_out(table.add_column("row_number", list(range(1, len(table) + 1))), _reason_to_ask_nothing)


def read_column(path: str | list[str], column: str) -> list[str]:
    """Any column of the files or the hub data set as text, missing cells as "": that of row n at n - 1.

    Raises:
        ValueError: as `read_rows`, or there is no such column.
    """
    if isinstance(path, str) and not is_local(path):
        tables = {path: _read_hub(path).to_pandas()}
    else:
        tables = {file: _read_file(file) for file in ([path] if isinstance(path, str) else path)}
    for file, table in tables.items():
        if column not in table.columns:
            names = ", ".join(map(str, table.columns))
            raise ValueError(f"{file} has no column {column!r}; there are {names}")
    cells = pd.concat([table[column].astype(object) for table in tables.values()])
    return ["" if cell is None or cell is pd.NA or cell != cell else str(cell).strip() for cell in cells]


def _to_table(frame: pd.DataFrame, file: str) -> Dataset:
    """The frame's rows with the columns of its format; the other columns may hold anything."""
    columns = _format_columns(list(frame.columns), file)
    frame = frame[columns].reset_index(drop=True)
    if "messages" in columns:
        frame["messages"] = [_role_and_content(cell) for cell in frame["messages"]]
    try:
        table = Dataset.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, UnicodeError, OverflowError) as error:  # a cell of another type, or no Unicode
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        for number, row in enumerate(rows, 1):
            _reason_to_drop({"row_number": number, **{column: row[column] for column in columns}})
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return _keep_format(table, file)


def _role_and_content(messages: Any) -> Any:
    """Messages without their other keys; what is no list of objects is left for `clean_rows` to refuse."""
    if not isinstance(messages, list | np.ndarray):
        return messages
    return [
        {"role": message.get("role"), "content": message.get("content")}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def is_local(path: str) -> bool:
    """Whether `data.path` names a file, not a data set of the hub."""
    return Path(path).exists() or path.lower().endswith(FILE_SUFFIXES)


def _read_file(file: str) -> pd.DataFrame:
    path = Path(file)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"data.path {file} is a folder; name the files in it")
    if path.exists() and not path.is_file():  # to read a pipe is to wait for one who writes
        raise ValueError(f"data.path {file} is no ordinary file")
    if suffix not in FILE_SUFFIXES:
        raise ValueError(f"data.path {file} is none of {', '.join(FILE_SUFFIXES)}")
    try:
        with path.open("rb"):
            pass  # pandas does not say of every kind of file that it is not there
        if path.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
        if suffix == ".csv":
            # As the seeds read it: pandas takes empty cells and words like "n/a" for missing.
            frame = pd.read_csv(path, dtype=str)
            if not isinstance(frame.index, pd.RangeIndex):
                raise ValueError(f"{file} has more cells in its rows than names in its header")
            return frame
        if suffix == ".parquet":
            return pd.read_parquet(path)
        text = path.read_text(encoding="utf-8-sig")
        objects = _json_objects(text, file)
        if not objects:
            raise ValueError(f"{file} is empty")
        try:
            return pd.DataFrame(objects)
        except UnicodeEncodeError:  # a cell that is no Unicode, which `_to_table` finds and names
            return pd.DataFrame(objects, dtype=object)
    except OSError as error:
        raise ValueError(f"data.path {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {_first_bad_byte(path)})") from error
    except ValueError as error:  # also pandas' ParserError and EmptyDataError, and pyarrow's ArrowInvalid
        message = " ".join(str(error).split())
        raise ValueError(
            message if message.startswith(file) else f"{file} cannot be read: {message}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{file} cannot be read: its brackets are nested too deep") from error


def _first_bad_byte(path: Path) -> int:
    try:
        path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _json_objects(text: str, file: str) -> list[dict[str, Any]]:
    """The objects of a JSON array, or of JSON lines: told apart by what the text starts with."""
    objects: list[dict[str, Any]] = []
    if text.lstrip().startswith("["):
        try:
            objects = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {error.lineno}: {error.msg}") from error
        places = [f"{file}, entry {number}" for number in range(1, len(objects) + 1)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"{file}, line {number}" for number, _ in lines]
        for (_, line), place in zip(lines, places, strict=True):
            try:
                objects.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: {error.msg} at column {error.colno}") from error
    for entry, place in zip(objects, places, strict=True):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{place}: expected an object with the columns of a row, found {str(entry)[:40]!r}"
            )
    return objects


def _read_hub(name: str) -> Dataset:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"data.path {name!r} is neither a file that exists nor the name of a hub data set")
    try:
        return load_dataset(name, split="train")
    except Exception as error:  # the hub's client raises many kinds, from no network to no such name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data.path {name!r} is no local file, and as a hub data set it could not be loaded: {reason}"
        ) from error


def _keep_format(table: Dataset, source: str) -> Dataset:
    """Only the columns of the table's format, with `input` filled in."""
    table = table.select_columns(_format_columns(table.column_names, source))
    if "output" in table.column_names and "input" not in table.column_names:
        table = table.add_column("input", [None] * len(table))
    return table


def _format_columns(found: list[str], source: str) -> list[str]:
    """Those of the columns that make a row of one of FORMATS."""
    for required, optional in FORMATS.values():
        if set(required) <= set(found):
            return [c for c in (*required, *optional) if c in found]
    known = [column for required, _ in FORMATS.values() for column in required]
    near = {c: difflib.get_close_matches(c.strip().lower(), known, n=1) for c in found}
    hints = ", ".join(f"{c!r} is near {match[0]!r}" for c, match in near.items() if match and match[0] != c)
    raise ValueError(
        f"{source} has the columns {found}; expected instruction and output (input optional), messages, or "
        f"prompt and completion{'; ' + hints if hints else ''}"
    )


def clean_rows(table: Dataset) -> tuple[Dataset, dict[str, list[int]]]:
    """The rows with something to learn from, and the numbers of the others, by reason."""
    return _sort_out(table, _reason_to_drop)


def _sort_out(
    table: Dataset, reason_to_drop: Callable[[Mapping[str, Any]], str | None]
) -> tuple[Dataset, dict[str, list[int]]]:
    """The rows without a reason to drop them, and the numbers of the others, by reason."""
    kept: list[int] = []
    dropped: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(table):
        if reason := reason_to_drop(row):
            dropped[reason].append(row["row_number"])
        else:
            kept.append(index)
    return table.select(kept), dict(dropped)


def _reason_to_drop(row: Mapping[str, Any]) -> str | None:
    if "messages" in row:
        return _reason_to_drop_messages(row)
    question, answer = ("instruction", "output") if "output" in row else ("prompt", "completion")
    for column in (question, answer, "input"):
        _require_text(row.get(column), f"row {row['row_number']}: {column}")
    if not (row[answer] or "").strip():
        return f"without {answer}"
    if not (row[question] or "").strip():
        return f"without {question}"
    return None


def _reason_to_drop_messages(row: Mapping[str, Any]) -> str | None:
    place, messages = f"row {row['row_number']}: messages", row["messages"]
    if messages is None:
        return "without messages"
    if not isinstance(messages, list):
        raise ValueError(f"{place} must be a list of objects with role and content, not {messages!r:.60}")
    if not messages:
        return "without messages"
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise ValueError(f"{place} must be a list of objects with role and content, not {message!r:.60}")
        _require_text(message["role"], f"{place}: role")
        _require_text(message.get("content"), f"{place}: content")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or any(not (message["content"] or "").strip() for message in answers):
        return "without text in an assistant turn"
    return None


def _reason_to_ask_nothing(row: Mapping[str, Any]) -> str | None:
    """As `_reason_to_drop`, whatever the row's last answer is."""
    if "messages" not in row:
        return _reason_to_drop({**row, "output" if "output" in row else "completion": "an answer"})
    turns = row["messages"]
    if not turns or not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return _reason_to_drop(row)
    asked = turns_asked(turns)
    if all(turn.get("role") == "system" for turn in asked):
        return "without a question"
    return _reason_to_drop({**row, "messages": [*asked, {"role": "assistant", "content": "an answer"}]})


def turns_asked(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages up to the last answer, or all of them where the last one is the user's."""
    if not turns or turns[-1].get("role") == "user":
        return turns
    last = max((i for i, turn in enumerate(turns) if turn.get("role") == "assistant"), default=len(turns))
    return turns[:last]


def _require_text(cell: Any, place: str) -> None:
    if not isinstance(cell, str | None):
        raise ValueError(f"{place} must be text, not {cell!r:.60}")
    try:
        (cell or "").encode()
    except UnicodeEncodeError as error:  # JSON's escapes can write half of a surrogate pair
        raise ValueError(f"{place} holds {error.object[error.start]!r}, which is no character") from error


def sample_rows(table: Dataset, num_samples: int | None, seed: int) -> Dataset:
    """`num_samples` rows, those and in the order that `pandas.DataFrame.sample` gives; None gives all."""
    if num_samples is None:
        return table
    if num_samples > len(table):
        raise ValueError(f"data.num_samples is {num_samples}, but only {len(table)} rows are usable")
    return table.select(pd.Series(range(len(table))).sample(n=num_samples, random_state=seed).tolist())


def split_rows(table: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Train and eval rows, as `datasets.Dataset.train_test_split` gives them; a fraction of 0 splits none."""
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
    """Train and eval rows such that no instruction, as `normalise` leaves it, is on both sides.

    Instructions are drawn in an order that depends on the seed, and go to the eval side while the rows that
    have them still fit into its share.
    """
    if eval_fraction == 0:
        return table, table.select([])
    rows_of: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(table):
        rows_of[normalise(instruction_of(row))].append(index)
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
    """What the row asks for, without the input that it asks it of: the first user turn of messages."""
    if "messages" in row:
        return next((m["content"] or "" for m in row["messages"] if m["role"] == "user"), "")
    return str(row["prompt"] if "completion" in row else row["instruction"])


def prompt_of(row: Mapping[str, Any]) -> str:
    """All that the row's last answer answers to: instruction and input, or the turns before it."""
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
    """Eval rows whose prompt, or one much like it, is trained on: row number -> place in rows.train."""
    matches = most_similar([prompt_of(row) for row in rows.eval], [prompt_of(row) for row in rows.train])
    return {number: match for number, match in zip(rows.eval["row_number"], matches, strict=True) if match}


def _described(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)
