"""The report of a run: one page that shows what was trained on what, how it went, and what came of it."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.config import Config, flatten
from finetune.config_parsing import config_to_dict, config_to_yaml
from finetune.report.charts import STYLE, Chart, Line, draw
from finetune.report.html import write_page
from finetune.report.intervals import Interval
from finetune.report.records import Change, Record, changes, read_record
from finetune.run.summary import launch_command
from finetune.runtime.console import say

PAGE = "report.html"
TRAIN, EVAL, PUBLISHED = 1, 2, 3  # colours

Facts = Sequence[tuple[str, str]]


class Published(NamedTuple):
    """What a notebook that a preset comes from says of its last evaluation, with the loss on every token."""

    data: str
    keys: dict[str, Any]
    metrics: dict[str, float]


PUBLISHED_MODEL = "Qwen2-0.5B-Instruct"
SAME_ROWS = {
    "data.sample_seed": 42,
    "data.split_seed": 42,
    "data.split_by": "row",
    "data.eval_fraction": 0.2,
    "data.max_length": 512,
}
PUBLICATIONS = [
    Published(
        "finance-alpaca",
        {
            **SAME_ROWS,
            "data.num_samples": 6000,
            "data.system_prompt": "You are a Professional financial assistant. "
            "Provide accurate financial advice",
        },
        {"loss": 1.788, "entropy": 1.799, "mean_token_accuracy": 0.612},
    ),
    Published(
        "alpaca",
        {**SAME_ROWS, "data.num_samples": 5000, "data.system_prompt": None},
        {"loss": 1.3833, "entropy": 1.3761, "mean_token_accuracy": 0.6682},
    ),
]


class Row(NamedTuple):
    """A metric before, after, and their difference: each a value and, below it, its interval."""

    name: str
    unit: str
    cells: Sequence[tuple[str, str]]


class Answers(NamedTuple):
    """`turns` are (role, text), the last one is answered; `texts` are (heading, answer)."""

    turns: Sequence[tuple[str, str]]
    texts: Sequence[tuple[str, str]]


def leave_report(run_dir: Path) -> None:
    """Write the report of a run that has just ended. All else of it is saved: it is not lost over its report,
    whatever fails."""
    try:
        write_report(run_dir, run_dir / PAGE)
    except Exception as error:
        say(
            f"The report could not be written ({type(error).__name__}: {' '.join(str(error).split())}). "
            f"The run is saved; `python -m finetune report {shlex.quote(str(run_dir))}` tries again."
        )
    else:
        say(f"report       {run_dir / PAGE}")


def write_report(run_dir: Path, page: Path) -> None:
    """Write the report of a run, finished or not, to `page`.

    Raises:
        ValueError: `run_dir` holds no run, or files of it that cannot be read.
    """
    record = read_record(run_dir)
    found = changes(record)
    write_page(
        page,
        _TEMPLATE,
        title=f"Run {record.name}",
        chart_style=STYLE,
        lead=_lead(record),
        state=record.state,
        is_finished=record.is_finished,
        verdict=verdict(found, len(record.eval_lines)),
        columns=_columns(record),
        rows=metric_rows(found),
        notes=_notes(record),
        charts=curves(record),
        published_note=published_note(record.config),
        evaluations=record.eval_lines,
        answers=pair_answers(record),
        data=_data_facts(record),
        settings=_setting_facts(record.config),
        ran=record.environment.get("settings", []),
        machine=_machine_facts(record),
        command=repeating_command(record),
        config=config_to_yaml(record.config),
    )


def _lead(record: Record) -> str:
    config = record.config
    base = (
        f"base in {config.model.quantization}"
        if config.model.quantization != "none"
        else "base not quantized"
    )
    return f"{config.model.name_or_path} ({base}) with LoRA r={config.lora.r}, on {_path(config)}"


def _path(config: Config) -> str:
    path = config.data.path
    return path if isinstance(path, str) else ", ".join(path)


# --- Before and after ---


def verdict(found: dict[str, Change], num_evaluations: int) -> str:
    """What became of the loss, in a sentence."""
    if not found:
        return "Nothing was evaluated."
    change = found["loss"].change
    if change is None:
        return "There is one evaluation, and none to compare it with."
    if math.isnan(change.low):
        return (
            f"The eval loss {_went(change.value)}. There is no interval: the run has no sums of each example."
        )
    bounds = sorted((abs(change.low), abs(change.high)))
    if change.low <= 0 <= change.high:
        return (
            f"The eval loss {_went(change.value)}, which cannot be told from no change (95 % interval: "
            f"{between(change, 3, sign=True)})."
        )
    return f"The eval loss {_went(change.value)} (95 % interval: {bounds[0]:.3f} to {bounds[1]:.3f})."


def _went(change: float) -> str:
    return f"{'fell' if change < 0 else 'rose'} by {abs(change):.3f} nats per target token"


def signed(value: float, digits: int) -> str:
    r"""With a sign that is as wide as a digit, such as \u22120.120."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def between(interval: Interval, digits: int, sign: bool = False) -> str:
    """The bounds; nothing where there are none."""
    if math.isnan(interval.low):
        return ""
    low, high = (signed(x, digits) if sign else f"{x:.{digits}f}" for x in (interval.low, interval.high))
    return f"{low} to {high}"


