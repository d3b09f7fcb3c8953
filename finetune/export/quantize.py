"""Quantize a GGUF file of 16-bit weights with the `gguf` library, as `llama-quantize` would."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

BLOCK_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # what the library can quantize to
HEAD_TYPE = GGMLQuantizationType.Q8_0


def quantize(source: Path, target: Path, name: str) -> dict[str, str]:
    """Write `source` to `target` with its matrices in the type `name`, one of BLOCK_TYPES.

    Returns the type of each matrix that has another: the head, which is also the embeddings where a model has
    one weight for both, is in Q8_0 (llama-quantize takes Q6_K, which the library cannot write), and a matrix
    stays in 16 bits if its rows are not whole blocks of 32 weights. What is fp32 in `source` stays so.
    """
    reader = gguf.GGUFReader(source)
    fields = {field.name: field for field in reader.fields.values() if not field.name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    fields.pop("general.file_type")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"])
    for field in fields.values():
        kind, item_kind = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, item_kind)
    kinds = _kinds(reader, GGMLQuantizationType[name.upper()])
    for tensor in reader.tensors:
        kind = kinds[tensor.name]
        shape = [int(size) for size in reversed(tensor.shape)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        dtype: Any = np.uint8
        if kind == tensor.tensor_type:
            shape, dtype = tensor.data.shape, tensor.data.dtype
        else:
            shape = gguf.quant_shape_to_byte_shape(shape, kind)
        size = tensor.n_elements // block * block_bytes
        writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            kind, data = kinds[tensor.name], tensor.data
            if kind != tensor.tensor_type:
                data = gguf.quantize(gguf.dequantize(data, tensor.tensor_type), kind)
            writer.write_tensor_data(data)
    finally:
        writer.close()
    wanted = GGMLQuantizationType[name.upper()]
    return {
        tensor.name: kinds[tensor.name].name
        for tensor in reader.tensors
        if kinds[tensor.name] not in (wanted, GGMLQuantizationType.F32)
    }


def _kinds(reader: gguf.GGUFReader, wanted: GGMLQuantizationType) -> dict[str, GGMLQuantizationType]:
    """The type of each tensor in the new file."""
    names = {tensor.name for tensor in reader.tensors}
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    kinds = {}
    for tensor in reader.tensors:
        kind = HEAD_TYPE if tensor.name == head else wanted
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        stays = tensor.tensor_type == GGMLQuantizationType.F32 or tensor.shape[0] % block != 0
        kinds[tensor.name] = tensor.tensor_type if stays else kind
    return kinds
