"""Rows become examples once, and come from the cache thereafter: in order, with what is known of each."""

import hashlib
import json
from dataclasses import replace

import pytest
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from datasets import Dataset
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.config import DataConfig
from finetune.data.conversations import Conversation, to_messages
from finetune.data.preparing.examples import COLUMNS, Examples, tokenize_rows
from finetune.data.rows import Rows, iterate_rows, load_rows
from finetune.data.splits import tokenize_splits
from finetune.data.templates.tokenize import IGNORE, encode, encode_batch

TRIMMING_TEMPLATE = QWEN2_TEMPLATE.replace("turn.content", "turn.content | trim")
# Earlier answers lose their reasoning, as under Qwen3's template.
THINKING_TEMPLATE = (
    "{%- for turn in messages -%}"
    "{{ '<|im_start|>' ~ turn.role ~ '\n' }}"
    "{%- if turn.reasoning_content and loop.last -%}"
    "{{ '<think>' ~ turn.reasoning_content ~ '</think>' }}"
    "{%- endif -%}"
    "{{ turn.content ~ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@pytest.fixture(scope="module")
def qwen2() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def smollm2(starter_dir) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(starter_dir)


# --- A whole table of rows ---

ROWS = [
    {"instruction": "What is it?", "input": None, "output": "A coin."},
    {"instruction": "Add them.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say a lot.", "input": "", "output": "It is a long answer. " * 10},
]


def table(rows=ROWS, source=0) -> Dataset:
    """A table of rows as load_rows gives it."""
    entries = [
        {"row_number": number, "source": source, "row": json.dumps(row)} for number, row in enumerate(rows, 1)
    ]
    return Dataset.from_list(entries)


def config(**changes) -> DataConfig:
    return replace(DataConfig(path="rows.csv"), **changes)


def columns(examples) -> list[tuple]:
    return [(row["row_number"], row["input_ids"], row["labels"]) for row in examples.dataset]


def test_every_row_is_encoded_in_order_and_keeps_its_number(qwen2):
    rows = table().select([2, 0, 1])
    examples = tokenize_rows(rows, qwen2, config(system_prompt="Be kind."))
    assert set(examples.dataset.column_names) == set(COLUMNS)
    assert columns(examples) == [
        (row["row_number"], *encode(qwen2, to_messages(row, "Be kind."), "completion")[:2])
        for row in iterate_rows(rows)
    ]
    assert (examples.truncated, examples.dropped) == ([], {})


def test_rows_of_every_format_are_encoded(qwen2):
    answer = columns(tokenize_rows(table(ROWS[:1]), qwen2, config()))
    messages = [{"messages": to_messages(ROWS[0], None)}]
    assert columns(tokenize_rows(table(messages), qwen2, config())) == answer
    completion = [{"prompt": "What is it?", "completion": "A coin."}]
    assert columns(tokenize_rows(table(completion), qwen2, config())) == answer


def test_training_on_all_is_what_the_configuration_asks_for(qwen2):
    examples = tokenize_rows(table(), qwen2, config(train_on="all"))
    assert all(row["labels"] == [IGNORE, *row["input_ids"][1:]] for row in examples.dataset)


def test_rows_longer_than_max_length_are_cut_at_the_end_and_named(qwen2):
    whole = columns(tokenize_rows(table(), qwen2, config()))
    lengths = [len(input_ids) for _, input_ids, _ in whole]
    assert lengths[2] > lengths[1] > lengths[0]
    for max_length, cut_rows in (
        (lengths[2], []),
        (lengths[2] - 1, [3]),
        (lengths[1], [3]),
        (lengths[1] - 1, [2, 3]),
    ):
        cut = tokenize_rows(table(), qwen2, config(max_length=max_length))
        assert columns(cut) == [(n, ids[:max_length], labels[:max_length]) for n, ids, labels in whole]
        assert (cut.truncated, cut.dropped) == (cut_rows, {})


def test_rows_longer_than_max_length_are_dropped_and_counted_where_asked(qwen2):
    whole = columns(tokenize_rows(table(), qwen2, config()))
    length = len(whole[1][1])
    kept = tokenize_rows(table(), qwen2, config(max_length=length, overlong="drop"))
    assert columns(kept) == whole[:2]
    assert (kept.truncated, kept.dropped) == ([], {f"over {length} tokens": [3]})
    # The same tokens, so from the same cache
    cut = tokenize_rows(table(), qwen2, config(max_length=length, overlong="truncate"))
    assert (len(cut.dataset), cut.truncated, cut.dropped) == (3, [3], {})


def test_rows_that_cutting_leaves_without_a_target_are_dropped_and_counted(qwen2):
    long_question = {"instruction": "What is it? " * 20, "input": None, "output": "A coin."}
    rows = table([ROWS[0], long_question, ROWS[2]])
    examples = tokenize_rows(rows, qwen2, config(max_length=50))
    assert [row["row_number"] for row in examples.dataset] == [1, 3]
    assert (examples.truncated, examples.dropped) == ([3], {"without a target token": [2]})
    on_all = tokenize_rows(rows, qwen2, config(max_length=50, train_on="all"))
    assert (len(on_all.dataset), on_all.truncated, on_all.dropped) == (3, [2, 3], {})


def test_lengths_and_target_counts_are_those_of_the_examples(qwen2):
    examples = tokenize_rows(table(), qwen2, config(max_length=100))
    assert examples.lengths.tolist() == [len(row["input_ids"]) for row in examples.dataset]
    assert examples.lengths[2] == 100
    assert examples.target_counts.tolist() == [
        len([label for label in row["labels"] if label != IGNORE]) for row in examples.dataset
    ]
    assert 0 < examples.target_counts[0] < examples.lengths[0]


def test_both_splits_are_encoded_each_its_own_rows(qwen2):
    rows = Rows(train=table().select([0, 2]), eval=table().select([1]), num_read=3, dropped={})
    train, evaluation = tokenize_splits(rows, qwen2, config())
    assert columns(train) == columns(tokenize_rows(rows.train, qwen2, config()))
    assert columns(evaluation) == columns(tokenize_rows(rows.eval, qwen2, config()))
    alone = replace(rows, eval=table().select([]))
    assert len(tokenize_splits(alone, qwen2, config())[1].dataset) == 0


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_split_that_is_left_without_an_example_is_refused_by_name_and_reason(qwen2, split):
    rows = {
        "train": table().select([0]),
        "eval": table().select([0]),
        split: table([*ROWS, ROWS[1]]).select([1, 2, 3]),
    }
    limit = len(encode(qwen2, to_messages(ROWS[0], None), "completion").input_ids)
    with pytest.raises(ValueError, match=rf"in the {split} split \(3 over {limit} tokens\)"):
        tokenize_splits(
            Rows(**rows, num_read=4, dropped={}), qwen2, config(max_length=limit, overlong="drop")
        )


def test_no_rows_give_no_examples(qwen2):
    examples = tokenize_rows(table().select([]), qwen2, config())
    assert (len(examples.dataset), examples.truncated, examples.dropped) == (0, [], {})
    assert (examples.lengths.tolist(), examples.target_counts.tolist()) == ([], [])
    assert set(examples.dataset.column_names) == set(COLUMNS)


def test_a_tokenizer_without_a_chat_template_is_refused(qwen2):
    with pytest.raises(ValueError, match="no chat template; set data"):
        tokenize_rows(table(), tiny_tokenizer(chat_template=None), config())


def test_what_cannot_be_encoded_is_named_by_the_number_of_its_row():
    rows = [ROWS[0], {"instruction": "What?", "input": None, "output": "no lower case here"}]
    # Refuses the second row only: what it replaces is not in the first.
    tokenizer = tiny_tokenizer(
        QWEN2_TEMPLATE.replace("turn.content", "turn.content | replace('lower', 'upper')")
    )
    with pytest.raises(ValueError, match=r"^row 2: the chat template does not render the assistant's text"):
        tokenize_rows(table(rows), tokenizer, config())
    numbered = table(rows).remove_columns("row_number").add_column("row_number", [70, 90])
    with pytest.raises(ValueError, match=r"^row 90: "):
        tokenize_rows(numbered, tokenizer, config())


def test_the_real_rows_keep_their_answers(smollm2, shared_data):
    rows = load_rows(DataConfig(path=str(shared_data / "alpaca_9229.json"), num_samples=60)).eval
    examples = tokenize_rows(rows, smollm2, config(max_length=4096))
    for row, example_ in zip(iterate_rows(rows), examples.dataset, strict=True):
        targets = [label for label in example_["labels"] if label != IGNORE]
        assert smollm2.decode(targets).removeprefix("\n") == row["output"].removeprefix("\n") + "<|im_end|>"


def reasoning(*answers: str) -> dict:
    """A conversation in which each answer is thought about first."""
    turns = [
        turn
        for text in answers
        for turn in (
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": text, "reasoning_content": f"About {text}"},
        )
    ]
    return {"messages": turns}


def test_branches_are_kept_and_count_in_the_fingerprint():
    tokenizer = tiny_tokenizer(THINKING_TEMPLATE)
    rows = table([reasoning("A coin.", "A note.")])
    examples = tokenize_rows(rows, tokenizer, config())
    [tokens] = [encode(tokenizer, to_messages(row, None), "completion") for row in iterate_rows(rows)]
    assert len(tokens.branches) == 1
    assert [tuple(map(tuple, row["branches"])) for row in examples.dataset] == [tokens.branches]
    unbranched = examples.dataset.map(lambda row: {"branches": []})
    assert Examples(unbranched, [], {}).fingerprint != examples.fingerprint
    assert Examples(examples.dataset, [], {}).fingerprint == examples.fingerprint


def test_a_comb_that_is_too_long_becomes_several_examples_and_loses_nothing():
    tokenizer = tiny_tokenizer(THINKING_TEMPLATE)
    rows = table([reasoning("A coin.", "A note.", "A bond.")])
    whole = tokenize_rows(rows, tokenizer, config())
    limit = int(whole.lengths[0]) - 1
    parts = tokenize_rows(rows, tokenizer, config(max_length=limit, overlong="drop"))
    assert len(parts.dataset) > 1
    assert max(parts.lengths) <= limit
    assert parts.target_counts.sum() == whole.target_counts.sum()
    assert (parts.truncated, parts.dropped) == ([], {})
    assert set(parts.dataset["row_number"]) == {1}


def test_a_plain_text_is_cut_into_pieces_and_is_not_overlong(qwen2):
    rows = table([{"text": "It is a coin. " * 40}, ROWS[0]])
    for overlong in ("truncate", "drop"):
        examples = tokenize_rows(rows, qwen2, config(max_length=64, overlong=overlong))
        pieces = [row["input_ids"] for row in examples.dataset if row["row_number"] == 1]
        whole = encode(qwen2, Conversation([], text="It is a coin. " * 40), "completion").input_ids
        assert whole[:1] + [token for piece in pieces for token in piece[1:]] == whole
        assert (examples.truncated, examples.dropped) == ([], {})


def test_what_the_template_does_to_rows_is_counted():
    remarks = tokenize_rows(
        table([reasoning("A coin."), ROWS[0], reasoning("A note.")]), tiny_tokenizer(), config()
    ).unused
    assert list(remarks.values()) == [2]
    assert "reasoning_content" in next(iter(remarks))


def test_a_text_needs_no_chat_template():
    examples = tokenize_rows(table([{"text": "It is a coin."}]), tiny_tokenizer(chat_template=None), config())
    assert len(examples.dataset) == 1


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 2]], ids=str)
def test_what_preparing_found_out_is_what_measuring_the_examples_gives(qwen2, order):
    dropped = {"instruction": "What is it? " * 60, "input": None, "output": "A coin."}
    examples = tokenize_rows(table([*ROWS, dropped], source=3).select(order), qwen2, config(max_length=100))
    measured = Examples(examples.dataset, [], {})
    assert examples.dropped == {"without a target token": [4]}
    assert (examples.shared_prefix, examples.fingerprint) == (measured.shared_prefix, measured.fingerprint)
    assert examples.shared_prefix > 8
    for figure in ("lengths", "target_counts", "sources"):
        assert getattr(examples, figure).tolist() == getattr(measured, figure).tolist()
    assert examples.sources.tolist() == [3] * (len(order) - 1)


