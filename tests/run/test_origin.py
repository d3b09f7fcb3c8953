"""A run that begins from an adapter: of a run, of a checkpoint, or one that PEFT alone has made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import read_metrics, tiny_model
from kills import StoppedError, assert_ended_alike
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.__main__ import main
from finetune.config_parsing import parse_config
from finetune.report.model_card import model_card
from finetune.run.sweep import make_trial
from finetune.run.tracker import Tracker
from finetune.runtime.files import file_sha256

SHORT = {"train__max_steps": 2, "checkpoint__every_steps": 1, "optim__name": "adamw"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def made(tmp_path, tiny_model_dir) -> Callable[..., Path]:
    """An adapter with weights of its own that PEFT alone has saved, with these settings, on this base."""

    def make(base: Path | None = None, name: str = "given", **settings: Any) -> Path:
        torch.manual_seed(5)
        model = Qwen2ForCausalLM.from_pretrained(base or tiny_model_dir)
        defaults = {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
        }
        made = peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **settings}))
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        made.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def refused(run_train, tmp_path, capfd) -> Callable[..., str]:
    """Trains in vain from an adapter, and returns the one line that is said of it."""

    def train_in_vain(adapter: Path | str, **settings: Any) -> str:
        capfd.readouterr()
        folder = tmp_path / "refused"
        run_train(expect=2, output_dir=folder, model__adapter=adapter, **{**SHORT, **settings})
        assert not folder.exists()
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return train_in_vain


def eval_loss(run_dir: Path, step: int) -> float:
    return next(m["loss"] for m in read_metrics(run_dir) if m["split"] == "eval" and m["step"] == step)


def logits(base: Path, adapter: Path) -> torch.Tensor:
    """What plain PEFT computes."""
    model = peft.PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


# What PEFT can make of LoRA and we train as it does.
VARIANTS: dict[str, dict[str, Any]] = {
    "another rank and other targets": {"r": 16, "lora_alpha": 5, "target_modules": ["down_proj", "k_proj"]},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "ranks and scales by layer": {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "a pattern of names": {"target_modules": r".*\.1\.(self_attn\.q_proj|mlp\.up_proj)"},
    "a module left out": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "a bias in B": {"lora_bias": True},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows of tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_evaluated_as_it_was_trained_further_and_loads_with_plain_peft(
    variant, made, run_train, tmp_path, tiny_model_dir, monkeypatch
):
    monkeypatch.setattr("peft.utils.save_and_load.EMBEDDING_LAYER_NAMES", [])  # they would be saved whole
    adapter = made(**VARIANTS[variant])
    before = load_file(adapter / WEIGHTS)
    run = run_train(model__adapter=adapter, lora__lora_dropout=0.0, **SHORT)
    # The tiny learning rate leaves the weights where they were: the result is the adapter's.
    still = run_train(
        output_dir=tmp_path / "still", model__adapter=adapter, optim__learning_rate=1e-30, **SHORT
    )
    after = load_file(still / "adapter" / WEIGHTS)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(logits(tiny_model_dir, still / "adapter"), logits(tiny_model_dir, adapter))
    assert eval_loss(run, 0) == pytest.approx(eval_loss(still, 2), rel=1e-6)
    # PEFT's own layers in the model's own computation, one padded example after another.
    plain = {f"fast__{name}": False for name in ("attention", "head", "lora", "elementwise", "kernels")}
    reference = run_train(
        output_dir=tmp_path / "plain", model__adapter=adapter, train__packing=False, **plain, **SHORT
    )
    assert eval_loss(run, 0) == pytest.approx(eval_loss(reference, 0), rel=1e-5)
    trained = load_file(run / "adapter" / WEIGHTS)
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    assert eval_loss(run, 2) < eval_loss(run, 0)


def test_the_keys_of_lora_are_the_adapters_and_the_record_says_where_it_is_from(made, run_train, capfd):
    adapter = made(r=16, lora_alpha=5)
    run = run_train(model__adapter=adapter, lora__r=16, lora__lora_dropout=0.2, **SHORT)
    lora = parse_config(["--config", str(run / "config.yaml")]).lora
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (16, 5.0, ["q_proj", "v_proj"])
    assert lora.lora_dropout == 0.2
    record = json.loads((run / "environment.json").read_text())["model_adapter"]
    assert record["sha256"] == file_sha256(adapter / WEIGHTS)
    assert (record["path"], record["run"], record["step"]) == (str(adapter), None, None)
    said = " ".join(capfd.readouterr().out.split())
    assert "begins from" in said
    assert "trained on another base" not in said
    assert f"trained on from {adapter}" in (run / "report.html").read_text()
    card = (run / "adapter" / "README.md").read_text()
    assert "was trained on from the adapter `given`" in card
    assert str(adapter.parent) not in card


@pytest.mark.parametrize("place", ["", "adapter", "checkpoints/step_000001"])
def test_a_run_its_result_and_a_checkpoint_are_adapters(place, run_train, tmp_path):
    first = run_train(output_dir=tmp_path / "first", lora__r=4, **SHORT)
    run = run_train(output_dir=tmp_path / "second", model__adapter=first / place, **SHORT)
    record = json.loads((run / "environment.json").read_text())["model_adapter"]
    step = 1 if "checkpoints" in place else 2
    assert (record["run"], record["step"]) == ("first", step)
    if step == 2:
        assert eval_loss(run, 0) == pytest.approx(eval_loss(first, 2), rel=1e-6)
    assert "trained on from the adapter `first` after update" in model_card(
        run, parse_config(["--config", str(run / "config.yaml")])
    )


def test_an_unfinished_run_is_refused_with_a_checkpoint_to_name(run_train, refused, tmp_path):
    first = run_train(output_dir=tmp_path / "first", **SHORT)
    shutil.rmtree(first / "adapter")
    assert f"such as {first / 'checkpoints' / 'step_000002'}" in refused(first)
    shutil.rmtree(first / "checkpoints")
    assert "has saved nothing yet" in refused(first)


def test_an_altered_checkpoint_is_refused(run_train, refused, tmp_path):
    checkpoint = run_train(output_dir=tmp_path / "first", **SHORT) / "checkpoints" / "step_000001"
    weights = checkpoint / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert f"{WEIGHTS} was altered" in refused(checkpoint)


def test_a_key_that_is_neither_the_adapters_nor_the_default_is_refused(made, refused):
    adapter = made(r=16, lora_alpha=5)
    for key, value, words in (
        ("lora__r", 4, "lora.r is 4, and the adapter"),
        ("lora__lora_alpha", 7, "lora.lora_alpha is 7, and the adapter"),
        ("lora__target_modules", "[q_proj]", "lora.target_modules is q_proj, and the adapter"),
        ("lora__use_dora", True, "lora.use_dora is True, and the adapter"),
    ):
        said = refused(adapter, **{key: value})
        assert words in said
    assert "has q_proj, v_proj" in refused(adapter, lora__target_modules="[q_proj]")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bias": "all"}, 'has bias "all"'),
        ({"modules_to_save": ["lm_haed"]}, "the model has no lm_haed; it has lm_head"),
        ({"modules_to_save": ["lm_head"]}, "has no base_model.model.lm_head.weight"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication"),
        ({"target_parameters": ["experts"]}, "has target_parameters"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "has init_lora_weights pissa_niter_4, which changes the base",
        ),
        ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"task_type": "SEQ_CLS"}, "for SEQ_CLS"),
        ({"new_in_2031": 3}, "has new_in_2031, which this version of PEFT does not know"),
        ({"target_modules": None}, "names no target_modules"),
        ({"r": 0}, CONFIG),
        ({"r": "x"}, CONFIG),
        ({"target_modules": ["nothing"]}, "model.adapter"),
    ],
)
def test_what_peft_can_and_we_cannot_train_is_refused_by_name(made, refused, changed, words):
    adapter = made()
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(settings | changed))
    said = refused(adapter)
    assert words in said
    assert str(adapter) in said


def test_folders_that_hold_no_adapter_are_refused(made, refused, tmp_path):
    assert f"{tmp_path / 'nowhere'} is not a folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty' / CONFIG} is not there" in refused(tmp_path / "empty")
    adapter = made()
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    assert f"{adapter / WEIGHTS} is not there" in refused(adapter)
    torch.save(tensors, adapter / "adapter_model.bin")
    assert "adapter_model.bin is pickled, which could run code" in refused(adapter)
    (adapter / WEIGHTS).write_bytes(b"torn")
    assert f"{adapter / WEIGHTS} cannot be read" in refused(adapter)
    (adapter / CONFIG).write_text("[]")
    assert f"{adapter / CONFIG} is not the configuration of an adapter" in refused(adapter)
    (adapter / CONFIG).write_text("{ no")
    assert f"{adapter / CONFIG} cannot be read" in refused(adapter)


def test_a_configuration_that_leaves_out_the_rank_has_pefts_default(made, run_train):
    adapter = made(r=peft.LoraConfig().r)
    settings = json.loads((adapter / CONFIG).read_text())
    del settings["r"]
    (adapter / CONFIG).write_text(json.dumps(settings))
    run = run_train(model__adapter=adapter, **SHORT)
    record = json.loads((run / "environment.json").read_text())
    assert record["model_adapter"]["largest_rank"] == peft.LoraConfig().r


def test_weights_that_do_not_match_are_refused_by_name(made, refused, tiny_model_dir, tmp_path):
    adapter = made()
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def with_weights(**changed: torch.Tensor | None) -> str:
        kept = {key: tensor for key, tensor in {**tensors, **changed}.items() if tensor is not None}
        save_file(kept, adapter / WEIGHTS)
        return refused(adapter)

    assert f"has no {name}" in with_weights(**{name: None})
    assert f"has {name} of the shape [5, 64]" in with_weights(**{name: torch.zeros(5, 64)})
    extra = "base_model.model.model.embed_tokens.weight"
    assert f"has {extra}, which belongs to no" in with_weights(**{extra: torch.zeros(2, 2)})
    assert f"a number in {name} that is not finite" in with_weights(**{name: torch.full((4, 64), torch.nan)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_size": 32}, "of the shape [4, 32], and"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "layers.2."),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "layers.1."),
    ],
)
def test_an_adapter_on_a_base_of_another_shape_is_refused(
    made, refused, tiny_model_dir, tmp_path, changed, words
):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(other, **changed)).save_pretrained(other)
    assert words in refused(made(base=other))


def test_another_base_of_the_same_shape_is_said(made, run_train, tiny_model_dir, tmp_path, capfd):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tiny_model(Qwen2Config.from_pretrained(other).vocab_size, seed=1).save_pretrained(other)
    run = run_train(model__adapter=made(base=other), **SHORT)
    assert "trained on another base" in capfd.readouterr().out
    record = json.loads((run / "environment.json").read_text())["model_adapter"]
    assert record["other_base"] == str(other)
    # Of a run of ours the base is known by its weights, whatever it is called.
    moved = shutil.copytree(tiny_model_dir, tmp_path / "moved")
    again = {"output_dir": tmp_path / "again", "model__adapter": run, "model__name_or_path": moved, **SHORT}
    capfd.readouterr()
    run_train(**again)
    assert "trained on another base" not in capfd.readouterr().out


def test_a_stopped_run_resumes_without_the_adapter(made, run_train, tmp_path, monkeypatch):
    adapter = made(rank_pattern={"v_proj": 7})
    settings = {"model__adapter": adapter, **SHORT, "train__max_steps": 4}
    whole = run_train(output_dir=tmp_path / "whole", **settings)
    advance = Tracker.advance

    def stop(self: Tracker, step: int) -> None:
        if step == 3:
            raise StoppedError
        advance(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", stop)
        with pytest.raises(StoppedError):
            run_train(output_dir=tmp_path / "stopped", **settings)
    shutil.rmtree(adapter)
    stopped = tmp_path / "stopped"
    run_train(output_dir=stopped, **settings)
    assert_ended_alike(whole, stopped)
    assert json.loads((stopped / "environment.json").read_text())["model_adapter"]["path"] == str(adapter)


def test_before_its_first_checkpoint_a_run_begins_from_the_same_adapter_or_not_at_all(
    made, run_train, tmp_path, monkeypatch, capfd
):
    adapter = made()
    settings = {"model__adapter": adapter, **SHORT}

    def stop(self: Tracker, step: int) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "advance", stop)
        with pytest.raises(StoppedError):
            run_train(**settings)
    kept, tensors = (adapter / WEIGHTS).read_bytes(), load_file(adapter / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / WEIGHTS)
    run_train(expect=2, **settings)
    assert "is not the adapter any more that the run in" in capfd.readouterr().err
    (adapter / WEIGHTS).write_bytes(kept)
    run_train(**settings)


def test_other_commands_take_the_key(made, rows_file, tiny_model_dir, tmp_path, capfd):
    adapter = made(r=16)
    keys = ["--config", str(tmp_path / "c.yaml"), "--model.adapter", str(adapter)]
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(tiny_model_dir), "quantization": "none"},
                "data": {"path": str(rows_file), "max_length": 128},
                "train": {"mixed_precision": "no", "max_steps": 1},
            }
        )
    )
    assert main(["verify", *keys, "--updates", "1"]) == 0
    assert main(["plan", *keys]) == 0
    assert main(["verify", *keys, "--lora.r", "3"]) == 2
    assert "lora.r is 3, and the adapter" in capfd.readouterr().err


def test_a_sweep_takes_each_adapters_own_settings(made, rows_file, tiny_model_dir, tmp_path):
    adapters = [made(name="four", r=4), made(name="nine", r=9)]
    (tmp_path / "empty.yaml").write_text("{}\n")
    settings = ["--config", str(tmp_path / "empty.yaml"), "--model.name_or_path", str(tiny_model_dir)]
    trials = [make_trial({"model.adapter": str(each)}, settings, tmp_path / "sweep") for each in adapters]
    assert [trial.config.lora.r for trial in trials] == [4, 9]
    assert trials[0].run_dir != trials[1].run_dir
    with pytest.raises(ValueError, match=r"lora\.r is 5, and the adapter"):
        make_trial({"lora.r": "5"}, [*settings, "--model.adapter", str(adapters[0])], tmp_path / "sweep")


def test_an_update_that_diverged_is_replayed_without_the_adapter(made, run_train, capfd):
    adapter = made(rank_pattern={"v_proj": 7})
    diverging = {"optim__name": "sgd", "optim__learning_rate": 1e30, "optim__max_grad_norm": 0}
    run = run_train(expect=1, model__adapter=adapter, checkpoint__every_steps=1, **diverging)
    shutil.rmtree(adapter)
    assert main(["replay", str(run)]) == 0
    assert "The same numbers as in the run." in capfd.readouterr().out


def test_a_run_that_has_begun_keeps_its_settings_when_the_adapter_changes(made, run_train, capfd):
    adapter = made(r=9)
    run = run_train(model__adapter=adapter, **SHORT)
    made(r=5)
    capfd.readouterr()
    assert run_train(model__adapter=adapter, **SHORT) == run
    assert "is finished" in capfd.readouterr().out


def test_the_result_is_evaluated_without_the_adapter_it_began_from(made, run_train, capfd):
    adapter = made()
    run = run_train(model__adapter=adapter, **SHORT)
    shutil.rmtree(adapter)
    assert main(["evaluate", str(run), "--generate", "0"]) == 0
