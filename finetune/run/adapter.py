"""A trained adapter on disk, the configuration of its run, and the model that the two make."""

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.config import Config, ModelConfig
from finetune.config_parsing import config_to_yaml, parse_config
from finetune.model.added_tokens import add_rows, token_ids_of
from finetune.model.given_adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    adapter_weights,
    read_raw_settings,
)
from finetune.model.load import base_fingerprint, check_vocabulary, load_base, load_tokenizer
from finetune.ops import token_rows, trained_modules
from finetune.run.checkpoint import BASE, STATE, TRAINING_CONFIG, fault_of, list_checkpoints
from finetune.run.folder import CHAT_TEMPLATE, CONFIG, ENVIRONMENT, RESULT, read_environment
from finetune.runtime import system
from finetune.runtime.accelerator import choose_precision, create_accelerator
from finetune.runtime.choice import Choice
from finetune.runtime.cli import CommandParser, split_arguments
from finetune.runtime.console import say

TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Trained:
    """An adapter, and how it was trained."""

    adapter: Path
    """The folder that holds it: a run's result, a checkpoint, or one from elsewhere"""
    config: Config
    run_dir: Path | None
    """The run's folder, if the adapter is still in one"""
    own_tokenizer: bool = False
    """Whether its tokenizer, with its chat template, lies beside the adapter; else it is the base's, with the
    chat template of the configuration"""


@dataclass(frozen=True)
class TrainedModel:
    accelerator: Any
    precision: Choice
    tokenizer: Any
    model: peft.PeftModel
    """`model.disable_adapter()` gives the base"""


def trained_parser(command: str, options: str, description: str) -> CommandParser:
    """The parser of a command that takes a run's folder, a checkpoint or an adapter.

    `options` stand in its usage line.
    """
    parser = CommandParser(
        prog=f"python -m finetune {command}",
        usage=f"%(prog)s RUN {options} [--section.key VALUE ...]",
        description=description,
        epilog="Keys of the configuration, as train.py takes them, override what the run was trained with.",
    )
    parser.add_argument(
        "trained", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or an adapter"
    )
    return parser


def parse_trained(parser: CommandParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Trained]:
    """The arguments of a `trained_parser`, and the adapter that the first one names.

    Raises:
        ValueError: an argument that is wrong, or as `find_trained`.
    """
    arguments, settings = split_arguments(parser, argv)
    return arguments, find_trained(arguments.trained, settings)