def test_the_fingerprint_is_that_of_the_examples_as_json(qwen2):
    examples = tokenize_rows(table(), qwen2, config())
    digest = hashlib.sha256()
    for row in examples.dataset:
        digest.update(json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}).encode())
    assert examples.fingerprint == digest.hexdigest()


# --- The cache ---


@pytest.fixture
def encoded_anew(monkeypatch):
    """Says whether a call had to encode any row; each call's tokens are checked against `encode` itself."""

    def ask(rows, tokenizer, data_config) -> bool:
        called = []
        with monkeypatch.context() as patch:
            patch.setattr(
                "finetune.data.preparing.encoding.encode_batch",
                lambda *a: called.append(1) or encode_batch(*a),
            )
            examples = tokenize_rows(rows, tokenizer, data_config)
        cut = slice(data_config.max_length)
        assert len(examples.dataset) == len(rows)
        for row, (number, input_ids, labels) in zip(iterate_rows(rows), columns(examples), strict=True):
            messages = to_messages(row, data_config.system_prompt)
            fresh = encode(tokenizer, messages, data_config.train_on)
            assert (number, input_ids, labels) == (row["row_number"], fresh.input_ids[cut], fresh.labels[cut])
        return bool(called)

    return ask


def test_rows_are_encoded_once_and_then_read_from_the_cache(encoded_anew):
    assert encoded_anew(table(), tiny_tokenizer(), config())
    assert not encoded_anew(table(), tiny_tokenizer(), config())
    # These change no token.
    assert not encoded_anew(table(), tiny_tokenizer(), config(eval_fraction=0.5, path="elsewhere.csv"))
    assert not encoded_anew(table(), tiny_tokenizer(), config(overlong="drop"))


