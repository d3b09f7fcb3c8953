"""A sweep: a run for each combination of values of a few keys, one after another, each in its own process."""

import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from finetune.config import Config, flatten
from finetune.config_parsing import config_to_dict
from finetune.model.given_adapter import parse_training_config
from finetune.run.folder import RunStatus, read_environment, read_evaluations, run_status
from finetune.runtime import system
from finetune.runtime.console import say
from finetune.runtime.files import write_atomically
from finetune.runtime.processes import SWEEP

TRAIN = Path(__file__).parents[2] / "train.py"
RECORD = "sweep.json"
STOPPED = (130, 143)  # train.py's exit codes after Ctrl-C and SIGTERM


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    values: dict[str, Any]
    """The swept keys, in the configuration's order"""
    arguments: list[str]
    """What train.py is started with"""
    config: Config

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir)


def parse_values(given: Sequence[str]) -> dict[str, list[str]]:
    """{"lora.r": ["4", "8"]} of ["lora.r=4,8"]: each value as train.py takes it on its command line.

    Raises:
        ValueError: no key, no value, a key that stands twice, or no items of a YAML list.
    """
    values: dict[str, list[str]] = {}
    for argument in given:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not (key and equals):
            raise ValueError(f"--over {argument} has no values: write --over KEY=VALUE,VALUE")
        if key in values:
            raise ValueError(f"--over {key} stands twice: give all its values at once")
        if key == "output_dir":
            raise ValueError("--over output_dir: the sweep names the folder of each run itself")
        listed = f"[{text}]"
        try:
            node = yaml.compose(listed, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):  # of a thousand brackets
            node = None
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise ValueError(f"--over {argument}: {text!r} is no list of values such as 1,2 or a,'b, c'")
        values[key] = [
            item.value
            if isinstance(item, yaml.ScalarNode)
            else listed[item.start_mark.index : item.end_mark.index]
            for item in node.value
        ]
    return values


def choose_combinations(
    values: Mapping[str, Sequence[str]], count: int | None, seed: int
) -> list[dict[str, str]]:
    """All combinations of the values, the last key varying fastest, or `count` distinct ones in random order.

    Raises:
        ValueError: there are fewer than `count`.
    """
    total = math.prod(len(texts) for texts in values.values())
    if count is None:
        return [dict(zip(values, texts, strict=True)) for texts in itertools.product(*values.values())]
    if not 1 <= count <= total:
        raise ValueError(f"--random must be between 1 and {total}, the number of combinations, not {count}")
    combinations = []
    for number in random.Random(seed).sample(range(total), count):
        combination = {}
        for key, texts in values.items():
            number, place = divmod(number, len(texts))
            combination[key] = texts[place]
        combinations.append(combination)
    return combinations


def make_trial(combination: Mapping[str, str], settings: Sequence[str], folder: Path) -> Trial:
    """The run of one combination, in a folder of `folder` that its values name.

    Raises:
        ValueError: as `parse_training_config`, or a key is a section.
    """
    arguments = [*settings, *(f"--{key}={text}" for key, text in combination.items())]
    config = parse_training_config(arguments)
    flat = flatten(config_to_dict(config))
    if sections := [key for key in combination if key not in flat]:
        raise ValueError(f"--over {sections[0]}: it is no key of the configuration that holds one value")
    values = {key: value for key, value in flat.items() if key in combination}
    run_dir = str(folder / folder_name(values))
    return Trial(values, [*arguments, f"--output_dir={run_dir}"], replace(config, output_dir=run_dir))


