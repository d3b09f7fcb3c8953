"""Calls are found in every form in which the templates write them; what only looks like a call stays text."""

from itertools import pairwise

import pytest
from conftest import tiny_tokenizer
from tools import tool_rows

from finetune.data.conversations import Conversation
from finetune.data.templates.answer_parts import Parts, length_before_calls, split_calls
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
        assert parts.calls == calls
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
