"""Prepare rows in chunks, on all cores: what a job makes of each chunk lies in a file of its own, so that a
preparation that was killed resumes at the chunks that are missing."""

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.data.preparing.chunk_files import (
    is_left_over,
    partial_path,
    read_chunk,
    read_counts,
    write_chunk,
    write_record,
    written_to_disk,
)
from finetune.runtime.console import console
from finetune.runtime.system import available_cpus

Job = Callable[[Any], pa.Table]
"""What is done to the payload of a chunk. Jobs and payloads go to other processes, so they can be pickled."""

CHUNK_ROWS = 2_000
CHUNK_BYTES = 4 << 20  # of long texts, fewer rows: encoding takes some 70 bytes for each of the text
FEW_ROWS = 8_000  # are done sooner by this process than others start
MANY_CHUNKS = 60  # are never few: those that are looked at first lie in memory
QUEUED_PER_WORKER = 4  # chunks that wait in memory
MOST_WORKERS = 61 if sys.platform == "win32" else 1_000  # Windows waits for no more than 63 objects at once
JOINED_BYTES = 32 << 20  # of a record batch of joined chunks
QUIET_SECONDS = 1.0  # a shorter preparation needs no progress bar
ENCODING = "finetune.data.preparing.encoding"  # what processes import before they have work


class Chunk(NamedTuple):
    """Rows to prepare; `payload` gives what the job is given, and is only called where that is done."""

    num_rows: int
    payload: Callable[[], Any]


class Task(NamedTuple):
    """A chunk, and the file for what is made of it."""

    path: Path
    chunk: Chunk


def make_chunks(
    folder: Path,
    chunks: Iterable[Chunk],
    job: Job,
    title: str,
    total: int | None = None,
    quickness: int = 1,
) -> list[Path]:
    """Files, in order, of what `job` makes of each chunk; those that exist are not made again.

    Of few rows this process makes them itself: of a job that is `quickness` times as quick as tokenizing, as
    many times FEW_ROWS. A progress bar with this title shows how many rows are done, of `total` where that is
    known.

    Raises:
        ValueError: the first one that the chunks or `job` raise, in the order of the rows; the disk is full;
            or a process was killed.
    """
    paths: list[Path] = []
    few_rows = FEW_ROWS * quickness

    def missing() -> Iterator[Task]:
        for number, chunk in enumerate(chunks):
            paths.append(folder / f"{number:05}.arrow")
            if not paths[-1].exists():
                yield Task(paths[-1], chunk)

    with _errors_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tasks: Iterator[Task] = missing()
        num_rows = 0
        first: list[Task] = []
        for task in tasks:
            first.append(task)
            num_rows += task.chunk.num_rows
            if num_rows > few_rows or len(first) > MANY_CHUNKS:
                break
        tasks = chain(first, tasks)
        is_large = (num_rows > few_rows or len(first) > MANY_CHUNKS) and available_cpus() > 1
        if num_rows > FEW_ROWS and available_cpus() > 1 and _pool.is_kept:
            _pool.start()  # for a quick job too: while it runs here, they get ready for the next one
        done = _run_in_others(tasks, job, folder) if is_large else _run_here(tasks, job)
        _show_progress(done, title, total)
        for partial in folder.glob(".*.partial"):
            if is_left_over(partial):
                partial.unlink(missing_ok=True)
    return paths


def join_chunks(
    file: Path,
    schema: pa.Schema,
    make: Callable[[], Sequence[Path]],
    summarize: Callable[[Iterator[Any]], Mapping[str, Any]],
) -> Any:
    """Leave the tables of the chunks that `make` gives in `file`, one after the other, and return what
    `summarize` makes of what was counted in them. If that was done before, no chunk is made.

    Thousands of small files would each take time and memory wherever they are mapped. The chunks are removed
    when the file is whole: until then, both are on the disk.

    Raises:
        ValueError: as `make`, or the disk is full.
    """
    record = file.with_suffix(".json")
    if not record.exists():
        paths = make()
        with _errors_of(file.parent):
            try:
                known = summarize(read_counts(path) for path in paths)
                _write_joined(file, schema, paths)
                write_record(record, known)
            except FileNotFoundError:
                if not record.exists():  # else another process that made the same was done first
                    raise
    for path in file.parent.glob("[0-9]*.arrow"):  # also those that a killed process left
        with suppress(OSError):
            path.unlink()
    return json.loads(record.read_text(encoding="utf-8"))


