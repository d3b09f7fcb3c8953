"""The tokenizer, the frozen base (bf16, int8 or nf4) and the LoRA adapter on it."""

import hashlib
import json
import re
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from accelerate.utils import set_seed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.utils.hub import cached_file

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.preparing.examples import Examples
from finetune.data.templates.chat_template import set_stop_ids
from finetune.data.templates.named_templates import end_of_turn, use_template
from finetune.model import first_weights
from finetune.model.added_tokens import add_rows, token_ids_of, trainable_token_indices
from finetune.model.given_adapter import check_weights, find_adapter, read_settings
from finetune.model.layers_on_disk import describe_reading, find_layers, needs_no_weights, without_report
from finetune.model.quiet import quiet_libraries
from finetune.model.safetensors_files import weight_reader
from finetune.model.starter import HUB_NAME, starter_model_dir
from finetune.model.target_modules import check_modules_to_save, describe_modules_to_save, targets_of
from finetune.ops import quantized
from finetune.ops.plain_weights import use_plain_weights
from finetune.ops.trained_modules import hold_in_fp32, plain_layer
from finetune.runtime.accelerator import DTYPES
from finetune.runtime.choice import Choice


def load_tokenizer(config: Config, folder: Path | None = None) -> Any:
    """The model's tokenizer with the chat template of `data.chat_template`, and a padding token (the model's
    EOS token if it has none of its own). With `folder`, the tokenizer that was saved there, as it is.

    Its `stop_ids` are its EOS token, those of the model's generation config, and the special token that ends
    an assistant's turn in the chat template.

    Raises:
        ValueError: as `load_base` and `use_template`.
    """
    if folder is None:
        tokenizer = _from_pretrained(AutoTokenizer, config.model, *_locate(config.model))
    else:
        tokenizer = _saved_tokenizer(folder)
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {config.model.name_or_path} is not a fast one: it cannot locate its tokens in "
            "a text"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = [tokenizer.eos_token_id, *generation_ends(config.model)]
    if config.data.chat_template is not None and folder is None:
        use_template(tokenizer, config.data.chat_template)
    set_stop_ids(tokenizer, [end for end in (*ends, end_of_turn(tokenizer)) if end is not None])
    return tokenizer


def _saved_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a broken folder can raise any error of several libraries
        raise ValueError(f"the tokenizer in {folder} could not be loaded: {_in_one_line(error)}") from error


def generation_ends(config: ModelConfig) -> list[int]:
    """The tokens at which the model's generation config stops, or its configuration where it has none.

    Raises:
        ValueError: as `load_base`, or the file cannot be read.
    """
    source, arguments = _locate(config)
    if "gguf_file" in arguments:  # it names one, which the tokenizer has as its EOS token
        return []
    for name in ("generation_config.json", "config.json"):
        file = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,  # offline, of a file that the model does not have
            **arguments,
        )
        if file is None:
            continue
        try:
            ends = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"model.name_or_path {config.name_or_path}: its {name} cannot be read: {_in_one_line(error)}"
            ) from error
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []


def load_architecture(config: ModelConfig) -> Any:
    """The model's configuration in transformers, loaded without its weights.

    Raises:
        ValueError: as `load_base`.
    """
    source, arguments = _locate(config)
    return _from_pretrained(AutoConfig, config, source, arguments)


