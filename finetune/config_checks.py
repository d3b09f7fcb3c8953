"""What must hold across the configuration: ranges, and settings that contradict each other."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from finetune.config import (
    Config,
    DataConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    described,
    evaluates,
    examples_per_update,
    flatten,
)

LARGEST_FLOAT = 1e38  # about what fp32 holds, in which optimizers compute


LARGEST_WHOLE_NUMBER = 10**9  # beyond every size and count, and far from where 64 bits overflow

ANSWER_METRICS = ("exact_match", "chrf", "ended", "tool_call_accuracy")
"""What eval.answers adds to an eval line"""
LOWER_IS_BETTER = ("loss", "loss_without_leaks")
HIGHER_IS_BETTER = ("mean_token_accuracy", *ANSWER_METRICS)
OF_A_SOURCE = ("loss", "mean_token_accuracy")  # also as loss/NAME


# What a column can be, by the names that data.columns maps to.
COLUMNS = (
    *(
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "history",
        "prompt",
        "completion",
        "text",
    ),
    *("system", "tools", "chat_template_kwargs"),
)


def check_config(config: Config) -> None:
    """Raise ValueError, naming the key, for a value out of range or settings that contradict each other."""
    model, lora, data, train = config.model, config.lora, config.data, config.train
    optim, budget = config.optim, train.max_tokens_per_micro_batch
    budget = None if budget == "auto" else budget
    whole_numbers: dict[str, int | None] = {
        "lora.r": lora.r,
        "data.num_samples": data.num_samples,
        "train.num_epochs": train.num_epochs,
        "train.max_steps": train.max_steps,
        "train.early_stopping_patience": train.early_stopping_patience,
        "train.micro_batch_size": train.micro_batch_size,
        "train.gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train.global_batch_size": train.global_batch_size,
        "fast.head_mib": config.fast.head_mib,
        "eval.every": None if config.eval.every == "epoch" else config.eval.every,
        "optim.warmup_steps": optim.warmup_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "log.every_steps": config.log.every_steps,
    }
    for key, number in whole_numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{key} must be at least 1, not {number}")
    sizes = {"data.max_length": data.max_length, "train.max_tokens_per_micro_batch": budget}
    for key, number in {**whole_numbers, **sizes}.items():
        if number is not None and number > LARGEST_WHOLE_NUMBER:
            raise ValueError(f"{key} must be at most {LARGEST_WHOLE_NUMBER}, not {number}")
    ranges: list[tuple[str, float, bool, str]] = [
        ("lora.lora_alpha", lora.lora_alpha, lora.lora_alpha > 0, "above 0"),
        ("lora.lora_dropout", lora.lora_dropout, 0 <= lora.lora_dropout < 1, "at least 0 and below 1"),
        ("data.eval_fraction", data.eval_fraction, 0 <= data.eval_fraction < 1, "at least 0 and below 1"),
        ("data.max_length", data.max_length, data.max_length >= 2, "at least 2"),
        ("optim.learning_rate", optim.learning_rate, 0 < optim.learning_rate < float("inf"), "above 0"),
        ("optim.eps", optim.eps, optim.eps > 0, "above 0"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("optim.max_grad_norm", optim.max_grad_norm, optim.max_grad_norm >= 0, "at least 0"),
        ("optim.warmup_ratio", optim.warmup_ratio, 0 <= optim.warmup_ratio <= 1, "between 0 and 1"),
        *_ranges_of_ratios(optim),
        *(("optim.betas", beta, 0 <= beta < 1, "at least 0 and below 1") for beta in optim.betas),
    ]
    seeds = {
        "data.sample_seed": data.sample_seed,
        "data.split_seed": data.split_seed,
        "train.seed": train.seed,
    }
    ranges += [(key, seed, 0 <= seed < 2**32, "at least 0 and below 2^32") for key, seed in seeds.items()]
    for name, value, holds, expected in ranges:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, not {value}")
        if value > LARGEST_FLOAT:
            raise ValueError(f"{name} must be at most {LARGEST_FLOAT}, not {value}")
        if not holds:
            raise ValueError(f"{name} must be {expected}, not {value}")
    # The configuration of a run that began from an adapter has its pattern there.
    is_pattern = isinstance(lora.target_modules, str) and lora.target_modules != "all-linear"
    if is_pattern and model.adapter is None:
        raise ValueError(
            f"lora.target_modules must be all-linear or a list such as [q_proj, v_proj], "
            f"not {lora.target_modules!r}"
        )
    if not lora.target_modules:
        raise ValueError("lora.target_modules is an empty list: name the modules, or say all-linear")
    _check_texts(config)
    _check_sources(config)
    _check_evaluation(config)
    _check_schedule(optim)
    _check_lora(config)
    if budget is not None and budget < data.max_length:
        raise ValueError(
            f"train.max_tokens_per_micro_batch ({budget}) must be at least data.max_length "
            f"({data.max_length}): an example is never split"
        )
    _check_batch_sizes(train)
    if model.quantization == "nf4" and train.mixed_precision == "no":
        raise ValueError("model.quantization nf4 multiplies in 16 bits: set train.mixed_precision to bf16")
    if train.sharding == "base" and model.quantization != "none" and (lora.use_dora or not config.fast.lora):
        key = "lora.use_dora" if lora.use_dora else "fast.lora false"
        raise ValueError(
            f"train.sharding base shares out {model.quantization} weights that only the fast LoRA layers can "
            f"read: leave {key} out, or set model.quantization to none"
        )


def _check_batch_sizes(train: TrainConfig) -> None:
    """Some number of processes must make an update as large as the keys say; which one is not known here."""
    of_one_process = train.micro_batch_size * (train.gradient_accumulation_steps or 1)
    examples_per_update(train, max(1, (train.global_batch_size or 0) // of_one_process))


def is_higher_better(metric: str) -> bool:
    """Whether a higher value of a metric that checkpoint.best_by may name is better."""
    return metric.partition("/")[0] in HIGHER_IS_BETTER


def may_be_best_by(metric: str) -> bool:
    """Whether checkpoint.best_by may name a metric: one of which it is known whether higher is better."""
    kind, slash, name = metric.partition("/")
    if slash:
        return kind in OF_A_SOURCE and name != ""
    return kind in LOWER_IS_BETTER + HIGHER_IS_BETTER


def _check_evaluation(config: Config) -> None:
    """What goes by the evaluations needs some, and checkpoint.best_by names a metric that they have."""
    by, answers = config.checkpoint.best_by, config.eval.answers
    if not 0 <= answers <= LARGEST_WHOLE_NUMBER:
        bound = "at least 0" if answers < 0 else f"at most {LARGEST_WHOLE_NUMBER}"
        raise ValueError(f"eval.answers must be {bound}, not {answers}")
    by_evaluation = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "train.early_stopping_patience": config.train.early_stopping_patience,
        "eval.answers": answers,
    }
    for key, setting in by_evaluation.items():
        if setting and not evaluates(config):
            raise ValueError(f"{key} needs evaluations, and data.eval_fraction 0 does not evaluate")
    metric = by.partition("/")[0]
    if not may_be_best_by(by):
        named = [f"{of}/NAME of a source or eval set" for of in OF_A_SOURCE]
        known = ", ".join([*LOWER_IS_BETTER, *HIGHER_IS_BETTER, *named])
        raise ValueError(f"checkpoint.best_by must be one of {known}, not {by!r:.60}")
    if metric in ANSWER_METRICS and answers == 0:
        raise ValueError(
            f"checkpoint.best_by {by} is of answers, and eval.answers is 0: set it to the number of rows to "
            "answer"
        )


def _ranges_of_ratios(optim: OptimConfig) -> Iterator[tuple[str, float, bool, str]]:
    """The ranges of the ratios that may be left out."""
    if (ratio := optim.lora_b_lr_ratio) is not None:
        yield "optim.lora_b_lr_ratio", ratio, ratio > 0, "above 0"
    if (ratio := optim.min_lr_ratio) is not None:
        yield "optim.min_lr_ratio", ratio, 0 <= ratio <= 1, "between 0 and 1"
    if (ratio := optim.decay_ratio) is not None:
        yield "optim.decay_ratio", ratio, 0 < ratio <= 1, "above 0 and at most 1"


def _check_schedule(optim: OptimConfig) -> None:
    """The keys of the schedule belong together, and none of them is without effect."""
    if optim.warmup_steps is not None and optim.warmup_ratio > 0:
        raise ValueError(
            f"optim.warmup_steps is {optim.warmup_steps} and optim.warmup_ratio {optim.warmup_ratio}: set "
            "warmup_ratio to 0, or leave warmup_steps out"
        )
    if optim.decay_ratio is not None and optim.schedule != "warmup_stable_decay":
        raise ValueError(
            f"optim.decay_ratio belongs to the schedule warmup_stable_decay, and optim.schedule is "
            f"{optim.schedule}"
        )
    if optim.min_lr_ratio is not None and optim.schedule == "constant":
        raise ValueError("optim.min_lr_ratio is where a schedule falls to, and optim.schedule is constant")
    if optim.warmup_ratio + (optim.decay_ratio or 0) > 1:
        raise ValueError(
            f"optim.warmup_ratio {optim.warmup_ratio} and optim.decay_ratio {optim.decay_ratio} are together "
            "more than all updates"
        )


def _check_lora(config: Config) -> None:
    """What must hold of the adapter's layers and first weights."""
    lora = config.lora
    for key in ("exclude_modules", "layers_to_transform"):
        if getattr(lora, key) == []:
            raise ValueError(f"lora.{key} is an empty list: leave it null")
    if any(number < 0 for number in lora.layers_to_transform or ()):
        raise ValueError(
            f"lora.layers_to_transform must be numbers from 0, not {min(lora.layers_to_transform or ())}"
        )
    own = ("exclude_modules", "layers_to_transform", "init_lora_weights")
    if config.model.adapter is not None:
        for key in own:
            if getattr(lora, key) is not None:
                raise ValueError(
                    f"lora.{key} is for a new adapter, and model.adapter names one: leave it out"
                )
    both = set(lora.modules_to_save or ()).intersection(lora.target_modules)
    if both and isinstance(lora.target_modules, list):
        raise ValueError(
            f"lora.target_modules and lora.modules_to_save both name {min(both)}: a module gets LoRA or is "
            "trained whole; leave it out of one"
        )
    if lora.init_lora_weights == "loftq":
        _check_loftq(config)
    if lora.init_lora_weights in ("pissa", "olora") and config.optim.weight_decay > 0:
        raise ValueError(
            f"lora.init_lora_weights {lora.init_lora_weights} holds half of the adapter fixed, which "
            "optim.weight_decay would change: set it to 0"
        )


