"""The steps of `on_a_gpu.py`. Each runs in a process of its own, and returns the numbers of its row."""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import ROOT, as_prompts_and_completions, settings, trl_settings
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from update import PARTS, Program, make_update, set_up

import train
from finetune.config import Config, examples_per_update
from finetune.config_parsing import parse_config
from finetune.data.collate import MicroBatch, iterate_batches
from finetune.data.order import epoch_order
from finetune.data.plan import make_plan, requested_budget
from finetune.data.rows import load_rows
from finetune.model.fast_paths import choose_fast_paths
from finetune.model.load import load_base, load_tokenizer
from finetune.run.folder import METRICS, read_lines
from finetune.runtime.memory import GIB, peak_memory_gib, peak_reserved_gib, reset_peak_memory, room_on
from finetune.training.comparison import compare_paths, randomize_adapter
from finetune.training.memory_model import measure_update, predict
from finetune.training.setup import load_parts

SMALL_CARD = 6e9 - 0.5e9  # bytes: of a 6 GB card, about half a GB is CUDA's context and the screen
TURING = (7, 5)


class NotMeasuredError(Exception):
    """Why a step has nothing to show on this machine."""


@dataclass(frozen=True)
class Job:
    """What all steps work on."""

    model: str
    rows: str
    folder: str
    is_tiny: bool
    """A tiny model on a CPU: everything runs, and no number means anything"""

    @property
    def num_updates(self) -> int:
        return 4 if self.is_tiny else 40

    @property
    def num_dropped(self) -> int:
        """The first updates: they compile kernels, and fill the allocator."""
        return 1 if self.is_tiny else 10

    def argv(self, name: str, changes: dict[str, Any]) -> list[str]:
        """Arguments of train.py for a run with this name."""
        sizes = (
            {"data.max_length": 64, "data.num_samples": 40, "eval.at_start": False} if self.is_tiny else {}
        )
        updates = {"train.max_steps": self.num_updates}
        run_dir = Path(self.folder) / name
        return settings(Path(self.rows), run_dir, self.model, {**sizes, **updates, **changes})

    def config(self, name: str, changes: dict[str, Any]) -> Config:
        return parse_config(self.argv(name, changes))


def require_card() -> torch.device:
    if not torch.cuda.is_available():
        raise NotMeasuredError("needs a card")
    return torch.device("cuda")


def run_tests(job: Job) -> dict[str, Any]:
    """tests/test_cuda.py"""
    require_card()
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"ok": done.returncode == 0, "summary": lines[-1] if lines else "", "failed": failed}


def compare(job: Job, base: str, precision: str) -> dict[str, Any]:
    """The paths that are chosen, and what `verify` says of them."""
    changes = {"model.quantization": base, "train.mixed_precision": precision, "lora.lora_dropout": 0}
    config = job.config(f"verify-{base}-{precision}", changes)
    parts = load_parts(config)
    randomize_adapter(parts.model)
    paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    compared = compare_paths(config, parts, paths.packed, num_updates=2)
    return {
        "ok": compared.agrees,
        "precision": parts.precision.actual,
        "paths": {choice.name: [choice.requested, choice.actual, choice.reason] for choice in paths},
        "fast_errors": [error._asdict() for error in compared.fast_errors],
        "reference_errors": [error._asdict() for error in compared.reference_errors],
        "peak_gib": {"fast": compared.fast.peak_gib, "reference": compared.reference.peak_gib},
    }


def imitate_turing(job: Job) -> dict[str, Any]:
    """`compare` as on a card without bf16, FlashAttention and Triton's products."""
    require_card()
    with (
        patch.object(torch.cuda, "get_device_capability", lambda *_: TURING),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_: False),
    ):
        return compare(job, "int8", "bf16")


