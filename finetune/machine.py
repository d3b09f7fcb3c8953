"""What this machine is and can do: the Accelerator, the precision, and the record of both."""

import os
import platform
import resource
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from finetune.config import Config

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "tensorboard")
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What was asked for and what runs; `reason` says why where the two differ."""

    name: str
    asked: str
    got: str
    reason: str = ""


def choose_precision(asked: str) -> Setting:
    """bf16 becomes fp16 with loss scaling on a card that computes bf16 in software or not at all."""
    name = "precision"
    if asked == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        return Setting(name, asked, "fp16", f"{torch.cuda.get_device_name()} has no bf16; losses are scaled")
    if asked == "fp16" and not torch.cuda.is_available():
        return Setting(name, asked, "bf16", "fp16 with loss scaling needs a GPU")
    return Setting(name, asked, asked)


def create_accelerator(config: Config, precision: str) -> Accelerator:
    """The Accelerator that moves the model, scales fp16 losses, and speaks to the other processes.

    Accumulation and the schedule are the loop's own, so Accelerate is told of no accumulation.

    Raises:
        ValueError: the launcher started several processes of which Accelerate knows nothing.
    """
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # but without a successor
    # The launcher's environment would override the argument, and divide the loss a second time.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=1,
        cpu=not torch.cuda.is_available(),
        log_with="tensorboard",
        project_dir=config.output_dir,
        # The processes of an update may differ in their number of forward passes, so none may wait in one.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if accelerator.device.type == "cpu":
        _use_all_cores(accelerator.num_processes)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but Accelerate knows of {accelerator.num_processes}; each "
            "would train alone on the same data. Launch with `accelerate launch --num_processes` or torchrun"
        )
    return accelerator


def _use_all_cores(num_processes: int) -> None:
    """Undo the launchers' OMP_NUM_THREADS=1, which leaves all cores but one idle; a higher one is the
    user's own."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
        torch.set_num_threads(max(1, cores // num_processes))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads on {psutil.cpu_count(logical=False)} cores"


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: allocated on a GPU, resident (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and hardware, for a run's environment.json and a benchmark's results."""
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": device_name(accelerator.device),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "cuda": torch.version.cuda,
        "num_processes": accelerator.num_processes,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
