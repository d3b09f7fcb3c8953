"""A run's model card: the README.md beside its adapter. What the run recorded, and nothing else."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment, StrictUndefined

from finetune.config import Config, ModelConfig, flatten
from finetune.config_parsing import config_to_dict
from finetune.data.files import is_local
from finetune.model import starter
from finetune.model.load import hub_name
from finetune.report.html import TEMPLATES
from finetune.run.folder import (
    METRICS,
    example_sums_file,
    read_environment,
    read_evaluations,
    read_example_sums,
    read_lines,
)

MADE_HERE = "<!-- Made from the record of the run. Without this line, `push` leaves the card as it is. -->"
# What vLLM takes for --max-lora-rank (docs.vllm.ai, vllm.config.lora, MaxLoRARanks).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Keys that the card's other parts show, or that decide nothing about the weights.
NO_SETTINGS = (
    *("output_dir", "resume", "strict", "log.", "checkpoint.", "eval."),
    *("data.path", "data.system_prompt", "model.name_or_path"),
)


class Figure(NamedTuple):
    """A metric on the eval rows, as the table shows it; `before` and `change` are empty where unknown."""

    name: str
    before: str
    after: str
    change: str


class Base(NamedTuple):
    """The base model, as the card names and loads it."""

    name: str
    on_hub: bool
    is_starter: bool
    gguf: bool
    arguments: str
    """Of from_pretrained, as Python"""
    comment: str


def model_card(run_dir: Path, config: Config, repo: str | None = None) -> str:
    """The card of a run whose last update is made: Markdown behind YAML metadata, as the hub reads it.

    `repo` is where it is uploaded to (OWNER/NAME); without one it speaks of the folder it lies in. Folders of
    this machine are not named.

    Raises:
        ValueError: environment.json or a record of an evaluation cannot be read.
    """
    environment = read_environment(run_dir)
    evaluations = read_evaluations(run_dir)
    figures = measured(run_dir, evaluations)
    base = _describe_base(config.model)
    rows = environment.get("rows")  # runs of older versions have no count
    settings = {key: value for key, value in flatten(config_to_dict(config)).items() if value is not None}
    values = {
        "front_matter": yaml.safe_dump(_metadata(config, base), sort_keys=False, allow_unicode=True),
        "made_here": MADE_HERE,
        "config": config,
        "base": base,
        "repo": repo,
        "adapter": _literal(repo or "."),
        "adapter_comment": "" if repo else "  # this folder",
        "figures": figures,
        "has_intervals": any("[" in figure.after for figure in figures),
        "num_eval": environment["data"]["eval_examples"],
        "num_target_tokens": evaluations[-1]["num_target_tokens"] if evaluations else 0,
        "without_leaks": _number(evaluations[-1].get("loss_without_leaks")) if evaluations else "",
        "sources": ", ".join(_code(without_folder(path)) for path in _paths(config)),
        "rows": rows,
        "dropped": ", ".join(f"{count} {reason}" for reason, count in rows["dropped"].items()) or "none"
        if rows
        else "",
        "data": environment["data"],
        "num_updates": max((entry["step"] for entry in read_lines(run_dir / METRICS)), default=0),
        "global_batch_size": environment["global_batch_size"],
        "hardware": _hardware(environment),
        "python": environment["python"],
        "versions": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
        "settings": [(key, value) for key, value in settings.items() if not key.startswith(NO_SETTINGS)],
        "vllm_rank": next((rank for rank in VLLM_RANKS if rank >= config.lora.r), None),
    }
    # No HTML escapes: what comes from a user stands in code spans, where Markdown shows it as it is.
    markdown = Environment(
        loader=TEMPLATES, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    markdown.filters |= {"code": _code, "literal": _literal}
    return re.sub(r"\n{3,}", "\n\n", markdown.get_template("model_card.md").render(values))


def without_folder(path: str) -> str:
    """A path without the folder it has on this machine: `/home/me/rows.csv` becomes `rows.csv`; a relative
    path and a hub name stay."""
    return PurePath(path).name or path if path.startswith(("/", "~", "..")) else path


def measured(run_dir: Path, evaluations: Sequence[dict[str, Any]]) -> list[Figure]:
    """Loss and token accuracy of the last evaluation, and of the first if it was made before training."""
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    steps = [first["step"], last["step"]] if first["step"] == 0 < last["step"] else [last["step"]]
    if not all(example_sums_file(run_dir, step).exists() for step in steps):  # a run of an older version
        return _figures_alone(evaluations, steps)
    from finetune.report.intervals import difference_interval, mean_interval

    figures = []
    frames = [read_example_sums(run_dir, step) for step in steps]
    counts = frames[-1]["num_target_tokens"].to_numpy(float)
    for name, column in (("loss, nats per target token", "nll"), ("token accuracy", "correct")):
        sums = [frame[column].to_numpy(float) for frame in frames]
        after = _with_interval(mean_interval(sums[-1], counts))
        if len(sums) == 1:
            figures.append(Figure(name, "", after, ""))
            continue
        before = _with_interval(mean_interval(sums[0], counts))
        change = _with_interval(difference_interval(sums[0], sums[1], counts), sign="+")
        figures.append(Figure(name, before, after, change))
    return figures


def _figures_alone(evaluations: Sequence[dict[str, Any]], steps: Sequence[int]) -> list[Figure]:
    figures = []
    for name, key in (("loss, nats per target token", "loss"), ("token accuracy", "mean_token_accuracy")):
        after = evaluations[-1][key]
        before = evaluations[0][key] if len(steps) == 2 else None
        change = "" if before is None else f"{after - before:+.4f}"
        figures.append(Figure(name, _number(before), _number(after), change))
    return figures


def _with_interval(interval: tuple[float, float, float], sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.4f}" for number in interval)
    return value if "nan" in low else f"{value} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _metadata(config: Config, base: Base) -> dict[str, Any]:
    datasets = [path for path in _paths(config) if not is_local(path)]
    licence = _licence(config.model)
    return {
        **({"base_model": base.name, "base_model_relation": "adapter"} if base.on_hub else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **({"license": licence} if licence else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": ["lora", "sft"],
    }


def _licence(config: ModelConfig) -> str | None:
    """What the base says of its licence: the starter's is known, a folder may have a card of its own."""
    if config.name_or_path == "starter":
        return starter.LICENCE
    card = Path(config.name_or_path).expanduser() / "README.md"
    try:
        licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, HFValidationError):  # of a card that is none of ours
        return None
    return licence if isinstance(licence, str) else None


