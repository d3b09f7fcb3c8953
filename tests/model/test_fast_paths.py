"""Which paths are chosen for which model, why not the fast ones, and that they change no sum."""

from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from conftest import HAS_COMPILER, KERNELS_BY, PACKED_BY
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from tiny import NAMES, VOCABULARY, adapter_gradients, fill_adapter, random_examples, with_adapter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config import Config, FastConfig, LoraConfig, ModelConfig, TrainConfig
from finetune.data.collate import collate
from finetune.data.preparing.examples import Examples
from finetune.model import fast_paths, int8_matmul
from finetune.model.fast_paths import FastPaths, choose_fast_paths, use_reference_paths
from finetune.model.load import add_adapter, load_model
from finetune.model.loss import TokenLoss
from finetune.ops import attention, quantized, triton_makers
from finetune.ops.attention import PACKED
from finetune.ops.base_weights import BaseWeights
from finetune.ops.decoder_layer import FusedLayer
from finetune.runtime.choice import Choice

CPU = torch.device("cpu")
LENGTHS = [20, 60, 33]  # the longest has 60 tokens
SWITCHES = [field.name for field in fields(FastConfig) if field.type is bool]
PACKED_NAME, CHUNKS, FUSED = (
    f"packed, {PACKED_BY}",
    "target tokens in chunks of 64 MiB",
    "one function for each input",
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="names what computes on a processor")


def built(architecture: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny random causal model of an architecture, with weights large enough that tokens matter."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **{**sizes, **special, **settings})
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def falcon_h1() -> Any:
    """With a recurrent state beside its attention; only the attention is adapted."""
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    small = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    return fill_adapter(add_adapter(built("falcon_h1", **small).requires_grad_(False), config))


def train_set() -> Examples:
    return Examples(Dataset.from_list(random_examples(LENGTHS)), truncated=[], dropped={})


def choose(
    token_loss: TokenLoss,
    fast: FastConfig | None = None,
    packing: bool = True,
    precision: str = "no",
    int8: str | None = None,
) -> FastPaths:
    config = Config(fast=fast or FastConfig(), train=TrainConfig(packing=packing))
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    return choose_fast_paths(config, accelerator, token_loss, train_set(), int8)


def sums_of(token_loss: TokenLoss, packing: bool, precision: str = "no") -> dict[str, Any]:
    """The sums of one batch, and the gradients of its mean loss."""
    token_loss.model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
        sums = token_loss.eval()(collate(random_examples(LENGTHS, seed=3), packing))
    (sums.nll / sums.count).backward()
    gradients = {name: gradient.clone() for name, gradient in adapter_gradients(token_loss.model).items()}
    return {**{name: getattr(sums, name).item() for name in NAMES}, "gradients": gradients}


def assert_same_sums(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    for name in ("nll", "entropy", "count"):
        assert actual[name] == pytest.approx(expected[name], rel=tolerance), name
    flat, right = (
        torch.cat([g.flatten() for g in each["gradients"].values()]) for each in (actual, expected)
    )
    assert (flat - right).norm() < 10 * tolerance * right.norm()


def is_as_requested(setting: Choice) -> bool:
    return setting.requested == setting.actual and setting.reason == ""


def all_are_as_requested(chosen: FastPaths) -> bool:
    """Whether all are; without a compiler all but the kernels, and that has to be the reason given."""
    if not HAS_COMPILER and chosen.kernels.requested == "compiled":
        assert chosen.kernels.actual == "torch's operations"
        assert "no C++ compiler" in chosen.kernels.reason
        chosen = chosen._replace(kernels=Choice("CPU kernels", "none", "none"))
    return all(is_as_requested(setting) for setting in chosen)


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_ordinary_models_get_every_fast_path_and_the_same_sums(architecture, precision, tolerance):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    token_loss = TokenLoss(with_adapter(built(architecture, dtype)))
    expected = {packing: sums_of(token_loss, packing, precision) for packing in (True, False)}
    chosen = choose(token_loss, precision=precision)
    assert (chosen.layout.actual, chosen.attention.actual) == ("packed", PACKED_NAME)
    assert (chosen.loss.actual, chosen.lora.actual, chosen.int8.actual) == (CHUNKS, FUSED, "none")
    assert chosen.layers.actual == "fused"
    assert all_are_as_requested(chosen)
    assert (token_loss.masks_packed_sequences, token_loss.head_mib) == (False, 64)
    assert token_loss.base.config._attn_implementation == PACKED
    for packing in (True, False):
        assert_same_sums(sums_of(token_loss, packing, precision), expected[packing], tolerance)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "phi3", "gpt2"])
