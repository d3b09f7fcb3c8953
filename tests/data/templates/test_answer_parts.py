"""Calls are found in every form in which the templates write them, and compared by what they say; what only
looks like a call stays text."""

from itertools import pairwise

import pytest
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from small_templates import SMALL_TEMPLATES, byte_tokenizer
from tools import tool_rows

from finetune.data.conversations import Conversation
from finetune.data.templates.answer_parts import (
    Call,
    Parts,
    call_format,
    length_before_calls,
    num_right_calls,
    split_calls,
)
from finetune.data.templates.named_templates import use_template
from finetune.model.generate import reference_answer


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral"])
def test_the_calls_that_a_template_writes_are_found(template):
    tokenizer = tiny_tokenizer(None)
    use_template(tokenizer, template)
    for row in tool_rows():
        turn = {**row["messages"][1], "content": "Let me see."}
        if template == "llama3":
            turn.pop("reasoning_content", None)
        text = reference_answer(tokenizer, Conversation([row["messages"][0], turn], row["tools"])).text
        calls = [call["function"] for call in turn["tool_calls"]]
        parts = split_calls(text, {calls[0]["name"]})
        assert [call._asdict() for call in parts.calls] == calls
        assert parts.content.endswith("Let me see.")
        assert length_before_calls(text) < text.rindex(calls[0]["name"])
        assert split_calls(text, {"another"}) == Parts(text, [])


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No call.",
        '{"weather": "fine"}',
        '{"name": "weather", "arguments": "Paris"}',
        CALL[:-20],  # cut within its object
        f"{CALL}\nAnd more.",
        "[" * 5000,
        '{"name": ' * 5000,
    ],
)
def test_what_only_looks_like_a_call_stays_text(text):
    assert split_calls(text, {"weather"}) == Parts(text, [])


def test_of_a_text_that_is_still_written_only_what_cannot_be_a_call_is_known():
    text = f"Let me see. 1 < 2\n{CALL}"
    known = [text[: length_before_calls(text[:end])] for end in range(len(text) + 1)]
    assert all(after.startswith(before) for before, after in pairwise(known))
    assert known[-1] == "Let me see. 1 < 2\n"
    assert known[14] == "Let me see. 1 "
    assert known[15] == "Let me see. 1 "  # the < may begin a call
    assert known[17] == "Let me see. 1 < 2"


# The calls of any template

USER = {"role": "user", "content": "What is the weather?"}
WEATHER = Call("weather", {"city": "Zürich", "unit": "kelvin"})
TIDES = Call("get-tides.v2", {"harbour": "Ystad {south}"})


def calling(*calls: tuple[str, dict]) -> dict:
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    made = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": None, "tool_calls": made}


ONE = calling(("weather", {"city": "Zürich", "unit": "kelvin"}))
TWO = calling(
    ("weather", {"unit": "kelvin", "city": "Zürich"}), ("get-tides.v2", {"harbour": "Ystad {south}"})
)
WRITERS = [
    name for name, template in SMALL_TEMPLATES.items() if "tool_calls" in template.source and name != "tagged"
]


@pytest.mark.parametrize("name", WRITERS)
def test_the_calls_that_a_template_writes_are_read_back(name):
    template = SMALL_TEMPLATES[name]
    found = call_format(byte_tokenizer(template), None)
    assert found is not None
    assert found.read(template.written(ONE, [USER]) or "") == [WEATHER]
    one_at_a_time = name in ("llama3", "llama3 with stops", "gptoss")
    if not one_at_a_time:
        text = template.written(TWO, [USER]) or ""
        assert found.read(text) == [WEATHER, TIDES]
        assert found.read(f"I will look: {text}") == [WEATHER, TIDES]
        assert found.read(text[: len(text) // 2]) in ([], [WEATHER])  # cut by the limit of tokens
    assert found.read("I cannot know the weather, {city}.") == []


def test_a_call_is_read_whatever_its_white_space():
    found = call_format(byte_tokenizer(SMALL_TEMPLATES["hermes"]), None)
    assert found is not None
    written = '<tool_call>{"name":"weather","arguments":{"unit":"kelvin",\n"city":"Zürich"}}</tool_call>'
    assert found.read(written.replace('","', '", "')) == [WEATHER]
    nested = '{"name": "a", "arguments": {"b": {"name": "c", "arguments": {}}}}'
    assert found.read(nested)[0] == Call("a", {"b": {"name": "c", "arguments": {}}})
    assert found.read('{"name": "a", "arguments": {"b": 1') == []


@pytest.mark.parametrize("template", [QWEN2_TEMPLATE, SMALL_TEMPLATES["gemma"].source])
def test_a_template_without_calls_has_no_form_of_them(template):
    assert call_format(tiny_tokenizer(template), None) is None


A, B, C = (Call("f", {"x": number, "y": None}) for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("made", "expected", "right"),
    [
        ([A], [A], 1),
        ([B], [A], 0),
        ([A._replace(name="g")], [A], 0),
        ([A._replace(arguments={"y": None, "x": 1})], [A], 1),  # its arguments in any order
        ([A._replace(arguments={"y": None, "x": True})], [A], 0),
        ([], [A, B], 0),
        ([B, A], [A, B], 2),  # in any order
        ([A], [A, B], 1),
        ([A, C], [A], 0.5),  # one too many
        ([A, A, A, A], [A, B], 0.5),  # said again and again
        ([A, A], [A, A], 2),
    ],
)
def test_calls_that_lack_or_are_too_many_count_as_wrong(made, expected, right):
    assert num_right_calls(made, expected) == right
