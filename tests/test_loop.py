"""The loop as a whole, run in this process, against the same arithmetic written out a second time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVAL_METRICS, TRAIN_METRICS, read_metrics
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import train

PLACE = {"split", "step", "epoch"}
TRAIN_KEYS, EVAL_KEYS = PLACE | TRAIN_METRICS, PLACE | EVAL_METRICS
# What an update is made of; the rest of a train line says how fast it was and what it took.
UPDATE_KEYS = ("loss", "entropy", "mean_token_accuracy", "num_target_tokens", "learning_rate", "grad_norm")

# 16 examples are trained on: two updates of six and one of four an epoch.
SIX_AN_UPDATE = {"train__micro_batch_size": 2, "train__gradient_accumulation_steps": 3}
# High enough that a few updates move every number by far more than rounding does.
FAST = {"optim__name": "adamw", "optim__learning_rate": 1e-2}
NO_DROPOUT = {"lora__lora_dropout": 0.0}


def lines_of(run_dir: Path, split: str) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(run_dir) if entry["split"] == split]


def column(run_dir: Path, key: str, split: str = "train") -> list[Any]:
    return [entry[key] for entry in lines_of(run_dir, split)]


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def distance(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The Euclidean distance between two adapters."""
    assert before.keys() == after.keys()
    return sum(float((after[name] - before[name]).double().square().sum()) for name in before) ** 0.5


def assert_same_training(run_dir: Path, other_dir: Path, relative: float = 1e-4) -> None:
    """The same updates, the same evaluations and the same adapter, up to rounding."""
    assert len(read_metrics(run_dir)) == len(read_metrics(other_dir))
    for entry, other in zip(read_metrics(run_dir), read_metrics(other_dir), strict=True):
        assert (entry["split"], entry["step"]) == (other["split"], other["step"])
        for key in (key for key in UPDATE_KEYS if key in entry):
            assert entry[key] == pytest.approx(other[key], rel=relative), (key, entry, other)
    ours, theirs = adapter_of(run_dir / "adapter"), adapter_of(other_dir / "adapter")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-4)


# What a run leaves, and when it writes


def test_a_run_leaves_its_record_its_checkpoints_and_the_adapter(run_train):
    run_dir = run_train(**SIX_AN_UPDATE)
    assert {path.name for path in run_dir.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "answers.jsonl",
        "evaluations",
        "tensorboard",
        "checkpoints",
        "adapter",
        "report.html",
    }
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [
        "step_000004",
        "step_000006",
    ]
    for folder in (run_dir / "checkpoints").iterdir():
        assert {path.name for path in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "manifest.json",
            "optimizer.safetensors",
            "state.json",
        }
    assert {path.name for path in (run_dir / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_fingerprint.txt",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_config.yaml",
    }


def test_metrics_lines_carry_their_keys_and_numbers_only(run_train):
    run_dir = run_train(**SIX_AN_UPDATE)
    for split, keys in (("train", TRAIN_KEYS), ("eval", EVAL_KEYS)):
        for entry in lines_of(run_dir, split):
            assert entry.keys() == keys
            numbers = {key: value for key, value in entry.items() if key != "split"}
            assert all(type(value) in (int, float) and np.isfinite(value) for value in numbers.values())
            assert type(entry["step"]) is int
            assert type(entry["num_target_tokens"]) is int
    assert len(read_metrics(run_dir)) == len(lines_of(run_dir, "train")) + len(lines_of(run_dir, "eval"))


def test_epochs_are_counted_in_fractions_of_an_epoch(run_train):
    run_dir = run_train(**SIX_AN_UPDATE)
    assert column(run_dir, "step") == [1, 2, 3, 4, 5, 6]
    assert column(run_dir, "epoch") == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert column(run_dir, "step", "eval") == [0, 3, 6]
    assert column(run_dir, "epoch", "eval") == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "train_steps", "eval_steps"),
    [
        ({"log__every_steps": 4}, [4, 6], [0, 3, 6]),
        ({"log__every_steps": 100, "eval__at_start": False}, [6], [3, 6]),
        ({"log__every_steps": 3, "eval__every": 4}, [3, 6], [0, 4, 6]),
        ({"eval__every": 1, "train__max_steps": 2}, [1, 2], [0, 1, 2]),
        ({"train__max_steps": 4}, [1, 2, 3, 4], [0, 3, 4]),
        ({"train__max_steps": 100}, [1, 2, 3, 4, 5, 6], [0, 3, 6]),
    ],
)
def test_lines_are_written_when_due_and_always_after_the_last_update(
    run_train, settings, train_steps, eval_steps
):
    run_dir = run_train(**SIX_AN_UPDATE, **settings)
    assert column(run_dir, "step") == train_steps
    assert column(run_dir, "step", "eval") == eval_steps


