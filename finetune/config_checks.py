"""What must hold across the configuration: ranges, and settings that contradict each other."""

import math
from dataclasses import asdict

from finetune.config import Config, flatten

LARGEST_FLOAT = 1e38  # about what fp32 holds, in which optimizers compute


LARGEST_WHOLE_NUMBER = 10**9  # beyond every size and count, and far from where 64 bits overflow


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
        "fast.head_mib": config.fast.head_mib,
        "eval.every": None if config.eval.every == "epoch" else config.eval.every,
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
    by_eval_loss = {
        "checkpoint.keep_best": config.checkpoint.keep_best,
        "train.early_stopping_patience": train.early_stopping_patience,
    }
    for key, setting in by_eval_loss.items():
        if setting and data.eval_fraction == 0:
            raise ValueError(f"{key} goes by the eval loss, and data.eval_fraction 0 does not evaluate")
    if budget is not None and budget < data.max_length:
        raise ValueError(
            f"train.max_tokens_per_micro_batch ({budget}) must be at least data.max_length "
            f"({data.max_length}): an example is never split"
        )
    if model.quantization == "nf4" and train.mixed_precision == "no":
        raise ValueError("model.quantization nf4 multiplies in 16 bits: set train.mixed_precision to bf16")


def _check_texts(config: Config) -> None:
    """Names must not be empty, and every text must be one that a file can hold and a system call takes."""
    empty = {
        "output_dir": "name a folder for this run",
        "resume": "say auto or never, or name a checkpoint",
        "model.name_or_path": "name a folder, a .gguf file or a hub model",
        "model.adapter": "name the folder of an adapter, or leave it null",
        "model.revision": "name a branch, tag or commit, or leave it null",
        "data.path": "name a file, a list of files or a hub data set",
        "lora.target_modules": "name the modules, or say all-linear",
    }
    for key, value in flatten(asdict(config)).items():
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if key in empty and (value == [] or "" in texts):
            raise ValueError(f"{key} is empty: {empty[key]}")
        for text in texts:
            if "\0" in text or text.encode(errors="replace").decode() != text:
                raise ValueError(f"{key} holds a character that is no text: {text!r:.60}")
