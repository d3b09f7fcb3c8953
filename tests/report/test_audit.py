"""report.audit: the rows and figures that are shown are those of the audit."""

import re

import pytest
from audits import LONG_TEXT, SAMPLE, TOKENIZER, audit_of, dissect_messages, listed, row, turns, write
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.config import DataConfig
from finetune.data.anatomy import ROLES
from finetune.data.findings import find_problems
from finetune.data.tokenize import IGNORE, encode
from finetune.report.audit import length_histogram
from finetune.report.audited_rows import pick_rows, trained_parts


def test_what_is_cut_away_is_shown_as_not_trained():
    messages = turns("What?", "A long answer. " * 20)
    [part] = trained_parts({"messages": messages}, TOKENIZER, DataConfig(path="x", max_length=50))[0]
    assert [(s.role, s.trained, s.kept) for s in part.segments][-3:] == [
        ("assistant", True, True),
        ("assistant", False, False),
        ("template", False, False),
    ]


PIECES = st.sampled_from(["<|im_end|>", "assistant", "\n", " ", "placeholder", "e\u0301", "💶", "A coin."])
TEXT = st.lists(PIECES | st.text(max_size=4), max_size=6).map("".join)


@settings(max_examples=100, deadline=None)
@given(st.none() | TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@example("", [("A coin.", "A coin."), ("", "")])
def test_roles_part_all_tokens_and_what_is_trained_is_answers_and_their_ends(system, pairs):
    messages = turns(*(content for pair in pairs for content in pair))
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    tokens = encode(TOKENIZER, messages, "completion")
    anatomy = dissect_messages(messages)
    assert len(anatomy.roles) == len(anatomy.offsets) == len(tokens.input_ids)
    assert set(anatomy.roles) <= set(ROLES)
    trained = {t for t, label in enumerate(tokens.labels) if label != IGNORE}
    answers = {t for t, role in enumerate(anatomy.roles) if role == "assistant"}
    assert len(anatomy.ends_of_turn) == len(pairs)
    assert trained == answers | set(anatomy.ends_of_turn)
    assert not answers & set(anatomy.ends_of_turn)

    # The pieces to be shown are the whole conversation, and the marked ones the targets.
    [part] = trained_parts({"messages": messages}, TOKENIZER, DataConfig(path="x", max_length=10**6))[0]
    assert "".join(segment.text for segment in part.segments) == anatomy.text
    assert all(segment.role in ("assistant", "template") for segment in part.segments if segment.trained)


@pytest.mark.parametrize(
    "rows",
    [
        [row("Name a coin."), row("Add them.", "3", "1 and 2")],
        [{"prompt": "Name a coin.", "completion": "A dime."}, {"prompt": "Add.", "completion": "3"}],
        [{"messages": turns("Name a coin.", "A dime.")}, {"messages": turns("Add.", "3", "And?", "4")}],
    ],
    ids=["instruction", "completion", "messages"],
)
def test_rows_of_every_format_are_audited(tmp_path, rows):
    audit = audit_of(write(tmp_path / "rows.jsonl", [*rows, *rows]), eval_fraction=0)
    assert audit.figures["num_ends"].equals(audit.figures["num_trained_ends"])
    assert (audit.figures["user"] > 0).all()
    assert listed(audit)["Same prompt and answer within a split"] == [(1, 3), (2, 4)]
    for shown in pick_rows(audit, TOKENIZER, find_problems(audit)):
        assert any(segment.trained for part in shown.parts for segment in part.segments)


def test_the_histogram_counts_every_example_once():
    lengths = audit_of(SAMPLE).figures["num_tokens"]
    text = length_histogram(lengths.to_numpy())
    bins = [
        (int(a), int(b), int(n.replace(",", "")))
        for a, b, n in re.findall(r"^ *(\d+) to (\d+) +([\d,]+)", text, re.M)
    ]
    assert [n for _, _, n in bins] == [((lengths >= a) & (lengths <= b)).sum() for a, b, _ in bins]
    assert sum(n for *_, n in bins) == len(lengths)
    assert len(bins) <= 16


def test_a_row_with_several_problems_names_them_all(tmp_path):
    rows = [row(LONG_TEXT, "Long. " * 100), row(LONG_TEXT.upper(), "Long. " * 100)]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), max_length=200, eval_fraction=0)
    [shown, _] = pick_rows(audit, TOKENIZER, find_problems(audit))
    assert [text.split()[0] for text in shown.problems] == ["cut:", "same"]