def test_the_cache_gives_the_same_examples(qwen2):
    first, second = (tokenize_rows(table(), qwen2, config(max_length=50)) for _ in range(2))
    assert columns(first) == columns(second)
    assert (first.truncated, first.dropped, first.fingerprint) == (
        second.truncated,
        second.dropped,
        second.fingerprint,
    )


@pytest.mark.parametrize(
    "change",
    [{"system_prompt": "Be kind."}, {"system_prompt": ""}, {"max_length": 100}, {"train_on": "all"}],
    ids=str,
)
def test_other_settings_do_not_read_what_was_cached(encoded_anew, qwen2, change):
    encoded_anew(table(), qwen2, config())
    assert encoded_anew(table(), qwen2, config(**change))
    assert not encoded_anew(table(), qwen2, config())


def test_another_chat_template_does_not_read_what_was_cached(encoded_anew, qwen2):
    encoded_anew(table(), qwen2, config())
    assert encoded_anew(table(), tiny_tokenizer(TRIMMING_TEMPLATE), config())


def test_another_tokenizer_does_not_read_what_was_cached(encoded_anew, qwen2, smollm2):
    encoded_anew(table(), qwen2, config())
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": [AddedToken("coin", special=True)]})
    assert encoded_anew(table(), other, config())
    smollm2_as_qwen2 = AutoTokenizer.from_pretrained(smollm2.name_or_path, chat_template=QWEN2_TEMPLATE)
    assert encoded_anew(table(), smollm2_as_qwen2, config())


