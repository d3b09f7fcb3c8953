"""The command line and YAML files, parsed into a checked configuration."""

import difflib
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings

from finetune.config import Config, SourceConfig, described, flatten
from finetune.config_checks import check_config
from finetune.config_files import shipped

DEFAULT_CONFIG_FILE = shipped("configs/quickstart.yaml")

# The sections of a preset that speak of its rows, or count the updates which those rows make.
OF_ITS_ROWS = ("data", "eval", "checkpoint", "log")

NO_STREAMING = (
    "streaming is not supported: an update takes its examples by their number, and a stream has none; leave "
    "it out, as rows are read in batches and kept on disk, not in memory"
)


def parse_config(argv: Sequence[str]) -> Config:
    """Parse command-line arguments, without the program's name, into a checked configuration.

    `--config FILE` (YAML) sets the keys it names and later `--section.key value` arguments override it;
    without `--config`, configs/quickstart.yaml is read. A preset (a file in configs/) describes certain rows:
    where another `data.path` replaces its own, its sections in `OF_ITS_ROWS` do not apply.

    Raises:
        ValueError: an unreadable file, an unknown key or a bad value, named in one line.
    """
    return _parse(argv)[0]


def unused_preset_settings(argv: Sequence[str]) -> list[str]:
    """For each preset that is read for other rows than its own, a line that names what does not apply.

    Raises:
        ValueError: as `parse_config`.
    """
    return _parse(argv)[1]


def _parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    arguments = [
        "--strict=true" if argument == "--strict" and following.startswith("--") else argument
        for argument, following in zip_longest(argv, argv[1:], fillvalue="--")
    ]
    files = [value for flag, value in pairwise(arguments) if flag == "--config"]
    files += [
        argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")
    ]
    if not files and not {"-h", "--help"} & set(arguments):
        files = [str(DEFAULT_CONFIG_FILE)]
        arguments = ["--config", *files, *arguments]
    arguments = _with_accumulation(arguments)
    parser = _parser()
    for file in files:
        _check_file(parser, file)
    config, remarks = _instantiate(parser, arguments), []
    for file in filter(_is_preset, dict.fromkeys(files)):
        preset = _load_yaml(Path(file).read_text(encoding="utf-8"))
        its_path = preset.get("data", {}).get("path", config.data.path)
        if its_path != config.data.path:
            rest = {section: keys for section, keys in preset.items() if section not in OF_ITS_ROWS}
            arguments = _replace_file(arguments, file, f"--config={yaml.dump(rest, Dumper=_YamlDumper)}")
            before, config = flatten(asdict(config)), _instantiate(parser, arguments)
            unused = [key for key, value in flatten(asdict(config)).items() if value != before[key]]
            if unused:
                place = f"configs/{Path(file).name}, which is for {described(its_path)}"
                remarks.append(f"not used for {described(config.data.path)}: {', '.join(unused)} of {place}")
    defaults: dict[str, Any] = {}  # of keys that are not given, where others are
    if config.data.eval_path is not None or config.eval.sets:
        defaults["data.eval_fraction"] = 0.0  # then no rows are split off
    if config.train.global_batch_size is not None:
        defaults["train.gradient_accumulation_steps"] = None  # then it follows
    if defaults:
        parser.set_defaults(defaults)
        config = _instantiate(parser, arguments)
    check_config(config)
    return config, remarks


def _with_accumulation(arguments: Sequence[str]) -> list[str]:
    """The arguments, in which train.global_batch_size has accumulation follow from it: what a file before it
    says was for other updates. Where the command line gives the accumulation too, they are left as they are.
    """
    size, accumulation = "--train.global_batch_size", "--train.gradient_accumulation_steps"
    words = [argument.partition("=")[0] for argument in arguments]
    is_null = f"{size}=null" in arguments or (size, "null") in pairwise(arguments)
    if size not in words or is_null or accumulation in words:
        return list(arguments)
    before = words.index(size)
    return [*arguments[:before], f"{accumulation}=null", *arguments[before:]]


