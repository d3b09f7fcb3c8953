"""From a row to messages, and through the model's chat template to `input_ids` and `labels`: the loss mask.

The loss mask is found by character positions. The conversation is rendered once as it is, and once for each
assistant turn with that turn's text replaced by a placeholder: the text before and after the placeholder is
the template's, the text in between in the real rendering is the assistant's. The mask is therefore right for
any template, including those whose prompt is not a prefix of the whole conversation.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset
from jinja2 import TemplateSyntaxError
from numpy.typing import NDArray

from finetune.config import DataConfig

IGNORE = -100  # the label of a token without loss, as everywhere in PyTorch
# Whose text a token belongs to: a turn of that role, of any other role, or the template.
ROLES = ("system", "user", "assistant", "other", "template")
MIN_SHARED = 8  # tokens; a shorter prefix is not worth sharing
CACHE_VERSION = 1  # incremented when the same row would yield other tokens or labels than before

Message = dict[str, str]


class Tokens(NamedTuple):
    """One example: `labels[t]` is `input_ids[t]` where the token is a target, else IGNORE."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Examples:
    """Tokenized rows that fit, and what happened to the others.

    `dataset` has the columns input_ids, labels, row_number. Of its examples, those of the rows `truncated`
    were cut at max_length; `dropped` are the numbers of the rows left out, by reason. `source_names` are
    those of the sources and eval sets of all rows read, each different.
    """

    dataset: Dataset
    truncated: list[int]
    dropped: dict[str, list[int]]
    source_names: list[str] = field(default_factory=lambda: ["data"])

    @cached_property
    def sources(self) -> NDArray[np.int32]:
        """[N]: the source of each example, as its place in `source_names`."""
        if "source" not in self.dataset.column_names:
            return np.zeros(len(self.dataset), dtype=np.int32)
        return np.array(self.dataset["source"], dtype=np.int32)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N]: tokens of each example."""
        return np.array([len(row) for row in self.dataset["input_ids"]], dtype=np.int64)

    @cached_property
    def target_counts(self) -> NDArray[np.int64]:
        """[N]: target tokens of each example."""
        counts = [sum(label != IGNORE for label in row) for row in self.dataset["labels"]]
        return np.array(counts, dtype=np.int64)

    @cached_property
    def shared_prefix(self) -> int:
        """Tokens that all examples begin with and that predict no target; 0 if below MIN_SHARED."""
        if len(self.dataset) == 0:
            return 0
        prefix: list[int] = self.dataset[0]["input_ids"]
        for input_ids, labels in zip(self.dataset["input_ids"], self.dataset["labels"], strict=True):
            # The last shared token predicts the first one that is not, so that must not be a target either.
            prefix = common_prefix(prefix, input_ids[: max(0, first_target(labels) - 1)])
            if not prefix:
                break
        return len(prefix) if len(prefix) >= MIN_SHARED else 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all token ids and labels, in order."""
        return _digest(self.dataset.select_columns(["input_ids", "labels"]))


def common_prefix(first: list[int], second: list[int]) -> list[int]:
    """What both lists begin with."""
    if first == second[: len(first)]:
        return first
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def first_target(labels: Sequence[int]) -> int:
    """The position of the first target; the length if there is none."""
    return next((position for position, label in enumerate(labels) if label != IGNORE), len(labels))


