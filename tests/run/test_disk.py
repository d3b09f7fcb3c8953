"""A disk that is full or cannot be written, and files that were altered, cost no run what it had saved."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file

import finetune.run.checkpoint as checkpoint_module
from finetune.run.checkpoint import fault_of
from finetune.run.tracker import Tracker

# A checkpoint takes about 0.4 MiB.
WHOLE = {"train__num_epochs": 4, "checkpoint__every_steps": 1, "lora__r": 16, "optim__name": "adamw"}


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A small disk of its own: call it with mount's options, again to change them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a small disk")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_ends_as(run_dir: Path, whole: Path) -> None:
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run_dir, whole)
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    losses, expected = (
        [(line["split"], line["step"], line["loss"]) for line in read_metrics(folder)]
        for folder in (run_dir, whole)
    )
    assert losses == expected


def at_step(step: int, do: Callable[[], Any]) -> tuple[str, Callable[[Tracker, int], None]]:
    """What to patch so that something happens after update `step`."""
    advance = Tracker.advance

    def doing(self: Tracker, at: int) -> None:
        advance(self, at)
        if at == step:
            do()

    return "finetune.run.tracker.Tracker.advance", doing


def fill(folder: Path, leave: int) -> Callable[[], None]:
    """Write a file into the folder that leaves so many bytes of its disk free."""

    def write() -> None:
        with (folder / "ballast").open("wb") as file:
            file.write(bytes(max(0, shutil.disk_usage(folder).free - leave)))

    return write


@pytest.mark.parametrize("checked", [True, False], ids=["seen before", "seen while writing"])
@pytest.mark.parametrize("leave", [0, 100_000, 300_000])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(
    run_on_same_rows, monkeypatch, capfd, disk, whole, leave, checked
):
    folder = disk("size=30m")
    settings = {**WHOLE, "log__every_steps": 100, "eval__every": 100}
    with monkeypatch.context() as patch:
        patch.setattr(*at_step(4, fill(folder, leave)))
        if not checked:
            patch.setattr("finetune.runtime.files.require_room", lambda *_: None)
        run_dir = run_on_same_rows(expect=2, output_dir=folder / "run", **settings)
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "step_000004" in error
    assert ("make room" if checked else "o space left on device") in error
    assert "rerun the same command to resume" in error
    kept = sorted((run_dir / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step_000002", "step_000003"]
    assert [fault_of(path) for path in kept] == [None, None]
    (folder / "ballast").unlink()
    run_on_same_rows(output_dir=run_dir, **settings)
    weights, expected = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (run_dir, whole))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_a_disk_that_is_full_when_metrics_are_written_ends_the_run_in_one_line(
    run_on_same_rows, monkeypatch, capfd, disk
):
    folder = disk("size=30m")
    settings = {**WHOLE, "train__num_epochs": 40, "checkpoint__every_steps": 5, "eval__every": 1000}
    with monkeypatch.context() as patch:
        patch.setattr(*at_step(6, fill(folder, 0)))
        patch.setattr("finetune.run.checkpoint.save_checkpoint", saving_no_later_than(5))
        run_dir = run_on_same_rows(expect=2, output_dir=folder / "run", **settings)
    error = capfd.readouterr().err
    assert "No space left on device" in error
    assert error.startswith(f"error: {run_dir} could not be written")
    assert error.count("\n") == 1
    (folder / "ballast").unlink()
    run_on_same_rows(output_dir=run_dir, **settings)
    trained = [line["step"] for line in read_metrics(run_dir) if line["split"] == "train"]
    assert trained == list(range(1, 81))


def saving_no_later_than(step: int) -> Callable[..., Any]:
    save = checkpoint_module.save_checkpoint
    return lambda run_dir, state, *rest: save(run_dir, state, *rest) if state.step <= step else None


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_anything_is_written(
    run_on_same_rows, capfd, disk
):
    folder = disk("size=1m")
    run_on_same_rows(expect=2, output_dir=folder / "run", **WHOLE)
    assert "no room for the run in" in capfd.readouterr().err
    assert list(folder.rglob("*")) == []


def test_a_folder_that_cannot_be_written_is_refused(run_on_same_rows, capfd, disk):
    folder = disk("size=30m")
    disk("ro")
    run_on_same_rows(expect=2, output_dir=folder / "run", **WHOLE)
    error = capfd.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


def test_a_disk_that_becomes_read_only_keeps_what_was_saved(
    run_on_same_rows, monkeypatch, capfd, disk, whole
):
    folder = disk("size=30m")
    with monkeypatch.context() as patch:
        patch.setattr(*at_step(4, lambda: disk("ro")))
        run_dir = run_on_same_rows(expect=2, output_dir=folder / "run", **WHOLE)
    error = capfd.readouterr().err
    assert error.startswith(f"error: {run_dir}")
    assert "Read-only file system" in error
    assert error.count("\n") == 1
    disk("rw")
    run_on_same_rows(output_dir=run_dir, **WHOLE)
    assert_ends_as(run_dir, whole)


@pytest.fixture
def unfinished(run_on_same_rows, tmp_path, made_once) -> Path:
    """A copy of a run of WHOLE that was stopped after update 5."""
    if "unfinished" not in made_once:

        class Stopped(Exception):  # noqa: N818
            pass

        def stop() -> None:
            raise Stopped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*at_step(6, stop))
            with pytest.raises(Stopped):
                run_on_same_rows(output_dir=tmp_path / "stopped", **WHOLE)
        made_once["unfinished"] = tmp_path / "stopped"
    return Path(shutil.copytree(made_once["unfinished"], tmp_path / "run"))


def corrupt(path: Path, others: list[Path], rng: random.Random) -> str:
    """Damage a file in one of the ways that disks, copies and people do; says how."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    way = rng.choice(["bit", "cut", "emptied", "longer", "gone", "zeros", "swapped"])
    if way == "bit":
        content[place] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del content[place:]
    elif way == "emptied":
        content.clear()
    elif way == "longer":
        content += bytes(rng.randrange(1, 9))
    elif way == "zeros":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    elif way == "swapped":
        content = bytearray(rng.choice(others).read_bytes())
    path.unlink()
    if way != "gone":
        path.write_bytes(content)
    return way


