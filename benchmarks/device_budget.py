"""What an update asks of a card, counted without one: operations, bytes beside the products, peak live bytes.

    python benchmarks/device_budget.py --out benchmarks/results/device_budget.json

The program's own set-up and update run on fake tensors (see `fake_card`), on one micro-batch of 1,004 tokens
with 512 targets, and everything they ask for is counted by part. The trial of the fast paths at the start is
a part of its own. Needs no card and no weights. GB are 10^9 bytes. The peak includes no CUDA context and no
workspaces of libraries.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_card

if __name__ == "__main__":
    fake_card.insert()  # before torch is imported

from typing import Any

import torch
from card_operators import DECOMPOSITIONS
from common import provenance, write_result
from counting import Counting, Totals
from datasets import Dataset
from fake_model import CARD, SIZES, fake_base
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from update import PARTS, make_update, set_up

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.collate import MicroBatch, pack
from finetune.data.preparing.examples import Examples
from finetune.data.templates.tokenize import IGNORE
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import add_adapter
from finetune.model.loss import TokenLoss
from finetune.runtime.accelerator import create_accelerator
from finetune.runtime.choice import Choice

BASES = {"int8": "int8", "nf4": "nf4", "bf16": "none"}
GB = 1e9
PREFIX = 20
TRL_MICRO_BATCHES = 4


def examples() -> list[dict[str, Any]]:
    """Eight with a common beginning of 20 tokens, 512 targets in all; the longest has 512 tokens."""
    lengths = (492, 96, 84, 78, 70, 64, 56, 44)  # behind the beginning
    targets = (266, 48, 42, 39, 35, 32, 28, 22)
    rows = []
    for number, (length, target) in enumerate(zip(lengths, targets, strict=True)):
        ids = [7] * PREFIX + [200 + number] * length
        rows.append({"input_ids": ids, "labels": [IGNORE] * (len(ids) - target) + ids[-target:]})
    return rows


def micro_batch() -> MicroBatch:
    batch = pack(examples())
    assert (batch.num_tokens, len(batch.target_ids)) == (1004, 512)
    return batch


def count_finetune(config: Config, model: str, base: str) -> tuple[dict[str, Totals], list[Choice]]:
    """The trial, the parts of the second update (the first makes the optimizer's state), the paths taken."""
    accelerator = create_accelerator(config, "bf16")
    assert accelerator.device.type == CARD.type
    train_set = Examples(Dataset.from_list(examples()), truncated=[], dropped={})
    with counting_on_a_fake_card() as counting:
        frozen = fake_base(model, base)
        with CARD:  # PEFT would make the adapter on the CPU, and real parameters cannot become fake ones
            adapted = add_adapter(frozen, config.lora)
        adapter, token_loss = FlatAdapter(adapted), TokenLoss(adapted).train()
        program = set_up(config, accelerator, "bf16", adapter, token_loss)
        with counting.part("trial"):
            choices = choose_fast_paths(config, accelerator, token_loss, train_set)
        batch = micro_batch().to(CARD)
        for step in range(2):
            for part in PARTS:
                counting.parts.pop(part, None)
            make_update(program, batch, step, counting.part)
    return counting.parts, list(choices)


def count_trl(config: Config, model: str, base: str) -> dict[str, Totals]:
    """The second update of TRL's SFTTrainer, with its defaults, in four padded micro-batches."""
    import trl_update

    with counting_on_a_fake_card() as counting:
        trl_update.train(config, fake_base(model, base), examples(), counting, TRL_MICRO_BATCHES)
    return counting.parts


@contextmanager
def counting_on_a_fake_card() -> Iterator[Counting]:
    counting = Counting("cuda", DECOMPOSITIONS, FakeTensorMode(allow_non_fake_inputs=True))
    torch.cuda.synchronize = lambda *_: counting.wait()
    with counting:
        yield counting


def as_case(program: str, model: str, base: str, dropout: float, parts: dict[str, Totals]) -> dict[str, Any]:
    update = {name: parts[name] for name in ("update", *PARTS) if name in parts}
    case = {
        "program": program,
        "model": model,
        "base": base,
        "dropout": dropout,
        "operations": sum(part.operations for part in update.values()),
        "traffic_gb": sum(part.traffic for part in update.values()) / GB,
        "peak_gb": max(part.peak for part in update.values()) / GB,
        "waits": sum(part.waits for part in update.values()),
    }
    by_part = {name: as_numbers(part) for name, part in update.items()}
    trial = {"trial": as_numbers(parts["trial"])} if "trial" in parts else {}
    return {**case, **trial, "parts": by_part}


def as_numbers(part: Totals) -> dict[str, Any]:
    return {
        "operations": part.operations,
        "traffic_gb": part.traffic / GB,
        "peak_gb": part.peak / GB,
        "waits": part.waits,
        "most_operations": dict(part.by_name.most_common(12)),
        "most_traffic_gb": {name: size / GB for name, size in part.traffic_by_name.most_common(8)},
    }


def show(cases: list[dict[str, Any]]) -> None:
    columns = ("operations", "traffic GB", "peak GB", "waits", "trial's peak GB")
    table = Table("program", "model", "base", "dropout", *columns, *PARTS)
    for case in cases:
        numbers = [f"{case['operations']:,}", f"{case['traffic_gb']:.2f}", f"{case['peak_gb']:.2f}"]
        trial = f"{case['trial']['peak_gb']:.2f}" if "trial" in case else ""
        parts = [f"{case['parts'][name]['operations']:,}" if name in case["parts"] else "" for name in PARTS]
        names = (case["program"], case["model"], case["base"], str(case["dropout"]))
        table.add_row(*names, *numbers, str(case["waits"]), trial, *parts)
    Console(width=170).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", nargs="+", choices=["finetune", "trl"], default=["finetune", "trl"])
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--base", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.1, 0.0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    fake_card.pretend()
    cases, paths = [], {}
    for program in args.program:
        for model in args.model:
            for base in args.base:
                for dropout in args.dropout:
                    config = Config(
                        model=ModelConfig(quantization=BASES[base]),  # type: ignore[arg-type]
                        lora=LoraConfig(lora_dropout=dropout),
                    )
                    if program == "trl":
                        parts = count_trl(config, model, base)
                    else:
                        parts, choices = count_finetune(config, model, base)
                        paths[f"{model}, {base}"] = {choice.name: choice.actual for choice in choices}
                    cases.append(as_case(program, model, base, dropout, parts))
                    gc.collect()
    show(cases)
    if args.out is not None:
        what = "what an update of one micro-batch of 1,004 tokens asks of a card, counted on fake tensors"
        write_result(args.out, {"what": what, **provenance(), "paths": paths, "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())
