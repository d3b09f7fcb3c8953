"""What the report of a run states: the verdict, before and after, notes, answers, and facts about the run."""

import math
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from finetune.config import Config, OptimConfig, described
from finetune.data.rows import text_of
from finetune.report.intervals import Interval, between, signed
from finetune.report.records import (
    ANSWERS_IN_WORDS,
    Change,
    Record,
    answer_changes,
    loss_changes_by_source,
    rounding,
)
from finetune.run.summary import launch_command
from finetune.training.best import best_in_words, best_of

Facts = Sequence[tuple[str, str]]


class MetricRow(NamedTuple):
    """A metric before, after, and their difference: each a value and, below it, its interval."""

    name: str
    unit: str
    cells: Sequence[tuple[str, str]]


class Answers(NamedTuple):
    """`turns` are (role, text), of which the last one is answered; `texts` are (heading, answer)."""

    turns: Sequence[tuple[str, str]]
    texts: Sequence[tuple[str, str]]


def lead(record: Record) -> str:
    """The line under the title: the base, the adapter and the data."""
    config = record.config
    quantization = config.model.quantization
    base = "base not quantized" if quantization == "none" else f"base in {quantization}"
    data, adapter = described(config.data.path), config.model.adapter
    began = "" if adapter is None else f", trained on from {adapter}"
    return f"{config.model.name_or_path} ({base}) with LoRA r={config.lora.r}{began}, on {data}"


# --- Before and after ---


def verdict(found: dict[str, Change]) -> str:
    """How the eval loss changed, in a sentence."""
    if not found:
        return "Nothing was evaluated."
    change = found["loss"].change
    if change is None:
        return "There is one evaluation, and none to compare it with."
    if math.isnan(change.low):
        return (
            f"The eval loss {_went(change.value)}. There is no interval: the run has no sums of each example."
        )
    bounds = sorted((abs(change.low), abs(change.high)))
    if change.low <= 0 <= change.high:
        return (
            f"The eval loss {_went(change.value)}, which cannot be told from no change (95 % interval: "
            f"{between(change, 3, sign=True)})."
        )
    return f"The eval loss {_went(change.value)} (95 % interval: {bounds[0]:.3f} to {bounds[1]:.3f})."


def _went(change: float) -> str:
    return f"{'fell' if change < 0 else 'rose'} by {abs(change):.3f} nats per target token"


def metric_rows(found: dict[str, Change]) -> list[MetricRow]:
    """The table of metrics before and after, with the perplexity that follows from the loss."""
    if not found:
        return []
    loss, accuracy, entropy = (found[metric] for metric in ("loss", "mean_token_accuracy", "entropy"))
    return [
        _row("loss", "nats per target token", loss, 4),
        _perplexity_row(loss),
        _row("token accuracy", "likeliest token is the target", accuracy, 4),
        _row("entropy", "nats, of the predictions", entropy, 4),
    ]


def source_rows(record: Record) -> list[MetricRow]:
    """The table of the loss by source and eval set, before and after; empty if there are not several."""
    last = record.eval_lines[-1] if record.eval_lines else {}
    return [
        _row(name, f"{last[f'num_target_tokens/{name}']:,} target tokens", change, 4)
        for name, change in loss_changes_by_source(record).items()
    ]


def answer_rows(record: Record) -> list[MetricRow]:
    """The table of how answers compare with those of the rows; empty without `eval.answers`."""
    rows = []
    for metric, change in answer_changes(record).items():
        name, unit, digits = ANSWERS_IN_WORDS[metric]
        rows.append(_row(name, unit, change, digits))
    return rows


def _row(name: str, unit: str, change: Change, digits: int) -> MetricRow:
    cells = [
        (f"{interval.value:.{digits}f}", between(interval, digits - 1))
        for interval in (change.first, change.last)
        if interval is not None
    ]
    if change.change is not None:
        cells.append((signed(change.change.value, digits), between(change.change, digits - 1, sign=True)))
    return MetricRow(name, unit, cells)


def _perplexity_row(loss: Change) -> MetricRow:
    cells = []
    for interval in (loss.first, loss.last):
        if interval is not None:
            of = _exp(interval)
            cells.append((f"{of.value:,.2f}" if of.value < 1e6 else f"{of.value:.2g}", between(of, 2)))
    if loss.change is not None:
        ratio = _exp(loss.change)
        cells.append((f"\N{MULTIPLICATION SIGN} {ratio.value:.3f}", between(ratio, 3)))
    return MetricRow("perplexity", "exp of the loss", cells)


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(min(x, 700.0)) for x in interval))


def columns(record: Record) -> list[str]:
    """The headings of the table of metrics."""
    lines = record.eval_lines
    if not lines:
        return []
    *_, last = steps = [_after(line["step"]) for line in lines]
    return [last] if len(lines) == 1 else [steps[0], last, "change"]


def _after(step: int) -> str:
    return "before training" if step == 0 else f"after update {step:,}"


