"""A card where there is none: fake tensors on "cuda" that go forward and backward in a CPU build of torch.

    import fake_card
    fake_card.insert()  # before the first import of torch
    import torch
    fake_card.pretend()

Fake tensors have a shape, a type and a device, but no memory, and nothing is computed. All that the program
decides by asking for a card (which kernels, which precision) is then decided as on an RTX 3060.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
CAPABILITY = (8, 6)
MEMORY = 12 * 2**30


def insert() -> None:
    """Compile `fake_card.cpp` and load it into this process. A torch built for CUDA needs none of it.

    Raises:
        RuntimeError: torch is already imported, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("a fake card has to be inserted before torch is imported")
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    torch_dir = Path(found.origin).parent
    if next(torch_dir.glob("lib/libtorch_cuda.*"), None) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_card.so"
        _compile(torch_dir, library)
        # With RTLD_GLOBAL, its functions are found before torch's own.
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _compile(torch_dir: Path, library: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("a fake card needs a C++ compiler: install g++")
    flags = ["-O1", "-std=c++20", "-fPIC", "-shared", f"-I{torch_dir / 'include'}"]
    libraries = [f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_dir / 'lib'}"]
    subprocess.run([compiler, *flags, str(SOURCE), *libraries, "-o", str(library)], check=True)


def pretend() -> None:
    """Have torch.cuda answer for the fake card in the rest of this process."""
    import bitsandbytes as bnb
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from triton.runtime.jit import JITFunction

    properties = SimpleNamespace(
        name="fake card", total_memory=MEMORY, major=CAPABILITY[0], minor=CAPABILITY[1],
        multi_processor_count=28, warp_size=32,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": CAPABILITY,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_allocated": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "synchronize": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    # Fake tensors have no addresses, but the program asks which of them lie in one piece of memory.
    torch.UntypedStorage.data_ptr = lambda storage: storage._cdata
    FakeTensor.data_ptr = lambda tensor: (
        tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()
    )
    FakeTensor.tolist = _tolist
    # torch.tensor(numbers, device="cuda") makes the tensor on the CPU, and moves it where the move is seen.
    torch._C._set_only_lift_cpu_tensors(True)
    # On a card, torch takes lists of plain tensors in one operation.
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    JITFunction.run = lambda *_, **__: None  # Triton's kernels have nothing to compute
    # Fake parameters cannot change places; all modules are made on the card.
    torch.nn.Module.to = lambda module, *_, **__: module
    # Paged state lies in the host's memory, and moving pages is no operation on tensors.
    bnb.functional.get_paged = _paged
    bnb.functional.fill = lambda *_, **__: None
    bnb.functional.prefetch_tensor = lambda *_, **__: None


def _tolist(tensor: Any) -> Any:
    """The whole tensor comes to the host in one copy, as on a card."""
    tensor = tensor.cpu()
    return tensor.item() if tensor.dim() == 0 else [_tolist(row) for row in tensor.unbind()]


def _paged(*shape: int, dtype: Any, device: Any) -> Any:
    import torch

    tensor = torch.zeros(shape, dtype=dtype)
    tensor.is_paged, tensor.page_deviceid = True, device.index  # type: ignore[attr-defined]
    return tensor