def metric_rows(found: dict[str, Change]) -> list[Row]:
    """The table of before and after, with the perplexity that follows from the loss."""
    if not found:
        return []
    loss, accuracy, entropy = (found[metric] for metric in ("loss", "mean_token_accuracy", "entropy"))
    return [
        _row("loss", "nats per target token", loss, 4),
        _perplexity_row(loss),
        _row("token accuracy", "likeliest token is the target", accuracy, 4),
        _row("entropy", "nats, of the predictions", entropy, 4),
    ]


def _row(name: str, unit: str, change: Change, digits: int) -> Row:
    cells = [
        (f"{interval.value:.{digits}f}", between(interval, digits - 1))
        for interval in (change.first, change.last)
        if interval is not None
    ]
    if change.change is not None:
        cells.append((signed(change.change.value, digits), between(change.change, digits - 1, sign=True)))
    return Row(name, unit, cells)


def _perplexity_row(loss: Change) -> Row:
    cells = []
    for interval in (loss.first, loss.last):
        if interval is not None:
            of = _exp(interval)
            cells.append((f"{of.value:,.2f}" if of.value < 1e6 else f"{of.value:.2g}", between(of, 2)))
    if loss.change is not None:
        ratio = _exp(loss.change)
        cells.append((f"\N{MULTIPLICATION SIGN} {ratio.value:.3f}", between(ratio, 3)))
    return Row("perplexity", "exp of the loss", cells)


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(min(x, 700.0)) for x in interval))


def _columns(record: Record) -> list[str]:
    """Headings of the table of before and after."""
    lines = record.eval_lines
    if not lines:
        return []
    *_, last = steps = [_after(line["step"]) for line in lines]
    return [last] if len(lines) == 1 else [steps[0], last, "change"]


def _after(step: int) -> str:
    return "before training" if step == 0 else f"after update {step:,}"


def _notes(record: Record) -> list[str]:
    """What else is to be said of the evaluations."""
    lines = record.eval_lines
    if not lines:
        return []
    what = "every token" if record.config.data.train_on == "all" else "the answers alone"
    same = "" if len(lines) == 1 else "; that of a change is over the same examples before and after"
    notes = [
        f"Over {record.environment['data']['eval_examples']:,} eval examples with "
        f"{lines[-1]['num_target_tokens']:,} target tokens: {what}. Intervals hold 95 % of the means of "
        f"examples drawn anew (bootstrap){same}."
    ]
    if "loss_without_leaks" in lines[-1]:
        losses = [lines[-1]] if len(lines) == 1 else [lines[0], lines[-1]]
        values = " and ".join(f"{line['loss_without_leaks']:.4f} {_after(line['step'])}" for line in losses)
        notes.append(f"Without the eval rows that are trained on too, the loss is {values}.")
    best = min(lines, key=lambda line: float(line["loss"]))
    if best is not lines[-1]:
        notes.append(f"The lowest eval loss of the run was {best['loss']:.4f}, {_after(best['step'])}.")
    return notes


