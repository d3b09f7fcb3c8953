"""Evaluation: exact token-weighted means over all eval examples, and a few answers to read."""

from collections.abc import Iterable, Sequence
from typing import Any

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
    was_training = token_loss.training
    token_loss.eval()
    window = SumWindow(accelerator.device)
    for batch in batches:
        with accelerator.autocast():
            window.add(token_loss(batch))
    token_loss.train(was_training)
    return window.reduce(accelerator)


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
    max_new_tokens: int = 64,
) -> list[str]:
    """The likeliest answer (greedy) to the last turn of each conversation, cut at `max_new_tokens`."""
    prompts = [render(tokenizer, messages, add_generation_prompt=True) for messages in conversations]
    inputs = tokenizer(
        prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(accelerator.device)
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    answers: list[str] = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]
