"""Stopped runs go on as if they had never stopped; finished, foreign and damaged ones are told apart."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read_metrics, tiny_model
from kills import (
    StoppedError,
    assert_ended_alike,
    assert_refused,
    assert_tensorboard_matches,
    checkpoint_names,
    damage,
    digests,
    training_lines,
    wait_for_the_next_second,
)
from safetensors.torch import load_file
from tiny import with_adapter
from torch import Tensor
from transformers import AutoTokenizer

import finetune.run.checkpoint as checkpoint_module
import train
from finetune.config import CheckpointConfig, LoraConfig, OptimConfig
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.given_adapter import adapter_weights
from finetune.model.load import add_adapter
from finetune.run.checkpoint import (
    Trained,
    TrainState,
    fault_of,
    load_checkpoint,
    save_checkpoint,
)
from finetune.run.tracker import Tracker
from finetune.training.loss_scale import LossScale
from finetune.training.metrics import Numbers
from finetune.training.optim import create_optimizer

# Twelve updates, with everything that a run carries along: dropout noise, 8-bit optimizer state (matrices of
# 64 x 64; bitsandbytes keeps smaller ones in 32 bits), and log lines over three updates where a
# checkpoint comes every two, so that it is written in the middle of a line's window.
WHOLE = {
    "model__quantization": "int8",
    "lora__r": 64,
    "lora__lora_dropout": 0.1,
    "train__mixed_precision": "bf16",
    "train__num_epochs": 4,
    "train__micro_batch_size": 2,
    "train__gradient_accumulation_steps": 3,
    "optim__name": "paged_adamw_8bit",
    "optim__learning_rate": 1e-2,
    "optim__warmup_ratio": 0.1,
    "log__every_steps": 3,
    "checkpoint__every_steps": 2,
}
SHORT = {"train__max_steps": 2, "checkpoint__every_steps": 1}
UNINTERRUPTED: list[Path] = []


@pytest.fixture
def uninterrupted(run_train, tmp_path) -> Path:
    """The folder of a run of WHOLE that nothing stopped; made once, and only read."""
    if not UNINTERRUPTED:
        UNINTERRUPTED.append(run_train(output_dir=tmp_path / "uninterrupted", **WHOLE))
    return UNINTERRUPTED[0]


@pytest.fixture
def arguments(run_train, monkeypatch) -> Callable[..., list[str]]:
    """The command-line arguments that run_train would start train.py with."""

    def collect(**settings: Any) -> list[str]:
        started: list[list[str]] = []
        with monkeypatch.context() as patch:
            patch.setattr(train, "main", lambda argv: started.append(argv) or 0)
            run_train(**settings)
        return started[0]

    return collect


@pytest.fixture
def run_until(run_train) -> Callable[..., Path]:
    """run_train, stopped at a moment of a step."""

    def run(moment: str, step: int, **settings: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*stopping(moment, step))
            with pytest.raises(StoppedError):
                run_train(**settings)
        return Path(settings["output_dir"])

    return run


def stopping(moment: str, step: int) -> tuple[str, Callable[..., Any]]:
    """A function of the program, and what stops it at a moment of a step."""
    advance, save = Tracker.advance, checkpoint_module.save_checkpoint

    def stopping_advance(self: Tracker, at: int) -> None:
        if at == step:
            raise StoppedError
        advance(self, at)

    def stopping_save(run_dir: Path, state: TrainState, *rest: Any) -> Path:
        if state.step == step:
            raise StoppedError
        return save(run_dir, state, *rest)

    def stopping_rename(source: Any, target: Any) -> None:
        if Path(target).name == f"step_{step:06d}":
            raise StoppedError
        os.rename(source, target)

    def stopping_result(*_: Any) -> None:
        raise StoppedError

    return {
        "in an update": ("finetune.run.tracker.Tracker.advance", stopping_advance),
        "before a checkpoint": ("finetune.run.checkpoint.save_checkpoint", stopping_save),
        "while writing a checkpoint": ("finetune.runtime.files.os.replace", stopping_rename),
        "before the result": ("finetune.run.checkpoint.save_result", stopping_result),
    }[moment]


def leaves_of(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= (
            leaves_of(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return leaves


# A stopped run, launched again


@pytest.mark.parametrize(
    ("moment", "step", "goes_on_after"),
    [
        ("in an update", 9, 8),
        ("before a checkpoint", 6, 4),  # the lines of update 6 are written, its checkpoint is not
        ("while writing a checkpoint", 8, 6),
        ("before the result", 12, 12),
        ("in an update", 2, None),  # before the first checkpoint
    ],
)
def test_a_stopped_run_launched_again_ends_as_if_never_stopped(
    run_train, run_until, uninterrupted, tmp_path, capfd, moment, step, goes_on_after
):
    run_dir = run_until(moment, step, output_dir=tmp_path / "run", **WHOLE)
    assert not (run_dir / "adapter").exists()
    wait_for_the_next_second(run_dir)
    run_train(output_dir=run_dir, **WHOLE)
    assert_ended_alike(run_dir, uninterrupted)
    assert_tensorboard_matches(run_dir)
    said = f"step_{goes_on_after:06d}, after update {goes_on_after}." if goes_on_after else "Going on"
    assert (said in capfd.readouterr().out) == (goes_on_after is not None)


def test_a_killed_process_leaves_what_a_new_one_goes_on_from(run_train, arguments, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    kill_itself = (
        "import os, signal, sys, train; from finetune.run.tracker import Tracker; advance = Tracker.advance\n"
        "def killing_advance(self, step):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if step == 10 else advance(self, step)\n"
        "Tracker.advance = killing_advance; train.main(sys.argv[1:])"
    )
    process = subprocess.run(
        [sys.executable, "-c", kill_itself, *arguments(output_dir=run_dir, **WHOLE)],
        cwd=ROOT,
        env={
            **os.environ,
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert checkpoint_names(run_dir) == ["step_000006", "step_000008"]
    assert [entry["step"] for entry in read_metrics(run_dir)][-1] == 9
    wait_for_the_next_second(run_dir)
    run_train(output_dir=run_dir, **WHOLE)
    assert_ended_alike(run_dir, uninterrupted)
    assert_tensorboard_matches(run_dir)


def test_a_run_stopped_twice_goes_on_twice(run_train, run_until, uninterrupted, tmp_path):
    run_dir = run_until("in an update", 5, output_dir=tmp_path / "run", **WHOLE)
    wait_for_the_next_second(run_dir)
    run_until("before a checkpoint", 10, output_dir=run_dir, **WHOLE)
    wait_for_the_next_second(run_dir)
    run_train(output_dir=run_dir, **WHOLE)
    assert_ended_alike(run_dir, uninterrupted)
    assert_tensorboard_matches(run_dir)


def test_the_optimizer_of_these_runs_has_8_bit_state(uninterrupted):
    tensors = load_file(uninterrupted / "checkpoints" / "step_000012" / "optimizer.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in tensors.values()}
    state = json.loads((uninterrupted / "checkpoints" / "step_000010" / "state.json").read_text())
    assert state["window_sums"][3] > 0  # the window of the log line was open


def test_a_torn_last_line_of_the_metrics_is_written_anew(run_train, run_until, uninterrupted, tmp_path):
    run_dir = run_until("in an update", 10, output_dir=tmp_path / "run", **WHOLE)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    run_train(output_dir=run_dir, **WHOLE)
    assert_ended_alike(run_dir, uninterrupted)


def test_other_log_and_checkpoint_settings_may_be_taken_on_the_way(
    run_train, run_until, uninterrupted, tmp_path
):
    run_dir = run_until("in an update", 7, output_dir=tmp_path / "run", **WHOLE)
    changed = {**WHOLE, "log__every_steps": 1, "checkpoint__every_steps": 5, "checkpoint__keep": 1}
    run_train(output_dir=run_dir, **changed, log__progress=False)
    assert digests(run_dir / "adapter") == digests(uninterrupted / "adapter")
    assert checkpoint_names(run_dir) == ["step_000012"]
    steps = [entry["step"] for entry in read_metrics(run_dir) if entry["split"] == "train"]
    assert steps == [3, 6, 7, 8, 9, 10, 11, 12]


def test_the_layout_of_an_update_may_change_on_the_way_but_not_its_size(
    run_train, run_until, tmp_path, capfd
):
    settings = {
        "lora__lora_dropout": 0.0,
        "optim__name": "adamw",
        "train__micro_batch_size": 2,
        "train__gradient_accumulation_steps": 3,
    }
    whole = run_train(output_dir=tmp_path / "whole", **settings)
    run_dir = run_until("in an update", 5, output_dir=tmp_path / "run", **settings)
    settings |= {"train__micro_batch_size": 1, "train__packing": False}
    assert_refused(run_train, capfd, "6 examples", "is 3", output_dir=run_dir, **settings)
    run_train(output_dir=run_dir, **{**settings, "train__gradient_accumulation_steps": 6})
    for entry, other in zip(read_metrics(run_dir), read_metrics(whole), strict=True):
        assert entry["step"] == other["step"]
        for key in ("loss", "num_target_tokens"):
            assert entry[key] == pytest.approx(other[key], rel=1e-5)


def test_a_finished_run_launched_again_says_so_and_changes_nothing(run_train, tmp_path, capfd):
    run_dir = run_train(output_dir=tmp_path / "run", **SHORT)
    before = digests(run_dir)
    capfd.readouterr()
    run_train(output_dir=run_dir, **SHORT)
    assert f"The run in {run_dir} is finished" in capfd.readouterr().out
    assert digests(run_dir) == before


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_only_whole_ones(run_train, tmp_path, monkeypatch):
    def stop(_: Path) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("finetune.runtime.system.remove_folder", stop)
        with pytest.raises(StoppedError):
            run_train(**SHORT, checkpoint__keep=1)
    assert checkpoint_names(tmp_path / "run")[1:] == ["step_000002"]
    run_train(**SHORT, checkpoint__keep=1)
    assert len(checkpoint_names(tmp_path / "run")) == 1


def test_a_run_killed_between_its_result_and_its_report_gets_the_report_when_launched_again(
    run_train, tmp_path
):
    run_dir = run_train(output_dir=tmp_path / "run", **SHORT)
    before = digests(run_dir)
    (run_dir / "report.html").unlink()
    run_train(output_dir=run_dir, **SHORT)
    assert digests(run_dir) == before


# Folders in which nothing may be trained


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.seed", 7),
        ("train.max_steps", 3),
        ("lora.r", 4),
        ("optim.learning_rate", 0.5),
        ("data.system_prompt", "Be brief."),
        ("eval.every", 1),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused_by_the_name_of_its_key(
    run_train, tmp_path, capfd, key, value
):
    run_dir = run_train(output_dir=tmp_path / "run", **SHORT)
    settings = {**SHORT, key.replace(".", "__"): value}
    assert_refused(run_train, capfd, f"{key} was", f"is {value}", output_dir=run_dir, **settings)


def test_an_unfinished_run_of_another_configuration_is_refused_too(run_train, run_until, tmp_path, capfd):
    run_dir = run_until("in an update", 2, output_dir=tmp_path / "run", **SHORT)
    assert_refused(run_train, capfd, "train.seed was 42, is 7", output_dir=run_dir, **SHORT, train__seed=7)


def test_resume_never_refuses_a_folder_with_a_run(run_train, run_until, tmp_path, capfd):
    finished = run_train(output_dir=tmp_path / "finished", **SHORT, resume="never")
    assert_refused(run_train, capfd, "resume is never", output_dir=finished, **SHORT, resume="never")
    stopped = run_until("in an update", 2, output_dir=tmp_path / "stopped", **SHORT)
    assert_refused(run_train, capfd, "resume is never", output_dir=stopped, **SHORT, resume="never")


@pytest.mark.parametrize(
    "name", ["holiday.jpg", ".hidden", "metrics.jsonl", "checkpoints/step_000002/state.json"]
)
def test_a_folder_with_other_files_and_no_run_is_refused(run_train, tmp_path, capfd, name):
    folder = tmp_path / "mine"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    assert_refused(run_train, capfd, str(folder), "other files", output_dir=folder, **SHORT)


@pytest.mark.parametrize("text", ["", "- a\n- list\n", "other: tool\n", "not: [yaml", "\x00"])
def test_a_folder_with_a_config_that_is_none_of_ours_is_refused(run_train, tmp_path, capfd, text):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    assert_refused(run_train, capfd, str(folder), output_dir=folder, **SHORT)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder_is_refused(run_train, tmp_path, capfd, name):
    (tmp_path / "file").write_text("mine")
    assert_refused(run_train, capfd, str(tmp_path / "file"), output_dir=tmp_path / name, **SHORT)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_a_place_for_a_new_run(run_train, tmp_path):
    (tmp_path / "empty").mkdir()
    run_dir = run_train(output_dir=tmp_path / "empty", **SHORT)
    assert (run_dir / "adapter").is_dir()


@pytest.mark.parametrize("change", ["one letter", "a row more", "another order"])
def test_other_rows_than_the_stopped_run_had_are_refused(
    run_train, run_until, tmp_path, rows_file, capfd, change
):
    run_dir = run_until("in an update", 2, output_dir=tmp_path / "run", **SHORT)
    rows = rows_file.read_text().splitlines(keepends=True)
    rows_file.write_text(
        {
            "one letter": "".join(rows).replace("What is 7", "What be 7"),
            "a row more": "".join([*rows, rows[0]]),
            "another order": "".join(reversed(rows)),
        }[change]
    )
    assert_refused(run_train, capfd, str(rows_file), "rows", output_dir=run_dir, **SHORT)


def test_other_eval_rows_than_the_stopped_run_had_are_refused_and_named(
    run_train, run_until, tmp_path, rows_file, capfd
):
    own = rows_file.with_name("own.jsonl")
    own.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    settings = {**SHORT, "data__eval_fraction": 0, "data__eval_path": own}
    run_dir = run_until("in an update", 2, output_dir=tmp_path / "run", **settings)
    own.write_text(own.read_text().replace("What is", "What be"))
    assert_refused(run_train, capfd, str(own), "evaluated on", output_dir=run_dir, **settings)


# Resuming from a checkpoint by its path


def test_a_new_run_goes_on_from_a_checkpoint_that_resume_names(run_train, uninterrupted, tmp_path, capfd):
    before = digests(uninterrupted)
    checkpoint = uninterrupted / "checkpoints" / "step_000010"
    run_dir = run_train(output_dir=tmp_path / "other", **WHOLE, resume=checkpoint)
    assert f"Resuming from {checkpoint}, after update 10." in capfd.readouterr().out
    expected = [entry for entry in training_lines(uninterrupted) if entry["step"] > 10]
    assert training_lines(run_dir) == expected
    assert digests(run_dir / "adapter") == digests(uninterrupted / "adapter")
    assert digests(uninterrupted) == before


@pytest.mark.parametrize("source_is_gone", [False, True])
def test_that_run_stopped_and_launched_again_goes_on_with_itself(
    run_train, run_until, uninterrupted, tmp_path, capfd, source_is_gone
):
    source = tmp_path / "step_000010"
    shutil.copytree(uninterrupted / "checkpoints" / "step_000010", source)
    settings = {**WHOLE, "resume": source, "checkpoint__every_steps": 1}
    run_dir = run_until("in an update", 12, output_dir=tmp_path / "run", **settings)
    if source_is_gone:  # the run that it came from keeps its newest only
        shutil.rmtree(source)
    run_train(output_dir=run_dir, **settings)
    assert "after update 11." in capfd.readouterr().out
    assert digests(run_dir / "adapter") == digests(uninterrupted / "adapter")
    assert training_lines(run_dir) == [e for e in training_lines(uninterrupted) if e["step"] > 10]


def test_that_run_stopped_before_its_own_first_checkpoint_begins_where_it_began(
    run_train, run_until, uninterrupted, tmp_path, capfd
):
    settings = {**WHOLE, "resume": uninterrupted / "checkpoints" / "step_000010"}
    run_dir = run_until("in an update", 12, output_dir=tmp_path / "run", **settings)
    run_train(output_dir=run_dir, **{**settings, "resume": "auto"})
    assert capfd.readouterr().out.count("after update 10.") == 2
    assert digests(run_dir / "adapter") == digests(uninterrupted / "adapter")


def test_a_checkpoint_to_resume_that_is_missing_or_damaged_is_refused(
    run_train, uninterrupted, tmp_path, capfd
):
    shutil.copytree(uninterrupted / "checkpoints" / "step_000010", tmp_path / "step_000010")
    damage(tmp_path / "step_000010" / "optimizer.safetensors", "altered")
    for path in (tmp_path / "step_000010", tmp_path / "nowhere", tmp_path):
        assert_refused(run_train, capfd, str(path), output_dir=tmp_path / "run", **WHOLE, resume=path)


@pytest.mark.parametrize(
    ("key", "value"), [("lora__r", 8), ("optim__name", "adamw"), ("lora__target_modules", "[q_proj]")]
)
def test_a_checkpoint_of_another_adapter_or_optimizer_is_refused(
    run_train, uninterrupted, tmp_path, capfd, key, value
):
    settings = {**WHOLE, key: value, "resume": uninterrupted / "checkpoints" / "step_000010"}
    assert_refused(run_train, capfd, "step_000010", output_dir=tmp_path / "run", **settings)


# Damage


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adapter_model.safetensors", "truncated"),
        ("adapter_model.safetensors", "altered"),
        ("optimizer.safetensors", "altered"),
        ("optimizer.safetensors", "missing"),
        ("state.json", "altered"),
        ("manifest.json", "missing"),
        ("manifest.json", "truncated"),
        ("manifest.json", "[]"),
        ("manifest.json", "{}"),
        ("manifest.json", '{"state.json": 3}'),
    ],
)
def test_a_damaged_checkpoint_has_a_fault_and_a_whole_one_has_none(uninterrupted, tmp_path, name, how):
    folder = tmp_path / "step_000012"
    shutil.copytree(uninterrupted / "checkpoints" / "step_000012", folder)
    assert fault_of(folder) is None
    damage(folder / name, how)
    assert name in (fault_of(folder) or "")


@pytest.mark.parametrize(
    ("name", "how"), [("optimizer.safetensors", "truncated"), ("manifest.json", "\x80garbage")]
)
def test_the_newest_checkpoint_is_named_and_passed_over_when_damaged(
    run_train, run_until, uninterrupted, tmp_path, capfd, name, how
):
    run_dir = run_until("in an update", 11, output_dir=tmp_path / "run", **WHOLE)
    damage(run_dir / "checkpoints" / "step_000010" / name, how)
    run_train(output_dir=run_dir, **WHOLE)
    said = capfd.readouterr().out
    assert f"step_000010 is damaged and was skipped: {name}" in said
    assert "after update 8." in said
    assert_ended_alike(run_dir, uninterrupted)


def test_a_run_whose_checkpoints_are_all_damaged_starts_anew(
    run_train, run_until, uninterrupted, tmp_path, capfd
):
    run_dir = run_until("in an update", 11, output_dir=tmp_path / "run", **WHOLE)
    for folder in (run_dir / "checkpoints").iterdir():
        damage(folder / "state.json", "missing")
    wait_for_the_next_second(run_dir)
    run_train(output_dir=run_dir, **WHOLE)
    said = capfd.readouterr().out
    assert "step_000010 is damaged" in said
    assert "step_000008 is damaged" in said
    assert_ended_alike(run_dir, uninterrupted)
    assert_tensorboard_matches(run_dir)


def test_a_damaged_newer_checkpoint_does_not_cost_the_whole_ones_written_after_it(
    run_train, run_until, tmp_path
):
    settings = {**WHOLE, "checkpoint__keep": 1}
    run_dir = run_until("in an update", 11, output_dir=tmp_path / "run", **settings)
    damage(run_dir / "checkpoints" / "step_000010" / "state.json", "missing")
    run_until("in an update", 5, output_dir=run_dir, **settings)
    whole = [name for name in checkpoint_names(run_dir) if fault_of(run_dir / "checkpoints" / name) is None]
    assert whole == ["step_000004"]


# What is kept


@pytest.mark.parametrize("keep", [1, 3, 100])
def test_exactly_the_newest_checkpoints_are_kept(run_train, tmp_path, keep):
    run_dir = run_train(
        output_dir=tmp_path / "run", checkpoint__every_steps=1, checkpoint__keep=keep, train__max_steps=4
    )
    newest = ["step_000001", "step_000002", "step_000003", "step_000004"][-keep:]
    assert checkpoint_names(run_dir) == newest
    assert all(fault_of(run_dir / "checkpoints" / name) is None for name in newest)


def test_a_run_leaves_no_file_that_could_hold_code(uninterrupted):
    known = {".csv", ".html", ".md", ".json", ".jsonl", ".txt", ".yaml", ".jinja", ".safetensors"}
    for path in uninterrupted.rglob("*"):
        if path.is_file():
            assert path.suffix in known or path.name.startswith("events.out.tfevents."), path
            # How pickles and torch.save's zip files begin.
            assert not path.read_bytes().startswith((b"\x80", b"PK")), path


@pytest.mark.parametrize(
    "names", [(".config.yaml.partial",), ("environment.json",), (".environment.json.partial",)]
)
def test_a_start_that_was_killed_while_it_wrote_the_first_file_is_made_anew(run_train, tmp_path, names):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{")
    run_train(output_dir=folder, **SHORT)
    assert sorted(path.name for path in folder.glob(".*")) == []


def test_what_a_kill_left_half_written_is_cleared_away(run_train, run_until, tmp_path):
    stopped = run_until("in an update", 2, output_dir=tmp_path / "run", **SHORT)
    half = stopped / "checkpoints" / ".step_000009.partial"
    half.mkdir()
    (half / "state.json").write_text("{")
    run_train(output_dir=stopped, **SHORT)
    assert list(stopped.rglob("*.partial")) == []


def test_the_checkpoint_that_a_run_began_with_is_checked_again(
    run_train, run_until, uninterrupted, tmp_path, capfd
):
    """Where the run's own ones are all damaged, it begins there again."""
    origin = shutil.copytree(
        uninterrupted / "checkpoints" / "step_000010", tmp_path / "origin" / "step_000010"
    )
    settings = {**WHOLE, "resume": origin, "output_dir": tmp_path / "new", "checkpoint__every_steps": 1}
    run_until("in an update", 12, **settings)
    for folder in (tmp_path / "new" / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    weights = bytearray((origin / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (origin / "adapter_model.safetensors").write_bytes(weights)
    for resume in (origin, "auto"):
        run_train(expect=2, **{**settings, "resume": resume})
        assert (
            f"resume {origin} is not an intact checkpoint: adapter_model.safetensors was altered"
            in capfd.readouterr().err
        )


def test_a_checkpoint_of_more_updates_than_the_run_has_is_refused(run_train, uninterrupted, tmp_path, capfd):
    origin = uninterrupted / "checkpoints" / "step_000012"
    settings = {**WHOLE, "resume": origin, "output_dir": tmp_path / "new"}
    run_train(expect=2, **settings, train__max_steps=12)
    assert "was saved after update 12, and this run has 12 in all" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_an_adapter_of_another_scale_is_refused(run_train, uninterrupted, tmp_path, capfd):
    origin = uninterrupted / "checkpoints" / "step_000010"
    run_train(expect=2, **WHOLE, resume=origin, output_dir=tmp_path / "new", lora__lora_alpha=32)
    assert "holds an adapter with lora_alpha 16" in capfd.readouterr().err


def test_other_settings_than_those_of_the_run_that_saved_the_checkpoint_are_shown(
    run_train, uninterrupted, tmp_path, capfd
):
    origin = uninterrupted / "checkpoints" / "step_000010"
    run_train(**{**WHOLE, "optim__learning_rate": 5e-3}, resume=origin, output_dir=tmp_path / "new")
    assert "was configured differently: " in (said := capfd.readouterr().out)
    assert "optim.learning_rate was 0.01, is 0.005" in said


@pytest.mark.parametrize("how", ["auto", "path"])
def test_another_base_of_the_same_shape_is_refused(
    run_train, run_until, tiny_model_dir, tmp_path, capfd, how
):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    stopped = run_until("in an update", 2, output_dir=tmp_path / "run", model__name_or_path=base, **SHORT)
    tiny_model(len(AutoTokenizer.from_pretrained(base)), seed=1).save_pretrained(base)
    resumed = (
        {"output_dir": stopped}
        if how == "auto"
        else {"output_dir": tmp_path / "new", "resume": stopped / "checkpoints" / "step_000001"}
    )
    run_train(expect=2, model__name_or_path=base, **resumed, **SHORT)
    error = capfd.readouterr().err
    assert "step_000001 was trained on another base model" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd"])
def test_adapter_optimizer_and_state_survive_a_round_trip(tmp_path, name):
    def build(seed: int) -> Trained:
        torch.manual_seed(seed)
        model = add_adapter(tiny_model(100).requires_grad_(False), LoraConfig(r=64))
        adapter = FlatAdapter(model)
        optimizer = create_optimizer(name, adapter, OptimConfig(name=name, learning_rate=1e-2))
        return Trained(adapter, optimizer, LossScale("fp16"))

    def update(trained: Trained, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        for parameter in trained.model.parameters():
            if parameter.requires_grad:
                parameter.grad.normal_(generator=noise)
        trained.optimizer.step()
        trained.loss_scale.adapt_to(Numbers.GRADIENT_NOT_FINITE if seed == 1 else Numbers.FINITE)

    def everything(trained: Trained) -> dict[str, Any]:
        weights = {key: value for key, value in trained.model.state_dict().items() if "lora_" in key}
        state = leaves_of(trained.optimizer.state_dict()["state"])
        return {**weights, **state, **trained.loss_scale.state_dict()}

    trained = build(seed=0)
    for seed in range(3):
        update(trained, seed)
    state = TrainState(base="this", step=3, window_sums=[0.1, 2.0, 3.0, 4.0])
    folder = save_checkpoint(tmp_path, state, trained, CheckpointConfig(), [])
    if name == "adamw_8bit":
        saved = load_file(folder / "optimizer.safetensors")
        assert {torch.uint8, torch.float32} <= {tensor.dtype for tensor in saved.values()}

    other = build(seed=1)
    assert load_checkpoint(folder, "this", other) == state
    assert other.loss_scale.state_dict() == {"scale": 2048, "good_updates": 1, "repeats": 1}
    for seed in range(3, 6):
        ours, theirs = everything(trained), everything(other)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if isinstance(value, Tensor):
                assert value.dtype == theirs[key].dtype, key
                assert torch.equal(value, theirs[key]), key
            else:
                assert value == theirs[key], key
        update(trained, seed)
        update(other, seed)


def test_what_is_saved_is_found_without_asking_the_hub(monkeypatch):
    """PEFT would ask it, at every save, for the configuration of a base with a hub name."""
    model = with_adapter(tiny_model(40))
    model.peft_config["default"].base_model_name_or_path = "owner/name"
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("the hub was asked")
    )
    assert all(".lora_" in name for name in adapter_weights(model))
