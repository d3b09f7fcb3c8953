"""What a template is given: the messages as it reads them, found out by asking it."""

import json
from typing import Any

import pytest
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from small_templates import SMALL_TEMPLATES, byte_tokenizer

from finetune.data.conversations import Conversation
from finetune.data.templates.chat_template import render, set_stop_ids, stop_ids, template_of
from finetune.data.templates.targets import up_to
from finetune.data.templates.tokenize import IGNORE, encode

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def calling(arguments: Any, content: str | None = None) -> Conversation:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
    ]
    return Conversation(turns, [WEATHER])


def trained(tokenizer, conversation) -> str:
    labels = encode(tokenizer, conversation, "completion").labels
    return tokenizer.decode([label for label in labels if label != IGNORE])


@pytest.mark.parametrize("arguments", [{"city": "Zürich"}, '{"city": "Zürich"}'], ids=["object", "text"])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>',
        ),
        ("deepseek", '<call>function<sep>weather\n```json\n{"city": "Zürich"}\n```</call><end>'),
        ("reasoning", "\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n</function><|im_end|>"),
        ("concatenating", '<call>{"name": "weather", "arguments": {"city": "Zürich"}}</call><|im_end|>'),
    ],
)
def test_arguments_are_given_as_the_template_reads_them_and_never_encoded_twice(name, written, arguments):
    assert trained(byte_tokenizer(SMALL_TEMPLATES[name]), calling(arguments)) == written


def test_arguments_that_are_no_json_are_refused_where_the_template_wants_an_object():
    with pytest.raises(ValueError, match=r"arguments of the tool call 'weather' are no JSON: \{city: Zürich"):
        render(byte_tokenizer(SMALL_TEMPLATES["concatenating"]), calling("{city: Zürich"))


def test_a_call_whose_arguments_the_template_changes_is_refused():
    template = SMALL_TEMPLATES["concatenating"]
    tokenizer = byte_tokenizer(
        template._replace(source=template.source.replace("| tojson", "| tojson | upper"))
    )
    with pytest.raises(ValueError, match=r"leaves out the tool call 'weather' of turn 2"):
        trained(tokenizer, calling({"city": "Zürich"}))
    tokenizer.chat_template = template.source.replace("c.function | tojson", "c.function.name")
    with pytest.raises(
        ValueError, match=r"arguments of the tool call 'weather' of turn 2 .*'city' is missing"
    ):
        trained(tokenizer, calling({"city": "Zürich"}))


def test_tools_that_are_not_written_are_remarked_on_though_a_call_names_them():
    template = SMALL_TEMPLATES["concatenating"]
    assert "weather" not in render(byte_tokenizer(template), up_to(calling({"city": "Zürich"}), 1))
    assert encode(byte_tokenizer(template), calling({"city": "Zürich"}), "completion").remarks == (
        "tools are not written",
    )
    hermes = byte_tokenizer(SMALL_TEMPLATES["hermes"])
    assert "weather" in render(hermes, up_to(calling({"city": "Zürich"}), 1))
    assert encode(hermes, calling({"city": "Zürich"}), "completion").remarks == ()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_reasoning_is_given_under_the_name_that_the_template_reads(name):
    source = QWEN2_TEMPLATE.replace(
        "~ turn.content", f"~ '<think>' ~ (turn.{name} or '') ~ '</think>' ~ turn.content"
    )
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."},
    ]
    assert trained(tiny_tokenizer(source), turns) == "<think>Two and two.</think>Four.<|im_end|>"


def test_what_the_template_does_not_write_is_remarked_on():
    tokenizer = tiny_tokenizer()
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."},
    ]
    tokens = encode(tokenizer, Conversation(turns, [WEATHER]), "completion")
    assert tokens.remarks == ("reasoning_content is not written", "tools are not written")
    shouting = tiny_tokenizer(
        QWEN2_TEMPLATE.replace("turn.content", "(turn.content if turn.role == 'assistant' else 'x')")
    )
    assert encode(
        shouting, [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "completion"
    ).remarks == ("the text of a user turn is not written as it is",)
    assert (
        encode(tokenizer, [*turns[:1], {"role": "assistant", "content": "Four."}], "completion").remarks == ()
    )


def test_what_the_template_adds_is_remarked_on():
    source = QWEN2_TEMPLATE.replace(
        "~ turn.content", "~ ('<think></think>' if turn.role == 'assistant' else '') ~ turn.content"
    )
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Four."}]
    tokens = encode(tiny_tokenizer(source), turns, "completion")
    assert tokens.remarks == ("'<think></think>' is added before an answer",)


def test_a_rows_own_arguments_reach_the_template():
    source = QWEN2_TEMPLATE.replace("turn.content", "turn.content ~ (mood | default(''))")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Four."}]
    tokenizer = tiny_tokenizer(source)
    assert render(tokenizer, Conversation(turns, None, {"mood": " :)"})).count(":)") == 2
    assert ":)" not in render(tokenizer, turns)
    with pytest.raises(ValueError, match="chat_template_kwargs may not hold messages"):
        render(tokenizer, Conversation(turns, None, {"messages": []}))


def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_any():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": QWEN2_TEMPLATE, "tool_use": "{{ tools | length }} tools"}
    turns = [{"role": "user", "content": "?"}]
    assert render(tokenizer, Conversation(turns, [WEATHER])) == "1 tools"
    assert "tools" not in render(tokenizer, turns)
    assert template_of(tokenizer) is template_of(tokenizer, [])


def test_a_template_that_wants_parts_gets_parts_and_others_get_text():
    assert template_of(byte_tokenizer(SMALL_TEMPLATES["parts"])).habits.parts >= {
        "user",
        "assistant",
        "system",
    }
    for name in set(SMALL_TEMPLATES) - {"parts"}:
        assert not template_of(byte_tokenizer(SMALL_TEMPLATES[name])).habits.parts, name


def test_generation_stops_at_the_eos_and_at_what_was_set():
    tokenizer = byte_tokenizer(SMALL_TEMPLATES["llama3"])
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id}
    set_stop_ids(tokenizer, [eot])
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id, eot}
    set_stop_ids(tokenizer, [])
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id}


def test_a_message_is_left_as_it_is():
    conversation = calling({"city": "Zürich"})
    before = json.dumps(conversation.messages)
    encode(byte_tokenizer(SMALL_TEMPLATES["deepseek"]), conversation, "completion")
    assert json.dumps(conversation.messages) == before
