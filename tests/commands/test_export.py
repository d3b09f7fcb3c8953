"""`python -m finetune export`: the GGUF file, read back, is the merged model; and its Modelfile."""

import errno
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from conftest import QWEN2_TEMPLATE, tiny_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetune.__main__ import main
from finetune.export.gguf import _pre_tokenizer, unsupported
from finetune.export.merge import FULL_PRECISION, load_unmerged, merge
from finetune.export.modelfile import modelfile
from finetune.run.adapter import find_trained, load_trained

SHORT = {
    "train__max_steps": 2,
    "eval__at_start": False,
    "lora__lora_dropout": 0,
    "optim__learning_rate": 0.05,
}
SHARED_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("initializer_range", "eos_token_id", "bos_token_id", "pad_token_id"),
)
TEXTS = (
    "Hello world",
    "  two  spaces\n\n\nthree\t tabs \r\n",
    "1234567 3.14% $1,000 ²³½",
    "it's we'll DON'T I'd",
    "naïve “quotes” … 日本語 العربية 🤦🏽‍♂️ \u00a0é",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    " leading and trailing ",
    "\n",
)
PROMPT = "<|im_start|>user\nWhat is a bond?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A random llama with fewer key heads, an output layer of its own, and embeddings beyond the tokenizer's
    last token."""
    folder = tmp_path / "tiny-llama"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=500.0,
        rms_norm_eps=1e-3,
        tie_word_embeddings=False,
        initializer_range=0.2,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def export(run_dir: Path, output: Path, *options: str) -> Path:
    assert main(["export", str(run_dir), "--output", str(output), *options]) == 0
    (path,) = output.glob("*.gguf")
    return path


def read_back(path: Path) -> tuple[torch.nn.Module, object]:
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=plain, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@torch.no_grad()
def log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits[0].log_softmax(-1)


@pytest.fixture
def bases(tiny_model_dir: Path, llama_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A random model of an architecture."""

    def make(architecture: str) -> Path:
        if architecture in ("qwen2", "llama"):
            return tiny_model_dir if architecture == "qwen2" else llama_dir
        folder = tmp_path / architecture
        AutoTokenizer.from_pretrained(llama_dir).save_pretrained(folder)
        config = LlamaConfig.from_pretrained(llama_dir).to_dict()
        config = {key: config[key] for key in SHARED_KEYS}
        if architecture == "mistral":
            made = MistralForCausalLM(MistralConfig(**config, sliding_window=None))
        else:  # transformers reads no size of the heads from a file, and takes this one
            made = Qwen3ForCausalLM(Qwen3Config(**config, head_dim=128))
            for name, weight in made.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    torch.nn.init.uniform_(weight, 0.5, 2)
        made.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3", "mistral"])
