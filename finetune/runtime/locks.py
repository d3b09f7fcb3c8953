"""Locks between processes: one run in a folder, and one process a cache that prepares rows."""

import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.runtime import system

LOCK = ".lock"  # in a run's folder
BEAT_SECONDS = 5.0  # between two signs of life of the process that holds it
SILENT_SECONDS = 60.0  # without one, a process that cannot be seen from here is taken for gone
PREPARED = b"prepared"  # in a lock for preparing: the last process that held it alone succeeded


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder against processes on all computers that share it.

    The lock is a file that names the process which holds it, and a number that this process raises every few
    seconds: locks of the kernel do not reach other computers on every file system. It is taken over from a
    process that is gone: at once if that was one of this computer, otherwise when the number has not changed
    for SILENT_SECONDS. A folder that cannot be written is not locked.

    Raises:
        ValueError: another process holds it.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not os.path.lexists(path)]
    lock, descriptor = folder / LOCK, None
    with suppress(OSError):  # what is wrong with the folder is said when it is looked into
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(lock)
    if descriptor is None:
        yield
        return
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, descriptor, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        is_held = False
        with suppress(OSError):
            is_held = _is_held(lock, descriptor)
        os.close(descriptor)  # Windows removes no open file
        with suppress(OSError):
            if is_held:
                lock.unlink()
            for path in missing:  # a run that did not begin leaves nothing behind
                path.rmdir()


def _acquire(lock: Path) -> int:
    """Create the lock, removing that of a process which is gone; returns its descriptor."""
    while True:
        with suppress(FileExistsError):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            _write(descriptor, 0)
            return descriptor
        content = _read(lock)
        if content is not None and not _is_gone(lock, content):
            holder = _parse(_read(lock))
            raise ValueError(
                f"{lock.parent} is in use by process {holder.get('pid')} on {holder.get('host')}, which may "
                "still be finishing its last update; wait for it, or stop it"
            )
        if content is not None:
            _remove(lock, content)


def _write(descriptor: int, beat: int) -> None:
    pid = os.getpid()
    started = system.start_of_process(pid)
    record = {"host": platform.node(), "computer": system.computer(), "pid": pid, "start": started}
    _overwrite(descriptor, json.dumps({**record, "beat": beat}).encode())
    os.fsync(descriptor)


def _overwrite(descriptor: int, content: bytes) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, content)


def _read(lock: Path) -> bytes | None:
    """What the lock holds; None if it was released."""
    try:
        return lock.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> dict[str, Any]:
    try:
        record = json.loads(content or b"")
    except ValueError:  # it is being written, or a kill left it so
        return {}
    return record if isinstance(record, dict) else {}


def _is_gone(lock: Path, content: bytes) -> bool:
    """Whether the process that wrote this is gone."""
    holder = _parse(content)
    if holder.get("computer") == system.computer():
        return bool(system.start_of_process(holder["pid"]) != holder["start"])
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(SILENT_SECONDS / 60)
        if (now := _read(lock)) != content:
            return now is None
    return True


def _remove(lock: Path, content: bytes) -> None:
    """Remove the lock, unless it is another one by now: a third process may have been faster."""
    aside = lock.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.rename(lock, aside)
        if aside.read_bytes() != content:
            with suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _is_held(lock: Path, descriptor: int) -> bool:
    """Whether this process holds the lock still."""
    return lock.exists() and lock.stat().st_ino == os.fstat(descriptor).st_ino


def _beat(lock: Path, descriptor: int, stop: threading.Event) -> None:
    """Give a sign of life every BEAT_SECONDS. A process that was halted until another one took over ends
    itself: each would overwrite the other's files."""
    beat = 0
    while not stop.wait(BEAT_SECONDS):
        beat += 1
        with suppress(OSError):  # the file system is away for a moment
            _write(descriptor, beat)
            if lock.exists() and not _is_held(lock, descriptor):
                print(f"error: another process took {lock.parent} over from this one", file=sys.stderr)
                os._exit(2)


@contextmanager
def preparing(lock: Path) -> Iterator[None]:
    """Within, one process prepares what the others then find. Those that come meanwhile wait until it has
    succeeded, and then go on side by side; if it fails or is killed, one of them takes its place.

    Where files cannot be locked, nobody waits.
    """
    kernel = system.file_locks()
    if kernel is None:
        yield
        return
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # said by what is to be written there
        yield
        return
    try:
        alone = _is_first(descriptor, kernel)
        yield
        if alone:
            _overwrite(descriptor, PREPARED)
    finally:
        os.close(descriptor)


def _is_first(descriptor: int, kernel: Any) -> bool:
    """Wait until this process may go on: alone (True), or because another one has prepared all."""
    while True:
        try:
            kernel.flock(descriptor, kernel.LOCK_EX | kernel.LOCK_NB)
        except BlockingIOError:
            kernel.flock(descriptor, kernel.LOCK_SH)
            os.lseek(descriptor, 0, os.SEEK_SET)
            if os.read(descriptor, len(PREPARED)) == PREPARED:
                return False
            kernel.flock(descriptor, kernel.LOCK_UN)
        except OSError:  # this file system has no locks
            return False
        else:
            os.ftruncate(descriptor, 0)
            return True
