"""`verify` agrees where the fast paths compute what the plain ones do, and sees a small mistake in each."""

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics
from transformers import AutoModelForCausalLM

import finetune.commands.verify
from finetune.__main__ import main
from finetune.commands.verify import compute_update
from finetune.config import FastConfig
from finetune.config_parsing import parse_config
from finetune.data.plan import make_plan
from finetune.model import loss
from finetune.model.fast_paths import choose_fast_paths, use_reference_paths
from finetune.ops import elementwise, kernels, lora, quantized
from finetune.training.setup import load_parts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="breaks what computes on a processor")

PRECISIONS = [("none", "no"), ("none", "bf16"), ("int8", "no"), ("int8", "bf16"), ("nf4", "bf16")]
ALL_PLAIN = [f"--fast.{f.name}=false" for f in fields(FastConfig) if f.default is True]
Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def calm_model_dir(tmp_path_factory, tiny_model_dir) -> Path:
    """The tiny model with weights half as large: in 16 bits it rounds off 1 % of a gradient, not 4 %."""
    folder = tmp_path_factory.mktemp("calm") / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for parameter in model.parameters():
        parameter.data.mul_(0.5 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path, calm_model_dir, rows_file, monkeypatch) -> list[str]:
    """The configuration of 16 rows in six updates of the model, for a command in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "200")  # so that no cell is folded
    (tmp_path / "empty.yaml").write_text("{}\n", encoding="utf-8")
    keys = {
        "model.name_or_path": calm_model_dir,
        "model.quantization": "none",
        "data.path": rows_file,
        "data.max_length": 128,
        "train.num_epochs": 2,
        "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 3,
        "train.mixed_precision": "no",
        "optim.name": "adamw",
    }
    return ["--config", str(tmp_path / "empty.yaml"), *(f"--{key}={value}" for key, value in keys.items())]


@pytest.fixture
def verify(arguments, capsys) -> Callable[..., tuple[int, str]]:
    """Run the command; gives its exit code and what it printed."""

    def run(*more: str) -> tuple[int, str]:
        code = main(["verify", *arguments, *more])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return run


@pytest.fixture
def break_fast_paths(monkeypatch) -> Callable[[Break], None]:
    """Break them once they are chosen: the trial of `choose_fast_paths` is not what is to find it."""

    def set_break(break_it: Break) -> None:
        def choose_and_break(*arguments: Any) -> Any:
            chosen = choose_fast_paths(*arguments)
            break_it(monkeypatch)
            return chosen

        monkeypatch.setattr("finetune.commands.verify.choose_fast_paths", choose_and_break)

    return set_break


def asked_for(quantization: str, precision: str) -> list[str]:
    return [f"--model.quantization={quantization}", f"--train.mixed_precision={precision}"]


def updates_of(printed: str) -> list[list[str]]:
    """The cells of the table's rows that begin with the number of an update."""
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if re.match(r"│ \d", line)]
    return [[cell.strip() for cell in row] for row in rows]


# Where both compute the same


@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
def test_the_fast_paths_agree_with_the_plain_ones_in_every_update(verify, quantization, precision):
    code, printed = verify("--updates", "4", *asked_for(quantization, precision))
    assert code == 0, printed
    updates = updates_of(printed)
    assert [row[0] for row in updates] == ["1", "2", "3", "4"]
    assert "do NOT" not in printed
    assert "one function for each input" in printed  # they are on, and have something to agree with
    assert "target tokens in chunks" in printed
    assert "packed, compiled kernel" in printed


def test_a_difference_of_nothing_but_rounding_is_shown_as_such(verify):
    _, printed = verify("--updates", "2")
    for _, plain, fast, loss_by, gradient_by, plain_off, _ in updates_of(printed):
        assert float(plain) == pytest.approx(float(fast), rel=1e-5)
        assert float(loss_by) < 1e-5
        assert 0 < float(gradient_by) < 1e-4
        assert plain_off == "0.0e+00, 0.0e+00"  # in fp32 it is the reference itself


@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
def test_without_a_fast_path_and_without_packing_both_sides_are_the_same_bits(
    verify, quantization, precision
):
    code, printed = verify(*ALL_PLAIN, "--train.packing=false", *asked_for(quantization, precision))
    assert code == 0
    assert [row[3:5] for row in updates_of(printed)] == 3 * [["0.0e+00", "0.0e+00"]]


