"""The comparison that `merge` and `export` print: predictions and answers on rows of the run."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from finetune.data.preparing.examples import Examples
from finetune.data.rows import Rows, iterate_rows
from finetune.data.splits import tokenize_splits
from finetune.export.fidelity import (
    Comparison,
    Difference,
    answer_questions,
    difference,
    start_comparison,
)
from finetune.model.generate import Answer
from finetune.report.html import visible
from finetune.run.adapter import Trained, TrainedModel
from finetune.runtime.console import console, say
from finetune.training.answer_scores import pick_questions

NUM_ANSWERS = 10
SHOWN_CHARACTERS = 240  # of a question and of an answer
MIN_GAIN_KEPT = 0.5  # below this share of what training gained, a warning is printed


class Line(NamedTuple):
    """A model in the table."""

    name: str
    difference: Difference
    """From the trained model, computed in fp32"""
    agreement_as_run: float | None
    """Agreement with the trained model, computed in the run's precision"""
    num_bytes: int | None = None
    is_written: bool = False


def open_comparison(trained: Trained, opened: TrainedModel, rows: Rows, num_rows: int) -> Comparison | None:
    """Compute the trained model's predictions and answers on the first `num_rows` eval rows; on train rows if
    the run has no eval rows.

    Returns None, and says so, if the model is none that can be compared.

    Raises:
        ValueError: no example is left of the rows.
    """
    train_set, eval_set = tokenize_splits(rows, opened.tokenizer, trained.config.data)
    examples, questioned = eval_set, rows.eval
    if len(eval_set.dataset) == 0:
        say("The run has no eval rows: comparing on its train rows.")
        examples, questioned = train_set, rows.train
    dataset = examples.dataset.select(range(min(num_rows, len(examples.dataset))))
    data = trained.config.data
    questions = pick_questions(
        iterate_rows(questioned), opened.tokenizer, data.system_prompt, NUM_ANSWERS, data.max_length
    )
    chosen = Examples(dataset, examples.truncated, examples.dropped)
    with console.status("computing the trained model's predictions and answers"):
        comparison = start_comparison(trained, opened, train_set, chosen, questions)
    if comparison is None:
        say("Not compared: the model's logits are not the product of its head with its last hidden states.")
    return comparison


def show_differences(comparison: Comparison, precision: str, lines: Sequence[Line]) -> None:
    """Print how far the base and other models are from the trained one. `precision` is that of the run."""
    loss = comparison.loss
    precision = "fp32" if precision == "no" else precision
    own = difference(comparison.trained, comparison.as_run, comparison.target_ids)
    num_rows, num_tokens = len(comparison.examples.dataset), len(comparison.target_ids)
    columns = ("", "KL", "loss", "change", "top-1", "as run", "MB")
    table = Table(*columns, title=f"{num_tokens:,} target tokens of {num_rows:,} rows", title_justify="left")
    table.add_row("trained, in fp32", "", f"{loss:.4f}", "", "", f"{own.agreement:.1%}", "")
    trained_as_run = Line(f"trained, as run ({precision})", own, None)
    for line in (Line("base, untrained", comparison.base, None), trained_as_run, *lines):
        kl, agreement, its_loss = line.difference
        as_run = "" if line.agreement_as_run is None else f"{line.agreement_as_run:.1%}"
        size = "" if line.num_bytes is None else f"{line.num_bytes / 1e6:,.0f}"
        cells = (
            f"{kl:.1e}",
            f"{its_loss:.4f}",
            f"{its_loss / loss - 1:+.2%}",
            f"{agreement:.1%}",
            as_run,
            size,
        )
        table.add_row(line.name, *cells, style="bold" if line.is_written else "")
    console.print(table)
    say("KL and top-1 (same most likely token) are per target token, against the trained weights in fp32.")
    say(f"as run: top-1 against the run's own computation in {precision}.")


def gain_kept(base: Difference, loss: float, written: Difference) -> str:
    """Return a sentence on how much of what training gained is left in what was written.

    `base` and `written` are differences from the trained model, whose loss is `loss`.
    """
    losses = f"base {base.loss:.4f}, trained {loss:.4f}, written {written.loss:.4f}"
    if base.loss <= loss:
        return f"On these rows the trained model is no better than its base ({losses})."
    kept = (base.loss - written.loss) / (base.loss - loss)
    sentence = f"It keeps {kept:.0%} of the loss that training gained ({losses})."
    if kept >= MIN_GAIN_KEPT and written.kl < base.kl:
        return sentence
    return f"{sentence} WARNING: rounding outweighs what was trained; choose a type of more bits."


def show_answers(comparison: Comparison, opened: TrainedModel, model: Any, name: str) -> None:
    """Print the answers of a model beside the trained model's, if the rows ask something."""
    if not comparison.questions:
        return
    with console.status("writing answers"):
        answers = answer_questions(opened, model, comparison.questions)
    table = Table("question", "trained", name, title=_agreement(comparison.answers, answers), show_lines=True)
    table.title_justify = "left"
    for question, expected, found in zip(comparison.questions, comparison.answers, answers, strict=True):
        asked = question.conversation.messages[-1]["content"]
        written = "[dim]the same[/]" if found == expected else _shortened(found.text)
        table.add_row(_shortened(str(asked)), _shortened(expected.text), written)
    console.print(table)


def _agreement(expected: Sequence[Answer], found: Sequence[Answer]) -> str:
    same = sum(one == other for one, other in zip(expected, found, strict=True))
    return f"{same} of {len(found)} greedy answers are the same"


def _shortened(text: str) -> str:
    return escape(visible(textwrap.shorten(text, SHOWN_CHARACTERS, placeholder=" ...")))
