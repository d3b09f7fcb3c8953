"""The trackers of `log.trackers` beside TensorBoard: Accelerate's own for MLflow, trackio, wandb and SwanLab.

The files of a run are what counts, and a tracker has a copy of them. One that fails is named once and gets
nothing more, and training continues. A run that resumes continues the same run of each tracker, and first
sends it what it lacks of the files.
"""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from finetune.config import Config, flatten
from finetune.config_parsing import config_to_dict
from finetune.data.rows import text_of
from finetune.run.folder import ANSWERS, METRICS, read_lines
from finetune.runtime import console
from finetune.runtime.accelerator import installed_trackers
from finetune.runtime.files import write_atomically

PROJECT = "finetune"
"""The project (in MLflow, the experiment) that runs belong to in each tracker"""
RECORDS = "trackers"
"""A folder in a run's folder, with a JSON file for each tracker: the run's id and link, and what was sent"""


def add_extra_trackers(accelerator: Any, config: Config) -> None:
    """Let Accelerate start, feed and finish the trackers of `log.trackers` that are installed."""
    if accelerator.is_main_process:
        accelerator.log_with += [
            ExtraTracker(name, config)
            for name in installed_trackers(config.log.trackers)
            if name != "tensorboard"
        ]


class ExtraTracker(GeneralTracker):  # type: ignore[misc]
    """One of Accelerate's trackers, left out of the run from its first error on.

    What it was sent is recorded one message late, because some trackers keep the last one in memory for a
    moment: after a kill it may get that one twice, but misses none.
    """

    requires_logging_directory = False

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        super().__init__()
        self._config, self._run_dir = config, Path(config.output_dir)
        self._record_file = self._run_dir / RECORDS / f"{name}.json"
        self._wrapped: Any = None  # Accelerate's tracker, while it works
        self._run_id, self._link = "", ""
        self._sent: dict[str, int] = {}  # train, eval and answers: the step of the last that it was sent

    @property
    def tracker(self) -> Any:
        """The library's own object for the run; None where it has failed."""
        return None if self._wrapped is None else self._wrapped.tracker

    def start(self) -> None:
        """Start a run, or go on in the one that was recorded, and send it what it lacks of the files."""
        with self._left_out_on_error():
            record = json.loads(self._record_file.read_text()) if self._record_file.exists() else {}
            self._sent = record.get("sent", {})
            settings = _plain(flatten(config_to_dict(self._config)))
            self._wrapped = _start(self.name, self._run_dir.name, record.get("run"), settings)
            self._run_id, self._link = _identity(self.name, self._wrapped.tracker)
            self._write_record()
            console.say(f"{self.name}: {self._link}")
            self._catch_up()

    def _catch_up(self) -> None:
        lines = [
            (entry["step"], {f"{entry['split']}/{name}": entry[name] for name in _metrics_in(entry)})
            for entry in read_lines(self._run_dir / METRICS)
        ]
        lines += [
            (entry["step"], answers_as_text(entry["answers"]))
            for entry in read_lines(self._run_dir / ANSWERS)
        ]
        for step, values in sorted(lines, key=lambda line: line[0]):
            self.log(values, step)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Send the values of one kind (train, eval or answers), unless it has those of this step."""
        kind, at = next(iter(values)).partition("/")[0], step or 0
        if self._wrapped is None or at <= self._sent.get(kind, -1):
            return
        with self._left_out_on_error():
            _send(self.name, self._wrapped, values, at)
            self._write_record()
            self._sent[kind] = at

    def finish(self) -> None:
        """End the run there. Everything has reached it afterwards."""
        if self._wrapped is None:
            return
        with self._left_out_on_error():
            self._wrapped.finish()
            self._write_record()

    def _write_record(self) -> None:
        self._record_file.parent.mkdir(exist_ok=True)
        record = {"run": self._run_id, "link": self._link, "sent": self._sent}
        write_atomically(self._record_file, json.dumps(record, indent=1))

    @contextmanager
    def _left_out_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each library raises its own kinds
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            console.say(f"{self.name} failed and gets nothing more of this run, which goes on ({reason})")
            failed, self._wrapped = self._wrapped, None
            with suppress(Exception):  # so that another run of this process can start
                failed.finish()


def recorded_links(run_dir: Path) -> list[tuple[str, str]]:
    """Each tracker that the run was sent to, and where to see it there."""
    files = sorted((run_dir / RECORDS).glob("*.json"))
    return [(file.stem, json.loads(file.read_text())["link"]) for file in files]


def answers_as_text(entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The answers of a line of answers.jsonl, each with its question, as Markdown by its name in trackers."""
    return {
        f"answers/{number}": f"**{_as_markdown(text_of(entry['messages'][-1]))}**\n\n"
        f"{_as_markdown(entry['answer'])}"
        for number, entry in enumerate(entries, 1)
    }