def find_trained(path: Path, settings: Sequence[str] = ()) -> Trained:
    """The adapter that a run's folder, a checkpoint or an adapter's folder holds.

    Of an unfinished run it is that of its newest whole checkpoint. `settings` are arguments as train.py takes
    them; they override the configuration of the run. An adapter from elsewhere has none: then it is the
    default one, with the base that the adapter names, not quantized.
    The chat template is the one that was trained with, unless the settings name another.
    `model.trust_remote_code` counts in the configuration of a run, not in a file beside an adapter.

    Raises:
        ValueError: the folder holds no adapter, a damaged one, or a setting is wrong.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: name a run's folder, a checkpoint, or an adapter")
    adapter, run_dir = _adapter_in(path), run_of(path)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (adapter / name).is_file():
            raise ValueError(f"{path} holds no adapter: {adapter / name} is not there")
    if (adapter / MANIFEST).exists() and (fault := fault_of(adapter)):
        raise ValueError(f"{adapter} is not an intact checkpoint: {fault}")
    given = any(text.partition("=")[0] == "--data.chat_template" for text in settings)
    own_tokenizer = not given and (adapter / TOKENIZER_CONFIG).is_file()
    recorded = adapter / TRAINING_CONFIG if run_dir is None else run_dir / CONFIG
    if recorded.is_file():
        # The files beside an adapter may be anybody's: only the user decides whose code to run.
        fixed = [] if run_dir else ["--model.trust_remote_code", "false"]
        if run_dir and not own_tokenizer and (run_dir / CHAT_TEMPLATE).is_file():
            # The file that the configuration names may have changed.
            fixed += ["--data.chat_template", str(run_dir / CHAT_TEMPLATE)]
        config = parse_config(["--config", str(recorded), *fixed, *settings])
        return Trained(adapter, config, run_dir, own_tokenizer)
    say(f"{adapter} does not say how it was trained: its base is taken as it names it, without quantization.")
    config = Config(model=ModelConfig(name_or_path=_named_base(adapter), quantization="none"))
    with tempfile.TemporaryDirectory() as folder:  # Windows reads no temporary file that is open
        file = Path(folder) / CONFIG
        system.write_text(file, config_to_yaml(config))
        return Trained(adapter, parse_config(["--config", str(file), *settings]), None, own_tokenizer)


def _adapter_in(path: Path) -> Path:
    if not _is_run(path):
        return path
    if (path / RESULT).is_dir():
        return path / RESULT
    damaged: list[str] = []
    for folder in list_checkpoints(path):
        fault = fault_of(folder)
        if fault is None:
            for line in damaged:
                say(f"Skipped: {line}.")
            say(f"The run in {path} is not finished: this is its {folder.name}.")
            return folder
        damaged.append(f"{folder.name} is damaged ({fault})")
    if damaged:
        raise ValueError(f"the run in {path} has no intact checkpoint: {'; '.join(damaged)}")
    raise ValueError(f"the run in {path} has not saved anything yet")


def run_of(path: Path) -> Path | None:
    """The run's folder that `path` is, or that contains it as its adapter or one of its checkpoints."""
    here = path.resolve()
    return next((folder for folder in (here, here.parent, here.parent.parent) if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    """Recognized by two files: other folders have a config.yaml too."""
    return (folder / CONFIG).is_file() and (folder / ENVIRONMENT).is_file()


def _named_base(adapter: Path) -> str:
    try:
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} cannot be read: {error}") from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not base:
        raise ValueError(f"{adapter / ADAPTER_CONFIG} names no base model: give --model.name_or_path")
    return str(base)


def load_trained_tokenizer(trained: Trained) -> Any:
    """The tokenizer that the adapter was trained with.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    return load_tokenizer(trained.config, trained.adapter if trained.own_tokenizer else None)


def load_trained(trained: Trained) -> TrainedModel:
    """The base with the adapter on it, in the precision of the run, and its tokenizer.

    Raises:
        ValueError: the base cannot be loaded, is another than the run's, or the adapter does not fit it.
    """
    config = trained.config
    precision = choose_precision(config.train.mixed_precision)
    accelerator = create_accelerator(config, precision.actual)
    tokenizer = load_trained_tokenizer(trained)
    base = load_base(config.model, precision.actual, accelerator.device)
    _check_base(trained, base)
    add_rows_of(trained.adapter, base)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # checked below
            model = peft.PeftModel.from_pretrained(base, str(trained.adapter), is_trainable=True)
    except Exception as error:  # damaged files and other models raise errors of many kinds
        raise ValueError(
            f"the adapter in {trained.adapter} could not be loaded onto {config.model.name_or_path}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    _check_all_loaded(trained, model)
    if trained_modules.wrappers(model):  # PEFT has rounded them to the precision of the base
        trained_modules.hold_in_fp32(model)
        set_peft_model_state_dict(model, load_file(trained.adapter / ADAPTER_WEIGHTS))
    check_vocabulary(model, tokenizer)
    token_rows.enable(model)
    return TrainedModel(accelerator, precision, tokenizer, model)


def add_rows_of(adapter: Path, base: Any) -> None:
    """Give the base rows for the tokens that were added when the adapter was trained.

    Raises:
        ValueError: the adapter's configuration cannot be read.
    """
    add_rows(base, token_ids_of(read_raw_settings(adapter).get("trainable_token_indices")))


def _check_base(trained: Trained, base: Any) -> None:
    """An adapter on another base of the same shape would produce nonsense."""
    found = base_fingerprint(trained.config.model, base)
    if (trained.adapter / MANIFEST).exists():  # a checkpoint, found whole
        expected = json.loads((trained.adapter / STATE).read_text(encoding="utf-8"))["base"]
    elif trained.run_dir is not None:
        expected = read_environment(trained.run_dir)["base"]
    elif (trained.adapter / BASE).is_file():  # copied out of its run
        expected = (trained.adapter / BASE).read_text(encoding="utf-8").strip()
        if ("@" in expected) != ("@" in found):
            return  # a model of the Hub, and a folder: it may be the same one
    else:
        return
    if expected != found:
        raise ValueError(
            f"{trained.adapter} was trained on another base model than {trained.config.model.name_or_path} "
            "is now"
        )


def _check_all_loaded(trained: Trained, model: peft.PeftModel) -> None:
    """PEFT accepts an adapter for more or fewer layers than the base has."""
    with safe_open(trained.adapter / ADAPTER_WEIGHTS, "pt") as file:
        names = set(file.keys())
    expected = adapter_weights(model).keys()
    if differing := (_layers(names) ^ _layers(expected)) or expected - names:
        raise ValueError(
            f"the adapter in {trained.adapter} is for other layers than those of "
            f"{trained.config.model.name_or_path}, such as {min(differing).removesuffix('.lora_A.weight')}"
        )


def _layers(names: Iterable[str]) -> set[str]:
    return {name for name in names if ".lora_A." in name}
