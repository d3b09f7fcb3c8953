"""From a conversation, through the model's chat template, to token ids and labels: the loss mask."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from finetune.data.conversations import Conversation, Message
from finetune.data.templates.chat_template import as_conversation, stop_ids, template_of
from finetune.data.templates.targets import StopTokens, Text, find_tagged, find_targets, is_trained, up_to

IGNORE = -100  # the label of a token without loss, as everywhere in PyTorch


class Tokens(NamedTuple):
    """One example: `labels[t]` is `input_ids[t]` where the token is a target, else IGNORE.

    The tokens before the first of the `branches` are the trunk: the whole conversation, as the chat template
    renders it. A branch (start, attach) is an earlier answer as the model writes it, where the trunk renders
    it otherwise: the tokens from `start` to the next branch or the end go on behind the first `attach`
    tokens, and see nothing else of the trunk and of other branches.
    """

    input_ids: list[int]
    labels: list[int]
    branches: tuple[tuple[int, int], ...] = ()
    remarks: tuple[str, ...] = ()
    """What the chat template did with the row, such as "reasoning_content is not written" """
    is_text: bool = False
    """Whether it is a plain text, of which a part is as good as the whole"""


def common_prefix(first: list[int], second: list[int]) -> list[int]:
    """What both lists begin with."""
    if first == second[: len(first)]:
        return first
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]


def first_target(labels: Sequence[int]) -> int:
    """The position of the first target; the length if there is none."""
    return next((position for position, label in enumerate(labels) if label != IGNORE), len(labels))


def encode(tokenizer: Any, conversation: Conversation | Sequence[Message], train_on: str) -> Tokens:
    """Token ids and labels of a conversation, not yet cut to any length.

    `train_on="completion"`: the targets are what the model has to write. With {% generation %} tags in the
    template they are the tagged tokens, else of each assistant turn all from the end of the generation prompt
    to the token at which generation stops. Of a turn with `train: False` nothing is. `train_on="all"`: every
    token is a target, as of a plain text. The first token is never one, since nothing predicts it.

    Raises:
        ValueError: no template, or it fails on this conversation, drops or rewrites an answer, or ends an
            assistant's turn with no special token (a model trained so would never stop).
    """
    [tokens] = encode_batch(tokenizer, [conversation], train_on)
    if isinstance(tokens, ValueError):
        raise tokens
    return tokens


def trunk_text(tokenizer: Any, conversation: Conversation, train_on: str) -> str:
    """The text whose tokens are the trunk that `encode` gives of a conversation with messages.

    It is not always what the template renders of the conversation: what the model writes last stands behind
    the prompt that asks for it, and ends with the token at which generation stops.

    Raises:
        ValueError: as `encode`.
    """
    stops = StopTokens(tokenizer, stop_ids(tokenizer))
    return _plan(tokenizer, conversation, train_on, stops).texts[0].text


def encode_batch(
    tokenizer: Any, conversations: Sequence[Conversation | Sequence[Message]], train_on: str
) -> list[Tokens | ValueError]:
    """`encode` of several conversations, with one call of the tokenizer; its error where it raises one."""
    stops = StopTokens(tokenizer, stop_ids(tokenizer))
    plans: list[_Plan | ValueError] = []
    for conversation in map(as_conversation, conversations):
        try:
            plans.append(_plan(tokenizer, conversation, train_on, stops))
        except ValueError as error:
            plans.append(error)
    made = [plan for plan in plans if isinstance(plan, _Plan)]
    chats = [text.text for plan in made if plan.kind != "text" for text in plan.texts]
    plain = [text.text for plan in made if plan.kind == "text" for text in plan.texts]
    chat_encodings = iter(_encodings(tokenizer, chats, add_special_tokens=False))
    plain_encodings = iter(_encodings(tokenizer, plain, add_special_tokens=True))
    results: list[Tokens | ValueError] = []
    for plan in plans:
        if isinstance(plan, ValueError):
            results.append(plan)
        elif plan.kind == "text":
            results.append(_plain_tokens(tokenizer, next(plain_encodings).ids))
        else:
            results.append(_assemble(plan, [next(chat_encodings) for _ in plan.texts], stops.special))
    return results


class _Plan(NamedTuple):
    """What is to be tokenized of a conversation: its texts, the trunk's first, and their targets."""

    texts: list[Text]
    kind: Literal["found", "tagged", "all", "text"]
    remarks: list[str]


def _plan(tokenizer: Any, conversation: Conversation, train_on: str, stops: StopTokens) -> _Plan:
    if conversation.text is not None:
        return _Plan([Text(conversation.text)], "text", [])
    template = template_of(tokenizer, conversation.tools)
    if train_on == "all":
        return _Plan([Text(template.render(conversation))], "all", [])
    conversation = _in_use(conversation)
    if not any(map(is_trained, conversation.messages)):
        return _Plan([Text(template.render(conversation))], "found", [])
    if template.is_tagged:
        texts, remarks = find_tagged(template, conversation)
        return _Plan(texts, "tagged", remarks)
    texts, remarks = find_targets(template, conversation, stops)
    return _Plan(texts, "found", remarks)


def _in_use(conversation: Conversation) -> Conversation:
    """The conversation without the turns after the last trained answer, which are never targets."""
    trained = [i for i, message in enumerate(conversation.messages) if is_trained(message)]
    return up_to(conversation, trained[-1] + 1) if trained else conversation


