"""The Accelerator, the precision, and the record of this machine."""

import ctypes
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradScalerKwargs, InitProcessGroupKwargs, parse_flag_from_env

from finetune.config import Config
from finetune.runtime import system
from finetune.runtime.choice import Choice
from finetune.runtime.launch import refuse_other_engines, require_same_launch
from finetune.runtime.memory import GIB
from finetune.runtime.processes import PEER_TIMEOUT, num_nodes, under_accelerate_launch

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "tensorboard")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def describe_machine(accelerator: Accelerator, trackers: Sequence[str]) -> list[Choice]:
    """Device, processes, data workers and trackers, as requested and actual."""
    device, processes = accelerator.device, accelerator.num_processes
    workers = Choice("data workers", "0", "0")
    return [_describe_device(device), _describe_processes(processes), workers, _describe_trackers(trackers)]


def installed_trackers(names: Sequence[str]) -> list[str]:
    """TensorBoard, and those of `names` whose packages are installed."""
    available = [str(tracker) for tracker in get_available_trackers()]
    return [name for name in dict.fromkeys(("tensorboard", *names)) if name in available]


def _describe_trackers(names: Sequence[str]) -> Choice:
    """The trackers, with the command that installs those that are missing."""
    requested, actual = dict.fromkeys(("tensorboard", *names)), installed_trackers(names)
    missing = " ".join(name for name in requested if name not in actual)
    reason = f"not installed; to have them: pip install {missing}" if missing else ""
    return Choice("trackers", ", ".join(requested), ", ".join(actual), reason)


def _describe_device(device: torch.device) -> Choice:
    """A torch build for CUDA or ROCm requests a GPU, unless the launcher was told to use the CPU."""
    actual = device.type
    told_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if actual == "cpu" and torch.version.cuda and not told_cpu:
        supported = _driver_cuda_version()
        if supported is None or supported >= _as_numbers(torch.version.cuda)[:1]:  # minor versions fit
            reason = f"torch is built for CUDA {torch.version.cuda} and finds no GPU that it can use"
        else:
            version = ".".join(map(str, supported))
            reason = (
                f"the NVIDIA driver is too old: it supports CUDA {version}, and this torch needs "
                f"{torch.version.cuda}; update the driver, or install a torch for CUDA {version} or older"
            )
        return Choice("device", "cuda", actual, reason)
    if actual == "cpu" and torch.version.hip and not told_cpu:
        reason = f"torch is built for ROCm {torch.version.hip} and finds no GPU that it can use"
        return Choice("device", "cuda", actual, reason)
    return Choice("device", actual, actual)


def on_apple_gpu() -> bool:
    """Whether this process computes on the GPU of a Mac: torch calls it "mps"."""
    return torch.backends.mps.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over many tokens are kept in: fp64 resolves one token's part of a million nats; fp32 on
    Apple's GPUs, which have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _driver_cuda_version() -> tuple[int, int] | None:
    """The newest version of CUDA that the NVIDIA driver supports, such as (12, 4); None without a driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL(system.CUDA_DRIVER).cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else (number.value // 1000, number.value % 1000 // 10)


def _describe_processes(num_processes: int) -> Choice:
    """On a CPU, `accelerate launch` starts one process even if several were requested: it sets up a
    rendezvous address, and starts one."""
    name, actual = "processes", str(num_processes)
    if under_accelerate_launch() and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        reason = "on a CPU accelerate launch starts one; torchrun --nproc_per_node N train.py starts N"
        return Choice(name, "several", actual, reason)
    return Choice(name, actual, actual)


def choose_precision(requested: str) -> Choice:
    """bf16 becomes fp16 with loss scaling on a GPU without native bf16; fp16 becomes bf16 on a CPU."""
    name = "precision"
    if on_apple_gpu():
        if requested == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
            return Choice(name, requested, "fp16", "macOS has bf16 from version 14 on; losses are scaled")
        return Choice(name, requested, requested)
    if requested == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        return Choice(
            name, requested, "fp16", f"{torch.cuda.get_device_name()} has no bf16; losses are scaled"
        )
    if requested == "fp16" and not torch.cuda.is_available():
        return Choice(name, requested, "bf16", "fp16 with loss scaling needs a GPU")
    return Choice(name, requested, requested)


def create_accelerator(config: Config, precision: str) -> Accelerator:
    """The Accelerator: device, autocast, and communication between ranks.

    Accumulation, the schedule and fp16's loss scale are the loop's own.

    Raises:
        ValueError: the launcher started several processes and Accelerate does not see them, or it asks for
            what `refuse_other_engines` refuses; or as `require_same_launch`.
    """
    refuse_other_engines()
    # oneDNN caches a compiled program for each shape. Each update has another number of tokens, so that its
    # default of 1024 programs grows to half a GiB. A forward and backward pass needs about 150.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # What cuBLAS wants for the same bits each time (`compute_same_bits`), set before it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The launcher's environment would override the argument and divide the loss a second time.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    # FSDP is the loop's own too: Accelerate's would shard the adapter, and transformers load by it.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=1,
        cpu=not (torch.cuda.is_available() or on_apple_gpu()),
        log_with="tensorboard",
        project_dir=config.output_dir,
        kwargs_handlers=[GradScalerKwargs(enabled=False), InitProcessGroupKwargs(timeout=PEER_TIMEOUT)],
    )
    if accelerator.device.type == "cpu":
        _use_all_cores(int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    else:
        compute_same_bits()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but Accelerate knows of {accelerator.num_processes}; each "
            "would train alone on the same data. Launch with `accelerate launch --num_processes` or torchrun"
        )
    require_same_launch(accelerator, config)
    return accelerator


def compute_same_bits() -> None:
    """Have a GPU add in a fixed order, so that a run that resumes computes the bits of one that did not stop.

    Without this, the gradients of attention differ from run to run. Where torch has no such order, it warns.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That would also fill each new tensor, to reveal what reads it before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _use_all_cores(num_local_processes: int) -> None:
    """Undo the launchers' OMP_NUM_THREADS=1, which leaves all cores but one idle; a higher value is the
    user's own."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = min(psutil.cpu_count(logical=False) or 1, system.available_cpus())
        torch.set_num_threads(max(1, cores // num_local_processes))


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed dropout's random state: its noise depends on these three numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, {system.processor()}"
    return f"CPU, {torch.get_num_threads()} threads on {psutil.cpu_count(logical=False)} cores"


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the device in matrix multiplications: the best of ten, measured now."""
    dtype = DTYPES[precision]
    size = 1024 if device.type == "cpu" else 4096
    # Random numbers: with constants a GPU's multipliers switch less, draw less power and clock higher.
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        return time.perf_counter() - start

    return 2 * size**3 / min(seconds() for _ in range(10))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and hardware, for a run's environment.json and a benchmark's results."""
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": device_name(accelerator.device),
        "processor": system.processor(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "cuda": torch.version.cuda,
        "num_processes": accelerator.num_processes,
        "num_nodes": num_nodes(),
    }
