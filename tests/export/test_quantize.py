"""A quantized GGUF file holds what the 16-bit one does, in the types that are said."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from finetune.export.quantize import BLOCK_TYPES, quantize


def write_halves(path: Path, tied: bool) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (40, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 72),
    }
    if not tied:
        shapes["output.weight"] = (40, 64)
    weights = {name: generator.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    weights["blk.0.ffn_gate_inp.weight"] = generator.normal(size=(4, 64)).astype(np.float32)
    weights["output_norm.weight"] = generator.normal(size=64).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_token_list(["<a>", "b", "é"])
    writer.add_token_types([gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.NORMAL])
    writer.add_rope_freq_base(500.0)
    writer.add_add_bos_token(False)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_matrices_are_rounded_and_all_else_is_kept(tmp_path, name, tied):
    weights = write_halves(tmp_path / "f16.gguf", tied)
    others = quantize(tmp_path / "f16.gguf", tmp_path / "small.gguf", name)
    before, after = (gguf.GGUFReader(tmp_path / file) for file in ("f16.gguf", "small.gguf"))

    fields = [
        {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        for reader in (before, after)
    ]
    assert fields[1].pop("general.file_type") == gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]
    del fields[0]["general.file_type"]
    assert fields[0] == fields[1]

    head = "token_embd.weight" if tied else "output.weight"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in after.tensors}
    assert kinds.pop(head) == "Q8_0"
    assert kinds.pop("blk.0.ffn_down.weight") == "F16"  # its rows are no whole blocks
    assert {kinds.pop("blk.0.ffn_gate_inp.weight"), kinds.pop("output_norm.weight")} == {"F32"}
    assert set(kinds.values()) == {name.upper()}
    expected = {head: "Q8_0", "blk.0.ffn_down.weight": "F16"}
    assert others == {key: kind for key, kind in expected.items() if kind != name.upper()}

    steps = {"q4_0": 8, "q4_1": 8, "q5_0": 16, "q5_1": 16, "q8_0": 127}  # on either side of zero
    for tensor in after.tensors:
        weight = weights[tensor.name].astype(np.float32)
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type.name.startswith("F"):
            assert np.array_equal(found, weight)
        else:
            step = np.abs(weight).max() / steps[tensor.tensor_type.name.lower()]
            assert np.abs(found - weight).max() <= 1.01 * step  # Q4_0 clips at the end of the range
            assert not np.array_equal(found, weight)
