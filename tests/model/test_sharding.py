"""Processes that share a base compute what each computes with a whole one, and what one does alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, tiny_model, tiny_tokenizer
from sharded import CASES, UPDATES
from tiny import CPU, built, with_adapter

from finetune.config import Config, FastConfig, LoraConfig, ModelConfig, TrainConfig
from finetune.config_checks import check_config
from finetune.model import sharding
from finetune.model.load import load_model
from finetune.model.loss import TokenLoss
from finetune.model.sharding import Sharding, choose_sharding, shard_base

# Of three and four processes some cases: each precision and quantization, both heads, with checkpointing.
REDUCED = ["bf16", "fp32, untied, checkpointing", "int8, checkpointing", "nf4, untied, module by module"]
RUNS = [*((2, name) for name in CASES), *((count, name) for count in (3, 4) for name in REDUCED)]

Results = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of some processes found in a case. One launch makes all cases of a number of processes."""
    folder = tmp_path_factory.mktemp("sharded")
    vocabulary = len(tiny_tokenizer())
    for name, tied in (("tied", True), ("untied", False)):
        model = tiny_model(vocabulary)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().flip(0).clone())
        model.save_pretrained(folder / name)

    @cache
    def launched(count: int) -> dict[str, list[dict[str, Any]]]:
        names = [name for number, name in RUNS if number == count]
        script = [str(ROOT / "tests" / "sharded.py"), str(folder), *names]
        processes = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", str(count), *script),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert processes.returncode == 0, processes.stderr
        return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}

    return lambda count, name: launched(count)[name]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(("count", "name"), RUNS)
def test_processes_that_share_a_base_make_the_update_of_one(results, count, name, update):
    assert len(results(count, name)) == count
    for found in (each["updates"][update] for each in results(count, name)):
        assert found["gradient norm"] > 0.1
        assert found["gradient against one process"] < 1e-5
        assert found["gradient against none"] < 1e-6
        assert found["gradient is the same to the bit"] or CASES[name].precision == "no"
        assert found["sums none"] == pytest.approx(found["sums alone"], rel=1e-5)
        assert found["sums base"] == pytest.approx(found["sums alone"], rel=1e-5)


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_they_evaluate_and_answer_as_with_a_whole_base(results, count, name):
    for found in results(count, name):
        assert found["stats differ by"] == found["fp32 stats differ by"] == 0
        assert found["answers base"] == found["answers none"] == results(count, name)[0]["answers none"]


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_each_holds_its_share_of_the_layers_and_no_more(results, count, name):
    shares = [found["bytes base"] for found in results(count, name)]
    whole = shares[0][1]
    assert sum(here for here, _ in shares) == whole
    # By rows: of 32 rows three processes have 11, 11 and 10.
    assert max(here for here, _ in shares) * count <= whole * (1 if count in (2, 4) else 1.04)


@pytest.mark.parametrize(("count", "name"), RUNS)
def test_they_count_and_name_the_same_base(results, count, name):
    for found in results(count, name):
        assert found["parameters base"] == found["parameters none"]
        assert found["quantization base"] == found["quantization none"] == CASES[name].quantization


def test_they_take_the_same_fast_paths(results):
    assert results(2, "int8, checkpointing")[0]["paths"]["decoder layers"] == ["fused", ""]
    assert results(2, "nf4")[0]["paths"]["decoder layers"] == ["fused", ""]
    assert results(2, "nf4, untied, module by module")[0]["paths"]["decoder layers"][0] == "module by module"


def test_one_process_keeps_the_whole_base_and_says_so():
    accelerator = SimpleNamespace(num_processes=1, device=CPU)
    chosen = choose_sharding(Config(train=TrainConfig(sharding="base")), accelerator)
    assert not chosen.is_on
    (choice,) = chosen.choices
    assert (choice.requested, choice.actual, choice.reason) == (
        "base",
        "none",
        "one process has the whole base",
    )


def test_nodes_of_one_process_share_a_base_only_if_told_to(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(sharding, "all_reduce_max", lambda accelerator, number: number)
    accelerator = SimpleNamespace(num_processes=2, device=CPU)
    (choice,) = choose_sharding(Config(train=TrainConfig(sharding="base")), accelerator).choices
    assert choice.actual == "none"
    assert "train.shard_over all" in choice.reason


def test_nodes_with_different_numbers_of_processes_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(sharding, "all_reduce_max", lambda accelerator, number: max(number, -1))
    accelerator = SimpleNamespace(num_processes=3, device=CPU)
    with pytest.raises(ValueError, match="they have 1 to 2: start as many on each"):
        choose_sharding(Config(train=TrainConfig(sharding="base")), accelerator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": LoraConfig(use_dora=True)}, "leave lora.use_dora out, or set model.quantization to none"),
        ({"fast": FastConfig(lora=False)}, "leave fast.lora false out, or set model.quantization to none"),
    ],
)
def test_layers_that_keep_a_quantized_weight_are_refused(settings, message):
    train = TrainConfig(sharding="base")
    with pytest.raises(ValueError, match=message):
        check_config(Config(train=train, **settings))
    check_config(Config(train=train, model=ModelConfig(quantization="none"), **settings))


def test_layers_that_are_not_on_the_fast_path_are_refused_on_a_quantized_base(tiny_model_dir):
    """As those of a given adapter with DoRA are not."""
    quantized = ModelConfig(name_or_path=str(tiny_model_dir), quantization="int8")
    model = load_model(Config(model=quantized), "bf16", CPU, plain_weights=True)
    with pytest.raises(ValueError, match=r"14 adapted layers, such as .*q_proj, do not take the fast path"):
        shard_base(TokenLoss(model), Sharding((), mesh=object()))


def test_without_a_mesh_nothing_is_sharded():
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    shard_base(token_loss, Sharding(()))
    assert type(token_loss) is TokenLoss
