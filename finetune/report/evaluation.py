"""The base against the tuned model: losses with intervals, by slice, answers, and lm-evaluation-harness."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor

from finetune.config import Config, DataConfig, Sources, described, described_rows, paths_of
from finetune.data.plan import make_plan, plan_evaluation
from finetune.data.preparing.examples import Examples, tokenize_rows
from finetune.data.rows import Rows, find_leaks, iterate_rows, load_rows
from finetune.data.splits import fingerprint_of
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.generate import Answer, answer_prompts
from finetune.model.loss import TokenLoss
from finetune.ops.quantized import dropout_off
from finetune.report.intervals import Interval, difference_interval, mean_interval
from finetune.run.adapter import Trained, TrainedModel
from finetune.run.checkpoint import TRAINING_CONFIG
from finetune.run.folder import RESULT, read_environment, read_evaluations
from finetune.runtime.console import console, say
from finetune.training.answer_scores import Question, chrf_metric, in_batches, pick_questions, score
from finetune.training.evaluate import evaluate

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
    """The answers of both models to a row."""

    question: Question
    base: Answer
    tuned: Answer


@dataclass(frozen=True)
class Evaluated:
    """The rows to evaluate on, and those of the run if they can still be read."""

    source: str
    rows: Dataset
    data: DataConfig
    source_names: Sequence[str]
    run_rows: Rows | None

    def leaks(self) -> dict[int, Any]:
        """The rows whose prompt was trained on, exactly or nearly, by row number."""
        return {} if self.run_rows is None else find_leaks(replace(self.run_rows, eval=self.rows))


def read_rows(trained: Trained, file: str | None) -> Evaluated:
    """All rows of `file`; without one, the run's eval rows.

    Raises:
        ValueError: there are no rows to evaluate on, or as `load_rows`.
    """
    data, sets = trained.config.data, trained.config.eval.sets
    if file is None:
        if trained.run_dir is None and not (trained.adapter / TRAINING_CONFIG).is_file():
            raise ValueError(f"{trained.adapter} does not say what it was trained on: give --data FILE")
        rows = load_rows(data, sets)
        if len(rows.eval) == 0:
            raise ValueError("the run has no eval rows (data.eval_fraction is 0): give --data FILE")
        place = described(_main_eval_path(trained.config))
        return Evaluated(f"the eval rows of {place}", rows.eval, data, rows.source_names, rows)
    own = replace(data, path=file, num_samples=None, eval_path=None, eval_fraction=0.0)
    rows = load_rows(own)
    for reason, numbers in rows.dropped.items():
        say(f"{file}: {len(numbers):,} rows {reason} are left out.")
    try:
        run_rows = load_rows(data, sets)
    except ValueError as error:
        say(f"Rows that were also trained on cannot be marked: {error}")
        run_rows = None
    return Evaluated(file, rows.train, own, rows.source_names, run_rows)


def _main_eval_path(config: Config) -> Sources:
    """Where the rows are from that the figures of all examples are of; see `is_main`."""
    if config.data.eval_fraction > 0:
        return config.data.path
    if config.data.eval_path is not None:
        return config.data.eval_path
    return [path for paths in (config.eval.sets or {}).values() for path in paths_of(paths)]


def evaluate_both(
    trained: Trained, opened: TrainedModel, evaluated: Evaluated, examples: Examples
) -> tuple[Values, Values]:
    """[E, 4] sums of the base and of the tuned model, as `evaluate` gives them, computed as in the run."""
    config, train_set, int8, max_tokens = trained.config, examples, None, None
    is_own = evaluated.data is config.data
    if is_own and evaluated.run_rows is not None:
        train_set = tokenize_rows(evaluated.run_rows.train, opened.tokenizer, config.data)
    if trained.run_dir is not None:
        environment = read_environment(trained.run_dir)
        int8, max_tokens = str(environment["int8"]), environment["token_budget"]
        if is_own and environment["data"] != fingerprint_of(train_set, examples):
            rows = described_rows(config)
            say(f"These are NOT the rows of the run: {rows} or the settings have changed since.")
    token_loss = TokenLoss(opened.model)
    fast_paths = choose_fast_paths(config, opened.accelerator, token_loss, train_set, int8)
    packing = fast_paths.packed
    batches = plan_evaluation(make_plan(config, train_set, packing, 0, 1, max_tokens), examples)

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

    compared = (_compare(base[:, column], tuned[:, column], counts) for column in range(3))
    return Group(name, len(base), int(counts.sum()), *compared)


def _compare(base: Values, tuned: Values, counts: Values) -> Compared:
    """The means per count of the sums [E] of both models."""
    change = difference_interval(base, tuned, counts)
    return Compared(mean_interval(base, counts), mean_interval(tuned, counts), change)


def show_figures(trained: Trained, evaluated: Evaluated, group: Group) -> None:
    """Print the figures of all examples, and the loss that the run itself recorded."""
    size = f"{group.num_examples:,} examples, {group.num_target_tokens:,} target tokens"
    say(f"{evaluated.source}: {size}")  # not the table's title, which would be folded inside a path
    table = Table("", "base", "tuned", "change")
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


def show_groups(groups: Sequence[Group]) -> None:
    """Print the loss of each slice, if there are any."""
    if not groups:
        return
    table = Table("loss of", "examples", "base", "tuned", "change", "95 %")
    for group in groups:
        base, tuned, change = group.loss
        limits = "" if math.isnan(change.low) else f"{change.low:+.3f}, {change.high:+.3f}"
        numbers = (f"{base.value:.4f}", f"{tuned.value:.4f}", f"{change.value:+.4f}")
        table.add_row(Text(group.name), f"{group.num_examples:,}", *numbers, limits)
    console.print(table)


def write_answers(
    opened: TrainedModel, evaluated: Evaluated, count: int, max_new_tokens: int
) -> list[Written]:
    """The answers of the base and of the tuned model to the first `count` rows that ask something."""
    rows, prompt = iterate_rows(evaluated.rows), evaluated.data.system_prompt
    questions = pick_questions(rows, opened.tokenizer, prompt, count)

    def answers(model: AbstractContextManager[Any]) -> dict[int, Answer]:
        found: dict[int, Answer] = {}
        with model:
            for batch in in_batches(questions):
                prompts = [question.prompt for question in batch]
                made = answer_prompts(
                    opened.accelerator, opened.model, opened.tokenizer, prompts, max_new_tokens
                )
                found |= zip((question.row_number for question in batch), made, strict=True)
        return found

    with console.status(f"writing {len(questions)} answers by the base"):
        by_base = answers(opened.model.disable_adapter())
    with console.status(f"writing {len(questions)} answers by the tuned model"):
        by_tuned = answers(nullcontext())
    return [
        Written(question, by_base[question.row_number], by_tuned[question.row_number])
        for question in questions
    ]


def score_answers(written: Sequence[Written], max_new_tokens: int) -> dict[str, Any]:
    """How the answers compare with those of the rows, how they end and how long they are; and the answers."""
    by_base = [score(one.question, one.base) for one in written]
    by_tuned = [score(one.question, one.tuned) for one in written]
    ones = np.ones(len(written))
    calls = np.array([one.num_calls for one in by_tuned], dtype=np.float64)

    def compared(name: str, counts: Values) -> Compared:
        base, tuned = (np.array([getattr(one, name) for one in scores]) for scores in (by_base, by_tuned))
        return _compare(base, tuned, counts)

    tokens_by_base, tokens_by_tuned = (
        np.array([answer.num_tokens for answer in answers], dtype=np.float64)
        for answers in ([one.base for one in written], [one.tuned for one in written])
    )
    measures = {
        "exact_match": compared("exact_match", ones),
        "ended": compared("ended", ones),
        "num_tokens": _compare(tokens_by_base, tokens_by_tuned, ones),
        "chrf": compared("chrf", ones),
    }
    if calls.any():
        measures["tool_call_accuracy"] = compared("num_right_calls", calls)
    signature = str(chrf_metric().get_signature())  # the metric has none before it scored something
    rows = [
        {
            "row_number": question.row_number,
            "conversation": question.conversation.messages,
            "reference": question.reference.text,
            "base": base,
            "tuned": tuned,
        }
        for question, base, tuned in written
    ]
    return {"max_new_tokens": max_new_tokens, "chrf_signature": signature, **measures, "rows": rows}


def show_answers(scores: dict[str, Any]) -> None:
    """Print what `score_answers` gives, without the answers themselves."""
    title = f"Answers to {len(scores['rows'])} rows, at most {scores['max_new_tokens']} tokens, greedy"
    table = Table("", "base", "tuned", "change", title=title, title_justify="left")
    shares = {
        "exact_match": "equal to the reference",
        "ended": "end by themselves",
        "tool_call_accuracy": "right tool calls",
    }
    names = {**shares, "num_tokens": "tokens", "chrf": "chrF against the reference"}
    for key, name in names.items():
        if key not in scores:
            continue
        pattern = "{:.2f}" if key in shares else "{:.1f}"
        patterns = (pattern, pattern, pattern.replace(":", ":+"))
        table.add_row(name, *(_cell(*pair) for pair in zip(scores[key], patterns, strict=True)))
    console.print(table)


def import_harness() -> Any:
    """`simple_evaluate` and the model class of lm-evaluation-harness.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return (
            import_module("lm_eval").simple_evaluate,
            import_module("lm_eval.models.huggingface").HFLM,
        )
    except ImportError as error:
        raise ValueError(f"--lm-eval needs lm-evaluation-harness ({error}): pip install lm_eval") from error


