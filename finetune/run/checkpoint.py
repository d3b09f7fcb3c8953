"""Checkpoints: what a run needs to resume, written atomically.

An update is a function of (config, seed, step), so the state of a run is its step, the adapter, the
optimizer state and the sums of the open log window. Tensors are stored as safetensors, the rest as JSON.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from finetune.config import CheckpointConfig, Config
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.given_adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    adapter_weights,
    all_weights,
    find_adapter,
    load_weights,
)
from finetune.runtime import system
from finetune.runtime.files import atomic_folder, file_sha256, tensor_bytes
from finetune.runtime.processes import on_main
from finetune.training.best import best_in_words, best_of, best_value_first
from finetune.training.loss_scale import LossScale
from finetune.training.metrics import SumWindow
from finetune.training.optim import state_bytes
from finetune.training.optim_state import kind_of, load_state, split_state

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
TRAINING_CONFIG = "training_config.yaml"  # beside a result: the configuration of its run

BASE = "base_fingerprint.txt"  # and the fingerprint of its base

CARD = "README.md"  # and what it is, as the Hugging Face Hub shows it


History = list[dict[str, Any]]
"""The eval lines of metrics.jsonl, in order: what a run decides by, before and after a kill alike"""


@dataclass
class TrainState:
    """The state of a run besides its weights."""

    base: str = ""
    """Fingerprint of the base model that the adapter belongs to"""
    step: int = 0
    """Updates made"""
    window_sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    """TokenSums since the last log line, over all ranks"""
    window_sums_by_source: dict[str, list[float]] = field(default_factory=dict)
    """Those of each source, where there are several"""


@dataclass(frozen=True)
class Trained:
    """What the updates of a run change."""

    adapter: FlatAdapter
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale

    @property
    def model(self) -> PeftModel:
        """The model that the adapter belongs to."""
        return self.adapter.model


class Checkpointer:
    """Saves and restores the state of a run: adapter, optimizer, fp16's loss scale, step, open log window."""

    def __init__(self, config: Config, accelerator: Any, trained: Trained, window: SumWindow) -> None:
        self.config, self.run_dir = config, Path(config.output_dir)
        self.trained = trained
        self._accelerator, self._window = accelerator, window
        self._base = ""

    def resume(self, source: Path | None, base: str) -> TrainState:
        """Restore the checkpoint `source`; without one, start from scratch or from `model.adapter`.

        `base` is the base model's fingerprint.

        Raises:
            ValueError: as `load_checkpoint` and `load_weights`.
        """
        self._base = base
        if source is None:
            if self.config.model.adapter is not None:
                load_weights(find_adapter(self.config.model.adapter), self.trained.model)
            return TrainState(base)
        state = load_checkpoint(source, base, self.trained)
        if self._accelerator.is_main_process:  # sums over all ranks: they must count once
            self._window.restore(state.window_sums, state.window_sums_by_source)
        return state

    def save(self, state: TrainState, history: History) -> None:
        """Write the checkpoint of `state.step` unless it exists; nothing before the first update.

        With `keep_best`, `history` says which checkpoint to keep besides the newest.
        """
        state.window_sums, *by_source = self._window.total(self._accelerator).tolist()
        state.window_sums_by_source = dict(zip(self._window.source_names, by_source, strict=True))
        if state.step > 0:
            on_main(
                self._accelerator,
                save_checkpoint,
                self.run_dir,
                state,
                self.trained,
                self.config.checkpoint,
                history,
            )

    def load_best(self, state: TrainState, history: History) -> list[str]:
        """As the function `load_best`, of this run."""
        return load_best(self.run_dir, history, self.config.checkpoint.best_by, state, self.trained.model)

    def save_result(self, folder: Path, tokenizer: Any, training_config: str, card: str) -> None:
        """As the function `save_result`, of this run."""
        save_result(folder, self.trained.model, tokenizer, training_config, card, self._base)

    def estimate_bytes(self) -> int:
        """Approximate size of one checkpoint on disk."""
        return estimate_bytes(self.trained.model, self.config.optim.name)


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step_{step:06d}"


