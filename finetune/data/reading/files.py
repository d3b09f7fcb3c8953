"""Files and hub data sets, read in batches of rows: cheap to read in one process, to be parsed in another."""

import codecs
import gzip
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset

from finetune.data.reading.json_array import iterate_array
from finetune.data.reading.sources import Source, kind_of

BOM = codecs.BOM_UTF8
ROWS_AT_ONCE = 1000  # where one column of all rows is read
BATCH_BYTES = 4 << 20  # about; batches of longer rows have fewer


@dataclass(frozen=True)
class RawBatch(ABC):
    """Rows of one file or hub data set that follow each other, not yet parsed. It can be pickled.

    `where` is the file or data set, and its row `first_row`, counted from 1, is the first of `num_rows`.
    """

    where: str
    first_row: int
    num_rows: int

    @abstractmethod
    def objects(self) -> list[dict[str, Any]]:
        """The rows as they are written, one dict of cells each; a missing cell is None or absent.

        Raises:
            ValueError: what is wrong with a row, with its place.
        """

    def rows(self) -> list[tuple[str, dict[str, Any]]]:
        """Each row with its place in words, such as "data/a.jsonl, row 7".

        Raises:
            ValueError: as `objects`.
        """
        return [
            (f"{self.where}, row {number}", row) for number, row in enumerate(self.objects(), self.first_row)
        ]


def read_batches(source: Source, rows_per_batch: int) -> Iterator[RawBatch]:
    """All rows of a source in order, at most `rows_per_batch` in a batch and one file after another.

    Memory holds one batch, however large the file is; what is wrong further on is found when it is reached.

    Raises:
        ValueError: a file or data set that is not there, cannot be read, or holds no row.
    """
    batches = (
        _hub_batches(source, rows_per_batch) if source.dataset else _file_batches(source, rows_per_batch)
    )
    yield from batches


def _file_batches(source: Source, rows_per_batch: int) -> Iterator[RawBatch]:
    readers = {".csv": _csv_batches, ".parquet": _parquet_batches}
    for file in source.files:
        read = readers.get(kind_of(file) or "", _json_batches)
        with _errors_of(file, source.key):
            with Path(file).open("rb"):
                pass  # for some formats pandas does not report a missing file
            batches = read(file, rows_per_batch) if Path(file).stat().st_size else iter(())
            first = next(batches, None)
            if first is None:
                raise ValueError(f"{file} is empty")
            yield first
            yield from batches


@contextmanager
def _errors_of(file: str, key: str) -> Iterator[None]:
    """What reading a file can raise, as a ValueError that begins with its name, or the key's."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {_first_bad_byte(file)})") from error
    except (OSError, EOFError) as error:  # EOFError: a .gz that was cut
        raise ValueError(f"{key} {file}: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:  # also pandas' ParserError and EmptyDataError, and pyarrow's ArrowInvalid
        message = " ".join(str(error).split())
        if message.startswith(file):
            raise ValueError(message) from error
        raise ValueError(f"{file} cannot be read: {message}") from error
    except RecursionError as error:
        raise ValueError(f"{file} cannot be read: its brackets are nested too deep") from error
    except pa.ArrowException as error:  # those that are no ValueError: not implemented, a key that is missing
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _open(file: str) -> io.BufferedReader:
    """The file's bytes, decompressed."""
    if file.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(file, "rb"))
    if file.lower().endswith(".zst"):
        return io.BufferedReader(pa.input_stream(file, compression="zstd"))
    return Path(file).open("rb")


