"""Evaluation: exact token-weighted means over all eval examples, and a few answers to read."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from datasets import Dataset

from finetune.batching import MicroBatch
from finetune.chat import Message, render, to_messages
from finetune.loss import TokenLoss
from finetune.metrics import Metrics, SumWindow


@torch.no_grad()
def evaluate(accelerator: Any, token_loss: TokenLoss, batches: Iterable[MicroBatch]) -> Metrics:
    """The metrics of all examples of all processes, with dropout off.

    `token_loss` is the module itself, not its DDP wrapper: processes may have different numbers of batches.
    """
    window = SumWindow(accelerator.device)
    with dropout_off(token_loss):
        for batch in batches:
            with accelerator.autocast():
                window.add(token_loss(batch))
    return window.reduce(accelerator)


@contextmanager
def dropout_off(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, with the int8 layers computing as they do in training.

    bitsandbytes' int8 layers look at the mode too: on a CPU they dequantise their weights in training and
    quantise the activations as well in evaluation, which is many times slower and not the trained function.
    """
    was_training = model.training
    model.eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.train()
    try:
        yield
    finally:
        model.train(was_training)


def pick_conversations(rows: Dataset, system_prompt: str | None, count: int = 3) -> list[list[Message]]:
    """The first eval rows up to their last assistant turn: what the model is asked before and after."""
    conversations = []
    for row in rows.select(range(min(count, len(rows)))):
        messages = to_messages(row, system_prompt)
        last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
        conversations.append(messages[:last])
    return conversations


@torch.no_grad()
def generate_answers(
    accelerator: Any,
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Message]],
    max_new_tokens: int = 48,
) -> list[str]:
    """The likeliest answer (greedy) to the last turn of each conversation, cut at `max_new_tokens`."""
    prompts = [render(tokenizer, messages, add_generation_prompt=True) for messages in conversations]
    # Padded apart: a call with padding would leave it switched on in the tokenizer that the run saves.
    encoded = tokenizer(prompts, add_special_tokens=False)
    inputs = tokenizer.pad(encoded, padding_side="left", return_tensors="pt").to(accelerator.device)
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
        )
    answers: list[str] = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]
