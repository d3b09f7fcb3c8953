"""The same updates as TRL: our loop and TRL's SFTTrainer side by side, loss by loss.

    pip install trl==1.16.0
    python benchmarks/updates_against_trl.py --data ROWS.json --out benchmarks/results/updates.json

Both get the same tokens and labels (ours), the same initial adapter, the same examples in the same order, an
fp32 base and no dropout. What is left to differ is what this compares: accumulation, normalisation of the
loss, clipping, the optimizer and the schedule. Ours is the real train.py; its packing is on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from finetune.batching import epoch_order  # noqa: E402
from finetune.chat import tokenize_rows  # noqa: E402
from finetune.config import Config, parse_config  # noqa: E402
from finetune.machine import environment  # noqa: E402
from finetune.model import load_model, load_tokenizer  # noqa: E402
from finetune.rows import load_rows  # noqa: E402

TOLERANCE = 1e-3


def first_rows(path: Path, count: int) -> list[dict[str, str]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [row for row in rows if row["output"].strip()][:count]


def settings(rows_file: Path, run_dir: Path, model: str) -> list[str]:
    values = {
        "model.name_or_path": model,
        "model.quantization": "none",
        "train.mixed_precision": "no",
        "lora.lora_dropout": 0,
        "data.path": rows_file,
        "data.eval_fraction": 0,
        "data.num_samples": "null",
        "train.num_epochs": 1,
        "optim.learning_rate": 1e-4,
        "log.every_steps": 1,
        "output_dir": run_dir,
    }
    pairs = [[f"--{key}", str(value)] for key, value in values.items()]
    return ["--config", str(ROOT / "configs" / "alpaca.yaml"), *(part for pair in pairs for part in pair)]


def train_ours(argv: list[str], run_dir: Path) -> list[dict[str, Any]]:
    subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], check=True, cwd=ROOT)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["split"] == "train"]


class KeepLogs(TrainerCallback):
    """TRL rounds nothing, but its history lacks nothing we need either: keep the raw log lines."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.updates.append(dict(logs))


def train_trl(config: Config) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(config.model)
    examples = tokenize_rows(load_rows(config.data).train, tokenizer, config.data).dataset
    order = epoch_order(config.train.seed, 0, len(examples)).tolist()
    rows = examples.select(order).select_columns(["input_ids", "labels"])
    model = load_model(config, "no", torch.device("cpu"))
    set_seed(config.train.seed)
    logs = KeepLogs()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-"),
            num_train_epochs=config.train.num_epochs,
            per_device_train_batch_size=config.train.micro_batch_size,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            learning_rate=config.optim.learning_rate,
            lr_scheduler_type=config.optim.schedule,
            weight_decay=config.optim.weight_decay,
            max_grad_norm=config.optim.max_grad_norm,
            optim=config.optim.name,
            max_length=None,
            packing=False,
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
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
        rows_file.write_text(json.dumps(first_rows(args.data, args.rows)), encoding="utf-8")
        argv = settings(rows_file, run_dir, args.model)
        ours = train_ours(argv, run_dir)
        trl = train_trl(parse_config(argv))
        versions = environment(Accelerator(cpu=True))
    assert len(ours) == len(trl), (len(ours), len(trl))
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
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
        "commit": commit,
        "environment": versions,
        "largest_difference": largest,
        "updates": updates,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if largest <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
