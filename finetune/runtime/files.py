"""Files and folders: written whole or not at all, flushed to disk, with room checked first."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from finetune.runtime import system
from finetune.runtime.system import flush_to_disk


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old or the new one, never a torn one."""
    partial = path.with_name(f".{path.name}.partial")
    system.write_text(partial, text)
    system.replace(partial, path)


SMALL_FILES_BYTES = 2**20  # beside the tensors: JSON, the tokenizer's few files


HOW_TO_RESUME = (
    "earlier checkpoints are intact: fix that, then rerun the same command to resume from the newest"
)


@contextmanager
def atomic_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A `staged_folder` that replaces an older one; ValueError if the disk has no room or the write fails."""
    require_room(folder.parent, num_bytes, folder.name)
    try:
        with staged_folder(folder, overwrite=True) as staging:
            yield staging
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error


@contextmanager
def staged_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to write into, flushed and renamed to `folder` on success, removed on failure.

    Raises:
        OSError: it could not be written; or `folder` exists, is not empty, and `overwrite` is not set.
    """
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.iterdir(), staging]:
            flush_to_disk(path)
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        system.replace(staging, folder)  # an empty folder of that name gives way
        flush_to_disk(folder.parent)
    except SafetensorError as error:  # safetensors has its own kind for a full disk
        raise OSError(errno.EIO, str(error), str(folder)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def cannot_write(folder: Path, error: Exception) -> str:
    """The message for a user whose disk is full, read-only or failing."""
    reason = getattr(error, "strerror", None) or str(error)
    return f"{folder} could not be written ({reason}); {HOW_TO_RESUME}"


def require_room(folder: Path, num_bytes: int, name: str, advice: str = HOW_TO_RESUME) -> None:
    """Raise ValueError if the disk of `folder` has less than `num_bytes` free, plus some for small files."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, free = num_bytes + SMALL_FILES_BYTES, shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"no room for {name} in {folder}: it takes {needed / 2**20:.1f} MiB, and "
            f"{free / 2**20:.1f} MiB are free; make room{advice and '; '}{advice}"
        )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """This program's folder in the user's cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    except RuntimeError as error:  # a container's user without a home
        raise ValueError(f"{error} Set XDG_CACHE_HOME to a folder that can be written") from error