def load_model(
    config: Config,
    precision: str,
    device: torch.device,
    added_token_ids: Sequence[int] = (),
    source: Path | None = None,
    train_set: Examples | None = None,
    plain_weights: bool = False,
) -> peft.PeftModel:
    """The base with a fresh adapter: only its fp32 weights are trainable, initialized from the seed, and with
    EVA from `train_set`. Those of LoftQ need the base's files.

    The rows of `added_token_ids` in the embedding and the head are trained with it. Where the base has none,
    it gets them: at first each is the mean of all others.

    It has the layers that the adapter of `source`, the checkpoint that the run resumes from, has where
    `model.adapter` is set, and those of `model.adapter` where there is no checkpoint yet. Their weights are
    loaded later: into views of one flat tensor.

    With `plain_weights`, quantized weights become plain parameters, as a base needs that is to be sharded.

    Raises:
        ValueError: the model cannot be loaded, it does not have the target modules, the weights of
            `model.adapter` are not those of its layers, or as `start_from_data` and `start_from_lost`.
    """
    given = None if config.model.adapter is None else source or find_adapter(config.model.adapter)
    settings = None if given is None else read_settings(given)
    can_wait = plain_weights and needs_no_weights(config.lora, settings)
    base = load_base(config.model, precision, device, first_layer_alone=can_wait)
    given_rows = [] if settings is None else token_ids_of(settings.trainable_token_indices)
    if given_rows and (missing := sorted(set(added_token_ids) - set(given_rows))):
        raise ValueError(
            f"model.adapter {given} trains the rows of the tokens {given_rows}, and data.chat_template adds "
            f"others: {missing}"
        )
    add_rows(base, [*given_rows, *added_token_ids])
    if config.train.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    set_seed(config.train.seed)
    if given is None or settings is None:
        model = add_adapter(base, config.lora, added_token_ids, is_new=source is None)
        if config.lora.init_lora_weights == "eva" and source is None and train_set is not None:
            first_weights.start_from_data(model, train_set.dataset)
        if config.lora.init_lora_weights == "loftq" and source is None:
            first_weights.start_from_lost(model, weight_reader(*_locate(config.model)))
    else:
        if added_token_ids and not given_rows:
            settings.trainable_token_indices = trainable_token_indices(base, added_token_ids)
        settings.lora_dropout = config.lora.lora_dropout
        trains_rows = settings.trainable_token_indices is not None
        check_modules_to_save(base, settings.modules_to_save or (), trains_rows, f"model.adapter {given}")
        model = _adapted(base, settings, f"model.adapter {given}")
        if source is None:
            check_weights(given, model)
    if plain_weights:  # after PEFT, which knows bitsandbytes' layers
        use_plain_weights(model)
    return model


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has a token without an embedding in the model: the run would
    fail midway, and on a GPU without naming the cause."""
    tokens, embeddings = len(tokenizer), len(plain_layer(model.get_input_embeddings()).weight)
    if tokens > embeddings:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model has embeddings for {embeddings}: use the "
            "tokenizer that belongs to the model"
        )


def load_base(
    config: ModelConfig, precision: str, device: torch.device, first_layer_alone: bool = False
) -> Any:
    """The causal language model, quantized as configured, frozen, on the device.

    `precision` is no, bf16 or fp16: the data type of everything that is not quantized, including embeddings.
    With `first_layer_alone`, all decoder layers have the weights of the first one, where the model's files
    allow it: its `layers_on_disk` then reads their own.

    Raises:
        ValueError: no such folder, file or Hub model, no network, or not a causal language model.
    """
    quiet_libraries()
    dtype = DTYPES[precision]
    source, arguments = _locate(config)
    quantization = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }[choose_quantization(config.quantization, device).actual]
    if "gguf_file" in arguments:
        if quantization is not None:
            raise ValueError(
                f"model.name_or_path {config.name_or_path} is a GGUF file, which loads dequantized: set "
                "model.quantization to none, or save it as a model folder first"
            )
        quantization = GgufConfig(dequantize=True)
    layers = None
    if first_layer_alone and not config.trust_remote_code:
        layers = find_layers(load_architecture(config), dtype, source, arguments)
    arguments |= {"dtype": dtype, "quantization_config": quantization, "device_map": {"": device}}
    arguments |= {"output_loading_info": True}
    if layers is None:
        base, loading = _from_pretrained(AutoModelForCausalLM, config, source, arguments)
    else:
        with without_report():
            arguments["config"] = layers.first_alone
            base, loading = _from_pretrained(AutoModelForCausalLM, config, source, arguments)
        layers.complete(base)
    if {module.is_causal for module in base.modules() if hasattr(module, "is_causal")} == {False}:
        raise ValueError(
            f"model.name_or_path {config.name_or_path} is no causal language model: tokens see later tokens"
        )
    if loading["missing_keys"]:  # transformers would initialize them randomly and continue
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"model.name_or_path {config.name_or_path} lacks {len(missing)} weights, such as {missing[0]}"
        )
    if config.name_or_path == "starter":
        base.name_or_path = (
            HUB_NAME  # PEFT writes it into the adapter, where a folder of this user's cache is useless
        )
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On some CPUs, evaluation would pack its weights, and it would have no gradient afterwards.
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.init_8bit_state = types.MethodType(_init_8bit_state, module)
    return base.requires_grad_(False)


def choose_quantization(requested: str, device: torch.device) -> Choice:
    """How the base is loaded on this device."""
    name = "quantization"
    if device.type == "mps" and requested != "none":
        return Choice(name, requested, "none", "bitsandbytes' layers have not been tried on Apple's GPUs")
    return Choice(name, requested, requested)


def _init_8bit_state(layer: Any) -> None:
    """bitsandbytes' own method, but it keeps the scales. PEFT's DoRA moves the weight to the device it is on.
    On a CPU, the weight then has its codes again, but not its scales."""
    if layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB
    type(layer).init_8bit_state(layer)


def add_adapter(
    base: Any, config: LoraConfig, added_token_ids: Sequence[int] = (), is_new: bool = True
) -> peft.PeftModel:
    """The base with a new adapter, which trains the rows of `added_token_ids` too.

    Unless it `is_new`, its weights are loaded later, and are not made from those of the base.

    Raises:
        ValueError: the base does not have the target modules, or as `targets_of`, `check_modules_to_save`
            and `start_from_base`.
    """
    check_modules_to_save(base, config.modules_to_save or (), bool(added_token_ids))
    rank, alpha = first_weights.rank_and_alpha(config)
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets_of(base, config),
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        modules_to_save=config.modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        trainable_token_indices=trainable_token_indices(base, added_token_ids) if added_token_ids else None,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    model = _adapted(base, settings, "lora.target_modules")
    if isinstance(config.target_modules, list):
        found = {name.rpartition(".")[2] for name in model.targeted_module_names}
        missing = [name for name in config.target_modules if name.rpartition(".")[2] not in found]
        if missing:  # PEFT accepts the list if one of them is found
            raise ValueError(f"lora.target_modules: the model has no {', '.join(missing)}")
    if config.init_lora_weights in first_weights.FROM_BASE:
        if is_new:
            first_weights.start_from_base(model, config.init_lora_weights)
        first_weights.hold_second_half(model)
    return model


def _adapted(base: Any, settings: peft.LoraConfig, named: str) -> peft.PeftModel:
    """The base with new LoRA layers; `named` is what a user wrote that would be at fault."""
    try:
        model = peft.get_peft_model(base, settings)
    except ValueError as error:
        raise ValueError(f"{named}: {_in_one_line(error)}") from error
    hold_in_fp32(model)
    return model


def base_fingerprint(config: ModelConfig, model: Any) -> str:
    """Identify the base, on any device: the commit of a Hub model, or a digest of a folder's weight files
    (their sizes, and a MiB at the start, the middle and the end of each)."""
    source, arguments = _locate(config)
    if not Path(source).is_dir():
        return f"{source}@{getattr(model.config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    pattern = arguments.get("gguf_file", "*.safetensors")
    for path in sorted(Path(source).glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - 2**20)):
                file.seek(offset)
                digest.update(file.read(2**20))
    return digest.hexdigest()


def describe_model(config: Config, model: Any) -> list[Choice]:
    """The quantization of the base; that a sharded one was read whole, if so; and where they were chosen the
    layers that are trained whole and how the adapter begins."""
    choices = [describe_base(config.model, model), *describe_reading(model)]
    choices += describe_modules_to_save(config, model)
    return [*choices, *first_weights.describe_first_weights(config.lora)]


def describe_base(config: ModelConfig, model: Any) -> Choice:
    """The quantization of the base, as found in its layers."""
    requested = config.quantization
    counts = {
        name: sum(isinstance(module, kinds) for module in model.modules())
        for name, kinds in (("int8", quantized.INT8), ("nf4", quantized.NF4))
    }
    actual = next((name for name, count in counts.items() if count > 0), "none")
    chosen = choose_quantization(requested, next(model.parameters()).device)
    reason = "" if actual == requested else chosen.reason or f"no linear layer became {requested}"
    return Choice("quantization", requested, actual, reason)


def hub_name(config: ModelConfig) -> str | None:
    """The name of the base on the Hugging Face Hub; None for a folder or a file."""
    if config.name_or_path == "starter":
        return HUB_NAME
    try:
        source, _ = _locate(config)
    except ValueError:  # a folder that no longer exists
        return None
    return None if Path(source).is_dir() else source


def _locate(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The name or path that transformers loads, and the arguments to load it with."""
    name = config.name_or_path
    if name == "starter":
        return str(starter_model_dir()), {}
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # no such user, or one without a home
        raise ValueError(f"model.name_or_path {name}: {error}") from error
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model.name_or_path {name} does not exist")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise ValueError(f"model.name_or_path {name} holds an adapter; name the model it was trained on")
        return str(path), {}
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"model.name_or_path {name!r} is neither an existing folder nor a Hub model name")
    return name, {"revision": config.revision} if config.revision else {}


def _from_pretrained(loader: Any, config: ModelConfig, source: str, arguments: dict[str, Any]) -> Any:
    try:
        return loader.from_pretrained(source, trust_remote_code=config.trust_remote_code, **arguments)
    except Exception as error:  # a broken folder can raise any error of several libraries
        raise ValueError(
            f"model.name_or_path {config.name_or_path} could not be loaded: {_in_one_line(error)}"
        ) from error


def _in_one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__