def test_the_file_read_back_is_the_merged_model(run_train, tmp_path, bases, architecture):
    run_dir = run_train(**SHORT, model__name_or_path=bases(architecture))
    trained = find_trained(run_dir)
    opened = load_trained(trained)
    merged, original = merge(load_unmerged(trained, opened, FULL_PRECISION)), opened.tokenizer
    exact, tokenizer = read_back(export(run_dir, tmp_path / "f16", "--quantize", "f16"))
    rounded, _ = read_back(export(run_dir, tmp_path / "q8"))

    assert exact.config.model_type == ("llama" if architecture == "mistral" else architecture)
    for name, tensor in merged.state_dict().items():  # f16 holds 11 bits
        torch.testing.assert_close(exact.state_dict()[name], tensor, rtol=2**-11, atol=1e-7, msg=name)
    prompt = original(PROMPT, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    answer = merged.eval().generate(prompt, **settings)
    assert torch.equal(exact.generate(prompt, **settings), answer)
    expected = log_probs(merged, answer)
    assert (log_probs(exact, answer) - expected).abs().max() < 0.02
    divergence = (expected.exp() * (expected - log_probs(rounded, answer))).sum(-1)
    assert divergence.mean() < 0.01  # nats per token; the base itself is two orders further away
    base_model = AutoModelForCausalLM.from_pretrained(
        find_trained(run_dir).config.model.name_or_path, dtype=torch.float32
    )
    from_base = (expected.exp() * (expected - log_probs(base_model.eval(), answer))).sum(-1)
    assert from_base.mean() > 0.1

    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"], text
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    for turns in (messages, messages[1:]):
        rendered = [
            asked.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            for asked in (tokenizer, original)
        ]
        assert rendered[0] == rendered[1]


def test_the_file_says_what_llama_cpp_asks_for(run_train, tmp_path, llama_dir):
    run_dir = run_train(**SHORT, model__name_or_path=llama_dir)
    reader = gguf.GGUFReader(export(run_dir, tmp_path / "out"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["llama.attention.head_count"] == 4
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["llama.rope.freq_base"] == 500.0
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    assert fields["llama.context_length"] == 256
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.padding_token_id"] == 2
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.chat_template"] == QWEN2_TEMPLATE
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]
    assert types[-5:] == [gguf.TokenType.UNUSED] * 5
    assert len(fields["tokenizer.ggml.tokens"]) == len(set(fields["tokenizer.ggml.tokens"])) == len(types)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == kinds["blk.1.attn_k.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"


def test_a_matrix_of_no_whole_blocks_is_f16(run_train, tmp_path, llama_dir):
    config = LlamaConfig.from_pretrained(llama_dir)
    config.intermediate_size = 72
    LlamaForCausalLM(config).save_pretrained(llama_dir)
    path = export(run_train(**SHORT, model__name_or_path=llama_dir), tmp_path / "out")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("splits", "name"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
        (
            [
                pre_tokenizers.Split(
                    Regex(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    "isolated",
                ),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "qwen2",
        ),
        (
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            None,
        ),
    ],
)
def test_how_text_is_split_is_known_by_llama_cpps_name_or_refused(splits, name):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = (
        splits[0] if len(splits) == 1 else pre_tokenizers.Sequence(splits)
    )
    assert _pre_tokenizer(tokenizer) == name
    assert (unsupported(LlamaConfig(), tokenizer) is None) == (name is not None)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert _pre_tokenizer(tokenizer) == name
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert _pre_tokenizer(tokenizer) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "biases"),
    ],
)
def test_another_architecture_is_refused_with_the_command_that_can(
    run_train, tmp_path, llama_dir, capsys, monkeypatch, change, words
):
    run_dir = run_train(**SHORT, model__name_or_path=llama_dir)
    config = LlamaConfig.from_pretrained(llama_dir)
    for key, value in change.items():
        setattr(config, key, value)
    config.save_pretrained(llama_dir)
    monkeypatch.setattr("finetune.commands.export.load_trained", None)  # no weights are loaded for this
    assert main(["export", str(run_dir), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert f"python -m finetune merge {run_dir} --output merged && " in error
    assert "convert_hf_to_gguf.py merged --outtype f16 --outfile merged.gguf" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_it_is_written_whole_or_not_at_all_and_over_nothing(run_train, tmp_path, capsys, monkeypatch):
    run_dir, output = run_train(**SHORT), tmp_path / "exports" / "out"
    write = gguf.GGUFWriter.write_tensor_data
    written = []

    def full_disk(self: gguf.GGUFWriter, tensor: object) -> None:
        written.append(tensor)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full_disk)
    assert main(["export", str(run_dir), "--output", str(output)]) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert list(output.parent.iterdir()) == []
    monkeypatch.undo()
    output.mkdir()  # an empty folder is as good as none
    export(run_dir, output)
    assert {path.name for path in output.iterdir()} == {"run-Q8_0.gguf", "Modelfile"}
    assert main(["export", str(run_dir), "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_commands_on_screen_are_those_of_this_adapter(run_train, tmp_path, capsys):
    run_dir = run_train(**SHORT, output_dir=tmp_path / "My Run", lora__r=12)
    output = tmp_path / "out"
    export(run_dir, output)
    shown = capsys.readouterr().out
    base = find_trained(run_dir).config.model.name_or_path
    assert f"ollama create my-run -f {output}/Modelfile && ollama run my-run" in shown
    modules = f"'my-run={run_dir}/adapter'"
    serve = f"vllm serve {base} --enable-lora --lora-modules {modules} --max-lora-rank 16"
    assert f"{serve} --max-model-len 1024\n" in shown
    assert "--jinja -c 1024 -m " in shown


@pytest.mark.parametrize(
    ("prompt", "system"),
    [
        (None, "You are a helpful assistant."),  # what the template renders by itself, as in training
        ('Say "no"\n\n  twice: "no"', 'Say "no"\n\n  twice: "no"'),
        ('"""', None),
        ("soft\u00a0space", None),
    ],
)
def test_the_modelfile_of_a_chatml_model(prompt, system):
    text, left_out = modelfile("x.gguf", tiny_tokenizer(), prompt, 8192)
    template = (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    )
    expected = (
        f'FROM ./x.gguf\nTEMPLATE """{template}"""\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 8192\n'
    )
    assert text == expected + (f'SYSTEM """{system}"""\n' if system else "")
    assert [remark.partition(":")[0] for remark in left_out] == ([] if system else ["SYSTEM"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}",
        QWEN2_TEMPLATE.replace("turn.content", "turn.content | trim"),  # nearly ChatML: it strips the text
        QWEN2_TEMPLATE.replace("<|im_end|>\n' }}{%- endfor", "<|im_end|>' }}{%- endfor"),  # no newline
        "{{ raise_exception('no') }}",
    ],
)
def test_another_chat_template_is_not_guessed(template):
    text, left_out = modelfile("x.gguf", tiny_tokenizer(template), "Be kind.", 512)
    assert template != QWEN2_TEMPLATE
    stops = 'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 512\n'
    assert text == f'FROM ./x.gguf\n{stops}SYSTEM """Be kind."""\n'
    assert [remark.partition(":")[0] for remark in left_out] == ["TEMPLATE"]


def test_the_starters_template_is_chatml(starter_dir):
    tokenizer = AutoTokenizer.from_pretrained(starter_dir)
    text, left_out = modelfile("x.gguf", tokenizer, None, 4096)
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    assert left_out == []
    assert unsupported(LlamaConfig.from_pretrained(starter_dir), tokenizer) is None
    assert _pre_tokenizer(tokenizer) == "smollm"
