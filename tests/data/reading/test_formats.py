"""Formats are found by their columns, and rows of any of them become one form; nothing is lost unsaid."""

import json
import pickle
from typing import Any

import pytest
import yaml

from finetune.config import DataConfig
from finetune.config_checks import COLUMNS
from finetune.data.reading.batches import read_formatted
from finetune.data.reading.cleaning import reason_to_ask_nothing, reason_to_drop, turns_asked
from finetune.data.reading.formats import PAIRS, Format, format_of
from finetune.data.reading.sources import training_sources

PLACE = "rows.jsonl, row 3"
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def found(row: dict[str, Any], mapping: dict[str, str] | None = None) -> Format:
    return format_of(list(row), mapping, "rows.jsonl", row)


def convert(row: dict[str, Any], mapping: dict[str, str] | None = None) -> dict[str, Any]:
    """The Row of a row of which everything is used."""
    made, unused = found(row, mapping).convert(row, PLACE)
    assert unused == []
    assert json.loads(json.dumps(made)) == made
    return made


def unused_of(row: dict[str, Any]) -> list[str]:
    return found(row).convert(row, PLACE)[1]


def refusal(row: dict[str, Any], mapping: dict[str, str] | None = None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        found(row, mapping).convert(row, PLACE)
    message = str(caught.value)
    assert "\n" not in message
    return message


def alpaca(instruction: Any = "a", text: Any = None, output: Any = "b", **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "input": text, "output": output, **more}


# --- What each format becomes ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (alpaca(), alpaca()),
        ({"instruction": "a", "output": "b"}, alpaca()),
        (alpaca(text="x"), alpaca(text="x")),
        (alpaca(text=float("nan")), alpaca()),
        (alpaca(system="s", history=[["q", "r"]]), alpaca(system="s", history=[["q", "r"]])),
        (alpaca(system=" ", history=[]), alpaca()),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"text": "a"}, {"text": "a"}),
        ({"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        ({"messages": None}, {"messages": []}),
        (
            {"messages": [USER, ANSWER], "tools": "[]", "system": "s", "chat_template_kwargs": '{"x": 1}'},
            {"messages": [USER, ANSWER], "system": "s", "chat_template_kwargs": {"x": 1}},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                "tools": [TOOL],
            },
            {"messages": [USER, ANSWER], "tools": [TOOL]},
        ),
        ({"conversation": [USER, ANSWER]}, {"messages": [USER, ANSWER]}),
        # A prompt as messages: what the assistant said in it is no target.
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "tools": [TOOL]},
            {"messages": [USER, {**ANSWER, "train": False}, USER, ANSWER], "tools": [TOOL]},
        ),
        ({"prompt": "a", "completion": "b", "system": "s"}, {"messages": [USER, ANSWER], "system": "s"}),
        # Other pairs
        ({"system_prompt": "s", "question": "a", "response": "b"}, alpaca(system="s")),
        ({"instruction": "a", "context": "x", "response": "b"}, alpaca(text="x")),
        ({"input": "a", "output": "b"}, alpaca()),
    ],
    ids=lambda row: "/".join(row),
)
def test_rows_of_every_format_become_their_one_form(row, expected):
    assert convert(row) == expected


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_common_pairs_are_an_instruction_and_an_output(pair):
    ask, answer = pair
    assert convert({answer: "b", ask: "a"}) == alpaca()
    assert found({ask: "a", answer: "b"}).name == f"{ask} and {answer}"


def test_a_format_can_be_sent_to_another_process():
    one = found({"question": "a", "answer": "b"})
    assert pickle.loads(pickle.dumps(one)) == one


EVERY = {
    "messages": [USER, ANSWER],
    "conversations": [{"from": "human", "value": "c"}],
    "instruction": "i",
    "output": "o",
    "prompt": "p",
    "completion": "c",
    "question": "q",
    "answer": "r",
    "text": "t",
}


def test_of_several_formats_the_first_is_taken_and_what_the_others_have_is_named():
    order = [("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion")]
    order += [("question", "answer"), ("text",)]
    left = dict(EVERY)
    for columns in order:
        one = found(left)
        assert set(one.required) == set(columns)
        unused = one.convert(left, PLACE)[1]
        left = {column: cell for column, cell in left.items() if column not in columns}
        assert unused == [f'column "{column}"' for column in left]
    assert left == {}


# --- A mapping ---


