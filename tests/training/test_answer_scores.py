"""An answer is judged by that of its row; figures are means over answers, and of calls over calls."""

import pytest
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from sacrebleu.metrics.chrf import CHRF
from small_templates import SMALL_TEMPLATES, byte_tokenizer

from finetune.model.generate import Answer
from finetune.training.answer_scores import in_batches, longest_reference, mean_scores, pick_questions, score

TOKENIZER = tiny_tokenizer(QWEN2_TEMPLATE)
CALL = {"type": "function", "function": {"name": "exchange", "arguments": {"coin": "dime"}}}
TOOLS = [{"type": "function", "function": {"name": "exchange", "parameters": {"type": "object"}}}]


def row(number: int, question: str, answer: str) -> dict:
    return {"row_number": number, "instruction": question, "input": None, "output": answer}


def calling(number: int, *calls: dict) -> dict:
    answer = {"role": "assistant", "content": None, "tool_calls": list(calls)}
    messages = [{"role": "user", "content": "Change it."}, answer]
    return {"row_number": number, "messages": messages, "tools": TOOLS}


def test_an_answer_is_compared_with_the_rows_own():
    [question] = pick_questions([row(7, "Name a coin.", "A dime.")], TOKENIZER, None, 5)
    assert question.reference.text == "A dime."
    assert question.reference.ended
    same = score(question, question.reference)
    assert (same.exact_match, same.chrf, same.ended, same.num_calls) == (1, pytest.approx(100), 1, 0)
    other = score(question, Answer("A dime, or two", 5, False))
    expected = CHRF().sentence_score("A dime, or two", ["A dime."]).score
    assert (other.exact_match, other.chrf, other.ended) == (0, expected, 0)
    assert mean_scores([same, other]) == {
        "num_answers": 2,
        "exact_match": 0.5,
        "chrf": pytest.approx((100 + expected) / 2),
        "ended": 0.5,
    }


def test_of_calls_the_share_is_over_the_calls_of_the_rows():
    tokenizer = byte_tokenizer(SMALL_TEMPLATES["hermes"])
    penny = {"type": "function", "function": {"name": "exchange", "arguments": {"coin": "penny"}}}
    rows = [calling(1, CALL), calling(2, CALL, penny), row(3, "Name a coin.", "A dime.")]
    one, two, none = pick_questions(rows, tokenizer, None, 5)
    assert (one.called, two.called, none.called) == (["exchange"], ["exchange"] * 2, [])
    spaced = one.reference.text.replace(": ", ":  ")  # the same call, not the same letters
    scores = [
        score(one, Answer(spaced, 9, True)),
        score(two, one.reference),
        score(none, one.reference),  # a call that nobody asked for: not the row's answer, and no row's call
    ]
    assert [(s.exact_match, s.num_right_calls, s.num_calls) for s in scores] == [
        (0, 1, 1),
        (0, 1, 2),
        (0, 0, 0),
    ]
    assert mean_scores(scores)["tool_call_accuracy"] == pytest.approx(2 / 3)


def test_the_first_rows_that_ask_and_fit_are_answered_longest_prompts_first():
    rows = [row(n, "Name it. " * (n % 4), "A dime. " * n) for n in range(1, 30)]
    documents = [{"row_number": 99, "text": "A dime is a coin."}]
    questions = pick_questions([*documents, *rows], TOKENIZER, None, 13)
    assert [question.row_number for question in questions] == list(range(1, 14))
    lengths = {question.row_number: len(question.prompt) for question in questions}
    batches = in_batches(questions)
    assert [len(batch) for batch in batches] == [10, 3]
    ordered = [lengths[question.row_number] for batch in batches for question in batch]
    assert ordered == sorted(ordered, reverse=True)
    assert longest_reference(questions) == questions[-1].reference.num_tokens
    limit = lengths[4] + questions[3].reference.num_tokens
    fitting = pick_questions(rows, TOKENIZER, None, 13, max_length=limit)
    assert {1, 4} <= {question.row_number for question in fitting}
    assert all(len(q.prompt) + q.reference.num_tokens <= limit for q in fitting)
    assert len(fitting) < 13
