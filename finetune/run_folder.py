"""A run's folder: whether it is new, unfinished or finished, and what lies in it beside checkpoints."""

import json
import os
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from finetune.batching import Plan
from finetune.chat import Examples
from finetune.checkpoint import fault_of, list_checkpoints, require_room
from finetune.config import Config, config_to_dict, config_to_yaml, flatten

CONFIG, ENVIRONMENT, ADAPTER = "config.yaml", "environment.json", "adapter"
METRICS, ANSWERS = "metrics.jsonl", "answers.jsonl"
# Keys that change what is shown and kept, or how an update is laid out, not what it is.
FREE_KEYS = (
    "output_dir",
    "resume",
    "strict",
    "log.",
    "checkpoint.",
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.packing",
    "train.max_tokens_per_micro_batch",
    "train.gradient_checkpointing",
)


class RunStatus(Enum):
    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


def run_status(config: Config) -> RunStatus:
    """What `output_dir` holds; nothing is written.

    Raises:
        ValueError: it holds a run and `resume` is never, a run of another configuration, or no run but
            other files.
    """
    folder = Path(config.output_dir)
    # A link that leads nowhere "exists" not, and is in the way all the same.
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"output_dir {folder}: {existing} is a file, not a folder; choose another")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir {folder}: {existing} cannot be written; choose another")
    if not (folder / CONFIG).exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"output_dir {folder} holds other files and no run; choose another")
        return RunStatus.NEW
    if config.resume == "never":
        raise ValueError(f"output_dir {folder} holds a run and resume is never; choose another, or delete it")
    differing = _differing_keys(_saved_config(folder), config)
    if differing:
        raise ValueError(
            f"output_dir {folder} holds a run of another configuration ({'; '.join(differing)}); "
            "choose another output_dir, or delete it"
        )
    return RunStatus.FINISHED if (folder / ADAPTER).is_dir() else RunStatus.UNFINISHED


def _saved_config(folder: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"output_dir {folder} holds a {CONFIG} that is no run's; choose another")
    return saved


def _differing_keys(saved: dict[str, Any], config: Config) -> list[str]:
    before, now = flatten(saved), flatten(config_to_dict(config))
    return [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ]


def start_run(
    config: Config,
    environment: dict[str, Any],
    plan: Plan,
    train_set: Examples,
    eval_set: Examples,
    checkpoint_bytes: int,
) -> None:
    """Write config.yaml and environment.json.

    Raises:
        ValueError: the run goes on, but with other rows, or with updates of another size; or the disk has no
            room for the checkpoints that the run keeps and the one it writes beside them.
    """
    folder = Path(config.output_dir)
    data = data_of(train_set, eval_set)
    environment = {**environment, "global_batch_size": plan.global_batch_size, "data": data}
    if (folder / ENVIRONMENT).exists():
        before = read_environment(folder)
        if before["data"] != data:
            raise ValueError(
                f"the rows of {config.data.path} are not those that the run in {folder} was trained on; "
                "restore them, or choose another output_dir"
            )
        if before["global_batch_size"] != plan.global_batch_size:
            raise ValueError(
                f"the run in {folder} takes {before['global_batch_size']} examples per update, and with "
                f"{plan.num_processes} process(es) this is {plan.global_batch_size}: set "
                "train.gradient_accumulation_steps or train.micro_batch_size so that the product is the same"
            )
    require_room(
        folder, (config.checkpoint.keep + 1 - len(list_checkpoints(folder))) * checkpoint_bytes, "the run"
    )
    folder.mkdir(parents=True, exist_ok=True)
    # What the run first went on from stays on record: it does so again until it has its own checkpoint.
    _write(folder / CONFIG, config_to_yaml(replace(config, resume=_origin(config))))
    _write(folder / ENVIRONMENT, json.dumps(environment, indent=1, ensure_ascii=False))


def data_of(train_set: Examples, eval_set: Examples) -> dict[str, Any]:
    """What tells the examples of one run from those of another."""
    return {
        "train_examples": len(train_set.dataset),
        "eval_examples": len(eval_set.dataset),
        "fingerprint": f"{train_set.fingerprint}-{eval_set.fingerprint}",
    }


def read_environment(run_dir: Path) -> dict[str, Any]:
    """What `start_run` wrote.

    Raises:
        ValueError: it cannot be read, or is none of ours.
    """
    path = run_dir / ENVIRONMENT
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(environment, dict) or not {"data", "global_batch_size", "num_processes"} <= set(
        environment
    ):
        raise ValueError(f"{path} is no record of a run")
    return environment


def _origin(config: Config) -> str:
    """The `resume` that the run in output_dir was first launched with."""
    folder = Path(config.output_dir)
    if not (folder / CONFIG).exists():
        return config.resume
    return str(_saved_config(folder).get("resume", "auto"))


def find_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and a line for each newer one that is damaged.

    Raises:
        ValueError: the checkpoint that `resume` names is damaged, not the newest of its run, or not the one
            that the run in output_dir went on from.
    """
    run_dir = Path(config.output_dir)
    own = list_checkpoints(run_dir)
    origin = _origin(config)
    if config.resume not in ("auto", "never"):
        asked = Path(config.resume)
        if not own and (fault := fault_of(asked)):
            raise ValueError(f"resume {asked} is no whole checkpoint: {fault}")
        if own and config.resume != origin and asked.resolve() != own[0].resolve():
            raise ValueError(f"output_dir {run_dir} holds the newer {own[0].name}; choose another output_dir")
        origin = origin if own else config.resume
    skipped: list[str] = []
    for folder in own:
        fault = fault_of(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"{folder.name} is damaged and was passed over: {fault}")
    return None if origin in ("auto", "never") else Path(origin), skipped


def keep_lines_until(run_dir: Path, step: int) -> None:
    """Drop the lines that a run going on from `step` will write again, and a torn last one, of metrics.jsonl
    and answers.jsonl.

    Lines of step 0 were written before training, and are made anew only when it starts anew.
    """
    for path in (run_dir / METRICS, run_dir / ANSWERS):
        if not path.exists():
            continue
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and 0 < step >= entry.get("step", step + 1):
                kept.append(line + "\n")
        _write(path, "".join(kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl or answers.jsonl, in order; none where it is not there."""
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The eval lines of metrics.jsonl, in order."""
    return [entry for entry in read_lines(run_dir / METRICS) if entry["split"] == "eval"]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
