"""One run in a folder, on all computers that share it; and one process that prepares, while others wait."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from finetune.runtime import locks
from finetune.runtime.locks import LOCK, folder_lock, preparing

HOLD = """
import sys, time
from pathlib import Path
from finetune.runtime.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process of this computer, which holds the lock of the folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def patience(monkeypatch):
    """A process on another computer is taken for gone after this many seconds."""
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.3)


def move_to(lock: Path, host: str) -> None:
    """Let the lock be one of a process on another computer."""
    record = json.loads(lock.read_bytes())
    lock.write_text(json.dumps({**record, "host": host, "computer": f"that of {host}"}))


def test_the_lock_names_its_process_and_leaves_nothing_behind(tmp_path):
    with folder_lock(tmp_path / "runs" / "mine"):
        record = json.loads((tmp_path / "runs" / "mine" / LOCK).read_bytes())
        assert (record["host"], record["pid"]) == (os.uname().nodename, os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_is_kept(tmp_path):
    with folder_lock(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, holder):
    named = f"in use by process {holder.pid} on {os.uname().nodename}"
    with pytest.raises(ValueError, match=named), folder_lock(tmp_path / "run"):
        pytest.fail("two hold the lock")
    holder.send_signal(signal.SIGKILL)
    # It has ended, and nobody has asked for its exit code: as for what a killed launcher leaves behind.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / "run" / LOCK).exists()
    with folder_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_bytes())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_number_that_another_process_has_by_now_does_not_hold_the_lock(tmp_path, holder):
    lock = tmp_path / "run" / LOCK
    lock.write_text(json.dumps({**json.loads(lock.read_bytes()), "start": "1"}))
    with folder_lock(tmp_path / "run"):
        pass


@pytest.mark.usefixtures("patience")
def test_a_lock_of_another_computer_holds_while_it_gives_signs_of_life(tmp_path, holder):
    lock = tmp_path / "run" / LOCK
    move_to(lock, "node-7")
    content = lock.read_bytes()
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.02):
            number += 1
            lock.write_bytes(content + b" " * number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"in use by process .*stop it"), folder_lock(tmp_path / "run"):
            pytest.fail("two hold the lock")
    finally:
        stop.set()
        thread.join()
    with folder_lock(tmp_path / "run"):  # no sign of life any more
        assert json.loads(lock.read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "node-7"}'])
@pytest.mark.usefixtures("patience")
def test_a_lock_that_a_kill_left_half_written_is_taken_over(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()


def test_of_two_that_take_over_one_lock_the_faster_keeps_it(tmp_path):
    """The slower one has read the old lock, and finds a new one in its place."""
    with folder_lock(tmp_path):
        before = (tmp_path / LOCK).read_bytes()
        inode = (tmp_path / LOCK).stat().st_ino
        locks._remove(tmp_path / LOCK, b"the old one")
        assert ((tmp_path / LOCK).read_bytes(), (tmp_path / LOCK).stat().st_ino) == (before, inode)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_process_whose_lock_was_taken_over_ends_itself(tmp_path):
    often = "from finetune.runtime import locks; locks.BEAT_SECONDS = 0.05"
    command = [sys.executable, "-c", f"{often}\n{HOLD}", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    lock = tmp_path / "run" / LOCK
    content = lock.read_bytes()
    lock.rename(tmp_path / "old")
    lock.write_bytes(content)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == f"error: another process took {tmp_path / 'run'} over from this one\n"


def test_a_folder_that_cannot_be_made_is_not_locked(tmp_path):
    (tmp_path / "file").touch()
    with folder_lock(tmp_path / "file" / "run"):
        assert (tmp_path / "file").is_file()


# Preparing

PREPARE = """
import sys, time
from pathlib import Path
from finetune.runtime.locks import preparing
folder, how = Path(sys.argv[1]), sys.argv[2]
print("waits", flush=True)
with preparing(folder / "lock"):
    print("in", flush=True)
    sys.stdin.readline()
    if how == "fails":
        sys.exit(3)
print("out", flush=True)
"""


class Preparing:
    """A process that prepares, until it is told to end."""

    def __init__(self, folder: Path, how: str = "succeeds") -> None:
        command = [sys.executable, "-c", PREPARE, str(folder), how]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, bufsize=1
        )
        assert self.says() == "waits"

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def is_waiting(self) -> bool:
        """Whether it waits for a lock, as the kernel says (proc_locks(5))."""
        waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
        return any(f" {self.process.pid} " in line for line in waiting)

    def wait_until_waiting(self) -> None:
        while not self.is_waiting():
            assert self.process.poll() is None

    def end(self) -> None:
        self.process.stdin.write("\n")
        self.process.wait()


@pytest.mark.parametrize("first_one", ["fails", "is killed"])
def test_others_wait_until_one_has_prepared_and_then_go_on_side_by_side(tmp_path, first_one):
    first = Preparing(tmp_path, first_one)
    assert first.says() == "in"
    others = [Preparing(tmp_path) for _ in range(3)]
    for other in others:
        other.wait_until_waiting()
    first.process.kill() if first_one == "is killed" else first.end()
    # One of the others takes its place, alone.
    (second,) = _first_that_enters(others)
    rest = [other for other in others if other is not second]
    for other in rest:
        other.wait_until_waiting()
    second.end()
    assert [other.says() for other in rest] == ["in", "in"]  # at once: none of them has been told to end
    for other in rest:
        other.end()
    assert (tmp_path / "lock").read_bytes() == locks.PREPARED


def _first_that_enters(processes: list[Preparing]) -> list[Preparing]:
    streams = {process.process.stdout.fileno(): process for process in processes}
    ready, _, _ = select.select(list(streams), [], [], 60)
    entered = [streams[number] for number in ready]
    assert [process.says() for process in entered] == ["in"] * len(entered)
    return entered


def test_without_locks_all_prepare(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("locks are not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with preparing(tmp_path / "lock"), preparing(tmp_path / "lock"):
        pass
    (tmp_path / "file").touch()
    with preparing(tmp_path / "file" / "lock"):
        pass
