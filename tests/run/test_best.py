"""The checkpoint of the lowest eval loss is kept and becomes the result; a run that learns no more ends."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics
from kills import (
    StoppedError,
    assert_ended_alike,
    assert_refused,
    checkpoint_names,
    damage,
    digests,
    training_lines,
)

import finetune.run.evaluator as evaluator_module
from finetune.run.checkpoint import fault_of
from finetune.run.tracker import Tracker
from finetune.training.best import best_of, best_value_first, is_out_of_patience

# With these the eval loss falls, rises and falls again: of eight updates the third is by far the best
# of the first six, and none of the three after it is better.
SETTINGS = {
    "optim__name": "adamw",
    "optim__learning_rate": 0.07,
    "train__seed": 41,
    "optim__schedule": "constant",
    "lora__lora_dropout": 0.1,
    "train__num_epochs": 4,
    "eval__every": 1,
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 1,
    "log__every_steps": 3,
}
BEST, ENDS_AT, PLANNED = 3, 6, 8
WHOLE = {**SETTINGS, "checkpoint__keep_best": True, "train__early_stopping_patience": ENDS_AT - BEST}


def eval_losses(run_dir: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in read_metrics(run_dir) if entry["split"] == "eval"}


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def adapter_step(run_dir: Path) -> int:
    step: int = json.loads((run_dir / "environment.json").read_text())["adapter_step"]
    return step


def test_the_best_checkpoint_is_kept_and_its_adapter_is_the_result(whole):
    losses = eval_losses(whole)
    assert min(losses, key=lambda step: losses[step]) == BEST
    assert max(losses) == ENDS_AT
    assert checkpoint_names(whole) == [checkpoint(whole, step).name for step in (BEST, ENDS_AT)]
    assert [fault_of(checkpoint(whole, step)) for step in (BEST, ENDS_AT)] == [None, None]
    assert weights(whole / "adapter") == weights(checkpoint(whole, BEST))
    assert weights(whole / "adapter") != weights(checkpoint(whole, ENDS_AT))
    assert adapter_step(whole) == BEST


def test_a_run_out_of_patience_ends_as_one_planned_that_long_does(run_on_same_rows, tmp_path, capfd):
    """The same updates, adapter, checkpoints, evaluations and answers."""
    patient = {**SETTINGS, "train__early_stopping_patience": ENDS_AT - BEST}
    run_dir = run_on_same_rows(output_dir=tmp_path / "run", **patient)
    said = " ".join(capfd.readouterr().out.split())
    best = eval_losses(run_dir)[BEST]
    assert (
        f"Ended early, after update {ENDS_AT} of {PLANNED}: the last 3 evaluations had no lower loss than "
        f"{best:.4f}, that after update {BEST}."
    ) in said
    planned = run_on_same_rows(output_dir=tmp_path / "planned", **SETTINGS, train__max_steps=ENDS_AT)
    assert "Ended early" not in capfd.readouterr().out
    assert training_lines(run_dir) == training_lines(planned)
    assert weights(run_dir / "adapter") == weights(planned / "adapter")
    assert digests(run_dir / "checkpoints") == digests(planned / "checkpoints")
    assert (run_dir / "answers.jsonl").read_bytes() == (planned / "answers.jsonl").read_bytes()
    run_on_same_rows(output_dir=run_dir, **patient)
    assert f"The run in {run_dir} is finished" in capfd.readouterr().out
    more_patient = {**patient, "train__early_stopping_patience": 4}
    assert_refused(
        run_on_same_rows,
        capfd,
        "train.early_stopping_patience was 3, is 4",
        output_dir=run_dir,
        **more_patient,
    )


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([], 1, False),
        ([3.0], 1, False),  # step 0's is the first to beat
        ([3.0, 3.0], 1, True),  # the same is not lower
        ([3.0, 2.0], 1, False),
        ([3.0, 2.0, 2.5], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 1.9, 2.0], 2, False),
        ([3.0, 2.0, 2.5, 2.2], 2, True),
        ([3.0, 4.0, 5.0, 6.0], None, False),
    ],
)
def test_patience_counts_the_evaluations_since_the_best(losses, patience, ends):
    evaluations = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    assert is_out_of_patience(evaluations, patience, "loss") == ends


@pytest.mark.parametrize(
    ("by", "best", "order"),
    [("loss", 3, [3, 1, 2, 0]), ("chrf", 1, [1, 2, 0, 3]), ("loss/math", 2, [2, 0, 1, 3])],
)
def test_the_best_is_the_lowest_loss_or_the_highest_of_another_metric(by, best, order):
    """Of equal ones the earliest; what two losses may be off by is no difference."""
    values = [(3.0, 10.0, 2.0), (2.5, 12.0, 2.0), (2.5, 12.0, 1.0), (2.0, 9.0, 3.0)]
    evaluations = [
        {"step": step, "loss": loss, "chrf": chrf, "loss/math": of_math, "loss_error": 0.1}
        for step, (loss, chrf, of_math) in enumerate(values)
    ]
    assert best_of(evaluations, by)["step"] == best
    assert [entry["step"] for entry in best_value_first(evaluations, by)] == order
    assert is_out_of_patience(evaluations, 1, by) == (best < 3)
    if by.startswith("loss"):
        near = [{**entry, "loss_error": 10.0} for entry in evaluations]
        assert best_of(near, by)["step"] == 0


# Killed


def stopping(moment: str, step: int) -> tuple[str, Callable[..., Any]]:
    """A function of the program, and what stops it at a moment of a step."""
    evaluate, activity, log, remove = (
        evaluator_module.evaluate,
        Tracker.show_activity,
        Tracker.log,
        shutil.rmtree,
    )
    replace, calls = os.replace, iter(range(100))

    def stopping_activity(self: Tracker, what: str) -> None:
        activity(self, what)
        if what == "evaluating" and next(calls) == step:
            raise StoppedError

    def stopping_evaluate(*arguments: Any) -> Any:
        sums = evaluate(*arguments)
        if next(calls) == step:
            raise StoppedError
        return sums

    def stopping_log(self: Tracker, split: str, at: int, metrics: Any) -> None:
        log(self, split, at, metrics)
        if split == "eval" and at == step:
            raise StoppedError

    def stopping_remove(path: Any, **options: Any) -> None:
        if Path(path).name == f".step_{step:06d}.removed.partial" and not options:
            (Path(path) / "state.json").unlink()
            raise StoppedError
        remove(path, **options)

    def stopping_replace(source: Any, target: Any) -> None:
        if Path(target).name == "adapter":
            raise StoppedError
        replace(source, target)

    return {
        "between checkpoint and evaluation": (
            "finetune.run.tracker.Tracker.show_activity",
            stopping_activity,
        ),
        "in the evaluation": ("finetune.run.evaluator.evaluate", stopping_evaluate),
        "after the evaluation's line": ("finetune.run.tracker.Tracker.log", stopping_log),
        "while pruning": ("finetune.runtime.system.shutil.rmtree", stopping_remove),
        "while writing the result": ("finetune.runtime.system.os.replace", stopping_replace),
    }[moment]


@pytest.mark.parametrize(
    ("moment", "step", "goes_on_after"),
    [
        ("between checkpoint and evaluation", BEST, BEST),
        ("in the evaluation", BEST + 1, BEST + 1),
        ("after the evaluation's line", BEST, BEST),
        ("after the evaluation's line", ENDS_AT, ENDS_AT),
        ("while pruning", ENDS_AT - 1, ENDS_AT),
        ("while writing the result", ENDS_AT, ENDS_AT),
    ],
)
def test_a_run_killed_then_ends_with_the_same_bits(
    run_on_same_rows, whole, tmp_path, capfd, moment, step, goes_on_after
):
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*stopping(moment, step))
        with pytest.raises(StoppedError):
            run_on_same_rows(output_dir=run_dir, **WHOLE)
    assert not (run_dir / "adapter").exists()
    run_on_same_rows(output_dir=run_dir, **WHOLE)
    said = capfd.readouterr().out
    assert f"after update {goes_on_after}." in said
    assert f"Ended early, after update {ENDS_AT}" in said
    assert_ended_alike(run_dir, whole)
    assert adapter_step(run_dir) == BEST


def test_patience_that_ends_between_checkpoints_is_told_again_by_the_same_evaluations(
    run_on_same_rows, whole, tmp_path
):
    """Without keep_best the run goes on from before the evaluations that ended it."""
    settings = {**WHOLE, "checkpoint__keep_best": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*stopping("after the evaluation's line", ENDS_AT))
        with pytest.raises(StoppedError):
            run_on_same_rows(output_dir=tmp_path / "run", **settings)
    assert checkpoint_names(tmp_path / "run") == ["step_000004"]
    run_dir = run_on_same_rows(output_dir=tmp_path / "run", **settings)
    assert training_lines(run_dir) == training_lines(whole)
    assert weights(run_dir / "adapter") == weights(checkpoint(whole, ENDS_AT))
    assert checkpoint_names(run_dir) == ["step_000006"]


# Damage, and a full disk


@pytest.fixture
def without_result(whole, run_on_same_rows, tmp_path, made_once) -> Iterator[Path]:
    """A copy of a run of WHOLE that was killed before its result was written."""
    if "killed" not in made_once:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*stopping("while writing the result", ENDS_AT))
            with pytest.raises(StoppedError):
                run_on_same_rows(output_dir=tmp_path / "killed", **WHOLE)
        made_once["killed"] = tmp_path / "killed"
    return Path(shutil.copytree(made_once["killed"], tmp_path / "run"))


def test_a_damaged_best_checkpoint_is_named_and_the_best_whole_one_is_taken(
    run_on_same_rows, without_result, capfd
):
    damage(checkpoint(without_result, BEST) / "optimizer.safetensors", "altered")
    run_on_same_rows(output_dir=without_result, **WHOLE)
    said = " ".join(capfd.readouterr().out.split())
    assert "Of the lowest eval loss, step_000003 cannot be used: optimizer.safetensors was altered" in said
    assert weights(without_result / "adapter") == weights(checkpoint(without_result, ENDS_AT))
    assert adapter_step(without_result) == ENDS_AT
    assert checkpoint_names(without_result) == ["step_000003", "step_000006"]


def test_a_best_checkpoint_damaged_on_the_way_leaves_the_next_best_in_its_place(
    run_on_same_rows, tmp_path, whole
):
    """From then on the best whole one is what is never removed."""
    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*stopping("in the evaluation", BEST + 1))
        with pytest.raises(StoppedError):
            run_on_same_rows(output_dir=run_dir, **WHOLE)
    damage(checkpoint(run_dir, BEST) / "adapter_model.safetensors", "truncated")
    run_on_same_rows(output_dir=run_dir, **WHOLE)
    losses = eval_losses(whole)
    next_best = min((BEST + 1, ENDS_AT - 1, ENDS_AT), key=lambda step: losses[step])
    assert adapter_step(run_dir) == next_best
    assert weights(run_dir / "adapter") == weights(checkpoint(run_dir, next_best))


@pytest.mark.parametrize("name", [f"step_{BEST + 1:06d}", "adapter"])
def test_a_full_disk_costs_the_best_checkpoint_nothing(run_on_same_rows, whole, tmp_path, capfd, name):
    from finetune.runtime.files import require_room

    def full(folder: Path, num_bytes: int, what: str) -> None:
        require_room(folder, 2**60 if what == name else num_bytes, what)

    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.runtime.files.require_room", full)
        run_on_same_rows(expect=2, output_dir=run_dir, **WHOLE)
    assert f"no room for {name} in" in capfd.readouterr().err
    assert fault_of(checkpoint(run_dir, BEST)) is None
    run_on_same_rows(output_dir=run_dir, **WHOLE)
    assert_ended_alike(run_dir, whole)


def test_training_that_brought_nothing_says_so(run_on_same_rows, tmp_path, capfd):
    """A learning rate that moves no weight: no evaluation is better than that of step 0."""
    nothing = {**WHOLE, "optim__learning_rate": 1e-37}
    run_dir = run_on_same_rows(output_dir=tmp_path / "run", **nothing)
    losses = eval_losses(run_dir)
    assert list(losses) == [0, 1, 2, 3]
    said = " ".join(capfd.readouterr().out.split())
    assert f"No evaluation after training had a lower loss than that before it, {losses[0]:.4f}." in said
    assert "after update 1, which had the lowest eval loss" in said