def _check_loftq(config: Config) -> None:
    quantization = config.model.quantization
    if quantization != "nf4":
        lost = {"none": "nothing was lost", "int8": "8 bits lose too little"}
        raise ValueError(
            "lora.init_lora_weights loftq makes up for what weights in 4 bits have lost, and with "
            f"model.quantization {quantization} {lost[quantization]}: set it to nf4, or leave loftq out"
        )
    if config.lora.use_dora:
        raise ValueError(
            "lora.init_lora_weights loftq changes the weights whose magnitudes lora.use_dora takes: leave "
            "one of them out"
        )


def _check_sources(config: Config) -> None:
    """What must hold of the sources of rows, of their columns and names, and of the eval sets."""
    data = config.data
    if data.eval_path is not None and data.eval_fraction > 0:
        raise ValueError(
            f"data.eval_fraction is {data.eval_fraction}, but data.eval_path names the rows to evaluate on: "
            "set data.eval_fraction to 0, or leave data.eval_path out"
        )
    _check_columns("data.columns", data.columns)
    for key, path in (("data.path", data.path), ("data.eval_path", data.eval_path)):
        entries = [] if path is None or isinstance(path, str) else path
        sources = [entry for entry in entries if isinstance(entry, SourceConfig)]
        # On the command line, what is no list of either kind is read as a text.
        if isinstance(path, str) and path.startswith(("[", "{")) and "path:" in path:
            raise ValueError(f"{key} must be a list of files or of sources {{path: ...}}, not {path}")
        for source in sources:
            place = f"{key} {described(source.path)}"
            if _is_empty(source.path):
                raise ValueError(f"{key}: a source has an empty path; name a file or a hub data set")
            _check_columns(f"{place}: columns", source.columns)
            if source.name is not None:
                _check_name(f"{place}: name", source.name)
            if (number := source.num_samples) is not None and not 1 <= number <= LARGEST_WHOLE_NUMBER:
                bound = "at least 1" if number < 1 else f"at most {LARGEST_WHOLE_NUMBER}"
                raise ValueError(f"{place}: num_samples must be {bound}, not {number}")
        names = [source.name for source in sources if source.name is not None]
        if key == "data.eval_path":
            names += config.eval.sets or ()
            if any(source.share is not None for source in sources):
                raise ValueError(f"{key}: an eval set has no share; num_samples takes so many of its rows")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{key}: {twice[0]} is the name of two sources")
    _check_shares(data)
    for name, path in (config.eval.sets or {}).items():
        _check_name("eval.sets: a name", name)
        if _is_empty(path):
            raise ValueError(f"eval.sets.{name} is empty: name a file, a list of files or a hub data set")


