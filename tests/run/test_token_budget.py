"""The token budget of a run: named, left to the free memory, or as at the start of the run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import read_metrics
from kills import StoppedError, assert_ended_alike

from finetune.__main__ import main
from finetune.config import Config, DataConfig, TrainConfig
from finetune.run import token_budget
from finetune.run.tracker import Tracker
from finetune.runtime.memory import Room
from finetune.training.memory_model import Prediction

AUTO = {"train__max_tokens_per_micro_batch": "auto"}
SMALL = {"data__max_length": 64, "lora__lora_dropout": 0.2, "checkpoint__every_steps": 1}
MARGIN_GIB = 0.25
# An update takes a MiB a token.
MIB_A_TOKEN = Prediction(
    process=0,
    base=0,
    adapter=0,
    optimizer=0,
    kept_per_token=2**20,
    per_layer_and_token=0,
    weight=0,
    head_per_token=0,
    head_most=0,
)


@pytest.fixture
def memory_for(monkeypatch) -> Callable[[int], None]:
    """Pretend that this machine has memory for the updates of so many tokens, and the margin."""

    def pretend(tokens: int) -> None:
        room = Room(tokens / 1024 + MARGIN_GIB)
        monkeypatch.setattr(token_budget, "room_on", lambda device: room)
        monkeypatch.setattr(token_budget, "predict", lambda *arguments: MIB_A_TOKEN)

    return pretend


def record_of(run_dir: Path) -> Any:
    return json.loads((run_dir / "environment.json").read_text())["token_budget"]


def choices_of(run_dir: Path) -> list[tuple[str, str, str]]:
    """What the table of requested and actual said of the token budget: requested, actual, why."""
    choices = json.loads((run_dir / "environment.json").read_text())["settings"]
    values = [tuple(choice.values()) for choice in choices if choice["name"] == "tokens per micro-batch"]
    return [value[1:] for value in values]


@pytest.fixture
def stop_after(run_train) -> Callable[..., Path]:
    """Run train.py, stopped without a warning after so many updates."""

    def run(step: int, **settings: Any) -> Path:
        advance = Tracker.advance

        def stopping(self: Tracker, at: int) -> None:
            if at > step:
                raise StoppedError
            advance(self, at)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tracker, "advance", stopping)
            with pytest.raises(StoppedError):
                run_train(**settings)
        return Path(settings["output_dir"])

    return run


# On a whole run


def test_auto_takes_what_the_machine_holds_records_it_and_says_so(run_train, tmp_path, capsys):
    """By the real prediction and the real memory, which is plenty for a tiny model."""
    run_dir = run_train(output_dir=tmp_path / "run", train__max_steps=1, **AUTO)
    said = capsys.readouterr().out
    assert record_of(run_dir) == 2 * 4 * 128  # all tokens that an update of 8 examples can have
    assert "1,024 at most, packed without padding" in said
    ((requested, actual, reason),) = choices_of(run_dir)
    assert requested == actual == "1,024"
    assert re.fullmatch(r"auto: \d+\.\d GiB, less a margin of \d+\.\d", reason)


def test_a_resumed_run_computes_the_same_bits_though_the_free_memory_differs(
    run_train, stop_after, memory_for, tmp_path
):
    memory_for(100)
    whole = run_train(output_dir=tmp_path / "whole", **SMALL, **AUTO)
    run_dir = stop_after(2, output_dir=tmp_path / "run", **SMALL, **AUTO)
    memory_for(5000)
    run_train(output_dir=run_dir, **SMALL, **AUTO)
    assert choices_of(run_dir) == [("100", "100", "as at the start of this run")]
    assert record_of(run_dir) == 100
    assert_ended_alike(run_dir, whole)
    # With the budget of the second machine, the run would have had other bits.
    other = run_train(output_dir=tmp_path / "other", **SMALL, **AUTO)
    assert record_of(other) == 8 * 64
    losses = [[entry["loss"] for entry in read_metrics(run)] for run in (whole, other)]
    assert losses[0] != losses[1]


def test_a_number_in_the_configuration_replaces_the_recorded_one_and_says_so(
    run_train, stop_after, memory_for, tmp_path, capsys
):
    memory_for(300)
    run_dir = stop_after(1, output_dir=tmp_path / "run", **SMALL, **AUTO)
    number = {"train__max_tokens_per_micro_batch": 70}
    stop_after(2, output_dir=run_dir, **SMALL, **number)
    assert choices_of(run_dir) == [("70", "70", "in the configuration; until now the run had 300")]
    assert record_of(run_dir) == 70
    # The first command, given again, does not return to what may have been too much.
    run_train(output_dir=run_dir, **SMALL, **AUTO)
    assert record_of(run_dir) == 70
    assert "70 at most" in capsys.readouterr().out


def test_replay_lays_out_a_bad_update_as_the_run_did(run_train, memory_for, tmp_path, capfd):
    memory_for(100)
    diverging = {"optim__name": "sgd", "optim__learning_rate": 1e30, "optim__max_grad_norm": 0}
    run_dir = run_train(expect=1, output_dir=tmp_path / "run", **SMALL, **AUTO, **diverging)
    record = json.loads((run_dir / "bad_update.json").read_text())
    assert len(record["micro_batches"]) > 1
    memory_for(5000)
    assert main(["replay", str(run_dir)]) == 0
    assert "The same numbers as in the run." in capfd.readouterr().out


def test_too_little_memory_for_an_example_is_one_line_that_names_the_keys(
    run_train, memory_for, tmp_path, capfd
):
    memory_for(127)
    run_dir = run_train(expect=2, output_dir=tmp_path / "run", **AUTO)
    said = capfd.readouterr().err
    assert said.startswith("error: 0.1 GiB fit at most 127 tokens, and an example may have 128: ")
    assert said.count("\n") == 1
    assert "data.max_length" in said
    assert "train.gradient_checkpointing" in said
    assert not run_dir.exists()
    run_train(expect=2, output_dir=tmp_path / "run", train__gradient_checkpointing=True, **AUTO)
    said = capfd.readouterr().err
    assert "data.max_length" in said
    assert "gradient_checkpointing" not in said


def test_a_run_on_a_cpu_that_does_not_ask_for_it_neither_measures_nor_shows_nor_records(
    run_train, stop_after, monkeypatch, tmp_path, capsys
):
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(token_budget, "room_on", refuse)
    monkeypatch.setattr(token_budget, "predict", refuse)
    run_dir = stop_after(1, output_dir=tmp_path / "run", **SMALL, train__max_tokens_per_micro_batch=100)
    assert record_of(run_dir) is None
    # Without a record, a resumed run goes by its configuration, as ever.
    run_train(output_dir=run_dir, **SMALL)
    said = capsys.readouterr().out
    assert choices_of(run_dir) == []
    assert record_of(run_dir) is None
    assert "100 at most" in said
    assert "128 at most" in said


# The choice


def choose(tmp_path: Path, device: str, packing: bool = True, **keys: Any) -> token_budget.TokenBudget:
    train = TrainConfig(micro_batch_size=2, gradient_accumulation_steps=4, **keys)
    config = Config(train=train, data=DataConfig(max_length=100), output_dir=str(tmp_path / "none"))
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=1)
    return token_budget.choose(config, accelerator, None, packing)


def test_on_a_card_it_is_automatic_where_the_configuration_says_nothing(memory_for, tmp_path):
    memory_for(333)
    on_card = choose(tmp_path, "cuda")
    assert (on_card.tokens, on_card.to_record) == (333, 333)
    assert [choice.actual for choice in on_card.choices] == ["333"]
    assert choose(tmp_path, "cpu") == token_budget.TokenBudget(200)
    for device in ("cuda", "cpu"):
        assert choose(tmp_path, device, max_tokens_per_micro_batch="auto") == on_card
        named = choose(tmp_path, device, max_tokens_per_micro_batch=150)
        assert named == token_budget.TokenBudget(150)


@pytest.mark.parametrize(("packing", "most"), [(True, 8 * 100), (False, 2 * 100)])
def test_it_is_no_larger_than_what_a_micro_batch_can_have(memory_for, tmp_path, packing, most):
    memory_for(4000)
    assert choose(tmp_path, "cuda", packing).tokens == most


def test_the_ranks_agree_on_the_smallest(memory_for, tmp_path, monkeypatch):
    memory_for(333)
    others = [-250, -700]
    monkeypatch.setattr(token_budget, "all_reduce_max", lambda _, number: max(number, *others))
    assert choose(tmp_path, "cuda").tokens == 250
    others.append(-99)
    with pytest.raises(ValueError, match="fit at most 99 tokens"):
        choose(tmp_path, "cuda")
