"""One of several processes that hold a sharded base: what happens where their shares differ in micro-batches.

Started by tests/runtime/test_uneven_shares.py, with the folder for what it finds.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from conftest import tiny_model
from datasets import Dataset
from tiny import VOCABULARY, random_examples, with_adapter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from finetune.data.collate import iterate_batches
from finetune.data.plan import Layout, Plan, plan_evaluation
from finetune.data.preparing.examples import Examples
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.loss import TokenLoss
from finetune.runtime.processes import is_lost_peer
from finetune.runtime.signals import StopRequest
from finetune.training.evaluate import evaluate

# A correct exchange between two processes takes far less, also on a busy machine.
TIMEOUT = timedelta(seconds=10)
# One example is about as long as all others together: it is a process's whole share.
LENGTHS = [30, 5, 4, 6, 3, 5, 4, 3, 7]
ONE_EACH = Layout(packing=False, micro_batch_size=1, max_tokens=max(LENGTHS))


def shard(token_loss: TokenLoss, adapter: FlatAdapter) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    replicated = {parameter for parameter in adapter.model.parameters() if parameter.requires_grad}
    for layer in adapter.model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=replicated)
    fully_shard(token_loss, mesh=mesh, ignored_params=replicated)
    register_fsdp_forward_method(token_loss, "token_stats")


def gradient(
    accelerator: Accelerator, token_loss: TokenLoss, adapter: FlatAdapter, plan: Plan, data: Examples
) -> list[list[float]]:
    """The adapter's gradient of each update, over all processes of the plan."""
    gradients = []
    for step in range(plan.num_steps):
        adapter.zero_gradients()
        update = plan.update(step)
        for batch in iterate_batches(update.micro_batches, data.dataset, False, accelerator.device):
            (token_loss(batch).nll / update.num_target_tokens).backward()
        if plan.num_processes > 1:
            adapter.reduce_gradients(accelerator)
        gradients.append(adapter.gradient.tolist())
    return gradients


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    rank = accelerator.process_index
    examples = random_examples(LENGTHS)
    data = Examples(Dataset.from_list(examples), truncated=[], dropped={})
    # Updates of eight examples and of one, of which all processes but the first have none.
    alone = Plan(data.lengths, data.target_counts, ONE_EACH, 8, num_epochs=1, seed=0)
    uneven = replace(alone, rank=rank, num_processes=accelerator.num_processes)
    even = replace(uneven, collective=True)
    found: dict[str, Any] = {
        name: [
            *(len(plan.update(step).micro_batches) for step in range(plan.num_steps)),
            *(len(plan_evaluation(plan, data, most)) for most in (None, 1)),
        ]
        for name, plan in (("uneven", uneven), ("even", even))
    }

    model = with_adapter(tiny_model(VOCABULARY))
    adapter, token_loss = FlatAdapter(model), TokenLoss(model).train()
    found["alone"] = gradient(accelerator, token_loss, adapter, alone, data)

    def evaluated(plan: Plan, most: int | None = None, **how: Any) -> Any:
        sums = evaluate(
            accelerator, token_loss, plan_evaluation(plan, data, most), data.dataset, False, **how
        )
        return None if sums is None else sums.tolist()

    found["evaluated_unsharded"] = [evaluated(uneven), evaluated(uneven, 1)]
    shard(token_loss, adapter)
    found["filled_up"] = gradient(accelerator, token_loss, adapter, even, data)
    found["evaluated"] = [evaluated(even, collective=True), evaluated(even, 1, collective=True)]

    # A signal to the second process within its second batch.
    seen = 0
    token_stats = token_loss.token_stats

    def stopping(batch: Any) -> Any:
        nonlocal seen
        seen += 1
        if rank == 1 and seen == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return token_stats(batch)

    token_loss.token_stats = stopping  # type: ignore[method-assign]
    with StopRequest(accelerator) as stop:
        sums = evaluated(even, stop=stop, collective=True)
    found["stopped"] = {"sums": sums, "batches": seen, "exit_code": stop.exit_code}

    found |= {"hung": False, "error": "none"}
    try:
        gradient(accelerator, token_loss, adapter, uneven, data)
    except RuntimeError as error:
        found |= {"hung": is_lost_peer(error), "error": str(error)}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # the groups are of no more use


if __name__ == "__main__":
    main(Path(sys.argv[1]))