def _check_columns(key: str, columns: Mapping[str, str] | None) -> None:
    for theirs, ours in (columns or {}).items():
        if not theirs.strip():
            raise ValueError(f"{key} has an empty name of a column; write {{theirs: ours}}")
        if ours not in COLUMNS:
            raise ValueError(f"{key}: {theirs} cannot be {ours!r}; it is one of {', '.join(COLUMNS)}")
        if list((columns or {}).values()).count(ours) > 1:
            raise ValueError(f"{key}: two columns are {ours}; one can be")


def _check_name(key: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"{key} must be of letters, digits, dots, dashes and underscores, as it names metrics, "
            f"not {name!r:.60}"
        )


def _check_shares(data: DataConfig) -> None:
    """Either every source of data.path has a share, and these add up to 1, or none has."""
    sources = (
        [] if isinstance(data.path, str) else [one for one in data.path if isinstance(one, SourceConfig)]
    )
    numbers = [source for source in sources if source.num_samples is not None]
    if numbers and data.num_samples is not None:
        raise ValueError(
            f"data.num_samples is {data.num_samples}, and {described(numbers[0].path)} has a num_samples of "
            "its own: leave one of them out, or use share"
        )
    if all(source.share is None for source in sources):
        return
    if numbers and numbers[0].share is not None:
        raise ValueError(
            f"data.path: {described(numbers[0].path)} has num_samples and a share; leave one out"
        )
    if numbers:
        raise ValueError(
            f"data.path: {described(numbers[0].path)} has num_samples, where others have a share; all "
            "sources have a share, or none has"
        )
    for source in sources:
        place = f"data.path {described(source.path)}"
        if source.share is None:
            raise ValueError(
                f"{place} has no share, where others have one; all sources have one, or none has"
            )
        if not 0 < source.share <= 1:
            raise ValueError(f"{place}: share must be above 0 and at most 1, not {source.share}")
    total = math.fsum(source.share or 0 for source in sources)
    if abs(total - 1) > 1e-6:
        listed = ", ".join(f"{described(source.path)} {source.share}" for source in sources)
        raise ValueError(f"data.path: the shares must add up to 1, not {total:g} ({listed})")