@pytest.mark.parametrize(
    ("row", "mapping", "expected"),
    [
        ({"q": "a", "reply": "b"}, {"q": "instruction", "reply": "output"}, alpaca()),
        ({"q": "a", "answer": "b"}, {"q": "instruction"}, alpaca()),
        ({"q": "a", "r": "b", "x": "c"}, {"q": "instruction", "r": "output", "x": "input"}, alpaca(text="c")),
        ({"chat": [USER, ANSWER], "fns": [TOOL]}, {"chat": "messages", "fns": "tools"}, None),
        ({"chat": [{"from": "gpt", "value": "b"}]}, {"chat": "conversations"}, {"messages": [ANSWER]}),
        ({"body": "a"}, {"body": "text"}, {"text": "a"}),
        ({"p": "a", "c": "b"}, {"p": "prompt", "c": "completion"}, {"prompt": "a", "completion": "b"}),
        ({"instruction": "b", "output": "a"}, {"instruction": "output", "output": "instruction"}, alpaca()),
    ],
)
def test_mapped_columns_are_what_they_are_mapped_to(row, mapping, expected):
    assert convert(row, mapping) == (expected or {"messages": [USER, ANSWER], "tools": [TOOL]})


def test_every_name_that_can_be_mapped_to_is_used():
    cells = {
        **EVERY,
        "input": "x",
        "history": [["q", "r"]],
        "system": "s",
        "tools": [TOOL],
        "chat_template_kwargs": {"x": 1},
    }
    needs = {
        **dict.fromkeys(("input", "history"), ("instruction", "output")),
        **dict.fromkeys(("system", "tools", "chat_template_kwargs"), ("messages",)),
        "instruction": ("output",),
        "output": ("instruction",),
        "prompt": ("completion",),
        "completion": ("prompt",),
    }
    for ours in COLUMNS:
        row = {"theirs": cells[ours], **{name: cells[name] for name in needs.get(ours, ())}}
        assert "theirs" in found(row, {"theirs": ours}).columns.values()
        convert(row, {"theirs": ours})


def test_a_mapping_says_which_format_is_meant_where_there_are_several():
    row = {"messages": [USER], "q": "a", "r": "b", "instruction": "not this one"}
    one = found(row, {"q": "instruction", "r": "output"})
    made, unused = one.convert(row, PLACE)
    assert made == alpaca()
    assert unused == ['column "messages"', 'column "instruction"']


def test_a_mapping_of_a_column_that_is_not_there_is_refused():
    message = refusal({"question": "a", "answer": "b"}, {"qestion": "instruction"})
    assert (
        message == "rows.jsonl has no column 'qestion', which data.columns names; there are question, answer"
    )


# --- Unknown columns ---


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"id": 7, "quest": "a", "answr": "b"}, {"quest": "instruction", "answr": "output"}),
        ({"reply": "b", "ask": "a"}, {"ask": "instruction", "reply": "output"}),
        ({"x": "a", "y": "b"}, {"x": "instruction", "y": "output"}),
        ({"id": 7, "chat": [USER]}, {"chat": "messages"}),
        ({"id": 7, "chat": [{"from": "human", "value": "a"}]}, {"chat": "conversations"}),
        ({"id": 7, "body": "Once"}, {"body": "text"}),
        ({"Odd: name": "a", "output": "b"}, {"Odd: name": "instruction", "output": "output"}),
    ],
)
def test_unknown_columns_are_shown_with_a_row_and_the_yaml_that_would_map_them(row, line):
    message = refusal(row)
    assert f"rows.jsonl has the columns {list(row)}" in message
    assert json.dumps(row) in message
    said = message.split("data.columns: ")[1].split("}")[0] + "}"
    mapping = yaml.safe_load(said)
    assert mapping == line
    assert reason_to_drop(convert_lossy(row, mapping)) in (None, "without text in an assistant turn")


def convert_lossy(row: dict[str, Any], mapping: dict[str, str]) -> dict[str, Any]:
    return found(row, mapping).convert(row, PLACE)[0]


def test_a_row_that_is_shown_is_shortened():
    message = refusal({"story": "very " * 1000, "more": ["x"] * 1000})
    assert len(message) < 900
    assert "very very" in message


def test_columns_of_which_nothing_can_be_text_get_no_line():
    assert "data.columns" not in refusal({"x": 1, "y": 2})


