"""The memory of a card and what it sends: against a loaded model, a counted update, and processes on gloo."""

import json
import sys

import pytest
import torch
from command_line import config_arguments
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from finetune.config_parsing import parse_config
from finetune.model.fast_paths import choose_fast_paths
from finetune.runtime.accelerator import create_accelerator
from finetune.training.memory_model import predict
from finetune.training.scale import (
    Frozen,
    FrozenBase,
    Unloaded,
    card_memory,
    count_kept_per_token,
    frozen_base,
    group_bytes,
    meta_model,
    predict_unloaded,
    traffic,
)
from finetune.training.setup import load_parts

sys.path.insert(0, str(ROOT / "benchmarks"))
import scale

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a processor's memory and layers")

BASES = ("none", "int8", "nf4")


@pytest.mark.parametrize("quantization", BASES)
@pytest.mark.parametrize("more", [[], ["--train.gradient_checkpointing=true"]])
def test_a_model_that_is_not_loaded_is_predicted_as_one_that_is(
    tmp_path, tiny_model_dir, rows_file, quantization, more
):
    keys = {
        "model.name_or_path": tiny_model_dir,
        "model.quantization": quantization,
        "data.path": rows_file,
        "data.max_length": 128,
        "train.mixed_precision": "bf16",
    }
    config = parse_config([*config_arguments(tmp_path, keys), *more])
    parts = load_parts(config)
    paths = choose_fast_paths(config, parts.accelerator, parts.token_loss, parts.train_set)
    loaded = predict(config, parts.accelerator, parts.token_loss, paths.packed)
    unloaded = predict_unloaded(config, parts.accelerator, AutoConfig.from_pretrained(tiny_model_dir))
    for part in (
        "base",
        "adapter",
        "optimizer",
        "per_layer_and_token",
        "weight",
        "head_per_token",
        "head_most",
    ):
        assert getattr(unloaded.predicted, part) == getattr(loaded, part), part
    assert unloaded.predicted.kept_per_token == pytest.approx(loaded.kept_per_token, rel=1e-3)
    assert unloaded.gradient_bytes == parts.adapter.gradient.nbytes


def test_a_model_without_a_list_of_decoder_layers_is_refused():
    model = meta_model(AutoConfig.for_model("gpt2", n_layer=1), torch.bfloat16)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list of decoder layers"):
        frozen_base(model, "none")


tensors = st.builds(Frozen, rows=st.integers(1, 10**6), row_bytes=st.integers(1, 10**5))
groups = st.lists(tensors, min_size=1, max_size=5).map(tuple)
bases = st.builds(
    FrozenBase,
    layers=st.lists(groups, min_size=1, max_size=5).map(tuple),
    root=groups,
    replicated=st.integers(0, 1000),
)


@given(bases, st.integers(2, 128))
def test_shards_hold_the_base_and_less_than_a_row_of_each_tensor_more(base, num_shards):
    every = [tensor for group in (base.root, *base.layers) for tensor in group]
    whole = sum(tensor.rows * tensor.row_bytes for tensor in every)
    assert base.shard(1) == whole + base.replicated
    in_shards = num_shards * (base.shard(num_shards) - base.replicated)
    assert 0 <= in_shards - whole < num_shards * sum(tensor.row_bytes for tensor in every)


@pytest.fixture(scope="module")
def half_billion() -> Unloaded:
    """Qwen2-0.5B in int8."""
    return scale.planned("0.5B", "int8")


@pytest.mark.parametrize("model", ["0.5B", "1.5B"])
@pytest.mark.parametrize("base", BASES)
def test_the_peak_of_a_card_is_the_one_that_an_update_on_fake_tensors_has(model, base):
    """benchmarks/device_budget.py counts the tensors alive in the program's own update, 1,004 tokens long."""
    file = ROOT / "benchmarks" / "results" / "device_budget.json"
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    (counted,) = (
        case["peak_gb"]
        for case in cases
        if (case["program"], case["model"], case["base"], case["dropout"])
        == ("finetune", f"Qwen2-{model}", scale.name_of(base), 0.1)
    )
    predicted = card_memory(scale.planned(model, base), 1, 1004).update
    assert predicted / 1e9 == pytest.approx(counted, rel=0.02)


def test_the_kept_bytes_of_the_tables_are_those_that_are_counted_now():
    config = scale.alpaca("none")
    accelerator = create_accelerator(config, "bf16")
    written = json.loads(scale.RESULT.read_text(encoding="utf-8"))["kept_per_token"]["0.5B"]
    counted = count_kept_per_token(config, accelerator, scale.architecture("0.5B"))
    assert counted == pytest.approx(written, rel=0.01)


def test_one_card_holds_the_whole_base_and_sends_nothing(half_billion):
    card, sent = card_memory(half_billion, 1, 1000), traffic(half_billion, 1, 1)
    assert card.update == half_billion.predicted.of_update(1000)
    assert card.between_updates == half_billion.predicted.held
    assert (sent.gathered, sent.reduced) == (0, 0)


def test_a_shared_base_costs_what_is_gathered_and_saves_what_others_hold(half_billion):
    whole, shared = (card_memory(half_billion, number, 1000) for number in (1, 8))
    root = group_bytes(half_billion.base.root)
    assert shared.base < whole.base / 7
    assert shared.root == root == 2 * 151936 * 896 + 2 * 896
    assert shared.update == shared.between_updates + max(
        2 * root, root + shared.kept + max(shared.layers + shared.at_layer, shared.at_head)
    )
    assert shared.first_update == shared.update - half_billion.predicted.optimizer
    layer, weight = half_billion.base.largest_layer, half_billion.predicted.weight // 2
    assert whole.loading == whole.base + whole.adapter + weight
    assert shared.loading == shared.base + root + 2 * layer + shared.adapter + weight
    in_pass = max(shared.layers + shared.at_layer, shared.at_head)
    assert shared.evaluation == shared.between_updates + max(2 * root, root + in_pass)


def test_cards_that_hold_a_whole_base_send_the_gradient_alone(half_billion):
    sent = traffic(half_billion, 1, 16)
    assert sent.of_update(4) == 2 * 15 / 16 * half_billion.gradient_bytes


def test_the_page_has_the_tables_that_the_arithmetic_gives():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.with_tables(page) == page


def test_two_processes_hold_and_send_what_is_predicted(tmp_path, tiny_model_dir):
    """Bytes of the kernel's count on the processes' own connections, which have headers and barriers too."""
    for case in scale.run_processes(str(tiny_model_dir), 2):
        name = (case["sharding"], case["base"])
        assert case["reduced"] == pytest.approx(case["predicted_reduced"], rel=0.01, abs=4096), name
        assert case["gathered"] == pytest.approx(case["predicted_gathered"], rel=0.01, abs=4096), name
        if case["sharding"] == "base":
            assert case["held"] == case["predicted_held"], name
