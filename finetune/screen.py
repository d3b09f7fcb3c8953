"""What a person reads in the terminal: what is trained on what, and how it ended."""

import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.batching import Plan
from finetune.chat import Examples
from finetune.config import Config
from finetune.duplicates import Match
from finetune.evaluate import is_out_of_patience
from finetune.machine import Setting, device_name
from finetune.model import count_parameters
from finetune.rows import Rows
from finetune.run_folder import CONFIG, METRICS


class _Console(Console):
    """Goes on when nobody reads any more (`| tee` gets a Ctrl-C too): the run still has to be saved."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False)

# Metric, its name on screen, and how it is written.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "loss_without_leaks": ("without leaks", "{:.4f}"),
    "mean_token_accuracy": ("accuracy", "{:.4f}"),
    "entropy": ("entropy", "{:.4f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "grad_norm": ("grad norm", "{:.3f}"),
    "useful_tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.0%}"),
    "peak_memory_gib": ("GiB", "{:.2f}"),
}


def say(message: str) -> None:
    """Print one line, never folded."""
    console.print(message, soft_wrap=True, markup=False)


def show_start(config: Config, settings: Sequence[Setting], facts: Sequence[tuple[str, str]]) -> None:
    """Print what is trained on what, and asked beside got."""
    table = Table(title=Text(f"Run {config.output_dir}"), title_justify="left", show_header=False)
    for name, value in facts:
        table.add_row(name, Text(value))
    console.print(table)
    show_settings(settings)


def show_settings(settings: Sequence[Setting]) -> None:
    """Print what was asked for beside what runs."""
    table = Table("", "asked", "got", "why", title="Asked and got", title_justify="left")
    for s in settings:
        table.add_row(s.name, s.asked, s.got, s.reason, style="yellow" if s.asked != s.got else "")
    console.print(table)


def batch_arithmetic(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Examples and tokens of an update, and the number of updates."""
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


def describe(
    config: Config,
    model: Any,
    rows: Rows,
    train_set: Examples,
    eval_set: Examples,
    leaks: Mapping[int, Match],
    flop_per_second: float,
) -> list[tuple[str, str]]:
    """The model; the rows read, kept and dropped, the examples they became, and the eval rows that are
    trained on too."""
    trainable, total = count_parameters(model)
    dropped: Counter[str] = Counter()
    for source in (rows, train_set, eval_set):
        dropped.update({reason: len(numbers) for reason, numbers in source.dropped.items()})
    num_taken = len(rows.train) + len(rows.eval)
    return [
        ("device", f"{device_name(model.device)}; {flop_per_second / 1e9:,.0f} GFLOP/s in matmuls"),
        ("model", f"{config.model.name_or_path}, base in {config.model.quantization}"),
        ("parameters", f"{trainable:,} trainable of {total:,} ({trainable / total:.2%})"),
        ("rows", f"{rows.num_read:,} read, {rows.num_kept:,} usable, {num_taken:,} taken"),
        ("dropped", ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"),
        ("cut at max_length", f"{len(train_set.truncated):,} train, {len(eval_set.truncated):,} eval"),
        ("examples", f"{len(train_set.dataset):,} train, {len(eval_set.dataset):,} eval"),
        ("leaks", _leaks_in_words(leaks, len(rows.eval))),
    ]


def _leaks_in_words(leaks: Mapping[int, Match], num_eval: int) -> str:
    if not leaks:
        return "no eval prompt is trained on"
    same = sum(match.exact for match in leaks.values())
    return (
        f"{len(leaks):,} of {num_eval:,} eval prompts are trained on too ({same:,} the same, "
        f"{len(leaks) - same:,} nearly); the loss is also given without them"
    )


def show_finished(run_dir: Path) -> None:
    say(f"The run in {run_dir} is finished; its adapter is {run_dir / 'adapter'}.")
    say("To train again, choose another --output_dir, or delete that folder.")


def show_checkpoint(checkpoint: Path | None, remarks: Sequence[str], step: int) -> None:
    """Print what `find_checkpoint` has to say, and which one the run goes on from."""
    for line in remarks:
        say(line)
    if checkpoint is not None:
        say(f"Going on from {checkpoint}, after update {step}.")


def show_stop(config: Config, accelerator: Any, step: int) -> None:
    """Print that the run was stopped, and the command that goes on with it."""
    run_dir = Path(config.output_dir)
    saved = f"after update {step}; all is saved" if step > 0 else "before its first update"
    say(f"Stopped {saved}. To go on:")
    say(f"  {launch_command(run_dir, accelerator.num_processes, accelerator.device.type == 'cuda')}")


def launch_command(run_dir: Path, num_processes: int, on_gpu: bool) -> str:
    """The command that runs the configuration of `run_dir` in as many processes."""
    launcher = "accelerate launch"
    if num_processes > 1:
        launcher += f" --multi_gpu --num_processes {num_processes}"
        launcher = launcher if on_gpu else f"torchrun --nproc_per_node {num_processes}"
    return f"{launcher} train.py --config {shlex.quote(str(run_dir / CONFIG))}"


def show_end(
    config: Config,
    plan: Plan,
    evaluations: Sequence[dict[str, Any]],
    adapter_step: int,
    remarks: Sequence[str],
) -> None:
    """Print how the run ended, the first evaluation against that of its adapter, and where things lie.

    `remarks` are what `load_best` had to say.
    """
    run_dir = Path(config.output_dir)
    _show_last_step(config, plan, evaluations)
    for line in remarks:
        say(line)
    of_adapter = [entry for entry in evaluations if entry["step"] == adapter_step]
    if len(evaluations) > 1 and of_adapter:
        before, after = evaluations[0], of_adapter[-1]
        columns = ("eval", f"step {before['step']}", f"step {after['step']}", "change")
        table = Table(*columns, title="Before and after", title_justify="left")
        for key in ("loss", "entropy", "mean_token_accuracy"):
            name, pattern = SHOWN[key]
            change = f"{after[key] / before[key] - 1:+.1%}" if before[key] else ""
            table.add_row(name, pattern.format(before[key]), pattern.format(after[key]), change)
        console.print(table)
    losses = [entry["loss"] for entry in evaluations]
    if len(losses) > 1 and evaluations[0]["step"] == 0 and losses[0] <= min(losses[1:]):
        say(f"No evaluation after training had a lower loss than the untrained model's {losses[0]:.4f}.")
    if config.checkpoint.keep_best and of_adapter:
        say(f"The adapter is that after update {adapter_step}, of the lowest eval loss.")
    say(f"adapter      {run_dir / 'adapter'}")
    say(f"metrics      {run_dir / METRICS}")
    say(f"to see it    tensorboard --logdir {run_dir}")


def _show_last_step(config: Config, plan: Plan, evaluations: Sequence[dict[str, Any]]) -> None:
    """Print why the run ended before its planned end, if it did."""
    patience = config.train.early_stopping_patience
    if is_out_of_patience(evaluations, patience) and evaluations[-1]["step"] < plan.num_steps:
        best = min(evaluations, key=lambda entry: entry["loss"])
        tried = "the last evaluation" if patience == 1 else f"the last {patience} evaluations"
        say(
            f"Ended early, after update {evaluations[-1]['step']} of {plan.num_steps}: {tried} had no lower "
            f"loss than {best['loss']:.4f}, that after update {best['step']}."
        )
