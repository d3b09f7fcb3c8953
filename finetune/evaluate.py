"""Evaluation: exact token-weighted means over all eval examples, and a few answers to read."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset

from finetune.batching import MicroBatch
from finetune.chat import Message, render, to_messages
from finetune.loss import TokenLoss
from finetune.metrics import COUNT, Metrics, SumWindow, means
from finetune.model import dropout_off
from finetune.signals import StopRequest


@torch.no_grad()
def evaluate(
    accelerator: Any,
    token_loss: TokenLoss,
    parts: Sequence[Iterable[MicroBatch]],
    stop: StopRequest | None = None,
) -> Metrics | None:
    """The metrics of all examples of all processes, with dropout off; None where it was stopped midway.

    `token_loss` is the module itself, not its DDP wrapper: processes may have different numbers of batches.
    Raises FloatingPointError where the loss is not a finite number.

    `parts` are as `plan_evaluation` gives them: all examples, or, on all processes alike, those whose prompt
    is not trained on and those whose is. Then `loss_without_leaks` is the loss of the first.
    """

    def sum_up(part: Iterable[MicroBatch]) -> SumWindow:
        sums = SumWindow(accelerator.device)
        for batch in part if stop is None else stop.until(part):
            with accelerator.autocast():
                sums.add(token_loss(batch))
        return sums

    with dropout_off(token_loss):
        sums = [sum_up(part) for part in parts]
    if stop is not None and stop.agreed():
        return None
    totals = torch.stack([part.total(accelerator) for part in sums])
    if not bool(totals.isfinite().all()):
        raise FloatingPointError("the loss of the evaluation is not a finite number")
    metrics = means(totals.sum(0))
    if len(parts) > 1 and float(totals[0, COUNT]) > 0:
        metrics["loss_without_leaks"] = means(totals[0])["loss"]
    return metrics


def pick_conversations(rows: Dataset, system_prompt: str | None, count: int = 3) -> list[list[Message]]:
    """The first eval rows up to their last assistant turn: what the model is asked before and after.

    Rows in which the assistant answers to nobody are passed over: templates may refuse to open such a turn.
    """
    conversations: list[list[Message]] = []
    for row in rows:
        if len(conversations) == count:
            break
        messages = to_messages(row, system_prompt)
        last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
        if any(message["role"] != "system" for message in messages[:last]):
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
