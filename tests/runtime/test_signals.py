"""A signal lets the update end and be saved; the run goes on from there as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, read_metrics
from safetensors.torch import load_file
from torch import equal

import train
from finetune.run.tracker import Tracker
from finetune.runtime.cli import run_command

SETTINGS = {"train__num_epochs": 3, "checkpoint__every_steps": 100, "optim__name": "paged_adamw_8bit"}
STEPS = 6
NOT_THE_TRAINING = ("useful_tokens_per_second", "mfu", "peak_memory_gib")


def signalled(moment: str, number: int, step: int) -> tuple[str, Callable[..., Any]]:
    """A function of the program, and one that sends this process a signal at `step` or in an activity."""
    advance, activity = Tracker.advance, Tracker.show_activity

    def signalling_advance(self: Tracker, at: int) -> None:
        advance(self, at)
        if at == step:
            os.kill(os.getpid(), number)

    def signalling_activity(self: Tracker, what: str) -> None:
        activity(self, what)
        if what == moment:
            os.kill(os.getpid(), number)

    if moment == "an update":
        return "finetune.run.tracker.Tracker.advance", signalling_advance
    return "finetune.run.tracker.Tracker.show_activity", signalling_activity


def values(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run_dir)
    return [{key: x for key, x in line.items() if key not in NOT_THE_TRAINING} for line in lines]


@pytest.fixture(scope="module")
def whole_runs() -> list[Path]:
    return []


@pytest.fixture
def whole(run_train, tmp_path, whole_runs) -> Path:
    """A run of SETTINGS that nothing stopped; made once, and only read."""
    if not whole_runs:
        whole_runs.append(run_train(output_dir=tmp_path / "whole", **SETTINGS))
    return whole_runs[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("moment", "saved"), [("an update", 2), ("evaluating", None), ("writing a few answers", None)]
)
def test_a_signal_ends_the_update_saves_it_and_the_printed_command_goes_on(
    run_train, monkeypatch, capfd, tmp_path, whole, number, code, moment, saved
):
    with monkeypatch.context() as patch:
        patch.setattr(*signalled(moment, number, 2))
        run_dir = run_train(expect=code, output_dir=tmp_path / "stopped run", **SETTINGS)
    said = capfd.readouterr()
    assert f"{signal.Signals(number).name}: finishing this update" in said.err
    assert "Traceback" not in said.err
    checkpoints = run_dir / "checkpoints"
    assert [path.name for path in checkpoints.glob("*")] == ([f"step_{saved:06d}"] if saved else [])
    command = said.out.splitlines()[-1].strip()
    assert command == f"python train.py --config '{run_dir}/config.yaml'"
    run_train(output_dir=run_dir, **SETTINGS)
    assert values(run_dir) == values(whole)
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run_dir, whole)
    )
    assert all(equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_an_evaluation_that_was_cut_off_is_made_when_the_run_goes_on(run_train, monkeypatch, tmp_path, whole):
    """The one after the first epoch, whose update the stop saves."""
    show_activity = Tracker.show_activity
    seen: list[str] = []

    def at_the_second(self: Tracker, what: str) -> None:
        show_activity(self, what)
        seen.append(what)
        if seen.count("evaluating") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("finetune.run.tracker.Tracker.show_activity", at_the_second)
        run_dir = run_train(expect=143, output_dir=tmp_path / "stopped", **SETTINGS)
    assert [line["step"] for line in values(run_dir) if line["split"] == "eval"] == [0]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000002"]
    run_train(output_dir=run_dir, **SETTINGS)
    assert values(run_dir) == values(whole)


@pytest.mark.parametrize("forwarded", [False, True], ids=["alone", "under a launcher that signals again"])
def test_a_second_request_stops_at_once(run_train, monkeypatch, tmp_path, forwarded):
    """torchrun passes on the signal that the terminal gave to all: two signals are one request there."""
    if forwarded:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    advance = Tracker.advance
    arrived: list[int] = []

    def signalling(self: Tracker, at: int) -> None:
        advance(self, at)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT) if at == 2 else ():
            arrived.append(number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr("finetune.run.tracker.Tracker.advance", signalling)
    with pytest.raises(SystemExit) as stopped:
        run_train(output_dir=tmp_path / "run", **SETTINGS)
    assert stopped.value.code == 130
    assert len(arrived) == (3 if forwarded else 2)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("dead", ["stdout", "stderr", "both"])
def test_a_run_whose_output_nobody_reads_any_more_is_saved_all_the_same(long_run, dead):
    """As under `| tee log`, which a Ctrl-C ends too."""
    arguments, run_dir = long_run
    reader, writer = os.pipe()
    pipes = {name: writer if dead in (name, "both") else subprocess.DEVNULL for name in ("stdout", "stderr")}
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        **pipes,
    )
    os.close(writer)
    while not (run_dir / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.close(reader)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert only_checkpoint(run_dir) > 0


def test_an_error_that_nobody_reads_leaves_nothing_for_python_to_flush_as_it_exits(monkeypatch):
    """Python 3.13 would exit with 120 rather than with the program's code."""
    reader, writer = os.pipe()
    os.close(reader)

    def fail(_: Sequence[str]) -> None:
        raise ValueError("the error")

    with os.fdopen(writer, "w") as unread, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", unread)
        assert run_command(fail, []) == 2
        unread.flush()