def test_models_that_keep_packed_examples_apart_are_packed(architecture):
    chosen = choose(TokenLoss(with_adapter(built(architecture))))
    assert is_as_requested(chosen.layout)
    assert chosen.packed
    assert chosen.attention.actual == PACKED_NAME


@pytest.mark.parametrize(
    ("make", "attention", "layout"),
    [
        (falcon_h1, "different results", "differently from separate ones"),
        (
            # A window shorter than the longest example
            lambda: with_adapter(built("mistral", sliding_window=40)),
            "a sliding window shorter than an example",
            "differently from separate ones",
        ),
        (
            lambda: with_adapter(built("bloom")),
            "only eager attention",
            "no mask between packed examples",
        ),
    ],
    ids=["falcon_h1", "mistral", "bloom"],
)
def test_models_that_do_not_are_padded_and_the_reason_is_given(make, attention, layout):
    token_loss = TokenLoss(make())
    own = token_loss.base.config._attn_implementation
    expected = sums_of(token_loss, packing=False)
    chosen = choose(token_loss)
    assert (chosen.layout.requested, chosen.layout.actual) == ("packed", "padded")
    assert layout in chosen.layout.reason
    assert (chosen.attention.requested, chosen.attention.actual) == (PACKED_NAME, own)
    assert attention in chosen.attention.reason
    assert token_loss.base.config._attn_implementation == own
    assert token_loss.masks_packed_sequences
    assert_same_sums(sums_of(token_loss, packing=False), expected)


def test_a_window_longer_than_any_example_is_packed():
    chosen = choose(TokenLoss(with_adapter(built("mistral", sliding_window=64))))
    assert (chosen.layout.actual, chosen.attention.actual) == ("packed", PACKED_NAME)


def test_padded_is_what_is_asked_where_packing_is_off():
    token_loss = TokenLoss(falcon_h1())
    chosen = choose(token_loss, packing=False)
    assert (chosen.layout.requested, chosen.layout.actual, chosen.layout.reason) == ("padded", "padded", "")
    assert is_as_requested(chosen.attention)
    assert PACKED not in (chosen.attention.actual, token_loss.base.config._attn_implementation)


HEAD_SIZE = {"head_dim": 16}
ODD_HEADS = [
    ("gemma2", {**HEAD_SIZE, "final_logit_softcapping": 30.0, "attn_logit_softcapping": None}),
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.06}),
]


@pytest.mark.parametrize(("architecture", "settings"), ODD_HEADS, ids=[name for name, _ in ODD_HEADS])
def test_a_model_whose_logits_are_more_than_its_heads_output_keeps_its_own_head(architecture, settings):
    token_loss = TokenLoss(with_adapter(built(architecture, **settings)))
    expected = sums_of(token_loss, packing=False)
    chosen = choose(token_loss)
    assert (chosen.loss.requested, chosen.loss.actual) == (CHUNKS, "all logits of target tokens")
    assert "not just its head's output" in chosen.loss.reason
    assert token_loss.head_mib is None
    assert_same_sums(sums_of(token_loss, packing=False), expected)
    # In chunks it would have been another loss.
    token_loss.head_mib = 1
    assert sums_of(token_loss, packing=False)["nll"] != pytest.approx(expected["nll"], rel=1e-3)


