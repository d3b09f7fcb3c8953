"""report.audit: the rows and figures that are shown are those of the audit."""

import re

import pytest
from audits import LONG_TEXT, SAMPLE, TOKENIZER, audit_of, dissect_messages, listed, row, turns, write
from conftest import tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.config import DataConfig, SourceConfig
from finetune.data.findings import find_problems
from finetune.data.templates.anatomy import ROLES, Part
from finetune.data.templates.tokenize import IGNORE, encode
from finetune.report.audit import MOVED, length_histogram, summary
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


CALL = {"type": "function", "function": {"name": "exchange", "arguments": {"coin": "dime"}}}
TOOL = {"type": "function", "function": {"name": "exchange", "parameters": {"type": "object"}}}
# As Qwen3's does: reasoning and calls are written, and of earlier answers the reasoning is left out.
REASONING = (
    "{%- for tool in tools or [] -%}{{ '<|im_start|>system\\n' ~ tool.function.name ~ '<|im_end|>\\n' }}"
    "{%- endfor -%}{%- for turn in messages -%}{{ '<|im_start|>' ~ turn.role ~ '\\n' }}"
    "{%- if turn.role == 'assistant' and loop.last -%}"
    "{{ '<think>\\n' ~ (turn.reasoning_content or '') ~ '\\n</think>\\n\\n' }}{%- endif -%}"
    "{{ turn.content or '' }}{%- for call in turn.tool_calls or [] -%}"
    "{{ '<tool_call>' ~ call.function.name ~ (call.function.arguments | tojson) ~ '</tool_call>' }}"
    "{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
CONVERSATION = [
    {"role": "user", "content": "What is a dime worth?"},
    {"role": "assistant", "content": None, "reasoning_content": "Ask the bank.", "tool_calls": [CALL]},
    {"role": "tool", "content": "ten cents"},
    {"role": "assistant", "content": "Ten cents.", "reasoning_content": "It has told me."},
]


def test_reasoning_and_calls_are_marked_where_the_model_writes_them(tmp_path):
    """The first answer has lost its reasoning once another follows: it is trained, and shown, as it was."""
    tokenizer = tiny_tokenizer(REASONING)
    rows = [{"messages": CONVERSATION, "tools": [TOOL]}, {"messages": turns("Name a coin.", "A dime.")}]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), tokenizer, eval_fraction=0)
    [tools, plain] = sorted(pick_rows(audit, tokenizer, find_problems(audit)), key=lambda row: row.number)
    [conversation, earlier] = tools.parts
    assert trained_text(conversation) == "<think>\nIt has told me.\n</think>\n\nTen cents.<|im_end|>"
    assert trained_text(earlier) == (
        '<think>\nAsk the bank.\n</think>\n\n<tool_call>exchange{"coin": "dime"}</tool_call><|im_end|>'
    )
    assert earlier.context.endswith("What is a dime worth?<|im_end|>\n<|im_start|>assistant\n")
    assert [s.text for s in conversation.segments if s.role == "tool"] == ["ten cents"]
    assert list(tools.facts) == ["tools: exchange"]
    assert "rewritten" in tools.remarks[-1]
    assert trained_text(plain.parts[0]) == "<think>\n\n</think>\n\nA dime.<|im_end|>"

    figures = audit.figures
    assert figures["num_branches"].tolist() == [1, 0]
    assert figures.loc[1, "num_ends"] == figures.loc[1, "num_trained_ends"] == 2
    tables = {table.title: table for table in summary(audit)}
    did = {row[0]: row[1:] for row in tables["What the chat template does with rows"].rows}
    assert did[MOVED] == ("1", "50.0%", "1")
    [added] = [cells for remark, cells in did.items() if "is added before an answer" in remark]
    assert added == ("1", "50.0%", "2")


def trained_text(part: Part) -> str:
    return "".join(segment.text for segment in part.segments if segment.trained)


def test_what_is_not_used_of_the_rows_and_what_the_template_leaves_out_is_counted(tmp_path):
    rows = [
        {"messages": [{**turn, "mood": "good"} for turn in turns("What?", f"A {coin}.")], "topic": coin}
        for coin in ("dime", "penny")
    ]
    rows += [{"messages": CONVERSATION, "tools": [TOOL, {"type": "function", "function": {"name": "weigh"}}]}]
    tokenizer = tiny_tokenizer(REASONING.replace("tool.function.name", "'a tool'"))
    tables = {
        table.title: {row[0]: row[1] for row in table.rows}
        for table in summary(audit_of(write(tmp_path / "rows.jsonl", rows), tokenizer, eval_fraction=0))
    }
    assert tables["Not used of the rows"] == {'column "topic"': "2", 'message key "mood"': "2"}
    assert tables["What the chat template does with rows"]["tools are not written"] == "1"
    assert tables["What is trained on"]["format"] == "messages"


def test_sources_are_told_apart(tmp_path):
    chats = write(tmp_path / "chats.jsonl", [{"messages": turns("Name a coin.", f"{n}")} for n in range(3)])
    pairs = write(tmp_path / "pairs.jsonl", [{"question": f"{n}?", "answer": "It is so."} for n in range(5)])
    sources = [SourceConfig(path=chats, name="chats"), SourceConfig(path=pairs, system_prompt="Be kind.")]
    audit = audit_of(sources, eval_fraction=0)
    [table] = [table for table in summary(audit) if table.title == "Sources"]
    assert [row[:4] for row in table.rows] == [
        ("chats", "messages", "3", "0"),
        ("pairs", "question and answer", "5", "0"),
    ]
    assert sum(int(row[5]) for row in table.rows) == audit.figures["num_targets"].sum()
    by_source = audit.figures.groupby("source")["system"].sum()
    assert by_source[0] == 0 < by_source[1]
    shown = {row.number: row for row in pick_rows(audit, TOKENIZER, find_problems(audit))}
    assert shown[5].place == f"{pairs}, row 2"


def test_a_plain_text_is_trained_whole_in_several_examples(tmp_path):
    text = "A coin is a small, flat, round piece of metal. " * 20
    audit = audit_of(write(tmp_path / "rows.jsonl", [{"text": text}] * 2), max_length=60, eval_fraction=0)
    assert (audit.figures["num_examples"] > 3).all()
    assert (audit.figures["full_length"] == audit.figures["num_tokens"]).all()
    assert audit.cut_rows() == []
    # Each example begins with the last token of the one before, so that only the text's first is no target.
    assert (audit.figures["num_targets"] + 1).equals(audit.figures["num_tokens"])
    [shown, _] = pick_rows(audit, TOKENIZER, find_problems(audit))
    assert "".join(segment.text for segment in shown.parts[0].segments) == text + TOKENIZER.eos_token
    assert "Template writes no end-of-turn token" not in listed(audit)


def test_a_row_that_was_dropped_is_shown_as_it_stands_in_its_file(tmp_path):
    silent = [{"role": "user", "content": "Anybody?"}, {"role": "assistant", "content": ""}]
    rows = [{"messages": turns("Name a coin.", "A dime.")}, {"messages": silent}]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), eval_fraction=0)
    [shown, _] = pick_rows(audit, TOKENIZER, find_problems(audit))
    assert (shown.number, shown.split) == (2, "dropped")
    assert "".join(segment.text for segment in shown.parts[0].segments) == (
        "turn 1, user: Anybody?\nturn 2, assistant: \n"
    )
