"""Answers judged by those of the rows: exact match, chrF, how many end by themselves, right tool calls."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from finetune.data.conversations import Conversation, Row, to_conversation
from finetune.data.templates.answer_parts import (
    Call,
    CallFormat,
    call_format,
    names_of_calls,
    num_right_calls,
)
from finetune.model.generate import Answer, encode_prompt, reference_answer
from finetune.training.evaluate import pick_conversations
from finetune.training.metrics import Metrics

ANSWERS_AT_A_TIME = 10  # in one batch


class Question(NamedTuple):
    """A row up to its last answer, and that answer."""

    row_number: int
    conversation: Conversation
    """What is asked"""
    prompt: list[int]
    """Its token ids"""
    reference: Answer
    """The row's own answer, as the template writes it"""
    called: list[str]
    """The names of the functions that it calls"""
    call_format: CallFormat | None
    """How its calls are written; None where it has none, or where they cannot be read back"""

    @property
    def calls(self) -> list[Call]:
        """The tool calls of the row's own answer, as far as they can be read"""
        return [] if self.call_format is None else self.call_format.read(self.reference.text)


class Scores(NamedTuple):
    """How an answer compares with the row's own."""

    exact_match: float
    """1 if both are the same text, with reasoning and calls; else 0"""
    chrf: float
    """0 to 100, as sacrebleu's `sentence_score`"""
    ended: float
    """1 if the model ended its turn, 0 if the limit of tokens did"""
    num_right_calls: float
    """Of `num_calls`, as `data.templates.answer_parts.num_right_calls` counts them"""
    num_calls: int
    """Tool calls of the row's own answer that could be read"""


def pick_questions(
    rows: Iterable[Row], tokenizer: Any, system_prompt: str | None, count: int, max_length: int | None = None
) -> list[Question]:
    """The first `count` rows that ask something, in their order; with `max_length`, those of which prompt and
    answer have at most so many tokens in all."""
    questions: list[Question] = []
    for row in rows:
        if len(questions) == count:
            break
        for asked in pick_conversations([row], system_prompt, 1):
            question = _question(row, asked, tokenizer, system_prompt)
            if max_length is None or len(question.prompt) + question.reference.num_tokens <= max_length:
                questions.append(question)
    return questions


def _question(row: Row, asked: Conversation, tokenizer: Any, system_prompt: str | None) -> Question:
    whole = to_conversation(row, system_prompt).messages[: len(asked.messages) + 1]
    reference = reference_answer(tokenizer, replace(asked, messages=whole))
    called = names_of_calls(whole[-1])
    found = call_format(tokenizer, asked.tools) if called else None
    if found is not None and [name for name, _ in found.read(reference.text)] != called:
        found = None
    return Question(row["row_number"], asked, encode_prompt(tokenizer, asked), reference, called, found)


def longest_reference(questions: Sequence[Question]) -> int:
    """Tokens of the longest answer of the rows, including the one that ends it."""
    return max(question.reference.num_tokens for question in questions)


def in_batches(questions: Sequence[Question]) -> list[list[Question]]:
    """Batches of ANSWERS_AT_A_TIME, of prompts of about one length, the longest first."""
    ordered = sorted(questions, key=lambda question: (-len(question.prompt), question.row_number))
    return [ordered[at : at + ANSWERS_AT_A_TIME] for at in range(0, len(ordered), ANSWERS_AT_A_TIME)]


def score(question: Question, answer: Answer) -> Scores:
    """Compare an answer with the row's own."""
    calls, format_ = question.calls, question.call_format
    made = [] if format_ is None else format_.read(answer.text)
    return Scores(
        float(answer.text == question.reference.text),
        float(chrf_metric().sentence_score(answer.text, [question.reference.text]).score),
        float(answer.ended),
        num_right_calls(made, calls) if calls else 0.0,
        len(calls),
    )


@cache
def chrf_metric() -> Any:
    """sacrebleu's chrF with its defaults."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def mean_scores(scores: Sequence[Scores]) -> Metrics:
    """The means over the answers: `exact_match`, `chrf`, `ended`; and, if any of the rows calls tools,
    `tool_call_accuracy`: of all their calls the share that was made with the right name and arguments."""
    number = len(scores)
    means: Metrics = {
        "num_answers": number,
        "exact_match": sum(one.exact_match for one in scores) / number,
        "chrf": sum(one.chrf for one in scores) / number,
        "ended": sum(one.ended for one in scores) / number,
    }
    if num_calls := sum(one.num_calls for one in scores):
        means["tool_call_accuracy"] = sum(one.num_right_calls for one in scores) / num_calls
    return means