@pytest.mark.parametrize("how", ["bias", "LoRA"])
def test_a_head_with_a_bias_or_lora_is_left_alone(how):
    base = built("phi", num_key_value_heads=4) if how == "bias" else built("llama")
    config = LoraConfig(r=4, target_modules="all-linear" if how == "bias" else ["q_proj", "lm_head"])
    token_loss = TokenLoss(add_adapter(base, config))
    chosen = choose(token_loss)
    assert (chosen.loss.requested, chosen.loss.actual) == (CHUNKS, "all logits of target tokens")
    assert "has LoRA or a bias" in chosen.loss.reason
    assert token_loss.head_mib is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_layers_that_are_trained_whole_get_the_gradients_of_the_reference_paths(tied, packing):
    names = ["lm_head", "embed_tokens", "norm", "gate_proj"]
    base = built("llama", tie_word_embeddings=tied)
    model = add_adapter(base, LoraConfig(r=4, lora_dropout=0, modules_to_save=names))
    token_loss = TokenLoss(fill_adapter(model))

    def outcome() -> tuple[list[float], dict[str, Tensor]]:
        model.zero_grad()
        sums = token_loss.eval()(collate(random_examples(LENGTHS, seed=3), packing))
        (sums.nll / sums.count).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return [getattr(sums, name).item() for name in NAMES], gradients

    expected, expected_gradients = outcome()
    chosen = choose(token_loss)
    assert chosen.loss.actual == CHUNKS
    assert chosen.elementwise.actual == "keep their inputs, except 5"
    sums, gradients = outcome()
    assert sums == pytest.approx(expected, rel=1e-4)
    assert len([name for name in gradients if ".lora_" not in name]) == 1 + 1 + 5 + 2
    for name, gradient in gradients.items():
        of_reference = expected_gradients[name]
        assert of_reference.any(), name
        assert (gradient - of_reference).norm() < 1e-4 * of_reference.norm(), name


def test_attention_that_bounds_its_scores_is_not_packed_attention():
    settings = {**HEAD_SIZE, "final_logit_softcapping": None, "attn_logit_softcapping": 20.0}
    token_loss = TokenLoss(with_adapter(built("gemma2", **settings)))
    chosen = choose(token_loss)
    packing = chosen.packed
    assert (chosen.attention.requested, chosen.attention.actual) == (PACKED_NAME, "eager")
    assert chosen.attention.reason
    assert token_loss.base.config._attn_implementation == "eager"
    actual = sums_of(token_loss, packing)
    use_reference_paths(token_loss)
    assert_same_sums(actual, sums_of(token_loss, packing))


def test_layers_of_another_kind_keep_pefts_forward_and_the_reason_is_given():
    token_loss = TokenLoss(with_adapter(built("gpt2")))
    chosen = choose(token_loss)
    assert (chosen.lora.requested, chosen.lora.actual) == (FUSED, "PEFT's")
    assert chosen.lora.reason


def test_where_some_layers_are_of_another_kind_the_others_are_fast_and_their_number_is_given():
    config = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "embed_tokens"])
    base = built("qwen2", tie_word_embeddings=False).requires_grad_(False)
    token_loss = TokenLoss(fill_adapter(add_adapter(base, config)))
    expected = sums_of(token_loss, packing=True)
    chosen = choose(token_loss)
    assert (chosen.lora.requested, chosen.lora.actual) == (FUSED, f"{FUSED}, except 1")
    assert chosen.lora.reason
    assert chosen.layers.actual == "fused"
    assert len(fast_layers(token_loss)) == 4
    assert_same_sums(sums_of(token_loss, packing=True), expected)


# Switched off


PARTS = {name: {"head": "loss"}.get(name, name) for name in SWITCHES}
FAST = {
    "attention": PACKED_NAME,
    "head": CHUNKS,
    "lora": FUSED,
    "elementwise": "keep their inputs",
    "kernels": KERNELS_BY,
}
PLAIN = {
    "attention": "sdpa",
    "head": "all logits of target tokens",
    "lora": "PEFT's",
    "elementwise": "the model's",
    "kernels": "torch's operations",
}


@pytest.mark.parametrize("off", SWITCHES)
def test_a_path_that_is_switched_off_is_plain_as_asked_and_the_others_are_fast(off):
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    expected = sums_of(token_loss, packing=True)
    chosen = choose(token_loss, FastConfig(**{off: False}))
    assert all_are_as_requested(chosen)
    assert chosen.packed
    actual = {name: getattr(chosen, PARTS[name]).actual for name in SWITCHES}
    expected_names = {name: PLAIN[name] if name == off else FAST[name] for name in SWITCHES}
    if off == "kernels":
        expected_names["attention"] = "packed, per example"
    assert actual == expected_names
    assert token_loss.masks_packed_sequences == (off == "attention")
    assert token_loss.head_mib == (None if off == "head" else 64)
    assert len(fast_layers(token_loss)) == (0 if off == "lora" else 14)
    assert chosen.layers.actual == ("module by module" if off in ("lora", "elementwise") else "fused")
    assert_same_sums(sums_of(token_loss, packing=True), expected)


