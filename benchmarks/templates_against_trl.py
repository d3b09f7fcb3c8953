"""Our targets beside those that TRL's chat templates tag, for each template and kind of conversation.

    python benchmarks/templates_against_trl.py --templates .../site-packages/trl/chat_templates

A template with {% generation %} tags is held to them: our targets are the tokens that transformers' own mask
marks. Its twin without tags (the same name without _training) is held to what the tags mark of each turn when
it is the last, less what the generation prompt gives and what stands behind the end of the turn. A template
without tags and without a twin must not be refused. What a template itself does not write cannot be trained
on: that it raises, or leaves out an answer, a tool call or an argument, is looked up in its own rendering.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.data.conversations import Conversation  # noqa: E402
from finetune.data.templates.chat_template import common_start, set_stop_ids, stop_ids, template_of  # noqa: E402
from finetune.data.templates.tokenize import IGNORE, Tokens, common_prefix, encode  # noqa: E402

TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What may be a token of its own in a template or in what it writes.
SPECIAL = re.compile(
    r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<\|[a-z_]+>|<[a-z_]+\|>|</?s>|<(?:start|end)_of_\w+>|\[/?INST\]"
)
# By the beginning of a template's name: BOS, EOS, and the other tokens of the model's generation config.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ()),
    "deepseek": ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>", ()),
    "diffusion_gemma": ("<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "gemma4": ("<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "gemma": ("<bos>", "<eos>", ("<end_of_turn>",)),
    "glm4moe": ("<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|observation|>")),
    "gptoss": ("<|startoftext|>", "<|return|>", ("<|call|>", "<|endoftext|>")),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>", ()),
    "lfm2": ("<|startoftext|>", "<|im_end|>", ()),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|eom_id|>", "<|end_of_text|>")),
    "llava_next": ("<s>", "</s>", ()),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>", ()),
    "nemotron": ("<s>", "<|im_end|>", ()),
    "phi3": ("<s>", "<|endoftext|>", ("<|end|>", "<|assistant|>")),
    "qwen": ("<|endoftext|>", "<|im_end|>", ("<|endoftext|>",)),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>", ()),
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def call(number: int, name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(number: int, name: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "name": name, "tool_call_id": f"call0000{number}", "content": text}


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {
        parameter: {"type": "string", "description": f"The {parameter}."} for parameter in parameters
    }
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": f"Answers {name}.", "parameters": schema},
    }


SYSTEM = {"role": "system", "content": "Be brief and kind."}
TOOLS = [tool("get_weather", "city", "day"), tool("get_time", "zone")]
WEATHER = call(1, "get_weather", city="Zürich", day='"Monday"')
TIME = call(2, "get_time", zone="CET")
CONVERSATIONS: dict[str, Conversation] = {
    "single": Conversation([user("What is it?"), answer("It is a coin.")]),
    "system": Conversation([SYSTEM, user("What is it?"), answer("It is a coin, “Ça” 💶.")]),
    "multi-turn": Conversation(
        [
            user("What is it?"),
            answer("It is a coin."),
            user("And now?"),
            answer("A note.\n\n1. Ten"),
            user("Why?"),
            answer("Because."),
        ]
    ),
    "repeated": Conversation(
        [
            user("What is it?"),
            answer("What is it?"),
            user("What is it?"),
            answer("What is it?"),
            user("?"),
            answer("What is it?"),
        ]
    ),
    "reasoning": Conversation([user("2 + 2?"), answer("It is 4.", reasoning_content="Two and two.\nFour.")]),
    "reasoning in turns": Conversation(
        [
            user("2 + 2?"),
            answer("It is 4.", reasoning_content="Two and two."),
            user("And 3 + 3?"),
            answer("It is 6.", reasoning_content="Three and three."),
        ]
    ),
    "tool call": Conversation([user("Weather?"), answer(None, tool_calls=[WEATHER])], TOOLS),
    "tool result": Conversation(
        [
            user("Weather?"),
            answer(None, tool_calls=[WEATHER]),
            result(1, "get_weather", '{"sun": true}'),
            answer("It is sunny."),
        ],
        TOOLS,
    ),
    "parallel calls": Conversation(
        [
            user("Weather and time?"),
            answer(None, tool_calls=[WEATHER, TIME]),
            result(1, "get_weather", "sunny"),
            result(2, "get_time", "noon"),
            answer("Sunny, at noon."),
        ],
        TOOLS,
    ),
    "content and call": Conversation(
        [
            user("Weather?"),
            answer("I shall look.", tool_calls=[WEATHER]),
            result(1, "get_weather", "sunny"),
            answer("It is sunny."),
            user("Thanks."),
            answer("At your service."),
        ],
        TOOLS,
    ),
    "reasoning and calls": Conversation(
        [
            SYSTEM,
            user("Weather?"),
            answer(None, reasoning_content="I must look.", tool_calls=[WEATHER]),
            result(1, "get_weather", "sunny"),
            answer("It is sunny.", reasoning_content="It said so."),
            user("Time?"),
            answer(None, reasoning_content="Look again.", tool_calls=[TIME]),
            result(2, "get_time", "noon"),
            answer("Noon.", reasoning_content="It said noon."),
        ],
        TOOLS,
    ),
}


class Outcome(NamedTuple):
    """What came of a conversation under a template: equal, refused by the template, or differing, and why."""

    kind: str
    why: str = ""


def family_of(name: str) -> tuple[str, str, tuple[str, ...]]:
    return next(family for prefix, family in FAMILIES.items() if name.startswith(prefix))


def make_tokenizer(name: str, source: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the template's special tokens."""
    bos, eos, others = family_of(name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    roles = (
        [f"<|{role}|>" for role in ("user", "assistant", "system", "tool")] if name.startswith("phi") else []
    )
    special = sorted({*SPECIAL.findall(source), *others, *roles} - {bos, eos})
    tokens = [AddedToken(token, special=True, normalized=False) for token in special]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = source
    set_stop_ids(tokenizer, tokenizer.convert_tokens_to_ids(list(others)))
    return tokenizer


def tagged_mask(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids, and 1 where the template tags them: transformers' own rendering, and its way from characters
    to tokens, of the messages as the template wants them."""
    [text], [spans] = render_jinja_template(
        conversations=[template_of(tokenizer, conversation.tools).prepare(conversation.messages)],
        tools=conversation.tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    encoded = tokenizer(text, add_special_tokens=False)
    mask = [0] * len(encoded["input_ids"])
    for start, end in spans:
        for token in range(encoded.char_to_token(start), encoded.char_to_token(end - 1) + 1):
            mask[token] = 1
    return encoded["input_ids"], mask


def runs(tokens: Tokens) -> list[list[int]]:
    """The targets of each turn."""
    found: list[list[int]] = []
    starts = {start for start, _ in tokens.branches}
    for t, label in enumerate(tokens.labels):
        if label == IGNORE:
            continue
        if t == 0 or tokens.labels[t - 1] == IGNORE or t in starts:
            found.append([])
        found[-1].append(label)
    return found


def part_of(conversation: Conversation, end: int) -> Conversation:
    return Conversation(conversation.messages[:end], conversation.tools, conversation.template_kwargs)


def expected_targets(tagged: Any, conversation: Conversation) -> Iterator[list[int]]:
    """What the tags mark of each assistant's turn when it is the last, less what the prompt gives of it."""
    template = template_of(tagged, conversation.tools)
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        text, spans = template.generation_spans(part_of(conversation, i + 1))
        other = replace(conversation, messages=[*conversation.messages[:i], altered(message)])
        own = len(common_start(text, template.render(other)))
        first = next(start for start, end in spans if end > own)
        prompt = template.render(part_of(conversation, i), add_generation_prompt=True)
        if text.startswith(prompt) and first < len(prompt):
            yield ids_of(tagged, text[len(prompt) : spans[-1][1]])
        else:
            yield less_prompt(
                tagged, conversation, i, ids_of(tagged, text[first : spans[-1][1]]), text[:first]
            )


def altered(message: dict[str, Any]) -> dict[str, Any]:
    """The same fields with other texts."""
    changed = dict(message)
    for name in ("content", "reasoning_content"):
        if changed.get(name):
            changed[name] = "\ue000"
    if calls := changed.get("tool_calls"):
        function = {"name": "\ue000", "arguments": {"\ue000": ""}}
        changed["tool_calls"] = [{**made, "function": function} for made in calls]
    return changed


def less_prompt(
    tokenizer: Any, conversation: Conversation, i: int, targets: list[int], before: str = ""
) -> list[int]:
    """The targets of turn `i` without what the generation prompt gives of it or, where it gives nothing
    behind a tool's turn, of others; `before` is the text before the targets."""
    template = template_of(tokenizer, conversation.tools)
    without = template.render(part_of(conversation, i))
    given = template.render(part_of(conversation, i), add_generation_prompt=True)
    if without == given:
        without, given, _ = template.examples
    asked = ids_of(tokenizer, given)
    asked = asked[len(common_prefix(ids_of(tokenizer, without), asked)) :]
    # The tags may begin within it.
    inside = next(k for k in range(len(asked), -1, -1) if before.endswith(tokenizer.decode(asked[:k])))
    return targets[len(common_prefix(asked[inside:], targets)) :]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def same(tokenizer: Any, ours: list[int], tagged: list[int]) -> bool:
    """Whether two turns' targets are the same up to the token at which generation stops. Tags may leave that
    token out, or reach over what stands behind it."""
    stops = stop_ids(tokenizer)
    first_stop = next((k for k, token in enumerate(tagged) if token in stops), None)
    if first_stop is None:
        return ours[:-1] == tagged or tokenizer.decode(ours).rstrip() == tokenizer.decode(tagged).rstrip()
    return ours == tagged[: first_stop + 1]


def lost(tokenizer: Any, conversation: Conversation) -> str:
    """What of an answer or a tool call the template itself does not write; empty if all is there."""
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        text = template_of(tokenizer, conversation.tools).render(part_of(conversation, i + 1))
        prompt = template_of(tokenizer, conversation.tools).render(part_of(conversation, i))
        own = text[len(prompt) - 20 :]
        if (message["content"] or "") not in own:
            return f"the answer of turn {i + 1}"
        for made in message.get("tool_calls", []):
            name, arguments = made["function"]["name"], made["function"]["arguments"]
            if name not in own or any(str(v) not in own.replace('\\"', '"') for v in arguments.values()):
                return f"the call of {name} in turn {i + 1}"
    return ""


def compare_tagged(tokenizer: Any, conversation: Conversation) -> Outcome:
    try:
        input_ids, mask = tagged_mask(tokenizer, conversation)
    except Exception as error:  # a template is a program
        return Outcome("refused", f"{error!s:.100}")
    try:
        tokens = encode(tokenizer, conversation, "completion")
    except ValueError as error:
        gone = lost(tokenizer, conversation)
        return Outcome("refused", f"leaves out {gone}") if gone else Outcome("differing", str(error))
    if tokens.input_ids != input_ids:
        return Outcome("differing", "other tokens")
    ours = [int(label != IGNORE) for label in tokens.labels]
    if ours == mask:
        return Outcome("equal")
    texts = [
        tokenizer.decode([i for i, m in zip(input_ids, which, strict=True) if m]) for which in (ours, mask)
    ]
    return Outcome("differing", f"{texts[0]!r}\n      tagged {texts[1]!r}")


def compare_twin(tokenizer: Any, tagged: Any | None, conversation: Conversation) -> Outcome:
    template = template_of(tokenizer, conversation.tools)
    try:
        for i in range(1, len(conversation.messages) + 1):
            if conversation.messages[i - 1]["role"] == "assistant":
                template.render(part_of(conversation, i))
    except ValueError as error:
        return Outcome("refused", str(error))
    try:
        tokens = encode(tokenizer, conversation, "completion")
    except ValueError as error:
        gone = lost(tokenizer, conversation)
        return Outcome("refused", f"leaves out {gone}") if gone else Outcome("differing", str(error))
    if tagged is None:
        return Outcome("equal")
    try:
        expected = list(expected_targets(tagged, conversation))
    except ValueError as error:
        return Outcome("refused", f"the tagged twin: {error}")
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    left = runs(tokens)
    texts = [[tokenizer.decode(targets) for targets in which] for which in (left, expected)]
    for i, marked in zip(turns, expected, strict=True):
        # The turns that are branches stand behind the others.
        found = (
            targets
            for targets in left
            if same(tokenizer, less_prompt(tokenizer, conversation, i, targets), marked)
        )
        if (targets := next(found, None)) is None:
            return Outcome("differing", f"turn {i + 1}: {texts[0]}\n      tagged {texts[1]}")
        left.remove(targets)
    return Outcome("differing", f"targets of no turn: {left}") if left else Outcome("equal")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--templates", type=Path, required=True, help="the folder of .jinja files")
    parser.add_argument("--verbose", action="store_true", help="say why each conversation is refused")
    arguments = parser.parse_args()
    sources = {
        path.stem: path.read_text(encoding="utf-8") for path in sorted(arguments.templates.glob("*.jinja"))
    }
    counts: Counter[str] = Counter()
    for name, source in sources.items():
        tokenizer = make_tokenizer(name, source)
        twin = sources.get(f"{name}_training")
        tagged = make_tokenizer(name, twin) if twin and TAG.search(twin) else None
        for kind, conversation in CONVERSATIONS.items():
            if TAG.search(source):
                outcome = compare_tagged(tokenizer, conversation)
            else:
                outcome = compare_twin(tokenizer, tagged, conversation)
            counts[outcome.kind] += 1
            if outcome.kind == "differing" or (arguments.verbose and outcome.why):
                print(f"{outcome.kind}: {name}, {kind}: {outcome.why}")
    print(
        f"{len(sources)} templates, {counts.total()} conversations: {counts['equal']} equal, "
        f"{counts['refused']} refused by the template, {counts['differing']} differing"
    )
    return 1 if counts["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
