"""`verify` agrees if the fast paths compute what the reference paths do, and finds small mistakes in each."""

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import assert_one_line_error, config_arguments, enter_empty_folder, help_of, six_updates
from conftest import PACKED_BY
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.__main__ import main
from finetune.config import FastConfig
from finetune.data.collate import Boundaries
from finetune.model import loss
from finetune.model.fast_paths import choose_fast_paths
from finetune.ops import attention, operators
from finetune.ops.base_weights import BaseWeights
from finetune.ops.projection import Projection
from finetune.training.comparison import Outcome, compute_update

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="breaks what computes on a processor")

PRECISIONS = [("none", "no"), ("none", "bf16"), ("int8", "no"), ("int8", "bf16"), ("nf4", "bf16")]
NO_FAST_PATHS = [f"--fast.{f.name}=false" for f in fields(FastConfig) if f.default is True]
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
    enter_empty_folder(tmp_path / "here", monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")  # so that no cell is folded
    return config_arguments(tmp_path, six_updates(calm_model_dir, rows_file))


@pytest.fixture
def verify(arguments, capsys) -> Callable[..., tuple[int, str]]:
    """Run the command; returns its exit code and what it printed."""

    def run(*more: str) -> tuple[int, str]:
        code = main(["verify", *arguments, *more])
        printed = capsys.readouterr()
        assert printed.err == ""
        return code, printed.out

    return run


@pytest.fixture
def break_fast_paths(monkeypatch) -> Callable[[Break], None]:
    """Break them after they are chosen: it is not the trial in `choose_fast_paths` that has to find it."""

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
def test_the_fast_paths_agree_with_the_reference_paths_in_every_update(verify, quantization, precision):
    code, printed = verify("--updates", "4", *asked_for(quantization, precision))
    assert code == 0, printed
    updates = updates_of(printed)
    assert [row[0] for row in updates] == ["1", "2", "3", "4"]
    assert "do NOT" not in printed
    assert "one function for each input" in printed  # they are on, and have something to agree with
    assert "target tokens in chunks" in printed
    assert f"packed, {PACKED_BY}" in printed


def test_a_difference_of_nothing_but_rounding_is_shown_as_such(verify):
    _, printed = verify("--updates", "2")
    for _, reference, fast, loss_by, gradient_by, reference_off, _ in updates_of(printed):
        assert float(reference) == pytest.approx(float(fast), rel=1e-5)
        assert float(loss_by) < 1e-5
        assert 0 < float(gradient_by) < 1e-4
        assert reference_off == "0.0e+00, 0.0e+00"  # in fp32 it is the reference itself


@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
def test_without_a_fast_path_and_without_packing_both_sides_are_the_same_bits(
    verify, quantization, precision
):
    code, printed = verify(*NO_FAST_PATHS, "--train.packing=false", *asked_for(quantization, precision))
    assert code == 0
    assert [row[3:5] for row in updates_of(printed)] == 3 * [["0.0e+00", "0.0e+00"]]


@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
def test_packed_sequences_without_a_fast_path_agree(verify, quantization, precision):
    code, printed = verify(*NO_FAST_PATHS, *asked_for(quantization, precision))
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


# Mistakes of five percent, and one between the examples of a packed sequence


def scale_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Projection.begin

    def begin(*arguments):
        call = real(*arguments)
        return call._replace(factors=[1.05 * factor for factor in call.factors])

    monkeypatch.setattr(Projection, "begin", begin)


def scale_gradient_of_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of B: the products with u, which nothing else has in a backward pass."""
    real = Projection.gradients_of_b
    monkeypatch.setattr(
        Projection, "gradients_of_b", lambda self, dy, u, call: real(self, dy, 1.05 * u, call)
    )


def scale_gradient_of_a(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Projection.gradients_of_a
    monkeypatch.setattr(Projection, "gradients_of_a", lambda self, v, x, call: real(self, 1.05 * v, x, call))


def scale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BaseWeights.dequantize
    monkeypatch.setattr(BaseWeights, "dequantize", lambda *arguments: 1.05 * real(*arguments))


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
    change_attention(monkeypatch, lambda boundaries, scale: (boundaries, 1.05 * scale))


def leak_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_one_example(boundaries: Boundaries, scale: float) -> tuple[Boundaries, float]:
        return boundaries._replace(lengths=(sum(boundaries.lengths),)), scale

    change_attention(monkeypatch, as_one_example)


def change_attention(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Boundaries, float], tuple[Boundaries, float]]
) -> None:
    """Whatever computes it here, and both passes, so that one's gradient is the other's."""
    choose_implementation = attention._choose_implementation

    def choose_wrong(*tensors: Tensor) -> attention.Implementation:
        make = choose_implementation(*tensors)
        return lambda query, key, value, *others: make(query, key, value, *change(*others))

    monkeypatch.setattr(attention, "_choose_implementation", choose_wrong)


def turn_positions_the_wrong_way(monkeypatch: pytest.MonkeyPatch) -> None:
    real = operators.rotate
    monkeypatch.setattr(operators, "rotate", lambda x, cos, sin, _: real(x, cos, sin, 1))


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
        return Outcome(factor * outcome.loss, factor * outcome.gradient)

    monkeypatch.setattr("finetune.training.comparison.compute_update", compute)
    return verify(*asked_for("none", precision))[0] == 1


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
    assert_one_line_error(capsys, ["verify", *arguments, *more], said)


def test_help_names_the_options(capsys):
    said = help_of(capsys, "verify")
    for expected in ("python -m finetune verify", "--updates N", "--config FILE", "Exit code 1"):
        assert expected in said
