"""Stopped runs, and what one compares when they have been resumed."""

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import EVAL_METRICS, TRAIN_METRICS, read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)

from finetune.run.checkpoint import (
    CARD,
    TRAINING_CONFIG,
)

NOT_THE_TRAINING = ("useful_tokens_per_second", "mfu", "peak_memory_gib")


class StoppedError(Exception):
    """What stands for a power cut in these tests."""


def wait_for_the_next_second(run_dir: Path) -> None:
    """TensorBoard reads event files in the order of their names, which hold the second of their making."""
    names = [path.name for path in (run_dir / "tensorboard").iterdir()]
    while int(time.time()) <= max(int(name.split(".")[3]) for name in names):
        time.sleep(0.05)


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from one run to the next."""
    return [
        {key: value for key, value in entry.items() if key not in NOT_THE_TRAINING}
        for entry in read_metrics(run_dir)
    ]


def digests(folder: Path) -> dict[str, str]:
    """A hash of every file in a folder, by its place in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in (TRAINING_CONFIG, CARD)  # they name the rows' file, which each test has anew
    }


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_ended_alike(run_dir: Path, other_dir: Path) -> None:
    """Bit for bit: the adapter, the checkpoints with the optimizer's state, and the metrics."""
    assert training_lines(run_dir) == training_lines(other_dir)
    assert digests(run_dir / "adapter") == digests(other_dir / "adapter")
    assert digests(run_dir / "checkpoints") == digests(other_dir / "checkpoints")
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in other_dir.iterdir()}


def assert_tensorboard_matches(run_dir: Path) -> None:
    """TensorBoard shows each line of metrics.jsonl once, and the answers before and after once."""
    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()
    lines = read_metrics(run_dir)
    evaluated = EVAL_METRICS | {key for entry in lines for key in entry if key == "loss_error"}
    metrics = {"eval": evaluated, "train": TRAIN_METRICS}
    tags = {f"{split}/{key}" for split, keys in metrics.items() for key in keys}
    tags |= {f"{entry['split']}/{key}" for entry in lines for key in entry if "/" in key}  # of a source
    assert set(events.Tags()["scalars"]) == tags
    for tag in events.Tags()["scalars"]:
        split, _, key = tag.partition("/")
        written = [(line["step"], line[key]) for line in lines if line["split"] == split and key in line]
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in shown] == [step for step, _ in written], tag
        values = [value for _, value in written]
        assert [value for _, value in shown] == pytest.approx(values, rel=1e-6), tag
    # TensorBoard's own reader: the other one does not purge texts.
    texts = PluginEventAccumulator(str(run_dir / "tensorboard"), {"tensors": 0}).Reload()
    for number in (1, 2, 3):
        answers = texts.Tensors(f"answers/{number}/text_summary")
        assert [event.step for event in answers] == [0, lines[-1]["step"]]


def assert_refused(run_train, capfd, *words: str, **settings: Any) -> None:
    """The run ends with exit code 2 and one line on stderr that has these words; no file changes."""
    folder = Path(settings["output_dir"])
    before = digests(folder)
    capfd.readouterr()
    run_train(expect=2, **settings)
    message = capfd.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert digests(folder) == before


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "altered":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "missing":
        path.unlink()
    else:
        path.write_text(how)
