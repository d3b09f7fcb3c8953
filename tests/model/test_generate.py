"""Answers do not depend on what is asked beside them, and end where they end."""

from collections import Counter
from typing import Any

import bitsandbytes as bnb
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from card import put_on_gpu, quantized_layer
from conftest import ROOT, tiny_model, tiny_tokenizer
from tiny import conversation, fill_adapter, with_adapter
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.config import Config, LoraConfig, ModelConfig
from finetune.data.templates.chat_template import set_stop_ids
from finetune.model.generate import (
    Answer,
    Sampler,
    answer_prompts,
    check_limits,
    encode_prompt,
    generate_answers,
    multiply_dequantized,
    require_room,
)
from finetune.model.load import add_adapter, load_base, load_tokenizer
from finetune.ops.quantized import dropout_off


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


CONVERSATIONS = [
    conversation("What is a bond?"),
    conversation("Hi"),
    conversation("Explain in one sentence why somebody would keep cash for a rainy day.", "Because.", "Why?"),
    conversation("How much should I save?" * 4),
]


def test_answers_do_not_depend_on_what_is_asked_beside_them(accelerator):
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer)), lora_dropout=0.5).train()
    together = generate_answers(accelerator, model, tokenizer, CONVERSATIONS, max_new_tokens=12)
    alone = [
        generate_answers(accelerator, model, tokenizer, [one], max_new_tokens=12)[0] for one in CONVERSATIONS
    ]
    assert together == alone
    assert len({answer.text for answer in together}) == len(CONVERSATIONS)
    assert all(module.training for module in model.modules())


def test_an_answer_is_the_likeliest_next_token_again_and_again(accelerator):
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer))).eval()
    # Sampling settings that come with a model, as Qwen2-Instruct's do, are not for comparing answers.
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=50, top_p=0.9)
    answers = generate_answers(accelerator, model, tokenizer, CONVERSATIONS, max_new_tokens=5)
    for asked, answer in zip(CONVERSATIONS, answers, strict=True):
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        new: list[int] = []
        while len(new) < 5 and tokenizer.eos_token_id not in new:
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert not model.training


def test_an_answer_ends_at_the_end_of_its_turn_and_shows_every_token_before_it(accelerator, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer)))
    word = tokenizer(" money", add_special_tokens=False)["input_ids"]
    marker, stop = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"])
    set_stop_ids(tokenizer, [stop])  # beside EOS

    def say_a_word_and_stop(**arguments: Any) -> torch.Tensor:
        prompts = arguments["input_ids"]
        answer = torch.tensor([*word, marker, *word, stop, tokenizer.pad_token_id])
        return torch.cat([prompts, answer.expand(len(prompts), -1)], dim=1)

    monkeypatch.setattr(model, "generate", say_a_word_and_stop)
    answers = generate_answers(accelerator, model, tokenizer, CONVERSATIONS)
    assert answers == [Answer("money<|im_start|> money", 2 * len(word) + 2, ended=True)] * len(CONVERSATIONS)


def sample_conversations(count: int) -> list[Any]:
    """Questions of the sample, of lengths far apart."""
    rows = pd.read_csv(ROOT / "data" / "finance_sample.csv")
    rows = rows.sort_values("instruction", key=lambda texts: texts.str.len())
    return [conversation(text) for text in rows["instruction"].iloc[:: len(rows) // count][:count]]


def test_sixteen_at_a_time_get_the_answers_of_one_at_a_time(accelerator):
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer)))
    asked = sample_conversations(16)
    together = generate_answers(accelerator, model, tokenizer, asked, max_new_tokens=40)
    assert together == [
        generate_answers(accelerator, model, tokenizer, [one], max_new_tokens=40)[0] for one in asked
    ]
    assert len({len(encode_prompt(tokenizer, one)) for one in asked}) > 8


def test_sixteen_at_a_time_get_the_answers_of_one_at_a_time_from_the_starter(accelerator, starter_dir):
    config = ModelConfig(name_or_path=str(starter_dir), quantization="none")
    tokenizer = load_tokenizer(Config(model=config))
    model = load_base(config, "no", accelerator.device)
    prompts = [encode_prompt(tokenizer, one) for one in sample_conversations(16)]
    together = answer_prompts(accelerator, model, tokenizer, prompts, 5)
    for place in (0, 6, 11, 15):
        assert answer_prompts(accelerator, model, tokenizer, [prompts[place]], 5) == [together[place]]


