"""The metrics of a run: metrics.jsonl, TensorBoard, and the progress bar in the terminal."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from finetune.config import Config, flatten
from finetune.config_parsing import config_to_dict
from finetune.data.by_source import several_sources, source_of_each
from finetune.data.conversations import Conversation
from finetune.data.plan import Plan
from finetune.data.preparing.examples import Examples
from finetune.model.generate import Answer
from finetune.run.answer_files import write_answer_scores
from finetune.run.extra_trackers import add_extra_trackers, answers_as_text
from finetune.run.folder import ANSWERS, METRICS, read_lines, write_example_sums
from finetune.run.summary import SHOWN
from finetune.runtime import console
from finetune.runtime.files import cannot_write
from finetune.training.answer_scores import Question, Scores
from finetune.training.metrics import Metrics


class Tracker:
    """Shows and writes the metrics of a run. It does nothing on ranks other than the main one.

    Scalars go to TensorBoard and the trackers of `log.trackers` as `split/metric` through Accelerate, and as
    one object a line to metrics.jsonl; generated answers go there as text, and to answers.jsonl. The files
    are written first, and a resumed run sends TensorBoard what they hold of its first step again: a kill
    between the two loses nothing.
    """

    def __init__(self, accelerator: Any, config: Config, plan: Plan, first_step: int) -> None:
        self._accelerator = accelerator
        self._main = accelerator.is_main_process
        self._plan = plan
        self._run_dir = Path(config.output_dir)
        self._metrics_file = self._run_dir / METRICS
        self._answers_file = self._run_dir / ANSWERS
        add_extra_trackers(accelerator, config)
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step}})
        if self._main and first_step == 0:
            self._write_hparams(config)
        self._restore(first_step)
        self._figures, self._activity = Text(), Text()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("updates, left"),
            TimeRemainingColumn(),
            console=console.console,
            speed_estimate_period=600,  # an update may take minutes on a small machine
        )
        self._task = self._progress.add_task(
            "train", total=plan.num_steps, completed=first_step, epoch=self._epoch_on_screen(first_step)
        )
        live = self._main and config.log.progress and console.console.is_terminal
        self._live = (
            Live(Group(self._progress, self._figures, self._activity), console=console.console)
            if live
            else None
        )

    def __enter__(self) -> "Tracker":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._activity.plain = ""
            self._live.stop()
        with _saying_where(self._run_dir):
            self._accelerator.end_training()

    def log(self, split: str, step: int, metrics: Metrics) -> None:
        """Write the metrics of `split` (train or eval) after `step` updates, and show them."""
        if not self._main:
            return
        with _saying_where(self._run_dir):
            _append(
                self._metrics_file, {"split": split, "step": step, "epoch": self._epochs(step), **metrics}
            )
            self._accelerator.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)
        figures = "  ".join(
            f"{name} {pattern.format(metrics[key])}"
            for key, (name, pattern) in SHOWN.items()
            if key in metrics
        )
        if split == "train" and self._live:
            self._figures.plain = figures
        else:
            epoch = self._epoch_on_screen(step)
            console.say(f"{split:5}  step {step}/{self._plan.num_steps}  epoch {epoch}  {figures}")

    def write_example_sums(self, step: int, eval_set: Examples, sums: Tensor) -> None:
        """Write the sums of each example as `evaluate` returns them: intervals are computed from these."""
        if self._main:
            with _saying_where(self._run_dir):
                sources = source_of_each(eval_set) if several_sources(eval_set) else None
                write_example_sums(self._run_dir, step, eval_set.dataset["row_number"], sums, sources)

    def write_answer_scores(
        self, step: int, questions: Sequence[Question], answers: Sequence[Answer], scores: Sequence[Scores]
    ) -> None:
        """Write the answers to the rows of `eval.answers`, and how each compares with that of its row."""
        if self._main:
            with _saying_where(self._run_dir):
                write_answer_scores(self._run_dir, step, questions, answers, scores)

    def log_answers(
        self, step: int, conversations: Sequence[Conversation], answers: Sequence[Answer]
    ) -> None:
        """Write a generated answer to each conversation, as text: its reasoning and calls as they are."""
        if self._main:
            entries = [
                {"messages": conversation.messages, "answer": answer.text}
                for conversation, answer in zip(conversations, answers, strict=True)
            ]
            with _saying_where(self._run_dir):
                _append(self._answers_file, {"step": step, "answers": entries})
                self._accelerator.log(answers_as_text(entries), step=step)

    def was_made(self, kind: str, step: int) -> bool:
        """Whether the evaluation ("eval") or the "answers" of `step`, where this run was resumed, exist."""
        return (kind, step) in self._written

    def _restore(self, first_step: int) -> None:
        """Send TensorBoard what the files hold of the step at which this run was resumed."""
        self._written: set[tuple[str, int]] = set()
        for entry in read_lines(self._metrics_file):
            if 0 < first_step == entry["step"]:
                split, _, _ = (entry.pop(key) for key in ("split", "step", "epoch"))
                self._accelerator.log({f"{split}/{name}": x for name, x in entry.items()}, step=first_step)
                self._written.add((split, first_step))
        for entry in read_lines(self._answers_file):
            if 0 < first_step == entry["step"]:
                self._accelerator.log(answers_as_text(entry["answers"]), step=first_step)
                self._written.add(("answers", first_step))
        self._accelerator.wait_for_everyone()  # all have read the files before one writes on

    def show_activity(self, activity: str) -> None:
        """Say below the bar what the run does between updates."""
        self._activity.plain = activity

    def advance(self, step: int) -> None:
        """Move the bar to `step` updates."""
        self._activity.plain = ""
        self._progress.update(self._task, completed=step, epoch=self._epoch_on_screen(step))

    def _epochs(self, step: int) -> float:
        """Epochs trained, a fraction within one."""
        return step / self._plan.steps_per_epoch

    def _epoch_on_screen(self, step: int) -> str:
        current = max(1, -(-step // self._plan.steps_per_epoch))
        return f"{current}/{self._plan.num_epochs}"

    def _write_hparams(self, config: Config) -> None:
        # Accelerate's own way writes a second event file in a folder of its own: a second run on screen.
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
        plain = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in flatten(config_to_dict(config)).items()
        }
        for summary in hparams(
            plain,  # type: ignore[no-untyped-call]
            {"eval/loss": None, "eval/mean_token_accuracy": None},
        ):
            writer.file_writer.add_summary(summary)


@contextmanager
def _saying_where(run_dir: Path) -> Iterator[None]:
    """Name the folder if a write fails: some writers, such as TensorBoard's thread, do not."""
    try:
        yield
    except OSError as error:
        raise ValueError(cannot_write(run_dir, error)) from error


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: such a number becomes null."""
    return {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in entry.items()}


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Append one line and flush it to disk: a checkpoint written later must not survive it."""
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(json.dumps(_finite(entry)) + "\n")
        file.flush()
        os.fsync(file.fileno())
