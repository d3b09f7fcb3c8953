"""Speed and memory beside TRL: train.py and TRL's SFTTrainer in turn, on the same rows and updates.

    pip install trl==1.16.0
    python benchmarks/against_trl.py --data ROWS.json --out benchmarks/results/against_trl.json

The seed job's configuration (configs/alpaca.yaml), an epoch, each program as it is used: ours is the real
train.py, TRL's is SFTTrainer with completion-only loss and no packing. They run one after the other, A B A B,
each in a process of its own with as many threads. The same examples make the same updates in the same order;
the adapter's first values and the dropout noise differ, and TRL also trains what the template writes after
the end of the answer. Useful tokens are those of the examples, without padding. The time is that of the
updates: TRL's `train()`, and ours summed over metrics.jsonl, without start, evaluation and checkpoints.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    as_prompts_and_completions,
    examples_and_plan,
    matmul_gflop_per_second,
    provenance,
    run_process,
    run_train,
    settings,
    trl_settings,
    usable_rows,
    write_result,
    write_rows,
)
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config import Config, ModelConfig
from finetune.config_parsing import parse_config
from finetune.data.order import epoch_order
from finetune.data.rows import load_rows
from finetune.data.templates.tokenize import IGNORE
from finetune.model.load import load_base, load_tokenizer
from finetune.model.size import training_flop
from finetune.model.starter import starter_model_dir

QUANTIZATION = {"int8": "int8", "bf16": "none"}


def run_trl(out: Path, config: Config) -> None:
    """Train with TRL's SFTTrainer as configured, and write what it took."""
    from peft import LoraConfig, TaskType
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    has_cuda = torch.cuda.is_available()
    rows = load_rows(config.data).train
    order = epoch_order(config.train.seed, 0, len(rows)).tolist()
    set_seed(config.train.seed)
    trainer = SFTTrainer(
        model=load_base(config.model, "bf16", torch.device("cuda" if has_cuda else "cpu")),
        args=SFTConfig(
            **trl_settings(config, tempfile.mkdtemp(prefix="trl-", dir=out.parent)),
            max_length=config.data.max_length,
            completion_only_loss=True,
            bf16=True,
            seed=config.train.seed,
            use_cpu=not has_cuda,
        ),
        train_dataset=as_prompts_and_completions(rows.select(order)),
        processing_class=load_tokenizer(config),
        peft_config=LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            lora_dropout=config.lora.lora_dropout,
            target_modules=config.lora.target_modules,
            task_type=TaskType.CAUSAL_LM,
        ),
    )
    flop_per_token, flop_per_target = training_flop(trainer.model)
    examples = trainer.train_dataset
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "input_ids": list(examples["input_ids"]),
        "num_target_tokens": sum(label != IGNORE for labels in examples["labels"] for label in labels),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_cuda_gib": torch.cuda.max_memory_allocated() / 2**30 if has_cuda else None,
        "flop_per_token": flop_per_token,
        "flop_per_target_token": flop_per_target,
    }
    out.write_text(json.dumps(result), encoding="utf-8")


