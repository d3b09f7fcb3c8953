"""Prepare rows in chunks, on all cores: what a job makes of each chunk lies in a file of its own, so that a
preparation that was killed resumes at the chunks that are missing."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.runtime.console import console

Job = Callable[[pa.Table], pa.Table]
"""What is done to a chunk. A job goes to other processes, so it can be pickled."""

CHUNK_ROWS = 2_000
FEW_ROWS = 4_000  # are done sooner by this process than others start
QUEUED_PER_WORKER = 4  # chunks that wait in memory
QUIET_SECONDS = 1.0  # a shorter preparation needs no progress bar


def make_chunks(
    folder: Path, num_rows: int, rows_between: Callable[[int, int], pa.Table], job: Job, title: str
) -> list[Path]:
    """Files, in order, of what `job` makes of CHUNK_ROWS rows each; those that exist are not made again.

    `rows_between(start, end)` gives the rows of a chunk. `title` stands beside the progress bar.

    Raises:
        ValueError: the first one that `job` raises, in the order of the rows; the disk is full; or a process
            was killed.
    """
    paths = [folder / f"{number:05}.arrow" for number in range(-(-num_rows // CHUNK_ROWS))]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if not missing:
        return paths
    spans = [(n * CHUNK_ROWS, min(num_rows, (n + 1) * CHUNK_ROWS)) for n in missing]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        chunks = ((paths[n], rows_between(*span)) for n, span in zip(missing, spans, strict=True))
        num_missing = sum(end - start for start, end in spans)
        workers = min(available_cpus(), len(missing))
        in_others = workers > 1 and num_missing > FEW_ROWS
        done = _run_in_others(chunks, job, workers) if in_others else _run_here(chunks, job)
        _show_progress(done, num_missing, title)
        for left_over in folder.glob(".*.partial"):  # by processes that were killed
            left_over.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"the tokens cannot be kept in {folder} ({error.strerror or error}); make room, or set "
            "HF_DATASETS_CACHE to another folder, and rerun the same command"
        ) from error
    return paths


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_chunk(path: Path, table: pa.Table) -> None:
    """Write a chunk so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.replace(partial, path)
    except FileNotFoundError:  # another process has finished this chunk, and removed what was left over
        if not path.exists():
            raise


def read_chunk(path: Path) -> pa.Table:
    """A chunk, read into memory."""
    with path.open("rb") as file, pa.ipc.open_stream(file) as reader:
        return reader.read_all()


def _run_here(chunks: Iterator[tuple[Path, pa.Table]], job: Job) -> Iterator[int]:
    """Do the job on each chunk; yields the number of its rows."""
    for path, rows in chunks:
        write_chunk(path, job(rows))
        yield len(rows)


def _run_in_others(chunks: Iterator[tuple[Path, pa.Table]], job: Job, workers: int) -> Iterator[int]:
    """The same in processes of their own, few chunks ahead of what is yielded."""
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,))
    queue: deque[tuple[int, Future[None]]] = deque()
    try:
        with _without_main_module():
            for path, rows in chunks:
                queue.append((len(rows), executor.submit(_work, path, rows)))
                if len(queue) == workers * QUEUED_PER_WORKER:
                    break
        while queue:
            num_rows, future = queue.popleft()
            future.result()
            if (chunk := next(chunks, None)) is not None:
                queue.append((len(chunk[1]), executor.submit(_work, *chunk)))
            yield num_rows
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that prepared rows was killed, perhaps for want of memory; rerun the same command to "
            "resume, on fewer cores (taskset -c 0) if it happens again"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


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


_job: Any = None  # of a worker


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C goes to all processes; the first one decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a process
    pa.set_cpu_count(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work(path: Path, rows: pa.Table) -> None:
    write_chunk(path, _job(rows))


def _show_progress(done: Iterator[int], total: int, title: str) -> None:
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
