"""The adapter that a run begins from (`model.adapter`): found, checked, and put in place of a new one.

It is one of ours or any that PEFT has saved. Its own configuration says what it consists of. What we would
not train exactly as PEFT does is refused by name, and so is a weight that the base has no place for.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from finetune.config import Config, LoraConfig
from finetune.config_parsing import parse_config
from finetune.runtime.files import file_sha256
from finetune.runtime.fsdp_launch import follow_launcher

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# A run's folder: its configuration and record, its result, and what says that a checkpoint is whole.
RUN_FILES, RESULT, MANIFEST = ("config.yaml", "environment.json"), "adapter", "manifest.json"
ROWS = "token_adapter.trainable_tokens_delta"
"""How PEFT's names of the trained rows of an embedding end"""

# What an adapter's configuration may say: what shapes its layers, what is ours to choose, and what only says
# how its first weights were made, which are not those in the file.
SHAPES = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "lora_bias"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("trainable_token_indices", "modules_to_save"),
}
NOT_OF_ITS_WEIGHTS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "lora_dropout", "init_lora_weights", "eva_config"),
}
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to make an adapter's first weights that take something away from the weights of the base"""


OWN_KEYS = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "modules_to_save")
"""The keys of our section `lora` that an adapter decides"""


def parse_training_config(argv: Sequence[str]) -> Config:
    """As `parse_config`, with the settings of the adapter that the run begins from, and what the launcher
    says of sharding.

    Raises:
        ValueError: as `parse_config`, `with_adapter_settings` and `follow_launcher`.
    """
    return follow_launcher(with_adapter_settings(parse_config(argv)))


def with_adapter_settings(config: Config) -> Config:
    """The configuration with the section `lora` as `model.adapter` has it; without one, as it is.

    A key may have the adapter's value or the default, which then gives way; `lora_dropout` is free. A run
    that has begun has them in its record: its adapter need not be there any more.

    Raises:
        ValueError: there is no such adapter, it cannot be trained on, or a key has another value than it.
    """
    name = config.model.adapter
    if name is None:
        return config
    own = _settings_of_run(config) or _own_keys(read_settings(find_adapter(name)))
    for key, value in own.items():
        given = getattr(config.lora, key)
        if _comparable(given) not in (_comparable(value), _comparable(getattr(LoraConfig(), key))):
            raise ValueError(
                f"lora.{key} is {_in_words(given)}, and the adapter {name} has {_in_words(value)}: leave the "
                "key out, and the run takes the adapter's"
            )
    return replace(config, lora=replace(config.lora, **own))


def _settings_of_run(config: Config) -> dict[str, Any] | None:
    """What the run in `output_dir`, if it began from the same adapter, took from it."""
    try:
        saved = yaml.safe_load((Path(config.output_dir) / RUN_FILES[0]).read_text(encoding="utf-8"))
        if saved["model"]["adapter"] != config.model.adapter:
            return None
        lora = {"modules_to_save": None, **saved["lora"]}  # an older run has no such key
        return {key: lora[key] for key in OWN_KEYS}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None  # no run, or one that cannot be resumed: what is wrong with it is said where it is opened


def _own_keys(settings: peft.LoraConfig) -> dict[str, Any]:
    targets = settings.target_modules
    own = {key: getattr(settings, key) for key in OWN_KEYS}
    own["lora_alpha"] = float(settings.lora_alpha)
    own["modules_to_save"] = sorted(settings.modules_to_save or ()) or None
    return {**own, "target_modules": targets if isinstance(targets, str) else sorted(targets)}


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _in_words(value: Any) -> str:
    return (
        ", ".join(value) if isinstance(value, list) else f"{value:g}" if type(value) is float else f"{value}"
    )


def find_adapter(name: str) -> Path:
    """The folder of the adapter that `model.adapter` names: of a run, the one of its result.

    Raises:
        ValueError: there is none, the run is not finished, a checkpoint was altered, or its weights are
            pickled, which could run code.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # no such user, or one without a home
        raise ValueError(f"model.adapter {name}: {error}") from error
    if not path.is_dir():
        raise ValueError(
            f"model.adapter {name} is not a folder; name a run, one of its checkpoints, or the folder of an "
            "adapter on this computer"
        )
    folder = path
    if all((path / file).is_file() for file in RUN_FILES):
        folder = path / RESULT
        if not folder.is_dir():
            saved = sorted((path / "checkpoints").glob("step_*"))
            advice = f"name a checkpoint of it, such as {saved[-1]}" if saved else "it has saved nothing yet"
            raise ValueError(f"model.adapter {name} is a run that is not finished; {advice}")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"model.adapter {name} holds no adapter: {folder / ADAPTER_CONFIG} is not there")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = folder / "adapter_model.bin"
        why = f"{folder / ADAPTER_WEIGHTS} is not there"
        if pickled.is_file():
            why = f"{pickled} is pickled, which could run code: save the adapter as safetensors"
        raise ValueError(f"model.adapter {name} cannot be used: {why}")
    if (folder / MANIFEST).is_file():
        _check_manifest(folder)
    return folder


def _check_manifest(checkpoint: Path) -> None:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: files[name]["sha256"] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"model.adapter {checkpoint}: {MANIFEST} cannot be read") from error
    for name, digest in expected.items():
        if file_sha256(checkpoint / name) != digest:
            raise ValueError(f"model.adapter {checkpoint} is not an intact checkpoint: {name} was altered")


def read_raw_settings(folder: Path) -> dict[str, Any]:
    """What the adapter's configuration says, as it stands there.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / ADAPTER_CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not the configuration of an adapter")
    return raw