def save_random_model(config_dir: Path, tokenizer: str, folder: Path) -> None:
    """A model of this config with random weights, and a tokenizer: the config's own where it has one."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(config_dir)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    source = str(config_dir) if (config_dir / "tokenizer.json").exists() else tokenizer
    load_tokenizer(Config(model=ModelConfig(name_or_path=source))).save_pretrained(folder)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything the two programs took, by base, and how fast the machine was meanwhile."""
    model = args.model
    if args.random_weights:
        model = str(folder / "model")
        # In a process of its own: what this one holds, the two programs would be counted to hold.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(save_random_model, args.random_weights, args.model, folder / "model").result()
    elif args.model == "starter":
        starter_model_dir()  # fetched before anything is measured
    rows, lengths = usable_rows(args.data, model, None if args.longest else args.rows)
    chosen = range(len(rows))
    if args.longest:
        chosen = sorted(sorted(chosen, key=lambda i: -int(lengths[i]))[: args.rows])
    if len(chosen) < args.rows:
        raise ValueError(f"{args.data} has only {len(chosen)} usable rows")
    write_rows(folder / "rows.json", (rows[i] for i in chosen))
    rates = [matmul_gflop_per_second()]
    bases = {}
    for base in args.base:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for repetition in range(args.repetitions):
            run_dir = folder / f"{base}-{repetition}"
            changes = {"model.quantization": QUANTIZATION[base], "lora.lora_dropout": 0.1}
            argv = settings(folder / "rows.json", run_dir, model, changes)
            for name, run in (("ours", run_ours), ("trl", run_theirs)):
                runs[name].append(run(argv, folder))
                rates.append(matmul_gflop_per_second())
                runs[name][-1]["matmul_gflop_per_second"] = (rates[-2] + rates[-1]) / 2
                speed = runs[name][-1]["useful_tokens_per_second"]
                print(f"{base} {repetition + 1}: {name} {speed:,.0f} tokens/s", file=sys.stderr, flush=True)
        bases[base] = summarize(runs["ours"], runs["trl"])
    return {
        "examples": len(chosen),
        "useful_tokens": sum(int(lengths[i]) for i in chosen),
        "longest_example": max(int(lengths[i]) for i in chosen),
        "matmul_gflop_per_second": rates,
        "int8_over_bf16": bases["int8"]["ours"] / bases["bf16"]["ours"] if len(bases) == 2 else None,
        "bases": bases,
    }


def run_ours(argv: Sequence[str], _: Path) -> dict[str, Any]:
    run = run_train(argv)
    on_cuda = max(entry["peak_memory_gib"] for entry in run.updates) if torch.cuda.is_available() else None
    return {
        **{name: value for name, value in asdict(run).items() if name != "updates"},
        "losses": [entry["loss"] for entry in run.updates],
        "useful_tokens_per_second": run.num_tokens / run.seconds,
        "peak_cuda_gib": on_cuda,
    }


def run_theirs(argv: Sequence[str], folder: Path) -> dict[str, Any]:
    peak_rss_gib = run_process([__file__, "--run-trl", str(folder / "trl.json"), *argv])
    result: dict[str, Any] = json.loads((folder / "trl.json").read_text(encoding="utf-8"))
    theirs = result.pop("input_ids")
    examples, plan = examples_and_plan(argv)
    order = epoch_order(plan.seed, 0, len(plan.lengths)).tolist()
    return {
        **result,
        "num_tokens": sum(map(len, theirs)),
        "same_tokens_as_ours": theirs == list(examples.dataset.select(order)["input_ids"]),
        "useful_tokens_per_second": int(plan.lengths.sum()) / result["seconds"],
        "peak_rss_gib": peak_rss_gib,
    }


