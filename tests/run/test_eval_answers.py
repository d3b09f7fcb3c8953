"""Answers to eval rows at each evaluation, and the checkpoint that is the best by what they are worth."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import read_metrics
from kills import StoppedError, assert_ended_alike, checkpoint_names, digests
from planted import BEST, ENDS_AT, FOLLOWS_CHRF, LOWEST_LOSS, MOMENTS, PLANTED, plant
from sacrebleu.metrics.chrf import CHRF

from finetune.__main__ import main
from finetune.report.comparison import write_comparison

WHOLE = {**FOLLOWS_CHRF, "optim__learning_rate": 0.07, "log__every_steps": 3}


def answers_of(run_dir: Path, step: int) -> list[dict[str, Any]]:
    text = (run_dir / "evaluations" / f"answers_{step:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def eval_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(run_dir) if entry["split"] == "eval"]


@pytest.fixture
def planted(monkeypatch) -> None:
    for patch in plant():
        monkeypatch.setattr(*patch)


def test_the_best_by_a_metric_that_disagrees_with_the_loss_also_after_seven_kills(
    planted, run_on_same_rows, whole, tmp_path, capfd
):
    run_dir = tmp_path / "run"
    for _, make_patch in MOMENTS.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*make_patch())
            with pytest.raises(StoppedError):
                run_on_same_rows(output_dir=run_dir, **WHOLE)
        assert not (run_dir / "adapter").exists()
    capfd.readouterr()
    run_on_same_rows(output_dir=run_dir, **WHOLE)
    said = " ".join(capfd.readouterr().out.split())
    assert f"Ended early, after update {ENDS_AT} of 8: the last 3 evaluations had no higher chrf than" in said
    assert f"The adapter is the one after update {BEST}, which had the highest eval chrf." in said
    assert_ended_alike(run_dir, whole)
    assert digests(run_dir / "evaluations") == digests(whole / "evaluations")

    lines = {line["step"]: line for line in eval_lines(run_dir)}
    assert min(lines, key=lambda step: lines[step]["loss"]) == LOWEST_LOSS
    assert {step: line["chrf"] for step, line in lines.items()} == PLANTED
    assert checkpoint_names(run_dir) == [f"step_{step:06d}" for step in (BEST, ENDS_AT)]
    card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"The adapter is the one after update {BEST}, which had the highest eval chrf." in card
    figures = re.search(r"^\| loss, nats.*$", card, re.MULTILINE)
    assert figures is not None
    before, after = (float(cell.split()[0]) for cell in figures[0].split("|")[2:4])
    assert [before, after] == pytest.approx([lines[step]["loss"] for step in (0, BEST)], abs=1e-4)
    weights = [
        folder / "adapter_model.safetensors"
        for folder in (run_dir / "adapter", run_dir / "checkpoints" / f"step_{BEST:06d}")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_figures_are_those_of_the_answers_that_the_result_gives(run_train, rows_file, tmp_path):
    run_dir = run_train(
        optim__learning_rate=0.02, train__num_epochs=6, data__eval_fraction=0.4, eval__answers=6
    )
    first, *_, last = eval_lines(run_dir)
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    for line in (first, last):
        answers = answers_of(run_dir, line["step"])
        assert len(answers) == line["num_answers"] == 6
        assert all(one["reference"] == rows[one["row_number"] - 1]["output"] for one in answers)
        exact = [one["answer"] == one["reference"] for one in answers]
        chrf = [CHRF().sentence_score(one["answer"], [one["reference"]]).score for one in answers]
        assert line["exact_match"] == sum(exact) / 6
        assert line["chrf"] == pytest.approx(sum(chrf) / 6)
        assert line["ended"] == sum(one["ended"] for one in answers) / 6
        assert "tool_call_accuracy" not in line
    assert last["chrf"] > first["chrf"]
    limit = max(one["num_tokens"] for one in answers_of(run_dir, 0))  # the untrained model ends none
    figures = tmp_path / "figures.json"
    arguments = ["--generate", "6", "--max_new_tokens", str(limit), "--output", str(figures)]
    assert main(["evaluate", str(run_dir), *arguments]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))["answers"]
    for metric in ("exact_match", "chrf", "ended"):
        assert found[metric]["tuned"]["value"] == pytest.approx(last[metric])
        assert found[metric]["base"]["value"] == pytest.approx(first[metric])
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Answers compared with those of the rows" in page
    assert f"<b>{last['chrf']:.1f}</b>" in page
    card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| 6 answers, compared with those of the rows | before | after | change |" in card
    (row,) = [line for line in card.splitlines() if line.startswith("| chrF,")]
    assert [cell.split()[0] for cell in row.split("|")[2:4]] == [
        f"{line['chrf']:.1f}" for line in (first, last)
    ]
    assert "Only loss and token accuracy were measured" not in card
    without = run_train(output_dir=tmp_path / "without", data__eval_fraction=0.4, train__max_steps=1)
    rows = write_comparison([run_dir, without], tmp_path / "compare.html")
    shown = [row.cells["chrF"].text for row in rows]
    assert shown == [f"{last['chrf']:.1f}", ""]
    assert f"{last['exact_match']:.3f}" in (tmp_path / "compare.html").read_text(encoding="utf-8")


CALL = {"type": "function", "function": {"name": "exchange", "arguments": {"coin": "dime"}}}
TOOL = {"type": "function", "function": {"name": "exchange", "parameters": {"type": "object"}}}


def test_right_tool_calls_are_counted_where_rows_have_some(run_train, tmp_path):
    """The rows' calls are all the same, so that the model soon makes them."""
    path = tmp_path / "calls.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Change coin {number}."},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
            ],
            "tools": [TOOL],
        }
        for number in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_dir = run_train(
        data__path=path,
        data__chat_template="chatml",
        data__max_length=512,
        optim__name="adamw",
        optim__learning_rate=0.02,
        train__num_epochs=12,
        eval__every=12,
        eval__answers=50,
        checkpoint__keep_best=True,
        checkpoint__best_by="tool_call_accuracy",
    )
    lines = eval_lines(run_dir)
    assert lines[0]["tool_call_accuracy"] == 0
    assert lines[-1]["tool_call_accuracy"] == 1
    assert lines[-1]["num_answers"] == 4  # all eval rows
    assert "right tool calls" in (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval__answers": -1}, "eval.answers must be at least 0, not -1"),
        ({"eval__answers": 3, "data__eval_fraction": 0}, "eval.answers needs evaluations"),
        ({"checkpoint__best_by": "bleu"}, "checkpoint.best_by must be one of loss,"),
        ({"checkpoint__best_by": "chrf/math"}, "checkpoint.best_by must be one of loss,"),
        ({"checkpoint__best_by": "chrf"}, "eval.answers is 0"),
        ({"checkpoint__best_by": "loss/math"}, "have no loss/math, but loss, mean_token_accuracy"),
        (
            {"checkpoint__best_by": "tool_call_accuracy", "eval__answers": 2},
            "have no tool_call_accuracy, but",
        ),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_line(run_train, capfd, settings, message):
    run_train(expect=2, **settings)
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_documents_cannot_be_answered(run_train, tmp_path, capfd):
    path = tmp_path / "texts.jsonl"
    texts = [f"A coin is worth {number} cents." for number in range(10)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run_train(expect=2, data__path=path, eval__answers=2)
    assert "eval.answers: no eval row asks something" in capfd.readouterr().err


def test_a_run_does_not_resume_by_another_metric(run_train, capfd):
    settings = {"eval__answers": 2, "train__num_epochs": 1}
    run_train(**settings)
    run_train(expect=2, **settings, checkpoint__best_by="chrf")
    assert "checkpoint.best_by was loss, is chrf" in capfd.readouterr().err
