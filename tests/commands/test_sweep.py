"""A sweep: one run for each combination of values, one after another; it can be stopped and resumed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics

from finetune.__main__ import main
from finetune.run.sweep import TRAIN

# In the place of train.py: it does at once what its argument says of this run's value of lora.r.
STAND_IN = """
import json, signal, sys, time
from pathlib import Path
argv = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if "=" in a)
run_dir = Path(argv["output_dir"])
with (run_dir.parent.parent / "started").open("a") as file:
    file.write(argv["lora.r"] + "\\n")
do = json.loads((run_dir.parent.parent / "do.json").read_text()).get(argv["lora.r"], "finish")
if do == "wait":
    def stop(number, _):
        with (run_dir.parent.parent / "signals").open("a") as file:
            file.write(f"{number}\\n")
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    (run_dir.parent.parent / "ready").touch()
    time.sleep(60)
if do != "finish":
    sys.exit(do)
run_dir.mkdir(exist_ok=True)
(run_dir / "adapter").mkdir()
(run_dir / "environment.json").write_text(json.dumps({
    "base": "", "int8": "", "global_batch_size": 1, "num_processes": 1, "started_from": None,
    "adapter_step": 2,
    "data": {"fingerprint": "train-eval" + argv.get("data.split_seed", "")}}))
losses = {"0": 3.0, "2": 1 / int(argv["lora.r"]), "4": 2.0}
(run_dir / "metrics.jsonl").write_text("".join(
    json.dumps({"split": "eval", "step": int(s), "loss": loss, "chrf": 30 * loss}) + "\\n"
    for s, loss in losses.items()))