def _check_texts(config: Config) -> None:
    """Names must not be empty, and every text must be one that a file can hold and a system call takes."""
    empty = {
        "output_dir": "name a folder for this run",
        "resume": "say auto or never, or name a checkpoint",
        "model.name_or_path": "name a folder, a .gguf file or a hub model",
        "model.adapter": "name the folder of an adapter, or leave it null",
        "model.revision": "name a branch, tag or commit, or leave it null",
        "data.path": "name a file, a list of files or a hub data set",
        "data.eval_path": "name a file, a list of files or a hub data set, or leave it null",
        "data.chat_template": "name a file or a template, or leave it null",
        "lora.target_modules": "name the modules, or say all-linear",
        "lora.modules_to_save": "name layers, or leave it null",
    }
    for key, value in flatten(asdict(config)).items():
        texts = list(_texts_in(value))
        if key in empty and _is_empty(value):
            raise ValueError(f"{key} is empty: {empty[key]}")
        for text in texts:
            if "\0" in text or text.encode(errors="replace").decode() != text:
                raise ValueError(f"{key} holds a character that is no text: {text!r:.60}")


def _is_empty(value: Any) -> bool:
    return value in ("", []) or (isinstance(value, list) and "" in value)


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, also in lists and mappings, and their keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value
        for item in value.values():
            yield from _texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)
