"""data.anatomy.dissect: each token has the role of the turn whose text it is."""

from audits import TOKENIZER, dissect_messages, texts_by_role, turns
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from small_templates import QWEN3, SMALL_TEMPLATES, byte_tokenizer

from finetune.data.templates.tokenize import IGNORE, encode


def test_each_token_is_of_the_turn_whose_text_it_is():
    messages = [
        {"role": "system", "content": "Be kind."},
        *turns("What is it?", "A coin.", "And now?", "A note."),
    ]
    assert texts_by_role(TOKENIZER, messages) == {
        "system": "Be kind.",
        "user": "What is it?And now?",
        "assistant": "A coin.A note.",
        "template": "<|im_start|>system\n<|im_end|>\n"
        + 2 * "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
    }


def test_a_system_prompt_that_the_template_brings_is_the_templates():
    assert "system" not in texts_by_role(TOKENIZER, turns("What is it?", "A coin."))
    assert "You are a helpful assistant." in texts_by_role(TOKENIZER, turns("What?", "A coin."))["template"]


def test_what_the_template_rewrites_is_the_templates_and_what_it_trims_is_still_the_turns():
    rewriting = tiny_tokenizer(
        QWEN2_TEMPLATE.replace("turn.content", "(turn.content if turn.role == 'assistant' else 'Same.')")
    )
    roles = texts_by_role(rewriting, turns("What is it?", "A coin."))
    assert "user" not in roles
    assert "Same." in roles["template"]
    trimming = tiny_tokenizer(QWEN2_TEMPLATE.replace("turn.content", "turn.content | trim"))
    roles = texts_by_role(trimming, turns("\n What is it? ", "  A coin.\n"))
    assert (roles["user"], roles["assistant"]) == ("What is it?", "A coin.")


def test_a_turn_that_may_hold_only_some_words_is_the_templates():
    """The template refuses what would be put in its place."""
    template = (
        QWEN2_TEMPLATE
        + "{%- if messages[0].content not in ('yes', 'no') -%}{{ raise_exception('no') }}{%- endif -%}"
    )
    roles = texts_by_role(tiny_tokenizer(template), turns("yes", "A coin."))
    assert (roles["assistant"], "user" in roles) == ("A coin.", False)


def test_turns_of_other_roles_are_told_apart_from_the_template():
    messages = [*turns("What?", "Wait."), {"role": "tool", "content": "coin"}, *turns("?", "A coin.")[1:]]
    roles = texts_by_role(TOKENIZER, messages)
    assert (roles["tool"], roles["assistant"]) == ("coin", "Wait.A coin.")


def test_a_token_that_reaches_into_an_answer_is_the_answers():
    """As it is trained: here a space of the template and the first word are one token."""
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ '[' ~ m.role ~ '] ' ~ m.content ~ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    messages = turns("What?", "The coin.")
    assert texts_by_role(tokenizer, messages)["assistant"] == " The coin."
    labels = encode(tokenizer, messages, "completion").labels
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == " The coin.<|im_end|>"


def test_a_token_that_reaches_from_a_question_into_an_answer_is_the_answers():
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m.content ~ (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    )
    assert tokenizer.tokenize("an interest") == ["an", "Ġinterest"]
    roles = texts_by_role(tokenizer, turns("an inte", "rest"))
    assert (roles["user"], roles["assistant"]) == ("an", " interest")


def test_what_follows_the_last_answer_counts_only_where_every_token_is_trained():
    messages = [*turns("What?", "A coin."), {"role": "user", "content": "Thanks."}]
    assert texts_by_role(TOKENIZER, messages)["user"] == "What?"
    assert texts_by_role(TOKENIZER, messages, "all")["user"] == "What?Thanks."


def test_ends_of_turns_are_found_or_said_to_be_none():
    anatomy = dissect_messages(turns("a", "b", "c", "d"))
    input_ids = encode(TOKENIZER, turns("a", "b", "c", "d"), "completion").input_ids
    assert len(anatomy.ends_of_turn) == 2
    assert [input_ids[end] for end in anatomy.ends_of_turn] == 2 * [TOKENIZER.eos_token_id]
    bare = tiny_tokenizer("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}")
    assert dissect_messages(turns("a", "b"), "all", bare).ends_of_turn == [None]
    upper = tiny_tokenizer(QWEN2_TEMPLATE.replace("turn.content", "turn.content | upper"))
    assert dissect_messages(turns("a", "b"), "all", upper).ends_of_turn == [None]


def test_a_trunk_that_ends_with_the_token_of_the_next_turn_is_taken_apart():
    """As GLM's: the text of the trunk is longer than the conversation that the template renders."""
    roles = texts_by_role(
        byte_tokenizer(SMALL_TEMPLATES["glm"]), turns("What?", "A coin.", "And?", "A note.")
    )
    assert (roles["user"], roles["assistant"]) == ("What?And?", "\nA coin.\nA note.")
    assert roles["template"].endswith("<|user|>")


def test_a_trunk_that_asks_in_another_way_than_the_conversation_is_rendered_is_taken_apart():
    """As Qwen3's where an answer follows another: when it is asked for, that one is still the last."""
    messages = [*turns("What?", "A coin."), {"role": "assistant", "content": "A note."}]
    roles = texts_by_role(tiny_tokenizer(QWEN3), messages)
    thought = "<think>\n\n</think>\n\n"
    assert (roles["user"], roles["assistant"]) == ("What?", f"{thought}A coin.{thought}A note.")
    messages[1] = {**messages[1], "train": False}
    roles = texts_by_role(tiny_tokenizer(QWEN3), messages)
    assert (roles["user"], roles["assistant"]) == ("What?", f"A coin.{thought}A note.")
