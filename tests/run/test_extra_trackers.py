"""Trackers beside TensorBoard: the same values in each, in one run of theirs however often ours resumes, and
no harm to the run from one that fails."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from conftest import ROOT, read_metrics
from kills import wait_for_the_next_second
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.run import extra_trackers
from finetune.run.extra_trackers import recorded_links
from finetune.run.tracker import Tracker
from finetune.runtime import accelerator as machine
from finetune.runtime.signals import StopRequest

SIX = {"train__gradient_accumulation_steps": 3, "log__every_steps": 2}  # six updates, three an epoch
Points = dict[tuple[str, int], list[Any]]
"""What a tracker holds: by name and step, each value it was sent"""


def lines_of(run_dir: Path) -> dict[tuple[str, int], float]:
    """The metrics that the run's own file holds, by name and step."""
    return {
        (f"{entry['split']}/{name}", entry["step"]): value
        for entry in read_metrics(run_dir)
        for name, value in entry.items()
        if name not in ("split", "step", "epoch")
    }


def texts_of(run_dir: Path) -> dict[tuple[str, int], str]:
    """The answers that the run's own file holds, by name and step."""
    lines = map(json.loads, (run_dir / "answers.jsonl").read_text().splitlines())
    return {
        (name, entry["step"]): text
        for entry in lines
        for name, text in extra_trackers.answers_as_text(entry["answers"]).items()
    }


