"""Several processes make the updates of one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import ROOT, read_metrics
from sources import NAMES, in_sources

import train

# 13 examples are trained on: updates of 6, 6 and 1 example, so that one of two processes has none.
# 4 are evaluated on.
SETTINGS = {
    "data__num_samples": 17,
    "train__num_epochs": 2,
    "lora__lora_dropout": 0.0,
    "optim__name": "adamw",
    "optim__learning_rate": 1e-2,
}
ONE = {"train__micro_batch_size": 2, "train__gradient_accumulation_steps": 3}
EACH_OF_TWO = {"train__micro_batch_size": 1, "train__gradient_accumulation_steps": 3}
SUMS = ("split", "step", "epoch", "num_target_tokens")
OF_ANSWERS = ("num_answers", "exact_match", "chrf", "ended")
MEANS = ("loss", "entropy", "mean_token_accuracy", "grad_norm", "learning_rate")

STOPPED: list[tuple[Path, dict[str, Any]]] = []
# train.py, but process 0 is gone after the checkpoint of update 4.
STOPPED_AFTER_FOUR = """
import os, sys, train
from finetune.run import checkpoint
save = checkpoint.save_checkpoint
def save_and_stop(run_dir, state, *rest):
    save(run_dir, state, *rest)
    if state.step == 4:
        os._exit(7)
checkpoint.save_checkpoint = save_and_stop
sys.exit(train.main(sys.argv[1:]))
"""

# train.py, but a batch of answers is of two rows, so that the processes share four.
ANSWERING_BY_TWOS = """
import sys, train
from finetune.training import answer_scores
answer_scores.ANSWERS_AT_A_TIME = 2
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def launch(run_train, monkeypatch, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start two processes with torchrun on the CPU, with run_train's settings."""

    def run(script: Path = ROOT / "train.py", **settings: Any) -> subprocess.CompletedProcess[str]:
        started: list[list[str]] = []
        with monkeypatch.context() as patch:
            patch.setattr(train, "main", lambda argv: started.append(argv) or 0)
            run_train(**settings)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # two processes' threads share few cores
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.run(
            [*torchrun, str(script), *started[0]],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def assert_same_metrics(run_dir: Path, other_dir: Path) -> None:
    ours, theirs = read_metrics(run_dir), read_metrics(other_dir)
    assert len(ours) == len(theirs)
    for entry, other in zip(ours, theirs, strict=True):
        assert [entry[key] for key in SUMS] == [other[key] for key in SUMS]
        assert [entry.get(key) for key in OF_ANSWERS] == [other.get(key) for key in OF_ANSWERS]
        for key in (key for key in MEANS if key in entry):
            assert entry[key] == pytest.approx(other[key], rel=1e-5), (entry, other)


@pytest.mark.parametrize(
    ("packing", "eval_fraction", "micro_batches"),
    [
        (True, 0.2, {}),
        # Each example in a forward pass of its own, so that the processes differ in their number; and one
        # eval example: the second process has none.
        (False, 0.05, {"train__max_tokens_per_micro_batch": 128}),
    ],
)
def test_two_processes_make_the_updates_of_one(
    run_train, launch, tmp_path, monkeypatch, packing, eval_fraction, micro_batches
):
    settings = {
        **SETTINGS,
        **micro_batches,
        "data__num_samples": 17 if packing else 14,
        "data__eval_fraction": eval_fraction,
        "train__packing": packing,
        "eval__answers": 4,
        "log__every_steps": 2,
    }
    monkeypatch.setattr("finetune.training.answer_scores.ANSWERS_AT_A_TIME", 2)
    alone = run_train(output_dir=tmp_path / "alone", **settings, **ONE)
    script = tmp_path / "train_answering_by_twos.py"
    script.write_text(ANSWERING_BY_TWOS, encoding="utf-8")
    result = launch(script, output_dir=tmp_path / "both", **settings, **EACH_OF_TWO)
    assert result.returncode == 0, result.stderr
    assert_same_metrics(tmp_path / "both", alone)
    written = {path.name: path.read_bytes() for path in (alone / "evaluations").glob("answers_*")}
    assert len(written) > 1
    assert written == {name: (tmp_path / "both" / "evaluations" / name).read_bytes() for name in written}
    assert [entry["step"] for entry in read_metrics(alone) if entry["split"] == "train"] == [2, 4, 6]
    # One of them speaks.
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("Run ")]) == 1
    assert len([line for line in lines if line.startswith(("train ", "eval "))]) == len(read_metrics(alone))
    assert len([line for line in lines if line.startswith("adapter ")]) == 1
    assert "1 x 3 x 2 process" in result.stdout
    assert {path.name for path in (tmp_path / "both").iterdir()} == {path.name for path in alone.iterdir()}


def test_two_processes_give_the_figures_of_each_source_that_one_gives(run_train, launch, rows_file, tmp_path):
    # The last update of an epoch is of one example, so that one process has none.
    settings = {**SETTINGS, "log__every_steps": 1, "data__path": in_sources(rows_file)}
    result = launch(output_dir=tmp_path / "both", **settings, **EACH_OF_TWO)
    assert result.returncode == 0, result.stderr
    alone = run_train(output_dir=tmp_path / "alone", **settings, **ONE)
    assert_same_metrics(tmp_path / "both", alone)
    seen = set()
    for line, other in zip(read_metrics(tmp_path / "both"), read_metrics(alone), strict=True):
        by_source = {key: value for key, value in line.items() if "/" in key}
        assert by_source == pytest.approx({key: other[key] for key in other if "/" in key}, rel=1e-5)
        seen |= by_source.keys()
    assert {f"loss/{name}" for name in NAMES} <= seen


