"""Files and hub data sets as tables of rows: read, checked, and reduced to the columns of a format."""

import difflib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, load_dataset

from finetune.data.cleaning import reason_to_drop

# Required and optional columns of each format. If several match, the first is taken.
FORMATS = {
    "messages": (("messages",), ()),
    "instruction": (("instruction", "output"), ("input",)),
    "completion": (("prompt", "completion"), ()),
}


FILE_SUFFIXES = (".csv", ".parquet", ".json", ".jsonl")


def read_rows(path: str | list[str]) -> Dataset:
    """All rows of the files or the hub data set, with the columns of one of FORMATS and `row_number`."""
    if isinstance(path, str) and not is_local(path):
        table = _keep_format(_read_hub(path), path)
    else:
        files = [path] if isinstance(path, str) else path
        tables = [to_table(read_file(file), file) for file in files]
        for file, other in zip(files, tables, strict=True):
            if other.column_names != tables[0].column_names:
                raise ValueError(
                    f"{file} has the columns {other.column_names}, {files[0]} has {tables[0].column_names}"
                )
        table = concatenate_datasets(tables)
    return table.add_column("row_number", list(range(1, len(table) + 1)))


def read_column(path: str | list[str], column: str) -> list[str]:
    """Any column of the files or the hub data set as text, missing cells as ""; row n is at index n - 1.

    Raises:
        ValueError: as `read_rows`, or there is no such column.
    """
    if isinstance(path, str) and not is_local(path):
        tables = {path: _read_hub(path).to_pandas()}
    else:
        tables = {file: read_file(file) for file in ([path] if isinstance(path, str) else path)}
    for file, table in tables.items():
        if column not in table.columns:
            names = ", ".join(map(str, table.columns))
            raise ValueError(f"{file} has no column {column!r}; there are {names}")
    cells = pd.concat([table[column].astype(object) for table in tables.values()])
    return ["" if cell is None or cell is pd.NA or cell != cell else str(cell).strip() for cell in cells]


def to_table(frame: pd.DataFrame, file: str) -> Dataset:
    """The frame's rows with the columns of its format; the other columns may hold anything."""
    columns = _format_columns(list(frame.columns), file)
    frame = frame[columns].reset_index(drop=True)
    if "messages" in columns:
        frame["messages"] = [_role_and_content(cell) for cell in frame["messages"]]
    try:
        table = Dataset.from_pandas(frame, preserve_index=False)
    except (
        pa.ArrowException,
        UnicodeError,
        OverflowError,
    ) as error:  # a cell of another type, or invalid Unicode
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        for number, row in enumerate(rows, 1):
            reason_to_drop({"row_number": number, **{column: row[column] for column in columns}})
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return _keep_format(table, file)


def _role_and_content(messages: Any) -> Any:
    """Messages reduced to role and content; `clean_rows` refuses what is not a list of objects."""
    if not isinstance(messages, list | np.ndarray):
        return messages
    return [
        {"role": message.get("role"), "content": message.get("content")}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def is_local(path: str) -> bool:
    """Whether `data.path` names a file rather than a hub data set."""
    return Path(path).exists() or path.lower().endswith(FILE_SUFFIXES)


def read_file(file: str) -> pd.DataFrame:
    path = Path(file)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"data.path {file} is a folder; name the files in it")
    if path.exists() and not path.is_file():  # reading a pipe would wait for its writer
        raise ValueError(f"data.path {file} is no ordinary file")
    if suffix not in FILE_SUFFIXES:
        raise ValueError(f"data.path {file} is none of {', '.join(FILE_SUFFIXES)}")
    try:
        with path.open("rb"):
            pass  # for some formats pandas does not report a missing file
        if path.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
        if suffix == ".csv":
            # As the seeds read it: pandas treats empty cells and words such as "n/a" as missing.
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
        except UnicodeEncodeError:  # a cell of invalid Unicode, which `to_table` finds and names
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
    """The objects of a JSON array or of JSON lines, distinguished by the first character."""
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
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, ...
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
    """The columns that make up a row of one of FORMATS."""
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


def described(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)
