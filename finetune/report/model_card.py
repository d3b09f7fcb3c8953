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

TEMPLATE = """\
---
{{ front_matter }}---

{{ made_here }}

# LoRA adapter for {{ base.name | code }}

A LoRA adapter (r={{ config.lora.r }}) that fine-tunes the chat model {{ base.name | code }} on instructions,
trained by a loop on Hugging Face Accelerate and PEFT.
{%- if base.is_starter %}

The weights it was trained on are a 4-bit version of that model (GGUF, Q4_1), dequantized. With the model's
own weights, which the code below loads, its figures were not measured.
{%- endif %}

## Results
{% if figures %}
{% if figures[0].before %}
| {{ num_eval }} eval examples, {{ num_target_tokens }} target tokens | before | after | change |
|---|---|---|---|
{%- for figure in figures %}
| {{ figure.name }} | {{ figure.before }} | {{ figure.after }} | {{ figure.change }} |
{%- endfor %}
{% else %}
| {{ num_eval }} eval examples, {{ num_target_tokens }} target tokens | after |
|---|---|
{%- for figure in figures %}
| {{ figure.name }} | {{ figure.after }} |
{%- endfor %}
{% endif %}
{%- if has_intervals %}
In brackets: 95 % confidence intervals, from a bootstrap over the eval examples.
{%- endif %}
{%- if without_leaks %}
Some eval prompts are also, or nearly, among the training rows; without them the loss afterwards is
{{ without_leaks }}.
{%- endif %}
{% else %}
Not measured: the run had no evaluation.
{% endif %}
## Data

| | |
|---|---|
| source | {{ sources }} |
| licence of the data | not stated |
{%- if rows %}
| rows | {{ rows.read }} read, {{ rows.usable }} usable |
| dropped | {{ dropped }} |
| cut at {{ config.data.max_length }} tokens | {{ rows.cut }} |
{%- endif %}
| examples | {{ data.train_examples }} trained on, {{ data.eval_examples }} for evaluation |
| system prompt | {% if config.data.system_prompt is none %}none of its own\
{% else %}{{ config.data.system_prompt | code }}{% endif %} |
| loss on | {% if config.data.train_on == "all" %}every token{% else %}the answers only{% endif %} |

## Training

{{ num_updates }} updates of {{ global_batch_size }} examples, on {{ hardware | code }}.

| setting | value |
|---|---|
{%- for key, value in settings %}
| `{{ key }}` | {{ value | code }} |
{%- endfor %}

Versions: Python {{ python }}, {{ versions }}.

## How to use it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{% if base.gguf %}, GgufConfig{% endif %}

base = AutoModelForCausalLM.from_pretrained({{ base.arguments }}){{ base.comment }}
model = PeftModel.from_pretrained(base, {{ adapter }}){{ adapter_comment }}
tokenizer = AutoTokenizer.from_pretrained({{ adapter }})
messages = [
{%- if config.data.system_prompt is not none %}
    {"role": "system", "content": {{ config.data.system_prompt | literal }}},
{%- endif %}
    {"role": "user", "content": "Your question"},
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```
{% if base.on_hub and not config.lora.use_dora and vllm_rank %}
```
vllm serve {{ base.name }} --enable-lora --max-lora-rank {{ vllm_rank }} \\
    --lora-modules adapter={{ repo or "." }}
```
{% endif %}
## Limits

{% if figures -%}
- Measured on {{ num_eval }} examples of the same kind as those it was trained on, by loss and token accuracy
  alone. How it does on other questions, and how good its answers are to a reader, was not measured.
{% else -%}
- Nothing about its answers was measured.
{% endif -%}
- No evaluation of safety, bias or truthfulness was made; what the base gets wrong, this may get wrong too.
"""


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
    markdown = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    markdown.filters |= {"code": _code, "literal": _literal}
    return re.sub(r"\n{3,}", "\n\n", markdown.from_string(TEMPLATE).render(values))


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
