"""What processes that share a base compute, beside what one computes alone: torchrun tests/sharded.py FOLDER.

For each case of CASES, or those named after FOLDER, the main process writes FOLDER/NAME.json, a list with the
results of each process: its share of updates with a whole base and with a share of it, beside the whole
updates with a whole base.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from torch.distributed import all_gather_object

from finetune.config import Config, FastConfig, LoraConfig, ModelConfig, TrainConfig
from finetune.data.collate import MicroBatch, collate
from finetune.data.preparing.examples import Examples
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import describe_base, load_model
from finetune.model.loss import TokenLoss
from finetune.model.precision import in_fp32
from finetune.model.sharding import Sharding, choose_sharding, local_share, shard_base
from finetune.model.size import count_parameters
from finetune.ops.quantized import dropout_off
from finetune.runtime.accelerator import create_accelerator, reseed


@dataclass(frozen=True)
class Case:
    model: str = "tied"
    """Which of the two model folders"""
    quantization: str = "none"
    precision: str = "bf16"
    checkpointing: bool = False
    added_tokens: bool = False
    fast: FastConfig = field(default_factory=FastConfig)
    use_dora: bool = False

    @property
    def config(self) -> Config:
        return Config(
            model=ModelConfig(name_or_path=self.model, quantization=self.quantization),
            lora=LoraConfig(lora_dropout=0.1, use_dora=self.use_dora),
            train=TrainConfig(
                mixed_precision=self.precision, gradient_checkpointing=self.checkpointing, sharding="base"
            ),
            fast=self.fast,
        )


REFERENCE = FastConfig(attention=False, head=False, lora=False, elementwise=False, kernels=False)
CASES = {
    "bf16": Case(),
    "bf16, untied, added tokens": Case("untied", added_tokens=True),
    "fp32, untied, checkpointing": Case("untied", precision="no", checkpointing=True),
    "int8, checkpointing": Case(quantization="int8", checkpointing=True),
    "int8, untied, added tokens": Case("untied", "int8", added_tokens=True),
    "nf4": Case(quantization="nf4"),
    "nf4, untied, module by module": Case("untied", "nf4", fast=FastConfig(elementwise=False)),
    "bf16, reference paths, DoRA": Case(fast=REFERENCE, use_dora=True),
}
LENGTHS = [40, 17, 5, 33, 2, 26, 12, 9]


def examples(vocabulary: int) -> list[dict[str, list[int]]]:
    """Random tokens, of which all but the first are targets."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


class Part:
    """One process's model with its loss, made as train.py makes them."""

    def __init__(self, folder: Path, case: Case, accelerator: Any, sharding: Sharding) -> None:
        config = replace(case.config, model=replace(case.config.model, name_or_path=str(folder / case.model)))
        rows = examples(500)
        added = [600, 811] if case.added_tokens else []
        self.accelerator, self.choices = accelerator, sharding.choices
        self.model = load_model(
            config, case.precision, accelerator.device, added, plain_weights=sharding.is_on
        )
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # while it is zero, A has no gradient
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        self.adapter, self.token_loss = FlatAdapter(self.model), TokenLoss(self.model).train()
        train_set = Examples(Dataset.from_list(rows), truncated=[], dropped={})
        self.paths = choose_fast_paths(
            config, accelerator, self.token_loss, train_set, "dequantize", sharding.is_on
        )
        shard_base(self.token_loss, sharding)
        self.batches = [collate([rows[i] for i in indices], self.paths.packed) for indices in LAYOUT]

    def update(self, batches: list[MicroBatch], num_targets: int) -> tuple[list[float], Tensor]:
        """On this process, the sums of its micro-batches of an update and the adapter's flat gradient."""
        self.adapter.zero_gradients()
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            reseed(0, 0, len(batch.input_ids[0]))  # noise by micro-batch, so that any process draws the same
            with self.accelerator.autocast():
                made = self.token_loss(batch)
            (made.nll / num_targets).backward()
            sums += torch.stack([made.nll.detach(), made.entropy, made.correct, made.count])
        return sums.tolist(), self.adapter.gradient.clone()

    def stats(self, exact: bool = False) -> Tensor:
        with torch.no_grad(), dropout_off(self.token_loss):
            if exact:
                with in_fp32(self.token_loss):
                    return self.token_loss.token_stats(self.batches[0])
            with self.accelerator.autocast():
                return self.token_loss.token_stats(self.batches[0])

    def answers(self) -> list[list[int]]:
        with torch.no_grad(), dropout_off(self.token_loss), self.accelerator.autocast():
            prompts = torch.arange(3, 23).view(2, 10)
            made = self.token_loss.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=5,
                do_sample=False,
                pad_token_id=2,
                eos_token_id=2,
            )
        return made.tolist()

    def layer_bytes(self) -> tuple[int, int]:
        """Frozen bytes of the decoder layers here, and in all."""
        frozen = [p for n, p in self.model.named_parameters() if not p.requires_grad and ".layers." in n]
        here = sum(local_share(p).numel() * p.element_size() for p in frozen)
        return here, sum(p.numel() * p.element_size() for p in frozen)


