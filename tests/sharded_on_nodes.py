"""What the processes of two nodes compute that share a base: torchrun ... tests/sharded_on_nodes.py FOLDER.

The main process writes FOLDER/node.json and FOLDER/all.json, each a list with the results of each process.

"""

import json
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from sharded import Case, Part, own_batches
from torch import distributed

from finetune.config import Config
from finetune.model import sharding
from finetune.model.sharding import Sharding, choose_sharding, local_share
from finetune.runtime import accelerator as machine

TIMEOUT = timedelta(minutes=7)  # not what any library has by itself


@dataclass(frozen=True)
class CaseOfNodes(Case):
    shard_over: str = "node"

    @property
    def config(self) -> Config:
        config = super().config
        return replace(config, train=replace(config.train, shard_over=self.shard_over))


def compare(folder: Path, shard_over: str, accelerator: Any) -> dict[str, Any]:
    case = CaseOfNodes(quantization="int8", shard_over=shard_over)
    chosen = choose_sharding(case.config, accelerator)
    assert chosen.mesh is not None
    parts = {
        "none": Part(folder, case, accelerator, Sharding(())),
        "base": Part(folder, case, accelerator, chosen),
    }
    batches = parts["none"].batches
    num_targets = sum(len(batch.target_ids) for batch in batches)
    alone, gradients = parts["none"].update(batches, num_targets)[1], {}
    for name, part in parts.items():
        gradients[name] = part.update(own_batches(part, batches), num_targets)[1]
        distributed.all_reduce(gradients[name])
    here = sum(local_share(p).numel() for p in parts["base"].model.parameters() if not p.requires_grad)
    group = chosen.mesh.get_group()
    return {
        "choice": chosen.choices[0].actual,
        "shares with": distributed.get_process_group_ranks(group),
        "node": os.environ["GROUP_RANK"],
        "has the timeout": group._get_backend(torch.device("cpu")).options._timeout == TIMEOUT,
        "is the same to the bit": torch.equal(gradients["none"], gradients["base"]),
        "against one process": float((gradients["base"] - alone).norm() / alone.norm()),
        "held": here / sum(p.numel() for p in parts["base"].model.parameters() if not p.requires_grad),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    machine.PEER_TIMEOUT = sharding.PEER_TIMEOUT = TIMEOUT
    accelerator = machine.create_accelerator(Config(output_dir=str(folder)), "bf16")
    for shard_over in ("node", "all"):
        found: list[Any] = [None] * accelerator.num_processes
        distributed.all_gather_object(found, compare(folder, shard_over, accelerator))
        if accelerator.is_main_process:
            (folder / f"{shard_over}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
