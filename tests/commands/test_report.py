"""The report says what the files of a run say, of any run, and is a page that needs nothing but itself."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from browser import look_at
from conftest import read_metrics

import train
from finetune.__main__ import main
from finetune.report.html import visible
from finetune.report.intervals import difference_interval, mean_interval

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
HOSTILE = "</p><script>alert(1)</script> <img src=x onerror=y> & \x1b[31m \u202eabc\u202c $x_1$ {{ 7 * 7 }}"


@pytest.fixture
def finished(run_train, tmp_path, made_once) -> Path:
    """A copy of a finished run of six updates, evaluated three times."""
    if "run" not in made_once:
        settings = {"train__micro_batch_size": 2, "train__gradient_accumulation_steps": 3}
        made_once["run"] = run_train(output_dir=tmp_path / "made", **settings)
    return Path(shutil.copytree(made_once["run"], tmp_path / "run"))


def report(run_dir: Path, *arguments: str) -> str:
    """The page that the command writes."""
    assert main(["report", str(run_dir), *arguments]) == 0
    return (run_dir / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What is read on the page, on one line."""
    parser = HTMLParser()
    parts: list[str] = []
    parser.handle_data = lambda data: parts.append(data)  # type: ignore[method-assign]
    parser.feed(page[page.index("<body>") :])
    return " ".join(" ".join(parts).split())


def edit_config(run_dir: Path, **settings: Any) -> None:
    """Keyword arguments are keys with `__` for the dot."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    config["train"]["mixed_precision"] = "no"  # which plain YAML reads as false
    for key, value in settings.items():
        section, name = key.split("__")
        config[section][name] = value
    text = yaml.safe_dump(config).replace("mixed_precision: 'no'", "mixed_precision: no")
    (run_dir / "config.yaml").write_text(text, encoding="utf-8")


def edit_metrics(run_dir: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Put `edit(line)` in the place of each line, or nothing where it is None."""
    lines = [edit(line) for line in read_metrics(run_dir)]
    text = "".join(json.dumps(line) + "\n" for line in lines if line is not None)
    (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")


def sums_of(run_dir: Path, step: int) -> pd.DataFrame:
    return pd.read_csv(run_dir / "evaluations" / f"step_{step:06d}.csv")


# What it says


def test_the_run_itself_leaves_the_page_that_the_command_writes(finished):
    left = (finished / "report.html").read_text(encoding="utf-8")
    # Of the folder's place alone the two differ.
    assert report(finished).replace("Run run", "Run made").replace("/run", "/made") == left.replace(
        "/run", "/made"
    )


def test_before_and_after_are_the_means_of_the_evaluations_with_their_intervals(finished):
    said = text_of(report(finished))
    before, after = sums_of(finished, 0), sums_of(finished, 6)
    counts = before["num_target_tokens"].to_numpy(float)
    for metric, column in (("loss", "nll"), ("token accuracy", "correct"), ("entropy", "entropy")):
        first, last = (frame[column].to_numpy(float) for frame in (before, after))
        figures = ""
        for values in (first, last):
            interval = mean_interval(values, counts)
            assert interval.value == pytest.approx(values.sum() / counts.sum())
            figures += rf" {interval.value:.4f} {interval.low:.3f} to {interval.high:.3f}"
        change = difference_interval(first, last, counts)
        assert change.value == pytest.approx((last.sum() - first.sum()) / counts.sum())
        figures += f" {change.value:+.4f} {change.low:+.3f} to {change.high:+.3f}"
        figures = re.escape(figures.replace("-", MINUS))
        assert re.search(rf"{metric} [a-z, ]+{figures}", said), figures
    loss = [(frame["nll"].sum() / counts.sum()) for frame in (before, after)]
    assert f"perplexity exp of the loss {np.exp(loss[0]):,.2f} " in said
    assert f"{TIMES} {np.exp(loss[1] - loss[0]):.3f} " in said
    assert "before training after update 6 change" in said
    went = f"{'fell' if loss[1] < loss[0] else 'rose'} by {abs(loss[1] - loss[0]):.3f}"
    assert f"The eval loss {went} nats per target token" in said


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ([-1.0, -1.0, -1.0, -1.0], "The eval loss fell by "),
        ([1.0, 1.0, 1.0, 1.0], "The eval loss rose by "),
        ([3.0, -2.0, 2.0, -4.0], "cannot be told from no change"),
    ],
)
def test_the_verdict_is_the_interval_s(finished, changed, verdict):
    sums = sums_of(finished, 0)
    counts = sums["num_target_tokens"]
    sums["nll"] += np.array(changed)
    sums.to_csv(finished / "evaluations" / "step_000006.csv", index=False)
    said = text_of(report(finished))
    assert verdict in said
    assert f"by {abs(sum(changed)) / counts.sum():.3f} nats" in said
    assert ("cannot be told" in said) == ("cannot be told" in verdict)


