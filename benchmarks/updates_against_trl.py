"""The same updates as TRL: our loop and TRL's SFTTrainer side by side, loss by loss.

    pip install trl==1.16.0
    python benchmarks/updates_against_trl.py --data ROWS.json --out benchmarks/results/updates.json

Both get the same tokens and labels (ours), the same initial adapter, the same examples in the same order, an
fp32 base and no dropout. What is left to differ is what this compares: accumulation, normalization of the
loss, clipping, the optimizer and the schedule. Ours is the real train.py; its packing is on.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import provenance, run_train, settings, trl_settings, usable_rows, write_result, write_rows
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from finetune.config import Config
from finetune.config_parsing import parse_config
from finetune.data.order import epoch_order
from finetune.data.preparing.examples import tokenize_rows
from finetune.data.rows import load_rows
from finetune.model.load import load_model, load_tokenizer

TOLERANCE = 7e-6
CHANGES = {
    "model.quantization": "none",
    "train.mixed_precision": "no",
    "lora.lora_dropout": 0,
    "optim.learning_rate": 1e-4,
}


class KeepLogs(TrainerCallback):
    """Keep the log line of each update."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.updates.append(dict(logs))


def train_trl(config: Config) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(config)
    examples = tokenize_rows(load_rows(config.data).train, tokenizer, config.data).dataset
    order = epoch_order(config.train.seed, 0, len(examples)).tolist()
    rows = examples.select(order).select_columns(["input_ids", "labels"])
    model = load_model(config, "no", torch.device("cpu"))
    set_seed(config.train.seed)
    logs = KeepLogs()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **trl_settings(config, tempfile.mkdtemp(prefix="trl-")),
            max_length=None,
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        callbacks=[logs],
    )
    trainer.train()
    return logs.updates


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a JSON array of Alpaca rows")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows_file, run_dir = Path(folder) / "rows.json", Path(folder) / "run"
        write_rows(rows_file, usable_rows(args.data, args.model, args.rows)[0])
        argv = settings(rows_file, run_dir, args.model, CHANGES)
        ours = run_train(argv).updates
        trl = train_trl(parse_config(argv))
    assert len(ours) == len(trl), (len(ours), len(trl))
    updates = [
        {
            "step": mine["step"],
            "num_target_tokens": mine["num_target_tokens"],
            "ours": mine["loss"],
            "trl": theirs["loss"],
            "difference": mine["loss"] - theirs["loss"],
            "grad_norm_ours": mine["grad_norm"],
            "grad_norm_trl": float(theirs["grad_norm"]),
        }
        for mine, theirs in zip(ours, trl, strict=True)
    ]
    largest = max(abs(update["difference"]) for update in updates)
    print("| update | target tokens | loss, ours | loss, TRL | difference | grad norm, ours | TRL |")
    print("|---|---|---|---|---|---|---|")
    for u in updates:
        print(
            f"| {u['step']} | {u['num_target_tokens']} | {u['ours']:.6f} | {u['trl']:.6f} "
            f"| {u['difference']:+.1e} | {u['grad_norm_ours']:.5f} | {u['grad_norm_trl']:.5f} |"
        )
    print(f"largest difference of a loss: {largest:.1e} (at most {TOLERANCE})")
    result = {
        "what": "loss of each update, train.py against TRL 1.16.0's SFTTrainer; fp32 base, dropout 0",
        "command": f"python benchmarks/updates_against_trl.py --data {args.data.name} --rows {args.rows}",
        **provenance(),
        "largest_difference": largest,
        "updates": updates,
    }
    write_result(args.out, result)
    return 0 if largest <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
