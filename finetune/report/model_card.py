"""Write a run's model card, the README.md beside its adapter, from what the run recorded."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment, StrictUndefined

from finetune.config import Config, ModelConfig, eval_paths, flatten, paths_of
from finetune.config_parsing import config_to_dict
from finetune.data.reading.sources import is_local
from finetune.model import starter
from finetune.model.load import hub_name
from finetune.report.html import TEMPLATES
from finetune.report.intervals import Interval
from finetune.report.records import (
    ANSWERS_IN_WORDS,
    Change,
    Record,
    answer_changes,
    changes,
    loss_changes_by_source,
    read_record,
    until_result,
)
from finetune.training.best import best_in_words

MADE_HERE = "<!-- Made from the record of the run. Without this line, `push` leaves the card as it is. -->"
# The values that vLLM accepts for --max-lora-rank (docs.vllm.ai, vllm.config.lora, MaxLoRARanks).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Keys that other parts of the card show, or that do not affect the weights.
OMITTED_KEYS = (
    *("output_dir", "resume", "strict", "log.", "checkpoint.", "eval."),
    *("data.path", "data.eval_path", "data.chat_template", "data.system_prompt"),
    *("model.name_or_path", "model.adapter"),
)


class Figure(NamedTuple):
    """A metric on the eval rows, as the table shows it; `before` and `change` are empty if unknown."""

    name: str
    before: str
    after: str
    change: str


class Base(NamedTuple):
    """The base model: how the card names and loads it."""

    name: str
    on_hub: bool
    is_starter: bool
    gguf: bool
    needs_nf4: bool
    """Whether the adapter makes up for what this base has lost in 4 bits (LoftQ)"""
    arguments: str
    """Arguments of from_pretrained, as Python source"""
    comment: str


def model_card(run_dir: Path, config: Config, repo: str | None = None) -> str:
    """Return the card of a run's result: Markdown with YAML front matter, as the hub reads it.

    `repo` (OWNER/NAME) is the repository it is uploaded to. Without one, the code in the card loads the
    adapter from the card's own folder. The card names no folders of this machine.

    Raises:
        ValueError: a file of the run cannot be read.
    """
    whole = read_record(run_dir)
    record = until_result(whole)
    environment, evaluations = record.environment, record.eval_lines
    figures = result_figures(record)
    base = _describe_base(config.model, config.lora.init_lora_weights == "loftq")
    rows = environment.get("rows")  # older versions did not record the counts
    origin = environment["model_adapter"]
    rank = config.lora.r if origin is None else origin["largest_rank"]
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
        "figures_by_source": figures_by_source(record),
        "answer_figures": answer_figures(record),
        "num_answers": evaluations[-1].get("num_answers") if evaluations else None,
        "num_eval": record.num_eval_examples,
        "num_target_tokens": evaluations[-1]["num_target_tokens"] if evaluations else 0,
        "without_leaks": _number(evaluations[-1].get("loss_without_leaks")) if evaluations else "",
        "sources": _in_words(paths_of(config.data.path)),
        "eval_sources": _in_words(eval_paths(config)),
        "rows": rows,
        "dropped": ", ".join(f"{count} {reason}" for reason, count in rows["dropped"].items()) or "none"
        if rows
        else "",
        "data": environment["data"],
        "chat_template": without_folder(config.data.chat_template or ""),
        "num_updates": whole.num_steps,
        "best_step": environment.get("adapter_step", whole.num_steps),
        "best_in_words": best_in_words(config.checkpoint.best_by),
        "global_batch_size": environment["global_batch_size"],
        "hardware": _hardware(environment),
        "python": environment["python"],
        "versions": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
        "settings": [(key, value) for key, value in settings.items() if not key.startswith(OMITTED_KEYS)],
        "vllm_rank": next((accepted for accepted in VLLM_RANKS if accepted >= rank), None),
        "has_rows": bool(environment["token_rows"]),
        "vllm_loads_it": _vllm_loads(config) and not environment["token_rows"],
        "began_from": _began_from(origin),
    }
    # No HTML escaping: text from users is in code spans, which Markdown shows verbatim.
    markdown = Environment(
        loader=TEMPLATES, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    markdown.filters |= {"code": _code, "literal": _literal}
    return re.sub(r"\n{3,}", "\n\n", markdown.get_template("model_card.md").render(values))


def _vllm_loads(config: Config) -> bool:
    """Whether vLLM computes what was trained, from the adapter and its base on the hub: it knows no DoRA and
    no modules that were trained whole, and an adapter that began as LoftQ is for a base in 4 bits."""
    lora = config.lora
    return not (lora.use_dora or lora.modules_to_save or lora.init_lora_weights == "loftq")


def without_folder(path: str) -> str:
    """Remove this machine's folder from a path: `/home/me/rows.csv` becomes `rows.csv`.

    Relative paths and hub names are unchanged.
    """
    return PurePath(path).name or path if path.startswith(("/", "~", "..")) else path


def result_figures(record: Record) -> list[Figure]:
    """Loss and token accuracy after training and, if they were measured before training, before it."""
    found = changes(record)
    if not found:
        return []
    names = {"loss": "loss, nats per target token", "mean_token_accuracy": "token accuracy"}
    return [_figure(record, name, found[metric]) for metric, name in names.items()]


def figures_by_source(record: Record) -> list[Figure]:
    """The loss of each source and eval set, as `result_figures` gives that of the main eval rows; empty if
    there are not several."""
    return [_figure(record, _code(name), change) for name, change in loss_changes_by_source(record).items()]


def answer_figures(record: Record) -> list[Figure]:
    """How answers to eval rows compare with the rows' own; empty without `eval.answers`."""
    figures = []
    for metric, change in answer_changes(record).items():
        name, unit, digits = ANSWERS_IN_WORDS[metric]
        figures.append(_figure(record, f"{name}, {unit}", change, digits))
    return figures


