"""report.model_card: the README.md beside an adapter says what the run recorded, and its code runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import read_metrics

from finetune.config import LoraConfig, ModelConfig
from finetune.config_parsing import parse_config
from finetune.model.load import add_adapter, load_base
from finetune.report.intervals import difference_interval, mean_interval
from finetune.report.model_card import model_card, without_folder
from finetune.run.checkpoint import save_adapter
from finetune.run.folder import read_example_sums

HOSTILE = 'Be `brief`` | "kind"\n---\nlicense: mit\n<script>x</script> """ # \\ ``` é'


def front_matter(card: str) -> dict[str, object]:
    start, metadata, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(metadata)


def card_of(run_dir: Path, repo: str | None = None) -> str:
    return model_card(run_dir, parse_config(["--config", str(run_dir / "config.yaml")]), repo)


def numbers_in(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]


def line_with(card: str, start: str) -> str:
    (line,) = [line for line in card.splitlines() if line.startswith(start)]
    return line


def test_the_results_are_those_of_the_run_with_their_intervals(run_train):
    run_dir = run_train()
    card = (run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    first, last = (read_example_sums(run_dir, step) for step in (0, 4))
    evaluations = [entry for entry in read_metrics(run_dir) if entry["split"] == "eval"]
    for name, column, key in (
        ("| loss, nats", "nll", "loss"),
        ("| token accuracy", "correct", "mean_token_accuracy"),
    ):
        counts = last["num_target_tokens"].to_numpy(float)
        before, after = (frame[column].to_numpy(float) for frame in (first, last))
        expected = [
            *mean_interval(before, counts),
            *mean_interval(after, counts),
            *difference_interval(before, after, counts),
        ]
        assert numbers_in(line_with(card, name)) == pytest.approx(expected, abs=1e-4)
        assert expected[0] == pytest.approx(evaluations[0][key])
        assert expected[3] == pytest.approx(evaluations[-1][key])
    assert "| 4 eval examples, " in card
    assert "4 updates of 8 examples, on `" in card


def test_the_card_says_what_became_of_the_rows_and_how_it_was_trained(run_train, rows_file):
    rows_file.write_text(rows_file.read_text() + '{"instruction": "Why?", "input": "", "output": ""}\n')
    card = (run_train(data__num_samples=18) / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| source | `rows.jsonl` |" in card
    assert "| rows | 21 read, 20 usable |" in card
    assert line_with(card, "| dropped |").startswith("| dropped | 1 ")
    assert "| examples | 14 trained on, 4 for evaluation |" in card
    assert "| licence of the data | not stated |" in card
    assert "| `optim.learning_rate` | `0.001` |" in card
    assert front_matter(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft"],
    }


def test_the_card_names_no_folder_of_this_machine(run_train, tmp_path, tiny_model_dir):
    run_dir = run_train()
    for card in ((run_dir / "adapter" / "README.md").read_text(encoding="utf-8"), card_of(run_dir, "me/it")):
        assert str(tmp_path) not in card
        assert str(tiny_model_dir.parent) not in card
    assert without_folder("/home/me/rows.csv") == "rows.csv"
    assert without_folder("~/rows.csv") == "rows.csv"
    assert without_folder("data/rows.csv") == "data/rows.csv"
    assert without_folder("tatsu-lab/alpaca") == "tatsu-lab/alpaca"


@pytest.mark.parametrize("prompt", [None, HOSTILE])
def test_the_code_on_the_card_loads_the_adapter_and_answers(
    run_train, tmp_path, monkeypatch, tiny_model_dir, prompt
):
    run_dir = run_train(train__max_steps=2, data__system_prompt=prompt)
    adapter = run_dir / "adapter"
    (adapter / tiny_model_dir.name).symlink_to(tiny_model_dir)  # "its folder", as the card says
    monkeypatch.chdir(adapter)
    card = (adapter / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(code, names)
    messages = [{"role": "system", "content": prompt}] * (prompt is not None)
    assert names["messages"] == [*messages, {"role": "user", "content": "Your question"}]
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    weights = [value for name, value in names["model"].named_parameters() if "lora_B" in name]
    assert weights
    assert all(bool(weight.any()) for weight in weights)  # what was trained, not a fresh adapter


def test_a_users_text_changes_neither_metadata_nor_tables(run_train, tmp_path):
    plain = card_of(run_train(train__max_steps=1))
    hostile = card_of(
        run_train(train__max_steps=1, output_dir=tmp_path / "other", data__system_prompt=HOSTILE)
    )
    assert front_matter(hostile) == front_matter(plain)
    row = line_with(hostile, "| system prompt |")
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # two cells
    assert "```` Be `brief`` \\| " in row  # a fence longer than any within
    assert len(hostile.splitlines()) == len(plain.splitlines()) + 1  # the system turn in the code


def test_a_run_without_an_evaluation_claims_no_result(run_train):
    card = (run_train(data__eval_fraction=0, train__max_steps=1) / "adapter" / "README.md").read_text()
    assert "Not measured: the run had no evaluation." in card
    assert "before" not in card
    assert "The quality of its answers was not measured." in card


def test_without_an_evaluation_before_training_there_is_no_change(run_train):
    run_dir = run_train(eval__at_start=False, train__num_epochs=1)
    card = card_of(run_dir)
    assert "target tokens | after |" in card
    assert len(numbers_in(line_with(card, "| loss, nats"))) == 3


def test_a_run_of_an_older_version_has_figures_without_intervals(run_train):
    run_dir = run_train(train__num_epochs=1)
    shutil.rmtree(run_dir / "evaluations")
    environment = json.loads((run_dir / "environment.json").read_text())
    del environment["rows"]
    (run_dir / "environment.json").write_text(json.dumps(environment))
    card = card_of(run_dir)
    assert len(numbers_in(line_with(card, "| loss, nats"))) == 3  # before, after, change
    assert "confidence intervals" not in card
    assert "| rows |" not in card


def test_the_starters_adapter_names_the_hubs_model_and_its_licence(starter_dir, tmp_path, run_train):
    base = load_base(ModelConfig(name_or_path="starter", quantization="none"), "bf16", torch.device("cpu"))
    save_adapter(add_adapter(base, LoraConfig(target_modules=["q_proj"])), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"

    run_dir = run_train(train__max_steps=1)
    config = parse_config(["--config", str(run_dir / "config.yaml"), "--model.name_or_path", "starter"])
    card = model_card(run_dir, config, "me/it")
    metadata = front_matter(card)
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert metadata["license"] == "apache-2.0"
    assert "4-bit version of that model" in card
    assert 'PeftModel.from_pretrained(base, "me/it")' in card


def test_a_hub_data_set_stands_in_the_metadata(run_train):
    run_dir = run_train(train__max_steps=1)
    config = parse_config(["--config", str(run_dir / "config.yaml"), "--data.path", "tatsu-lab/alpaca"])
    assert front_matter(model_card(run_dir, config))["datasets"] == ["tatsu-lab/alpaca"]


@pytest.mark.parametrize(
    ("card", "licence"), [("---\nlicense: mit\n---\n", "mit"), ("no metadata", None), ("---\n[\n---\n", None)]
)
def test_a_base_in_a_folder_gives_the_licence_of_its_own_card(
    run_train, tmp_path, tiny_model_dir, card, licence
):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    (base / "README.md").write_text(card)
    run_dir = run_train(train__max_steps=1, model__name_or_path=base)
    assert front_matter(card_of(run_dir)).get("license") == licence