# --- What is refused of a row ---


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (alpaca(output=5), "output must be text, not 5"),
        ({"question": "a", "answer": ["b"]}, "answer must be text"),
        (alpaca(history="q"), "history must be a list of [question, answer]"),
        (alpaca(history=[["q"]]), "history must be a list"),
        (alpaca(history=[["q", None]]), "history must be a list"),
        (alpaca(system=5), "system must be text"),
        ({"prompt": "a", "completion": [ANSWER]}, "must both be text, or both be messages"),
        ({"prompt": [USER], "completion": "b"}, "must both be text, or both be messages"),
        ({"prompt": [USER], "completion": [{"role": 5}]}, "completion must be a list of objects"),
        ({"prompt": {"role": "user"}, "completion": "b"}, "prompt must be text"),
        ({"messages": [USER, ANSWER], "tools": "x"}, "tools is no JSON"),
        ({"text": 5}, "text must be text"),
        (alpaca(instruction="\ud800"), "instruction holds '\\ud800', which is no character"),
        ({"question": "\ud800", "answer": "b"}, "instruction holds"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages holds"),
        ({"messages": [USER], "tools": [{"name": "f", "\udfff": 1}]}, "tools holds '\\udfff'"),
    ],
)
def test_a_cell_of_another_kind_is_refused_with_its_place(row, part):
    if "question" in row and "\ud800" in row["question"]:
        part = "question holds"
    message = refusal(row)
    assert message.startswith(f"{PLACE}: ")
    assert part in message


def test_a_row_of_another_format_is_refused_not_dropped():
    one = format_of(["instruction", "output", "prompt", "completion"], None, "rows.jsonl")
    with pytest.raises(
        ValueError, match=f"{PLACE}: it has prompt and completion, where .* instruction and output"
    ):
        one.convert({"prompt": "a", "completion": "b"}, PLACE)
    assert one.convert({"instruction": "a"}, PLACE) == (alpaca(output=None), [])
    assert one.convert({"id": 5}, PLACE) == (alpaca(None, None, None), ['column "id"'])


def test_what_is_not_used_is_named_unless_it_is_null():
    assert unused_of(alpaca(score=0, id=None, level=float("nan"), tags=[])) == [
        'column "score"',
        'column "tags"',
    ]
    assert unused_of({"messages": [{**USER, "id": 1}, ANSWER], "input": "x"}) == [
        'column "input"',
        'message key "id"',
    ]
    assert unused_of({"prompt": [{**USER, "x": 1}], "completion": [{**ANSWER, "y": 1}]}) == [
        'message key "x"',
        'message key "y"',
    ]


def test_a_system_column_beside_a_system_turn_is_named():
    own = {"role": "system", "content": "s"}
    assert convert({"messages": [own, USER], "system": "s"}) == {"messages": [own, USER]}
    row = {"messages": [own, USER], "system": "other"}
    assert found(row).convert(row, PLACE) == (
        {"messages": [own, USER]},
        ['column "system" beside a system turn'],
    )


# --- Questions ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "topic": "x"}, alpaca(output=None)),
        ({"question": "a", "context": "x"}, alpaca(text="x", output=None)),
        ({"prompt": "a", "topic": "x"}, {"prompt": "a", "completion": None}),
        ({"prompt": [USER], "tools": [TOOL]}, {"messages": [USER], "tools": [TOOL]}),
        ({"query": "a", "response": "b"}, alpaca()),
    ],
)
def test_questions_need_no_answers(row, expected):
    one = format_of(list(row), None, "rows.jsonl", row, questions_only=True)
    made, _ = one.convert(row, PLACE)
    assert made == expected
    assert reason_to_ask_nothing(made) is None
    if "query" not in row:
        with pytest.raises(ValueError, match="has the columns"):
            format_of(list(row), None, "rows.jsonl", row)


