"""What the benchmarks share: the rows, a run of train.py in a process of its own, and the record of both."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune.config import Config  # noqa: E402
from finetune.config_parsing import parse_config  # noqa: E402
from finetune.data.conversations import to_messages  # noqa: E402
from finetune.data.plan import Plan, make_plan  # noqa: E402
from finetune.data.preparing.examples import Examples, tokenize_rows  # noqa: E402
from finetune.data.rows import iterate_rows, load_rows  # noqa: E402
from finetune.model.load import load_tokenizer  # noqa: E402
from finetune.run.folder import METRICS, read_environment, read_lines  # noqa: E402
from finetune.runtime.accelerator import environment  # noqa: E402

CODE = ("train.py", "finetune", "configs", "benchmarks/*.py")


def settings(rows_file: Path, run_dir: Path, model: str, changes: dict[str, Any]) -> list[str]:
    """Arguments of train.py: the Alpaca job on all of these rows, an epoch, without evaluation, every update
    logged, and a checkpoint at the end only; `changes` are keys and values of the configuration."""
    values = {
        "model.name_or_path": model,
        "data.path": rows_file,
        "data.eval_fraction": 0,
        "data.num_samples": "null",
        "train.num_epochs": 1,
        "checkpoint.every_steps": 10**6,
        "log.every_steps": 1,
        "log.progress": "false",
        "output_dir": run_dir,
        **changes,
    }
    pairs = [[f"--{key}", str(value)] for key, value in values.items()]
    return ["--config", str(ROOT / "configs" / "alpaca.yaml"), *(part for pair in pairs for part in pair)]


def trl_settings(config: Config, output_dir: str) -> dict[str, Any]:
    """Arguments of TRL's SFTConfig that make the updates of `config`: the same sizes, optimizer, schedule and
    order of examples, each update logged, nothing saved or reported."""
    return {
        "output_dir": output_dir,
        "num_train_epochs": config.train.num_epochs,
        "per_device_train_batch_size": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "learning_rate": config.optim.learning_rate,
        "lr_scheduler_type": config.optim.schedule,
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.max_grad_norm,
        "optim": config.optim.name,
        "packing": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def usable_rows(
    path: Path, model: str, limit: int | None = None
) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """The first `limit` rows that become an example, in the file's order, and the tokens of each."""
    config = parse_config(settings(path, Path("unused"), model, {}))
    rows = load_rows(config.data).train
    if limit is not None:  # twice as many: some may be left without a target token
        rows = rows.select(range(min(len(rows), 2 * limit)))
    examples = tokenize_rows(rows, load_tokenizer(config), config.data)
    by_number = {row["row_number"]: row for row in iterate_rows(rows)}
    kept = [dict(by_number[number]) for number in examples.dataset["row_number"]]
    for row in kept:
        del row["row_number"]
    return kept[:limit], examples.lengths[:limit]


def as_prompts_and_completions(rows: Dataset) -> Dataset:
    """A table of rows as TRL takes it: the last turn of each apart from those before it."""
    turns = [to_messages(row, None) for row in iterate_rows(rows)]
    return Dataset.from_list([{"prompt": own[:-1], "completion": own[-1:]} for own in turns])


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text(json.dumps(list(rows)), encoding="utf-8")


def examples_and_plan(argv: Sequence[str]) -> tuple[Examples, Plan]:
    """The examples that train.py trains on with these arguments, and its updates."""
    config = parse_config(argv)
    examples = tokenize_rows(load_rows(config.data).train, load_tokenizer(config), config.data)
    return examples, make_plan(config, examples, config.train.packing, rank=0, num_processes=1)


def run_process(arguments: Sequence[str]) -> float:
    """Run `python ARGUMENTS` on all cores, quietly, and return its peak RSS in GiB.

    Raises:
        RuntimeError: it failed, or its peak cannot be told: Linux counts from that of the parent process.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(physical_cores())}
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)  # so that nobody waits for it again
        if code != 0:
            output.seek(0)
            text = output.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"{arguments[0]} ended with {code}:\n{text}")
    if usage.ru_maxrss <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
        raise RuntimeError(f"{arguments[0]} needed no more memory than this program, which hides its peak")
    return usage.ru_maxrss * 1024 / 2**30


@dataclass(frozen=True)
class Run:
    """A run of train.py: its train lines of metrics.jsonl, and what it took.

    `seconds` are those of its updates: without the start, evaluation and checkpoints.
    """

    updates: list[dict[str, Any]]
    seconds: float
    num_tokens: int
    num_target_tokens: int
    peak_rss_gib: float
    int8: str


def run_train(argv: Sequence[str]) -> Run:
    """train.py with these arguments, in a process of its own."""
    run_dir = Path(parse_config(argv).output_dir)
    peak_rss_gib = run_process([str(ROOT / "train.py"), *argv])
    updates = [entry for entry in read_lines(run_dir / METRICS) if entry["split"] == "train"]
    plan = examples_and_plan(argv)[1]
    planned = [plan.update(entry["step"] - 1) for entry in updates]
    assert [update.num_target_tokens for update in planned] == [e["num_target_tokens"] for e in updates]
    tokens = [update.num_tokens for update in planned]
    return Run(
        updates=updates,
        seconds=sum(n / e["useful_tokens_per_second"] for n, e in zip(tokens, updates, strict=True)),
        num_tokens=sum(tokens),
        num_target_tokens=sum(update.num_target_tokens for update in planned),
        peak_rss_gib=peak_rss_gib,
        int8=read_environment(run_dir)["int8"],
    )


def physical_cores() -> int:
    return min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))


def matmul_gflop_per_second() -> float:
    """What the machine multiplies at in bf16 now: the best shape, each by its median of several."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(physical_cores())
    shapes = [(1024, 576, 1536), (1024, 1536, 576), (2048, 2048, 2048)]
    if device.type == "cuda":
        shapes.append((8192, 8192, 8192))
    return max(2 * n * k * m / _seconds(n, k, m, device) for n, k, m in shapes) / 1e9


def _seconds(n: int, k: int, m: int, device: torch.device) -> float:
    a = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    b = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[2:])  # the first ones warm up


def provenance() -> dict[str, Any]:
    """The code, the versions and the hardware."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    torch.set_num_threads(physical_cores())
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", *CODE)),
        "environment": environment(Accelerator(cpu=not torch.cuda.is_available())),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