def folder_name(values: Mapping[str, Any]) -> str:
    """`learning_rate=0.0001_r=4`: letters, digits and `.+=_-`, at most 89 of them. Where others had to go, a
    hash of what they were tells such names apart."""
    name = "_".join(f"{key}={as_text(value)}" for key, value in short_keys(values).items())
    safe = re.sub(r"[^A-Za-z0-9.+=_-]+", "-", name)[:80]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def short_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without their sections, where that leaves them apart."""
    short = {key.rpartition(".")[2]: value for key, value in values.items()}
    return short if len(short) == len(values) else dict(values)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_trials(trials: Sequence[Trial], folder: Path) -> None:
    """Raise ValueError if two runs are the same, one can be neither started nor resumed, or the folder holds
    a sweep over other keys or no sweep."""
    seen: set[Path] = set()
    for trial in trials:
        if trial.run_dir in seen:
            raise ValueError(f"{trial.run_dir.name} stands twice: two of the values are the same")
        seen.add(trial.run_dir)
    keys = list(trials[0].values)
    if (folder / RECORD).exists():
        before = _read_record(folder)
        if before != keys:
            raise ValueError(
                f"{folder} holds a sweep over {', '.join(before)}, and this one is over {', '.join(keys)}; "
                "choose another --output_dir"
            )
    elif folder.is_dir() and any(path.name != f".{RECORD}.partial" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no sweep; choose another --output_dir")
    for trial in trials:
        run_status(trial.config)


def _read_record(folder: Path) -> list[str]:
    """The keys of the sweep in `folder`."""
    try:
        keys = json.loads((folder / RECORD).read_text(encoding="utf-8"))["keys"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RECORD} is no record of a sweep; choose another --output_dir") from error
    return list(keys)


def run_trials(trials: Sequence[Trial], folder: Path) -> tuple[int, dict[str, str]]:
    """Train the unfinished runs, each in its own process. Returns the sweep's exit code, and by folder name
    how each run ended.

    The sweep continues after a run that failed, and ends with one that could not start: the others would
    most likely fail to start too.
    """
    outcomes: dict[str, str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(trials, folder, outcomes)
    code = 0
    with _signals_passed_on() as (children, received):
        for number, trial in enumerate(trials, 1):
            name = trial.run_dir.name
            if run_status(trial.config) is RunStatus.FINISHED:
                outcomes[name] = "finished"
                continue
            if received or code > 1:
                continue
            say(f"Run {number} of {len(trials)}: {name}")
            environment = {**os.environ, SWEEP: str(os.getpid())}
            process = system.start_apart([sys.executable, str(TRAIN), *trial.arguments], environment)
            children.append(process)
            if received:  # it came while the process was started
                system.ask_to_stop(process, received[0])
            ended = process.wait()
            if ended == 0:
                outcomes[name] = "finished"
            elif received or ended in STOPPED:
                outcomes[name] = "stopped"
                code = 128 + received[0] if received else ended
            else:
                outcomes[name] = f"failed, exit code {ended}"
                code = 2 if ended == 2 else 1
            _write_record(trials, folder, outcomes)
    _write_record(trials, folder, outcomes)
    if received and len(outcomes) < len(trials):
        code = 128 + received[0]
    return code, outcomes


def _write_record(trials: Sequence[Trial], folder: Path, outcomes: Mapping[str, str]) -> None:
    runs = {
        trial.run_dir.name: {"values": trial.values, "outcome": outcomes.get(trial.run_dir.name, "not begun")}
        for trial in trials
    }
    record = {"keys": list(trials[0].values), "runs": runs}
    write_atomically(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False))


@contextmanager
def _signals_passed_on() -> Iterator[tuple[list[subprocess.Popen[bytes]], list[int]]]:
    """Forward signals that ask this process to stop to the newest child. Yields the list of children, for the
    caller to fill, and the list of received signals.

    Each child is in its own process group, out of the terminal's reach: a Ctrl-C would otherwise reach it
    twice, and the second one stops a run immediately.
    """
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number if number == signal.SIGINT else signal.SIGTERM)
        if children:
            system.ask_to_stop(children[-1], received[-1])

    previous = {
        number: signal.signal(number, pass_on)
        for number in system.signals_named("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    }
    try:
        yield children, received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def evaluation_of_result(run_dir: Path) -> dict[str, Any] | None:
    """The eval line of a finished run's adapter: the last one, unless the best checkpoint was taken."""
    evaluations = read_evaluations(run_dir)
    step = read_environment(run_dir).get("adapter_step")
    of_adapter = [entry for entry in evaluations if entry["step"] == step]
    return next(reversed(of_adapter or evaluations), None)


def eval_rows(run_dir: Path) -> str:
    """What tells the eval examples of one run, token by token, from those of another."""
    return str(read_environment(run_dir)["data"]["fingerprint"]).rpartition("-")[2]