def test_a_line_over_several_updates_weighs_every_target_token_alike(run_train, tmp_path):
    each = run_train(output_dir=tmp_path / "each", **SIX_AN_UPDATE, **FAST)
    fewer = run_train(output_dir=tmp_path / "fewer", **SIX_AN_UPDATE, **FAST, log__every_steps=4)
    counts = column(each, "num_target_tokens")
    assert len(set(counts)) > 2  # else a mean of means would be right too
    assert column(fewer, "num_target_tokens") == [sum(counts[:4]), sum(counts[4:])]
    for key in ("loss", "entropy", "mean_token_accuracy"):
        sums = np.array(column(each, key)) * counts
        expected = [sums[:4].sum() / sum(counts[:4]), sums[4:].sum() / sum(counts[4:])]
        assert column(fewer, key) == pytest.approx(expected, rel=1e-6)
    for key in ("grad_norm", "learning_rate"):  # of the last update, not of the window
        assert column(fewer, key) == [column(each, key)[3], column(each, key)[5]]


def test_every_evaluation_is_on_all_eval_examples(run_train):
    run_dir = run_train(**SIX_AN_UPDATE)
    assert len(set(column(run_dir, "num_target_tokens", "eval"))) == 1


def test_without_eval_rows_a_run_trains_and_evaluates_nothing(run_train):
    run_dir = run_train(**SIX_AN_UPDATE, data__eval_fraction=0)
    assert column(run_dir, "step") == [1, 2, 3, 4, 5, 6, 7, 8]  # 20 examples, six an update
    assert lines_of(run_dir, "eval") == []
    assert (run_dir / "adapter" / "adapter_model.safetensors").exists()


# The numbers, against a second way to them