def _figure(record: Record, name: str, found: Change, digits: int = 4) -> Figure:
    first, last, change = found
    after = _with_interval(last, digits)
    if first is None or change is None or record.eval_lines[0]["step"] > 0:
        return Figure(name, "", after, "")
    return Figure(name, _with_interval(first, digits), after, _with_interval(change, digits, sign="+"))


def _with_interval(interval: Interval, digits: int, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.{digits}f}" for number in interval)
    return value if "nan" in low else f"{value} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _metadata(config: Config, base: Base) -> dict[str, Any]:
    datasets = [path for path in paths_of(config.data.path) if not is_local(path)]
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
    """Return the base's licence: the starter's is known, and a folder may have a card that states it."""
    if config.name_or_path == "starter":
        return starter.LICENCE
    card = Path(config.name_or_path).expanduser() / "README.md"
    try:
        licence = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, HFValidationError):  # the base's card may be malformed
        return None
    return licence if isinstance(licence, str) else None


def _describe_base(config: ModelConfig, needs_nf4: bool) -> Base:
    on_hub = hub_name(config)
    name = on_hub or without_folder(config.name_or_path)
    gguf = on_hub is None and name.endswith(".gguf")
    arguments = [_literal(name)]
    if gguf:
        arguments = ['"."', f"gguf_file={_literal(name)}", "quantization_config=GgufConfig(dequantize=True)"]
    if on_hub and config.revision:
        arguments.append(f"revision={_literal(config.revision)}")
    if needs_nf4:
        arguments.append("quantization_config=nf4")
    if config.trust_remote_code:
        arguments.append("trust_remote_code=True")
    is_starter, comment = config.name_or_path == "starter", "" if on_hub else "  # its folder"
    return Base(name, on_hub is not None, is_starter, gguf, needs_nf4, ", ".join(arguments), comment)


def _began_from(origin: dict[str, Any] | None) -> str:
    """Name the adapter that the run began from, without this machine's folders; empty if there is none."""
    if origin is None:
        return ""
    name = origin["run"] or without_folder(origin["path"])
    after = "" if origin["step"] is None else f" after update {origin['step']}"
    return f"{_code(name)}{after} (SHA-256 of its weights: {_code(origin['sha256'])})"


def _in_words(paths: Sequence[str]) -> str:
    return ", ".join(_code(without_folder(path)) for path in paths)


def _hardware(environment: dict[str, Any]) -> str:
    parts = [environment["device"], environment["processor"], f"{environment['memory_gib']} GiB of memory"]
    return ", ".join(part for part in parts if part)


def _code(value: Any) -> str:
    """Format any text as a code span that can be in a table.

    It is on one line, and its fence is longer than any run of backticks in it (CommonMark, 6.1).
    """
    plain = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(plain.split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _literal(text: str) -> str:
    """Format any text as a Python string literal on one line."""
    return json.dumps(text, ensure_ascii=False)
