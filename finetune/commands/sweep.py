"""`python -m finetune sweep --over KEY=VALUE,VALUE`: a run for each value, or combination of values, of a few
keys, one after another."""

import hashlib
import itertools
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from finetune.config import Config, flatten
from finetune.config_parsing import config_to_dict, parse_config
from finetune.run.folder import RunStatus, only_one_at_a_time, read_environment, read_evaluations, run_status
from finetune.runtime.cli import CommandParser, split_arguments
from finetune.runtime.console import console, say
from finetune.runtime.files import write_atomically

TRAIN = Path(__file__).parents[2] / "train.py"
RECORD, PAGE = "sweep.json", "comparison.html"
STOPPED = (130, 143)  # what train.py ends with after a Ctrl-C or SIGTERM


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


def command(argv: Sequence[str]) -> int:
    """0 where all runs are finished, 1 where one of them failed, 2 where one could not start, and 128 + the
    signal that stopped the sweep.

    Raises:
        ValueError: an argument or a combination of values is wrong, or the folder holds something else.
    """
    parser = CommandParser(
        prog="python -m finetune sweep",
        usage="%(prog)s --over KEY=VALUE,VALUE [--over ...] [--config FILE] [--section.key VALUE ...]",
        description=__doc__,
        epilog="Other keys of the configuration, as train.py takes them, hold for all runs. Launched again, "
        "the same command skips the runs that are finished and goes on with the others.",
    )
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=VALUE,VALUE",
        help="a key and its values, as the items of a YAML list: one that holds a comma is quoted, or is "
        "itself a list: 'lora.target_modules=all-linear,[q_proj, v_proj]'. Given again, for another key, "
        "each value meets each",
    )
    parser.add_argument("--random", type=int, metavar="N", help="not all combinations, but N drawn at random")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of that draw (0)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/sweep"), help="folder of all its runs (runs/sweep)"
    )
    arguments, settings = split_arguments(parser, argv)
    values = parse_values(arguments.over)
    combinations = choose_combinations(values, arguments.random, arguments.seed)
    folder: Path = arguments.output_dir
    trials = [make_trial(combination, settings, folder) for combination in combinations]
    check_trials(trials, folder)
    with only_one_at_a_time(replace(trials[0].config, output_dir=str(folder))):
        code, outcomes = run_trials(trials, folder)
    show_trials(trials, outcomes)
    if code in (0, 1):
        write_page(trials, outcomes, folder / PAGE)
    else:
        say("To go on with the sweep:")
        say(f"  python -m finetune sweep {shlex.join(argv)}")
    return code


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
    """All combinations of the values, the last key's changing fastest, or `count` different ones in the order
    that they are drawn.

    Raises:
        ValueError: there are not so many.
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
        ValueError: as `parse_config`, or a key is a section.
    """
    arguments = [*settings, *(f"--{key}={text}" for key, text in combination.items())]
    config = parse_config(arguments)
    flat = flatten(config_to_dict(config))
    if sections := [key for key in combination if key not in flat]:
        raise ValueError(f"--over {sections[0]}: it is no key of the configuration that holds one value")
    values = {key: value for key, value in flat.items() if key in combination}
    run_dir = str(folder / folder_name(values))
    return Trial(values, [*arguments, f"--output_dir={run_dir}"], replace(config, output_dir=run_dir))


def folder_name(values: Mapping[str, Any]) -> str:
    """`learning_rate=0.0001_r=4`: letters, digits and `.+=_-`, at most 89 of them. Where others had to go, a
    hash of what they were tells such names apart."""
    name = "_".join(f"{key}={_as_text(value)}" for key, value in _short_keys(values).items())
    safe = re.sub(r"[^A-Za-z0-9.+=_-]+", "-", name)[:80]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _short_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without their sections, where that leaves them apart."""
    short = {key.rpartition(".")[2]: value for key, value in values.items()}
    return short if len(short) == len(values) else dict(values)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_trials(trials: Sequence[Trial], folder: Path) -> None:
    """Raise ValueError where two runs are the same, one cannot be begun or gone on with, or the folder holds
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
    """Train those that are not finished, each in a process of its own; return the sweep's exit code, and how
    each run ended, by its folder's name.

    What one run fails of the others may not; what it could not start of, most likely all.
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
            process = subprocess.Popen([sys.executable, str(TRAIN), *trial.arguments], process_group=0)
            children.append(process)
            if received:  # it came while the process was started
                process.send_signal(received[0])
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
    """Send what asks this process to stop to the newest of the children, in the list that is yielded; the
    other list holds what came.

    They are out of the terminal's reach, in a group of their own: of a Ctrl-C they would else get two, and
    the second one stops a run at once.
    """
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number if number != signal.SIGHUP else signal.SIGTERM)
        if children:
            children[-1].send_signal(received[-1])

    previous = {
        number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield children, received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def show_trials(trials: Sequence[Trial], outcomes: Mapping[str, str]) -> None:
    """Print the eval loss of each run's adapter, and which is the lowest."""
    keys = _short_keys(trials[0].values)
    table = Table(*keys, "eval loss", "after update", "run", title="Sweep", title_justify="left")
    losses: dict[Path, float] = {}
    for trial in trials:
        outcome = outcomes.get(trial.run_dir.name, "not begun")
        entry = _evaluation_of_result(trial.run_dir) if outcome == "finished" else None
        if entry is not None:
            losses[trial.run_dir] = entry["loss"]
        cells = ["", ""] if entry is None else [f"{entry['loss']:.4f}", str(entry["step"])]
        values = [Text(_as_text(value)) for value in trial.values.values()]
        table.add_row(*values, *cells, outcome, style="" if outcome == "finished" else "yellow")
    console.print(table)
    if not losses:
        say("No run has an eval loss yet.")
        return
    if len({_eval_rows(run_dir) for run_dir in losses}) > 1:
        say("The runs were not evaluated on the same examples: their losses cannot be compared.")
    best = min(losses, key=lambda run_dir: losses[run_dir])
    say(f"Lowest eval loss: {losses[best]:.4f}, of {best}")


def _evaluation_of_result(run_dir: Path) -> dict[str, Any] | None:
    """The eval line of a finished run's adapter: the last one, unless the best checkpoint was taken."""
    evaluations = read_evaluations(run_dir)
    step = read_environment(run_dir).get("adapter_step")
    of_adapter = [entry for entry in evaluations if entry["step"] == step]
    return next(reversed(of_adapter or evaluations), None)


def _eval_rows(run_dir: Path) -> str:
    """What tells the eval examples of one run, token by token, from those of another."""
    return str(read_environment(run_dir)["data"]["fingerprint"]).rpartition("-")[2]


def write_page(trials: Sequence[Trial], outcomes: Mapping[str, str], page: Path) -> None:
    """Write the page that compares the finished runs, where there are two."""
    finished = [trial.run_dir for trial in trials if outcomes.get(trial.run_dir.name) == "finished"]
    if len(finished) > 1:
        import_module("finetune.commands.compare").write_comparison(finished, page)
        say(f"comparison   {page}")