class SecondWay:
    """The same training written out plainly: one example at a time, in fp32, with none of our modules."""

    def __init__(self, model_dir: Path, rows_file: Path, train_on: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.train_on = train_on
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
        split = Dataset.from_list(rows).train_test_split(test_size=0.2, seed=42)
        self.train_examples = [self.encode(row) for row in split["train"]]
        self.eval_examples = [self.encode(row) for row in split["test"]]
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        set_seed(42)
        lora = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(base, lora)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def encode(self, row: dict[str, str]) -> tuple[list[int], set[int]]:
        """Token ids, and the positions of the targets among them."""
        user = row["instruction"] + (f"\n Context:{row['input']}" if row["input"] else "")
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]

        def ids_of(**arguments: Any) -> list[int]:
            return self.tokenizer.apply_chat_template(**arguments, return_dict=False)

        ids = ids_of(conversation=turns)
        if self.train_on == "all":
            return ids, set(range(1, len(ids)))
        prompt = ids_of(conversation=turns[:1], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        end = max(position for position, token in enumerate(ids) if token == self.tokenizer.eos_token_id)
        return ids, set(range(len(prompt), end + 1))

    def sums(self, example: tuple[list[int], set[int]]) -> tuple[Tensor, float, int, int]:
        """nll, entropy, how many were right, how many there are: over the targets of one example."""
        ids, targets = example
        logits = self.model(input_ids=torch.tensor([ids])).logits[0]
        nll, entropy, correct = torch.tensor(0.0), 0.0, 0
        for position in sorted(targets):
            log_probs = torch.log_softmax(logits[position - 1], dim=0)
            nll = nll - log_probs[ids[position]]
            entropy -= float((log_probs.exp() * log_probs).sum().detach())
            correct += int(log_probs.argmax()) == ids[position]
        return nll, entropy, correct, len(targets)

    def evaluate(self) -> dict[str, float]:
        with torch.no_grad():
            nll, entropy, correct, count = map(sum, zip(*map(self.sums, self.eval_examples), strict=True))
        return {
            "loss": float(nll) / count,
            "entropy": entropy / count,
            "mean_token_accuracy": correct / count,
            "num_target_tokens": count,
        }

    def train(self, updates: list[tuple[int, int, int, float]], max_norm: float) -> list[dict[str, float]]:
        """Make the updates (epoch, first, last, learning rate): examples first to last of the epoch's
        order."""
        optimizer = torch.optim.AdamW(self.parameters, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5)
        lines = []
        for epoch, first, last, learning_rate in updates:
            order = np.random.default_rng([42, epoch]).permutation(len(self.train_examples))
            examples = [self.train_examples[i] for i in order[first:last]]
            count = sum(len(targets) for _, targets in examples)
            line = {"loss": 0.0, "entropy": 0.0, "mean_token_accuracy": 0.0, "num_target_tokens": count}
            for example in examples:
                nll, entropy, correct, _ = self.sums(example)
                (nll / count).backward()
                line["loss"] += float(nll) / count
                line["entropy"] += entropy / count
                line["mean_token_accuracy"] += correct / count
            line["grad_norm"] = sum(float(p.grad.square().sum()) for p in self.parameters) ** 0.5
            line["learning_rate"] = learning_rate
            for parameter in self.parameters:
                parameter.grad *= min(1.0, max_norm / line["grad_norm"])
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
            lines.append(line)
        return lines


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_updates_are_those_of_a_loop_written_out_plainly(run_train, tiny_model_dir, rows_file, train_on):
    run_dir = run_train(
        **SIX_AN_UPDATE,
        **NO_DROPOUT,
        data__train_on=train_on,
        train__max_steps=4,
        eval__every=2,
        optim__name="adamw",
        optim__learning_rate=3e-2,
        optim__betas="[0.8, 0.95]",
        optim__eps=1e-3,  # so large that a gradient near 0 is no coin toss
        optim__weight_decay=0.5,
        optim__warmup_ratio=0.25,
    )
    second = SecondWay(tiny_model_dir, rows_file, train_on)
    updates = [(0, 0, 6, 0.0), (0, 6, 12, 3e-2), (0, 12, 16, 2e-2), (1, 0, 6, 1e-2)]
    evaluations = [second.evaluate()]
    expected = second.train(updates, max_norm=1.0)
    evaluations.append(second.evaluate())
    assert len({line["mean_token_accuracy"] for line in expected}) > 1
    for got, wanted in zip(lines_of(run_dir, "train"), expected, strict=True):
        for key in UPDATE_KEYS:
            assert got[key] == pytest.approx(wanted[key], rel=1e-4), (got["step"], key)
    first, _, last = lines_of(run_dir, "eval")
    for got, wanted in zip((first, last), evaluations, strict=True):
        for key, value in wanted.items():
            assert got[key] == pytest.approx(value, rel=1e-4), (got["step"], key)
    ours = adapter_of(run_dir / "adapter")
    theirs = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in second.model.named_parameters()
        if parameter.requires_grad
    }
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


