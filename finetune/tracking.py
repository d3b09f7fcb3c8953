"""What a person sees of a run: the console, metrics.jsonl and TensorBoard."""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard.summary import hparams

from finetune.batching import Plan
from finetune.chat import Examples, Message
from finetune.checkpoint import GO_ON
from finetune.config import Config, config_to_dict, flatten
from finetune.duplicates import Match
from finetune.machine import Setting, device_name
from finetune.metrics import Metrics
from finetune.model import count_parameters
from finetune.rows import Rows
from finetune.run_folder import ANSWERS, CONFIG, METRICS, read_lines

console = Console(highlight=False)

# Metric, its name on screen, and how it is written.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "loss_without_leaks": ("without leaks", "{:.4f}"),
    "mean_token_accuracy": ("accuracy", "{:.4f}"),
    "entropy": ("entropy", "{:.4f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "grad_norm": ("grad norm", "{:.3f}"),
    "useful_tokens_per_second": ("tokens/s", "{:,.0f}"),
    "peak_memory_gib": ("GiB", "{:.2f}"),
}


def say(message: str) -> None:
    """Print one line, never folded."""
    console.print(message, soft_wrap=True, markup=False)


class Tracker:
    """Shows and writes the metrics of a run. On all but the main process it does nothing.

    Scalars go to TensorBoard as `split/metric` through Accelerate, and as one object a line to
    metrics.jsonl; generated answers go to TensorBoard as text, and to answers.jsonl. The files are written
    first, and a run that goes on tells TensorBoard anew what they hold of its first step: a kill between
    the two costs nothing.
    """

    def __init__(self, accelerator: Any, config: Config, plan: Plan, first_step: int) -> None:
        self._accelerator = accelerator
        self._main = accelerator.is_main_process
        self._plan = plan
        self._metrics_file = Path(config.output_dir) / METRICS
        self._answers_file = Path(config.output_dir) / ANSWERS
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
            console=console,
            speed_estimate_period=600,  # an update may take minutes on a small machine
        )
        self._task = self._progress.add_task(
            "train", total=plan.num_steps, completed=first_step, epoch=self._epoch_on_screen(first_step)
        )
        live = self._main and config.log.progress and console.is_terminal
        self._live = (
            Live(Group(self._progress, self._figures, self._activity), console=console) if live else None
        )

    def __enter__(self) -> "Tracker":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._activity.plain = ""
            self._live.stop()
        with _saying_where(self._metrics_file.parent):
            self._accelerator.end_training()

    def log(self, split: str, step: int, metrics: Metrics) -> None:
        """Write the metrics of `split` (train or eval) after `step` updates, and show them."""
        if not self._main:
            return
        with _saying_where(self._metrics_file.parent):
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
            say(f"{split:5}  step {step}/{self._plan.num_steps}  epoch {epoch}  {figures}")

    def log_answers(self, step: int, conversations: Sequence[list[Message]], answers: Sequence[str]) -> None:
        """Write a generated answer to each conversation, as text."""
        if self._main:
            entries = [
                {"messages": messages, "answer": answer}
                for messages, answer in zip(conversations, answers, strict=True)
            ]
            with _saying_where(self._answers_file.parent):
                _append(self._answers_file, {"step": step, "answers": entries})
                self._show_answers(step, entries)

    def has(self, kind: str, step: int) -> bool:
        """Whether the evaluation ("eval") or the "answers" of `step`, the one this run went on from, are
        there already."""
        return (kind, step) in self._written

    def _restore(self, first_step: int) -> None:
        """Give TensorBoard what the files hold of the step that this run goes on from."""
        self._written: set[tuple[str, int]] = set()
        for entry in read_lines(self._metrics_file):
            if 0 < first_step == entry["step"]:
                split, _, _ = (entry.pop(key) for key in ("split", "step", "epoch"))
                self._accelerator.log({f"{split}/{name}": x for name, x in entry.items()}, step=first_step)
                self._written.add((split, first_step))
        for entry in read_lines(self._answers_file):
            if 0 < first_step == entry["step"]:
                self._show_answers(first_step, entry["answers"])
                self._written.add(("answers", first_step))

    def _show_answers(self, step: int, entries: Sequence[dict[str, Any]]) -> None:
        for number, entry in enumerate(entries, 1):
            question = _as_markdown(entry["messages"][-1]["content"])
            text = f"**{question}**\n\n{_as_markdown(entry['answer'])}"
            self._accelerator.log({f"answers/{number}": text}, step=step)

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
    """Name the folder where a write fails: TensorBoard's thread, among others, does not."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{run_dir} could not be written ({error.strerror or error}); {GO_ON}") from error


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Write one line, through to the disk: a checkpoint that follows must not outlive it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _as_markdown(text: str) -> str:
    return text.strip().replace("\n", "  \n")


def show_start(
    config: Config,
    settings: Sequence[Setting],
    plan: Plan,
    facts: Sequence[tuple[str, str]],
) -> None:
    """Print what is trained on what, the batch arithmetic, and asked beside got."""
    table = Table(title=Text(f"Run {config.output_dir}"), title_justify="left", show_header=False)
    for name, value in (*facts, *_batch_arithmetic(config, plan)):
        table.add_row(name, Text(value))
    console.print(table)
    table = Table("", "asked", "got", "why", title="Asked and got", title_justify="left")
    for s in settings:
        table.add_row(s.name, s.asked, s.got, s.reason, style="yellow" if s.asked != s.got else "")
    console.print(table)


def _batch_arithmetic(config: Config, plan: Plan) -> list[tuple[str, str]]:
    train = config.train
    product = f"{train.micro_batch_size} x {train.gradient_accumulation_steps} x {plan.num_processes}"
    capped = "" if plan.max_steps is None else f", at most {plan.max_steps}"
    return [
        ("examples per update", f"{product} process = {plan.global_batch_size}"),
        (
            "updates",
            f"ceil({len(plan.lengths):,} / {plan.global_batch_size}) = {plan.steps_per_epoch:,} an epoch "
            f"x {plan.num_epochs}{capped} = {plan.num_steps:,}",
        ),
        (
            "tokens",
            f"{int(plan.lengths.sum()):,} an epoch, {plan.target_counts.sum() / plan.lengths.sum():.1%} of "
            f"them targets; longest example {int(plan.lengths.max())}, mean {plan.lengths.mean():.0f}",
        ),
        ("tokens per micro-batch", f"{plan.layout.max_tokens:,} at most, {_layout_name(plan)}"),
    ]


def _layout_name(plan: Plan) -> str:
    return "packed without padding" if plan.layout.packing else "padded"


def describe_model(config: Config, model: Any) -> list[tuple[str, str]]:
    trainable, total = count_parameters(model)
    return [
        ("device", device_name(model.device)),
        ("model", f"{config.model.name_or_path}, base in {config.model.quantization}"),
        ("parameters", f"{trainable:,} trainable of {total:,} ({trainable / total:.2%})"),
    ]


def describe_data(
    rows: Rows, train_set: Examples, eval_set: Examples, leaks: Mapping[int, Match]
) -> list[tuple[str, str]]:
    """Rows read, kept and dropped, the examples they became, and the eval rows that are trained on too."""
    dropped: Counter[str] = Counter()
    for source in (rows, train_set, eval_set):
        dropped.update({reason: len(numbers) for reason, numbers in source.dropped.items()})
    return [
        (
            "rows",
            f"{rows.num_read:,} read, {rows.num_kept:,} usable, {len(rows.train) + len(rows.eval):,} taken",
        ),
        ("dropped", ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"),
        ("cut at max_length", f"{len(train_set.truncated):,} train, {len(eval_set.truncated):,} eval"),
        ("examples", f"{len(train_set.dataset):,} train, {len(eval_set.dataset):,} eval"),
        ("leaks", _leaks_in_words(leaks, len(eval_set.dataset))),
    ]


def _leaks_in_words(leaks: Mapping[int, Match], num_eval: int) -> str:
    if not leaks:
        return "no eval prompt is trained on"
    same = sum(match.similarity == 1 for match in leaks.values())
    return (
        f"{len(leaks):,} of {num_eval:,} eval prompts are trained on too ({same:,} the same, "
        f"{len(leaks) - same:,} nearly); the loss is also given without them"
    )


def show_stop(config: Config, accelerator: Any, step: int) -> None:
    """Print that the run was stopped, and the command that goes on with it."""
    run_dir = Path(config.output_dir)
    saved = f"after update {step}; all is saved" if step > 0 else "before its first update"
    say(f"Stopped {saved}. To go on:")
    number = accelerator.num_processes
    launcher = "accelerate launch"
    if number > 1:
        on_gpu = accelerator.device.type == "cuda"
        launcher += f" --multi_gpu --num_processes {number}" if on_gpu else ""
        launcher = launcher if on_gpu else f"torchrun --nproc_per_node {number}"
    # A run that was launched with `resume: never` has this in its config.yaml.
    resume = " --resume auto" if config.resume == "never" else ""
    say(f"  {launcher} train.py --config {shlex.quote(str(run_dir / CONFIG))}{resume}")


def show_end(evaluations: Sequence[dict[str, Any]], run_dir: Path) -> None:
    """Print the first evaluation against the last one, and where things lie."""
    if len(evaluations) > 1:
        before, after = evaluations[0], evaluations[-1]
        columns = ("eval", f"step {before['step']}", f"step {after['step']}", "change")
        table = Table(*columns, title="Before and after", title_justify="left")
        for key in ("loss", "entropy", "mean_token_accuracy"):
            name, pattern = SHOWN[key]
            change = f"{after[key] / before[key] - 1:+.1%}" if before[key] else ""
            table.add_row(name, pattern.format(before[key]), pattern.format(after[key]), change)
        console.print(table)
    say(f"adapter      {run_dir / 'adapter'}")
    say(f"metrics      {run_dir / METRICS}")
    say(f"to see it    tensorboard --logdir {run_dir}")