def _describe_base(config: ModelConfig) -> Base:
    on_hub = hub_name(config)
    name = on_hub or without_folder(config.name_or_path)
    gguf = on_hub is None and name.endswith(".gguf")
    arguments = [_literal(name)]
    if gguf:
        arguments = ['"."', f"gguf_file={_literal(name)}", "quantization_config=GgufConfig(dequantize=True)"]
    if on_hub and config.revision:
        arguments.append(f"revision={_literal(config.revision)}")
    if config.trust_remote_code:
        arguments.append("trust_remote_code=True")
    is_starter, comment = config.name_or_path == "starter", "" if on_hub else "  # its folder"
    return Base(name, on_hub is not None, is_starter, gguf, ", ".join(arguments), comment)


def _paths(config: Config) -> list[str]:
    return [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)


def _hardware(environment: dict[str, Any]) -> str:
    parts = [environment["device"], environment["processor"], f"{environment['memory_gib']} GiB of memory"]
    return ", ".join(part for part in parts if part)


def _code(value: Any) -> str:
    """Any text as a code span, also within a table: on one line, and with a fence longer than its own
    backticks (CommonMark, 6.1)."""
    plain = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(plain.split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _literal(text: str) -> str:
    """Any text as a string of Python, on one line."""
    return json.dumps(text, ensure_ascii=False)