def train_on_a_small_card(job: Job) -> dict[str, Any]:
    """The seed job, with an evaluation and a checkpoint, in the memory of a 6 GB card."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, SMALL_CARD / total))
    changes = {"data.eval_fraction": 0.1, "checkpoint.every_steps": job.num_updates // 2}
    run_dir, _ = run_quietly(job, "small-card", changes)
    return {"ok": (run_dir / "adapter").is_dir(), **peaks()}


def predict_memory(job: Job) -> dict[str, Any]:
    """What `plan` predicts of the largest update, beside what it took; and the budget that would fit."""
    config = job.config("plan", {"train.max_steps": "null"})
    parts = load_parts(config)
    paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    predicted = predict(config, parts.accelerator, parts.token_loss, paths.packed)
    plan = make_plan(config, parts.train_set, paths.packed, 0, 1, requested_budget(config))
    measured = measure_update(config, parts, plan)
    usable = room_on(parts.accelerator.device).usable_gib
    return {
        "ok": True,
        "tokens": measured.largest_batch,
        "predicted_gib": predicted.of_update(measured.largest_batch) / GIB,
        "measured_gib": measured.peak_gib,
        "usable_gib": usable,
        "fitting_tokens": predicted.largest_budget(usable),
    }


def measure_phases(job: Job) -> dict[str, Any]:
    """The peak of each part of an update, allocated and reserved."""
    program, batches = prepare(job)
    of_part: dict[str, dict[str, Any]] = {}

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        reset_peak_memory(program.accelerator.device)
        yield
        of_part[name] = peaks()

    for step in range(job.num_dropped + 1):
        make_update(program, batches[step % len(batches)], step, measured)
    return {"ok": True, "parts": {name: of_part[name] for name in PARTS if name in of_part}}


def profile_updates(job: Job) -> dict[str, Any]:
    """Kernels of an update, how long the card computes, the twenty longest kernels, and the waits."""
    program, batches = prepare(job)
    has_card = torch.cuda.is_available()

    @contextmanager
    def labelled(name: str) -> Iterator[None]:
        with torch.profiler.record_function(name):
            yield

    def update(step: int) -> None:
        make_update(program, batches[step % len(batches)], step, labelled)

    for step in range(job.num_dropped):
        update(step)
    count = 2 if job.is_tiny else 5
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_card else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for step in range(count):
            update(job.num_dropped + step)
        if has_card:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name not in PARTS:
            kernels.setdefault(event.name, []).append(event.device_time_total / 1e6)
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:20]
    busy = sum(sum(times) for times in kernels.values())
    waits = [event for event in profiler.events() if event.name in ("cudaStreamSynchronize", "cudaMemcpy")]
    return {
        "ok": True,
        "seconds_per_update": seconds / count,
        "kernels_per_update": sum(map(len, kernels.values())) / count if has_card else None,
        "busy_share": busy / seconds if has_card else None,
        "waits_per_update": len(waits) / count if has_card else None,
        "longest": [[name, len(kernels[name]) / count, sum(kernels[name]) / count] for name in longest],
    }


def measure_speed(job: Job, changes: dict[str, Any]) -> dict[str, Any]:
    """Useful tokens per second of train.py, and its peak."""
    name = "-".join(f"{key}-{value}" for key, value in changes.items()) or "default"
    _, lines = run_quietly(job, f"speed-{name}", changes)
    speeds = [line["useful_tokens_per_second"] for line in lines[job.num_dropped :]]
    return {"ok": True, "useful_tokens_per_second": median(speeds), **peaks()}


def measure_trl(job: Job, base: str, dropout: float, **options: Any) -> dict[str, Any]:
    """Useful tokens per second of TRL's SFTTrainer with these options, and its peak."""
    require_package("trl")
    if options.get("use_liger_kernel"):
        require_package("liger_kernel")
    config = job.config("trl", {"model.quantization": base, "lora.lora_dropout": dropout})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return run_trl(job, config, load_base(config.model, "bf16", device), **options)


def measure_unsloth(job: Job) -> dict[str, Any]:
    """Unsloth on its fast case: nf4, without dropout."""
    require_card()
    require_package("unsloth")
    from unsloth import FastLanguageModel

    config = job.config("unsloth", {"model.quantization": "nf4", "lora.lora_dropout": 0})
    model, _ = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=config.data.max_length, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=0,
        target_modules=config.lora.target_modules,
    )
    return run_trl(job, config, model, has_adapter=True)


class Clock(TrainerCallback):
    """When each update ended, on the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def run_trl(
    job: Job, config: Config, model: Any, has_adapter: bool = False, **options: Any
) -> dict[str, Any]:
    from peft import LoraConfig, TaskType
    from trl import SFTConfig, SFTTrainer

    adapter = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.lora_alpha,
        lora_dropout=config.lora.lora_dropout,
        target_modules=config.lora.target_modules,
        task_type=TaskType.CAUSAL_LM,
    )
    rows, clock = load_rows(config.data).train, Clock()
    order = epoch_order(config.train.seed, 0, len(rows)).tolist()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **{
                **trl_settings(config, tempfile.mkdtemp(prefix="trl-", dir=job.folder)),
                "max_steps": job.num_updates,
                "max_length": config.data.max_length,
                "completion_only_loss": True,
                "bf16": True,
                "use_cpu": not torch.cuda.is_available(),
                **options,
            }
        ),
        train_dataset=as_prompts_and_completions(rows.select(order)),
        processing_class=load_tokenizer(config),
        peft_config=None if has_adapter else adapter,
        callbacks=[clock],
    )
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    trainer.train()
    size = examples_per_update(config.train, 1)
    first, last = job.num_dropped, len(clock.times)
    tokens = sum(lengths[first * size : last * size])
    seconds = clock.times[-1] - clock.times[first - 1]
    return {"ok": True, "useful_tokens_per_second": tokens / seconds, **peaks()}


def require_package(name: str) -> None:
    if find_spec(name) is None:
        raise NotMeasuredError(f"{name} is not installed, and no wheel of it was given")


def prepare(job: Job) -> tuple[Program, list[MicroBatch]]:
    """The program on its fast paths, and its first micro-batches."""
    config = job.config("update", {})
    parts = load_parts(config)
    program = set_up(config, parts.accelerator, parts.precision.actual, parts.adapter, parts.token_loss)
    paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    plan = make_plan(config, parts.train_set, paths.packed, 0, 1, requested_budget(config))
    batches = [
        batch
        for step in range(3)
        for batch in iterate_batches(
            plan.update(step).micro_batches,
            parts.train_set.dataset,
            paths.packed,
            parts.accelerator.device,
        )
    ]
    return program, batches


def run_quietly(job: Job, name: str, changes: dict[str, Any]) -> tuple[Path, list[dict[str, Any]]]:
    """Run train.py in this process. Returns its folder and the train lines of its metrics.

    Raises:
        RuntimeError: it ended with an error.
    """
    argv, printed = job.argv(name, changes), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = train.main(argv)
    if code != 0:
        raise RuntimeError(f"train.py ended with {code}: {printed.getvalue()[-2000:]}")
    run_dir = Path(parse_config(argv).output_dir)
    return run_dir, [line for line in read_lines(run_dir / METRICS) if line["split"] == "train"]


def peaks() -> dict[str, float | None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"peak_gib": peak_memory_gib(device), "reserved_gib": peak_reserved_gib(device)}