@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
def test_packed_rows_without_a_fast_path_agree(verify, quantization, precision):
    code, printed = verify(*ALL_PLAIN, *asked_for(quantization, precision))
    assert code == 0, printed
    assert "one function for each input" not in printed
    assert "target tokens in chunks" not in printed


def test_no_more_updates_are_compared_than_the_run_has(verify):
    code, printed = verify("--updates", "50", "--train.max_steps", "2")
    assert (code, len(updates_of(printed))) == (0, 2)


def test_it_writes_nothing(verify, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert verify("--output_dir", str(tmp_path / "run"), "--updates", "1")[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


# Mistakes of five percent, and one between the examples of a row


def scale_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lora._LoraLinears

    class Wrong:
        @staticmethod
        def apply(x, bases, scalings, *others):
            return real.apply(x, bases, [1.05 * scaling for scaling in scalings], *others)

    monkeypatch.setattr(lora, "_LoraLinears", Wrong)


def scale_gradient_of_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradients(monkeypatch, of_a=1, of_b=1.05)


def scale_gradients(monkeypatch: pytest.MonkeyPatch, of_a: float, of_b: float) -> None:
    class Wrong(lora._LoraLinears):
        @staticmethod
        def backward(ctx, *dys):
            results = super(Wrong, Wrong).backward(ctx, *dys)
            others, das, dbs = results[:5], results[5 : 5 + len(dys)], results[5 + len(dys) :]
            return *others, *(of_a * da for da in das), *(of_b * db for db in dbs)

    monkeypatch.setattr(lora, "_LoraLinears", Wrong)


def scale_gradient_of_a(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradients(monkeypatch, of_a=1.05, of_b=1)


def scale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantized.frozen_weight
    monkeypatch.setattr(lora, "frozen_weight", lambda *arguments: 1.05 * real(*arguments))


class WrongHead(loss.ChunkedTokenSums):
    @staticmethod
    def backward(ctx, grad_sums):
        gradient, *others = super(WrongHead, WrongHead).backward(ctx, grad_sums)
        return 1.05 * gradient, *others


def scale_gradient_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ChunkedTokenSums", WrongHead)


def scale_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loss.ChunkedTokenSums

    class Wrong:
        @staticmethod
        def apply(hidden, weight, *others):
            return real.apply(hidden, 1.05 * weight, *others)

    monkeypatch.setattr(loss, "ChunkedTokenSums", Wrong)


def scale_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    change_attention(monkeypatch, lambda lengths, prefix, scale: (lengths, prefix, 1.05 * scale))


def leak_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    change_attention(monkeypatch, lambda lengths, prefix, scale: ((sum(lengths),), prefix, scale))


def change_attention(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """Both passes of it, so that one's gradient is the other's."""
    for name in ("attention_forward", "attention_backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *arguments, real=real: real(*arguments[:-3], *change(*arguments[-3:]))
        )


def turn_positions_the_wrong_way(monkeypatch: pytest.MonkeyPatch) -> None:
    real = elementwise._rotated
    monkeypatch.setattr(elementwise, "_rotated", lambda x, cos, sin, _: real(x, cos, sin, 1))


MISTAKES = [
    scale_lora,
    scale_gradient_of_lora,
    scale_weights,
    scale_gradient_of_the_head,
    scale_the_head,
    scale_attention,
    leak_attention,
    turn_positions_the_wrong_way,
]


@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
@pytest.mark.parametrize("break_it", MISTAKES, ids=lambda break_it: break_it.__name__)
def test_a_small_mistake_of_a_fast_path_is_found(
    request, verify, break_fast_paths, break_it, quantization, precision
):
    break_fast_paths(break_it)
    code, printed = verify(*asked_for(quantization, precision))
    assert code == 1, printed
    assert "The fast paths do NOT" in printed
    assert len(updates_of(printed)) == 3


def test_a_mistake_that_only_a_trained_adapter_shows_is_found(verify, break_fast_paths):
    """While B is zero, as in a fresh adapter, A has no gradient."""
    break_fast_paths(scale_gradient_of_a)
    assert verify()[0] == 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_mistake_in_a_single_update_is_found(verify, monkeypatch, precision, step):
    assert bad_update_is_found(verify, monkeypatch, precision, step, factor=1.2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_number_that_is_not_finite_in_a_single_update_is_found(verify, monkeypatch, precision, step):
    assert bad_update_is_found(verify, monkeypatch, precision, step, factor=math.nan)


def bad_update_is_found(
    verify: Any, monkeypatch: pytest.MonkeyPatch, precision: str, step: int, factor: float
) -> bool:
    """Whether verify says so where one update of the fast paths has a loss and a gradient of another size."""
    seen = []

    def compute(parts, plan, number, *others):
        outcome = compute_update(parts, plan, number, *others)
        seen.append(number)
        if number != step or seen.count(step) > 1:  # the fast paths come first
            return outcome
        return finetune.commands.verify.Outcome(factor * outcome.loss, factor * outcome.gradient)

    monkeypatch.setattr("finetune.commands.verify.compute_update", compute)
    return verify(*asked_for("none", precision))[0] == 1


# What it computes


@pytest.mark.parametrize("packing", [True, False])
def test_an_update_has_the_loss_and_the_gradient_of_the_run_s(run_train, calm_model_dir, arguments, packing):
    settings = {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "packing": packing}
    run_dir = run_train(
        **{f"train__{key}": value for key, value in settings.items()},
        model__name_or_path=calm_model_dir,
        lora__lora_dropout=0,
        optim__name="sgd",
        optim__learning_rate=1e-30,  # the adapter stays as it came
        optim__max_grad_norm=1e-3,  # the norm that is logged is that before clipping
    )
    lines = [entry for entry in read_metrics(run_dir) if entry["split"] == "train"]
    config = parse_config([*arguments, f"--train.packing={packing}".lower(), "--lora.lora_dropout=0"])
    parts = load_parts(config)
    choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    plan = make_plan(config, parts.train_set, packing, 0, 1)
    assert len(lines) == plan.num_steps == 6
    for step, line in enumerate(lines):
        outcome = compute_update(parts, plan, step)
        assert outcome.loss == pytest.approx(line["loss"], rel=1e-6)
        assert float(outcome.gradient.norm()) == pytest.approx(line["grad_norm"], rel=1e-5)


def test_a_gradient_is_of_one_update_alone_and_none_is_left_behind(arguments):
    config = parse_config([*arguments, "--lora.lora_dropout=0"])
    parts = load_parts(config)
    plan = make_plan(config, parts.train_set, True, 0, 1)
    first = compute_update(parts, plan, 0)
    assert all(parameter.grad is None for parameter in parts.model.parameters())
    compute_update(parts, plan, 1)
    again = compute_update(parts, plan, 0)
    assert torch.equal(first.gradient, again.gradient)
    assert len(first.gradient) == sum(p.numel() for p in parts.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]"])
@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
def test_trying_the_paths_leaves_what_the_plain_ones_compute_as_it_was(
    arguments, quantization, precision, targets
):
    more = [*asked_for(quantization, precision), "--lora.lora_dropout=0", f"--lora.target_modules={targets}"]
    config = parse_config([*arguments, *more])
    parts = load_parts(config)
    plan = make_plan(config, parts.train_set, False, 0, 1)
    before = compute_update(parts, plan, 0)
    choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    use_reference_paths(parts.token_loss)
    after = compute_update(parts, plan, 0)
    assert after.loss == pytest.approx(before.loss, rel=1e-6)
    assert (after.gradient - before.gradient).norm() < 1e-5 * before.gradient.norm()


# Mistakes of the user


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--updates", "0"], "--updates must be at least 1, not 0"),
        (["--updates", "-3"], "--updates must be at least 1, not -3"),
        (["--updates", "few"], "--updates: invalid int value: 'few'"),
        (["--updates"], "--updates: expected one argument"),
        (["--update", "3"], "unknown key update"),
        (["--optim.lr", "1"], "unknown key optim.lr"),
        (["--fast.heads", "true"], "nearest is fast.head"),
        (["--data.path", "nowhere.csv"], "nowhere.csv"),
        (["--model.name_or_path", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line_and_2(arguments, capsys, more, said):
    assert main(["verify", *arguments, *more]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("error: ")
    assert said in printed.err
    assert list(Path.cwd().iterdir()) == []


def test_help_says_what_is_accepted(capsys):
    with pytest.raises(SystemExit) as end:
        main(["verify", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for expected in ("python -m finetune verify", "--updates N", "--config FILE", "Exit code 1"):
        assert expected in said
