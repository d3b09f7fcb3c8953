"""What the operating system offers, and what is done where it offers less."""

import errno
import io
import os
import signal
import sys
import types
from pathlib import Path

import psutil
import pytest

from finetune.runtime import system
from finetune.runtime.files import staged_folder


def refused(number: int) -> PermissionError:
    """What Windows answers where another program has a file open."""
    error = PermissionError(errno.EACCES, "The process cannot access the file")
    error.winerror = number  # type: ignore[attr-defined]
    return error


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_file_is_replaced_as_soon_as_another_program_lets_it(tmp_path, monkeypatch, no_pauses):
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    real, refusals = os.replace, [refused(5), refused(32)]

    def replace(source: Path, target: Path) -> None:
        if refusals:
            raise refusals.pop()
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    system.replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new"


@pytest.mark.parametrize("error", [refused(32), OSError(errno.ENOSPC, "No space left on device")])
def test_a_file_that_cannot_be_replaced_is_an_error(tmp_path, monkeypatch, no_pauses, error):
    def replace(*_: object) -> None:
        raise error

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(OSError, match=error.strerror):
        system.replace(tmp_path / "new", tmp_path / "old")


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(tmp_path):
    for name in ("new", "newer", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "place" / "file").unlink()
    system.replace(tmp_path / "new", tmp_path / "place")
    assert (tmp_path / "place" / "file").read_text() == "new"
    with pytest.raises(OSError, match="not empty"):
        system.replace(tmp_path / "newer", tmp_path / "place")


def test_a_folder_of_which_a_file_is_in_use_is_left(tmp_path, monkeypatch, no_pauses):
    def in_use(path: Path) -> None:
        raise refused(32)

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", in_use)
        system.remove_folder(folder)
    assert folder.exists()
    system.remove_folder(folder)
    assert not folder.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_flush_folders_is_enough_and_a_failing_one_is_not(
    tmp_path, monkeypatch, number
):
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)

    def write() -> None:
        with staged_folder(tmp_path / "folder") as staging:
            (staging / "file").write_text("content")

    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            write()
        assert not (tmp_path / "folder").exists()
    else:
        write()
        assert (tmp_path / "folder" / "file").read_text() == "content"


@pytest.mark.parametrize(("long_paths", "fits"), [(0, False), (1, True)])
def test_a_run_whose_files_would_have_too_long_paths_is_refused_at_once(monkeypatch, long_paths, fits):
    class Key:
        def __enter__(self) -> "Key":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    registry = types.ModuleType("winreg")
    registry.HKEY_LOCAL_MACHINE = 0  # type: ignore[attr-defined]
    registry.OpenKey = lambda *_: Key()  # type: ignore[attr-defined]
    registry.QueryValueEx = lambda *_: (long_paths, 4)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "winreg", registry)
    system.check_path_length(Path("/runs/short"), 100)
    if fits:
        system.check_path_length(Path("/" + "r" * 200), 100)
    else:
        with pytest.raises(ValueError, match="302 characters, and Windows takes 259"):
            system.check_path_length(Path("/" + "r" * 200), 100)


def test_text_that_a_console_cannot_show_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252", newline=""))
    system.let_streams_take_any_text()
    print("1 € is 你")
    sys.stdout.flush()
    assert written.getvalue().decode("cp1252").strip() == r"1 € is \u4f60"


def test_text_has_the_line_ends_that_it_is_given(tmp_path):
    system.write_text(tmp_path / "text", "a\nb\r\nc")
    assert (tmp_path / "text").read_bytes() == b"a\nb\r\nc"


def test_signals_that_this_system_lacks_are_left_out():
    assert system.signals_named("SIGTERM", "SIGNEVER") == (signal.SIGTERM,)


def test_a_process_is_an_orphan_once_its_parent_has_ended(monkeypatch):
    assert not system.is_orphan_of(os.getppid())
    assert system.is_orphan_of(os.getppid() + 1)
    monkeypatch.setattr("psutil.pid_exists", lambda number: False)  # Windows keeps the number of the parent
    assert system.is_orphan_of(os.getppid())


def test_without_resource_and_affinity_the_numbers_are_psutils(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert system.peak_resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert 1 <= system.available_cpus() <= (os.cpu_count() or 1)


def test_no_other_module_asks_for_what_the_systems_do_not_share():
    """The shim of `test_without_posix` hides such names only where that test comes."""
    names = ("getuid", "sched_getaffinity", "getrusage", "/proc/", "import resource", "import fcntl")
    own = Path(system.__file__)
    asking = [
        (path.name, name)
        for path in own.parents[1].rglob("*.py")
        for name in names
        if path != own and name in path.read_text(encoding="utf-8")
    ]
    assert asking == []