def run_harness(harness: Any, opened: TrainedModel, tasks: list[str]) -> dict[str, Any]:
    """The results of lm-evaluation-harness for the base and the tuned model, as they are loaded here."""
    simple_evaluate, wrapper = harness
    results = {}
    for name, model in (("base", opened.model.disable_adapter()), ("tuned", nullcontext())):
        wrapped = wrapper(pretrained=opened.model, tokenizer=opened.tokenizer)  # it sets another mode
        with model, dropout_off(opened.model), opened.accelerator.autocast():
            results[name] = simple_evaluate(model=wrapped, tasks=tasks)["results"]
    return results


def show_harness(results: dict[str, Any]) -> None:
    """Print the measures of each task with their standard errors."""
    table = Table("task", "measure", "base", "tuned", title="lm-evaluation-harness", title_justify="left")
    for task, measures in results["tuned"].items():
        for measure in measures:
            if isinstance(measures[measure], float) and "_stderr" not in measure:
                cells = (_with_error(results[name][task], measure) for name in ("base", "tuned"))
                table.add_row(task, measure.partition(",")[0], *cells)
    console.print(table)


def _with_error(measures: dict[str, Any], measure: str) -> str:
    name, comma, kind = measure.partition(",")
    error = measures.get(f"{name}_stderr{comma}{kind}")
    value = f"{measures[measure]:.4f}"
    return f"{value} ± {error:.4f}" if isinstance(error, float) else value


def to_plain(value: Any) -> Any:
    """Convert to what JSON can express: records become objects, and numbers that are not finite null."""
    if isinstance(value, Group):
        return {key: to_plain(part) for key, part in vars(value).items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: to_plain(part) for key, part in value._asdict().items()}
    if isinstance(value, dict):
        return {key: to_plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [to_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
