"""Sources become tables of rows: read in batches and memory-mapped, each row in its one form as JSON text.

Text, because a table of objects would invent, for each row, the keys that others have.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from finetune.data.conversations import Row
from finetune.data.preparing.chunk_files import counts_of, packed, with_counts
from finetune.data.preparing.chunks import CHUNK_BYTES, CHUNK_ROWS, Chunk, join_chunks, make_chunks, spans
from finetune.data.reading.batches import read_formatted
from finetune.data.reading.cleaning import reason_to_drop
from finetune.data.reading.files import RawBatch, hub_fingerprint
from finetune.data.reading.formats import Format
from finetune.data.reading.sources import Source
from finetune.runtime.files import file_sha256

SCHEMA = pa.schema({"row_number": pa.int64(), "source": pa.int32(), "row": pa.string()})
ROWS_HASHED = 1 << 20  # at once: memory does not grow with more
# Packages whose versions decide what is read of files, what templates write, and which tokens texts become.
CALLED = ("datasets", "jinja2", "numpy", "pandas", "pyarrow", "tokenizers", "transformers")
KEYED = "rows of "  # and a key: the description of a table whose texts depend on that and their numbers alone


class ReadSources(NamedTuple):
    """The rows of sources that can be trained on.

    `num_read` rows of each source were read, in the format `formats`; `dropped` are the numbers of rows left
    out, by reason; `unused` counts rows by what of them is not used; `files` are the number of the first row
    and the name of each file or data set.
    """

    table: Dataset
    num_read: list[int]
    formats: list[str]
    dropped: dict[str, list[int]]
    unused: Counter[str]
    files: list[tuple[int, str]]


class Part(NamedTuple):
    """A batch of a source's rows, the first of which has the number `first_number`."""

    raw: RawBatch
    format: Format
    first_number: int
    source: int
    system_prompt: str | None
    """Of this source, where that is not the one of all"""


@dataclass(frozen=True)
class ReadRows:
    """The job that parses and converts raw rows."""

    reason_to_drop: Callable[[Mapping[str, Any]], str | None]

    def __call__(self, part: Part) -> pa.Table:
        """A table with the columns of SCHEMA.

        Raises:
            ValueError: a row that cannot be read, with its place.
        """
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        dropped: dict[str, list[int]] = defaultdict(list)
        unused: Counter[str] = Counter()
        for number, (place, raw) in enumerate(part.raw.rows(), part.first_number):
            row, idle = part.format.convert(raw, place)
            unused.update(set(idle))
            if reason := self.reason_to_drop(row):
                dropped[reason].append(number)
                continue
            if part.system_prompt is not None and "text" not in row:
                row.setdefault("system", part.system_prompt)
            columns["row_number"].append(number)
            columns["source"].append(part.source)
            columns["row"].append(as_text(row))
        return with_counts(pa.table(columns, SCHEMA), {"dropped": dropped, "unused": unused})


def as_text(row: Row) -> str:
    """The row as JSON text."""
    return json.dumps(row, ensure_ascii=False)


def read_sources(sources: Sequence[Source], system_prompt: str | None) -> ReadSources:
    """The rows of sources that can be trained on; `system_prompt` is that of all that have no other.

    They are memory-mapped from the cache of `datasets`, which the first call for these files writes.

    Raises:
        ValueError: a source that cannot be read, or a row that cannot be converted, with its place.
    """
    folder = cache_folder({"sources": [_identity(source) for source in sources], "system": system_prompt})
    known = _read_into(folder / "rows.arrow", sources, system_prompt)
    table = Dataset.from_file(str(folder / "rows.arrow")).data.table
    # Without the key all texts would be hashed for `digest_of`. Splits of a table that knows its file would
    # each leave a further file beside it.
    info = datasets.DatasetInfo(description=KEYED + folder.name)
    return ReadSources(
        Dataset(table, info=info, fingerprint=folder.name),
        known["num_read"],
        known["formats"],
        known["dropped"],
        Counter(known["unused"]),
        [(first, file) for first, file in known["files"]],
    )


