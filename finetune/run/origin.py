"""What a run began from: the adapter that `model.adapter` names, as the record of the run keeps it."""

import json
from pathlib import Path
from typing import Any

import peft

from finetune.config import Config, LoraConfig
from finetune.model.given_adapter import (
    ADAPTER_WEIGHTS,
    find_adapter,
    largest_rank,
    read_raw_settings,
)
from finetune.run.adapter import run_of
from finetune.run.checkpoint import STATE
from finetune.run.folder import CONFIG, RESULT, read_environment
from finetune.runtime.files import file_sha256


def origin_record(config: Config, model: peft.PeftModel, base: str, step: int) -> dict[str, Any] | None:
    """The adapter that the run begins from, for environment.json; None where it begins with a new one.

    `base` is the base's fingerprint, and `step` that of the checkpoint that the run resumes from, or 0. A run
    that has begun keeps what it recorded.

    Raises:
        ValueError: no update has been saved yet, and the adapter is another one than the run began from.
    """
    name = config.model.adapter
    if name is None:
        return None
    folder = Path(config.output_dir)
    recorded: dict[str, Any] | None = None
    if (folder / CONFIG).exists():
        recorded = read_environment(folder)["model_adapter"]
    if recorded is not None and step > 0:
        return recorded
    adapter = find_adapter(name)
    digest = file_sha256(adapter / ADAPTER_WEIGHTS)
    if recorded is not None and recorded["sha256"] != digest:
        raise ValueError(
            f"model.adapter {name} is not the adapter any more that the run in {folder} began from: restore "
            "it, or choose another output_dir"
        )
    run_dir = run_of(adapter)
    trained_base = None if run_dir is None else read_environment(run_dir)["base"]
    named = read_raw_settings(adapter).get("base_model_name_or_path")
    own = str(model.get_base_model().name_or_path)
    fits = _is_same_path(named, own) if trained_base is None else trained_base == base
    return {
        "path": str(adapter),
        "sha256": digest,
        "run": None if run_dir is None else run_dir.name,
        "step": None if run_dir is None else _step_of(adapter, run_dir),
        "largest_rank": largest_rank(adapter),
        "other_base": None if fits else str(named or "no base"),
    }


def _step_of(adapter: Path, run_dir: Path) -> int | None:
    """The updates after which a run had this adapter."""
    if adapter.name == RESULT:
        step: int | None = read_environment(run_dir).get("adapter_step")
        return step
    return int(json.loads((adapter / STATE).read_text(encoding="utf-8"))["step"])


def _is_same_path(named: str | None, own: str) -> bool:
    return named is not None and (named == own or Path(named).resolve() == Path(own).resolve())


def describe_origin(record: dict[str, Any] | None, lora: LoraConfig) -> list[tuple[str, str]]:
    """Lines of the start table that say what the run began from; `lora` is what the adapter made of it."""
    if record is None:
        return []
    of_run = "" if record["run"] is None else f", of the run {record['run']}"
    of_run += "" if record["step"] is None else f" after update {record['step']:,}"
    lines = [("begins from", f"{record['path']}{of_run}; sha256 {record['sha256'][:16]}")]
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    variants = [name for name, used in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if used]
    shape = ", ".join([f"r {lora.r}", f"alpha {lora.lora_alpha:g}", *variants])
    lines.append(("its LoRA", f"{shape}, on {targets}"))
    if record["other_base"] is not None:
        remark = f"the adapter names {record['other_base']}; all its weights fit this base"
        lines.append(("trained on another base", remark))
    return lines