def find_published(config: Config) -> Published | None:
    """The figures of the notebook whose model, rows and split the run has, whatever its other settings."""
    paths = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    if len(paths) != 1 or Path(config.model.name_or_path).name != PUBLISHED_MODEL:
        return None
    data, keys = Path(paths[0]).stem.lower().replace("_", "-"), flatten(config_to_dict(config))
    matching = [
        published
        for published in PUBLICATIONS
        if published.data == data and published.keys.items() <= keys.items()
    ]
    return matching[0] if matching else None


def published_note(config: Config) -> str:
    """What is to be said of published figures; nothing where there are none."""
    published = find_published(config)
    if published is None:
        return ""
    metrics = published.metrics
    said = (
        f"The notebook that this job comes from gives, after its last epoch, a validation loss of "
        f"{metrics['loss']}, an entropy of {metrics['entropy']} and a token accuracy of "
        f"{metrics['mean_token_accuracy']}, with the loss on every token"
    )
    if config.data.train_on == "all":
        return (
            f"{said}, as here: the dashed lines. Its entropy and accuracy are means over batches, not tokens."
        )
    return (
        f"{said}. This run's is on the answers alone, so the two cannot be compared, and they are not drawn; "
        "--data.train_on all trains as the notebook did."
    )


# --- Curves ---


def curves(record: Record) -> list[Chart]:
    """A chart of each metric that has a value."""
    published = find_published(record.config)
    marked = published.metrics if published is not None and record.config.data.train_on == "all" else {}
    train, evals = record.train_lines, record.eval_lines

    def both(title: str, unit: str, metric: str) -> Chart | None:
        lines = [line_of(train, metric, "train", TRAIN), line_of(evals, metric, "eval", EVAL, dotted=True)]
        if metric in marked and record.num_steps > 0:
            value = marked[metric]
            ends = [0, record.num_steps]
            lines.append(Line(f"published: {value}", ends, [value, value], PUBLISHED, dashed=True))
        return _draw(title, unit, lines)

    def alone(title: str, unit: str, metric: str, scale: float = 1) -> Chart | None:
        return _draw(title, unit, [line_of(train, metric, "", TRAIN, scale=scale)], from_zero=True)

    drawn = [
        both("Loss", "nats per target token", "loss"),
        both("Token accuracy", "share of target tokens", "mean_token_accuracy"),
        both("Entropy", "nats, of the predictions", "entropy"),
        alone("Gradient norm", "before clipping", "grad_norm"),
        alone("Learning rate", "", "learning_rate"),
        alone("Speed", "useful tokens per second", "useful_tokens_per_second"),
        alone("MFU", "% of the device's matmul rate", "mfu", scale=100),
        alone("Memory", "GiB, the most held so far", "peak_memory_gib"),
    ]
    return [chart for chart in drawn if chart is not None]


def line_of(
    entries: Sequence[dict[str, Any]],
    metric: str,
    name: str,
    colour: int,
    dotted: bool = False,
    scale: float = 1,
    per_epoch: bool = False,
) -> Line:
    """The metric of log lines, by update or by epoch."""
    known = [entry for entry in entries if metric in entry]
    xs = [entry["epoch" if per_epoch else "step"] for entry in known]
    ys = [None if entry[metric] is None else scale * entry[metric] for entry in known]
    return Line(name, xs, ys, colour, dotted)


def _draw(title: str, unit: str, lines: Sequence[Line], from_zero: bool = False) -> Chart | None:
    lines = [line for line in lines if any(y is not None for y in line.ys)]
    return draw(title, unit, lines, from_zero=from_zero) if lines else None


# --- Answers ---


def pair_answers(record: Record) -> list[Answers]:
    """The answers written first and last, side by side."""
    lines = record.answer_lines
    if not lines:
        return []
    first, last = lines[0], lines[-1]
    # A run that went on with another run's rows has no answers of its own from before.
    asked = [[entry["messages"] for entry in line["answers"]] for line in (first, last)]
    shown = [first, last] if len(lines) > 1 and asked[0] == asked[1] else [last]
    pairs = []
    for number, messages in enumerate(asked[1]):
        turns = [(m["role"], m["content"]) for m in messages if m["role"] != "system"]
        texts = [(_after(line["step"]), line["answers"][number]["answer"]) for line in shown]
        pairs.append(Answers(turns, texts))
    return pairs