import os
sys.path.insert(0, os.environ["ROOT"])
from finetune.config_parsing import config_to_yaml, parse_config
(run_dir / "config.yaml").write_text(config_to_yaml(parse_config(sys.argv[1:])))
"""


@pytest.fixture
def pages(monkeypatch) -> list[tuple[list[str], Path]]:
    """What the page that compares runs was asked for."""
    written: list[tuple[list[str], Path]] = []

    def write_comparison(run_dirs: Any, page: Path) -> None:
        written.append(([path.name for path in run_dirs], page))

    monkeypatch.setattr("finetune.commands.sweep.write_comparison", write_comparison)
    return written


@pytest.fixture
def config_file(tmp_path, tiny_model_dir, rows_file) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(
        f"model: {{name_or_path: {tiny_model_dir}, quantization: none}}\n"
        f"data: {{path: {rows_file}, max_length: 128}}\n"
        "train: {max_steps: 2, mixed_precision: no}\n"
        "optim: {name: adamw}\n"
    )
    return path


@pytest.fixture
def sweep(tmp_path, config_file, monkeypatch, pages) -> Callable[..., int]:
    """Run the command into tmp_path / sweep; with `do`, with a stand-in of train.py that does it."""

    def run(*arguments: str, do: dict[str, Any] | None = None) -> int:
        if do is not None:
            script = tmp_path / "stand_in.py"
            script.write_text(STAND_IN)
            (tmp_path / "do.json").write_text(json.dumps(do))
            monkeypatch.setenv("ROOT", str(TRAIN.parent))
            monkeypatch.setattr("finetune.run.sweep.TRAIN", script)
        folder = str(tmp_path / "sweep")
        return main(["sweep", "--config", str(config_file), "--output_dir", folder, *arguments])

    return run


def started(tmp_path: Path) -> list[str]:
    """The values of lora.r that the stand-in was started with, so far."""
    path = tmp_path / "started"
    return path.read_text().split() if path.exists() else []


def outcomes(tmp_path: Path) -> dict[str, str]:
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    return {name: run["outcome"] for name, run in record["runs"].items()}


def test_a_sweep_trains_each_value_and_records_what_diverged(sweep, tmp_path, capfd, pages):
    """For real: the first learning rate is beyond all bounds."""
    assert sweep("--over", "optim.learning_rate=1e30,1e-2", "--data.num_samples=16") == 1
    said = capfd.readouterr()
    assert "stopped: a number of update 2 is not finite" in said.err
    bad, good = "learning_rate=1e+30", "learning_rate=0.01"
    assert outcomes(tmp_path) == {bad: "failed, exit code 1", good: "finished"}
    assert (tmp_path / "sweep" / good / "adapter").is_dir()
    loss = read_metrics(tmp_path / "sweep" / good)[-1]["loss"]
    assert f"Lowest eval loss: {loss:.4f}, of {tmp_path / 'sweep' / good}" in said.out
    assert pages == []  # there is nothing to compare it with


def test_runs_that_fail_do_not_keep_the_others_from_being_made(sweep, tmp_path, capfd, pages):
    assert sweep("--over", "lora.r=1,2,4,8", do={"2": 1, "4": 77}) == 1
    assert started(tmp_path) == ["1", "2", "4", "8"]
    assert list(outcomes(tmp_path).values()) == [
        "finished",
        "failed, exit code 1",
        "failed, exit code 77",
        "finished",
    ]
    assert "Lowest eval loss: 0.1250, of" in capfd.readouterr().out  # of the adapter's step, not of the last
    assert [names for names, _ in pages] == [["r=1", "r=8"]]
    assert sweep("--over", "lora.r=1,2,4,8", do={}) == 0
    assert started(tmp_path)[4:] == ["2", "4"]
    assert [names for names, _ in pages][1:] == [["r=1", "r=2", "r=4", "r=8"]]


def test_the_best_is_that_by_the_metric_which_the_runs_follow(sweep, capfd):
    answers = ["--eval.answers=2", "--checkpoint.keep_best=true", "--checkpoint.best_by=chrf"]
    assert sweep("--over", "lora.r=8,2,4", *answers, do={}) == 0
    said = capfd.readouterr().out
    assert all(heading in said for heading in ("eval loss", "eval chrf"))
    (line,) = [line for line in said.splitlines() if line.startswith("Highest eval chrf: 15.0000, of ")]
    assert line.endswith("r=2")  # whose loss is the highest


def test_runs_that_follow_different_metrics_are_ranked_by_their_loss(sweep, capfd):
    assert sweep("--over", "checkpoint.best_by=chrf,loss", "--lora.r=4", "--eval.answers=2", do={}) == 0
    said = capfd.readouterr().out
    assert "The runs differ in checkpoint.best_by: they are ranked by their loss." in said
    assert "Lowest eval loss: 0.2500, of " in said


def test_what_train_py_cannot_start_of_stops_the_sweep_at_once(sweep, tmp_path, capfd, pages):
    assert sweep("--over", "lora.r=1,2,4", do={"2": 2}) == 2
    assert started(tmp_path) == ["1", "2"]
    assert list(outcomes(tmp_path).values()) == ["finished", "failed, exit code 2", "not begun"]
    assert pages == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_the_printed_command_goes_on(sweep, tmp_path, capfd, number):
    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    code = sweep("--over", "lora.r=1,2,4", do={"2": "wait"})
    thread.join()
    assert code == 128 + number
    assert (tmp_path / "signals").read_text().split() == [str(int(number))]
    assert started(tmp_path) == ["1", "2"]
    assert list(outcomes(tmp_path).values()) == ["finished", "stopped", "not begun"]
    command = capfd.readouterr().out.splitlines()[-1].strip()
    assert command.startswith("python -m finetune sweep --config ")
    assert command.endswith("--over lora.r=1,2,4")
    assert sweep("--over", "lora.r=1,2,4", do={}) == 0
    assert started(tmp_path)[2:] == ["2", "4"]


def test_a_run_that_someone_else_stopped_stops_the_sweep(sweep, tmp_path, capfd):
    assert sweep("--over", "lora.r=1,2,4", do={"2": 143}) == 143
    assert started(tmp_path) == ["1", "2"]
    assert "To resume the sweep:" in capfd.readouterr().out


def test_runs_on_other_eval_rows_are_told_apart(sweep, capfd):
    assert sweep("--over", "data.split_seed=1,2", "--lora.r=4", do={}) == 0
    assert "not evaluated on the same examples" in capfd.readouterr().out


def test_each_value_meets_each_and_the_folders_are_named_by_them(sweep, tmp_path, pages):
    assert sweep("--over", "lora.r=4,8", "--over", "optim.learning_rate=1e-4,2e-4", do={}) == 0
    assert list(outcomes(tmp_path)) == [
        "r=4_learning_rate=0.0001",
        "r=4_learning_rate=0.0002",
        "r=8_learning_rate=0.0001",
        "r=8_learning_rate=0.0002",
    ]
    # The same values, written and ordered otherwise, are the same runs.
    assert sweep("--over", "optim.learning_rate=0.0002,1E-4", "--over", "lora.r=8,4", do={}) == 0
    assert len(started(tmp_path)) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--over", "lora.r=4,0"], ["lora.r must be at least 1, not 0"]),
        (["--over", "lora.rank=4"], ["unknown key lora.rank; the nearest is lora.r"]),
        (["--over", "lora.r=4,x"], ["lora.r"]),
        (["--over", "lora.r=4,4"], ["r=4 stands twice"]),
        (["--over", "lora.r=4", "--over", "lora.r=8"], ["lora.r stands twice"]),
        (["--over", "optim.learning_rate=1e-4,0.0001"], ["stands twice"]),
        (["--over", "lora.r"], ["--over lora.r has no values"]),
        (["--over", "lora.r="], ["no list of values"]),
        (["--over", "lora.r=4],[8"], ["no list of values"]),
        (["--over", "output_dir=a,b"], ["names the folder of each run itself"]),
        (["--over", "lora={r: 4}"], ["lora"]),
        (["--over", "lora.r=4,8", "--random", "3"], ["--random must be between 1 and 2"]),
        (["--over", "lora.r=4,8", "--random", "0"], ["--random must be between 1 and 2"]),
        (["--lora.r", "4"], ["--over"]),
        (["--over", "lora.r=4,8", "--optim.lr", "1"], ["unknown key optim.lr"]),
    ],
    ids=" ".join,
)
def test_a_wrong_argument_or_combination_is_named_before_anything_runs(
    sweep, tmp_path, capfd, arguments, words
):
    assert sweep(*arguments, do={}) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == []
    assert started(tmp_path) == []
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_another_sweep_other_files_or_other_runs_is_refused(sweep, tmp_path, capfd):
    assert sweep("--over", "lora.r=4", do={}) == 0
    assert sweep("--over", "train.seed=4,5", do={}) == 2
    assert "holds a sweep over lora.r, and this one is over train.seed" in capfd.readouterr().err
    assert sweep("--over", "lora.r=4,8", "--train.seed=3", do={}) == 2
    assert "r=4 holds a run of another configuration (train.seed was 42, is 3)" in capfd.readouterr().err
    assert started(tmp_path) == ["4"]
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    assert sweep("--over", "lora.r=4", do={}) == 2
    assert "is no record of a sweep" in capfd.readouterr().err
    (tmp_path / "sweep" / "sweep.json").unlink()
    assert sweep("--over", "lora.r=4", do={}) == 2
    assert "holds other files and no sweep" in capfd.readouterr().err