def read_settings(folder: Path) -> peft.LoraConfig:
    """What the adapter in `folder` consists of: its configuration, without what does not shape its layers.

    Raises:
        ValueError: it is not LoRA's, or has a setting with which it could not be trained here as in PEFT.
    """
    path, raw = folder / ADAPTER_CONFIG, read_raw_settings(folder)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path} is of an adapter of type {raw.get('peft_type')}; only LORA is trained here")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{path} is of an adapter for {raw['task_type']}; only CAUSAL_LM is trained here")
    if str(raw.get("init_lora_weights")).lower().startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"{path} has init_lora_weights {raw['init_lora_weights']}, which changes the base: convert the "
            "adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    defaults = peft.LoraConfig()
    for key, value in raw.items():
        if key in SHAPES | NOT_OF_ITS_WEIGHTS or value in (None, False, [], {}):
            continue
        if key not in {field.name for field in fields(peft.LoraConfig)}:
            raise ValueError(f"{path} has {key}, which this version of PEFT does not know")
        if key == "runtime_config" or value != getattr(defaults, key):
            raise ValueError(f"{path} has {key} {json.dumps(value)[:60]}, which is not trained here")
    if not raw.get("target_modules"):
        raise ValueError(f"{path} names no target_modules")
    try:
        shapes = {key: raw[key] for key in SHAPES if raw.get(key) is not None}
        settings = peft.LoraConfig(**shapes, task_type=peft.TaskType.CAUSAL_LM)
        ranks = [settings.r, *settings.rank_pattern.values()]
        scales = [settings.lora_alpha, *settings.alpha_pattern.values()]
        are_numbers = all(type(rank) is int and rank > 0 for rank in ranks) and all(
            type(scale) in (int, float) and scale > 0 for scale in scales
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())[:300]}") from error
    if not are_numbers:
        raise ValueError(f"{path} has a rank or a lora_alpha that is not a number above 0")
    return settings


def largest_rank(folder: Path) -> int:
    """The largest rank of the layers of the adapter in `folder`.

    Raises:
        ValueError: as `read_raw_settings`.
    """
    raw = read_raw_settings(folder)
    ranks: list[int] = [raw.get("r") or peft.LoraConfig().r, *(raw.get("rank_pattern") or {}).values()]
    return max(ranks)


def adapter_weights(model: peft.PeftModel) -> dict[str, Tensor]:
    """The adapter's weights. By default PEFT asks the hub at each save whether the vocabulary has grown."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(
        model, all_weights(model), save_embedding_layers=False
    )
    return weights


def all_weights(model: peft.PeftModel) -> dict[str, Tensor]:
    """What PEFT looks for the adapter's weights in. Its own choice, `model.state_dict()`, frees gathered
    weights of a sharded base: where one process alone saves, the others would then gather by themselves."""
    return {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}


def check_weights(folder: Path, model: peft.PeftModel) -> None:
    """Raise ValueError, naming the first, where a weight of the adapter in `folder` has no place of its name
    and shape in the model, or a place in the model has no weight.

    Rows of added tokens may be new where the adapter has none.
    """
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            saved = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {error}") from error
    expected = {name: list(tensor.shape) for name, tensor in adapter_weights(model).items()}
    base = model.get_base_model().name_or_path
    for name, shape in saved.items():
        if name not in expected:
            raise ValueError(
                f"model.adapter {folder} has {name}, which belongs to no adapted layer of {base}"
            )
        if shape != expected[name]:
            raise ValueError(
                f"model.adapter {folder} has {name} of the shape {shape}, and {base} takes {expected[name]}"
            )
    has_rows = any(name.endswith(ROWS) for name in saved)
    for name in expected:
        if name not in saved and (has_rows or not name.endswith(ROWS)):
            raise ValueError(f"model.adapter {folder} has no {name}, which {base} takes")


def load_weights(folder: Path, model: peft.PeftModel) -> None:
    """Put the weights of the adapter in `folder` into the model, in place.

    Raises:
        ValueError: as `check_weights`, or a number is not finite.
    """
    check_weights(folder, model)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"model.adapter {folder} has a number in {name} that is not finite")
    set_peft_model_state_dict(model, {**adapter_weights(model), **weights})