# --- Facts ---


def _data_facts(record: Record) -> Facts:
    """The rows and the batch arithmetic, as they were shown when the run started."""
    data = record.environment["data"]
    counted = [
        ("examples", f"{data['train_examples']:,} train, {data['eval_examples']:,} eval"),
        ("examples per update", f"{record.environment['global_batch_size']:,}"),
        ("updates", f"{record.steps_per_epoch:,} an epoch, {record.planned_steps:,} in all"),
    ]
    described = [
        (name, value) for name, value in record.environment.get("described", counted) if name != "device"
    ]
    return [("data", _path(record.config)), *described]


def _setting_facts(config: Config) -> Facts:
    lora, data, train, optim = config.lora, config.data, config.train, config.optim
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    variants = [name for name, used in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if used]
    rate = f"{optim.learning_rate:g}, {optim.schedule}"
    rate += (
        f", warm-up over {optim.warmup_ratio:.0%} of the updates" if optim.warmup_ratio else ", no warm-up"
    )
    facts = [
        ("LoRA", f"r {lora.r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {targets}"),
        ("trained on", "every token" if data.train_on == "all" else "the answers alone"),
        ("system prompt", data.system_prompt or "the chat template's own"),
        (
            "longest example",
            f"{data.max_length:,} tokens; {'cut' if data.overlong == 'truncate' else 'dropped'} where longer",
        ),
        (
            "optimizer",
            f"{optim.name}, weight decay {optim.weight_decay:g}, clipped at {optim.max_grad_norm:g}",
        ),
        ("learning rate", rate),
        ("precision", {"no": "fp32"}.get(train.mixed_precision, train.mixed_precision)),
        ("seeds", f"sample {data.sample_seed}, split {data.split_seed}, training {train.seed}"),
    ]
    return [*facts, ("variants", ", ".join(variants))] if variants else facts


def _machine_facts(record: Record) -> Facts:
    environment = record.environment
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    measured = dict(environment.get("described", ())).get("device", environment["device"])
    facts = [
        ("device", measured),
        ("processor", environment["processor"]),
        ("memory", f"{environment['memory_gib']} GiB"),
        ("processes", str(environment["num_processes"])),
        ("Python", environment["python"]),
        ("packages", packages),
    ]
    return [*facts, ("CUDA", environment["cuda"])] if environment["cuda"] else facts


def repeating_command(record: Record) -> str:
    """The command that goes on with an unfinished run, or makes a finished one again in another folder."""
    environment, folder = record.environment, record.folder
    on_gpu = not environment["device"].startswith("CPU")
    command = launch_command(folder, environment["num_processes"], on_gpu)
    if not record.is_finished:
        return command
    command += f" --output_dir {shlex.quote(f'{folder}-again')}"
    if record.config.fast.int8_matmul == "auto" and environment["int8"] in ("int8", "dequantize"):
        command += f" --fast.int8_matmul {environment['int8']}"  # else measured anew
    if environment["started_from"] is not None:
        command += f" --resume {shlex.quote(environment['started_from'])}"
    return command


