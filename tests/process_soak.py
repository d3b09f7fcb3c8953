"""Kill one process of a run or all, and see that the run goes on with as many, fewer or more of them, with a
shared or a whole base, and ends as if it had never been killed. `python tests/soak.py --processes` starts
this.

The processes are started, watched and started again by torchrun's own agent, and talk over gloo. They are
forked from one that has the libraries loaded: an import takes longer than the run. Their last update of an
epoch has one example and so has the evaluation, so that all processes but one have none.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from faults import Fault, arm, points
from safetensors.numpy import load_file
from soak import end_of, has_ended, make_inputs, result_of, start
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from finetune.run.checkpoint import fault_of, list_checkpoints

TOLERANCE = 1e-5  # of a metric, relative
PATIENCE = 240.0  # seconds after which a launcher whose process was killed should have ended
# 20 rows: 19 to train on, in updates of 6, 6, 6 and 1, and 1 to evaluate.
NUM_UPDATES = 20
SETTINGS = {
    "model.quantization": "int8",
    "fast.int8_matmul": "dequantize",
    "lora.lora_dropout": 0,
    "data.max_length": 128,
    "data.eval_fraction": 0.05,
    "train.global_batch_size": 6,
    "train.micro_batch_size": 1,
    "train.max_tokens_per_micro_batch": 128,
    "train.mixed_precision": "no",
    "train.num_epochs": NUM_UPDATES // 4,
    "optim.name": "adamw",
    "optim.learning_rate": 1e-3,
    "log.every_steps": 2,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 3,
    "eval.every": 5,
}


class Layout(NamedTuple):
    sharding: str
    processes: int

    def __str__(self) -> str:
        return f"{self.sharding} x{self.processes}"


class Change(NamedTuple):
    """The processes of a run that is killed, and those that go on with it; None: its own launcher starts it
    again (`--max-restarts`)."""

    before: Layout
    after: Layout | None

    def __str__(self) -> str:
        return f"{self.before} -> {self.after or 'started again by its launcher'}"


CHANGES = [
    Change(Layout("none", 2), Layout("none", 2)),
    Change(Layout("base", 2), None),
    Change(Layout("none", 2), Layout("none", 1)),
    Change(Layout("base", 2), Layout("base", 2)),
    Change(Layout("none", 1), Layout("none", 3)),
    Change(Layout("none", 2), None),
    Change(Layout("base", 2), Layout("none", 1)),
    Change(Layout("base", 2), Layout("base", 3)),
    Change(Layout("none", 2), Layout("base", 2)),
]


class Kill(NamedTuple):
    """When a run is killed, and how much of it."""

    all: bool
    fault: Fault | None
    """At this point, or"""
    seconds: float
    """so many seconds after it has started, or"""
    updates: int
    """after it has logged so many updates and these seconds"""

    def __str__(self) -> str:
        when = "in the updates" if self.updates else "at any moment"
        return f"{'all' if self.all else 'one'}, {self.fault.point if self.fault else when}"


class Soak:
    """The inputs, the run that is never killed, and what has been found."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.log, self.rng = folder, folder / "log.txt", random.Random(seed)
        self.kills: list[tuple[Change, Kill]] = []
        self.differences: dict[str, float] = {}
        assert end_of(start(lambda: make_inputs(folder), self.log)) == 0, self.log.read_text()
        (folder / "none.yaml").write_text("{}\n", encoding="utf-8")
        started = time.monotonic()
        self.run_to_the_end(folder / "undisturbed", Layout("none", 1))
        self.seconds = time.monotonic() - started
        self.expected = result_of(folder / "undisturbed")

    def launch(self, output_dir: Path, layout: Layout, fault: Fault | None = None, restarts: int = 0) -> int:
        """Start a run in a session of its own; returns the number of its launcher, or of its only process."""
        settings = {
            "model.name_or_path": self.folder / "model",
            "data.path": self.folder / "rows.jsonl",
            "output_dir": output_dir,
            "train.sharding": layout.sharding,
            **SETTINGS,
        }
        argv = ["--config", str(self.folder / "none.yaml")]
        argv += [part for key, value in settings.items() for part in (f"--{key}", str(value))]

        def job() -> int:
            os.setsid()
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # what --max-restarts needs over gloo
            if layout.processes == 1:
                return work(argv, fault)
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=layout.processes,
                run_id=output_dir.name,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=restarts,
                start_method="fork",
            )
            elastic_launch(config, as_process)(argv, fault)
            return 0

        return start(job, self.log)

    def run_to_the_end(self, output_dir: Path, layout: Layout) -> None:
        assert end_of(self.launch(output_dir, layout)) == 0, self.said()

    def said(self) -> str:
        """The end of what the processes printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-6000:]

    def choose_kill(self, change: Change, output_dir: Path) -> Kill:
        """Of three, one is at a named point, one in the updates and one at any moment."""
        number = len(self.kills)
        all_of_them = change.after is not None and self.rng.random() < 0.6
        if number % 3 == 0:
            name, point = self.rng.choice(list(points(NUM_UPDATES).items()))
            rank = self.rng.randrange(change.before.processes) if point.by_all else 0
            call = self.rng.randint(1, point.calls)
            return Kill(all_of_them, Fault(name, rank, call, output_dir.with_suffix(".halted")), 0, 0)
        if number % 3 == 1:
            return Kill(all_of_them, None, self.rng.uniform(0, 1), self.rng.randrange(2, NUM_UPDATES - 3))
        return Kill(all_of_them, None, self.rng.uniform(0, self.seconds), 0)

    def kill_and_go_on(self, change: Change) -> None:
        """Kill a run of `change.before` once, and compare what `change.after` makes of it."""
        output_dir = self.folder / f"run-{len(self.kills)}"
        kill = self.choose_kill(change, output_dir)
        print(f"{len(self.kills) + 1:3} {change}: {kill}", end=" ", flush=True)
        began = time.monotonic()
        while True:
            launcher = self.launch(output_dir, change.before, kill.fault, int(change.after is None))
            code = await_moment(launcher, output_dir, change.before, kill)
            if code is None:
                break
            assert code == 0, f"{change}: exit code {code} without a kill\n{self.said()}"
            assert kill.fault is None, f"the run has no such point: {kill}"
            shutil.rmtree(output_dir)  # it was faster: the next one is killed earlier
            kill = kill._replace(seconds=kill.seconds / 2)
        strike(launcher, kill, self.rng)
        code = wait_for_end(launcher)
        assert (code == 0) == (change.after is None), f"{change}, {kill}: exit code {code}\n{self.said()}"
        await_empty_session(launcher)
        if change.after is not None:
            faults = {path.name: fault_of(path) for path in list_checkpoints(output_dir)}
            assert not any(faults.values()), f"{change}, {kill}: {faults}"
            self.run_to_the_end(output_dir, change.after)
        self.compare(output_dir, f"{change}, {kill}")
        self.kills.append((change, kill))
        shutil.rmtree(output_dir)
        print(f"({time.monotonic() - began:.0f} s)", flush=True)

    def compare(self, output_dir: Path, what: str) -> None:
        """The run has ended as the one that was never killed, to rounding."""
        found, expected = result_of(output_dir), self.expected
        assert found.keys() == expected.keys(), f"{what}: {found.keys() ^ expected.keys()}"
        assert found["answers"] == expected["answers"], what
        names = [{path.name for path in run.iterdir()} for run in (output_dir, self.folder / "undisturbed")]
        assert names[0] == names[1], f"{what}: {names[0] ^ names[1]}"
        for line, other in zip(found["metrics"], expected["metrics"], strict=True):
            assert line.keys() == other.keys(), what
            for key, value in line.items():
                self.note(f"metrics.jsonl, {key}", value, other[key], what)
        for tag in (tag for tag in expected if tag.startswith(("train/", "eval/"))):
            assert [step for step, _ in found[tag]] == [step for step, _ in expected[tag]], f"{what}: {tag}"
            for (_, value), (_, other) in zip(found[tag], expected[tag], strict=True):
                self.note("TensorBoard", value, other, what)
        ours, theirs = (
            load_file(folder / "adapter" / "adapter_model.safetensors")
            for folder in (output_dir, self.folder / "undisturbed")
        )
        assert ours.keys() == theirs.keys(), what
        distance = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in theirs) ** 0.5
        size = sum(float((tensor**2).sum()) for name, tensor in theirs.items() if "lora_B" in name) ** 0.5
        self.note("adapter", size + distance, size, what)  # beside B, which training alone has made

    def note(self, name: str, found: Any, expected: Any, what: str) -> None:
        """Compare two values, and keep the largest relative difference."""
        if isinstance(expected, str):
            assert found == expected, f"{what}: {name}"
            return
        difference = abs(found - expected) / max(abs(expected), 1e-30)
        assert difference <= TOLERANCE, f"{what}: {name} is {found}, not {expected}"
        self.differences[name] = max(difference, self.differences.get(name, 0.0))

    def record(self) -> dict[str, Any]:
        return {
            "kills": len(self.kills),
            "of_one_process": sum(not kill.all for _, kill in self.kills),
            "of_all_processes": sum(kill.all for _, kill in self.kills),
            "changes": dict(Counter(str(change) for change, _ in self.kills)),
            "moments": dict(Counter(str(kill) for _, kill in self.kills)),
            "largest_relative_differences": self.differences,
        }


def work(argv: list[str], fault: Fault | None) -> int:
    if fault is not None:
        arm(fault)
    return train.main(argv)


def as_process(argv: list[str], fault: Fault | None) -> None:
    """One process of several, which should not have its launcher's handlers of signals."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    sys.exit(work(argv, fault))