# Five micro-batches, so that two, three and four processes have unequal numbers of them.
LAYOUT = [[0, 1], [2], [3], [4, 5], [6, 7]]
# An update of all, and one in which the first process alone has an example.
UPDATES = {"uneven": slice(None), "empty": slice(1)}


def own_batches(part: Part, batches: list[MicroBatch]) -> list[MicroBatch]:
    """This process's micro-batches, filled up with some that have no target: all make equally many."""
    rank, size = part.accelerator.process_index, part.accelerator.num_processes
    own = batches[rank::size]
    return own + [empty_batch(part)] * (-(-len(batches) // size) - len(own))


def empty_batch(part: Part) -> MicroBatch:
    none = part.batches[0].target_ids[:0]
    return part.batches[0]._replace(target_positions=none, target_ids=none)


def compare_updates(whole: Part, shared: Part, chosen: slice) -> dict[str, Any]:
    """An update with a whole base and a shared one, over all processes, beside that of one process."""
    batches = whole.batches[chosen]
    num_targets = sum(len(batch.target_ids) for batch in batches)
    sums, gradient = whole.update(batches, num_targets)
    alone, made = gradient, {}
    result: dict[str, Any] = {"sums alone": sums, "gradient norm": float(alone.norm())}
    for name, part in (("none", whole), ("base", shared)):
        sums, gradient = part.update(own_batches(part, batches), num_targets)
        torch.distributed.all_reduce(gradient)
        total = torch.tensor(sums, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        result[f"sums {name}"], made[name] = total.tolist(), gradient
    result["gradient is the same to the bit"] = torch.equal(made["none"], made["base"])
    result["gradient against one process"] = float((made["base"] - alone).norm() / alone.norm())
    result["gradient against none"] = float((made["base"] - made["none"]).norm() / made["none"].norm())
    return result


def compare(folder: Path, case: Case, accelerator: Any) -> dict[str, Any]:
    whole = Part(folder, case, accelerator, Sharding(()))
    shared = Part(folder, case, accelerator, choose_sharding(case.config, accelerator))
    result: dict[str, Any] = {"choices": [str(choice) for choice in shared.choices]}
    result["paths"] = {c.name: (c.actual, c.reason) for c in shared.paths}
    for name, part in (("none", whole), ("base", shared)):
        result[f"stats {name}"], result[f"fp32 stats {name}"] = part.stats(), part.stats(exact=True)
        result[f"answers {name}"] = part.answers()
        result[f"parameters {name}"] = count_parameters(part.model)
        result[f"quantization {name}"] = describe_base(case.config.model, part.model).actual
        result[f"bytes {name}"] = part.layer_bytes()
    for kind in ("stats", "fp32 stats"):
        a, b = result.pop(f"{kind} none"), result.pop(f"{kind} base")
        result[f"{kind} differ by"] = float((a - b).abs().max())
    result["updates"] = {name: compare_updates(whole, shared, chosen) for name, chosen in UPDATES.items()}
    return result


def main() -> None:
    folder, chosen = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    for name in chosen:
        AcceleratorState._reset_state()
        accelerator = create_accelerator(Config(), CASES[name].precision)
        results: list[Any] = [None] * accelerator.num_processes
        all_gather_object(results, compare(folder, CASES[name], accelerator))
        if accelerator.is_main_process:
            (folder / f"{name}.json").write_text(json.dumps(results), encoding="utf-8")
            print(name, "done", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
