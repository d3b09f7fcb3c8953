"""A run's folder: whether it is new, unfinished or finished, and what lies in it beside checkpoints."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from finetune.config import Config, described_rows, flatten
from finetune.config_parsing import config_to_dict, config_to_yaml, with_current_values
from finetune.data.plan import Plan
from finetune.data.splits import Data, fingerprint_of
from finetune.model import given_adapter
from finetune.run.checkpoint import checkpoints_dir, fault_of, list_checkpoints
from finetune.runtime import system
from finetune.runtime.files import require_room, write_atomically
from finetune.runtime.locks import LOCK, folder_lock

CONFIG, ENVIRONMENT = given_adapter.RUN_FILES
RESULT, CHAT_TEMPLATE = given_adapter.RESULT, "chat_template.jinja"
METRICS, ANSWERS, EVALUATIONS = "metrics.jsonl", "answers.jsonl", "evaluations"
SOURCE = "source"
LONGEST_NAME = 100  # in characters: tensorboard/events.out.tfevents.1764482400.HOST.1.0 and the like
EXAMPLE_SUMS = ["nll", "entropy", "correct", "num_target_tokens"]
RECORDED = {"base", "int8", "data", "global_batch_size", "num_processes", "started_from"}
# Keys that change what is shown and kept, or how an update is laid out, not what it is.
FREE_KEYS = (
    "output_dir",
    "resume",
    "strict",
    "log.",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "train.micro_batch_size",
    "train.gradient_accumulation_steps",
    "train.global_batch_size",
    "train.packing",
    "train.max_tokens_per_micro_batch",
    "train.gradient_checkpointing",
    "train.sharding",
    "train.shard_over",
    "fast.attention",
    "fast.head",
)


class RunStatus(Enum):
    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


def run_status(config: Config) -> RunStatus:
    """What `output_dir` holds; nothing is written.

    Raises:
        ValueError: it holds a run and `resume` is never, a run of another configuration, or files that
            are not a run's.
    """
    folder = Path(config.output_dir)
    # A dangling link does not "exist", but it is in the way all the same.
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"output_dir {folder}: {existing} is a file, not a folder; choose another")
    system.check_path_length(folder, LONGEST_NAME)
    if not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir {folder}: {existing} cannot be written; choose another")
    if not (folder / CONFIG).exists():
        if folder.exists() and any(not _is_leftover(path) for path in folder.iterdir()):
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
    return RunStatus.FINISHED if (folder / RESULT).is_dir() else RunStatus.UNFINISHED


def _is_leftover(path: Path) -> bool:
    """Whether this is the lock, or was left by a start that was killed before its last step, writing
    config.yaml."""
    written_before = (ENVIRONMENT, CHAT_TEMPLATE)
    return path.name.startswith(LOCK) or path.name in written_before or _is_partial(path)


def _is_partial(path: Path) -> bool:
    """Whether it is a file that was being written, or one by which processes find a shared folder."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextmanager
def only_one_at_a_time(config: Config) -> Iterator[None]:
    """Lock the run's folder against a second process, on this or another computer, while this one lives.

    Raises:
        ValueError: another process holds the lock: the two would overwrite each other's files.
    """
    folder = os.path.realpath(config.output_dir)
    if os.environ.get("RANK", "0") != "0":
        yield  # rank 0 holds the lock for all ranks
        return
    name = f"finetune-{system.user()}-{hashlib.sha256(folder.encode()).hexdigest()[:24]}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"output_dir {config.output_dir} is in use by another process, which may still be finishing its "
            "last update; wait for it, or stop it"
        ) from None
    try:
        with folder_lock(Path(config.output_dir)):
            yield
    finally:
        lock.release()


def _saved_config(folder: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"output_dir {folder} holds a {CONFIG} that is not a run's; choose another")
    return with_current_values(saved)


def _differing_keys(saved: dict[str, Any], config: Config) -> list[str]:
    # A run of an older version lacks keys that were added since; it ran as their defaults do.
    before, now = flatten(config_to_dict(Config())) | flatten(saved), flatten(config_to_dict(config))
    return [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ]