# --- Which rows are dropped ---

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
SILENT = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, ANSWER]}, None),
        ({"messages": [USER, {**SILENT, "tool_calls": [CALL]}]}, None),
        ({"messages": [USER, {**SILENT, "reasoning_content": "r"}]}, None),
        ({"messages": [USER, SILENT]}, "without text in an assistant turn"),
        ({"messages": [USER, {**SILENT, "reasoning_content": " "}]}, "without text in an assistant turn"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "without text in an assistant turn"),
        ({"messages": [USER, ANSWER, USER, SILENT]}, "without text in an assistant turn"),
        ({"messages": [USER, {**SILENT, "train": False}, USER, ANSWER]}, None),
        ({"messages": [USER, {**ANSWER, "train": False}]}, "without a turn to train on"),
        ({"messages": [USER, {**SILENT, "train": False}]}, "without a turn to train on"),
        ({"messages": [USER]}, "without text in an assistant turn"),
        ({"messages": []}, "without messages"),
        ({"text": "a"}, None),
        ({"text": " \n"}, "without text"),
        ({"text": None}, "without text"),
        (alpaca(), None),
        (alpaca(output=" "), "without output"),
        (alpaca(None), "without instruction"),
        ({"prompt": "", "completion": "b"}, "without prompt"),
        ({"prompt": "a", "completion": None}, "without completion"),
    ],
)
def test_rows_with_nothing_to_learn_are_dropped_by_reason(row, reason):
    assert reason_to_drop(row) == reason


@pytest.mark.parametrize(
    ("turns", "asked"),
    [
        ([USER, ANSWER], 1),
        ([USER, ANSWER, USER], 3),
        ([USER, {**SILENT, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}], 3),
        ([USER, {**SILENT, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, ANSWER], 3),
        ([USER, {**SILENT, "tool_calls": [CALL]}], 1),
        ([], 0),
    ],
)
def test_the_question_is_what_stands_before_the_last_answer(turns, asked):
    assert turns_asked(turns) == turns[:asked]


def test_a_row_without_a_question_cannot_be_asked():
    for turns in (
        [{"role": "system", "content": "s"}],
        [ANSWER],
        [{"role": "developer", "content": "s"}, ANSWER],
    ):
        assert reason_to_ask_nothing({"messages": turns}) == "without a question"
    assert reason_to_ask_nothing({"messages": []}) == "without messages"
    assert reason_to_ask_nothing({"text": "a"}) == "without a question"
    assert reason_to_ask_nothing(alpaca(" ")) == "without instruction"


# --- Real rows ---


def read_all(path: Any) -> tuple[list[dict[str, Any]], set[str]]:
    """All rows of a file in their one form, and what of them is not used."""
    rows, unused = [], set()
    (source,) = training_sources(DataConfig(path=str(path)))
    for batch, one in read_formatted(source, 7):
        for place, raw in batch.rows():
            row, names = one.convert(raw, place)
            rows.append(row)
            unused.update(names)
    return rows, unused


def test_real_conversations_with_reasoning_and_tools_keep_all_of_it(shared_data):
    """Read once more from the file's text, without anything of ours."""
    path = shared_data / "reasoning_tools_25.jsonl"
    rows, unused = read_all(path)
    raws = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert (len(rows), unused) == (25, set())
    assert [reason_to_drop(row) for row in rows] == [None] * 25
    counts = {"reasoning_content": 0, "tool_calls": 0, "content": 0}
    for row, raw in zip(rows, raws, strict=True):
        assert row["tools"] == raw["tools"]
        assert [turn["role"] for turn in row["messages"]] == [turn["role"] for turn in raw["messages"]]
        for turn, given in zip(row["messages"], raw["messages"], strict=True):
            for key in counts:
                assert turn.get(key) == given.get(key)
                counts[key] += bool(given.get(key))
    assert counts == {"reasoning_content": 64, "tool_calls": 34, "content": 119}


def test_real_sharegpt_conversations_with_tools_keep_all_of_it(shared_data):
    path = shared_data / "glaive_toolcall_300.json"
    rows, unused = read_all(path)
    raws = json.loads(path.read_text(encoding="utf-8"))
    assert (len(rows), unused) == (300, set())
    assert [reason_to_drop(row) for row in rows] == [None] * 300
    num_calls = 0
    for row, raw in zip(rows, raws, strict=True):
        assert [tool["function"] for tool in row.get("tools", [])] == json.loads(raw["tools"])
        said, given = [], []
        for turn in row["messages"]:
            calls = [
                (call["function"]["name"], call["function"]["arguments"])
                for call in turn.get("tool_calls", ())
            ]
            said += [(turn["role"], turn["content"])] if turn["content"] is not None else []
            said += [("call", *call) for call in calls]
        for turn in raw["conversations"]:
            if turn["from"] == "function_call":
                call = json.loads(turn["value"])
                given.append(("call", call["name"], call["arguments"]))
                num_calls += 1
            else:
                roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
                given.append((roles[turn["from"]], turn["value"]))
        assert said == given
    assert num_calls == 211