def await_moment(launcher: int, output_dir: Path, layout: Layout, kill: Kill) -> int | None:
    """Wait for the moment of `kill`; the exit code of a run that has ended before."""

    def until(is_due: Callable[[], bool]) -> int | None:
        while not is_due():
            if (code := has_ended(launcher)) is not None:
                return code
            time.sleep(0.002)
        return None

    if kill.fault is not None:
        file = kill.fault.file
        return until(lambda: file.exists() and file.read_text() != "")
    if layout.processes > 1:
        code = until(lambda: len(processes_of(launcher)) == layout.processes)
        if code is not None:
            return code
    if kill.updates:
        code = until(lambda: updates_logged(output_dir) >= kill.updates)
        if code is not None:
            return code
    deadline = time.monotonic() + kill.seconds
    return until(lambda: time.monotonic() >= deadline)


def updates_logged(output_dir: Path) -> int:
    file = output_dir / "metrics.jsonl"
    return 2 * file.read_text(encoding="utf-8").count('"train"') if file.exists() else 0


def processes_of(launcher: int) -> list[psutil.Process]:
    return psutil.Process(launcher).children()


def strike(launcher: int, kill: Kill, rng: random.Random) -> None:
    """Kill all processes with their launcher, or the one that halted, or any one."""
    if kill.all:
        os.killpg(launcher, signal.SIGKILL)
    elif kill.fault is not None:
        os.kill(int(kill.fault.file.read_text()), signal.SIGKILL)
    else:
        victims = [process.pid for process in processes_of(launcher)] or [launcher]
        os.kill(rng.choice(victims), signal.SIGKILL)


def wait_for_end(launcher: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while (code := has_ended(launcher)) is None:
        assert time.monotonic() < deadline, "the launcher goes on though its process was killed"
        time.sleep(0.01)
    return code


def await_empty_session(session: int) -> None:
    """No process that the launcher started, or was started by one, is left."""
    deadline = time.monotonic() + 30
    while left := [process for process in psutil.process_iter() if is_in(session, process)]:
        assert time.monotonic() < deadline, f"these are left: {left}"
        time.sleep(0.05)


def is_in(session: int, process: psutil.Process) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def soak(kills: int, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """What has been found, after each kill.

    Raises AssertionError for a state that no run goes on from, or an end that is not the undisturbed.
    """
    state = Soak(folder, seed)
    for number in range(kills):
        state.kill_and_go_on(CHANGES[number % len(CHANGES)])
        yield state.record()
