"""Answers do not depend on what is asked beside them, and end where they end."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model, tiny_tokenizer
from test_evaluate import conversation
from test_loss import with_adapter

from finetune.generation import Answer, generate_answers


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


def test_an_answer_ends_at_the_end_of_its_turn_and_shows_no_special_token(accelerator, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer)))
    word = tokenizer(" money", add_special_tokens=False)["input_ids"]

    def say_a_word_and_stop(**arguments: Any) -> torch.Tensor:
        prompts = arguments["input_ids"]
        answer = torch.tensor([*word, tokenizer.eos_token_id, tokenizer.pad_token_id])
        return torch.cat([prompts, answer.expand(len(prompts), -1)], dim=1)

    monkeypatch.setattr(model, "generate", say_a_word_and_stop)
    answers = generate_answers(accelerator, model, tokenizer, CONVERSATIONS)
    assert answers == [Answer("money", len(word) + 1, ended=True)] * len(CONVERSATIONS)