def _as_markdown(text: str) -> str:
    return text.strip().replace("\n", "  \n")


def _metrics_in(entry: dict[str, Any]) -> list[str]:
    """The names of the metrics in a line of metrics.jsonl. A number that is not finite is null there."""
    return [
        name for name, value in entry.items() if name not in ("split", "step", "epoch") and value is not None
    ]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: numbers and texts."""
    return {
        key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()
    }


def _start(name: str, run_name: str, run_id: str | None, settings: dict[str, Any]) -> Any:
    """Accelerate's tracker, started: a new run with these settings, or the run `run_id` again."""
    new_or_same = {"id": run_id or uuid.uuid4().hex[:20], "resume": "allow"}
    project = PROJECT
    arguments: dict[str, Any] = {"name": run_name, "config": settings}
    if name == "mlflow":
        # By default, MLflow tries a server that does not answer for a quarter of an hour.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        arguments = {"run_name": run_name, "run_id": run_id}
    elif name == "trackio":  # it finds a run by its name, the newest of several
        resume = "never" if run_id is None else "allow"
        arguments |= {"resume": resume, "auto_log_cpu": False, "auto_log_gpu": False}
    elif name == "wandb":
        project, arguments = os.environ.get("WANDB_PROJECT", PROJECT), arguments | new_or_same
    else:
        arguments |= new_or_same
    tracker = LOGGER_TYPE_TO_CLASS[name](project, **arguments)
    tracker.start()
    if name == "mlflow" and run_id is None:  # it takes a setting once
        tracker.store_init_configuration(settings)
    return tracker


def _identity(name: str, run: Any) -> tuple[str, str]:
    """The id of a run in its tracker, and its link, or the command that shows or sends it."""
    if name == "mlflow":
        import mlflow

        store, info = mlflow.get_tracking_uri(), run.info
        if store.startswith("http"):
            return info.run_id, f"{store.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
        return info.run_id, f"mlflow ui --backend-store-uri {store}"
    if name == "trackio":
        return run.id, run.url or f"trackio show --project {run.project}"
    if name == "wandb":
        return run.id, run.url or f"wandb sync {Path(run.dir).parent}"
    return run.id, run.url if run.mode == "online" else f"swanlab sync {run.dir}"  # it has a link online only


def _send(name: str, tracker: Any, values: dict[str, Any], step: int) -> None:
    """Send metrics, or texts in the form in which the tracker shows them."""
    texts = {key: value for key, value in values.items() if isinstance(value, str)}
    if not texts:
        tracker.log(values, step=step)
    elif name == "mlflow":
        import mlflow

        for key, text in texts.items():
            mlflow.log_text(text, f"{key}/step_{step:06d}.md", run_id=tracker.tracker.info.run_id)
    elif name == "trackio":
        import trackio

        tracker.log({key: trackio.Markdown(text) for key, text in texts.items()}, step=step)
    elif name == "wandb":
        tracker.log_table("answers", columns=["name", "text"], data=list(map(list, texts.items())), step=step)
    else:
        import swanlab

        tracker.log({key: swanlab.Text(text) for key, text in texts.items()}, step=step)