def fast_layers(token_loss: TokenLoss) -> list[Any]:
    return [m for m in token_loss.modules() if isinstance(m, LoraLayer) and "forward" in vars(m)]


def own_forwards(token_loss: TokenLoss) -> set[str]:
    """The modules that have a forward method other than that of their class."""
    return {name for name, module in token_loss.named_modules() if "forward" in vars(module)}


def test_with_all_switched_off_nothing_is_set():
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    expected, before = sums_of(token_loss, packing=True), own_forwards(token_loss)
    choose(token_loss)
    assert own_forwards(token_loss) > before
    chosen = choose(
        token_loss, FastConfig(**dict.fromkeys(SWITCHES, False))
    )  # and what an earlier choice had set is put back
    assert all_are_as_requested(chosen)
    assert (token_loss.masks_packed_sequences, token_loss.head_mib) == (True, None)
    assert own_forwards(token_loss) == before
    assert token_loss.base.config._attn_implementation == "sdpa"
    actual = sums_of(token_loss, packing=True)
    assert {name: actual[name] for name in NAMES} == {name: expected[name] for name in NAMES}


def test_plain_paths_put_everything_back():
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    expected, before = sums_of(token_loss, packing=True), own_forwards(token_loss)
    choose(token_loss)
    assert own_forwards(token_loss) > before
    use_reference_paths(token_loss)
    assert (token_loss.masks_packed_sequences, token_loss.head_mib) == (True, None)
    assert own_forwards(token_loss) == before
    assert token_loss.base.config._attn_implementation == "sdpa"
    actual = sums_of(token_loss, packing=True)
    assert {name: actual[name] for name in NAMES} == {name: expected[name] for name in NAMES}
    assert all(torch.equal(actual["gradients"][name], right) for name, right in expected["gradients"].items())


def test_the_budget_of_the_head_is_the_configured_one():
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    chosen = choose(token_loss, FastConfig(head_mib=3))
    assert chosen.loss.actual == "target tokens in chunks of 3 MiB"
    assert token_loss.head_mib == 3


