"""Rows per second from files to tokens and labels: this program's preparation against TRL's, and its memory.

    python benchmarks/preparation.py --data ../shared/data/alpaca_9229.json --rows 52000 --out results.json

The rows of the file are repeated, with the words of their instructions in another order, until there are so
many: as many tokens, and few near duplicates. Both programs use as many processes, in pairs, each with an
empty cache. Ours reads the file, cleans, splits, tokenizes, masks, looks for leaks and fingerprints; TRL's is
SFTTrainer's constructor with dataset_num_proc, on rows that are in memory as prompt and completion, and it
does not look for leaks. Then ours again, from its cache.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from common import provenance, write_result

from finetune.config import Config, DataConfig
from finetune.data.conversations import to_messages
from finetune.data.splits import fingerprint_of, load_data
from finetune.model.load import load_tokenizer
from finetune.model.starter import starter_model_dir

MAX_LENGTH = 512


def write_rows(source: Path, count: int, out: Path) -> None:
    """`count` different rows as JSON lines."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    with out.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = dict(rows[number % len(rows)])
            if number >= len(rows):
                words = row["instruction"].split()
                random.Random(number).shuffle(words)
                row["instruction"] = " ".join(words)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def prepare_ours(rows: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(Config())
    start = time.perf_counter()
    config = Config(data=DataConfig(path=str(rows), max_length=MAX_LENGTH))
    data = load_data(config, tokenizer)
    fingerprint = fingerprint_of(data.train, data.eval)
    parts = (data.train, data.eval)
    lengths, counts = [part.lengths for part in parts], [part.target_counts for part in parts]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "examples": len(data.train.dataset) + len(data.eval.dataset),
        "tokens": sum(int(part.sum()) for part in lengths),
        "target_tokens": sum(int(part.sum()) for part in counts),
        "leaks": len(data.leaks),
        **fingerprint,
    }


def prepare_trl(rows: Path, processes: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    turns = [to_messages(row, None) for row in read if row["output"].strip()]
    table = Dataset.from_list([{"prompt": own[:-1], "completion": own[-1:]} for own in turns])
    config = AutoConfig.from_pretrained(starter_model_dir())
    config.num_hidden_layers, config.layer_types = 1, None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(Config())
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_length=MAX_LENGTH,
            completion_only_loss=True,
            dataset_num_proc=processes,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        start = time.perf_counter()
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=table, processing_class=tokenizer)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "examples": len(trainer.train_dataset)}


def run(arguments: Sequence[str], cache: Path) -> dict[str, Any]:
    """What this file reports when it is run so, with a cache of its own, and the peak memory it took: of the
    first process (resident) and of all (each page once)."""
    out = cache / "result.json"
    cache.mkdir(exist_ok=True)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--report", str(out), *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            first = psutil.Process(process.pid)
            peak = max(peak, sum(p.memory_full_info().pss for p in [first, *first.children(recursive=True)]))
        except psutil.Error:  # one of them has just ended
            pass
        time.sleep(0.2)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return {**result, "peak_gib_of_all_processes": peak / 2**30}


def report(arguments: Sequence[str], out: Path) -> None:
    name, rows, processes = arguments
    result = prepare_ours(Path(rows)) if name == "ours" else prepare_trl(Path(rows), int(processes))
    result["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    out.write_text(json.dumps(result), encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--report"]:
        report(argv[2:], Path(argv[1]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a JSON array of Alpaca rows")
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    starter_model_dir()  # fetched before anything is measured
    processes = len(os.sched_getaffinity(0))
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": [], "ours_again": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(args.data, args.rows, rows)
        for number in range(args.repetitions):
            for name in ("ours", "trl", "ours_again"):
                if name == "trl" and args.without_trl:
                    continue
                program = name.removesuffix("_again")
                cache = Path(folder) / f"{program}-{number}"
                runs[name].append(run([program, str(rows), str(processes)], cache))
                print(f"{name}: {args.rows / runs[name][-1]['seconds']:,.0f} rows/s", file=sys.stderr)
    result = {
        "what": "rows per second from files to tokens and labels",
        "rows": args.rows,
        "processes": processes,
        **provenance(),
        "trl": version("trl"),
        "median_rows_per_second": {
            name: args.rows / median(one["seconds"] for one in many) for name, many in runs.items() if many
        },
        "runs": runs,
    }
    write_result(args.out, result)
    print(f"| {args.rows:,} rows, {processes} processes | rows/s | s | peak RSS | all processes |")
    print("|---|---|---|---|---|")
    for name, many in runs.items():
        for one in many:
            print(
                f"| {name} | {args.rows / one['seconds']:,.0f} | {one['seconds']:.1f} "
                f"| {one['peak_rss_gib']:.2f} GiB | {one['peak_gib_of_all_processes']:.2f} GiB |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