def _first_bad_byte(file: str) -> int:
    """The place, in the text as it was before compression, of the first byte that is not UTF-8."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(file) as stream:
        while True:
            held = len(decoder.getstate()[0])  # of a character that the last piece began
            piece = stream.read(1 << 20)
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                return read - held + error.start
            if not piece:
                return read
            read += len(piece)


# --- CSV ---


@dataclass(frozen=True)
class _Frame(RawBatch):
    frame: pd.DataFrame

    def objects(self) -> list[dict[str, Any]]:
        cells = self.frame.astype(object).where(self.frame.notna(), None)
        names = list(cells.columns)
        return [dict(zip(names, row, strict=True)) for row in cells.itertuples(index=False, name=None)]


def _csv_batches(file: str, rows_per_batch: int) -> Iterator[RawBatch]:
    # As the seeds read it: pandas treats empty cells and words such as "n/a" as missing.
    with _open(file) as stream, pd.read_csv(stream, dtype=str, chunksize=rows_per_batch) as frames:
        first = 1
        for frame in frames:
            if not isinstance(frame.index, pd.RangeIndex):
                raise ValueError(f"{file} has more cells in its rows than names in its header")
            if len(frame):
                yield _Frame(file, first, len(frame), frame)
                first += len(frame)


# --- Parquet and hub data sets ---


@dataclass(frozen=True)
class _ArrowRows(RawBatch):
    stream: bytes
    """An Arrow IPC stream of these rows alone: a pickled slice of a table would carry the whole table"""

    def objects(self) -> list[dict[str, Any]]:
        rows = pa.ipc.open_stream(self.stream).read_all().to_pylist()
        return [{column: _without_nulls(cell) for column, cell in row.items()} for row in rows]


def _without_nulls(cell: Any) -> Any:
    """A cell without the keys of its objects that are null: Arrow gives every object the keys of all others.

    What only Arrow holds, such as a date within an object, becomes text, as JSON would have it.
    """
    if isinstance(cell, dict):
        return {key: _without_nulls(value) for key, value in cell.items() if value is not None}
    if isinstance(cell, list):
        return [_without_nulls(value) for value in cell]
    return cell if isinstance(cell, str | int | float | bool | None) else str(cell)


def _arrow_batches(where: str, first_row: int, table: pa.Table | pa.RecordBatch) -> Iterator[RawBatch]:
    num_rows = max(1, table.num_rows * BATCH_BYTES // max(1, table.nbytes))
    for start in range(0, table.num_rows, num_rows):
        part = table.slice(start, num_rows)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write(part)
        yield _ArrowRows(where, first_row + start, part.num_rows, sink.getvalue().to_pybytes())


def _parquet_batches(file: str, rows_per_batch: int) -> Iterator[RawBatch]:
    first = 1
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=rows_per_batch):
            yield from _arrow_batches(file, first, batch)
            first += batch.num_rows


def _hub_batches(source: Source, rows_per_batch: int) -> Iterator[RawBatch]:
    name = cast(str, source.dataset)
    table = _load_hub(source, name).with_format("arrow")
    for start in range(0, len(table), rows_per_batch):
        yield from _arrow_batches(name, start + 1, table[start : start + rows_per_batch])
    if len(table) == 0:
        raise ValueError(f"{name} is empty")


def hub_fingerprint(source: Source) -> str:
    """What tells the rows of a hub data set from those of another, or of another revision of it."""
    return str(_load_hub(source, cast(str, source.dataset))._fingerprint)


def _load_hub(source: Source, name: str) -> Any:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(
            f"{source.key} {name!r} is neither a file that exists nor the name of a hub data set"
        )
    subset = () if source.subset is None else (source.subset,)
    revision = {} if source.revision is None else {"revision": source.revision}
    try:
        return load_dataset(name, *subset, split=source.split, **revision)
    except Exception as error:  # the hub's client raises many kinds: no network, no such name, ...
        if subsets := re.search(r"among the available configs: (\[.*?\])", str(error), re.DOTALL):
            raise ValueError(
                f"{source.key} {name!r} has subsets: set subset to one of {subsets[1]}"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source.key} {name!r} is no local file, and as a hub data set it could not be loaded: {reason}"
        ) from error


# --- JSON: lines of objects, or one array of them ---


@dataclass(frozen=True)
class _Lines(RawBatch):
    text: bytes
    first_line: int
    first_byte: int

    def objects(self) -> list[dict[str, Any]]:
        objects, byte = [], self.first_byte
        for number, line in enumerate(self.text.split(b"\n"), self.first_line):
            if line.strip():
                objects.append(self._parse(line, number, byte))
            byte += len(line) + 1
        return objects

    def _parse(self, line: bytes, number: int, byte: int) -> dict[str, Any]:
        place = f"{self.where}, line {number}"
        try:
            return _require_object(json.loads(line.decode()), place)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where} is not UTF-8 text (byte {byte + error.start})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise ValueError(f"{place}: its brackets are nested too deep") from error


@dataclass(frozen=True)
class _Entries(RawBatch):
    entries: list[dict[str, Any]]

    def objects(self) -> list[dict[str, Any]]:
        return self.entries


def _require_object(entry: Any, place: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected an object with the columns of a row, found {str(entry)[:40]!r}")
    return entry


def _json_batches(file: str, rows_per_batch: int) -> Iterator[RawBatch]:
    """The objects of a JSON array or of JSON lines, distinguished by the first character."""
    with _open(file) as stream:
        blank = stream.read(len(BOM)) if stream.peek(len(BOM)).startswith(BOM) else b""
        while stream.peek(1)[:1].isspace():
            blank += stream.read(1)
        lines_before = blank.count(b"\n")
        if stream.peek(1)[:1] == b"[":
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
            yield from _array_batches(file, text, lines_before, rows_per_batch)
        else:
            yield from _line_batches(file, stream, lines_before, len(blank), rows_per_batch)


def _line_batches(
    file: str, stream: io.BufferedReader, num_lines: int, num_bytes: int, rows_per_batch: int
) -> Iterator[RawBatch]:
    """Batches of the stream's lines, before which the file has `num_lines` lines and `num_bytes` bytes."""
    lines: list[bytes] = []
    row, filled, size = 1, 0, 0
    for line in stream:
        lines.append(line)
        filled += bool(line.strip())
        size += len(line)
        if filled == rows_per_batch or (filled and size >= BATCH_BYTES):
            yield _Lines(file, row, filled, b"".join(lines), num_lines + 1, num_bytes)
            num_lines, num_bytes = num_lines + len(lines), num_bytes + size
            row, filled, size, lines = row + filled, 0, 0, []
    if filled:
        yield _Lines(file, row, filled, b"".join(lines), num_lines + 1, num_bytes)


def _array_batches(file: str, text: IO[str], lines_before: int, rows_per_batch: int) -> Iterator[RawBatch]:
    entries: list[dict[str, Any]] = []
    row = 1
    for number, entry in enumerate(iterate_array(text, file, lines_before + 1), 1):
        entries.append(_require_object(entry, f"{file}, entry {number}"))
        if len(entries) == rows_per_batch:
            yield _Entries(file, row, len(entries), entries)
            row, entries = row + len(entries), []
    if entries:
        yield _Entries(file, row, len(entries), entries)


def read_column(sources: Sequence[Source], column: str) -> list[str]:
    """Any column of the sources as text, missing cells as ""; row n of all that is read is at index n - 1.

    Raises:
        ValueError: as `read_batches`, or no source has such a column.
    """
    cells: list[str] = []
    found: dict[str, None] = {}
    for source in sources:
        for batch in read_batches(source, ROWS_AT_ONCE):
            for row in batch.objects():
                found |= dict.fromkeys(row)
                cell = row.get(column)
                cells.append("" if cell is None or cell != cell else str(cell).strip())
    if column not in found:
        places = ", ".join(source.name for source in sources)
        raise ValueError(f"{places} has no column {column!r}; there are {', '.join(found)}")
    return cells
