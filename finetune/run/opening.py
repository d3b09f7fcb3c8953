"""How a run opens: its folder, the record of what it is, and the first screen."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.duplicates import Match
from finetune.data.plan import Plan
from finetune.data.splits import Data, fingerprint_of, in_words
from finetune.data.templates.named_templates import describe_template
from finetune.model.added_tokens import token_ids_of
from finetune.model.fast_paths import FastPaths
from finetune.model.size import count_parameters
from finetune.run import folder, summary
from finetune.run.checkpoint import Checkpointer, TrainState
from finetune.run.origin import describe_origin, origin_record
from finetune.run.token_budget import TokenBudget
from finetune.runtime.accelerator import device_name, environment
from finetune.runtime.choice import Choice
from finetune.runtime.launch import require_same


@dataclass(frozen=True)
class RunFacts:
    """What a run consists of: recorded in environment.json, and shown when it starts."""

    config: Config
    model: Any
    tokenizer: Any
    data: Data
    plan: Plan
    choices: Sequence[Choice]
    fast_paths: FastPaths
    """A resumed run multiplies int8 weights in the same way"""
    token_budget: TokenBudget
    """A resumed run lays out its updates in the same way"""
    flop_per_second: float
    """Of this device in matrix multiplications"""


def require_same_start(accelerator: Any, data: Data, source: Path | None) -> None:
    """All ranks must have read the same rows, and resume from the same checkpoint, if any.

    Raises:
        ValueError: as `require_same`.
    """
    require_same(
        accelerator,
        {
            "the fingerprint of the rows": fingerprint_of(data.train, data.eval)["fingerprint"],
            "the checkpoint to resume from": "none" if source is None else source.name,
        },
    )


def open_run(
    accelerator: Any,
    facts: RunFacts,
    state: TrainState,
    checkpointer: Checkpointer,
    source: Path | None,
    remarks: Sequence[str],
) -> None:
    """Write environment.json and config.yaml, remove what a kill left half written, and print the start.

    `source` is the checkpoint that the run resumes from; `remarks` are those of `find_checkpoint`.

    Raises:
        ValueError: as `folder.start_run` and `origin_record`.
    """
    origin = origin_record(facts.config, facts.model, state.base, state.step)
    began = describe_origin(origin, facts.config.lora)
    described = [*describe(facts), *began, *batch_arithmetic(facts.config, facts.plan)]
    record = {
        **environment(accelerator),
        "base": state.base,
        "model_adapter": origin,
        "token_rows": token_ids_of(facts.model.peft_config["default"].trainable_token_indices),
        "int8": facts.fast_paths.int8.actual,
        "token_budget": facts.token_budget.to_record,
        "described": described,
        "settings": [asdict(choice) for choice in facts.choices],
        "rows": facts.data.counts(),
    }
    template = None if facts.config.data.chat_template is None else facts.tokenizer.chat_template
    size = checkpointer.estimate_bytes()
    folder.start_run(facts.config, record, facts.plan, facts.data, template, source, state.step, size)
    folder.keep_lines_until(Path(facts.config.output_dir), state.step)
    summary.show_start(facts.config, facts.choices, described)
    summary.show_checkpoint(source, remarks, state.step)


def describe(facts: RunFacts) -> list[tuple[str, str]]:
    """The model; the rows that were read, kept and dropped, and what of them is not used; the examples they
    became; and the eval rows that are trained on too."""
    config, model, data = facts.config, facts.model, facts.data
    rows, dropped, unused = data.rows, data.dropped(), data.unused()
    trainable, total = count_parameters(model)
    added = token_ids_of(model.peft_config["default"].trainable_token_indices)
    rows_trained = [("trained rows", f"{len(added)} tokens of the embedding and the head")] if added else []
    num_taken = len(rows.train) + len(rows.eval)
    return [
        ("device", f"{device_name(model.device)}; {facts.flop_per_second / 1e9:,.0f} GFLOP/s in matmuls"),
        ("model", f"{config.model.name_or_path}, base in {config.model.quantization}"),
        ("parameters", f"{trainable:,} trainable of {total:,} ({trainable / total:.2%})"),
        *rows_trained,
        ("chat template", describe_template(config.data.chat_template, facts.tokenizer)),
        (
            "rows",
            f"{rows.num_read:,} read, {rows.num_kept:,} usable, {num_taken:,} taken; "
            f"{_sources_in_words(data)}",
        ),
        *([("not used", in_words(unused))] if unused else []),
        ("dropped", ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"),
        ("cut at max_length", f"{len(data.train.truncated):,} train, {len(data.eval.truncated):,} eval"),
        ("examples", f"{len(data.train.dataset):,} train, {len(data.eval.dataset):,} eval"),
        ("leaks", _leaks_in_words(data.leaks, len(rows.eval))),
    ]


def _sources_in_words(data: Data) -> str:
    """The format of the rows; of several sources, the name, rows taken and format of each."""
    names, formats = data.rows.source_names, data.rows.formats
    if len(names) < 2:
        return ", ".join(formats)
    each = zip(names, data.taken(), formats, strict=True)
    return ", ".join(f"{name} {count:,} ({form})" for name, count, form in each)


def _leaks_in_words(leaks: Mapping[int, Match], num_eval: int) -> str:
    if not leaks:
        return "no eval prompt is trained on"
    same = sum(match.exact for match in leaks.values())
    return (
        f"{len(leaks):,} of {num_eval:,} eval prompts are trained on too ({same:,} the same, "
        f"{len(leaks) - same:,} nearly); the loss is also given without them"
    )


def batch_arithmetic(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Examples and tokens of an update, and the number of updates."""
    train = config.train
    if train.gradient_accumulation_steps is None:
        size = f"{plan.global_batch_size}, shared by {plan.num_processes} process"
    else:
        product = f"{train.micro_batch_size} x {train.gradient_accumulation_steps} x {plan.num_processes}"
        size = f"{product} process = {plan.global_batch_size}"
    capped = "" if plan.max_steps is None else f", at most {plan.max_steps}"
    return [
        ("examples per update", size),
        (
            "updates",
            f"ceil({len(plan.lengths):,} / {plan.global_batch_size}) = {plan.steps_per_epoch:,} an epoch "
            f"x {plan.num_epochs}{capped} = {plan.num_steps:,}",
        ),
        (
            "tokens",
            f"{int(plan.lengths.sum()):,} an epoch, {plan.target_counts.sum() / plan.lengths.sum():.1%} of "
            f"them targets; longest example {int(plan.lengths.max())}, mean {plan.lengths.mean():.0f}",
        ),
        ("tokens per micro-batch", f"{plan.layout.max_tokens:,} at most, {_layout_name(plan)}"),
    ]


def _layout_name(plan: Plan) -> str:
    return "packed without padding" if plan.layout.packing else "padded"
