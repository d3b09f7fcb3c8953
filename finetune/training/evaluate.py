"""Evaluation: exact sums of each eval example, their token-weighted means, and which rows are asked."""

from collections.abc import Container, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from finetune.data.collate import iterate_batches
from finetune.data.plan import Indices
from finetune.data.tokenize import Examples, Message, to_messages
from finetune.model.loss import TokenLoss
from finetune.ops.quantized import dropout_off
from finetune.runtime.signals import StopRequest
from finetune.training.metrics import COUNT, Metrics, means


@torch.no_grad()
def evaluate(
    accelerator: Any,
    token_loss: TokenLoss,
    batches: Sequence[Indices],
    dataset: Dataset,
    packing: bool,
    stop: StopRequest | None = None,
) -> Tensor | None:
    """[E, 4] float64 on the CPU: nll and entropy in nats, correct, and number of the target tokens of each of
    the E examples of `dataset`, with dropout off; None where it was stopped midway.

    `token_loss` is the module itself, not its DDP wrapper: processes may have different numbers of batches.
    `batches` are this process's share, as `plan_evaluation` gives them; the sums are of all processes.
    Raises FloatingPointError where the loss is not a finite number.
    """
    sums = torch.zeros(len(dataset), 4, dtype=torch.float64, device=accelerator.device)
    micro_batches = iterate_batches(batches, dataset, packing, accelerator.device)
    with dropout_off(token_loss):
        pairs = zip(batches, micro_batches, strict=True)
        for indices, batch in pairs if stop is None else stop.until(pairs):
            with accelerator.autocast():
                values = token_loss.token_stats(batch).double()
            counted = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
            examples = torch.tensor(indices, device=sums.device)[batch.example_of_target()]
            sums.index_add_(0, examples, counted)
    if stop is not None and stop.should_stop():
        return None
    total: Tensor = accelerator.reduce(sums, reduction="sum").cpu()
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the loss of the evaluation is not a finite number")
    return total


def evaluation_metrics(sums: Tensor, eval_set: Examples, leaks: Container[int]) -> Metrics:
    """The means over all examples; where some of their rows are in `leaks`, which are trained on too,
    `loss_without_leaks` is the loss of the others.

    sums [E, 4] as `evaluate` gives them.
    """
    metrics = means(sums.sum(0))
    clean = torch.tensor([number not in leaks for number in eval_set.dataset["row_number"]])
    if not clean.all() and float(sums[clean].sum(0)[COUNT]) > 0:
        metrics["loss_without_leaks"] = means(sums[clean].sum(0))["loss"]
    return metrics


def is_out_of_patience(evaluations: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought no lower loss than the best before them; None never is.

    `evaluations` are eval lines of metrics.jsonl, in order: what a resumed run decides by, too.
    """
    losses = [entry["loss"] for entry in evaluations]
    return patience is not None and losses != [] and len(losses) - losses.index(min(losses)) > patience


def pick_conversations(rows: Dataset, system_prompt: str | None, count: int = 10) -> list[list[Message]]:
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
