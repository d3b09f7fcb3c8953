"""A conversation that goes on computes only what is new, and gets the answers it would get anew."""

import pytest
from accelerate import Accelerator
from conftest import tiny_model, tiny_tokenizer
from tiny import built, conversation, with_adapter

from finetune.model.generate import answer_prompts, encode_prompt
from finetune.model.prefix_cache import PrefixCache


def test_turns_get_the_answers_without_a_cache_and_compute_only_what_is_new():
    accelerator, tokenizer = Accelerator(cpu=True), tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer))).eval()
    cache = PrefixCache(model)
    computed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: computed.append(inputs[0].numel())
    )
    turns: list[str] = []
    lengths: list[tuple[int, int]] = []
    for question in ("What is a bond?", "Why?", "And what does a loan cost?"):
        turns.append(question)
        prompt = encode_prompt(tokenizer, conversation(*turns))
        (plain,) = answer_prompts(accelerator, model, tokenizer, [prompt], 10)
        computed.clear()
        (made,) = answer_prompts(accelerator, model, tokenizer, [prompt], 10, prefix_cache=cache)
        assert made == plain
        lengths.append((len(prompt), computed[0]))
        turns.append(made.text)
    assert lengths[0][0] == lengths[0][1]
    for whole, new in lengths[1:]:
        assert new < whole / 2
    other = encode_prompt(tokenizer, conversation(*turns[:2], "Something else?"))
    (made,) = answer_prompts(accelerator, model, tokenizer, [other], 10, prefix_cache=cache)
    assert [made] == answer_prompts(accelerator, model, tokenizer, [other], 10)


def test_an_answer_that_was_stopped_is_forgotten():
    tokenizer = tiny_tokenizer()
    model = with_adapter(tiny_model(len(tokenizer))).eval()
    cache = PrefixCache(model)
    arguments = (Accelerator(cpu=True), model, tokenizer, [encode_prompt(tokenizer, conversation("Hi"))], 10)

    class Stopping:
        """A reader who presses Ctrl-C after three tokens."""

        def __init__(self) -> None:
            self.left = 4

        def put(self, _: object) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_prompts(*arguments, streamer=Stopping(), prefix_cache=cache)
    assert answer_prompts(*arguments, prefix_cache=cache) == answer_prompts(*arguments)


def test_a_model_that_forgets_positions_begins_anew():
    base = built("mistral", sliding_window=4)
    cache = PrefixCache(base)
    assert cache.start([5, 6, 7]) is None
    cache.keep([5, 6, 7, 8])
    assert cache.start([5, 6, 7, 8, 9]) is None