def to_messages(row: Mapping[str, Any], system_prompt: str | None) -> list[Message]:
    """A row of any format as chat messages.

    The user turn of an Alpaca row is its instruction and, when there is an input, a second line ` Context:`
    with it. The system prompt goes before rows that have no system turn of their own.
    """
    if "messages" in row:
        messages = [{"role": m["role"], "content": m["content"] or ""} for m in row["messages"]]
    elif "completion" in row:
        messages = _turns(row["prompt"], row["completion"])
    else:
        context = row["input"] or ""
        user = f"{row['instruction']}\n Context:{context}" if context.strip() else row["instruction"]
        messages = _turns(user, row["output"])
    if system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _turns(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def encode(tokenizer: Any, messages: list[Message], train_on: str) -> Tokens:
    """Token ids and labels of a conversation, not yet cut to any length.

    `train_on="completion"`: the text of every assistant turn and the special token that ends it are
    targets. `train_on="all"`: every token is. The first token is never one, since nothing predicts it.

    Raises:
        ValueError: the template fails on these messages, rewrites an answer, or ends an assistant's turn
            with no special token (a model trained so would never stop).
    """
    messages = _in_use(messages, train_on)
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids: list[int] = encoded["input_ids"]
    if train_on == "all":
        return Tokens(input_ids, [IGNORE, *input_ids[1:]])
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    labels = [IGNORE] * len(input_ids)
    special = _special_ids(tokenizer)
    for start, end in assistant_spans(tokenizer, messages, text):
        inside = _tokens_inside(special, input_ids, offsets, start, end)
        stop = _end_of_turn(special, text, input_ids, offsets, end)
        if stop is None:
            raise ValueError(
                "the chat template ends an assistant's turn with no special token, so the model would not "
                "learn to stop; use a chat template that writes an end-of-turn token, or data.train_on all"
            )
        for i in range(inside[0] if inside else stop, stop + 1):
            labels[i] = input_ids[i]
    labels[0] = IGNORE
    return Tokens(input_ids, labels)


def render(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as the chat template renders it."""
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is wrong in its line {error.lineno}: {error}") from error
    except Exception as error:  # a template is a program: it can fail in every way that one can
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the turns {roles}: {error!s:.200}") from error
    return text


def assistant_spans(tokenizer: Any, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Where in `text`, the rendered messages, the text of each assistant turn stands: [start, end)."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = turn_span(tokenizer, messages, text, turn)
        if span is None:
            raise ValueError(
                f"the chat template does not render the assistant's text as it is (turn {turn + 1}), "
                "so the tokens to train on cannot be told; use another chat template or data.train_on all"
            )
        spans.append(span)
    return spans


def turn_span(tokenizer: Any, messages: list[Message], text: str, turn: int) -> tuple[int, int] | None:
    """Where in `text`, the rendered messages, the text of one turn stands: [start, end).

    None where the template does not write it once and as it is, but for white space around it.
    """
    placeholder = "placeholder"
    while placeholder in text:
        placeholder += "-"
    message = messages[turn]
    probe = [*messages[:turn], {**message, "content": placeholder}, *messages[turn + 1 :]]
    before, found, after = render(tokenizer, probe).partition(placeholder)
    start, end = len(before), len(text) - len(after)
    if (
        not found
        or placeholder in after
        or start > end
        or not (text.startswith(before) and text.endswith(after))
        or text[start:end].strip() != message["content"].strip()
    ):
        return None
    return start, end


class Anatomy(NamedTuple):
    """What the T tokens of a conversation are, not yet cut to any length: those that `encode` gives.

    `text` is the conversation as the template writes it, `offsets` [T] where in it each token stands
    ([start, end)), `roles` [T] whose text it is: a role of ROLES. `ends_of_turn` has for each assistant turn
    the index of the special token that ends it, None where none does.
    """

    text: str
    offsets: list[tuple[int, int]]
    roles: list[str]
    ends_of_turn: list[int | None]


def dissect(tokenizer: Any, messages: list[Message], train_on: str) -> Anatomy:
    """Classify the tokens of a conversation by the role of the turn they belong to.

    The text of a turn that the template rewrites counts as the template's. A token that overlaps two turns
    is the assistant's if one of them is, as in `encode`.

    Raises:
        ValueError: the template fails on these messages.
    """
    messages = _in_use(messages, train_on)
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    special = _special_ids(tokenizer)
    roles = ["template"] * len(input_ids)
    ends_of_turn: list[int | None] = []
    for turn in sorted(range(len(messages)), key=lambda turn: messages[turn]["role"] == "assistant"):
        role = messages[turn]["role"]
        try:
            span = turn_span(tokenizer, messages, text, turn)
        except ValueError:  # a template that inspects a turn and rejects the placeholder
            span = None
        if span is not None:
            for i in _tokens_inside(special, input_ids, offsets, *span):
                roles[i] = role if role in ROLES else "other"
        if role == "assistant":
            ends_of_turn.append(span and _end_of_turn(special, text, input_ids, offsets, span[1]))
    return Anatomy(text, offsets, roles, ends_of_turn)


def _in_use(messages: list[Message], train_on: str) -> list[Message]:
    """The messages without those after the last answer, which are never targets."""
    if train_on == "all":
        return messages
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    return messages[: last + 1]


def _special_ids(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _tokens_inside(
    special: set[int], input_ids: list[int], offsets: list[tuple[int, int]], start: int, end: int
) -> list[int]:
    """Indices of the tokens of the text [start, end).

    A token that overlaps it belongs to it, so that no part of an answer is left untrained. The exception is
    a special token of the template that absorbs white space (lstrip or rstrip).
    """
    return [
        i
        for i, (first, last) in enumerate(offsets)
        if first < end and last > start and not (first < start and input_ids[i] in special)
    ]


def _end_of_turn(
    special: set[int], text: str, input_ids: list[int], offsets: list[tuple[int, int]], end: int
) -> int | None:
    """Index of the special token that ends the turn whose text ends at `end`; None if there is none.

    Only white space may stand before it.
    """
    for i, (first, last) in enumerate(offsets):
        if last <= end:
            continue
        if input_ids[i] in special:
            return i
        if text[max(first, end) : last].strip():
            break
    return None


def tokenize_rows(rows: Dataset, tokenizer: Any, config: DataConfig) -> Examples:
    """Encode every row, truncate or drop the overlong ones, and drop those without a target token.

    The tokens are memory-mapped from the cache of `datasets`, which the first call writes.

    Raises:
        ValueError: no chat template, or a row that `encode` refuses (named by its number).
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the model's tokenizer has no chat template; take the model's instruct or chat version, or add "
            "a chat_template.jinja to a local copy of its folder"
        )
    if len(rows) == 0:
        return Examples(Dataset.from_dict({"input_ids": [], "labels": [], "row_number": []}), [], {})

    def encode_row(row: dict[str, Any]) -> dict[str, Any]:
        try:
            tokens = encode(tokenizer, to_messages(row, config.system_prompt), config.train_on)
        except ValueError as error:
            raise ValueError(f"row {row['row_number']}: {error}") from error
        cut = slice(config.max_length)
        return {
            "input_ids": tokens.input_ids[cut],
            "labels": tokens.labels[cut],
            "row_number": row["row_number"],
            "num_tokens": len(tokens.input_ids),
        }

    key = _cache_key(rows, tokenizer, config)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "finetune"
    folder.mkdir(parents=True, exist_ok=True)
    encoded = rows.map(
        encode_row,
        remove_columns=[column for column in rows.column_names if column != "row_number"],
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
    )
    reasons = [
        f"over {config.max_length} tokens"
        if config.overlong == "drop" and row["num_tokens"] > config.max_length
        else "without a target token"
        if all(label == IGNORE for label in row["labels"])
        else None
        for row in encoded
    ]
    kept = encoded.select([i for i, reason in enumerate(reasons) if reason is None])
    dropped: dict[str, list[int]] = defaultdict(list)
    for number, reason in zip(encoded["row_number"], reasons, strict=True):
        if reason is not None:
            dropped[reason].append(number)
    return Examples(
        dataset=kept.remove_columns("num_tokens"),
        truncated=[row["row_number"] for row in kept if row["num_tokens"] > config.max_length],
        dropped=dict(dropped),
    )


def _cache_key(rows: Dataset, tokenizer: Any, config: DataConfig) -> str:
    """A key of all that the tokens depend on: rows, tokenizer, chat template, settings, this code."""
    settings = {
        "version": CACHE_VERSION,
        "rows": _digest(rows),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "system_prompt": config.system_prompt,
        "max_length": config.max_length,
        "train_on": config.train_on,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _digest(table: Dataset) -> str:
    digest = hashlib.sha256()
    for row in table:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()
