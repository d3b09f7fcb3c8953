"""How the processes of a run were launched: what is refused, and what must be the same for all of them."""

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import parse_flag_from_env

from finetune.config import Config, flatten
from finetune.runtime.processes import gather_objects

NONCE_SECONDS = 5.0  # a shared file system may show a new file to other nodes later


def refuse_other_engines() -> None:
    """Refuse what `accelerate launch` may ask for in the environment and the loop cannot do.

    Raises:
        ValueError: with the reason, and what to use instead.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is not supported: its engine makes the updates, so that no number could be checked "
            "before the weights change, and it saves pickles; launch with --use_fsdp --fsdp_version 2 instead"
        )
    if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "Megatron-LM is not supported: it brings models, a loop and checkpoints of its own; launch with "
            "--use_fsdp --fsdp_version 2 instead"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") == "1":
            raise ValueError(
                "FSDP1 is not supported: it lays trained and frozen weights into one tensor, which quantized "
                "ones do not survive; launch with --fsdp_version 2 instead"
            )
        if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            raise ValueError(
                "CPU offload is not supported: each pass would copy the base to the device again; launch "
                "with --fsdp_offload_params false, and set model.quantization to nf4 or use more devices"
            )
    for kind in ("tensor", "context", "sequence"):
        option = f"{kind[0]}p_size"
        size = os.environ.get(f"PARALLELISM_CONFIG_{option.upper()}", "1")
        if size != "1":
            raise ValueError(
                f"{kind} parallelism is not supported: each process computes whole examples; launch with "
                f"--parallelism_config_{option} 1 instead of {size}, and the processes share the examples"
            )


def require_same_launch(accelerator: Any, config: Config) -> None:
    """All processes must run the same code with the same settings, in one folder that all of them see.

    Raises:
        ValueError: on one process of each node, naming what differs. The others exit silently.
    """
    if accelerator.num_processes == 1:
        return
    settings = {key: str(value) for key, value in flatten(asdict(config)).items()}
    settings.pop("output_dir")  # one folder may have two paths
    require_same(accelerator, {"the program's code": _code_digest(), **settings})
    _require_shared(accelerator, Path(config.output_dir))


def require_same(accelerator: Any, values: Mapping[str, str]) -> None:
    """Each process calls this; what `values` names must be the same on all of them.

    Raises:
        ValueError: on one process of each node, naming the first difference. The others exit silently.
    """
    (first_place, first), *others = gather_objects(accelerator, (_place(accelerator), dict(values)))
    for place, theirs in others:
        for name, value in first.items():
            if theirs[name] != value:
                _end_all(
                    accelerator,
                    f"{name} must be the same on all processes, and is {value} for {first_place} and "
                    f"{theirs[name]} for {place}",
                )


def _require_shared(accelerator: Any, folder: Path) -> None:
    """All processes must see what the main one writes into the folder."""
    missing = [path for path in (folder, *folder.absolute().parents) if not os.path.lexists(path)]
    is_written, nonce = False, folder / f".{uuid.uuid4().hex}.partial"  # a name that the next start removes
    if accelerator.is_main_process:
        with suppress(OSError):  # what is wrong with the folder is said when it is looked into
            folder.mkdir(parents=True, exist_ok=True)
            nonce.touch()
            is_written = True
    is_written, name = gather_objects(accelerator, (is_written, nonce.name))[0]
    seen = gather_objects(accelerator, (_place(accelerator), not is_written or _appears(folder / name)))
    if accelerator.is_main_process:
        with suppress(OSError):
            nonce.unlink()
            for path in missing:
                path.rmdir()
    for place, sees_it in seen:
        if not sees_it:
            _end_all(
                accelerator,
                f"output_dir {folder} is not one folder: {place} does not see what {seen[0][0]} wrote there; "
                "choose one on a file system that all nodes share",
            )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + NONCE_SECONDS
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        with suppress(OSError):
            os.listdir(file.parent)  # NFS then looks again for names that were not there
    return True


def _place(accelerator: Any) -> str:
    return f"process {accelerator.process_index} on {platform.node()}"


def _end_all(accelerator: Any, message: str) -> NoReturn:
    """All processes have found the same: one of each node says so."""
    if accelerator.is_local_main_process:
        raise ValueError(message)
    raise SystemExit(2)


def _code_digest() -> str:
    """The first digits of a SHA-256 of this program's files."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in [package.parent / "train.py", *sorted(package.rglob("*"))]:
        if path.suffix in (".py", ".cpp", ".jinja"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