class Notebook(GeneralTracker):
    """A tracker that appends what it is told to a file: what the others have in common, with no package."""

    name, requires_logging_directory = "notebook", False
    fails_at: int | None = None

    def __init__(self, project: str, name: str, **settings: Any) -> None:
        super().__init__()
        self.file, self.settings = Path(project, f"{name}.txt"), settings
        self.id = settings["id"]
        self.url = f"notebook of {name}"

    @property
    def tracker(self) -> "Notebook":
        return self

    def _write(self, *note: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(note) + "\n")

    def start(self) -> None:
        self.file.parent.mkdir(exist_ok=True)
        self._write("start", self.id, self.settings["config"])

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("no answer\nfrom the server")
        self._write("log", values, step)

    def log_table(self, table_name: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self._write("log", dict(data), step)

    def finish(self) -> None:
        self._write("finish")


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    """A notebook stands for Weights & Biases; this is its file."""
    monkeypatch.setenv("WANDB_PROJECT", str(tmp_path / "store"))
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    monkeypatch.setattr(machine, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    return tmp_path / "store" / "run.txt"


def notes_in(file: Path, kind: str) -> list[Any]:
    return [note[1:] for note in map(json.loads, file.read_text().splitlines()) if note[0] == kind]


def points_in(file: Path) -> Points:
    points: Points = {}
    for values, step in notes_in(file, "log"):
        for name, value in values.items():
            points.setdefault((name, step), []).append(value)
    return points


def once(values: dict[Any, Any]) -> Points:
    return {key: [value] for key, value in values.items()}


WITH_NOTEBOOK = {**SIX, "log__trackers": "[wandb]"}


def test_a_tracker_gets_the_config_each_metric_and_each_answer_of_the_files_once(run_train, notebook, capsys):
    run_dir = run_train(**WITH_NOTEBOOK)
    assert points_in(notebook) == once({**lines_of(run_dir), **texts_of(run_dir)})
    ((_, settings),) = notes_in(notebook, "start")
    assert settings["optim.learning_rate"] == 1e-3
    assert settings["output_dir"] == str(run_dir)
    assert len(notes_in(notebook, "finish")) == 1
    link = "notebook of run"
    assert recorded_links(run_dir) == [("wandb", link)]
    output = capsys.readouterr().out
    assert output.count(link) == 2  # when it starts, and when it has ended


def stopped_and_resumed(run_train: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Path:
    """The folder of a run that was stopped after update 3, and resumed."""
    advance = Tracker.advance

    def stopping_advance(self: Tracker, step: int) -> None:
        advance(self, step)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", stopping_advance)
        run_dir: Path = run_train(expect=128 + signal.SIGTERM, **settings)
    wait_for_the_next_second(run_dir)
    run_train(**settings)
    return run_dir


def test_a_resumed_run_goes_on_in_the_same_run_of_its_tracker(run_train, notebook, monkeypatch):
    run_dir = stopped_and_resumed(run_train, monkeypatch, WITH_NOTEBOOK)
    assert points_in(notebook) == once({**lines_of(run_dir), **texts_of(run_dir)})
    assert len({identity for identity, _ in notes_in(notebook, "start")}) == 1


def test_after_a_kill_a_tracker_lacks_nothing_and_has_at_most_one_line_twice(
    run_train, notebook, monkeypatch
):
    class KilledError(BaseException):
        pass

    advance = Tracker.advance

    def killed_advance(self: Tracker, step: int) -> None:
        advance(self, step)
        if step == 5:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", killed_advance)
        patch.setattr(Tracker, "__exit__", lambda *_: None)  # nothing is finished
        with pytest.raises(KilledError):
            run_train(**WITH_NOTEBOOK, checkpoint__every_steps=2)
    run_train(**WITH_NOTEBOOK, checkpoint__every_steps=2)
    run_dir = notebook.parent.parent / "run"
    points, expected = points_in(notebook), {**lines_of(run_dir), **texts_of(run_dir)}
    assert points.keys() == expected.keys()
    twice = {key for key, values in points.items() if len(values) > 1}
    assert len({(name.partition("/")[0], step) for name, step in twice}) <= 1
    assert all(values[-1] == expected[key] for key, values in points.items() if key not in twice)


def test_a_tracker_that_is_named_later_gets_all_that_the_files_hold(run_train, notebook, monkeypatch):
    monkeypatch.setattr(StopRequest, "should_stop", lambda self: False)
    run_dir = run_train(**SIX)
    shutil.rmtree(run_dir / "adapter")  # as if it had been killed before the result
    wait_for_the_next_second(run_dir)
    run_train(**WITH_NOTEBOOK)
    assert points_in(notebook) == once({**lines_of(run_dir), **texts_of(run_dir)})


@pytest.mark.parametrize("first_failure", [0, 4])
def test_a_tracker_that_fails_is_named_once_and_the_run_ends_as_without_it(
    run_train, notebook, monkeypatch, capfd, tmp_path, first_failure
):
    monkeypatch.setattr(Notebook, "fails_at", first_failure)
    run_dir = run_train(**WITH_NOTEBOOK)
    output = capfd.readouterr()
    (line,) = [line for line in output.out.splitlines() if line.startswith("wandb failed")]
    assert "ConnectionError: no answer from the server" in line
    assert output.err == ""
    assert all(step < first_failure for (name, step) in points_in(notebook) if name.startswith("train/"))
    monkeypatch.setattr(Notebook, "fails_at", None)
    plain = run_train(**SIX, output_dir=tmp_path / "plain")
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (run_dir, plain)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_tracker_that_does_not_start_is_named_and_gets_all_when_the_run_resumes(
    run_train, notebook, monkeypatch, capsys
):
    notebook.parent.write_text("a file where the store must be")
    run_dir = run_train(**WITH_NOTEBOOK, train__max_steps=6)
    assert capsys.readouterr().out.count("wandb failed and gets nothing more") == 1
    notebook.parent.unlink()
    shutil.rmtree(run_dir / "adapter")
    wait_for_the_next_second(run_dir)
    run_train(**WITH_NOTEBOOK, train__max_steps=6)
    assert points_in(notebook) == once({**lines_of(run_dir), **texts_of(run_dir)})


def test_a_tracker_that_is_not_installed_is_said_with_its_command(run_train, monkeypatch, capsys):
    monkeypatch.setattr(machine, "get_available_trackers", lambda: ["tensorboard"])
    run_dir = run_train(**SIX, log__trackers="[mlflow,swanlab]", train__max_steps=1)
    recorded = json.loads((run_dir / "environment.json").read_text())["settings"]
    (choice,) = [choice for choice in recorded if choice["name"] == "trackers"]
    assert (choice["requested"], choice["actual"]) == ("tensorboard, mlflow, swanlab", "tensorboard")
    assert choice["reason"] == "not installed; to have them: pip install mlflow swanlab"
    assert recorded_links(run_dir) == []


# The libraries themselves, where they are installed


def mlflow_points(run_dir: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient()
    run_id = json.loads((run_dir / "trackers" / "mlflow.json").read_text())["run"]
    points: Points = {}
    for name in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, name):
            points.setdefault((name, metric.step), []).append(metric.value)
    return points


def mlflow_texts(run_dir: Path) -> dict[tuple[str, int], str]:
    import mlflow
    from mlflow import MlflowClient

    run_id = json.loads((run_dir / "trackers" / "mlflow.json").read_text())["run"]
    texts = {}
    for answer in MlflowClient().list_artifacts(run_id, "answers"):
        for file in MlflowClient().list_artifacts(run_id, answer.path):
            step = int(Path(file.path).stem.removeprefix("step_"))
            texts[answer.path, step] = mlflow.artifacts.load_text(f"runs:/{run_id}/{file.path}")
    return texts


def trackio_points(run_dir: Path) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    run_id = json.loads((run_dir / "trackers" / "trackio.json").read_text())["run"]
    points: Points = {}
    for entry in SQLiteStorage.get_logs("finetune", run_id=run_id):
        for name, value in entry.items():
            if name not in ("step", "timestamp"):
                value = value["_value"] if isinstance(value, dict) else value
                points.setdefault((name, entry["step"]), []).append(value)
    return points


def tensorboard_points(run_dir: Path) -> Points:
    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    points: Points = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            points.setdefault((name, event.step), []).append(event.value)
    return points


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Iterator[Path]:
    """Empty local stores of MLflow and trackio."""
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    pytest.importorskip("sqlalchemy", reason="MLflow's local store needs sqlalchemy")
    trackio = pytest.importorskip("trackio", reason="needs trackio")
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # MLflow puts artifacts there
        patch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", folder / "trackio")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        yield folder


ALL = {**SIX, "log__trackers": "[tensorboard,mlflow,trackio]"}


@pytest.mark.usefixtures("stores")
def test_mlflow_and_trackio_hold_the_same_values_to_the_last_digit_and_go_on_when_the_run_resumes(
    run_train, monkeypatch
):
    from mlflow import MlflowClient

    run_dir = stopped_and_resumed(run_train, monkeypatch, ALL)
    metrics, texts = lines_of(run_dir), texts_of(run_dir)
    assert mlflow_points(run_dir) == once(metrics)
    assert mlflow_texts(run_dir) == texts
    assert trackio_points(run_dir) == once({**metrics, **texts})
    # An event file holds numbers in fp32.
    assert tensorboard_points(run_dir) == once({key: float(np.float32(x)) for key, x in metrics.items()})
    (run,) = MlflowClient().search_runs([MlflowClient().get_experiment_by_name("finetune").experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.learning_rate"] == "0.001"
    assert run.data.params["output_dir"] == str(run_dir)


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
@pytest.mark.parametrize("how", ["its log method raises", "its store is removed"])
def test_with_either_of_them_failing_midway_the_run_ends_and_the_other_has_everything(
    run_train, stores, monkeypatch, capfd, tmp_path, name, how
):
    import mlflow

    # A store of its own: a database that was removed under MLflow stays unusable in this process.
    shutil.copy(stores / "mlflow.db", tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    advance = Tracker.advance

    def failing_advance(self: Tracker, step: int) -> None:
        advance(self, step)
        if step == 3 and how == "its log method raises":

            def log(*_: Any, **__: Any) -> None:
                raise ConnectionError("gone")

            monkeypatch.setattr(LOGGER_TYPE_TO_CLASS[name], "log", log)
        elif step == 3 and name == "mlflow":
            (tmp_path / "mlflow.db").unlink()
        elif step == 3:
            shutil.move(stores / "trackio", tmp_path / "moved")
            (stores / "trackio").write_text("no folder")

    monkeypatch.setattr(Tracker, "advance", failing_advance)
    run_dir = run_train(**ALL)
    if how == "its store is removed" and name == "trackio":
        (stores / "trackio").unlink()
        shutil.move(tmp_path / "moved", stores / "trackio")
    output = capfd.readouterr()
    if name == "mlflow" or how == "its log method raises":
        assert output.out.count(f"{name} failed and gets nothing more") == 1
    other = {"mlflow": trackio_points, "trackio": mlflow_points}[name]
    texts = texts_of(run_dir) if name == "mlflow" else {}
    assert other(run_dir) == once({**lines_of(run_dir), **texts})
    assert (run_dir / "adapter").is_dir()


def test_each_tracker_is_documented():
    text = (ROOT / "docs" / "trackers.md").read_text(encoding="utf-8")
    assert all(name in text for name in ("tensorboard", "mlflow", "trackio", "wandb", "swanlab"))
