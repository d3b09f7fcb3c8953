"""Fill a sharded base from its files: each process reads the rows of its own share, and nothing else.

For bases in 16 bits or fp32. `train.py` loads all of the base instead, to try the fast paths on it.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM


def empty_base(architecture: Any, dtype: torch.dtype) -> Any:
    """The frozen model of an architecture: its parameters on `meta`, its buffers in memory."""
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    base.tie_weights()
    return base.requires_grad_(False)


def read_shares(base: Any, folder: Path, device: torch.device) -> None:
    """Give the parameters of an `empty_base` that was sharded memory on the device, and their values.

    Raises:
        ValueError: the safetensors files of the folder lack a weight or have it in another shape.
    """
    base._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    missing = dict(base.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in missing.keys() & set(file.keys()):
                _read_rows(missing.pop(name), file.get_slice(name), name)
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, such as {min(missing)}")


@torch.no_grad()
def _read_rows(parameter: DTensor, rows: Any, name: str) -> None:
    """Copy this process's rows of a tensor in a file."""
    if list(parameter.shape) != rows.get_shape():
        raise ValueError(
            f"{name} is {rows.get_shape()} in its file, and {list(parameter.shape)} in the model"
        )
    share = parameter.to_local()
    # FSDP2 cuts as torch.chunk does: all shares have as many rows, but the last ones.
    start = parameter.device_mesh.get_local_rank() * -(-len(parameter) // parameter.device_mesh.size())
    if len(share) > 0:
        share.copy_(rows[start : start + len(share)])