# What may not change an update


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_tokens", [128, 200, 1000])
def test_packing_and_token_budget_leave_the_updates_as_they_are(run_train, tmp_path, packing, max_tokens):
    # With AdamW's usual eps of 1e-8, weights whose gradient is itself no more than rounding move too.
    settings = {**SIX_AN_UPDATE, **FAST, **NO_DROPOUT, "optim__eps": 1e-5}
    plain = run_train(output_dir=tmp_path / "plain", **settings)
    other = run_train(
        output_dir=tmp_path / "other",
        **settings,
        train__packing=packing,
        train__max_tokens_per_micro_batch=max_tokens,
    )
    assert_same_training(plain, other)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(1, 6), (6, 1), (3, 2)])
def test_micro_batch_size_times_accumulation_is_all_that_counts(
    run_train, tmp_path, packing, micro_batch_size, accumulation
):
    settings = {**FAST, **NO_DROPOUT, "train__packing": packing}
    two_by_three = run_train(output_dir=tmp_path / "2x3", **settings, **SIX_AN_UPDATE)
    other = run_train(
        output_dir=tmp_path / "other",
        **settings,
        train__micro_batch_size=micro_batch_size,
        train__gradient_accumulation_steps=accumulation,
    )
    assert_same_training(two_by_three, other)


@pytest.mark.parametrize("packing", [True, False])
def test_gradient_checkpointing_leaves_the_updates_as_they_are(run_train, tmp_path, monkeypatch, packing):
    settings = {**SIX_AN_UPDATE, **FAST, "lora__lora_dropout": 0.1, "train__packing": packing}
    forward_passes = []
    load_model = train.load_model

    def load_and_count(*arguments: Any) -> Any:
        model = load_model(*arguments)
        layer = model.get_base_model().model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: forward_passes.append(torch.is_grad_enabled()))
        return model

    monkeypatch.setattr("train.load_model", load_and_count)
    plain = run_train(output_dir=tmp_path / "plain", **settings)
    once = forward_passes.count(True)
    forward_passes.clear()
    frugal = run_train(output_dir=tmp_path / "frugal", **settings, train__gradient_checkpointing=True)
    assert_same_training(plain, frugal, relative=1e-5)  # also the dropout noise is drawn again
    assert forward_passes.count(True) == 2 * once


@pytest.mark.parametrize("packing", [True, False])
def test_an_evaluation_on_an_int8_base_does_not_depend_on_the_layout(run_train, tmp_path, packing):
    settings = {
        **SIX_AN_UPDATE,
        "model__quantization": "int8",
        "train__max_steps": 1,
        "data__eval_fraction": 0.5,
    }
    one_by_one = run_train(
        output_dir=tmp_path / "one-by-one",
        **settings,
        train__max_tokens_per_micro_batch=128,
        train__packing=False,
    )
    wide = run_train(
        output_dir=tmp_path / "wide",
        **settings,
        train__max_tokens_per_micro_batch=1000,
        train__packing=packing,
    )
    for key in ("loss", "entropy"):
        assert column(one_by_one, key, "eval")[0] == pytest.approx(column(wide, key, "eval")[0], rel=1e-5)


# What must change it


def test_dropout_noise_depends_on_the_seed_and_the_step_alone(run_train, tmp_path):
    settings = {**SIX_AN_UPDATE, **FAST, "lora__lora_dropout": 0.3}
    runs = {
        name: run_train(output_dir=tmp_path / name, **{**settings, **changed})
        for name, changed in {
            "first": {},
            "again": {},
            "other seed": {"train__seed": 7},
            "no dropout": NO_DROPOUT,
        }.items()
    }
    losses = {name: column(run_dir, "loss") for name, run_dir in runs.items()}
    assert losses["first"] == losses["again"]
    assert adapter_of(runs["first"] / "adapter").keys()
    assert distance(adapter_of(runs["first"] / "adapter"), adapter_of(runs["again"] / "adapter")) == 0
    assert losses["first"][0] != losses["other seed"][0]
    # B is 0 before the first update, so dropout does not touch its loss.
    assert losses["first"][0] == pytest.approx(losses["no dropout"][0], rel=1e-6)
    assert losses["first"][1] != pytest.approx(losses["no dropout"][1], rel=1e-4)


