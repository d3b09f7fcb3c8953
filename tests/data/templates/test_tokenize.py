"""The mask is exactly the answers and what ends them, for every kind of chat template and any text."""

from itertools import pairwise

import pytest
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.data.conversations import to_messages
from finetune.data.templates.chat_template import render
from finetune.data.templates.tokenize import IGNORE, encode

QWEN2_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

# As HF asks templates to mark what the assistant says.
GENERATION_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TURN = (
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' ~ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The end of a turn is a special token other than the EOS; texts are trimmed.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# Roles are plain text, a space stands before the answer, and the EOS directly after it.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TRIMMING_TEMPLATE = QWEN2_TEMPLATE.replace("turn.content", "turn.content | trim")
# The generation prompt opens a thought, which no finished turn has.
THINKING_PROMPT_TEMPLATE = QWEN2_TEMPLATE.replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)
# The last answer stands behind an empty thought, the ones before it do not.
LAST_TURN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END_TEMPLATE = (
    "{% for m in messages %}{{ '### ' ~ m.role ~ ':\n' ~ m.content ~ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(contents)
    ]


def trained(tokenizer, messages, train_on="completion") -> str:
    """The text of the target tokens, all turns one behind the other."""
    tokens = encode(tokenizer, messages, train_on)
    assert len(tokens.input_ids) == len(tokens.labels)
    targets = [
        (i, label) for i, label in zip(tokens.input_ids, tokens.labels, strict=True) if label != IGNORE
    ]
    assert all(i == label for i, label in targets)
    return tokenizer.decode([label for _, label in targets])


def tokenizer_with(template: str, special: list[str] = (), **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [AddedToken(t, special=True, normalized=False) for t in special],
            **tokens,
        }
    )
    return tokenizer


@pytest.fixture(scope="module")
def qwen2() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def smollm2(starter_dir) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(starter_dir)


