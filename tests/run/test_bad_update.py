"""A number that is not finite stops a run before it reaches the weights, and the update can be repeated."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import read_metrics
from safetensors.torch import load_file
from tiny import built, with_adapter

from finetune.__main__ import main
from finetune.data.plan import Layout, Plan
from finetune.data.templates.tokenize import IGNORE
from finetune.model.loss import TokenLoss, TokenSums, reference_token_sums
from finetune.ops.chunked_head import ChunkedTokenSums
from finetune.run.bad_update import examine_update

# Weights that a huge step makes so large that the next forward pass overflows.
DIVERGING = {"optim__name": "sgd", "optim__learning_rate": 1e30, "optim__max_grad_norm": 0}


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def stopped(request, run_train, capfd):
    """The folder of a run that diverges in its second update, and what was said."""
    run_dir = run_train(
        expect=1, **DIVERGING, train__packing=request.param, checkpoint__every_steps=1, lora__lora_dropout=0.2
    )
    return run_dir, capfd.readouterr()


def test_it_stops_the_run_before_anything_of_it_is_saved(stopped):
    run_dir, said = stopped
    assert said.err == "stopped: a number of update 2 is not finite\n"
    assert f"python -m finetune replay {run_dir}" in said.out
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]
    good, before = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run_dir / "checkpoints" / "step_000001", run_dir / "bad_update")
    )
    assert all(tensor.isfinite().all() and torch.equal(tensor, before[key]) for key, tensor in good.items())
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    assert [entry["step"] for entry in read_metrics(run_dir) if entry["split"] == "train"] == [1]
    assert not (run_dir / "adapter").exists()


def test_its_record_names_the_examples_their_text_and_the_loss_of_each_target(stopped, rows_file):
    run_dir, _ = stopped
    record = json.loads((run_dir / "bad_update.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    assert record["update"] == 2
    assert not math.isfinite(float(record["loss"]))
    examples = [example for batch in record["micro_batches"] for example in batch["examples"]]
    assert len({example["row_number"] for example in examples}) == len(examples) == 8
    for example in examples:
        row = rows[example["row_number"] - 1]
        assert row["instruction"] in example["text"]
        assert "".join(t["token"] for t in example["targets"]) == row["output"] + "<|im_end|>"
    targets = [target for example in examples for target in example["targets"]]
    assert len(targets) == record["num_target_tokens"]
    assert any(not math.isfinite(float(target["nll"])) for target in targets)
    assert any(batch["parameters_with_bad_gradient"] for batch in record["micro_batches"])


def test_replay_repeats_it_to_the_same_numbers(stopped, capfd):
    run_dir, _ = stopped
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(["replay", str(run_dir)]) == 0
    said = capfd.readouterr()
    assert "The same numbers as in the run." in said.out
    assert said.err == ""
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    record = json.loads((run_dir / "bad_update.json").read_text(encoding="utf-8"))
    record["micro_batches"][0]["examples"][0]["targets"][0]["nll"] = 1.5
    (run_dir / "bad_update.json").write_text(json.dumps(record), encoding="utf-8")
    assert main(["replay", str(run_dir)]) == 1
    assert "These are not the numbers" in capfd.readouterr().out


@pytest.mark.parametrize("head_in_chunks", [True, False])
def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(
    run_train, monkeypatch, capfd, head_in_chunks
):
    """A loss of which only the slope overflows: the square root's at zero."""

    class SteepSums:
        @staticmethod
        def apply(hidden, *others):
            return ChunkedTokenSums.apply(hidden, *others) + (hidden * 0).sum().sqrt()

    def with_a_steep_slope(logits, target_ids, is_from):
        sums = reference_token_sums(logits, target_ids, is_from)
        return TokenSums(sums.nll + (logits * 0).sum().sqrt(), *list(vars(sums).values())[1:])

    monkeypatch.setattr("finetune.model.loss.ChunkedTokenSums", SteepSums)
    monkeypatch.setattr("finetune.model.loss.reference_token_sums", with_a_steep_slope)
    run_dir = run_train(expect=1, fast__head=head_in_chunks)
    assert "a number of update 1 is not finite" in capfd.readouterr().err
    weights = load_file(run_dir / "bad_update" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (run_dir / "checkpoints").exists()


def test_weights_that_overflow_are_never_saved(run_train, capfd):
    """The last update's: no further loss would show them."""
    overflowing = {**DIVERGING, "optim__learning_rate": 1e37, "optim__weight_decay": 1e6}
    run_dir = run_train(expect=1, **overflowing, train__max_steps=1, data__eval_fraction=0)
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "adapter").exists()
    assert "a weight is not a finite number" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda run: (run / "bad_update.json").unlink(), "has no bad_update.json"),
        (lambda run: (run / "bad_update.json").write_text("{"), "cannot be read"),
        (
            lambda run: (run / "bad_update" / "state.json").write_text("{}"),
            "not an intact checkpoint: state.json",
        ),
        (
            lambda run: (run / "environment.json").write_text("[]"),
            "environment.json is not the record of a run",
        ),
    ],
)
def test_replay_refuses_in_one_line_what_it_cannot_repeat(run_train, capfd, break_it, said):
    run_dir = run_train(expect=1, **DIVERGING)
    capfd.readouterr()
    break_it(run_dir)
    assert main(["replay", str(run_dir)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_the_report_of_an_example_with_branches_is_the_same_in_every_layout():
    ids = [*range(1, 10), 12, 13, 14, 15]
    comb = {"input_ids": ids, "labels": [IGNORE] * 5 + ids[5:], "branches": [[9, 6], [11, 6]]}
    plain = {"input_ids": ids[:4], "labels": [IGNORE, *ids[1:4]], "branches": []}
    dataset = [{**comb, "row_number": 1}, {**plain, "row_number": 2}]
    token_loss, tokenizer = TokenLoss(with_adapter(built("qwen2"))), SimpleNamespace(decode=str)
    lengths, counts = np.array([13, 4]), np.array([8, 3])
    reports = []
    for packing in (True, False):
        layout = Layout(packing, micro_batch_size=4, max_tokens=60)
        plan = Plan(lengths, counts, layout, global_batch_size=2, num_epochs=1, seed=0)
        record = examine_update(Accelerator(cpu=True), token_loss, plan, 0, dataset, tokenizer)
        (batch,) = record["micro_batches"]
        reports.append(sorted(batch["examples"], key=lambda example: example["row_number"]))
    assert reports[0][0]["branches"] == [{"start": 9, "attach": 6}, {"start": 11, "attach": 6}]
    assert [target["position"] for target in reports[0][0]["targets"]] == list(range(5, 13))
    for packed, padded in zip(*reports, strict=True):
        nlls = [[target.pop("nll") for target in one["targets"]] for one in (packed, padded)]
        assert nlls[0] == pytest.approx(nlls[1], rel=1e-5)
        assert packed.pop("nll") == pytest.approx(padded.pop("nll"), rel=1e-5)
        assert packed == padded


def test_a_full_disk_does_not_hide_the_bad_number(run_train, monkeypatch, capfd):
    def full(*_: object) -> None:
        raise ValueError("no room for bad_update")

    monkeypatch.setattr("finetune.run.bad_update.write_checkpoint", full)
    run_dir = run_train(expect=1, **DIVERGING, checkpoint__every_steps=1)
    said = capfd.readouterr()
    assert "What was in update 2 could not be written: no room" in said.out
    assert said.err == "stopped: a number of update 2 is not finite\n"
    assert not (run_dir / "bad_update.json").exists()


def test_an_evaluation_that_is_not_finite_ends_the_run_without_an_adapter(run_train, monkeypatch, capfd):
    """The weights are finite, and so is the loss of what was trained on: one eval row is too much."""
    real = TokenLoss.token_stats
    monkeypatch.setattr(TokenLoss, "token_stats", lambda *arguments: real(*arguments) * float("inf"))
    run_dir = run_train(expect=1, eval__at_start=False)
    assert "stopped: the loss of the evaluation is not a finite number" in capfd.readouterr().err
    assert "Infinity" not in (run_dir / "metrics.jsonl").read_text()
    assert not (run_dir / "adapter").exists()