def test_a_second_process_is_kept_out_of_a_run_at_work(long_run, run_train, capfd):
    arguments, run_dir = long_run
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (run_dir / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert train.main(arguments) == 2
    error = capfd.readouterr().err
    assert f"output_dir {run_dir} is in use by another process" in error
    assert error.count("\n") == 1
    process.kill()
    process.wait()
    assert only_one_line_per_step(run_dir)


def only_one_line_per_step(run_dir: Path) -> bool:
    steps = [line["step"] for line in read_metrics(run_dir)]
    return len(steps) == len(set(steps))


def test_the_handlers_are_as_before_after_a_run(run_train):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run_train(train__max_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def started(arguments: list[str], log: Path, until: str) -> subprocess.Popen[bytes]:
    """A process of its own session, once its output has a text."""
    with log.open("wb") as output:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            arguments,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    while until not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return process


@pytest.fixture
def long_run(run_train, monkeypatch, tmp_path) -> tuple[list[str], Path]:
    """Arguments of a run of thousands of updates, and its folder."""
    arguments: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda argv: arguments.extend(argv) or 0)
        run_dir = run_train(
            output_dir=tmp_path / "long",
            train__num_epochs=5000,
            eval__every=10**6,
            eval__at_start=False,
            checkpoint__every_steps=10**6,
            log__every_steps=5,
        )
    return arguments, run_dir


def only_checkpoint(run_dir: Path) -> int:
    (folder,) = (run_dir / "checkpoints").iterdir()
    return int(folder.name.removeprefix("step_"))


@pytest.mark.parametrize("to_all", [True, False], ids=["the terminal's ctrl-c", "one process alone"])
def test_two_processes_stop_after_the_same_update(long_run, tmp_path, to_all):
    arguments, run_dir = long_run
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = started([*torchrun, "train.py", *arguments], log := tmp_path / "log", until="step 5/")
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    text = log.read_text()
    assert text.count("Stopped after update") == 1, text
    assert f"torchrun --nproc_per_node 2 train.py --config {run_dir}/config.yaml" in text
    assert f"Stopped after update {only_checkpoint(run_dir)};" in text


def test_the_death_of_the_launcher_stops_its_process_too(long_run, tmp_path):
    arguments, run_dir = long_run
    accelerate = Path(sys.executable).parent / "accelerate"
    launch = [str(accelerate), "launch", "--cpu", "train.py"]
    process = started([*launch, *arguments], log := tmp_path / "log", until="step 5/")
    process.send_signal(signal.SIGTERM)  # to the launcher alone, as `kill` of its number does
    assert process.wait(timeout=60) == -signal.SIGTERM
    deadline = time.monotonic() + 60
    while "To go on" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert f"Stopped after update {only_checkpoint(run_dir)};" in log.read_text()


def test_a_sweep_that_is_killed_takes_its_run_with_it(long_run, tmp_path):
    arguments, folder = long_run
    sweep = [sys.executable, "-m", "finetune", "sweep", "--over", "lora.r=4,2"]
    process = started([*sweep, *arguments], log := tmp_path / "log", until="step 5/")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while "To go on" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert f"Stopped after update {only_checkpoint(folder / 'r=4')};" in log.read_text()
    assert not (folder / "r=2").exists()
