"""Answers to conversations, by the trained model or its base."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from finetune.chat import Message, render
from finetune.model import dropout_off


class Answer(NamedTuple):
    """A generated turn, without special tokens and white space around it."""

    text: str
    num_tokens: int
    """Generated, the one that ends the turn included"""
    ended: bool
    """By itself, not at the limit of tokens"""


@torch.no_grad()
def generate_answers(
    accelerator: Any,
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Message]],
    max_new_tokens: int = 48,
) -> list[Answer]:
    """The likeliest answer (greedy) to the last turn of each conversation, all as one batch."""
    prompts = [render(tokenizer, messages, add_generation_prompt=True) for messages in conversations]
    # Padded apart: a call with padding would leave it switched on in the tokenizer that the run saves.
    encoded = tokenizer(prompts, add_special_tokens=False)
    inputs = tokenizer.pad(encoded, padding_side="left", return_tensors="pt").to(accelerator.device)
    ends = end_tokens(model, tokenizer)
    with dropout_off(model), accelerator.autocast():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # some models bring one of their own
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends),
        )
    return [_answer(tokenizer, row, ends) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's EOS, and those that the model brings."""
    ends = model.generation_config.eos_token_id
    several = ends if isinstance(ends, list) else [ends]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}


def _answer(tokenizer: Any, tokens: list[int], ends: set[int]) -> Answer:
    """Of a row of generated tokens, which is padded behind its end."""
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    own = tokens if end is None else tokens[: end + 1]
    text: str = tokenizer.decode(own, skip_special_tokens=True)
    return Answer(text.strip(), len(own), end is not None)