@pytest.mark.parametrize("seed", range(40))
def test_a_corrupted_checkpoint_is_named_and_the_run_ends_as_if_undisturbed(
    run_on_same_rows, capfd, unfinished, whole, seed
):
    rng = random.Random(seed)
    older, newer = sorted((unfinished / "checkpoints").iterdir())
    victims = [newer] if rng.random() < 0.7 else [newer, older]
    for folder in victims:
        files = sorted(folder.iterdir())
        others = [path for path in files if path.name != "manifest.json"]
        corrupt(rng.choice(files), others, rng)
    damaged = [folder.name for folder in victims if fault_of(folder) is not None]
    run_on_same_rows(output_dir=unfinished, **WHOLE)
    said = capfd.readouterr().out
    named = [line.split()[0] for line in said.splitlines() if "is damaged and was skipped" in line]
    assert named == (damaged if newer.name in damaged else [])
    if damaged == [newer.name, older.name]:
        assert "Resuming from" not in said
        assert "No checkpoint of this run is intact: it starts from scratch." in said
    else:
        assert f"Resuming from {older if newer.name in damaged else newer}" in said
    assert_ends_as(unfinished, whole)


def test_a_checkpoint_that_was_half_copied_is_passed_over(run_on_same_rows, capfd, unfinished, whole):
    older, newer = sorted((unfinished / "checkpoints").iterdir())
    for path in sorted(newer.iterdir())[2:]:
        path.unlink()
    run_on_same_rows(output_dir=unfinished, **WHOLE)
    assert f"Resuming from {older}" in capfd.readouterr().out
    assert_ends_as(unfinished, whole)


@pytest.mark.parametrize("which", ["checkpoints", "step"])
def test_a_checkpoint_folder_that_is_a_link_is_refused_and_left_alone(
    run_on_same_rows, capfd, unfinished, tmp_path, which
):
    linked = (
        unfinished / "checkpoints" if which == "checkpoints" else max((unfinished / "checkpoints").iterdir())
    )
    outside = shutil.move(linked, tmp_path / "outside")
    os.symlink(outside, linked)
    before = {path: path.read_bytes() for path in Path(outside).rglob("*") if path.is_file()}
    run_on_same_rows(expect=2, output_dir=unfinished, **WHOLE)
    error = capfd.readouterr().err
    assert error.startswith(f"error: {linked} is a link")
    assert {path: path.read_bytes() for path in Path(outside).rglob("*") if path.is_file()} == before