@pytest.fixture(scope="module")
def llama3() -> PreTrainedTokenizerFast:
    return tokenizer_with(
        LLAMA3_TEMPLATE, LLAMA3_TOKENS, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


@pytest.fixture(scope="module")
def mistral() -> PreTrainedTokenizerFast:
    return tokenizer_with(MISTRAL_TEMPLATE, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def sentencepiece_mistral() -> PreTrainedTokenizerFast:
    """Spaces are letters of the words, as in Llama 2 and Mistral 7B: one is put before the whole text too."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # so that no token learns to span words
    backend.train_from_iterator(["[INST] What is it? [/INST] It is a coin, and a note"] * 3, trainer)
    backend.pre_tokenizer = None
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


# --- Messages ---


def test_the_user_turn_is_the_instruction_and_the_input_behind_a_line_that_says_context():
    row = {"instruction": "Add them.", "input": " 1 and\n2\n", "output": "3", "row_number": 1}
    assert to_messages(row, None) == turns("Add them.\n Context: 1 and\n2\n", "3")


@pytest.mark.parametrize("blank", [None, "", "  ", "\n"])
def test_a_blank_input_leaves_the_instruction_alone(blank):
    row = {"instruction": " Add them. ", "input": blank, "output": " 3\n"}
    assert to_messages(row, None) == turns(" Add them. ", " 3\n")


def test_prompt_and_completion_are_one_turn_each():
    assert to_messages({"prompt": "2 + 2 =", "completion": " 4"}, None) == turns("2 + 2 =", " 4")


def test_messages_keep_their_roles_and_texts_and_lose_the_rest():
    messages = [{**m, "name": None, "weight": 1} for m in turns("a", "b", "c", "d")]
    assert to_messages({"messages": messages}, None) == turns("a", "b", "c", "d")
    silent = [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]
    assert to_messages({"messages": silent}, None) == turns("", "b")


def test_the_system_prompt_goes_only_before_rows_that_have_none():
    system = {"role": "system", "content": "Be kind."}
    own = {"role": "system", "content": "Be brief."}
    for row in (
        {"instruction": "a", "input": None, "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"messages": turns("a", "b")},
    ):
        assert to_messages(row, "Be kind.") == [system, *turns("a", "b")]
        assert to_messages(row, None) == turns("a", "b")
        assert to_messages(row, "") == [{"role": "system", "content": ""}, *turns("a", "b")]
    assert to_messages({"messages": [own, *turns("a", "b")]}, "Be kind.") == [own, *turns("a", "b")]


def test_making_messages_leaves_the_row_as_it_is():
    row = {"messages": turns("a", "b")}
    to_messages(row, "Be kind.")[1]["content"] = "changed"
    assert row == {"messages": turns("a", "b")}


def test_the_conversation_is_rendered_as_the_seeds_did(qwen2, smollm2):
    row = {"instruction": "Add them.", "input": "1 and 2", "output": "3"}
    turn = "<|im_start|>user\nAdd them.\n Context:1 and 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    assert render(qwen2, to_messages(row, None)) == QWEN2_SYSTEM + turn
    assert render(qwen2, to_messages(row, "Be kind.")) == f"<|im_start|>system\nBe kind.<|im_end|>\n{turn}"
    assert render(smollm2, to_messages(row, "Be kind.")) == f"<|im_start|>system\nBe kind.<|im_end|>\n{turn}"
    assert render(qwen2, turns("a"), add_generation_prompt=True).endswith(
        "a<|im_end|>\n<|im_start|>assistant\n"
    )


# --- The mask, template by template ---

ANSWERS = ["It is a coin.", "Two\n\nlines, 1. and 2.\n", "no", "“Ça” 💶🙂 e\u0301", "x <|endoftext|> y"]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", ["qwen2", "smollm2"])
def test_the_targets_are_the_answer_and_the_end_of_turn(request, name, answer):
    tokenizer = request.getfixturevalue(name)
    assert trained(tokenizer, turns("What is it?", answer)) == f"{answer}<|im_end|>"
    with_system = [{"role": "system", "content": "Be kind."}, *turns("What is it?", answer)]
    assert trained(tokenizer, with_system) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_targets_are_right_with_generation_tags_and_the_same_as_these_mark(answer):
    tokenizer = tiny_tokenizer(GENERATION_TEMPLATE)
    messages = turns("What is it?", answer, "And now?", "The same.")
    assert trained(tokenizer, messages) == f"{answer}<|im_end|>The same.<|im_end|>"
    marked = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens = encode(tokenizer, messages, "completion")
    assert tokens.input_ids == marked["input_ids"]
    assert [int(label != IGNORE) for label in tokens.labels] == marked["assistant_masks"]


def test_tags_may_end_with_characters_that_the_tokenizer_leaves_out():
    tokenizer = tiny_tokenizer(
        GENERATION_TEMPLATE.replace("'<|im_end|>' }}{% endg", "'<|im_end|>\n' }}{% endg")
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    assert trained(tokenizer, turns("What is it?", "\nA coin.", "?", "\n")) == "A coin.<|im_end|><|im_end|>"


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_targets_are_right_where_the_end_of_turn_is_not_the_eos(llama3, answer):
    assert llama3.eos_token == "<|end_of_text|>"
    expected = f"{answer.strip()}<|eot_id|>"
    assert trained(llama3, turns("What is it?", answer)) == expected
    assert trained(llama3, turns("What is it?", answer, "And?", answer)) == 2 * expected


def test_the_targets_are_right_where_a_space_stands_before_the_answer(mistral):
    assert trained(mistral, turns("What is it?", "\nIt")) == " \nIt</s>"
    # " The" is one token here: what reaches into the answer is trained whole.
    assert mistral.tokenize(" The") == ["ĠThe"]
    assert trained(mistral, turns("What is it?", "The coin.")) == " The coin.</s>"
    assert trained(mistral, turns("A?", "\nB", "C?", "The\n")) == " \nB</s> The\n</s>"


def test_the_targets_are_right_where_spaces_are_letters(sentencepiece_mistral):
    tokenizer = sentencepiece_mistral
    assert "▁It" in tokenizer.tokenize("[INST] What is it? [/INST] It")
    assert trained(tokenizer, turns("What is it?", "It is a coin")) == " It is a coin</s>"
    assert trained(tokenizer, turns("What?", "It is", "What is a note?", "a coin")) == " It is</s> a coin</s>"


def test_the_targets_are_right_where_the_template_strips_the_answer():
    tokenizer = tiny_tokenizer(TRIMMING_TEMPLATE)
    assert trained(tokenizer, turns(" What is it? ", "\n It is a coin. \n")) == "It is a coin.<|im_end|>"
    assert trained(tokenizer, turns("a", " b ", "c", "\nd")) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_targets_are_right_where_the_generation_prompt_says_more_than_the_conversation(answer):
    tokenizer = tiny_tokenizer(THINKING_PROMPT_TEMPLATE)
    messages = turns("What is it?", answer)
    prompt = render(tokenizer, messages[:1], add_generation_prompt=True)
    assert not render(tokenizer, messages).startswith(prompt)
    assert trained(tokenizer, messages) == f"{answer}<|im_end|>"


def test_the_targets_are_right_where_past_turns_are_rendered_unlike_the_last():
    tokenizer = tiny_tokenizer(LAST_TURN_TEMPLATE)
    assert "</think>" in render(tokenizer, turns("a", "b"))
    assert not render(tokenizer, turns("a", "b", "c", "d")).startswith(render(tokenizer, turns("a", "b")))
    thought = "<think>\n\n</think>\n\n"
    assert trained(tokenizer, turns("What?", "One.")) == f"{thought}One.<|im_end|>"
    assert (
        trained(tokenizer, turns("What?", "One.", "And?", "Two."))
        == f"{thought}Two.<|im_end|>{thought}One.<|im_end|>"
    )


@pytest.mark.parametrize(
    "change", ["turn.content | upper", "turn.content | replace('i', 'y')", "turn.content[:5]", "'Same.'"]
)
def test_a_template_that_rewrites_the_answer_is_refused(change):
    tokenizer = tiny_tokenizer(QWEN2_TEMPLATE.replace("turn.content", f"({change})"))
    messages = turns("What is it?", "It is a coin.")
    with pytest.raises(ValueError, match=r"does not render the assistant's text as it is \(turn 2\)"):
        encode(tokenizer, messages, "completion")
    assert trained(tokenizer, messages, "all")


def test_a_template_that_writes_the_answer_twice_is_refused():
    tokenizer = tiny_tokenizer(QWEN2_TEMPLATE.replace("turn.content", "turn.content ~ ' ' ~ turn.content"))
    with pytest.raises(ValueError, match="does not render the assistant's text as it is"):
        encode(tokenizer, turns("What is it?", "It is a coin."), "completion")


def test_a_template_without_an_end_of_turn_token_is_refused():
    tokenizer = tiny_tokenizer(NO_END_TEMPLATE)
    messages = turns("What is it?", "It is a coin.")
    with pytest.raises(ValueError, match="ends an assistant's turn with no special token"):
        encode(tokenizer, messages, "completion")
    assert trained(tokenizer, messages, "all").endswith("It is a coin.\n\n")


def test_the_start_of_the_next_turn_is_no_end_of_turn():
    tokenizer = tiny_tokenizer(QWEN2_TEMPLATE.replace("<|im_end|>", ""))
    with pytest.raises(ValueError, match="ends an assistant's turn with no special token"):
        encode(tokenizer, turns("What is it?", "It is a coin.", "And now?"), "completion")


def test_what_the_template_writes_between_the_answer_and_the_end_of_generation_is_trained():
    template = QWEN2_TEMPLATE.replace("turn.content ~ '<|im_end|>", "turn.content ~ '\nOver.<|im_end|>")
    assert trained(tiny_tokenizer(template), turns("What?", "A coin.")) == "A coin.\nOver.<|im_end|>"
    # A special token at which generation does not stop ends only what stands before it.
    other = tokenizer_with(template.replace("<|im_end|>", "<|end|>"), ["<|end|>"])
    with pytest.raises(ValueError, match="ends an assistant's turn with no special token"):
        encode(other, turns("What?", "A coin."), "completion")


def test_white_space_between_the_answer_and_the_end_of_turn_is_trained():
    template = QWEN2_TEMPLATE.replace("turn.content ~ '<|im_end|>", "turn.content ~ '\n\n<|im_end|>")
    assert trained(tiny_tokenizer(template), turns("What?", "A coin.")) == "A coin.\n\n<|im_end|>"


def test_the_roles_a_template_refuses_are_named(mistral):
    messages = [{"role": "system", "content": "Be kind."}, *turns("What?", "A coin.")]
    for train_on in ("completion", "all"):
        with pytest.raises(ValueError, match=r"refuses the turns system, user, assistant: Only user and"):
            encode(mistral, messages, train_on)


@pytest.mark.parametrize("answer", ["It is a coin. ", "It is a coin.\n\n"])
def test_an_end_of_turn_that_swallows_the_white_space_before_it_is_found(answer):
    tokenizer = tokenizer_with(QWEN2_TEMPLATE.replace("<|im_end|>", "<|end|>"))
    end = AddedToken("<|end|>", special=True, normalized=False, lstrip=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    assert trained(tokenizer, turns("What?", answer, "And?", answer)) == 2 * "It is a coin.<|end|>"


def test_a_start_of_turn_that_swallows_the_white_space_behind_it_is_not_trained():
    """As Phi-3's tokens do."""
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    start = AddedToken("<|assistant|>", special=True, normalized=False, rstrip=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [start]})
    assert trained(tokenizer, turns("What?", "A coin.")) == "A coin.<|im_end|>"
    assert trained(tokenizer, turns("What?", "\n\nA coin.")) == "A coin.<|im_end|>"


# --- The mask, text by text ---


def test_every_answer_of_a_conversation_is_trained_and_nothing_else(qwen2, smollm2, llama3):
    messages = [
        {"role": "system", "content": "Be kind."},
        *turns("One?", "1.", "Two?", "Zwei.", "Three?", "3"),
    ]
    for tokenizer, end in ((qwen2, "<|im_end|>"), (smollm2, "<|im_end|>"), (llama3, "<|eot_id|>")):
        assert trained(tokenizer, messages) == f"1.{end}Zwei.{end}3{end}"
        assert trained(tokenizer, [*messages, *turns("Four?")]) == f"1.{end}Zwei.{end}3{end}"
        assert trained(tokenizer, turns("One?")) == ""


def test_an_answer_that_opens_the_conversation_is_trained(qwen2):
    messages = [{"role": "assistant", "content": "Hello!"}, *turns("What?", "A coin.")]
    assert trained(qwen2, messages) == "Hello!<|im_end|>A coin.<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        # As Llama 3's, Qwen2.5-VL's and Qwen3's: of no messages the prompt lacks how texts begin, or fails.
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}" + CHATML_TURN,
        "{% for m in messages %}{% if loop.first %}{{ '<|im_start|>system\nHi.<|im_end|>\n' }}{% endif %}"
        + CHATML_TURN,
        "{% if messages[0].role == 'system' %}{% endif %}{% for m in messages %}" + CHATML_TURN,
    ],
)
def test_an_opening_answer_begins_where_others_do_if_the_template_cannot_ask_for_it(template):
    tokenizer = tiny_tokenizer(template)
    call = {"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}
    opening = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert trained(tokenizer, turns("", "A coin.")[1:]) == "A coin.<|im_end|>"
    expected = '<call>{"name": "find", "arguments": {"x": 1}}<|im_end|>It is.<|im_end|>'
    assert trained(tokenizer, [opening, *turns("What?", "It is.")]) == expected


def test_what_of_the_generation_prompt_a_finished_turn_lacks_is_remarked_on():
    tokens = encode(tiny_tokenizer(THINKING_PROMPT_TEMPLATE), turns("What?", "A coin."), "completion")
    assert tokens.remarks == ("'<think>' of the generation prompt is missing before an answer",)
    tokens = encode(tiny_tokenizer(), turns("What?", "A coin."), "completion")
    assert tokens.remarks == ()


def test_the_eos_is_trained_though_it_is_the_padding_too(qwen2, smollm2):
    for tokenizer in (qwen2, smollm2):
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        tokens = encode(tokenizer, turns("What?", "A coin."), "completion")
        ends = [t for t, token in enumerate(tokens.input_ids) if token == tokenizer.eos_token_id]
        assert len(ends) == 3
        assert [tokens.labels[t] for t in ends] == [IGNORE, IGNORE, tokenizer.eos_token_id]


INTRUDERS = [
    "<|im_end|>\n<|im_start|>assistant\nIt is a coin.<|im_end|>\n",
    "<|im_start|>assistant\n",
    "It is a coin.",
    "placeholder",
    "placeholder- placeholder-- <|im_start|>assistant\nplaceholder",
]


@pytest.mark.parametrize("user", INTRUDERS)
def test_what_looks_like_an_answer_in_the_users_text_stays_untrained(qwen2, smollm2, user):
    for tokenizer in (qwen2, smollm2):
        assert trained(tokenizer, turns(user, "It is a coin.")) == "It is a coin.<|im_end|>"
        assert trained(tokenizer, turns(user, "A.", user, "It is a coin.", user)) == (
            "A.<|im_end|>It is a coin.<|im_end|>"
        )
        tokens = encode(tokenizer, turns(user, "It is a coin."), "completion")
        answer = tokenizer("It is a coin.<|im_end|>", add_special_tokens=False)["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        assert tokens.input_ids[-len(answer + newline) :] == answer + newline
        assert [t for t, label in enumerate(tokens.labels) if label != IGNORE] == list(
            range(len(tokens.labels) - len(answer + newline), len(tokens.labels) - len(newline))
        )


@pytest.mark.parametrize("user", ["placeholder", "2 + 2 =", "placeholder- placeholder"])
def test_the_answer_is_found_where_it_follows_the_users_text_directly(user):
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m.content ~ (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    )
    assert (
        trained(tokenizer, turns(user, "4.", user, "5 placeholder")) == "4.<|im_end|>5 placeholder<|im_end|>"
    )


@pytest.mark.parametrize("answer", INTRUDERS)
def test_what_looks_like_a_turn_in_the_answer_is_the_answers(qwen2, smollm2, answer):
    for tokenizer in (qwen2, smollm2):
        assert trained(tokenizer, turns("What?", answer, answer, "No.")) == f"{answer}<|im_end|>No.<|im_end|>"


def test_training_on_all_takes_every_token_but_the_first(qwen2, smollm2, mistral):
    for tokenizer in (qwen2, smollm2, mistral):
        tokens = encode(tokenizer, turns("What?", "A coin."), "all")
        assert tokens.labels == [IGNORE, *tokens.input_ids[1:]]
        assert tokens.input_ids == encode(tokenizer, turns("What?", "A coin."), "completion").input_ids
        assert tokenizer.decode(tokens.input_ids) == render(tokenizer, turns("What?", "A coin."))


def test_the_first_token_is_never_a_target():
    bare = tiny_tokenizer("{% for m in messages %}{{ m.content ~ '<|im_end|>' }}{% endfor %}")
    tokens = encode(bare, [{"role": "assistant", "content": "A coin."}], "completion")
    assert tokens.labels == [IGNORE, *tokens.input_ids[1:]]


def test_the_bos_that_a_tokenizer_would_add_stands_only_where_the_template_writes_it(sentencepiece_mistral):
    tokenizer = sentencepiece_mistral
    assert tokenizer("It").input_ids[0] == tokenizer.bos_token_id
    for train_on in ("completion", "all"):
        tokens = encode(tokenizer, turns("What?", "It is"), train_on)
        assert tokens.input_ids.count(tokenizer.bos_token_id) == 1


# --- The mask, any text ---

PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "assistant",
    "\n",
    " ",
    "\t",
    "e\u0301",
    "\u0301",
    "💶",
    "👩‍👩‍👧",
    "placeholder",
]
TEXT = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join),
)
CONVERSATION = st.tuples(st.none() | TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))


