"""Rows of added tokens: PEFT's own computation is what ours must equal, forward and backward, wherever a path
reads the embedding or the head."""

from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from tiny import CPU, VOCABULARY, built, random_examples
from torch import Tensor

from finetune.config import Config, FastConfig, LoraConfig, OptimConfig
from finetune.data.collate import collate
from finetune.model.added_tokens import add_rows, token_ids_of, trainable_token_indices
from finetune.model.fast_paths import use_reference_paths
from finetune.model.flat_adapter import FlatAdapter
from finetune.model.load import add_adapter
from finetune.model.loss import TokenLoss
from finetune.model.precision import in_fp32
from finetune.model.size import count_parameters, training_flop
from finetune.ops import decoder_layer, elementwise, lora, token_rows
from finetune.training.memory_model import predict
from finetune.training.optim import create_optimizer
from finetune.training.optim_state import load_state, split_state

ADDED = (VOCABULARY, VOCABULARY + 1)  # beyond the base's rows
WITHIN = (3, 7)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])


def with_rows(
    tied: bool, ids: tuple[int, ...] = ADDED, architecture: str = "llama", dtype: Any = torch.float32
) -> peft.PeftModel:
    """A tiny model with an adapter that does something and trained rows far from what they were."""
    base = built(architecture, tie_word_embeddings=tied).to(dtype)
    add_rows(base, ids)
    model = add_adapter(base, LoraConfig(r=4, lora_dropout=0.0), ids)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def outcome(token_loss: TokenLoss, ids: tuple[int, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The sums of examples that hold added tokens as inputs and as targets, and all gradients."""
    batch = collate(random_examples([9, 14], vocabulary=VOCABULARY), packing=True)
    for place, token in ((2, ids[0]), (5, ids[1]), (12, ids[1])):
        batch.input_ids[0, place] = token
    batch.target_ids[::3] = ids[0]
    for parameter in token_loss.parameters():
        parameter.grad = None
    sums = token_loss(batch)
    (sums.nll / sums.count).backward()
    gradients = {n: p.grad.clone() for n, p in token_loss.named_parameters() if p.grad is not None}
    return [sums.nll.detach(), sums.entropy, sums.correct, token_loss.token_stats(batch)], gradients


@TIED
@pytest.mark.parametrize("ids", [ADDED, WITHIN])
@pytest.mark.parametrize("head_mib", [None, 1, 0], ids=["the model's head", "one chunk", "many chunks"])
@pytest.mark.usefixtures("cpu_kernels")
def test_the_fast_paths_compute_what_peft_does(tied, ids, head_mib):
    token_loss = TokenLoss(with_rows(tied, ids))
    expected, expected_gradients = outcome(token_loss, ids)
    assert sum("trainable_tokens" in name for name in expected_gradients) == (1 if tied else 2)
    assert all(gradient.abs().max() > 0 for gradient in expected_gradients.values())
    lora.enable(token_loss.model)
    elementwise.enable(token_loss.model)
    assert decoder_layer.enable(token_loss.model) == (2, 2)
    token_loss.head_mib = head_mib
    actual, gradients = outcome(token_loss, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)
    use_reference_paths(token_loss)
    again, _ = outcome(token_loss, ids)
    assert torch.equal(again[0], expected[0])
    assert not any("forward" in module.__dict__ for module in token_loss.modules())


@TIED
def test_the_chunked_head_alone_sees_the_rows_beside_pefts_embedding(tied):
    token_loss = TokenLoss(with_rows(tied))
    expected, expected_gradients = outcome(token_loss, ADDED)
    token_loss.head_mib = 0
    actual, gradients = outcome(token_loss, ADDED)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)


@TIED
def test_in_16_bits_the_fast_rows_are_as_near_to_fp32_as_pefts(tied):
    token_loss = TokenLoss(with_rows(tied, dtype=torch.bfloat16))
    with in_fp32(token_loss.model):
        exact, exact_gradients = outcome(token_loss, ADDED)

    def distance(gradients: dict[str, Tensor]) -> float:
        names = [name for name in gradients if "trainable_tokens" in name]
        return max(
            float((gradients[n] - exact_gradients[n]).norm() / exact_gradients[n].norm()) for n in names
        )

    with torch.autocast("cpu", torch.bfloat16):
        _, of_peft = outcome(token_loss, ADDED)
        lora.enable(token_loss.model)
        token_loss.head_mib = 1
        sums, of_ours = outcome(token_loss, ADDED)
    assert float(sums[0]) == pytest.approx(float(exact[0]), rel=0.05)
    assert distance(of_ours) < 1.5 * distance(of_peft) + 0.01
    with in_fp32(token_loss.model):  # on our paths it is the same
        again, again_gradients = outcome(token_loss, ADDED)
    torch.testing.assert_close(again, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again_gradients, exact_gradients, rtol=1e-3, atol=1e-4)


@TIED
def test_without_the_adapter_the_base_computes_with_its_own_rows(tied):
    model = with_rows(tied, WITHIN).eval()
    plain = built("llama", tie_word_embeddings=tied)
    tokens = torch.tensor([[3, 7, 1, 2]])
    token_rows.enable(model)
    with torch.no_grad():
        assert not torch.allclose(model(tokens).logits, plain(tokens).logits, atol=0.1)
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
            head = model.get_base_model().get_output_embeddings()
            assert token_rows.rows_of(head) is None


@TIED
def test_new_rows_are_the_mean_of_all_others_and_those_that_exist_stay(tied):
    base, plain = built("llama", tie_word_embeddings=tied), built("llama", tie_word_embeddings=tied)
    add_rows(base, WITHIN)
    assert base.config.vocab_size == VOCABULARY
    add_rows(base, (3, VOCABULARY + 2))
    assert base.config.vocab_size == VOCABULARY + 3
    layers = (base.get_input_embeddings(), plain.get_input_embeddings())
    heads = (base.get_output_embeddings(), plain.get_output_embeddings())
    assert (layers[0].weight is heads[0].weight) == tied
    for now, before in (layers, heads):
        assert torch.equal(now.weight[:VOCABULARY], before.weight)
        torch.testing.assert_close(now.weight[VOCABULARY:], before.weight.mean(0).expand(3, -1))
        assert not now.weight.requires_grad


def test_the_setting_of_peft_names_both_layers_where_they_are_two():
    assert trainable_token_indices(built("llama", tie_word_embeddings=True), (1, 2)) == [1, 2]
    names = trainable_token_indices(built("llama", tie_word_embeddings=False), (1, 2))
    assert names == {"model.embed_tokens": [1, 2], "lm_head": [1, 2]}
    assert token_ids_of(names) == token_ids_of([2, 1]) == [1, 2]
    assert token_ids_of(None) == []


@TIED
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd"])
def test_the_flat_adapter_holds_the_rows_and_an_optimizer_its_state(tied, name):
    def after(num_updates: int, restarts: bool) -> dict[str, Tensor]:
        model = with_rows(tied)
        adapter, token_loss = FlatAdapter(model), TokenLoss(model)
        lora.enable(model)
        token_loss.head_mib = 1
        settings = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
        optimizer = create_optimizer(name, adapter, settings)
        for step in range(num_updates):
            if restarts and step == 1:
                state = split_state(optimizer, adapter)
                optimizer = create_optimizer(name, adapter, settings)
                load_state(optimizer, adapter, *state)
            adapter.zero_gradients()
            batch = collate(random_examples([9, 14], vocabulary=VOCABULARY + 2, seed=step), packing=True)
            sums = token_loss(batch)
            (sums.nll / sums.count).backward()
            adapter.reduce_gradients(Accelerator(cpu=True))
            optimizer.step()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    before, trained, resumed = after(0, False), after(3, False), after(3, True)
    rows = [n for n in before if "trainable_tokens" in n]
    assert len(rows) == (1 if tied else 2)
    assert all(not torch.equal(trained[n], before[n]) for n in rows)
    assert all(torch.equal(trained[n], resumed[n]) for n in before)


@TIED
def test_counts_of_work_and_memory_leave_pefts_wrappers_out(tied):
    plain = add_adapter(built("llama", tie_word_embeddings=tied), LoraConfig(r=4))
    model = with_rows(tied, WITHIN)
    assert training_flop(model) == training_flop(plain)
    trainable, total = count_parameters(model)
    number = 2 * 64 * (1 if tied else 2)
    assert (trainable, total) == tuple(count + number for count in count_parameters(plain))
    config = Config(fast=FastConfig(head_mib=1), lora=LoraConfig(r=4))
    predictions = []
    for each in (plain, model):
        token_loss = TokenLoss(each)
        token_loss.head_mib = 1
        lora.enable(each)
        predictions.append(predict(config, Accelerator(cpu=True), token_loss, True))
    assert predictions[0].weight == predictions[1].weight
    assert predictions[0].head_most == predictions[1].head_most
    assert predictions[0].per_layer_and_token == predictions[1].per_layer_and_token


def test_a_padding_row_that_is_trained_stays_with_peft():
    base = built("llama", tie_word_embeddings=True)
    model = add_adapter(base, LoraConfig(r=4, lora_dropout=0.0), (0, 7))  # 0 pads: it has no gradient there
    lora.enable(model)
    embedding = model.get_base_model().get_input_embeddings()
    assert "forward" not in embedding.__dict__
    assert embedding(torch.tensor([[1]], device=CPU)).shape == (1, 1, 64)
