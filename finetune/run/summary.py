"""What a run prints: what is trained on what, and how it ended."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from finetune.config import Config
from finetune.config_checks import ANSWER_METRICS, is_higher_better
from finetune.config_files import TRAIN_PROGRAM
from finetune.data.plan import Plan
from finetune.run.extra_trackers import recorded_links
from finetune.run.folder import CONFIG, METRICS
from finetune.runtime.choice import Choice
from finetune.runtime.console import console, say, show_choices
from finetune.runtime.processes import num_nodes
from finetune.training.best import best_in_words, best_of, better_in_words, is_out_of_patience

# Metric: its name on screen and its format.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "loss_error": ("±", "{:.4f}"),
    "loss_without_leaks": ("without leaks", "{:.4f}"),
    "mean_token_accuracy": ("accuracy", "{:.4f}"),
    "entropy": ("entropy", "{:.4f}"),
    "exact_match": ("exact", "{:.1%}"),
    "chrf": ("chrF", "{:.1f}"),
    "ended": ("ended", "{:.1%}"),
    "tool_call_accuracy": ("calls", "{:.1%}"),
    "learning_rate": ("lr", "{:.2e}"),
    "grad_norm": ("grad norm", "{:.3f}"),
    "loss_scale": ("loss scale", "{:,.0f}"),
    "overflow_repeats": ("repeats", "{}"),
    "useful_tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.0%}"),
    "peak_memory_gib": ("GiB", "{:.2f}"),
}


def show_start(config: Config, settings: Sequence[Choice], facts: Sequence[tuple[str, str]]) -> None:
    """Print what is trained on what, and the requested beside the actual settings."""
    say(f"Run {config.output_dir}")  # not the table's title, which would be folded inside the path
    table = Table(show_header=False)
    for name, value in facts:
        table.add_row(name, Text(value))
    console.print(table)
    show_choices(settings)


def show_finished(run_dir: Path) -> None:
    say(f"The run in {run_dir} is finished; its adapter is {run_dir / 'adapter'}.")
    say("To train again, choose another --output_dir, or delete that folder.")


def show_checkpoint(checkpoint: Path | None, remarks: Sequence[str], step: int) -> None:
    """Print the remarks of `find_checkpoint`, and which checkpoint the run resumes from."""
    for line in remarks:
        say(line)
    if checkpoint is not None:
        say(f"Resuming from {checkpoint}, after update {step}.")


def show_stop(config: Config, accelerator: Any, step: int) -> None:
    """Print that the run was stopped, and the command that resumes it."""
    run_dir = Path(config.output_dir)
    saved = f"after update {step}; all is saved" if step > 0 else "before its first update"
    nodes, on_gpu = num_nodes(), accelerator.device.type == "cuda"
    say(f"Stopped {saved}. To resume{', on each node' if nodes > 1 else ''}:")
    say(f"  {launch_command(run_dir, accelerator.num_processes, on_gpu, nodes)}")


def launch_command(run_dir: Path, num_processes: int, on_gpu: bool, nodes: int = 1) -> str:
    """The command that runs the configuration of `run_dir` in `num_processes` processes, in all.

    For several nodes it is the same on each. It has a placeholder for the name of the first one.
    """
    launcher = "python"
    if nodes > 1:
        launcher = f"torchrun --nnodes {nodes} --nproc_per_node {num_processes // nodes} --rdzv_backend c10d "
        launcher += f"--rdzv_endpoint FIRST_NODE:29500 --rdzv_id {shlex.quote(run_dir.name)}"
    elif num_processes > 1:
        launcher = f"accelerate launch --multi_gpu --num_processes {num_processes}"
        launcher = launcher if on_gpu else f"torchrun --nproc_per_node {num_processes}"
    return f"{launcher} {TRAIN_PROGRAM} --config {shlex.quote(str(run_dir / CONFIG))}"


def show_end(
    config: Config,
    plan: Plan,
    evaluations: Sequence[dict[str, Any]],
    adapter_step: int,
    remarks: Sequence[str],
) -> None:
    """Print how the run ended, the first evaluation beside that of its adapter, and where the files are.

    `remarks` are those of `load_best` and of the loss scale.
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
        of_answers = [key for key in ANSWER_METRICS if key in before and key in after]
        shown = [(key, *SHOWN[key]) for key in ("loss", "entropy", "mean_token_accuracy", *of_answers)]
        by_source = [key for key in after if key.startswith("loss/")]
        shown += [(key, f"loss of {key.removeprefix('loss/')}", SHOWN["loss"][1]) for key in by_source]
        for key, name, pattern in shown:
            change = f"{after[key] / before[key] - 1:+.1%}" if before[key] else ""
            table.add_row(Text(name), pattern.format(before[key]), pattern.format(after[key]), change)
        console.print(table)
    by = config.checkpoint.best_by
    if len(evaluations) > 1 and evaluations[0]["step"] == 0 and best_of(evaluations, by) is evaluations[0]:
        first = evaluations[0]
        value = f"{first[by]:.4f}"
        if "loss_error" in first and not is_higher_better(by):
            value += f" by more than the error of both ({first['loss_error']:.4f})"
        say(f"No evaluation after training had a {better_in_words(by)} than that before it, {value}.")
    if config.checkpoint.keep_best and of_adapter:
        say(f"The adapter is the one after update {adapter_step}, which had the {best_in_words(by)}.")
    say(f"adapter      {run_dir / 'adapter'}")
    say(f"metrics      {run_dir / METRICS}")
    say(f"to see it    tensorboard --logdir {run_dir}")
    for name, link in recorded_links(run_dir):
        say(f"in {name:<9} {link}")


def _show_last_step(config: Config, plan: Plan, evaluations: Sequence[dict[str, Any]]) -> None:
    """Print why the run ended early, if it did."""
    patience, by = config.train.early_stopping_patience, config.checkpoint.best_by
    if is_out_of_patience(evaluations, patience, by) and evaluations[-1]["step"] < plan.num_steps:
        best = best_of(evaluations, by)
        tried = "the last evaluation" if patience == 1 else f"the last {patience} evaluations"
        say(
            f"Ended early, after update {evaluations[-1]['step']} of {plan.num_steps}: {tried} had no "
            f"{better_in_words(by)} than {best[by]:.4f}, that after update {best['step']}."
        )