def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    trained: Trained,
    config: CheckpointConfig,
    history: History,
) -> Path:
    """Write checkpoints/step_NNNNNN, unless it is there, and remove all but the `keep` newest and, with
    `keep_best`, the best of `history`.

    Raises:
        ValueError: the disk is full; earlier checkpoints are left as they were.
        FloatingPointError: a weight is not a finite number.
    """
    weights = adapter_weights(trained.model).values()
    if not all(bool(tensor.isfinite().all()) for tensor in weights):
        raise FloatingPointError(
            f"after update {state.step} a weight is not a finite number; it was not saved"
        )
    folder = checkpoint_dir(run_dir, state.step)
    if not (folder.exists() and fault_of(folder) is None):
        write_checkpoint(folder, state, trained)
    # Newer ones are damaged: the run resumed from an earlier one.
    written = list_checkpoints(run_dir)
    position = written.index(folder)
    best = [path for path, _ in best_first(run_dir, history, config.best_by)] if config.keep_best else []
    for other in written[:position] + written[position + config.keep :]:
        if other not in best:
            _remove(other)
    return folder


def _remove(folder: Path) -> None:
    """Remove a checkpoint. A kill leaves it whole, or a part under a name that the next start removes."""
    aside = folder.with_name(f".{folder.name}.removed.partial")
    folder.rename(aside)
    system.remove_folder(aside)


def best_first(run_dir: Path, history: History, by: str) -> Iterator[tuple[Path, str | None]]:
    """The evaluated checkpoints, each with its fault, up to the first intact one: the best by the metric
    `by`, as `best_of` finds it, then by its value, the oldest of equals first.

    Of step 0 there is no checkpoint.
    """
    trained = [entry for entry in history if entry["step"] > 0]
    for entry in [best_of(trained, by), *best_value_first(trained, by)] if trained else []:
        folder = checkpoint_dir(run_dir, entry["step"])
        fault = fault_of(folder)
        yield folder, fault
        if fault is None:
            return


def write_checkpoint(folder: Path, state: TrainState, trained: Trained) -> None:
    """Write one checkpoint atomically: into a temporary folder, flushed to disk, then renamed."""
    tensors, values = split_state(trained.optimizer, trained.adapter)
    size = tensor_bytes([*adapter_weights(trained.model).values(), *tensors.values()])
    with atomic_folder(folder, size) as staging:
        save_adapter(trained.model, staging)
        save_file(tensors, staging / OPTIMIZER)
        record = {
            **{key: value for key, value in asdict(state).items() if value != {}},
            "loss_scaler": trained.loss_scale.state_dict(),
            "optimizer_kind": kind_of(trained.optimizer),
            "optimizer": values,
        }
        _write_json(staging / STATE, record)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in staging.iterdir()
        }
        _write_json(staging / MANIFEST, files)


def save_result(
    folder: Path, model: PeftModel, tokenizer: Any, training_config: str, card: str, base: str
) -> None:
    """Write the result of a run atomically. It loads with PeftModel and AutoTokenizer.

    `training_config` (YAML) says how it was trained; `card` is its README.md; `base` identifies its base.

    Raises:
        ValueError: the disk is full.
    """
    with atomic_folder(folder, tensor_bytes(adapter_weights(model).values())) as staging:
        save_adapter(model, staging)
        tokenizer.save_pretrained(staging)
        system.write_text(staging / TRAINING_CONFIG, training_config)
        system.write_text(staging / CARD, card)
        system.write_text(staging / BASE, f"{base}\n")