def _encodings(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> list[Any]:
    """The texts as `tokenizers` encodes them: ids, and which characters each token stands for."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    encodings: list[Any] = encoded.encodings
    return encodings


def _plain_tokens(tokenizer: Any, input_ids: list[int]) -> Tokens:
    """A plain text with what the tokenizer puts around it, and the EOS behind it."""
    if tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids = [*input_ids, tokenizer.eos_token_id]
    return Tokens(input_ids, [IGNORE, *input_ids[1:]], is_text=True)


def _assemble(plan: _Plan, encodings: list[Any], special: frozenset[int]) -> Tokens:
    """One example of the encoded texts: the trunk, and the others behind it as branches."""
    input_ids: list[int] = encodings[0].ids
    if plan.kind == "all":
        return Tokens(input_ids, [IGNORE, *input_ids[1:]])
    trunk, labels = input_ids, _labels(plan, 0, encodings[0], special)
    branches = []
    for number, encoding in enumerate(encodings[1:], 1):
        ids, own_labels = encoding.ids, _labels(plan, number, encoding, special)
        end = max(t for t, label in enumerate(own_labels) if label != IGNORE) + 1
        attach = len(common_prefix(ids[: first_target(own_labels)], trunk))
        branches.append((len(input_ids), attach))
        input_ids, labels = input_ids + ids[attach:end], labels + own_labels[attach:end]
    return Tokens(input_ids, labels, tuple(branches), tuple(dict.fromkeys(plan.remarks)))


def _labels(plan: _Plan, number: int, encoding: Any, special: frozenset[int]) -> list[int]:
    """The labels of one text's tokens.

    A token that reaches into a span belongs to it, so that no part of an answer is left untrained. The
    exception is a special token of the template that absorbs the white space behind it. A tokenizer may leave
    out characters at either end, such as line breaks.
    """
    ids: list[int] = encoding.ids
    labels = [IGNORE] * len(ids)
    for start, last in plan.texts[number].spans:
        first, end = (
            next((token for token in map(encoding.char_to_token, places) if token is not None), None)
            for places in (range(start, last + 1), range(last, start - 1, -1))
        )
        if first is None or end is None:
            continue
        if (
            plan.kind == "found"
            and first < end
            and ids[first] in special
            and encoding.token_to_chars(first)[0] < start
        ):
            first += 1
        labels[first : end + 1] = ids[first : end + 1]
    labels[:1] = [IGNORE] * len(labels[:1])
    return labels


def cut(tokens: Tokens, max_length: int) -> list[Tokens]:
    """Examples of at most `max_length` tokens, branches included.

    A plain text becomes consecutive pieces. A conversation is cut at its end; branches that have no room
    beside the trunk become examples of their own, with the part of the trunk that they need, untrained. A
    branch that is alone too long is cut at its end too.
    """
    if len(tokens.input_ids) <= max_length:
        return [tokens]
    if tokens.is_text:
        return _pieces(tokens, max_length)
    trunk_end = tokens.branches[0][0] if tokens.branches else len(tokens.input_ids)
    ends = [start for start, _ in tokens.branches[1:]] + [len(tokens.input_ids)]
    group: list[_Branch] = []
    context, holds_trunk, examples = trunk_end, True, []
    for (start, attach), end in zip(tokens.branches, ends, strict=False):
        length = sum(branch.end - branch.start for branch in group)
        if max(context, attach) + length + end - start > max_length:
            examples.append(_part(tokens, context, group, holds_trunk))
            group, context, holds_trunk = [], 0, False
        context = max(context, attach)
        group.append(_Branch(start, end, attach))
    examples.append(_part(tokens, context, group, holds_trunk))
    cut_examples = [_shortened(example, max_length) for example in examples if example.input_ids]
    first, *others = cut_examples
    return [first, *(other for other in others if first_target(other.labels) < len(other.labels))]


class _Branch(NamedTuple):
    start: int
    end: int
    attach: int


def _part(tokens: Tokens, context: int, group: list[_Branch], holds_trunk: bool) -> Tokens:
    """The first `context` tokens of the trunk, trained or not, and some of the branches."""
    input_ids = tokens.input_ids[:context]
    labels = tokens.labels[:context] if holds_trunk else [IGNORE] * context
    branches = []
    for start, end, attach in group:
        branches.append((len(input_ids), attach))
        input_ids, labels = input_ids + tokens.input_ids[start:end], labels + tokens.labels[start:end]
    is_line = len(group) == 1 and not holds_trunk
    return Tokens(input_ids, labels, () if is_line else tuple(branches), tokens.remarks)


def _shortened(tokens: Tokens, max_length: int) -> Tokens:
    """The first `max_length` tokens: only an example without branches is ever longer."""
    return tokens._replace(input_ids=tokens.input_ids[:max_length], labels=tokens.labels[:max_length])


def _pieces(tokens: Tokens, max_length: int) -> list[Tokens]:
    """Consecutive pieces of a plain text. Each begins with the last token of the one before, which predicts
    its first target: so every token but the text's first is a target once."""
    pieces = []
    for start in range(0, len(tokens.input_ids) - 1, max_length - 1):
        input_ids = tokens.input_ids[start : start + max_length]
        pieces.append(Tokens(input_ids, [IGNORE, *input_ids[1:]], is_text=True))
    return pieces