def summarize(ours: list[dict[str, Any]], trl: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions, and the repetitions."""
    for run in ours:
        flop = run["num_tokens"] * trl[0]["flop_per_token"]
        flop += run["num_target_tokens"] * trl[0]["flop_per_target_token"]
        run["share_of_matmul_rate"] = flop / run["seconds"] / run["matmul_gflop_per_second"] / 1e9

    def middle(runs: list[dict[str, Any]], key: str) -> float:
        return median(run[key] for run in runs)

    speed, peak = "useful_tokens_per_second", "peak_rss_gib"
    pairs = list(zip(ours, trl, strict=True))
    losses = [abs(a - b) for x, y in pairs for a, b in zip(x["losses"], y["losses"], strict=True)]
    summary = {
        "ours": middle(ours, speed),
        "trl": middle(trl, speed),
        "speed_ratio": middle(ours, speed) / middle(trl, speed),
        "speed_ratio_by_repetition": [mine[speed] / theirs[speed] for mine, theirs in pairs],
        "peak_rss_gib_ours": middle(ours, peak),
        "peak_rss_gib_trl": middle(trl, peak),
        "memory_ratio": middle(ours, peak) / middle(trl, peak),
        "cuda": "not measured",
        "share_of_matmul_rate": middle(ours, "share_of_matmul_rate"),
        "largest_difference_of_a_loss": max(losses),
        "same_tokens": all(run["same_tokens_as_ours"] for run in trl),
    }
    if torch.cuda.is_available():
        on_cuda = [middle(runs, "peak_cuda_gib") for runs in (ours, trl)]
        summary["cuda"] = dict(zip(("peak_gib_ours", "peak_gib_trl"), on_cuda, strict=True))
        summary["cuda"]["ratio"] = on_cuda[0] / on_cuda[1]
    return {**summary, "runs_ours": ours, "runs_trl": trl}


def show(result: dict[str, Any]) -> None:
    bases = result["bases"]
    print(
        "| base | useful tokens/s, ours | TRL | ratio | peak RSS, ours | TRL | ratio | of matmul rate, ours |"
    )
    print("|---" * 8 + "|")
    for name, base in bases.items():
        print(
            f"| {name} | {base['ours']:,.1f} | {base['trl']:,.1f} | {base['speed_ratio']:.2f} "
            f"| {base['peak_rss_gib_ours']:.2f} GiB | {base['peak_rss_gib_trl']:.2f} GiB "
            f"| {base['memory_ratio']:.2f} | {base['share_of_matmul_rate']:.0%} |"
        )
    rates = result["matmul_gflop_per_second"]
    print(f"\nbf16 matmuls: {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s")
    if result["int8_over_bf16"] is not None:
        print(f"ours, int8 / bf16: {result['int8_over_bf16']:.2f} of the speed")
    for name, base in bases.items():
        if isinstance(base["cuda"], dict):
            print(
                f"{name}, most allocated on the GPU: ours {base['cuda']['peak_gib_ours']:.2f} GiB, "
                f"TRL {base['cuda']['peak_gib_trl']:.2f} GiB, ratio {base['cuda']['ratio']:.2f}"
            )
        else:
            print(f"{name}, GPU: {base['cuda']}")
        mine, theirs = base["runs_ours"][0], base["runs_trl"][0]
        print(
            f"{name}: {mine['num_tokens']:,} tokens each; target tokens: ours {mine['num_target_tokens']:,}, "
            f"TRL {theirs['num_target_tokens']:,}, with what the template writes after an answer's end"
        )
        if not base["same_tokens"]:
            print(f"{name}: TRL's tokens are NOT ours ({theirs['num_tokens']:,} in all)")
    pairs = " | ".join(f"{name}: loss, ours | TRL | difference" for name in bases)
    print(f"\n| update | {pairs} |")
    print("|---" * (1 + 3 * len(bases)) + "|")
    first = [(base["runs_ours"][0]["losses"], base["runs_trl"][0]["losses"]) for base in bases.values()]
    for step in range(len(first[0][0])):
        cells = (f"{a[step]:.4f} | {b[step]:.4f} | {a[step] - b[step]:+.4f}" for a, b in first)
        print(f"| {step + 1} | {' | '.join(cells)} |")
    for name, base in bases.items():
        print(f"{name}: largest difference of a loss {base['largest_difference_of_a_loss']:.4f}")


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--run-trl"]:
        run_trl(Path(argv[1]), parse_config(argv[2:]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="rows in Alpaca's columns")
    parser.add_argument("--rows", type=int, default=64, help="the first so many usable rows")
    parser.add_argument("--longest", action="store_true", help="those with most tokens instead")
    parser.add_argument("--base", nargs="+", choices=list(QUANTIZATION), default=list(QUANTIZATION))
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--model", default="starter")
    parser.add_argument(
        "--random-weights", type=Path, metavar="CONFIG_DIR", help="a model of this config instead"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    command = f"python benchmarks/against_trl.py --data {args.data.name} --rows {args.rows}"
    command += " --longest" if args.longest else ""
    command += (
        f" --base {' '.join(args.base)} --repetitions {args.repetitions} --model {Path(args.model).name}"
    )
    command += f" --random-weights {args.random_weights.name}" if args.random_weights else ""
    record = provenance()
    record["environment"]["packages"]["trl"] = version("trl")
    result = {
        "what": "speed and peak memory of train.py against TRL's SFTTrainer, on the same rows and updates",
        "command": command,
        **record,
        "notes": [
            "TRL trains the tokens that the template writes after the answer's end too, ours does not",
            "on an int8 base TRL keeps its adapter in bf16, ours is in fp32",
            "our token budget is the default, 2 x 512: as many tokens as TRL's two longest examples",
        ],
        **measured,
    }
    write_result(args.out, result)
    show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