def estimate_bytes(model: PeftModel, optimizer_name: str) -> int:
    """Approximate size of a checkpoint: fp32 weights and the optimizer state of each."""
    return tensor_bytes(adapter_weights(model).values()) // 4 * (4 + state_bytes(optimizer_name))


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them."""
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=all_weights(model))
    _sort_names(folder / ADAPTER_CONFIG)
    (folder / CARD).unlink()  # PEFT's template; a run's result has a card of its own


def _sort_names(path: Path) -> None:
    """Put the lists of names in order: PEFT writes sets, in an order that each process chooses anew."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    lists = ("target_modules", "exclude_modules", "modules_to_save")
    names = {key: sorted(settings[key]) for key in lists if isinstance(settings.get(key), list)}
    system.write_text(path, json.dumps(settings | names, indent=2, sort_keys=True))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, newest first.

    Raises:
        ValueError: one of them, or their folder, is a file or a link (whose target may not be this run's).
    """
    folder = checkpoints_dir(run_dir)
    found = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    for path in (folder, *found):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; put the folder itself there, or remove the link")
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file where a folder must be; remove it")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if it is intact."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if missing := {ADAPTER_WEIGHTS, ADAPTER_CONFIG, OPTIMIZER, STATE} - set(files):
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
        for name, expected in files.items():
            if name != Path(name).name or (folder / name).is_symlink():
                return f"{name} is no file of the checkpoint's own"
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has not its size"
            if file_sha256(folder / name) != expected["sha256"]:
                return f"{name} was altered"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def load_checkpoint(folder: Path, base: str, trained: Trained) -> TrainState:
    """Restore adapter, optimizer and fp16's loss scale, and return the state of the loop.

    Raises:
        ValueError: it was saved with another base, another adapter (other target modules or rank) or
            another optimizer.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    keys = {"base", "step", "window_sums", "loss_scaler", "optimizer_kind", "optimizer"}
    if not (isinstance(state, dict) and set(state) >= keys):
        raise ValueError(f"checkpoint {folder} was saved by another version: its {STATE} lacks keys")
    load_adapter(folder, trained.model)
    if state["base"] != base:
        raise ValueError(f"checkpoint {folder} was trained on another base model than this one")
    saved_kind, kind = state["optimizer_kind"], kind_of(trained.optimizer)
    if saved_kind != kind:
        raise ValueError(f"checkpoint {folder} was saved with {saved_kind}, not with {kind}")
    load_state(trained.optimizer, trained.adapter, load_file(folder / OPTIMIZER), state["optimizer"])
    trained.loss_scale.load_state_dict(state["loss_scaler"])
    return TrainState(base, state["step"], state["window_sums"], state.get("window_sums_by_source", {}))


def load_adapter(folder: Path, model: PeftModel) -> None:
    """Load the adapter of a checkpoint into the model.

    Raises:
        ValueError: it is one of another rank, of another scale or for other modules.
    """
    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for key in ("lora_alpha", "use_rslora", "use_dora"):
        now = getattr(model.peft_config["default"], key)
        if saved.get(key) != now:
            raise ValueError(f"checkpoint {folder} holds an adapter with {key} {saved.get(key)}, not {now}")
    adapter = load_file(folder / ADAPTER_WEIGHTS)
    expected = {name: tensor.shape for name, tensor in adapter_weights(model).items()}
    if {name: tensor.shape for name, tensor in adapter.items()} != expected:
        raise ValueError(f"checkpoint {folder} holds an adapter of another rank or for other modules")
    set_peft_model_state_dict(model, adapter)


def load_best(run_dir: Path, history: History, by: str, state: TrainState, model: PeftModel) -> list[str]:
    """Load the adapter of the checkpoint that is the best by the metric `by` into the model, set `state.step`
    to its step; return remarks to print."""
    tried = list(best_first(run_dir, history, by))
    damaged = [f"{folder.name} cannot be used: {fault}" for folder, fault in tried if fault is not None]
    remarks = [f"Of the {best_in_words(by)}, {damaged[0]}"] if damaged else []
    if len(damaged) == len(tried):
        return [*remarks, "No intact checkpoint was evaluated: the adapter is that of the last update."]
    best, _ = tried[-1]
    load_adapter(best, model)
    state.step = int(best.name.removeprefix("step_"))
    return remarks


def _write_json(path: Path, value: Any) -> None:
    system.write_text(path, json.dumps(value, indent=1))
