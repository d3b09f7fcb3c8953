"""Files and folders: written whole or not at all, flushed to disk, with room checked first."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old or the new one, never a torn one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


SMALL_FILES_BYTES = 2**20  # beside the tensors: JSON, the tokenizer's few files


HOW_TO_RESUME = (
    "earlier checkpoints are intact: fix that, then rerun the same command to resume from the newest"
)


@contextmanager
def atomic_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary folder to write into, flushed and renamed to `folder` on success, removed on failure."""
    require_room(folder.parent, num_bytes, folder.name)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.iterdir(), staging]:
            flush_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
        flush_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own kind for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        raise ValueError(cannot_write(folder, error)) from error


def cannot_write(folder: Path, error: Exception) -> str:
    """The message for a user whose disk is full, read-only or failing."""
    reason = getattr(error, "strerror", None) or str(error)
    return f"{folder} could not be written ({reason}); {HOW_TO_RESUME}"


def require_room(folder: Path, num_bytes: int, name: str) -> None:
    """Raise ValueError if the disk of `folder` has less than `num_bytes` free, plus some for small files."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, free = num_bytes + SMALL_FILES_BYTES, shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"no room for {name} in {folder}: it takes {needed / 2**20:.1f} MiB, and "
            f"{free / 2**20:.1f} MiB are free; make room; {HOW_TO_RESUME}"
        )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """This program's folder in the user's cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"
    except RuntimeError as error:  # a container's user without a home
        raise ValueError(f"{error} Set XDG_CACHE_HOME to a folder that can be written") from error