def _read_into(file: Path, sources: Sequence[Source], system_prompt: str | None) -> dict[str, Any]:
    """Write the rows of sources into a file, and return the other fields of their `ReadSources`."""
    num_read, formats = [0] * len(sources), [""] * len(sources)
    files: list[tuple[int, str]] = []

    def chunks() -> Iterator[Chunk]:
        for place, source in enumerate(sources):
            own = source.system_prompt if source.system_prompt != system_prompt else None
            for raw, format_ in read_formatted(source, CHUNK_ROWS):
                first = sum(num_read) + 1
                if raw.first_row == 1:
                    files.append((first, raw.where))
                num_read[place] += raw.num_rows
                formats[place] = format_.name
                yield Chunk(raw.num_rows, partial(Part, raw, format_, first, place, own))

    def summarize(counts_of_chunks: Iterator[Any]) -> dict[str, Any]:
        dropped: dict[str, list[int]] = defaultdict(list)
        unused: Counter[str] = Counter()
        for counts in counts_of_chunks:
            unused.update(counts["unused"])
            for reason, numbers in counts["dropped"].items():
                dropped[reason] += numbers
        known = {"num_read": num_read, "formats": formats, "files": files}
        return {**known, "dropped": dropped, "unused": unused}

    make = partial(make_chunks, file.parent, chunks(), ReadRows(reason_to_drop), "Reading", quickness=15)
    known: dict[str, Any] = join_chunks(file, SCHEMA, make, summarize)
    return known


def read_questions_of(
    sources: Sequence[Source], reason_to_drop: Callable[[Mapping[str, Any]], str | None]
) -> tuple[Dataset, dict[str, list[int]], Counter[str]]:
    """The rows of sources whose answers may be missing, in memory; the numbers of those dropped; and how many
    rows have what is not used.

    Raises:
        ValueError: as `read_sources`.
    """
    job, number = ReadRows(reason_to_drop), 1
    tables, dropped = [SCHEMA.empty_table()], defaultdict[str, list[int]](list)
    unused: Counter[str] = Counter()
    for place, source in enumerate(sources):
        for raw, format_ in read_formatted(source, CHUNK_ROWS, questions_only=True):
            tables.append(job(Part(raw, format_, number, place, None)))
            counts = counts_of(tables[-1])
            unused.update(counts["unused"])
            for reason, numbers in counts["dropped"].items():
                dropped[reason] += numbers
            number += raw.num_rows
    return Dataset(pa.concat_tables(tables)), dict(dropped), unused


def _identity(source: Source) -> dict[str, Any]:
    """What the rows of a source depend on."""
    identity = {**asdict(source), "num_samples": None, "share": None}
    if source.dataset is not None:
        return {**identity, "fingerprint": hub_fingerprint(source)}
    digests = []
    for file in source.files:
        try:
            digests.append(file_sha256(Path(file)))
        except OSError as error:
            raise ValueError(f"{source.key} {file}: {error.strerror or error}") from error
    return {**identity, "sha256": digests}


def cache_folder(depends_on: Mapping[str, Any]) -> Path:
    """The folder for what is made of data and settings by the code of this package and those that it calls,
    which need not exist."""
    text = json.dumps({**depends_on, "code": _code_digest()}, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "finetune" / key


@cache
def _code_digest() -> str:
    """So that no row is read from the cache of code that has changed since."""
    digest = hashlib.sha256(json.dumps({name: version(name) for name in CALLED}).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def table_chunks(table: Dataset) -> Iterator[Chunk]:
    """A table in chunks of at most CHUNK_ROWS rows with CHUNK_BYTES of text (or one longer row), `packed`."""
    arrow = table.with_format("arrow")
    sizes = _in_order(table, pc.binary_length(table.data.column("row")).to_numpy())
    for start, end in spans(sizes, CHUNK_ROWS, CHUNK_BYTES):
        yield Chunk(end - start, partial(_packed_part, arrow, start, end))


def _packed_part(arrow: Dataset, start: int, end: int) -> bytes:
    return packed(arrow[start:end])


def column_of(table: Dataset, name: str) -> NDArray[Any]:
    """A column of numbers, without its rows' other columns."""
    return _in_order(table, table.data.column(name).to_numpy())


def _in_order(table: Dataset, values: NDArray[Any]) -> NDArray[Any]:
    """The values of a table's rows, of those of all rows that it selects from."""
    places = table._indices
    return np.asarray(values if places is None else values[places.column(0).to_numpy()])


def digest_of(rows: Dataset) -> str:
    """SHA-256 of a table of rows: their numbers, sources and texts, in order."""
    digest = hashlib.sha256()
    for name in ("row_number", "source"):
        values = column_of(rows, name)
        for start in range(0, len(values), ROWS_HASHED):
            digest.update(values[start : start + ROWS_HASHED].astype("<i8").tobytes())
    if rows.info.description.startswith(KEYED):
        digest.update(rows.info.description.encode())
    else:
        for table in rows.with_format("arrow").iter(CHUNK_ROWS):
            digest.update(json.dumps(table["row"].to_pylist()).encode())
    return digest.hexdigest()
