"""What the tokens of a conversation are: whose text, which are trained, and what max_length leaves."""

from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from finetune.data.conversations import Conversation
from finetune.data.templates.chat_template import render, stop_ids
from finetune.data.templates.targets import is_trained, up_to
from finetune.data.templates.tokenize import IGNORE, Tokens, cut, encode, trunk_text

# Whose text a token belongs to: the answers (with reasoning and tool calls), a turn of another role, a plain
# text, or what the chat template writes by itself.
ROLES = ("system", "user", "tool", "assistant", "text", "other", "template")
ROLE_OF = {"developer": "system", "function": "tool"}
_PLACEHOLDER = "placeholder"


class Anatomy(NamedTuple):
    """What the T tokens of a conversation are, not yet cut to any length: those that `encode` gives.

    `text` is that of the trunk, and `offsets` say where in it each of its tokens stands ([start, end)).
    `roles` [T] has a role of ROLES for each token, those of branches included. `ends_of_turn` has for each
    answer, in the order of the tokens, the index of the special token that ends it, None where none does.
    """

    tokens: Tokens
    text: str
    offsets: list[tuple[int, int]]
    roles: list[str]
    ends_of_turn: list[int | None]


def dissect(tokenizer: Any, conversation: Conversation, train_on: str) -> Anatomy:
    """Encode a conversation, and say of each token whose text it is.

    What the model has to write is the assistant's, but for the token that ends it, which is the template's.
    The text of another turn that the template rewrites counts as the template's too. A token that overlaps
    two turns is the assistant's if one of them is, as in `encode`.

    Raises:
        ValueError: as `encode`.
    """
    tokens = encode(tokenizer, conversation, train_on)
    if conversation.text is not None:
        return _of_plain_text(tokenizer, conversation.text, tokens)
    used = conversation if train_on == "all" else _up_to_last_answer(conversation)
    text = trunk_text(tokenizer, conversation, train_on)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    trunk_end = tokens.branches[0][0] if tokens.branches else len(tokens.input_ids)
    assert encoded["input_ids"] == tokens.input_ids[:trunk_end]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= stop_ids(tokenizer)
    roles = _roles_of_turns(tokenizer, used, text, encoded["input_ids"], offsets, special)
    roles += ["template"] * (len(tokens.input_ids) - trunk_end)
    answers = tokens if train_on == "completion" else _answers_within(tokenizer, conversation, tokens)
    ends_of_turn: list[int | None] = []
    for first, last in _runs(answers):
        has_end = tokens.input_ids[last] in special
        ends_of_turn.append(last if has_end else None)
        roles[first : last + 1] = ["assistant"] * (last + 1 - first)
        if has_end:
            roles[last] = "template"
    if train_on == "all" and not ends_of_turn:
        ends_of_turn = [None] * sum(message["role"] == "assistant" for message in used.messages)
    return Anatomy(tokens, text, offsets, roles, ends_of_turn)


def _up_to_last_answer(conversation: Conversation) -> Conversation:
    trained = [turn for turn, message in enumerate(conversation.messages) if is_trained(message)]
    return up_to(conversation, trained[-1] + 1) if trained else conversation


def _answers_within(tokenizer: Any, conversation: Conversation, tokens: Tokens) -> Tokens:
    """Of a conversation every token of which is trained, those that are the answers, as far as the template
    lets them be told apart."""
    try:
        answers = encode(tokenizer, conversation, "completion")
    except ValueError:  # it rewrites an answer, or ends none
        return Tokens([], [])
    end = answers.branches[0][0] if answers.branches else len(answers.input_ids)
    is_within = answers.input_ids[:end] == tokens.input_ids[:end]
    return Tokens(answers.input_ids[:end], answers.labels[:end]) if is_within else Tokens([], [])


def _of_plain_text(tokenizer: Any, text: str, tokens: Tokens) -> Anatomy:
    offsets: list[tuple[int, int]] = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) < len(tokens.input_ids):  # `encode` has added the EOS
        offsets = [*offsets, (len(text), len(text) + len(tokenizer.eos_token))]
        text += tokenizer.eos_token
    return Anatomy(tokens, text, offsets, ["text"] * len(tokens.input_ids), [])


def _roles_of_turns(
    tokenizer: Any,
    conversation: Conversation,
    text: str,
    input_ids: list[int],
    offsets: list[tuple[int, int]],
    special: set[int],
) -> list[str]:
    """The roles of the tokens by the texts of the turns; all others are the template's.

    A token that overlaps a text belongs to it. The exception is a special token of the template that absorbs
    white space (lstrip or rstrip).
    """
    roles = ["template"] * len(input_ids)
    rendered = render(tokenizer, conversation)
    by_role = sorted(
        range(len(conversation.messages)), key=lambda turn: conversation.messages[turn]["role"] == "assistant"
    )
    for turn in by_role:
        span = _turn_span(tokenizer, conversation, rendered, turn)
        span = span and _place_in(text, rendered, *span)
        if span is None:
            continue
        role = conversation.messages[turn]["role"]
        role = ROLE_OF.get(role, role)
        for position, (first, last) in enumerate(offsets):
            if (
                first < span[1]
                and last > span[0]
                and not (first < span[0] and input_ids[position] in special)
            ):
                roles[position] = role if role in ROLES else "other"
    return roles