def test_a_draw_follows_the_softmax_and_depends_on_its_seed_alone():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20_000, -1)
    ids = torch.zeros(len(scores), 1, dtype=torch.long)
    sampler = Sampler(0.5, range(len(scores)), torch.device("cpu"))
    first, second = (sampler(ids, scores).argmax(-1) for _ in range(2))
    expected = (scores[0] / 0.5).softmax(-1)
    for drawn in (first, second):
        shares = torch.bincount(drawn, minlength=4) / len(scores)
        assert shares == pytest.approx(expected, abs=4 * 0.5 / len(scores) ** 0.5)
    pairs = Counter(zip(first.tolist(), second.tolist(), strict=True))
    assert pairs[0, 0] / len(scores) == pytest.approx(float(expected[0]) ** 2, abs=0.015)  # independent
    alone = Sampler(0.5, [7], torch.device("cpu"))
    assert [int(alone(ids[:1], scores[:1]).argmax(-1)) for _ in range(2)] == [int(first[7]), int(second[7])]


def test_what_cannot_be_generated_with_is_said():
    for temperature in (-1.0, 1e-9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be 0"):
            check_limits(temperature, 1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        check_limits(0, 0)
    model = tiny_model(800)  # of 1024 positions
    require_room(model, 1000, 24)
    with pytest.raises(
        ValueError, match=r"1,000 tokens, which with an answer of up to 25 tokens exceeds .* 1,024"
    ):
        require_room(model, 1000, 25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of layers on a processor")
@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_weights_held_dequantized_give_the_same_answers(tiny_model_dir, quantization, precision):
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    config = ModelConfig(name_or_path=str(tiny_model_dir), quantization=quantization)
    base = load_base(config, precision, accelerator.device)
    tokenizer = load_tokenizer(Config(model=config))
    model = fill_adapter(add_adapter(base, LoraConfig(r=4)))
    ids = torch.tensor([encode_prompt(tokenizer, CONVERSATIONS[2])])

    def outcome() -> tuple[list[Answer], torch.Tensor, torch.Tensor]:
        answers = generate_answers(accelerator, model, tokenizer, CONVERSATIONS, max_new_tokens=20)
        with torch.no_grad(), dropout_off(model), accelerator.autocast():
            logits = model(input_ids=ids).logits
            with model.disable_adapter():
                return answers, logits, model(input_ids=ids).logits

    def is_quantized(module: Any) -> bool:
        return isinstance(module, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)

    before = outcome()
    assert any(map(is_quantized, model.modules()))
    multiply_dequantized(model, precision)
    assert not any(map(is_quantized, model.modules()))
    after = outcome()
    assert after[0] == before[0]
    rounding = 0 if precision == "bf16" else 1e-5  # in fp32 bitsandbytes multiplies in another order
    for tuned_or_base in (1, 2):
        torch.testing.assert_close(after[tuned_or_base], before[tuned_or_base], rtol=rounding, atol=rounding)
    assert not torch.allclose(after[1].float(), after[2].float(), atol=0.1)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_on_a_gpu_the_weights_stay_quantized_and_no_token_waits_for_it(monkeypatch, quantization):
    for kind in (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit):
        monkeypatch.setattr(kind, "forward", lambda *_: pytest.fail("bitsandbytes multiplied"))
    model = torch.nn.Sequential(quantized_layer(quantization))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        put_on_gpu(model[0])
        multiply_dequantized(model, "fp16")
        assert isinstance(model[0], bnb.nn.Linear8bitLt | bnb.nn.Linear4bit)
        assert model.eval()(torch.empty(3, 64, device="cuda", dtype=torch.float16)).shape == (3, 128)


def test_the_head_is_given_what_it_multiplies_without_copies_of_its_weight(accelerator):
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer)))
    head = model.get_output_embeddings()
    dense: list[bool] = []
    spy = head.register_forward_hook(lambda _, inputs, __: dense.append(inputs[0].is_contiguous()))
    generate_answers(accelerator, model, tokenizer, CONVERSATIONS, max_new_tokens=2)
    spy.remove()
    assert dense == [True, True]
    assert not head._forward_pre_hooks