def _write_joined(file: Path, schema: pa.Schema, paths: Sequence[Path]) -> None:
    """The tables of chunks, one after the other, in batches of about JOINED_BYTES."""
    with written_to_disk(file) as sink, pa.ipc.new_stream(sink, schema) as writer:
        tables: list[pa.Table] = []
        for path in paths:
            tables.append(read_chunk(path).replace_schema_metadata())
            if sum(table.nbytes for table in tables) >= JOINED_BYTES:
                writer.write_table(pa.concat_tables(tables).combine_chunks())
                tables.clear()
        if tables:
            writer.write_table(pa.concat_tables(tables).combine_chunks())


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """What keeps files out of the folder, as a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"prepared rows cannot be kept in {folder} ({error.strerror or error}); make room, or set "
            "HF_DATASETS_CACHE to another folder, and rerun the same command"
        ) from error


def spans(sizes: NDArray[Any], most_rows: int, most: int) -> Iterator[tuple[int, int]]:
    """The rows of these sizes in order, as (start, end) of at most `most_rows` whose sizes add up to at most
    `most`, or of one larger row."""
    before = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=before[1:])
    start = 0
    while start < len(sizes):
        within = int(np.searchsorted(before, before[start] + most, side="right")) - 1
        end = min(start + most_rows, max(start + 1, within))
        yield start, end
        start = end


@contextmanager
def workers_kept() -> Iterator[None]:
    """Within, `make_chunks` starts processes once, not for each of its calls."""
    is_outermost, _pool.is_kept = not _pool.is_kept, True
    try:
        yield
    finally:
        if is_outermost:
            _pool.is_kept = False
            _pool.stop()


class _Pool:
    """The processes that work at present."""

    def __init__(self) -> None:
        self.executor: ProcessPoolExecutor | None = None
        self.is_kept = False

    def start(self) -> None:
        """Start all of them; they import what they need meanwhile."""
        if self.executor is None:
            context = multiprocessing.get_context("spawn")
            self.executor = ProcessPoolExecutor(_num_workers(), context, initializer=_start_worker)
            with _without_main_module():
                for _ in range(_num_workers()):
                    self.executor.submit(import_module, ENCODING)

    def submit(self, *arguments: Any) -> Future[None]:
        self.start()
        assert self.executor is not None
        return self.executor.submit(_work, *arguments)

    def stop(self) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)
            self.executor = None


_pool = _Pool()


def _num_workers() -> int:
    return min(available_cpus(), MOST_WORKERS)


def _run_here(tasks: Iterable[Task], job: Job) -> Iterator[int]:
    """Do the job on each chunk; yields the number of its rows."""
    for path, chunk in tasks:
        write_chunk(path, job(chunk.payload()))
        yield chunk.num_rows


def _run_in_others(tasks: Iterator[Task], job: Job, folder: Path) -> Iterator[int]:
    """The same in processes of their own, few chunks ahead of what is yielded."""
    queue: deque[tuple[int, Future[None]]] = deque()
    # Pickled once: a tokenizer has megabytes.
    job_file, pickled = partial_path(folder / "job"), pickle.dumps(job)
    job_file.write_bytes(pickled)
    digest = hashlib.sha256(pickled).hexdigest()
    is_done = False
    try:
        while True:
            while len(queue) < _num_workers() * QUEUED_PER_WORKER and (task := next(tasks, None)):
                path, chunk = task
                queue.append((chunk.num_rows, _pool.submit(digest, job_file, path, chunk.payload())))
            if not queue:
                break
            num_rows, future = queue.popleft()
            future.result()
            yield num_rows
        is_done = True
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that prepared rows was killed, perhaps for want of memory; rerun the same command to "
            "resume, on fewer cores (taskset -c 0) if it happens again"
        ) from error
    finally:
        if not (is_done and _pool.is_kept):
            _pool.stop()
        job_file.unlink(missing_ok=True)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes that start meanwhile do not import the program's own file, and with it torch and the model's
    libraries: seconds and hundreds of MiB each."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C goes to all processes; the first one decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process
    pa.set_cpu_count(1)
    gc.disable()  # it takes a quarter of the time if it runs within a chunk, and next to none after each
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(digest: str, job_file: Path, path: Path, payload: Any) -> None:
    if digest not in _jobs:
        _jobs.clear()
        _jobs[digest] = pickle.loads(job_file.read_bytes())
        gc.freeze()
    write_chunk(path, _jobs[digest](payload))
    gc.collect()


_jobs: dict[str, Job] = {}  # of a worker: the last one, by its digest


def _show_progress(done: Iterator[int], title: str, total: int | None) -> None:
    """Exhaust `done`, with a progress bar on a terminal if it takes long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(title, total=total)
    start, shown = time.monotonic(), False
    try:
        for count in done:
            bar.advance(task, count)
            if console.is_terminal and not shown and time.monotonic() - start > QUIET_SECONDS:
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()
