"""Evaluation: exact sums of each eval example, their token-weighted means, and the sample conversations."""

from collections.abc import Collection, Container, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from finetune.data.by_source import is_main, several_sources, source_of_each
from finetune.data.collate import iterate_batches
from finetune.data.conversations import SYSTEM_ROLES, Conversation, Row, to_conversation
from finetune.data.plan import Indices
from finetune.data.preparing.examples import Examples
from finetune.data.templates.targets import is_trained
from finetune.model.loss import TokenLoss
from finetune.model.precision import in_fp32
from finetune.ops.quantized import dropout_off
from finetune.runtime.accelerator import sum_dtype
from finetune.runtime.signals import StopRequest
from finetune.training.metrics import COUNT, Metrics, means, means_by_source


@torch.no_grad()
def evaluate(
    accelerator: Any,
    token_loss: TokenLoss,
    batches: Sequence[Indices],
    dataset: Dataset,
    packing: bool,
    stop: StopRequest | None = None,
    precision: str = "run",
    collective: bool = False,
) -> Tensor | None:
    """[E, 4] float64 on the CPU: nll and entropy in nats, correct, and number of the target tokens of each of
    the E examples of `dataset`, without dropout. None if the evaluation was stopped midway.

    `batches` are those of this rank, as `plan_evaluation` returns them; the sums are over all ranks. Ranks
    may have different numbers of batches unless `collective`, as in a Plan: then all stop after the same one.
    `precision` is "run", or "fp32" to compute in fp32 with the same weights.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    sums = torch.zeros(len(dataset), 4, dtype=sum_dtype(accelerator.device), device=accelerator.device)
    micro_batches = iterate_batches(batches, dataset, packing, accelerator.device)
    exact = precision == "fp32"
    with dropout_off(token_loss), in_fp32(token_loss) if exact else nullcontext():
        pairs = zip(batches, micro_batches, strict=True)
        for indices, batch in pairs if stop is None else stop.until(pairs, together=collective):
            with nullcontext() if exact else accelerator.autocast():
                values = token_loss.token_stats(batch).to(sums.dtype)
            counted = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
            examples = torch.tensor(indices, dtype=torch.long, device=sums.device)[batch.example_of_target()]
            sums.index_add_(0, examples, counted)
    if stop is not None and stop.should_stop():
        return None
    total: Tensor = accelerator.reduce(sums, reduction="sum").cpu().double()
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the loss of the evaluation is not a finite number")
    return total


def evaluation_metrics(
    sums: Tensor, eval_set: Examples, leaks: Container[int], eval_sets: Collection[str] = ()
) -> Metrics:
    """The means over the main examples, as `is_main` tells them from those of `eval_sets` (the names of
    eval.sets); then, if the examples come from several sources or sets, those of each.

    `loss`, by which `keep_best` and patience go by default, is therefore not that of an eval set unless there
    are no other eval rows. If some of the main rows are in `leaks` (rows that are also trained on),
    `loss_without_leaks` is the loss of the others. sums [E, 4] as `evaluate` returns them.
    """
    assert set(eval_sets) <= set(eval_set.source_names), "a set is named as in the configuration"
    main = torch.from_numpy(is_main(source_of_each(eval_set), eval_sets))
    metrics = means(sums[main].sum(0))
    clean = main & torch.tensor([number not in leaks for number in eval_set.dataset["row_number"]])
    if not clean.equal(main) and float(sums[clean].sum(0)[COUNT]) > 0:
        metrics["loss_without_leaks"] = means(sums[clean].sum(0))["loss"]
    if sources := several_sources(eval_set):
        own = torch.from_numpy(eval_set.sources)
        of_each = torch.stack([sums[own == source].sum(0) for source in sources])
        metrics |= means_by_source(sources.values(), of_each)
    return metrics


def loss_error(sums: Tensor, exact: Tensor) -> float:
    """The error of an evaluation's mean loss, in nats, from K of its examples that are also computed in fp32.

    sums, exact [K, 4] as `evaluate` returns them, in the run's precision and in fp32. The result is the mean
    difference per token, plus twice its standard error over the examples.
    """
    difference, counts = sums[:, 0] - exact[:, 0], sums[:, COUNT]
    mean = difference.sum() / counts.sum()
    standard_error = (difference - mean * counts).square().sum().sqrt() / counts.sum()
    return float(mean.abs() + 2 * standard_error)


def pick_conversations(rows: Iterable[Row], system_prompt: str | None, count: int = 10) -> list[Conversation]:
    """The first eval rows up to the last assistant turn that is trained on, with the tools and the template's
    arguments: what the model answers before and after training.

    Rows without a message before that turn are skipped: templates may refuse to open such a turn.
    """
    conversations: list[Conversation] = []
    for row in rows:
        if len(conversations) == count:
            break
        conversation = to_conversation(row, system_prompt)
        messages = conversation.messages
        trained = [turn for turn, message in enumerate(messages) if is_trained(message)]
        last = max(trained, default=0)
        if any(message["role"] not in SYSTEM_ROLES for message in messages[:last]):
            conversations.append(replace(conversation, messages=messages[:last]))
    return conversations
