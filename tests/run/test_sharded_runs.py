"""Whole runs with a sharded base: the metrics of one process, before a kill and after it, sharded or not."""

import json
import shutil

import pytest
from conftest import read_metrics
from runtime.test_processes import (
    BAD_IN_ONE,
    STOPPED_AFTER_FOUR,
    assert_same_metrics,
    launch,  # noqa: F401  a fixture
)

# 13 examples are trained on: updates of 8 and of 5, in which one of two processes has a micro-batch more.
SETTINGS = {
    "model__quantization": "int8",
    "fast__int8_matmul": "dequantize",
    "data__num_samples": 17,
    "train__max_tokens_per_micro_batch": 128,
    "train__num_epochs": 3,
    "lora__lora_dropout": 0.0,
    "optim__name": "adamw",
    "optim__learning_rate": 1e-2,
    "checkpoint__keep": 9,
}
ONE = {"train__micro_batch_size": 8, "train__gradient_accumulation_steps": 1}
SHARED_BY_TWO = {
    "train__micro_batch_size": 4,
    "train__gradient_accumulation_steps": 1,
    "train__sharding": "base",
}


def answers_of(run_dir) -> list:
    lines = (run_dir / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_goes_on_from_a_sharded_base_to_a_whole_one_and_back(run_train, launch, rows_file, tmp_path):  # noqa: F811
    settings = {**SETTINGS, "data__path": rows_file}
    alone = run_train(output_dir=tmp_path / "alone", **settings, **ONE)

    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_AFTER_FOUR)
    stopped = launch(script, output_dir=tmp_path / "stopped", **settings, **SHARED_BY_TWO)
    assert stopped.returncode != 0
    assert "base, on 2 processes" in stopped.stdout
    assert read_metrics(tmp_path / "stopped")[-1]["step"] == 4
    run_train(output_dir=tmp_path / "stopped", **settings, **ONE)  # now one process, and a whole base
    assert_same_metrics(tmp_path / "stopped", alone)
    assert answers_of(tmp_path / "stopped") == answers_of(alone)

    for step in (4, 6):  # what one process made until update 2, two go on with
        shutil.rmtree(alone / "checkpoints" / f"step_{step:06d}")
    shutil.copytree(alone, tmp_path / "both")
    shutil.rmtree(tmp_path / "both" / "adapter")
    resumed = launch(output_dir=tmp_path / "both", **settings, **SHARED_BY_TWO)
    assert resumed.returncode == 0, resumed.stderr
    assert "after update 2." in resumed.stdout
    assert_same_metrics(tmp_path / "both", alone)
    assert answers_of(tmp_path / "both") == answers_of(alone)


def test_a_bad_number_is_looked_for_by_all_that_share_a_base(launch, tmp_path):  # noqa: F811
    script = tmp_path / "bad_in_one.py"
    script.write_text(BAD_IN_ONE)
    result = launch(script, output_dir=tmp_path / "run", **SETTINGS, **SHARED_BY_TWO)
    assert result.returncode != 0
    assert "a number of update 1 is not finite" in result.stderr
    record = json.loads((tmp_path / "run" / "bad_update.json").read_text(encoding="utf-8"))
    assert {batch["process"] for batch in record["micro_batches"]} == {0, 1}
    assert record["loss"] == pytest.approx(
        next(line["loss"] for line in read_metrics(tmp_path / "run") if line["split"] == "eval"), rel=0.2
    )