def test_dropout_is_off_in_an_evaluation(run_train, tiny_model_dir, rows_file):
    run_dir = run_train(**SIX_AN_UPDATE, **FAST, lora__lora_dropout=0.5, train__max_steps=3)
    second = SecondWay(tiny_model_dir, rows_file, "completion")
    set_peft_model_state_dict(second.model, adapter_of(run_dir / "adapter"))
    expected = second.evaluate()
    assert column(run_dir, "loss", "eval")[-1] == pytest.approx(expected["loss"], rel=1e-4)


def test_each_update_draws_its_own_dropout_noise(run_train, tmp_path, monkeypatch):
    noises = []
    load_model = train.load_model

    def load_and_watch(*arguments: Any) -> Any:
        model = load_model(*arguments)
        # The noise that the first forward pass of an update is going to draw. The decoder makes it on every
        # path; where a path is tried, and in an evaluation, dropout is off.
        model.get_base_model().get_decoder().register_forward_pre_hook(
            lambda module, _: noises.append((module.training, torch.rand(1).item()))
        )
        return model

    monkeypatch.setattr("train.load_model", load_and_watch)
    run_train(
        lora__lora_dropout=0.3, train__micro_batch_size=6, train__gradient_accumulation_steps=1,
        train__max_tokens_per_micro_batch=1000,
    )  # fmt: skip
    drawn = [noise for training, noise in noises if training]
    assert len(drawn) == 6
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1.0, 0])
def test_each_update_moves_the_weights_by_the_clipped_gradient_times_the_scheduled_rate(
    run_train, max_grad_norm
):
    """SGD shows what reaches the optimizer: the weights move by learning rate x norm of the gradient."""
    run_dir = run_train(
        **SIX_AN_UPDATE,
        optim__name="sgd",
        optim__learning_rate=0.2,
        optim__schedule="cosine",
        optim__warmup_ratio=0.3,
        optim__max_grad_norm=max_grad_norm,
        checkpoint__every_steps=1,
        checkpoint__keep=10,
    )
    rates, norms = column(run_dir, "learning_rate"), column(run_dir, "grad_norm")
    # 2 of 6 updates warm up from 0; the cosine falls over the other 4.
    cosine = [0.5 * (1 + np.cos(np.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx([0.2 * factor for factor in (0, 0.5, *cosine)])
    assert min(norms) > 1.0  # before clipping
    adapters = [adapter_of(folder) for folder in sorted((run_dir / "checkpoints").iterdir())]
    assert all(not tensor.any() for name, tensor in adapters[0].items() if "lora_B" in name)  # the rate was 0
    for k in range(1, 6):
        clipped = min(norms[k], max_grad_norm) if max_grad_norm else norms[k]
        moved = distance(adapters[k - 1], adapters[k])
        assert moved == pytest.approx(rates[k] * clipped, rel=1e-2, abs=1e-6), k


def test_weight_decay_reaches_the_optimizer(run_train, tmp_path):
    still = run_train(output_dir=tmp_path / "still", **SIX_AN_UPDATE, **FAST)
    decayed = run_train(output_dir=tmp_path / "decayed", **SIX_AN_UPDATE, **FAST, optim__weight_decay=5.0)
    norms = [
        sum(
            float(tensor.square().sum())
            for name, tensor in adapter_of(run / "adapter").items()
            if "lora_A" in name
        )
        for run in (still, decayed)
    ]
    assert norms[1] < 0.9 * norms[0]


# Precision, quantization and the whole


def test_bf16_is_what_the_forward_pass_computes_in(run_train, tmp_path, monkeypatch):
    settings = {**SIX_AN_UPDATE, **FAST, **NO_DROPOUT}
    exact = run_train(output_dir=tmp_path / "fp32", **settings)
    dtypes = set()
    load_model = train.load_model

    def note_training(_: Any, __: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():  # an evaluation computes some examples in fp32, to measure its error
            dtypes.add(output.dtype)

    def load_and_watch(*arguments: Any) -> Any:
        model = load_model(*arguments)
        base = model.get_base_model().model
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        for layer in base.layers:
            for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
                module.register_forward_hook(note_training)
        return model

    monkeypatch.setattr("train.load_model", load_and_watch)
    rounded = run_train(output_dir=tmp_path / "bf16", **settings, train__mixed_precision="bf16")
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in adapter_of(rounded / "adapter").values()} == {torch.float32}
    for got, wanted in zip(column(rounded, "loss"), column(exact, "loss"), strict=True):
        assert got == pytest.approx(wanted, rel=2e-2)
        assert got != pytest.approx(wanted, rel=1e-6)


def test_the_default_optimizer_on_an_int8_base_learns_the_rows_and_leaves_an_adapter_that_loads(
    run_train, tiny_model_dir
):
    run_dir = run_train(
        model__quantization="int8",
        train__mixed_precision="bf16",
        train__num_epochs=8,
        optim__name="paged_adamw_8bit",
        optim__learning_rate=1e-2,
        lora__r=64,  # 64 x 64 weights and more: below 4096 bitsandbytes keeps the state in 32 bits
    )
    train_losses, eval_losses = column(run_dir, "loss"), column(run_dir, "loss", "eval")
    assert train_losses[0] > 7.5  # a random model
    assert train_losses[-1] < 2.5
    assert eval_losses[-1] < eval_losses[0] / 3
    assert column(run_dir, "mean_token_accuracy", "eval")[-1] > 0.5

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, run_dir / "adapter").eval()
    turns = [{"role": "user", "content": "What is 3 plus 3?"}, {"role": "assistant", "content": "It is 6."}]
    encoded = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        adapted = model(**encoded).logits
        with model.disable_adapter():
            plain = model(**encoded).logits
    assert float((adapted - plain).abs().max()) > 1.0


def test_on_a_quantized_base_the_adapter_is_all_that_trains(run_train, monkeypatch):
    seen = {}
    load_model = train.load_model

    def load_and_keep(*arguments: Any) -> Any:
        model = load_model(*arguments)
        seen["model"] = model
        seen["before"] = {
            name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)
        }
        return model

    monkeypatch.setattr("train.load_model", load_and_keep)
    run_train(**SIX_AN_UPDATE, **FAST, model__quantization="int8", train__mixed_precision="bf16")
    after = seen["model"].state_dict()
    changed = {name for name, value in seen["before"].items() if not torch.equal(value, after[name])}
    assert changed == {name for name in seen["before"] if "lora_" in name}


def test_eval_rows_that_are_trained_on_too_are_reported_and_the_loss_is_given_without_them(
    run_train, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("finetune.runtime.console.console._width", 250)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmno"), size=7)) for _ in range(70)]
    rows = [{"instruction": " ".join(words[5 * n : 5 * n + 5]), "output": "No."} for n in range(14)]
    path = tmp_path / "twice.jsonl"
    again = [{**row, "instruction": row["instruction"].upper()} for row in rows[:6]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + again), encoding="utf-8")
    run_dir = run_train(output_dir=tmp_path / "by row", data__path=path, train__max_steps=1)
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if "eval prompts are trained on too" in line]
    count = int(line.split("│")[2].split()[0])
    assert 0 < count < 4
    evaluations = [entry for entry in read_metrics(run_dir) if entry["split"] == "eval"]
    assert len(evaluations) == 2
    assert all(0 < entry["loss_without_leaks"] != entry["loss"] for entry in evaluations)
    assert text.count("  without leaks ") == 2

    run_dir = run_train(
        output_dir=tmp_path / "by instruction",
        data__path=path,
        train__max_steps=1,
        data__split_by="instruction",
    )
    assert "no eval prompt is trained on" in capsys.readouterr().out
    assert all("loss_without_leaks" not in entry for entry in read_metrics(run_dir))
