"""Answers that the template renders otherwise later on are branches; and what max_length makes of them."""

from itertools import pairwise

import pytest
from conftest import tiny_tokenizer
from small_templates import QWEN3, SMALL_TEMPLATES, byte_tokenizer

from finetune.data.conversations import Conversation
from finetune.data.templates.tokenize import IGNORE, Tokens, cut, encode, encode_batch


def thought(question: str, reasoning: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": reasoning, "content": answer},
    ]


def paths(tokenizer, tokens: Tokens) -> list[tuple[str, str]]:
    """Of the trunk and of each branch: what stands before its first target, and its targets."""
    starts = [start for start, _ in tokens.branches]
    ends = [*starts, len(tokens.input_ids)]
    all_paths = [(tokens.input_ids[: ends[0]], tokens.labels[: ends[0]])]
    for (start, attach), end in zip(tokens.branches, ends[1:], strict=True):
        ids = tokens.input_ids[:attach] + tokens.input_ids[start:end]
        all_paths.append((ids, [IGNORE] * attach + tokens.labels[start:end]))
    texts = []
    for ids, labels in all_paths:
        first = next((t for t, label in enumerate(labels) if label != IGNORE), len(labels))
        texts.append((tokenizer.decode(ids[:first]), tokenizer.decode([i for i in labels if i != IGNORE])))
    return texts


ONE, TWO, THREE = (
    thought("One?", "First.", "1."),
    thought("Two?", "Second.", "2."),
    thought("Three?", "Third.", "3."),
)
ASKED = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
LATER = ASKED + "1.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
LAST = LATER + "2.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n"
WRITTEN = [
    "<think>\nFirst.\n</think>\n\n1.<|im_end|>",
    "<think>\nSecond.\n</think>\n\n2.<|im_end|>",
    "<think>\nThird.\n</think>\n\n3.<|im_end|>",
]


@pytest.fixture(scope="module")
def qwen3():
    return tiny_tokenizer(QWEN3)


def test_an_earlier_answer_is_a_branch_behind_the_part_of_the_trunk_that_asks_for_it(qwen3):
    tokens = encode(qwen3, [*ONE, *TWO, *THREE], "completion")
    assert paths(qwen3, tokens) == [(LAST, WRITTEN[2]), (ASKED, WRITTEN[0]), (LATER, WRITTEN[1])]
    # What they share is there once: only the answers themselves come on top of the trunk.
    trunk = encode(qwen3, [*ONE, *TWO, *THREE], "all").input_ids
    branches = sum(len(qwen3(text, add_special_tokens=False)["input_ids"]) for text in WRITTEN[:2])
    assert len(tokens.input_ids) == len(trunk) + branches


def test_the_turns_of_one_chain_of_tools_are_one_branch(qwen3):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "coin"}}}
    chain = [
        ONE[0],
        {"role": "assistant", "content": None, "reasoning_content": "Look.", "tool_calls": [call]},
        {"role": "tool", "content": "a coin"},
        ONE[1],
    ]
    tokens = encode(qwen3, [*chain, *TWO], "completion")
    [_, (before, written)] = paths(qwen3, tokens)
    assert before.endswith(ASKED)
    assert written.startswith("<think>\nLook.\n</think>")
    assert written.endswith(WRITTEN[0])
    assert "a coin" not in written
    assert len(tokens.branches) == 1


def test_a_turn_that_is_not_to_be_trained_is_no_branch(qwen3):
    untrained = [ONE[0], {**ONE[1], "train": False}]
    tokens = encode(qwen3, [*untrained, *TWO], "completion")
    assert paths(qwen3, tokens) == [(LATER, WRITTEN[1])]
    assert paths(qwen3, encode(qwen3, [*TWO, *untrained], "completion")) == paths(
        qwen3, encode(qwen3, TWO, "completion")
    )


def test_untrained_turns_are_matched_with_tags_by_their_order():
    tokenizer = byte_tokenizer(SMALL_TEMPLATES["tagged"])
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "one", "train": False},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "two"},
    ]
    labels = encode(tokenizer, turns, "completion").labels
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == "two<|im_end|>"
    twice = SMALL_TEMPLATES["tagged"].source.replace(
        "{% endgeneration %}", "{% endgeneration %}{% generation %}.{% endgeneration %}"
    )
    tokenizer.chat_template = twice
    with pytest.raises(ValueError, match="tags 4 spans of 2 assistant's turns"):
        encode(tokenizer, turns, "completion")