_TEMPLATE = """\
{% extends "page" %}
{% block style %}
{{ chart_style }}
header { border-bottom: 1px solid var(--line); padding-bottom: .8rem; }
header h1 { margin: .4rem 0 .2rem; font-size: 1.8rem; }
header p { margin: .2rem 0; }
.verdict { font-size: 1.15rem; line-height: 1.4; margin: 1.2rem 0; }
.unfinished { color: var(--bad); }
.metrics { width: 100%; }
.metrics td { vertical-align: top; }
.metrics small { display: block; color: var(--dim); font-size: .8rem; }
.metrics b { font-size: 1.1rem; font-weight: 600; }
.turn { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6rem; unicode-bidi: isolate; }
.turn:first-of-type { font-weight: 600; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem 1.2rem; }
.pair h4 { margin: 0; font-size: .8rem; font-weight: 600; color: var(--dim); }
.pair p { margin: 0; white-space: pre-wrap; font-size: .92rem; unicode-bidi: isolate; }
.facts { width: 100%; }
.facts td:first-child { width: 12rem; }
.command { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); padding: .7rem;
  border: 1px solid var(--line); border-radius: .5rem; }
@media (max-width: 40rem) {
  .pair { grid-template-columns: 1fr; }
  .metrics small { font-size: .72rem; }
  .metrics td { white-space: normal; }
  .facts td:first-child { width: 7rem; white-space: normal; padding-right: .6rem; }
}
{% endblock %}
{% block content %}
{% macro facts(rows) %}
<table class="facts">
{% for name, value in rows %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<p class="{{ 'note' if is_finished else 'unfinished' }}">{{ state }}</p>
</header>
<p class="verdict">{{ verdict }}</p>
{% if rows %}
<div class="scroll"><table class="metrics">
<tr><th></th>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ row.name }}<small>{{ row.unit }}</small></td>
{% for value, interval in row.cells %}<td><b>{{ value }}</b><small>{{ interval }}</small></td>{% endfor %}
</tr>
{% endfor %}
</table></div>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}
{% endif %}
{% if published_note %}<p class="note">{{ published_note }}</p>{% endif %}
<h2>Curves</h2>
{% if charts %}
<p class="note">Train: the mean over the target tokens of a log line, with dropout. Eval: over all eval
examples, without.</p>
<div class="charts">
{% for chart in charts %}
<figure><figcaption><b>{{ chart.title }}</b> <span class="legend">{{ chart.unit }}</span>
{% if chart.lines | length > 1 or chart.lines[0].name %}
<div class="legend">{% for line in chart.lines %}<span><i style="border-color: var(--c{{ line.colour }});
border-top-style: {{ 'dashed' if line.dashed else 'solid' }}"></i>{{ line.name }}</span>{% endfor %}</div>
{% endif %}
</figcaption>{{ chart.svg }}</figure>
{% endfor %}
</div>
{% else %}
<p>Nothing is logged yet.</p>
{% endif %}
{% if evaluations | length > 2 %}
<h2>Evaluations</h2>
<div class="scroll"><table>
<tr><th>update</th><th>epoch</th><th>loss</th><th>token accuracy</th><th>entropy</th></tr>
{% for line in evaluations %}
<tr><td>{{ line.step }}</td><td>{{ "%.2f" | format(line.epoch) }}</td>
<td>{{ "%.4f" | format(line.loss) }}</td><td>{{ "%.4f" | format(line.mean_token_accuracy) }}</td>
<td>{{ "%.4f" | format(line.entropy) }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if answers %}
<h2>Answers</h2>
<p class="note">The likeliest answer to the first eval rows, cut where it is long.</p>
{% for entry in answers %}
<article>
{% for role, text in entry.turns %}
<p class="turn" dir="auto">{% if entry.turns | length > 1 %}{{ role }}: {% endif %}{{ text }}</p>
{% endfor %}
<div class="pair">
{% for heading, text in entry.texts %}
<div><h4>{{ heading }}</h4><p dir="auto">{{ text }}</p></div>
{% endfor %}
</div>
</article>
{% endfor %}
{% endif %}
<h2>Model, data and updates</h2>
{{ facts(data) }}
<h2>Settings</h2>
{{ facts(settings) }}
<h2>Machine</h2>
{{ facts(machine) }}
{% if ran %}
<h2>What ran</h2>
<table class="facts">
{% for setting in ran %}
<tr><td>{{ setting.name }}</td><td>{{ setting.actual }}
{%- if setting.actual != setting.requested %}, asked: {{ setting.requested }}{% endif %}
{%- if setting.reason %} <span class="note">({{ setting.reason }})</span>{% endif %}</td></tr>
{% endfor %}
</table>
{% endif %}
<h2>{{ "Again" if is_finished else "To go on" }}</h2>
<pre class="command">{{ command }}</pre>
<details><summary>The whole configuration</summary><pre class="command">{{ config }}</pre></details>
{% endblock %}
"""
