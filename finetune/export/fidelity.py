"""Compare what a merged or exported model predicts with the trained model, and choose the merge to write."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.data.collate import iterate_batches
from finetune.data.plan import make_plan, plan_evaluation
from finetune.data.preparing.examples import Examples
from finetune.export.merge import DEQUANTIZED, load_unmerged, merge, model_bytes, round_weights
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.generate import Answer, answer_prompts
from finetune.model.loss import TokenLoss
from finetune.ops.quantized import dropout_off
from finetune.ops.token_rows import frozen_layer, rows_of
from finetune.run.adapter import Trained, TrainedModel
from finetune.run.folder import read_environment
from finetune.runtime.accelerator import sum_dtype
from finetune.training.answer_scores import Question

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A merge is faithful if, on the eval rows, it agrees with the trained model to within these bounds.
MIN_AGREEMENT = 0.99
MAX_LOSS_CHANGE = 0.005
CHUNK = 256  # target tokens whose logits are in memory at a time
ANSWER_TOKENS = 64  # the longest answer that is compared


class Predictions(NamedTuple):
    """Predictions for N target tokens, in compact form: hidden [N, d] and the head's weight [V, d]."""

    hidden: Tensor
    weight: Tensor

    def logits(self, part: slice) -> Tensor:
        """[n, V] fp32, multiplied in the precision of the hidden states."""
        hidden = self.hidden[part]
        return (hidden @ self.weight.to(hidden.dtype).t()).float()


class Difference(NamedTuple):
    """How predictions q differ from p: means over the target tokens."""

    kl: float
    """KL(p || q) in nats"""
    agreement: float
    """Fraction of tokens for which both have the same most likely token"""
    loss: float
    """Loss of q in nats"""


class Candidate(NamedTuple):
    """A merge that may be written."""

    base: str
    dtype: str
    num_bytes: int
    difference: Difference
    """Difference from the trained model, computed in fp32"""
    agreement_as_run: float
    """Agreement with the trained model, computed in the run's precision"""


class Comparison(NamedTuple):
    """The examples to compare on, and the trained model's predictions for them."""

    examples: Examples
    batches: list[list[int]]
    packing: bool
    target_ids: Tensor
    as_run: Predictions
    """Predictions in the run's precision, with the run's fast paths"""
    trained: Predictions
    """Predictions of the same weights in fp32: the reference, since rounding differs between computations"""
    loss: float
    """Loss of `trained` in nats per target token"""
    base: Difference
    """Difference of the base, without the adapter, from `trained`"""
    questions: list[Question]
    answers: list[Answer]
    """The trained model's, to `questions`"""


def start_comparison(
    trained: Trained,
    opened: TrainedModel,
    train_set: Examples,
    examples: Examples,
    questions: list[Question],
) -> Comparison | None:
    """Compute the trained model's predictions for `examples`, and its answers to `questions`.

    Returns None if the model's logits are not the product of its head with its last hidden states.
    `train_set` holds the examples that the run was trained on. They determine the layout of the batches.
    """
    config = replace(trained.config, fast=replace(trained.config.fast, head=True))
    token_loss = TokenLoss(opened.model)
    int8, max_tokens = None, None
    if trained.run_dir is not None:
        environment = read_environment(trained.run_dir)
        int8, max_tokens = str(environment["int8"]), environment["token_budget"]
    packing = choose_fast_paths(config, opened.accelerator, token_loss, train_set, int8).packed
    if token_loss.head_mib is None:
        return None
    batches = plan_evaluation(make_plan(config, train_set, packing, 0, 1, max_tokens), examples)
    device = opened.accelerator.device
    ids = [batch.target_ids for batch in iterate_batches(batches, examples.dataset, packing, device)]
    precision = opened.accelerator.autocast()
    as_run = predict(token_loss, batches, examples, packing, precision)
    # The adapter is unmerged, so that the comparison also tests the merge.
    reference = load_unmerged(trained, opened, DEQUANTIZED)
    in_fp32 = predict(TokenLoss(reference), batches, examples, packing, nullcontext())
    in_fp32 = Predictions(in_fp32.hidden, as_run.weight)  # the same head, rounded to the run's precision
    with reference.disable_adapter():
        without = predict(TokenLoss(reference), batches, examples, packing, nullcontext())
    target_ids = torch.cat(ids)
    loss = difference(as_run, in_fp32, target_ids).loss
    base = difference(in_fp32, without, target_ids)
    answers = answer_questions(opened, reference, questions)
    return Comparison(examples, batches, packing, target_ids, as_run, in_fp32, loss, base, questions, answers)


