"""Tool calls are read back from what each chat template writes of them, and compared by what they say."""

import pytest
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from small_templates import SMALL_TEMPLATES, byte_tokenizer

from finetune.data.templates.tool_calls import call_format, num_right_calls

USER = {"role": "user", "content": "What is the weather?"}
WEATHER = ("weather", '{"city": "Z\\u00fcrich", "unit": "kelvin"}')
TIDES = ("get-tides.v2", '{"harbour": "Ystad {south}"}')


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
    assert found.read(nested)[0] == ("a", '{"b": {"arguments": {}, "name": "c"}}')
    assert found.read('{"name": "a", "arguments": {"b": 1') == []


@pytest.mark.parametrize("template", [QWEN2_TEMPLATE, SMALL_TEMPLATES["gemma"].source])
def test_a_template_without_calls_has_no_form_of_them(template):
    assert call_format(tiny_tokenizer(template), None) is None


A, B, C = (("f", f'{{"x": {number}}}') for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("made", "expected", "right"),
    [
        ([A], [A], 1),
        ([B], [A], 0),
        ([("g", A[1])], [A], 0),
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
