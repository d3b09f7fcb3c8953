"""Generate answers to conversations with the trained model or its base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from finetune.config_checks import LARGEST_WHOLE_NUMBER
from finetune.data.conversations import Conversation, Message
from finetune.data.templates.chat_template import render, stop_ids
from finetune.data.templates.tokenize import IGNORE, encode
from finetune.model.prefix_cache import PrefixCache
from finetune.ops import quantized
from finetune.ops.quantized import dropout_off, frozen_weight
from finetune.runtime.accelerator import DTYPES


class Answer(NamedTuple):
    """A generated turn, as it was written: with its reasoning and its tool calls, and with special tokens in
    it, but without the one that ends it and without surrounding white space."""

    text: str
    num_tokens: int
    """Generated tokens, including the one that ends the turn"""
    ended: bool
    """Whether the model ended the turn, rather than the limit of tokens"""


class Sampler:
    """Adds noise to scores [B, V], so that their argmax is a sample from softmax(scores / temperature).

    This is the Gumbel-max trick. The noise of a sequence depends on its seed, not on the other sequences.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self._temperature = temperature
        # Apple's GPUs have no fp64.
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # In fp32, one number in 2^24 would be 0, and its token would always be chosen.
        noise = torch.empty(scores.shape, dtype=torch.float64, device=self._device)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        if noise.device != scores.device:
            return scores / self._temperature - noise.log().float().to(scores.device)
        return scores / self._temperature - noise.log()


def check_limits(temperature: float, max_new_tokens: int) -> None:
    """Raise ValueError if the temperature or the number of new tokens is out of range."""
    if not (temperature == 0 or 0.01 <= temperature <= 100):
        raise ValueError(f"temperature must be 0 (the likeliest token) or 0.01 to 100, not {temperature:g}")
    if not 1 <= max_new_tokens <= LARGEST_WHOLE_NUMBER:
        raise ValueError(f"the number of new tokens must be at least 1, not {max_new_tokens}")


def generate_answers(
    accelerator: Any,
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation | list[Message]],
    max_new_tokens: int = 48,
) -> list[Answer]:
    """Greedy answers to the last turn of each conversation, generated as one batch."""
    prompts = [encode_prompt(tokenizer, conversation) for conversation in conversations]
    return answer_prompts(accelerator, model, tokenizer, prompts, max_new_tokens)


def encode_prompt(tokenizer: Any, conversation: Conversation | list[Message]) -> list[int]:
    """Token ids of a conversation up to the start of the assistant's next turn, with the conversation's tools
    and arguments of the template; those of a plain text are the text's own.

    Raises:
        ValueError: there is no template, or it fails on these messages.
    """
    if isinstance(conversation, Conversation) and conversation.text is not None:
        text = conversation.text
    else:
        text = render(tokenizer, conversation, add_generation_prompt=True)
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def reference_answer(tokenizer: Any, conversation: Conversation) -> Answer:
    """The answer that is the last turn of a conversation, in the form that `answer_prompts` gives answers.

    Raises:
        ValueError: as `encode`.
    """
    tokens = encode(tokenizer, conversation, "completion")
    end = tokens.branches[0][0] if tokens.branches else len(tokens.input_ids)  # of the whole conversation
    while tokens.labels[end - 1] == IGNORE:
        end -= 1
    start = end
    while tokens.labels[start - 1] != IGNORE:
        start -= 1
    return _answer(tokenizer, tokens.input_ids[start:end], stop_ids(tokenizer))


def require_room(model: Any, num_tokens: int, max_new_tokens: int) -> None:
    """Raise ValueError if a prompt of `num_tokens` and its answer exceed the model's positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and num_tokens + max_new_tokens > positions:
        raise ValueError(
            f"the prompt has {num_tokens:,} tokens, which with an answer of up to {max_new_tokens:,} tokens "
            f"exceeds the model's limit of {positions:,}"
        )


@torch.no_grad()
def answer_prompts(
    accelerator: Any,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampler: Sampler | None = None,
    streamer: Any = None,
    prefix_cache: PrefixCache | None = None,
    stopping: StoppingCriteria | None = None,
) -> list[Answer]:
    """Answers to prompts (token ids), generated as one batch: greedy, or sampled by `sampler`.

    `model` is a model of transformers or PEFT, or a TokenLoss, as it must be for a sharded base.

    `streamer`, one of transformers' streamers, receives the tokens of a single prompt as they are generated,
    and `prefix_cache` keeps its keys and values. `stopping` sees all tokens [B, T] after each step, and says
    which answers [B] end there.
    """
    # Calling the tokenizer with padding would leave padding enabled in the tokenizer that the run saves.
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    inputs = padded.to(accelerator.device)
    ends = stop_ids(tokenizer)
    cache = None if prefix_cache is None else prefix_cache.start(prompts[0])
    with dropout_off(model), _dense_head_input(model), accelerator.autocast():
        tokens = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # some models come with a penalty of their own
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
            logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
            stopping_criteria=StoppingCriteriaList([] if stopping is None else [stopping]),
            streamer=streamer,
        )
    if prefix_cache is not None:
        prefix_cache.keep(tokens[0].tolist())
    return [_answer(tokenizer, row, ends) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]


@contextmanager
def _dense_head_input(model: Any) -> Iterator[None]:
    """Make the input of the head contiguous. It is a slice of the prompt's hidden states; for a slice, torch
    would copy the head's weight once for each sequence of the batch, which is hundreds of times the work."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _answer(tokenizer: Any, tokens: list[int], ends: frozenset[int]) -> Answer:
    """The answer in a sequence of generated tokens, which may be padded after its end."""
    end = next((index for index, token in enumerate(tokens) if token in ends), None)
    text: str = tokenizer.decode(tokens[:end], skip_special_tokens=False)
    return Answer(text.strip(), len(tokens) if end is None else end + 1, end is not None)


def multiply_dequantized(model: nn.Module, precision: str) -> None:
    """Have quantized layers multiply by their dequantized weights, as in training.

    On a CPU they are replaced by layers that hold these weights, because it would dequantize them again for
    each token. That takes twice (int8) or four times (nf4) the memory. A GPU has less, and dequantizes faster
    than it multiplies. `precision` is no, bf16 or fp16.
    """
    kinds = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, kinds) and layer.weight.device.type == "cpu":
                linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(frozen_weight(layer, DTYPES[precision]), requires_grad=False)
                linear.bias = layer.bias
                setattr(module, name, linear)
    quantized.enable(model)