def test_choosing_leaves_the_mode_and_the_gradients_as_they_are():
    model = with_adapter(built("qwen2"), lora_dropout=0.1)
    token_loss = TokenLoss(model).train()
    choose(token_loss)
    assert all(module.training for module in token_loss.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("fast_lora", [False, True])
def test_nf4_layers_without_an_adapter_pass_gradients_on_after_the_choice(fast_lora, tiny_model_dir):
    def gradients(chosen: bool) -> Any:
        source = ModelConfig(name_or_path=str(tiny_model_dir), quantization="nf4")
        adapter = LoraConfig(lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        token_loss = TokenLoss(
            fill_adapter(load_model(Config(model=source, lora=adapter), "bf16", CPU))
        ).train()
        if chosen:
            choose(token_loss, FastConfig(lora=fast_lora), precision="bf16")
        with torch.autocast("cpu", torch.bfloat16):
            sums = token_loss(collate(random_examples(LENGTHS), packing=True))
        sums.nll.backward()
        return torch.cat([g.flatten() for g in adapter_gradients(token_loss.model).values()])

    plain = gradients(chosen=False)
    assert (gradients(chosen=True) - plain).norm() < 0.1 * plain.norm()


# What is tried and found wrong


def test_a_fast_layer_that_computes_something_else_is_not_used(monkeypatch):
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    expected = sums_of(token_loss, packing=True)
    real = BaseWeights.dequantize
    monkeypatch.setattr(BaseWeights, "dequantize", lambda *arguments: 1.5 * real(*arguments))
    chosen = choose(token_loss)
    assert (chosen.lora.requested, chosen.lora.actual) == (FUSED, "PEFT's")
    assert "different results" in chosen.lora.reason
    assert fast_layers(token_loss) == []
    assert_same_sums(sums_of(token_loss, packing=True), expected)


@pytest.mark.parametrize(
    ("architecture", "settings", "actual", "reason"),
    [
        ("qwen3", {}, "module by module", "no layers of Llama's kind with fast parts"),
        ("gpt2", {}, "module by module", "no layers of Llama's kind with fast parts"),
        (
            "qwen2",  # the second layer has a window, longer than any example
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "fused, except 1",
            "layers of another kind",
        ),
    ],
)
def test_how_many_layers_are_fused_and_why_not_all(architecture, settings, actual, reason):
    token_loss = TokenLoss(with_adapter(built(architecture, **settings)))
    expected = sums_of(token_loss, packing=True)
    chosen = choose(token_loss)
    assert (chosen.layers.requested, chosen.layers.actual) == ("fused", actual)
    assert chosen.layers.reason == reason
    assert_same_sums(sums_of(token_loss, packing=True), expected)


def test_fused_layers_that_compute_something_else_are_not_used(monkeypatch):
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    expected = sums_of(token_loss, packing=True)
    real = FusedLayer._compute
    monkeypatch.setattr(FusedLayer, "_compute", lambda *inputs, **named: -3 * real(*inputs, **named))
    chosen = choose(token_loss)  # each layer is compared with its own method
    assert (chosen.layers.actual, chosen.layers.reason) == (
        "module by module",
        "no layers of Llama's kind with fast parts",
    )
    monkeypatch.setattr(FusedLayer, "is_equivalent", lambda _: True)
    chosen = choose(token_loss)  # and all together with the model
    assert chosen.layers.actual == "module by module"
    assert "different results" in chosen.layers.reason
    assert_same_sums(sums_of(token_loss, packing=True), expected)


def let_attention_be_computed_by(make: attention.Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_choose_implementation", lambda *_: make)
    monkeypatch.setitem(attention.NAMES, make, PACKED_BY)


def test_an_attention_that_computes_something_else_is_not_used(monkeypatch):
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    expected = sums_of(token_loss, packing=True)
    choose_implementation = attention._choose_implementation
    let_attention_be_computed_by(
        lambda query, *others: -3 * choose_implementation(query, query, query)(query, *others), monkeypatch
    )
    chosen = choose(token_loss)
    assert (chosen.attention.requested, chosen.attention.actual) == (PACKED_NAME, "sdpa")
    assert "different results" in chosen.attention.reason
    assert chosen.packed
    assert_same_sums(sums_of(token_loss, packing=True), expected)


@pytest.mark.parametrize("with_branches", [True, False])
def test_an_attention_that_ignores_branches_is_not_used_where_examples_have_some(monkeypatch, with_branches):
    choose_implementation = attention._choose_implementation

    def ignoring(query: Tensor, key: Tensor, value: Tensor, boundaries: Any, scale: float) -> Tensor:
        make = choose_implementation(query, key, value)
        return make(query, key, value, boundaries._replace(branches=()), scale)

    examples: list[dict[str, Any]] = [{**one, "branches": []} for one in random_examples(LENGTHS)]
    if with_branches:
        examples[0]["branches"] = [[12, 7], [15, 10]]
    data = Examples(Dataset.from_list(examples), truncated=[], dropped={})
    token_loss, accelerator = TokenLoss(with_adapter(built("qwen2"))), Accelerator(cpu=True)
    assert all_are_as_requested(choose_fast_paths(Config(), accelerator, token_loss, data))
    let_attention_be_computed_by(ignoring, monkeypatch)
    chosen = choose_fast_paths(Config(), accelerator, token_loss, data)
    assert chosen.attention.actual == ("sdpa" if with_branches else PACKED_NAME)
    assert chosen.packed


class LargestLogits(TorchDispatchMode):
    """The most rows of a floating-point tensor with a column for each token of the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, list | tuple) else [results]:
            if isinstance(result, Tensor) and result.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, result.numel() // self.vocabulary)
        return results


def test_the_trial_holds_the_logits_of_few_tokens():
    vocabulary, length = 1009, 600
    examples = random_examples([30, length], vocabulary)
    token_loss = TokenLoss(with_adapter(built("qwen2", vocab_size=vocabulary, max_position_embeddings=1024)))
    data = Examples(Dataset.from_list(examples), truncated=[], dropped={})
    with LargestLogits(vocabulary) as largest:
        chosen = choose_fast_paths(Config(), Accelerator(cpu=True), token_loss, data)
    assert all_are_as_requested(chosen)
    assert 0 < largest.rows <= 64


@pytest.mark.parametrize("length", [2, 5, 64, 200])
def test_the_trial_compares_the_first_own_token_and_the_last_and_some_between(length):
    examples = Examples(Dataset.from_list(random_examples([length])), truncated=[], dropped={})
    token_loss = TokenLoss(with_adapter(built("qwen2")))
    trial = fast_paths._Trial(Accelerator(cpu=True), token_loss, examples)
    shared = min(16, length // 4)
    positions = trial.alone.target_positions.tolist()
    assert (positions[0], positions[-1]) == (shared, length - 2)
    assert len(positions) == min(64, length - 1 - shared)
    gaps = {after - before for before, after in pairwise(positions)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert torch.equal(trial.packed.target_ids, trial.alone.target_ids)


def test_the_peak_is_counted_from_after_the_trial(monkeypatch):
    events: list[Any] = []
    real = fast_paths._Trial.logits
    monkeypatch.setattr(fast_paths._Trial, "logits", lambda *own: events.append("trial") or real(*own))
    monkeypatch.setattr(fast_paths, "reset_peak_memory", events.append)
    choose(TokenLoss(with_adapter(built("qwen2"))))
    assert events[-1] == CPU
    assert set(events[:-1]) == {"trial"}


def test_a_path_that_runs_out_of_memory_is_no_path_that_computes_something_else(monkeypatch):
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    let_attention_be_computed_by(out_of_memory, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        choose(TokenLoss(with_adapter(built("qwen2"))))


# int8


@pytest.fixture
def int8_loss(tiny_model_dir: Path) -> TokenLoss:
    source = ModelConfig(name_or_path=str(tiny_model_dir), quantization="int8")
    config = Config(model=source, lora=LoraConfig(lora_dropout=0.0))
    return TokenLoss(load_model(config, "bf16", CPU))


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_matmul, "_seconds", lambda *_: pytest.fail("it was measured"))


def assert_all_layers_multiply(token_loss: TokenLoss, in_int8: bool) -> None:
    layers = fast_layers(token_loss)
    assert len(layers) == 14
    assert all(layer.int8_matmul is in_int8 for layer in layers)


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("recorded", ["int8", "dequantize"])
def test_how_a_run_began_is_kept_and_not_measured_again(int8_loss, recorded):
    chosen = choose(int8_loss, precision="bf16", int8=recorded)
    assert (chosen.int8.requested, chosen.int8.actual) == (recorded, recorded)
    assert "as at the start of this run" in chosen.int8.reason
    assert_all_layers_multiply(int8_loss, recorded == "int8")


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("recorded", [None, "int8", "dequantize"])
@pytest.mark.parametrize("asked", ["int8", "dequantize"])
def test_a_way_that_is_asked_for_is_taken(int8_loss, asked, recorded):
    chosen = choose(int8_loss, FastConfig(int8_matmul=asked), precision="bf16", int8=recorded)
    assert (chosen.int8.requested, chosen.int8.actual) == (asked, asked)
    in_int8 = asked == "int8"
    assert chosen.layers.actual == ("module by module" if in_int8 else "fused")
    assert chosen.layers.reason == ("int8 weights are multiplied in int8" if in_int8 else "")
    assert_all_layers_multiply(int8_loss, asked == "int8")


@pytest.mark.parametrize(
    ("in_int8", "dequantized", "actual"),
    [(1.0, 1.3, "int8"), (1.0, 1.1, "dequantize"), (1.0, 0.5, "dequantize")],
)
def test_int8_is_taken_where_it_is_faster_by_more_than_a_fifth(
    int8_loss, monkeypatch, in_int8, dequantized, actual
):
    times = iter([in_int8, dequantized])
    monkeypatch.setattr(int8_matmul, "_seconds", lambda *_: next(times))
    chosen = choose(int8_loss, precision="bf16")
    assert (chosen.int8.requested, chosen.int8.actual) == (actual, actual)
    assert f"dequantized {dequantized * 1e3:.1f} ms, in int8 {in_int8 * 1e3:.1f} ms" in chosen.int8.reason
    assert_all_layers_multiply(int8_loss, actual == "int8")


def test_int8_activations_are_not_the_truth_that_fast_paths_are_compared_with(int8_loss, monkeypatch):
    """On a GPU, bitsandbytes' layers round the activations: as far off here as any difference can be."""
    monkeypatch.setattr(
        bnb.nn.Linear8bitLt, "forward", lambda layer, x: x.new_zeros(*x.shape[:-1], layer.out_features)
    )
    chosen = choose(int8_loss, FastConfig(int8_matmul="dequantize"), precision="bf16")
    assert (chosen.lora.actual, chosen.elementwise.actual) == (FUSED, "keep their inputs")
    assert chosen.attention.actual == PACKED_NAME
    assert all_are_as_requested(chosen)


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize(
    ("asked", "recorded", "actual"),
    [("auto", None, "dequantize"), ("auto", "int8", "int8"), ("int8", None, "int8")],
)
def test_a_gpu_dequantizes_unless_something_else_is_asked_for(int8_loss, asked, recorded, actual):
    gpu = SimpleNamespace(device=torch.device("cuda"), mixed_precision="fp16", is_main_process=True)
    config = Config(fast=FastConfig(int8_matmul=asked))
    chosen = int8_matmul.choose_int8(config, gpu, int8_loss.model, train_set(), recorded, False)
    assert (chosen.requested, chosen.actual) == (actual, actual)
    assert ("waits" in chosen.reason) == (actual == "dequantize")


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_int8_is_measured_in_the_precision_of_the_run(int8_loss, monkeypatch, precision, dtype):
    measured = []

    def multiply(x: Tensor, layer: Any, int8_matmul: bool) -> Tensor:
        measured.append(x.dtype)
        return x

    monkeypatch.setattr(quantized, "multiply", multiply)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    int8_matmul.choose_int8(Config(), accelerator, int8_loss.model, train_set(), None, False)
    assert set(measured) == {dtype}


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_layers_without_an_adapter_multiply_like_those_with_one(tiny_model_dir, monkeypatch, quantization):
    source = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
    adapter = LoraConfig(lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    token_loss = TokenLoss(fill_adapter(load_model(Config(model=source, lora=adapter), "bf16", CPU)))
    expected = sums_of(token_loss, packing=True, precision="bf16")
    choose(token_loss, precision="bf16")
    for kind in (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit):
        monkeypatch.setattr(kind, "forward", lambda *_: pytest.fail("bitsandbytes multiplied"))
    assert_same_sums(sums_of(token_loss, packing=True, precision="bf16"), expected, 2e-2)


@pytest.mark.usefixtures("no_clock")
def test_pefts_layers_multiply_int8_as_bitsandbytes_does(int8_loss):
    chosen = choose(int8_loss, FastConfig(lora=False, int8_matmul="int8"), precision="bf16")
    assert (chosen.int8.requested, chosen.int8.actual) == ("bitsandbytes'", "bitsandbytes'")


@pytest.mark.usefixtures("no_clock")
def test_a_model_without_int8_weights_has_no_way_of_multiplying_them():
    chosen = choose(TokenLoss(with_adapter(built("qwen2"))), FastConfig(int8_matmul="int8"), int8="int8")
    assert chosen.int8 == replace(chosen.int8, requested="none", actual="none", reason="")


def test_on_a_card_the_kernels_are_tritons_and_what_is_left_to_torch_is_said(monkeypatch):
    card = torch.device("cuda")
    without = fast_paths._choose_kernels(Config(), card)
    assert (without.name, without.requested, without.actual) == (
        "GPU kernels",
        "Triton",
        "torch's operations",
    )
    assert without.reason
    monkeypatch.setattr(triton_makers, "_kernels", triton_makers)
    monkeypatch.setattr(triton_makers, "enable", lambda device: None)
    monkeypatch.setattr(triton_makers, "_has_products", True)
    hopper = fast_paths._choose_kernels(Config(), card)
    assert hopper.actual == hopper.requested == "Triton"
    assert hopper.reason.startswith("torch for rows of over 16,384 numbers; torch for fp32")
    monkeypatch.setattr(triton_makers, "_has_products", False)
    turing = fast_paths._choose_kernels(Config(), card)
    assert turing.actual == "Triton, except dropped_product, dropped_sum, add_dropped"
    assert "without tensor cores" in turing.reason
    assert fast_paths._choose_kernels(Config(), torch.device("mps")).actual == "torch's operations"
