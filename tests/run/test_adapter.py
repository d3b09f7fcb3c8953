"""Opening what was trained: a run, a checkpoint or an adapter, wherever it lies; and what is none of them."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import tiny_model
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.__main__ import main
from finetune.config import Config
from finetune.run.adapter import TrainedModel, find_trained, load_trained, parse_trained, trained_parser
from finetune.runtime.cli import run_command

RUN: list[Path] = []


@pytest.fixture
def finished(run_train, tmp_path_factory) -> Path:
    """The folder of a finished run with two checkpoints; made once, and only read."""
    if not RUN:
        folder = tmp_path_factory.mktemp("trained") / "run"
        settings = {"train__max_steps": 4, "optim__learning_rate": 1e-2, "model__quantization": "int8"}
        RUN.append(run_train(output_dir=folder, **settings))
    return RUN[0]


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(finished, tmp_path / "runs" / "copy")


@pytest.fixture
def unfinished(run_dir) -> Path:
    shutil.rmtree(run_dir / "adapter")
    return run_dir


@pytest.fixture
def foreign(tmp_path, tiny_model_dir) -> Path:
    """An adapter that PEFT alone has made."""
    base = Qwen2ForCausalLM.from_pretrained(tiny_model_dir)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def opened(path: Path, *settings: str) -> TrainedModel:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return load_trained(find_trained(path, settings))


def assert_holds(model: peft.PeftModel, folder: Path) -> None:
    """The model's adapter is the one in this folder."""
    expected = load_file(folder / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    held = {name: tensor.cpu() for name, tensor in held.items()}
    torch.testing.assert_close(held, expected, rtol=0, atol=0)


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Opens what cannot be opened, as a command does, and returns the one line that is said of it."""

    def open_in_vain(path: Path, *settings: str) -> str:
        def command(argv: Sequence[str]) -> None:
            load_trained(parse_trained(trained_parser("show", "", "shows"), argv)[1])

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        capfd.readouterr()
        assert run_command(command, [str(path), *settings]) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1, said
        return said

    return open_in_vain


def test_a_finished_run_is_its_result_and_with_the_adapter_off_its_base(finished, tiny_model_dir):
    trained = find_trained(finished)
    assert (trained.adapter, trained.run_dir) == (finished / "adapter", finished)
    assert trained.config.model.quantization == "int8"
    model = opened(finished, "--model.quantization", "none").model
    assert_holds(model, finished / "adapter")
    tokens = torch.arange(20, device=model.device)[None]
    base = Qwen2ForCausalLM.from_pretrained(tiny_model_dir).to(model.device)
    with torch.no_grad():
        model.eval()
        answered = model(tokens).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, base(tokens).logits)
        assert not torch.allclose(answered, base(tokens).logits, atol=1e-2)


def test_the_keys_of_the_configuration_override_those_of_the_run(finished):
    assert find_trained(finished, ["--model.quantization", "none"]).config.model.quantization == "none"
    opening = opened(finished)
    assert any(type(module).__name__ == "Linear8bitLt" for module in opening.model.modules())
    assert_holds(opening.model, finished / "adapter")


def test_an_unfinished_run_is_its_newest_checkpoint(unfinished, capfd):
    trained = find_trained(unfinished)
    assert (trained.adapter, trained.run_dir) == (unfinished / "checkpoints" / "step_000004", unfinished)
    assert "not finished: this is its step_000004" in " ".join(capfd.readouterr().out.split())


def test_a_damaged_checkpoint_is_named_and_passed_over(unfinished, capfd):
    (unfinished / "checkpoints" / "step_000004" / "optimizer.safetensors").write_bytes(b"")
    assert_holds(opened(unfinished).model, unfinished / "checkpoints" / "step_000002")
    said = capfd.readouterr().out
    assert "step_000004 is damaged (optimizer.safetensors has not its size)" in said
    assert "this is its step_000002" in said


def test_of_an_unfinished_run_without_a_whole_checkpoint_is_said_why(unfinished, refused):
    for step in ("step_000002", "step_000004"):
        (unfinished / "checkpoints" / step / "state.json").unlink()
    said = refused(unfinished)
    for words in (
        "has no intact checkpoint",
        "step_000002 is damaged",
        "step_000004 is damaged",
        "state.json",
    ):
        assert words in said
    shutil.rmtree(unfinished / "checkpoints")
    assert refused(unfinished).endswith("has not saved anything yet\n")


@pytest.mark.parametrize("place", ["adapter", "checkpoints/step_000002"])
def test_a_checkpoint_or_the_result_in_a_run_knows_its_run(finished, place, monkeypatch):
    trained = find_trained(finished / place)
    assert (trained.adapter, trained.run_dir) == (finished / place, finished)
    assert trained.config.output_dir == str(finished)
    assert_holds(opened(finished / place).model, finished / place)
    monkeypatch.chdir(finished / place)
    assert find_trained(Path(".")).run_dir == finished


def test_a_link_to_an_adapter_knows_its_run(finished, tmp_path):
    (tmp_path / "link").symlink_to(finished / "adapter")
    assert find_trained(tmp_path / "link").run_dir == finished


def assert_trained_alike(config: Config, expected: Config) -> None:
    """But for what decides nothing about the weights: where and how often the run wrote."""
    for section in ("model", "lora", "data", "optim"):
        assert getattr(config, section) == getattr(expected, section)
    assert (config.train.mixed_precision, config.train.seed) == (
        expected.train.mixed_precision,
        expected.train.seed,
    )


def test_a_result_that_was_copied_elsewhere_knows_how_it_was_trained(finished, tmp_path):
    copied = shutil.copytree(finished / "adapter", tmp_path / "elsewhere" / "mine")
    trained = find_trained(copied)
    assert (trained.adapter, trained.run_dir) == (copied, None)
    assert_trained_alike(trained.config, find_trained(finished).config)
    assert_holds(opened(copied).model, copied)


def test_a_config_file_of_something_else_makes_no_run(finished, tmp_path):
    copied = shutil.copytree(finished / "adapter", tmp_path / "project" / "mine")
    for folder in (copied, copied.parent, copied.parent.parent):
        (folder / "config.yaml").write_text("database: postgres\n")
    trained = find_trained(copied)
    assert (trained.adapter, trained.run_dir) == (copied, None)
    assert_trained_alike(trained.config, find_trained(finished).config)


def test_a_foreign_adapter_is_put_on_the_base_that_it_names(foreign, tiny_model_dir, capfd):
    trained = find_trained(foreign, ["--train.mixed_precision", "no"])
    assert "does not say how it was trained" in " ".join(capfd.readouterr().out.split())
    assert trained.run_dir is None
    assert trained.config.model.name_or_path == str(tiny_model_dir)
    assert trained.config.model.quantization == "none"
    assert_holds(load_trained(trained).model, foreign)


def test_an_adapters_own_file_has_no_remote_code_run(finished, tmp_path):
    copied = shutil.copytree(finished / "adapter", tmp_path / "mine")
    settings = yaml.safe_load((copied / "training_config.yaml").read_text())
    settings["model"]["trust_remote_code"] = True
    (copied / "training_config.yaml").write_text(yaml.safe_dump(settings))
    assert find_trained(copied).config.model.trust_remote_code is False
    asked = find_trained(copied, ["--model.trust_remote_code", "true"])
    assert asked.config.model.trust_remote_code is True


@pytest.mark.parametrize("place", ["", "adapter", "checkpoints/step_000002"])
def test_another_base_of_the_same_shape_is_refused(run_dir, refused, tiny_model_dir, tmp_path, place):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    vocabulary = Qwen2Config.from_pretrained(other).vocab_size
    tiny_model(vocabulary, seed=1).save_pretrained(other)
    said = refused(run_dir / place, "--model.name_or_path", str(other))
    assert "was trained on another base model" in said
    assert str(other) in said


@pytest.mark.parametrize("place", ["adapter", "checkpoints/step_000002"])
def test_an_adapter_copied_elsewhere_still_knows_its_base(finished, refused, tiny_model_dir, tmp_path, place):
    copied = shutil.copytree(finished / place, tmp_path / "mine")
    assert_holds(opened(copied).model, copied)
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tiny_model(Qwen2Config.from_pretrained(other).vocab_size, seed=1).save_pretrained(other)
    assert "another base model" in refused(copied, "--model.name_or_path", str(other))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_base_with_more_or_fewer_layers_is_refused(foreign, refused, tiny_model_dir, tmp_path, layers):
    """PEFT would leave out what does not fit, and leave the other layers as they are."""
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    kinds = ["full_attention"] * layers
    config = Qwen2Config.from_pretrained(other, num_hidden_layers=layers, layer_types=kinds)
    Qwen2ForCausalLM(config).save_pretrained(other)
    said = refused(foreign, "--model.name_or_path", str(other))
    assert "other layers" in said
    assert f"layers.{min(layers, 2)}." in said


def test_a_base_of_another_width_is_refused(finished, refused, tiny_model_dir, tmp_path):
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    config = Qwen2Config.from_pretrained(other, hidden_size=32)
    Qwen2ForCausalLM(config).save_pretrained(other)
    copied = shutil.copytree(finished / "adapter", tmp_path / "mine")
    said = refused(copied, "--model.name_or_path", str(other))
    assert f"{copied} was trained on another base model than {other}" in said
    (copied / "base_fingerprint.txt").unlink()  # as of an adapter from elsewhere
    said = refused(copied, "--model.name_or_path", str(other))
    assert f"the adapter in {copied} could not be loaded onto {other}" in said


def truncate(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def break_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{ no")


def empty_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("[]")


def break_training_config(adapter: Path) -> None:
    (adapter / "training_config.yaml").write_text("optim: {learning_rat: 1}\n")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "could not be loaded onto"),
        (break_config, "adapter_config.json cannot be read"),
        (empty_config, "adapter_config.json is not the configuration of an adapter"),
        (break_training_config, "learning_rat"),
    ],
)
def test_a_damaged_result_is_refused(finished, refused, tmp_path, damage, words):
    copied = shutil.copytree(finished / "adapter", tmp_path / "mine")
    damage(copied)
    said = refused(copied)
    assert words in said
    assert str(copied) in said


@pytest.mark.parametrize(
    ("text", "words"),
    [("{ no", "cannot be read"), ("[]", "names no base model"), ("{}", "names no base model")],
)
def test_a_foreign_adapter_that_names_no_base_is_refused(finished, refused, tmp_path, text, words):
    copied = shutil.copytree(finished / "adapter", tmp_path / "mine")
    (copied / "training_config.yaml").unlink()
    (copied / "adapter_config.json").write_text(text)
    said = refused(copied)
    assert words in said
    assert "adapter_config.json" in said


def test_a_damaged_checkpoint_that_is_named_is_refused(run_dir, refused):
    checkpoint = run_dir / "checkpoints" / "step_000002"
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    said = refused(checkpoint)
    assert f"{checkpoint} is not an intact checkpoint: adapter_model.safetensors was altered" in said


def test_what_is_none_of_these_is_refused(finished, run_dir, refused, tmp_path, tiny_model_dir):
    (tmp_path / "empty").mkdir()
    assert "is not a folder" in refused(tmp_path / "nowhere")
    assert "is not a folder" in refused(finished / "config.yaml")
    for folder in (tmp_path / "empty", finished / "checkpoints", finished.parent, tiny_model_dir):
        assert f"{folder} holds no adapter" in refused(folder)
    (run_dir / "adapter" / "adapter_config.json").unlink()
    assert "adapter_config.json is not there" in refused(run_dir)
    assert "unknown key optim.lr" in refused(finished, "--optim.lr", "1")


def test_a_run_whose_record_is_damaged_is_refused(run_dir, refused):
    (run_dir / "environment.json").write_text("{}")
    assert f"{run_dir / 'environment.json'} is not the record of a run" in refused(run_dir)
    (run_dir / "config.yaml").write_text("- nothing\n")
    assert f"config file {run_dir / 'config.yaml'}" in refused(run_dir)


@pytest.mark.parametrize("argument", ["--debug=1", "--nonsense", "second"])
def test_a_wrong_argument_of_a_command_is_one_line(tmp_path, capfd, argument):
    assert main(["replay", str(tmp_path), argument]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_command_that_is_interrupted_while_it_is_imported_says_so(monkeypatch, capfd):
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.__main__.import_module", interrupt)
    assert main(["audit"]) == 130
    assert capfd.readouterr().err == "stopped\n"