def training_config(config: Config) -> str:
    """The configuration (YAML) without the keys that do not change what an update is, so that two runs which
    make the same updates write the same text."""
    kept: dict[str, Any] = {}
    for section, keys in config_to_dict(config).items():
        for name, value in keys.items() if isinstance(keys, dict) else ():
            if not f"{section}.{name}".startswith(FREE_KEYS):
                kept.setdefault(section, {})[name] = value
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def start_run(
    config: Config,
    environment: dict[str, Any],
    plan: Plan,
    data: Data,
    chat_template: str | None,
    checkpoint: Path | None,
    step: int,
    checkpoint_bytes: int,
) -> None:
    """Write environment.json, the chat template and config.yaml, and remove what a kill left half written.

    `chat_template` is the text of that of `data.chat_template`, None for the model's own. `checkpoint`, saved
    after update `step`, is what the run resumes from.

    Raises:
        ValueError: the run resumes, but with another chat template, other rows or updates of another size; or
            the disk has no room for the checkpoints that the run keeps and the one being written.
    """
    folder = Path(config.output_dir)
    started_from = _started_from(folder)
    if checkpoint is not None and checkpoint.parent != checkpoints_dir(folder):
        started_from = checkpoint.resolve()
        if step >= plan.num_steps:
            raise ValueError(
                f"resume {checkpoint} was saved after update {step}, and this run has {plan.num_steps} in all"
            )
    fingerprint = fingerprint_of(data.train, data.eval)
    if (folder / CONFIG).exists():
        if (
            chat_template is not None
            and (folder / CHAT_TEMPLATE).read_text(encoding="utf-8") != chat_template
        ):
            raise ValueError(
                f"data.chat_template {config.data.chat_template} is not the one that the run in {folder} was "
                f"trained with, which is {folder / CHAT_TEMPLATE}; restore it, or choose another output_dir"
            )
        before = read_environment(folder)
        if before["data"] != fingerprint:
            raise ValueError(
                f"the rows of {described_rows(config)} are not those that the run in {folder} was "
                "trained and evaluated on; restore them, or choose another output_dir"
            )
        if before["global_batch_size"] != plan.global_batch_size:
            raise ValueError(
                f"the run in {folder} takes {before['global_batch_size']} examples per update, and with "
                f"{plan.num_processes} process(es) this is {plan.global_batch_size}: set "
                f"train.global_batch_size to {before['global_batch_size']} and "
                "train.gradient_accumulation_steps to null"
            )
    to_write = config.checkpoint.keep + config.checkpoint.keep_best + 1 - len(list_checkpoints(folder))
    require_room(folder, to_write * checkpoint_bytes, "the run")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(".*.partial"), *checkpoints_dir(folder).glob(".*.partial")):
        system.remove_folder(leftover) if leftover.is_dir() else leftover.unlink()
    environment = {
        **environment,
        "global_batch_size": plan.global_batch_size,
        "data": fingerprint,
        # The run resumes from there again until it has a checkpoint of its own.
        "started_from": None if started_from is None else str(started_from),
    }
    write_atomically(folder / ENVIRONMENT, json.dumps(environment, indent=1, ensure_ascii=False))
    if chat_template is not None:
        write_atomically(folder / CHAT_TEMPLATE, chat_template)
    write_atomically(folder / CONFIG, config_to_yaml(replace(config, resume="auto")))


def record_adapter_step(run_dir: Path, step: int) -> None:
    """Add to environment.json the update whose adapter is the run's result."""
    environment = {**read_environment(run_dir), "adapter_step": step}
    write_atomically(run_dir / ENVIRONMENT, json.dumps(environment, indent=1, ensure_ascii=False))


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
    if not isinstance(environment, dict) or not set(environment) >= RECORDED:
        raise ValueError(f"{path} is not the record of a run")
    return _with_current_names(environment)


def _with_current_names(environment: dict[str, Any]) -> dict[str, Any]:
    """The record of an older run with today's names: `asked` and `got` became `requested` and `actual`."""
    names = {"asked": "requested", "got": "actual"}
    choices = [
        {names.get(name, name): value for name, value in choice.items()}
        for choice in environment.get("settings", [])
    ]
    int8 = "dequantize" if environment["int8"] == "dequantise" else environment["int8"]
    # Older runs chose no budget, began from no adapter, and trained no rows of added tokens.
    later: dict[str, Any] = {"token_budget": None, "model_adapter": None, "token_rows": []}
    return {**later, **environment, "int8": int8, "settings": choices}