def _turn_span(tokenizer: Any, conversation: Conversation, text: str, turn: int) -> tuple[int, int] | None:
    """Where in the rendered text the content of a turn stands: [start, end). None if the template changed it.

    The text before and after a placeholder in its place is the template's, that in between is the turn's.
    """
    message = conversation.messages[turn]
    if not message["content"]:
        return None
    messages = list(conversation.messages)
    messages[turn] = {**message, "content": _PLACEHOLDER}
    try:
        replaced = render(tokenizer, replace(conversation, messages=messages))
    except ValueError:  # a template that inspects a turn and rejects the placeholder
        return None
    before, found, after = replaced.partition(_PLACEHOLDER)
    start, end = len(before), len(text) - len(after)
    is_there = (
        found
        and _PLACEHOLDER not in after
        and start <= end
        and text.startswith(before)
        and text.endswith(after)
        and text[start:end].strip() == message["content"].strip()
    )
    return (start, end) if is_there else None


def _runs(tokens: Tokens) -> list[tuple[int, int]]:
    """The first and the last position of each run of targets in the trunk or in one branch."""
    starts = {start for start, _ in tokens.branches}
    runs: list[tuple[int, int]] = []
    for position, label in enumerate(tokens.labels):
        if label == IGNORE:
            continue
        if runs and runs[-1][1] == position - 1 and position not in starts:
            runs[-1] = (runs[-1][0], position)
        else:
            runs.append((position, position))
    return runs


def _place_in(text: str, rendered: str, start: int, end: int) -> tuple[int, int] | None:
    """Where what the rendered conversation has in [start, end) stands in the text of the trunk, which begins
    or ends as it does."""
    if text.startswith(rendered[:end]):
        return start, end
    moved = len(text) - len(rendered)
    return (start + moved, end + moved) if text.endswith(rendered[start:]) else None


class Kept(NamedTuple):
    """What max_length leaves of the T tokens of a row.

    `in_example` [T] are those of which an example holds one, `trained` [T] those that are targets there.
    `examples` are those of the row, with positions among its tokens instead of token ids.
    """

    in_example: list[bool]
    trained: list[bool]
    examples: list[Tokens]


def keep(tokens: Tokens, max_length: int) -> Kept:
    """What `cut` leaves of a row, without the examples that have no target."""
    positions = tokens._replace(input_ids=list(range(len(tokens.input_ids))))
    in_example, trained = ([False] * len(tokens.input_ids) for _ in range(2))
    examples: list[Tokens] = []
    for piece in cut(positions, max_length):
        if all(label == IGNORE for label in piece.labels):
            continue
        examples.append(piece)
        for position, label in zip(piece.input_ids, piece.labels, strict=True):
            in_example[position] = True
            trained[position] = trained[position] or label != IGNORE
    return Kept(in_example, trained, examples)


class Segment(NamedTuple):
    """Adjacent tokens of one kind. `role` is one of ROLES; what max_length cuts is not `kept`."""

    text: str
    role: str
    trained: bool
    kept: bool


class Part(NamedTuple):
    """The conversation of a row, or a branch of it: `segments` behind `context`, what of the conversation the
    branch sees ("" of the conversation itself)."""

    segments: list[Segment]
    context: str = ""
    num_context_tokens: int = 0


def parts_of(tokenizer: Any, anatomy: Anatomy, kept: Kept) -> list[Part]:
    """The conversation and then each branch, in segments of one role, trained on or not at all."""
    tokens = anatomy.tokens
    bounds = [*(start for start, _ in tokens.branches), len(tokens.input_ids)]
    kinds = list(zip(anatomy.roles, kept.trained, kept.in_example, strict=True))

    def starts_of_runs(start: int, end: int) -> list[int]:
        return [next(run) for _, run in groupby(range(start, end), key=kinds.__getitem__)]

    starts = starts_of_runs(0, bounds[0])
    places = [0, *(anatomy.offsets[position][0] for position in starts[1:]), len(anatomy.text)]
    texts = [anatomy.text[start:end] for start, end in pairwise(places)]
    parts = [Part(_segments(texts, starts, kinds))]
    for (start, attach), end in zip(tokens.branches, bounds[1:], strict=True):
        starts = starts_of_runs(start, end)
        texts = _decoded(tokenizer, tokens.input_ids[start:end], [position - start for position in starts])
        context_end = anatomy.offsets[attach][0] if attach < bounds[0] else len(anatomy.text)
        parts.append(Part(_segments(texts, starts, kinds), anatomy.text[:context_end], attach))
    return parts


def _segments(texts: list[str], starts: list[int], kinds: list[tuple[str, bool, bool]]) -> list[Segment]:
    return [Segment(text, *kinds[start]) for text, start in zip(texts, starts, strict=True) if text]


def _decoded(tokenizer: Any, input_ids: list[int], starts: list[int]) -> list[str]:
    """The text of tokens in the pieces that begin at `starts`."""

    def decode(end: int) -> str:
        text: str = tokenizer.decode(input_ids[:end], clean_up_tokenization_spaces=False)
        return text

    text = decode(len(input_ids))
    lengths = [*(len(decode(start)) for start in starts[1:]), len(text)]
    return [text[start:end] for start, end in zip([0, *lengths], lengths, strict=False)]