def test_data_settings_machine_and_command_are_the_run_s(finished):
    said = text_of(report(finished))
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    described = dict(environment["described"])
    assert described["rows"] == "20 read, 20 usable, 20 taken; instruction and output"
    for name, value in described.items():
        assert f"{name} {' '.join(value.split())}" in said
    assert "examples per update 2 x 3 x 1 process = 6" in said
    assert "leaks no eval prompt is trained on" in said or "eval prompts are trained on too" in said
    assert "updates ceil(16 / 6) = 3 an epoch x 2 = 6" in said
    assert "r 8, alpha 16, dropout 0.1, on all-linear" in said
    assert "learning rate 0.001, linear, no warm-up" in said
    assert f"torch {environment['packages']['torch']}" in said
    optimizer = next(choice for choice in environment["settings"] if choice["name"] == "optimizer")
    assert f"optimizer {optimizer['actual']}" in said
    again = f"python train.py --config {finished}/config.yaml --output_dir {finished}-again"
    assert again in said
    assert "Finished, after 6 updates." in said


def test_a_run_whose_budget_went_by_the_free_memory_is_repeated_with_that_budget(finished):
    path = finished / "environment.json"
    environment = json.loads(path.read_text(encoding="utf-8"))
    assert "--train.max_tokens_per_micro_batch" not in text_of(report(finished))
    path.write_text(json.dumps({**environment, "token_budget": 700}), encoding="utf-8")
    again = f"--output_dir {finished}-again --train.max_tokens_per_micro_batch 700"
    assert again in text_of(report(finished))
    del environment["token_budget"]  # a run of an older version
    path.write_text(json.dumps(environment), encoding="utf-8")
    assert "--train.max_tokens_per_micro_batch" not in text_of(report(finished))


def test_every_metric_that_is_logged_has_its_curve(finished):
    page = report(finished)
    captions = re.findall(r"<figcaption><b>(.*?)</b>", page)
    assert captions == [
        *("Loss", "Token accuracy", "Entropy", "Gradient norm"),
        *("Learning rate", "Speed", "MFU", "Memory"),
    ]
    assert page.count("<svg") == 8
    losses = [line["loss"] for line in read_metrics(finished) if line["split"] == "train"]
    assert f"Loss: line 1 from {losses[0]:.4g} to {losses[-1]:.4g}" in page


