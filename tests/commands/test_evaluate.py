"""`evaluate` gives the run's own numbers again, slices add up to them, and what is wrong is said first."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from conftest import read_metrics
from sources import in_sources

from finetune.__main__ import main
from finetune.run.folder import read_example_sums

PRECISIONS = [
    {},
    {"train__packing": False},
    {"model__quantization": "int8"},
    {"model__quantization": "int8", "train__mixed_precision": "bf16"},
    {"model__quantization": "int8", "train__mixed_precision": "bf16", "fast__int8_matmul": "int8"},
    {"train__mixed_precision": "bf16", "train__packing": False},
]
SETTINGS = {"optim__learning_rate": 0.02, "data__eval_fraction": 0.4}


@pytest.fixture
def run_dir(run_train) -> Path:
    return run_train(**SETTINGS)


@pytest.fixture
def figures(tmp_path, capsys, monkeypatch) -> Any:
    """Run the command; gives its figures and what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: Any) -> tuple[dict[str, Any], str]:
        file = tmp_path / "figures.json"
        code = main(["evaluate", *map(str, arguments), "--output", str(file)])
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, "")
        return json.loads(file.read_text(encoding="utf-8")), printed.out

    return run


@pytest.mark.parametrize("settings", PRECISIONS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_figures_are_those_that_the_run_wrote(run_train, figures, settings):
    run_dir = run_train(**SETTINGS, **settings)
    found, printed = figures(run_dir, "--generate", 0)
    first, *_, last = [line for line in read_metrics(run_dir) if line["split"] == "eval"]
    for name in ("loss", "entropy", "mean_token_accuracy"):
        assert found["all"][name]["tuned"]["value"] == pytest.approx(last[name], rel=1e-4)
        assert found["all"][name]["base"]["value"] == pytest.approx(first[name], rel=1e-4)
    assert found["all"]["num_target_tokens"] == last["num_target_tokens"]
    assert f"found a loss of {last['loss']:.4f}" in printed
    assert "NOT the rows" not in printed
    assert last["loss"] < first["loss"]


def test_intervals_hold_their_value_and_slices_add_up(run_dir, figures):
    found, printed = figures(run_dir, "--generate", 0)
    loss = found["all"]["loss"]
    for part in loss.values():
        assert part["low"] < part["value"] < part["high"]
    assert loss["change"]["value"] == pytest.approx(loss["tuned"]["value"] - loss["base"]["value"])
    by_name = {one["name"]: one for one in found["slices"]}
    inputs = [by_name["with input"], by_name["without input"]]
    lengths = [one for name, one in by_name.items() if name.endswith("tokens")]
    assert len(lengths) > 2
    for groups in (inputs, lengths):
        assert sum(one["num_examples"] for one in groups) == found["all"]["num_examples"]
        total = sum(one["loss"]["tuned"]["value"] * one["num_target_tokens"] for one in groups)
        assert total / found["all"]["num_target_tokens"] == pytest.approx(loss["tuned"]["value"])
    assert all(len(line) <= 80 for line in printed.splitlines() if line.startswith(("│", "┃", "┏")))
    assert "..." not in printed
    assert "…" not in printed


def test_a_slice_by_input_is_of_those_rows(run_dir, figures):
    found, _ = figures(run_dir, "--generate", 0)
    last = max(int(path.stem.removeprefix("step_")) for path in (run_dir / "evaluations").iterdir())
    sums = read_example_sums(run_dir, last)
    has_input = (sums["row_number"] - 1) % 3 == 0  # as the rows were made
    own = sums[has_input]
    (group,) = [one for one in found["slices"] if one["name"] == "with input"]
    assert group["loss"]["tuned"]["value"] == pytest.approx(
        own["nll"].sum() / own["num_target_tokens"].sum(), rel=1e-4
    )


def test_each_source_is_a_slice(run_train, rows_file, figures):
    run_dir = run_train(**SETTINGS, data__path=in_sources(rows_file))
    found, _ = figures(run_dir, "--generate", 0)
    last = [line for line in read_metrics(run_dir) if line["split"] == "eval"][-1]
    by_name = {one["name"]: one for one in found["slices"]}
    of_sources_alone = {key.partition("/")[2] for key in last if key.startswith("loss/")}
    assert len(of_sources_alone) > 1
    for name in of_sources_alone:
        assert by_name[name]["loss"]["tuned"]["value"] == pytest.approx(last[f"loss/{name}"], rel=1e-4)
        assert by_name[name]["num_target_tokens"] == last[f"num_target_tokens/{name}"]


def test_rows_of_eval_sets_have_values_of_a_column_too(run_train, rows_file, tmp_path, figures):
    eval_file = tmp_path / "math.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()][:6]
    topics = ["sums", "sums", "roots", "sums", "roots", "sums"]
    text = "".join(json.dumps(row | {"topic": topic}) + "\n" for row, topic in zip(rows, topics, strict=True))
    eval_file.write_text(text, encoding="utf-8")
    sets = {"math": str(eval_file)}
    run_dir = run_train(optim__learning_rate=0.02, data__eval_fraction=0, eval__sets=json.dumps(sets))
    found, _ = figures(run_dir, "--by", "topic", "--generate", 0)
    counts = {one["name"]: one["num_examples"] for one in found["slices"]}
    assert counts["topic = sums"] == 4
    assert counts["topic = roots"] == 2


def test_a_file_is_evaluated_whole_and_by_any_of_its_columns(run_dir, rows_file, tmp_path, figures):
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()][:9]
    for number, row in enumerate(rows):
        row["topic"] = ["fruit", "", 7][number % 3]
    rows.insert(2, {"instruction": "No answer", "input": "", "output": "", "topic": "fruit"})
    file = tmp_path / "others.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, printed = figures(run_dir, "--data", file, "--by", "topic", "--generate", 0)
    assert "1 rows without output are left out" in printed
    assert found["all"]["num_examples"] == 9
    topics = {one["name"]: one for one in found["slices"] if one["name"].startswith("topic")}
    assert {name: one["num_examples"] for name, one in topics.items()} == {
        "topic = fruit": 3,
        "topic = (empty)": 3,
        "topic = 7": 3,
    }
    fruit = tmp_path / "fruit.jsonl"
    fruit.write_text(
        "".join(json.dumps(row) + "\n" for row in rows if row["topic"] == "fruit"), encoding="utf-8"
    )
    alone, _ = figures(run_dir, "--data", fruit, "--generate", 0)
    assert alone["all"]["loss"]["tuned"] == pytest.approx(topics["topic = fruit"]["loss"]["tuned"], rel=1e-5)
    leaked = {one["name"]: one["num_examples"] for one in found["slices"] if "trained on" in one["name"]}
    assert sum(leaked.values()) == 9
    assert leaked["trained on too"] > 0