def notes(record: Record) -> list[str]:
    """Remarks on the evaluations, below their table."""
    lines = record.eval_lines
    if not lines:
        return []
    what = "every token" if record.config.data.train_on == "all" else "the answers alone"
    same = "" if len(lines) == 1 else "; that of a change is over the same examples before and after"
    remarks = [
        f"Over {record.num_eval_examples:,} eval examples with "
        f"{lines[-1]['num_target_tokens']:,} target tokens: {what}. Intervals hold 95 % of the means of "
        f"examples drawn anew (bootstrap){same}."
    ]
    if record.config.eval.sets:
        has_main = record.num_eval_examples < record.environment["data"]["eval_examples"]
        remarks.append(
            "The rows of eval.sets are not among them, and have figures of their own."
            if has_main
            else "They are the rows of all eval.sets together."
        )
    if "loss_without_leaks" in lines[-1]:
        losses = [lines[-1]] if len(lines) == 1 else [lines[0], lines[-1]]
        values = " and ".join(f"{line['loss_without_leaks']:.4f} {_after(line['step'])}" for line in losses)
        remarks.append(f"Without the eval rows that are trained on too, the loss is {values}.")
    if error := rounding(lines[-1]):
        precision = record.config.train.mixed_precision
        remarks.append(
            f"The eval loss is computed in {precision}, {error}, as estimated from some examples in fp32; "
            "--eval.precision fp32 avoids it."
        )
    by = record.config.checkpoint.best_by
    best = best_of(lines, by)
    if best is not lines[-1]:
        remarks.append(f"The {best_in_words(by)} of the run was {best[by]:.4f}, {_after(best['step'])}.")
    return remarks


# --- Answers ---


def pair_answers(record: Record) -> list[Answers]:
    """The answers of the first and the last evaluation, side by side."""
    lines = record.answer_lines
    if not lines:
        return []
    first, last = lines[0], lines[-1]
    # A run that started from another run's checkpoint has no answers of its own from before training.
    asked = [[entry["messages"] for entry in line["answers"]] for line in (first, last)]
    shown = [first, last] if len(lines) > 1 and asked[0] == asked[1] else [last]
    pairs = []
    for number, messages in enumerate(asked[1]):
        turns = [(m["role"], text_of(m)) for m in messages if m["role"] != "system"]
        texts = [(_after(line["step"]), line["answers"][number]["answer"]) for line in shown]
        pairs.append(Answers(turns, texts))
    return pairs


# --- Facts ---


def data_facts(record: Record) -> Facts:
    """The rows and the batch arithmetic, as shown when the run started."""
    data = record.environment["data"]
    counted = [
        ("examples", f"{data['train_examples']:,} train, {data['eval_examples']:,} eval"),
        ("examples per update", f"{record.environment['global_batch_size']:,}"),
        ("updates", f"{record.steps_per_epoch:,} an epoch, {record.planned_steps:,} in all"),
    ]
    facts = [
        (name, value) for name, value in record.environment.get("described", counted) if name != "device"
    ]
    return [("data", described(record.config.data.path)), *facts]


def setting_facts(config: Config) -> Facts:
    """The settings that decide what the weights become."""
    lora, data, train, optim = config.lora, config.data, config.train, config.optim
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    variants = [name for name, used in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if used]
    facts = [
        ("LoRA", f"r {lora.r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {targets}"),
        ("trained on", "every token" if data.train_on == "all" else "the answers alone"),
        ("system prompt", data.system_prompt or "the chat template's default, if it has one"),
        (
            "longest example",
            f"{data.max_length:,} tokens; {'cut' if data.overlong == 'truncate' else 'dropped'} where longer",
        ),
        (
            "optimizer",
            f"{optim.name}, weight decay {optim.weight_decay:g}, clipped at {optim.max_grad_norm:g}",
        ),
        ("learning rate", _learning_rate_in_words(optim)),
        ("precision", {"no": "fp32"}.get(train.mixed_precision, train.mixed_precision)),
        ("seeds", f"sample {data.sample_seed}, split {data.split_seed}, training {train.seed}"),
    ]
    return [*facts, ("variants", ", ".join(variants))] if variants else facts


def _learning_rate_in_words(optim: OptimConfig) -> str:
    words = [f"{optim.learning_rate:g}"]
    if optim.lora_b_lr_ratio:
        words.append(f"of B {optim.lora_b_lr_ratio:g} times that (LoRA+)")
    decay = (
        f" over the last {optim.decay_ratio or 0.1:.0%}" if optim.schedule == "warmup_stable_decay" else ""
    )
    floor = f" to {optim.min_lr_ratio:g} of it" if optim.min_lr_ratio else ""
    words.append(f"{optim.schedule}{decay}{floor}")
    if optim.warmup_steps:
        words.append(f"warm-up over {optim.warmup_steps} updates")
    elif optim.warmup_ratio:
        words.append(f"warm-up over {optim.warmup_ratio:.0%} of the updates")
    else:
        words.append("no warm-up")
    return ", ".join(words)


def machine_facts(record: Record) -> Facts:
    """The hardware and the versions of the software."""
    environment = record.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    measured = dict(environment.get("described", ())).get("device", environment["device"])
    facts = [
        ("device", measured),
        ("processor", environment["processor"]),
        ("memory", f"{environment['memory_gib']} GiB"),
        ("processes", str(environment["num_processes"])),
        ("Python", environment["python"]),
        ("packages", packages),
    ]
    return [*facts, ("CUDA", environment["cuda"])] if environment["cuda"] else facts


def repeating_command(record: Record) -> str:
    """The command that resumes an unfinished run, or repeats a finished one in another folder."""
    environment, folder = record.environment, record.folder
    on_gpu = not environment["device"].startswith("CPU")
    nodes = environment.get("num_nodes", 1)  # older records have none
    command = launch_command(folder, environment["num_processes"], on_gpu, nodes)
    if not record.is_finished:
        return command
    command += f" --output_dir {shlex.quote(f'{folder}-again')}"
    if record.config.fast.int8_matmul == "auto" and environment["int8"] in ("int8", "dequantize"):
        command += f" --fast.int8_matmul {environment['int8']}"  # else it is measured again
    if environment["token_budget"] is not None:  # else it depends on the free memory
        command += f" --train.max_tokens_per_micro_batch {environment['token_budget']}"
    if environment["started_from"] is not None:
        command += f" --resume {shlex.quote(environment['started_from'])}"
    return command