def test_answers_stand_side_by_side(finished):
    said = text_of(report(finished))
    first, last = map(json.loads, (finished / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    for before, after in zip(first["answers"], last["answers"], strict=True):
        texts = (before["messages"][-1]["content"], "before training", before["answer"])
        texts += ("after update 6", after["answer"])
        assert " ".join(" ".join(map(visible, texts)).split()) in said


SEED_SYSTEM_PROMPT = "You are a Professional financial assistant. Provide accurate financial advice"
SEED_ROWS = {"data__num_samples": 6000, "data__max_length": 512, "data__system_prompt": SEED_SYSTEM_PROMPT}
SEED_MODEL = {"model__name_or_path": "Qwen/Qwen2-0.5B-Instruct"}
SEED = {**SEED_ROWS, **SEED_MODEL, "data__path": "gbharti/finance-alpaca"}


@pytest.mark.parametrize(
    ("settings", "is_marked", "is_named"),
    [
        ({**SEED, "data__train_on": "all"}, True, True),
        ({**SEED, "data__train_on": "all", "data__path": "my/finance_alpaca.csv"}, True, True),
        ({**SEED, "data__train_on": "completion"}, False, True),
        ({**SEED, "data__train_on": "all", "data__num_samples": 5000}, False, False),
        ({**SEED, "data__train_on": "all", "data__path": "tatsu-lab/alpaca"}, False, False),
        ({**SEED, "data__train_on": "all", "model__name_or_path": "starter"}, False, False),
    ],
)
def test_published_figures_are_marked_where_they_can_be_compared(finished, settings, is_marked, is_named):
    edit_config(finished, **settings)
    page = report(finished)
    assert [f"published: {value}" in page for value in (1.788, 1.799, 0.612)] == [is_marked] * 3
    said = text_of(page)
    assert ("The notebook that this job comes from" in said) == is_named
    assert ("the two cannot be compared" in said) == (is_named and not is_marked)


# Of any run


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({"data__eval_fraction": 0}, ["Nothing was evaluated."], ["before training 0"]),
        (
            {"eval__at_start": False, "eval__every": 1000, "log__every_steps": 1000},
            ["There is one evaluation, and none to compare it with.", "after update 2"],
            ["change", TIMES],
        ),
        ({"eval__at_start": False, "eval__every": 1}, ["after update 1 after update 2 change"], []),
        ({"data__eval_fraction": 0.05}, ["There is no interval: "], []),
    ],
)
def test_runs_that_are_evaluated_otherwise_have_their_report(run_train, settings, said, unsaid):
    run_dir = run_train(train__max_steps=2, **settings)
    page = text_of((run_dir / "report.html").read_text(encoding="utf-8"))
    for text in said:
        assert text in page
    for text in unsaid:
        assert text not in page
    assert "nan" not in re.sub(r"finance|financial", "", page)


def test_a_run_that_ended_early_says_so(finished):
    edit_metrics(finished, lambda line: line if line["step"] <= 3 else None)
    said = text_of(report(finished))
    assert "Finished early, after update 3 of 6." in said
    assert "before training after update 3 change" in said


def test_the_lowest_loss_is_named_where_it_is_not_the_last(finished):
    edit_metrics(finished, lambda line: {**line, "loss": 0.5} if line["step"] == 3 else line)
    assert "The lowest eval loss of the run was 0.5000, after update 3." in text_of(report(finished))


