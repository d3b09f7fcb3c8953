"""Write a model and its tokenizer as one GGUF file, as llama.cpp's converter does, and read one back.

Keys and tensor names come from the `gguf` library, which llama.cpp's converter also uses. This module adds
what the converter itself does, for the architectures below with a byte-level BPE tokenizer.
"""

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_REGEX

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names of the architectures that transformers calls by these"""


def unsupported(config: Any, tokenizer: Any) -> str | None:
    """Return why `write_gguf` does not support a model, or None if it does.

    `config` is the model's transformers configuration.
    """
    if config.model_type not in ARCHITECTURES:
        return f"its architecture is {config.model_type}"
    if (rope := config.rope_parameters["rope_type"]) != "default":
        return f"its positions are scaled ({rope})"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    # Mistral's configuration has a window whenever it is not None; Qwen's may have one that is not used.
    if getattr(config, "use_sliding_window", config.model_type == "mistral") and config.sliding_window:
        return "its attention uses a sliding window"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "its linear layers have biases that the architecture does not define"
    if _pre_tokenizer(tokenizer) is None:
        return "its tokenizer does not split text as GPT-2's, SmolLM's or Qwen2's does"
    return None


def write_gguf(path: Path, model: Any, tokenizer: Any, name: str) -> None:
    """Write a causal language model for which `unsupported` returns None: matrices in fp16, vectors fp32."""
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_architecture(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for tensor_name, tensor in _tensors(model):
        dtype: Any = np.dtype(np.float32 if tensor.ndim == 1 else np.float16)
        writer.add_tensor_info(tensor_name, tensor.shape, dtype, tensor.numel() * dtype.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(model):  # one at a time: copies of all would double the memory
            array = _array(tensor)
            writer.write_tensor_data(array if array.ndim == 1 else array.astype(np.float16))
    finally:
        writer.close()


def read_gguf(path: Path, config: Any, device: torch.device) -> Any:
    """Load the weights of a GGUF file, dequantized to fp32, as a model of transformers on `device`.

    `config` is the model's own configuration: transformers does not read all of it from a GGUF file, such as
    the size of Qwen3's heads. An architecture that has another name in the file is read as that one.

    Raises:
        ValueError: transformers cannot read the architecture.
    """
    arguments = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    if ARCHITECTURES.get(config.model_type, config.model_type) == config.model_type:
        arguments["config"] = config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):  # from a base that was loaded from a GGUF file
            del config.quantization_config
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **arguments)
    except NotImplementedError as error:
        first_line = str(error).partition(". ")[0]
        raise ValueError(f"transformers does not read it from a GGUF file ({first_line})") from error
    return model.to(device).eval()


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().contiguous().numpy()
    return array


def _add_architecture(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights under llama.cpp's names.

    A head that shares its weight with the embeddings is left out: llama.cpp then uses that weight for both.
    """
    config = model.config
    llama_cpps_name = ARCHITECTURES[config.model_type]
    architecture = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == llama_cpps_name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tied and name == "lm_head.weight":
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        if llama_cpps_name == "llama" and name.endswith("q_proj.weight"):
            tensor = _interleave(tensor, config.num_attention_heads)
        if llama_cpps_name == "llama" and name.endswith("k_proj.weight"):
            tensor = _interleave(tensor, config.num_key_value_heads)
        yield gguf_name, tensor


def _interleave(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head for llama.cpp's rotary embedding. tensor [heads * head_dim, hidden_size]

    For the llama architecture, llama.cpp rotates pairs of adjacent rows. transformers rotates the first half
    of a head with the second.
    """
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, -1)
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    types = []
    for number in range(vocab_size):
        if number not in tokens:  # embeddings beyond the tokenizer's last token
            tokens[number] = f"[PAD{number}]"
            types.append(gguf.TokenType.UNUSED)
        elif number in added:
            special = added[number].special
            types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_token_list([tokens[number] for number in range(vocab_size)])
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        vocab = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    # Found by encoding a text: post-processors add these tokens in several different ways.
    ids = tokenizer("a")["input_ids"]
    vocab.add_special_token["bos"] = ids[0] == tokenizer.bos_token_id
    vocab.add_special_token["eos"] = ids[-1] == tokenizer.eos_token_id
    vocab.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(tokenizer: Any) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer, or None if it is not one of the three below."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE" or backend["model"].get("ignore_merges"):
        return None
    if (backend["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # llama.cpp passes over Qwen2's NFC
        return None
    splits = backend["pre_tokenizer"] or {}
    match splits.get("pretokenizers", [splits]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if regex == QWEN2_REGEX:
            return "qwen2"
    return None