def test_tags_that_leave_out_an_answer_are_refused():
    tokenizer = byte_tokenizer(SMALL_TEMPLATES["tagged"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% generation %}{{ m.content ~", "{{ m.content }}{% generation %}{{"
    )
    with pytest.raises(ValueError, match=r"\(turn 2\): it changes it"):
        encode(
            tokenizer,
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "one"}],
            "completion",
        )


def test_a_plain_text_is_trained_whole_with_the_eos_behind_it(qwen3):
    tokens = encode(qwen3, Conversation([], text="It is a coin."), "completion")
    assert qwen3.decode(tokens.input_ids) == "It is a coin.<|im_end|>"
    assert tokens.labels == [IGNORE, *tokens.input_ids[1:]]
    again = encode(qwen3, Conversation([], text="It is a coin.<|im_end|>"), "all")
    assert again == tokens


def test_a_plain_text_is_cut_into_pieces_one_behind_the_other(qwen3):
    tokens = encode(qwen3, Conversation([], text="It is a coin, or a note. " * 9), "completion")
    for length in (2, 7, len(tokens.input_ids) - 1):
        pieces = cut(tokens, length)
        targets = [label for piece in pieces for label in piece.labels if label != IGNORE]
        assert targets == tokens.input_ids[1:]
        assert all(before.input_ids[-1] == after.input_ids[0] for before, after in pairwise(pieces))
        assert all(piece.labels == [IGNORE, *piece.input_ids[1:]] for piece in pieces)
        assert all(1 < len(piece.input_ids) <= length for piece in pieces)
    assert cut(tokens, len(tokens.input_ids)) == [tokens]


def test_a_conversation_is_cut_at_its_end(qwen3):
    tokens = encode(qwen3, ONE, "completion")
    [shorter] = cut(tokens, 20)
    assert (shorter.input_ids, shorter.labels) == (tokens.input_ids[:20], tokens.labels[:20])


def test_branches_without_room_beside_the_trunk_stand_with_what_they_need_of_it(qwen3):
    tokens = encode(qwen3, [*ONE, *TWO, *THREE], "completion")
    whole = paths(qwen3, tokens)
    for length in range(len(tokens.input_ids), tokens.branches[0][0] - 1, -1):
        examples = cut(tokens, length)
        assert all(len(example.input_ids) <= length for example in examples)
        found = [path for example in examples for path in paths(qwen3, example) if path[1]]
        assert found == whole, length
        assert all(
            not example.branches or example.branches[-1][0] < len(example.input_ids) for example in examples
        )
    assert len(cut(tokens, tokens.branches[0][0])) > 1


def test_a_branch_that_is_alone_too_long_is_cut_at_its_end(qwen3):
    tokens = encode(qwen3, [*thought("One?", "Very long. " * 40, "1."), *TWO], "completion")
    trunk = tokens.branches[0][0]
    first, second = cut(tokens, trunk + 5)
    assert (len(first.input_ids), len(second.input_ids)) == (trunk, trunk + 5)
    assert not second.branches
    [(before, written)] = paths(qwen3, second)
    assert before == ASKED
    assert written.startswith("<think>\nVery long.")


def test_a_batch_gives_what_each_row_gives_alone_and_errors_in_their_places(qwen3):
    rows = [ONE, [{"role": "nobody", "content": None}], Conversation([], text="A text."), [*ONE, *TWO], THREE]
    broken = tiny_tokenizer(
        QWEN3.replace(
            "{% if m.role == 'user'",
            "{% if m.role == 'nobody' %}{{ raise_exception('who') }}{% elif m.role == 'user'",
        )
    )
    alone = [encode_batch(broken, [row], "completion")[0] for row in rows]
    batch = encode_batch(broken, rows, "completion")
    assert isinstance(batch[1], ValueError)
    assert "refuses the turns nobody: who" in str(batch[1])
    assert batch[:1] + batch[2:] == alone[:1] + alone[2:]
