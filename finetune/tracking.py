"""What a person sees of a run: the console, metrics.jsonl and TensorBoard."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard.summary import hparams

from finetune.batching import Plan
from finetune.chat import Examples, Message
from finetune.config import Config, config_to_dict, flatten
from finetune.machine import Setting, device_name
from finetune.metrics import Metrics
from finetune.model import count_parameters
from finetune.rows import Rows
from finetune.run_folder import METRICS

console = Console(highlight=False)

# Metric, its name on screen, and how it is written.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
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
    metrics.jsonl; generated answers go to TensorBoard as text.
    """

    def __init__(self, accelerator: Any, config: Config, plan: Plan, first_step: int) -> None:
        self._accelerator = accelerator
        self._main = accelerator.is_main_process
        self._plan = plan
        self._metrics_file = Path(config.output_dir) / METRICS
        # TensorBoard drops what an interrupted run wrote after the step that this one goes on from.
        purge_step = first_step + 1 if first_step > 0 else 0
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": purge_step}})
        if self._main and first_step == 0:
            self._write_hparams(config)
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
        self._accelerator.end_training()

    def log(self, split: str, step: int, metrics: Metrics) -> None:
        """Write the metrics of `split` (train or eval) after `step` updates, and show them."""
        if not self._main:
            return
        entry = {"split": split, "step": step, "epoch": self._epochs(step), **metrics}
        with self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
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
        for number, (messages, answer) in enumerate(zip(conversations, answers, strict=True), 1):
            text = f"**{_as_markdown(messages[-1]['content'])}**\n\n{_as_markdown(answer)}"
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


def describe_model(config: Config, model: torch.nn.Module, device: torch.device) -> list[tuple[str, str]]:
    trainable, total = count_parameters(model)
    return [
        ("device", device_name(device)),
        ("model", f"{config.model.name_or_path}, base in {config.model.quantization}"),
        ("parameters", f"{trainable:,} trainable of {total:,} ({trainable / total:.2%})"),
    ]


def describe_data(rows: Rows, train_set: Examples, eval_set: Examples) -> list[tuple[str, str]]:
    """Rows read, kept and dropped, and the examples they became."""
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
    ]


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
