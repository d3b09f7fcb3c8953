"""Any conversation under any template gets a right mask, or one clear line."""

import random
from typing import Any

import pytest
from small_templates import SMALL_TEMPLATES, SmallTemplate, byte_tokenizer

from finetune.data.chat_template import template_of
from finetune.data.conversations import Conversation
from finetune.data.tokenize import IGNORE, Tokens, encode

CONVERSATIONS_EACH = 50  # of 20 templates: 1,000

TEXTS = [
    "It is a coin.",
    "What?",
    "4",
    "",
    " \n",
    "\n\nTwo lines,\n\n1. and 2.\n",
    "“Ça” 💶 e\u0301 👩‍👩‍👧",
    '{"sun": true}',
    "<|im_end|>\n<|im_start|>assistant\nIt is a coin.<|im_end|>\n",
    "<|user|> [INST] </s> <end> <|eot_id|>",
    "<|start|>assistant<|channel|>final",
    "placeholder",
    "a < b, 'c' \\ \"d\"",
]
THOUGHTS = [*TEXTS, "Two and two.\nFour.", "It is a coin. Or not?"]
WITH_THOUGHT = ["<think>\nTwo and two.\n</think>\n\nFour.", "so</think>Four.", "Use <think> and </think> so."]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    for name in ("find_coin", "weigh")
]


def random_call(rng: random.Random, name: str, number: int) -> dict[str, Any]:
    values = ["Zürich", 'a "b"', 3, 2.5, True, None, ["x", {"y": "<|im_end|>"}], "two\nlines", {}]
    arguments = {key: rng.choice(values) for key in rng.sample(["city", "day", "wie"], rng.randint(0, 3))}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def random_answer(rng: random.Random) -> list[dict[str, Any]]:
    """An assistant's turn, and what tools say to it."""
    turn: dict[str, Any] = {"role": "assistant", "content": rng.choice(TEXTS + WITH_THOUGHT)}
    if rng.random() < 0.4:
        turn["reasoning_content"] = rng.choice(THOUGHTS)
    if rng.random() < 0.15:
        turn["train"] = False
    if rng.random() > 0.35:
        return [turn]
    names = rng.sample(["find_coin", "weigh"], rng.choice([1, 1, 2]))
    turn["tool_calls"] = [random_call(rng, name, number) for number, name in enumerate(names)]
    turn["content"] = rng.choice([None, None, "", "I shall look."])
    said = [
        {"role": "tool", "name": name, "tool_call_id": f"call0000{number}", "content": rng.choice(TEXTS)}
        for number, name in enumerate(names)
    ]
    return [turn, *said] if rng.random() < 0.8 else [turn]


def random_conversation(rng: random.Random) -> Conversation:
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        messages.append({"role": rng.choice(["system", "system", "developer"]), "content": rng.choice(TEXTS)})
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.9:
            messages.append({"role": "user", "content": rng.choice(TEXTS)})
        for _ in range(rng.choice([1, 1, 1, 2])):
            messages += random_answer(rng)
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": rng.choice(TEXTS)})
    return Conversation(messages, TOOLS if rng.random() < 0.4 else None)


def written_in(tokenizer: Any, tokens: Tokens) -> list[tuple[str, str]]:
    """Each run of targets as text, with the text that its first token sees before it."""
    pairs = list(zip(tokens.input_ids, tokens.labels, strict=True))
    ends = [start for start, _ in tokens.branches] + [len(pairs)]
    trunk = pairs[: ends[0]]
    paths = [trunk]
    for (start, attach), end in zip(tokens.branches, ends[1:], strict=True):
        assert attach <= len(trunk)
        paths.append([(token, IGNORE) for token, _ in trunk[:attach]] + pairs[start:end])
    written = []
    for path in paths:
        first = 0
        for t, (_, label) in enumerate(path):
            if label != IGNORE and (t == 0 or path[t - 1][1] == IGNORE):
                first = t
            if label != IGNORE and (t + 1 == len(path) or path[t + 1][1] == IGNORE):
                ids = [token for token, _ in path]
                written.append((tokenizer.decode(ids[:first]), tokenizer.decode(ids[first : t + 1])))
    return written


def expected(
    tokenizer: Any, template: SmallTemplate, conversation: Conversation
) -> list[tuple[str, str]] | None:
    """What the model writes and what it sees before it, for each trained turn; None where that cannot be.

    What it sees is asked of transformers itself.
    """
    pairs = []
    prepared = template_of(tokenizer, conversation.tools).prepare(conversation.messages)
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        written = template.written(message, conversation.messages[:i])
        try:
            tokenizer.apply_chat_template(prepared[: i + 1], tools=conversation.tools, tokenize=False)
            prompt = prompt_of(tokenizer, prepared[:i], conversation)
        except Exception:
            return None
        if written is None:
            return None
        pairs.append((prompt.removesuffix(template.unprompted), written))
    return pairs


def prompt_of(tokenizer: Any, prepared: list[dict[str, Any]], conversation: Conversation) -> str:
    if prepared:
        return tokenizer.apply_chat_template(
            prepared, tools=conversation.tools, tokenize=False, add_generation_prompt=True
        )
    # It refuses to render nothing; what all templates here write before a conversation is at most the BOS.
    one = [{"role": "user", "content": "?"}]
    asked = tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
    begun = tokenizer.apply_chat_template(one, tokenize=False)
    return asked[: len(asked) - len(asked.removeprefix(begun))] and asked


@pytest.mark.parametrize("name", SMALL_TEMPLATES)
def test_any_conversation_gets_a_right_mask_or_a_clear_line(name):
    template = SMALL_TEMPLATES[name]
    tokenizer = byte_tokenizer(template)
    rng = random.Random(name)
    outcomes = []
    for _ in range(CONVERSATIONS_EACH):
        conversation = random_conversation(rng)
        pairs = expected(tokenizer, template, conversation)
        try:
            tokens = encode(tokenizer, conversation, "completion")
        except ValueError as error:
            assert "\n" not in str(error)
            may_change = any("</think>" in (m.get("content") or "") for m in conversation.messages)
            assert pairs is None or may_change, f"{error}\n{conversation}"
            outcomes.append(False)
            continue
        assert pairs is not None, conversation
        assert sorted(written_in(tokenizer, tokens)) == sorted(pairs), conversation
        outcomes.append(True)
    assert any(outcomes) == (name != "no end")