def _instantiate(parser: ArgumentParser, arguments: Sequence[str]) -> Config:
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except Exception as error:  # PyYAML below jsonargparse lets out errors of many kinds
        raise ValueError(_one_line(error)) from error
    return Config(**{f.name: parsed[f.name] for f in fields(Config)})


def _is_preset(file: str) -> bool:
    return Path(file).resolve().parent == DEFAULT_CONFIG_FILE.parent.resolve()


def _replace_file(arguments: Sequence[str], file: str, text: str) -> list[str]:
    """The arguments with `text` for `--config FILE` and `--config=FILE`."""
    replaced: list[str] = []
    for argument in arguments:
        if argument == file and replaced and replaced[-1] == "--config":
            replaced[-1] = text
        else:
            replaced.append(text if argument == f"--config={file}" else argument)
    return replaced


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


def with_current_values(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of a run's config.yaml, with the values that are spelled otherwise since."""
    fast = settings.get("fast")
    if isinstance(fast, dict) and fast.get("int8_matmul") == "dequantise":
        return {**settings, "fast": {**fast, "int8_matmul": "dequantize"}}
    return settings


def _load_yaml(text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_YamlLoader)  # a SafeLoader, with two words read otherwise
    except yaml.YAMLError:
        raise
    except Exception as error:  # `2020-99-99`, `!!bool maybe`, brackets a thousand deep: PyYAML lets them out
        raise yaml.YAMLError(f"{type(error).__name__}: {error!s:.200}") from error
    if isinstance(value, dict):
        value = with_current_values(value)
    # An argument of the command line comes here too: `--data.system_prompt "# Rules"` is no comment, and
    # `~` is a text. Only the word says null there.
    is_null = text.strip().lower() in ("", "null")
    return text if value is None and not is_null and "\n" not in text else value


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog="train.py",
        description="Fine-tune a chat model on instructions: LoRA on a quantized base, "
        "by a training loop you can read.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="A YAML file of the keys below. For other rows than its own, the sections data, eval, "
        "checkpoint and log of a file in configs/ do not apply",
    )
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
    for name in ("path", "eval_path"):
        if wrong := _wrong_entry(f"data.{name}", settings.get("data", {}).get(name)):
            raise ValueError(f"config file {file}: {wrong}")
    try:
        parser.parse_string(text)
    except Exception as error:  # as in parse_config
        raise ValueError(f"config file {file}: {_one_line(error)}") from error
    types = _keys(Config)
    for key, value in flatten(settings).items():
        if value is None and type(None) not in get_args(types[key]):
            raise ValueError(f"config file {file}: {key} must have a value, not null")


def _wrong_entry(key: str, value: Any) -> str | None:
    """What is wrong with an entry of a list of sources, where jsonargparse names the whole list."""
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return None
    known = [f.name for f in fields(SourceConfig)]
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            return f"{key} has files and sources in one list: write {{path: {entry}}} for entry {number}"
        if "streaming" in entry:
            return f"{key}, entry {number}: {NO_STREAMING}"
        if unknown := next((name for name in entry if name not in known), None):
            return f"{key}, entry {number}: unknown key {unknown}; there are {', '.join(known)}"
        if entry.get("path") is None:
            return f"{key}, entry {number}: path is missing"
    return None


def _one_line(error: Exception) -> str:
    """What jsonargparse says, in one line that ends with the nearest right key."""
    if not isinstance(error, ArgumentError):
        return f"a value cannot be read ({type(error).__name__}: {error!s:.200})"
    message = re.sub(r"\s+", " ", str(error)).strip()
    message = re.sub(r"<class '(\w+)'>", r"\1", message.replace("typing.", ""))
    message = message.replace("list[finetune.config.SourceConfig]", "a list of {path: ...}")
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
    if unknown.rpartition(".")[2] == "streaming":
        return f"{unknown}: {NO_STREAMING}"
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


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts of plain YAML and JSON values."""
    plain: dict[str, Any] = _load_yaml(config_to_yaml(config))
    return plain


def config_to_yaml(config: Config) -> str:
    values = asdict(config)
    values["optim"]["betas"] = list(values["optim"]["betas"])
    return yaml.dump(values, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True)
