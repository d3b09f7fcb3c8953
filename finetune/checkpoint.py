"""Checkpoints: what a run needs to go on, written whole or not at all.

An update is a function of (config, seed, step), so the state of a run is its step, the adapter, the
optimizer, and the sums of the log window that was open. Tensors lie in safetensors files, the rest in JSON.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)


@dataclass
class TrainState:
    """Where a run is, beside its weights."""

    step: int = 0
    """Updates made"""
    window_sums: list[float] = field(default_factory=list)
    """TokenSums since the last log line, over all processes"""
    loss_scaler: dict[str, float | int] = field(default_factory=dict)
    """fp16 only: the state of torch.amp.GradScaler"""


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_checkpoint(
    run_dir: Path, state: TrainState, model: PeftModel, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Write checkpoints/step_NNNNNN and remove all but the `keep` newest.

    It is written beside its place, flushed to disk and then renamed, so one that has its name is whole.
    """
    folder = checkpoints_dir(run_dir) / f"step_{state.step:06d}"
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_adapter(model, staging)
    tensors, values = _split_tensors(optimizer.state_dict()["state"])
    save_file(tensors, staging / OPTIMIZER)
    _write_json(staging / STATE, {**asdict(state), "optimizer_kind": _kind(optimizer), "optimizer": values})
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in staging.iterdir()}
    _write_json(staging / MANIFEST, files)
    for path in [*staging.iterdir(), staging]:
        _flush_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
    _flush_to_disk(folder.parent)
    # Newer ones are damaged: the run went back behind them.
    written = list_checkpoints(run_dir)
    position = written.index(folder)
    for other in written[:position] + written[position + keep :]:
        shutil.rmtree(other)
    return folder


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # a form to be filled in; nothing in it is known yet


def save_adapter_and_tokenizer(folder: Path, model: PeftModel, tokenizer: Any) -> None:
    """Write the result of a run: it loads with PeftModel and AutoTokenizer. Whole or not at all."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_adapter(model, staging)
    tokenizer.save_pretrained(staging)
    for path in [*staging.iterdir(), staging]:
        _flush_to_disk(path)
    os.replace(staging, folder)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, newest first."""
    return sorted(checkpoints_dir(run_dir).glob("step_*"), reverse=True)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if missing := {ADAPTER, OPTIMIZER, STATE} - set(files):
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
        for name, expected in files.items():
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has not its size"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} was altered"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def load_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put the adapter and the optimizer into the state they were saved in, and return the rest.

    Raises:
        ValueError: it was saved with another adapter (other target modules or rank) or another optimizer.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    adapter = load_file(folder / ADAPTER)
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    if {name: tensor.shape for name, tensor in adapter.items()} != expected:
        raise ValueError(f"checkpoint {folder} holds an adapter of another rank or for other modules")
    saved_kind = state.pop("optimizer_kind")
    if saved_kind != _kind(optimizer):
        raise ValueError(f"checkpoint {folder} was saved with {saved_kind}, not with {_kind(optimizer)}")
    set_peft_model_state_dict(model, adapter)
    merged = _merge_tensors(state.pop("optimizer"), load_file(folder / OPTIMIZER))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": merged, "param_groups": groups})
    return TrainState(**state)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class; a paged one has the state of the unpaged one."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    return f"{type(inner).__module__.partition('.')[0]} {type(inner).__name__.removeprefix('Paged')}"


def _split_tensors(state: dict[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as flat tensors, `0.exp_avg`, and the same of everything else."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, value in _leaves(state):
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
        else:
            values[path] = value
    return tensors, values


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merge_tensors(values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """The inverse of `_split_tensors`: parameter index -> name -> value."""
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**values, **tensors}.items():
        index, *names = path.split(".")
        entry = state.setdefault(int(index), {})
        for name in names[:-1]:
            entry = entry.setdefault(name, {})
        entry[names[-1]] = value
    return state


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