def answer_questions(opened: TrainedModel, model: Any, questions: Sequence[Question]) -> list[Answer]:
    """Greedy answers of a model in the run's precision, of up to ANSWER_TOKENS tokens, in one batch."""
    if not questions:
        return []
    prompts = [question.prompt for question in questions]
    return answer_prompts(opened.accelerator, model, opened.tokenizer, prompts, ANSWER_TOKENS)


def compare(comparison: Comparison, model: Any) -> tuple[Difference, float]:
    """Compute in fp32 how a model's predictions differ from the trained model's, and its agreement with them
    as they were computed in the run's precision."""
    batches, packing = comparison.batches, comparison.packing
    predictions = predict(TokenLoss(model), batches, comparison.examples, packing, nullcontext())
    to_trained, to_run = (
        difference(expected, predictions, comparison.target_ids)
        for expected in (comparison.trained, comparison.as_run)
    )
    return to_trained, to_run.agreement


@torch.no_grad()
def predict(
    token_loss: TokenLoss,
    batches: Sequence[list[int]],
    examples: Examples,
    packing: bool,
    precision: AbstractContextManager[Any],
) -> Predictions:
    """Compute the predictions for all target tokens, without dropout."""
    head = token_loss.base.get_output_embeddings()
    weight: Tensor = (frozen_layer(head) if rows_of(head) is None else head).weight
    micro_batches = iterate_batches(batches, examples.dataset, packing, weight.device)
    with dropout_off(token_loss), precision:
        hidden = [token_loss.target_hidden(batch) for batch in micro_batches]
    return Predictions(torch.cat(hidden), weight)


@torch.no_grad()
def difference(p: Predictions, q: Predictions, target_ids: Tensor) -> Difference:
    """Compute how q differs from p on N target tokens; target_ids [N]."""
    sums = torch.zeros(3, dtype=sum_dtype(target_ids.device), device=target_ids.device)
    for start in range(0, len(target_ids), CHUNK):
        part = slice(start, start + CHUNK)
        log_p, log_q = (predictions.logits(part).log_softmax(-1) for predictions in (p, q))
        same = log_p.argmax(-1) == log_q.argmax(-1)
        nll = -log_q.gather(-1, target_ids[part, None])
        sums += torch.stack([(log_p.exp() * (log_p - log_q)).sum(), same.sum(), nll.sum()]).to(sums.dtype)
    kl, agreement, loss = (sums / len(target_ids)).tolist()
    return Difference(kl, agreement, loss)


def compare_merge(
    trained: Trained, opened: TrainedModel, comparison: Comparison, base: str, dtypes: Sequence[str]
) -> list[Candidate]:
    """Merge into one base, round to each of `dtypes` in turn, and compare. All computation is in fp32."""
    candidates = []
    model = merge(load_unmerged(trained, opened, base))
    for name in dtypes:
        round_weights(model, DTYPES[name])
        size = model_bytes(model, DTYPES[name])
        candidates.append(Candidate(base, name, size, *compare(comparison, model)))
    return candidates


def choose(candidates: Sequence[Candidate], loss: float) -> Candidate:
    """Return the smallest faithful merge, or the nearest one if none is faithful.

    `loss` is the trained model's loss.
    """
    faithful = [candidate for candidate in candidates if is_faithful(candidate, loss)]
    if faithful:
        return min(faithful, key=lambda candidate: (candidate.num_bytes, candidate.difference.kl))
    return min(candidates, key=lambda candidate: candidate.difference.kl)


def is_faithful(candidate: Candidate, loss: float) -> bool:
    _, agreement, own = candidate.difference
    return agreement >= MIN_AGREEMENT and abs(own / loss - 1) <= MAX_LOSS_CHANGE