def test_an_unfinished_run_has_a_report_of_what_there_is(finished):
    shutil.rmtree(finished / "adapter")
    edit_metrics(finished, lambda line: line if line["step"] <= 2 else None)
    with (finished / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"split": "train", "st')  # as it is being written
    said = text_of(report(finished))
    assert "Not finished: logged up to update 2 of 6." in said
    assert "There is one evaluation" in said
    assert f"To resume python train.py --config {finished}/config.yaml " in said
    (finished / "metrics.jsonl").unlink()
    (finished / "answers.jsonl").unlink()
    said = text_of(report(finished))
    assert "Nothing is logged yet." in said
    assert "logged up to update 0 of 6" in said


def test_a_run_that_diverged_has_a_report(run_train):
    diverging = {"optim__name": "sgd", "optim__learning_rate": 1e30, "optim__max_grad_norm": 0}
    run_dir = run_train(expect=1, **diverging)
    assert "Stopped: a loss or gradient was not finite." in text_of(report(run_dir))


def test_a_gradient_norm_that_was_not_finite_leaves_a_gap(finished):
    edit_metrics(finished, lambda line: {**line, "grad_norm": None} if line["step"] in (2, 3) else line)
    assert "Gradient norm: line 1 from" in report(finished)
    edit_metrics(finished, lambda line: {**line, "grad_norm": None} if "grad_norm" in line else line)
    page = report(finished)
    assert "Gradient norm" not in page
    assert page.count("<svg") == 7


def test_a_run_that_recorded_less_has_a_report(finished):
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    del environment["described"], environment["settings"]
    (finished / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    shutil.rmtree(finished / "evaluations")
    said = text_of(report(finished))
    assert "examples 16 train, 4 eval" in said
    assert "There is no interval" in said


# A page that needs nothing but itself


def test_texts_of_users_and_models_are_text(finished, tmp_path):
    run_dir = finished.rename(tmp_path / "<b>run\u202e")
    answers = [json.loads(line) for line in (run_dir / "answers.jsonl").read_text("utf-8").splitlines()]
    for line in answers:
        for entry in line["answers"]:
            entry["answer"] = entry["messages"][-1]["content"] = HOSTILE + "\ud800"
    (run_dir / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers), "utf-8")
    edit_config(
        run_dir, data__path=HOSTILE.replace("\x1b", ""), data__system_prompt=HOSTILE.replace("\x1b", "")
    )
    page = report(run_dir)
    tags = set(re.findall(r"<([a-z0-9]+)", page))
    assert not tags & {"script", "img", "link", "iframe", "object", "form", "base", "foreignobject", "image"}
    assert "<b>run" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2 * 2 * len(answers[0]["answers"])
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    assert "{{ 7 * 7 }}" in page
    assert "\\ud800" in page


def test_the_page_names_no_other_file(finished):
    page = report(finished)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"https?:|url\(|@import|<!DOCTYPE svg|<script", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    # Colours are the page's, for light and dark.
    drawing = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing)) <= {
        *("none", "var(--dim)", "var(--line)"),
        *(f"var(--c{number})" for number in range(1, 9)),
    }


def test_a_phone_shows_it_whole_and_fetches_nothing(finished, tmp_path):
    report(finished)
    seen = look_at(finished / "report.html", 400, tmp_path)
    assert seen["console"] == []
    assert seen["fetched"] == []
    assert seen["width"] <= seen["shown_width"]
    assert len(seen["charts"]) == 8
    assert min(seen["charts"]) > 100
    assert "The eval loss" in seen["text"]


# How it fails


def test_another_page_is_written_where_it_is_asked_for(finished, tmp_path):
    (finished / "report.html").unlink()
    assert main(["report", str(finished), "--page", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize(
    ("spoil", "arguments", "named"),
    [
        (lambda run: (run / "config.yaml").unlink(), [], "config.yaml is not there"),
        (
            lambda run: (run / "environment.json").write_text("[]"),
            [],
            "environment.json is not the record of a run",
        ),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), [], "metrics.jsonl cannot be read"),
        (lambda run: (run / "answers.jsonl").write_bytes(b"\xff\n"), [], "answers.jsonl cannot be read"),
        (lambda run: (run / "evaluations" / "step_000006.csv").write_text("a,b"), [], "is not the record"),
        (lambda run: None, ["--page", "metrics.jsonl"], "name a file that ends in .html"),
        (lambda run: None, ["--page"], "expected one argument"),
        (lambda run: None, ["--pgae", "x.html"], "--pgae"),
    ],
)
def test_a_mistake_is_one_line_and_2(finished, capsys, spoil, arguments, named):
    spoil(finished)
    before = (finished / "report.html").read_bytes()
    assert main(["report", str(finished), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert named in said
    assert (finished / "report.html").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("a bug")])
def test_a_report_that_fails_loses_no_run(run_train, tmp_path, monkeypatch, capsys, error):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("finetune.report.page.write_page", fail)
    with pytest.raises(AssertionError, match=r"report\.html"):  # the fixture's: train.main has returned 0
        run_train(output_dir=tmp_path / "run", train__max_steps=1)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The report")]
    assert len(said) == 1
    assert str(error.args[-1]) in said[0]
    assert f"python -m finetune report {tmp_path / 'run'}" in said[0]
    assert train.main(["--config", str(tmp_path / "run" / "config.yaml")]) == 0  # it is finished


def test_help_needs_no_run(capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", "--help"])
    assert end.value.code == 0
    assert "--page FILE" in capsys.readouterr().out