def test_other_special_tokens_do_not_read_what_was_cached(encoded_anew):
    """The template writes them, and the tokenizer's own file does not say which they are."""
    template = QWEN2_TEMPLATE.replace("'<|im_end|>\n' }}", "eos_token ~ '\n' }}")
    tokenizer = tiny_tokenizer(template)
    encoded_anew(table(), tokenizer, config())
    tokenizer.eos_token = "<|endoftext|>"
    assert encoded_anew(table(), tokenizer, config())


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_other_rows_do_not_read_what_was_cached(encoded_anew, qwen2, column):
    encoded_anew(table(), qwen2, config())
    assert encoded_anew(table([*ROWS[:2], {**ROWS[2], column: "Something else."}]), qwen2, config())
    assert encoded_anew(table(ROWS[:2]), qwen2, config())
    assert encoded_anew(table().select([1, 0, 2]), qwen2, config())
    assert encoded_anew(table([ROWS[0], *ROWS]).select([1, 2, 3]), qwen2, config())


# --- The fingerprint ---


def test_the_fingerprint_is_the_same_for_the_same_tokens_whatever_they_came_from(qwen2):
    fingerprint = tokenize_rows(table(), qwen2, config()).fingerprint
    messages = [{"messages": to_messages(row, None)} for row in ROWS]
    later = [{"prompt": "dropped before", "completion": "x"}]
    assert tokenize_rows(table(messages), qwen2, config()).fingerprint == fingerprint
    assert tokenize_rows(table(), qwen2, config(max_length=400)).fingerprint == fingerprint
    assert tokenize_rows(table([*later, *later]), qwen2, config()).fingerprint != fingerprint
    renumbered = table().remove_columns("row_number").add_column("row_number", [5, 6, 7])
    assert tokenize_rows(renumbered, qwen2, config()).fingerprint == fingerprint


def test_the_fingerprint_is_another_for_other_tokens_labels_order_or_number(qwen2):
    examples = [
        tokenize_rows(table(), qwen2, config()),
        tokenize_rows(table(), qwen2, config(train_on="all")),
        tokenize_rows(table(), qwen2, config(max_length=50)),
        tokenize_rows(table(), qwen2, config(system_prompt="Be kind.")),
        tokenize_rows(table().select([1, 0, 2]), qwen2, config()),
        tokenize_rows(table().select([0, 1]), qwen2, config()),
        tokenize_rows(table().select([]), qwen2, config()),
    ]
    assert len({example_.fingerprint for example_ in examples}) == len(examples)
