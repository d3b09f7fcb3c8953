"""A run on several sources gives the loss of each, exactly; a run on one gives what it always gave."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVAL_METRICS, TRAIN_METRICS, read_metrics
from kills import (
    StoppedError,
    assert_ended_alike,
    assert_tensorboard_matches,
    checkpoint_names,
    wait_for_the_next_second,
)
from sources import NAMES, in_sources
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import sums_one_by_one
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune.run.checkpoint as checkpoint_module
from finetune.__main__ import main
from finetune.config_parsing import parse_config
from finetune.data.order import epoch_order
from finetune.data.splits import load_data
from finetune.run.folder import read_example_sums
from finetune.run.tracker import Tracker

BY_SOURCE = ("loss", "mean_token_accuracy", "num_target_tokens")
# Updates of 6, 6 and 4 of 16 examples, without dropout.
SETTINGS: dict[str, Any] = {
    "lora__lora_dropout": 0.0,
    "train__micro_batch_size": 2,
    "train__gradient_accumulation_steps": 3,
    "optim__name": "adamw",
    "optim__learning_rate": 1e-2,
}
# A log line over three updates where a checkpoint comes every two, so that it is written inside a window.
INTERRUPTED: dict[str, Any] = {
    **SETTINGS,
    "train__num_epochs": 4,
    "lora__lora_dropout": 0.1,
    "log__every_steps": 3,
    "checkpoint__every_steps": 2,
}


@pytest.fixture
def run_on_sources(run_train, rows_file) -> Any:
    """`run_train` on the rows of `rows_file`, as three sources."""
    return partial(run_train, data__path=in_sources(rows_file))


def lines_of(run_dir: Path, split: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir) if line["split"] == split]


def sources_in(line: dict[str, Any]) -> set[str]:
    return {key.partition("/")[2] for key in line if "/" in key}


def expected_metrics(sums: list[dict[str, Any]], sources: list[int]) -> dict[str, float]:
    """The metrics by source of examples whose sums and sources are given."""
    metrics: dict[str, float] = {}
    for source, name in enumerate(NAMES):
        own = [one for one, of in zip(sums, sources, strict=True) if of == source]
        if own:
            nll, correct, count = (sum(float(one[key]) for one in own) for key in ("nll", "correct", "count"))
            values = (nll / count, correct / count, count)
            metrics |= {f"{key}/{name}": value for key, value in zip(BY_SOURCE, values, strict=True)}
    return metrics


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("log_every", [1, 2])
def test_each_source_s_figures_are_those_of_its_own_tokens(
    run_on_sources, tiny_model_dir, packing, fast, log_every
):
    # The weights stay those of the base, so that each example has the same sums in every update.
    settings = {**SETTINGS, "optim__learning_rate": 1e-12, "train__packing": packing, "fast__head": fast}
    run_dir = run_on_sources(**settings, log__every_steps=log_every)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    data = load_data(parse_config(["--config", str(run_dir / "config.yaml")]), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()

    def alone(examples: Any) -> tuple[list[dict[str, Any]], list[int]]:
        with torch.no_grad():
            return [sums_one_by_one(model, [row]) for row in examples.dataset], examples.sources.tolist()

    sums, sources = alone(data.train)
    order = [(epoch, example) for epoch in range(2) for example in epoch_order(42, epoch, len(sums))]
    updates = [
        [example for of, example in order if of == epoch][start : start + 6]
        for epoch in range(2)
        for start in (0, 6, 12)
    ]
    lines = lines_of(run_dir, "train")
    assert [line["step"] for line in lines] == list(range(log_every, 7, log_every))
    for first, last in pairwise([0, *(line["step"] for line in lines)]):
        examples = [example for update in updates[first:last] for example in update]
        line = next(line for line in lines if line["step"] == last)
        by_source = {key: value for key, value in line.items() if "/" in key}
        expected = expected_metrics([sums[i] for i in examples], [sources[i] for i in examples])
        assert by_source == pytest.approx(expected, rel=1e-5)
        assert by_source.keys() == expected.keys()
        counts = [line[f"num_target_tokens/{name}"] for name in sources_in(line)]
        assert all(type(count) is int for count in counts)
        assert sum(counts) == line["num_target_tokens"]
    if log_every == 1:  # a source without a target has no figures
        assert any(sources_in(line) < set(NAMES) for line in lines)
    eval_sums, eval_sources = alone(data.eval)
    for line in lines_of(run_dir, "eval"):
        by_source = {key: value for key, value in line.items() if "/" in key}
        assert by_source == pytest.approx(expected_metrics(eval_sums, eval_sources), rel=1e-4)
    assert len(set(eval_sources)) > 1


def test_sources_leave_the_training_and_the_figures_of_all_tokens_as_they_are(
    run_train, run_on_sources, tmp_path
):
    one = run_train(output_dir=tmp_path / "one", **SETTINGS)
    several = run_on_sources(output_dir=tmp_path / "several", **SETTINGS)
    measured = {"useful_tokens_per_second", "mfu", "peak_memory_gib"}
    for line, other in zip(read_metrics(one), read_metrics(several), strict=True):
        kept = [key for key in line if key not in measured]
        assert {key: line[key] for key in kept} == {key: other[key] for key in kept}
    weights = "adapter/adapter_model.safetensors"
    assert (one / weights).read_bytes() == (several / weights).read_bytes()


def test_a_single_source_adds_no_key_and_no_column(run_train):
    run_dir = run_train(**SETTINGS)
    where = {"split", "step", "epoch"}
    for line in read_metrics(run_dir):
        assert set(line) == where | (TRAIN_METRICS if line["split"] == "train" else EVAL_METRICS)
    (header,) = {path.read_text().splitlines()[0] for path in (run_dir / "evaluations").iterdir()}
    assert header == "row_number,nll,entropy,correct,num_target_tokens"
    for name in checkpoint_names(run_dir):
        state = json.loads((run_dir / "checkpoints" / name / "state.json").read_text())
        assert "window_sums_by_source" not in state
    assert "by source" not in (run_dir / "report.html").read_text()
    assert "by source" not in (run_dir / "adapter" / "README.md").read_text()


# Resuming


@pytest.mark.parametrize("step", [5, 9])
def test_a_resumed_run_gives_the_same_figures_by_source(run_on_sources, tmp_path, step):
    whole = run_on_sources(output_dir=tmp_path / "whole", **INTERRUPTED)
    advance = Tracker.advance

    def stopping_advance(self: Tracker, at: int) -> None:
        if at == step:
            raise StoppedError
        advance(self, at)

    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "advance", stopping_advance)
        with pytest.raises(StoppedError):
            run_on_sources(output_dir=run_dir, **INTERRUPTED)
    (newest, *_) = sorted(checkpoint_names(run_dir), reverse=True)
    state = json.loads((run_dir / "checkpoints" / newest / "state.json").read_text())
    of_each = list(state["window_sums_by_source"].values())
    assert sum(count for *_, count in of_each) == state["window_sums"][3] > 0  # an open window
    wait_for_the_next_second(run_dir)
    run_on_sources(output_dir=run_dir, **INTERRUPTED)
    assert_ended_alike(run_dir, whole)
    assert_tensorboard_matches(run_dir)


def test_a_checkpoint_from_before_sources_were_told_apart_is_resumed(run_on_sources, tmp_path, monkeypatch):
    whole = run_on_sources(output_dir=tmp_path / "whole", **INTERRUPTED)
    write = checkpoint_module.write_checkpoint

    def write_as_before(folder: Path, state: Any, trained: Any) -> Path:
        state.window_sums_by_source = {}
        write(folder, state, trained)
        if state.step == 4:
            raise StoppedError
        return folder

    run_dir = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "write_checkpoint", write_as_before)
        with pytest.raises(StoppedError):
            run_on_sources(output_dir=run_dir, **INTERRUPTED)
    run_on_sources(output_dir=run_dir, **INTERRUPTED)
    ours, theirs = lines_of(run_dir, "train"), lines_of(whole, "train")
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    counts = [
        [sum(line[f"num_target_tokens/{name}"] for name in sources_in(line)) for line in lines]
        for lines in (ours, theirs)
    ]
    assert counts[0][1] < counts[1][1]  # updates 5 and 6, without 4
    assert (counts[0][0], counts[0][2:]) == (counts[1][0], counts[1][2:])


# What is shown


def test_tensorboard_has_a_curve_of_each_source(run_on_sources):
    run_dir = run_on_sources(**SETTINGS, log__every_steps=3)
    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    for split in ("train", "eval"):
        lines = lines_of(run_dir, split)
        for name in sorted(set.union(*map(sources_in, lines))):
            shown = [(event.step, event.value) for event in events.Scalars(f"{split}/loss/{name}")]
            key = f"loss/{name}"
            written = [(line["step"], line[key]) for line in lines if key in line]
            assert [step for step, _ in shown] == [step for step, _ in written]
            assert [value for _, value in shown] == pytest.approx([value for _, value in written], rel=1e-6)


def test_the_last_table_has_a_line_for_each_source_and_the_log_lines_do_not(run_on_sources, capsys):
    run_dir = run_on_sources(**SETTINGS, log__every_steps=3)
    said = capsys.readouterr().out
    first, *_, last = lines_of(run_dir, "eval")
    for name in sources_in(last):
        (row,) = [line for line in said.splitlines() if f"loss of {name}" in line]
        assert f"{first[f'loss/{name}']:.4f}" in row
        assert f"{last[f'loss/{name}']:.4f}" in row
    shown = [line for line in said.splitlines() if line.startswith(("train ", "eval "))]
    assert shown
    assert not any(name in line for line in shown for name in NAMES)


def test_report_card_comparison_and_evaluate_give_the_loss_of_each_source(
    run_on_sources, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run_dir = run_on_sources(output_dir=tmp_path / "slow", **SETTINGS)
    other = run_on_sources(output_dir=tmp_path / "fast", **{**SETTINGS, "optim__learning_rate": 0.03})
    first, *_, last = lines_of(run_dir, "eval")
    frame = read_example_sums(run_dir, last["step"])
    assert frame["source"].nunique() == len(sources_in(last)) > 1
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    assert main(["compare", str(run_dir), str(other)]) == 0
    comparison = " ".join(capsys.readouterr().out.split())
    theirs = lines_of(other, "eval")[-1]
    assert "Train loss by source" in page
    assert "Eval loss by source" in page
    for name in sources_in(last):
        own = frame[frame["source"] == name]
        assert own["nll"].sum() / own["num_target_tokens"].sum() == pytest.approx(last[f"loss/{name}"])
        row = page[page.index(f"<tr><td>{name}<small>") :].partition("</tr>")[0]
        (line,) = [line for line in card.splitlines() if line.startswith(f"| `{name}` |")]
        for entry in (first, last):
            assert f"{entry[f'loss/{name}']:.4f}" in row
            assert f"{entry[f'loss/{name}']:.4f}" in line
        change = theirs[f"loss/{name}"] - last[f"loss/{name}"]
        said = f"On {name} the loss differs by {change:+.3f}".replace("-", "\N{MINUS SIGN}")
        assert said in comparison
        assert said in Path("compare.html").read_text(encoding="utf-8")


# Eval sets


@pytest.mark.parametrize("has_main", [True, False])
def test_eval_sets_have_figures_of_their_own_beside_those_of_the_main_rows(
    run_train, rows_file, tmp_path, has_main
):
    lines = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)
    sets = {"first": lines[:3], "second.one": lines[3:8]}
    for name, part in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    run_dir = run_train(
        **SETTINGS,
        data__eval_fraction=0.2 if has_main else 0,
        eval__sets=json.dumps({name: str(tmp_path / f"{name}.jsonl") for name in sets}),
        checkpoint__keep_best=True,
        train__early_stopping_patience=3,
    )
    frame = read_example_sums(run_dir, 0)
    assert frame["source"].value_counts().to_dict() == (
        {"first": 3, "second.one": 5} | ({"rows": 4} if has_main else {})
    )
    main_rows = frame[frame["source"] == "rows"] if has_main else frame
    line = lines_of(run_dir, "eval")[0]
    for part, key in (
        (main_rows, "loss"),
        *((frame[frame["source"] == name], f"loss/{name}") for name in sets),
    ):
        assert line[key] == pytest.approx(part["nll"].sum() / part["num_target_tokens"].sum())
    assert line["num_target_tokens"] == main_rows["num_target_tokens"].sum()
    assert ("loss/rows" in line) == has_main
    assert not any("/" in key for line in lines_of(run_dir, "train") for key in line)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    tokens = f"{line['num_target_tokens']:,} target tokens"
    assert f"Over {len(main_rows)} eval examples with {tokens}" in page
    assert ("The rows of eval.sets are not among them" in page) == has_main
    assert f"| {len(main_rows)} eval examples, {tokens} |" in card
    assert "| eval rows | `first.jsonl`, `second.one.jsonl` |" in card
    assert str(tmp_path) not in card


def test_the_best_checkpoint_is_that_of_the_main_rows(run_train, rows_file, tmp_path):
    """Trained on what it says, the set's loss falls while that of rows with other answers rises."""
    lines = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({**row, "output": "§ " * 9}) + "\n" for row in lines))
    run_dir = run_train(
        **{**SETTINGS, "optim__learning_rate": 0.05, "train__num_epochs": 4},
        data__eval_fraction=0,
        data__eval_path=str(other),
        eval__sets=json.dumps({"same": str(rows_file)}),
        checkpoint__keep_best=True,
    )
    evaluations = [line for line in lines_of(run_dir, "eval") if line["step"] > 0]
    best = min(evaluations, key=lambda line: line["loss"])
    assert best["step"] != min(evaluations, key=lambda line: line["loss/same"])["step"]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["adapter_step"] == best["step"]
