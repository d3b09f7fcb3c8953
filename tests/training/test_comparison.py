"""The updates that are compared are the run's own, and the reference paths compute what they did before."""

import pytest
import torch
from command_line import config_arguments, six_updates
from conftest import read_metrics

from finetune.config_parsing import parse_config
from finetune.data.plan import make_plan
from finetune.model.fast_paths import choose_fast_paths, use_reference_paths
from finetune.training.comparison import compute_update
from finetune.training.setup import load_parts

PRECISIONS = [("none", "no"), ("none", "bf16"), ("int8", "no"), ("int8", "bf16"), ("nf4", "bf16")]


@pytest.fixture
def arguments(tmp_path, tiny_model_dir, rows_file) -> list[str]:
    return config_arguments(tmp_path, six_updates(tiny_model_dir, rows_file))


@pytest.mark.parametrize("packing", [True, False])
def test_an_update_has_the_loss_and_the_gradient_norm_that_the_run_logs(run_train, arguments, packing):
    settings = {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "packing": packing}
    run_dir = run_train(
        **{f"train__{key}": value for key, value in settings.items()},
        lora__lora_dropout=0,
        optim__name="sgd",
        optim__learning_rate=1e-30,  # the adapter stays as it is
        optim__max_grad_norm=1e-3,  # the logged norm is that before clipping
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


def test_a_gradient_is_that_of_one_update_and_none_is_left_behind(arguments):
    config = parse_config([*arguments, "--lora.lora_dropout=0"])
    parts = load_parts(config)
    plan = make_plan(config, parts.train_set, True, 0, 1)
    first = compute_update(parts, plan, 0)
    assert first.gradient.any()
    assert not parts.adapter.gradient.any()
    compute_update(parts, plan, 1)
    again = compute_update(parts, plan, 0)
    assert torch.equal(first.gradient, again.gradient)
    assert len(first.gradient) == sum(p.numel() for p in parts.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]"])
@pytest.mark.parametrize(("quantization", "precision"), PRECISIONS)
def test_choosing_the_fast_paths_leaves_what_the_reference_paths_compute_unchanged(
    arguments, quantization, precision, targets
):
    more = [f"--model.quantization={quantization}", f"--train.mixed_precision={precision}"]
    more += ["--lora.lora_dropout=0", f"--lora.target_modules={targets}"]
    config = parse_config([*arguments, *more])
    parts = load_parts(config)
    plan = make_plan(config, parts.train_set, False, 0, 1)
    before = compute_update(parts, plan, 0)
    choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    use_reference_paths(parts.token_loss)
    after = compute_update(parts, plan, 0)
    assert after.loss == pytest.approx(before.loss, rel=1e-6)
    assert (after.gradient - before.gradient).norm() < 1e-5 * before.gradient.norm()
