"""`python -m finetune evaluate RUN`: the base against the tuned model, with intervals."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor

from finetune.config import DataConfig
from finetune.data import slices
from finetune.data.files import read_column
from finetune.data.plan import make_plan, plan_evaluation
from finetune.data.rows import Rows, answer_of, find_leaks, load_rows
from finetune.data.splits import fingerprint_of
from finetune.data.tokenize import Examples, Message, tokenize_rows
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.generate import Answer, generate_answers
from finetune.model.loss import TokenLoss
from finetune.ops.quantized import dropout_off
from finetune.report.intervals import Interval, difference_interval, mean_interval
from finetune.run.adapter import Trained, TrainedModel, load_trained, parse_trained, trained_parser
from finetune.run.checkpoint import TRAINING_CONFIG
from finetune.run.folder import RESULT, read_environment, read_evaluations
from finetune.runtime.console import console, say
from finetune.runtime.files import write_atomically
from finetune.training.evaluate import evaluate, pick_conversations

ANSWERS_AT_A_TIME = 10
Values = NDArray[np.float64]


class Compared(NamedTuple):
    """A mean of the base and of the tuned model, and how much it changed (paired by example)."""

    base: Interval
    tuned: Interval
    change: Interval


@dataclass(frozen=True)
class Group:
    """The figures of all examples, or of a slice of them."""

    name: str
    num_examples: int
    num_target_tokens: int
    loss: Compared
    entropy: Compared
    mean_token_accuracy: Compared


class Written(NamedTuple):
    """What both models answered to a row."""

    row_number: int
    conversation: list[Message]
    reference: str
    base: Answer
    tuned: Answer


@dataclass(frozen=True)
class Evaluated:
    """The rows that are evaluated on, and those that were trained on, where they can still be read."""

    source: str
    rows: Dataset
    data: DataConfig
    run_rows: Rows | None

    def leaks(self) -> dict[int, Any]:
        return {} if self.run_rows is None else find_leaks(replace(self.run_rows, eval=self.rows))


def command(argv: Sequence[str]) -> None:
    """Print the figures, and write them where --output names a file.

    Raises:
        ValueError: arguments, an adapter, rows or a base that cannot be used.
    """
    arguments, trained = parse_trained(_parser(), argv)
    _check(arguments)
    harness = None if arguments.lm_eval is None else _import_harness()
    evaluated = _read_rows(arguments, trained)
    cells = None if arguments.by is None else read_column(evaluated.data.path, arguments.by)
    opened = load_trained(trained)
    examples = tokenize_rows(evaluated.rows, opened.tokenizer, evaluated.data)
    if len(examples.dataset) == 0:
        raise ValueError(f"no example is left of {evaluated.source}; raise data.max_length")
    base, tuned = _evaluate_both(trained, opened, evaluated, examples)
    everything = group_figures("all", base, tuned, np.ones(len(base), dtype=bool))
    chosen = [
        *slices.by_length(examples.lengths),
        *slices.by_input(evaluated.rows, examples),
        *slices.by_leak(evaluated.leaks(), examples),
    ]
    if cells is not None:
        chosen += slices.by_value(arguments.by, cells, examples)
    groups = [group_figures(name, base, tuned, members) for name, members in slices.without_trivial(chosen)]
    _show_figures(trained, evaluated, everything)
    _show_groups(groups)
    result = {"run": str(arguments.trained), "adapter": str(trained.adapter), "data": evaluated.source}
    figures = {**result, "all": _plain(everything), "slices": [_plain(group) for group in groups]}
    if arguments.generate > 0:
        written = _write_answers(opened, evaluated, arguments.generate, arguments.max_new_tokens)
        figures["answers"] = _show_answers(written, arguments.max_new_tokens)
    if harness is not None:
        figures["lm_eval"] = _run_harness(harness, opened, arguments.lm_eval.split(","))
    if arguments.output is not None:
        write_atomically(arguments.output, json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False))
        say(f"All figures are in {arguments.output}.")


def _parser() -> Any:
    parser = trained_parser(
        "evaluate",
        "[--data FILE] [--by COLUMN] [--generate N] [--lm-eval TASKS] [--output FILE]",
        "Loss, perplexity, entropy and token accuracy of the base and of the tuned model, with 95 % "
        "intervals (of the change too, paired by example), on the run's eval rows or all rows of a file.",
    )
    add = parser.add_argument
    add("--data", metavar="FILE", help="evaluate on all rows of this file, instead of the run's eval rows")
    add("--by", metavar="COLUMN", help="figures for each value of this column of the data")
    add(
        "--generate",
        metavar="N",
        type=int,
        default=20,
        help="answers to the first N rows (default 20; 0: none)",
    )
    add("--max_new_tokens", metavar="N", type=int, default=128, help="longest answer in tokens (default 128)")
    add("--lm-eval", metavar="TASKS", help="tasks of lm-evaluation-harness, with commas between them")
    add("--output", metavar="FILE", type=Path, help="write all figures into this JSON file")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.generate < 0:
        raise ValueError(f"--generate must be at least 0, not {arguments.generate}")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {arguments.max_new_tokens}")
    output = arguments.output
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ValueError(f"--output {output}: name a file in a folder that exists")


def _read_rows(arguments: argparse.Namespace, trained: Trained) -> Evaluated:
    data = trained.config.data
    if arguments.data is None:
        if trained.run_dir is None and not (trained.adapter / TRAINING_CONFIG).is_file():
            raise ValueError(f"{trained.adapter} does not say what it was trained on: give --data FILE")
        rows = load_rows(data)
        if len(rows.eval) == 0:
            raise ValueError("the run has no eval rows (data.eval_fraction is 0): give --data FILE")
        return Evaluated(f"the eval rows of {data.path}", rows.eval, data, rows)
    own = replace(data, path=arguments.data, num_samples=None, eval_fraction=0.0)
    rows = load_rows(own)
    for reason, numbers in rows.dropped.items():
        say(f"{arguments.data}: {len(numbers):,} rows {reason} are left out.")
    try:
        run_rows = load_rows(data)
    except ValueError as error:
        say(f"Rows that were trained on too are not told apart: {error}")
        run_rows = None
    return Evaluated(arguments.data, rows.train, own, run_rows)


def _evaluate_both(
    trained: Trained, opened: TrainedModel, evaluated: Evaluated, examples: Examples
) -> tuple[Values, Values]:
    """[E, 4] sums of the base and of the tuned model, as `evaluate` gives them, computed as in the run."""
    config, train_set, int8 = trained.config, examples, None
    is_own = evaluated.data is config.data
    if is_own and evaluated.run_rows is not None:
        train_set = tokenize_rows(evaluated.run_rows.train, opened.tokenizer, config.data)
    if trained.run_dir is not None:
        environment = read_environment(trained.run_dir)
        int8 = str(environment["int8"])
        if is_own and environment["data"] != fingerprint_of(train_set, examples):
            say(f"These are NOT the rows of the run: {config.data.path} or the settings have changed since.")
    token_loss = TokenLoss(opened.model)
    fast_paths = choose_fast_paths(config, opened.accelerator, token_loss, train_set, int8)
    packing = fast_paths.packed
    batches = plan_evaluation(make_plan(config, train_set, packing, 0, 1), examples)

    def sums(model: AbstractContextManager[Any]) -> Values:
        with model:
            found = evaluate(opened.accelerator, token_loss, batches, examples.dataset, packing)
        assert isinstance(found, Tensor), "nothing asked it to stop"
        values: Values = found.numpy()
        return values

    with console.status("evaluating the base"):
        base = sums(opened.model.disable_adapter())
    with console.status("evaluating the tuned model"):
        return base, sums(nullcontext())


def group_figures(name: str, base: Values, tuned: Values, members: NDArray[np.bool_]) -> Group:
    """The means of some of the examples, of sums [E, 4]: nll, entropy, correct, count."""
    base, tuned = base[members], tuned[members]
    counts = base[:, 3]

    def compared(column: int) -> Compared:
        before, after = base[:, column], tuned[:, column]
        change = difference_interval(before, after, counts)
        return Compared(mean_interval(before, counts), mean_interval(after, counts), change)

    return Group(name, len(base), int(counts.sum()), *(compared(column) for column in range(3)))


def _show_figures(trained: Trained, evaluated: Evaluated, group: Group) -> None:
    """Print the figures of all examples, and what the run itself had found."""
    size = f"{group.num_examples:,} examples, {group.num_target_tokens:,} target tokens"
    table = Table(
        "", "base", "tuned", "change", title=Text(f"{evaluated.source}: {size}"), title_justify="left"
    )
    for name, compared in (("loss", group.loss), ("entropy", group.entropy)):
        table.add_row(
            name, *(_cell(interval, "{:.4f}") for interval in compared[:2]), _cell(compared.change, "{:+.4f}")
        )
    perplexity = [Interval(*(math.exp(limit) for limit in interval)) for interval in group.loss]
    patterns = ("{:.2f}", "{:.2f}", "x {:.3f}")
    table.add_row("perplexity", *(_cell(*pair) for pair in zip(perplexity, patterns, strict=True)))
    accuracy = group.mean_token_accuracy
    patterns = ("{:.4f}", "{:.4f}", "{:+.4f}")
    table.add_row("token accuracy", *(_cell(*pair) for pair in zip(accuracy, patterns, strict=True)))
    console.print(table)
    say("Below each figure its 95 % interval over examples; of the change, paired by example.")
    run_dir, is_own = trained.run_dir, evaluated.data is trained.config.data
    if run_dir is not None and is_own and trained.adapter.resolve() == (run_dir / RESULT).resolve():
        for line in read_evaluations(run_dir)[-1:]:
            say(f"The run itself found a loss of {line['loss']:.4f} after its last update.")
    if abs(group.loss.change.value) > 0 and group.loss.change.low < 0 < group.loss.change.high:
        say("The change of the loss is within chance: its interval holds 0.")


def _cell(interval: Interval, pattern: str) -> str:
    value, low, high = (pattern.format(number) for number in interval)
    return value if math.isnan(interval.low) else f"{value}\n{low} to {high}"


def _show_groups(groups: Sequence[Group]) -> None:
    if not groups:
        return
    table = Table("loss of", "examples", "base", "tuned", "change", "95 %")
    for group in groups:
        base, tuned, change = group.loss
        limits = "" if math.isnan(change.low) else f"{change.low:+.3f}, {change.high:+.3f}"
        numbers = (f"{base.value:.4f}", f"{tuned.value:.4f}", f"{change.value:+.4f}")
        table.add_row(Text(group.name), f"{group.num_examples:,}", *numbers, limits)
    console.print(table)


def _write_answers(
    opened: TrainedModel, evaluated: Evaluated, count: int, max_new_tokens: int
) -> list[Written]:
    """What the base and the tuned model answer to the first rows."""
    asked = [
        (row, conversation)
        for row in evaluated.rows.select(range(min(len(evaluated.rows), 2 * count)))
        for conversation in pick_conversations([row], evaluated.data.system_prompt, 1)
    ][:count]
    conversations = [conversation for _, conversation in asked]

    def answers(model: AbstractContextManager[Any]) -> list[Answer]:
        found: list[Answer] = []
        with model:
            for start in range(0, len(conversations), ANSWERS_AT_A_TIME):
                some = conversations[start : start + ANSWERS_AT_A_TIME]
                found += generate_answers(
                    opened.accelerator, opened.model, opened.tokenizer, some, max_new_tokens
                )
        return found

    with console.status(f"writing {len(asked)} answers by the base"):
        by_base = answers(opened.model.disable_adapter())
    with console.status(f"writing {len(asked)} answers by the tuned model"):
        by_tuned = answers(nullcontext())
    return [
        Written(row["row_number"], conversation, answer_of(row), base, tuned)
        for (row, conversation), base, tuned in zip(asked, by_base, by_tuned, strict=True)
    ]


def _show_answers(written: Sequence[Written], max_new_tokens: int) -> dict[str, Any]:
    """Print how the answers end and how near they are to the references; the same as figures."""
    from sacrebleu.metrics.chrf import CHRF

    metric, ones = CHRF(), np.ones(len(written))

    def compared(value: Callable[[Answer, str], float]) -> Compared:
        base, tuned = (
            np.array([value(getattr(one, name), one.reference) for one in written])
            for name in ("base", "tuned")
        )
        change = difference_interval(base, tuned, ones)
        return Compared(mean_interval(base, ones), mean_interval(tuned, ones), change)

    measures = {
        "ended": compared(lambda answer, _: float(answer.ended)),
        "num_tokens": compared(lambda answer, _: float(answer.num_tokens)),
        "chrf": compared(lambda answer, reference: metric.sentence_score(answer.text, [reference]).score),
    }
    title = f"Answers to {len(written)} rows, at most {max_new_tokens} tokens, greedy"
    table = Table("", "base", "tuned", "change", title=title, title_justify="left")
    names = {"ended": "end by themselves", "num_tokens": "tokens", "chrf": "chrF against the reference"}
    for key, found in measures.items():
        pattern = "{:.2f}" if key == "ended" else "{:.1f}"
        cells = (_cell(found.base, pattern), _cell(found.tuned, pattern))
        table.add_row(names[key], *cells, _cell(found.change, pattern.replace(":", ":+")))
    console.print(table)
    return {
        "max_new_tokens": max_new_tokens,
        "chrf_signature": str(metric.get_signature()),
        **{key: _plain(found) for key, found in measures.items()},
        "rows": [_plain(one) for one in written],
    }


def _import_harness() -> Any:
    try:
        return (
            import_module("lm_eval").simple_evaluate,
            import_module("lm_eval.models.huggingface").HFLM,
        )
    except ImportError as error:
        raise ValueError(f"--lm-eval needs lm-evaluation-harness ({error}): pip install lm_eval") from error


def _run_harness(harness: Any, opened: TrainedModel, tasks: list[str]) -> dict[str, Any]:
    """The tasks' results by lm-evaluation-harness, of the base and of the tuned model, as they are here."""
    simple_evaluate, wrapper = harness
    results = {}
    for name, model in (("base", opened.model.disable_adapter()), ("tuned", nullcontext())):
        wrapped = wrapper(pretrained=opened.model, tokenizer=opened.tokenizer)  # it sets another mode
        with model, dropout_off(opened.model), opened.accelerator.autocast():
            results[name] = simple_evaluate(model=wrapped, tasks=tasks)["results"]
    table = Table("task", "measure", "base", "tuned", title="lm-evaluation-harness", title_justify="left")
    for task, measures in results["tuned"].items():
        for measure in measures:
            if isinstance(measures[measure], float) and "_stderr" not in measure:
                cells = (_with_error(results[name][task], measure) for name in ("base", "tuned"))
                table.add_row(task, measure.partition(",")[0], *cells)
    console.print(table)
    return results


def _with_error(measures: dict[str, Any], measure: str) -> str:
    name, comma, kind = measure.partition(",")
    error = measures.get(f"{name}_stderr{comma}{kind}")
    value = f"{measures[measure]:.4f}"
    return f"{value} ± {error:.4f}" if isinstance(error, float) else value


def _plain(value: Any) -> Any:
    """Of what JSON knows: records as objects, and null for what is not a number."""
    if isinstance(value, Group):
        return {key: _plain(part) for key, part in vars(value).items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: _plain(part) for key, part in value._asdict().items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