def test_eval_rows_of_their_own_have_columns_too(run_train, rows_file, figures):
    lines = rows_file.read_text(encoding="utf-8").splitlines()[:6]
    own, math = (rows_file.with_name(f"{name}.jsonl") for name in ("own", "math"))
    for file, number, topics in ((own, 0, ("fruit", "tea")), (math, 4, ("sums",))):
        rows = [
            json.loads(line) | {"topic": topic} for line in lines[number : number + 2] for topic in topics
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sets = json.dumps({"math": str(math)})
    run_dir = run_train(
        optim__learning_rate=0.02, data__eval_fraction=0, data__eval_path=str(own), eval__sets=sets
    )
    found, printed = figures(run_dir, "--by", "topic", "--generate", 0)
    topics = {one["name"]: one["num_examples"] for one in found["slices"] if one["name"].startswith("topic")}
    assert topics == {"topic = fruit": 2, "topic = tea": 2}
    assert str(own) in printed  # whole, however narrow the table below it
    assert rows_file.name not in printed


def test_other_rows_than_the_runs_are_said_to_be_others(run_dir, rows_file, figures):
    rows_file.write_text(rows_file.read_text(encoding="utf-8").replace("apples", "pears"), encoding="utf-8")
    _, printed = figures(run_dir, "--generate", 0)
    assert "These are NOT the rows of the run" in printed


def test_answers_of_both_models_are_compared_with_the_references(run_dir, figures):
    found, printed = figures(run_dir, "--generate", 3, "--max_new_tokens", 6)
    answers = found["answers"]
    assert [len(answers["rows"]), answers["max_new_tokens"]] == [3, 6]
    for row in answers["rows"]:
        number = row["row_number"] - 1
        assert row["reference"] == f"It is {number + number}." + " Really." * (number % 5)
        assert row["conversation"][-1]["content"].startswith(f"What is {number} plus {number}?")
        assert 1 <= row["tuned"]["num_tokens"] <= 6
    ended = [row["tuned"]["ended"] for row in answers["rows"]]
    assert answers["ended"]["tuned"]["value"] == pytest.approx(sum(ended) / 3)
    assert any(row["base"]["text"] != row["tuned"]["text"] for row in answers["rows"])
    assert answers["chrf"]["tuned"]["value"] > answers["chrf"]["base"]["value"]
    assert "chrF" in printed


def test_the_harness_gets_the_base_and_the_tuned_model(run_dir, figures, monkeypatch):
    calls = []

    class Wrapper:
        def __init__(self, pretrained: Any, tokenizer: Any) -> None:
            self.model = pretrained
            pretrained.eval()
            pretrained.tie_weights()

    def simple_evaluate(model: Any, tasks: list[str]) -> dict[str, Any]:
        inputs = model.model.get_input_embeddings().weight.new_tensor([[1, 2, 3]]).long()
        calls.append((tasks, float(model.model(input_ids=inputs).logits[0, -1, 5].detach())))
        return {"results": {"arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.01}}}

    harness, models, huggingface = (
        ModuleType(f"lm_eval{name}") for name in ("", ".models", ".models.huggingface")
    )
    harness.simple_evaluate, huggingface.HFLM = simple_evaluate, Wrapper  # type: ignore[attr-defined]
    for module in (harness, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found, printed = figures(run_dir, "--generate", 0, "--lm-eval", "arc,piqa")
    assert [tasks for tasks, _ in calls] == [["arc", "piqa"]] * 2
    assert calls[0][1] != calls[1][1]
    assert found["lm_eval"]["tuned"]["arc"]["acc,none"] == 0.25
    assert "0.2500 ± 0.0100" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lm-eval", "arc"], "pip install lm_eval"),
        (["--generate", "-1"], "--generate must be at least 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--by", "colour"], "has no column 'colour'; there are instruction, input, output"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--output", "no/such/folder/figures.json"], "name a file in a folder that exists"),
        (["--data.eval_fraction", "0"], "the run has no eval rows"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(run_dir, capsys, monkeypatch, arguments, message):
    def refuse(_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("finetune.commands.evaluate.load_trained", refuse)
    capsys.readouterr()
    assert main(["evaluate", str(run_dir), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_adapter_from_elsewhere_needs_rows(run_dir, tmp_path, rows_file, capsys, figures, tiny_model_dir):
    adapter = tmp_path / "adapter"
    shutil.copytree(run_dir / "adapter", adapter)
    (adapter / "training_config.yaml").unlink()
    capsys.readouterr()
    assert main(["evaluate", str(adapter)]) == 2
    assert "give --data FILE" in capsys.readouterr().err
    found, _ = figures(
        adapter,
        "--data",
        rows_file,
        "--generate",
        0,
        "--train.mixed_precision",
        "no",
        "--data.system_prompt",
        "null",
    )
    assert found["all"]["num_examples"] == 20


def test_help_comes_without_a_run(capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--help"])
    assert end.value.code == 0
    assert "--lm-eval TASKS" in capsys.readouterr().out


def test_one_example_has_figures_and_no_intervals(run_dir, rows_file, tmp_path, figures):
    file = tmp_path / "one.csv"
    pd.read_json(rows_file, lines=True).head(1).to_csv(file, index=False)
    found, _ = figures(run_dir, "--data", file, "--generate", 1, "--max_new_tokens", 2)
    assert found["all"]["loss"]["tuned"]["low"] is None
    assert math.isfinite(found["all"]["loss"]["tuned"]["value"])
