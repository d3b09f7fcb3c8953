"""A process that is killed, or silent for too long, ends the others with one line and no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed
from by_hand import start_two
from conftest import ROOT

import train
from finetune.runtime.cli import LOST_PEER, run_command

# train.py, where a silent process is waited for ten seconds.
IMPATIENT = """
import sys
from datetime import timedelta
from finetune.runtime import accelerator, processes
accelerator.PEER_TIMEOUT = processes.PEER_TIMEOUT = timedelta(seconds=10)
import train
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistStoreError("wait timeout after 1000ms, keys: /x"),
        torch.distributed.DistNetworkError("The client socket has timed out after 1000ms"),
        torch.distributed.DistNetworkError("Connection reset by peer"),
        torch.distributed.DistBackendError("ncclRemoteError: a remote process exited prematurely"),
        RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:5000"),
    ],
)
def test_what_torch_says_of_a_lost_process_is_told_in_one_line(error, capfd):
    def command(_: object) -> None:
        raise error

    assert run_command(command, []) == 1
    assert capfd.readouterr().err == f"{LOST_PEER}\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The read operation timed out"),
        RuntimeError("Connection reset by peer"),
        RuntimeError("Broken pipe"),
        torch.distributed.DistNetworkError("The server socket has failed to listen: EADDRINUSE"),
        torch.distributed.DistBackendError("ncclInvalidUsage: invalid usage"),
    ],
)
def test_an_error_that_only_sounds_like_a_lost_process_is_told_as_itself(error):
    def command(_: object) -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        run_command(command, [])


@pytest.fixture
def long_run(run_train, monkeypatch, tmp_path) -> tuple[list[str], Path]:
    """Arguments of a run of thousands of updates, and its folder."""
    arguments: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda argv: arguments.extend(argv) or 0)
        run_dir = run_train(
            output_dir=tmp_path / "run", train__num_epochs=5000, eval__every=10**6, eval__at_start=False
        )
    return arguments, run_dir


def wait_for_updates(run_dir: Path, *processes: subprocess.Popen[bytes]) -> None:
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_bytes():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_a_kill_of_the_first_process_ends_the_other_in_one_line(long_run, tmp_path):
    """The first one holds the rendezvous too."""
    arguments, run_dir = long_run
    processes = start_two(["train.py", *arguments], tmp_path / "logs")
    wait_for_updates(run_dir, *processes)
    processes[0].kill()
    assert processes[0].wait() == -signal.SIGKILL
    assert processes[1].wait(timeout=60) == 1
    assert (tmp_path / "logs" / "1").read_text().splitlines()[-1] == LOST_PEER
    assert "Traceback" not in (tmp_path / "logs" / "1").read_text()


def test_a_silent_process_is_waited_for_no_longer_than_the_timeout(long_run, tmp_path):
    arguments, run_dir = long_run
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    processes = start_two([str(script), *arguments], tmp_path / "logs")
    wait_for_updates(run_dir, *processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(timeout=60) == 1
    finally:
        processes[1].kill()
        processes[1].wait()
    assert (tmp_path / "logs" / "0").read_text().splitlines()[-1] == LOST_PEER
    assert "Traceback" not in (tmp_path / "logs" / "0").read_text()


def test_a_kill_under_torchrun_ends_the_other_process_in_one_line(long_run, tmp_path):
    arguments, run_dir = long_run
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    torchrun += ["--log-dir", str(tmp_path / "logs"), "--redirects", "3"]
    process = subprocess.Popen(
        [*torchrun, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_updates(run_dir, process)
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    assert process.wait(timeout=120) != 0
    (said,) = (tmp_path / "logs").glob("*/attempt_0/0/stderr.log")
    assert said.read_text().splitlines()[-1] == LOST_PEER
    assert "Traceback" not in said.read_text()
    assert not (run_dir / "adapter").exists()