def messages_of(conversation) -> list[dict[str, str]]:
    system, pairs = conversation
    messages = turns(*(content for pair in pairs for content in pair))
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def num_bytes(tokenizer, token_id: int) -> int:
    """Of a byte-level tokenizer each letter of a token stands for one byte, but an added token is itself."""
    added = tokenizer.added_tokens_decoder.get(token_id)
    return len(added.content.encode()) if added else len(tokenizer.convert_ids_to_tokens(token_id))


def expected_targets(tokenizer, messages) -> list[int]:
    """Places of the target tokens, counted in bytes from the turns rendered one after another.

    Right for templates that write each turn on its own, and for tokenizers that work on bytes and change
    none; asks neither for character offsets nor for a placeholder.
    """
    targets = []
    input_ids = tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"]
    ends = [0]
    for token in input_ids:
        ends.append(ends[-1] + num_bytes(tokenizer, token))
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            first = len(render(tokenizer, messages[:turn], add_generation_prompt=True).encode())
            last = first + len((message["content"] + "<|im_end|>").encode())
            targets += [t for t in range(len(input_ids)) if ends[t] < last and ends[t + 1] > first]
    return targets


def sayable(tokenizer, text: str) -> str:
    """The text without letters that the tokenizer has no tokens for: SmolLM2's lacks a few bytes."""
    return "".join(letter for letter in text if tokenizer.decode(tokenizer.encode(letter)) == letter)


