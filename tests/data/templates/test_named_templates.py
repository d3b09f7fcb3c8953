"""A chat template by name or file: what it writes, what of it is trained on, and the tokens that it needs."""

import json
from typing import Any

import pytest
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from tools import tool_rows
from transformers import AutoTokenizer

from finetune.data.conversations import Conversation
from finetune.data.templates.chat_template import render
from finetune.data.templates.named_templates import (
    NAMES,
    added_token_ids,
    describe_template,
    end_of_turn,
    use_template,
)
from finetune.data.templates.tokenize import IGNORE, encode

ADDED = {
    "chatml": [],  # the tiny tokenizer has them
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": [],
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "<|im_end|>"}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Two\n\nlines \n"},
    {"role": "assistant", "content": "One.\n\nTwo."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No more."},
]


def with_template(setting: str, tokenizer: Any = None) -> Any:
    tokenizer = tokenizer or tiny_tokenizer(None)
    use_template(tokenizer, setting)
    return tokenizer


def targets(tokenizer: Any, conversation: Conversation) -> list[str]:
    """The texts that are trained on, each without its end of turn."""
    tokens = encode(tokenizer, conversation, "completion")
    runs: list[list[int]] = [[]]
    for label in tokens.labels:
        if label == IGNORE and runs[-1]:
            runs.append([])
        elif label != IGNORE:
            runs[-1].append(label)
    texts = [tokenizer.decode(run) for run in runs if run]
    assert all(text.endswith(tokenizer.eos_token) for text in texts)
    return [text.removesuffix(tokenizer.eos_token) for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_trained_to_its_end_of_turn_and_the_tokens_it_lacks_are_added(name, tmp_path):
    tokenizer = with_template(name)
    before = len(tiny_tokenizer(None))
    assert tokenizer.convert_ids_to_tokens(list(added_token_ids(tokenizer))) == ADDED[name]
    assert list(added_token_ids(tokenizer)) == list(range(before, before + len(ADDED[name])))
    assert tokenizer.eos_token == tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == ENDS[name]
    assert tokenizer.pad_token == "<|im_end|>"
    space = " " if name == "mistral" else ""
    assert targets(tokenizer, Conversation(TURNS)) == [f"{space}One.\n\nTwo.", f"{space}No more."]
    text = render(tokenizer, Conversation(TURNS))
    assert text.count("Be kind.") == text.count(" Two\n\nlines \n") == text.count("And?") == 1

    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert render(saved, Conversation(TURNS)) == text
    assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert saved.eos_token == tokenizer.eos_token


def as_chatml(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{dumped({'name': call['name'], 'arguments': call['arguments']})}\n</tool_call>"


def as_llama3(call: dict[str, Any]) -> str:
    return dumped({"name": call["name"], "parameters": call["arguments"]})


def as_mistral(call: dict[str, Any]) -> str:
    return dumped({"name": call["name"], "arguments": call["arguments"], "id": "call00001"})


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


WRITTEN = {
    "chatml": ("<think>\n{}\n</think>\n\n", as_chatml, "\n", "{}"),
    "llama3": ("", as_llama3, "; ", "{}"),
    "mistral": ("[THINK]{}[/THINK]", as_mistral, ", ", "[TOOL_CALLS] [{}]"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_calls_are_written_as_in_their_family_and_trained_on_whole(name):
    thinking, form, between, around = WRITTEN[name]
    tokenizer = with_template(name)
    for row in tool_rows():
        conversation = Conversation(row["messages"], row["tools"])
        turn = row["messages"][1]
        calls = between.join(form(call["function"]) for call in turn["tool_calls"])
        thought = thinking.format(turn["reasoning_content"]) if "reasoning_content" in turn else ""
        answer = (" " if name == "mistral" else "") + row["messages"][-1]["content"]
        assert targets(tokenizer, conversation) == [thought + around.format(calls), answer]
        text = render(tokenizer, conversation)
        schema = row["tools"][0]["function"]
        assert all(dumped(said) in text for said in (schema["name"], *schema["parameters"]["required"]))
        assert all(message["content"] in text for message in row["messages"][2:])


def test_arguments_may_be_json_text_and_the_system_prompt_stands_beside_the_tools():
    row = tool_rows()[0]
    as_text = json.loads(json.dumps(row))
    call = as_text["messages"][1]["tool_calls"][0]["function"]
    call["arguments"] = json.dumps(call["arguments"])
    system = {"role": "system", "content": "Be kind."}
    for name in WRITTEN:
        tokenizer = with_template(name)
        one, other = (
            render(tokenizer, Conversation([system, *it["messages"]], it["tools"])) for it in (row, as_text)
        )
        assert one == other
        assert one.count("Be kind.") == 1


def test_gemma_refuses_what_it_has_no_form_for():
    row, tokenizer = tool_rows()[0], with_template("gemma")
    with pytest.raises(ValueError, match="the gemma template has no form for tools"):
        render(tokenizer, Conversation(row["messages"][:1], row["tools"]))
    with pytest.raises(ValueError, match="no form for tool calls"):
        render(tokenizer, Conversation(row["messages"]))


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_prompt_that_no_question_follows_is_refused_and_not_written_into_an_answer(name):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hello."}]
    with pytest.raises(ValueError, match="writes a system prompt into the user turn after it"):
        encode(with_template(name), messages, "completion")


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_an_empty_system_prompt_leaves_the_user_turn_as_it_is(name):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A coin."}]
    tokenizer = with_template(name)
    assert render(tokenizer, [{"role": "system", "content": ""}, *turns]) == render(tokenizer, turns)


def test_a_file_is_a_template_whose_own_tokens_are_added(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}<br>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = with_template(str(file))
    added = ["<|user|>", "<|end|>", "<|assistant|>", "<|system|>", "<|tool|>"]
    assert set(tokenizer.convert_ids_to_tokens(list(added_token_ids(tokenizer)))) == set(added)
    assert describe_template(str(file), tokenizer).startswith(f"{file} (5 tokens added: <|user|> ")
    assert tokenizer.eos_token == "<|end|>"
    assert targets(tokenizer, Conversation(TURNS)) == ["One.\n\nTwo.", "No more."]
    again = tiny_tokenizer(None)
    use_template(again, str(file))
    assert again.get_vocab() == tokenizer.get_vocab()  # a resumed run has the same rows


def test_a_template_that_writes_eos_by_name_keeps_it(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role ~ m.content ~ '<|end|>' ~ eos_token }}{% endfor %}")
    tokenizer = with_template(str(file))
    assert tokenizer.eos_token == "<|im_end|>"
    assert render(tokenizer, Conversation(TURNS[1:3])).endswith("Two.<|end|><|im_end|>")


def test_chatml_begins_with_bos_where_the_tokenizer_begins_texts_with_it():
    tokenizer = tiny_tokenizer(None)
    tokenizer.bos_token = "<|endoftext|>"
    assert render(with_template("chatml", tokenizer), Conversation(TURNS)).startswith("<|im_start|>system")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    text = render(with_template("chatml", tokenizer), Conversation(TURNS))
    assert text.startswith("<|endoftext|><|im_start|>system")


def refusal(setting: str) -> str:
    with pytest.raises(ValueError, match=r"data\.chat_template") as error:
        use_template(tiny_tokenizer(), setting)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_template_is_named(tmp_path):
    assert refusal("chatlm").endswith(
        "chatlm is neither a file nor one of chatml, llama3, gemma, mistral; did you mean chatml?"
    )
    assert refusal(str(tmp_path)).endswith("is neither a file nor one of chatml, llama3, gemma, mistral")
    for text, words in (
        ("\n", "is an empty file"),
        ("# A page\nof text", "is no chat template: it does not write what the turns of a conversation say"),
        ("{% for m in messages %}{{ m.content }}", "the chat template is wrong in its line 1"),
        ("{{ messages[0]['text'] ~ nothing.more }}", "the chat template refuses the turns user, assistant"),
    ):
        file = tmp_path / "template.jinja"
        file.write_text(text)
        assert words in refusal(str(file))
    file.write_bytes(b"\xff\xfe{{")
    assert "cannot be read as text" in refusal(str(file))


def test_the_models_own_template_has_an_end_of_turn_too():
    tokenizer = tiny_tokenizer(QWEN2_TEMPLATE)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(tiny_tokenizer(None)) is None
    assert end_of_turn(tiny_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")) is None
    assert (describe_template(None, tokenizer), describe_template(None, tiny_tokenizer(None))) == (
        "the model's own",
        "none",
    )
