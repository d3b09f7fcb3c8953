"""What a message, a tool call and a tool may hold; what is refused is named by row and turn."""

import copy
import json
from typing import Any

import pytest

from finetune.data.conversations import to_conversation, to_messages
from finetune.data.reading.messages import read_messages, read_sharegpt, read_template_kwargs, read_tools

PLACE = "rows.jsonl, row 3"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, "x", None]}}}


def read(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of which everything is used."""
    before = copy.deepcopy(messages)
    read, unused = read_messages(list(messages), PLACE)
    assert unused == []
    assert messages == before
    return read


def unused_of(*messages: dict[str, Any]) -> list[str]:
    return read_messages(list(messages), PLACE)[1]


def refusal(*messages: Any, read: Any = read_messages) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(list(messages), PLACE)
    message = str(caught.value)
    assert message.startswith(PLACE)
    assert "\n" not in message
    return message


def said(content: Any = "Hi", role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


# --- Content and reasoning ---


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function", "critic"])
def test_text_of_every_role_stays_as_it_is(role):
    assert read(said(" a\n", role)) == [said(" a\n", role)]
    assert read({"role": role}) == read(said(None, role)) == [said(None, role)]


@pytest.mark.parametrize(
    ("parts", "text", "reasoning"),
    [
        ([{"type": "text", "text": "a"}], "a", None),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b", None),
        (["a", {"type": "text", "text": "b", "image": None}], "ab", None),
        ([{"type": "reasoning", "reasoning": "r"}, {"type": "text", "text": "a"}], "a", "r"),
        ([{"type": "reasoning", "text": "r"}, {"type": "thinking", "thinking": "s"}], None, "rs"),
        ([], None, None),
    ],
)
def test_parts_become_the_text_and_the_reasoning(parts, text, reasoning):
    expected = said(text) if reasoning is None else said(text, reasoning_content=reasoning)
    assert read(said(parts)) == [expected]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (5, ["content must be text", "5"]),
        ({"type": "text", "text": "a"}, ["content must be text"]),
        ([{"type": "image_url", "image_url": {}}], ["'image_url'", "only text and reasoning"]),
        ([{"type": "text", "text": "a"}, {"type": "audio"}], ["'audio'"]),
        ([{"text": "a"}], ["with a type"]),
        ([5], ["with a type", "5"]),
        ([{"type": "text"}], ["has no text"]),
        ([{"type": "text", "text": 5}], ["has no text"]),
        ([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}], ["behind text"]),
    ],
)
def test_other_contents_are_refused_by_name_with_row_and_turn(content, parts):
    message = refusal(said("a", "user"), said(content))
    assert [part for part in ["messages, turn 2: ", *parts] if part not in message] == []


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_three_names_and_then_one(key):
    assert read(said("a", **{key: "because"})) == [said("a", reasoning_content="because")]
    assert read(said(None, **{key: "because"})) == [said(None, reasoning_content="because")]
    assert read(said("a", **{key: ""})) == read(said("a", **{key: None})) == [said("a")]
    assert f"turn 1: {key} must be text" in refusal(said("a", **{key: 5}))


def test_reasoning_that_is_there_twice_must_be_the_same():
    same = {"reasoning_content": "r", "reasoning": "r", "thinking": None}
    assert read(said("a", **same)) == [said("a", reasoning_content="r")]
    message = refusal(said("a", reasoning="r", thinking="s"))
    assert "turn 1: the reasoning in reasoning and in thinking differs" in message
    parts = [{"type": "reasoning", "text": "s"}, {"type": "text", "text": "a"}]
    assert "in reasoning and in the parts of content differs" in refusal(said(parts, reasoning="r"))


# --- Tool calls ---


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": CALL["function"]},
        CALL["function"],
        {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}},
        {"name": "add", "arguments": ' {"a": 1, "b": [2.5, "x", null]}\n', "type": "function", "id": None},
    ],
)
def test_a_tool_call_in_any_form_has_its_arguments_as_an_object(call):
    assert read(said(None, tool_calls=[call])) == [said(None, tool_calls=[CALL])]
    assert read(said("a", tool_calls=[call, call])) == [said("a", tool_calls=[CALL, CALL])]


@pytest.mark.parametrize("nothing", [None, {}, "{}", "", " "])
def test_a_call_without_arguments_has_none(nothing):
    (message,) = read(said(None, tool_calls=[{"name": "now", "arguments": nothing}]))
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_text_within_arguments_is_not_parsed_once_more():
    arguments = {"code": '{"a": 1}', "n": "5"}
    (message,) = read(said(None, tool_calls=[{"name": "run", "arguments": json.dumps(arguments)}]))
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def test_ids_names_and_the_old_form_of_a_call_are_kept():
    call = {**CALL, "id": "call_1"}
    result = said("3", "tool", tool_call_id="call_1", name="add")
    assert read(said(None, tool_calls=[call]), result) == [said(None, tool_calls=[call]), result]
    old = said(None, function_call={"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])})
    assert read(old) == [said(None, tool_calls=[CALL])]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"tool_calls": CALL}, ["tool_calls must be a list"]),
        ({"tool_calls": ["add"]}, ["tool call 1 must be an object", "'add'"]),
        ({"tool_calls": [CALL, {"arguments": {}}]}, ["tool call 2 must be an object with name"]),
        ({"tool_calls": [{"name": "", "arguments": {}}]}, ["tool call 1 must be"]),
        ({"tool_calls": [{"name": "f", "arguments": "{a: 1}"}]}, ["arguments is no JSON", "{a: 1}"]),
        ({"tool_calls": [{"name": "f", "arguments": '{"a": 1'}]}, ["arguments is no JSON", "at character 8"]),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, ["arguments must be an object", "[1]"]),
        ({"tool_calls": [{"name": "f", "arguments": '"{}"'}]}, ["arguments must be an object", "'{}'"]),
        ({"tool_calls": [{"name": "f", "arguments": 5}]}, ["arguments must be an object", "5"]),
        ({"tool_calls": [{"name": "f", "arguments": "[" * 100_000}]}, ["nested too deep"]),
        ({"tool_calls": [{**CALL, "type": "custom"}]}, ["'custom'"]),
        ({"tool_calls": [{**CALL, "id": 5}]}, ["tool call 1: id must be text"]),
        ({"tool_calls": [CALL], "function_call": CALL["function"]}, ["function_call and tool_calls"]),
        ({"tool_call_id": 5}, ["tool_call_id must be text"]),
        ({"name": ["x"]}, ["name must be text"]),
    ],
)
def test_malformed_calls_are_refused_with_row_and_turn(more, parts):
    message = refusal(said("a", "user"), said(None, **more))
    assert [part for part in ["messages, turn 2", *parts] if part not in message] == []


# --- Which turns are trained on ---


@pytest.mark.parametrize(
    "no", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}]
)
def test_a_turn_can_be_left_out_of_training(no):
    assert read(said("a", **no)) == [said("a", train=False)]


@pytest.mark.parametrize(
    "yes", [{}, {"train": True}, {"train": None, "weight": None}, {"weight": 1}, {"weight": 1.0}]
)
def test_a_turn_is_trained_on_unless_it_says_otherwise(yes):
    assert read(said("a", **yes)) == [said("a")]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"weight": 0.5}, "weight must be 0 or 1, not 0.5"),
        ({"weight": 2}, "weight must be 0 or 1"),
        ({"weight": "1"}, "weight must be 0 or 1"),
        ({"weight": True}, "weight must be 0 or 1"),
        ({"train": "no"}, "train must be true or false"),
        ({"train": 1}, "train must be true or false"),
        ({"train": True, "weight": 0}, "train is true and weight is 0"),
    ],
)
def test_other_weights_are_refused(more, part):
    assert f"turn 1: {part}" in refusal(said("a", **more))


# --- What is not used ---


def test_keys_that_are_not_used_are_named_unless_they_are_null():
    assert unused_of(said("a", logprobs=[1], score=0, refusal=None, ok=False)) == [
        'message key "logprobs"',
        'message key "score"',
        'message key "ok"',
    ]
    call = {**CALL, "index": 0, "function": {**CALL["function"], "strict": True, "parsed": None}}
    assert unused_of(said(None, tool_calls=[call])) == ['tool call key "index"', 'tool call key "strict"']
    assert unused_of(said([{"type": "text", "text": "a", "cache_control": {}}])) == [
        'part key "cache_control"'
    ]


def test_what_only_an_assistant_can_have_is_not_used_of_others():
    more = {"tool_calls": [CALL], "reasoning": "r", "train": True}
    assert unused_of(said("a", "user", **more)) == [f'message key "{key}"' for key in more]
    assert unused_of(said("a", "user", tool_calls=[], reasoning="", train=False, weight=0)) == []
    thoughts = [{"type": "reasoning", "text": "r"}, {"type": "text", "text": "a"}]
    assert read_messages([said(thoughts, "user")], PLACE) == (
        [said("a", "user")],
        ["reasoning of a turn of user"],
    )


# --- ShareGPT ---


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": who, "value": what} for who, what in pairs]


@pytest.mark.parametrize(
    ("who", "role"),
    [
        *[(who, "user") for who in ("human", "user")],
        *[(who, "assistant") for who in ("gpt", "assistant", "model")],
        *[(who, "tool") for who in ("observation", "tool", "tool_response")],
        ("system", "system"),
        ("developer", "developer"),
    ],
)
def test_who_speaks_in_sharegpt(who, role):
    assert read_sharegpt(turns((who, "a")), PLACE) == ([said("a", role)], [])


ADD = json.dumps(CALL["function"])


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (
            [("human", "1"), ("function_call", ADD), ("observation", "2"), ("gpt", "3")],
            [said("1", "user"), said(None, tool_calls=[CALL]), said("2", "tool"), said("3")],
        ),
        (  # it speaks, then calls
            [("human", "1"), ("gpt", "Wait."), ("function_call", ADD), ("observation", "2"), ("gpt", "3")],
            [said("1", "user"), said("Wait.", tool_calls=[CALL]), said("2", "tool"), said("3")],
        ),
        (  # two calls at once, in either spelling
            [("human", "1"), ("function_call", ADD), ("function_call", ADD), ("observation", "2")],
            [said("1", "user"), said(None, tool_calls=[CALL, CALL]), said("2", "tool")],
        ),
        (
            [("human", "1"), ("function_call", f"[{ADD}, {ADD}]")],
            [said("1", "user"), said(None, tool_calls=[CALL, CALL])],
        ),
        (  # what it says right after a call does not belong to it
            [("human", "1"), ("function_call", ADD), ("gpt", "Done.")],
            [said("1", "user"), said(None, tool_calls=[CALL]), said("Done.")],
        ),
        (
            [("system", "s"), ("human", "1"), ("tool_call", ADD)],
            [said("s", "system"), said("1", "user"), said(None, tool_calls=[CALL])],
        ),
    ],
)
def test_function_calls_become_tool_calls(conversation, expected):
    assert read_sharegpt(turns(*conversation), PLACE) == (expected, [])


def test_a_call_that_is_no_target_does_not_join_a_turn_that_is():
    conversation = [
        *turns(("human", "1"), ("gpt", "Wait.")),
        {"from": "function_call", "value": ADD, "train": False},
    ]
    assert read_sharegpt(conversation, PLACE)[0][1:] == [
        said("Wait."),
        said(None, tool_calls=[CALL], train=False),
    ]


def test_conversations_may_be_of_roles_and_contents():
    assert read_sharegpt([said("a", "user"), said("b")], PLACE) == ([said("a", "user"), said("b")], [])


def test_other_keys_of_a_sharegpt_turn_are_named():
    assert read_sharegpt([{"from": "gpt", "value": "a", "weight": 0, "markdown": {}}], PLACE) == (
        [said("a", train=False)],
        ['message key "markdown"'],
    )


@pytest.mark.parametrize(
    ("turn", "parts"),
    [
        ({"from": "narrator", "value": "a"}, ["turn 1: from must be one of human, user, gpt", "'narrator'"]),
        ({"from": 1, "value": "a"}, ["conversations must be a list of objects with from and value"]),
        ({"value": "a"}, ["conversations must be a list of objects with from and value"]),
        ("text", ["conversations must be a list of objects with from and value"]),
        ({"from": "gpt", "value": 5}, ["turn 1: content must be text"]),
        (
            {"from": "function_call", "value": "add(1, 2)"},
            ["turn 1: a function_call is no JSON", "add(1, 2)"],
        ),
        ({"from": "function_call", "value": "[]"}, ["turn 1: a function_call must be an object"]),
        ({"from": "function_call", "value": "5"}, ["turn 1: a function_call must be an object"]),
        ({"from": "function_call", "value": None}, ["turn 1: a function_call must be an object"]),
        ({"from": "function_call", "value": '{"name": "f", "arguments": "x"}'}, ["arguments is no JSON"]),
    ],
)
def test_malformed_sharegpt_is_refused_with_row_and_turn(turn, parts):
    message = refusal(turn, read=read_sharegpt)
    assert [part for part in parts if part not in message] == []


# --- Tools and arguments of the template ---

FUNCTION = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "cell",
    [
        [TOOL],
        [FUNCTION],
        [{"type": "function", **FUNCTION}],
        [{"function": FUNCTION}],
        json.dumps([TOOL]),
        json.dumps([FUNCTION]),
        [json.dumps(FUNCTION)],
    ],
)
def test_tools_in_any_form_are_openais(cell):
    assert read_tools(cell, PLACE) == [TOOL]


@pytest.mark.parametrize("nothing", [None, [], "[]", "", " ", "null"])
def test_no_tools_are_none(nothing):
    assert read_tools(nothing, PLACE) == []


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("add", ["tools is no JSON", "'add'"]),
        ({"name": "add"}, ["tools must be a list"]),
        (json.dumps(TOOL), ["tools must be a list"]),
        ([5], ["tool 1 must be a function", "5"]),
        ([TOOL, {"description": "x"}], ["tool 2 must be an object with a name"]),
        ([{"type": "function", "function": "add"}], ["tool 1 must be an object with a name"]),
        ([{"type": "retrieval", "function": FUNCTION}], ["tool 1 must be a function"]),
        (["add"], ["tool 1 is no JSON"]),
    ],
)
def test_other_tools_are_refused(cell, parts):
    with pytest.raises(ValueError, match=PLACE) as caught:
        read_tools(cell, PLACE)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_arguments_of_the_template_are_an_object_or_its_text():
    for cell in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert read_template_kwargs(cell, PLACE, "kwargs") == {"enable_thinking": False}
    assert read_template_kwargs(None, PLACE, "kwargs") == read_template_kwargs("", PLACE, "kwargs") == {}
    for cell, part in (("x", "is no JSON"), ([1], "must be an object"), ({"tools": []}, "sets tools")):
        with pytest.raises(ValueError, match=f"{PLACE}: kwargs {part}"):
            read_template_kwargs(cell, PLACE, "kwargs")


# --- Conversations ---


def test_a_conversation_has_all_that_the_row_has():
    messages = [said("a", "user"), said(None, reasoning_content="r", tool_calls=[CALL]), said(None, "tool")]
    row = {"messages": messages, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}
    conversation = to_conversation(row, None)
    assert conversation.messages == [*messages[:2], said("", "tool")]
    assert conversation.tools == [TOOL]
    assert conversation.template_kwargs == {"enable_thinking": True}
    assert conversation.text is None
    plain = to_conversation({"messages": messages[:1]}, None)
    assert (plain.tools, plain.template_kwargs) == (None, {})


def test_the_system_text_of_a_row_goes_before_the_system_prompt_and_neither_before_a_system_turn():
    system, user = said("s", "system"), said("a", "user")
    assert to_messages({"messages": [user], "system": "s"}, "p") == [system, user]
    assert to_messages({"messages": [user]}, "p") == [said("p", "system"), user]
    for own in (system, said("d", "developer")):
        assert to_messages({"messages": [own, user]}, "p") == [own, user]
    alpaca = {"instruction": "a", "input": None, "output": "b", "system": "s"}
    assert to_messages(alpaca, "p") == [system, user, said("b")]


def test_the_history_of_an_alpaca_row_goes_before_its_instruction():
    row = {"instruction": "c", "input": "x", "output": "d", "history": [["a", "b"], ["e", "f"]]}
    assert to_messages(row, "s") == [
        said("s", "system"),
        *[said(text, role) for text, role in zip("abef", ["user", "assistant"] * 2, strict=True)],
        said("c\n Context:x", "user"),
        said("d"),
    ]


def test_a_text_to_continue_is_no_messages():
    conversation = to_conversation({"text": " Once"}, "s")
    assert (conversation.text, conversation.messages) == (" Once", [])