def check_any_text(tokenizer, conversation) -> None:
    messages = [{**m, "content": sayable(tokenizer, m["content"])} for m in messages_of(conversation)]
    tokens = encode(tokenizer, messages, "completion")
    text = render(tokenizer, messages)
    assert tokens.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    places = [t for t, label in enumerate(tokens.labels) if label != IGNORE]
    assert [tokens.labels[t] for t in places] == [tokens.input_ids[t] for t in places]
    assert places == expected_targets(tokenizer, messages)

    # Each run of targets is an answer and its end. The template's newline may be in the first token of it.
    runs = [[places[0]]]
    for before, place in pairwise(places):
        runs.append([place]) if place > before + 1 else runs[-1].append(place)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for run, answer in zip(runs, answers, strict=True):
        decoded = tokenizer.decode([tokens.input_ids[t] for t in run])
        if answer[:1].isspace() and decoded.startswith("\n") and len(decoded) > len(answer + "<|im_end|>"):
            decoded = decoded.removeprefix("\n")
        assert decoded == f"{answer}<|im_end|>"


any_text = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@any_text
@given(CONVERSATION)
@example((None, [("", "\n\nA coin.")]))
@example(("", [("<|im_end|>\n<|im_start|>assistant\n", " A coin. \n"), ("A coin.", "\u0301")]))
def test_any_text_is_masked_right_with_qwen2s_template(qwen2, conversation):
    check_any_text(qwen2, conversation)


@any_text
@given(CONVERSATION)
@example((None, [("", "\n\nA coin.")]))
@example(("", [("<|im_end|>\n<|im_start|>assistant\n", " A coin. \n"), ("A coin.", "\u0301")]))
def test_any_text_is_masked_right_with_smollm2s_template_and_tokenizer(smollm2, conversation):
    check_any_text(smollm2, conversation)


@any_text
@given(CONVERSATION)
@example((None, [("e\u0301", "e\u0301 \u0958 a\u0323\u0307 \u1100\u1161\u11a8")]))
def test_any_text_is_masked_right_by_a_tokenizer_that_composes_letters_as_qwen2s_does(
    nfc_qwen2, conversation
):
    """The tokens and the targets are those of the composed conversation."""
    messages = messages_of(conversation)
    composed = [{**m, "content": NFC.normalize_str(m["content"])} for m in messages]
    assert encode(nfc_qwen2, messages, "completion") == encode(nfc_qwen2, composed, "completion")


NFC = normalizers.NFC()


@pytest.fixture(scope="module")
def nfc_qwen2() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = NFC
    return tokenizer
