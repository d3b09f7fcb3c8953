"""An update with a number that is not finite: what it was made of, written down and repeated.

The weights and the optimizer from before it lie in bad_update/, in the form of a checkpoint; its examples,
their text and the loss of each of their tokens in bad_update.json. Since an update is a function of (config,
seed, step), these are enough to repeat it.
"""

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.data.collate import MicroBatch, iterate_batches
from finetune.data.plan import Plan
from finetune.data.segments import branches_of
from finetune.data.splits import Data
from finetune.data.templates.tokenize import IGNORE
from finetune.model.loss import TokenLoss
from finetune.run.checkpoint import Checkpointer, TrainState, list_checkpoints, write_checkpoint
from finetune.runtime.accelerator import reseed
from finetune.runtime.console import say
from finetune.runtime.files import write_atomically
from finetune.runtime.processes import on_main

RECORD, STATE_BEFORE = "bad_update.json", "bad_update"


def examine_update(
    accelerator: Any, token_loss: TokenLoss, plan: Plan, step: int, dataset: Any, tokenizer: Any
) -> dict[str, Any]:
    """Repeat the forward and backward passes of update `step` (from 0) of all ranks in this process, with the
    same dropout noise, and report the results: by example, by target token, by parameter.

    Losses are in nats; a non-finite number is written as text. Gradients are zero afterwards.
    """
    update = plan.update(step)
    micro_batches = [
        {"process": rank, **examined}
        for rank in range(plan.num_processes)
        for examined in _examine_share(
            accelerator, token_loss, replace(plan, rank=rank), step, dataset, tokenizer
        )
    ]
    nll = sum(float(example["nll"]) for batch in micro_batches for example in batch["examples"])
    return {
        "update": step + 1,
        "epoch": update.epoch + 1,
        "num_target_tokens": update.num_target_tokens,
        "loss": _in_json(nll / update.num_target_tokens),
        "micro_batches": micro_batches,
    }


def _examine_share(
    accelerator: Any, token_loss: TokenLoss, plan: Plan, step: int, dataset: Any, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    update = plan.update(step)
    device = accelerator.device
    batches = iterate_batches(update.micro_batches, dataset, plan.layout.packing, device)
    trainable = {name: p for name, p in token_loss.named_parameters() if p.requires_grad}
    reseed(plan.seed, step, plan.rank)
    for indices, batch in zip(update.micro_batches, batches, strict=True):
        token_loss.zero_grad(set_to_none=False)
        with accelerator.autocast():
            nll_of_token = _nll(token_loss, batch)
        torch.autograd.backward(nll_of_token.sum() / update.num_target_tokens)
        gradients = {name: p.grad for name, p in trainable.items() if p.grad is not None}
        norm = torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm()
        yield {
            "grad_norm": _in_json(float(norm)),
            "parameters_with_bad_gradient": [
                name.removeprefix("model.") for name, g in gradients.items() if not bool(g.isfinite().all())
            ],
            "examples": _examples([dataset[i] for i in indices], nll_of_token.tolist(), tokenizer),
        }
    token_loss.zero_grad(set_to_none=False)


def _nll(token_loss: TokenLoss, batch: MicroBatch) -> Tensor:
    """[N]: nats of each target token, with their gradient."""
    return F.cross_entropy(token_loss.target_logits(batch).float(), batch.target_ids, reduction="none")


def _examples(rows: Sequence[dict[str, Any]], nlls: list[float], tokenizer: Any) -> list[dict[str, Any]]:
    """One object an example; the targets of a micro-batch stand in the order of its examples, and of an
    example in that of its tokens."""
    examples, left = [], iter(nlls)
    for row in rows:
        targets = [
            {"position": position, "token": tokenizer.decode([label]), "nll": next(left)}
            for position, label in enumerate(row["labels"])
            if label != IGNORE
        ]
        nll = sum(target["nll"] for target in targets)
        examples.append(
            {
                "row_number": row["row_number"],
                "nll": _in_json(nll),
                "num_tokens": len(row["input_ids"]),
                "text": tokenizer.decode(row["input_ids"]),
                "branches": [branch._asdict() for branch in branches_of(row)],
                "targets": [{**target, "nll": _in_json(target["nll"])} for target in targets],
            }
        )
    return examples


def _in_json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def record_bad_update(
    accelerator: Any,
    checkpointer: Checkpointer,
    token_loss: TokenLoss,
    plan: Plan,
    state: TrainState,
    data: Data,
    tokenizer: Any,
) -> FloatingPointError:
    """Find which numbers of the update after `state` are not finite, write them down, and print where. All
    ranks repeat the update, as a sharded base needs; the main process writes. Returns the error to raise."""
    record = examine_update(accelerator, token_loss, plan, state.step, data.train.dataset, tokenizer)
    on_main(accelerator, _show, checkpointer, record, state)
    return FloatingPointError(f"a number of update {state.step + 1} is not finite")


def _show(checkpointer: Checkpointer, record: dict[str, Any], state: TrainState) -> None:
    say(write_bad_update(checkpointer, record, state))


def write_bad_update(checkpointer: Checkpointer, record: dict[str, Any], state: TrainState) -> str:
    """Write bad_update.json and, as a checkpoint, the state before the update; return a message to print."""
    run_dir = checkpointer.run_dir
    kept = list_checkpoints(run_dir)
    last = f"the last checkpoint is {kept[0]}" if kept else "there was no checkpoint yet"
    before = TrainState(state.base, state.step)
    try:
        write_checkpoint(run_dir / STATE_BEFORE, before, checkpointer.trained)
        write_atomically(run_dir / RECORD, json.dumps(record, indent=1, ensure_ascii=False))
    except (ValueError, OSError) as error:  # the bad number matters more than the full disk
        return f"{last}. What was in update {record['update']} could not be written: {error}"
    return (
        f"Update {record['update']} has a loss or a gradient that is not finite, and was not made; {last}.\n"
        f"{run_dir / RECORD} holds its examples and the loss of each token. To repeat it:\n"
        f"  python -m finetune replay {shlex.quote(str(run_dir))}"
    )


def read_bad_update(run_dir: Path) -> dict[str, Any]:
    """What `write_bad_update` wrote.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    path = run_dir / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run_dir} has no {RECORD}: none of its updates was bad") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return record