def _started_from(folder: Path) -> Path | None:
    """The checkpoint of another run that the run in this folder started from."""
    if not (folder / CONFIG).exists():
        return None
    path = read_environment(folder)["started_from"]
    return None if path is None else Path(path)


def recorded_int8(config: Config) -> str | None:
    """How the run in output_dir multiplies int8 weights; None where there is no run yet."""
    folder = Path(config.output_dir)
    return str(read_environment(folder)["int8"]) if (folder / CONFIG).exists() else None


def recorded_token_budget(config: Config) -> int | None:
    """The tokens of a micro-batch that the run in output_dir chose; None where it chose none, or there is no
    run yet."""
    folder = Path(config.output_dir)
    recorded: int | None = read_environment(folder)["token_budget"] if (folder / CONFIG).exists() else None
    return recorded


def find_checkpoint(config: Config) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, if any, and remarks to print: which newer ones are damaged, and how the
    configuration differs if another run saved it.

    Raises:
        ValueError: the checkpoint that `resume` names is damaged, or not the newest of the run in output_dir
            and not the one that run began with.
    """
    run_dir = Path(config.output_dir)
    own = list_checkpoints(run_dir)
    origin = _started_from(run_dir)
    if config.resume not in ("auto", "never"):
        asked = Path(os.path.realpath(config.resume))  # no error for a link to itself
        if own and asked not in (origin, own[0].resolve()):
            raise ValueError(f"output_dir {run_dir} holds the newer {own[0].name}; choose another output_dir")
        origin = origin if own else asked
    lines: list[str] = []
    for folder in own:
        fault = fault_of(folder)
        if fault is None:
            return folder, lines
        lines.append(f"{folder.name} is damaged and was skipped: {fault}")
    if origin is None:
        if lines:
            lines.append("No checkpoint of this run is intact: it starts from scratch.")
        return None, lines
    if fault := fault_of(origin):
        named = origin if config.resume in ("auto", "never") else config.resume
        raise ValueError(f"resume {named} is not an intact checkpoint: {fault}")
    saved = origin.parent.parent / CONFIG
    if saved.is_file() and (differing := _differing_keys(_saved_config(saved.parent), config)):
        lines.append(f"The run that saved {origin} was configured differently: {'; '.join(differing)}")
    return origin, lines


def keep_lines_until(run_dir: Path, step: int) -> None:
    """Drop from metrics.jsonl and answers.jsonl the lines that a run resumed at `step` will write again, and
    a torn last line.

    Lines of step 0 were written before training; they are dropped only when the run starts from scratch.
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
        write_atomically(path, "".join(kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl or answers.jsonl, in order; none if the file does not exist."""
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The eval lines of metrics.jsonl, in order."""
    return [entry for entry in read_lines(run_dir / METRICS) if entry["split"] == "eval"]


def write_example_sums(
    run_dir: Path,
    step: int,
    row_numbers: Sequence[int],
    sums: Tensor,
    sources: NDArray[np.object_] | None = None,
) -> None:
    """Write the sums of each eval example, one line each, as `evaluate` returns them.

    sums [E, 4] float64: nll and entropy in nats, correct, number of target tokens. `sources` [E]: the name
    of each example's source, where there are several.
    """
    frame = pd.DataFrame(sums.numpy(), columns=EXAMPLE_SUMS)
    frame = frame.astype({"correct": int, "num_target_tokens": int})
    frame.insert(0, "row_number", row_numbers)
    if sources is not None:
        frame[SOURCE] = sources
    path = example_sums_file(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n"))


def read_example_sums(run_dir: Path, step: int) -> pd.DataFrame:
    """What `write_example_sums` wrote after `step` updates; the column `source` is there if it was given.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    path = example_sums_file(run_dir, step)
    try:
        # A source may be called 1, or NA: its name is text.
        frame = pd.read_csv(path, dtype={SOURCE: str}, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if [column for column in frame.columns if column != SOURCE] != ["row_number", *EXAMPLE_SUMS]:
        raise ValueError(f"{path} is not the record of an evaluation")
    return frame


def example_sums_file(run_dir: Path, step: int) -> Path:
    return run_dir / EVALUATIONS / f"step_{step:06d}.csv"
