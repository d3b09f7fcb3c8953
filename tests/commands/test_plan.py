"""`plan` prints the parts of the memory, the peaks, the time and a budget that train.py takes."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from command_line import assert_one_line_error, config_arguments, enter_empty_folder, help_of

from finetune.__main__ import main
from finetune.config import FastConfig
from finetune.config_parsing import parse_config
from finetune.data.plan import Plan
from finetune.runtime.memory import Room
from finetune.training.memory_model import Measured, Prediction, measure_update

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a processor's memory and layers")

NO_FAST_PATHS = [f"--fast.{f.name}=false" for f in fields(FastConfig) if f.default is True]
IN_BF16 = ["--train.mixed_precision=bf16"]


@pytest.fixture
def arguments(tmp_path, tiny_model_dir, rows_file, monkeypatch) -> list[str]:
    """The configuration of 16 train and 4 eval rows of the tiny model, for a command in an empty folder."""
    enter_empty_folder(tmp_path / "here", monkeypatch)
    monkeypatch.setenv("COLUMNS", "120")  # so that no cell is folded
    keys = {
        "model.name_or_path": tiny_model_dir,
        "model.quantization": "none",
        "data.path": rows_file,
        "data.max_length": 128,
        "train.num_epochs": 3,
        "train.mixed_precision": "no",
        "optim.name": "adamw",
    }
    return config_arguments(tmp_path, keys)


@pytest.fixture
def plan(arguments, capsys) -> Callable[..., tuple[int, str]]:
    """Run the command; returns its exit code and what it printed."""

    def run(*more: str) -> tuple[int, str]:
        code = main(["plan", *arguments, *more])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return run


def test_it_prints_parts_peaks_time_and_a_budget(plan):
    code, printed = plan()
    assert code == 0
    for part in (
        "Python and libraries",
        "base",
        "adapter and its gradient",
        "optimizer",
        "for the backward pass",
    ):
        assert re.search(rf"│ .*{part} +│ \d+\.\d\d ", printed), part
    for peak in ("longest update", "longest eval batch"):
        assert re.search(rf"│ {peak} +│ \d+\.\d\d +│ \d+\.\d\d +│ \d+\.\d +│", printed), peak
    assert "predicted GiB" in printed
    assert "measured GiB" in printed
    assert re.search(r"^An epoch: about [\d.,]+ min, .*; epochs planned: 3$", printed, re.M)
    (budget,) = re.findall(r"^\d+\.\d GiB fit --train.max_tokens_per_micro_batch (\d+)$", printed, re.M)
    assert int(budget) % 64 == 0
    assert int(budget) >= 128


def test_the_budget_it_prints_is_taken_by_the_config(plan, arguments):
    _, printed = plan("--gib", "8")
    _, _, setting = printed.partition("fit ")
    key, _, value = setting.split("\n")[0].partition(" ")
    assert "8.0 GiB fit" in printed
    assert parse_config([*arguments, key, value]).train.max_tokens_per_micro_batch == int(value)


def test_more_memory_holds_more_tokens(plan):
    budgets = []
    for gib in ("8", "16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        budgets.append(int(plan("--gib", gib)[1].split()[-1]))
    assert budgets[1] > 1.5 * budgets[0]


def test_too_little_memory_is_1_and_says_what_to_change(plan):
    code, printed = plan("--gib", "0.001")
    assert code == 1
    last = printed.splitlines()[-1]
    assert "0.0 GiB fit at most 0 tokens, and an example may have 128" in last
    assert "data.max_length" in last
    assert "train.gradient_checkpointing" in last
    assert "fit --train" not in printed


def test_the_budget_it_prints_holds_an_example_of_any_length(plan, monkeypatch, arguments):
    """Budgets are rounded down to a multiple of 64, but not below max_length."""
    monkeypatch.setattr(Prediction, "largest_budget", lambda self, gib: 120)
    code, printed = plan("--data.max_length", "100")
    assert code == 0
    assert "--train.max_tokens_per_micro_batch 100\n" in printed


def test_by_default_it_fits_into_what_is_free_less_a_margin(plan, monkeypatch):
    asked = []
    monkeypatch.setattr("finetune.commands.plan.room_on", lambda device: Room(20.0))
    monkeypatch.setattr(Prediction, "largest_budget", lambda self, gib: asked.append(gib) or 640)
    _, printed = plan()
    assert "A run can have 20.0 GiB here, and leaves 1.0 of them as a margin\n" in printed
    assert "19.0 GiB fit --train.max_tokens_per_micro_batch 640\n" in printed
    assert set(asked) == {19.0}


@pytest.mark.parametrize(("fits", "planned"), [(200, 200), (10**6, 8 * 128), (5, 128)])
def test_with_an_automatic_budget_it_measures_what_a_run_would_take(plan, monkeypatch, fits, planned):
    budgets = []
    monkeypatch.setattr(Prediction, "largest_budget", lambda self, gib: fits)

    def noting(config: Any, parts: Any, plan: Plan) -> Measured:
        budgets.append(plan.layout.max_tokens)
        return measure_update(config, parts, plan)

    monkeypatch.setattr("finetune.commands.plan.measure_update", noting)
    code, _ = plan("--train.max_tokens_per_micro_batch=auto")
    assert budgets == [planned]
    assert code == (1 if fits < 128 else 0)


def test_on_a_card_it_prints_what_is_reserved_beside_what_is_allocated(plan, monkeypatch):
    def on_a_card(*arguments: Any) -> Measured:
        return replace(measure_update(*arguments), peak_gib=1.25, reserved_gib=1.75)

    monkeypatch.setattr("finetune.commands.plan.measure_update", on_a_card)
    _, printed = plan("--data.eval_fraction", "0")
    assert re.search(r"│ longest update +│ \d+\.\d\d +│ 1\.25 +│ 1\.75 +│", printed)
    assert re.search(r"predicted GiB ┃ allocated GiB ┃ reserved GiB ┃ seconds", printed)
    assert "other tensors" in printed


def test_without_eval_rows_it_shows_updates_alone(plan):
    code, printed = plan("--data.eval_fraction", "0")
    assert code == 0
    assert "longest update" in printed
    assert "longest eval batch" not in printed


@pytest.mark.parametrize("more", [["--model.quantization=int8"], ["--model.quantization=nf4"], NO_FAST_PATHS])
def test_it_plans_for_every_kind_of_base_and_for_the_reference_paths(plan, more):
    code, printed = plan(*IN_BF16, "--train.packing=false", *more)
    assert code == 0
    assert "longest eval batch" in printed


def numbers_of(printed: str, row: str) -> list[float]:
    """The numbers of a row of a table, from left to right."""
    (line,) = re.findall(rf"│ {row} +│(.*)", printed)
    return [float(number) for number in re.findall(r"\d+\.\d\d", line)]


def test_for_several_cards_it_shows_each_way_to_shard_without_rows(plan):
    code, printed = plan("--cards", "4", "--nodes", "2", "--data.path", "nowhere.csv", "--gib", "8")
    assert code == 0
    assert re.search(r"train.sharding +┃ none ┃ base ┃ base, over all nodes", printed)
    moments = ("while loading", "first update", "later updates", "evaluation", "between updates, saving")
    for row in ("base", "optimizer", "kept of .* tokens for the backward pass", *moments):
        assert len(numbers_of(printed, row)) == 3, row
    sent = numbers_of(printed, "the base, for a micro-batch")
    assert sent[0] == 0
    assert numbers_of(printed, "the adapter's gradient, for an update") == [0, 0, 0]  # too few to show
    assert printed.endswith("8.0 GiB a card fit train.sharding: none; base; base, over all nodes\n")


def test_more_cards_make_fewer_micro_batches_of_the_same_update(plan):
    size = ["--train.global_batch_size", "16", "--train.gradient_accumulation_steps", "null"]
    _, printed = plan("--cards", "2", *size, "--train.micro_batch_size", "2")
    assert "an update of 4 micro-batches" in printed


def test_cards_of_one_node_have_no_nodes_to_shard_over(plan):
    _, printed = plan("--cards", "2")
    assert re.search(r"train.sharding +┃ none ┃ base ┃\n", printed)


def test_too_little_memory_on_every_card_is_1(plan):
    code, printed = plan("--cards", "2", "--gib", "0.000001")
    assert code == 1
    assert printed.endswith("0.0 GiB a card fit train.sharding: neither\n")


def test_it_writes_nothing(plan, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert plan("--output_dir", str(tmp_path / "run"))[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--gib", "0"], "--gib must be above 0 and finite, not 0.0"),
        (["--gib", "-1"], "--gib must be above 0 and finite, not -1.0"),
        (["--gib", "nan"], "--gib must be above 0 and finite, not nan"),
        (["--gib", "inf"], "--gib must be above 0 and finite, not inf"),
        (["--gib", "much"], "--gib: invalid float value: 'much'"),
        (["--gib"], "--gib: expected one argument"),
        (["--gigabytes", "3"], "unknown key gigabytes"),
        (["--cards", "0"], "--cards must be at least 1, not 0"),
        (["--cards", "2", "--nodes", "-1"], "--nodes must be at least 1, not -1"),
        (["--nodes", "2"], "--nodes needs --cards, the number of cards of a node"),
        (["--optim.lr", "1"], "unknown key optim.lr"),
        (["--data.path", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_mistake_is_one_line_and_2(arguments, capsys, more, said):
    assert_one_line_error(capsys, ["plan", *arguments, *more], said)


def test_help_names_the_options(capsys):
    said = help_of(capsys, "plan")
    for expected in (
        "python -m finetune plan",
        "--gib",
        "--cards",
        "--nodes",
        "--config FILE",
        "token budget",
    ):
        assert expected in said
