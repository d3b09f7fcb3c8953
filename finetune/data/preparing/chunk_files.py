"""The files of chunks: Arrow tables with what was counted in them, each there whole or not at all."""

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pyarrow as pa

from finetune.runtime import system

COUNTS = b"counts"  # of a chunk, as JSON, in the metadata of its schema


def with_counts(table: pa.Table, counts: Mapping[str, Any]) -> pa.Table:
    """The table, with what was counted while it was made."""
    return table.replace_schema_metadata({COUNTS: json.dumps(counts)})


def counts_of(table: pa.Table | pa.RecordBatchReader) -> Any:
    """What `with_counts` added."""
    return json.loads(table.schema.metadata[COUNTS])


def read_counts(path: Path) -> Any:
    """The same of a chunk, of which no row is read."""
    with path.open("rb") as file, pa.ipc.open_stream(file) as reader:
        return counts_of(reader)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write into that then becomes `path`, which is there whole or not at all, also where several
    processes make the same at once."""
    partial = partial_path(path)
    yield partial
    try:
        os.replace(partial, path)
    except (FileNotFoundError, PermissionError):
        # One that does not see this process, as in containers, took it for left over. Or one that made the
        # same has it open, on Windows.
        if not path.exists():
            raise


def partial_path(path: Path) -> Path:
    """What this process writes before it is `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.partial")


def is_left_over(partial: Path) -> bool:
    """Whether the process that wrote it is gone. Those of other computers cannot be seen from here."""
    owner = re.fullmatch(r".*\.(\d+)@(.*)\.partial", partial.name)
    return owner is not None and owner[2] == platform.node() and not psutil.pid_exists(int(owner[1]))


def write_chunk(path: Path, table: pa.Table) -> None:
    """Write a chunk, as `written_whole`."""
    with written_to_disk(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


@contextmanager
def written_to_disk(path: Path) -> Iterator[BinaryIO]:
    """An open file that then becomes `path`, as `written_whole`."""
    with written_whole(path) as partial, partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what is known of chunks as JSON, as `written_whole`."""
    with written_whole(path) as partial:
        system.write_text(partial, json.dumps(record))


def read_chunk(path: Path) -> pa.Table:
    """A chunk, read into memory."""
    with path.open("rb") as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


def read_in_parts(path: Path) -> Iterator[pa.Table]:
    """A chunk, or joined ones, read into memory part by part, as they were written."""
    with path.open("rb") as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def packed(table: pa.Table) -> bytes:
    """A table as bytes; pickled itself, a part of a table would take the whole one with it."""
    sink = pa.BufferOutputStream()
    table = table.combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def unpacked(table: bytes) -> pa.Table:
    return pa.ipc.open_stream(table).read_all()