def test_two_processes_end_together_where_one_does_and_take_the_same_best_checkpoint(
    run_train, launch, tmp_path
):
    settings = {
        **SETTINGS,
        "optim__learning_rate": 0.1,
        "eval__every": 1,
        "checkpoint__keep": 1,
        "checkpoint__keep_best": True,
        "train__early_stopping_patience": 1,
        "train__num_epochs": 4,
    }
    alone = run_train(output_dir=tmp_path / "alone", **settings, **ONE)
    result = launch(output_dir=tmp_path / "both", **settings, **EACH_OF_TWO)
    assert result.returncode == 0, result.stderr
    last = read_metrics(alone)[-1]["step"]
    assert last < 12
    assert f"Ended early, after update {last} of 12" in result.stdout
    assert [entry["step"] for entry in read_metrics(tmp_path / "both")][-1] == last
    steps = [
        json.loads((tmp_path / name / "environment.json").read_text())["adapter_step"]
        for name in ("both", "alone")
    ]
    assert steps == [last - 1, last - 1]


@pytest.fixture
def stopped(launch, rows_file, tmp_path) -> tuple[Path, dict[str, Any]]:
    """A copy of a run that two processes began and did not end, and its settings; it is made once."""
    if not STOPPED:
        script = tmp_path / "stopped_after_four.py"
        script.write_text(STOPPED_AFTER_FOUR)
        settings = {**SETTINGS, "data__path": rows_file, "log__every_steps": 3}
        result = launch(script, output_dir=tmp_path / "both", **settings, **EACH_OF_TWO)
        assert result.returncode != 0
        assert not (tmp_path / "both" / "adapter").exists()
        assert read_metrics(tmp_path / "both")[-1]["step"] == 3
        STOPPED.append((tmp_path / "both", settings))
    folder, settings = STOPPED[0]
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", settings


def test_two_stopped_processes_launched_again_make_the_updates_of_one(run_train, launch, stopped, tmp_path):
    both, settings = stopped
    alone = run_train(output_dir=tmp_path / "alone", **settings, **ONE)
    result = launch(output_dir=both, **settings, **EACH_OF_TWO)
    assert result.returncode == 0, result.stderr
    assert "after update 4." in result.stdout
    assert_same_metrics(both, alone)


def test_one_process_goes_on_where_two_stopped_with_updates_of_the_same_size(run_train, stopped, tmp_path):
    both, settings = stopped
    alone = run_train(output_dir=tmp_path / "alone", **settings, **ONE)
    assert_same_metrics(run_train(output_dir=both, **settings, **ONE), alone)


def test_one_process_cannot_go_on_where_two_stopped_with_updates_of_another_size(run_train, stopped, capfd):
    """The steps made so far would stand for other examples."""
    both, settings = stopped
    before = read_metrics(both)
    capfd.readouterr()
    run_train(expect=2, output_dir=both, **settings, **EACH_OF_TWO)
    message = capfd.readouterr().err
    assert message.startswith("error: ")
    assert "process" in message
    assert read_metrics(both) == before


def test_processes_of_which_accelerate_knows_nothing_are_refused(run_train, tmp_path, monkeypatch, capfd):
    def lonely(**arguments: Any) -> Accelerator:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("WORLD_SIZE")
            return Accelerator(**arguments)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("finetune.runtime.accelerator.Accelerator", lonely)
    capfd.readouterr()
    run_train(expect=2, output_dir=tmp_path / "run")
    message = capfd.readouterr().err
    assert message.startswith("error: 2 processes were started, but Accelerate knows of 1")
    assert message.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    "file", ["alpaca_9229.json", "finance_alpaca_900.csv", "finance_alpaca_900_messages.jsonl"]
)
def test_on_real_rows_two_processes_packed_and_padded_are_one(run_train, launch, tmp_path, shared_data, file):
    settings = {
        **SETTINGS,
        "data__path": shared_data / file,
        "data__num_samples": 60,
        "data__max_length": 512,
        "train__num_epochs": 1,
    }
    alone = run_train(output_dir=tmp_path / "alone", **settings, **ONE)
    assert len(read_metrics(alone)) > 8
    run_train(output_dir=tmp_path / "padded", **settings, **ONE, train__packing=False)
    assert_same_metrics(tmp_path / "padded", alone)
    result = launch(output_dir=tmp_path / "both", **settings, **EACH_OF_TWO)
    assert result.returncode == 0, result.stderr
    assert_same_metrics(tmp_path / "both", alone)


# In two processes of which one meets a gradient that is not finite.
BAD_IN_ONE = """
import os, sys, train
from finetune.model import loss
forward = loss.TokenLoss.forward
def bad_in_rank_1(token_loss, batch):
    sums = forward(token_loss, batch)
    if os.environ["RANK"] == "1" and sums.nll.requires_grad:
        return loss.TokenSums(sums.nll * float("nan"), sums.entropy, sums.correct, sums.count)
    return sums
loss.TokenLoss.forward = bad_in_rank_1
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_bad_number_of_one_process_stops_both_before_it_reaches_the_weights(launch, tmp_path):
    script = tmp_path / "bad_in_one.py"
    script.write_text(BAD_IN_ONE)
    result = launch(script, output_dir=tmp_path / "run", **SETTINGS, **EACH_OF_TWO)
    assert result.returncode != 0
    assert "a number of update 1 is not finite" in result.stderr
    record = json.loads((tmp_path / "run" / "bad_update.json").read_text(encoding="utf-8"))
    assert {batch["process"] for batch in record["micro_batches"]} == {0, 1}
    rows = [example["row_number"] for batch in record["micro_batches"] for example in batch["examples"]]
    assert len(set(rows)) == len(rows) == 6
    assert not (tmp_path / "run" / "checkpoints").exists()
